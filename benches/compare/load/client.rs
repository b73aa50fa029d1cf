//! The TCP clients: requests on open connections, a connection per request, idle connections, and a
//! client that only sends.
//!
//! Each function opens its sockets in the namespace of the calling thread: call it through
//! [`Namespace::run`](tidegate_testbed::Namespace::run).

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::buffer::spare_capacity;
use rustix::event::{PollFd, PollFlags, Timespec, epoll, poll};
use socket2::{Domain, Socket, Type};

use super::{EVENTS, MESSAGE};
use crate::stats::quantile;

/// The timeout for opening a connection and for a response.
const TIMEOUT: Duration = Duration::from_secs(5);

/// The time before responses are counted.
const WARM_UP: Duration = Duration::from_millis(200);

/// The number of connections after which [`connections`] ends early, because each leaves a port in
/// TIME_WAIT.
const MAX_CONNECTIONS: u64 = 50_000;

/// The result of [`requests`].
pub(crate) struct Requests {
    pub(crate) per_second: f64,
    pub(crate) p50: Duration,
    pub(crate) p99: Duration,
}

/// Keeps one request in flight on each of `count` connections for `duration`.
///
/// `at_start` is called when counting starts, to read the CPU time of the contender.
pub(crate) fn requests(
    target: SocketAddr,
    count: usize,
    duration: Duration,
    at_start: impl FnOnce(),
) -> Result<Requests> {
    let mut ring = Ring::open(target, count)?;
    ring.run(WARM_UP)?;
    ring.latencies.clear();
    at_start();
    let elapsed = ring.run(duration)?;
    let mut latencies = ring.latencies;
    ensure!(!latencies.is_empty(), "no request was answered");
    latencies.sort_unstable();
    Ok(Requests {
        per_second: latencies.len() as f64 / elapsed.as_secs_f64(),
        p50: Duration::from_nanos(quantile(&latencies, 0.50).into()),
        p99: Duration::from_nanos(quantile(&latencies, 0.99).into()),
    })
}

/// Connections with one request in flight each.
struct Ring {
    epoll: OwnedFd,
    slots: Vec<Slot>,
    /// Nanoseconds from a request to the last byte of its response.
    latencies: Vec<u32>,
}

struct Slot {
    stream: TcpStream,
    sent: Instant,
    received: usize,
}

impl Ring {
    fn open(target: SocketAddr, count: usize) -> Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let mut slots = Vec::with_capacity(count);
        for number in 0..count {
            let mut stream = connect(target).with_context(|| format!("connection {number}"))?;
            stream.set_nonblocking(true)?;
            let token = epoll::EventData::new_u64(number as u64);
            epoll::add(&epoll, &stream, token, epoll::EventFlags::IN)?;
            stream.write_all(&[b'?'; MESSAGE])?;
            slots.push(Slot { stream, sent: Instant::now(), received: 0 });
        }
        Ok(Self { epoll, slots, latencies: Vec::new() })
    }

    /// Runs for `duration` and returns the actual duration.
    fn run(&mut self, duration: Duration) -> Result<Duration> {
        let start = Instant::now();
        let mut events = Vec::with_capacity(EVENTS);
        while start.elapsed() < duration {
            wait(&self.epoll, &mut events)?;
            for event in &events {
                let slot = &mut self.slots[event.data.u64() as usize];
                if let Some(latency) = slot.advance()? {
                    self.latencies.push(latency);
                }
            }
        }
        Ok(start.elapsed())
    }
}

impl Slot {
    /// Reads available data. After a complete response, sends the next request and returns the
    /// response time.
    fn advance(&mut self) -> Result<Option<u32>> {
        let mut buffer = [0; MESSAGE];
        self.received += match self.stream.read(&mut buffer[self.received..]) {
            Ok(0) => bail!("the connection was closed before the response was complete"),
            Ok(length) => length,
            Err(error) if error.kind() == ErrorKind::WouldBlock => 0,
            Err(error) => return Err(error).context("read a response"),
        };
        if self.received < MESSAGE {
            return Ok(None);
        }
        let now = Instant::now();
        let latency = now.duration_since(self.sent).as_nanos();
        self.received = 0;
        self.sent = now;
        self.stream.write_all(&[b'?'; MESSAGE]).context("send a request")?;
        Ok(Some(u32::try_from(latency).unwrap_or(u32::MAX)))
    }
}

