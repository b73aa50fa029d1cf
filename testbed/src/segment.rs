//! A link that several hosts share: each is everybody's neighbour, and hears whom it likes.

use std::sync::atomic::{AtomicU8, Ordering};

use crate::Namespace;
use crate::topology::{quicken_ipv6, wait_until_up};

/// A switch in a namespace of its own.
pub struct Segment {
    switch: Namespace,
    ports: AtomicU8,
}

impl Segment {
    /// A link with nobody on it.
    #[track_caller]
    pub fn new() -> Self {
        let switch = Namespace::new();
        // Without snooping nobody has to ask for the multicasts that neighbours are found by.
        switch.ip_all(
            "link add br0 type bridge mcast_snooping 0
             link set br0 up",
        );
        Self { switch, ports: AtomicU8::new(0) }
    }

    /// Gives `host` the interface `link` on it, with `addresses`, each with its prefix length.
    #[track_caller]
    pub fn attach(&self, host: &Namespace, link: &str, addresses: &[&str]) {
        let port = format!("port{}", self.ports.fetch_add(1, Ordering::Relaxed));
        quicken_ipv6(host);
        self.switch.ip_all(&format!(
            "link add {port} type veth peer name {link} netns {}
             link set {port} master br0 up",
            host.path().display(),
        ));
        for address in addresses {
            let nodad = if address.contains(':') { "nodad" } else { "" };
            host.ip_all(&format!("addr add {address} dev {link} {nodad}"));
        }
        host.ip_all(&format!("link set {link} up"));
        wait_until_up(host, link);
        wait_until_up(&self.switch, &port);
        wait_until_up(&self.switch, "br0");
    }
}

impl Default for Segment {
    fn default() -> Self {
        Self::new()
    }
}
