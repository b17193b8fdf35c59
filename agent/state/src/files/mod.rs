//! Open files as a section: path, position and flags of each go along, and its content where the new kernel does not
//! have it.
//!
//! | file | what goes along |
//! | --- | --- |
//! | with a name, in memory of this kernel (tmpfs, ramfs) | the content, mode and owner, too |
//! | with a name, elsewhere | the new kernel has to have it under the same path, no shorter |
//! | unlinked | the content; it becomes memory |
//! | memory (`memfd_create`) | the content, its name and its seals |
//!
//! Directories, pipes, sockets and devices are refused, and locks do not go along. Content is compared block by block with
//! what was sent: every round reads all of it, the last one while the workload stands still.

mod place;
mod record;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs::File;
use std::os::unix::fs::FileExt;

use xxhash_rust::xxh3::Xxh3;

use crate::hash;
use crate::hook::ExportError;
use crate::piece::Sink;
use crate::wire::{PIECE_LIMIT, is_name};
use place::Stage;
use record::{BLOCK, BLOCK_HEAD, Kind, Meta, RUN, Record};

/// Most files of a section.
pub const MOST: usize = 1024;
/// Longest entry of the table: a path has 4096 bytes at most.
const HEAD_LIMIT: usize = 8192;
/// Bytes of content that are looked at for one piece: whoever owns the files is not kept waiting for more.
const AT_ONCE: u64 = 1 << 20;

/// What is sent of a file that has a name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Content {
    /// The content, if it is in memory of this kernel.
    #[default]
    AsNeeded,
    /// The content.
    Along,
    /// No content: the new kernel has the file under the same path.
    There,
}

impl Content {
    fn along(self) -> Option<bool> {
        match self {
            Content::AsNeeded => None,
            Content::Along => Some(true),
            Content::There => Some(false),
        }
    }
}

struct Entry {
    file: File,
    content: Content,
    /// Number of what it is open on.
    number: u64,
}

/// What was sent of the content of a file, or has come.
#[derive(Default)]
struct Blocks {
    /// Of each block; 0 for one that never was anything but zeros.
    hashes: Vec<u64>,
    /// Of all hashes: the digest takes no time that grows with the file.
    sum: u64,
}

impl Blocks {
    /// Whether it differs from what is known of it.
    fn put(&mut self, index: usize, bytes: &[u8]) -> bool {
        if self.hashes.len() <= index {
            self.hashes.resize(index + 1, 0);
        }
        let Some(slot) = self.hashes.get_mut(index) else { return true };
        if *slot == 0 && hash::is_zero(bytes) {
            return false;
        }
        // 0 stands for what was never sent.
        let new = hash::of(bytes, index) | 1;
        let before = std::mem::replace(slot, new);
        self.sum = self.sum.wrapping_sub(before).wrapping_add(new);
        before != new
    }

    /// The file is no longer than this.
    fn cut(&mut self, size: u64) {
        let length = index(size.next_multiple_of(BLOCK as u64)).min(self.hashes.len());
        let gone = self.hashes.drain(length..).fold(0, u64::wrapping_add);
        self.sum = self.sum.wrapping_sub(gone);
    }
}

/// An export under way.
pub struct Export {
    table: Vec<Meta>,
    /// Of the table, what was not given yet.
    heads: Option<VecDeque<Meta>>,
    begun: bool,
    /// Files whose content was not given yet, and where in the first.
    contents: VecDeque<Meta>,
    at: u64,
}

/// Files that a workload has open, each under a name of its choice.
#[derive(Default)]
pub struct Files {
    open: BTreeMap<String, Entry>,
    limit: u64,
    numbers: u64,
    /// As it was last sent.
    sent: Option<Vec<Meta>>,
    blocks: BTreeMap<u64, Blocks>,
    arriving: Arriving,
}

/// What comes from the kernel before.
#[derive(Default)]
struct Arriving {
    /// The table as it comes, and how many are to come.
    coming: Vec<Meta>,
    expected: Option<u32>,
    table: Vec<Meta>,
    /// Where content is kept until the workload serves.
    stages: BTreeMap<u64, Stage>,
    /// Files as they will be open then.
    ready: BTreeMap<String, File>,
}

