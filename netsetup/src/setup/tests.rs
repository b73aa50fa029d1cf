//! Tests against the real kernel, in temporary namespaces.

use super::*;
use crate::{Attachment, Endpoint, Interface, Network, RepairKind, RuleIsolation, Subnet};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::time::Duration;
use tidegate_model::MacAddress;
use tidegate_netns::Namespace;
use tidegate_testbed::Topology;

const SOON: Duration = Duration::from_secs(5);
const NEVER: Duration = Duration::from_millis(300);

/// A host with an external network, and a directory for journals.
struct Bed {
    net: Topology,
    host: Namespace,
    directory: tempfile::TempDir,
    runtime: tokio::runtime::Runtime,
}

impl Bed {
    fn new() -> Self {
        let net = Topology::three();
        let host = Namespace::from_path(&net.host.path()).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        Self { net, host, directory: tempfile::tempdir().unwrap(), runtime }
    }

    /// Applies two networks with the containers a, b and c. Returns the namespaces as testbed
    /// handles and as tidegate handles.
    fn with_two_networks(
        &self,
    ) -> ([tidegate_testbed::Namespace; 3], [Namespace; 3], Setup, Desired) {
        let boxes = [(); 3].map(|()| tidegate_testbed::Namespace::new());
        let [a, b, c] = [0, 1, 2].map(|at: usize| Namespace::from_path(&boxes[at].path()).unwrap());
        let mut setup = self.setup(&[("a", &a), ("b", &b), ("c", &c)]);
        let desired = two_networks();
        self.runtime.block_on(setup.apply(&desired)).unwrap();
        (boxes, [a, b, c], setup, desired)
    }

    fn setup(&self, endpoints: &[(&str, &Namespace)]) -> Setup {
        self.setup_at("test.journal", endpoints)
    }

    fn setup_at(&self, journal: &str, endpoints: &[(&str, &Namespace)]) -> Setup {
        let mut kernel = Kernel::new(self.host.clone());
        for (name, namespace) in endpoints {
            kernel.add_endpoint(name, (*namespace).clone());
        }
        let journal = Journal::open(&self.directory.path().join(journal)).unwrap();
        Setup::new(kernel, journal, RuleIsolation::default())
    }

    /// The visible state of the host: links, addresses, routes, rules.
    fn state(&self) -> String {
        let ip = |args: &[&str]| self.net.host.exec("ip", args);
        [
            ip(&["-o", "link"]),
            ip(&["-o", "addr"]),
            ip(&["route", "show", "table", "all"]),
            ip(&["-6", "route", "show", "table", "all"]),
            ip(&["rule"]),
            ip(&["-6", "rule"]),
        ]
        .join("")
        .lines()
        .filter(|line| !line.contains("expires") && !line.contains("fe80:"))
        .map(|line| format!("{line}\n"))
        .collect()
    }
}

fn interface(name: &str, number: u8) -> Interface {
    Interface { name: name.into(), mac: MacAddress([2, 0, 0, 0, 0, number]) }
}

/// Two dual-stack networks, with two endpoints on the first and one on the second.
fn two_networks() -> Desired {
    let subnet = |text: &str| {
        let subnet = text.parse().unwrap();
        Subnet { subnet, gateway: crate::gateway(subnet) }
    };
    let network = |name: &str, number: u8, inter_container| Network {
        name: name.into(),
        bridge: interface(&format!("tg-{name}"), number),
        subnets: vec![
            subnet(&format!("10.9.{number}.0/24")),
            subnet(&format!("fd09:{number}::/64")),
        ],
        internal: false,
        inter_container,
        overlay: None,
        mtu: 1500,
    };
    let endpoint = |name: &str, on: &str, number: u8, host: u8| Endpoint {
        name: name.into(),
        attachments: vec![Attachment {
            network: on.into(),
            host_end: interface(&format!("tgv-{name}"), 100 + host),
            inside: interface("eth0", 200 + host),
            addresses: vec![
                format!("10.9.{number}.{host}/24").parse().unwrap(),
                format!("fd09:{number}::{host}/64").parse().unwrap(),
            ],
            default_route: true,
            any_address: false,
        }],
    };
    Desired {
        networks: vec![network("blue", 1, true), network("red", 2, true)],
        endpoints: vec![
            endpoint("a", "blue", 1, 10),
            endpoint("b", "blue", 1, 11),
            endpoint("c", "red", 2, 12),
        ],
        ..Desired::default()
    }
}

