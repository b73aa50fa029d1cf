//! A published UDP port from both ends: datagrams, sessions, and address changes.
//!
//! UDP may lose and reorder. In these tests this happens only if a buffer is full or an address is
//! unresolved. Each test therefore exchanges a datagram before it sends many, ignores the order of
//! arrival, and keeps at most a few hundred packets in flight. The per-CPU receive queue, which all
//! namespaces share, holds 1,000 packets (`net.core.netdev_max_backlog`).

#[path = "udp/addresses.rs"]
mod addresses;
#[path = "udp/backends.rs"]
mod backends;
#[path = "udp/datagrams.rs"]
mod datagrams;
#[path = "udp/sessions.rs"]
mod sessions;
mod support;

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use support::{Publisher, TIMEOUT, container, host, host_v6, is_ready, wait_until};
use tidegate_testbed::server::{EchoServer, PeerServer};
use tidegate_testbed::{Namespace, Pattern, Protocol, Signal, Topology, addr, raise_open_files};

/// The label of the published port for IPv4.
const PORT: &str = "0.0.0.0:5353/udp";

/// The label of the published port for IPv6.
const PORT_V6: &str = "[::]:5353/udp";

/// The largest UDP payload over IPv4: 65,535 bytes less the headers.
const MAX_PAYLOAD: usize = 65_507;

/// The unspecified address of the family of `like`, with port 0.
fn unspecified(like: SocketAddr) -> SocketAddr {
    let ip = if like.is_ipv4() {
        IpAddr::from(Ipv4Addr::UNSPECIFIED)
    } else {
        Ipv6Addr::UNSPECIFIED.into()
    };
    SocketAddr::new(ip, 0)
}

/// A socket with a large receive buffer and a timeout.
#[track_caller]
fn socket(namespace: &Namespace, bind: SocketAddr) -> UdpSocket {
    let socket = namespace.run(|| UdpSocket::bind(bind));
    let socket = socket.unwrap_or_else(|error| panic!("bind {bind}: {error}"));
    socket.set_read_timeout(Some(TIMEOUT)).unwrap();
    // net.core.rmem_max may be too low for this.
    rustix::net::sockopt::set_socket_recv_buffer_size_force(&socket, 16 << 20).unwrap();
    socket
}

#[track_caller]
fn receive(socket: &UdpSocket) -> (Vec<u8>, SocketAddr) {
    let mut buffer = vec![0; 1 << 16];
    let (length, from) = socket.recv_from(&mut buffer).expect("a datagram arrives");
    buffer.truncate(length);
    (buffer, from)
}

/// Sends a datagram and returns the next received one.
#[track_caller]
fn echo(socket: &UdpSocket, to: SocketAddr, datagram: &[u8]) -> Vec<u8> {
    socket.send_to(datagram, to).unwrap();
    receive(socket).0
}

/// Sends a datagram from `client` to a plain server socket. Returns the address for replies.
#[track_caller]
fn open_session(client: &UdpSocket, to: SocketAddr, server: &UdpSocket) -> SocketAddr {
    client.send_to(b"hello", to).unwrap();
    let (hello, upstream) = receive(server);
    assert_eq!(hello, b"hello");
    upstream
}

/// `size` bytes that depend on `seed`.
fn payload(size: usize, seed: u64) -> Vec<u8> {
    let mut bytes = vec![0; size];
    Pattern::new(seed).fill(&mut bytes);
    bytes
}

/// Receives as many datagrams as were sent and compares them regardless of order.
#[track_caller]
fn assert_same_datagrams(sent: &[Vec<u8>], at: &UdpSocket) {
    let mut received: Vec<Vec<u8>> = Vec::new();
    while received.len() < sent.len() && is_ready(at, PollFlags::IN, TIMEOUT) {
        received.push(receive(at).0);
    }
    let mut sent = sent.to_vec();
    sent.sort();
    received.sort();
    let lengths = |datagrams: &[Vec<u8>]| datagrams.iter().map(Vec::len).collect::<Vec<_>>();
    assert_eq!(lengths(&received), lengths(&sent));
    assert!(received == sent, "the lengths match, but the bytes differ");
    assert!(!is_ready(at, PollFlags::IN, Duration::ZERO), "more datagrams arrived than were sent");
}

