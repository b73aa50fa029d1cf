//! A published TCP port, as both of its ends see it: real clients and servers with a real kernel
//! between them.
//!
//! The client reaches the host's address, `tidegate publish` runs on the host, and the server is in
//! a container behind the host's bridge. Where what must happen is "as without a proxy", the test
//! does the same thing over the kernel's own path first and compares.

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
    Backend, PATIENCE, Publisher, address, ask, connect, container, host, host_v6, is_ready,
    limit_open_files, many_addresses, read_all, read_to_end, reset, wait_for_reset, wait_until,
};
use tidegate_testbed::server::{EchoServer, PeerServer, Sink, Source};
use tidegate_testbed::transfer::{self, Transfer};
use tidegate_testbed::{
    Namespace, Pattern, Protocol, Signal, Topology, addr, procfs, raise_open_files,
};

const MIB: u64 = 1 << 20;

/// What is moved before a connection counts as fast.
const FAST: u64 = MIB;

/// How the published port is called where only IPv4 is looked at.
const PORT: &str = "0.0.0.0:8080/tcp";

/// A published port 8080 in front of a backend whose connections the test takes by hand.
struct Bed {
    net: Topology,
    backend: Backend,
    publisher: Publisher,
}

impl Bed {
    #[track_caller]
    fn new(options: &str) -> Self {
        let net = Topology::three();
        let backend = Backend::tcp(&net.container, container(80));
        let publisher =
            Publisher::start(&net.host, &format!("8080:80 --to {} {options}", addr::CONTAINER_V4));
        Self { net, backend, publisher }
    }

    /// One that copies and one that splices, whatever a read brings, for each of `amounts`.
    fn each<const N: usize>(amounts: [u64; N]) -> impl Iterator<Item = (Self, u64)> {
        let ways = ["--splice-from 1000000000", "--splice-from 0"];
        ways.into_iter().flat_map(move |way| amounts.map(|moved| (Self::new(way), moved)))
    }

    /// A connection: the client's end and the server's.
    #[track_caller]
    fn pair(&self) -> (TcpStream, TcpStream) {
        (connect(&self.net.client, host(8080)), self.backend.accept())
    }

    /// One over which so many bytes have gone each way.
    #[track_caller]
    fn pair_after(&self, moved: u64) -> (TcpStream, TcpStream) {
        let (client, server) = self.pair();
        carry(&client, &server, moved);
        carry(&server, &client, moved);
        (client, server)
    }