/// Opens a connection, sends one request, closes the connection and repeats, with `at_a_time`
/// connections in parallel.
///
/// Returns the connections per second, and their total number.
pub(crate) fn connections(
    target: SocketAddr,
    at_a_time: usize,
    duration: Duration,
) -> Result<(f64, u64)> {
    let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    let mut slots = Vec::with_capacity(at_a_time);
    for number in 0..at_a_time {
        slots.push(Visit::start(&epoll, number, target)?);
    }
    let start = Instant::now();
    let mut done = 0;
    let mut events = Vec::with_capacity(EVENTS);
    while start.elapsed() < duration && done < MAX_CONNECTIONS {
        wait(&epoll, &mut events)?;
        for event in &events {
            let number = event.data.u64() as usize;
            if slots[number].advance().with_context(|| format!("after {done} connections"))? {
                done += 1;
                // Closing the finished connection also removes it from epoll.
                slots[number] = Visit::start(&epoll, number, target)?;
            }
        }
    }
    Ok((done as f64 / start.elapsed().as_secs_f64(), done))
}

/// One connection of [`connections`].
struct Visit {
    socket: Socket,
    asked: bool,
    received: usize,
}

impl Visit {
    fn start(epoll: &OwnedFd, number: usize, target: SocketAddr) -> Result<Self> {
        let socket =
            Socket::new(Domain::for_address(target), Type::STREAM.nonblocking().cloexec(), None)?;
        socket.set_tcp_nodelay(true)?;
        match socket.connect(&target.into()) {
            Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => {
                return Err(error).with_context(|| format!("connect to {target}"));
            }
            _ => {}
        }
        // One edge-triggered registration serves both steps: writable when connected, then
        // readable.
        let both = epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::ET;
        epoll::add(epoll, &socket, epoll::EventData::new_u64(number as u64), both)?;
        Ok(Self { socket, asked: false, received: 0 })
    }

    /// Takes the next step. Returns true when the response is complete.
    fn advance(&mut self) -> Result<bool> {
        if !self.asked {
            match self.socket.write(&[b'?'; MESSAGE]) {
                Ok(_) => self.asked = true,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error).context("connect"),
            }
        }
        let mut buffer = [0; MESSAGE];
        match self.socket.read(&mut buffer) {
            Ok(0) => bail!("the connection was closed without a response"),
            Ok(length) => self.received += length,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(error).context("read the response"),
        }
        Ok(self.received >= MESSAGE)
    }
}

/// Opens `count` connections, makes one request on each to verify the path, and leaves them idle.
/// The connections take the addresses in `sources` in rotation; for the unspecified address, the
/// kernel chooses the source.
pub(crate) fn idle(
    target: SocketAddr,
    sources: &[Ipv4Addr],
    count: usize,
) -> Result<Vec<TcpStream>> {
    let each = (0..count).zip(sources.iter().cycle());
    each.map(|(number, source)| {
        ask_once(target, *source).with_context(|| format!("connection {number}"))
    })
    .collect()
}

fn ask_once(target: SocketAddr, source: Ipv4Addr) -> Result<TcpStream> {
    let socket = Socket::new(Domain::for_address(target), Type::STREAM, None)?;
    socket.bind(&SocketAddr::from((source, 0)).into())?;
    socket.connect_timeout(&target.into(), TIMEOUT)?;
    let mut stream = TcpStream::from(socket);
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.write_all(&[b'?'; MESSAGE])?;
    stream.read_exact(&mut [0; MESSAGE])?;
    Ok(stream)
}

/// Writes to a connection until it blocks for `quiet`, at most `limit` bytes.
///
/// Returns the number of bytes that have left the socket.
pub(crate) fn push(target: SocketAddr, quiet: Duration, limit: usize) -> Result<usize> {
    let mut stream = connect(target)?;
    stream.set_nonblocking(true)?;
    let chunk = vec![0; 64 * 1024];
    let quiet = Timespec::try_from(quiet)?;
    let mut pushed = 0;
    while pushed < limit {
        match stream.write(&chunk) {
            Ok(length) => pushed += length,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                if poll(&mut [PollFd::new(&stream, PollFlags::OUT)], Some(&quiet))? == 0 {
                    break;
                }
            }
            Err(error) => return Err(error).context("push"),
        }
    }
    Ok(pushed - unacknowledged(&stream)?)
}

/// The unacknowledged bytes of `stream`, which have not left this end (tcp(7), `SIOCOUTQ`).
fn unacknowledged(stream: &TcpStream) -> Result<usize> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: the request writes one int to `bytes`.
    let result = unsafe { libc::ioctl(stream.as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) };
    if result != 0 {
        return Err(std::io::Error::last_os_error()).context("SIOCOUTQ");
    }
    usize::try_from(bytes).context("SIOCOUTQ")
}

fn connect(target: SocketAddr) -> Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&target, TIMEOUT)
        .with_context(|| format!("connect to {target}"))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Replaces `events` with the next ones. It is an error if there are none within [`TIMEOUT`].
fn wait(epoll: &OwnedFd, events: &mut Vec<epoll::Event>) -> Result<()> {
    events.clear();
    let quiet = Timespec::try_from(TIMEOUT)?;
    match epoll::wait(epoll, spare_capacity(events), Some(&quiet)) {
        Ok(0) => bail!("no event within {TIMEOUT:?}"),
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(error) => Err(error).context("epoll_wait"),
    }
}
