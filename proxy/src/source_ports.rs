//! Source ports towards a backend, when the kernel's own choice runs dry.
//!
//! Every connection that we close first leaves its source port in TIME_WAIT for a minute, and the kernel, asked for
//! any free port, does not take such a one again (`tcp_tw_reuse` is off but for loopback). With the usual 28,000
//! ephemeral ports, one backend port can be dialled 470 times a second for any length of time; beyond that connect(2) first
//! becomes slow and then fails with `EADDRNOTAVAIL`.
//!
//! A port that is asked for *by number* may be taken again at once, provided both ends use timestamps, which keep the two
//! connections apart (RFC 6191; `tcp_twsk_unique`, net/ipv4/tcp_ipv4.c). So when the kernel has none left, ports are taken
//! in turn by number, which also brings back the longest resting first.

use crate::upstream::begin_connect;
use rustix::net::{bind, sockopt};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// Where the kernel's range is to be read, for the namespace of the reading thread.
const RANGE: &str = "/proc/sys/net/ipv4/ip_local_port_range";

/// The kernel's default range, for where it cannot be read.
const DEFAULT_RANGE: (u16, u16) = (32_768, 60_999);

/// How long ports are taken by number after the kernel had none: as long as TIME_WAIT (`TCP_TIMEWAIT_LEN`).
const BY_NUMBER_FOR: Duration = Duration::from_secs(60);

/// Ports tried by number before a flow is refused. Those of live connections are in the way.
const ATTEMPTS: u32 = 256;

/// Chooses source ports of TCP connections, from one namespace to one backend.
#[derive(Debug, Default)]
pub struct SourcePorts {
    /// The first port and how many there are; read when they are first needed, which most backends never do.
    range: OnceLock<(u16, u32)>,
    next: AtomicU32,
    by_number_until: Mutex<Option<Instant>>,
}

impl SourcePorts {
    /// Begins to connect a socket from `make` to `to`. `make` has bound it to an address without a port, if the
    /// address matters (`source`); otherwise `source` is `None`.
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
        if !self.by_number() {
            let socket = make()?;
            match begin_connect(&socket, to) {
                Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable => {
                    *self.until() = Some(Instant::now() + BY_NUMBER_FOR);
                }
                result => return result.map(|()| socket),
            }
        }
        let any: IpAddr =
            if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        for _ in 0..ATTEMPTS {
            let socket = make()?;
            let from = SocketAddr::new(source.unwrap_or(any), self.next_port());
            match bind(&socket, &from).map_err(io::Error::from).and_then(|()| begin_connect(&socket, to)) {
                // A live connection's, or somebody's listener.
                Err(error) if is_taken(&error) => {}
                result => return result.map(|()| socket),
            }
        }
        Err(io::ErrorKind::AddrNotAvailable.into())
    }

    fn next_port(&self) -> u16 {
        let (first, count) = *self.range.get_or_init(range_of_this_namespace);
        let offset = self.next.fetch_add(1, Ordering::Relaxed) % count;
        first + offset as u16
    }

    fn by_number(&self) -> bool {
        let mut until = self.until();
        let still = until.is_some_and(|until| Instant::now() < until);
        if !still {
            *until = None;
        }
        still
    }

    fn until(&self) -> std::sync::MutexGuard<'_, Option<Instant>> {
        self.by_number_until.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The range that the calling thread's namespace sets.
fn range_of_this_namespace() -> (u16, u32) {
    let text = std::fs::read_to_string(RANGE).unwrap_or_default();
    let mut numbers = text.split_whitespace().filter_map(|number| number.parse::<u16>().ok());
    let (first, last) = match (numbers.next(), numbers.next()) {
        (Some(first), Some(last)) if first <= last => (first, last),
        _ => DEFAULT_RANGE,
    };
    (first, u32::from(last - first) + 1)
}

fn is_taken(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::AddrInUse | io::ErrorKind::AddrNotAvailable)
}
