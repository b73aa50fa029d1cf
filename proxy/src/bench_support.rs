//! Support for the benchmark of counter overhead: parts of an event loop, generic over real and
//! no-op counters.

pub use crate::port::{Tally, Uncounted};

use crate::port::{Port, PortStats};
use crate::side::Side;
use crate::tcp::{
    Connection, Holder, Limits, Phase, Reservation, SPLICE_FROM, Scratch, Shares, Turn,
};
use crate::{Direct, PortOptions};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tidegate_model::Direction;
use tidegate_model::{Protocol, PublishLabel};
use tidegate_reactor::{Descriptors, PipePool, Readiness};

/// A connection of a published port with the buffers of its loop.
pub struct BenchConnection<T: Tally> {
    connection: Connection<T>,
    scratch: Scratch,
}

impl<T: Tally> BenchConnection<T> {
    /// Creates a connection between `client` and `backend`, two connected non-blocking sockets.
    ///
    /// # Panics
    /// Never: enough descriptors are available.
    #[must_use]
    pub fn new(client: OwnedFd, backend: OwnedFd) -> Self {
        let localhost = IpAddr::V4(Ipv4Addr::LOCALHOST);
        let port = Port {
            id: 0,
            label: PublishLabel::new(SocketAddr::new(localhost, 80), Protocol::Tcp),
            container_port: 80,
            options: Arc::new(PortOptions::new(Arc::new(Direct::new(localhost)))),
            stats: PortStats::<T>::default(),
            closed: AtomicBool::new(false),
            has_series: true,
        };
        let descriptors = Arc::new(Descriptors::new(64));
        let permit = descriptors.take(2).expect("64 descriptors are available");
        let phase = Phase::Open { since: Instant::now() };
        let shares =
            Arc::new(Shares::new(Limits { connections: 1, per_client: None, bytes: 1 << 30 }));
        let holder = Holder { client: localhost, port: 0 };
        shares.add(holder, 0);
        let reservation = Reservation::new(shares, holder, 0, permit);
        let connection =
            Connection::new(client, backend, phase, Arc::new(port), None, None, reservation);
        Self { connection, scratch: Scratch::new(PipePool::new(16, 16, descriptors), SPLICE_FROM) }
    }

    /// Does the work of a loop for one event: polls the sockets and transfers payload. Returns
    /// whether the connection is still open.
    pub fn turn(&mut self) -> bool {
        let sides = [Side::Backend, Side::Client];
        let ready = Readiness::of(sides.map(|side| self.connection.socket(side).as_fd()));
        for (side, ready) in sides.into_iter().zip(ready) {
            self.connection.record_readiness(side, ready);
        }
        matches!(self.connection.turn(&mut self.scratch), Turn::Wait | Turn::Again)
    }
}

/// The counters of a port alone.
#[derive(Debug, Default)]
pub struct BenchCounters<T: Tally>(PortStats<T>);

impl<T: Tally> BenchCounters<T> {
    /// Counts a connection with accept, connect, one request, one response, and its end.
    pub fn connection(&self, dial: Duration, life: Duration) {
        self.0.accepted.add(1);
        self.0.live.fetch_add(1, Ordering::Relaxed);
        self.0.record_dial(dial);
        self.0.add_bytes(Direction::In, 100);
        self.0.add_bytes(Direction::Out, 1000);
        self.0.record_lifetime(life);
        self.0.live.fetch_sub(1, Ordering::Relaxed);
    }
}
