//! Source ports towards a far end that is dialled often.
//!
//! Every connection that we close first leaves its source port in TIME_WAIT for a minute, and the
//! kernel, asked for any free port, does not take such a one again (`tcp_tw_reuse` is off but for
//! loopback). It looks through one half of its range first, and then through the other
//! (`__inet_hash_connect`, net/ipv4/inet_hashtables.c). With the usual 28,000 ephemeral ports, one
//! far end can be dialled 470 times a second for any length of time. Beyond that connect(2) first
//! becomes slow, once half of them are used (half a millisecond with a range of 64,000, in which
//! the whole event loop stands still), and then fails with `EADDRNOTAVAIL`.
//!
//! A port that is asked for *by number* may be taken again at once, provided both ends use
//! timestamps, which keep the two connections apart (RFC 6191; `tcp_twsk_unique`,
//! net/ipv4/tcp_ipv4.c). So before it comes to that, and when the kernel has none left, ports are
//! taken in turn by number, which also brings back the longest resting first.

use rustix::io::Errno;
use rustix::net::{bind, connect, sockopt};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// Where the kernel's range is to be read, for the namespace of the reading thread.
const RANGE: &str = "/proc/sys/net/ipv4/ip_local_port_range";

/// How long a port rests (`TCP_TIMEWAIT_LEN`).
const REST: Duration = Duration::from_secs(60);

/// Ports tried by number before a flow is refused. Those of live connections are in the way.
const ATTEMPTS: u32 = 256;

/// How long none is tried after all that were tried were taken.
const DRY: Duration = Duration::from_millis(100);

/// The range is not looked up for the sake of fewer connections than these.
const FEW: u32 = 64;

/// Ports that the kernel gives to sockets that ask for any.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortRange {
    first: u16,
    last: u16,
}

impl Default for PortRange {
    /// The kernel's own.
    fn default() -> Self {
        Self { first: 32_768, last: 60_999 }
    }
}

impl PortRange {
    /// The range that the calling thread's namespace sets; the kernel's default where that cannot
    /// be read.
    #[must_use]
    pub fn of_this_namespace() -> Self {
        let text = std::fs::read_to_string(RANGE).unwrap_or_default();
        let mut numbers = text.split_whitespace().filter_map(|number| number.parse().ok());
        match (numbers.next(), numbers.next()) {
            (Some(first), Some(last)) if first <= last => Self { first, last },
            _ => Self::default(),
        }
    }

    /// How many there are.
    #[must_use]
    pub fn count(self) -> u32 {
        u32::from(self.last - self.first) + 1
    }

    /// Half of the half that the kernel goes through first.
    fn plenty(self) -> u32 {
        self.count() / 4
    }
}

/// How many connections began in the last one to two [`REST`]s.
#[derive(Debug, Default)]
struct Recent {
    since: Option<Instant>,
    before: u32,
    now: u32,
    /// There was no port, and until then none is looked for.
    dry_until: Option<Instant>,
}

impl Recent {
    /// Counts one more; how many there are with it.
    fn add(&mut self, now: Instant) -> u32 {
        self.pass(now);
        self.now = self.now.saturating_add(1);
        self.before.saturating_add(self.now)
    }

    fn count(&mut self, now: Instant) -> u32 {
        self.pass(now);
        self.before.saturating_add(self.now)
    }

    fn pass(&mut self, now: Instant) {
        let since = *self.since.get_or_insert(now);
        let passed = now.saturating_duration_since(since);
        if passed >= REST {
            self.before = if passed < 2 * REST { self.now } else { 0 };
            (self.since, self.now) = (Some(now), 0);
        }
    }
}

/// Chooses source ports of TCP connections, from one namespace to one far end.
#[derive(Debug, Default)]
pub struct SourcePorts {
    /// Read when it is first needed, which for most far ends it never is.
    range: OnceLock<PortRange>,
    next: AtomicU32,
    recent: Mutex<Recent>,
}

impl SourcePorts {
    /// With a range that is known already, for who may not be able to read it later.
    #[must_use]
    pub fn within(range: PortRange) -> Self {
        Self { range: range.into(), ..Self::default() }
    }

    /// Whether so many connections began of late that ports are taken by number.
    pub fn by_number(&self) -> bool {
        self.is_plenty(self.recent().count(Instant::now()))
    }

    fn is_plenty(&self, count: u32) -> bool {
        count > FEW && count > self.range().plenty()
    }

