//! Shared code of the tests of `tidegate publish`: the program in front of a backend, clients with
//! timeouts, and its metrics.

#![allow(dead_code, reason = "every test crate uses a part of it")]

use std::fmt::Display;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, SocketAddrV6, TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::str::FromStr;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Resource, Rlimit, setrlimit};
use socket2::SockRef;
use tidegate_testbed::{Namespace, Process, Topology, addr, eventually};

/// The timeout of operations that should be immediate, with a margin for a busy machine.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(30);

/// A port of the container, over IPv4.
pub(crate) fn container(port: u16) -> SocketAddr {
    (addr::CONTAINER_V4, port).into()
}

/// A port on the host address that clients use, over IPv4.
pub(crate) fn host(port: u16) -> SocketAddr {
    (addr::HOST_V4, port).into()
}

/// A port on the host address that clients use, over IPv6.
pub(crate) fn host_v6(port: u16) -> SocketAddr {
    (addr::HOST_V6, port).into()
}

/// Routes 198.18.0.0/15 to the client, so that it can use any of these addresses.
pub(crate) fn route_many_addresses(net: &Topology) {
    net.client.ip(&["route", "add", "local", "198.18.0.0/15", "dev", "lo"]);
    net.host.ip(&["route", "add", "198.18.0.0/15", "via", &addr::CLIENT_V4.to_string()]);
}

/// Address `number` of 198.18.0.0/15.
pub(crate) fn address(number: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(Ipv4Addr::new(198, 18, 0, 0).to_bits() + number)
}

/// The metrics address of a [`Publisher`], in its own namespace.
pub(crate) const METRICS: &str = "127.0.0.1:9464";

/// A running `tidegate publish` that is ready.
pub(crate) struct Publisher {
    pub(crate) process: Process,
    host: Namespace,
}

impl Publisher {
    /// Runs `tidegate publish` with `arguments`, separated by blanks, in `host`.
    #[track_caller]
    pub(crate) fn start(host: &Namespace, arguments: &str) -> Self {
        Self::start_with(host, arguments, |_| {})
    }

    /// Like [`Self::start`], with `prepare` applied to the command first.
    #[track_caller]
    pub(crate) fn start_with(
        host: &Namespace,
        arguments: &str,
        prepare: impl FnOnce(&mut Command),
    ) -> Self {
        let mut command = tidegate(host, &format!("publish {arguments} --metrics {METRICS}"));
        prepare(&mut command);
        let process = Process::spawn(&mut command);
        // This line is printed last, when everything is ready.
        process.wait_for_line("metrics at http", TIMEOUT);
        Self { process, host: host.clone() }
    }

    /// The current metrics.
    #[track_caller]
    pub(crate) fn metrics(&self) -> Metrics {
        let (head, body) = http(&self.host, METRICS, "GET /metrics HTTP/1.1\r\nHost: test\r\n\r\n");
        assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
        Metrics(body)
    }

    /// Waits until `wanted` holds for the metrics.
    #[track_caller]
    pub(crate) fn wait_for_metrics(&self, wanted: impl Fn(&Metrics) -> bool) -> Metrics {
        let mut last = self.metrics();
        let held = eventually(TIMEOUT, || {
            last = self.metrics();
            wanted(&last)
        });
        assert!(held, "the metrics never matched:\n{}", last.of_ports());
        last
    }
}

/// A metrics page.
pub(crate) struct Metrics(pub(crate) String);

impl Metrics {
    /// The value of a series, in the notation of the page: `name{label="value",...}`.
    #[track_caller]
    pub(crate) fn value(&self, series: &str) -> f64 {
        self.read(series)
    }

    /// The value of a series as an integer.
    #[track_caller]
    pub(crate) fn count(&self, series: &str) -> u64 {
        self.read(series)
    }

    #[track_caller]
    fn read<T: FromStr<Err: Display>>(&self, series: &str) -> T {
        let line = self.0.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        let line =
            line.unwrap_or_else(|| panic!("no series {series}; there are:\n{}", self.of_ports()));
        line.parse().unwrap_or_else(|error| panic!("{series} {line}: {error}"))
    }

