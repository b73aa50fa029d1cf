//! Who reaches what: one table, for every way to keep networks closed.

use super::scene::{Scene, rootless_namespace, state};
use super::uplink::{self, Uplink};
use super::witness::Witness;
use socket2::{Domain, Socket, Type};
use std::fs;
use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::time::Duration;
use tidegate_testbed::frames::{LinkSocket, MARKER, Mac, checksum, ethernet, icmp6, ipv4};
use tidegate_testbed::server::PeerServer;
use tidegate_testbed::{Namespace, Process, Signal, addr, eventually};

const SOON: Duration = Duration::from_secs(10);
/// How long an answer is waited for that is to come, and one that is not.
const PATIENCE: [Duration; 2] = [Duration::from_secs(5), Duration::from_millis(250)];

/// Where a client is, or whom it pretends to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum From {
    /// Beyond the host, on its first uplink.
    Outside,
    /// Beyond the host, on its second uplink.
    Beyond,
    /// A host on the second uplink that sends everything, loopback addresses too, by way of the
    /// host.
    Hostile,
    /// The same, with the source address of an endpoint of the server's network.
    AsNeighbour,
    /// The same, with a loopback address for its source.
    AsLoopback,
    /// The host itself.
    Host,
    /// Another endpoint of the same network.
    Neighbour,
    /// An endpoint of another network.
    Stranger,
    /// An endpoint of an internal network.
    Inmate,
    /// The server's own endpoint.
    Itself,
    /// Root in an endpoint, with a source address that is not its own.
    Forging(Forger, Source),
}

/// Where root forges source addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Forger {
    /// In the stranger.
    Stranger,
    /// In the inmate.
    Inmate,
}

/// A forged source address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    /// Another address of its own network.
    Member,
    /// The gateway of its own network.
    Gateway,
    /// A client on the outside.
    Outside,
    /// Loopback.
    Loopback,
    /// The server's neighbour, on another network.
    OtherNetwork,
}

const FORGERS: [Forger; 2] = [Forger::Stranger, Forger::Inmate];
const SOURCES: [Source; 5] =
    [Source::Member, Source::Gateway, Source::Outside, Source::Loopback, Source::OtherNetwork];

/// What it asks.
#[derive(Clone, Copy, Debug)]
enum To {
    /// The container's address and port.
    Container,
    /// The published port at the host's address on the first uplink.
    Published,
    /// The published port at the host's address on the second uplink.
    PublishedBeyond,
    /// The published port at the gateway address of the server's network.
    Gateway,
    /// The published port at the gateway address of the stranger's network.
    AwayGateway,
    /// The published port at the gateway address of the internal network.
    InsideGateway,
    /// The published port on the host's loopback address; a client elsewhere asks its own.
    Loopback,
    /// Another port, published on the host's loopback address alone, there.
    LoopbackOnly,
    /// The same at the host's address on the outside.
    LoopbackOnlyOutside,
    /// The same at the gateway address of the server's network.
    LoopbackOnlyGateway,
}

/// What comes of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    /// Nothing gets to the server, and nothing comes back.
    Nothing,
    /// The server answers.
    Answer,
    /// A datagram gets to the server; its answer goes elsewhere. Of TCP nothing does.
    OneWay,
}

const NO: Outcome = Outcome::Nothing;
const YES: Outcome = Outcome::Answer;
const IN: Outcome = Outcome::OneWay;

const FROM: [From; 10] = [
    From::Outside,
    From::Beyond,
    From::Hostile,
    From::AsNeighbour,
    From::AsLoopback,
    From::Host,
    From::Neighbour,
    From::Stranger,
    From::Inmate,
    From::Itself,
];

/// How the project is up.
#[derive(Clone, Copy, Debug)]
struct Mode {
    /// By an ordinary user: the networks are apart from the host.
    rootless: bool,
    /// On a host that forwards for others.
    forwarding: bool,
    /// With the variant of iptables that is not made of nf_tables.
    legacy: bool,
    /// What the kernel is taken not to have.
    lacks: &'static str,
    /// Flags of `tidegate up`.
    flags: &'static [&'static str],
}

const ROOT: Mode = Mode {
    rootless: false,
    forwarding: false,
    legacy: false,
    lacks: "",
    flags: &["--firewall=none"],
};
const ROOTLESS: Mode = Mode { rootless: true, flags: &[], ..ROOT };
const NFTABLES: Mode = Mode { flags: &["--firewall=nftables"], ..ROOT };
const NFTABLES_KERNEL: Mode = Mode { flags: &["--firewall=nftables", "--publish=kernel"], ..ROOT };
const IPTABLES: Mode = Mode { flags: &["--firewall=iptables"], ..ROOT };
const IPTABLES_KERNEL: Mode = Mode { flags: &["--firewall=iptables", "--publish=kernel"], ..ROOT };

const ROOT_WITHOUT_TUN: Mode = Mode { lacks: "tun", ..ROOT };
const ROOTLESS_WITHOUT_TUN: Mode = Mode { lacks: "tun", ..ROOTLESS };
/// With everything forced off that is probed for.
const ROOT_OLD: Mode = Mode { lacks: "all", ..ROOT };
const ROOTLESS_OLD: Mode = Mode { lacks: "all", ..ROOTLESS };
const NFTABLES_SHARED: Mode = Mode { lacks: "owned-tables", ..NFTABLES_KERNEL };
/// Policy rules stand behind the firewall.
const NFTABLES_UNGATED: Mode = Mode { lacks: "gates", ..NFTABLES_KERNEL };
const IPTABLES_UNGATED: Mode = Mode { lacks: "gates,owned-tables", ..IPTABLES_KERNEL };
const LEGACY_KERNEL: Mode = Mode { legacy: true, ..IPTABLES_KERNEL };

