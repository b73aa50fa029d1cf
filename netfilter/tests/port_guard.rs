//! Port guards of each mechanism at the ports of a real bridge: forged frames, as root in a
//! container can send them, and the frames of an unmodified kernel.

use std::io::ErrorKind;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::num::NonZeroU32;
use std::thread;
use std::time::Duration;
use tidegate_model::MacAddress;
use tidegate_netfilter::{Mechanism, PortGuards, PortPolicy, SpoofReason};
use tidegate_testbed::frames::{
    BROADCAST, Forger, KINDS, LinkSocket, MARKER, Mac, advertisement, arp, checksum, ethernet,
    ipv4, ipv6, syn4, too_big4, udp4, udp6,
};
use tidegate_testbed::{Namespace, eventually};

const SOON: Duration = Duration::from_secs(10);
/// Frames of each kind.
const COUNT: usize = 10_000;

const MEMBER: Mac = [2, 0, 0, 0, 0, 7];
const BRIDGE: Mac = [2, 0, 0, 0, 0, 1];
const NEIGHBOR: Mac = [2, 0, 0, 0, 0, 8];
const OWN: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 7);
const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 1);
const NEIGHBOR_V4: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 8);

fn v6(text: &str) -> Ipv6Addr {
    text.parse().unwrap()
}

/// A bridge with a guarded, hostile member and a neighbour.
struct Bridge {
    host: Namespace,
    member: Namespace,
    neighbor: Namespace,
    guards: PortGuards,
    index: u32,
}

impl Bridge {
    fn new(mechanism: Mechanism, any_address: bool) -> Self {
        let (host, member, neighbor) = (Namespace::new(), Namespace::new(), Namespace::new());
        host.ip_all("link add br0 address 02:00:00:00:00:01 type bridge mcast_snooping 0");
        for (link, namespace, mac) in [("veth-m", &member, MEMBER), ("veth-n", &neighbor, NEIGHBOR)]
        {
            let path = namespace.path();
            let mac = mac.map(|byte| format!("{byte:02x}")).join(":");
            host.ip_all(&format!(
                "link add {link} type veth peer name eth0 address {mac} netns {}",
                path.display()
            ));
        }
        for link in ["br0", "veth-m", "veth-n"] {
            host.sysctl(&format!("net.ipv6.conf.{link}.disable_ipv6"), "1");
        }
        let policy = PortPolicy {
            mac: MacAddress(MEMBER),
            bridge: MacAddress(BRIDGE),
            v4: vec![OWN],
            v6: vec![v6("fd09::7")],
            any_address,
        };
        let listed = host.ip(&["-o", "link", "show", "veth-m"]);
        let index = listed.split(':').next().unwrap().parse().unwrap();
        let guards = Namespace::new().run(|| PortGuards::probe(&[mechanism], "test")).unwrap();
        assert_eq!(guards.mechanism(), mechanism);
        host.run(|| {
            assert!(!guards.is_attached(index, "veth-m", &policy).unwrap());
            guards.attach(index, "veth-m", &policy).unwrap();
            assert!(guards.is_attached(index, "veth-m", &policy).unwrap());
        });
        host.ip_all(
            "link set veth-m master br0\nlink set veth-n master br0\nlink set veth-m up\nlink set veth-n up\nlink set br0 up",
        );
        Self { host, member, neighbor, guards, index }
    }

    /// The kernels of the members send nothing on their own.
    fn silent(mechanism: Mechanism, any_address: bool) -> Self {
        let bridge = Self::new(mechanism, any_address);
        for namespace in [&bridge.member, &bridge.neighbor] {
            namespace.sysctl("net.ipv6.conf.eth0.disable_ipv6", "1");
            namespace.ip_all("link set eth0 arp off\nlink set eth0 up");
        }
        assert!(eventually(SOON, || bridge
            .host
            .ip(&["-o", "link", "show", "veth-n"])
            .contains("state UP")));
        bridge
    }

    fn dropped(&self) -> Vec<(SpoofReason, u64)> {
        let dropped = self.host.run(|| self.guards.dropped());
        let counts = SpoofReason::ALL.into_iter().zip(dropped["veth-m"].spoofed);
        counts.filter(|(_, count)| *count > 0).collect()
    }

