//! Hosts as namespaces on one switch, for tests.

#![allow(dead_code, reason = "not every test uses all of it")]

use std::net::IpAddr;
use tidegate_model::MacAddress;
use tidegate_testbed::Namespace;

/// Hosts on one switch, with the underlay addresses 192.0.2.N and 2001:db8::N.
pub(crate) struct Hosts {
    _switch: Namespace,
    pub(crate) hosts: Vec<Namespace>,
}

impl Hosts {
    pub(crate) fn new(count: u8) -> Self {
        let switch = Namespace::new();
        switch.ip_all(
            "link add br0 type bridge
             link set br0 up",
        );
        let hosts = (1..=count).map(|number| {
            let host = Namespace::new();
            let port = format!("p{number}");
            veth(&switch, &port, &host);
            switch.ip_all(&format!(
                "link set {port} master br0
                 link set {port} up"
            ));
            host.ip_all(&format!(
                "link set lo up
                 addr add 192.0.2.{number}/24 dev eth0
                 addr add 2001:db8::{number}/64 dev eth0 nodad
                 link set eth0 up
                 link add front type bridge mcast_snooping 0
                 link set front up"
            ));
            host
        });
        Self { hosts: hosts.collect(), _switch: switch }
    }

    /// A container at host `number`, with the addresses 10.9.0.ID and fd09::ID.
    pub(crate) fn container(&self, number: usize, id: u8) -> Namespace {
        let (host, container) = (&self.hosts[number], Namespace::new());
        let port = format!("c{id}");
        veth(host, &port, &container);
        host.ip_all(&format!(
            "link set {port} master front
             link set {port} up"
        ));
        container.ip_all(&format!(
            "link set lo up
             link set eth0 address {}
             addr add 10.9.0.{id}/24 dev eth0
             addr add fd09::{id}/64 dev eth0 nodad
             link set eth0 up",
            mac(id)
        ));
        container
    }
}

/// A veth pair: `port` in `namespace`, and eth0 in `peer`.
pub(crate) fn veth(namespace: &Namespace, port: &str, peer: &Namespace) {
    let peer = peer.path();
    let link = format!("link add {port} type veth peer name eth0 netns {}", peer.display());
    namespace.ip_all(&link);
}

pub(crate) fn mac(id: u8) -> MacAddress {
    MacAddress([2, 0, 10, 9, 0, id])
}

pub(crate) fn vtep(number: usize, v6: bool) -> IpAddr {
    let text =
        if v6 { format!("2001:db8::{}", number + 1) } else { format!("192.0.2.{}", number + 1) };
    text.parse().unwrap()
}

pub(crate) fn reaches(from: &Namespace, to: &str) -> bool {
    let output = from.command("ping").args(["-c", "1", "-W", "1", to]).output().unwrap();
    output.status.success()
}
