//! A link shared by several hosts.

use std::sync::atomic::{AtomicU8, Ordering};

use crate::Namespace;
use crate::topology::{disable_dad, wait_until_up};

/// A bridge in a namespace of its own.
pub struct Segment {
    switch: Namespace,
    ports: AtomicU8,
}

impl Segment {
    /// A link without hosts.
    #[track_caller]
    pub fn new() -> Self {
        let switch = Namespace::new();
        // Without multicast snooping, neighbour discovery works without group membership reports.
        switch.ip_all(
            "link add br0 type bridge mcast_snooping 0
             link set br0 up",
        );
        Self { switch, ports: AtomicU8::new(0) }
    }

    /// Adds the interface `link` to `host`, with `addresses` in CIDR notation, and connects it.
    #[track_caller]
    pub fn attach(&self, host: &Namespace, link: &str, addresses: &[&str]) {
        let port = format!("port{}", self.ports.fetch_add(1, Ordering::Relaxed));
        disable_dad(host);
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
