//! UDP sessions with several backends.

use crate::scene::{Balancer, CLOSED, Event, Scene, TIMEOUT};
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::thread;
use tidegate_model::Protocol;
use tidegate_proxy::{DialFailure, DropReason};

#[test]
fn a_session_moves_with_its_next_datagram_when_its_backend_is_removed() {
    let scene =
        Scene::with(Protocol::Udp, Balancer::new(&[server(b'a'), server(b'b')], None), |_, _| {});
    let client = client(&scene);
    assert_eq!(exchange(&client, b"1"), b"1a");
    assert_eq!(exchange(&client, b"2"), b"2a");
    scene.upstream.remove(0);
    assert_eq!(exchange(&client, b"3"), b"3b");
    assert_eq!(exchange(&client, b"4"), b"4b");
    // Reported with the first reply.
    let expected = [Event::Opened(0), Event::Connected(0), Event::Opened(1), Event::Connected(1)];
    assert_eq!(scene.upstream.events(), expected);
    assert_eq!(scene.upstream.leases(), 1);
    let port = scene.snapshot();
    assert_eq!((port.accepted, port.live), (2, 1));
    assert_eq!(port.dropped.iter().sum::<u64>(), 0);
}

#[test]
fn a_closed_port_is_reported_and_the_session_moves_when_the_backend_is_removed() {
    let scene = Scene::with(Protocol::Udp, Balancer::new(&[CLOSED, server(b'b')], None), |_, _| {});
    let client = client(&scene);
    let refused = Event::Failed(0, DialFailure::Refused);
    client.send(b"lost").unwrap();
    scene.upstream.wait_for(refused);
    for _ in 0..3 {
        client.send(b"lost").unwrap();
    }
    crate::scene::wait_until("each datagram is answered with an ICMP error", || {
        scene.snapshot().dropped[DropReason::BackendRefused as usize] >= 2
    });
    assert_eq!(scene.snapshot().accepted, 1, "the upstream decides when the session moves");
    scene.upstream.remove(0);
    assert_eq!(exchange(&client, b"2"), b"2b");
}

/// A client that is connected to the published port.
fn client(scene: &Scene) -> UdpSocket {
    let client = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    client.connect(scene.port).unwrap();
    client.set_read_timeout(Some(TIMEOUT)).unwrap();
    client
}

fn exchange(client: &UdpSocket, datagram: &[u8]) -> Vec<u8> {
    client.send(datagram).unwrap();
    let mut buffer = [0; 64];
    let length = client.recv(&mut buffer).unwrap();
    buffer[..length].to_vec()
}

/// Starts a server that returns each datagram with `name` appended. It ends with the process.
fn server(name: u8) -> SocketAddr {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let addr = socket.local_addr().unwrap();
    thread::spawn(move || {
        let mut buffer = [0; 64];
        loop {
            let (length, from) = socket.recv_from(&mut buffer[..63]).unwrap();
            buffer[length] = name;
            socket.send_to(&buffer[..=length], from).unwrap();
        }
    });
    addr
}
