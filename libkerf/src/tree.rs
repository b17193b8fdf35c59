//! A device tree in memory.

use dtb::{Reader, StructItem};

use crate::KerfError;

/// Larger blobs are no instance definitions.
pub(crate) const MAX_BLOB: usize = 1 << 20;
/// Deeper trees are no instance definitions.
const MAX_DEPTH: usize = 16;

/// One node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Node {
    /// Name with unit address ("memory@0"), empty for the root.
    pub name: String,
    /// Properties in order.
    pub properties: Vec<(String, Vec<u8>)>,
    /// Children in order.
    pub children: Vec<Node>,
}

impl Node {
    /// Raw value of a property.
    pub fn property(&self, name: &str) -> Option<&[u8]> {
        self.properties.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_slice())
    }

    /// A child by its name without unit address.
    pub fn child(&self, name: &str) -> Option<&Node> {
        self.children.iter().find(|c| c.base_name() == name)
    }

    /// Name without unit address.
    pub fn base_name(&self) -> &str {
        self.name.split('@').next().unwrap_or_default()
    }
}

/// A tree and where it came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tree {
    /// For messages.
    pub file: String,
    /// The root node.
    pub root: Node,
}

impl Tree {
    /// Read a flattened device tree.
    pub fn from_blob(file: &str, blob: &[u8]) -> Result<Tree, KerfError> {
        let bad = |message: String| KerfError::Blob { file: file.into(), message };
        if blob.len() > MAX_BLOB {
            return Err(bad(format!("it has more than {MAX_BLOB} bytes, which no definition needs")));
        }
        // The blob may be followed by padding; its header says how long it is.
        let total = blob
            .get(4..8)
            .and_then(|b| <[u8; 4]>::try_from(b).ok())
            .map(|b| u32::from_be_bytes(b) as usize)
            .ok_or_else(|| bad(format!("{} bytes are too few for a header", blob.len())))?;
        let blob = blob.get(..total).ok_or_else(|| {
            bad(format!("it is cut off: {total} bytes are announced, {} are there", blob.len()))
        })?;
        // The reader wants it aligned to eight bytes.
        let mut room = vec![0u8; blob.len() + 8];
        let skip = room.as_ptr().align_offset(8);
        let aligned = room
            .get_mut(skip..skip + blob.len())
            .ok_or_else(|| bad("it cannot be aligned in memory".into()))?;
        aligned.copy_from_slice(blob);
        let reader = Reader::read(aligned).map_err(|e| bad(format!("{e:?}")))?;
        let mut items = reader.struct_items();
        let mut open: Vec<Node> = Vec::new();
        loop {
            match items.next_item().map_err(|e| bad(format!("{e:?}")))? {
                StructItem::BeginNode { name } => {
                    if open.len() >= MAX_DEPTH {
                        return Err(bad(format!("it is nested deeper than {MAX_DEPTH} nodes")));
                    }
                    open.push(Node { name: name.into(), ..Default::default() });
                }
                StructItem::Property { name, value } => {
                    let node =
                        open.last_mut().ok_or_else(|| bad(format!("property {name} is outside the root")))?;
                    node.properties.push((name.into(), value.to_vec()));
                }
                StructItem::EndNode => {
                    let done = open.pop().ok_or_else(|| bad("it ends more nodes than it begins".into()))?;
                    match open.last_mut() {
                        Some(parent) => parent.children.push(done),
                        None => return Ok(Tree { file: file.into(), root: done }),
                    }
                }
            }
        }
    }
}
