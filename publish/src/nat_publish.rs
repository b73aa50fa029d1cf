//! Published ports that the NAT engine carries, where it owns the containers' default route: UDP
//! shows the client's own address there.
//!
//! TCP has a better way: a socket made in the container's namespace shows the client as well, and
//! crosses neither device nor bridge (see [`client_address`](crate::client_address)). Of UDP that
//! takes a rule in the container for each client, and no client could talk to the container
//! directly meanwhile. What comes in by the engine's device goes back there by the default route,
//! for every client alike.
//!
//! It takes an address that the default route leads away from. A container on internal networks
//! only has none, and its ports stay with the publisher's own sockets.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tidegate_model::Ingress;
use tidegate_nat::{DropReason, Forward, ForwardId, ForwardSource, ForwardStats, Guard, Nat};
use tidegate_proxy::{
    DropReason as DatagramDrop, Engine, GatewayAcl, Listener, PortSnapshot, SeriesLabel,
};

/// The engine, and who else publishes ports.
#[derive(Clone)]
pub struct NatPublisher {
    nat: Arc<Nat>,
    /// Of the ports that it publishes.
    others: Arc<Engine>,
}

/// A port that the engine carries; dropped, it is closed.
pub struct NatPort {
    way: NatPublisher,
    id: ForwardId,
    forward: Forward,
    stats: Arc<ForwardStats>,
    has_series: bool,
    is_closed: AtomicBool,
}

impl NatPublisher {
    /// By `nat`, beside ports of `others`.
    pub fn new(nat: Arc<Nat>, others: Arc<Engine>) -> Self {
        Self { nat, others }
    }

    /// Leads what comes to `listener`, of UDP, to `port` of a container at `guests`: at most one
    /// address of each family, and at least one. `acl` controls access.
    ///
    /// # Errors
    /// What is in the way; the port is closed then.
    pub fn publish(
        &self,
        listener: Listener,
        port: u16,
        guests: &[IpAddr],
        acl: &GatewayAcl,
    ) -> io::Result<NatPort> {
        let label = listener.label();
        let same = guests.iter().find(|guest| guest.is_ipv4() == label.address().is_ipv4());
        let guest = same.or(guests.first()).ok_or(io::ErrorKind::AddrNotAvailable)?;
        let forward = Forward {
            protocol: label.protocol(),
            listen: label.address(),
            guest: SocketAddr::new(*guest, port),
            source: ForwardSource::Client,
        };
        // Before anything comes in.
        self.others.add_foreign_udp_port(label.address());
        let guard = Arc::new(AccessGuard { acl: acl.clone(), others: Arc::clone(&self.others) });
        let published = self.nat.publish_on(OwnedFd::from(listener), forward, Some(guard));
        let found = published.map(|id| (id, self.nat.forward_stats(id).unwrap_or_default()));
        match found {
            Ok((id, stats)) => {
                let has_series = self.others.reserve_series(1) > 0;
                let is_closed = AtomicBool::new(false);
                Ok(NatPort { way: self.clone(), id, forward, stats, has_series, is_closed })
            }
            Err(error) => {
                self.others.remove_foreign_udp_port(label.address());
                Err(io::Error::other(error))
            }
        }
    }
}

impl NatPort {
    /// Its figures, in the words of the publisher's own ports.
    pub fn snapshot(&self) -> PortSnapshot {
        let stats = &self.stats;
        let mut dropped = [0; DatagramDrop::ALL.len()];
        for reason in DropReason::ALL {
            let as_told = match reason {
                DropReason::ShutOut | DropReason::Malformed => DatagramDrop::NotAllowed,
                DropReason::NoRoom => DatagramDrop::NoRoom,
                DropReason::TooBig => DatagramDrop::TooLong,
                DropReason::Policy | DropReason::Unreachable => DatagramDrop::BackendUnreachable,
                _ => DatagramDrop::Exhausted,
            };
            dropped[as_told as usize] += stats.dropped[reason as usize].get();
        }
        dropped[DatagramDrop::BackendRefused as usize] += stats.refusals.get();
        // The engine counts out first, the publisher in.
        let turned = |[out, into]: [u64; 2]| [into, out];
        PortSnapshot {
            accepted: stats.flows_begun.get(),
            live: stats.flows.get(),
            limit: self.way.nat.figures().share_limit,
            cut: stats.evicted.get(),
            bytes: turned(stats.bytes.each_ref().map(tidegate_nat::Count::get)),
            datagrams: turned(stats.datagrams.each_ref().map(tidegate_nat::Count::get)),
            dropped,
            ..PortSnapshot::empty(SeriesLabel::Port(self.forward.label()))
        }
    }

    /// Whether it has series of its own in metrics.
    pub fn has_series(&self) -> bool {
        self.has_series
    }

    /// Closes it: nothing more is counted when this returns.
    pub fn close(&self) {
        if !self.is_closed.swap(true, Ordering::Relaxed) {
            self.way.nat.unpublish(self.id);
            self.way.others.remove_foreign_udp_port(self.forward.listen);
        }
    }
}

impl Drop for NatPort {
    fn drop(&mut self) {
        self.close();
        if self.has_series {
            self.way.others.release_series();
        }
    }
}

/// Access control, as at the publisher's own ports.
struct AccessGuard {
    acl: GatewayAcl,
    others: Arc<Engine>,
}

impl Guard for AccessGuard {
    fn admits(&self, ingress: &Ingress) -> bool {
        !self.acl.denies(ingress) && !self.others.is_reflected(ingress.client, &self.acl)
    }
}
