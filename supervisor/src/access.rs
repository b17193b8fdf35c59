//! Who may do what, by the credentials the kernel vouches for.

use kmorph_control::{ErrorKind, OpError, Request};
use nix::unistd::{Gid, Group, Uid, User};
use tokio::net::UnixStream;

/// Members change things.
pub const ADMIN_GROUP: &str = "kmorph-admin";
/// Members look at things.
pub const READ_GROUP: &str = "kmorph";

/// A client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// User id.
    pub uid: u32,
    /// Process id, 0 when unknown.
    pub pid: i32,
    /// What it may do.
    pub right: Right,
}

/// Rights, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Right {
    /// Nothing.
    None,
    /// Look.
    Read,
    /// Change.
    Admin,
}

fn right(uid: u32, is_member: impl Fn(&str) -> bool) -> Right {
    // Who runs the daemon could change everything anyhow.
    if uid == 0 || uid == Uid::effective().as_raw() || is_member(ADMIN_GROUP) {
        Right::Admin
    } else if is_member(READ_GROUP) {
        Right::Read
    } else {
        Right::None
    }
}

/// Whether a user belongs to a group, by its main group or by the group's list.
fn member(uid: u32, gid: u32, name: &str) -> bool {
    let Ok(Some(group)) = Group::from_name(name) else { return false };
    if group.gid == Gid::from_raw(gid) {
        return true;
    }
    match User::from_uid(Uid::from_raw(uid)) {
        Ok(Some(user)) => group.gid == user.gid || group.mem.contains(&user.name),
        _ => false,
    }
}

impl Peer {
    /// Of a connection.
    pub fn of(stream: &UnixStream) -> std::io::Result<Peer> {
        let c = stream.peer_cred()?;
        let right = right(c.uid(), |group| member(c.uid(), c.gid(), group));
        Ok(Peer { uid: c.uid(), pid: c.pid().unwrap_or(0), right })
    }

    /// Whether there is anything it may do.
    pub fn may_connect(&self) -> Result<(), OpError> {
        match self.right {
            Right::None => Err(self.denied(READ_GROUP)),
            Right::Read | Right::Admin => Ok(()),
        }
    }

    fn denied(&self, group: &str) -> OpError {
        OpError::new(
            ErrorKind::Denied,
            format!("user {} may not do this: root and the group {group} may", self.uid),
        )
    }

    /// Whether a request is allowed.
    pub fn check(&self, request: &Request) -> Result<(), OpError> {
        let (need, group) =
            if request.changes() { (Right::Admin, ADMIN_GROUP) } else { (Right::Read, READ_GROUP) };
        if self.right >= need {
            return Ok(());
        }
        Err(self.denied(group))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rights_follow_groups() {
        assert_eq!(right(0, |_| false), Right::Admin);
        assert_eq!(right(1000, |g| g == ADMIN_GROUP), Right::Admin);
        assert_eq!(right(1000, |g| g == READ_GROUP), Right::Read);
        assert_eq!(right(1000, |_| false), Right::None);
    }

    #[test]
    fn readers_look_and_admins_change() {
        let peer = |right| Peer { uid: 1000, pid: 1, right };
        let stop = Request::DaemonStop { graceful: false };
        assert!(peer(Right::Read).check(&Request::List).is_ok());
        let e = peer(Right::Read).check(&stop).unwrap_err();
        assert_eq!(e.kind, ErrorKind::Denied);
        assert!(e.message.contains(ADMIN_GROUP), "{e}");
        assert!(peer(Right::Admin).check(&stop).is_ok());
        assert!(peer(Right::None).check(&Request::List).is_err());
        assert!(peer(Right::Read).may_connect().is_ok());
        let e = peer(Right::None).may_connect().unwrap_err();
        assert_eq!((e.kind, e.message.contains(READ_GROUP)), (ErrorKind::Denied, true), "{e}");
    }

    #[tokio::test]
    async fn this_process_is_itself() {
        let (a, _b) = UnixStream::pair().unwrap();
        let p = Peer::of(&a).unwrap();
        assert_eq!((p.uid, p.pid), (Uid::effective().as_raw(), std::process::id() as i32));
    }
}
