//! The role of dockerd for a docker-proxy: descriptors, arguments, and the status pipe.

use std::ffi::OsStr;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::pipe::{PipeFlags, pipe_with};
use tidegate_testbed::{Namespace, Process, Signal, pass_fd};

/// A timeout with a margin for a busy machine.
pub(crate) const SOON: Duration = Duration::from_secs(10);

/// The descriptors of dockerd's protocol.
const STATUS_FD: i32 = 3;
const LISTEN_FD: i32 = 4;

/// The listening address of docker-proxy in most tests.
pub(crate) const FRONT: &str = "127.0.0.1:8080";

/// The arguments of dockerd for port 8080 of loopback, forwarded to port 9000 of loopback.
pub(crate) const LOOPBACK: &str =
    "-proto tcp -host-ip 127.0.0.1 -host-port 8080 -container-ip 127.0.0.1 -container-port 9000";

/// [`LOOPBACK`] for UDP.
pub(crate) const LOOPBACK_UDP: &str =
    "-proto udp -host-ip 127.0.0.1 -host-port 8080 -container-ip 127.0.0.1 -container-port 9000";

/// `docker-proxy ARGUMENTS` in `namespace`, without its environment variables and with only the
/// standard descriptors.
pub(crate) fn command(namespace: &Namespace, arguments: &str) -> Command {
    let mut command = namespace.command(env!("CARGO_BIN_EXE_docker-proxy"));
    command.args(arguments.split_whitespace()).current_dir("/");
    for variable in [
        "TIDEGATE_PROXY_LIMITS",
        "TIDEGATE_PROXY_SOURCE",
        "TIDEGATE_PROXY_PROTOCOL",
        "TIDEGATE_PROXY_METRICS",
        "TIDEGATE_LOG",
    ] {
        command.env_remove(variable);
    }
    command
}

/// A docker-proxy with a status pipe, before its start.
pub(crate) struct Launch {
    command: Command,
    status: OwnedFd,
}

impl Launch {
    /// `docker-proxy ARGUMENTS` in `namespace`.
    pub(crate) fn new(namespace: &Namespace, arguments: &str) -> Self {
        Self::of(command(namespace, arguments))
    }

    /// Any command with a status pipe.
    pub(crate) fn of(mut command: Command) -> Self {
        // In packet mode, each read returns the data of one write.
        let (status, theirs) =
            pipe_with(PipeFlags::DIRECT | PipeFlags::CLOEXEC).expect("make a pipe");
        pass_fd(&mut command, theirs, STATUS_FD);
        Self { command, status }
    }

    pub(crate) fn env(mut self, variable: &str, value: impl AsRef<OsStr>) -> Self {
        self.command.env(variable, value);
        self
    }

    /// Passes a bound socket, like dockerd 28.
    pub(crate) fn listen_on(mut self, socket: impl Into<OwnedFd>) -> Self {
        pass_fd(&mut self.command, socket.into(), LISTEN_FD);
        self
    }

    /// Sets the parent death signal to SIGTERM, like dockerd.
    pub(crate) fn with_parent_death_signal(mut self) -> Self {
        // SAFETY: the closure makes one system call.
        unsafe {
            self.command.pre_exec(|| {
                rustix::process::set_parent_process_death_signal(Some(Signal::TERM))?;
                Ok(())
            });
        }
        self
    }

    #[track_caller]
    pub(crate) fn start(mut self) -> Proxy {
        // This also drops our copies of the descriptors.
        Proxy { process: Process::spawn(&mut self.command), status: self.status }
    }
}

/// A started docker-proxy with an unread status pipe.
pub(crate) struct Proxy {
    process: Process,
    status: OwnedFd,
}

/// The failure of a docker-proxy.
pub(crate) struct Refusal {
    /// The reason that dockerd shows.
    pub(crate) reason: String,
    /// The standard error.
    pub(crate) stderr: String,
    pub(crate) exit_code: Option<i32>,
}

