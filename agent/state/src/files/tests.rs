use std::fs::OpenOptions;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};

use nix::fcntl::{FcntlArg, OFlag, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use proptest::prelude::*;

use super::*;
use crate::piece::each;

const LIMIT: u64 = 64 << 20;

fn memory(name: &str) -> File {
    memfd_create(name, MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING).unwrap().into()
}

fn flags(file: &File) -> OFlag {
    OFlag::from_bits_retain(fcntl(file.as_fd(), FcntlArg::F_GETFL).unwrap())
        & !OFlag::from_bits_retain(0o100_000)
}

/// One round; how many bytes it brought.
fn round(old: &mut Files, new: &mut Files, full: bool) -> usize {
    let mut bytes = 0;
    let mut sink = each(|at, piece| {
        assert!(piece.len() <= PIECE_LIMIT as usize && at == bytes as u64);
        bytes += piece.len();
        new.import(piece).map_err(std::io::Error::other)
    });
    old.export(full, &mut sink).unwrap();
    drop(sink);
    new.imported().unwrap();
    assert_eq!(old.digest(), new.digest());
    bytes
}

fn content(file: &File) -> Vec<u8> {
    let mut all = vec![];
    place::again(file, false).unwrap().read_to_end(&mut all).unwrap();
    all
}

fn position(mut file: &File) -> u64 {
    file.stream_position().unwrap()
}

#[test]
fn every_kind_of_file_is_open_in_the_new_kernel_as_it_was_in_the_old_one() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let (mut old, mut new) = (Files::new(LIMIT), Files::new(LIMIT));
    let mut log = OpenOptions::new().append(true).create(true).mode(0o640).open(path("log")).unwrap();
    log.write_all(b"one\ntwo\n").unwrap();
    let mut gone = OpenOptions::new().read(true).write(true).create_new(true).open(path("gone")).unwrap();
    gone.write_all(&[7; 100_000]).unwrap();
    gone.seek(SeekFrom::Start(50_000)).unwrap();
    std::fs::remove_file(path("gone")).unwrap();
    std::fs::write(path("shared"), "the same in both").unwrap();
    let mut shared = File::open(path("shared")).unwrap();
    shared.seek(SeekFrom::Start(4)).unwrap();
    let twice = File::open(path("shared")).unwrap();
    let mut sealed = memory("a name");
    sealed.write_all(b"sealed").unwrap();
    fcntl(&sealed, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_WRITE)).unwrap();
    // Mostly holes.
    let sparse = memory("sparse");
    sparse.set_len(32 << 20).unwrap();
    sparse.write_all_at(b"here", 20 << 20).unwrap();
    for (name, file, content) in [
        ("log", log.try_clone().unwrap(), Content::Along),
        ("gone", gone.try_clone().unwrap(), Content::AsNeeded),
        ("shared", shared, Content::There),
        ("twice", twice, Content::There),
        ("sealed", sealed, Content::AsNeeded),
        ("sparse", sparse.try_clone().unwrap(), Content::AsNeeded),
    ] {
        assert!(old.insert(name, file, content).unwrap().is_none());
    }
    let first = round(&mut old, &mut new, true);
    assert!((100_000..120_000).contains(&first), "holes are not sent: {first}");
    assert_eq!(round(&mut old, &mut new, false), 0, "nothing changed");
    log.write_all(b"three\n").unwrap();
    assert!(round(&mut old, &mut new, false) < 2000);
    assert_eq!(new.get("log").map(length_of), None, "they are not open before it serves");
    assert_eq!(std::fs::read(path("log")).unwrap(), b"one\ntwo\nthree\n");
    new.activate().unwrap();

    let (a, b) = (old.get("log").unwrap(), new.get("log").unwrap());
    assert_eq!((flags(b), position(b)), (flags(a), position(a)));
    assert_eq!(content(b), b"one\ntwo\nthree\n");
    // It is another file, which has taken that one's place.
    assert_ne!(a.metadata().unwrap().ino(), b.metadata().unwrap().ino());
    assert_eq!(std::fs::metadata(path("log")).unwrap().ino(), b.metadata().unwrap().ino());
    assert_eq!(b.metadata().unwrap().permissions().mode() & 0o7777, 0o640);
    let mut b = b;
    b.write_all(b"four\n").unwrap();
    assert_eq!(std::fs::read(path("log")).unwrap(), b"one\ntwo\nthree\nfour\n");
    assert_eq!(content(a), b"one\ntwo\nthree\n", "the old kernel's is left alone");
    let gone = new.get("gone").unwrap();
    assert_eq!((content(gone), position(gone)), (vec![7; 100_000], 50_000));
    assert_eq!((position(new.get("shared").unwrap()), position(new.get("twice").unwrap())), (4, 0));
    let sealed = new.get("sealed").unwrap();
    let seals = SealFlag::from_bits_retain(fcntl(sealed, FcntlArg::F_GET_SEALS).unwrap());
    assert_eq!(seals, SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_WRITE);
    let mut sealed = sealed;
    assert!(content(sealed) == b"sealed" && sealed.write_all(b"x").is_err());
    let sparse = new.get("sparse").unwrap();
    assert!(
        content(sparse) == content(old.get("sparse").unwrap()) && sparse.metadata().unwrap().blocks() < 1000
    );
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2, "nothing is left beside them");

    // And on: what came goes along again.
    let mut third = Files::new(LIMIT);
    round(&mut new, &mut third, true);
    third.activate().unwrap();
    assert_eq!(content(third.get("gone").unwrap()), vec![7; 100_000]);
    assert_eq!(content(third.get("log").unwrap()), b"one\ntwo\nthree\nfour\n");
}