/// Returns whether a client in `from` gets a reply from a server at `to` in `server`.
fn reaches(from: &Namespace, server: &Namespace, to: &str, timeout: Duration) -> bool {
    let to: SocketAddr = to.parse().unwrap();
    let listener = server.with(|| TcpListener::bind((to.ip(), 0))).unwrap().unwrap();
    let to = listener.local_addr().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            listener.set_nonblocking(true).unwrap();
            let start = std::time::Instant::now();
            while start.elapsed() < timeout {
                if let Ok((mut stream, _)) = listener.accept() {
                    let _ = stream.write_all(b"!");
                    return;
                }
                std::thread::sleep(Duration::from_millis(2));
            }
        });
        let stream = from.with(|| TcpStream::connect_timeout(&to, timeout)).unwrap();
        let Ok(mut stream) = stream else { return false };
        stream.set_read_timeout(Some(timeout)).unwrap();
        stream.read_exact(&mut [0]).is_ok()
    })
}

/// The operations until then are rolled back.
#[test]
fn a_stopped_change_leaves_no_objects_behind() {
    let bed = Bed::new();
    let before = bed.state();
    let boxes = tidegate_testbed::Namespace::new();
    let a = Namespace::from_path(&boxes.path()).unwrap();
    let mut setup = bed.setup(&[("a", &a), ("b", &a), ("c", &a)]);
    let stop = setup.stop_handle();
    bed.runtime.block_on(async {
        let desired = two_networks();
        let applying = setup.apply(&desired);
        tokio::pin!(applying);
        // After some of the operations.
        let pending = tokio::time::timeout(Duration::from_millis(5), &mut applying).await;
        assert!(pending.is_err(), "{pending:?}");
        stop.stop();
        assert!(matches!(applying.await, Err(SetupError::Stopped)));
    });
    assert_eq!(bed.state(), before);
    assert!(setup.owned().is_empty());
}

#[test]
fn endpoints_reach_only_their_network_and_the_host() {
    let bed = Bed::new();
    let outside = Namespace::from_path(&bed.net.client.path()).unwrap();
    let [a, b, c] = [(); 3].map(|()| Namespace::create().unwrap());
    let mut setup = bed.setup(&[("a", &a), ("b", &b), ("c", &c)]);
    // A host with forwarding enabled, as left by Docker, and an external host with routes to the
    // container subnets.
    for key in ["net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding"] {
        bed.host.set_sysctl(key, "1").unwrap();
    }
    bed.net.client.ip_all(
        "route add 10.9.0.0/16 via 203.0.113.1
         -6 route add fd09::/16 via 2001:db8:1::1",
    );
    bed.runtime.block_on(setup.apply(&two_networks())).unwrap();
    for (to_b, to_host, to_c) in [
        ("10.9.1.11:0", "10.9.1.1:0", "10.9.2.12:0"),
        ("[fd09:1::11]:0", "[fd09:1::1]:0", "[fd09:2::12]:0"),
    ] {
        assert!(reaches(&a, &b, to_b, SOON), "a neighbour at {to_b}");
        assert!(reaches(&a, &bed.host, to_host, SOON), "the host at {to_host}");
        assert!(reaches(&bed.host, &c, to_c, SOON), "the host reaches {to_c}");
        assert!(!reaches(&a, &c, to_c, NEVER), "another network at {to_c}");
        assert!(!reaches(&outside, &c, to_c, NEVER), "external access to {to_c}");
        assert!(!reaches(&outside, &b, to_b, NEVER), "external access to {to_b}");
    }
    assert!(!reaches(&a, &outside, "203.0.113.9:0", NEVER), "no egress without the engine");
    bed.runtime.block_on(setup.finish()).unwrap();
}

