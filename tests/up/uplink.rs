//! A second uplink of the host: another outside, and somebody on it who means harm.

use super::scene::Scene;
use tidegate_testbed::{Namespace, Segment};

/// The host's addresses there.
pub(crate) const HOST: [&str; 2] = ["198.51.100.1", "2001:db8:2::1"];

/// Who is there.
pub(crate) struct Uplink {
    /// An honest client.
    pub(crate) client: Namespace,
    /// Sends everything by way of the host: to its containers, to its gateways, to its loopback
    /// addresses.
    pub(crate) hostile: Namespace,
    _link: Segment,
}

impl Uplink {
    /// Gives the scene's host `eth1`.
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
        // Loopback addresses are nothing special to it: it has none of its own, and sends there as
        // anywhere.
        uplink.hostile.sysctl("net.ipv4.conf.all.route_localnet", "1");
        uplink.hostile.ip_all(&format!(
            "addr del 127.0.0.1/8 dev lo
             -6 addr del ::1/128 dev lo
             route add 127.0.0.0/8 via {host4}
             -6 route add ::1/128 via {host6}"
        ));
        // The least that a kernel checks by itself: sources are believed, wherever they come in.
        for key in ["all", "default", "eth0", "eth1"] {
            scene.net.host.sysctl(&format!("net.ipv4.conf.{key}.rp_filter"), "0");
        }
        uplink
    }
}
