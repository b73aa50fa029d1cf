//! What the tests of `tidegate publish` share: the program in front of a backend, clients that do
//! not wait for ever, and its figures.

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

/// How long anything may take that ought to take no time: much more than a busy machine needs.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// A port of the container, by IPv4.
pub(crate) fn container(port: u16) -> SocketAddr {
    (addr::CONTAINER_V4, port).into()
}

/// A port of the host as its clients call it, by IPv4.
pub(crate) fn host(port: u16) -> SocketAddr {
    (addr::HOST_V4, port).into()
}

/// The same by IPv6.
pub(crate) fn host_v6(port: u16) -> SocketAddr {
    (addr::HOST_V6, port).into()
}

/// Lets the client be any address of 198.18.0.0/15, and the host believes it.
pub(crate) fn many_addresses(net: &Topology) {
    net.client.ip(&["route", "add", "local", "198.18.0.0/15", "dev", "lo"]);
    net.host.ip(&["route", "add", "198.18.0.0/15", "via", &addr::CLIENT_V4.to_string()]);
}

/// Address `number` of those.
pub(crate) fn address(number: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(Ipv4Addr::new(198, 18, 0, 0).to_bits() + number)
}

/// Where a [`Publisher`] tells its figures, in its own namespace.
pub(crate) const METRICS: &str = "127.0.0.1:9464";

/// `tidegate publish`, running and ready.
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

    /// The same, with `prepare` applied to the command first.
    #[track_caller]
    pub(crate) fn start_with(
        host: &Namespace,
        arguments: &str,
        prepare: impl FnOnce(&mut Command),
    ) -> Self {
        let mut command = tidegate(host, &format!("publish {arguments} --metrics {METRICS}"));
        prepare(&mut command);
        let process = Process::spawn(&mut command);
        // The last line it says when everything is in place.
        process.wait_for_line("metrics at http", PATIENCE);
        Self { process, host: host.clone() }
    }

    /// The figures at this moment.
    #[track_caller]
    pub(crate) fn metrics(&self) -> Metrics {
        let (head, body) = http(&self.host, METRICS, "GET /metrics HTTP/1.1\r\nHost: test\r\n\r\n");
        assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
        Metrics(body)
    }

    /// Waits until `wanted` holds for the figures.
    #[track_caller]
    pub(crate) fn wait_for_metrics(&self, wanted: impl Fn(&Metrics) -> bool) -> Metrics {
        let mut last = self.metrics();
        let held = eventually(PATIENCE, || {
            last = self.metrics();
            wanted(&last)
        });
        assert!(held, "the figures never were as expected:\n{}", last.of_ports());
        last
    }
}

/// The text that Prometheus would read.
pub(crate) struct Metrics(pub(crate) String);

impl Metrics {
    /// The value of one series, written as on the page: `name{label="value",...}`.
    #[track_caller]
    pub(crate) fn value(&self, series: &str) -> f64 {
        self.read(series)
    }

    /// The same, where it is a whole number.
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

    /// All whole numbers of the series that begin with `family`, together.
    pub(crate) fn sum(&self, family: &str) -> u64 {
        let lines = self.0.lines().filter(|line| line.starts_with(family));
        lines.map(|line| line.rsplit_once(' ').unwrap().1.parse::<u64>().unwrap()).sum()
    }

    /// The value of `tidegate_proxy_NAME` of the port called `publish`.
    #[track_caller]
    pub(crate) fn port(&self, name: &str, publish: &str) -> u64 {
        self.value(&format!("tidegate_proxy_{name}{{publish=\"{publish}\"}}")) as u64
    }

    /// The same of a family that has a label besides.
    #[track_caller]
    pub(crate) fn labelled(&self, name: &str, publish: &str, label: &str, value: &str) -> u64 {
        self.value(&format!("tidegate_proxy_{name}{{publish=\"{publish}\",{label}=\"{value}\"}}"))
            as u64
    }

    /// How many connections of the port were refused because of `reason`.
    #[track_caller]
    pub(crate) fn refused(&self, publish: &str, reason: &str) -> u64 {
        self.labelled("refused_connections_total", publish, "reason", reason)
    }

    /// How many datagrams of the port were dropped because of `reason`.
    #[track_caller]
    pub(crate) fn dropped(&self, publish: &str, reason: &str) -> u64 {
        self.labelled("dropped_datagrams_total", publish, "reason", reason)
    }

    /// What is not zero of the proxy's series.
    pub(crate) fn of_ports(&self) -> String {
        let told = |line: &&str| line.starts_with("tidegate_proxy_") && !line.ends_with(" 0");
        self.0.lines().filter(told).take(100).map(|line| format!("{line}\n")).collect()
    }
}

