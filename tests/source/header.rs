//! `--source=proxy-protocol`: the container sees its gateway, and a header carries the client.

use std::io::{Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener};
use std::sync::mpsc::{Receiver, channel};

use tidegate_testbed::Namespace;

use crate::ask::open;
use crate::scene::{Family, Mode, SOON, Scene};

/// The signature at the beginning of a version 2 header.
const SIGNATURE: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";

#[test]
fn the_header_carries_the_client_and_the_container_sees_its_gateway() {
    let scene = Scene::new();
    let connections = listen(&scene.net.container);
    for mode in [Mode::Netns, Mode::To(Family::V4), Mode::To(Family::V6)] {
        for version in [None, Some("v1"), Some("v2")] {
            let mut options = vec!["--source", "proxy-protocol"];
            options.extend(version.into_iter().flat_map(|version| ["--proxy-protocol", version]));
            let publisher = scene.publish(mode, &["8080:80"], &options);
            for family in Family::BOTH {
                let paths: [(&Namespace, IpAddr); 3] = [
                    (&scene.net.client, family.host()),
                    (&scene.net.host, family.loopback()),
                    (&scene.neighbour, family.gateway()),
                ];
                for (from, to) in paths {
                    let mut stream = open(from, (to, 8080));
                    stream.write_all(b"payload").unwrap();
                    stream.shutdown(Shutdown::Write).unwrap();
                    let (peer, bytes) = connections.recv_timeout(SOON).expect("a connection");
                    let (client, server) = (stream.local_addr().unwrap(), (to, 8080).into());
                    let case = format!("{mode:?} {version:?} {client}");
                    assert_eq!(peer.ip().to_canonical(), mode.towards(family).gateway(), "{case}");
                    let header = match version {
                        Some("v1") => version_1(client, server),
                        _ => version_2(client, server),
                    };
                    let expected = [header.as_slice(), b"payload"].concat();
                    assert_eq!(
                        bytes.escape_ascii().to_string(),
                        expected.escape_ascii().to_string(),
                        "{case}"
                    );
                }
            }
            publisher.terminate();
        }
    }
}

/// Accepts connections on all addresses and returns the peer and all bytes of each.
fn listen(container: &Namespace) -> Receiver<(SocketAddr, Vec<u8>)> {
    let listener = container.run(|| TcpListener::bind((Family::V6.unspecified(), 80))).unwrap();
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            stream.set_read_timeout(Some(SOON)).unwrap();
            let mut bytes = Vec::new();
            stream.read_to_end(&mut bytes).unwrap();
            if sender.send((stream.peer_addr().unwrap(), bytes)).is_err() {
                return;
            }
        }
    });
    receiver
}

/// Section 2.1 of the PROXY protocol specification.
fn version_1(client: SocketAddr, server: SocketAddr) -> Vec<u8> {
    let family = if client.is_ipv4() { "TCP4" } else { "TCP6" };
    let (from, to) = (client.ip(), server.ip());
    format!("PROXY {family} {from} {to} {} {}\r\n", client.port(), server.port()).into_bytes()
}

/// Section 2.2 of the PROXY protocol specification.
fn version_2(client: SocketAddr, server: SocketAddr) -> Vec<u8> {
    let mut header = SIGNATURE.to_vec();
    header.push(0x21);
    header.extend(if client.is_ipv4() { [0x11, 0, 12] } else { [0x21, 0, 36] });
    for ip in [client.ip(), server.ip()] {
        match ip {
            IpAddr::V4(ip) => header.extend(ip.octets()),
            IpAddr::V6(ip) => header.extend(ip.octets()),
        }
    }
    header.extend([client.port(), server.port()].map(u16::to_be_bytes).concat());
    header
}
