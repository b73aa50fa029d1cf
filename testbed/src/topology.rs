//! Client, host and container: the smallest network for tests of published ports.
//!
//! ```text
//!   client                      host                               container
//!   ┌────────────────┐          ┌───────────────────────────┐      ┌────────────────┐
//!   │ eth0           ├──────────┤ eth0            br0       ├──────┤ eth0           │
//!   │ 203.0.113.9    │   veth   │ 203.0.113.1     172.30.0.1│ veth │ 172.30.0.2     │
//!   │ 2001:db8:1::9  │          │ 2001:db8:1::1   fd30::1   ├─┐    │ fd30::2        │
//!   └────────────────┘          └───────────────────────────┘ │    └────────────────┘
//!   default via host                                          │    default via br0
//!                                                             │    neighbour
//!                                                             │    ┌────────────────┐
//!                                                             └────┤ eth0           │
//!                                                                  │ 172.30.0.3 ... │
//!                                                                  └────────────────┘
//! ```

use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use crate::{Namespace, eventually};

/// The addresses of [`Topology`]: documentation prefixes outside, private prefixes inside.
pub mod addr {
    use std::net::{Ipv4Addr, Ipv6Addr};

    /// The client's IPv4 address.
    pub const CLIENT_V4: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 9);
    /// The client's IPv6 address.
    pub const CLIENT_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 9);
    /// The host's IPv4 address on the client's side.
    pub const HOST_V4: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);
    /// The host's IPv6 address on the client's side.
    pub const HOST_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 1);
    /// The bridge's IPv4 address, the containers' gateway.
    pub const GATEWAY_V4: Ipv4Addr = Ipv4Addr::new(172, 30, 0, 1);
    /// The bridge's IPv6 address, the containers' gateway.
    pub const GATEWAY_V6: Ipv6Addr = Ipv6Addr::new(0xfd30, 0, 0, 0, 0, 0, 0, 1);
    /// The container's IPv4 address.
    pub const CONTAINER_V4: Ipv4Addr = Ipv4Addr::new(172, 30, 0, 2);
    /// The container's IPv6 address.
    pub const CONTAINER_V6: Ipv6Addr = Ipv6Addr::new(0xfd30, 0, 0, 0, 0, 0, 0, 2);
    /// The first neighbour's IPv4 address.
    pub const NEIGHBOUR_V4: Ipv4Addr = Ipv4Addr::new(172, 30, 0, 3);
    /// The first neighbour's IPv6 address.
    pub const NEIGHBOUR_V6: Ipv6Addr = Ipv6Addr::new(0xfd30, 0, 0, 0, 0, 0, 0, 3);
}

/// Timeout for a link to come up.
const LINK_UP: Duration = Duration::from_secs(10);

/// The last byte of the addresses of the first container.
const FIRST_CONTAINER: u8 = 2;

/// Three connected namespaces, with the host as the router between the other two.
///
/// IPv6 addresses are usable immediately, because duplicate address detection is off. Bridged
/// packets do not pass the firewall of the host (`net.bridge.bridge-nf-call-*` is 0); a test that
/// needs it sets this to 1.
pub struct Topology {
    /// Outside of the host, in a subnet shared with it.
    pub client: Namespace,
    /// Has `eth0` to the client and the bridge `br0` to containers.
    pub host: Namespace,
    /// On the bridge of the host.
    pub container: Namespace,
    /// The last byte of the addresses of the next container.
    next: AtomicU8,
}

/// Configures a [`Topology`].
pub struct Builder {
    forwarding: bool,
    congestion_control: Option<String>,
}

impl Topology {
    /// The default topology: the host forwards, and TCP uses `reno`.
    #[track_caller]
    pub fn three() -> Self {
        Self::builder().build()
    }

    /// Starts from the defaults of [`three`](Self::three).
    pub fn builder() -> Builder {
        Builder { forwarding: true, congestion_control: None }
    }

    /// Adds a container to the bridge. The first one gets [`addr::NEIGHBOUR_V4`] and
    /// [`addr::NEIGHBOUR_V6`], later ones the next addresses.
    #[track_caller]
    pub fn neighbour(&self) -> Namespace {
        let neighbour = Namespace::new();
        let control = self.host.read_sysctl("net.ipv4.tcp_congestion_control");
        neighbour.sysctl("net.ipv4.tcp_congestion_control", &control);
        self.attach(&neighbour);
        neighbour
    }

