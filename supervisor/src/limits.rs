//! Limits of the process.

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tracing::{info, warn};

/// Descriptors below which clients and instances may be refused: a thousand of each and some to spare.
const ENOUGH: u64 = 4096;

/// Have as many descriptors as the system allows: every client and every instance needs some.
pub fn raise_descriptors() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE).and_then(|(soft, hard)| {
        if soft < hard {
            setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
        }
        Ok(hard)
    });
    match raised {
        Ok(limit) if limit < ENOUGH => warn!(
            limit,
            "few descriptors are allowed: many clients or instances may be refused; raise LimitNOFILE= or ulimit -Hn"
        ),
        Ok(limit) => info!(limit, "descriptors"),
        Err(error) => warn!(%error, "the limit of descriptors could not be raised"),
    }
}
