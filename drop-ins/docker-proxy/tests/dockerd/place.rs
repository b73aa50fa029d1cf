//! A network namespace for clients, with requests to the server of the containers.

use std::fmt;
use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::path::Path;
use std::thread;
use std::time::Duration;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use tidegate_testbed::Protocol;

/// The timeout of a response.
const TIMEOUT: Duration = Duration::from_secs(10);

/// A network namespace with a name.
pub(crate) struct Place {
    name: String,
    net: File,
}

impl Place {
    /// Opens the namespace at `path`.
    #[track_caller]
    pub(crate) fn open(name: &str, path: impl AsRef<Path>) -> Self {
        let net = File::open(&path);
        let net =
            net.unwrap_or_else(|error| panic!("{name}: open {}: {error}", path.as_ref().display()));
        Self { name: name.to_owned(), net }
    }

    /// Runs `f` on a thread in the namespace.
    pub(crate) fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        let done = thread::scope(|scope| {
            let inside = || {
                move_into_link_name_space(self.net.as_fd(), Some(LinkNameSpaceType::Network))
                    .expect("enter a network namespace");
                f()
            };
            scope.spawn(inside).join()
        });
        done.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    /// Sends a request to the server at `to`, and returns the client address that it sees.
    #[track_caller]
    pub(crate) fn asks(&self, protocol: Protocol, to: impl Into<SocketAddr>) -> IpAddr {
        let to = to.into();
        let seen = self.try_ask(protocol, to);
        seen.unwrap_or_else(|error| {
            panic!("{self} gets no answer from {to} ({protocol:?}): {error}")
        })
    }

    /// Asserts that `to` refuses the connection immediately.
    #[track_caller]
    pub(crate) fn is_refused(&self, protocol: Protocol, to: impl Into<SocketAddr>) {
        let to = to.into();
        let error = self.try_ask(protocol, to).expect_err("the request is answered");
        assert_eq!(
            error.kind(),
            ErrorKind::ConnectionRefused,
            "{self} and {to} ({protocol:?}): {error}"
        );
    }

    /// A connection on which the greeting of the server was received.
    #[track_caller]
    pub(crate) fn connects(&self, to: impl Into<SocketAddr>) -> TcpStream {
        let to = to.into();
        let connected = self.run(|| {
            let mut stream = TcpStream::connect_timeout(&to, TIMEOUT)?;
            stream.set_read_timeout(Some(TIMEOUT))?;
            let mut byte = [0];
            while byte != *b"\n" {
                stream.read_exact(&mut byte)?;
            }
            io::Result::Ok(stream)
        });
        connected.unwrap_or_else(|error| panic!("{self}: no exchange with {to}: {error}"))
    }

    fn try_ask(&self, protocol: Protocol, to: SocketAddr) -> io::Result<IpAddr> {
        const QUESTION: &[u8] = b"who am I?";
        let answer = match protocol {
            Protocol::Tcp => self.run(|| ask_tcp(to, QUESTION)),
            Protocol::Udp => self.run(|| ask_udp(to, QUESTION)),
        }?;
        let (peer, echo) = answer.split_once('\n').unwrap_or_default();
        assert_eq!(echo.as_bytes(), QUESTION, "{self} and {to} ({protocol:?})");
        let peer: SocketAddr = peer.parse().expect("the server names an address");
        Ok(peer.ip())
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

/// Sends `payload` over a connection of [`Place::connects`] and expects it back.
#[track_caller]
pub(crate) fn echo(stream: &mut TcpStream, payload: &[u8]) {
    stream.write_all(payload).expect("send");
    let mut answer = vec![0; payload.len()];
    stream.read_exact(&mut answer).expect("receive what was sent");
    assert_eq!(answer, payload);
}

/// The response of a web server on loopback, with its head.
#[track_caller]
pub(crate) fn get(place: &Place, port: u16, path: &str) -> String {
    place.run(|| {
        let to = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let mut stream = TcpStream::connect_timeout(&to, TIMEOUT).expect("connect");
        stream.set_read_timeout(Some(TIMEOUT)).expect("a stream has timeouts");
        write!(stream, "GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n").expect("send");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("receive");
        answer
    })
}

fn ask_tcp(to: SocketAddr, question: &[u8]) -> io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&to, TIMEOUT)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.write_all(question)?;
    stream.shutdown(Shutdown::Write)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

fn ask_udp(to: SocketAddr, question: &[u8]) -> io::Result<String> {
    let any: IpAddr =
        if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0))?;
    // A connected socket receives only from this address, and reports ICMP errors.
    socket.connect(to)?;
    socket.set_read_timeout(Some(TIMEOUT))?;
    socket.send(question)?;
    let mut answer = [0; 1000];
    let length = socket.recv(&mut answer)?;
    Ok(String::from_utf8_lossy(&answer[..length]).into_owned())
}
