//! Agents of several hosts, which are namespaces, over a store in this process.

mod common;

use common::{Hosts, mac, reaches, vtep};
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tidegate_mesh::agent::{Agent, Names, Options};
use tidegate_mesh::device::{DeviceSpec, Links};
use tidegate_mesh::membership::{self, Own};
use tidegate_mesh::overlay::Entries;
use tidegate_mesh::programmer::LocalNetwork;
use tidegate_mesh::record::{Endpoint, EndpointState, Network, Node, Role, Subnet};
use tidegate_mesh::store::{
    Changes, ClusterStore, Connect, Embedded, Entry, LeaseId, Revision, StoreFuture, Transaction,
    Watch,
};
use tidegate_testbed::{Namespace, eventually};

const SOON: Duration = Duration::from_secs(10);

/// Names of other hosts, by network.
#[derive(Clone, Default)]
struct Known(Arc<Mutex<BTreeMap<String, Vec<String>>>>);

impl Names for Known {
    fn set(&mut self, network: &str, endpoints: &BTreeMap<String, Endpoint>) {
        let names = endpoints.keys().cloned().collect();
        self.0.lock().unwrap().insert(network.to_owned(), names);
    }
}

struct Host {
    agent: Agent,
    names: Known,
    id: String,
}

fn own(number: usize) -> Own {
    let id = format!("host-{number}");
    let node = Node {
        index: 0,
        vtep: vtep(number, false),
        boot: format!("boot of {id}"),
        machine: format!("machine of {id}"),
        mtu: 1500,
    };
    let underlay = vec!["192.0.2.0/24".parse().unwrap()];
    let (endpoints, bindings) = Default::default();
    Own { id, node, underlay, endpoints, bindings }
}

fn front() -> LocalNetwork {
    LocalNetwork { name: "front".into(), vni: 0x123456, bridge: "front".into(), mtu: 1450 }
}

fn network() -> Network {
    let subnet = |subnet: &str, gateway: &str| Subnet {
        subnet: subnet.parse().unwrap(),
        gateway: gateway.parse().unwrap(),
    };
    let subnets = vec![subnet("10.9.0.0/24", "10.9.0.1"), subnet("fd09::/64", "fd09::1")];
    Network { vni: 0x123456, subnets, mtu: 1450, internal: false }
}

/// Starts the agent of host `number` with the network `front`.
fn start(hosts: &Hosts, store: &(impl Connect + Clone + 'static), own: Own, number: usize) -> Host {
    let namespace = tidegate_netns::Namespace::from_path(&hosts.hosts[number].path()).unwrap();
    let (names, id) = (Known::default(), own.id.clone());
    let agent = Agent::start(Options {
        own,
        store: Arc::new(store.clone()),
        namespace,
        networks: vec![front()],
        follower: Box::new(|_| {}),
        names: Box::new(names.clone()),
        reports: tokio::sync::watch::Sender::new(None),
    });
    Host { agent: agent.unwrap(), names, id }
}

fn endpoint(host: &Host, id: u8) -> Endpoint {
    Endpoint {
        node: host.id.clone(),
        generation: id.into(),
        addresses: vec![[10, 9, 0, id].into(), format!("fd09::{id}").parse().unwrap()],
        mac: mac(id),
        state: EndpointState::Ready,
        aliases: Vec::new(),
        hostname: None,
        role: Role::Container,
    }
}

fn wait<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(future)
}

fn attach(host: &Host, id: u8) -> Result<(), String> {
    let name = format!("c{id}");
    let claimed = host.agent.claim("front", &name, endpoint(host, id));
    wait(claimed).map_err(|error| error.to_string())
}

/// Three hosts in one cluster with the network `front`.
fn three() -> (Hosts, Embedded, Vec<Host>) {
    let (hosts, store) = (Hosts::new(3), Embedded::new());
    let agents: Vec<_> = (0..3).map(|number| start(&hosts, &store, own(number), number)).collect();
    for host in &agents {
        wait(host.agent.joined(SOON)).unwrap();
    }
    wait(agents[0].agent.create("front", network())).unwrap();
    for host in &agents {
        let mut cluster = host.agent.cluster();
        wait(cluster.wait_for(|cluster| cluster.view.networks.contains_key("front"))).unwrap();
    }
    (hosts, store, agents)
}

fn sees(host: &Host, names: &[&str]) {
    let mut last = Vec::new();
    let is_so = eventually(SOON, || {
        let known = host.names.0.lock().unwrap().get("front").cloned().unwrap_or_default();
        last = known;
        last == names
    });
    assert!(is_so, "{}: {last:?}", host.id);
}

