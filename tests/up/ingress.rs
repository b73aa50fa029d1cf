//! Access checks of published ports by ingress interface: at link-local, multicast and broadcast
//! addresses, which belong to no network, and after a bridge was recreated.

use super::matrix::peer_as_seen;
use super::scene::{Scene, service_namespace, state, with_commands};
use super::uplink::Uplink;
use super::witness::Witness;
use socket2::{Domain, Socket, Type};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::Duration;
use tidegate_reactor::{drop_forged_own_source, enable_stream_ingress, stream_ingress};
use tidegate_testbed::server::PeerServer;
use tidegate_testbed::{Namespace, Process, Signal, eventually};

const SOON: Duration = Duration::from_secs(10);
/// Timeouts of a probe with an expected answer, and without one.
const TIMEOUTS: [Duration; 2] = [Duration::from_secs(5), Duration::from_millis(300)];

/// `server` on `home` and `insider` on the internal `inside` publish a port each.
const FILE: &str = r#"
name: ingress
networks:
  home: { enable_ipv6: true, ipam: { config: [ { subnet: 10.77.1.0/24 }, { subnet: "fd77:1::/64" } ] } }
  away: { enable_ipv6: true, ipam: { config: [ { subnet: 10.77.2.0/24 }, { subnet: "fd77:2::/64" } ] } }
  inside: { internal: true, enable_ipv6: true, ipam: { config: [ { subnet: 10.77.3.0/24 }, { subnet: "fd77:3::/64" } ] } }
services:
  server:
    x-netns: SERVER
    networks: { home: { ipv4_address: 10.77.1.10, ipv6_address: "fd77:1::10" } }
    ports: [ "8080:80", "8080:80/udp" ]
  insider:
    x-netns: INSIDER
    networks: { inside: { ipv4_address: 10.77.3.10, ipv6_address: "fd77:3::10" } }
    ports: [ "8083:80", "8083:80/udp" ]
  neighbour: { x-netns: NEIGHBOUR, networks: [ home ] }
  stranger: { x-netns: STRANGER, networks: [ away ] }
  isolated: { x-netns: ISOLATED, networks: [ inside ] }
"#;

const SERVICES: [&str; 5] = ["server", "insider", "neighbour", "stranger", "isolated"];

/// Configuration of the project.
#[derive(Clone, Copy, Debug)]
struct Mode {
    rootless: bool,
    /// Flags of `tidegate up`.
    flags: &'static [&'static str],
}

const NONE: Mode = Mode { rootless: false, flags: &["--firewall=none"] };
const NFTABLES: Mode = Mode { rootless: false, flags: &["--firewall=nftables", "--publish=proxy"] };
const NFTABLES_KERNEL: Mode =
    Mode { rootless: false, flags: &["--firewall=nftables", "--publish=kernel"] };
const IPTABLES: Mode = Mode { rootless: false, flags: &["--firewall=iptables", "--publish=proxy"] };
const IPTABLES_KERNEL: Mode =
    Mode { rootless: false, flags: &["--firewall=iptables", "--publish=kernel"] };
const ROOTLESS: Mode = Mode { rootless: true, flags: &[] };

/// Location of a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum From {
    /// On the first uplink.
    Outside,
    /// On `home`, the network of `server`.
    Neighbour,
    /// On `away`.
    Stranger,
    /// On `inside`, the internal network of `insider`.
    Isolated,
}

/// Destination address of a probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum To {
    /// The gateway of the client's network. For an external client, the host's address.
    Gateway(Family),
    /// The gateway of the network of the port's endpoint, routed through the host.
    GatewayOfPort(Family),
    /// The host's address on the uplink.
    Host(Family),
    /// The link-local address of the host on the client's link, from a link-local source.
    LinkLocal,
    /// The same from a global source.
    LinkLocalFromGlobal,
    /// ff02::1, all nodes.
    AllNodes,
    /// 224.0.0.1, all hosts.
    AllHosts,
    /// 255.255.255.255.
    Broadcast,
    /// The broadcast address of the client's subnet.
    SubnetBroadcast,
    /// The broadcast address of the host's subnet on the uplink, routed through the host.
    UplinkBroadcast,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Family {
    V4,
    V6,
}

use Family::{V4, V6};

