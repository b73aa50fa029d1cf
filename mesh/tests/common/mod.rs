//! Hosts as namespaces on one switch, each with the bridge `front`, for tests.

#![allow(dead_code, reason = "not every test uses all of it")]

use std::net::IpAddr;
use tidegate_model::MacAddress;
use tidegate_testbed::{Namespace, hosts};

/// Hosts with the bridge `front`.
pub(crate) struct Hosts {
    _switch: Namespace,
    pub(crate) hosts: Vec<Namespace>,
}

impl Hosts {
    pub(crate) fn new(count: u8) -> Self {
        let hosts::Hosts { switch, hosts } = hosts::Hosts::new(count);
        for host in &hosts {
            host.ip_all(
                "link add front type bridge mcast_snooping 0
                 link set front up",
            );
        }
        Self { _switch: switch, hosts }
    }

    /// A container at host `number`, with the addresses 10.9.0.ID and fd09::ID.
    pub(crate) fn container(&self, number: usize, id: u8) -> Namespace {
        let (host, container) = (&self.hosts[number], Namespace::new());
        let port = format!("c{id}");
        hosts::Hosts::veth(host, &port, &container);
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
