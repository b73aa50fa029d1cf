//! Tests with sockets on loopback.

use super::*;
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::AsRawFd;
use std::time::Duration;

fn pair() -> (UdpSocket, UdpSocket) {
    let receiver = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    receiver.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    let sender = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    sender.connect(receiver.local_addr().unwrap()).unwrap();
    (sender, receiver)
}

/// Receives `expected` datagrams from `socket`.
fn receive_all(socket: &UdpSocket, expected: usize) -> Vec<Vec<u8>> {
    let mut buffer = vec![0; SLOT_BYTES];
    (0..expected)
        .map(|_| {
            let length = socket.recv(&mut buffer).unwrap();
            buffer[..length].to_vec()
        })
        .collect()
}

/// Sends `datagrams` through a relay socket with receive offload, as the proxy does.
fn relay(datagrams: &[Vec<u8>], offload: &mut Offload) -> (Vec<Vec<u8>>, Sent) {
    let (client, front) = pair();
    enable_receive_offload(&front).unwrap();
    enable_packet_info(&front, false).unwrap();
    let (upstream, server) = pair();
    for datagram in datagrams {
        client.send(datagram).unwrap();
    }
    let (mut batch, mut sender) = (RecvBatch::new(), SendBatch::new());
    let mut total = Sent::default();
    let mut seen = 0;
    while seen < datagrams.len() {
        let count = batch.receive(&front).unwrap();
        for index in 0..count {
            let datagram = batch.get(index);
            assert_eq!(datagram.source, Some(client.local_addr().unwrap()));
            assert_eq!(datagram.destination, Some(Ipv4Addr::LOCALHOST.into()));
            seen += datagram.count();
        }
        let sent = sender.forward(&upstream, &batch, 0..count, None, offload);
        assert!(sent.error.is_none(), "{sent:?}");
        total.datagrams += sent.datagrams;
        total.bytes += sent.bytes;
    }
    (receive_all(&server, datagrams.len()), total)
}

fn patterned(length: usize, seed: usize) -> Vec<u8> {
    (0..length).map(|i| (i * 7 + seed * 13) as u8).collect()
}

#[test]
fn datagrams_arrive_whole_in_order_and_with_their_boundaries() {
    let lengths = [1200, 1200, 1200, 300, 0, 1200, 64, 64, 64, 65_507, 1];
    let datagrams: Vec<_> =
        lengths.iter().enumerate().map(|(seed, length)| patterned(*length, seed)).collect();
    for mut offload in [Offload::default(), Offload::OFF] {
        let (arrived, sent) = relay(&datagrams, &mut offload);
        assert_eq!(arrived, datagrams);
        assert_eq!(sent.datagrams as usize, datagrams.len());
        assert_eq!(sent.bytes as usize, lengths.iter().sum::<usize>());
    }
}

#[test]
fn a_rejected_gso_batch_is_sent_as_single_datagrams() {
    // Over loopback (MTU 65,536) no GSO batch is too large. A socket without checksums rejects
    // segmentation instead (EINVAL or EIO, depending on the kernel version).
    let (client, front) = pair();
    let (upstream, server) = pair();
    let no_checksum = socket2::SockRef::from(&upstream);
    let on: libc::c_int = 1;
    // SAFETY: the pointer and the length describe `on`.
    let result = unsafe {
        libc::setsockopt(
            no_checksum.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NO_CHECK,
            (&raw const on).cast(),
            size_of_val(&on) as libc::socklen_t,
        )
    };
    assert_eq!(result, 0);
    let datagrams: Vec<_> = (0..5).map(|seed| patterned(500, seed)).collect();
    for datagram in &datagrams {
        client.send(datagram).unwrap();
    }
    let (mut batch, mut sender, mut offload) =
        (RecvBatch::new(), SendBatch::new(), Offload::default());
    let count = batch.receive(&front).unwrap();
    let sent = sender.forward(&upstream, &batch, 0..count, None, &mut offload);
    assert_eq!((sent.datagrams, sent.bytes), (5, 2500), "{sent:?}");
    assert_eq!(receive_all(&server, 5), datagrams);
    assert!(offload.max_segment < 500, "the limit is recorded: {offload:?}");
}

#[test]
fn a_closed_port_is_reported_and_the_datagram_is_sent() {
    let (client, front) = pair();
    let (upstream, server) = pair();
    let port = server.local_addr().unwrap();
    drop(server);
    upstream.send(b"provokes ICMP").unwrap();
    std::thread::sleep(Duration::from_millis(20));
    let server = UdpSocket::bind(port).unwrap();
    server.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    client.send(b"after").unwrap();
    let (mut batch, mut sender) = (RecvBatch::new(), SendBatch::new());
    let count = batch.receive(&front).unwrap();
    let sent = sender.forward(&upstream, &batch, 0..count, None, &mut Offload::default());
    assert_eq!((sent.datagrams, sent.refusals), (1, 1), "{sent:?}");
    assert_eq!(receive_all(&server, 1), [b"after".to_vec()]);
}

#[test]
fn a_reply_uses_the_requested_source_address() {
    let (client, front) = pair();
    client.send(b"ask").unwrap();
    let other = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
    let asker = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    asker.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    let (mut batch, mut sender) = (RecvBatch::new(), SendBatch::new());
    let count = batch.receive(&front).unwrap();
    let from = Ipv4Addr::new(127, 0, 0, 42).into();
    let destination = Destination { to: asker.local_addr().unwrap(), from: Some((from, 0)) };
    let sent =
        sender.forward(&other, &batch, 0..count, Some(&destination), &mut Offload::default());
    assert_eq!(sent.datagrams, 1, "{sent:?}");
    let (_, answered_by) = asker.recv_from(&mut [0; 16]).unwrap();
    assert_eq!(answered_by.ip(), from);
}