/// Attached containers c7 of the first host and c8 of the second one.
fn two_containers(hosts: &Hosts, agents: &[Host]) -> [Namespace; 2] {
    let containers = [hosts.container(0, 7), hosts.container(1, 8)];
    attach(&agents[0], 7).unwrap();
    attach(&agents[1], 8).unwrap();
    sees(&agents[0], &["c8"]);
    containers
}

#[test]
fn endpoints_are_programmed_and_named_on_all_hosts_and_removed() {
    let (hosts, _store, agents) = three();
    let containers: Vec<Namespace> =
        (0..3).map(|number| hosts.container(number, 7 + number as u8)).collect();
    for (host, id) in agents.iter().zip(7..) {
        attach(host, id).unwrap();
    }
    sees(&agents[0], &["c8", "c9"]);
    sees(&agents[2], &["c7", "c8"]);
    for to in ["10.9.0.8", "10.9.0.9", "fd09::9"] {
        assert!(reaches(&containers[0], to), "{to}");
    }
    wait(agents[2].agent.release("front", "c9")).unwrap();
    sees(&agents[0], &["c8"]);
    assert!(!reaches(&containers[0], "10.9.0.9"), "removed");
    let error = attach(&agents[1], 9).unwrap_err();
    assert!(error.contains("was released recently"), "{error}");
    assert!(reaches(&containers[0], "10.9.0.8"));
}

#[test]
fn a_host_that_cannot_be_in_the_cluster_is_told_why() {
    let (hosts, store, agents) = three();
    drop(agents);
    let same = Own { id: "other".into(), ..own(1) };
    let host = start(&hosts, &store, same, 1);
    let error = wait(host.agent.joined(SOON)).unwrap_err().to_string();
    assert!(error.starts_with("192.0.2.2 is the address of host host-1"), "{error}");
    drop(host);
    let mut named = own(2);
    named.id = "host-1".into();
    let host = start(&hosts, &store, named, 2);
    let error = wait(host.agent.joined(SOON)).unwrap_err().to_string();
    assert!(error.contains("host host-1 is in the cluster already, on another machine"), "{error}");
}

#[test]
fn names_addresses_and_networks_have_one_owner() {
    let (_hosts, _store, agents) = three();
    attach(&agents[0], 7).unwrap();
    let error = wait(agents[1].agent.claim("front", "c7", endpoint(&agents[1], 8))).unwrap_err();
    let expected = "endpoint c7: host host-0 has an endpoint with this name on network front";
    assert_eq!(error.to_string(), expected);
    let error = wait(agents[1].agent.claim("front", "thief", endpoint(&agents[1], 7))).unwrap_err();
    let expected =
        "endpoint thief: 10.9.0.7 on network front is in use by endpoint c7 of host host-0";
    assert_eq!(error.to_string(), expected);
    let error = wait(agents[1].agent.create("front", network())).unwrap_err();
    assert_eq!(error.to_string(), "network front exists in the cluster");
    let error = wait(agents[1].agent.create("back", network())).unwrap_err();
    assert!(error.to_string().contains("overlaps 10.9.0.0/24 of network front"), "{error}");
    let error = wait(agents[1].agent.delete("front")).unwrap_err();
    assert!(error.to_string().contains("c7 on host-0; detach them first"), "{error}");
    wait(agents[0].agent.release("front", "c7")).unwrap();
    wait(agents[1].agent.delete("front")).unwrap();
}

/// A store whose watches are late, as those of a host far from the store.
#[derive(Clone, Debug)]
struct Late(Embedded);

struct LateWatch(Box<dyn Watch>);

impl Connect for Late {
    fn connect(&self) -> StoreFuture<'_, Arc<dyn ClusterStore>> {
        Box::pin(async { Ok(Arc::new(self.clone()) as Arc<dyn ClusterStore>) })
    }
}

impl ClusterStore for Late {
    fn list<'a>(&'a self, prefix: &'a str) -> StoreFuture<'a, (Vec<Entry>, Revision)> {
        self.0.list(prefix)
    }
    fn commit(&self, transaction: Transaction) -> StoreFuture<'_, Option<Revision>> {
        self.0.commit(transaction)
    }
    fn grant(&self, ttl: Duration) -> StoreFuture<'_, LeaseId> {
        self.0.grant(ttl)
    }
    fn keep_alive(&self, lease: LeaseId) -> StoreFuture<'_, ()> {
        self.0.keep_alive(lease)
    }
    fn revoke(&self, lease: LeaseId) -> StoreFuture<'_, ()> {
        self.0.revoke(lease)
    }
    fn watch<'a>(&'a self, prefix: &'a str, after: Revision) -> StoreFuture<'a, Box<dyn Watch>> {
        Box::pin(async move {
            let watch = self.0.watch(prefix, after).await?;
            Ok(Box::new(LateWatch(watch)) as Box<dyn Watch>)
        })
    }
}