#[test]
fn without_inter_container_traffic_endpoints_reach_only_the_host() {
    let bed = Bed::new();
    let [a, b, c] = [(); 3].map(|()| Namespace::create().unwrap());
    let mut setup = bed.setup(&[("a", &a), ("b", &b), ("c", &c)]);
    let mut desired = two_networks();
    desired.networks[0].inter_container = false;
    bed.runtime.block_on(setup.apply(&desired)).unwrap();
    for (to_b, to_host) in [("10.9.1.11:0", "10.9.1.1:0"), ("[fd09:1::11]:0", "[fd09:1::1]:0")] {
        assert!(!reaches(&a, &b, to_b, NEVER), "a neighbour at {to_b}");
        assert!(reaches(&a, &bed.host, to_host, SOON), "the host at {to_host}");
    }
}

#[test]
fn apply_is_idempotent_and_finish_removes_everything() {
    let bed = Bed::new();
    let before = bed.state();
    let [a, b, c] = [(); 3].map(|()| Namespace::create().unwrap());
    let mut setup = bed.setup(&[("a", &a), ("b", &b), ("c", &c)]);
    assert!(bed.runtime.block_on(setup.apply(&two_networks())).unwrap() > 30);
    assert_eq!(bed.runtime.block_on(setup.apply(&two_networks())).unwrap(), 0);
    let mut less = two_networks();
    less.networks.pop();
    less.endpoints.pop();
    bed.runtime.block_on(setup.apply(&less)).unwrap();
    assert!(!bed.state().contains("tg-red") && bed.state().contains("tg-blue"));
    bed.runtime.block_on(setup.finish()).unwrap();
    assert_eq!(bed.state(), before);
    assert!(!bed.directory.path().join("test.journal").exists());
}

#[test]
fn networks_and_endpoints_are_added_and_removed_one_by_one() {
    let bed = Bed::new();
    let before = bed.state();
    let [a, b, c] = [(); 3].map(|()| Namespace::create().unwrap());
    let mut setup = bed.setup(&[]);
    let all = two_networks();
    let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
    let mut desired = Desired { networks: all.networks[..1].to_vec(), ..Desired::default() };
    bed.runtime.block_on(async {
        assert!(setup.extend(&desired, &names(&[])).await.unwrap() > 5);
        assert_eq!(setup.extend(&desired, &names(&[])).await.unwrap(), 0);
        for (endpoint, namespace) in all.endpoints[..2].iter().zip([&a, &b]) {
            setup.kernel().add_endpoint(&endpoint.name, namespace.clone());
            desired.endpoints.push(endpoint.clone());
            setup.extend(&desired, &names(&[&endpoint.name])).await.unwrap();
        }
        desired = all.clone();
        setup.kernel().add_endpoint("c", c.clone());
        setup.extend(&desired, &names(&["c"])).await.unwrap();
        assert_eq!(setup.apply(&desired).await.unwrap(), 0, "the same as applied at once");
    });
    assert!(reaches(&a, &b, "10.9.1.11:0", SOON));
    assert!(!reaches(&a, &c, "10.9.2.12:0", NEVER));

    let mut twice = desired.clone();
    twice.networks.push(Network { name: "blue2".into(), ..desired.networks[0].clone() });
    let error = bed.runtime.block_on(setup.extend(&twice, &names(&[]))).unwrap_err();
    assert!(matches!(error, SetupError::Conflict(ConflictError::SubnetsOverlap { .. })), "{error}");

    drop(c);
    bed.runtime.block_on(async {
        setup.remove_endpoint("c").await.unwrap();
        desired.endpoints.pop();
        let with_red = desired.clone();
        desired.networks.pop();
        setup.retract(&with_red, &desired).await.unwrap();
        assert_eq!(setup.apply(&desired).await.unwrap(), 0, "nothing else was changed");
    });
    assert!(reaches(&a, &b, "10.9.1.11:0", SOON));
    bed.runtime.block_on(async {
        for name in ["a", "b"] {
            setup.remove_endpoint(name).await.unwrap();
        }
        desired.endpoints.clear();
        setup.retract(&desired, &Desired::default()).await.unwrap();
    });
    assert_eq!(setup.owned(), []);
    assert_eq!(bed.state(), before);
    bed.runtime.block_on(setup.finish()).unwrap();
}

