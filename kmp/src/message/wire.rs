//! Helpers of the payload encoding.

use bytes::Bytes;
use serde::de::{DeserializeOwned, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::MessageError;

/// Deepest nesting a payload may have; ours need 4.
const MAX_DEPTH: usize = 32;

/// Read a whole payload; an empty one is all defaults.
pub(super) fn read<T: DeserializeOwned + Default>(
    name: &'static str,
    payload: &[u8],
) -> Result<T, MessageError> {
    if payload.is_empty() {
        return Ok(T::default());
    }
    let error = |detail: String| MessageError::Payload { name, detail };
    let mut d = rmp_serde::Deserializer::new(payload);
    d.set_max_depth(MAX_DEPTH);
    let value = T::deserialize(&mut d).map_err(|e| error(e.to_string()))?;
    match d.get_ref().len() {
        0 => Ok(value),
        n => Err(error(format!("{n} bytes follow the map of {} bytes", payload.len() - n))),
    }
}

/// Bytes that MessagePack carries as `bin`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Blob(pub Bytes);

impl From<Vec<u8>> for Blob {
    fn from(v: Vec<u8>) -> Blob {
        Blob(v.into())
    }
}

impl Serialize for Blob {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_bytes(&self.0)
    }
}

impl<'de> Deserialize<'de> for Blob {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Blob, D::Error> {
        struct BlobVisitor;
        impl<'de> Visitor<'de> for BlobVisitor {
            type Value = Blob;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("bytes")
            }
            fn visit_bytes<E>(self, v: &[u8]) -> Result<Blob, E> {
                Ok(Blob(Bytes::copy_from_slice(v)))
            }
            fn visit_byte_buf<E>(self, v: Vec<u8>) -> Result<Blob, E> {
                Ok(Blob(v.into()))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Blob, A::Error> {
                let mut v = Vec::new();
                while let Some(byte) = seq.next_element()? {
                    v.push(byte);
                }
                Ok(Blob(v.into()))
            }
        }
        d.deserialize_bytes(BlobVisitor)
    }
}

/// Fields that are usually 0 are left out: they cost nothing then, and an older reader never sees them.
pub(super) fn is_zero<T: Default + PartialEq>(v: &T) -> bool {
    *v == T::default()
}

/// Figures that need no double precision travel as 32-bit floats: a heartbeat fits one interrupt.
pub(super) mod short {
    use serde::{Deserialize, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(v: &f64, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_f32(*v as f32)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<f64, D::Error> {
        f64::deserialize(d)
    }
}

/// [`short`] for optional figures.
pub(super) mod short_option {
    use serde::{Deserialize, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(v: &Option<f64>, s: S) -> Result<S::Ok, S::Error> {
        match v {
            Some(v) => s.serialize_f32(*v as f32),
            None => s.serialize_none(),
        }
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Option<f64>, D::Error> {
        Option::<f64>::deserialize(d)
    }
}
