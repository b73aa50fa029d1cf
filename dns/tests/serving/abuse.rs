//! Clients that mean no good.

use crate::support::client::{question, read, told, write};
use crate::support::{Container, House};
use hickory_server::proto::rr::RecordType;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};
use tidegate_testbed::{Namespace, eventually};

fn scene() -> (House, Container) {
    let house = House::new(Namespace::new(), "");
    house.network("un1");
    house.endpoint("un1", "web", &[], &["172.30.1.2"]);
    let container = house.serve("web");
    (house, container)
}

fn is_open(stream: &TcpStream) -> bool {
    stream.set_nonblocking(true).unwrap();
    let mut byte = [0; 1];
    let end = (&*stream).read(&mut byte);
    stream.set_nonblocking(false).unwrap();
    matches!(end, Err(error) if error.kind() == std::io::ErrorKind::WouldBlock)
}

#[test]
fn a_thousand_idle_clients_leave_datagrams_and_new_clients_alone() {
    let (_house, asker) = scene();
    let idle: Vec<_> = (0..1_000).map(|_| asker.connect()).collect();
    for _ in 0..200 {
        let start = Instant::now();
        assert_eq!(asker.told("web", RecordType::A), "172.30.1.2");
        assert!(start.elapsed() < Duration::from_millis(100));
    }
    let mut stream = asker.connect();
    write(&mut stream, &question(1, "web", RecordType::A));
    assert_eq!(told(&read(&mut stream).unwrap()), "172.30.1.2");
    let open = || idle.iter().filter(|stream| is_open(stream)).count();
    assert!(eventually(Duration::from_secs(3), || open() <= 128), "{} are kept", open());
}

#[test]
fn who_asks_stays_and_who_idles_goes() {
    let (_house, asker) = scene();
    let mut busy = asker.connect();
    let mut idle = Vec::new();
    for id in 0..400 {
        idle.push(asker.connect());
        write(&mut busy, &question(id, "web", RecordType::A));
        assert_eq!(told(&read(&mut busy).unwrap()), "172.30.1.2", "after {id} others");
    }
}

/// As in CVE-2026-35406: a query that is cut short, and a reset instead of an end.
#[test]
fn a_truncated_query_and_a_reset_end_the_connection() {
    let (house, asker) = scene();
    let clients = || house.resolver.fill().tcp_clients[0];
    for _ in 0..20 {
        let mut half = asker.connect();
        half.write_all(&[0, 40, 1, 2, 3]).unwrap();
        assert!(eventually(Duration::from_secs(3), || clients() > 0));
        socket2::SockRef::from(&half).set_linger(Some(Duration::ZERO)).unwrap();
        drop(half);
        // At once, not after the two seconds that a silent client has.
        let start = Instant::now();
        assert!(eventually(Duration::from_secs(3), || clients() == 0));
        assert!(start.elapsed() < Duration::from_millis(1_500), "{:?}", start.elapsed());
    }
    let mut stream = asker.connect();
    write(&mut stream, &question(1, "web", RecordType::A));
    assert_eq!(told(&read(&mut stream).unwrap()), "172.30.1.2");
}

#[test]
fn a_client_that_stops_in_the_middle_goes_after_two_seconds() {
    let (_house, asker) = scene();
    let start = Instant::now();
    let mut half = asker.connect();
    half.write_all(&[0, 40, 1, 2, 3]).unwrap();
    let mut drip = asker.connect();
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
fn a_length_that_no_question_has_ends_the_conversation() {
    let (_house, asker) = scene();
    let mut stream = asker.connect();
    stream.write_all(&[0xff, 0xff, 0, 1]).unwrap();
    let mut byte = [0; 1];
    assert!(matches!(stream.read(&mut byte), Ok(0) | Err(_)));
}

#[test]
fn who_does_not_read_is_not_read_from() {
    let (house, asker) = scene();
    for number in 0..100_u32 {
        let address = std::net::Ipv4Addr::from(0xac1e_0a00 + number).to_string();
        house.endpoint("un1", &format!("c{number}"), &["crowd"], &[&address]);
    }
    let mut stream = asker.connect();
    stream.set_nonblocking(true).unwrap();
    let bytes = question(1, "crowd", RecordType::A).to_vec().unwrap();
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
    println!("{written} bytes of questions were taken; the process has grown by {grown} bytes");
    assert!(written < 32 << 20, "what the kernel's buffers hold");
    assert_eq!(asker.told("web", RecordType::A), "172.30.1.2");
}

#[test]
fn garbage_is_survived() {
    let (_house, asker) = scene();
    let socket = asker.namespace.run(|| std::net::UdpSocket::bind("127.0.0.1:0").unwrap());
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
    assert_eq!(asker.told("web", RecordType::A), "172.30.1.2");
}
