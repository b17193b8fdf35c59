//! Placing regions in the pool.

use super::layout::REGION_ALIGN;
use crate::{MemoryRange, PlatformError};

/// Find `size` bytes for a region: at `fixed` when the definition demands it, else first fit.
pub fn place(
    pool: &[MemoryRange],
    used: &[MemoryRange],
    size: u64,
    fixed: Option<u64>,
) -> Result<MemoryRange, PlatformError> {
    if size == 0 {
        return Err(PlatformError::Invalid("an instance needs memory; memory-bytes is 0".into()));
    }
    if let Some(base) = fixed {
        let want = MemoryRange { base, size };
        if base.checked_add(size).is_none() || !pool.iter().any(|p| p.base <= base && want.end() <= p.end()) {
            return Err(PlatformError::Invalid(format!(
                "memory {base:#x}+{size:#x} is not inside the pool ({}); change memory-base or extend the pool",
                describe(pool)
            )));
        }
        return match used.iter().find(|u| u.overlaps(&want)) {
            Some(u) => Err(PlatformError::Busy(format!(
                "memory {base:#x}+{size:#x} overlaps {:#x}+{:#x}, which is in use",
                u.base, u.size
            ))),
            None => Ok(want),
        };
    }
    lowest(pool, used, size, REGION_ALIGN).ok_or_else(|| full(pool, used, size))
}

/// The same for what is no region: at the upper end of the pool, so that regions find whole memory blocks below.
pub fn place_high(
    pool: &[MemoryRange],
    used: &[MemoryRange],
    size: u64,
) -> Result<MemoryRange, PlatformError> {
    let mut sorted = pool.to_vec();
    sorted.sort_by_key(|r| std::cmp::Reverse(r.base));
    for range in &sorted {
        let mut end = range.end();
        while let Some(base) =
            end.checked_sub(size).map(|b| b & !(REGION_ALIGN - 1)).filter(|b| *b >= range.base)
        {
            let want = MemoryRange { base, size };
            match used.iter().filter(|u| u.overlaps(&want)).map(|u| u.base).min() {
                None => return Ok(want),
                Some(base) => end = base,
            }
        }
    }
    Err(full(pool, used, size))
}

/// Free memory of `total` bytes in whole blocks, in as few pieces as possible; less when there is not more, or when it
/// would be more than `most` pieces.
pub fn pieces(
    pool: &[MemoryRange],
    used: &[MemoryRange],
    total: u64,
    block: u64,
    most: usize,
) -> Vec<MemoryRange> {
    let (mut used, mut found) = (used.to_vec(), vec![]);
    let mut left = total / block;
    let mut size = left;
    while size > 0 && found.len() < most {
        match lowest(pool, &used, size * block, block) {
            Some(piece) => {
                used.push(piece);
                found.push(piece);
                left -= size;
                size = size.min(left);
            }
            None => size -= 1,
        }
    }
    found
}

fn lowest(pool: &[MemoryRange], used: &[MemoryRange], size: u64, align: u64) -> Option<MemoryRange> {
    let mut sorted = pool.to_vec();
    sorted.sort_by_key(|r| r.base);
    for range in &sorted {
        let mut at = range.base.next_multiple_of(align);
        while at.checked_add(size).is_some_and(|end| end <= range.end()) {
            let want = MemoryRange { base: at, size };
            match used.iter().filter(|u| u.overlaps(&want)).map(MemoryRange::end).max() {
                None => return Some(want),
                Some(end) => at = end.next_multiple_of(align),
            }
        }
    }
    None
}

fn full(pool: &[MemoryRange], used: &[MemoryRange], size: u64) -> PlatformError {
    let total: u64 = pool.iter().map(|r| r.size).sum();
    let taken: u64 = used.iter().map(|r| r.size).sum();
    PlatformError::Busy(format!(
        "no {} MiB of contiguous memory are free in the pool ({} MiB, {} MiB of it used); terminate an instance or extend \
         the pool",
        size >> 20,
        total >> 20,
        taken >> 20
    ))
}