    /// Begins to connect a socket from `make` to `to`. `make` has bound it to an address without a
    /// port, if the address matters (`source`); otherwise `source` is `None`.
    ///
    /// # Errors
    /// What `make` and connect(2) say; `AddrNotAvailable` when no port could be had.
    pub fn connect(
        &self,
        make: impl Fn() -> io::Result<OwnedFd>,
        source: Option<IpAddr>,
        to: SocketAddr,
    ) -> io::Result<OwnedFd> {
        let make = || {
            let socket = make()?;
            // A port in TIME_WAIT is bound again only if its last socket allowed that as well.
            sockopt::set_socket_reuseaddr(&socket, true)?;
            Ok::<_, io::Error>(socket)
        };
        let now = Instant::now();
        let (count, dry) = {
            let mut recent = self.recent();
            (recent.add(now), recent.dry_until.is_some_and(|until| now < until))
        };
        if dry {
            return Err(Errno::ADDRNOTAVAIL.into());
        }
        if !self.is_plenty(count) {
            let socket = make()?;
            match begin_connect(&socket, to) {
                // Others have used them up.
                Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable => {
                    self.recent().now = u32::MAX;
                }
                result => return result.map(|()| socket),
            }
        }
        let any: IpAddr =
            if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        for _ in 0..ATTEMPTS {
            let socket = make()?;
            let from = SocketAddr::new(source.unwrap_or(any), self.next_port());
            match bind(&socket, &from)
                .map_err(io::Error::from)
                .and_then(|()| begin_connect(&socket, to))
            {
                // A live connection's, or somebody's listener.
                Err(error) if is_taken(&error) => {}
                result => return result.map(|()| socket),
            }
        }
        self.recent().dry_until = Some(now + DRY);
        Err(Errno::ADDRNOTAVAIL.into())
    }

    fn next_port(&self) -> u16 {
        let range = self.range();
        let offset = self.next.fetch_add(1, Ordering::Relaxed) % range.count();
        range.first + offset as u16
    }

    fn range(&self) -> PortRange {
        *self.range.get_or_init(PortRange::of_this_namespace)
    }

    fn recent(&self) -> std::sync::MutexGuard<'_, Recent> {
        self.recent.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Begins to connect `socket`; that it is not done yet is no error.
///
/// # Errors
/// What connect(2) says at once: no route, no free port, refused (UDP never; TCP over loopback).
pub fn begin_connect(socket: impl AsFd, address: SocketAddr) -> io::Result<()> {
    match connect(socket, &address) {
        Ok(()) | Err(Errno::INPROGRESS) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn is_taken(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::AddrInUse | io::ErrorKind::AddrNotAvailable)
}

#[cfg(test)]
mod tests {
    use super::*;
    use socket2::{Domain, Socket, Type};
    use std::cell::Cell;
    use std::net::TcpListener;

    #[test]
    fn what_is_older_than_two_minutes_does_not_count() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut recent = Recent::default();
        for second in 0..30 {
            recent.add(at(second));
        }
        assert_eq!(recent.count(at(59)), 30);
        assert_eq!(recent.count(at(60)), 30, "the minute before counts");
        recent.add(at(61));
        assert_eq!(recent.count(at(119)), 31);
        assert_eq!(recent.count(at(120)), 1);
        assert_eq!(recent.count(at(300)), 0);
    }

    #[test]
    fn when_all_are_taken_none_is_tried_for_a_while() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let to = listener.local_addr().unwrap();
        let ports = SourcePorts::within(PortRange { first: to.port(), last: to.port() });
        ports.recent().now = u32::MAX;
        let made = Cell::new(0);
        let make = || {
            made.set(made.get() + 1);
            Ok(Socket::new(Domain::IPV4, Type::STREAM, None)?.into())
        };
        for _ in 0..2 {
            let refused = ports.connect(make, None, to).unwrap_err();
            assert_eq!(refused.kind(), io::ErrorKind::AddrNotAvailable);
        }
        assert_eq!(made.get(), ATTEMPTS, "the second time it did not try");
        ports.recent().dry_until = Some(Instant::now());
        ports.connect(make, None, to).unwrap_err();
        assert_eq!(made.get(), 2 * ATTEMPTS);
    }

    #[test]
    fn a_range_of_one_port_is_one() {
        let range = PortRange { first: 7, last: 7 };
        let ports = SourcePorts::within(range);
        assert_eq!((range.count(), ports.next_port(), ports.next_port()), (1, 7, 7));
        assert!(PortRange::of_this_namespace().count() > 1);
    }
}
