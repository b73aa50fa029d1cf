//! A published TCP port from both ends, with real clients and servers and a real kernel.
//!
//! The client connects to the address of the host, `tidegate publish` runs on the host, and the
//! server is in a container on the bridge of the host. Where the expectation is "as without a
//! proxy", the test first does the same with forwarding by the kernel, and compares.

#[path = "tcp/backends.rs"]
mod backends;
#[path = "tcp/buffers.rs"]
mod buffers;
#[path = "tcp/clients.rs"]
mod clients;
#[path = "tcp/ending.rs"]
mod ending;
#[path = "tcp/half_close.rs"]
mod half_close;
#[path = "tcp/limits.rs"]
mod limits;
#[path = "tcp/payload.rs"]
mod payload;
#[path = "tcp/resets.rs"]
mod resets;
#[path = "tcp/stalled.rs"]
mod stalled;
mod support;

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use rustix::process::{ForeignRawFd, Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use socket2::SockRef;
use support::{
    Backend, Publisher, TIMEOUT, address, ask, connect, container, host, host_v6, is_ready,
    limit_open_files, read_all, read_to_end, reset, route_many_addresses, wait_for_reset,
    wait_until,
};
use tidegate_testbed::server::{EchoServer, PeerServer, Sink, Source};
use tidegate_testbed::transfer::{self, Transfer};
use tidegate_testbed::{
    Namespace, Pattern, Protocol, Signal, Topology, addr, procfs, raise_open_files,
};

const MIB: u64 = 1 << 20;

/// The amount of payload after which a connection counts as fast.
const FAST: u64 = MIB;

/// The label of the published port for IPv4.
const PORT: &str = "0.0.0.0:8080/tcp";

/// A published port 8080 in front of a backend with explicit accepts.
struct Setup {
    net: Topology,
    backend: Backend,
    publisher: Publisher,
}

impl Setup {
    #[track_caller]
    fn new(options: &str) -> Self {
        let net = Topology::three();
        let backend = Backend::tcp(&net.container, container(80));
        let publisher =
            Publisher::start(&net.host, &format!("8080:80 --to {} {options}", addr::CONTAINER_V4));
        Self { net, backend, publisher }
    }

    /// A setup that copies and one that splices at any read size, for each of `amounts`.
    fn each<const N: usize>(amounts: [u64; N]) -> impl Iterator<Item = (Self, u64)> {
        let options = ["--splice-from 1000000000", "--splice-from 0"];
        options.into_iter().flat_map(move |option| amounts.map(|moved| (Self::new(option), moved)))
    }

    /// A connection: the end of the client and that of the server.
    #[track_caller]
    fn pair(&self) -> (TcpStream, TcpStream) {
        (connect(&self.net.client, host(8080)), self.backend.accept())
    }

    /// A connection that has moved the given amount in each direction.
    #[track_caller]
    fn pair_after(&self, moved: u64) -> (TcpStream, TcpStream) {
        let (client, server) = self.pair();
        carry(&client, &server, moved);
        carry(&server, &client, moved);
        (client, server)
    }

    /// Like [`Self::pair_after`], with the end of the client first, or that of the server.
    #[track_caller]
    fn ordered_pair_after(&self, moved: u64, client_first: bool) -> (TcpStream, TcpStream) {
        let (client, server) = self.pair_after(moved);
        if client_first { (client, server) } else { (server, client) }
    }

    #[track_caller]
    fn wait_until_closed(&self) {
        wait_until("the port is closed", || !self.net.host.is_bound(Protocol::Tcp, 8080));
        assert_eq!(refused(&self.net.client, host(8080)), io::ErrorKind::ConnectionRefused);
    }
}

/// Sends `length` bytes over a connection and checks the received bytes.
#[track_caller]
fn carry(from: &TcpStream, to: &TcpStream, length: u64) {
    thread::scope(|scope| {
        scope.spawn(|| transfer::send(&mut &*from, 9, length).unwrap());
        let arrived = transfer::receive(&mut to.take(length), 9);
        assert_eq!(arrived, Transfer::complete(length));
    });
}

/// Connects, and returns the error of a refused client. An orderly end is a failure.
#[track_caller]
fn refused(from: &Namespace, to: SocketAddr) -> io::ErrorKind {
    error_of_refused(from.run(|| TcpStream::connect_timeout(&to, TIMEOUT)))
}

/// The error of a client that the proxy refuses.
#[track_caller]
fn error_of_refused(connected: io::Result<TcpStream>) -> io::ErrorKind {
    match connected {
        Ok(stream) => {
            let (bytes, error) = read_all(&support::with_timeouts(stream));
            assert_eq!(bytes, b"");
            error.expect("the connection ended as if it had been served")
        }
        // The reset came before connect(2) returned; a closed port has another error kind.
        Err(error) => error.kind(),
    }
}

/// Makes `count` connections in sequence, each with one request to an echo server.
#[track_caller]
fn ask_in_turn(from: &Namespace, count: u32) {
    from.run(|| {
        for number in 0..count {
            let stream = support::with_timeouts(TcpStream::connect(host(8080)).unwrap());
            assert_eq!(
                ask(&stream, &number.to_be_bytes()),
                number.to_be_bytes(),
                "connection {number}"
            );
        }
    });
}

/// Makes packets to the container vanish, as with a pulled cable: the neighbour entry has an unused
/// MAC address.
fn black_hole(host: &Namespace) {
    let container = addr::CONTAINER_V4.to_string();
    host.ip(&[
        "neigh",
        "replace",
        &container,
        "lladdr",
        "02:00:00:00:00:99",
        "dev",
        "br0",
        "nud",
        "permanent",
    ]);
}

/// Undoes [`black_hole`].
fn restore_path(host: &Namespace) {
    host.ip(&["neigh", "del", &addr::CONTAINER_V4.to_string(), "dev", "br0"]);
}

/// The server accepts, sends "too busy" and ends the connection with `end`, before the proxy learns
/// that its connect succeeded. Returns what the client receives, as it would without a proxy.
fn answered_before_the_proxy_reads(
    end: impl FnOnce(TcpStream),
) -> (Vec<u8>, Option<io::ErrorKind>) {
    let net = Topology::three();
    let backend = Backend::tcp(&net.container, container(80));
    black_hole(&net.host);
    let arguments = format!("8080:80 --to {} --dial-timeout 1h", addr::CONTAINER_V4);
    let publisher = Publisher::start(&net.host, &arguments);
    let client = connect(&net.client, host(8080));
    wait_until("the backend is dialled", || dials(&net.host) == 1);
    pause(&publisher, true);
    restore_path(&net.host);
    let mut server = backend.accept();
    server.write_all(b"too busy").unwrap();
    end(server);
    pause(&publisher, false);
    if !is_ready(&client, PollFlags::IN, TIMEOUT) {
        return (vec![], None);
    }
    // An orderly end of the server leaves the direction from the client open.
    client.shutdown(Shutdown::Write).ok();
    read_all(&client)
}

/// Stops the publisher with SIGSTOP, or continues it.
#[track_caller]
fn pause(publisher: &Publisher, on: bool) {
    let pid = publisher.process.pid();
    let signal = if on { Signal::STOP } else { Signal::CONT };
    rustix::process::kill_process(Pid::from_raw(pid as i32).unwrap(), signal).unwrap();
    if on {
        wait_until("the publisher has stopped", || procfs::state(pid) == Some('T'));
    }
}

/// The number of connections from `namespace` to port 80 in SYN_SENT.
fn dials(namespace: &Namespace) -> usize {
    let table = namespace.run(|| std::fs::read_to_string("/proc/thread-self/net/tcp").unwrap());
    // After the line number: local address, remote address, state (02 is SYN_SENT), in hex.
    let dialling = |line: &&str| {
        let mut fields = line.split_ascii_whitespace().skip(2);
        fields.next().is_some_and(|remote| remote.ends_with(":0050")) && fields.next() == Some("02")
    };
    table.lines().filter(dialling).count()
}

/// Duplicates of all sockets of the publisher.
fn sockets_of(publisher: &Publisher) -> Vec<OwnedFd> {
    let pid = publisher.process.pid();
    let process = pidfd_open(Pid::from_raw(pid as i32).unwrap(), PidfdFlags::empty()).unwrap();
    let descriptors = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let sockets = descriptors.flatten().filter(|entry| {
        std::fs::read_link(entry.path())
            .is_ok_and(|target| target.to_string_lossy().starts_with("socket:"))
    });
    let numbers =
        sockets.map(|entry| entry.file_name().to_string_lossy().parse::<ForeignRawFd>().unwrap());
    numbers.map(|number| pidfd_getfd(&process, number, PidfdGetfdFlags::empty()).unwrap()).collect()
}

/// Asserts that an idle publisher uses no CPU time.
#[track_caller]
fn assert_idle(publisher: &Publisher) {
    const WATCH: Duration = Duration::from_millis(500);
    let before = publisher.process.cpu_seconds();
    thread::sleep(WATCH);
    let used = publisher.process.cpu_seconds() - before;
    assert!(used < 0.1, "{used} s of CPU time in {WATCH:?} of idleness");
}

/// Sends `pattern` until the connection blocks, while the peer does not read. Returns the amount.
fn push_until_blocked(mut stream: &TcpStream, pattern: &mut Pattern) -> u64 {
    /// Longer than acknowledgements and window updates are delayed.
    const QUIET: Duration = Duration::from_millis(400);
    stream.set_nonblocking(true).unwrap();
    let start = pattern.position();
    let mut chunk = vec![0; 64 << 10];
    'push: loop {
        let before = pattern.clone();
        pattern.fill(&mut chunk);
        let mut sent = 0;
        while sent < chunk.len() {
            match stream.write(&chunk[sent..]) {
                Ok(count) => sent += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if !is_ready(&stream, PollFlags::OUT, QUIET) {
                        *pattern = before;
                        pattern.fill(&mut chunk[..sent]);
                        break 'push;
                    }
                }
                Err(error) => panic!("push: {error}"),
            }
        }
    }
    stream.set_nonblocking(false).unwrap();
    pattern.position() - start
}

