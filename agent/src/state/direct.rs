//! Pieces of state on their way from kernel to kernel, without the daemon between: a connection from the agent that has
//! them to the one that takes them. It is checked by the digests of the sections, as everything is.
//!
//! Numbers are little-endian. A greeting of 32 bytes ([`Greeting`]), then records: a head of 24 bytes and as many bytes
//! as that says ([`Head`]). Pieces can be in a *window* instead, memory that both kernels have: then the record says
//! where, and a record of 16 bytes comes back when it was taken ([`Freed`]).

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use kmorph_state::wire::PIECE_LIMIT;
use tokio::io::{
    AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader, BufWriter, ReadHalf, WriteHalf,
};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tokio_vsock::{VMADDR_CID_ANY, VsockAddr, VsockListener, VsockStream};

use super::device;
use super::pays::Pays;

const MAGIC: u64 = u64::from_le_bytes(*b"KMPSTATE");
const VERSION: u64 = 1;
/// Longest time for a connection, and for the greeting.
const OPEN_LIMIT: Duration = Duration::from_secs(2);
/// A piece that does not become smaller than this share of itself is sent as it is.
const WORTH: f64 = 0.95;
/// Longest digest of a section.
const DIGEST_LIMIT: u32 = 64;

/// Where agents of other kernels are found.
#[derive(Clone, Debug)]
pub enum Reach {
    /// By the instance's number.
    Vsock,
    /// Stand-ins: in this folder. The number is one's own.
    Folder(PathBuf, u16),
}

trait Wire: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Wire for T {}

/// Waits for the kernel that has the state.
pub enum Listener {
    Vsock(VsockListener),
    Unix(UnixListener),
}

impl Reach {
    async fn connect(&self, instance: u16) -> io::Result<Box<dyn Wire>> {
        Ok(match self {
            Reach::Vsock => {
                let address = VsockAddr::new(u32::from(instance) + 2, kmp::STATE_PORT);
                Box::new(VsockStream::connect(address).await?)
            }
            Reach::Folder(dir, _) => {
                let path = dir.join(kmp::stand_in::names::port(instance, kmp::STATE_PORT));
                Box::new(UnixStream::connect(path).await?)
            }
        })
    }

    /// Memory that is shared with another kernel, and its size.
    pub fn window(&self, key: u64) -> io::Result<(File, u64)> {
        match self {
            Reach::Vsock => {
                let device = device::open(kmorph_state::handover::NODE)?;
                let size = kmorph_state::handover::select(&device, key)?;
                Ok((device, size))
            }
            Reach::Folder(dir, _) => {
                let path = dir.join(kmp::stand_in::names::window(key));
                let file = File::options().read(true).write(true).open(path)?;
                let size = file.metadata()?.len();
                Ok((file, size))
            }
        }
    }

    /// Listen.
    pub fn listen(&self) -> io::Result<Listener> {
        Ok(match self {
            Reach::Vsock => {
                Listener::Vsock(VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, kmp::STATE_PORT))?)
            }
            Reach::Folder(dir, own) => {
                let path = dir.join(kmp::stand_in::names::port(*own, kmp::STATE_PORT));
                match std::fs::remove_file(&path) {
                    Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
                    _ => {}
                }
                Listener::Unix(UnixListener::bind(path)?)
            }
        })
    }
}

/// Says which morph's state comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Greeting {
    morph: u64,
    token: u64,
}

impl Greeting {
    const SIZE: usize = 32;

    fn encode(self) -> [u8; Self::SIZE] {
        let mut out = [0; Self::SIZE];
        for (place, number) in out.chunks_exact_mut(8).zip([MAGIC, VERSION, self.morph, self.token]) {
            place.copy_from_slice(&number.to_le_bytes());
        }
        out
    }
}

/// What a record is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Piece = 0,
    /// Compressed: an LZ4 block.
    Packed = 1,
    /// The end of a round; `offset` is its number.
    End = 2,
    /// It is in the window: eight bytes say where.
    Placed = 3,
    /// What the section has come to, when everything of it is sent.
    Digest = 4,
}

/// Head of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Head {
    kind: Kind,
    section: u32,
    offset: u64,
    /// Bytes that follow.
    length: u32,
    /// Bytes of the piece.
    plain: u32,
}

impl Head {
    const SIZE: usize = 24;

