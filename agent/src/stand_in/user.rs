//! The user space of a stand-in: a program named on the kernel command line, as `init=` names one for a real kernel.

use std::io;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use kmorph_state::wire::ADDRESS_VARIABLE;
use kmp::stand_in::names;

use crate::{fork, kmsg};

/// Names the environment variable with the beginning of the paths that stand for the instance's vsock ports: a service
/// listens on this and the number of its port.
const PORTS_VARIABLE: &str = "KMORPH_PORTS";

/// The program and its arguments, which follow `--`, if there is one.
fn init(cmdline: &str) -> Option<(&str, Vec<&str>)> {
    let (kernel, user) = match cmdline.split_once(" -- ") {
        Some((kernel, user)) => (kernel, user),
        None => (cmdline, ""),
    };
    let path = kernel.split_ascii_whitespace().rev().find_map(|w| w.strip_prefix("init="))?;
    Some((path, user.split_ascii_whitespace().collect()))
}

/// The program that runs.
pub struct User(Child);

impl User {
    /// Start the program that the command line of the instance in `dir` names. It ends with this process.
    pub fn start(dir: &Path, id: u16, cmdline: &str) -> Option<User> {
        let (path, args) = init(cmdline)?;
        let port = names::port(id, 0);
        let ports = dir.join("..").join(port.trim_end_matches('0'));
        let mut command = Command::new(path);
        command
            .args(args)
            .stdin(Stdio::null())
            .env(ADDRESS_VARIABLE, dir.join(names::WORKLOADS))
            .env(PORTS_VARIABLE, ports);
        fork::ends_with_parent(&mut command);
        match command.spawn() {
            Ok(child) => {
                kmsg::log(kmsg::INFO, &format!("Run {path} as init process"));
                Some(User(child))
            }
            Err(e) => {
                kmsg::log(kmsg::ERROR, &format!("cannot run {path}: {e}"));
                None
            }
        }
    }

    /// Whether it has ended; how.
    pub fn ended(&mut self) -> Option<io::Result<String>> {
        self.0.try_wait().map(|ended| ended.map(|status| status.to_string())).transpose()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_is_named_as_for_a_real_kernel() {
        assert_eq!(
            init("quiet init=/a init=/bin/kv loglevel=3 -- kv 64"),
            Some(("/bin/kv", vec!["kv", "64"]))
        );
        assert_eq!(init("init=/bin/kv"), Some(("/bin/kv", vec![])));
        assert_eq!(init("quiet -- init=/no"), None);
        assert_eq!(init(""), None);
    }
}