/// One side stops reading and the other sends until it blocks: immediately, and after a fast phase
/// that has grown the windows. The bytes held by the proxy and its sockets must be bounded, and
/// none may be lost.
fn stalled_peer(server_stalls: bool) {
    const FAST_PHASE: u64 = 64 * MIB;
    const MOST: u64 = 4 * MIB;
    let setup = Setup::new("");
    let mut figures = Vec::new();
    for fast_phase in [0, FAST_PHASE, FAST_PHASE, FAST_PHASE] {
        let (sender, receiver) = setup.ordered_pair_after(0, server_stalls);
        carry(&sender, &receiver, fast_phase);
        let mut pattern = Pattern::new(9);
        let accepted = push_until_blocked(&sender, &mut pattern);
        let held = accepted - unsent(&sender) - unread(&receiver);
        figures.push(held);
        println!(
            "stalled {} after {} MiB: {accepted} bytes accepted, of them {} in the sender's buffer, \
             {} in the receiver's, {held} in between",
            if server_stalls { "server" } else { "client" },
            fast_phase / MIB,
            unsent(&sender),
            unread(&receiver),
        );
        // All bytes arrive once the peer reads again.
        thread::scope(|scope| {
            let arrived = scope.spawn(|| transfer::receive(&mut &receiver, 9));
            let mut rest = vec![0; 8 << 20];
            pattern.fill(&mut rest);
            (&sender).write_all(&rest).unwrap();
            sender.shutdown(Shutdown::Write).unwrap();
            assert_eq!(arrived.join().unwrap(), Transfer::complete(accepted + rest.len() as u64));
        });
    }
    assert!(figures.iter().all(|held| *held < MOST), "bytes held by the proxy: {figures:?}");
}