    fn join_client(&self) {
        disable_dad(&self.client);
        self.host.ip_all(&format!(
            "link add eth0 type veth peer name eth0 netns {}
             addr add {host4}/24 dev eth0
             addr add {host6}/64 dev eth0 nodad
             link set eth0 up",
            self.client.path().display(),
            host4 = addr::HOST_V4,
            host6 = addr::HOST_V6,
        ));
        self.client.ip_all(&format!(
            "addr add {client4}/24 dev eth0
             addr add {client6}/64 dev eth0 nodad
             link set eth0 up
             route add default via {host4}
             -6 route add default via {host6}",
            client4 = addr::CLIENT_V4,
            client6 = addr::CLIENT_V6,
            host4 = addr::HOST_V4,
            host6 = addr::HOST_V6,
        ));
        wait_until_up(&self.host, "eth0");
        wait_until_up(&self.client, "eth0");
    }

    fn add_bridge(&self) {
        self.host.ip_all(&format!(
            "link add br0 type bridge
             addr add {gateway4}/24 dev br0
             addr add {gateway6}/64 dev br0 nodad
             link set br0 up",
            gateway4 = addr::GATEWAY_V4,
            gateway6 = addr::GATEWAY_V6,
        ));
    }

    #[track_caller]
    fn attach(&self, container: &Namespace) {
        let last = self.next.fetch_add(1, Ordering::Relaxed);
        let [a, b, c, _] = addr::GATEWAY_V4.octets();
        let container4 = Ipv4Addr::new(a, b, c, last);
        let container6 = Ipv6Addr::from_bits(addr::GATEWAY_V6.to_bits() - 1 + u128::from(last));
        disable_dad(container);
        self.host.ip_all(&format!(
            "link add port{last} type veth peer name eth0 netns {}
             link set port{last} master br0 up",
            container.path().display(),
        ));
        container.ip_all(&format!(
            "addr add {container4}/24 dev eth0
             addr add {container6}/64 dev eth0 nodad
             link set eth0 up
             route add default via {gateway4}
             -6 route add default via {gateway6}",
            gateway4 = addr::GATEWAY_V4,
            gateway6 = addr::GATEWAY_V6,
        ));
        wait_until_up(container, "eth0");
        wait_until_up(&self.host, &format!("port{last}"));
        wait_until_up(&self.host, "br0");
    }
}

impl Builder {
    /// Whether the host forwards IPv4 and IPv6 between client and containers (default: yes).
    #[must_use]
    pub fn forwarding(mut self, on: bool) -> Self {
        self.forwarding = on;
        self
    }

    /// The TCP congestion control of all namespaces (default: `reno`).
    #[must_use]
    pub fn congestion_control(mut self, name: &str) -> Self {
        self.congestion_control = Some(name.to_owned());
        self
    }

    /// Creates the namespaces and connects them.
    #[track_caller]
    pub fn build(self) -> Topology {
        let topology = Topology {
            client: Namespace::new(),
            host: Namespace::new(),
            container: Namespace::new(),
            next: AtomicU8::new(FIRST_CONTAINER),
        };
        let host = &topology.host;
        if let Some(name) = &self.congestion_control {
            for namespace in [&topology.client, host, &topology.container] {
                namespace.sysctl("net.ipv4.tcp_congestion_control", name);
            }
        }
        let forwarding = if self.forwarding { "1" } else { "0" };
        host.sysctl("net.ipv4.ip_forward", forwarding);
        host.sysctl("net.ipv6.conf.all.forwarding", forwarding);
        for family in ["iptables", "ip6tables", "arptables"] {
            let key = format!("net.bridge.bridge-nf-call-{family}");
            if host.has_sysctl(&key) {
                host.sysctl(&key, "0");
            }
        }
        disable_dad(host);
        topology.join_client();
        topology.add_bridge();
        topology.attach(&topology.container);
        topology
    }
}

/// Waits until `link` is up and, if it is a bridge port, forwarding.
///
/// The kernel brings links up asynchronously, sometimes a second after both ends of a veth pair
/// were set up. Earlier packets are lost, and the first retransmission of TCP or ARP follows a
/// second later.
#[track_caller]
pub(crate) fn wait_until_up(namespace: &Namespace, link: &str) {
    let state = || namespace.ip(&["-details", "-oneline", "link", "show", "dev", link]);
    let is_port = state().contains(" master ");
    let up = eventually(LINK_UP, || {
        let state = state();
        state.contains(" state UP ") && (!is_port || state.contains(" state forwarding "))
    });
    assert!(up, "link is not up after {LINK_UP:?}: {}", state());
}

/// Disables duplicate address detection and router advertisements for links added later, so that
/// their IPv6 addresses, including link-local ones, are usable immediately.
pub(crate) fn disable_dad(namespace: &Namespace) {
    namespace.sysctl("net.ipv6.conf.default.disable_ipv6", "0");
    namespace.sysctl("net.ipv6.conf.default.accept_dad", "0");
    namespace.sysctl("net.ipv6.conf.default.accept_ra", "0");
}