    /// The sum of all series that begin with `family`.
    pub(crate) fn sum(&self, family: &str) -> u64 {
        let lines = self.0.lines().filter(|line| line.starts_with(family));
        lines.map(|line| line.rsplit_once(' ').unwrap().1.parse::<u64>().unwrap()).sum()
    }

    /// The value of `tidegate_proxy_NAME` for the port `publish`.
    #[track_caller]
    pub(crate) fn port(&self, name: &str, publish: &str) -> u64 {
        self.value(&format!("tidegate_proxy_{name}{{publish=\"{publish}\"}}")) as u64
    }

    /// The value of `tidegate_proxy_NAME` for the port `publish`, with one more label.
    #[track_caller]
    pub(crate) fn labelled(&self, name: &str, publish: &str, label: &str, value: &str) -> u64 {
        self.value(&format!("tidegate_proxy_{name}{{publish=\"{publish}\",{label}=\"{value}\"}}"))
            as u64
    }

    /// The number of connections of the port refused for `reason`.
    #[track_caller]
    pub(crate) fn refused(&self, publish: &str, reason: &str) -> u64 {
        self.labelled("refused_connections_total", publish, "reason", reason)
    }

    /// The number of datagrams of the port dropped for `reason`.
    #[track_caller]
    pub(crate) fn dropped(&self, publish: &str, reason: &str) -> u64 {
        self.labelled("dropped_datagrams_total", publish, "reason", reason)
    }

    /// The series of the proxy that are not zero.
    pub(crate) fn of_ports(&self) -> String {
        let is_nonzero = |line: &&str| line.starts_with("tidegate_proxy_") && !line.ends_with(" 0");
        self.0.lines().filter(is_nonzero).take(100).map(|line| format!("{line}\n")).collect()
    }
}

/// `tidegate` with `arguments`, separated by blanks, for `namespace`.
pub(crate) fn tidegate(namespace: &Namespace, arguments: &str) -> Command {
    let mut command = namespace.command(env!("CARGO_BIN_EXE_tidegate"));
    command.args(arguments.split_ascii_whitespace());
    command.env_remove("TIDEGATE_LOG");
    if module_path!().starts_with("old_kernel") {
        command.env(tidegate_model::feature::LACKS, "all");
    }
    command
}

/// Limits the child to `count` open files.
pub(crate) fn limit_open_files(command: &mut Command, count: u64) {
    // SAFETY: setrlimit is async-signal-safe.
    unsafe {
        command.pre_exec(move || {
            let limit = Rlimit { current: Some(count), maximum: Some(count) };
            Ok(setrlimit(Resource::Nofile, limit)?)
        });
    }
}

/// Sends `request` and reads the complete response: its head and its body.
#[track_caller]
pub(crate) fn http(namespace: &Namespace, to: &str, request: &str) -> (String, String) {
    let mut stream = connect(namespace, to.parse().expect("an address and a port"));
    stream.write_all(request.as_bytes()).expect("send a request");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("read the answer");
    let (head, body) =
        answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no HTTP answer: {answer:?}"));
    (head.to_owned(), body.to_owned())
}

/// Connects from `namespace`, with timeouts.
#[track_caller]
pub(crate) fn connect(namespace: &Namespace, to: SocketAddr) -> TcpStream {
    let connected = namespace.run(|| TcpStream::connect_timeout(&to, TIMEOUT));
    with_timeouts(connected.unwrap_or_else(|error| panic!("connect to {to}: {error}")))
}

/// Sets the timeouts of a stream.
pub(crate) fn with_timeouts(stream: TcpStream) -> TcpStream {
    stream.set_read_timeout(Some(TIMEOUT)).expect("set a read timeout");
    stream.set_write_timeout(Some(TIMEOUT)).expect("set a write timeout");
    stream
}

/// A listener of a test that accepts connections explicitly.
pub(crate) struct Backend(TcpListener);

impl Backend {
    #[track_caller]
    pub(crate) fn tcp(namespace: &Namespace, addr: SocketAddr) -> Self {
        let listener = namespace.run(|| TcpListener::bind(addr));
        let listener = listener.unwrap_or_else(|error| panic!("listen on {addr}: {error}"));
        // The timeout also applies to accept(2).
        SockRef::from(&listener).set_read_timeout(Some(TIMEOUT)).expect("set a timeout");
        Self(listener)
    }