/// Unicast destinations, probed with TCP and UDP.
const UNICAST: [To; 8] = [
    To::Gateway(V4),
    To::Gateway(V6),
    To::GatewayOfPort(V4),
    To::GatewayOfPort(V6),
    To::Host(V4),
    To::Host(V6),
    To::LinkLocal,
    To::LinkLocalFromGlobal,
];

/// Multicast and broadcast destinations, probed with UDP.
const GROUPS: [To; 5] =
    [To::AllNodes, To::AllHosts, To::Broadcast, To::SubnetBroadcast, To::UplinkBroadcast];

/// A published port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Port {
    number: u16,
    /// The network of its endpoint, by the byte that identifies it in addresses.
    network: u8,
}

const PORTS: [Port; 2] = [Port { number: 8080, network: 1 }, Port { number: 8083, network: 3 }];

/// The project with the servers behind its ports and all clients.
struct Scenery {
    mode: Mode,
    scene: Scene,
    before: String,
    /// The namespace of the bridges.
    bridges: Namespace,
    services: [Namespace; 5],
    _servers: [PeerServer; 4],
    witnesses: [Witness; 2],
    up: Process,
}

impl Scenery {
    #[track_caller]
    fn new(mode: Mode) -> Self {
        let scene = Scene::new().with_open_tun();
        // The external client routes container subnets through the host.
        scene.net.client.ip_all(
            "route add 10.77.0.0/16 via 203.0.113.1
             -6 route add fd77::/16 via 2001:db8:1::1",
        );
        let before = state(&scene.net.host);
        let (up, services) = scene.up_with_services(FILE, SERVICES, mode.rootless, mode.flags);
        let bridges = if mode.rootless { inner_namespace(&up) } else { scene.net.host.clone() };
        // Root on the internal network adds default routes.
        services[4].ip_all(
            "route add default via 10.77.3.1
             -6 route add default via fd77:3::1",
        );
        let at = |network: u8| {
            let v4 = format!("10.77.{network}.10:80").parse::<SocketAddr>().unwrap();
            [v4, format!("[fd77:{network}::10]:80").parse().unwrap()]
        };
        let [server, insider, ..] = &services;
        let [a, b] = at(1).map(|at| PeerServer::tcp(server, at));
        let [c, d] = at(3).map(|at| PeerServer::tcp(insider, at));
        let witnesses = [Witness::new(server, &at(1)), Witness::new(insider, &at(3))];
        Self { mode, scene, before, bridges, services, _servers: [a, b, c, d], witnesses, up }
    }

    fn place(&self, from: From) -> &Namespace {
        match from {
            From::Outside => &self.scene.net.client,
            From::Neighbour => &self.services[2],
            From::Stranger => &self.services[3],
            From::Isolated => &self.services[4],
        }
    }

    /// The link-local address that the host has on the link of `from`.
    fn link_local(&self, from: From) -> Ipv6Addr {
        let host = if from == From::Outside { &self.scene.net.host } else { &self.bridges };
        let gateway = match from {
            From::Outside => "203.0.113.1/24".to_owned(),
            _ => format!("10.77.{}.1/24", from.network()),
        };
        let mut found = None;
        // Retried while links change and until duplicate address detection has finished.
        assert!(eventually(SOON, || {
            let all = host.ip(&["-o", "addr", "show"]);
            let link = all.lines().find(|line| line.contains(&gateway));
            let Some(link) = link.and_then(|line| line.split_whitespace().nth(1)) else {
                return false;
            };
            let is_on_it = |line: &&str| {
                line.contains("scope link") && !line.contains("tentative") && line.contains("inet6")
            };
            let on_link = all.lines().filter(|line| line.split_whitespace().nth(1) == Some(link));
            let line = on_link.into_iter().find(is_on_it);
            found = line
                .and_then(|line| line.split_whitespace().nth(3)?.split('/').next()?.parse().ok());
            found.is_some()
        }));
        found.unwrap()
    }

    /// Whether the port's server receives the probe of `from`, or answers it.
    fn is_served(&self, port: Port, from: From, to: To, udp: bool, expected: bool) -> bool {
        let link_local = self.link_local(from);
        let text = format!("{port:?} {from:?} {to:?}");
        let timeout = TIMEOUTS[usize::from(!expected)];
        let answered = self.place(from).run(|| {
            let asked = if udp {
                probe_udp(port, from, to, link_local, &text, timeout)
            } else {
                probe_tcp(port, from, to, link_local, timeout)
            };
            asked.is_ok_and(|length| length > 0)
        });
        let witness = &self.witnesses[usize::from(port.network == 3)];
        answered || udp && witness.has_seen(&text)
    }