impl Proxy {
    /// Reads the status like dockerd: `0` and a newline in one read. The pipe must then be closed.
    #[track_caller]
    pub(crate) fn ready(self) -> Process {
        let first = self.packet();
        assert_eq!(first.as_deref(), Some("0\n"), "output:\n{}", self.process.output());
        assert_eq!(self.packet(), None, "the pipe must be closed");
        self.process
    }

    /// Reads the reason of a failure, and waits for the exit.
    #[track_caller]
    pub(crate) fn refused(mut self) -> Refusal {
        let first = self.packet().unwrap_or_default();
        let reason = first
            .strip_prefix("1\n")
            .unwrap_or_else(|| panic!("{first:?} is not a failure"))
            .to_owned();
        assert_eq!(self.packet(), None, "a failure must be one write");
        let exit_code = self.process.wait(SOON).code();
        Refusal { reason, stderr: self.process.wait_for_output(SOON), exit_code }
    }

    /// The process and the unread pipe.
    pub(crate) fn unread(self) -> (Process, OwnedFd) {
        (self.process, self.status)
    }

    /// The data of one write(2); `None` when all writers have closed the pipe.
    #[track_caller]
    fn packet(&self) -> Option<String> {
        let answered = readable_within(&self.status, SOON);
        assert!(answered, "no status within {SOON:?}; output:\n{}", self.process.output());
        let mut buffer = [0; 4096];
        let length = rustix::io::read(&self.status, &mut buffer).expect("read the status pipe");
        (length > 0).then(|| String::from_utf8_lossy(&buffer[..length]).into_owned())
    }
}

/// Whether `fd` becomes readable, or reaches its end, within `timeout`.
fn readable_within(fd: impl AsFd, timeout: Duration) -> bool {
    let timeout = Timespec::try_from(timeout).expect("a timeout of seconds");
    poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&timeout)).expect("poll") == 1
}

/// A TCP connection from `namespace` with a read timeout of [`SOON`].
#[track_caller]
pub(crate) fn connect(namespace: &Namespace, to: impl Into<SocketAddr>) -> TcpStream {
    let to = to.into();
    let stream = namespace.run(|| TcpStream::connect_timeout(&to, SOON));
    let stream = stream.unwrap_or_else(|error| panic!("connect to {to}: {error}"));
    stream.set_read_timeout(Some(SOON)).expect("a stream has timeouts");
    stream
}

/// Asserts that a connection from `namespace` is reset, immediately or on the first read.
#[track_caller]
pub(crate) fn assert_reset(namespace: &Namespace, to: impl Into<SocketAddr>) {
    let to = to.into();
    let read = namespace.run(|| {
        let mut stream = TcpStream::connect_timeout(&to, SOON)?;
        stream.set_read_timeout(Some(SOON))?;
        stream.read(&mut [0; 1])
    });
    assert_eq!(read.map_err(|error| error.kind()), Err(ErrorKind::ConnectionReset), "{to}");
}

/// A UDP socket in `namespace`, connected to `to`, with a read timeout of [`SOON`].
#[track_caller]
pub(crate) fn udp(namespace: &Namespace, to: impl Into<SocketAddr>) -> UdpSocket {
    let to = to.into();
    let any: SocketAddr = if to.is_ipv4() { ([0; 4], 0).into() } else { ([0; 16], 0).into() };
    let socket = namespace.run(|| UdpSocket::bind(any)).expect("bind a UDP socket");
    socket.connect(to).unwrap_or_else(|error| panic!("connect to {to}: {error}"));
    socket.set_read_timeout(Some(SOON)).expect("a socket has timeouts");
    socket
}

/// Sends `payload` and expects it back.
#[track_caller]
pub(crate) fn echo(stream: &mut TcpStream, payload: &[u8]) {
    stream.write_all(payload).expect("send");
    let mut answer = vec![0; payload.len()];
    stream.read_exact(&mut answer).expect("receive what was sent");
    assert!(answer == payload, "other data came back");
}

/// [`FRONT`] as an address.
pub(crate) fn front() -> SocketAddr {
    FRONT.parse().expect("an address")
}

/// The target of [`LOOPBACK`] and [`LOOPBACK_UDP`].
pub(crate) fn back() -> SocketAddr {
    ([127, 0, 0, 1], 9000).into()
}
