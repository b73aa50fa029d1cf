//! Abusive clients.

use crate::support::client::{query, read, summary, write};
use crate::support::{Container, TestBed};
use hickory_server::proto::rr::RecordType;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};
use tidegate_testbed::{Namespace, eventually};

fn scene() -> (TestBed, Container) {
    let bed = TestBed::new(Namespace::new(), "");
    bed.network("un1");
    bed.endpoint("un1", "web", &[], &["172.30.1.2"]);
    let container = bed.serve("web");
    (bed, container)
}

fn is_open(stream: &TcpStream) -> bool {
    stream.set_nonblocking(true).unwrap();
    let mut byte = [0; 1];
    let end = (&*stream).read(&mut byte);
    stream.set_nonblocking(false).unwrap();
    matches!(end, Err(error) if error.kind() == std::io::ErrorKind::WouldBlock)
}

#[test]
fn a_thousand_idle_clients_do_not_affect_udp_and_new_clients() {
    let (_bed, client) = scene();
    let idle: Vec<_> = (0..1_000).map(|_| client.connect()).collect();
    for _ in 0..200 {
        let start = Instant::now();
        assert_eq!(client.resolve("web", RecordType::A), "172.30.1.2");
        assert!(start.elapsed() < Duration::from_millis(100));
    }
    let mut stream = client.connect();
    write(&mut stream, &query(1, "web", RecordType::A));
    assert_eq!(summary(&read(&mut stream).unwrap()), "172.30.1.2");
    let open = || idle.iter().filter(|stream| is_open(stream)).count();
    assert!(eventually(Duration::from_secs(3), || open() <= 128), "{} are open", open());
}

#[test]
fn the_client_that_is_idle_longest_is_closed() {
    let (_bed, client) = scene();
    let mut busy = client.connect();
    let mut idle = Vec::new();
    for id in 0..400 {
        idle.push(client.connect());
        write(&mut busy, &query(id, "web", RecordType::A));
        assert_eq!(summary(&read(&mut busy).unwrap()), "172.30.1.2", "after {id} others");
    }
}

/// As in CVE-2026-35406: a truncated query, and a reset instead of FIN.
#[test]
fn a_truncated_query_and_a_reset_end_the_connection() {
    let (bed, client) = scene();
    let clients = || bed.resolver.usage().tcp_clients[0];
    for _ in 0..20 {
        let mut half = client.connect();
        half.write_all(&[0, 40, 1, 2, 3]).unwrap();
        assert!(eventually(Duration::from_secs(3), || clients() > 0));
        socket2::SockRef::from(&half).set_linger(Some(Duration::ZERO)).unwrap();
        drop(half);
        // At once, before the timeout of 2 s for incomplete queries.
        let start = Instant::now();
        assert!(eventually(Duration::from_secs(3), || clients() == 0));
        assert!(start.elapsed() < Duration::from_millis(1_500), "{:?}", start.elapsed());
    }
    let mut stream = client.connect();
    write(&mut stream, &query(1, "web", RecordType::A));
    assert_eq!(summary(&read(&mut stream).unwrap()), "172.30.1.2");
}

#[test]
fn an_incomplete_query_is_closed_after_two_seconds() {
    let (_bed, client) = scene();
    let start = Instant::now();
    let mut half = client.connect();
    half.write_all(&[0, 40, 1, 2, 3]).unwrap();
    let mut drip = client.connect();
    drip.write_all(&[0]).unwrap();
    let mut byte = [0; 1];
    assert!(eventually(Duration::from_secs(4), || {
        std::thread::sleep(Duration::from_millis(100));
        let _ = drip.write_all(&[1]);
        !is_open(&half) && !is_open(&drip)
    }));
    assert!(start.elapsed() > Duration::from_millis(1_900));
    assert!(!matches!(half.read(&mut byte), Ok(1)));
}

#[test]
fn an_excessive_length_closes_the_connection() {
    let (_bed, client) = scene();
    let mut stream = client.connect();
    stream.write_all(&[0xff, 0xff, 0, 1]).unwrap();
    let mut byte = [0; 1];
    assert!(matches!(stream.read(&mut byte), Ok(0) | Err(_)));
}

#[test]
fn no_queries_are_read_from_a_client_that_does_not_read() {
    let (bed, client) = scene();
    for number in 0..100_u32 {
        let address = std::net::Ipv4Addr::from(0xac1e_0a00 + number).to_string();
        bed.endpoint("un1", &format!("c{number}"), &["crowd"], &[&address]);
    }
    let mut stream = client.connect();
    stream.set_nonblocking(true).unwrap();
    let bytes = query(1, "crowd", RecordType::A).to_vec().unwrap();
    let framed = [&(bytes.len() as u16).to_be_bytes()[..], &bytes].concat();
    let flood = framed.repeat(1_000);
    let before = tidegate_testbed::procfs::rss(std::process::id()).unwrap();
    let mut written = 0_usize;
    let end = Instant::now() + Duration::from_secs(2);
    while Instant::now() < end {
        match stream.write(&flood) {
            Ok(length) => written += length,
            Err(_) => std::thread::sleep(Duration::from_millis(10)),
        }
    }
    let grown = tidegate_testbed::procfs::rss(std::process::id()).unwrap().saturating_sub(before);
    println!("{written} bytes of queries were accepted; the process grew by {grown} bytes");
    assert!(written < 32 << 20, "the size of the kernel buffers");
    assert_eq!(client.resolve("web", RecordType::A), "172.30.1.2");
}

#[test]
fn random_datagrams_do_no_harm() {
    let (_bed, client) = scene();
    let socket = client.namespace.run(|| std::net::UdpSocket::bind("127.0.0.1:0").unwrap());
    let mut number = 0x1234_5678_9abc_def0_u64;
    for length in 0..3_000_usize {
        let bytes: Vec<u8> = (0..length % 300)
            .map(|_| {
                number ^= number << 13;
                number ^= number >> 7;
                number ^= number << 17;
                number as u8
            })
            .collect();
        socket.send_to(&bytes, "127.0.0.11:53").unwrap();
    }
    socket.send_to(&[0; 65_507], "127.0.0.11:53").unwrap();
    assert_eq!(client.resolve("web", RecordType::A), "172.30.1.2");
}