    /// Probes every port from every client at every address. Returns the deviations from
    /// [`expected`].
    fn deviations(&self) -> Vec<String> {
        let by_both = |to: To| [(to, false), (to, true)];
        let probes =
            UNICAST.into_iter().flat_map(by_both).chain(GROUPS.into_iter().map(|to| (to, true)));
        let probes: Vec<(To, bool)> = probes.collect();
        std::thread::scope(|scope| {
            let mut asking = Vec::new();
            for port in PORTS {
                for from in [From::Outside, From::Neighbour, From::Stranger, From::Isolated] {
                    for (to, udp) in probes.clone() {
                        let expected = expected(self.mode, port, from, to);
                        asking.push(scope.spawn(move || {
                            let served = self.is_served(port, from, to, udp, expected);
                            let is_wrong = served != expected;
                            is_wrong.then(|| {
                                format!("{port:?} from {from:?} at {to:?} (udp {udp}): {served}")
                            })
                        }));
                    }
                }
            }
            asking.into_iter().filter_map(|one| one.join().unwrap()).collect()
        })
    }
}

impl From {
    /// The client's network, by the byte that identifies it in addresses.
    fn network(self) -> u8 {
        match self {
            Self::Outside => 0,
            Self::Neighbour => 1,
            Self::Stranger => 2,
            Self::Isolated => 3,
        }
    }
}

/// Whether `port` serves `from` at `to`.
fn expected(mode: Mode, port: Port, from: From, to: To) -> bool {
    let is_attached = from.network() == port.network;
    if from == From::Outside {
        // Clients on an uplink are on no network of the project.
        return !matches!(to, To::GatewayOfPort(_) | To::UplinkBroadcast);
    }
    match to {
        To::Gateway(_) => from != From::Isolated || is_attached,
        To::GatewayOfPort(_) => is_attached,
        To::Host(_) => from != From::Isolated,
        // Rootless: no socket listens at these addresses in the namespace of the bridges.
        _ if mode.rootless => false,
        _ => is_attached && from != From::Isolated,
    }
}

/// The namespace of an ordinary user's networks, found by a thread in the namespace of the bridges.
/// Other threads can be in the namespace of a service temporarily.
fn inner_namespace(up: &Process) -> Namespace {
    let tasks = || fs::read_dir(format!("/proc/{}/task", up.pid())).unwrap().flatten();
    let mut found = None;
    assert!(eventually(SOON, || {
        found = tasks().find_map(|task| {
            let opened = File::open(task.path().join("ns/net")).ok()?;
            // Through the open descriptor, since the thread may have ended.
            let path = format!("/proc/self/fd/{}", opened.as_raw_fd());
            let namespace = Namespace::at(Path::new(&path));
            let addresses = namespace.ip(&["-o", "addr", "show"]);
            addresses.contains("10.77.1.1/24").then_some(namespace)
        });
        found.is_some()
    }));
    found.unwrap()
}