/// The unacknowledged bytes in the send buffer of a socket.
fn unsent(stream: &TcpStream) -> u64 {
    let mut count: libc::c_int = 0;
    // SAFETY: the request writes one integer to the pointer (SIOCOUTQ in tcp(7)).
    let result = unsafe { libc::ioctl(stream.as_raw_fd(), libc::TIOCOUTQ, &raw mut count) };
    assert_eq!(result, 0, "SIOCOUTQ: {}", io::Error::last_os_error());
    count as u64
}

/// The unread bytes in the receive buffer of a socket.
fn unread(stream: &TcpStream) -> u64 {
    rustix::io::ioctl_fionread(stream).unwrap()
}

/// Runs `scene` with forwarding by the kernel and through the published port, and compares the
/// results. The scene receives a function that stops the proxy (true) and continues it.
fn same_as_without_a_proxy<T: PartialEq + std::fmt::Debug>(
    setup: &Setup,
    moved: u64,
    scene: impl Fn(&dyn Fn(bool), TcpStream, TcpStream) -> T,
) {
    let direct = (connect(&setup.net.client, container(80)), setup.backend.accept());
    carry(&direct.0, &direct.1, moved);
    carry(&direct.1, &direct.0, moved);
    let expected = scene(&|_| {}, direct.0, direct.1);

    let (client, server) = setup.pair_after(moved);
    let stop = |on| pause(&setup.publisher, on);
    assert_eq!(scene(&stop, client, server), expected, "after {moved} bytes each way");
}