#[test]
fn only_blocks_that_changed_go_along_again() {
    let (mut old, mut new) = (Files::new(LIMIT), Files::new(LIMIT));
    let file = memory("file");
    file.write_all_at(&[7; 1_000_000], 0).unwrap();
    old.insert("file", file.try_clone().unwrap(), Content::AsNeeded).unwrap();
    assert!(
        (1_000_000..1_001_000).contains(&round(&mut old, &mut new, true)),
        "blocks in a row share a head"
    );
    for (at, length, blocks) in [(0, 1, 1), (999_000, 1000, 2), (1_000_000, 8, 1), (500_000, 5000, 3)] {
        file.write_all_at(&vec![9; length], at).unwrap();
        let bytes = round(&mut old, &mut new, false);
        assert!(bytes <= blocks * BLOCK + 500, "{length} bytes at {at}: {bytes} went along");
        assert!(content(&file) == content(&new.arriving.ready["file"]));
    }
}

fn length_of(file: &File) -> u64 {
    file.metadata().unwrap().len()
}

#[test]
fn two_that_are_open_on_one_file_stay_so() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("both");
    std::fs::write(&path, "content").unwrap();
    let (mut old, mut new) = (Files::new(LIMIT), Files::new(LIMIT));
    old.insert("reads", File::open(&path).unwrap(), Content::Along).unwrap();
    let writes = OpenOptions::new().write(true).open(&path).unwrap();
    old.insert("writes", writes, Content::Along).unwrap();
    round(&mut old, &mut new, true);
    new.activate().unwrap();
    new.get("writes").unwrap().write_all_at(b"CON", 0).unwrap();
    assert_eq!(content(new.get("reads").unwrap()), b"CONtent");
    assert!(new.get("reads").unwrap().write_all_at(b"x", 0).is_err(), "it is open for reading only");
}

#[test]
fn what_is_discarded_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    std::fs::write(&path, "old").unwrap();
    let (mut old, mut new) = (Files::new(LIMIT), Files::new(LIMIT));
    old.insert("file", File::open(&path).unwrap(), Content::Along).unwrap();
    for _ in 0..2 {
        round(&mut old, &mut new, true);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
        new.discard().unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }
    // One that was taken out of the section is gone on the other side, too.
    round(&mut old, &mut new, true);
    old.remove("file").unwrap();
    round(&mut old, &mut new, false);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    new.activate().unwrap();
    assert!(new.get("file").is_none());
}

