//! A second uplink of the host, with a client and a hostile host.

use super::scene::Scene;
use tidegate_testbed::{Namespace, Segment};

/// The host's addresses on the uplink.
pub(crate) const HOST: [&str; 2] = ["198.51.100.1", "2001:db8:2::1"];

/// The hosts on the uplink.
pub(crate) struct Uplink {
    /// A regular client.
    pub(crate) client: Namespace,
    /// Routes everything through the host, including container, gateway and loopback addresses.
    pub(crate) hostile: Namespace,
    _link: Segment,
}

impl Uplink {
    /// Adds the uplink as `eth1` of the scene's host.
    #[track_caller]
    pub(crate) fn new(scene: &Scene) -> Self {
        let uplink =
            Self { client: Namespace::new(), hostile: Namespace::new(), _link: Segment::new() };
        let [host4, host6] = HOST;
        let link = &uplink._link;
        link.attach(&scene.net.host, "eth1", &[&format!("{host4}/24"), &format!("{host6}/64")]);
        link.attach(&uplink.client, "eth0", &["198.51.100.9/24", "2001:db8:2::9/64"]);
        link.attach(&uplink.hostile, "eth0", &["198.51.100.66/24", "2001:db8:2::66/64"]);
        for namespace in [&uplink.client, &uplink.hostile] {
            namespace.ip_all(&format!(
                "route add default via {host4}
                 -6 route add default via {host6}"
            ));
        }
        // It has no loopback addresses and routes them like any other address.
        uplink.hostile.sysctl("net.ipv4.conf.all.route_localnet", "1");
        uplink.hostile.ip_all(&format!(
            "addr del 127.0.0.1/8 dev lo
             -6 addr del ::1/128 dev lo
             route add 127.0.0.0/8 via {host4}
             -6 route add ::1/128 via {host6}"
        ));
        // Without the reverse path filter, the host accepts any source address on any interface.
        for key in ["all", "default", "eth0", "eth1"] {
            scene.net.host.sysctl(&format!("net.ipv4.conf.{key}.rp_filter"), "0");
        }
        uplink
    }
}