fn describe(pool: &[MemoryRange]) -> String {
    if pool.is_empty() {
        return "which is empty".into();
    }
    pool.iter()
        .map(|r| format!("{:#x}-{:#x}", r.base, r.end().saturating_sub(1)))
        .collect::<Vec<_>>()
        .join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const M: u64 = 1 << 20;

    #[test]
    fn fills_gaps_first() {
        let pool = [MemoryRange { base: 1024 * M, size: 512 * M }];
        let used =
            [MemoryRange { base: 1024 * M, size: 128 * M }, MemoryRange { base: 1280 * M, size: 128 * M }];
        assert_eq!(place(&pool, &used, 128 * M, None).unwrap().base, 1152 * M);
        assert_eq!(place(&pool, &used, 127 * M, None).unwrap().base, 1152 * M);
        let text = place(&pool, &used, 129 * M, None).unwrap_err().to_string();
        assert!(text.contains("129 MiB"), "{text}");
    }

    #[test]
    fn fixed_places_are_checked() {
        let pool = [MemoryRange { base: 1024 * M, size: 512 * M }];
        let used = [MemoryRange { base: 1024 * M, size: 128 * M }];
        assert_eq!(place(&pool, &used, M, Some(1152 * M)).unwrap().base, 1152 * M);
        assert!(matches!(place(&pool, &used, M, Some(1151 * M)), Err(PlatformError::Busy(_))));
        assert!(matches!(place(&pool, &used, 513 * M, Some(1024 * M)), Err(PlatformError::Invalid(_))));
        assert!(matches!(place(&pool, &used, u64::MAX, Some(1024 * M)), Err(PlatformError::Invalid(_))));
        assert!(matches!(place(&[], &[], M, None), Err(PlatformError::Busy(_))));
    }

    #[test]
    fn what_is_no_region_lies_at_the_upper_end() {
        let pool =
            [MemoryRange { base: 1024 * M, size: 512 * M }, MemoryRange { base: 4096 * M, size: 256 * M }];
        let mut used = vec![];
        let bases: Vec<u64> = (0..3)
            .map(|_| {
                let r = place_high(&pool, &used, 100 * M).unwrap();
                used.push(r);
                r.base / M
            })
            .collect();
        assert_eq!(bases, [4252, 4152, 1436]);
        assert!(place_high(&pool, &used, 413 * M).is_err());
        assert!(place_high(&[], &[], M).is_err());
    }

    #[test]
    fn pieces_are_whole_blocks_and_few() {
        let pool = [MemoryRange { base: 1000 * M, size: 1024 * M }];
        let used = [MemoryRange { base: 1280 * M, size: 2 * M }, MemoryRange { base: 1800 * M, size: 2 * M }];
        let got = |total: u64, most| -> Vec<(u64, u64)> {
            pieces(&pool, &used, total * M, 128 * M, most).iter().map(|r| (r.base / M, r.size / M)).collect()
        };
        assert_eq!(got(256, 8), [(1024, 256)]);
        assert_eq!(got(384, 8), [(1408, 384)]);
        assert_eq!(got(640, 8), [(1408, 384), (1024, 256)]);
        assert_eq!(got(640, 1), [(1408, 384)]);
        assert_eq!(got(100, 8), []);
        // No more than there is.
        assert_eq!(got(4096, 8), [(1408, 384), (1024, 256)]);
    }

    proptest! {
        #[test]
        fn never_overlaps_and_stays_inside(sizes in proptest::collection::vec(1u64..64, 1..40)) {
            let pool = [
                MemoryRange { base: 100 * M, size: 300 * M },
                MemoryRange { base: 4096 * M, size: 300 * M },
            ];
            let mut used: Vec<MemoryRange> = Vec::new();
            for s in sizes {
                if let Ok(r) = place(&pool, &used, s * M, None) {
                    prop_assert!(pool.iter().any(|p| p.base <= r.base && r.end() <= p.end()));
                    prop_assert!(used.iter().all(|u| !u.overlaps(&r)));
                    prop_assert_eq!(r.base % REGION_ALIGN, 0);
                    used.push(r);
                }
            }
        }
    }
}
