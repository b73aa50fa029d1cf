//! Published UDP ports that the NAT engine forwards if it provides the default route of the
//! containers. The container then sees the address of the client.
//!
//! For TCP, a socket in the namespace of the container also preserves the address of the client,
//! and its packets cross neither a device nor a bridge (see
//! [`client_address`](crate::client_address)). For UDP, that would need a policy rule in the
//! container for each client, and a client could not contact the container directly while its rule
//! exists. Through the engine, no rule is needed: the replies to all clients leave by the default
//! route, which leads to the engine.
//!
//! This requires an address of the container on the network of its default route. A container that
//! is attached only to internal networks has none, and the proxy serves its ports.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tidegate_model::{Ingress, PerDirection};
use tidegate_nat::{DropReason, Forward, ForwardId, ForwardSource, ForwardStats, Guard, Nat};
use tidegate_proxy::{
    DropReason as DatagramDrop, Engine, GatewayAcl, Listener, PortSnapshot, SeriesLabel,
};

/// Publishes ports through the NAT engine, in addition to those of the proxy.
#[derive(Clone)]
pub struct NatPublisher {
    nat: Arc<Nat>,
    /// The proxy, which serves the other published ports.
    proxy: Arc<Engine>,
}

/// A port that the NAT engine forwards. It is closed on drop.
pub struct NatPort {
    publisher: NatPublisher,
    id: ForwardId,
    forward: Forward,
    stats: Arc<ForwardStats>,
    has_series: bool,
    is_closed: AtomicBool,
}

impl NatPublisher {
    /// A publisher that uses `nat` and shares limits and access control with `proxy`.
    pub fn new(nat: Arc<Nat>, proxy: Arc<Engine>) -> Self {
        Self { nat, proxy }
    }

    /// Forwards datagrams to `listener`, a UDP socket, to `port` of a container. `guests` are the
    /// addresses of the container: one or two, and at most one of each family. `acl` controls
    /// access.
    ///
    /// # Errors
    /// If the engine cannot serve the port; it is closed then.
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
        // Before the first datagram, so that the loop guard of the proxy knows the port.
        self.proxy.add_foreign_udp_port(label.address());
        let guard = Arc::new(AccessGuard { acl: acl.clone(), proxy: Arc::clone(&self.proxy) });
        let published = self.nat.publish_on(OwnedFd::from(listener), forward, Some(guard));
        let found = published.map(|id| (id, self.nat.forward_stats(id).unwrap_or_default()));
        match found {
            Ok((id, stats)) => {
                let has_series = self.proxy.reserve_series(1) > 0;
                let is_closed = AtomicBool::new(false);
                Ok(NatPort { publisher: self.clone(), id, forward, stats, has_series, is_closed })
            }
            Err(error) => {
                self.proxy.remove_foreign_udp_port(label.address());
                Err(io::Error::other(error))
            }
        }
    }
}

impl NatPort {
    /// The counters of the port, with the drop reasons of the proxy.
    pub fn snapshot(&self) -> PortSnapshot {
        let stats = &self.stats;
        let mut dropped = [0; DatagramDrop::ALL.len()];
        for reason in DropReason::ALL {
            let proxy_reason = match reason {
                DropReason::Denied | DropReason::Malformed => DatagramDrop::NotAllowed,
                DropReason::NoRoom => DatagramDrop::NoRoom,
                DropReason::TooBig => DatagramDrop::TooLong,
                DropReason::Policy | DropReason::Unreachable => DatagramDrop::BackendUnreachable,
                _ => DatagramDrop::Exhausted,
            };
            dropped[proxy_reason as usize] += stats.dropped[reason as usize].get();
        }
        dropped[DatagramDrop::BackendRefused as usize] += stats.refusals.get();
        PortSnapshot {
            accepted: stats.flows_begun.get(),
            live: stats.flows.get(),
            limit: self.publisher.nat.figures().share_limit,
            cut: stats.evicted.get(),
            bytes: PerDirection::new(|direction| stats.bytes[direction].get()),
            datagrams: PerDirection::new(|direction| stats.datagrams[direction].get()),
            dropped,
            ..PortSnapshot::empty(SeriesLabel::Port(self.forward.label()))
        }
    }

    /// Whether the port has its own series in the metrics.
    pub fn has_series(&self) -> bool {
        self.has_series
    }

    /// Closes the port. The counters do not change after this returns.
    pub fn close(&self) {
        if !self.is_closed.swap(true, Ordering::Relaxed) {
            self.publisher.nat.unpublish(self.id);
            self.publisher.proxy.remove_foreign_udp_port(self.forward.listen);
        }
    }
}

impl Drop for NatPort {
    fn drop(&mut self) {
        self.close();
        if self.has_series {
            self.publisher.proxy.release_series();
        }
    }
}

/// The access control of the ports of the proxy.
struct AccessGuard {
    acl: GatewayAcl,
    proxy: Arc<Engine>,
}

impl Guard for AccessGuard {
    fn admits(&self, ingress: &Ingress) -> bool {
        !self.acl.denies(ingress) && !self.proxy.is_reflected(ingress.client, &self.acl)
    }
}
