//! Whose process is at the other end of a TCP connection within one host.
//!
//! TCP has no `SO_PEERCRED`. The kernel's socket diagnosis (`NETLINK_SOCK_DIAG`, sock_diag(7))
//! finds the client's socket by its addresses, without a search through all connections, and tells
//! the user that made it.

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
const ANSWER: usize = 72;
/// Where in those `inet_diag_sockid` begins, and in the answer the user.
const ID_IN_REQUEST: usize = 8;
const ID_IN_ANSWER: usize = 4;
const USER: usize = 64;
const INODE: usize = 68;

/// Tells users of local clients.
pub struct LocalPeers(Socket);

impl LocalPeers {
    /// Asks the kernel about the network namespace of the calling thread.
    ///
    /// # Errors
    /// No descriptor is left, or the kernel has no socket diagnosis.
    pub fn new() -> io::Result<Self> {
        let socket = Socket::new(NETLINK_SOCK_DIAG)?;
        socket.connect(&NetlinkAddress::new(0, 0))?;
        socket.set_non_blocking(true)?;
        Ok(Self(socket))
    }

    /// The user that made the socket of `client`, which is connected to `local`. `None` if there is
    /// no such socket here, or if no process has it any more. A user that is not mapped in this
    /// process's user namespace is reported as 65534.
    #[must_use]
    pub fn user_of(&self, client: SocketAddr, local: SocketAddr) -> Option<u32> {
        let (client, local) = (canonical(client), canonical(local));
        // An answer that an earlier call has not read.
        let mut answer = [0; 256];
        while self.0.recv(&mut &mut answer[..], 0).is_ok() {}
        self.0.send(&request(client, local)?, 0).ok()?;
        // It is there when send(2) returns.
        let length = self.0.recv(&mut &mut answer[..], 0).ok()?;
        read(answer.get(..length)?, client, local)
    }
}

impl fmt::Debug for LocalPeers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LocalPeers")
    }
}

/// The question for the TCP socket at `of` that is connected to `to`; `None` for two families.
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
    // In all states.
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

/// As `inet_diag_sockid` has addresses.
fn octets(ip: IpAddr) -> [u8; 16] {
    match ip {
        IpAddr::V4(v4) => {
            let [a, b, c, d] = v4.octets();
            [a, b, c, d, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
        }
        IpAddr::V6(v6) => v6.octets(),
    }
}

/// The user in `answer`, if it is about the socket that was asked for: where there is no such
/// connection, the kernel describes a listener. For a socket that was closed, it describes what is
/// left of the connection, with inode 0 and user 0 (`inet_twsk_diag_fill`, net/ipv4/inet_diag.c),
/// which must not be taken for root's.
fn read(answer: &[u8], of: SocketAddr, to: SocketAddr) -> Option<u32> {
    let kind = u16::from_ne_bytes(answer.get(4..6)?.try_into().ok()?);
    let told = answer.get(HEADER..HEADER + ANSWER).filter(|_| kind == BY_FAMILY)?;
    let id = &told[ID_IN_ANSWER..];
    let ports = [of.port().to_be_bytes(), to.port().to_be_bytes()].concat();
    let word = |at: usize| told[at..].first_chunk().copied().map(u32::from_ne_bytes);
    (id[..4] == ports && word(INODE)? != 0).then(|| word(USER)).flatten()
}

const _: () = assert!(ID_IN_REQUEST + 48 == REQUEST && ID_IN_ANSWER + 48 + 12 == USER);

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};

    #[test]
    fn the_user_of_a_client_on_this_host_is_told() {
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
    fn a_client_that_has_closed_is_nobodys() {
        let peers = LocalPeers::new().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        drop(TcpStream::connect(listener.local_addr().unwrap()).unwrap());
        let (accepted, client) = listener.accept().unwrap();
        assert_eq!(peers.user_of(client, accepted.local_addr().unwrap()), None);
    }

    #[test]
    fn who_is_not_here_has_no_user() {
        let peers = LocalPeers::new().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let here = listener.local_addr().unwrap();
        assert_eq!(
            peers.user_of(here, "127.0.0.1:1".parse().unwrap()),
            None,
            "a listener is no client"
        );
        assert_eq!(peers.user_of("192.0.2.1:9".parse().unwrap(), here), None);
    }
}
