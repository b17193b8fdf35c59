//! Reading values out of the tree. All mistakes are collected, so that one run shows them all.

use std::cell::RefCell;
use std::fmt;

use kmorph_control::{ErrorKind, OpError};

use crate::node::{Entry, Node, Place, Value};

/// A mistake.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Where.
    pub place: Place,
    /// Key, with the sections it is in; empty when the file as a whole is meant.
    pub key: String,
    /// What is wrong and what is allowed.
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.place)?;
        if !self.key.is_empty() {
            write!(f, "{}: ", self.key)?;
        }
        f.write_str(&self.message)
    }
}

/// The configuration cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}", self.summary())]
pub struct ConfigError {
    /// Kind.
    pub kind: ErrorKind,
    /// Every mistake, in the order of keys; at least one.
    pub problems: Vec<Problem>,
}

impl ConfigError {
    /// A single mistake.
    pub(crate) fn one(kind: ErrorKind, problem: Problem) -> ConfigError {
        ConfigError { kind, problems: vec![problem] }
    }

    /// Every mistake on a line of its own.
    pub fn full(&self) -> String {
        self.problems.iter().map(Problem::to_string).collect::<Vec<_>>().join("\n")
    }

    fn summary(&self) -> String {
        let first = self.problems.first().map(Problem::to_string).unwrap_or_default();
        match self.problems.len() {
            0 | 1 => first,
            n => format!("{first} (and {} more: kmorphctl config check shows all)", n - 1),
        }
    }
}

impl From<ConfigError> for OpError {
    fn from(e: ConfigError) -> OpError {
        OpError::new(e.kind, e.to_string())
    }
}

/// Collects mistakes, and where each value that was read stands.
#[derive(Default)]
pub(crate) struct Reader {
    problems: RefCell<Vec<Problem>>,
    places: RefCell<Vec<(String, Place)>>,
}

impl Reader {
    pub fn problem(&self, place: &Place, key: impl Into<String>, message: impl Into<String>) {
        let problem = Problem { place: place.clone(), key: key.into(), message: message.into() };
        self.problems.borrow_mut().push(problem);
    }

    /// Remember where the value of a key came from.
    pub fn note(&self, key: impl Into<String>, place: &Place) {
        self.places.borrow_mut().push((key.into(), place.clone()));
    }

    /// The place of every value, or every mistake.
    pub fn finish(self) -> Result<Vec<(String, Place)>, ConfigError> {
        let problems = self.problems.into_inner();
        if problems.is_empty() {
            Ok(self.places.into_inner())
        } else {
            Err(ConfigError { kind: ErrorKind::BadInput, problems })
        }
    }

    /// A section whose keys are known; others are mistakes.
    pub fn section<'a>(&'a self, node: &'a Node, path: &str, keys: &[&str]) -> Section<'a> {
        let section = self.names(node, path);
        for entry in section.entries {
            if !keys.contains(&entry.key.as_str()) {
                self.problem(
                    &entry.place,
                    section.key(&entry.key),
                    format!("there is no such key; there are {}", keys.join(", ")),
                );
            }
        }
        section
    }

    /// A section whose keys are names.
    pub fn names<'a>(&'a self, node: &'a Node, path: &str) -> Section<'a> {
        let entries: &[Entry] = match &node.value {
            Value::Map(entries) => entries,
            Value::Null => &[],
            _ => {
                self.problem(&node.place, path, "this is a section: write its keys below it, indented");
                &[]
            }
        };
        Section { reader: self, path: path.to_owned(), place: &node.place, entries }
    }

    /// The elements of a list.
    pub fn list<'a>(&self, node: &'a Node, key: &str) -> &'a [Node] {
        match &node.value {
            Value::List(all) => all,
            _ => {
                self.problem(&node.place, key, "this is a list: write [a, b], or each on a line with a dash");
                &[]
            }
        }
    }

    /// The text of a single value.
    pub fn text<'a>(&self, node: &'a Node, key: &str) -> Option<&'a str> {
        match &node.value {
            Value::Scalar(text) => Some(text),
            Value::Null => {
                self.problem(&node.place, key, "there is no value; give one, or leave the key out");
                None
            }
            _ => {
                self.problem(&node.place, key, "this is a single value, not a list or a section");
                None
            }
        }
    }

    /// A single value, read by a function that says what is allowed.
    pub fn parse<T>(
        &self,
        node: &Node,
        key: &str,
        parse: impl FnOnce(&str) -> Result<T, String>,
    ) -> Option<T> {
        match parse(self.text(node, key)?) {
            Ok(value) => {
                self.note(key, &node.place);
                Some(value)
            }
            Err(message) => {
                self.problem(&node.place, key, message);
                None
            }
        }
    }
}

/// Keys of one section.
pub(crate) struct Section<'a> {
    reader: &'a Reader,
    path: String,
    /// Where the section starts.
    pub place: &'a Place,
    pub entries: &'a [Entry],
}

impl<'a> Section<'a> {
    /// A key with the sections it is in.
    pub fn key(&self, name: &str) -> String {
        if self.path.is_empty() { name.to_owned() } else { format!("{}.{name}", self.path) }
    }

    pub fn get(&self, name: &str) -> Option<&'a Node> {
        self.entries.iter().find(|e| e.key == name).map(|e| &e.node)
    }

    /// Set a value when the key is there.
    pub fn set<T>(&self, name: &str, into: &mut T, parse: impl FnOnce(&str) -> Result<T, String>) {
        if let Some(value) = self.get(name).and_then(|n| self.reader.parse(n, &self.key(name), parse)) {
            *into = value;
        }
    }

    /// Set a list when the key is there; it replaces the default.
    pub fn set_list<T>(&self, name: &str, into: &mut Vec<T>, parse: impl Fn(&str) -> Result<T, String>) {
        let Some(node) = self.get(name) else { return };
        let key = self.key(name);
        *into =
            self.reader.list(node, &key).iter().filter_map(|n| self.reader.parse(n, &key, &parse)).collect();
    }
}