    /// Sends `frames` from the member. Returns how many frames the neighbour and the host have
    /// received.
    fn send(&self, frames: impl Iterator<Item = Vec<u8>>) -> [usize; 2] {
        let sender = LinkSocket::open(&self.member, "eth0");
        let receivers =
            [LinkSocket::open(&self.neighbor, "eth0"), LinkSocket::open(&self.host, "br0")];
        let mut received = [0; 2];
        let mut take = || {
            for (count, receiver) in received.iter_mut().zip(&receivers) {
                *count += receiver.received().len();
            }
        };
        for (number, frame) in frames.enumerate() {
            sender.send(&frame);
            if number % 256 == 0 {
                take();
            }
        }
        // A veth pair delivers in a softirq, possibly on another core.
        thread::sleep(Duration::from_millis(100));
        take();
        received
    }
}

fn forger(seed: u64) -> Forger {
    Forger {
        mac: MEMBER,
        own: (OWN, v6("fd09::7")),
        link_local: v6("fe80::ff:fe00:7"),
        gateway: (GATEWAY, v6("fd09::1")),
        neighbor: (NEIGHBOR_V4, v6("fd09::8")),
        seed,
    }
}

#[test]
fn forged_frames_reach_neither_neighbor_nor_host() {
    for mechanism in Mechanism::ALL {
        let bridge = Bridge::silent(mechanism, false);
        let mut forger = forger(1);
        let mut sent = 0;
        for kind in KINDS {
            let frames = (0..COUNT).map(|_| forger.frame(kind));
            assert_eq!(bridge.send(frames), [0, 0], "{mechanism}: {kind}");
            sent += COUNT as u64;
            if mechanism != Mechanism::Classic {
                let counted: u64 = bridge.dropped().iter().map(|(_, count)| count).sum();
                assert_eq!(counted, sent, "{mechanism}: {kind}");
            }
        }
    }
}

#[test]
fn valid_frames_of_the_endpoint_pass() {
    for mechanism in Mechanism::ALL {
        let bridge = Bridge::silent(mechanism, false);
        let own6 = v6("fd09::7");
        let frames = [
            ethernet(BROADCAST, MEMBER, 0x0800, &udp4((OWN, 1), (GATEWAY, 2), b"own")),
            ethernet(NEIGHBOR, MEMBER, 0x0800, &ipv4(OWN, NEIGHBOR_V4, 6, &[0; 20])),
            // An error that quotes a packet to the endpoint.
            ethernet(BROADCAST, MEMBER, 0x0800, &too_big4(OWN, GATEWAY, (OWN, 53), 9, 1280)),
            arp(1, MEMBER, OWN, GATEWAY),
            ethernet(BROADCAST, MEMBER, 0x86dd, &udp6((own6, 1), (v6("ff02::1"), 2), b"own")),
            ethernet(BROADCAST, MEMBER, 0x86dd, &advertisement(own6, v6("ff02::1"), own6, MEMBER)),
        ];
        // The neighbour receives all frames, the host those not unicast to the neighbour.
        assert_eq!(bridge.send(frames.into_iter()), [6, 5], "{mechanism}");
        assert_eq!(bridge.dropped(), [], "{mechanism}");
    }
}

#[test]
fn any_address_still_checks_the_mac_address() {
    for mechanism in Mechanism::ALL {
        let bridge = Bridge::silent(mechanism, true);
        let mut forger = forger(2);
        let foreign = (0..100).map(|_| forger.frame("ipv4"));
        assert_eq!(bridge.send(foreign), [100, 100], "{mechanism}");
        let mut forger = self::forger(2);
        let forged_mac = (0..100).map(|_| forger.frame("mac"));
        assert_eq!(bridge.send(forged_mac), [0, 0], "{mechanism}");
        let mut forger = self::forger(2);
        let loopback = (0..100).map(|_| forger.frame("loopback"));
        assert_eq!(bridge.send(loopback), [0, 0], "{mechanism}: to loopback addresses");
        let mut forger = self::forger(2);
        // Broadcast, so the host receives it.
        let errors = (0..100).map(|_| forger.frame("icmp"));
        assert_eq!(bridge.send(errors), [0, 0], "{mechanism}: errors received by the host");
        let server = Ipv4Addr::new(203, 0, 113, 9);
        let error = too_big4(OWN, NEIGHBOR_V4, (server, 53), 9, 1280);
        let to_neighbor = ethernet(NEIGHBOR, MEMBER, 0x0800, &error);
        assert_eq!(bridge.send([to_neighbor].into_iter()), [1, 0], "{mechanism}: as a router");
    }
}

