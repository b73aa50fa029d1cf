//! A way to a container that may lead elsewhere later.

use rustix::net::getpeername;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::BorrowedFd;
use std::sync::{Arc, PoisonError, RwLock};
use tidegate_proxy::{Flow, Opened, Upstream};

/// An upstream that can be replaced under ports that are published.
///
/// Flows that were begun stay on the way they took: a TCP connection ends with the container that
/// it reached, and a UDP session to an address that is not the container's any more is stale, so
/// that its next datagram opens a new one.
pub struct Relocatable(RwLock<Arc<Target>>);

/// Where it leads now.
struct Target {
    upstream: Arc<dyn Upstream>,
    addresses: Vec<IpAddr>,
}

impl Relocatable {
    /// Leads to `addresses` by `upstream`; without any, to those that the upstream finds by itself.
    pub fn new(upstream: Arc<dyn Upstream>, addresses: &[IpAddr]) -> Self {
        Self(RwLock::new(Arc::new(Target { upstream, addresses: addresses.to_vec() })))
    }

    /// Leads to `addresses` by `upstream` from here on.
    pub fn relocate(&self, upstream: Arc<dyn Upstream>, addresses: &[IpAddr]) {
        let target = Arc::new(Target { upstream, addresses: addresses.to_vec() });
        let old =
            std::mem::replace(&mut *self.0.write().unwrap_or_else(PoisonError::into_inner), target);
        // Not under the lock: what it takes back takes a while.
        drop(old);
    }

    /// Not under the lock either: nobody waits for it while a socket is opened.
    fn target(&self) -> Arc<Target> {
        Arc::clone(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Upstream for Relocatable {
    fn open(&self, flow: &Flow) -> io::Result<Opened> {
        self.target().upstream.open(flow)
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
    fn flows_go_where_it_leads_now_and_sessions_to_the_old_place_are_stale() {
        let places = ["127.0.0.1", "127.0.0.2"].map(|ip| ip.parse::<IpAddr>().unwrap());
        let servers = places.map(|ip| UdpSocket::bind((ip, 0)).unwrap());
        let ways = places.map(|ip| Arc::new(Direct::new(ip)) as Arc<dyn Upstream>);
        let flow = |server: &UdpSocket| Flow {
            protocol: Protocol::Udp,
            client: SocketAddr::from(([192, 0, 2, 1], 4000)),
            local: None,
            container_port: server.local_addr().unwrap().port(),
        };
        let [first, second] = ways;
        let way = Relocatable::new(first, &places[..1]);
        let before = way.open(&flow(&servers[0])).unwrap().socket;
        assert!(!way.is_stale(before.as_fd()));
        way.relocate(second, &places[1..]);
        let after = way.open(&flow(&servers[1])).unwrap().socket;
        assert!(way.is_stale(before.as_fd()) && !way.is_stale(after.as_fd()));
        rustix::io::write(&after, b"here").unwrap();
        let mut buffer = [0; 8];
        assert_eq!(servers[1].recv(&mut buffer).unwrap(), 4);
    }
}