/// Enables UDP_SEGMENT: the kernel splits sends on `socket` into datagrams of `segment` bytes.
fn segment_sends(socket: &UdpSocket, segment: u16) {
    let segment = libc::c_int::from(segment);
    // SAFETY: the pointer and the length describe `segment`.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_UDP,
            libc::UDP_SEGMENT,
            (&raw const segment).cast(),
            size_of_val(&segment) as libc::socklen_t,
        )
    };
    assert_eq!(result, 0, "UDP_SEGMENT: {}", io::Error::last_os_error());
}

/// Sends GSO batches of 1,400 byte datagrams, which fit the MTU of the sender but not the one
/// behind the proxy.
fn oversized_segments(from: &UdpSocket, to: SocketAddr, at: &UdpSocket) {
    const SEGMENT: u16 = 1400;
    let batch = payload(20 * usize::from(SEGMENT), 1);
    let segments: Vec<Vec<u8>> = batch.chunks(SEGMENT.into()).map(<[u8]>::to_vec).collect();
    segment_sends(from, SEGMENT);
    for _ in 0..3 {
        from.send_to(&batch, to).unwrap();
        assert_same_datagrams(&segments, at);
    }
}

/// Sends until a response arrives, for at most 5 s.
#[track_caller]
fn assert_resumes(client: &UdpSocket, to: SocketAddr) -> Vec<u8> {
    let start = Instant::now();
    loop {
        client.send_to(b"again", to).unwrap();
        if is_ready(client, PollFlags::IN, Duration::from_millis(20)) {
            assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
            let answer = receive(client).0;
            // Responses to the other datagrams sent meanwhile.
            while is_ready(client, PollFlags::IN, Duration::from_millis(50)) {
                receive(client);
            }
            return answer;
        }
        assert!(start.elapsed() < Duration::from_secs(5), "no response arrives any more");
    }
}

/// The host address that the backend sees is removed, added, and removed again while another takes
/// its place. Sockets bound to it must not stay in use.
#[track_caller]
fn bridge_address_changes(backend: IpAddr, [first, second]: [&str; 2]) {
    let net = Topology::three();
    for (namespace, link) in [(&net.host, "br0"), (&net.container, "eth0")] {
        // A neighbour solicitation can be lost while an address is set up; by default the next one
        // follows after a second.
        namespace.sysctl(&format!("net.ipv6.neigh.{link}.retrans_time_ms"), "50");
        namespace.sysctl(&format!("net.ipv4.neigh.{link}.retrans_time_ms"), "50");
    }
    let _peers = PeerServer::udp(&net.container, (backend, 53).into());
    let publisher = Publisher::start(&net.host, &format!("5353:53/udp --to {backend}"));
    let client = socket(&net.client, unspecified(host(5353)));
    let expect = |gateway: &str| {
        let seen: SocketAddr =
            String::from_utf8(assert_resumes(&client, host(5353))).unwrap().parse().unwrap();
        assert_eq!(seen.ip().to_string(), gateway.split('/').next().unwrap());
    };
    expect(first);
    net.host.ip(&["addr", "del", first, "dev", "br0"]);
    client.send_to(b"lost", host(5353)).unwrap();
    add_address(&net.host, first);
    expect(first);
    net.host.ip(&["addr", "del", first, "dev", "br0"]);
    add_address(&net.host, second);
    expect(second);
    assert_eq!(
        publisher.metrics().port("sessions", PORT),
        1,
        "no session of the old address is left"
    );
}

fn add_address(namespace: &Namespace, address: &str) {
    let mut arguments = vec!["addr", "add", address, "dev", "br0"];
    if address.contains("::") {
        arguments.push("nodad");
    }
    namespace.ip(&arguments);
}

/// A server that replies to datagrams starting with a question mark and ignores others.
struct SelectiveServer {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl SelectiveServer {
    #[track_caller]
    fn start(namespace: &Namespace, listen: SocketAddr) -> Self {
        let socket = socket(namespace, listen);
        socket.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut buffer = [0; 2048];
            while !stopped.load(Ordering::Relaxed) {
                let Ok((length, peer)) = socket.recv_from(&mut buffer) else { continue };
                if buffer[..length].starts_with(b"?") {
                    let _ = socket.send_to(&buffer[..length], peer);
                }
            }
        });
        Self { stop, thread: Some(thread) }
    }
}

impl Drop for SelectiveServer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