/// Simulates a kill at every operation: before it is performed, and after it is performed but
/// before it is recorded.
#[test]
fn next_process_clears_the_state_of_a_killed_one() {
    let bed = Bed::new();
    let before = bed.state();
    let count = {
        let names = [(); 3].map(|()| Namespace::create().unwrap());
        let mut setup = bed.setup(&[("a", &names[0]), ("b", &names[1]), ("c", &names[2])]);
        let count = bed.runtime.block_on(setup.plan(&two_networks())).unwrap().len();
        bed.runtime.block_on(setup.finish()).unwrap();
        count
    };
    for killed_at in 0..count {
        for asked in [false, true] {
            let [a, b, c] = [(); 3].map(|()| Namespace::create().unwrap());
            let mut setup = bed.setup(&[("a", &a), ("b", &b), ("c", &c)]);
            bed.runtime.block_on(async {
                let ops = setup.plan(&two_networks()).await.unwrap();
                setup.journal.before(&ops).unwrap();
                for op in &ops[..killed_at + usize::from(asked)] {
                    setup.kernel.execute(op).await.unwrap();
                }
            });
            // The namespaces persist, like those held by a container runtime.
            drop(setup);
            let mut next = bed.setup(&[]);
            bed.runtime.block_on(next.clear()).unwrap();
            assert_eq!(bed.state(), before, "killed at step {killed_at}, asked {asked}");
            bed.runtime.block_on(next.finish()).unwrap();
        }
    }
}

#[test]
fn failed_operation_rolls_back_previous_ones() {
    let bed = Bed::new();
    let before = bed.state();
    let [a, b] = [(); 2].map(|()| Namespace::create().unwrap());
    // The namespace of the third endpoint is unknown, as if it had been deleted.
    let mut setup = bed.setup(&[("a", &a), ("b", &b)]);
    let error = bed.runtime.block_on(setup.apply(&two_networks())).unwrap_err().to_string();
    assert!(error.contains("endpoint \"c\""), "{error}");
    assert_eq!(bed.state(), before);
    assert_eq!(setup.owned(), []);
}

#[test]
fn foreign_interface_with_the_same_name_is_left_alone() {
    let bed = Bed::new();
    let [a, b, c] = [(); 3].map(|()| Namespace::create().unwrap());
    let mut setup = bed.setup(&[("a", &a), ("b", &b), ("c", &c)]);
    bed.runtime.block_on(setup.apply(&two_networks())).unwrap();
    bed.net.host.ip_all("link del tg-blue\nlink add tg-blue type bridge");
    drop(setup);
    let mut next = bed.setup(&[]);
    bed.runtime.block_on(next.clear()).unwrap();
    assert!(bed.state().contains("tg-blue"));
    assert!(!bed.state().contains("tg-red"));
    let error = bed.runtime.block_on(next.apply(&two_networks())).unwrap_err().to_string();
    assert!(error.contains("\"tg-blue\" on the host already exists"), "{error}");
}

#[test]
fn conflicting_route_is_an_error_and_nothing_is_changed() {
    let bed = Bed::new();
    bed.net.host.ip_all("route add 10.9.1.128/25 via 203.0.113.9");
    let before = bed.state();
    let mut setup = bed.setup(&[]);
    let mut desired = two_networks();
    desired.endpoints.clear();
    let error = bed.runtime.block_on(setup.apply(&desired)).unwrap_err().to_string();
    assert!(
        error.starts_with("network \"blue\": subnet 10.9.1.0/24 overlaps 10.9.1.128/25"),
        "{error}"
    );
    assert_eq!(bed.state(), before);
    assert!(Path::new(&bed.directory.path().join("test.journal")).exists());
}