/// Who gets what by asking where, in the order of [`FROM`].
type Table = &'static [(To, [Outcome; 10])];

impl Mode {
    fn expected(self) -> Table {
        match (self.rootless, self.has_egress()) {
            (false, _) => &EXPECTED,
            (true, true) => &EXPECTED_ROOTLESS,
            (true, false) => &EXPECTED_WITHOUT_TUN,
        }
    }

    /// On a host that forwards for others.
    const fn forwarding(self) -> Self {
        Self { forwarding: true, ..self }
    }

    /// Whether containers reach the outside.
    fn has_egress(self) -> bool {
        self.lacks != "tun"
    }
}

/// Rows in the order of [`FROM`]. Whoever pretends to be another gets no answer, but may get a
/// datagram into what is published.
#[rustfmt::skip]
const EXPECTED: [(To, [Outcome; 10]); 10] = [
    //                        ---------- beyond the host -----------  ------------- here --------------
    //                        outside beyond hostile as-neigh. as-lo  host neighb. strang. inmate itself
    (To::Container,           [NO,    NO,    NO,     NO,       NO,    YES, YES,    NO,     NO,    YES]),
    (To::Published,           [YES,   YES,   YES,    NO,       NO,    YES, YES,    YES,    NO,    YES]),
    (To::PublishedBeyond,     [YES,   YES,   YES,    NO,       NO,    YES, YES,    YES,    NO,    YES]),
    (To::Gateway,             [NO,    NO,    NO,     NO,       NO,    YES, YES,    NO,     NO,    YES]),
    (To::AwayGateway,         [NO,    NO,    NO,     NO,       NO,    YES, NO,     YES,    NO,    NO]),
    (To::InsideGateway,       [NO,    NO,    NO,     NO,       NO,    YES, NO,     NO,     NO,    NO]),
    (To::Loopback,            [NO,    NO,    NO,     NO,       NO,    YES, NO,     NO,     NO,    NO]),
    (To::LoopbackOnly,        [NO,    NO,    NO,     NO,       NO,    YES, NO,     NO,     NO,    NO]),
    (To::LoopbackOnlyOutside, [NO,    NO,    NO,     NO,       NO,    NO,  NO,     NO,     NO,    NO]),
    (To::LoopbackOnlyGateway, [NO,    NO,    NO,     NO,       NO,    NO,  NO,     NO,     NO,    NO]),
];

/// The same for networks apart from the host, which reach its addresses by the NAT engine.
#[rustfmt::skip]
const EXPECTED_ROOTLESS: [(To, [Outcome; 10]); 10] = [
    //                        outside beyond hostile as-neigh. as-lo  host neighb. strang. inmate itself
    (To::Container,           [NO,    NO,    NO,     NO,       NO,    NO,  YES,    NO,     NO,    YES]),
    (To::Published,           [YES,   YES,   YES,    NO,       NO,    YES, YES,    YES,    NO,    YES]),
    (To::PublishedBeyond,     [YES,   YES,   YES,    NO,       NO,    YES, YES,    YES,    NO,    YES]),
    (To::Gateway,             [NO,    NO,    NO,     NO,       NO,    NO,  YES,    NO,     NO,    YES]),
    (To::AwayGateway,         [NO,    NO,    NO,     NO,       NO,    NO,  NO,     YES,    NO,    NO]),
    (To::InsideGateway,       [NO,    NO,    NO,     NO,       NO,    NO,  NO,     NO,     NO,    NO]),
    (To::Loopback,            [NO,    NO,    NO,     NO,       NO,    YES, NO,     NO,     NO,    NO]),
    (To::LoopbackOnly,        [NO,    NO,    NO,     NO,       NO,    YES, NO,     NO,     NO,    NO]),
    (To::LoopbackOnlyOutside, [NO,    NO,    NO,     NO,       NO,    NO,  NO,     NO,     NO,    NO]),
    (To::LoopbackOnlyGateway, [NO,    NO,    NO,     NO,       NO,    NO,  NO,     NO,     NO,    NO]),
];

/// The same where the engine cannot have a device. Containers do not reach the host's addresses.
#[rustfmt::skip]
const EXPECTED_WITHOUT_TUN: [(To, [Outcome; 10]); 10] = [
    //                        outside beyond hostile as-neigh. as-lo  host neighb. strang. inmate itself
    (To::Container,           [NO,    NO,    NO,     NO,       NO,    NO,  YES,    NO,     NO,    YES]),
    (To::Published,           [YES,   YES,   YES,    NO,       NO,    YES, NO,     NO,     NO,    NO]),
    (To::PublishedBeyond,     [YES,   YES,   YES,    NO,       NO,    YES, NO,     NO,     NO,    NO]),
    (To::Gateway,             [NO,    NO,    NO,     NO,       NO,    NO,  YES,    NO,     NO,    YES]),
    (To::AwayGateway,         [NO,    NO,    NO,     NO,       NO,    NO,  NO,     YES,    NO,    NO]),
    (To::InsideGateway,       [NO,    NO,    NO,     NO,       NO,    NO,  NO,     NO,     NO,    NO]),
    (To::Loopback,            [NO,    NO,    NO,     NO,       NO,    YES, NO,     NO,     NO,    NO]),
    (To::LoopbackOnly,        [NO,    NO,    NO,     NO,       NO,    YES, NO,     NO,     NO,    NO]),
    (To::LoopbackOnlyOutside, [NO,    NO,    NO,     NO,       NO,    NO,  NO,     NO,     NO,    NO]),
    (To::LoopbackOnlyGateway, [NO,    NO,    NO,     NO,       NO,    NO,  NO,     NO,     NO,    NO]),
];

