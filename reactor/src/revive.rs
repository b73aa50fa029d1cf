//! Recovery of sockets that other software destroyed (`ss -K`, `SOCK_DESTROY`).
//!
//! The kernel aborts the socket, and its descriptor stays open. A listener stops listening
//! (`tcp_abort`, net/ipv4/tcp.c), and a datagram socket loses its device (`udp_abort`,
//! `__udp_disconnect`, net/ipv4/udp.c). A socket on a port that the kernel chose also loses the
//! port. All other socket options persist, so it suffices to bind the socket and call listen(2)
//! again.

use rustix::io::Errno;
use rustix::net::{connect_unspec, listen, sockopt};
use socket2::SockRef;
use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;

/// Whether `error` of accept(2) or of a receive call can mean that the socket was destroyed.
#[must_use]
pub fn says_destroyed(error: &io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::INVAL | Errno::CONNABORTED))
}

/// Makes a stream socket that was bound to `address` and `device` listen again. Returns whether it
/// had stopped listening.
///
/// # Errors
/// Errors of the system calls, such as `EADDRINUSE` if another socket took the lost port.
pub fn revive_listener(
    socket: impl AsFd,
    address: SocketAddr,
    device: Option<&str>,
    backlog: i32,
) -> io::Result<bool> {
    if sockopt::socket_acceptconn(&socket)? {
        return Ok(false);
    }
    // An aborted socket is shut down, and accepted connections would inherit that state.
    connect_unspec(&socket)?;
    rebind(&socket, address, device)?;
    listen(&socket, backlog)?;
    Ok(true)
}

/// Binds a destroyed datagram socket to its `address` and `device` again.
///
/// # Errors
/// As for [`revive_listener`].
pub fn revive_datagrams(
    socket: impl AsFd,
    address: SocketAddr,
    device: Option<&str>,
) -> io::Result<()> {
    rebind(&socket, address, device)
}

fn rebind(socket: &impl AsFd, address: SocketAddr, device: Option<&str>) -> io::Result<()> {
    let socket = SockRef::from(socket);
    // Clears the error that the kernel set when it destroyed the socket.
    let _ = socket.take_error();
    if let Some(device) = device {
        socket.bind_device(Some(device.as_bytes()))?;
    }
    match socket.bind(&address.into()) {
        // The socket is still bound. getsockname(2) cannot tell, because it also reports a lost
        // port.
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
    fn a_listener_that_was_shut_down_accepts_again() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        assert!(!revive_listener(&listener, address, None, 8).unwrap(), "the socket is listening");
        // The closest equivalent of `SOCK_DESTROY` without privileges (`inet_shutdown`,
        // `tcp_disconnect`).
        rustix::net::shutdown(&listener, rustix::net::Shutdown::Both).unwrap();
        assert!(says_destroyed(&listener.accept().unwrap_err()));
        assert!(revive_listener(&listener, address, None, 8).unwrap());
        let _client = TcpStream::connect(address).unwrap();
        assert!(listener.accept().is_ok());
    }

    #[test]
    fn a_port_that_is_in_use_is_an_error() {
        let holder = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let lost = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        let error = revive_listener(&lost, holder.local_addr().unwrap(), None, 8).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
    }
}