/// A socket on the only link of the client's namespace, with the destination address. Must be
/// called in that namespace.
fn socket(
    port: Port,
    from: From,
    to: To,
    link_local: Ipv6Addr,
    kind: Type,
) -> io::Result<(Socket, SocketAddr)> {
    let scope = fs::read_to_string("/proc/thread-self/net/if_inet6").unwrap();
    let mut own = scope.lines().filter(|line| line.ends_with(" eth0"));
    let index = own.clone().next().and_then(|line| line.split_whitespace().nth(1)).unwrap();
    let index = u32::from_str_radix(index, 16).unwrap();
    let network = from.network();
    let outside = from == From::Outside;
    let on_link = |ip: Ipv6Addr| SocketAddr::V6(SocketAddrV6::new(ip, port.number, 0, index));
    let at = |text: &str| SocketAddr::new(text.parse::<IpAddr>().unwrap(), port.number);
    let address = match to {
        To::Gateway(V4) | To::Host(V4) if outside => at("203.0.113.1"),
        To::Gateway(V6) | To::Host(V6) if outside => at("2001:db8:1::1"),
        To::Gateway(V4) => at(&format!("10.77.{network}.1")),
        To::Gateway(V6) => at(&format!("fd77:{network}::1")),
        To::GatewayOfPort(V4) => at(&format!("10.77.{}.1", port.network)),
        To::GatewayOfPort(V6) => at(&format!("fd77:{}::1", port.network)),
        To::Host(V4) => at("203.0.113.1"),
        To::Host(V6) => at("2001:db8:1::1"),
        To::LinkLocal | To::LinkLocalFromGlobal => on_link(link_local),
        To::AllNodes => on_link("ff02::1".parse().unwrap()),
        To::AllHosts => at("224.0.0.1"),
        To::Broadcast => at("255.255.255.255"),
        To::SubnetBroadcast if outside => at("203.0.113.255"),
        To::SubnetBroadcast => at(&format!("10.77.{network}.255")),
        // This is the external client's own subnet, so it sends to the broadcast address of a
        // container network instead.
        To::UplinkBroadcast if outside => at("10.77.1.255"),
        To::UplinkBroadcast => at("203.0.113.255"),
    };
    let socket = Socket::new(Domain::for_address(address), kind, None)?;
    if kind == Type::DGRAM && address.is_ipv4() {
        socket.set_broadcast(true)?;
    }
    if GROUPS.contains(&to) {
        socket.bind_device(Some(b"eth0"))?;
    }
    if to == To::LinkLocalFromGlobal {
        let global =
            own.find(|line| !line.starts_with("fe80")).unwrap().split_whitespace().next().unwrap();
        let global = Ipv6Addr::from(u128::from_str_radix(global, 16).unwrap());
        socket.bind(&SocketAddr::new(global.into(), 0).into())?;
    }
    Ok((socket, address))
}

/// The length of the answer, from any source address.
fn probe_udp(
    port: Port,
    from: From,
    to: To,
    link_local: Ipv6Addr,
    text: &str,
    timeout: Duration,
) -> io::Result<usize> {
    let (socket, address) = socket(port, from, to, link_local, Type::DGRAM).expect("a socket");
    let socket = UdpSocket::from(socket);
    socket.set_read_timeout(Some(timeout))?;
    socket.send_to(text.as_bytes(), address)?;
    socket.recv(&mut [0; 100])
}

/// The length of the answer.
fn probe_tcp(
    port: Port,
    from: From,
    to: To,
    link_local: Ipv6Addr,
    timeout: Duration,
) -> io::Result<usize> {
    let (socket, address) = socket(port, from, to, link_local, Type::STREAM).expect("a socket");
    socket.connect_timeout(&address.into(), timeout)?;
    let mut stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(timeout))?;
    let _ = stream.write_all(b"?");
    stream.read(&mut [0; 100])
}

#[track_caller]
fn assert_access(mode: Mode) {
    let mut scenery = Scenery::new(mode);
    assert_eq!(scenery.deviations(), [""; 0], "{mode:?}");
    scenery.up.stop(Signal::INT, SOON);
    assert_eq!(state(&scenery.scene.net.host), scenery.before);
}

#[test]
fn link_local_and_group_addresses_reach_only_ports_of_the_own_network() {
    assert_access(NONE);
}

#[test]
fn link_local_and_group_addresses_with_nftables() {
    assert_access(NFTABLES);
}

#[test]
fn link_local_and_group_addresses_with_iptables() {
    assert_access(IPTABLES);
}

#[test]
fn link_local_and_group_addresses_published_by_the_kernel_with_nftables() {
    assert_access(NFTABLES_KERNEL);
}

#[test]
fn link_local_and_group_addresses_published_by_the_kernel_with_iptables() {
    assert_access(IPTABLES_KERNEL);
}

#[test]
fn link_local_and_group_addresses_reach_no_port_rootless() {
    assert_access(ROOTLESS);
}