impl Watch for LateWatch {
    fn next(&mut self) -> StoreFuture<'_, Changes> {
        Box::pin(async {
            let changes = self.0.next().await;
            tokio::time::sleep(Duration::from_millis(500)).await;
            changes
        })
    }
}

/// A name that another host has released can be claimed at once, also where the release is not
/// known yet. A name that is in use stays refused.
#[test]
fn a_released_name_is_free_on_a_host_whose_watch_is_late() {
    let (hosts, store, mut agents) = three();
    drop(agents.pop());
    let late = start(&hosts, &Late(store), own(2), 2);
    wait(late.agent.joined(SOON)).unwrap();
    attach(&agents[0], 7).unwrap();
    sees(&late, &["c7"]);
    wait(agents[0].agent.release("front", "c7")).unwrap();
    wait(late.agent.claim("front", "c7", endpoint(&late, 8))).unwrap();
    sees(&agents[0], &["c7"]);
    let error = wait(agents[0].agent.claim("front", "c7", endpoint(&agents[0], 9))).unwrap_err();
    assert!(error.to_string().contains("host host-2 has an endpoint with this name"), "{error}");
    // The late watch shows the release and the former endpoint: nothing is lost by that.
    std::thread::sleep(Duration::from_secs(2));
    sees(&agents[0], &["c7"]);
    assert!(wait(late.agent.status()).unwrap().problems.is_empty());
}

/// The store forgets the records of a host whose lease ends. Hosts that hear it keep them.
#[test]
fn records_of_a_host_outlive_its_lease_while_it_is_heard() {
    let (hosts, store, mut agents) = three();
    let containers = two_containers(&hosts, &agents);
    let all_heard = eventually(SOON, || {
        let status = wait(agents[0].agent.status()).unwrap();
        status.hosts.iter().all(|host| host.is_heard)
    });
    assert!(all_heard);
    let lease = wait(async {
        use tidegate_mesh::store::ClusterStore;
        let (entries, _) = store.list("/tidegate/1/nodes/host-1").await.unwrap();
        let lease = entries[0].lease.unwrap();
        store.revoke(lease).await.unwrap();
        lease
    });
    // It registers again with another lease; meanwhile nothing was removed.
    for _ in 0..20 {
        assert!(reaches(&containers[0], "10.9.0.8"));
        sees(&agents[0], &["c8"]);
        std::thread::sleep(Duration::from_millis(20));
    }
    let registered = eventually(SOON, || {
        use tidegate_mesh::store::ClusterStore;
        let (entries, _) = wait(store.list("/tidegate/1/endpoints/front/c8")).unwrap();
        entries.first().is_some_and(|entry| entry.lease != Some(lease))
    });
    assert!(registered);
    // A host that is gone is forgotten with its lease, but keeps its addresses.
    drop(agents.remove(1));
    sees(&agents[0], &[]);
    assert!(!reaches(&containers[0], "10.9.0.8"));
    let error = wait(agents[0].agent.claim("front", "c8", endpoint(&agents[0], 8))).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("10.9.0.8 on network front is in use by endpoint c8 of host host-1"),
        "{error}"
    );
    wait(agents[0].agent.remove_host("host-1")).unwrap();
    let error = wait(agents[0].agent.claim("front", "c8", endpoint(&agents[0], 8))).unwrap_err();
    assert!(error.to_string().contains("was released recently"), "{error}");
}

#[test]
fn leaving_removes_devices_rules_and_records() {
    let (hosts, store, agents) = three();
    attach(&agents[0], 7).unwrap();
    let tables = || hosts.hosts[0].exec("nft", &["list", "tables"]);
    assert!(tables().contains("tidegate_mesh"), "{}", tables());
    wait(agents[0].agent.leave()).unwrap();
    assert_eq!(tables(), "");
    assert_eq!(hosts.hosts[0].ip(&["link", "show", "type", "vxlan"]), "");
    let (entries, _) = {
        use tidegate_mesh::store::ClusterStore;
        wait(store.list("/tidegate/1/")).unwrap()
    };
    let (view, _) = tidegate_mesh::view::View::of(&entries, Revision(1));
    assert!(!view.nodes.contains_key("host-0") && view.endpoints.is_empty());
    assert!(membership::deletion(&view, "front").is_ok(), "no claim is left");
    let address: IpAddr = [10, 9, 0, 7].into();
    assert!(membership::free_addresses(&view, "front", &[], 0).unwrap()[0] != address);
}

