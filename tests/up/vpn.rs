//! VPNs, QoS scripts and second uplinks of the host: what was closed stays closed, what worked
//! keeps working, and no mark or rule of theirs is lost, whichever came first.

use super::firewall::MODES;
use super::matrix::peer_as_seen;
use super::scene::{Scene, service_namespace, state, with_commands};
use std::net::SocketAddr;
use std::time::Duration;
use tidegate_testbed::server::PeerServer;
use tidegate_testbed::{Namespace, Process, Segment, Signal, eventually};

const SOON: Duration = Duration::from_secs(10);
/// How long an answer is waited for that is not to come, and one that is.
const PATIENCE: [Duration; 2] = [Duration::from_millis(300), Duration::from_secs(5)];

/// Without a firewall.
const NONE: &[&str] = &["--firewall=none"];

const FILE: &str = r#"
name: vpn
networks:
  home: { ipam: { config: [ { subnet: 10.78.1.0/24 } ] } }
  away: { ipam: { config: [ { subnet: 10.78.2.0/24 } ] } }
services:
  server:
    x-netns: SERVER
    networks: { home: { ipv4_address: 10.78.1.10 } }
    ports: [ "8080:80" ]
  stranger:
    x-netns: STRANGER
    networks: { away: { ipv4_address: 10.78.2.10 } }
"#;

/// What software of others does to the host, and how it takes that back.
struct Vpn {
    up: &'static str,
    down: &'static str,
}

/// As mesh VPNs do: packets that come in by its link are marked (bits 16 to 23) and accepted.
const MESH: Vpn = Vpn {
    up: "iptables -N vpn-fwd
         iptables -A vpn-fwd -i vpn0 -j MARK --set-xmark 0x40000/0xff0000
         iptables -A vpn-fwd -m mark --mark 0x40000/0xff0000 -j ACCEPT
         iptables -A vpn-fwd -o vpn0 -j ACCEPT
         iptables -I FORWARD -j vpn-fwd",
    down: "iptables -D FORWARD -j vpn-fwd
           iptables -F vpn-fwd
           iptables -X vpn-fwd",
};

/// A class for what leaves by the uplink, kept with the connection. The counters tell whether the
/// mark is as it was set, and whether anybody else's bits are seen.
const QOS: Vpn = Vpn {
    up: "iptables -t mangle -A PREROUTING -j CONNMARK --restore-mark
         iptables -t mangle -A FORWARD -i eth0 -m mark --mark 0x5 -m comment --comment restored
         iptables -t mangle -A FORWARD -m mark ! --mark 0x0/0xfffffff8 -m comment --comment foreign
         iptables -t mangle -A POSTROUTING -o eth0 -j MARK --set-mark 0x5
         iptables -t mangle -A POSTROUTING -j CONNMARK --save-mark
         iptables -t mangle -A FORWARD -m connmark ! --mark 0x0/0xfffffff8 -m comment --comment foreign",
    down: "iptables -t mangle -D PREROUTING -j CONNMARK --restore-mark
           iptables -t mangle -D FORWARD -i eth0 -m mark --mark 0x5 -m comment --comment restored
           iptables -t mangle -D FORWARD -m mark ! --mark 0x0/0xfffffff8 -m comment --comment foreign
           iptables -t mangle -D FORWARD -m connmark ! --mark 0x0/0xfffffff8 -m comment --comment foreign
           iptables -t mangle -D POSTROUTING -o eth0 -j MARK --set-mark 0x5
           iptables -t mangle -D POSTROUTING -j CONNMARK --save-mark",
};

/// `wg-quick up`, but for the tunnel itself: rules without a priority, before all others.
const WG_QUICK: Vpn = Vpn {
    up: "ip route add default dev vpn0 table 51820
         ip rule add not fwmark 51820 table 51820
         ip rule add table main suppress_prefixlength 0",
    down: "ip rule del table main suppress_prefixlength 0
           ip rule del not fwmark 51820 table 51820
           ip route del default dev vpn0 table 51820",
};

/// OpenVPN's `redirect-gateway def1`.
const HALVES: Vpn = Vpn {
    up: "ip route add 0.0.0.0/1 via 100.64.7.2
         ip route add 128.0.0.0/1 via 100.64.7.2",
    down: "ip route del 0.0.0.0/1
           ip route del 128.0.0.0/1",
};

/// A host with a link to a VPN, and two containers.
struct Host {
    scene: Scene,
    peer: Namespace,
    server: Namespace,
    stranger: Namespace,
    file: String,
    _link: Segment,
}

