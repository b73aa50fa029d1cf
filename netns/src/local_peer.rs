//! User ID of the peer of a TCP connection within one host.
//!
//! TCP has no `SO_PEERCRED`. Instead, sock_diag(7) (`NETLINK_SOCK_DIAG`) looks up the client's
//! socket by its addresses, without a scan of all connections, and reports the user that created
//! it.

use netlink_sys::{Socket, SocketAddr as NetlinkAddress, protocols::NETLINK_SOCK_DIAG};
use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use tidegate_model::canonical;

/// `SOCK_DIAG_BY_FAMILY` (include/uapi/linux/sock_diag.h).
const BY_FAMILY: u16 = 20;
const NLM_F_REQUEST: u16 = 1;
/// Bytes of `nlmsghdr`.
const HEADER: usize = 16;
/// Bytes of `inet_diag_req_v2` and, at least, of `inet_diag_msg` (include/uapi/linux/inet_diag.h).
const REQUEST: usize = 56;
const REPLY: usize = 72;
/// Offsets of `inet_diag_sockid` in request and reply, and of user ID and inode in the reply.
const ID_IN_REQUEST: usize = 8;
const ID_IN_REPLY: usize = 4;
const USER: usize = 64;
const INODE: usize = 68;

/// A sock_diag(7) client that looks up the users of local clients.
pub struct LocalPeers(Socket);

impl LocalPeers {
    /// Opens a socket in the calling thread's network namespace.
    ///
    /// # Errors
    /// The process is out of file descriptors, or the kernel lacks sock_diag.
    pub fn new() -> io::Result<Self> {
        let socket = Socket::new(NETLINK_SOCK_DIAG)?;
        socket.connect(&NetlinkAddress::new(0, 0))?;
        socket.set_non_blocking(true)?;
        Ok(Self(socket))
    }

    /// Returns the user that created the socket bound to `client` and connected to `local`. Returns
    /// `None` if the namespace has no such socket, or if it has been closed. A user that is not
    /// mapped in this process's user namespace is reported as 65534.
    #[must_use]
    pub fn user_of(&self, client: SocketAddr, local: SocketAddr) -> Option<u32> {
        let (client, local) = (canonical(client), canonical(local));
        // Discard replies that an earlier call did not read.
        let mut reply = [0; 256];
        while self.0.recv(&mut &mut reply[..], 0).is_ok() {}
        self.0.send(&request(client, local)?, 0).ok()?;
        // The reply is queued when send(2) returns.
        let length = self.0.recv(&mut &mut reply[..], 0).ok()?;
        read(reply.get(..length)?, client, local)
    }
}

impl fmt::Debug for LocalPeers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LocalPeers")
    }
}

/// Builds a request for the TCP socket bound to `of` and connected to `to`. Returns `None` if their
/// families differ.
fn request(of: SocketAddr, to: SocketAddr) -> Option<Vec<u8>> {
    let family = match (of.ip(), to.ip()) {
        (IpAddr::V4(_), IpAddr::V4(_)) => libc::AF_INET,
        (IpAddr::V6(_), IpAddr::V6(_)) => libc::AF_INET6,
        _ => return None,
    };
    let mut message = Vec::with_capacity(HEADER + REQUEST);
    message.extend(((HEADER + REQUEST) as u32).to_ne_bytes());
    message.extend(BY_FAMILY.to_ne_bytes());
    message.extend(NLM_F_REQUEST.to_ne_bytes());
    message.extend([0; 8]);
    // Match all TCP states.
    message.extend([family as u8, libc::IPPROTO_TCP as u8, 0, 0]);
    message.extend(u32::MAX.to_ne_bytes());
    message.extend(of.port().to_be_bytes());
    message.extend(to.port().to_be_bytes());
    message.extend(octets(of.ip()));
    message.extend(octets(to.ip()));
    // Any interface, any cookie (`INET_DIAG_NOCOOKIE`).
    message.extend([0; 4]);
    message.extend([0xff; 8]);
    Some(message)
}

/// Encodes an address for `inet_diag_sockid`.
fn octets(ip: IpAddr) -> [u8; 16] {
    match ip {
        IpAddr::V4(v4) => {
            let [a, b, c, d] = v4.octets();
            [a, b, c, d, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
        }
        IpAddr::V6(v6) => v6.octets(),
    }
}

/// Returns the user in `reply` if the reply describes the requested socket. Without such a
/// connection, the kernel describes a listener instead. For a closed socket, it describes the
/// TIME_WAIT socket with inode 0 and user 0 (`inet_twsk_diag_fill`, net/ipv4/inet_diag.c), which
/// must not be mistaken for root.
fn read(reply: &[u8], of: SocketAddr, to: SocketAddr) -> Option<u32> {
    let kind = u16::from_ne_bytes(reply.get(4..6)?.try_into().ok()?);
    let message = reply.get(HEADER..HEADER + REPLY).filter(|_| kind == BY_FAMILY)?;
    let id = &message[ID_IN_REPLY..];
    let ports = [of.port().to_be_bytes(), to.port().to_be_bytes()].concat();
    let word = |at: usize| message[at..].first_chunk().copied().map(u32::from_ne_bytes);
    (id[..4] == ports && word(INODE)? != 0).then(|| word(USER)).flatten()
}

const _: () = assert!(ID_IN_REQUEST + 48 == REQUEST && ID_IN_REPLY + 48 + 12 == USER);

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};

    #[test]
    fn user_of_a_local_client_is_reported() {
        let peers = LocalPeers::new().unwrap();
        for (at, to) in [("127.0.0.1:0", None), ("[::1]:0", None), ("[::]:0", Some("127.0.0.1"))] {
            let listener = TcpListener::bind(at).unwrap();
            let port = listener.local_addr().unwrap().port();
            let ip: IpAddr = match to {
                Some(to) => to.parse().unwrap(),
                None => listener.local_addr().unwrap().ip(),
            };
            let stream = TcpStream::connect((ip, port)).unwrap();
            let (accepted, client) = listener.accept().unwrap();
            let user = peers.user_of(client, accepted.local_addr().unwrap());
            assert_eq!(user, Some(rustix::process::getuid().as_raw()), "{at}");
            drop(stream);
        }
    }

    #[test]
    fn closed_client_has_no_user() {
        let peers = LocalPeers::new().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        drop(TcpStream::connect(listener.local_addr().unwrap()).unwrap());
        let (accepted, client) = listener.accept().unwrap();
        assert_eq!(peers.user_of(client, accepted.local_addr().unwrap()), None);
    }

    #[test]
    fn unknown_client_has_no_user() {
        let peers = LocalPeers::new().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let here = listener.local_addr().unwrap();
        assert_eq!(
            peers.user_of(here, "127.0.0.1:1".parse().unwrap()),
            None,
            "a listener is not a client"
        );
        assert_eq!(peers.user_of("192.0.2.1:9".parse().unwrap(), here), None);
    }
}