/// `tidegate` with `arguments`, separated by blanks, to be run in `namespace`.
pub(crate) fn tidegate(namespace: &Namespace, arguments: &str) -> Command {
    let mut command = namespace.command(env!("CARGO_BIN_EXE_tidegate"));
    command.args(arguments.split_ascii_whitespace());
    command.env_remove("TIDEGATE_LOG");
    if module_path!().starts_with("old_kernel") {
        command.env(tidegate_model::feature::LACKS, "all");
    }
    command
}

/// Gives the child no more than `count` open files.
pub(crate) fn limit_open_files(command: &mut Command, count: u64) {
    // SAFETY: setrlimit is async-signal-safe.
    unsafe {
        command.pre_exec(move || {
            let limit = Rlimit { current: Some(count), maximum: Some(count) };
            Ok(setrlimit(Resource::Nofile, limit)?)
        });
    }
}

/// Sends `request` and reads the whole answer: its head and its body.
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

/// Connects from `namespace`.
#[track_caller]
pub(crate) fn connect(namespace: &Namespace, to: SocketAddr) -> TcpStream {
    let connected = namespace.run(|| TcpStream::connect_timeout(&to, PATIENCE));
    patient(connected.unwrap_or_else(|error| panic!("connect to {to}: {error}")))
}

/// Bounds how long the stream waits.
pub(crate) fn patient(stream: TcpStream) -> TcpStream {
    stream.set_read_timeout(Some(PATIENCE)).expect("set a read timeout");
    stream.set_write_timeout(Some(PATIENCE)).expect("set a write timeout");
    stream
}

/// A listener whose connections the test takes by hand.
pub(crate) struct Backend(TcpListener);

impl Backend {
    #[track_caller]
    pub(crate) fn tcp(namespace: &Namespace, addr: SocketAddr) -> Self {
        let listener = namespace.run(|| TcpListener::bind(addr));
        let listener = listener.unwrap_or_else(|error| panic!("listen on {addr}: {error}"));
        // It holds for accept(2) as well.
        SockRef::from(&listener).set_read_timeout(Some(PATIENCE)).expect("set a timeout");
        Self(listener)
    }

    /// The next connection and where it comes from.
    #[track_caller]
    pub(crate) fn accept_from(&self) -> (TcpStream, SocketAddr) {
        let (stream, peer) = self.0.accept().expect("a connection comes in");
        (patient(stream), peer)
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

/// Waits until one of `events` (or an error) is there, and says whether it came.
pub(crate) fn is_ready(fd: &impl std::os::fd::AsFd, events: PollFlags, timeout: Duration) -> bool {
    let timeout = Timespec::try_from(timeout).expect("a short time");
    let mut polled = [PollFd::new(fd, events)];
    let ready = rustix::io::retry_on_intr(|| poll(&mut polled, Some(&timeout)));
    ready.expect("poll") > 0
}

/// Ends the connection with a reset. No other descriptor of it may be open.
pub(crate) fn reset(stream: TcpStream) {
    SockRef::from(&stream).set_linger(Some(Duration::ZERO)).expect("set SO_LINGER");
    drop(stream);
}

/// Waits until the other side has reset the connection; what is left to read is not touched.
#[track_caller]
pub(crate) fn wait_for_reset(stream: &TcpStream) {
    assert!(is_ready(stream, PollFlags::empty(), PATIENCE), "the connection was not reset");
    let error = stream.take_error().expect("SO_ERROR").map(|error| error.kind());
    // A reset that follows the other side's FIN is told as EPIPE (tcp_reset in the kernel's
    // tcp_input.c).
    let reset = [io::ErrorKind::ConnectionReset, io::ErrorKind::BrokenPipe];
    assert!(
        error.is_some_and(|error| reset.contains(&error)),
        "the connection ended with {error:?}, not a reset"
    );
}

/// Reads to the end: the bytes, and the error that cut the stream if there was one.
pub(crate) fn read_all(mut stream: &TcpStream) -> (Vec<u8>, Option<io::ErrorKind>) {
    let mut bytes = Vec::new();
    // What was read before an error stays in `bytes`.
    let error = stream.read_to_end(&mut bytes).err().map(|error| error.kind());
    (bytes, error)
}

/// Reads to the end, which must be an orderly one.
#[track_caller]
pub(crate) fn read_to_end(stream: &TcpStream) -> Vec<u8> {
    let (bytes, error) = read_all(stream);
    assert_eq!(error, None, "after {} bytes", bytes.len());
    bytes
}

/// Sends `request`, half-closes, and returns the whole answer.
#[track_caller]
pub(crate) fn ask(mut stream: &TcpStream, request: &[u8]) -> Vec<u8> {
    stream.write_all(request).expect("send a request");
    stream.shutdown(Shutdown::Write).expect("half-close");
    read_to_end(stream)
}

/// Waits until `ready` answers true.
#[track_caller]
pub(crate) fn wait_until(what: &str, ready: impl FnMut() -> bool) {
    assert!(eventually(PATIENCE, ready), "waited {PATIENCE:?} in vain until {what}");
}

/// The link-local address of `host`'s `eth0`, with `client`'s scope for it, and `port`.
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