/// What is left of it when root's instance was killed, until the next one clears it: bridges, and
/// what keeps them closed.
#[rustfmt::skip]
const EXPECTED_OF_THE_DEAD: [(To, [Outcome; 10]); 10] = [
    //                        outside beyond hostile as-neigh. as-lo  host neighb. strang. inmate itself
    (To::Container,           [NO,    NO,    NO,     NO,       NO,    YES, YES,    NO,     NO,    YES]),
    (To::Published,           [NO,    NO,    NO,     NO,       NO,    NO,  NO,     NO,     NO,    NO]),
    (To::PublishedBeyond,     [NO,    NO,    NO,     NO,       NO,    NO,  NO,     NO,     NO,    NO]),
    (To::Gateway,             [NO,    NO,    NO,     NO,       NO,    NO,  NO,     NO,     NO,    NO]),
    (To::AwayGateway,         [NO,    NO,    NO,     NO,       NO,    NO,  NO,     NO,     NO,    NO]),
    (To::InsideGateway,       [NO,    NO,    NO,     NO,       NO,    NO,  NO,     NO,     NO,    NO]),
    (To::Loopback,            [NO,    NO,    NO,     NO,       NO,    NO,  NO,     NO,     NO,    NO]),
    (To::LoopbackOnly,        [NO,    NO,    NO,     NO,       NO,    NO,  NO,     NO,     NO,    NO]),
    (To::LoopbackOnlyOutside, [NO,    NO,    NO,     NO,       NO,    NO,  NO,     NO,     NO,    NO]),
    (To::LoopbackOnlyGateway, [NO,    NO,    NO,     NO,       NO,    NO,  NO,     NO,     NO,    NO]),
];

pub(super) const FILE: &str = r#"
name: matrix
networks:
  home: { enable_ipv6: true, ipam: { config: [ { subnet: 10.77.1.0/24 }, { subnet: "fd77:1::/64" } ] } }
  away: { enable_ipv6: true, ipam: { config: [ { subnet: 10.77.2.0/24 }, { subnet: "fd77:2::/64" } ] } }
  inside: { internal: true, enable_ipv6: true, ipam: { config: [ { subnet: 10.77.3.0/24 }, { subnet: "fd77:3::/64" } ] } }
services:
  server:
    x-netns: SERVER
    networks: { home: { ipv4_address: 10.77.1.10, ipv6_address: "fd77:1::10" } }
    ports: [ "8080:80", "8080:80/udp", "127.0.0.1:9090:80", "127.0.0.1:9090:80/udp", "[::1]:9090:80", "[::1]:9090:80/udp" ]
  neighbour: { x-netns: NEIGHBOUR, networks: [ home ] }
  stranger: { x-netns: STRANGER, networks: [ away ] }
  inmate: { x-netns: INMATE, networks: [ inside ] }
"#;

pub(super) const ENDPOINTS: [&str; 4] = ["server", "neighbour", "stranger", "inmate"];

/// The project on a host with two uplinks, and everybody who is in the table.
struct Matrix {
    mode: Mode,
    /// The host as it was.
    before: String,
    scene: Scene,
    uplink: Uplink,
    endpoints: [Namespace; 4],
    witness: Witness,
    _servers: [PeerServer; 2],
    up: Process,
}

impl Matrix {
    #[track_caller]
    fn new(mode: Mode) -> Self {
        let scene = match mode {
            Mode { legacy: true, .. } => Scene::with_legacy_iptables(),
            Mode { rootless: true, lacks, .. } => Scene::lacking(lacks).with_open_tun(),
            Mode { lacks, .. } => Scene::lacking(lacks),
        };
        let uplink = Uplink::new(&scene);
        let on = if mode.forwarding { "1" } else { "0" };
        scene.net.host.sysctl("net.ipv4.ip_forward", on);
        scene.net.host.sysctl("net.ipv6.conf.all.forwarding", on);
        let before = state(&scene.net.host);
        let (up, endpoints) = scene.up_with_services(FILE, ENDPOINTS, mode.rootless, mode.flags);
        // A member of the internal network that gives itself a default route.
        endpoints[3].ip_all(
            "route add default via 10.77.3.1
             -6 route add default via fd77:3::1",
        );
        let at: [SocketAddr; 2] =
            ["10.77.1.10:80", "[fd77:1::10]:80"].map(|at| at.parse().unwrap());
        let servers = at.map(|at| PeerServer::tcp(&endpoints[0], at));
        let witness = Witness::new(&endpoints[0], &at);
        Self { mode, before, scene, uplink, endpoints, witness, _servers: servers, up }
    }

    fn place(&self, from: From) -> &Namespace {
        let [server, neighbour, stranger, inmate] = &self.endpoints;
        match from {
            From::Outside => &self.scene.net.client,
            From::Beyond => &self.uplink.client,
            From::Hostile | From::AsNeighbour | From::AsLoopback => &self.uplink.hostile,
            From::Host => &self.scene.net.host,
            From::Neighbour => neighbour,
            From::Stranger => stranger,
            From::Inmate | From::Forging(Forger::Inmate, _) => inmate,
            From::Forging(Forger::Stranger, _) => stranger,
            From::Itself => server,
        }
    }

    /// Asks, and waits as long as it takes if `expected` is to come.
    fn outcome(&self, probe: &Probe, expected: Outcome) -> Outcome {
        let patience = PATIENCE[usize::from(expected == NO)];
        let answered = self.place(probe.from).run(|| {
            let asked =
                if probe.udp { probe.ask_by_udp(patience) } else { probe.ask_by_tcp(patience) };
            asked.is_ok_and(|length| length > 0)
        });
        let seen = || self.witness.has_seen(&probe.text());
        if answered {
            YES
        } else if probe.udp && (seen() || expected == IN && eventually(PATIENCE[0], seen)) {
            IN
        } else {
            NO
        }
    }

