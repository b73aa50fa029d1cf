//! Source ports of connections, by destination.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::SocketAddr;
use tidegate_reactor::{PortRange, SourcePorts};

/// Number of recorded destinations.
const SLOTS: usize = 64;

/// Table of destinations. Several destinations share one slot. A destination keeps its slot while
/// its source ports are scarce because of frequent connections.
#[derive(Debug)]
pub(super) struct Destinations {
    range: PortRange,
    slots: Vec<Option<(SocketAddr, SourcePorts)>>,
}

impl Destinations {
    /// Creates an empty table. `range` is that of the kernel.
    pub(super) fn new(range: PortRange) -> Self {
        Self { range, slots: Vec::new() }
    }

    /// Returns the source ports for connections to `to`; `None` to let the kernel choose, because
    /// another destination needs the slot.
    pub(super) fn ports_towards(&mut self, to: SocketAddr) -> Option<&SourcePorts> {
        if self.slots.is_empty() {
            self.slots.resize_with(SLOTS, || None);
        }
        let mut hasher = DefaultHasher::new();
        to.hash(&mut hasher);
        let slot = &mut self.slots[hasher.finish() as usize % SLOTS];
        match slot {
            Some((owner, ports)) if *owner != to && ports.by_number() => return None,
            Some((owner, _)) if *owner == to => {}
            _ => *slot = Some((to, SourcePorts::within(self.range))),
        }
        slot.as_ref().map(|(_, ports)| ports)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use socket2::{Domain, Socket, Type};
    use std::io::ErrorKind;
    use std::net::{Ipv4Addr, TcpListener};
    use tidegate_testbed::Namespace;

    /// Returns a destination in the same slot as `of`, without a listener.
    fn neighbour(of: SocketAddr) -> SocketAddr {
        let shares = |to: &SocketAddr| {
            let mut both = Destinations::new(PortRange::default());
            both.ports_towards(of);
            both.ports_towards(*to);
            both.slots.iter().flatten().count() == 1
        };
        (1..=u16::MAX)
            .map(|port| SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port))
            .filter(|to| *to != of)
            .find(shares)
            .unwrap()
    }

    #[test]
    fn a_frequent_destination_keeps_the_slot() {
        Namespace::new().run(|| {
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
            let to = listener.local_addr().unwrap();
            let other = neighbour(to);
            let mut destinations = Destinations::new(PortRange::default());
            let mut connect = |to| {
                let make = || Ok(Socket::new(Domain::IPV4, Type::STREAM, None)?.into());
                destinations.ports_towards(to).map(|ports| ports.connect(make, None, to).map(drop))
            };
            for _ in 0..2 {
                connect(to).unwrap().unwrap();
                let refused = connect(other).expect("no destination is frequent").unwrap_err();
                assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
            }
            let range = PortRange::default();
            for _ in 0..=range.count() / 4 {
                connect(to).unwrap().unwrap();
                drop(listener.accept().unwrap());
            }
            assert!(connect(other).is_none(), "the slot is in use");
            assert!(connect(to).is_some());
        });
    }
}
