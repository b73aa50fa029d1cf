//! Source ports of frequent TCP connections to one destination.
//!
//! When this side closes a connection first, its source port stays in TIME_WAIT for a minute. The
//! automatic port selection of the kernel does not reuse such a port (`tcp_tw_reuse` applies only
//! to loopback). It searches one half of its range first, and then the other
//! (`__inet_hash_connect`, net/ipv4/inet_hashtables.c). With the default 28,000 ephemeral ports,
//! one destination supports 470 sustained connections per second. Beyond that, connect(2) first
//! becomes slow, once half of the ports are in use (half a millisecond with a range of 64,000,
//! which blocks the event loop), and then fails with `EADDRNOTAVAIL`.
//!
//! A socket that binds a port *by number* may reuse it at once if both ends use TCP timestamps,
//! which keep the two connections apart (RFC 6191; `tcp_twsk_unique`, net/ipv4/tcp_ipv4.c). So
//! before the search becomes slow, and when it fails, ports are bound by number in round-robin
//! order. This also reuses the ports with the longest time in TIME_WAIT first.

use rustix::io::Errno;
use rustix::net::{bind, connect, sockopt};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// The port range of the kernel, in the network namespace of the reading thread.
const RANGE: &str = "/proc/sys/net/ipv4/ip_local_port_range";

/// Duration of TIME_WAIT (`TCP_TIMEWAIT_LEN`).
const TIME_WAIT: Duration = Duration::from_secs(60);

/// Maximum number of ports to try by number before a connection fails. Ports of open connections
/// are unavailable.
const ATTEMPTS: u32 = 256;

/// Back-off of the port search after all attempts failed.
const BACK_OFF: Duration = Duration::from_millis(100);

/// Up to this number of recent connections, the range is not read.
const MIN_RECENT: u32 = 64;

/// The range of ports for automatic selection by the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortRange {
    first: u16,
    last: u16,
}

impl Default for PortRange {
    /// The default of the kernel.
    fn default() -> Self {
        Self { first: 32_768, last: 60_999 }
    }
}

impl PortRange {
    /// The range of the network namespace of the calling thread, or the default of the kernel if it
    /// cannot be read.
    #[must_use]
    pub fn of_this_namespace() -> Self {
        let text = std::fs::read_to_string(RANGE).unwrap_or_default();
        let mut numbers = text.split_whitespace().filter_map(|number| number.parse().ok());
        match (numbers.next(), numbers.next()) {
            (Some(first), Some(last)) if first <= last => Self { first, last },
            _ => Self::default(),
        }
    }

    /// The number of ports.
    #[must_use]
    pub fn count(self) -> u32 {
        u32::from(self.last - self.first) + 1
    }

    /// Half of the ports that the kernel searches first, which are half of the range.
    fn threshold(self) -> u32 {
        self.count() / 4
    }
}

/// Number of connections started during the last one to two [`TIME_WAIT`] periods.
#[derive(Debug, Default)]
struct Recent {
    since: Option<Instant>,
    before: u32,
    now: u32,
    /// End of the back-off after a failed port search.
    back_off_until: Option<Instant>,
}

impl Recent {
    /// Counts a connection and returns the new total.
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
        if passed >= TIME_WAIT {
            self.before = if passed < 2 * TIME_WAIT { self.now } else { 0 };
            (self.since, self.now) = (Some(now), 0);
        }
    }
}

/// Selects source ports of TCP connections from one namespace to one destination.
#[derive(Debug, Default)]
pub struct SourcePorts {
    /// Read on first use. Most destinations never need it.
    range: OnceLock<PortRange>,
    next: AtomicU32,
    recent: Mutex<Recent>,
}

impl SourcePorts {
    /// Creates a selector with a known range, for callers that may not be able to read it later.
    #[must_use]
    pub fn within(range: PortRange) -> Self {
        Self { range: range.into(), ..Self::default() }
    }

    /// Whether there were so many recent connections that ports are bound by number.
    pub fn by_number(&self) -> bool {
        self.exceeds_threshold(self.recent().count(Instant::now()))
    }

    fn exceeds_threshold(&self, count: u32) -> bool {
        count > MIN_RECENT && count > self.range().threshold()
    }

    /// Creates a socket with `make` and starts to connect it to `to`. If the source address
    /// matters, `make` binds the socket to it without a port, and `source` is that address.
    /// Otherwise `source` is `None`.
    ///
    /// # Errors
    /// Errors of `make` and connect(2); `AddrNotAvailable` if no port is available.
    pub fn connect(
        &self,
        make: impl Fn() -> io::Result<OwnedFd>,
        source: Option<IpAddr>,
        to: SocketAddr,
    ) -> io::Result<OwnedFd> {
        let make = || {
            let socket = make()?;
            // A port in TIME_WAIT can be bound again only if its previous socket also had
            // SO_REUSEADDR set.
            sockopt::set_socket_reuseaddr(&socket, true)?;
            Ok::<_, io::Error>(socket)
        };
        let now = Instant::now();
        let (count, backing_off) = {
            let mut recent = self.recent();
            (recent.add(now), recent.back_off_until.is_some_and(|until| now < until))
        };
        if backing_off {
            return Err(Errno::ADDRNOTAVAIL.into());
        }
        if !self.exceeds_threshold(count) {
            let socket = make()?;
            match begin_connect(&socket, to) {
                // Other sockets use all ports.
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
                // The port belongs to an open connection or to a listener.
                Err(error) if is_in_use(&error) => {}
                result => return result.map(|()| socket),
            }
        }
        self.recent().back_off_until = Some(now + BACK_OFF);
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

/// Starts to connect `socket`. A connection in progress is not an error.
///
/// # Errors
/// Immediate errors of connect(2): no route, no free port, refused (never for UDP; TCP over
/// loopback).
pub fn begin_connect(socket: impl AsFd, address: SocketAddr) -> io::Result<()> {
    match connect(socket, &address) {
        Ok(()) | Err(Errno::INPROGRESS) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn is_in_use(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::AddrInUse | io::ErrorKind::AddrNotAvailable)
}

#[cfg(test)]
mod tests {
    use super::*;
    use socket2::{Domain, Socket, Type};
    use std::cell::Cell;
    use std::net::TcpListener;

    #[test]
    fn connections_older_than_two_minutes_do_not_count() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut recent = Recent::default();
        for second in 0..30 {
            recent.add(at(second));
        }
        assert_eq!(recent.count(at(59)), 30);
        assert_eq!(recent.count(at(60)), 30, "the previous minute counts");
        recent.add(at(61));
        assert_eq!(recent.count(at(119)), 31);
        assert_eq!(recent.count(at(120)), 1);
        assert_eq!(recent.count(at(300)), 0);
    }

    #[test]
    fn the_port_search_backs_off_after_exhaustion() {
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
        assert_eq!(made.get(), ATTEMPTS, "the second call backs off");
        ports.recent().back_off_until = Some(Instant::now());
        ports.connect(make, None, to).unwrap_err();
        assert_eq!(made.get(), 2 * ATTEMPTS);
    }

    #[test]
    fn a_range_may_contain_a_single_port() {
        let range = PortRange { first: 7, last: 7 };
        let ports = SourcePorts::within(range);
        assert_eq!((range.count(), ports.next_port(), ports.next_port()), (1, 7, 7));
        assert!(PortRange::of_this_namespace().count() > 1);
    }
}