#[test]
fn what_cannot_go_along_is_refused_in_words() {
    let dir = tempfile::tempdir().unwrap();
    let mut files = Files::new(1000);
    let (reader, _writer) = std::io::pipe().unwrap();
    let pipe = File::from(std::os::fd::OwnedFd::from(reader));
    for (name, file, want) in [
        ("dir", File::open(dir.path()).unwrap(), "file dir: it is a directory"),
        ("pipe", pipe, "file pipe: it is a pipe"),
        ("null", File::open("/dev/null").unwrap(), "file null: it is a device"),
        ("a name", memory("x"), "is no name of a file"),
    ] {
        let error = files.insert(name, file, Content::AsNeeded).unwrap_err();
        assert!(error.contains(want), "{error}");
    }
    let big = memory("big");
    big.set_len(1001).unwrap();
    files.insert("big", big, Content::AsNeeded).unwrap();
    let error = files.export(true, &mut each(|_, _| Ok(()))).unwrap_err().to_string();
    assert_eq!(error, "file big: 1001 bytes are too many: all together may have 1000");

    // The new kernel has another file under that name, or none.
    let path = dir.path().join("there");
    std::fs::write(&path, "0123456789").unwrap();
    let (mut old, mut new) = (Files::new(LIMIT), Files::new(LIMIT));
    old.insert("there", File::open(&path).unwrap(), Content::There).unwrap();
    let mut came = vec![];
    let mut sink = each(|_, piece| {
        came.push(piece.to_vec());
        Ok(())
    });
    old.export(true, &mut sink).unwrap();
    drop(sink);
    for (change, want) in [
        ("short", "there has 5 bytes here and had 10: it is not the same file"),
        ("", "No such file or directory"),
    ] {
        if change.is_empty() {
            std::fs::remove_file(&path).unwrap()
        } else {
            std::fs::write(&path, change).unwrap()
        }
        came.iter().for_each(|piece| new.import(piece).unwrap());
        let error = new.imported().unwrap_err();
        assert!(error.contains("file there: ") && error.contains(want), "{error}");
    }
    // One whose name another file has got.
    let error = old.export(true, &mut each(|_, _| Ok(()))).map_err(|e| e.to_string());
    assert!(error.is_ok(), "it is unlinked, and goes along: {error:?}");
    for (piece, want) in [
        (&b"?"[..], "makes no sense at byte 0"),
        (b"T\xff\xff\xff\xff", "1024 are the limit"),
        (b"B\x09\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x01\0\0\0x", "do not belong to a file"),
    ] {
        let error = Files::new(LIMIT).import(piece).unwrap_err();
        assert!(error.contains(want), "{error}");
    }
    let mut new = Files::new(LIMIT);
    new.import(b"T\x01\0\0\0").unwrap();
    assert_eq!(new.imported().unwrap_err(), "0 of 1 files came");
}

fn file_at(path: &std::path::Path, text: &str) -> File {
    let file = OpenOptions::new().read(true).write(true).create_new(true).open(path).unwrap();
    file.write_all_at(text.as_bytes(), 0).unwrap();
    file
}

fn names(dir: &tempfile::TempDir) -> Vec<String> {
    let entries = std::fs::read_dir(dir.path()).unwrap();
    let mut all: Vec<_> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    all.sort();
    all
}

#[test]
fn what_was_renamed_or_unlinked_between_rounds_is_so_in_the_new_kernel() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let (mut old, mut new) = (Files::new(LIMIT), Files::new(LIMIT));
    std::fs::create_dir(path("d")).unwrap();
    for name in ["log", "x.tmp", "gone"] {
        old.insert(name, file_at(&path(name), name), Content::Along).unwrap();
    }
    round(&mut old, &mut new, true);
    // A log that is rotated, a file that is written beside its place, in another folder, and one that is unlinked.
    std::fs::rename(path("log"), path("log.1")).unwrap();
    old.insert("log2", file_at(&path("log"), "another"), Content::Along).unwrap();
    std::fs::rename(path("x.tmp"), path("d/x")).unwrap();
    std::fs::remove_file(path("gone")).unwrap();
    assert!(round(&mut old, &mut new, false) > 0);
    // The new kernel has none of them.
    for name in ["log", "log.1", "d/x"] {
        std::fs::remove_file(path(name)).unwrap();
    }
    new.activate().unwrap();
    assert_eq!(names(&dir), ["d", "log", "log.1"]);
    for (name, want) in [("log", "another"), ("log.1", "log"), ("d/x", "x.tmp")] {
        assert_eq!(std::fs::read_to_string(path(name)).unwrap(), want);
    }
    assert_eq!(content(new.get("gone").unwrap()), b"gone");
    assert_eq!(new.get("gone").unwrap().metadata().unwrap().nlink(), 0);
    // A folder that is not there is noticed before it is to serve.
    let mut third = Files::new(LIMIT);
    round(&mut new, &mut third, true);
    std::fs::create_dir(path("e")).unwrap();
    std::fs::rename(path("d/x"), path("e/x")).unwrap();
    let mut sink = each(|_, piece| third.import(piece).map_err(std::io::Error::other));
    new.export(false, &mut sink).unwrap();
    drop(sink);
    std::fs::remove_dir_all(path("e")).unwrap();
    let error = third.imported().unwrap_err();
    assert!(error.contains("file x.tmp: ") && error.contains("No such file"), "{error}");
}

