//! The typed model of an instance.

use serde::{Deserialize, Serialize};

use crate::{KerfError, Node, Tree};

/// Instance ids of the multikernel ABI.
const IDS: std::ops::RangeInclusive<u32> = 1..=511;
const PAGE: u64 = 4096;
const MAX_NAME: usize = 63;

/// An instance as it is defined.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Instance {
    /// Name: letters, digits, '-', '_' and '.', unique.
    pub name: String,
    /// 1 to 511, unique.
    pub id: u16,
    /// Physical CPU ids, in order; the first one boots.
    pub cpus: Vec<u32>,
    /// Memory in bytes, a multiple of the page size.
    pub memory_bytes: u64,
    /// Where it must lie, when the definition says so.
    pub memory_base: Option<u64>,
    /// File it was read from.
    pub file: String,
}

/// Whether a name may be an instance's (and so a file's) name.
pub(crate) fn name_is_valid(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= MAX_NAME
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
}

struct At<'a> {
    file: &'a str,
    path: String,
    node: &'a Node,
}

impl<'a> At<'a> {
    fn child(&self, name: &str) -> Option<At<'a>> {
        let node = self.node.child(name)?;
        Some(At { file: self.file, path: format!("{}/{}", self.path.trim_end_matches('/'), node.name), node })
    }

    fn error(&self, property: &str, message: impl Into<String>) -> KerfError {
        KerfError::Property {
            file: self.file.into(),
            node: self.path.clone(),
            property: property.into(),
            message: message.into(),
        }
    }

    fn bytes(&self, property: &str) -> Option<&'a [u8]> {
        self.node.property(property)
    }

    fn text(&self, property: &str) -> Result<Option<String>, KerfError> {
        let Some(v) = self.bytes(property) else { return Ok(None) };
        let text = v.strip_suffix(&[0]).and_then(|v| std::str::from_utf8(v).ok());
        match text {
            Some(t) if !t.contains('\0') => Ok(Some(t.into())),
            _ => Err(self.error(property, "is not one string")),
        }
    }

    /// One number of one or two cells.
    fn number(&self, property: &str) -> Result<Option<u64>, KerfError> {
        let Some(v) = self.bytes(property) else { return Ok(None) };
        match cells(v).as_slice() {
            [n] => Ok(Some(u64::from(*n))),
            [high, low] => Ok(Some(u64::from(*high) << 32 | u64::from(*low))),
            _ => Err(self.error(property, format!("has {} bytes; a number has 4 or 8", v.len()))),
        }
    }

    /// CPU ids: u64 each when the length allows it, else u32 (older trees).
    fn cpus(&self) -> Result<Vec<u32>, KerfError> {
        const NAME: &str = "cpus";
        let v = self
            .bytes(NAME)
            .ok_or_else(|| self.error(NAME, "is missing; give the physical CPU ids, as <0x0 0x2 ...>"))?;
        if v.is_empty() || v.len() % 4 != 0 {
            return Err(self
                .error(NAME, format!("has {} bytes; it needs one or more cells of 4 or 8 bytes", v.len())));
        }
        let cells = cells(v);
        let ids: Vec<u64> = if v.len() % 8 == 0 {
            cells.chunks(2).map(|c| u64::from(c[0]) << 32 | u64::from(c[1])).collect()
        } else {
            cells.into_iter().map(u64::from).collect()
        };
        let mut out = Vec::with_capacity(ids.len());
        for id in ids {
            let id = u32::try_from(id).map_err(|_| {
                self.error(
                    NAME,
                    format!("{id:#x} is not a CPU id; ids have 32 bits (cells are 64-bit pairs)"),
                )
            })?;
            if out.contains(&id) {
                return Err(self.error(NAME, format!("CPU {id} is listed twice")));
            }
            out.push(id);
        }
        Ok(out)
    }
}

fn cells(value: &[u8]) -> Vec<u32> {
    value.chunks_exact(4).filter_map(|c| c.try_into().ok().map(u32::from_be_bytes)).collect()
}

/// All instances a tree defines: the root itself, or the children of `/instances`.
pub fn instances_of(tree: &Tree) -> Result<Vec<Instance>, KerfError> {
    let root = At { file: &tree.file, path: "/".into(), node: &tree.root };
    if let Some(list) = root.child("instances") {
        return list
            .node
            .children
            .iter()
            .map(|c| {
                let at = At { file: &tree.file, path: format!("/instances/{}", c.name), node: c };
                one(&at, c.base_name().into())
            })
            .collect();
    }
    let name = root.text("model")?.ok_or_else(|| {
        root.error("model", "is missing; it names the instance (or give an /instances node)")
    })?;
    Ok(vec![one(&root, name)?])
}

fn one(at: &At<'_>, name: String) -> Result<Instance, KerfError> {
    if !name_is_valid(&name) {
        return Err(at.error(
            "name",
            format!("{name:?} is no instance name; use up to {MAX_NAME} letters, digits, '-', '_' and '.', a letter or digit first"),
        ));
    }
    let id =
        at.number("id")?.ok_or_else(|| at.error("id", "is missing; instances have ids from 1 to 511"))?;
    let id = u32::try_from(id)
        .ok()
        .filter(|i| IDS.contains(i))
        .and_then(|i| u16::try_from(i).ok())
        .ok_or_else(|| {
            at.error(
                "id",
                format!("{id} is out of range; instances have ids from 1 to 511 (0 is the primary kernel)"),
            )
        })?;
    let resources = at
        .child("resources")
        .ok_or_else(|| at.error("resources", "the node is missing; it holds cpus and memory-bytes"))?;
    let (memory_base, memory_bytes) = memory(&resources)?;
    Ok(Instance { name, id, cpus: resources.cpus()?, memory_bytes, memory_base, file: at.file.into() })
}

/// `memory-bytes` with an optional `memory-base`, or one `memory@N { reg = <base size>; }`.
fn memory(at: &At<'_>) -> Result<(Option<u64>, u64), KerfError> {
    let (place, base, bytes) = match (at.number("memory-bytes")?, at.child("memory")) {
        (Some(bytes), _) => ("memory-bytes", at.number("memory-base")?, bytes),
        (None, Some(node)) => {
            let reg = node.bytes("reg").map(cells);
            match reg.as_deref() {
                Some([bh, bl, sh, sl]) => (
                    "memory/reg",
                    Some(u64::from(*bh) << 32 | u64::from(*bl)),
                    u64::from(*sh) << 32 | u64::from(*sl),
                ),
                Some(other) => {
                    return Err(node.error(
                        "reg",
                        format!("has {} cells; a base and a size of two cells each make four", other.len()),
                    ));
                }
                None => match node.number("size")? {
                    Some(size) => ("memory/size", None, size),
                    None => return Err(node.error("reg", "is missing, and so is size")),
                },
            }
        }
        (None, None) => {
            return Err(at.error("memory-bytes", "is missing; give the memory in bytes, as <0x0 0x8000000>"));
        }
    };
    if bytes == 0 || !bytes.is_multiple_of(PAGE) {
        return Err(
            at.error(place, format!("{bytes:#x} bytes are not a whole number of {PAGE}-byte pages above 0"))
        );
    }
    if let Some(b) = base
        && (!b.is_multiple_of(PAGE) || b.checked_add(bytes).is_none())
    {
        return Err(at.error(
            "memory-base",
            format!("{b:#x} is not page aligned, or the memory does not fit behind it"),
        ));
    }
    Ok((base, bytes))
}

#[cfg(test)]
#[path = "instance_tests.rs"]
mod tests;