    fn encode(self) -> [u8; Self::SIZE] {
        let mut out = [0; Self::SIZE];
        out[0..4].copy_from_slice(&(self.kind as u32).to_le_bytes());
        out[4..8].copy_from_slice(&self.section.to_le_bytes());
        out[8..16].copy_from_slice(&self.offset.to_le_bytes());
        out[16..20].copy_from_slice(&self.length.to_le_bytes());
        out[20..24].copy_from_slice(&self.plain.to_le_bytes());
        out
    }

    fn decode(bytes: &[u8; Self::SIZE]) -> io::Result<Head> {
        let u32 = |at: usize| bytes[at..].first_chunk().map_or(0, |b| u32::from_le_bytes(*b));
        let kind = match u32(0) {
            0 => Kind::Piece,
            1 => Kind::Packed,
            2 => Kind::End,
            3 => Kind::Placed,
            4 => Kind::Digest,
            n => return Err(io::Error::other(format!("a record of kind {n}"))),
        };
        let offset = bytes[8..].first_chunk().map_or(0, |b| u64::from_le_bytes(*b));
        let head = Head { kind, section: u32(4), offset, length: u32(16), plain: u32(20) };
        let fits = match kind {
            Kind::Piece => head.length == head.plain,
            Kind::Packed => head.length <= head.plain,
            Kind::End => head.length == 0 && head.plain == 0,
            Kind::Placed => head.length == 8,
            Kind::Digest => head.length <= DIGEST_LIMIT && head.plain == 0,
        };
        if fits && head.plain <= PIECE_LIMIT {
            Ok(head)
        } else {
            Err(io::Error::other(format!("a record of {} bytes for {}", head.length, head.plain)))
        }
    }
}

/// A piece in the window was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Freed {
    /// Of which section it was.
    pub section: u32,
    /// Where it was.
    pub place: u64,
}

impl Freed {
    const SIZE: usize = 16;

    fn encode(self) -> [u8; Self::SIZE] {
        let mut out = [0; Self::SIZE];
        out[0..4].copy_from_slice(&self.section.to_le_bytes());
        out[8..16].copy_from_slice(&self.place.to_le_bytes());
        out
    }

    fn decode(bytes: &[u8; Self::SIZE]) -> Freed {
        let section = bytes.first_chunk().map_or(0, |b| u32::from_le_bytes(*b));
        let place = bytes.last_chunk().map_or(0, |b| u64::from_le_bytes(*b));
        Freed { section, place }
    }
}

/// To the kernel that takes the state.
pub struct Out {
    stream: BufWriter<WriteHalf<Box<dyn Wire>>>,
    token: u64,
    packed: Vec<u8>,
    pays: Pays,
    /// Hears what was taken out of the window, until the other end is gone.
    _hears: AbortOnDropHandle<()>,
    gone: CancellationToken,
    /// Bytes of pieces in the round under way, those in the window, and the others as they were sent.
    pub bytes: u64,
    pub shared: u64,
    pub sent: u64,
}

impl Out {
    /// Connect to the agent of that instance. `freed` is told of pieces in the window that it has taken.
    pub async fn connect(
        reach: &Reach,
        peer: u16,
        morph: u64,
        token: u64,
        freed: impl Fn(Freed) + Send + 'static,
    ) -> io::Result<Out> {
        let opened = async {
            let mut stream = reach.connect(peer).await?;
            stream.write_all(&Greeting { morph, token }.encode()).await?;
            Ok(stream)
        };
        let late = |_| Err(io::Error::other(format!("not within {OPEN_LIMIT:?}")));
        let stream = timeout(OPEN_LIMIT, opened).await.unwrap_or_else(late)?;
        let (reader, stream) = tokio::io::split(stream);
        let (mut reader, stream) = (BufReader::new(reader), BufWriter::new(stream));
        let gone = CancellationToken::new();
        let goes = gone.clone().drop_guard();
        let hears = tokio::spawn(async move {
            let _goes = goes;
            let mut record = [0; Freed::SIZE];
            while reader.read_exact(&mut record).await.is_ok() {
                freed(Freed::decode(&record));
            }
        });
        let packed = vec![0; lz4_flex::block::get_maximum_output_size(PIECE_LIMIT as usize)];
        let (pays, _hears) = (Pays::default(), AbortOnDropHandle::new(hears));
        Ok(Out { stream, token, packed, pays, _hears, gone, bytes: 0, shared: 0, sent: 0 })
    }