impl Files {
    /// No files, with so many bytes of content together at most.
    pub fn new(limit: u64) -> Files {
        Files { limit, ..Files::default() }
    }

    /// Most bytes the section may have.
    pub fn size(&self) -> u64 {
        // With the heads of blocks and a table with the longest paths there are.
        self.limit + (self.limit / BLOCK as u64 + 1) * BLOCK_HEAD as u64 + (MOST * HEAD_LIMIT) as u64
    }

    /// Take a file along from now on. One that had this name is given back.
    pub fn insert(&mut self, name: &str, file: File, content: Content) -> Result<Option<File>, String> {
        if !is_name(name) {
            return Err(format!(
                "{name:?} is no name of a file: 1 to 63 letters, digits, '.', '_', ',' and '-'"
            ));
        }
        if self.open.len() >= MOST && !self.open.contains_key(name) {
            return Err(format!("file {name}: {MOST} are taken along already"));
        }
        let why = |e: std::io::Error| format!("file {name}: {e}");
        let identity = place::identity(&file).map_err(why)?;
        let same = |e: &&Entry| place::identity(&e.file).is_ok_and(|i| i == identity);
        let number = match self.open.values().find(same) {
            Some(entry) => entry.number,
            None => {
                self.numbers += 1;
                self.numbers
            }
        };
        place::describe(name, &file, content.along(), number).map_err(|e| format!("file {name}: {e}"))?;
        Ok(self.open.insert(name.to_owned(), Entry { file, content, number }).map(|e| e.file))
    }

    /// The file of this name.
    pub fn get(&self, name: &str) -> Option<&File> {
        self.open.get(name).map(|e| &e.file)
    }

    /// Do not take it along any more.
    pub fn remove(&mut self, name: &str) -> Option<File> {
        self.open.remove(name).map(|e| e.file)
    }

    fn describe(&self) -> Result<Vec<Meta>, String> {
        let one = |(name, entry): (&String, &Entry)| {
            place::describe(name, &entry.file, entry.content.along(), entry.number)
                .map_err(|e| format!("file {name}: {e}"))
        };
        self.open.iter().map(one).collect()
    }

    /// Give everything, or what changed since it was last exported, to `out`.
    pub fn export(&mut self, full: bool, out: &mut dyn Sink) -> Result<(), ExportError> {
        let mut export = self.begin(full).map_err(ExportError::Refused)?;
        let (mut piece, mut sent) = (vec![], 0);
        while self.piece(&mut export, &mut piece).map_err(ExportError::Refused)? {
            if !piece.is_empty() {
                out.piece(sent, &piece)?;
                sent += piece.len() as u64;
            }
        }
        Ok(())
    }

    /// The same for whoever lets others at the files between two pieces, which [`Files::piece`] gives.
    pub fn begin(&mut self, full: bool) -> Result<Export, String> {
        if full {
            (self.sent, self.blocks) = (None, BTreeMap::new());
        }
        let table = self.describe()?;
        let mut contents = VecDeque::new();
        let mut left = self.limit;
        for meta in table.iter().filter(|m| !matches!(m.kind, Kind::There(_))) {
            if contents.iter().any(|m: &Meta| m.content == meta.content) {
                continue;
            }
            left = left.checked_sub(meta.size).ok_or_else(|| {
                let (name, size, limit) = (&meta.name, meta.size, self.limit);
                format!("file {name}: {size} bytes are too many: all together may have {limit}")
            })?;
            contents.push_back(meta.clone());
        }
        self.blocks.retain(|content, _| contents.iter().any(|m| m.content == *content));
        let heads = if self.sent.as_ref() == Some(&table) { None } else { Some(table.clone().into()) };
        Ok(Export { table, heads, begun: false, contents, at: 0 })
    }