/// Deleted bridges are recreated with other interface indexes.
#[test]
fn access_checks_hold_after_bridges_are_recreated() {
    for mode in [NONE, NFTABLES, IPTABLES] {
        let mut scenery = Scenery::new(mode);
        let host = scenery.scene.net.host.clone();
        let bridges = || {
            let all = host.ip(&["-o", "link", "show", "type", "bridge"]);
            let ours = all.lines().filter(|line| line.contains(": tg-"));
            ours.map(|line| line.split(": ").map(str::to_owned).take(2).collect())
                .collect::<Vec<Vec<_>>>()
        };
        let old = bridges();
        assert_eq!(old.len(), 3, "{old:?}");
        for bridge in &old {
            host.ip(&["link", "delete", &bridge[1]]);
        }
        assert!(eventually(SOON, || {
            let new = bridges();
            let is_new = |bridge: &Vec<String>| old.iter().all(|one| one[0] != bridge[0]);
            new.len() == old.len() && new.iter().all(is_new)
        }));
        let served = || {
            let port = PORTS[0];
            scenery.is_served(port, From::Neighbour, To::Gateway(V4), false, true)
                && scenery.is_served(port, From::Stranger, To::Gateway(V6), false, true)
                && scenery.is_served(PORTS[1], From::Isolated, To::Gateway(V4), false, true)
        };
        assert!(eventually(SOON, served), "{mode:?}: {}", scenery.up.output());
        // Endpoints have their addresses again, but not the routes that root has added.
        assert_eq!(scenery.deviations(), [""; 0], "{mode:?}");
        scenery.up.stop(Signal::INT, SOON);
    }
}

