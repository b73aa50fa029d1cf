//! An upstream that can be replaced at run time.

use rustix::net::getpeername;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::BorrowedFd;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;
use tidegate_proxy::{BackendId, DialFailure, Flow, Opened, Upstream};

/// An upstream that can be replaced while its ports stay published.
///
/// Existing flows keep their path: a TCP connection ends with the container that it reached. A UDP
/// session to an address that no longer belongs to the container is stale, and its next datagram
/// opens a new one.
pub struct RelocatableUpstream(RwLock<Arc<Target>>);

/// The current upstream.
struct Target {
    upstream: Arc<dyn Upstream>,
    addresses: Vec<IpAddr>,
}

impl RelocatableUpstream {
    /// Connects to `addresses` through `upstream`. If empty, `upstream` chooses the addresses
    /// itself.
    pub fn new(upstream: Arc<dyn Upstream>, addresses: &[IpAddr]) -> Self {
        Self(RwLock::new(Arc::new(Target { upstream, addresses: addresses.to_vec() })))
    }

    /// Replaces the upstream for new flows.
    pub fn relocate(&self, upstream: Arc<dyn Upstream>, addresses: &[IpAddr]) {
        let target = Arc::new(Target { upstream, addresses: addresses.to_vec() });
        let old =
            std::mem::replace(&mut *self.0.write().unwrap_or_else(PoisonError::into_inner), target);
        // Not under the lock: the drop removes policy rules, which takes a while.
        drop(old);
    }

    /// Returns a copy, so that the lock is not held while a socket is opened.
    fn target(&self) -> Arc<Target> {
        Arc::clone(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Upstream for RelocatableUpstream {
    fn open(&self, flow: &Flow) -> io::Result<Opened> {
        self.target().upstream.open(flow)
    }

    fn open_other(&self, flow: &Flow, tried: &[BackendId]) -> Option<io::Result<Opened>> {
        self.target().upstream.open_other(flow, tried)
    }

    fn hedge_after(&self) -> Option<Duration> {
        self.target().upstream.hedge_after()
    }

    fn connected(&self, backend: BackendId) {
        self.target().upstream.connected(backend);
    }

    fn failed(&self, backend: BackendId, why: DialFailure) {
        self.target().upstream.failed(backend, why);
    }

    fn is_available(&self, backend: BackendId) -> bool {
        self.target().upstream.is_available(backend)
    }

    fn is_stale(&self, socket: BorrowedFd<'_>) -> bool {
        let target = self.target();
        let peer =
            getpeername(socket).ok().flatten().and_then(|peer| SocketAddr::try_from(peer).ok());
        let elsewhere =
            peer.is_some_and(|peer| !target.addresses.contains(&peer.ip().to_canonical()));
        (elsewhere && !target.addresses.is_empty()) || target.upstream.is_stale(socket)
    }

    fn wants_local_address(&self) -> bool {
        self.target().upstream.wants_local_address()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::UdpSocket;
    use std::os::fd::AsFd;
    use tidegate_model::Protocol;
    use tidegate_proxy::Direct;

    #[test]
    fn new_flows_follow_a_relocation_and_old_sessions_are_stale() {
        let addresses = ["127.0.0.1", "127.0.0.2"].map(|ip| ip.parse::<IpAddr>().unwrap());
        let servers = addresses.map(|ip| UdpSocket::bind((ip, 0)).unwrap());
        let upstreams = addresses.map(|ip| Arc::new(Direct::new(ip)) as Arc<dyn Upstream>);
        let flow = |server: &UdpSocket| Flow {
            protocol: Protocol::Udp,
            client: SocketAddr::from(([192, 0, 2, 1], 4000)),
            local: None,
            container_port: server.local_addr().unwrap().port(),
        };
        let [first, second] = upstreams;
        let upstream = RelocatableUpstream::new(first, &addresses[..1]);
        let before = upstream.open(&flow(&servers[0])).unwrap().socket;
        assert!(!upstream.is_stale(before.as_fd()));
        upstream.relocate(second, &addresses[1..]);
        let after = upstream.open(&flow(&servers[1])).unwrap().socket;
        assert!(upstream.is_stale(before.as_fd()) && !upstream.is_stale(after.as_fd()));
        rustix::io::write(&after, b"here").unwrap();
        let mut buffer = [0; 8];
        assert_eq!(servers[1].recv(&mut buffer).unwrap(), 4);
    }
}
