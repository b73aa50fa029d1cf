//! Sockets that other software has destroyed (`ss -K`, `SOCK_DESTROY`), at work again.
//!
//! The kernel aborts the socket and leaves its descriptor: a listener no longer listens
//! (`tcp_abort`, net/ipv4/tcp.c), and a datagram socket loses its device (`udp_abort`,
//! `__udp_disconnect`, net/ipv4/udp.c). A port that the kernel had chosen is lost as well. The
//! descriptor keeps all other options, so it is bound and told to listen again.

use rustix::io::Errno;
use rustix::net::{connect_unspec, listen, sockopt};
use socket2::SockRef;
use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;

/// Whether `error`, of accept(2) or of receiving, may say that the socket was destroyed.
#[must_use]
pub fn says_destroyed(error: &io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::INVAL | Errno::CONNABORTED))
}

/// Has a stream socket that was bound to `address`, and to `device`, listen again. Whether it had
/// ceased to.
///
/// # Errors
/// The kernel's: somebody else has taken a port that was lost.
pub fn revive_listener(
    socket: impl AsFd,
    address: SocketAddr,
    device: Option<&str>,
    backlog: i32,
) -> io::Result<bool> {
    if sockopt::socket_acceptconn(&socket)? {
        return Ok(false);
    }
    // An aborted socket is shut down, which its connections would inherit.
    connect_unspec(&socket)?;
    rebind(&socket, address, device)?;
    listen(&socket, backlog)?;
    Ok(true)
}

/// Binds a datagram socket that was destroyed to its `address` and `device` again.
///
/// # Errors
/// As of [`revive_listener`].
pub fn revive_datagrams(
    socket: impl AsFd,
    address: SocketAddr,
    device: Option<&str>,
) -> io::Result<()> {
    rebind(&socket, address, device)
}

fn rebind(socket: &impl AsFd, address: SocketAddr, device: Option<&str>) -> io::Result<()> {
    let socket = SockRef::from(socket);
    // What it was destroyed with.
    let _ = socket.take_error();
    if let Some(device) = device {
        socket.bind_device(Some(device.as_bytes()))?;
    }
    match socket.bind(&address.into()) {
        // It still is. getsockname(2) does not tell: it names a port that was lost.
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => Ok(()),
        bound => bound,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use socket2::{Domain, Socket, Type};
    use std::net::{Ipv4Addr, TcpListener, TcpStream};

    #[test]
    fn a_listener_that_was_shut_down_is_connected_to_again() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        assert!(!revive_listener(&listener, address, None, 8).unwrap(), "it listens");
        // As near to being destroyed as one comes without privilege (`inet_shutdown`,
        // `tcp_disconnect`).
        rustix::net::shutdown(&listener, rustix::net::Shutdown::Both).unwrap();
        assert!(says_destroyed(&listener.accept().unwrap_err()));
        assert!(revive_listener(&listener, address, None, 8).unwrap());
        let _client = TcpStream::connect(address).unwrap();
        assert!(listener.accept().is_ok());
    }

    #[test]
    fn a_port_that_somebody_else_has_taken_is_an_error() {
        let holder = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let lost = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        let error = revive_listener(&lost, holder.local_addr().unwrap(), None, 8).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
    }
}