    /// Cancelled when the other end is gone: who has nothing to write does not notice.
    pub fn gone(&self) -> CancellationToken {
        self.gone.clone()
    }

    /// Whether it was made for this.
    pub fn is_for(&self, token: u64) -> bool {
        self.token == token
    }

    /// A round begins.
    pub fn begin(&mut self) {
        (self.bytes, self.shared, self.sent) = (0, 0, 0);
    }

    /// Send a piece; compressed when pieces get there faster that way.
    pub async fn piece(&mut self, section: u32, offset: u64, data: &[u8]) -> io::Result<()> {
        let began = Instant::now();
        let plain = u32::try_from(data.len()).unwrap_or(u32::MAX);
        let smaller = if self.pays.tries() {
            let most = (f64::from(plain) * WORTH) as usize;
            let packed = lz4_flex::block::compress_into(data, &mut self.packed).map_err(io::Error::other)?;
            (packed <= most).then_some(packed)
        } else {
            None
        };
        let (kind, payload) = match smaller.and_then(|n| self.packed.get(..n)) {
            Some(packed) => (Kind::Packed, packed),
            None => (Kind::Piece, data),
        };
        let length = u32::try_from(payload.len()).unwrap_or(u32::MAX);
        self.stream.write_all(&Head { kind, section, offset, length, plain }.encode()).await?;
        self.stream.write_all(payload).await?;
        self.bytes += u64::from(plain);
        self.sent += u64::from(length);
        self.pays.sent(plain, kind == Kind::Packed, began.elapsed());
        Ok(())
    }

    /// Say where a piece is in the window.
    pub async fn placed(&mut self, section: u32, offset: u64, bytes: u32, place: u64) -> io::Result<()> {
        let head = Head { kind: Kind::Placed, section, offset, length: 8, plain: bytes };
        let mut record = [0; Head::SIZE + 8];
        record[..Head::SIZE].copy_from_slice(&head.encode());
        record[Head::SIZE..].copy_from_slice(&place.to_le_bytes());
        self.stream.write_all(&record).await?;
        self.bytes += u64::from(bytes);
        self.shared += u64::from(bytes);
        Ok(())
    }

    /// Say what a section has come to.
    pub async fn digest(&mut self, section: u32, digest: &[u8]) -> io::Result<()> {
        let length = u32::try_from(digest.len()).ok().filter(|n| *n <= DIGEST_LIMIT);
        let length = length.ok_or_else(|| io::Error::other("a digest is too long"))?;
        self.stream
            .write_all(&Head { kind: Kind::Digest, section, offset: 0, length, plain: 0 }.encode())
            .await?;
        self.stream.write_all(digest).await
    }

    /// Send what is not on its way yet.
    pub async fn flush(&mut self) -> io::Result<()> {
        self.stream.flush().await
    }

    /// All pieces of a round are sent; to be flushed.
    pub async fn end(&mut self, round: u32) -> io::Result<()> {
        let head = Head { kind: Kind::End, section: 0, offset: round.into(), length: 0, plain: 0 };
        self.stream.write_all(&head.encode()).await
    }
}

/// What comes.
pub enum Came {
    Piece { section: u32, offset: u64, data: Bytes },
    Placed { section: u32, offset: u64, bytes: u32, place: u64 },
    Digest { section: u32, digest: Bytes },
    End { round: u32 },
}

/// From the kernel that has the state.
pub struct In {
    stream: BufReader<ReadHalf<Box<dyn Wire>>>,
    packed: Vec<u8>,
    freed: mpsc::UnboundedSender<Freed>,
    /// Says what was taken out of the window.
    _says: AbortOnDropHandle<()>,
}

impl Listener {
    async fn stream(&mut self) -> io::Result<Box<dyn Wire>> {
        Ok(match self {
            Listener::Vsock(l) => Box::new(l.accept().await?.0),
            Listener::Unix(l) => Box::new(l.accept().await?.0),
        })
    }