#[test]
fn content_that_is_not_to_go_along_any_more_takes_no_place() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    let (mut old, mut new) = (Files::new(LIMIT), Files::new(LIMIT));
    let file = file_at(&path, "content");
    old.insert("file", file.try_clone().unwrap(), Content::Along).unwrap();
    round(&mut old, &mut new, true);
    old.insert("file", file.try_clone().unwrap(), Content::There).unwrap();
    round(&mut old, &mut new, false);
    assert_eq!(names(&dir), ["file"]);
    new.activate().unwrap();
    assert_eq!(place::identity(new.get("file").unwrap()).unwrap(), place::identity(&file).unwrap());
}

#[test]
fn memory_that_is_sealed_between_rounds_is_sealed_in_the_new_kernel() {
    let (mut old, mut new) = (Files::new(LIMIT), Files::new(LIMIT));
    let file = memory("m");
    file.write_all_at(b"content", 0).unwrap();
    old.insert("m", file.try_clone().unwrap(), Content::AsNeeded).unwrap();
    round(&mut old, &mut new, true);
    let seals = SealFlag::F_SEAL_WRITE | SealFlag::F_SEAL_SEAL;
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals)).unwrap();
    round(&mut old, &mut new, false);
    new.activate().unwrap();
    let got = fcntl(new.get("m").unwrap(), FcntlArg::F_GET_SEALS).unwrap();
    assert_eq!(SealFlag::from_bits_retain(got), seals);
}

#[test]
fn files_that_could_not_take_their_places_do_so_when_that_is_told_again() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let (mut old, mut new) = (Files::new(LIMIT), Files::new(LIMIT));
    for name in ["a", "b", "c"] {
        old.insert(name, file_at(&path(name), name), Content::Along).unwrap();
    }
    let sealed = memory("m");
    fcntl(&sealed, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL)).unwrap();
    old.insert("0", sealed, Content::AsNeeded).unwrap();
    round(&mut old, &mut new, true);
    std::fs::remove_file(path("b")).unwrap();
    std::fs::create_dir(path("b")).unwrap();
    for _ in 0..2 {
        assert!(new.activate().unwrap_err().contains("directory"));
        assert!(new.get("a").is_none());
    }
    std::fs::remove_dir(path("b")).unwrap();
    new.activate().unwrap();
    assert_eq!(names(&dir), ["a", "b", "c"]);
    for name in ["a", "b", "c"] {
        assert_eq!(content(new.get(name).unwrap()), name.as_bytes());
    }
    assert!(new.get("0").is_some());
}

#[test]
fn two_workloads_may_have_one_file_open() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("both");
    let file = file_at(&path, "content");
    let mut all: Vec<_> = (0..2).map(|_| (Files::new(LIMIT), Files::new(LIMIT))).collect();
    for (old, new) in &mut all {
        old.insert("file", file.try_clone().unwrap(), Content::Along).unwrap();
        round(old, new, true);
    }
    for (_, new) in &mut all {
        new.activate().unwrap();
        assert_eq!(content(new.get("file").unwrap()), b"content");
    }
    assert_eq!(names(&dir), ["both"]);
}

/// What happens to a file between rounds.
#[derive(Clone, Debug)]
enum Change {
    Write(u64, usize, u8),
    Cut(u64),
    Seek(u64),
    Another,
}

fn changes() -> impl Strategy<Value = Vec<Change>> {
    let at = 0u64..300_000;
    let one = prop_oneof![
        4 => (at.clone(), 1usize..150_000, 0u8..4).prop_map(|(at, n, v)| Change::Write(at, n, v)),
        2 => at.clone().prop_map(Change::Cut),
        1 => at.prop_map(Change::Seek),
        1 => Just(Change::Another),
    ];
    proptest::collection::vec(one, 0..5)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn rounds_of_changes_end_in_equal_files(rounds in proptest::collection::vec(changes(), 1..6)) {
        let (mut old, mut new) = (Files::new(LIMIT), Files::new(LIMIT));
        old.insert("file", memory("file"), Content::AsNeeded).unwrap();
        for (n, changes) in rounds.into_iter().enumerate() {
            for change in changes {
                let mut file = old.get("file").unwrap();
                match change {
                    Change::Write(at, length, value) => file.write_all_at(&vec![value; length], at).unwrap(),
                    Change::Cut(length) => file.set_len(length).unwrap(),
                    Change::Seek(at) => drop(file.seek(SeekFrom::Start(at)).unwrap()),
                    Change::Another => drop(old.insert("file", memory("another"), Content::AsNeeded).unwrap()),
                }
            }
            round(&mut old, &mut new, n == 0);
            let (a, b) = (old.get("file").unwrap(), &new.arriving.ready["file"]);
            prop_assert!(content(a) == content(b));
            prop_assert_eq!(position(a), position(b));
        }
    }
}