impl Host {
    fn new(scene: Scene) -> Self {
        let (peer, server, stranger, link) =
            (Namespace::new(), Namespace::new(), Namespace::new(), Segment::new());
        link.attach(&scene.net.host, "vpn0", &["100.64.7.1/24"]);
        link.attach(&peer, "eth0", &["100.64.7.2/24", "192.0.2.50/32"]);
        peer.ip_all("route add default via 100.64.7.1");
        scene.net.host.ip_all("route add default via 203.0.113.9");
        for key in ["all", "default", "eth0", "vpn0"] {
            scene.net.host.sysctl(&format!("net.ipv4.conf.{key}.rp_filter"), "0");
        }
        // iptables leaves the chains that it has made for somebody once: they are there from the
        // start.
        scene.sh("for program in iptables ip6tables; do
               for table in filter mangle; do
                 for chain in INPUT FORWARD; do $program -t $table -A $chain -i none -j ACCEPT; done
                 $program -t $table -A OUTPUT -o none -j ACCEPT
               done
               $program -t mangle -A PREROUTING -i none -j ACCEPT
               $program -t mangle -A POSTROUTING -o none -j ACCEPT
             done");
        let path = |namespace: &Namespace| namespace.path().display().to_string();
        let file = FILE.replace("SERVER", &path(&server)).replace("STRANGER", &path(&stranger));
        Self { scene, peer, server, stranger, file, _link: link }
    }

    #[track_caller]
    fn up(&self, flags: &[&str]) -> Process {
        let up = self.scene.up_with(&self.file, flags);
        up.wait_for_line("Ctrl-C takes", SOON);
        up
    }

    /// Both firewalls and both ways to publish, each with `vpn` before and after.
    #[track_caller]
    fn keeps_its_promises_beside(&self, vpn: &Vpn, modes: &[&[&str]], check: impl Fn(&Self, &str)) {
        for flags in modes {
            let before = state(&self.scene.net.host);
            self.scene.sh(vpn.up);
            let theirs = state(&self.scene.net.host);
            let mut up = self.up(flags);
            self.check(&format!("VPN first, {flags:?}"));
            check(self, &format!("VPN first, {flags:?}"));
            up.stop(Signal::INT, SOON);
            assert_eq!(state(&self.scene.net.host), theirs, "VPN first, {flags:?}");
            self.scene.sh(vpn.down);
            assert_eq!(state(&self.scene.net.host), before, "VPN first, {flags:?}");
            self.later(vpn, flags, &theirs, &check);
        }
    }

    /// `vpn` comes while a project is up, and outlasts it as `theirs`.
    #[track_caller]
    fn later(&self, vpn: &Vpn, flags: &[&str], theirs: &str, check: &impl Fn(&Self, &str)) {
        let before = state(&self.scene.net.host);
        let mut up = self.up(flags);
        self.scene.sh(vpn.up);
        if flags.contains(&"--firewall=iptables") {
            // Until the jump is behind what was appended, a rule there sees the mark.
            assert!(eventually(SOON, || self.marks_last()), "VPN later, {flags:?}");
        }
        self.check(&format!("VPN later, {flags:?}"));
        check(self, &format!("VPN later, {flags:?}"));
        up.stop(Signal::INT, SOON);
        if !theirs.is_empty() {
            assert_eq!(
                without_priorities(&state(&self.scene.net.host)),
                without_priorities(theirs)
            );
        }
        self.scene.sh(vpn.down);
        assert_eq!(state(&self.scene.net.host), before, "VPN later, {flags:?}");
    }

    /// Whether the jump to the mark is the last rule of its hook: mangle POSTROUTING, or PREROUTING
    /// where policy rules are the guards.
    fn marks_last(&self) -> bool {
        ["POSTROUTING", "PREROUTING"].iter().any(|hook| {
            let listed = self.scene.net.host.exec("iptables", &["-t", "mangle", "-S", hook]);
            listed.trim_end().ends_with("-MARK")
        })
    }

    #[track_caller]
    fn check(&self, when: &str) {
        let client = &self.scene.net.client;
        let _servers = [&self.server, &self.peer, client]
            .map(|namespace| PeerServer::tcp(namespace, "0.0.0.0:80".parse().unwrap()));
        // A rule that was appended behind ours has to be noticed first.
        let works = |from: &Namespace, at: &str| {
            assert!(eventually(SOON, || answers(from, at, true)), "{when}: {at} does not answer");
        };
        works(&self.server, "203.0.113.9:80");
        works(&self.server, "100.64.7.2:80");
        works(client, "203.0.113.1:8080");
        works(&self.peer, "100.64.7.1:8080");
        let closed = |from: &Namespace, at: &str| {
            assert!(!answers(from, at, false), "{when}: {at} answers");
        };
        closed(client, "10.78.1.10:80");
        closed(&self.peer, "10.78.1.10:80");
        closed(&self.stranger, "10.78.1.10:80");
    }
}

fn answers(from: &Namespace, at: &str, expected: bool) -> bool {
    let at: SocketAddr = at.parse().unwrap();
    from.run(|| peer_as_seen(at, false, PATIENCE[usize::from(expected)])).is_ok()
}

/// Rules that the kernel numbers itself have other numbers where ours were among them.
fn without_priorities(state: &str) -> String {
    let rule = |line: &str| match line.split_once(":\t") {
        Some((number, rule)) if number.parse::<u32>().is_ok() => format!("{rule}\n"),
        _ => format!("{line}\n"),
    };
    state.lines().map(rule).collect()
}

#[test]
fn a_mesh_vpn_that_marks_what_it_forwards_changes_nothing() {
    let host = Host::new(Scene::new());
    host.keeps_its_promises_beside(&MESH, &MODES, |_, _| {});
    host.keeps_its_promises_beside(&MESH, &[NONE], |_, _| {});
}

/// Where policy rules stand behind the rules, the mark is set before the route is looked up.
#[test]
fn a_mesh_vpn_changes_nothing_where_policy_rules_are_the_guards() {
    Host::new(Scene::lacking("gates")).keeps_its_promises_beside(&MESH, &MODES, |_, _| {});
}

#[test]
fn a_qos_script_finds_its_marks_as_it_set_them_and_nobody_elses() {
    Host::new(Scene::new()).keeps_its_promises_beside(&QOS, &MODES, |host, when| {
        // Of connections that are forwarded. Sockets of ours have a mark of their own.
        let listed = host.scene.net.host.exec("iptables", &["-t", "mangle", "-nvxL"]);
        let packets = |comment: &str| -> Vec<u64> {
            let rules = listed.lines().filter(|line| line.contains(&format!("/* {comment} */")));
            rules.map(|line| line.split_whitespace().next().unwrap().parse().unwrap()).collect()
        };
        assert!(packets("restored").iter().all(|count| *count > 0), "{when}: {listed}");
        assert_eq!(packets("foreign"), [0, 0], "{when}: {listed}");
    });
    Host::new(Scene::new()).keeps_its_promises_beside(&QOS, &[NONE], |_, _| {});
}

#[test]
fn wg_quick_changes_nothing() {
    let modes: Vec<_> = MODES.into_iter().chain([NONE]).collect();
    Host::new(Scene::new()).keeps_its_promises_beside(&WG_QUICK, &modes, |host, when| {
        // By the tunnel, with the host's address there.
        let at: SocketAddr = "192.0.2.50:80".parse().unwrap();
        let _server = PeerServer::tcp(&host.peer, at);
        let seen = host.server.run(|| peer_as_seen(at, false, PATIENCE[1])).unwrap();
        assert!(seen.starts_with("100.64.7.1"), "{when}: {seen}");
    });
}

#[test]
fn an_openvpn_changes_nothing() {
    let modes: Vec<_> = MODES.into_iter().chain([NONE]).collect();
    Host::new(Scene::new()).keeps_its_promises_beside(&HALVES, &modes, |_, _| {});
}

/// The host's rules and routes are followed by the sockets of the engine, and its marks concern no
/// packet of containers.
#[test]
fn vpns_change_nothing_for_the_networks_of_an_ordinary_user() {
    let mut host = Host::new(Scene::new().with_open_tun());
    host.file = with_commands(FILE, &["server", "stranger"]);
    for (name, vpn) in [("mesh", MESH), ("QoS", QOS), ("wg-quick", WG_QUICK), ("OpenVPN", HALVES)] {
        for first in [true, false] {
            let when = format!("{name}, {}", if first { "first" } else { "later" });
            let before = state(&host.scene.net.host);
            if first {
                host.scene.sh(vpn.up);
            }
            let mut up = host.scene.up_as_nobody(&host.file);
            up.wait_for_line("Ctrl-C takes", SOON);
            host.server = service_namespace(&up, "server");
            host.stranger = service_namespace(&up, "stranger");
            if !first {
                host.scene.sh(vpn.up);
            }
            host.check(&when);
            up.stop(Signal::INT, SOON);
            host.scene.sh(vpn.down);
            assert_eq!(state(&host.scene.net.host), before, "{when}");
        }
    }
}

/// Rules at priorities before which four more do not fit. What is closed stays closed, and it is
/// said.
#[test]
fn a_rule_that_cannot_be_preceded_opens_nothing_and_is_named() {
    for priority in [0, 4, 5] {
        for first in [true, false] {
            let when = format!("priority {priority}, {}", if first { "first" } else { "later" });
            let host = Host::new(Scene::new());
            let add = format!(
                "ip route add default via 100.64.7.2 table 52; ip rule add pref {priority} lookup 52"
            );
            if first {
                host.scene.sh(&add);
            }
            let up = host.up(NONE);
            if !first {
                host.scene.sh(&add);
            }
            let told = || up.output().contains("precedes those of tidegate");
            assert!(eventually(SOON, || told() == (priority < 5)), "{when}: {}", up.output());
            if priority == 5 {
                // Ours are ahead of it, and the engine follows it with the host's address.
                let at: SocketAddr = "192.0.2.50:80".parse().unwrap();
                let _server = PeerServer::tcp(&host.peer, at);
                let seen = || host.server.run(|| peer_as_seen(at, false, PATIENCE[1]));
                assert!(
                    eventually(SOON, || seen().is_ok_and(|seen| seen.starts_with("100.64.7.1"))),
                    "{when}"
                );
                assert!(!told(), "{when}");
            } else {
                assert!(
                    up.output().contains("a priority of 5 or higher"),
                    "{when}: {}",
                    up.output()
                );
            }
            let _servers = PeerServer::tcp(&host.server, "0.0.0.0:80".parse().unwrap());
            for from in [&host.scene.net.client, &host.peer, &host.stranger] {
                assert!(!answers(from, "10.78.1.10:80", false), "{when}");
            }
        }
    }
}

/// As a script has it that is run when a link comes up.
#[test]
fn a_rule_that_is_appended_behind_the_mark_is_asked_before_it() {
    let host = Host::new(Scene::new());
    for flags in [MODES[2], MODES[3]] {
        let mut up = host.up(flags);
        host.scene.sh("iptables -t mangle -A POSTROUTING -j MARK --set-mark 0x7");
        assert!(eventually(SOON, || host.marks_last()), "{flags:?}");
        host.check(&format!("{flags:?}"));
        up.stop(Signal::INT, SOON);
        host.scene.sh("iptables -t mangle -D POSTROUTING -j MARK --set-mark 0x7");
    }
}

/// Two uplinks, and a client far behind the second one.
struct TwoUplinks {
    host: Host,
    far: Namespace,
    _link: Segment,
}

impl TwoUplinks {
    fn new() -> Self {
        let host = Host::new(Scene::new());
        let (far, link) = (Namespace::new(), Segment::new());
        link.attach(&host.scene.net.host, "eth1", &["198.51.100.1/24", "2001:db8:2::1/64"]);
        link.attach(&far, "eth0", &["198.51.100.9/24", "2001:db8:2::9/64", "192.0.2.77/32"]);
        for key in ["eth1", "all"] {
            host.scene.net.host.sysctl(&format!("net.ipv4.conf.{key}.rp_filter"), "0");
        }
        Self { host, far, _link: link }
    }