/// Frames that may open a TCP connection, and frames that cannot: name, whether it is policed,
/// frame.
fn policed_kinds() -> Vec<(&'static str, bool, Vec<u8>)> {
    let own6 = v6("fd09::7");
    let v4 = |packet: Vec<u8>| ethernet(BROADCAST, MEMBER, 0x0800, &packet);
    let tcp = |flags: u8| {
        let mut segment =
            vec![0, 1, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, flags, 0xff, 0xff, 0, 0, 0, 0];
        segment.resize(40, 0);
        segment
    };
    let changed = |at: usize, value: u8| {
        let mut packet = syn4((OWN, 1), (GATEWAY, 2), 3);
        packet[at] = value;
        // A bridge that passes packets to iptables drops those with an invalid header checksum
        // (`br_validate_ipv4`).
        packet[10..12].fill(0);
        let head = 4 * usize::from(packet[0] & 0xf);
        let sum = checksum(&packet[..head]);
        packet[10..12].copy_from_slice(&sum.to_be_bytes());
        v4(packet)
    };
    let inside = |next: u8, payload: &[u8]| {
        ethernet(BROADCAST, MEMBER, 0x86dd, &ipv6(own6, v6("ff02::1"), next, payload))
    };
    vec![
        ("SYN", true, v4(syn4((OWN, 1), (GATEWAY, 2), 3))),
        ("with ECN", true, changed(33, 0xc2)),
        ("with IP options", true, changed(0, 0x46)),
        ("in fragments", true, changed(6, 0x20)),
        ("SYN of IPv6", true, inside(6, &tcp(2))),
        (
            "behind a fragment header",
            true,
            inside(44, &[&[6, 0, 0, 0, 0, 0, 0, 1][..], &tcp(2)].concat()),
        ),
        ("SYN and ACK", false, changed(33, 0x12)),
        ("ACK", false, changed(33, 0x10)),
        ("ACK of IPv6", false, inside(6, &tcp(0x10))),
        ("UDP", false, v4(udp4((OWN, 1), (GATEWAY, 2), b"own"))),
        ("UDP of IPv6", false, inside(17, &[0; 40])),
        ("ARP", false, arp(1, MEMBER, OWN, GATEWAY)),
    ]
}

#[test]
fn policer_limits_new_connections_only() {
    /// So slow that only the burst passes during the test.
    const SLOW: Option<NonZeroU32> = NonZeroU32::new(1);
    const FRAMES: usize = 200;
    const BURST: usize = 32;
    for mechanism in Mechanism::ALL {
        let bridge = Bridge::silent(mechanism, false);
        for (kind, is_policed, frame) in policed_kinds() {
            let flood = || bridge.send((0..FRAMES).map(|_| frame.clone()))[0];
            let police = |rate| bridge.host.run(|| bridge.guards.police("veth-m", rate));
            let dropped = || bridge.host.run(|| bridge.guards.dropped())["veth-m"];
            let before = dropped().policed as usize;
            if mechanism == Mechanism::Classic {
                assert_eq!(police(SLOW).unwrap_err().kind(), ErrorKind::Unsupported);
                continue;
            }
            assert_eq!(flood(), FRAMES, "{mechanism}: {kind}, without a policer");
            police(SLOW).unwrap();
            let passed = flood();
            let expected = if is_policed { BURST..BURST + 3 } else { FRAMES..FRAMES + 1 };
            assert!(expected.contains(&passed), "{mechanism}: {kind}: {passed} passed");
            assert_eq!(dropped().policed as usize, before + FRAMES - passed, "{mechanism}: {kind}");
            police(None).unwrap();
            assert_eq!(flood(), FRAMES, "{mechanism}: {kind}, with the policer disabled again");
            let counted = dropped().policed as usize;
            assert_eq!(counted, before + FRAMES - passed, "{mechanism}: counters are kept");
            assert_eq!(dropped().spoofed.iter().sum::<u64>(), 0, "{mechanism}: {kind}");
            let unknown = bridge.host.run(|| bridge.guards.police("veth-n", SLOW));
            assert_eq!(unknown.unwrap_err().kind(), ErrorKind::NotFound);
        }
    }
}

