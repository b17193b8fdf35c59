//! Which kernel waits beside an instance, as its standby.

use std::collections::BTreeSet;
use std::path::Path;
use std::str::FromStr;
use std::sync::{Mutex, PoisonError};

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Longest path, as Linux has it.
const LONGEST: usize = 4096;

/// A kernel that is started beside an instance and waits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Standby {
    /// There is none.
    #[default]
    Off,
    /// The kernel image the instance runs.
    Same,
    /// This kernel image.
    Kernel(Image),
}

/// The path of a kernel image. Policies are copied a lot: the text of each path there ever was is kept once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Image(&'static str);

static PATHS: Mutex<BTreeSet<&'static str>> = Mutex::new(BTreeSet::new());

impl Image {
    fn new(path: &str) -> Image {
        // Every change is one insert, so a panic elsewhere left it whole.
        let mut paths = PATHS.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = paths.get(path) {
            return Image(known);
        }
        let kept: &'static str = Box::leak(path.to_owned().into_boxed_str());
        paths.insert(kept);
        Image(kept)
    }

    /// The path.
    pub fn path(self) -> &'static Path {
        Path::new(self.0)
    }
}

impl std::fmt::Display for Standby {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Standby::Off => "off",
            Standby::Same => "same",
            Standby::Kernel(Image(path)) => path,
        })
    }
}

/// It is none of the words and no absolute path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("neither off nor same nor an absolute path")]
pub struct NoStandby;

impl FromStr for Standby {
    type Err = NoStandby;

    fn from_str(text: &str) -> Result<Standby, NoStandby> {
        match text {
            // YAML 1.1 knows them all.
            "off" | "false" | "no" | "disabled" => Ok(Standby::Off),
            "same" => Ok(Standby::Same),
            path if path.starts_with('/') && path.len() < LONGEST && !path.contains(char::is_control) => {
                Ok(Standby::Kernel(Image::new(path)))
            }
            _ => Err(NoStandby),
        }
    }
}

impl Serialize for Standby {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Standby {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Standby, D::Error> {
        String::deserialize(d)?.parse().map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use serde::de::IntoDeserializer;
    use serde::de::value::{Error, StrDeserializer};

    use super::*;

    #[test]
    fn words_and_paths_and_nothing_else() {
        for text in ["off", "same", "/boot/vmlinuz-6.12"] {
            let read: Standby = text.parse().unwrap();
            assert_eq!(read.to_string(), text);
            let plain: StrDeserializer<'_, Error> = text.into_deserializer();
            assert_eq!(Standby::deserialize(plain).unwrap(), read);
        }
        assert_eq!("/a".parse::<Standby>(), "/a".parse::<Standby>());
        assert_ne!("/a".parse::<Standby>(), "/b".parse::<Standby>());
        for text in ["", "vmlinuz", "on", "/boot/\n", &format!("/{}", "x".repeat(LONGEST))] {
            assert_eq!(text.parse::<Standby>(), Err(NoStandby), "{text:?}");
        }
    }
}