/// Finishes a connection with a last request and its response.
fn ask_and_answer(mut client: &TcpStream, mut server: &TcpStream) -> (Vec<u8>, Vec<u8>) {
    client.write_all(b"more").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    let request = read_to_end(server);
    server.write_all(b"an answer").unwrap();
    server.shutdown(Shutdown::Write).unwrap();
    (request, read_to_end(client))
}

/// Sends urgent data between other bytes, optionally followed by the end, before the proxy reads.
fn send_around_urgent_data(setup: &Setup, mut client: &TcpStream, and_the_end: bool) {
    pause(&setup.publisher, true);
    client.write_all(b"before").unwrap();
    SockRef::from(client).send_out_of_band(b"!").unwrap();
    client.write_all(b"after").unwrap();
    if and_the_end {
        client.shutdown(Shutdown::Write).unwrap();
    }
    pause(&setup.publisher, false);
}

/// Reads the bytes of [`send_around_urgent_data`]. The urgent byte is ignored, because SO_OOBINLINE
/// decides whether it is part of the stream.
#[track_caller]
fn read_past_urgent_data(mut server: &TcpStream) -> String {
    let mut seen = Vec::new();
    while !seen.ends_with(b"after") && is_ready(server, PollFlags::IN, Duration::from_secs(10)) {
        let mut chunk = [0; 64];
        match server.read(&mut chunk).unwrap() {
            0 => break,
            read => seen.extend_from_slice(&chunk[..read]),
        }
    }
    seen.retain(|byte| *byte != b'!');
    String::from_utf8_lossy(&seen).into_owned()
}

/// The header of section 2.1 or 2.2 of the HAProxy specification "The PROXY protocol".
fn proxy_header(version: u8, client: SocketAddr, local: SocketAddr) -> Vec<u8> {
    if version == 1 {
        let family = if client.is_ipv4() { "TCP4" } else { "TCP6" };
        let (from, to) = (client.ip(), local.ip());
        return format!("PROXY {family} {from} {to} {} {}\r\n", client.port(), local.port())
            .into_bytes();
    }
    let octets = |ip| match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    };
    let addresses = [octets(client.ip()), octets(local.ip())].concat();
    let (family, length) = if client.is_ipv4() { (0x11, 12) } else { (0x21, 36) };
    let mut header = b"\r\n\r\n\0\r\nQUIT\n".to_vec();
    header.extend([0x21, family, 0, length]);
    header.extend(addresses);
    header.extend(client.port().to_be_bytes());
    header.extend(local.port().to_be_bytes());
    header
}

/// The address of this client as seen by a [`PeerServer`].
#[track_caller]
fn peer_ip(stream: &TcpStream) -> IpAddr {
    let text = String::from_utf8(read_to_end(stream)).unwrap();
    text.parse::<SocketAddr>().unwrap_or_else(|error| panic!("{text:?}: {error}")).ip()
}

/// Sizes from 1 to 70,000 with the sum `total`.
fn odd_sizes(total: usize, seed: u64) -> Vec<usize> {
    let mut random = Pattern::new(seed);
    let (mut sizes, mut left) = (Vec::new(), total);
    while left > 0 {
        let mut bytes = [0; 4];
        random.fill(&mut bytes);
        let number = u32::from_le_bytes(bytes) as usize;
        // Half of the sizes are small.
        let size =
            if number.is_multiple_of(2) { number / 2 % 100 } else { number / 2 % 70_000 } + 1;
        sizes.push(size.min(left));
        left -= size.min(left);
    }
    sizes
}
