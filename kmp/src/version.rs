//! Which version two sides speak.

use std::fmt;

/// An inclusive range of protocol versions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Versions {
    /// Oldest.
    pub min: u16,
    /// Newest.
    pub max: u16,
}

impl Versions {
    /// What this crate speaks: the current version and the one before.
    pub const OURS: Versions = Versions { min: crate::MIN_VERSION, max: crate::VERSION };

    /// Whether `version` is in the range.
    pub fn contains(self, version: u16) -> bool {
        self.min <= version && version <= self.max
    }
}

impl fmt::Display for Versions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.min == self.max {
            write!(f, "{}", self.max)
        } else {
            write!(f, "{} to {}", self.min, self.max)
        }
    }
}

/// The two sides have no version in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no common KMP version: this side speaks {ours}, the other side {theirs}; upgrade the older one")]
pub struct VersionError {
    /// This side.
    pub ours: Versions,
    /// The other side.
    pub theirs: Versions,
}

/// The newest version both sides speak.
pub fn negotiate(ours: Versions, theirs: Versions) -> Result<u16, VersionError> {
    let version = ours.max.min(theirs.max);
    if ours.contains(version) && theirs.contains(version) {
        Ok(version)
    } else {
        Err(VersionError { ours, theirs })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn v(min: u16, max: u16) -> Versions {
        Versions { min, max }
    }

    #[test]
    fn current_and_previous_are_spoken_older_is_refused_with_both_in_the_text() {
        assert_eq!(negotiate(v(4, 5), v(4, 5)), Ok(5));
        assert_eq!(negotiate(v(4, 5), v(3, 4)), Ok(4));
        assert_eq!(negotiate(v(4, 5), v(5, 6)), Ok(5));
        let error = negotiate(v(4, 5), v(2, 3)).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("4 to 5") && text.contains("2 to 3"), "{text}");
        assert!(negotiate(v(4, 5), v(6, 7)).is_err());
        assert!(
            negotiate(v(4, 5), v(5, 4)).is_err_and(|e| e.theirs == v(5, 4)),
            "an empty range has no version"
        );
    }

    proptest! {
        #[test]
        fn both_sides_reach_the_same_answer(a in 1u16..9, b in 0u16..3, c in 1u16..9, d in 0u16..3) {
            let (x, y) = (v(a, a + b), v(c, c + d));
            prop_assert_eq!(negotiate(x, y).ok(), negotiate(y, x).ok());
            let best = (1..12).filter(|&n| x.contains(n) && y.contains(n)).max();
            prop_assert_eq!(negotiate(x, y).ok(), best);
        }
    }
}