/// As after a restart: devices and entries of the previous agent carry traffic meanwhile.
#[test]
fn an_agent_adopts_what_the_previous_one_has_left() {
    let (hosts, store, mut agents) = three();
    let containers = two_containers(&hosts, &agents);
    let link = || hosts.hosts[0].ip(&["-o", "link", "show", "type", "vxlan"]);
    let before = link();
    let host = agents.remove(0);
    let mut again = own(0);
    again.endpoints.insert(("front".into(), "c7".into()), endpoint(&host, 7));
    drop(host);
    assert!(reaches(&containers[0], "10.9.0.8"), "without an agent");
    // Something has changed meanwhile.
    attach(&agents[1], 9).unwrap();
    let host = start(&hosts, &store, again, 0);
    sees(&host, &["c8", "c9"]);
    assert!(reaches(&containers[0], "10.9.0.8"));
    assert_eq!(link(), before);
    // Other software removes the device and the rules.
    hosts.hosts[0].ip(&["link", "del", "tgx123456"]);
    assert!(eventually(SOON, || reaches(&containers[0], "10.9.0.8")));
}

/// Operations in random order, among them those of other software. In the end, the kernel of each
/// host has exactly the entries of the endpoints on other hosts.
#[test]
fn kernels_follow_random_operations() {
    const OPERATIONS: usize = 40;
    for seed in 1..=3_u64 {
        let (hosts, store, mut agents) = three();
        // The state of the generator of Marsaglia (xorshift64).
        let mut state = seed;
        let mut random = |below: usize| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state % below as u64) as usize
        };
        // The host and the address of each name.
        let mut model: BTreeMap<String, (usize, u8)> = BTreeMap::new();
        for id in 2..2 + OPERATIONS as u8 {
            let (at, name) = (random(3), format!("c{}", random(6)));
            let host = &hosts.hosts[at];
            match random(10) {
                0 => drop(host.command("ip").args(["link", "del", "tgx123456"]).output()),
                1 => drop(host.command("ip").args(["neigh", "flush", "dev", "front"]).output()),
                2 => {
                    let forged = ["fdb", "add", "02:00:00:00:00:aa", "dev", "tgx123456"];
                    let more = ["dst", "192.0.2.2", "self"];
                    drop(host.command("bridge").args(forged).args(more).output());
                }
                3 => {
                    let mut own = own(at);
                    for (name, (_, id)) in model.iter().filter(|(_, (host, _))| *host == at) {
                        own.endpoints
                            .insert(("front".into(), name.clone()), endpoint(&agents[at], *id));
                    }
                    // The former agent ends first.
                    let previous = agents.remove(at);
                    drop(previous);
                    agents.insert(at, start(&hosts, &store, own, at));
                    wait(agents[at].agent.joined(SOON)).unwrap();
                }
                _ => match model.remove(&name) {
                    Some((at, _)) => wait(agents[at].agent.release("front", &name)).unwrap(),
                    None => {
                        let endpoint = endpoint(&agents[at], id);
                        wait(agents[at].agent.claim("front", &name, endpoint)).unwrap();
                        model.insert(name, (at, id));
                    }
                },
            }
        }
        for number in 0..3 {
            let mut expected = Entries::default();
            for (at, id) in model.values().filter(|(at, _)| *at != number) {
                expected.stations.insert(mac(*id), vtep(*at, false));
                for address in endpoint(&agents[*at], *id).addresses {
                    expected.neighbours.insert(address, mac(*id));
                }
            }
            let mut found = None;
            let holds = eventually(SOON, || {
                found = kernel_entries(&hosts, number);
                found.as_ref() == Some(&expected)
            });
            assert!(holds, "seed {seed}, host {number}: {found:#?}\nexpected {expected:#?}");
        }
    }
}

/// The entries of the overlay network on host `number`, if it has the device.
fn kernel_entries(hosts: &Hosts, number: usize) -> Option<Entries> {
    let shown = hosts.hosts[number].command("ip").args(["link", "show", "tgx123456"]).output();
    if !shown.unwrap().status.success() {
        return None;
    }
    wait(async {
        let namespace = tidegate_netns::Namespace::from_path(&hosts.hosts[number].path()).unwrap();
        let links = Links::open(&namespace).unwrap();
        let spec = DeviceSpec {
            name: "tgx123456".into(),
            bridge: "front".into(),
            vni: 0x123456,
            vtep: vtep(number, false),
            mtu: 1450,
        };
        let device = links.ensure(&spec, |_| Ok(())).await.ok()?;
        device.entries().await.ok()
    })
}