    /// Everybody asks everything at the same time. What came out otherwise than expected.
    fn wrong(&self, table: Table) -> Vec<String> {
        let by_both = [(false, false), (false, true), (true, false), (true, true)];
        let cells =
            table.iter().flat_map(|(to, row)| FROM.iter().zip(row).map(move |cell| (to, cell)));
        std::thread::scope(|scope| {
            let asking: Vec<_> = cells
                .flat_map(|(to, (from, expected))| {
                    by_both.map(|(udp, v6)| {
                        let probe = Probe { from: *from, to: *to, udp, v6 };
                        let expected = if *expected == IN && !udp { NO } else { *expected };
                        scope.spawn(move || (self.outcome(&probe, expected), expected, probe))
                    })
                })
                .collect();
            let outcomes = asking.into_iter().map(|one| one.join().unwrap());
            let wrong = outcomes.filter(|(outcome, expected, _)| outcome != expected);
            wrong
                .map(|(outcome, expected, probe)| {
                    format!("{probe:?}: {outcome:?}, not {expected:?}")
                })
                .collect()
        })
    }
}

impl Matrix {
    /// What reaches the server, or is answered, although its source address is forged: nothing
    /// should, at any address.
    fn forged(&self) -> Vec<String> {
        let forging =
            FORGERS.iter().flat_map(|forger| SOURCES.map(|source| From::Forging(*forger, source)));
        let forging: Vec<From> = forging.collect();
        let asked: Vec<To> = EXPECTED.iter().map(|(to, _)| *to).collect();
        std::thread::scope(|scope| {
            let asking: Vec<_> = forging
                .iter()
                .flat_map(|from| asked.iter().map(move |to| (*from, *to)))
                .flat_map(|(from, to)| {
                    [(false, false), (false, true), (true, false), (true, true)].map(|(udp, v6)| {
                        let probe = Probe { from, to, udp, v6 };
                        scope.spawn(move || (self.outcome(&probe, NO), probe))
                    })
                })
                .collect();
            let outcomes = asking.into_iter().map(|one| one.join().unwrap());
            outcomes
                .filter(|(outcome, _)| *outcome != NO)
                .map(|(outcome, probe)| format!("{probe:?}: {outcome:?}"))
                .collect()
        })
    }

    /// Where datagrams of the inmate get to beyond the host: nowhere. It sends them to the
    /// outside's own addresses.
    fn leaks_of_the_inmate(&self) -> Vec<&'static str> {
        let outside = ["203.0.113.9:7778", "[2001:db8:1::9]:7778"];
        let at = outside.map(|at| at.parse::<SocketAddr>().unwrap());
        let witness = Witness::new(&self.scene.net.client, &at);
        self.place(From::Inmate).run(|| {
            for to in at {
                let socket =
                    UdpSocket::bind(if to.is_ipv6() { "[::]:0" } else { "0.0.0.0:0" }).unwrap();
                for _ in 0..20 {
                    // Without a route it cannot even be sent.
                    let _ = socket.send_to(format!("leak to {to}").as_bytes(), to);
                    std::thread::sleep(Duration::from_millis(5));
                }
            }
        });
        std::thread::sleep(PATIENCE[1]);
        outside.into_iter().filter(|to| witness.has_seen(&format!("leak to {to}"))).collect()
    }

    /// Whom echo requests to the server's own addresses reach although they should not, or not
    /// although they should.
    fn wrong_echoes(&self) -> Vec<String> {
        let row = self.mode.expected()[0].1;
        let cells = FROM.iter().zip(row).filter(|(from, _)| {
            // They have no socket of their own to ping with.
            !matches!(from, From::AsNeighbour | From::AsLoopback)
        });
        std::thread::scope(|scope| {
            let asking: Vec<_> = cells
                .flat_map(|(from, expected)| {
                    ["10.77.1.10", "fd77:1::10"].map(|to| {
                        scope.spawn(move || {
                            let patience = if expected == YES { "5" } else { "0.3" };
                            let mut ping = self.place(*from).command("ping");
                            let output =
                                ping.args(["-c", "1", "-W", patience, to]).output().unwrap();
                            (*from, to, output.status.success(), expected == YES)
                        })
                    })
                })
                .collect();
            let outcomes = asking.into_iter().map(|one| one.join().unwrap());
            let wrong = outcomes.filter(|(_, _, reached, expected)| reached != expected);
            wrong
                .map(|(from, to, reached, _)| format!("echo from {from:?} to {to}: {reached}"))
                .collect()
        })
    }
}

/// Echo requests to gateways, which the host's kernel answers.
impl Matrix {
    /// Whether an echo request from there to the gateway of the network numbered `network` is
    /// answered; `None` where the host's kernel decides, as it does for services of the host.
    fn gateway_answers(&self, from: From, network: usize) -> Option<bool> {
        let own = match from {
            From::Itself | From::Neighbour => 1,
            From::Stranger => 2,
            From::Inmate => 3,
            _ => 0,
        };
        let firewall = self.mode.flags.iter().any(|flag| *flag != "--firewall=none");
        match from {
            _ if own == network => Some(true),
            // Internal guards are BPF programs.
            From::Inmate if self.mode.lacks == "all" => None,
            From::Inmate => Some(false),
            From::Host => None,
            // The gateways of an ordinary user's networks are in another namespace.
            _ if own == 0 && self.mode.rootless => Some(false),
            _ if firewall => Some(false),
            _ => None,
        }
    }

