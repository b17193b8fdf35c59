//! Where things lie when nothing is said: the system's places for root, the user's own for others.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use nix::unistd::{Uid, User};

/// Places.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Paths {
    /// Whether these are the system's.
    pub root: bool,
    /// Configuration; drop-ins lie in `<config>.d`.
    pub config: PathBuf,
    /// Folder of the socket, the lock and the log.
    pub run: PathBuf,
    /// Control socket.
    pub socket: PathBuf,
    /// Folder of the journal.
    pub state: PathBuf,
    /// Definitions of instances.
    pub instances: PathBuf,
    /// Where metrics are served.
    pub metrics: Option<SocketAddr>,
}

impl Paths {
    /// Of the user this process runs as.
    pub fn current() -> Paths {
        let uid = Uid::effective();
        if uid.is_root() {
            return Paths::system();
        }
        let home = || User::from_uid(uid).ok().flatten().map(|u| u.dir.into_os_string());
        let env = |name: &str| std::env::var_os(name).or_else(|| (name == "HOME").then(home).flatten());
        Paths::user(uid.as_raw(), env)
    }

    /// Root's.
    pub fn system() -> Paths {
        Paths {
            root: true,
            config: "/etc/kmorph/kmorphd.conf".into(),
            run: "/run/kmorph".into(),
            socket: "/run/kmorph/kmorphd.sock".into(),
            state: "/var/lib/kmorph".into(),
            instances: libkerf::INSTANCES.into(),
            metrics: Some(SocketAddr::from(([127, 0, 0, 1], 9464))),
        }
    }

    /// A user's, by the XDG base directories. Metrics are off: two users would ask for one port.
    pub fn user(uid: u32, env: impl Fn(&str) -> Option<OsString>) -> Paths {
        // A relative path in these variables is to be ignored, says their specification.
        let var = |name: &str| env(name).map(PathBuf::from).filter(|p| p.is_absolute());
        let private = PathBuf::from(format!("/tmp/kmorph-{uid}"));
        let home = var("HOME");
        let under = |name: &str, below: &str| {
            var(name)
                .or_else(|| home.as_deref().map(|h: &Path| h.join(below)))
                .unwrap_or_else(|| private.clone())
                .join("kmorph")
        };
        let run = var("XDG_RUNTIME_DIR").map_or_else(|| private.clone(), |d| d.join("kmorph"));
        let config = under("XDG_CONFIG_HOME", ".config");
        Paths {
            root: false,
            config: config.join("kmorphd.conf"),
            socket: run.join("kmorphd.sock"),
            state: under("XDG_STATE_HOME", ".local/state"),
            instances: config.join("instances"),
            metrics: None,
            run,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_has_places_of_its_own() {
        let env = |name: &str| match name {
            "XDG_RUNTIME_DIR" => Some("/run/user/1000".into()),
            "XDG_STATE_HOME" => Some("not/absolute".into()),
            "HOME" => Some("/home/ann".into()),
            _ => None,
        };
        let p = Paths::user(1000, env);
        assert_eq!(p.socket, Path::new("/run/user/1000/kmorph/kmorphd.sock"));
        assert_eq!(p.state, Path::new("/home/ann/.local/state/kmorph"));
        assert_eq!(p.instances, Path::new("/home/ann/.config/kmorph/instances"));
        assert_eq!(p.metrics, None);
        let bare = Paths::user(7, |_| None);
        assert_eq!(bare.socket, Path::new("/tmp/kmorph-7/kmorphd.sock"));
        assert_eq!(bare.state, Path::new("/tmp/kmorph-7/kmorph"));
    }
}
