//! YAML with the place of everything in it.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_saphyr::{Location, Spanned};

use crate::reader::Problem;

/// Where something stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// File.
    pub file: Arc<Path>,
    /// Line, from 1; 0 when it is not known.
    pub line: u64,
    /// Column, from 1.
    pub column: u64,
}

impl Place {
    fn at(file: &Arc<Path>, location: Location) -> Place {
        Place { file: file.clone(), line: location.line(), column: location.column() }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            0 => write!(f, "{}", self.file.display()),
            line => write!(f, "{}:{line}:{}", self.file.display(), self.column),
        }
    }
}

/// A value.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Value {
    Null,
    /// As text: what it means is known by who reads it.
    Scalar(String),
    List(Vec<Node>),
    Map(Vec<Entry>),
}

/// A value and its place.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Node {
    pub place: Place,
    pub value: Value,
}

/// A key and its value.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Entry {
    pub key: String,
    pub place: Place,
    pub node: Node,
}

impl Node {
    /// Read YAML text. `None`: it holds nothing.
    pub fn parse(text: &str, file: &Arc<Path>) -> Result<Option<Node>, Problem> {
        let blank = |line: &str| line.trim().is_empty() || line.trim_start().starts_with('#');
        if text.lines().all(blank) {
            return Ok(None);
        }
        let raw: Spanned<Raw> = serde_saphyr::from_str(text).map_err(|e| {
            let e = e.without_snippet();
            let place = Place::at(file, e.location().unwrap_or(Location::UNKNOWN));
            Problem { place, key: String::new(), message: strip_location(&e.to_string()) }
        })?;
        Ok(Some(raw.value.place(file, raw.referenced)))
    }

    /// This with another on top: maps key by key, everything else replaced.
    pub fn merge(&mut self, over: Node) {
        match (&mut self.value, over.value) {
            (Value::Map(below), Value::Map(above)) => {
                for entry in above {
                    match below.iter_mut().find(|e| e.key == entry.key) {
                        Some(old) => {
                            old.place = entry.place;
                            old.node.merge(entry.node);
                        }
                        None => below.push(entry),
                    }
                }
            }
            // An empty section says nothing about what is below it.
            (Value::Map(_), Value::Null) => {}
            (value, above) => {
                *value = above;
                self.place = over.place;
            }
        }
    }
}

/// The library puts the place into its text; it is said once, in front.
fn strip_location(text: &str) -> String {
    let text = text.lines().map(str::trim).filter(|l| !l.is_empty()).collect::<Vec<_>>().join(" ");
    let cut = text.find(" at line ").or_else(|| text.find(" (line ")).unwrap_or(text.len());
    let head = &text[..cut];
    let message =
        head.split_once(": ").filter(|(a, _)| a.starts_with("error: line ")).map_or(head, |(_, b)| b);
    message.trim_start_matches("error: ").to_owned()
}

/// What YAML holds, before it knows its file.
enum Raw {
    Null,
    Scalar(String),
    List(Vec<Spanned<Raw>>),
    Map(Vec<(Spanned<String>, Spanned<Raw>)>),
}

impl Raw {
    fn place(self, file: &Arc<Path>, at: Location) -> Node {
        let value = match self {
            Raw::Null => Value::Null,
            Raw::Scalar(text) => Value::Scalar(text),
            Raw::List(all) => {
                Value::List(all.into_iter().map(|n| n.value.place(file, n.referenced)).collect())
            }
            Raw::Map(all) => Value::Map(
                all.into_iter()
                    .map(|(key, n)| Entry {
                        place: Place::at(file, key.referenced),
                        key: key.value,
                        node: n.value.place(file, n.referenced),
                    })
                    .collect(),
            ),
        };
        Node { place: Place::at(file, at), value }
    }
}

struct RawVisitor;

impl<'de> Visitor<'de> for RawVisitor {
    type Value = Raw;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value, a list or a section")
    }

    fn visit_unit<E>(self) -> Result<Raw, E> {
        Ok(Raw::Null)
    }

    fn visit_none<E>(self) -> Result<Raw, E> {
        Ok(Raw::Null)
    }

    fn visit_some<D: Deserializer<'de>>(self, d: D) -> Result<Raw, D::Error> {
        Raw::deserialize(d)
    }

    fn visit_bool<E>(self, v: bool) -> Result<Raw, E> {
        Ok(Raw::Scalar(v.to_string()))
    }

    fn visit_i64<E>(self, v: i64) -> Result<Raw, E> {
        Ok(Raw::Scalar(v.to_string()))
    }

    fn visit_u64<E>(self, v: u64) -> Result<Raw, E> {
        Ok(Raw::Scalar(v.to_string()))
    }

    fn visit_f64<E>(self, v: f64) -> Result<Raw, E> {
        Ok(Raw::Scalar(v.to_string()))
    }

    fn visit_str<E>(self, v: &str) -> Result<Raw, E> {
        Ok(Raw::Scalar(v.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Raw, A::Error> {
        let mut all = Vec::new();
        while let Some(one) = list.next_element()? {
            all.push(one);
        }
        Ok(Raw::List(all))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Raw, A::Error> {
        let mut all = Vec::new();
        while let Some(key) = map.next_key()? {
            all.push((key, map.next_value()?));
        }
        Ok(Raw::Map(all))
    }
}

impl<'de> Deserialize<'de> for Raw {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Raw, D::Error> {
        d.deserialize_any(RawVisitor)
    }
}