    /// Echo requests to gateways that are answered and must not be, or the other way round.
    fn wrong_gateway_echoes(&self) -> Vec<String> {
        let from =
            FROM.into_iter().filter(|from| !matches!(from, From::AsNeighbour | From::AsLoopback));
        let cells = from.flat_map(|from| [1, 2, 3].map(|network| (from, network)));
        std::thread::scope(|scope| {
            let asking: Vec<_> = cells
                .filter_map(|(from, to)| Some((from, to, self.gateway_answers(from, to)?)))
                .flat_map(|(from, network, expected)| {
                    [format!("10.77.{network}.1"), format!("fd77:{network}::1")].map(|to| {
                        scope.spawn(move || {
                            let patience = if expected { "5" } else { "0.3" };
                            let mut ping = self.place(from).command("ping");
                            let output =
                                ping.args(["-c", "1", "-W", patience, &to]).output().unwrap();
                            let answered = output.status.success();
                            (answered != expected)
                                .then(|| format!("echo from {from:?} to {to}: {answered}"))
                        })
                    })
                })
                .collect();
            asking.into_iter().filter_map(|one| one.join().unwrap()).collect()
        })
    }
}

/// Echo requests by hand: no socket has somebody else's address for those.
impl Matrix {
    /// Where echo requests of root in a container with forged sources get to, or answers to them:
    /// nowhere.
    fn forged_echoes(&self) -> Vec<String> {
        let [server, neighbour, ..] = &self.endpoints;
        let receivers = [
            ("the server", server),
            ("its neighbour", neighbour),
            ("the outside", &self.scene.net.client),
        ]
        .map(|(name, namespace)| (name, LinkSocket::open(namespace, "eth0")));
        let mut reached = Vec::new();
        for forger in FORGERS {
            let place = self.place(From::Forging(forger, Source::Member));
            let subnet = if forger == Forger::Stranger { 2 } else { 3 };
            let gateway = format!("10.77.{subnet}.1");
            place.exec("ping", &["-c", "1", "-W", "5", &gateway]);
            let mac_in = |listed: &str| -> Mac {
                let mac =
                    listed.split_whitespace().find(|word| word.matches(':').count() == 5).unwrap();
                let bytes = mac.split(':').map(|byte| u8::from_str_radix(byte, 16).unwrap());
                bytes.collect::<Vec<_>>().try_into().unwrap()
            };
            let gateway_mac = mac_in(&place.ip(&["-4", "neigh", "show", &gateway]));
            let own_mac = mac_in(&place.ip(&["-o", "link", "show", "eth0"]));
            let link = LinkSocket::sender(place, "eth0");
            for source in SOURCES {
                let ip = |v6| forger.address(source, v6).parse::<SocketAddr>().unwrap().ip();
                let (IpAddr::V4(source4), IpAddr::V6(source6)) = (ip(false), ip(true)) else {
                    unreachable!()
                };
                for to in ["10.77.1.10", "10.77.1.1", "203.0.113.9", "203.0.113.1", &gateway] {
                    let to = to.parse().unwrap();
                    let mut echo = [&[8, 0, 0, 0, 0, 1, 0, 1][..], MARKER].concat();
                    let sum = checksum(&echo);
                    echo[2..4].copy_from_slice(&sum.to_be_bytes());
                    link.send(&ethernet(
                        gateway_mac,
                        own_mac,
                        0x0800,
                        &ipv4(source4, to, 1, &echo),
                    ));
                }
                for to in ["fd77:1::10", "fd77:1::1", "2001:db8:1::9", &format!("fd77:{subnet}::1")]
                {
                    let to = to.parse().unwrap();
                    let echo = [&[128, 0, 0, 0, 0, 1, 0, 1][..], MARKER].concat();
                    link.send(&ethernet(gateway_mac, own_mac, 0x86dd, &icmp6(source6, to, &echo)));
                }
                std::thread::sleep(PATIENCE[1]);
                for (name, receiver) in &receivers {
                    let is_one =
                        |frame: &Vec<u8>| frame.windows(MARKER.len()).any(|part| part == MARKER);
                    let count = receiver.received().iter().filter(|frame| is_one(frame)).count();
                    if count > 0 {
                        reached.push(format!("{count} of {forger:?} as {source:?} at {name}"));
                    }
                }
            }
        }
        reached
    }
}

/// Where containers go when they go out: a server on each uplink, which tells the address that it
/// is asked from.
impl Matrix {
    /// What containers do not reach although they should, or do although they should not, or not as
    /// the host.
    fn wrong_ways_out(&self) -> Vec<String> {
        let servers = [
            (&self.scene.net.client, "203.0.113.9:7777", "203.0.113.1"),
            (&self.scene.net.client, "[2001:db8:1::9]:7777", "2001:db8:1::1"),
            (&self.uplink.client, "198.51.100.9:7777", uplink::HOST[0]),
            (&self.uplink.client, "[2001:db8:2::9]:7777", uplink::HOST[1]),
        ];
        let mut wrong = Vec::new();
        for (place, at, host) in servers {
            let at: SocketAddr = at.parse().unwrap();
            let (_tcp, _udp) = (PeerServer::tcp(place, at), PeerServer::udp(place, at));
            for from in [From::Itself, From::Neighbour, From::Stranger, From::Inmate] {
                let has = self.mode.has_egress() && from != From::Inmate;
                let expected = has.then(|| host.to_owned());
                for udp in [false, true] {
                    let asked =
                        self.place(from).run(|| peer_as_seen(at, udp, PATIENCE[usize::from(!has)]));
                    if asked.as_ref().ok() != expected.as_ref() {
                        wrong.push(format!(
                            "{from:?} asks {at} (udp {udp}): {asked:?}, not {expected:?}"
                        ));
                    }
                }
            }
        }
        wrong
    }

    /// What is not ours is as open, or as closed, as it was.
    #[track_caller]
    fn forwards_for_others_as_before(&self) {
        let others = PeerServer::tcp(
            &self.scene.net.container,
            SocketAddr::new(addr::CONTAINER_V4.into(), 80),
        );
        let others6 = PeerServer::tcp(
            &self.scene.net.container,
            SocketAddr::new(addr::CONTAINER_V6.into(), 80),
        );
        for server in [others, others6] {
            let patience = PATIENCE[usize::from(!self.mode.forwarding)];
            let reached = self
                .uplink
                .hostile
                .run(|| TcpStream::connect_timeout(&server.addr(), patience).is_ok());
            assert_eq!(reached, self.mode.forwarding, "{}", server.addr());
        }
    }
}

