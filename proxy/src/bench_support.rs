//! For the benchmark that says what counting costs: parts of a loop's work with counters that
//! count, and with counters that do not.

pub use crate::port::{Tally, Uncounted};

use crate::port::{Direction, Port, PortStats};
use crate::tcp::{
    Connection, Holder, Limits, Phase, Reservation, SPLICE_FROM, Scratch, Shares, Side, Turn,
};
use crate::{Direct, PortOptions};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tidegate_model::{Protocol, PublishLabel};
use tidegate_reactor::{Descriptors, PipePool, Readiness};

/// A connection of a published port, with what a loop lends it.
pub struct Carrier<T: Tally> {
    connection: Connection<T>,
    scratch: Scratch,
}

impl<T: Tally> Carrier<T> {
    /// Between `client` and `backend`, two connected sockets that do not block.
    ///
    /// # Panics
    /// Never: three descriptors are there.
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
        let permit = descriptors.take(2).expect("the first two of many");
        let phase = Phase::Open { since: Instant::now() };
        let shares =
            Arc::new(Shares::new(Limits { connections: 1, of_client: None, bytes: 1 << 30 }));
        let holder = Holder { client: localhost, port: 0 };
        shares.add(holder, 0);
        let reservation = Reservation::new(shares, holder, 0, permit);
        let connection =
            Connection::new(client, backend, phase, Arc::new(port), None, None, reservation);
        Self { connection, scratch: Scratch::new(PipePool::new(16, 16, descriptors), SPLICE_FROM) }
    }

    /// What a loop does when there is something: looks what there is, and moves it. Whether the
    /// connection goes on.
    pub fn turn(&mut self) -> bool {
        let sides = [Side::Backend, Side::Client];
        let ready = Readiness::of(sides.map(|side| self.connection.socket(side).as_fd()));
        for (side, ready) in sides.into_iter().zip(ready) {
            self.connection.record_readiness(side, ready);
        }
        matches!(self.connection.turn(&mut self.scratch), Turn::Wait | Turn::Again)
    }
}

/// The figures of a port by themselves.
#[derive(Debug, Default)]
pub struct Figures<T: Tally>(PortStats<T>);

impl<T: Tally> Figures<T> {
    /// All that is counted of a connection that is accepted, reached, exchanges a request and an
    /// answer, and ends.
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