/// Almost as many endpoints as a bridge has ports. The times are printed, not checked; performance
/// is covered by the benchmark.
#[test]
fn thousand_endpoints_are_set_up_and_removed() {
    const COUNT: u16 = 1000;
    let bed = Bed::new();
    let before = bed.state();
    let mut desired = two_networks();
    desired.networks.pop();
    desired.networks[0].subnets = vec![Subnet {
        subnet: "10.9.0.0/16".parse().unwrap(),
        gateway: "10.9.0.1".parse().unwrap(),
    }];
    let namespaces: Vec<Namespace> = (0..COUNT).map(|_| Namespace::create().unwrap()).collect();
    let mut setup = bed.setup(&[]);
    desired.endpoints = (0..COUNT)
        .map(|number| {
            let [high, low] = number.to_be_bytes();
            let name = format!("e{number}");
            setup.kernel().add_endpoint(&name, namespaces[usize::from(number)].clone());
            Endpoint {
                name,
                attachments: vec![Attachment {
                    network: "blue".into(),
                    host_end: Interface {
                        name: format!("tgv-{number}"),
                        mac: MacAddress([2, 0, 0, 1, high, low]),
                    },
                    inside: Interface {
                        name: "eth0".into(),
                        mac: MacAddress([2, 0, 0, 2, high, low]),
                    },
                    addresses: vec![format!("10.9.{}.{low}/16", high + 1).parse().unwrap()],
                    default_route: true,
                    any_address: false,
                }],
            }
        })
        .collect();
    let start = std::time::Instant::now();
    bed.runtime.block_on(setup.apply(&desired)).unwrap();
    println!("{COUNT} endpoints after {:?}", start.elapsed());
    bed.runtime.block_on(setup.finish()).unwrap();
    println!("and gone after {:?}", start.elapsed());
    assert_eq!(bed.state(), before);
}

/// Reattaches endpoint `a` of blue in another namespace, as after a container restart.
#[test]
fn endpoint_is_reattached_without_affecting_neighbours() {
    let bed = Bed::new();
    let before = bed.state();
    let [a, b, c, again] = [(); 4].map(|()| Namespace::create().unwrap());
    let mut setup = bed.setup(&[("a", &a), ("b", &b), ("c", &c)]);
    let desired = two_networks();
    bed.runtime.block_on(setup.apply(&desired)).unwrap();
    let owned = setup.owned().len();
    let neighbours = |state: String| -> Vec<String> {
        state
            .lines()
            .filter(|line| line.contains("tgv-b") || line.contains("tgv-c"))
            .map(str::to_owned)
            .collect()
    };
    let (there, theirs) = (a.id(), neighbours(bed.state()));
    for namespace in [&again, &a, &again] {
        bed.runtime.block_on(setup.reattach(&desired, "a", namespace.clone())).unwrap();
        assert!(reaches(&b, namespace, "10.9.1.10:0", SOON));
        assert_eq!(setup.owned().len(), owned, "no duplicate facts");
    }
    assert_eq!(a.id(), there);
    assert!(
        a.sysctl("net.ipv4.conf.eth0.forwarding").is_err(),
        "nothing remains in the old namespace"
    );
    assert_eq!(neighbours(bed.state()), theirs);
    assert_eq!(bed.runtime.block_on(setup.apply(&desired)).unwrap(), 0);
    bed.runtime.block_on(setup.finish()).unwrap();
    assert_eq!(bed.state(), before);
}

#[test]
fn reattach_fails_without_changes_if_the_interface_name_is_in_use() {
    let bed = Bed::new();
    let [a, b, c, full] = [(); 4].map(|()| Namespace::create().unwrap());
    let mut setup = bed.setup(&[("a", &a), ("b", &b), ("c", &c)]);
    let desired = two_networks();
    bed.runtime.block_on(setup.apply(&desired)).unwrap();
    let mut other = bed.setup_at("other.journal", &[("full", &full)]);
    let mut elsewhere = two_networks();
    elsewhere.networks.truncate(1);
    elsewhere.networks[0].bridge = interface("tg-other", 77);
    elsewhere.networks[0].subnets.truncate(1);
    elsewhere.networks[0].subnets[0].subnet = "10.9.7.0/24".parse().unwrap();
    elsewhere.networks[0].subnets[0].gateway = "10.9.7.1".parse().unwrap();
    elsewhere.endpoints.truncate(1);
    elsewhere.endpoints[0].name = "full".into();
    elsewhere.endpoints[0].attachments[0].host_end = interface("tgv-full", 78);
    elsewhere.endpoints[0].attachments[0].inside = interface("eth0", 79);
    elsewhere.endpoints[0].attachments[0].addresses = vec!["10.9.7.2/24".parse().unwrap()];
    bed.runtime.block_on(other.apply(&elsewhere)).unwrap();
    let before = bed.state();
    let error = bed.runtime.block_on(setup.reattach(&desired, "a", full)).unwrap_err().to_string();
    assert!(error.contains("\"eth0\" on endpoint \"a\" already exists"), "{error}");
    assert_eq!(bed.state(), before);
    assert!(reaches(&b, &a, "10.9.1.10:0", SOON));
}