impl Matrix {
    /// The numbers of tidegate's links of that kind on the host.
    fn links(&self, kind: &str) -> Vec<u32> {
        let mut args = vec!["-o", "link", "show"];
        args.extend(kind.split(' '));
        let listed = self.scene.net.host.ip(&args);
        let ours = listed.lines().filter(|line| line.contains(": tg"));
        ours.map(|line| line.split(':').next().unwrap().parse().unwrap()).collect()
    }

    /// Detaches the programs at tidegate's links of that kind.
    fn detach_programs(&self, kind: &str) {
        let links = self.links(kind);
        self.scene.net.host.run(|| {
            links.into_iter().for_each(|link| tidegate_netfilter::detach_programs(link).unwrap());
        });
    }

    /// How many programs are at tidegate's links of that kind.
    fn programs(&self, kind: &str) -> usize {
        let links = self.links(kind);
        self.scene.net.host.run(|| {
            let count = |link| tidegate_netfilter::count_programs(link).unwrap_or(0);
            links.into_iter().map(count).sum()
        })
    }
}

/// The address that `server` sees us under.
pub(super) fn peer_as_seen(
    server: SocketAddr,
    udp: bool,
    patience: Duration,
) -> io::Result<String> {
    let mut answer = [0; 100];
    let length = if udp {
        let socket = UdpSocket::bind(if server.is_ipv6() { "[::]:0" } else { "0.0.0.0:0" })?;
        socket.set_read_timeout(Some(patience))?;
        socket.connect(server)?;
        socket.send(b"?")?;
        socket.recv(&mut answer)?
    } else {
        let mut stream = TcpStream::connect_timeout(&server, patience)?;
        stream.set_read_timeout(Some(patience))?;
        stream.write_all(b"?")?;
        stream.read(&mut answer)?
    };
    let peer: SocketAddr =
        String::from_utf8_lossy(&answer[..length]).trim().parse().map_err(io::Error::other)?;
    Ok(peer.ip().to_string())
}

impl Forger {
    /// The forged source address.
    fn address(self, source: Source, v6: bool) -> &'static str {
        match (self, source, v6) {
            (Self::Stranger, Source::Member, false) => "10.77.2.66:0",
            (Self::Stranger, Source::Member, true) => "[fd77:2::66]:0",
            (Self::Inmate, Source::Member, false) => "10.77.3.66:0",
            (Self::Inmate, Source::Member, true) => "[fd77:3::66]:0",
            (Self::Stranger, Source::Gateway, false) => "10.77.2.1:0",
            (Self::Stranger, Source::Gateway, true) => "[fd77:2::1]:0",
            (Self::Inmate, Source::Gateway, false) => "10.77.3.1:0",
            (Self::Inmate, Source::Gateway, true) => "[fd77:3::1]:0",
            (_, Source::Outside, false) => "203.0.113.9:0",
            (_, Source::Outside, true) => "[2001:db8:1::9]:0",
            (_, Source::Loopback, false) => "127.0.0.1:0",
            (_, Source::Loopback, true) => "[::1]:0",
            (_, Source::OtherNetwork, false) => "10.77.1.66:0",
            (_, Source::OtherNetwork, true) => "[fd77:1::66]:0",
        }
    }
}

/// One question.
#[derive(Clone, Copy, Debug)]
struct Probe {
    from: From,
    to: To,
    udp: bool,
    v6: bool,
}

impl Probe {
    /// What is asked, by which it is recognised.
    fn text(&self) -> String {
        format!("{self:?}")
    }

    fn address(&self) -> SocketAddr {
        let at = |v4: &str, v6: &str, port| {
            SocketAddr::new((if self.v6 { v6 } else { v4 }).parse::<IpAddr>().unwrap(), port)
        };
        match self.to {
            To::Container => at("10.77.1.10", "fd77:1::10", 80),
            To::Published => at("203.0.113.1", "2001:db8:1::1", 8080),
            To::PublishedBeyond => at(uplink::HOST[0], uplink::HOST[1], 8080),
            To::Gateway => at("10.77.1.1", "fd77:1::1", 8080),
            To::AwayGateway => at("10.77.2.1", "fd77:2::1", 8080),
            To::InsideGateway => at("10.77.3.1", "fd77:3::1", 8080),
            To::Loopback => at("127.0.0.1", "::1", 8080),
            To::LoopbackOnly => at("127.0.0.1", "::1", 9090),
            To::LoopbackOnlyOutside => at("203.0.113.1", "2001:db8:1::1", 9090),
            To::LoopbackOnlyGateway => at("10.77.1.1", "fd77:1::1", 9090),
        }
    }

    /// A socket with the source address that is pretended, if one is.
    fn socket(&self, kind: Type) -> io::Result<Socket> {
        let socket = Socket::new(if self.v6 { Domain::IPV6 } else { Domain::IPV4 }, kind, None)?;
        let pretended = match (self.from, self.v6) {
            (From::AsNeighbour, false) => "10.77.1.66:0",
            (From::AsNeighbour, true) => "[fd77:1::66]:0",
            (From::AsLoopback, false) => "127.0.0.1:0",
            (From::AsLoopback, true) => "[::1]:0",
            (From::Forging(forger, source), v6) => forger.address(source, v6),
            _ => return Ok(socket),
        };
        if self.v6 {
            socket.set_ip_transparent_v6(true)?;
        } else {
            socket.set_ip_transparent_v4(true)?;
        }
        socket.bind(&pretended.parse::<SocketAddr>().unwrap().into())?;
        Ok(socket)
    }

