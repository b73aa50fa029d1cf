//! The only program in the test image: sends the address of the client, then echoes.
//!
//! It uses only the standard library and is statically linked, so that the image contains a single
//! file. The arguments are its services: `tcp:80`, `udp:53`, on all IPv4 addresses, or on all
//! addresses if IPv6 is available.
//!
//! - TCP: a line with the address of the client, then an echo of every byte until the client
//!   half-closes.
//! - UDP: a line with the address of the sender, followed by an echo of the datagram.
//!
//! It prints `ready` when all ports are bound, and runs until it is killed.

use std::io::{self, Write};
use std::net::{Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::thread::{self, JoinHandle};

/// A buffer for any datagram.
const MAX_DATAGRAM: usize = 65_536;

fn main() -> io::Result<()> {
    let threads =
        std::env::args().skip(1).map(|service| serve(&service)).collect::<io::Result<Vec<_>>>()?;
    println!("ready");
    for thread in threads {
        // The threads do not end.
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
    let mut buffer = vec![0; MAX_DATAGRAM];
    loop {
        // Errors are ICMP errors about earlier responses.
        let Ok((length, sender)) = socket.recv_from(&mut buffer) else { continue };
        let answer = [format!("{}\n", plain(sender)).as_bytes(), &buffer[..length]].concat();
        let _ = socket.send_to(&answer, sender);
    }
}

/// The address as the client uses it: IPv4-mapped addresses of dual-stack sockets become IPv4.
fn plain(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}