#[test]
fn externally_removed_objects_are_restored_and_reported_once() {
    let bed = Bed::new();
    let (boxes, [a, b, _], mut setup, desired) = bed.with_two_networks();
    let journal = setup.owned().len();
    let (host, inside) = (&bed.net.host, &boxes[0]);
    // Changes of a pair also affect the endpoint.
    let state = || format!("{}{}", bed.state(), inside.exec("ip", &["-o", "addr"]));
    let fdb = || host.exec("bridge", &["fdb", "show", "br", "tg-blue"]);
    assert!(fdb().contains("02:00:00:00:00:d2 dev tgv-a master tg-blue static"), "{}", fdb());
    let moved = format!("ip link set tgv-a netns {}", boxes[1].path().display());
    let tried: [(&tidegate_testbed::Namespace, &str, &[&str]); 18] = [
        (host, "ip link del tg-blue", &["bridge"]),
        (host, "ip link set tg-blue mtu 1400", &["bridge"]),
        (host, "ip link set tg-blue down", &["link"]),
        (host, "ip link del tgv-a", &["veth"]),
        (inside, "ip link del eth0", &["veth"]),
        (inside, "ip link set eth0 down; ip link set eth0 name other", &["veth"]),
        (
            host,
            "ip link set tgv-a down; ip link set tgv-a name other; ip link set other up",
            &["veth"],
        ),
        (host, &moved, &["veth"]),
        (host, "ip link set tgv-a nomaster", &["port"]),
        (host, "bridge fdb del 02:00:00:00:00:d2 dev tgv-a master static", &["fdb"]),
        (host, "ip addr del 10.9.1.1/24 dev tg-blue", &["address"]),
        (inside, "ip addr del fd09:1::10/64 dev eth0", &["address"]),
        (inside, "ip addr del 127.0.0.1/8 dev lo", &["address"]),
        (host, "ip route del 10.9.1.0/24 dev tg-blue", &["route"]),
        (inside, "ip route del default; ip -6 route del default", &["route", "route"]),
        (inside, "ip link set eth0 down", &["link"]),
        (inside, "sysctl -q net.ipv6.conf.eth0.accept_ra=1", &["sysctl"]),
        (host, "ip rule del to 10.9.1.0/24", &["rule"]),
    ];
    for (place, script, kinds) in tried {
        place.exec("sh", &["-ec", script]);
        let endpoints = BTreeSet::from(["a".to_owned()]);
        let repaired = bed.runtime.block_on(setup.repair(&desired, true, &endpoints));
        assert!(repaired.failed.is_empty(), "{script}: {:?}", repaired.failed);
        assert!(repaired.detached.is_empty(), "{script}");
        let found: Vec<_> =
            repaired.restored.iter().map(|fact| RepairKind::of(fact).as_str()).collect();
        assert_eq!(found, kinds, "{script}: {:?}", repaired.restored);
        let again = bed.runtime.block_on(setup.repair(&desired, true, &endpoints));
        assert!(again.restored.is_empty() && again.failed.is_empty(), "{script}: {again:?}");
        assert!(reaches(&a, &b, "10.9.1.11:0", SOON), "{script}: {}", state());
        assert!(reaches(&a, &b, "[fd09:1::11]:0", SOON), "{script}: {}", state());
    }
    assert_eq!(setup.owned().len(), journal, "each fact once, and no implicit ones");
    host.ip(&["link", "del", "tgv-c"]);
    let repaired = bed.runtime.block_on(setup.repair(&desired, true, &BTreeSet::new()));
    assert_eq!(repaired.detached, BTreeSet::from(["c".to_owned()]));
    assert!(repaired.restored.is_empty(), "{:?}", repaired.restored);
}