    /// The length of the answer.
    fn ask_by_udp(&self, patience: Duration) -> io::Result<usize> {
        let socket = UdpSocket::from(self.socket(Type::DGRAM).expect("a socket with that source"));
        // Nobody answers a client with a forged source, however long it waits.
        let pretends =
            matches!(self.from, From::AsNeighbour | From::AsLoopback | From::Forging(..));
        socket.set_read_timeout(Some(if pretends { PATIENCE[1] } else { patience }))?;
        socket.connect(self.address())?;
        socket.send(self.text().as_bytes())?;
        socket.recv(&mut [0; 100])
    }

    /// The length of what comes of the answer.
    fn ask_by_tcp(&self, patience: Duration) -> io::Result<usize> {
        let socket = self.socket(Type::STREAM).expect("a socket with that source");
        socket.connect_timeout(&self.address().into(), patience)?;
        let mut stream = TcpStream::from(socket);
        stream.set_read_timeout(Some(patience))?;
        let _ = stream.write_all(b"?");
        stream.read(&mut [0; 100])
    }
}

/// The whole table, egress, and nothing left behind.
#[track_caller]
fn holds(mode: Mode) {
    let mut matrix = Matrix::new(mode);
    assert_eq!(matrix.wrong(mode.expected()), [""; 0]);
    assert_eq!(matrix.forged(), [""; 0]);
    assert_eq!(matrix.wrong_echoes(), [""; 0]);
    assert_eq!(matrix.wrong_gateway_echoes(), [""; 0]);
    assert_eq!(matrix.forged_echoes(), [""; 0]);
    assert_eq!(matrix.wrong_ways_out(), [""; 0]);
    matrix.forwards_for_others_as_before();
    matrix.up.stop(Signal::INT, SOON);
    assert_eq!(state(&matrix.scene.net.host), matrix.before);
}

#[test]
fn everyone_reaches_what_the_table_says_and_nothing_else() {
    holds(ROOT);
}

#[test]
fn the_same_holds_on_a_host_that_forwards_for_others_and_it_goes_on_doing_so() {
    holds(ROOT.forwarding());
}

#[test]
fn with_nftables_the_same_holds_and_containers_reach_the_outside() {
    holds(NFTABLES);
}

#[test]
fn with_nftables_the_same_holds_on_a_host_that_forwards_for_others() {
    holds(NFTABLES.forwarding());
}

#[test]
fn published_by_the_kernel_with_nftables_the_same_holds() {
    holds(NFTABLES_KERNEL);
}

#[test]
fn published_by_the_kernel_with_nftables_the_same_holds_on_a_host_that_forwards_for_others() {
    holds(NFTABLES_KERNEL.forwarding());
}

#[test]
fn with_iptables_the_same_holds_and_containers_reach_the_outside() {
    holds(IPTABLES);
}

#[test]
fn with_iptables_the_same_holds_on_a_host_that_forwards_for_others() {
    holds(IPTABLES.forwarding());
}

#[test]
fn published_by_the_kernel_with_iptables_the_same_holds() {
    holds(IPTABLES_KERNEL);
}

#[test]
fn published_by_the_kernel_with_iptables_the_same_holds_on_a_host_that_forwards_for_others() {
    holds(IPTABLES_KERNEL.forwarding());
}

#[test]
fn published_by_the_kernel_with_tables_that_are_everybodys_the_same_holds() {
    holds(NFTABLES_SHARED.forwarding());
}

#[test]
fn with_nftables_and_policy_rules_behind_it() {
    holds(NFTABLES_UNGATED.forwarding());
}

#[test]
fn with_iptables_and_policy_rules_behind_it() {
    holds(IPTABLES_UNGATED);
}

#[test]
fn published_by_the_kernel_with_legacy_iptables_the_same_holds() {
    holds(LEGACY_KERNEL);
    holds(LEGACY_KERNEL.forwarding());
}

#[test]
fn the_networks_of_an_ordinary_user_are_as_closed_and_have_a_egress() {
    holds(ROOTLESS);
}

#[test]
fn without_a_device_there_is_no_egress_and_all_else_holds() {
    holds(ROOT_WITHOUT_TUN);
    holds(ROOTLESS_WITHOUT_TUN);
}

/// A kernel before Linux 6.17 lets all links forward IPv6 or none: an ordinary user has all of
/// them, and a host that forwards does so already.
#[test]
fn on_an_old_kernel_the_same_holds() {
    holds(ROOT_OLD.forwarding());
    holds(ROOTLESS_OLD);
}

/// A neighbour is no router.
#[test]
fn endpoints_do_not_listen_to_router_advertisements() {
    let matrix = Matrix::new(ROOT);
    for name in ["accept_ra", "accept_redirects"] {
        assert_eq!(
            matrix.endpoints[0].read_sysctl(&format!("net.ipv6.conf.eth0.{name}")),
            "0",
            "{name}"
        );
    }
}

#[test]
fn what_a_killed_instance_leaves_is_closed() {
    let mut matrix = Matrix::new(ROOT.forwarding());
    matrix.up.signal(Signal::KILL);
    matrix.up.wait(SOON);
    assert_eq!(matrix.wrong(&EXPECTED_OF_THE_DEAD), [""; 0]);
}

