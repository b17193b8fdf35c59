//! Definitions that follow their instance: the source of a tree, and the file it replaces.

use std::fmt::Write as _;
use std::fs::File;
use std::io::Write as _;
use std::path::Path;

use crate::dir::{path_of, read_tree};
use crate::{Instance, KerfError, Node, Tree, instances_of};

/// Have the definition of this name say what `instance` says: number, CPUs and memory, without a fixed place. Everything
/// else in the file stays. The source `<name>.dts` is replaced as a whole or not at all; the first one, which no
/// program has written, is kept as `<name>.dts.orig`. Comments are not carried over.
pub fn save_named(dir: &Path, instance: &Instance) -> Result<(), KerfError> {
    let found = path_of(dir, &instance.name)?;
    let mut tree = read_tree(&found)?;
    if says(&tree, instance)? {
        return Ok(());
    }
    let node = node_of(&mut tree, &instance.name).ok_or_else(|| {
        KerfError::Conflict(format!("{} does not define {}", found.display(), instance.name))
    })?;
    change(node, instance);
    let path = dir.join(format!("{}.dts", instance.name));
    let text = format!(
        "/* Written by kmorphd when the kernel of {0} was replaced; the definition before is in {0}.dts.orig. */\n{1}",
        instance.name,
        source(&tree)
    );
    let io = |what: &str, path: &Path| {
        let what = format!("{what} {}", path.display());
        move |e: std::io::Error| KerfError::Io { what, why: e.to_string() }
    };
    let original = dir.join(format!("{}.dts.orig", instance.name));
    if found == path && !original.exists() {
        std::fs::copy(&path, &original).map_err(io("keep the definition as", &original))?;
    }
    // In a folder of its own, where nobody takes it for a definition.
    let aside = dir.join(".kmorph");
    let new = aside.join(format!("{}.dts", instance.name));
    std::fs::create_dir_all(&aside).map_err(io("make", &aside))?;
    File::create(&new)
        .and_then(|mut f| f.write_all(text.as_bytes()).and_then(|()| f.sync_all()))
        .map_err(io("write", &new))?;
    // What cannot be read again is not put in place.
    if !says(&read_tree(&new)?, instance)? {
        return Err(KerfError::Conflict(format!("{} does not say what it should", new.display())));
    }
    std::fs::rename(&new, &path).map_err(io("replace", &path))
}

fn says(tree: &Tree, want: &Instance) -> Result<bool, KerfError> {
    let same = |i: &Instance| {
        (i.id, &i.cpus, i.memory_bytes, i.memory_base)
            == (want.id, &want.cpus, want.memory_bytes, want.memory_base)
    };
    Ok(instances_of(tree)?.iter().find(|i| i.name == want.name).is_some_and(same))
}

/// The node that defines this instance.
fn node_of<'a>(tree: &'a mut Tree, name: &str) -> Option<&'a mut Node> {
    match tree.root.children.iter().position(|c| c.base_name() == "instances") {
        Some(at) => tree.root.children[at].children.iter_mut().find(|c| c.base_name() == name),
        None => Some(&mut tree.root),
    }
}

fn change(node: &mut Node, instance: &Instance) {
    set(node, "id", u32::from(instance.id).to_be_bytes().to_vec());
    let Some(at) = node.children.iter().position(|c| c.base_name() == "resources") else { return };
    let resources = &mut node.children[at];
    resources.properties.retain(|(name, _)| name != "memory-base");
    resources.children.retain(|c| c.base_name() != "memory");
    set(resources, "cpus", instance.cpus.iter().flat_map(|c| u64::from(*c).to_be_bytes()).collect());
    set(resources, "memory-bytes", instance.memory_bytes.to_be_bytes().to_vec());
    if let Some(base) = instance.memory_base {
        set(resources, "memory-base", base.to_be_bytes().to_vec());
    }
}

fn set(node: &mut Node, name: &str, value: Vec<u8>) {
    match node.properties.iter_mut().find(|(n, _)| n == name) {
        Some((_, old)) => *old = value,
        None => node.properties.push((name.into(), value)),
    }
}

/// A tree as device tree source.
pub fn source(tree: &Tree) -> String {
    let mut out = String::from("/dts-v1/;\n\n");
    node(&mut out, &tree.root, 0);
    out
}

fn node(out: &mut String, n: &Node, depth: usize) {
    let indent = "    ".repeat(depth);
    let name = if depth == 0 { "/" } else { &n.name };
    // A string takes everything.
    let _ = writeln!(out, "{indent}{name} {{");
    for (name, bytes) in &n.properties {
        let _ = match value(bytes) {
            Some(value) => writeln!(out, "{indent}    {name} = {value};"),
            None => writeln!(out, "{indent}    {name};"),
        };
    }
    for child in &n.children {
        node(out, child, depth + 1);
    }
    let _ = writeln!(out, "{indent}}};");
}

