//! What a host has to program for an overlay network. Pure.
//!
//! A VXLAN device floods and learns nothing here. The host therefore holds, for each endpoint of
//! another host, an entry of the forwarding database (its MAC address is behind the VTEP of that
//! host) and a neighbour entry for each of its addresses.
//!
//! [`changes`] leads from the entries that the kernel holds, whatever they are, to the desired ones.
//! At every step a packet reaches the endpoint that has its address, or nothing: neighbours are
//! removed before the stations behind them, and added after them.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use crate::record::{Claim, Endpoint};
use crate::view::View;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use tidegate_model::MacAddress;

/// The entries of one network, as desired or as found in the kernel.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Entries {
    /// The VTEP behind which a MAC address is.
    pub stations: BTreeMap<MacAddress, IpAddr>,
    /// The MAC address that has an address.
    pub neighbours: BTreeMap<IpAddr, MacAddress>,
}

impl Entries {
    /// Applies `change`.
    pub fn execute(&mut self, change: &Change) {
        match *change {
            Change::RemoveNeighbour(address) => drop(self.neighbours.remove(&address)),
            Change::RemoveStation(mac) => drop(self.stations.remove(&mac)),
            Change::AddStation(mac, vtep) => drop(self.stations.insert(mac, vtep)),
            Change::AddNeighbour(address, mac) => drop(self.neighbours.insert(address, mac)),
        }
    }
}

/// A change of one entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Removes a neighbour entry.
    RemoveNeighbour(IpAddr),
    /// Removes an entry of the forwarding database.
    RemoveStation(MacAddress),
    /// Adds an entry of the forwarding database.
    AddStation(MacAddress, IpAddr),
    /// Adds a neighbour entry.
    AddNeighbour(IpAddr, MacAddress),
}

/// Why an endpoint of another host is not programmed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Conflict {
    /// Its address is claimed by another endpoint, or by none.
    #[error("endpoint {endpoint} of network {network}: {address} is not claimed for it")]
    Address {
        /// The network.
        network: String,
        /// The endpoint.
        endpoint: String,
        /// The address.
        address: IpAddr,
    },
    /// Its MAC address is that of another endpoint.
    #[error("endpoint {endpoint} of network {network}: {mac} is that of {other}")]
    Mac {
        /// The network.
        network: String,
        /// The endpoint.
        endpoint: String,
        /// The MAC address.
        mac: MacAddress,
        /// The endpoint that has it.
        other: String,
    },
    /// Its host is not in the cluster.
    #[error("endpoint {endpoint} of network {network}: there is no host {node}")]
    Node {
        /// The network.
        network: String,
        /// The endpoint.
        endpoint: String,
        /// ID of the host.
        node: String,
    },
}

/// Returns the entries that the host `own` needs for the endpoints of other hosts on `network`, and
/// the endpoints that are left out.
#[must_use]
pub fn desired(view: &View, own: &str, network: &str) -> (Entries, Vec<Conflict>) {
    let (mut entries, mut conflicts) = (Entries::default(), Vec::new());
    let mut holders: BTreeMap<MacAddress, &str> = BTreeMap::new();
    // Another host cannot displace an endpoint of this one.
    let (here, elsewhere): (Vec<_>, Vec<_>) =
        view.endpoints_on(network).partition(|(_, endpoint)| endpoint.node == own);
    for (name, endpoint) in here.into_iter().chain(elsewhere) {
        match place(view, network, name, endpoint, holders.get(&endpoint.mac)) {
            Ok(_) if endpoint.node == own => {}
            Ok(vtep) => {
                entries.stations.insert(endpoint.mac, vtep);
                let addresses = endpoint.addresses.iter();
                entries.neighbours.extend(addresses.map(|address| (*address, endpoint.mac)));
            }
            Err(conflict) => {
                conflicts.push(conflict);
                continue;
            }
        }
        holders.insert(endpoint.mac, name);
    }
    (entries, conflicts)
}