    /// The next piece, in `piece`, which is emptied first and may stay empty; `false` when there is none.
    pub fn piece(&mut self, export: &mut Export, piece: &mut Vec<u8>) -> Result<bool, String> {
        piece.clear();
        if let Some(heads) = &mut export.heads {
            if !std::mem::replace(&mut export.begun, true) {
                record::table(piece, u32::try_from(heads.len()).unwrap_or(u32::MAX));
            }
            while piece.len() + HEAD_LIMIT <= PIECE_LIMIT as usize
                && let Some(meta) = heads.pop_front()
            {
                meta.encode(piece);
            }
            if heads.is_empty() {
                export.heads = None;
            }
            return Ok(true);
        }
        let Some(meta) = export.contents.front() else {
            self.sent = Some(std::mem::take(&mut export.table));
            return Ok(false);
        };
        let (entry, blocks) = (self.open.get(&meta.name), self.blocks.entry(meta.content).or_default());
        // One that was removed meanwhile is not in the next round's table.
        let more = match entry {
            Some(entry) => copy(meta, &entry.file, blocks, &mut export.at, piece)
                .map_err(|e| format!("file {}: {e}", meta.name))?,
            None => false,
        };
        if !more {
            export.contents.pop_front();
            export.at = 0;
        }
        Ok(true)
    }

    /// The same on both sides when they have the same files with the same content.
    pub fn digest(&self) -> Vec<u8> {
        let table = self.sent.as_ref().unwrap_or(&self.arriving.table);
        let mut all = Vec::new();
        table.iter().for_each(|m| m.encode(&mut all));
        let mut digest = Xxh3::new();
        digest.update(&all);
        for (content, blocks) in &self.blocks {
            digest.update(&content.to_le_bytes());
            digest.update(&blocks.sum.to_le_bytes());
        }
        digest.digest128().to_le_bytes().to_vec()
    }

    /// Take a piece. What it says of files is done when they are all there: [`Files::imported`].
    pub fn import(&mut self, piece: &[u8]) -> Result<(), String> {
        for record in record::records(piece)? {
            match record {
                Record::Table(files) if files as usize > MOST => {
                    return Err(format!("{files} files: {MOST} are the limit"));
                }
                Record::Table(files) => {
                    (self.arriving.expected, self.arriving.coming) = (Some(files), vec![]);
                }
                Record::File(meta) => self.coming(meta)?,
                Record::Blocks { content, at, bytes } => self.arrived(content, at, bytes)?,
            }
        }
        Ok(())
    }

    fn coming(&mut self, meta: Meta) -> Result<(), String> {
        let a = &mut self.arriving;
        let fits = a.expected.is_some_and(|n| a.coming.len() < n as usize) && is_name(&meta.name);
        if !fits || meta.size > self.limit && !matches!(meta.kind, Kind::There(_)) {
            return Err(format!("file {:?} with {} bytes is not expected", meta.name, meta.size));
        }
        let missing = !a.stages.contains_key(&meta.content);
        if missing && !matches!(meta.kind, Kind::There(_)) {
            let stage = Stage::new(&meta).map_err(|e| format!("file {}: {e}", meta.name))?;
            a.stages.insert(meta.content, stage);
        }
        a.coming.push(meta);
        Ok(())
    }

    fn arrived(&mut self, content: u64, at: u64, bytes: &[u8]) -> Result<(), String> {
        let fits = at.is_multiple_of(BLOCK as u64)
            && at.checked_add(bytes.len() as u64).is_some_and(|end| end <= self.limit);
        let stage = self.arriving.stages.get(&content).filter(|_| fits);
        let Some(stage) = stage else {
            return Err(format!(
                "{} bytes at {at} of content {content} do not belong to a file",
                bytes.len()
            ));
        };
        stage.file.write_all_at(bytes, at).map_err(|e| format!("content {content}: {e}"))?;
        let blocks = self.blocks.entry(content).or_default();
        for (n, block) in (index(at)..).zip(bytes.chunks(BLOCK)) {
            blocks.put(n, block);
        }
        Ok(())
    }

