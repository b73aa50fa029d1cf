//! Reachability matrix: one table of clients and destinations, checked in every isolation mode.

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
/// Timeouts of a probe with an expected answer, and without one.
const TIMEOUTS: [Duration; 2] = [Duration::from_secs(5), Duration::from_millis(250)];

/// Location of a client, or the source address that it spoofs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum From {
    /// On the first uplink of the host.
    Outside,
    /// On the second uplink of the host.
    Beyond,
    /// On the second uplink, with routes for all destinations through the host, including loopback
    /// addresses.
    Hostile,
    /// The same, with a spoofed source address on the server's network.
    AsNeighbour,
    /// The same, with a loopback address as its source.
    AsLoopback,
    /// The host itself.
    Host,
    /// Another endpoint of the same network.
    Neighbour,
    /// An endpoint of another network.
    Stranger,
    /// An endpoint of an internal network.
    Isolated,
    /// The server's own endpoint.
    Itself,
    /// Root in an endpoint, with a spoofed source address.
    Forging(Forger, Source),
}

/// The endpoint in which root spoofs source addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Forger {
    /// On another network than the server.
    Stranger,
    /// On an internal network.
    Isolated,
}

/// A spoofed source address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    /// Another address of its own network.
    Member,
    /// The gateway of its own network.
    Gateway,
    /// The external client.
    Outside,
    /// Loopback.
    Loopback,
    /// An address on the server's network.
    OtherNetwork,
}

const FORGERS: [Forger; 2] = [Forger::Stranger, Forger::Isolated];
const SOURCES: [Source; 5] =
    [Source::Member, Source::Gateway, Source::Outside, Source::Loopback, Source::OtherNetwork];

/// Destination of a probe.
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
    /// The published port at a loopback address, which is the client's own except on the host.
    Loopback,
    /// A port published only on the host's loopback address, at that address.
    LoopbackOnly,
    /// The same port at the host's address on the first uplink.
    LoopbackOnlyOutside,
    /// The same port at the gateway address of the server's network.
    LoopbackOnlyGateway,
}

/// Result of a probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    /// The probe does not reach the server.
    Nothing,
    /// The server answers.
    Answer,
    /// A datagram reaches the server, but its answer does not reach the client. For TCP, same as
    /// `Nothing`.
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
    From::Isolated,
    From::Itself,
];

/// Configuration of the project and of the host.
#[derive(Clone, Copy, Debug)]
struct Mode {
    /// Run by an ordinary user, with networks in another namespace than the host's.
    rootless: bool,
    /// Forwarding is enabled on the host.
    forwarding: bool,
    /// Legacy iptables instead of iptables-nft.
    legacy: bool,
    /// Kernel features that are treated as missing.
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
/// All probed features are treated as missing.
const ROOT_OLD: Mode = Mode { lacks: "all", ..ROOT };
const ROOTLESS_OLD: Mode = Mode { lacks: "all", ..ROOTLESS };
const NFTABLES_SHARED: Mode = Mode { lacks: "owned-tables", ..NFTABLES_KERNEL };
/// Policy rules instead of gates back the firewall.
const NFTABLES_UNGATED: Mode = Mode { lacks: "gates", ..NFTABLES_KERNEL };
const IPTABLES_UNGATED: Mode = Mode { lacks: "gates,owned-tables", ..IPTABLES_KERNEL };
const LEGACY_KERNEL: Mode = Mode { legacy: true, ..IPTABLES_KERNEL };

/// Expected outcomes by destination, in the order of [`FROM`].
type Table = &'static [(To, [Outcome; 10])];

impl Mode {
    fn expected(self) -> Table {
        match (self.rootless, self.has_egress()) {
            (false, _) => &EXPECTED,
            (true, true) => &EXPECTED_ROOTLESS,
            (true, false) => &EXPECTED_WITHOUT_TUN,
        }
    }

    /// The same mode with forwarding enabled on the host.
    const fn forwarding(self) -> Self {
        Self { forwarding: true, ..self }
    }

    #[track_caller]
    fn daemon(self, scene: &Scene) -> Process {
        if self.rootless { scene.daemon_as_nobody(self.flags) } else { scene.daemon(self.flags) }
    }

