//! The connection of a workload to the agent of its kernel.

use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixStream};
use std::time::Duration;

use crate::agent::{Agent, Heard};
use crate::piece::{Piece, Sink};
use crate::wire::{ADDRESS, ADDRESS_VARIABLE, Order, Report, Section, State, VERSION, WireError};

/// Wait before the agent is sought again.
const AGAIN: Duration = Duration::from_millis(200);

/// Why the connection to the agent ended.
#[derive(Debug, thiserror::Error)]
pub enum HookError {
    /// There is none, or it was lost.
    #[error("the agent at {address}: {error}")]
    Io {
        /// Where the agent was sought.
        address: String,
        /// What went wrong.
        error: io::Error,
    },
    /// It is gone, and the workload stays throttled; why.
    #[error("the agent is gone, and the workload stays throttled: {0}")]
    Throttled(String),
    /// The agent said something that cannot be understood.
    #[error("the agent: {0}")]
    Wire(#[from] WireError),
}

/// What an export ended with.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// The sink failed: the connection is lost.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The workload cannot give the section; why.
    #[error("{0}")]
    Refused(String),
}

/// A program whose state can be taken along. Errors are texts for the operator.
pub trait Workload: Sync {
    /// Its name, unique within the kernel.
    fn name(&self) -> String;

    /// What it is doing.
    fn state(&self) -> State;

    /// What it can export and import.
    fn sections(&self) -> Vec<Section>;

    /// Serve, with the state that was imported or else with its own. Said again it changes nothing.
    fn activate(&self) -> Result<(), String>;

    /// Stand still: when this returns, no state changes before [`Workload::thaw`].
    fn freeze(&self) -> Result<(), String>;

    /// Go on. Said to one that is not frozen it changes nothing.
    fn thaw(&self) -> Result<(), String>;

    /// Another workload serves now, for good.
    fn retire(&self) -> Result<(), String>;

    /// Forget what was imported.
    fn discard(&self) -> Result<(), String>;

    /// Give the pieces of a section to `out`, each with 256 KiB at most: everything, or what changed since the last
    /// export.
    fn export(&self, section: &str, full: bool, out: &mut dyn Sink) -> Result<(), ExportError>;

    /// A value that is equal when the content of the section is, of 64 bytes at most.
    fn digest(&self, section: &str) -> Result<Vec<u8>, String>;

    /// Take a piece of a section.
    fn import(&self, section: &str, offset: u64, piece: &Piece<'_>) -> Result<(), String>;

    /// Whether [`Workload::throttle`] does something.
    fn throttles(&self) -> bool {
        false
    }

    /// Change the state at no more than `100 - percent` percent of the pace it was changed at before; 0: unhindered
    /// again. It is lifted, too, by everything that ends a morph: thaw, retire, discard, and an agent that is lost.
    fn throttle(&self, percent: u8) -> Result<(), String> {
        match percent {
            0 => Ok(()),
            _ => Err("it cannot be throttled".into()),
        }
    }

    /// The pieces since the last call belong together and are all there.
    fn imported(&self, section: &str) -> Result<(), String>;
}

/// Where the agent listens, as the environment says.
pub fn address() -> String {
    std::env::var(ADDRESS_VARIABLE).ok().filter(|a| !a.is_empty()).unwrap_or_else(|| ADDRESS.into())
}

/// Connect to the agent: a path, or `@` and a name in the abstract namespace.
pub fn connect(address: &str) -> io::Result<UnixStream> {
    match address.strip_prefix('@') {
        Some(name) => UnixStream::connect_addr(&SocketAddr::from_abstract_name(name)?),
        None => UnixStream::connect(address),
    }
}

/// Do what the agent says, for ever. An agent that is lost is sought again; what the workload is doing meanwhile does
/// not change: one that is frozen stays so until an agent says otherwise. `log` is told of what went wrong.
pub fn run(workload: &dyn Workload, address: &str, log: &mut dyn FnMut(&HookError)) -> ! {
    let mut said = false;
    loop {
        let ended = connect(address)
            .map_err(|error| HookError::Io { address: address.to_owned(), error })
            .and_then(|stream| {
                said = false;
                serve(workload, &stream, address)
            });
        if let Err(error) = ended
            && !std::mem::replace(&mut said, true)
        {
            log(&error);
        }
        std::thread::park_timeout(AGAIN);
    }
}

/// Do what the agent on this connection says, until the connection ends.
pub fn serve(workload: &dyn Workload, stream: &UnixStream, address: &str) -> Result<(), HookError> {
    let ended = obey(workload, stream, address);
    if let Err(why) = workload.throttle(0) {
        return ended.and(Err(HookError::Throttled(why)));
    }
    ended
}

fn obey(workload: &dyn Workload, stream: &UnixStream, address: &str) -> Result<(), HookError> {
    let lost = |error| HookError::Io { address: address.to_owned(), error };
    let mut agent = Agent::new(stream);
    let mut greet = || {
        agent.say(&Report::Hello {
            version: VERSION,
            name: workload.name(),
            state: workload.state(),
            throttles: workload.throttles(),
            windows: true,
        })?;
        for section in workload.sections() {
            agent.say(&Report::Section(section))?;
        }
        agent.say(&Report::Ready)?;
        agent.flush()
    };
    greet().map_err(lost)?;
    // What went wrong since the last order that is answered.
    let mut failed: Option<String> = None;
    loop {
        let order = match agent.next() {
            Ok(Some(Heard::Order(order))) => order,
            Ok(Some(Heard::Piece { section, offset, bytes })) => {
                if failed.is_none() {
                    failed = workload.import(&section, offset, &Piece::from(&*bytes)).err();
                }
                agent.done_with(bytes);
                continue;
            }
            Ok(None) => return Ok(()),
            Err(trouble) => return Err(trouble.of(address)),
        };
        let done = match order {
            // The agent's end of the connection has them already.
            Order::Import { .. } | Order::Freed { .. } => continue,
            Order::Window { from, size } => agent.open_window(from, size).map(|()| Report::Ok),
            Order::Take { section, offset, bytes, place } => {
                if failed.is_none() {
                    let piece = agent.placed(place, bytes);
                    failed = piece.and_then(|piece| workload.import(&section, offset, &piece)).err();
                }
                Ok(Report::Ok)
            }
            Order::Imported { section } => match failed.take() {
                Some(why) => Err(why),
                None => workload.imported(&section).map(|()| Report::Ok),
            },
            Order::Export { section, full } => match workload.export(&section, full, &mut agent) {
                Ok(()) => Ok(Report::Done),
                Err(ExportError::Refused(why)) => Err(why),
                Err(ExportError::Io(error)) => return Err(lost(error)),
            },
            Order::Throttle { percent } => workload.throttle(percent).map(|()| Report::Ok),
            Order::Digest { section } => workload.digest(&section).map(Report::Digest),
            Order::Freeze => workload.freeze().map(|()| Report::Ok),
            Order::Activate => ended(&mut agent, workload.activate()),
            Order::Thaw => ended(&mut agent, workload.thaw()),
            Order::Retire => ended(&mut agent, workload.retire()),
            Order::Discard => {
                failed = None;
                ended(&mut agent, workload.discard())
            }
        };
        let report = done.unwrap_or_else(Report::Error);
        // Orders that are there already are answered together.
        agent.answer(&report).map_err(|trouble| trouble.of(address))?;
    }
}

/// A morph has ended one way or the other.
fn ended(agent: &mut Agent<'_>, done: Result<(), String>) -> Result<Report, String> {
    agent.close_window();
    done.map(|()| Report::Ok)
}
