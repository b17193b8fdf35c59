//! Inside an instance: a service with open files, which go along when its kernel is replaced.

use std::path::Path;

use kmorph_state::files::Content;
use kmorph_state::journal;
use vsock::{VMADDR_CID_ANY, VsockListener};

use crate::{Context, Result};

/// In memory of the kernel: the next one does not have it.
const PATH: &str = "/run/journal";

/// Serve for ever.
pub fn serve(port: u32) -> Result<()> {
    let listener = VsockListener::bind_with_cid_port(VMADDR_CID_ANY, port).context("listen")?;
    let service = journal::start(Path::new(PATH), Content::AsNeeded, |error| println!("journal: {error}"));
    for stream in listener.incoming() {
        let (stream, service) = (stream.context("accept")?, service.clone());
        std::thread::spawn(move || {
            if let Err(error) = service.serve(&stream, &stream) {
                println!("journal: a session ended: {error}");
            }
        });
    }
    Ok(())
}