    fn asks(&self) -> bool {
        self.far.run(|| {
            let socket =
                socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
            socket.bind(&"192.0.2.77:0".parse::<SocketAddr>().unwrap().into()).unwrap();
            let at: SocketAddr = "198.51.100.1:8080".parse().unwrap();
            socket.connect_timeout(&at.into(), PATIENCE[1]).is_ok()
        })
    }
}

#[test]
fn an_answer_leaves_by_the_uplink_that_was_asked() {
    for routes in [
        // As cloud images have it: a table of its own for the second address.
        "ip rule add from 198.51.100.1 table 200
         ip route add 198.51.100.0/24 dev eth1 table 200
         ip route add default via 198.51.100.9 table 200",
        // As DHCP on two links has it.
        "ip route add default via 198.51.100.9 metric 300",
    ] {
        for flags in [MODES[1], MODES[3]] {
            let two = TwoUplinks::new();
            two.host.scene.sh(routes);
            let before = state(&two.host.scene.net.host);
            let mut up = two.host.up(flags);
            {
                let _server = PeerServer::tcp(&two.host.server, "0.0.0.0:80".parse().unwrap());
                assert!(two.asks(), "{flags:?} {routes}");
            }
            two.host.check(&format!("{flags:?} {routes}"));
            up.stop(Signal::INT, SOON);
            assert_eq!(state(&two.host.scene.net.host), before, "{flags:?} {routes}");
        }
    }
}

/// The script of a second uplink is run when that comes up.
#[test]
fn an_uplink_that_comes_later_is_answered_by_too() {
    let two = TwoUplinks::new();
    for flags in [MODES[1], MODES[3]] {
        let before = state(&two.host.scene.net.host);
        let mut up = two.host.up(flags);
        let _server = PeerServer::tcp(&two.host.server, "0.0.0.0:80".parse().unwrap());
        two.host.scene.sh("ip route add default via 198.51.100.9 metric 300");
        assert!(eventually(SOON, || two.asks()), "{flags:?}");
        two.host.scene.sh("ip route del default via 198.51.100.9 metric 300");
        let listed = || two.host.scene.net.host.exec("ip", &["rule"]);
        assert!(eventually(SOON, || !listed().contains("fwmark")), "{flags:?}: {}", listed());
        up.stop(Signal::INT, SOON);
        assert_eq!(state(&two.host.scene.net.host), before, "{flags:?}");
    }
}