#[test]
fn foreign_link_in_a_container_does_not_block_other_repairs() {
    let bed = Bed::new();
    let (boxes, _, mut setup, desired) = bed.with_two_networks();
    boxes[0].ip_all("link del eth0\nlink add eth0 type bridge");
    boxes[1].ip(&["link", "del", "eth0"]);
    bed.net.host.ip(&["addr", "del", "10.9.1.1/24", "dev", "tg-blue"]);
    let endpoints = ["a", "b", "c"].map(str::to_owned).into();
    let repaired = bed.runtime.block_on(setup.repair(&desired, true, &endpoints));
    let kinds: Vec<_> = repaired.restored.iter().map(RepairKind::of).collect();
    assert_eq!(kinds, [RepairKind::Address, RepairKind::Veth]);
    let [(Some(endpoint), error)] = &repaired.failed[..] else { panic!("{:?}", repaired.failed) };
    assert_eq!(endpoint, "a");
    assert!(error.to_string().contains("\"eth0\" on endpoint \"a\" already exists"), "{error}");
}

/// The veth end is identified by its peer, so a link with the same name and MAC address is not
/// mistaken for it.
#[test]
fn link_that_replaces_a_veth_end_gets_no_addresses() {
    let bed = Bed::new();
    let (boxes, [a, b, _], mut setup, desired) = bed.with_two_networks();
    let (inside, endpoints) = (&boxes[0], BTreeSet::from(["a".to_owned()]));
    let mac = desired.endpoints[0].attachments[0].inside.mac;
    for dummy in [
        "type bridge".to_owned(),
        format!("address {mac} type bridge"),
        format!("address {mac} type veth"),
    ] {
        let script = format!(
            "ip link set eth0 down; ip link set eth0 name real; ip link add eth0 {dummy}; ip link set eth0 up; \
             ip addr del 127.0.0.1/8 dev lo"
        );
        inside.exec("sh", &["-ec", &script]);
        let repaired = bed.runtime.block_on(setup.repair(&desired, true, &endpoints));
        let [(Some(endpoint), error)] = &repaired.failed[..] else {
            panic!("{:?}", repaired.failed)
        };
        assert_eq!(endpoint, "a");
        assert!(error.to_string().contains("\"eth0\" on endpoint \"a\" already exists"), "{error}");
        let kinds: Vec<_> = repaired.restored.iter().map(RepairKind::of).collect();
        assert_eq!(kinds, [RepairKind::Address], "of lo: {:?}", repaired.restored);
        let shown = inside.exec("ip", &["-o", "addr", "show", "dev", "eth0"]);
        assert!(!shown.contains("10.9.1.10") && !shown.contains("fd09:1::10"), "{shown}");
        inside.ip(&["link", "del", "eth0"]);
        let repaired = bed.runtime.block_on(setup.repair(&desired, true, &endpoints));
        assert!(repaired.failed.is_empty(), "{:?}", repaired.failed);
        let kinds: Vec<_> = repaired.restored.iter().map(RepairKind::of).collect();
        assert_eq!(kinds, [RepairKind::Veth], "{dummy}");
        assert!(reaches(&a, &b, "10.9.1.11:0", SOON), "{dummy}");
    }
}

/// The 100,000 routes of the endpoint are not read.
#[test]
fn routes_of_an_endpoint_do_not_delay_repairs() {
    let bed = Bed::new();
    let (boxes, _, mut setup, desired) = bed.with_two_networks();
    boxes[0].ip_all("link add more type bridge\nlink set more up");
    let routes = "seq 0 99999 | awk '{ printf \"route add 11.%d.%d.%d dev more\\n\", $1 / 65536, $1 / 256 % 256, $1 % 256 }'";
    boxes[0].exec("sh", &["-ec", &format!("{routes} | ip -batch -")]);
    boxes[0].ip(&["addr", "del", "10.9.1.10/24", "dev", "eth0"]);
    let begun = std::time::Instant::now();
    let repaired =
        bed.runtime.block_on(setup.repair(&desired, false, &BTreeSet::from(["a".to_owned()])));
    let took = begun.elapsed();
    assert!(repaired.failed.is_empty(), "{:?}", repaired.failed);
    let kinds: Vec<_> = repaired.restored.iter().map(RepairKind::of).collect();
    assert_eq!(kinds, [RepairKind::Address]);
    assert!(took < Duration::from_millis(100), "{took:?}");
}
