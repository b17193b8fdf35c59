//! More CPUs and memory for a stand-in that runs.

use std::io::ErrorKind;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

use kmp::stand_in::names;
use tokio::time::Instant;

use super::Inner;
use super::claim::Claim;
use crate::{Grown, Growth, InstanceId, PlatformError};

/// Claim it, write that down, tell the stand-in. Blocks for `limit` at most.
pub fn grow(
    inner: &Inner,
    id: InstanceId,
    incarnation: u64,
    growth: &Growth,
    limit: Duration,
) -> Result<Grown, PlatformError> {
    let began = Instant::now();
    let dir = inner.folder.instance(id);
    let (cpus, extents) = inner.state().grow(id, incarnation, growth, inner.config.cpus, inner.pool())?;
    let mut claim = Claim::read(&dir, id)
        .and_then(|c| c.ok_or_else(|| "it is gone".into()))
        .map_err(|e| PlatformError::os(format!("read the claim of instance {id}"), e))?;
    claim.cpus.clone_from(&cpus);
    claim.extents.clone_from(&extents);
    claim.write(&dir)?;
    let memory_took = began.elapsed();
    let told = tell(inner, id, cpus.len(), limit);
    Ok(Grown {
        cpus: growth.cpus.clone(),
        memory: extents,
        failed: told.err().into_iter().collect(),
        memory_took,
        cpus_took: began.elapsed().saturating_sub(memory_took),
    })
}

/// Have the stand-in beat on so many CPUs.
fn tell(inner: &Inner, id: InstanceId, cpus: usize, limit: Duration) -> Result<(), String> {
    let path = inner.folder.instance(id).join(names::FAULT);
    let name = format!("kmorph-grow-{}-{id}", std::process::id());
    let asked = || -> std::io::Result<String> {
        let socket = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name)?)?;
        socket.set_read_timeout(Some(limit.max(Duration::from_millis(1))))?;
        socket.send_to(format!("grow {cpus}").as_bytes(), &path)?;
        let mut buf = [0; 512];
        let n = socket.recv(&mut buf)?;
        Ok(String::from_utf8_lossy(&buf[..n]).into_owned())
    };
    match asked() {
        Ok(said) if said == "ok" => Ok(()),
        Ok(said) => Err(format!("the stand-in of instance {id} says: {said}")),
        Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
            Err(format!("the stand-in of instance {id} did not answer within {limit:?}"))
        }
        Err(e) => Err(format!("{}: {e}", path.display())),
    }
}