/// Returns the VTEP of an endpoint.
fn place(
    view: &View,
    network: &str,
    name: &str,
    endpoint: &Endpoint,
    holder: Option<&&str>,
) -> Result<IpAddr, Conflict> {
    let (network, name) = (network.to_owned(), name.to_owned());
    let is_claimed = |address: &IpAddr| {
        let claim = view.addresses.get(&(network.clone(), *address));
        let own = Claim::Endpoint { name: name.clone(), node: endpoint.node.clone() };
        claim == Some(&own)
    };
    if let Some(address) = endpoint.addresses.iter().find(|address| !is_claimed(address)) {
        return Err(Conflict::Address { address: *address, network, endpoint: name });
    }
    if let Some(other) = holder {
        let other = (*other).to_owned();
        return Err(Conflict::Mac { network, endpoint: name, mac: endpoint.mac, other });
    }
    let node = view.nodes.get(&endpoint.node);
    node.map(|node| node.vtep).ok_or_else(|| Conflict::Node {
        network,
        endpoint: name,
        node: endpoint.node.clone(),
    })
}

/// Returns the changes from `found` to `desired`, in the order of their execution.
#[must_use]
pub fn changes(desired: &Entries, found: &Entries) -> Vec<Change> {
    let stale: BTreeSet<MacAddress> = found
        .stations
        .iter()
        .filter(|(mac, vtep)| desired.stations.get(mac) != Some(vtep))
        .map(|(mac, _)| *mac)
        .collect();
    // A neighbour whose station moves is removed meanwhile.
    let is_kept = |address: &IpAddr, mac: &MacAddress| {
        desired.neighbours.get(address) == Some(mac) && !stale.contains(mac)
    };
    let mut changes = Vec::new();
    let removed = found.neighbours.iter().filter(|(address, mac)| !is_kept(address, mac));
    changes.extend(removed.map(|(address, _)| Change::RemoveNeighbour(*address)));
    changes.extend(stale.iter().map(|mac| Change::RemoveStation(*mac)));
    let added = desired.stations.iter().filter(|(mac, vtep)| found.stations.get(mac) != Some(vtep));
    changes.extend(added.map(|(mac, vtep)| Change::AddStation(*mac, *vtep)));
    let added = desired.neighbours.iter().filter(|(address, mac)| {
        !(found.neighbours.get(address) == Some(mac) && is_kept(address, mac))
    });
    changes.extend(added.map(|(address, mac)| Change::AddNeighbour(*address, *mac)));
    changes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::{EndpointState, Node, Role};
    use proptest::prelude::*;

    fn mac(number: u8) -> MacAddress {
        MacAddress([2, 0, 0, 0, 0, number])
    }

    fn ip(number: u8) -> IpAddr {
        [10, 9, 0, number].into()
    }

    fn vtep(number: u8) -> IpAddr {
        [192, 0, 2, number].into()
    }

    impl Entries {
        /// Applies `change`, which must change something.
        fn step(&mut self, change: &Change) {
            let before = self.clone();
            self.execute(change);
            assert_ne!(*self, before);
        }

        /// Where a packet to `address` goes.
        fn route(&self, address: IpAddr) -> Option<(MacAddress, IpAddr)> {
            let mac = self.neighbours.get(&address)?;
            Some((*mac, *self.stations.get(mac)?))
        }
    }

    /// Random entries, in which every neighbour has a station unless `dangling`.
    fn entries(dangling: bool) -> impl Strategy<Value = Entries> {
        let stations = proptest::collection::btree_map(
            (0_u8..6).prop_map(mac),
            (0_u8..3).prop_map(vtep),
            0..6,
        );
        let neighbours =
            proptest::collection::btree_map((0_u8..6).prop_map(ip), (0_u8..6).prop_map(mac), 0..6);
        (stations, neighbours).prop_map(move |(stations, mut neighbours)| {
            neighbours.retain(|_, mac| dangling || stations.contains_key(mac));
            Entries { stations, neighbours }
        })
    }

    proptest! {
        #[test]
        fn changes_lead_to_the_desired_entries(desired in entries(false), found in entries(true)) {
            let mut now = found.clone();
            for change in changes(&desired, &found) {
                now.step(&change);
            }
            prop_assert_eq!(&now, &desired);
            prop_assert_eq!(changes(&desired, &now), []);
        }

        /// A packet reaches what had its address before, what has it now, or nothing.
        #[test]
        fn no_packet_goes_elsewhere_meanwhile(desired in entries(false), found in entries(true)) {
            let mut now = found.clone();
            for change in changes(&desired, &found) {
                now.step(&change);
                for address in (0..6).map(ip) {
                    let route = now.route(address);
                    let is_one = route.is_none()
                        || route == found.route(address)
                        || route == desired.route(address);
                    prop_assert!(is_one, "{:?} after {:?}", route, change);
                }
            }
        }
    }

    fn endpoint(node: &str, number: u8) -> Endpoint {
        Endpoint {
            node: node.into(),
            generation: 1,
            addresses: vec![ip(number)],
            mac: mac(number),
            state: EndpointState::Ready,
            aliases: Vec::new(),
            hostname: None,
            role: Role::Container,
        }
    }

    fn node(index: u16, number: u8) -> Node {
        let (boot, machine) = (String::new(), String::new());
        Node { index, vtep: vtep(number), boot, machine, mtu: 1500 }
    }

    fn claim(node: &str, name: &str) -> Claim {
        Claim::Endpoint { name: name.into(), node: node.into() }
    }

    /// Two hosts, each with an endpoint on the network `front`.
    fn view() -> View {
        let mut view = View::default();
        for (number, (host, name)) in [("a", "web"), ("b", "db")].into_iter().enumerate() {
            let number = number as u8;
            view.nodes.insert(host.into(), node(number.into(), number));
            view.endpoints.insert(("front".into(), name.into()), endpoint(host, number));
            view.addresses.insert(("front".into(), ip(number)), claim(host, name));
        }
        view
    }

    #[test]
    fn endpoints_of_other_hosts_and_of_this_network_are_programmed() {
        let mut view = view();
        view.endpoints.insert(("fron".into(), "x".into()), endpoint("b", 7));
        view.endpoints.insert(("front2".into(), "x".into()), endpoint("b", 8));
        let (entries, conflicts) = desired(&view, "a", "front");
        assert_eq!(conflicts, []);
        assert_eq!(entries.stations, [(mac(1), vtep(1))].into());
        assert_eq!(entries.neighbours, [(ip(1), mac(1))].into());
    }

    #[test]
    fn an_endpoint_without_a_claim_or_a_host_and_a_second_mac_address_are_left_out() {
        let mut view = view();
        view.nodes.insert("c".into(), node(9, 2));
        // The address of db, and the MAC address of web, which is on this host.
        view.endpoints.insert(("front".into(), "thief".into()), endpoint("c", 1));
        let twin = Endpoint { addresses: vec![ip(5)], ..endpoint("c", 0) };
        view.endpoints.insert(("front".into(), "twin".into()), twin);
        view.addresses.insert(("front".into(), ip(5)), claim("c", "twin"));
        view.endpoints.insert(("front".into(), "lost".into()), endpoint("gone", 6));
        view.addresses.insert(("front".into(), ip(6)), claim("gone", "lost"));
        let (entries, conflicts) = desired(&view, "a", "front");
        assert_eq!(entries.stations, [(mac(1), vtep(1))].into());
        let lines: Vec<_> = conflicts.iter().map(ToString::to_string).collect();
        assert_eq!(
            lines,
            [
                "endpoint lost of network front: there is no host gone",
                "endpoint thief of network front: 10.9.0.1 is not claimed for it",
                "endpoint twin of network front: 02:00:00:00:00:00 is that of web",
            ]
        );
    }
}
