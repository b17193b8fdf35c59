//! Definitions in all their forms, sound and broken.

use std::path::Path;

use super::*;
use crate::{compile, load_all, load_named};
use proptest::prelude::*;

const SOUND: &str = r#"/dts-v1/;
/ {
    compatible = "multikernel-v1";
    model = "web-server";
    id = <1>;
    resources {
        cpus = <0x0 0x2 0x0 0x3>;
        memory-base = <0x1 0x40000000>;
        memory-bytes = <0x0 0x8000000>;
    };
};
"#;

fn load(dir: &Path, source: &str) -> Result<Instance, KerfError> {
    let file = dir.join("web-server.dts");
    std::fs::write(&file, source).unwrap();
    load_named(dir, "web-server")
}

#[test]
fn reads_the_instance_tree() {
    let d = tempfile::tempdir().unwrap();
    let i = load(d.path(), SOUND).unwrap();
    assert_eq!((i.name.as_str(), i.id), ("web-server", 1));
    assert_eq!(i.cpus, [2, 3]);
    assert_eq!(i.memory_bytes, 128 << 20);
    assert_eq!(i.memory_base, Some(0x1_4000_0000));
}

#[test]
fn reads_the_older_single_tree_and_u32_cells() {
    let d = tempfile::tempdir().unwrap();
    let source = r#"/dts-v1/;
/ { instances {
    web-server { id = <1>; resources { cpus = <4>; memory-bytes = <0x8000000>; }; };
    other { id = <2>; resources { cpus = <5 6 7>; memory@0 { reg = <0 0x40000000 0 0x10000000>; }; }; };
}; };"#;
    let i = load(d.path(), source).unwrap();
    assert_eq!((i.cpus.as_slice(), i.memory_base), (&[4][..], None));
    let tree = compile(&d.path().join("web-server.dts")).unwrap();
    let other = &instances_of(&tree).unwrap()[1];
    assert_eq!(other.cpus, [5, 6, 7]);
    assert_eq!((other.memory_base, other.memory_bytes), (Some(0x4000_0000), 256 << 20));
}

#[test]
fn each_defect_names_its_property() {
    let cases = [
        ("model = \"web-server\";", "", "model"),
        ("id = <1>;", "", "id"),
        ("id = <1>;", "id = <0>;", "id"),
        ("id = <1>;", "id = <512>;", "511"),
        ("cpus = <0x0 0x2 0x0 0x3>;", "", "cpus"),
        ("cpus = <0x0 0x2 0x0 0x3>;", "cpus = <0 2 0 2>;", "listed twice"),
        ("cpus = <0x0 0x2 0x0 0x3>;", "cpus = <1 2>;", "not a CPU id"),
        ("cpus = <0x0 0x2 0x0 0x3>;", "cpus = [00 01];", "cpus"),
        ("memory-bytes = <0x0 0x8000000>;", "", "memory-bytes"),
        ("memory-bytes = <0x0 0x8000000>;", "memory-bytes = <0x0 0x8000001>;", "pages"),
        ("memory-bytes = <0x0 0x8000000>;", "memory-bytes = <0x0 0x0>;", "pages"),
        ("memory-base = <0x1 0x40000000>;", "memory-base = <0x1 0x40000001>;", "memory-base"),
        ("memory-base = <0x1 0x40000000>;", "memory-base = <0xffffffff 0xfffff000>;", "memory-base"),
        ("model = \"web-server\";", "model = \"a/b\";", "name"),
    ];
    for (from, to, word) in cases {
        let d = tempfile::tempdir().unwrap();
        let text = load(d.path(), &SOUND.replace(from, to)).unwrap_err().to_string();
        assert!(text.contains(word) && text.contains("web-server.dts"), "{to:?}: {text}");
    }
}

#[test]
fn dtc_names_the_line() {
    let d = tempfile::tempdir().unwrap();
    let text = load(d.path(), "/dts-v1/;\n/ {\n  id = <;\n};\n").unwrap_err().to_string();
    assert!(text.contains("web-server.dts:3"), "{text}");
}

#[test]
fn a_huge_blob_is_refused_unread() {
    let d = tempfile::tempdir().unwrap();
    let file = std::fs::File::create(d.path().join("web-server.dtb")).unwrap();
    file.set_len(1 << 40).unwrap();
    let text = load_named(d.path(), "web-server").unwrap_err().to_string();
    assert!(text.contains("web-server.dtb") && text.contains("more than 1048576 bytes"), "{text}");
}

#[test]
fn names_are_checked_before_they_become_paths() {
    let d = tempfile::tempdir().unwrap();
    for bad in ["../x", "", ".hidden", "a b", &"x".repeat(64)] {
        assert!(load_named(d.path(), bad).unwrap_err().to_string().contains("name"), "{bad}");
    }
    assert!(matches!(load_named(d.path(), "none"), Err(KerfError::NotFound { .. })));
}

#[test]
fn a_folder_is_read_whole_in_spite_of_broken_files() {
    let d = tempfile::tempdir().unwrap();
    let write = |name: &str, text: String| std::fs::write(d.path().join(name), text).unwrap();
    write("web-server.dts", SOUND.into());
    write("twin.dts", SOUND.replace("web-server", "twin"));
    write("db.dts", SOUND.replace("web-server", "db").replace("<1>", "<2>"));
    write("broken.dts", "nonsense".into());
    write("junk.dtb", "nonsense".into());
    write("readme.txt", "no tree".into());
    let all = load_all(d.path()).unwrap();
    let names: Vec<&str> = all.instances.iter().map(|i| i.name.as_str()).collect();
    assert_eq!(names, ["twin", "db"]);
    assert_eq!(all.errors.len(), 3, "{:?}", all.errors);
    assert!(load_all(&d.path().join("none")).unwrap().instances.is_empty());
}

fn blob() -> Vec<u8> {
    let d = tempfile::tempdir().unwrap();
    std::fs::write(d.path().join("a.dts"), SOUND).unwrap();
    let out = std::process::Command::new("dtc")
        .args(["-I", "dts", "-O", "dtb", "-o", "-"])
        .arg(d.path().join("a.dts"))
        .output()
        .unwrap();
    out.stdout
}

#[test]
fn blobs_read_like_sources_padded_or_not() {
    let mut b = blob();
    b.extend([0; 100]);
    let tree = Tree::from_blob("x", &b).unwrap();
    assert_eq!(instances_of(&tree).unwrap()[0].cpus, [2, 3]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn damaged_blobs_never_panic(hits in proptest::collection::vec((0usize..600, any::<u8>()), 1..12), cut in 0usize..600) {
        let mut b = BLOB.with(Clone::clone);
        for (at, v) in hits {
            let n = b.len();
            b[at % n] = v;
        }
        b.truncate(b.len().saturating_sub(cut / 8));
        if let Ok(tree) = Tree::from_blob("x", &b) {
            let _ = instances_of(&tree);
        }
    }
}

thread_local! {
    static BLOB: Vec<u8> = blob();
}
