//! Where the primary kernel offers a service of an instance: `tcp:8080=vsock:5000`, `unix:/run/web.sock=vsock:5000`, and
//! with `,sessions` behind that when the service speaks the session protocol, so that connections outlive a kernel.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// The agent's port; not to be published.
const KMP_PORT: u32 = 9000;
/// The longest path of a Unix socket (`sun_path` of `unix(7)`, with its end).
const LONGEST_PATH: usize = 107;
const SHAPE: &str = "expected tcp:[ADDRESS:]PORT=vsock:PORT[,sessions] or unix:/PATH=vsock:PORT[,sessions]";

/// A text that does not say where a service is to be offered.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?}: {why}")]
pub struct PublishError {
    /// What was given.
    pub text: String,
    /// What is wrong with it.
    pub why: String,
}

/// Where clients connect to.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Listen {
    /// A TCP address of the primary kernel.
    Tcp(SocketAddr),
    /// A Unix socket in its file system, an absolute path.
    Unix(PathBuf),
}

/// A published service. As text (and so in every encoding): `<listen>=vsock:<port>`, and `,sessions`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Publish {
    /// Where clients connect to.
    pub listen: Listen,
    /// The vsock port the service listens on in the instance.
    pub port: u32,
    /// The service speaks the session protocol: connections go on with another kernel.
    pub sessions: bool,
}

fn tcp(text: &str) -> Result<Listen, String> {
    let address = match text.parse::<u16>() {
        Ok(port) => SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), port),
        Err(_) => text.parse().map_err(|_| {
            format!("tcp:{text} is neither a port nor ADDRESS:PORT ([ADDRESS]:PORT for IPv6)")
        })?,
    };
    if address.port() == 0 {
        return Err("clients could not know TCP port 0: name a port from 1 to 65535".into());
    }
    Ok(Listen::Tcp(address))
}

fn unix(path: &str) -> Result<Listen, String> {
    if !path.starts_with('/') || path.contains('\0') {
        return Err(format!("unix:{path} is not an absolute path"));
    }
    if path.len() > LONGEST_PATH {
        return Err(format!("the path has {} bytes; a Unix socket takes {LONGEST_PATH}", path.len()));
    }
    Ok(Listen::Unix(path.into()))
}

fn parse(text: &str) -> Result<Publish, String> {
    // A path may contain '=', a vsock port cannot.
    let (listen, target) = text.rsplit_once('=').ok_or(SHAPE)?;
    let port = target.strip_prefix("vsock:").ok_or(SHAPE)?;
    let (port, sessions) = match port.split_once(',') {
        Some((port, "sessions")) => (port, true),
        Some(_) => return Err(SHAPE.into()),
        None => (port, false),
    };
    let port: u32 = port.parse().map_err(|_| format!("{port:?} is not a vsock port"))?;
    match port {
        KMP_PORT => return Err(format!("vsock port {KMP_PORT} is the agent's own")),
        0 | u32::MAX => return Err(format!("vsock port {port} cannot be listened on")),
        _ => {}
    }
    let listen = match listen.split_once(':') {
        Some(("tcp", rest)) => tcp(rest)?,
        Some(("unix", rest)) => unix(rest)?,
        _ => return Err(SHAPE.into()),
    };
    Ok(Publish { listen, port, sessions })
}

impl FromStr for Publish {
    type Err = PublishError;

    fn from_str(text: &str) -> Result<Publish, PublishError> {
        parse(text).map_err(|why| PublishError { text: text.to_owned(), why })
    }
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Listen::Tcp(address) => write!(f, "tcp:{address}"),
            Listen::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl fmt::Display for Publish {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}=vsock:{}{}", self.listen, self.port, if self.sessions { ",sessions" } else { "" })
    }
}

impl Serialize for Publish {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Publish {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Publish, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_is_read_and_written_back() {
        for (text, written) in [
            ("tcp:8080=vsock:5000", "tcp:0.0.0.0:8080=vsock:5000"),
            ("tcp:127.0.0.1:80=vsock:1", "tcp:127.0.0.1:80=vsock:1"),
            ("tcp:[::]:80=vsock:4294967294", "tcp:[::]:80=vsock:4294967294"),
            ("unix:/run/a=b.sock=vsock:5000", "unix:/run/a=b.sock=vsock:5000"),
            ("tcp:80=vsock:5000,sessions", "tcp:0.0.0.0:80=vsock:5000,sessions"),
        ] {
            let publish: Publish = text.parse().unwrap();
            assert_eq!(publish.to_string(), written);
            assert_eq!(written.parse::<Publish>().unwrap(), publish);
        }
    }

    #[test]
    fn what_cannot_be_is_refused_with_the_reason() {
        let long = format!("unix:/{}=vsock:5", "x".repeat(107));
        for (text, word) in [
            ("", "expected"),
            ("tcp:8080", "expected"),
            ("tcp:8080=5000", "expected"),
            ("udp:53=vsock:5000", "expected"),
            ("tcp:80=vsock:5000,session", "expected"),
            ("tcp:0=vsock:5000", "port 0"),
            ("tcp:70000=vsock:5000", "neither a port"),
            ("tcp:localhost:80=vsock:5000", "neither a port"),
            ("unix:run/a=vsock:5000", "absolute"),
            (&long, "107"),
            ("tcp:80=vsock:9000", "agent"),
            ("tcp:80=vsock:0", "listened"),
            ("tcp:80=vsock:4294967295", "listened"),
            ("tcp:80=vsock:-1", "not a vsock port"),
        ] {
            let error = text.parse::<Publish>().unwrap_err().to_string();
            assert!(error.contains(word), "{text:?}: {error}");
        }
    }
}