/// Strings as strings, whole cells as cells, the rest as bytes; nothing for nothing.
fn value(bytes: &[u8]) -> Option<String> {
    if bytes.is_empty() {
        return None;
    }
    if let Some(text) = text(bytes) {
        return Some(text);
    }
    if bytes.len().is_multiple_of(4) {
        let cells = bytes.chunks_exact(4).filter_map(|c| c.try_into().ok().map(u32::from_be_bytes));
        let cells: Vec<String> = cells.map(|c| format!("{c:#x}")).collect();
        return Some(format!("<{}>", cells.join(" ")));
    }
    let bytes: Vec<String> = bytes.iter().map(|b| format!("{b:02x}")).collect();
    Some(format!("[{}]", bytes.join(" ")))
}

fn text(bytes: &[u8]) -> Option<String> {
    let strings: Vec<&[u8]> = bytes.strip_suffix(&[0])?.split(|b| *b == 0).collect();
    let plain = |s: &&[u8]| {
        !s.is_empty() && s.iter().all(|b| (b' '..=b'~').contains(b) && !matches!(b, b'"' | b'\\'))
    };
    if !strings.iter().all(plain) {
        return None;
    }
    let quoted: Vec<String> = strings.iter().map(|s| format!("\"{}\"", String::from_utf8_lossy(s))).collect();
    Some(quoted.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load_named;

    const WEB: &str = r#"/dts-v1/;
/ {
    compatible = "multikernel-v1";
    model = "web";
    id = <1>;
    note = "a \"quoted\" one", "two";
    flag;
    odd = [01 02 03];
    resources {
        cpus = <0x0 0x2 0x0 0x3>;
        memory-base = <0x0 0x40000000>;
        memory-bytes = <0x0 0x8000000>;
        devices { nic@1 { reg = <0x1>; }; };
    };
};
"#;

    fn moved(name: &str) -> Instance {
        Instance {
            name: name.into(),
            id: 511,
            cpus: vec![1, 2],
            memory_bytes: 256 << 20,
            memory_base: None,
            file: String::new(),
        }
    }

    #[test]
    fn a_definition_follows_and_everything_else_stays() {
        let d = tempfile::tempdir().unwrap();
        let path = d.path().join("web.dts");
        std::fs::write(&path, WEB).unwrap();
        let before = read_tree(&path).unwrap();
        save_named(d.path(), &moved("web")).unwrap();
        let got = load_named(d.path(), "web").unwrap();
        assert_eq!(Instance { file: String::new(), ..got }, moved("web"));
        let after = read_tree(&path).unwrap();
        for property in ["compatible", "model", "note", "flag", "odd"] {
            assert_eq!(after.root.property(property), before.root.property(property), "{property}");
        }
        let devices = |t: &Tree| t.root.child("resources").unwrap().child("devices").cloned();
        assert_eq!(devices(&after), devices(&before));
        assert_eq!(std::fs::read_to_string(d.path().join("web.dts.orig")).unwrap(), WEB);
        // Another time: the first one is kept.
        save_named(d.path(), &Instance { id: 510, ..moved("web") }).unwrap();
        assert_eq!(load_named(d.path(), "web").unwrap().id, 510);
        assert_eq!(std::fs::read_to_string(d.path().join("web.dts.orig")).unwrap(), WEB);
        // What it says already is not written.
        let written = std::fs::metadata(&path).unwrap().modified().unwrap();
        save_named(d.path(), &Instance { id: 510, ..moved("web") }).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().modified().unwrap(), written);
    }

    #[test]
    fn one_of_several_and_a_blob() {
        let d = tempfile::tempdir().unwrap();
        let both = "/dts-v1/; / { instances { \
            web { id = <1>; resources { cpus = <2>; memory@0 { reg = <0 0x40000000 0 0x8000000>; }; }; }; \
            db { id = <2>; resources { cpus = <3>; memory-bytes = <0 0x8000000>; }; }; }; };";
        std::fs::write(d.path().join("web.dts"), both).unwrap();
        let tree = read_tree(&d.path().join("web.dts")).unwrap();
        save_named(d.path(), &moved("web")).unwrap();
        let all = instances_of(&read_tree(&d.path().join("web.dts")).unwrap()).unwrap();
        assert_eq!(
            all.iter().map(|i| (i.name.as_str(), i.id)).collect::<Vec<_>>(),
            [("web", 511), ("db", 2)]
        );
        assert_eq!(tree.root.children[0].children[1], {
            let after = read_tree(&d.path().join("web.dts")).unwrap();
            after.root.children[0].children[1].clone()
        });
        assert!(save_named(d.path(), &moved("nobody")).unwrap_err().to_string().contains("nobody"));
    }
}
