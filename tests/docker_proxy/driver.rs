//! What dockerd does to a docker-proxy: descriptors, arguments, and the reading of its answer.

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

/// What is expected to come comes within this time, on a busy machine too.
pub(crate) const SOON: Duration = Duration::from_secs(10);

/// The descriptors of dockerd's protocol.
const STATUS_FD: i32 = 3;
const LISTEN_FD: i32 = 4;

/// What the tests let docker-proxy listen on, unless it matters.
pub(crate) const FRONT: &str = "127.0.0.1:8080";

/// dockerd's arguments for port 8080 of loopback in front of port 9000 there.
pub(crate) const LOOPBACK: &str =
    "-proto tcp -host-ip 127.0.0.1 -host-port 8080 -container-ip 127.0.0.1 -container-port 9000";

/// The same for UDP.
pub(crate) const LOOPBACK_UDP: &str =
    "-proto udp -host-ip 127.0.0.1 -host-port 8080 -container-ip 127.0.0.1 -container-port 9000";

/// `docker-proxy ARGUMENTS` in `namespace`, with none of the variables that steer it and no
/// descriptor but the first three.
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

/// A docker-proxy about to be started with a status pipe.
pub(crate) struct Launch {
    command: Command,
    status: OwnedFd,
}

impl Launch {
    /// `docker-proxy ARGUMENTS` in `namespace`.
    pub(crate) fn new(namespace: &Namespace, arguments: &str) -> Self {
        Self::of(command(namespace, arguments))
    }

    /// Any command, with a status pipe.
    pub(crate) fn of(mut command: Command) -> Self {
        // A pipe of packets: each read gives what one write gave.
        let (status, theirs) =
            pipe_with(PipeFlags::DIRECT | PipeFlags::CLOEXEC).expect("make a pipe");
        pass_fd(&mut command, theirs, STATUS_FD);
        Self { command, status }
    }

    pub(crate) fn env(mut self, variable: &str, value: impl AsRef<OsStr>) -> Self {
        self.command.env(variable, value);
        self
    }

    /// Hands a bound socket down, as dockerd 28 does.
    pub(crate) fn listen_on(mut self, socket: impl Into<OwnedFd>) -> Self {
        pass_fd(&mut self.command, socket.into(), LISTEN_FD);
        self
    }

    /// Lets the process be sent SIGTERM when the thread that starts it ends, as dockerd does.
    pub(crate) fn ends_with_its_parent(mut self) -> Self {
        // SAFETY: one system call.
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
        // With the command go our copies of the descriptors.
        Proxy { process: Process::spawn(&mut self.command), status: self.status }
    }
}

/// A docker-proxy that may or may not have opened its port.
pub(crate) struct Proxy {
    process: Process,
    status: OwnedFd,
}

/// How a docker-proxy that did not open its port said so.
pub(crate) struct Refusal {
    /// What dockerd would show.
    pub(crate) reason: String,
    /// What was written to standard error.
    pub(crate) stderr: String,
    pub(crate) exit_code: Option<i32>,
}

impl Proxy {
    /// Reads the answer as dockerd does: `0` and a newline in one piece. After that the pipe must
    /// be closed.
    #[track_caller]
    pub(crate) fn ready(self) -> Process {
        let first = self.packet();
        assert_eq!(first.as_deref(), Some("0\n"), "it said:\n{}", self.process.output());
        assert_eq!(self.packet(), None, "the pipe must be closed");
        self.process
    }

    /// Reads why the port was not opened, and waits for the end of the process.
    #[track_caller]
    pub(crate) fn refused(mut self) -> Refusal {
        let first = self.packet().unwrap_or_default();
        let reason = first
            .strip_prefix("1\n")
            .unwrap_or_else(|| panic!("{first:?} is no refusal"))
            .to_owned();
        assert_eq!(self.packet(), None, "a refusal is one write as well");
        let exit_code = self.process.wait(SOON).code();
        Refusal { reason, stderr: self.process.wait_for_output(SOON), exit_code }
    }

    /// The process, whatever it has to say.
    pub(crate) fn unread(self) -> (Process, OwnedFd) {
        (self.process, self.status)
    }

    /// What one write(2) brought; `None` if nobody can write any more.
    #[track_caller]
    fn packet(&self) -> Option<String> {
        let answered = readable_within(&self.status, SOON);
        assert!(answered, "no answer in {SOON:?}; it said:\n{}", self.process.output());
        let mut buffer = [0; 4096];
        let length = rustix::io::read(&self.status, &mut buffer).expect("read the status pipe");
        (length > 0).then(|| String::from_utf8_lossy(&buffer[..length]).into_owned())
    }
}

/// Whether `fd` has something to read, the end included, before `timeout` is over.
fn readable_within(fd: impl AsFd, timeout: Duration) -> bool {
    let timeout = Timespec::try_from(timeout).expect("a timeout of seconds");
    poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&timeout)).expect("poll") == 1
}

/// A TCP connection from inside `namespace` that gives up reading after [`SOON`].
#[track_caller]
pub(crate) fn connect(namespace: &Namespace, to: impl Into<SocketAddr>) -> TcpStream {
    let to = to.into();
    let stream = namespace.run(|| TcpStream::connect_timeout(&to, SOON));
    let stream = stream.unwrap_or_else(|error| panic!("connect to {to}: {error}"));
    stream.set_read_timeout(Some(SOON)).expect("a stream has timeouts");
    stream
}

/// Asserts that a connection from inside `namespace` is reset, at once or when something is read
/// from it.
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

/// A UDP socket made in `namespace`, connected to `to`, that gives up reading after [`SOON`].
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
    assert!(answer == payload, "something else came back");
}

/// [`FRONT`] as an address.
pub(crate) fn front() -> SocketAddr {
    FRONT.parse().expect("an address")
}

/// Where [`LOOPBACK`] and [`LOOPBACK_UDP`] lead.
pub(crate) fn back() -> SocketAddr {
    ([127, 0, 0, 1], 9000).into()
}
