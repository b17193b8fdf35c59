//! Sizes, ranges and times as people write them.

use std::path::PathBuf;
use std::time::Duration;

use kmorph_platform::MemoryRange;

fn bytes(text: &str) -> Option<u64> {
    let text = text.trim();
    let at = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let number: u64 = text[..at].parse().ok()?;
    let shift = match text[at..].trim() {
        "" => 0,
        "K" | "KiB" | "k" => 10,
        "M" | "MiB" => 20,
        "G" | "GiB" => 30,
        _ => return None,
    };
    number.checked_mul(1 << shift)
}

/// Bytes, written like `256M`.
pub(crate) fn size(text: &str) -> Result<u64, String> {
    bytes(text).ok_or_else(|| format!("{text:?} is not a size; write 256M, 2G or a number of bytes"))
}

/// Bytes between two bounds, whole pages.
pub(crate) fn pages(min: u64, max: u64, or_zero: bool) -> impl Fn(&str) -> Result<u64, String> {
    move |text| {
        let value = size(text)?;
        let fits = (min..=max).contains(&value) && value.is_multiple_of(4096);
        if fits || (or_zero && value == 0) {
            return Ok(value);
        }
        let zero = if or_zero { "0, or " } else { "" };
        Err(format!(
            "{text:?} is not possible; allowed: {zero}{} to {}, in whole pages",
            show_size(min),
            show_size(max)
        ))
    }
}

/// A time, written like `1s` or `10ms`; a plain number is seconds.
pub(crate) fn time(min: Duration, max: Duration) -> impl Fn(&str) -> Result<Duration, String> {
    move |text| {
        let value = match text.trim().parse::<f64>() {
            Ok(seconds) => Duration::try_from_secs_f64(seconds).ok(),
            Err(_) => humantime::parse_duration(text).ok(),
        };
        value.filter(|t| (min..=max).contains(t)).ok_or_else(|| {
            format!("{text:?} is not possible; allowed: a time from {} to {}", show_time(min), show_time(max))
        })
    }
}

/// A number between two bounds.
pub(crate) fn number<T>(min: T, max: T) -> impl Fn(&str) -> Result<T, String>
where
    T: std::str::FromStr + PartialOrd + std::fmt::Display,
{
    move |text| match text.trim().parse::<T>() {
        Ok(n) if n >= min && n <= max => Ok(n),
        _ => Err(format!("{text:?} is not possible; allowed: a number from {min} to {max}")),
    }
}

/// A range of memory, written as on a kernel command line: `512M$0x40000000`.
pub(crate) fn range(text: &str) -> Result<MemoryRange, String> {
    let parse = || {
        let (size, base) = text.split_once('$')?;
        let base = match base.trim().strip_prefix("0x") {
            Some(hex) => u64::from_str_radix(hex, 16).ok()?,
            None => bytes(base)?,
        };
        let size = bytes(size)?;
        (size > 0 && base.checked_add(size).is_some()).then_some(MemoryRange { base, size })
    };
    parse().ok_or_else(|| format!("{text:?} is not a memory range; write size$base, as 512M$0x40000000"))
}

/// An absolute path: the daemon has no folder of its own.
pub(crate) fn path(text: &str) -> Result<PathBuf, String> {
    let path = PathBuf::from(text);
    if path.is_absolute() { Ok(path) } else { Err(format!("{text:?} is not an absolute path")) }
}

/// A name out of a list.
pub(crate) fn choice<T: Copy>(all: &'static [(&'static str, T)]) -> impl Fn(&str) -> Result<T, String> {
    move |text| {
        all.iter().find(|(name, _)| *name == text).map(|(_, value)| *value).ok_or_else(|| {
            let names: Vec<&str> = all.iter().map(|(name, _)| *name).collect();
            format!("{text:?} is not possible; allowed: {}", names.join(", "))
        })
    }
}

pub(crate) fn show_size(bytes: u64) -> String {
    [(30, "G"), (20, "M"), (10, "K")]
        .into_iter()
        .find(|(shift, _)| bytes > 0 && bytes.is_multiple_of(1 << shift))
        .map_or_else(|| bytes.to_string(), |(shift, unit)| format!("{}{unit}", bytes >> shift))
}

pub(crate) fn show_time(time: Duration) -> String {
    humantime::format_duration(time).to_string()
}

pub(crate) fn show_range(range: &MemoryRange) -> String {
    format!("{}${:#x}", show_size(range.size), range.base)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes_and_ranges() {
        assert_eq!(size("16M"), Ok(16 << 20));
        assert_eq!(range("512M$0x40000000"), Ok(MemoryRange { base: 0x4000_0000, size: 512 << 20 }));
        assert_eq!(range("1G$4G"), Ok(MemoryRange { base: 4 << 30, size: 1 << 30 }));
        for bad in ["lots", "-1", "1T", "99999999999999999999", ""] {
            assert!(size(bad).unwrap_err().contains("256M"), "{bad}");
        }
        assert!(range("0$0x1000").is_err() && range("1G").is_err());
        assert!(pages(1 << 20, 1 << 30, false)("0").is_err());
        assert_eq!(pages(1 << 20, 1 << 30, true)("0"), Ok(0));
    }

    proptest! {
        #[test]
        fn what_is_shown_is_read_back(bytes in any::<u64>(), ms in 0u64..86_400_000) {
            prop_assert_eq!(size(&show_size(bytes)), Ok(bytes));
            let t = Duration::from_millis(ms);
            prop_assert_eq!(time(Duration::ZERO, Duration::MAX)(&show_time(t)), Ok(t));
        }
    }
}