    /// The next connection and its peer.
    #[track_caller]
    pub(crate) fn accept_from(&self) -> (TcpStream, SocketAddr) {
        let (stream, peer) = self.0.accept().expect("a connection comes in");
        (with_timeouts(stream), peer)
    }

    /// The next connection.
    #[track_caller]
    pub(crate) fn accept(&self) -> TcpStream {
        self.accept_from().0
    }

    /// Whether a connection waits to be accepted.
    pub(crate) fn has_waiting(&self) -> bool {
        is_ready(&self.0, PollFlags::IN, Duration::ZERO)
    }
}

/// Waits for one of `events` or an error, and returns whether it occurred.
pub(crate) fn is_ready(fd: &impl std::os::fd::AsFd, events: PollFlags, timeout: Duration) -> bool {
    let timeout = Timespec::try_from(timeout).expect("a short time");
    let mut polled = [PollFd::new(fd, events)];
    let ready = rustix::io::retry_on_intr(|| poll(&mut polled, Some(&timeout)));
    ready.expect("poll") > 0
}

/// Closes the connection with a reset. No other descriptor of it may be open.
pub(crate) fn reset(stream: TcpStream) {
    SockRef::from(&stream).set_linger(Some(Duration::ZERO)).expect("set SO_LINGER");
    drop(stream);
}

/// Waits until the peer has reset the connection. Data is not read.
#[track_caller]
pub(crate) fn wait_for_reset(stream: &TcpStream) {
    assert!(is_ready(stream, PollFlags::empty(), TIMEOUT), "the connection was not reset");
    let error = stream.take_error().expect("SO_ERROR").map(|error| error.kind());
    // A reset after the FIN of the peer is reported as EPIPE (tcp_reset in the kernel's
    // net/ipv4/tcp_input.c).
    let reset = [io::ErrorKind::ConnectionReset, io::ErrorKind::BrokenPipe];
    assert!(
        error.is_some_and(|error| reset.contains(&error)),
        "the connection ended with {error:?}, not a reset"
    );
}

/// Reads to the end, and returns the bytes and the error that ended the stream.
pub(crate) fn read_all(mut stream: &TcpStream) -> (Vec<u8>, Option<io::ErrorKind>) {
    let mut bytes = Vec::new();
    // Bytes read before an error stay in `bytes`.
    let error = stream.read_to_end(&mut bytes).err().map(|error| error.kind());
    (bytes, error)
}

/// Reads to the end, which must be orderly.
#[track_caller]
pub(crate) fn read_to_end(stream: &TcpStream) -> Vec<u8> {
    let (bytes, error) = read_all(stream);
    assert_eq!(error, None, "after {} bytes", bytes.len());
    bytes
}

/// Sends `request`, half-closes, and returns the complete response.
#[track_caller]
pub(crate) fn ask(mut stream: &TcpStream, request: &[u8]) -> Vec<u8> {
    stream.write_all(request).expect("send a request");
    stream.shutdown(Shutdown::Write).expect("half-close");
    read_to_end(stream)
}

/// Waits until `ready` returns true.
#[track_caller]
pub(crate) fn wait_until(condition: &str, ready: impl FnMut() -> bool) {
    assert!(eventually(TIMEOUT, ready), "not within {TIMEOUT:?}: {condition}");
}

/// The link-local address of `eth0` of `host` with `port`, and with the scope id that `client`
/// uses.
#[track_caller]
pub(crate) fn link_local(host: &Namespace, client: &Namespace, port: u16) -> SocketAddr {
    let shown = host.ip(&["-6", "-brief", "address", "show", "dev", "eth0", "scope", "link"]);
    let address =
        shown.split_ascii_whitespace().find_map(|word| word.strip_suffix("/64")?.parse().ok());
    let address = address.unwrap_or_else(|| panic!("no link-local address: {shown:?}"));
    // `2: eth0@if3: <...>`
    let link = client.ip(&["-o", "link", "show", "dev", "eth0"]);
    let scope = link.split(':').next().and_then(|index| index.trim().parse().ok());
    SocketAddrV6::new(address, port, 0, scope.unwrap_or_else(|| panic!("no index: {link:?}")))
        .into()
}