    /// The next connection that knows the token; `refused` is told of others.
    pub async fn accept(&mut self, morph: u64, token: u64, refused: impl Fn(&str)) -> io::Result<In> {
        let want = Greeting { morph, token }.encode();
        loop {
            let mut stream = self.stream().await?;
            let mut greeting = [0; Greeting::SIZE];
            match timeout(OPEN_LIMIT, stream.read_exact(&mut greeting)).await {
                Ok(Ok(_)) if greeting == want => return Ok(In::new(stream)),
                Ok(Ok(_)) => refused("it is not the state of this morph"),
                Ok(Err(e)) => refused(&e.to_string()),
                Err(_) => refused("it does not say what it is"),
            }
        }
    }
}

async fn exactly(stream: &mut (impl AsyncRead + Unpin), length: usize) -> io::Result<BytesMut> {
    let mut bytes = BytesMut::with_capacity(length);
    while bytes.len() < length {
        let more = length - bytes.len();
        if stream.take(more as u64).read_buf(&mut bytes).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    Ok(bytes)
}

impl In {
    fn new(stream: Box<dyn Wire>) -> In {
        let (stream, mut writer) = tokio::io::split(stream);
        let stream = BufReader::new(stream);
        // No more than there are pieces in the window.
        let (freed, mut taken) = mpsc::unbounded_channel::<Freed>();
        let says = tokio::spawn(async move {
            let (mut some, mut out) = (vec![], vec![]);
            while taken.recv_many(&mut some, 64).await > 0 {
                out.clear();
                some.drain(..).for_each(|freed| out.extend_from_slice(&freed.encode()));
                // A connection that ends is noticed by who reads.
                if writer.write_all(&out).await.is_err() {
                    return;
                }
            }
        });
        In { stream, packed: vec![], freed, _says: AbortOnDropHandle::new(says) }
    }

    /// Where to say what was taken out of the window.
    pub fn freed(&self) -> mpsc::UnboundedSender<Freed> {
        self.freed.clone()
    }

    /// The next record; `None` at the end.
    pub async fn next(&mut self) -> io::Result<Option<Came>> {
        let mut head = [0; Head::SIZE];
        match self.stream.read_exact(&mut head).await {
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            read => read?,
        };
        let head = Head::decode(&head)?;
        let (section, offset) = (head.section, head.offset);
        Ok(Some(match head.kind {
            Kind::End => Came::End { round: u32::try_from(offset).unwrap_or(u32::MAX) },
            Kind::Piece => {
                let data = exactly(&mut self.stream, head.length as usize).await?.freeze();
                Came::Piece { section, offset, data }
            }
            Kind::Digest => {
                let digest = exactly(&mut self.stream, head.length as usize).await?.freeze();
                Came::Digest { section, digest }
            }
            Kind::Placed => {
                let mut place = [0; 8];
                self.stream.read_exact(&mut place).await?;
                Came::Placed { section, offset, bytes: head.plain, place: u64::from_le_bytes(place) }
            }
            Kind::Packed => {
                self.packed.resize(head.length as usize, 0);
                self.stream.read_exact(&mut self.packed).await?;
                let plain = lz4_flex::block::decompress(&self.packed, head.plain as usize);
                let plain = plain.map_err(io::Error::other)?;
                if plain.len() != head.plain as usize {
                    let text = format!("{} bytes were packed, and {} came", head.plain, plain.len());
                    return Err(io::Error::other(text));
                }
                Came::Piece { section, offset, data: plain.into() }
            }
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn pair(dir: &tempfile::TempDir, token: u64) -> (Out, In, mpsc::UnboundedReceiver<Freed>) {
        let (said, freed) = mpsc::unbounded_channel();
        let to = Reach::Folder(dir.path().to_owned(), 7);
        let mut listener = to.listen().unwrap();
        let refused = std::sync::Mutex::new(vec![]);
        let accepting = listener.accept(3, 9, |why| refused.lock().unwrap().push(why.to_owned()));
        let connecting = async {
            // Whoever does not know the token is sent away.
            let _stranger = Out::connect(&to, 7, 3, 8, |_| {}).await.unwrap();
            Out::connect(&to, 7, 3, token, move |freed| said.send(freed).unwrap_or_default()).await.unwrap()
        };
        let (came, out) = tokio::join!(accepting, connecting);
        assert_eq!(*refused.lock().unwrap(), ["it is not the state of this morph"]);
        assert!(out.is_for(token));
        (out, came.unwrap(), freed)
    }

    #[tokio::test]
    async fn of_what_is_in_the_window_only_the_place_goes_and_comes_back_when_it_is_taken() {
        let dir = tempfile::tempdir().unwrap();
        let (mut out, mut come, mut freed) = pair(&dir, 9).await;
        for n in 0..3 {
            out.placed(n, 5, 1000 + n, 1 << 40).await.unwrap();
            out.flush().await.unwrap();
            let Some(Came::Placed { section, offset, bytes, place }) = come.next().await.unwrap() else {
                panic!("it is not there")
            };
            assert_eq!((section, offset, bytes, place), (n, 5, 1000 + n, 1 << 40));
            come.freed().send(Freed { section, place }).unwrap();
            assert_eq!(freed.recv().await, Some(Freed { section: n, place: 1 << 40 }));
        }
        assert_eq!((out.bytes, out.shared, out.sent), (3003, 3003, 0));
        drop(come);
        assert_eq!(freed.recv().await, None);
    }

    #[tokio::test]
    async fn what_cannot_be_compressed_stays_as_it_is_and_zeros_and_text_shrink() {
        let dir = tempfile::tempdir().unwrap();
        let (mut out, mut come, _) = pair(&dir, 9).await;
        let mut random = 1u64;
        let mut noise = || {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (random >> 56) as u8
        };
        let noise: Vec<u8> = std::iter::repeat_with(&mut noise).take(100_000).collect();
        let text = include_bytes!("../../../docs/state.md").repeat(20)[..200_000].to_vec();
        for (n, (data, shrinks)) in
            [(noise, false), (vec![0; 150_000], true), (text, true)].into_iter().enumerate()
        {
            out.begin();
            // However fast this machine is: here everything is compressed that can be.
            out.pays = Pays::always();
            let round = n as u32;
            let (sent, want) = (data.clone(), data.clone());
            let sending = async {
                for piece in 0..3 {
                    out.piece(piece, 5, &sent).await.unwrap();
                }
                out.end(round).await.unwrap();
                out.flush().await.unwrap();
            };
            let coming = async {
                for piece in 0..3 {
                    let Some(Came::Piece { section, offset, data }) = come.next().await.unwrap() else {
                        panic!("no piece")
                    };
                    assert!(section == piece && offset == 5 && data == want);
                }
                assert!(matches!(come.next().await.unwrap(), Some(Came::End { round: r }) if r == round));
            };
            tokio::join!(sending, coming);
            assert_eq!(out.bytes, 3 * data.len() as u64);
            assert_eq!(out.sent < out.bytes / 2, shrinks, "{} of {}", out.sent, out.bytes);
            assert!(shrinks || out.sent == out.bytes, "{} of {}", out.sent, out.bytes);
        }
        drop(out);
        assert!(come.next().await.unwrap().is_none());
    }

    #[tokio::test]
    async fn what_makes_no_sense_ends_the_connection_in_words() {
        let head = |kind: u32, length: u32, plain: u32| {
            let mut bytes = Head { kind: Kind::Piece, section: 0, offset: 0, length, plain }.encode();
            bytes[..4].copy_from_slice(&kind.to_le_bytes());
            bytes.to_vec()
        };
        for (bytes, want) in [
            (head(9, 0, 0), "a record of kind 9"),
            (head(5, 0, 0), "a record of kind 5"),
            (head(0, 1, 2), "a record of 1 bytes for 2"),
            (head(1, 3, 2), "a record of 3 bytes for 2"),
            (head(0, PIECE_LIMIT + 1, PIECE_LIMIT + 1), "a record of 262145 bytes"),
            (head(2, 1, 1), "a record of 1 bytes for 1"),
            (head(3, 7, 1), "a record of 7 bytes for 1"),
            (head(4, 65, 0), "a record of 65 bytes for 0"),
            (head(4, 1, 1), "a record of 1 bytes for 1"),
            (head(3, 8, PIECE_LIMIT + 1), "a record of 8 bytes for 262145"),
            (head(3, 8, 1), "early eof"),
            ([head(1, 4, 100), vec![0xff; 4]].concat(), ""),
            ([head(0, 10, 10), vec![0; 9]].concat(), "end of file"),
        ] {
            let (mut ours, theirs) = tokio::io::duplex(1 << 16);
            ours.write_all(&bytes).await.unwrap();
            drop(ours);
            let mut come = In::new(Box::new(theirs));
            let Err(error) = come.next().await else { panic!("{want}") };
            assert!(error.to_string().contains(want), "{error}");
        }
    }
}