    /// The same with the client's end first, or the server's.
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

/// Sends `length` bytes over a connection and checks what arrives.
#[track_caller]
fn carry(from: &TcpStream, to: &TcpStream, length: u64) {
    thread::scope(|scope| {
        scope.spawn(|| transfer::send(&mut &*from, 9, length).unwrap());
        let arrived = transfer::receive(&mut to.take(length), 9);
        assert_eq!(arrived, Transfer::complete(length));
    });
}

/// Connects, and returns how the proxy turns the client away: never with an orderly end.
#[track_caller]
fn refused(from: &Namespace, to: SocketAddr) -> io::ErrorKind {
    turned_away(from.run(|| TcpStream::connect_timeout(&to, PATIENCE)))
}

/// How the proxy turns away who tried to connect.
#[track_caller]
fn turned_away(connected: io::Result<TcpStream>) -> io::ErrorKind {
    match connected {
        Ok(stream) => {
            let (bytes, error) = read_all(&support::patient(stream));
            assert_eq!(bytes, b"");
            error.expect("the connection looks as if it had been served")
        }
        // So fast that connect(2) had not returned yet; a closed port is another kind.
        Err(error) => error.kind(),
    }
}

/// One connection after another, each with a request of its own that an echo server answers.
#[track_caller]
fn ask_in_turn(from: &Namespace, count: u32) {
    from.run(|| {
        for number in 0..count {
            let stream = support::patient(TcpStream::connect(host(8080)).unwrap());
            assert_eq!(
                ask(&stream, &number.to_be_bytes()),
                number.to_be_bytes(),
                "connection {number}"
            );
        }
    });
}

/// Lets packets to the container vanish, as behind a cable that was pulled: they go to a hardware
/// address that nobody has.
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

/// The end of [`black_hole`].
fn heal(host: &Namespace) {
    host.ip(&["neigh", "del", &addr::CONTAINER_V4.to_string(), "dev", "br0"]);
}

/// The server accepts, says "too busy" and ends the connection with `end`, all of it before the
/// proxy learns that its dial has succeeded. Returns what the client sees, which is what it would
/// see without a proxy.
fn answered_before_the_proxy_looks(
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
    heal(&net.host);
    let mut server = backend.accept();
    server.write_all(b"too busy").unwrap();
    end(server);
    pause(&publisher, false);
    if !is_ready(&client, PollFlags::IN, PATIENCE) {
        return (vec![], None);
    }
    // An orderly end of the server does not end the client's half.
    client.shutdown(Shutdown::Write).ok();
    read_all(&client)
}

/// Stops the publisher where it is, or lets it go on.
#[track_caller]
fn pause(publisher: &Publisher, on: bool) {
    let pid = publisher.process.pid();
    let signal = if on { Signal::STOP } else { Signal::CONT };
    rustix::process::kill_process(Pid::from_raw(pid as i32).unwrap(), signal).unwrap();
    if on {
        wait_until("the publisher has stopped", || procfs::state(pid) == Some('T'));
    }
}

/// How many connections from `namespace` to port 80 have been begun and not been answered.
fn dials(namespace: &Namespace) -> usize {
    let table = namespace.run(|| std::fs::read_to_string("/proc/thread-self/net/tcp").unwrap());
    // Behind the number of the line: local address, remote address, state (02 is SYN_SENT), all in
    // hex.
    let dialling = |line: &&str| {
        let mut fields = line.split_ascii_whitespace().skip(2);
        fields.next().is_some_and(|remote| remote.ends_with(":0050")) && fields.next() == Some("02")
    };
    table.lines().filter(dialling).count()
}

/// Copies of all of the publisher's sockets.
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

/// Looks at the publisher's use of the CPU for a while in which there is nothing to do.
#[track_caller]
fn assert_idle(publisher: &Publisher) {
    const WATCH: Duration = Duration::from_millis(500);
    let before = publisher.process.cpu_seconds();
    thread::sleep(WATCH);
    let used = publisher.process.cpu_seconds() - before;
    assert!(used < 0.1, "{used} s of CPU time in {WATCH:?} of idleness");
}

/// Sends as much of `pattern` as is taken without anybody reading at the other end; returns how
/// much.
fn push_until_blocked(mut stream: &TcpStream, pattern: &mut Pattern) -> u64 {
    /// Longer than acknowledgements and window updates take.
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

/// One side stops reading, the other sends until it is blocked: at once, and after a phase in which
/// the connection was fast and its windows have grown. What the proxy and its sockets hold is then
/// bounded, and nothing of it is lost.
fn stalled_peer(server_stalls: bool) {
    const FAST_PHASE: u64 = 64 * MIB;
    const MOST: u64 = 4 * MIB;
    let bed = Bed::new("");
    let mut figures = Vec::new();
    for fast_phase in [0, FAST_PHASE, FAST_PHASE, FAST_PHASE] {
        let (sender, receiver) = bed.ordered_pair_after(0, server_stalls);
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
        // Nothing was lost, nothing is stuck.
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

/// What a socket was given to send and the other side has not acknowledged, in bytes.
fn unsent(stream: &TcpStream) -> u64 {
    let mut count: libc::c_int = 0;
    // SAFETY: the request writes one integer to where the pointer leads (SIOCOUTQ in tcp(7)).
    let result = unsafe { libc::ioctl(stream.as_raw_fd(), libc::TIOCOUTQ, &raw mut count) };
    assert_eq!(result, 0, "SIOCOUTQ: {}", io::Error::last_os_error());
    count as u64
}

/// What has arrived at a socket and was not read, in bytes.
fn unread(stream: &TcpStream) -> u64 {
    rustix::io::ioctl_fionread(stream).unwrap()
}

/// Does `scene` over the kernel's own path and through the published port, and compares what comes
/// of it. The scene is given a way to stop the proxy (true) and to let it go on.
fn same_as_without_a_proxy<T: PartialEq + std::fmt::Debug>(
    bed: &Bed,
    moved: u64,
    scene: impl Fn(&dyn Fn(bool), TcpStream, TcpStream) -> T,
) {
    let direct = (connect(&bed.net.client, container(80)), bed.backend.accept());
    carry(&direct.0, &direct.1, moved);
    carry(&direct.1, &direct.0, moved);
    let expected = scene(&|_| {}, direct.0, direct.1);

    let (client, server) = bed.pair_after(moved);
    let stop = |on| pause(&bed.publisher, on);
    assert_eq!(scene(&stop, client, server), expected, "after {moved} bytes each way");
}

/// The rest of a connection: a last request and its answer.
fn ask_and_answer(mut client: &TcpStream, mut server: &TcpStream) -> (Vec<u8>, Vec<u8>) {
    client.write_all(b"more").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    let request = read_to_end(server);
    server.write_all(b"an answer").unwrap();
    server.shutdown(Shutdown::Write).unwrap();
    (request, read_to_end(client))
}

/// Sends a byte of urgent data between others (and then the end), all of it before the proxy looks.
fn send_around_urgent_data(bed: &Bed, mut client: &TcpStream, and_the_end: bool) {
    pause(&bed.publisher, true);
    client.write_all(b"before").unwrap();
    SockRef::from(client).send_out_of_band(b"!").unwrap();
    client.write_all(b"after").unwrap();
    if and_the_end {
        client.shutdown(Shutdown::Write).unwrap();
    }
    pause(&bed.publisher, false);
}

/// Reads what [`send_around_urgent_data`] has sent. Whether the urgent byte itself comes in line is
/// left open: a program chooses that with SO_OOBINLINE.
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

/// The header of section 2.1 or 2.2 of HAProxy's "The PROXY protocol".
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

/// The address under which a [`PeerServer`] sees us.
#[track_caller]
fn peer_ip(stream: &TcpStream) -> IpAddr {
    let text = String::from_utf8(read_to_end(stream)).unwrap();
    text.parse::<SocketAddr>().unwrap_or_else(|error| panic!("{text:?}: {error}")).ip()
}

/// Sizes from 1 to 70,000 that sum up to `total`.
fn odd_sizes(total: usize, seed: u64) -> Vec<usize> {
    let mut random = Pattern::new(seed);
    let (mut sizes, mut left) = (Vec::new(), total);
    while left > 0 {
        let mut bytes = [0; 4];
        random.fill(&mut bytes);
        let number = u32::from_le_bytes(bytes) as usize;
        // Half of them small.
        let size =
            if number.is_multiple_of(2) { number / 2 % 100 } else { number / 2 % 70_000 } + 1;
        sizes.push(size.min(left));
        left -= size.min(left);
    }
    sizes
}
