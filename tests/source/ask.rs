//! Clients of every kind. Each request ends with a response or an error within a bounded time.

use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use socket2::{Domain, Socket, Type};
use tidegate_testbed::Protocol::{self, Tcp, Udp};
use tidegate_testbed::{Namespace, eventually};

use crate::scene::{Family, SOON};

/// The timeout after which a datagram is sent again.
const RESEND: Duration = Duration::from_millis(250);

/// The addresses of a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    /// The address that the server sees.
    pub(crate) peer: SocketAddr,
    /// The local address of the client.
    pub(crate) own: SocketAddr,
}

/// Sends a request from `from` to the peer server at `to`.
#[track_caller]
pub(crate) fn ask(from: &Namespace, protocol: Protocol, to: (IpAddr, u16)) -> Seen {
    let any = (Family::of(to.0).unspecified(), 0);
    try_ask(from, protocol, any, to)
        .unwrap_or_else(|error| panic!("{protocol:?} to {to:?}: {error}"))
}

/// Like [`ask`], from a chosen address, with errors returned.
pub(crate) fn try_ask(
    from: &Namespace,
    protocol: Protocol,
    own: (IpAddr, u16),
    to: (IpAddr, u16),
) -> io::Result<Seen> {
    match protocol {
        Tcp => {
            let mut stream = connect(from, own, to)?;
            let mut text = String::new();
            stream.read_to_string(&mut text)?;
            seen(&text, stream.local_addr()?)
        }
        Udp => {
            let socket = datagrams(from, own, to)?;
            let text = exchange(&socket, b"who am I?")?;
            seen(&String::from_utf8_lossy(&text), socket.local_addr()?)
        }
    }
}

/// A TCP connection with timeouts.
pub(crate) fn connect(
    from: &Namespace,
    own: (IpAddr, u16),
    to: (IpAddr, u16),
) -> io::Result<TcpStream> {
    from.run(|| {
        let socket = Socket::new(Domain::for_address(own.into()), Type::STREAM, None)?;
        socket.set_reuse_address(true)?;
        socket.bind(&SocketAddr::from(own).into())?;
        socket.connect_timeout(&SocketAddr::from(to).into(), SOON)?;
        let stream = TcpStream::from(socket);
        stream.set_read_timeout(Some(SOON))?;
        stream.set_write_timeout(Some(SOON))?;
        Ok(stream)
    })
}

/// A TCP connection from any address.
#[track_caller]
pub(crate) fn open(from: &Namespace, to: (IpAddr, u16)) -> TcpStream {
    let connected = connect(from, (Family::of(to.0).unspecified(), 0), to);
    connected.unwrap_or_else(|error| panic!("TCP to {to:?}: {error}"))
}

/// A UDP socket that receives only from `to`.
pub(crate) fn datagrams(
    from: &Namespace,
    own: (IpAddr, u16),
    to: (IpAddr, u16),
) -> io::Result<UdpSocket> {
    let socket = bind_datagrams(from, own)?;
    socket.connect(SocketAddr::from(to))?;
    Ok(socket)
}

/// A UDP socket that receives from all addresses.
///
/// A port that another thread has just closed may still be in use: a child process holds copies of
/// all sockets until it executes its program.
pub(crate) fn bind_datagrams(from: &Namespace, own: (IpAddr, u16)) -> io::Result<UdpSocket> {
    from.run(|| {
        let mut bound = Err(io::ErrorKind::AddrInUse.into());
        eventually(SOON, || {
            bound = UdpSocket::bind(SocketAddr::from(own));
            !matches!(&bound, Err(error) if error.kind() == io::ErrorKind::AddrInUse)
        });
        let socket = bound?;
        socket.set_read_timeout(Some(RESEND))?;
        Ok(socket)
    })
}

/// A UDP socket from any address.
#[track_caller]
pub(crate) fn open_datagrams(from: &Namespace, to: (IpAddr, u16)) -> UdpSocket {
    let opened = datagrams(from, (Family::of(to.0).unspecified(), 0), to);
    opened.unwrap_or_else(|error| panic!("UDP to {to:?}: {error}"))
}

/// Sends `question` until a response arrives.
pub(crate) fn exchange(socket: &UdpSocket, question: &[u8]) -> io::Result<Vec<u8>> {
    let deadline = Instant::now() + SOON;
    let mut buffer = [0; 2048];
    loop {
        let answer = socket.send(question).and_then(|_| socket.recv(&mut buffer));
        match answer {
            Ok(length) => return Ok(buffer[..length].to_vec()),
            Err(error) if Instant::now() >= deadline => return Err(error),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            // An ICMP error, which may be transient. An immediate retry would not help.
            Err(_) => std::thread::sleep(Duration::from_millis(10)),
        }
    }
}

/// Sends `text` over an echo connection and expects it back.
#[track_caller]
pub(crate) fn echo(stream: &mut TcpStream, text: &str) {
    let mut answer = vec![0; text.len()];
    let echoed = stream.write_all(text.as_bytes()).and_then(|()| stream.read_exact(&mut answer));
    echoed.unwrap_or_else(|error| panic!("echo {text:?}: {error}"));
    assert_eq!(String::from_utf8_lossy(&answer), text);
}

/// Sends `text` to a UDP echo server and expects it back, possibly after earlier responses.
#[track_caller]
pub(crate) fn echo_datagram(socket: &UdpSocket, text: &str) {
    let deadline = Instant::now() + SOON;
    loop {
        match exchange(socket, text.as_bytes()) {
            Ok(answer) if answer == text.as_bytes() => return,
            Ok(other) if Instant::now() >= deadline => {
                panic!("{:?}", String::from_utf8_lossy(&other))
            }
            Ok(_) => {}
            Err(error) => panic!("echo {text:?}: {error}"),
        }
    }
}

fn seen(text: &str, own: SocketAddr) -> io::Result<Seen> {
    let peer: SocketAddr =
        text.parse().map_err(|_| io::Error::other(format!("unexpected response {text:?}")))?;
    // A dual-stack server sees an IPv4 client as ::ffff:a.b.c.d.
    Ok(Seen { peer: SocketAddr::new(peer.ip().to_canonical(), peer.port()), own })
}