/// Each kind of guard is removed, and nobody puts it back: the others close the networks.
#[test]
fn without_one_kind_of_guard_the_others_hold() {
    let flush = |matrix: &Matrix| {
        matrix.scene.sh("nft flush ruleset; for i in iptables ip6tables; do for t in raw mangle nat filter; do $i -t $t -F; done; done");
    };
    let rules = |matrix: &Matrix| {
        matrix.scene.sh("for f in -4 -6; do
                ip $f rule list | grep -v -E 'lookup (local|main|default)$' | cut -d: -f1 | sort -u |
                while read p; do while ip $f rule del pref $p 2>/dev/null; do :; done; done
            done");
    };
    let gates = |matrix: &Matrix| matrix.detach_programs("type bridge");
    let guards = |matrix: &Matrix| matrix.detach_programs("type veth");
    type Remove<'a> = &'a dyn Fn(&Matrix);
    let kinds: [(&str, Remove<'_>); 4] = [
        ("firewall rules", &flush),
        ("policy rules", &rules),
        ("gates", &gates),
        ("port guards", &guards),
    ];
    // Published by sockets, which have gone: what the kernel carries goes on.
    let shared = Mode { lacks: "owned-tables", ..NFTABLES };
    let shared_kernel = Mode { lacks: "owned-tables", ..NFTABLES_KERNEL };
    for mode in [ROOT, shared, IPTABLES, shared_kernel, IPTABLES_KERNEL].map(Mode::forwarding) {
        for (kind, remove) in kinds {
            let mut matrix = Matrix::new(mode);
            matrix.up.signal(Signal::KILL);
            matrix.up.wait(SOON);
            remove(&matrix);
            // What the kernel translates goes on while its rules are there.
            let translated = mode.flags.contains(&"--publish=kernel");
            let table = &EXPECTED_OF_THE_DEAD;
            let tables: &[Table] = if translated { &[&table[..1], &table[3..]] } else { &[table] };
            for table in tables {
                assert_eq!(matrix.wrong(table), [""; 0], "{mode:?} without {kind}");
            }
            assert_eq!(matrix.forged(), [""; 0], "{mode:?} without {kind}");
            assert_eq!(matrix.leaks_of_the_inmate(), [""; 0], "{mode:?} without {kind}");
        }
    }
}

/// The networks of an ordinary user end with their process: it is stopped, so that it restores
/// nothing and its engine forwards nothing. Policy rules have no second guard there, and nobody
/// else gets into that namespace.
#[test]
fn without_port_guards_the_networks_of_an_ordinary_user_are_closed() {
    let mut matrix = Matrix::new(ROOTLESS);
    let inside = rootless_namespace(&matrix.up, &matrix.scene.net.host);
    matrix.up.signal(Signal::STOP);
    let before = state(&inside);
    inside.exec("nft", &["flush", "ruleset"]);
    assert_ne!(state(&inside), before);
    assert_eq!(matrix.wrong(&EXPECTED_ROOTLESS[..1]), [""; 0]);
    assert_eq!(matrix.forged(), [""; 0]);
    assert_eq!(matrix.leaks_of_the_inmate(), [""; 0]);
    matrix.up.signal(Signal::CONT);
}

/// Detached or deleted behind its back, each is back within two seconds.
#[test]
fn gates_and_port_guards_that_others_remove_are_put_back() {
    for mode in [ROOT, NFTABLES, IPTABLES] {
        let matrix = Matrix::new(mode);
        let attached = |kind| matrix.programs(kind);
        for kind in ["type bridge", "type veth"] {
            let before = attached(kind);
            assert!(before > 0, "{mode:?} {kind}");
            matrix.detach_programs(kind);
            assert!(eventually(SOON, || attached(kind) == before), "{mode:?} {kind}");
        }
        assert_eq!(matrix.forged(), [""; 0]);
        assert_eq!(matrix.wrong(mode.expected()), [""; 0]);
    }
}

/// Or no echo would get anywhere for want of an attack: the host answers whom the source names.
#[test]
fn without_port_guards_a_forged_echo_is_answered_to_the_outside() {
    let lacks = "bpf-guards,netdev-guards,classic-guards";
    let reached = Matrix::new(Mode { lacks, ..ROOT }).forged_echoes();
    assert!(
        reached.iter().any(|one| one.ends_with("Stranger as Outside at the outside")),
        "{reached:?}"
    );
    assert!(!reached.iter().any(|one| one.contains("Inmate")), "{reached:?}");
}

/// Or the table would hold for want of an attack: where the kernel is told to let them through,
/// they come through.
#[test]
fn what_the_hostile_neighbour_sends_does_arrive() {
    let matrix = Matrix::new(ROOT);
    let ask = |from, to, udp, expected| {
        let probe = Probe { from, to, udp, v6: false };
        assert_eq!(matrix.outcome(&probe, expected), expected, "{probe:?}");
    };
    ask(From::AsLoopback, To::PublishedBeyond, true, NO);
    let host = &matrix.scene.net.host;
    host.sysctl("net.ipv4.conf.eth1.route_localnet", "1");
    let of_others: SocketAddr = "127.0.0.1:9191".parse().unwrap();
    let _servers = (PeerServer::tcp(host, of_others), PeerServer::udp(host, of_others));
    for udp in [false, true] {
        matrix.uplink.hostile.run(|| peer_as_seen(of_others, udp, SOON)).unwrap();
        // A port of ours is closed all the same: it did not come in by `lo`.
        ask(From::Hostile, To::LoopbackOnly, udp, NO);
    }
    matrix.scene.net.host.sysctl("net.ipv4.conf.eth1.accept_local", "1");
    ask(From::AsLoopback, To::PublishedBeyond, true, IN);

    // IPv6 has no such switch; it counts what it throws away.
    let thrown_away = || {
        let path = "/proc/thread-self/net/snmp6";
        let table = matrix.scene.net.host.run(|| fs::read_to_string(path)).unwrap();
        let line = table.lines().find_map(|line| line.strip_prefix("Ip6InHdrErrors"));
        line.and_then(|count| count.trim().parse::<u64>().ok()).unwrap()
    };
    for (from, to) in [(From::Hostile, To::LoopbackOnly), (From::AsLoopback, To::PublishedBeyond)] {
        let before = thrown_away();
        assert_eq!(matrix.outcome(&Probe { from, to, udp: true, v6: true }, NO), NO);
        assert!(thrown_away() > before, "{from:?} to {to:?}");
    }
}
