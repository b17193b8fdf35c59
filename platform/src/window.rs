//! What every platform asks of a window before it makes or closes one.

use crate::{InstanceId, PlatformError, WINDOW};

/// Windows are whole multiples of this.
const ALIGN: u64 = 2 << 20;

/// A key of a window, not one of an instance's handover memory.
pub fn check_key(key: u64) -> Result<(), PlatformError> {
    if key & WINDOW != 0 {
        return Ok(());
    }
    Err(PlatformError::Invalid(format!(
        "{key:#x} is no key of a window: its highest bit is not set; add {WINDOW:#x} to it"
    )))
}

/// Everything about a window that can be wrong whatever the machine is.
pub fn check(key: u64, size: u64, from: InstanceId, to: InstanceId) -> Result<(), PlatformError> {
    check_key(key)?;
    if size == 0 || !size.is_multiple_of(ALIGN) {
        return Err(PlatformError::Invalid(format!(
            "window {key:#x} of {size} bytes: give it a size of whole {} MiB",
            ALIGN >> 20
        )));
    }
    if from == to {
        return Err(PlatformError::Invalid(format!(
            "window {key:#x} from instance {from} to itself: name the other kernel's instance as the reader"
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_a_window_is_told() {
        const MIB: u64 = 1 << 20;
        let cases = [
            (WINDOW, 2 * MIB, 1, 2, None),
            (WINDOW | 7, 64 * MIB, 2, 1, None),
            (u64::MAX, 0u64.wrapping_sub(2 * MIB), 1, 2, None),
            (7, 2 * MIB, 1, 2, Some("0x7 is no key of a window")),
            (0, 2 * MIB, 1, 2, Some("add 0x8000000000000000")),
            (WINDOW >> 1, 2 * MIB, 1, 2, Some("highest bit")),
            (WINDOW | 7, 0, 1, 2, Some("of 0 bytes: give it a size of whole 2 MiB")),
            (WINDOW | 7, MIB, 1, 2, Some("window 0x8000000000000007")),
            (WINDOW | 7, 2 * MIB + 4096, 1, 2, Some("2101248 bytes")),
            (WINDOW | 7, u64::MAX, 1, 2, Some("whole 2 MiB")),
            (WINDOW | 7, 2 * MIB, 3, 3, Some("instance 3 to itself")),
        ];
        for (key, size, from, to, want) in cases {
            let got = check(key, size, InstanceId(from), InstanceId(to));
            match (want, &got) {
                (None, Ok(())) => {}
                (Some(want), Err(PlatformError::Invalid(text))) if text.contains(want) => {}
                _ => panic!("key {key:#x}, size {size:#x}, from {from} to {to}: {got:?}, not {want:?}"),
            }
        }
    }
}
