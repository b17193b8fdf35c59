//! kmorph-agent: the part of kmorph inside an instance.
//!
//! kmorphd boots every instance with `rdinit=` at this program. As PID 1 it loads the substrate
//! modules, leaves a child that answers the Kernel Morphing Protocol on vsock port 9000, and becomes
//! the user's own init. The user's initramfs needs to know nothing of it.

mod kmsg;
mod metrics;
mod modules;
mod serve;
mod stage1;

use std::process::ExitCode;

fn main() -> ExitCode {
    if std::process::id() == 1 {
        return stage1::run();
    }
    let text = concat!(
        "kmorph-agent ",
        env!("CARGO_PKG_VERSION"),
        ": started by kmorphd as the first process of a kernel instance (rdinit=/.kmorph/agent); it does nothing when \
         started by hand\n"
    );
    // Nothing can be done when even this cannot be written.
    let _ = std::io::Write::write_all(&mut std::io::stderr(), text.as_bytes());
    ExitCode::from(2)
}