/// Covers boot with duplicate address detection, MLD, IGMP, ARP and neighbour discovery, and
/// address renewal.
#[test]
fn frames_of_an_unmodified_kernel_are_not_dropped() {
    for mechanism in Mechanism::ALL {
        let bridge = Bridge::new(mechanism, false);
        bridge.host.ip_all("addr add 10.9.0.1/24 dev br0");
        bridge.host.sysctl("net.ipv6.conf.br0.disable_ipv6", "0");
        bridge.host.ip_all("-6 addr add fd09::1/64 dev br0 nodad");
        for (namespace, last) in [(&bridge.member, 7), (&bridge.neighbor, 8)] {
            namespace.sysctl("net.ipv6.conf.eth0.accept_ra", "0");
            namespace.sysctl("net.ipv4.conf.eth0.arp_notify", "1");
            namespace.ip_all(&format!(
                "link set lo up\nlink set eth0 up\naddr add 10.9.0.{last}/24 dev eth0\n-6 addr add fd09::{last}/64 dev eth0"
            ));
        }
        let answers = |namespace: &Namespace, address: &str| {
            let mut ping = namespace.command("ping");
            ping.args(["-c", "1", "-W", "1", address]).output().unwrap().status.success()
        };
        // Packets sent before detection completes have the source ::1, which receivers drop (RFC
        // 4291, 2.5.3).
        let detected = |namespace: &Namespace| {
            eventually(SOON, || namespace.ip(&["-6", "addr", "show", "tentative"]).is_empty())
        };
        let all = || {
            ["10.9.0.1", "10.9.0.8", "fd09::1", "fd09::8"]
                .iter()
                .all(|to| answers(&bridge.member, to))
                && ["10.9.0.7", "fd09::7"].iter().all(|to| answers(&bridge.neighbor, to))
        };
        assert!(detected(&bridge.member) && detected(&bridge.neighbor));
        assert!(eventually(SOON, all), "{mechanism}");
        // IGMP and MLD: join and leave groups.
        bridge.member.run(|| {
            let group = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
            group.join_multicast_v4(&"239.1.2.3".parse().unwrap(), &OWN).unwrap();
            let group = std::net::UdpSocket::bind("[::]:0").unwrap();
            group.join_multicast_v6(&v6("ff15::7"), 0).unwrap();
        });
        bridge.member.ip_all(
            "addr del 10.9.0.7/24 dev eth0\n-6 addr del fd09::7/64 dev eth0\nlink set eth0 down\nlink set eth0 up\naddr add 10.9.0.7/24 dev eth0\n-6 addr add fd09::7/64 dev eth0",
        );
        assert!(detected(&bridge.member));
        assert!(eventually(SOON, all), "{mechanism}: renewed");
        assert!(answers(&bridge.member, "10.9.0.1") && !answers(&bridge.member, "10.9.0.99"));
        assert_eq!(bridge.dropped(), [], "{mechanism}");
    }
}

#[test]
fn guard_is_removed_with_its_link_and_external_removal_is_detected() {
    for mechanism in Mechanism::ALL {
        let bridge = Bridge::silent(mechanism, false);
        let policy = PortPolicy {
            mac: MacAddress(MEMBER),
            bridge: MacAddress(BRIDGE),
            v4: vec![OWN],
            v6: vec![v6("fd09::7")],
            any_address: false,
        };
        let is_attached =
            || bridge.host.run(|| bridge.guards.is_attached(bridge.index, "veth-m", &policy));
        let forged = || bridge.send([forger(3).frame("mac")].into_iter());
        let remove: &[(&str, &[&str])] = match mechanism {
            // Removal needs bpftool, which is not installed everywhere.
            Mechanism::Tcx => &[],
            Mechanism::Clsact | Mechanism::Classic => {
                &[("tc", &["qdisc", "del", "dev", "veth-m", "clsact"])]
            }
            Mechanism::Nftables => &[("nft", &["flush", "ruleset"])],
        };
        for (program, args) in remove {
            bridge.host.exec(program, args);
            assert!(!is_attached().unwrap(), "{mechanism}");
            assert_eq!(forged(), [1, 1], "{mechanism}");
            bridge.host.run(|| bridge.guards.attach(bridge.index, "veth-m", &policy)).unwrap();
        }
        assert!(is_attached().unwrap(), "{mechanism}");
        assert_eq!(forged(), [0, 0], "{mechanism}");
        // A different policy replaces this one.
        let sent = ethernet(BROADCAST, MEMBER, 0x0800, &udp4((OWN, 1), (GATEWAY, 2), MARKER));
        let own = || bridge.send([sent.clone()].into_iter());
        let moved = PortPolicy { v4: vec![[10, 9, 0, 9].into()], ..policy.clone() };
        for (policy, expected) in [(&moved, [0, 0]), (&policy, [1, 1])] {
            bridge.host.run(|| bridge.guards.attach(bridge.index, "veth-m", policy)).unwrap();
            assert_eq!(own(), expected, "{mechanism}: {policy:?}");
        }
        bridge.host.ip(&["link", "del", "veth-m"]);
        if mechanism == Mechanism::Nftables {
            bridge.host.run(|| PortGuards::remove_table("test")).unwrap();
            assert_eq!(bridge.host.exec("nft", &["list", "tables"]), "");
        } else {
            assert!(!is_attached().unwrap_or(false), "{mechanism}");
        }
    }
}
