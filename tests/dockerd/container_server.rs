//! The only program in the tests' image: says who connected, then echoes.
//!
//! Built with nothing but the standard library and linked statically, so that the image is this one
//! file. Its arguments are what it serves: `tcp:80`, `udp:53`, on every IPv4 address, or on every
//! address where IPv6 is there.
//!
//! - TCP: a line with the client's address, then every byte that comes in, until the client's
//!   half-close.
//! - UDP: each datagram comes back behind a line with the sender's address.
//!
//! It prints `ready` when everything is bound, and ends when it is killed.

use std::io::{self, Write};
use std::net::{Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::thread::{self, JoinHandle};

/// More than any datagram.
const LARGEST_DATAGRAM: usize = 65_536;

fn main() -> io::Result<()> {
    let threads =
        std::env::args().skip(1).map(|service| serve(&service)).collect::<io::Result<Vec<_>>>()?;
    println!("ready");
    for thread in threads {
        // They do not end.
        let _ = thread.join();
    }
    Ok(())
}

/// Binds a port and serves it on a thread.
fn serve(service: &str) -> io::Result<JoinHandle<()>> {
    let unknown = || io::Error::other(format!("{service:?} is neither tcp:PORT nor udp:PORT"));
    let (protocol, port) = service.split_once(':').ok_or_else(unknown)?;
    let port: u16 = port.parse().map_err(|_| unknown())?;
    let everywhere: [SocketAddr; 2] =
        [(Ipv6Addr::UNSPECIFIED, port).into(), (Ipv4Addr::UNSPECIFIED, port).into()];
    match protocol {
        "tcp" => {
            let listener = TcpListener::bind(&everywhere[..])?;
            Ok(thread::spawn(move || {
                for stream in listener.incoming().flatten() {
                    thread::spawn(move || converse(&stream));
                }
            }))
        }
        "udp" => {
            let socket = UdpSocket::bind(&everywhere[..])?;
            Ok(thread::spawn(move || answer(&socket)))
        }
        _ => Err(unknown()),
    }
}

fn converse(mut stream: &TcpStream) -> io::Result<()> {
    writeln!(stream, "{}", plain(stream.peer_addr()?))?;
    io::copy(&mut &*stream, &mut stream)?;
    stream.shutdown(Shutdown::Write)
}

fn answer(socket: &UdpSocket) {
    let mut buffer = vec![0; LARGEST_DATAGRAM];
    loop {
        // Errors are about what was sent before, to a client that has gone.
        let Ok((length, sender)) = socket.recv_from(&mut buffer) else { continue };
        let answer = [format!("{}\n", plain(sender)).as_bytes(), &buffer[..length]].concat();
        let _ = socket.send_to(&answer, sender);
    }
}

/// The address as the client knows it: IPv4 where the socket is of both families.
fn plain(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}