/// Without a firewall, only the access check at the published port denies access.
#[test]
fn an_internal_network_of_another_project_reaches_no_port() {
    let scene = Scene::new();
    let (server, isolated) = (Namespace::new(), Namespace::new());
    let file = |name: &str, number: u8, internal: bool, at: &Namespace, port: &str| {
        format!(
            "name: {name}
networks: {{ net: {{ internal: {internal}, enable_ipv6: true, ipam: {{ config: [ {{ subnet: 10.78.{number}.0/24 }}, {{ subnet: \"fd78:{number}::/64\" }} ] }} }} }}
services: {{ box: {{ x-netns: {}, networks: [ net ]{port} }} }}
",
            at.path().display()
        )
    };
    let _server = PeerServer::tcp(&server, "0.0.0.0:80".parse().unwrap());
    let one = scene
        .up_with(&file("one", 1, false, &server, ", ports: [ '8080:80' ]"), &["--firewall=none"]);
    one.wait_for_line("Ctrl-C takes", SOON);
    let other = scene.up_beside(&file("other", 2, true, &isolated, ""), &["--firewall=none"]);
    other.wait_for_line("Ctrl-C takes", SOON);
    isolated.ip_all("route add default via 10.78.2.1\n-6 route add default via fd78:2::1");
    let listed = scene.net.host.ip(&["-6", "-o", "addr", "show", "scope", "link"]);
    let bridge = listed.lines().find(|line| {
        let name = line.split_whitespace().nth(1).unwrap_or_default();
        let link = scene.net.host.ip(&["-o", "-d", "link", "show", name]);
        link.contains("tidegate internal network")
    });
    let link_local =
        bridge.and_then(|line| line.split_whitespace().nth(3)).unwrap().split('/').next().unwrap();
    let scope = isolated.run(|| fs::read_to_string("/proc/thread-self/net/if_inet6")).unwrap();
    let scope = scope
        .lines()
        .find(|line| line.ends_with("eth0"))
        .unwrap()
        .split(' ')
        .nth(1)
        .unwrap()
        .to_owned();
    let scope = u32::from_str_radix(&scope, 16).unwrap();
    let at = [
        "203.0.113.1:8080".parse::<SocketAddr>().unwrap(),
        "10.78.2.1:8080".parse().unwrap(),
        "[2001:db8:1::1]:8080".parse().unwrap(),
        SocketAddrV6::new(link_local.parse().unwrap(), 8080, 0, scope).into(),
    ];
    for address in at {
        let answered = isolated.run(|| peer_as_seen(address, false, TIMEOUTS[1]));
        assert!(answered.is_err(), "{address}: {answered:?}");
    }
    let outside = scene.net.client.run(|| peer_as_seen(at[0], false, TIMEOUTS[0]));
    assert!(outside.is_ok(), "{outside:?}");
}

/// Their sockets are bound to the interface index of the bridge.
#[test]
fn dns_servers_at_gateways_work_after_bridges_are_recreated() {
    for flags in [NONE.flags, NFTABLES.flags] {
        let scene = Scene::new();
        let file = "name: ingress
networks: { home: { x-dns: gateway, ipam: { config: [ { subnet: 10.77.1.0/24 } ] } } }
services: { box: { command: sleep 60, networks: { home: { ipv4_address: 10.77.1.10 } } } }
";
        let up = scene.up_with(file, flags);
        up.wait_for_line("Ctrl-C takes", SOON);
        let inside = service_namespace(&up, "box");
        let is_answered = || {
            let mut dig = inside.command("dig");
            dig.args(["@10.77.1.1", "+short", "+time=1", "+tries=1", "box"]);
            String::from_utf8_lossy(&dig.output().unwrap().stdout).trim() == "10.77.1.10"
        };
        assert!(eventually(SOON, is_answered), "{}", up.output());
        let bridges = scene.net.host.ip(&["-o", "link", "show", "type", "bridge"]);
        let bridge = bridges
            .lines()
            .find_map(|line| line.split(": ").nth(1).filter(|name| name.starts_with("tg-")));
        scene.net.host.ip(&["link", "delete", bridge.unwrap()]);
        assert!(eventually(SOON, is_answered), "{flags:?}: {}", up.output());
    }
}

/// Result of a request to a metrics endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Page {
    /// It is served.
    Served,
    /// The connection fails, or is reset before the request.
    Closed,
}

fn page(at: SocketAddr, expected: Page) -> Page {
    let timeout = TIMEOUTS[usize::from(expected == Page::Closed)];
    let Ok(mut stream) = TcpStream::connect_timeout(&at, timeout) else { return Page::Closed };
    stream.set_read_timeout(Some(TIMEOUTS[1])).unwrap();
    let silent = stream.read(&mut [0; 1]);
    // The connection of a denied client is reset before its request.
    let is_open = silent.is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock);
    stream.set_read_timeout(Some(TIMEOUTS[0])).unwrap();
    let mut answer = [0; 12];
    let asked = stream
        .write_all(b"GET /metrics HTTP/1.1\r\n\r\n")
        .and_then(|()| stream.read_exact(&mut answer));
    if is_open && asked.is_ok() && answer.starts_with(b"HTTP/1.1 200") {
        Page::Served
    } else {
        Page::Closed
    }
}

#[test]
fn metrics_are_not_served_to_internal_networks_or_at_gateways_of_other_networks() {
    for mode in [NONE, NFTABLES, IPTABLES, ROOTLESS] {
        let scene = Scene::new().with_open_tun();
        scene.net.client.ip_all(
            "route add 10.77.0.0/16 via 203.0.113.1\n -6 route add fd77::/16 via 2001:db8:1::1",
        );
        let file = with_commands(FILE, &SERVICES);
        let path = scene.directory.path().join("compose.yaml");
        fs::write(&path, file).unwrap();
        let mut command = if mode.rootless { scene.tidegate_as_nobody() } else { scene.tidegate() };
        command.arg("up").arg("-f").arg(path).args(mode.flags).args(["--metrics", "[::]:9464"]);
        let up = Process::spawn(&mut command);
        up.wait_for_line("Ctrl-C takes", SOON);
        let [neighbour, stranger, isolated] =
            ["neighbour", "stranger", "isolated"].map(|name| service_namespace(&up, name));
        isolated.ip_all("route add default via 10.77.3.1\n -6 route add default via fd77:3::1");
        let (host, outside) = (&scene.net.host, &scene.net.client);
        // Rootless: gateways are not addresses of the host.
        let at_gateway = if mode.rootless { Page::Closed } else { Page::Served };
        let (yes, no) = (Page::Served, Page::Closed);
        for (who, from, to, expected) in [
            ("host", host, "127.0.0.1", yes),
            ("host", host, "::1", yes),
            ("host", host, "203.0.113.1", yes),
            ("host", host, "10.77.3.1", at_gateway),
            ("outside", outside, "203.0.113.1", yes),
            ("outside", outside, "2001:db8:1::1", yes),
            ("outside", outside, "10.77.1.1", no),
            ("outside", outside, "fd77:3::1", no),
            ("neighbour", &neighbour, "203.0.113.1", yes),
            ("neighbour", &neighbour, "2001:db8:1::1", yes),
            ("neighbour", &neighbour, "10.77.1.1", at_gateway),
            ("neighbour", &neighbour, "fd77:1::1", at_gateway),
            ("neighbour", &neighbour, "10.77.2.1", no),
            ("stranger", &stranger, "fd77:1::1", no),
            ("isolated", &isolated, "203.0.113.1", no),
            ("isolated", &isolated, "2001:db8:1::1", no),
            ("isolated", &isolated, "10.77.3.1", no),
            ("isolated", &isolated, "fd77:3::1", no),
            ("isolated", &isolated, "10.77.1.1", no),
        ] {
            let at = SocketAddr::new(to.parse().unwrap(), 9464);
            assert_eq!(
                from.run(|| page(at, expected)),
                expected,
                "{mode:?}: {who} at {to}: {}",
                up.output()
            );
        }
    }
}

/// Root on the internal network adds a default route, which must not help.
#[test]
fn the_nat_engine_is_not_reachable_from_internal_networks() {
    for mode in [NONE, ROOTLESS] {
        let scene = Scene::new().with_open_tun();
        let file = with_commands(FILE, &SERVICES);
        let mut command =
            if mode.rootless { scene.command_as_nobody(&file) } else { scene.command(&file) };
        let up = Process::spawn(command.args(mode.flags).arg("--allow-host-loopback"));
        up.wait_for_line("Ctrl-C takes", SOON);
        let loopbacks: [SocketAddr; 2] =
            ["127.0.0.1:9999", "[::1]:9999"].map(|at| at.parse().unwrap());
        let _tcp = loopbacks.map(|at| PeerServer::tcp(&scene.net.host, at));
        let _udp = loopbacks.map(|at| PeerServer::udp(&scene.net.host, at));
        let [neighbour, isolated] =
            ["neighbour", "isolated"].map(|name| service_namespace(&up, name));
        isolated.ip_all("route add default via 10.77.3.1\n -6 route add default via fd77:3::1");
        for to in ["169.254.116.103:9999", "[fd74:6964:6567:6174::1]:9999"] {
            for udp in [false, true] {
                let to: SocketAddr = to.parse().unwrap();
                neighbour.run(|| peer_as_seen(to, udp, TIMEOUTS[0])).unwrap();
                let seen = isolated.run(|| peer_as_seen(to, udp, TIMEOUTS[1]));
                assert!(seen.is_err(), "{mode:?}: {to} (udp {udp}): {seen:?}");
            }
        }
    }
}

/// The kernel reports it for all combinations of source and destination addresses.
#[test]
fn an_accepted_connection_reports_its_ingress_interface() {
    let scene = Scene::new();
    let _uplink = Uplink::new(&scene);
    let (host, client) = (&scene.net.host, &scene.net.client);
    // Routes to the addresses of the second uplink through the first.
    client.ip_all(
        "route add 198.51.100.1 via 203.0.113.1\n -6 route add 2001:db8:2::1 via 2001:db8:1::1",
    );
    let indexes = ["lo", "eth0", "eth1"].map(|link| {
        let line = host.ip(&["-o", "link", "show", link]);
        line.split(':').next().unwrap().trim().parse::<u32>().unwrap()
    });
    let [lo, eth0, eth1] = indexes;
    assert_eq!(lo, 1);
    let link_local = |namespace: &Namespace| {
        let mut found = None;
        assert!(eventually(SOON, || {
            let line = namespace.ip(&["-6", "-o", "addr", "show", "dev", "eth0", "scope", "link"]);
            let address = line
                .split_whitespace()
                .nth(3)
                .and_then(|net| net.split('/').next())
                .map(str::to_owned);
            found = address.filter(|_| !line.contains("tentative"));
            found.is_some()
        }));
        format!("{}%eth0", found.unwrap())
    };
    let [of_host, of_client] = [host, client].map(link_local);
    for (ipv6, port) in [(false, 7000), (true, 7001)] {
        let any = if ipv6 { "::" } else { "0.0.0.0" };
        let listener = host.run(|| TcpListener::bind((any, port))).unwrap();
        enable_stream_ingress(&listener, ipv6).unwrap();
        let cases: &[(&Namespace, &str, &str, u32)] = if ipv6 {
            &[
                (client, "::", "2001:db8:1::1", eth0),
                (client, "::", "2001:db8:2::1", eth0),
                (client, "::", &of_host, eth0),
                (client, "2001:db8:1::9", &of_host, eth0),
                (client, &of_client, "2001:db8:1::1", eth0),
                (host, "::", "::1", lo),
                // The interface that has the address.
                (host, "::", "2001:db8:2::1", eth1),
            ]
        } else {
            &[
                (client, "0.0.0.0", "203.0.113.1", eth0),
                (client, "0.0.0.0", "198.51.100.1", eth0),
                (host, "0.0.0.0", "127.0.0.1", lo),
                (host, "0.0.0.0", "198.51.100.1", eth1),
            ]
        };
        for (from, source, to, expected) in cases {
            let (source, to) = (resolve(from, source, 0), resolve(from, to, port));
            let stream = from.run(|| {
                let socket = Socket::new(Domain::for_address(to), Type::STREAM, None).unwrap();
                socket.bind(&source.into()).unwrap();
                socket.connect(&to.into()).unwrap();
                socket
            });
            let (accepted, _) = listener.accept().unwrap();
            let ingress = stream_ingress(&accepted, ipv6).unwrap();
            assert_eq!(
                (ingress.interface, ingress.local),
                (*expected, to.ip()),
                "{source} to {to}"
            );
            drop(stream);
        }
    }
    // A listener without the socket options does not report it, which is an error.
    let listener = host.run(|| TcpListener::bind("0.0.0.0:7002")).unwrap();
    let _stream = client.run(|| TcpStream::connect("203.0.113.1:7002")).unwrap();
    assert!(stream_ingress(listener.accept().unwrap().0, false).is_err());
}

/// Parses `text` and resolves its zone to an interface index in `namespace`.
fn resolve(namespace: &Namespace, text: &str, port: u16) -> SocketAddr {
    let Some((address, link)) = text.split_once('%') else {
        return SocketAddr::new(text.parse().unwrap(), port);
    };
    let line = namespace.ip(&["-o", "link", "show", link]);
    let index = line.split(':').next().unwrap().trim().parse().unwrap();
    SocketAddrV6::new(address.parse().unwrap(), port, 0, index).into()
}

/// Source and destination are the same address of the host. Only the host itself can send that.
#[test]
fn external_datagrams_with_equal_source_and_destination_are_dropped() {
    let scene = Scene::new();
    let (host, client) = (&scene.net.host, &scene.net.client);
    host.sysctl("net.ipv4.conf.eth0.accept_local", "1");
    host.sysctl("net.ipv4.conf.all.rp_filter", "0");
    host.sysctl("net.ipv4.conf.eth0.rp_filter", "0");
    // Different ports per family: a program that another test starts can inherit a socket for a
    // moment.
    for (any, own, ports) in
        [("0.0.0.0", "203.0.113.1", [7000, 7001]), ("::", "2001:db8:1::1", [7002, 7003])]
    {
        let any: IpAddr = any.parse().unwrap();
        let own: IpAddr = own.parse().unwrap();
        let listen = |port| {
            let socket = host.run(|| UdpSocket::bind((any, port))).unwrap();
            socket.set_read_timeout(Some(SOON)).unwrap();
            socket
        };
        let [open, filtered] = ports.map(listen);
        drop_forged_own_source(&filtered, any.is_ipv6()).unwrap();
        let forger = client.run(|| {
            let socket =
                Socket::new(Domain::for_address(SocketAddr::new(own, 0)), Type::DGRAM, None)
                    .unwrap();
            if own.is_ipv6() {
                socket.set_ip_transparent_v6(true).unwrap();
            } else {
                socket.set_ip_transparent_v4(true).unwrap();
            }
            socket.bind(&SocketAddr::new(own, 5000).into()).unwrap();
            UdpSocket::from(socket)
        });
        let honest = client.run(|| UdpSocket::bind((any, 0))).unwrap();
        let from_host = host.run(|| UdpSocket::bind((own, 0))).unwrap();
        let mut buffer = [0; 20];
        // It arrives at the socket without a filter.
        forger.send_to(b"forged", (own, ports[0])).unwrap();
        assert_eq!(open.recv(&mut buffer).unwrap(), 6, "{own}");
        forger.send_to(b"forged", (own, ports[1])).unwrap();
        honest.send_to(b"honest", (own, ports[1])).unwrap();
        from_host.send_to(b"host", (own, ports[1])).unwrap();
        let mut seen = Vec::new();
        for _ in 0..2 {
            let length = filtered.recv(&mut buffer).unwrap();
            seen.push(String::from_utf8_lossy(&buffer[..length]).into_owned());
        }
        seen.sort();
        assert_eq!(seen, ["honest", "host"], "{own}");
    }
}