    /// The pieces are all there: make every file ready as it was open.
    pub fn imported(&mut self) -> Result<(), String> {
        let a = &mut self.arriving;
        if let Some(expected) = a.expected.take() {
            if a.coming.len() != expected as usize {
                return Err(format!("{} of {expected} files came", a.coming.len()));
            }
            a.table = std::mem::take(&mut a.coming);
            let arrives =
                |n: u64| a.table.iter().any(|m| m.content == n && !matches!(m.kind, Kind::There(_)));
            let gone: Vec<u64> = a.stages.keys().copied().filter(|n| !arrives(*n)).collect();
            for number in gone {
                self.blocks.remove(&number);
                if let Some(stage) = a.stages.remove(&number) {
                    stage.discard()?;
                }
            }
        }
        let with_content = a.table.iter().filter(|m| !matches!(m.kind, Kind::There(_)));
        let mut seen = BTreeSet::new();
        // Of several names of one file it gets the first.
        for meta in with_content.filter(|m| seen.insert(m.content)) {
            if let Some(stage) = a.stages.get_mut(&meta.content) {
                stage.follow(meta).map_err(|e| format!("file {}: {e}", meta.name))?;
            }
        }
        a.ready.clear();
        for meta in &a.table {
            let stage = a.stages.get(&meta.content);
            let opened = match stage {
                Some(stage) => stage.complete(meta).and_then(|()| place::open(meta, Some(stage))),
                None => place::open(meta, None),
            };
            a.ready.insert(meta.name.clone(), opened.map_err(|e| format!("file {}: {e}", meta.name))?);
            if stage.is_some() {
                self.blocks.entry(meta.content).or_default().cut(meta.size);
            }
        }
        Ok(())
    }

    /// The workload serves with what was imported: those files take their places, and are the ones that are open.
    pub fn activate(&mut self) -> Result<(), String> {
        for stage in self.arriving.stages.values_mut() {
            stage.settle()?;
        }
        // Before all of them have their places it can be told again.
        let Arriving { table, mut ready, .. } = std::mem::take(&mut self.arriving);
        for meta in table {
            let Some(file) = ready.remove(&meta.name) else { continue };
            let content = match meta.kind {
                Kind::There(_) => Content::There,
                Kind::Along(_) => Content::Along,
                Kind::Unlinked | Kind::Memory { .. } => Content::AsNeeded,
            };
            self.numbers = self.numbers.max(meta.content);
            self.open.insert(meta.name, Entry { file, content, number: meta.content });
        }
        Ok(())
    }

    /// Forget what was imported.
    pub fn discard(&mut self) -> Result<(), String> {
        let Arriving { stages, .. } = std::mem::take(&mut self.arriving);
        self.blocks.clear();
        stages.into_values().try_for_each(Stage::discard)
    }
}

/// Append the blocks of a file that differ from what was sent, from `at` on; whether there are more.
fn copy(
    meta: &Meta,
    file: &File,
    blocks: &mut Blocks,
    at: &mut u64,
    piece: &mut Vec<u8>,
) -> std::io::Result<bool> {
    // It may be open for writing only.
    let reader = place::again(file, false)?;
    let mut run = vec![0; RUN];
    let until = at.saturating_add(AT_ONCE).min(meta.size);
    // Each of them may have a head of its own.
    let most = RUN + RUN / BLOCK * BLOCK_HEAD;
    // What is written behind its end from now on is for the next round.
    while *at < until && piece.len() + most <= PIECE_LIMIT as usize {
        let length = usize::try_from(meta.size - *at).unwrap_or(RUN).min(RUN);
        let mut read = 0;
        while let Some(rest) = run.get_mut(read..length).filter(|r| !r.is_empty()) {
            match reader.read_at(rest, *at + read as u64)? {
                // It was cut meanwhile, and a later round sees that.
                0 => break,
                n => read += n,
            }
        }
        let bytes = run.get(..read).unwrap_or_default();
        let changed: Vec<bool> =
            (index(*at)..).zip(bytes.chunks(BLOCK)).map(|(n, block)| blocks.put(n, block)).collect();
        let mut from = 0;
        for same in changed.chunk_by(|a, b| a == b) {
            let end = (from + same.len() * BLOCK).min(read);
            if same.first() == Some(&true) {
                record::blocks(
                    piece,
                    meta.content,
                    *at + from as u64,
                    bytes.get(from..end).unwrap_or_default(),
                );
            }
            from = end;
        }
        *at += RUN as u64;
    }
    if *at < meta.size {
        return Ok(true);
    }
    blocks.cut(meta.size);
    Ok(false)
}

fn index(at: u64) -> usize {
    usize::try_from(at / BLOCK as u64).unwrap_or(usize::MAX)
}