    /// Whether containers have egress.
    fn has_egress(self) -> bool {
        self.lacks != "tun"
    }
}

/// Rows in the order of [`FROM`]. A client with a spoofed source gets no answer.
#[rustfmt::skip]
const EXPECTED: [(To, [Outcome; 10]); 10] = [
    //                        ---------- beyond the host -----------  ------------- here --------------
    //                        outside beyond hostile as-neigh. as-lo  host neighb. strang. isolated itself
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

/// The same for rootless networks, which reach the host's addresses through the NAT engine.
#[rustfmt::skip]
const EXPECTED_ROOTLESS: [(To, [Outcome; 10]); 10] = [
    //                        outside beyond hostile as-neigh. as-lo  host neighb. strang. isolated itself
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

/// The same without a TUN device. Containers do not reach the host's addresses.
#[rustfmt::skip]
const EXPECTED_WITHOUT_TUN: [(To, [Outcome; 10]); 10] = [
    //                        outside beyond hostile as-neigh. as-lo  host neighb. strang. isolated itself
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

/// The same after root's instance was killed, until the next one rolls back: bridges and guards
/// still exist.
#[rustfmt::skip]
const EXPECTED_AFTER_KILL: [(To, [Outcome; 10]); 10] = [
    //                        outside beyond hostile as-neigh. as-lo  host neighb. strang. isolated itself
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
  isolated: { x-netns: ISOLATED, networks: [ inside ] }
"#;

const NETWORKS: [&str; 3] = ["home", "away", "inside"];

pub(super) const ENDPOINTS: [&str; 4] = ["server", "neighbour", "stranger", "isolated"];

/// The project on a host with two uplinks, and all clients of the table.
struct Matrix {
    mode: Mode,
    /// State of the host before the project.
    before: String,
    scene: Scene,
    uplink: Uplink,
    endpoints: [Namespace; 4],
    witness: Witness,
    _servers: [PeerServer; 2],
    up: Process,
    /// Processes in endpoints of an unprivileged daemon.
    containers: Vec<Process>,
}

impl Matrix {
    #[track_caller]
    fn new(mode: Mode) -> Self {
        Self::with(mode, |scene| scene.up_with_services(FILE, ENDPOINTS, mode.rootless, mode.flags))
    }

    /// The same networks, created at run time in a daemon.
    #[track_caller]
    fn of_daemon(mode: Mode) -> Self {
        let mut containers = Vec::new();
        let mut matrix = Self::with(mode, |scene| {
            let daemon = mode.daemon(scene);
            for (name, number) in NETWORKS.into_iter().zip(1..) {
                let (v4, v6) = (format!("10.77.{number}.0/24"), format!("fd77:{number}::/64"));
                let mut create = vec!["network", "create", name, "--subnet", &v4, "--subnet", &v6];
                create.extend(["--internal"].iter().filter(|_| name == "inside"));
                scene.succeeds(&create);
            }
            let endpoints = ENDPOINTS.map(|_| {
                if !mode.rootless {
                    let namespace = Namespace::new();
                    let path = namespace.path().to_str().unwrap().to_owned();
                    return (namespace, path);
                }
                let (process, namespace, path) = scene.namespace_below_the_daemon();
                containers.push(process);
                (namespace, path)
            });
            for ((name, network), (_, path)) in
                ENDPOINTS.into_iter().zip(["home", "home", "away", "inside"]).zip(&endpoints)
            {
                let mut attach = vec!["attach", network, "--name", name, "--netns", path];
                if name == "server" {
                    attach.extend(["--ip", "10.77.1.10", "--ip", "fd77:1::10"]);
                    attach.extend(["-p", "8080:80", "-p", "8080:80/udp"]);
                    for at in ["127.0.0.1:9090:80", "[::1]:9090:80"] {
                        attach.extend(["-p", at]);
                    }
                }
                scene.succeeds(&attach);
            }
            // Ports of an endpoint can be added later.
            let body = |at: &str| format!("{{\"endpoint\":\"server\",\"spec\":\"{at}/udp\"}}");
            for at in ["127.0.0.1:9090:80", "[::1]:9090:80"] {
                let socket = scene.socket();
                let socket = socket.to_str().unwrap();
                let args = [
                    "-sS",
                    "--fail",
                    "--unix-socket",
                    socket,
                    "-d",
                    &body(at),
                    "http://x/v1/ports",
                ];
                scene.net.host.exec("curl", &args);
            }
            (daemon, endpoints.map(|(namespace, _)| namespace))
        });
        matrix.containers = containers;
        matrix
    }

    #[track_caller]
    fn with(mode: Mode, start: impl FnOnce(&Scene) -> (Process, [Namespace; 4])) -> Self {
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
        let (up, endpoints) = start(&scene);
        // Root on the internal network adds default routes.
        endpoints[3].ip_all(
            "route add default via 10.77.3.1
             -6 route add default via fd77:3::1",
        );
        let at: [SocketAddr; 2] =
            ["10.77.1.10:80", "[fd77:1::10]:80"].map(|at| at.parse().unwrap());
        let servers = at.map(|at| PeerServer::tcp(&endpoints[0], at));
        let witness = Witness::new(&endpoints[0], &at);
        let containers = Vec::new();
        Self { mode, before, scene, uplink, endpoints, witness, _servers: servers, up, containers }
    }

    fn place(&self, from: From) -> &Namespace {
        let [server, neighbour, stranger, isolated] = &self.endpoints;
        match from {
            From::Outside => &self.scene.net.client,
            From::Beyond => &self.uplink.client,
            From::Hostile | From::AsNeighbour | From::AsLoopback => &self.uplink.hostile,
            From::Host => &self.scene.net.host,
            From::Neighbour => neighbour,
            From::Stranger => stranger,
            From::Isolated | From::Forging(Forger::Isolated, _) => isolated,
            From::Forging(Forger::Stranger, _) => stranger,
            From::Itself => server,
        }
    }

    /// Sends `probe`. The timeout depends on the `expected` outcome.
    fn outcome(&self, probe: &Probe, expected: Outcome) -> Outcome {
        let timeout = TIMEOUTS[usize::from(expected == NO)];
        let answered = self.place(probe.from).run(|| {
            let asked = if probe.udp { probe.send_udp(timeout) } else { probe.send_tcp(timeout) };
            asked.is_ok_and(|length| length > 0)
        });
        let seen = || self.witness.has_seen(&probe.text());
        if answered {
            YES
        } else if probe.udp && (seen() || expected == IN && eventually(TIMEOUTS[0], seen)) {
            IN
        } else {
            NO
        }
    }

    /// Sends all probes concurrently. Returns the deviations from `table`.
    fn deviations(&self, table: Table) -> Vec<String> {
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
            let deviations = outcomes.filter(|(outcome, expected, _)| outcome != expected);
            deviations
                .map(|(outcome, expected, probe)| {
                    format!("{probe:?}: {outcome:?}, not {expected:?}")
                })
                .collect()
        })
    }
}

impl Matrix {
    /// Probes with spoofed sources that reach the server or are answered. Must be empty.
    fn delivered_spoofed_probes(&self) -> Vec<String> {
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

    /// External addresses that datagrams from the internal network reach. Must be empty.
    fn egress_leaks_of_internal_network(&self) -> Vec<&'static str> {
        let outside = ["203.0.113.9:7778", "[2001:db8:1::9]:7778"];
        let at = outside.map(|at| at.parse::<SocketAddr>().unwrap());
        let witness = Witness::new(&self.scene.net.client, &at);
        self.place(From::Isolated).run(|| {
            for to in at {
                let socket =
                    UdpSocket::bind(if to.is_ipv6() { "[::]:0" } else { "0.0.0.0:0" }).unwrap();
                for _ in 0..20 {
                    // Fails without a route.
                    let _ = socket.send_to(format!("leak to {to}").as_bytes(), to);
                    std::thread::sleep(Duration::from_millis(5));
                }
            }
        });
        std::thread::sleep(TIMEOUTS[1]);
        outside.into_iter().filter(|to| witness.has_seen(&format!("leak to {to}"))).collect()
    }

    /// Deviations of echo requests to the server's addresses.
    fn echo_deviations(&self) -> Vec<String> {
        let row = self.mode.expected()[0].1;
        let cells = FROM.iter().zip(row).filter(|(from, _)| {
            // ping cannot spoof its source.
            !matches!(from, From::AsNeighbour | From::AsLoopback)
        });
        std::thread::scope(|scope| {
            let asking: Vec<_> = cells
                .flat_map(|(from, expected)| {
                    ["10.77.1.10", "fd77:1::10"].map(|to| {
                        scope.spawn(move || {
                            let timeout = if expected == YES { "5" } else { "0.3" };
                            let mut ping = self.place(*from).command("ping");
                            let output =
                                ping.args(["-c", "1", "-W", timeout, to]).output().unwrap();
                            (*from, to, output.status.success(), expected == YES)
                        })
                    })
                })
                .collect();
            let outcomes = asking.into_iter().map(|one| one.join().unwrap());
            let deviations = outcomes.filter(|(_, _, reached, expected)| reached != expected);
            deviations
                .map(|(from, to, reached, _)| format!("echo from {from:?} to {to}: {reached}"))
                .collect()
        })
    }
}

/// Echo requests to gateways, which the host's kernel answers.
impl Matrix {
    /// Whether an echo request to the gateway of `network` must be answered. `None` if it depends
    /// on the host, as for services of the host.
    fn gateway_answers(&self, from: From, network: usize) -> Option<bool> {
        let own = match from {
            From::Itself | From::Neighbour => 1,
            From::Stranger => 2,
            From::Isolated => 3,
            _ => 0,
        };
        let firewall = self.mode.flags.iter().any(|flag| *flag != "--firewall=none");
        match from {
            _ if own == network => Some(true),
            // Internal guards are BPF programs, which require kernel support.
            From::Isolated if self.mode.lacks == "all" => None,
            From::Isolated => Some(false),
            From::Host => None,
            // Rootless: gateways are in another namespace.
            _ if own == 0 && self.mode.rootless => Some(false),
            _ if firewall => Some(false),
            _ => None,
        }
    }

    /// Deviations of echo requests to gateways.
    fn gateway_echo_deviations(&self) -> Vec<String> {
        let from =
            FROM.into_iter().filter(|from| !matches!(from, From::AsNeighbour | From::AsLoopback));
        let cells = from.flat_map(|from| [1, 2, 3].map(|network| (from, network)));
        std::thread::scope(|scope| {
            let asking: Vec<_> = cells
                .filter_map(|(from, to)| Some((from, to, self.gateway_answers(from, to)?)))
                .flat_map(|(from, network, expected)| {
                    [format!("10.77.{network}.1"), format!("fd77:{network}::1")].map(|to| {
                        scope.spawn(move || {
                            let timeout = if expected { "5" } else { "0.3" };
                            let mut ping = self.place(from).command("ping");
                            let output =
                                ping.args(["-c", "1", "-W", timeout, &to]).output().unwrap();
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

/// Raw echo requests with spoofed sources.
impl Matrix {
    /// Receivers of spoofed echo requests of root in a container, or of replies to them. Must be
    /// empty.
    fn delivered_spoofed_echoes(&self) -> Vec<String> {
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
                std::thread::sleep(TIMEOUTS[1]);
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

/// Egress to a server on each uplink, which returns the client's address.
impl Matrix {
    /// Deviations of egress: reachability, and masquerading to the host's address.
    fn egress_deviations(&self) -> Vec<String> {
        let servers = [
            (&self.scene.net.client, "203.0.113.9:7777", "203.0.113.1"),
            (&self.scene.net.client, "[2001:db8:1::9]:7777", "2001:db8:1::1"),
            (&self.uplink.client, "198.51.100.9:7777", uplink::HOST[0]),
            (&self.uplink.client, "[2001:db8:2::9]:7777", uplink::HOST[1]),
        ];
        let mut deviations = Vec::new();
        for (place, at, host) in servers {
            let at: SocketAddr = at.parse().unwrap();
            let (_tcp, _udp) = (PeerServer::tcp(place, at), PeerServer::udp(place, at));
            for from in [From::Itself, From::Neighbour, From::Stranger, From::Isolated] {
                let has = self.mode.has_egress() && from != From::Isolated;
                let expected = has.then(|| host.to_owned());
                for udp in [false, true] {
                    let asked =
                        self.place(from).run(|| peer_as_seen(at, udp, TIMEOUTS[usize::from(!has)]));
                    if asked.as_ref().ok() != expected.as_ref() {
                        deviations.push(format!(
                            "{from:?} to {at} (udp {udp}): {asked:?}, not {expected:?}"
                        ));
                    }
                }
            }
        }
        deviations
    }

    /// Asserts that the host forwards other traffic if and only if it did before.
    #[track_caller]
    fn assert_other_forwarding_unchanged(&self) {
        let others = PeerServer::tcp(
            &self.scene.net.container,
            SocketAddr::new(addr::CONTAINER_V4.into(), 80),
        );
        let others6 = PeerServer::tcp(
            &self.scene.net.container,
            SocketAddr::new(addr::CONTAINER_V6.into(), 80),
        );
        for server in [others, others6] {
            let timeout = TIMEOUTS[usize::from(!self.mode.forwarding)];
            let reached = self
                .uplink
                .hostile
                .run(|| TcpStream::connect_timeout(&server.addr(), timeout).is_ok());
            assert_eq!(reached, self.mode.forwarding, "{}", server.addr());
        }
    }
}

impl Matrix {
    /// The interface indexes of tidegate's links of `kind` on the host.
    fn links(&self, kind: &str) -> Vec<u32> {
        let mut args = vec!["-o", "link", "show"];
        args.extend(kind.split(' '));
        let listed = self.scene.net.host.ip(&args);
        let ours = listed.lines().filter(|line| line.contains(": tg"));
        ours.map(|line| line.split(':').next().unwrap().parse().unwrap()).collect()
    }

    /// Detaches the BPF programs of tidegate's links of `kind`.
    fn detach_programs(&self, kind: &str) {
        let links = self.links(kind);
        self.scene.net.host.run(|| {
            links.into_iter().for_each(|link| tidegate_netfilter::detach_programs(link).unwrap());
        });
    }

    /// The number of BPF programs of tidegate's links of `kind`.
    fn programs(&self, kind: &str) -> usize {
        let links = self.links(kind);
        self.scene.net.host.run(|| {
            let count = |link| tidegate_netfilter::count_programs(link).unwrap_or(0);
            links.into_iter().map(count).sum()
        })
    }
}

/// The address under which `server` sees this client.
pub(super) fn peer_as_seen(server: SocketAddr, udp: bool, timeout: Duration) -> io::Result<String> {
    let mut answer = [0; 100];
    let length = if udp {
        let socket = UdpSocket::bind(if server.is_ipv6() { "[::]:0" } else { "0.0.0.0:0" })?;
        socket.set_read_timeout(Some(timeout))?;
        socket.connect(server)?;
        socket.send(b"?")?;
        socket.recv(&mut answer)?
    } else {
        let mut stream = TcpStream::connect_timeout(&server, timeout)?;
        stream.set_read_timeout(Some(timeout))?;
        stream.write_all(b"?")?;
        stream.read(&mut answer)?
    };
    let peer: SocketAddr =
        String::from_utf8_lossy(&answer[..length]).trim().parse().map_err(io::Error::other)?;
    Ok(peer.ip().to_string())
}

impl Forger {
    /// The spoofed source address.
    fn address(self, source: Source, v6: bool) -> &'static str {
        match (self, source, v6) {
            (Self::Stranger, Source::Member, false) => "10.77.2.66:0",
            (Self::Stranger, Source::Member, true) => "[fd77:2::66]:0",
            (Self::Isolated, Source::Member, false) => "10.77.3.66:0",
            (Self::Isolated, Source::Member, true) => "[fd77:3::66]:0",
            (Self::Stranger, Source::Gateway, false) => "10.77.2.1:0",
            (Self::Stranger, Source::Gateway, true) => "[fd77:2::1]:0",
            (Self::Isolated, Source::Gateway, false) => "10.77.3.1:0",
            (Self::Isolated, Source::Gateway, true) => "[fd77:3::1]:0",
            (_, Source::Outside, false) => "203.0.113.9:0",
            (_, Source::Outside, true) => "[2001:db8:1::9]:0",
            (_, Source::Loopback, false) => "127.0.0.1:0",
            (_, Source::Loopback, true) => "[::1]:0",
            (_, Source::OtherNetwork, false) => "10.77.1.66:0",
            (_, Source::OtherNetwork, true) => "[fd77:1::66]:0",
        }
    }
}

/// One probe.
#[derive(Clone, Copy, Debug)]
struct Probe {
    from: From,
    to: To,
    udp: bool,
    v6: bool,
}

impl Probe {
    /// The payload, which identifies the probe.
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

    /// A socket, bound to the spoofed source address if there is one.
    fn socket(&self, kind: Type) -> io::Result<Socket> {
        let socket = Socket::new(if self.v6 { Domain::IPV6 } else { Domain::IPV4 }, kind, None)?;
        let spoofed = match (self.from, self.v6) {
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
        socket.bind(&spoofed.parse::<SocketAddr>().unwrap().into())?;
        Ok(socket)
    }

    /// The length of the answer.
    fn send_udp(&self, timeout: Duration) -> io::Result<usize> {
        let socket = UdpSocket::from(self.socket(Type::DGRAM).expect("a socket with that source"));
        // A client with a spoofed source never gets an answer, so it uses the short timeout.
        let is_spoofed =
            matches!(self.from, From::AsNeighbour | From::AsLoopback | From::Forging(..));
        socket.set_read_timeout(Some(if is_spoofed { TIMEOUTS[1] } else { timeout }))?;
        socket.connect(self.address())?;
        socket.send(self.text().as_bytes())?;
        socket.recv(&mut [0; 100])
    }

    /// The length of the first part of the answer.
    fn send_tcp(&self, timeout: Duration) -> io::Result<usize> {
        let socket = self.socket(Type::STREAM).expect("a socket with that source");
        socket.connect_timeout(&self.address().into(), timeout)?;
        let mut stream = TcpStream::from(socket);
        stream.set_read_timeout(Some(timeout))?;
        let _ = stream.write_all(b"?");
        stream.read(&mut [0; 100])
    }
}

/// Checks the table, echo requests, spoofing and egress, and that no state is left behind.
#[track_caller]
fn assert_isolation(mode: Mode) {
    let mut matrix = Matrix::new(mode);
    assert_eq!(matrix.deviations(mode.expected()), [""; 0]);
    assert_eq!(matrix.delivered_spoofed_probes(), [""; 0]);
    assert_eq!(matrix.echo_deviations(), [""; 0]);
    assert_eq!(matrix.gateway_echo_deviations(), [""; 0]);
    assert_eq!(matrix.delivered_spoofed_echoes(), [""; 0]);
    assert_eq!(matrix.egress_deviations(), [""; 0]);
    matrix.assert_other_forwarding_unchanged();
    matrix.up.stop(Signal::INT, SOON);
    assert_eq!(state(&matrix.scene.net.host), matrix.before);
}

#[test]
fn without_a_firewall() {
    assert_isolation(ROOT);
}

#[test]
fn without_a_firewall_on_a_forwarding_host() {
    assert_isolation(ROOT.forwarding());
}

#[test]
fn with_nftables() {
    assert_isolation(NFTABLES);
}

#[test]
fn with_nftables_on_a_forwarding_host() {
    assert_isolation(NFTABLES.forwarding());
}

#[test]
fn with_nftables_published_by_the_kernel() {
    assert_isolation(NFTABLES_KERNEL);
}

#[test]
fn with_nftables_published_by_the_kernel_on_a_forwarding_host() {
    assert_isolation(NFTABLES_KERNEL.forwarding());
}

#[test]
fn with_iptables() {
    assert_isolation(IPTABLES);
}

#[test]
fn with_iptables_on_a_forwarding_host() {
    assert_isolation(IPTABLES.forwarding());
}

#[test]
fn with_iptables_published_by_the_kernel() {
    assert_isolation(IPTABLES_KERNEL);
}

#[test]
fn with_iptables_published_by_the_kernel_on_a_forwarding_host() {
    assert_isolation(IPTABLES_KERNEL.forwarding());
}

#[test]
fn with_nftables_without_owned_tables() {
    assert_isolation(NFTABLES_SHARED.forwarding());
}

#[test]
fn with_nftables_backed_by_policy_rules() {
    assert_isolation(NFTABLES_UNGATED.forwarding());
}

#[test]
fn with_iptables_backed_by_policy_rules() {
    assert_isolation(IPTABLES_UNGATED);
}

#[test]
fn with_legacy_iptables_published_by_the_kernel() {
    assert_isolation(LEGACY_KERNEL);
    assert_isolation(LEGACY_KERNEL.forwarding());
}

/// The networks are created one by one in a daemon. After kill -9, the next daemon adopts them.
#[track_caller]
fn assert_isolation_in_a_daemon(mode: Mode) {
    let mut matrix = Matrix::of_daemon(mode);
    for round in ["created at run time", "adopted after kill -9"] {
        let round = format!("{mode:?}: {round}");
        assert_eq!(matrix.deviations(mode.expected()), [""; 0], "{round}");
        assert_eq!(matrix.delivered_spoofed_probes(), [""; 0], "{round}");
        assert_eq!(matrix.echo_deviations(), [""; 0], "{round}");
        assert_eq!(matrix.egress_deviations(), [""; 0], "{round}");
        let bridges = match mode.rootless {
            true => matrix.scene.kept_namespace(),
            false => matrix.scene.net.host.clone(),
        };
        let links = bridges.exec("ip", &["-o", "link"]);
        matrix.up.signal(Signal::KILL);
        matrix.up.wait(SOON);
        matrix.up = mode.daemon(&matrix.scene);
        let after = bridges.exec("ip", &["-o", "link"]);
        let ours = |links: &str| {
            let ours =
                links.lines().filter(|line| line.contains(": tg-") || line.contains(": tgv"));
            ours.map(str::to_owned).collect::<Vec<_>>()
        };
        assert_eq!(ours(&after), ours(&links), "the same links");
    }
    for name in ENDPOINTS {
        matrix.scene.succeeds(&["detach", name]);
    }
    for name in NETWORKS {
        matrix.scene.succeeds(&["network", "rm", name]);
    }
    matrix.up.stop(Signal::INT, SOON);
    // The rules of a daemon without networks continue to exist, and permit nothing.
    assert!(!state(&matrix.scene.net.host).contains("10.77."));
    assert_eq!(matrix.scene.keeper(), None);
}

#[test]
fn in_a_rootless_daemon() {
    assert_isolation_in_a_daemon(ROOTLESS);
}

#[test]
fn in_a_daemon_without_a_firewall() {
    assert_isolation_in_a_daemon(ROOT);
}

#[test]
fn in_a_daemon_with_nftables() {
    assert_isolation_in_a_daemon(NFTABLES.forwarding());
    assert_isolation_in_a_daemon(NFTABLES_KERNEL);
}

#[test]
fn in_a_daemon_with_iptables() {
    assert_isolation_in_a_daemon(IPTABLES);
    assert_isolation_in_a_daemon(IPTABLES_KERNEL.forwarding());
}

#[test]
fn rootless() {
    assert_isolation(ROOTLESS);
}

#[test]
fn without_a_tun_device_only_egress_is_missing() {
    assert_isolation(ROOT_WITHOUT_TUN);
    assert_isolation(ROOTLESS_WITHOUT_TUN);
}

/// Before Linux 6.17, IPv6 forwarding has only a global switch. It is the user's own in a rootless
/// namespace, and already on on a forwarding host.
#[test]
fn on_an_old_kernel() {
    assert_isolation(ROOT_OLD.forwarding());
    assert_isolation(ROOTLESS_OLD);
}

#[test]
fn endpoints_ignore_router_advertisements_and_redirects() {
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
fn networks_stay_closed_after_a_kill() {
    let mut matrix = Matrix::new(ROOT.forwarding());
    matrix.up.signal(Signal::KILL);
    matrix.up.wait(SOON);
    assert_eq!(matrix.deviations(&EXPECTED_AFTER_KILL), [""; 0]);
}

/// Removes each kind of guard after a kill. The remaining kinds isolate the networks.
#[test]
fn each_kind_of_guard_is_redundant() {
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
    // Ports of the proxy end with the kill. The kernel continues to forward its ports.
    let shared = Mode { lacks: "owned-tables", ..NFTABLES };
    let shared_kernel = Mode { lacks: "owned-tables", ..NFTABLES_KERNEL };
    for mode in [ROOT, shared, IPTABLES, shared_kernel, IPTABLES_KERNEL].map(Mode::forwarding) {
        for (kind, remove) in kinds {
            let mut matrix = Matrix::new(mode);
            matrix.up.signal(Signal::KILL);
            matrix.up.wait(SOON);
            remove(&matrix);
            // DNAT continues while its rules exist, so rows of published ports are skipped.
            let translated = mode.flags.contains(&"--publish=kernel");
            let table = &EXPECTED_AFTER_KILL;
            let tables: &[Table] = if translated { &[&table[..1], &table[3..]] } else { &[table] };
            for table in tables {
                assert_eq!(matrix.deviations(table), [""; 0], "{mode:?} without {kind}");
            }
            assert_eq!(matrix.delivered_spoofed_probes(), [""; 0], "{mode:?} without {kind}");
            assert_eq!(
                matrix.egress_leaks_of_internal_network(),
                [""; 0],
                "{mode:?} without {kind}"
            );
        }
    }
}

/// Rootless networks end with their process, so it is stopped (SIGSTOP) instead of killed, and
/// restores nothing. Policy rules are not redundant there, but other users cannot enter that
/// namespace.
#[test]
fn rootless_networks_are_closed_without_port_guards() {
    let mut matrix = Matrix::new(ROOTLESS);
    let inside = rootless_namespace(&matrix.up, &matrix.scene.net.host);
    matrix.up.signal(Signal::STOP);
    let before = state(&inside);
    inside.exec("nft", &["flush", "ruleset"]);
    assert_ne!(state(&inside), before);
    assert_eq!(matrix.deviations(&EXPECTED_ROOTLESS[..1]), [""; 0]);
    assert_eq!(matrix.delivered_spoofed_probes(), [""; 0]);
    assert_eq!(matrix.egress_leaks_of_internal_network(), [""; 0]);
    matrix.up.signal(Signal::CONT);
}

#[test]
fn removed_gates_and_port_guards_are_restored() {
    for mode in [ROOT, NFTABLES, IPTABLES] {
        let matrix = Matrix::new(mode);
        let attached = |kind| matrix.programs(kind);
        for kind in ["type bridge", "type veth"] {
            let before = attached(kind);
            assert!(before > 0, "{mode:?} {kind}");
            matrix.detach_programs(kind);
            assert!(eventually(SOON, || attached(kind) == before), "{mode:?} {kind}");
        }
        assert_eq!(matrix.delivered_spoofed_probes(), [""; 0]);
        assert_eq!(matrix.deviations(mode.expected()), [""; 0]);
    }
}

/// Without port guards, bridge guards deny spoofed sources. Counter-test: without these as well,
/// the host sends the reply to the spoofed source, so the tests above do exercise an attack.
#[test]
fn without_guards_the_reply_to_a_spoofed_echo_is_sent() {
    let reached = |lacks| Matrix::new(Mode { lacks, ..ROOT }).delivered_spoofed_echoes();
    assert_eq!(reached("bpf-guards,netdev-guards,classic-guards"), [""; 0]);
    let reached = reached("bpf-guards,netdev-guards,classic-guards,gates");
    assert!(
        reached.iter().any(|one| one.ends_with("Stranger as Outside at the outside")),
        "{reached:?}"
    );
}

/// Counter-test: packets of the hostile host arrive if sysctls permit them, so the table does
/// exercise an attack.
#[test]
fn packets_of_the_hostile_host_arrive_if_sysctls_permit_them() {
    let matrix = Matrix::new(ROOT);
    let ask = |from, to, udp, expected| {
        let probe = Probe { from, to, udp, v6: false };
        assert_eq!(matrix.outcome(&probe, expected), expected, "{probe:?}");
    };
    ask(From::AsLoopback, To::PublishedBeyond, true, NO);
    let host = &matrix.scene.net.host;
    host.sysctl("net.ipv4.conf.eth1.route_localnet", "1");
    let other_service: SocketAddr = "127.0.0.1:9191".parse().unwrap();
    let _servers = (PeerServer::tcp(host, other_service), PeerServer::udp(host, other_service));
    for udp in [false, true] {
        matrix.uplink.hostile.run(|| peer_as_seen(other_service, udp, SOON)).unwrap();
        // A published port stays closed, because the packets did not arrive on `lo`.
        ask(From::Hostile, To::LoopbackOnly, udp, NO);
    }
    matrix.scene.net.host.sysctl("net.ipv4.conf.eth1.accept_local", "1");
    ask(From::AsLoopback, To::PublishedBeyond, true, IN);

    // IPv6 has no such sysctl, but a counter of dropped packets.
    let dropped = || {
        let path = "/proc/thread-self/net/snmp6";
        let table = matrix.scene.net.host.run(|| fs::read_to_string(path)).unwrap();
        let line = table.lines().find_map(|line| line.strip_prefix("Ip6InHdrErrors"));
        line.and_then(|count| count.trim().parse::<u64>().ok()).unwrap()
    };
    for (from, to) in [(From::Hostile, To::LoopbackOnly), (From::AsLoopback, To::PublishedBeyond)] {
        let before = dropped();
        assert_eq!(matrix.outcome(&Probe { from, to, udp: true, v6: true }, NO), NO);
        assert!(dropped() > before, "{from:?} to {to:?}");
    }
}
