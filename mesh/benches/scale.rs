//! What a large cluster costs one of its hosts, by the pure parts: no kernel, no network, no store.
//!
//! | column | measures |
//! |---|---|
//! | state | size of all records |
//! | list | all records are read, as after a start or a compaction |
//! | change | one endpoint changes: it is read, and the entries of its network are derived and compared |
//! | tasks | the tasks of a service with a tenth of all endpoints are derived |
//! | choice | the next task of that service is chosen: in turn, and by source |
//! | table | the Maglev table of that service is built |
//! | entries | entries of the forwarding database and neighbours on one host |
//! | heartbeats | sent and received by one host |
//!
//! `cargo bench -p tidegate-mesh --bench scale`

use std::collections::BTreeMap;
use std::hint::black_box;
use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};
use tidegate_mesh::balance::{Balancer, Method, Target, TargetId};
use tidegate_mesh::liveness::{Heartbeat, INTERVAL};
use tidegate_mesh::membership::MAX_HOSTS;
use tidegate_mesh::overlay::{changes, desired};
use tidegate_mesh::record::{
    Claim, ClientSource, Endpoint, EndpointState, Network, Node, Record, Role, Service,
    ServicePort, Subnet,
};
use tidegate_mesh::services::tasks;
use tidegate_mesh::store::{Changes, Entry, Event, Revision};
use tidegate_mesh::view::View;
use tidegate_model::{MacAddress, Protocol};

/// Networks, over which endpoints are spread.
const NETWORKS: usize = 10;

fn entry(record: &Record) -> Entry {
    let (key, value) = record.encode();
    Entry { key: key.to_string(), value, lease: None, modified: Revision(1) }
}

fn network(number: usize) -> String {
    format!("net-{}", number % NETWORKS)
}

fn endpoint(number: usize, hosts: usize, generation: u64) -> Record {
    let [_, a, b, c] = (number as u32).to_be_bytes();
    let role = match number % NETWORKS {
        0 => Role::Task { service: "shop".into(), weight: 1 },
        _ => Role::Container,
    };
    let endpoint = Endpoint {
        node: format!("host-{}", number % hosts),
        generation,
        addresses: vec![address(number)],
        mac: MacAddress([2, 0, 0, a, b, c]),
        state: EndpointState::Ready,
        aliases: Vec::new(),
        hostname: None,
        role,
    };
    Record::Endpoint(network(number), format!("endpoint-{number}"), endpoint)
}

/// The address of an endpoint. Each network has a /16.
fn address(number: usize) -> IpAddr {
    let (network, host) = (number % NETWORKS, number / NETWORKS + 2);
    IpAddr::V4(Ipv4Addr::from_bits(0x0a00_0000 | (network as u32) << 16 | host as u32))
}

fn records(hosts: usize, endpoints: usize) -> Vec<Entry> {
    let mut records = Vec::new();
    for number in 0..hosts {
        let node = Node {
            index: number as u16 + 1,
            vtep: [192, 0, 2, number as u8].into(),
            boot: "4f3b6a0e-2f0c-4a39-9d52-6f6b5d1c0a77".into(),
            machine: "0123456789".into(),
            mtu: 1_500,
        };
        records.push(Record::Node(format!("host-{number}"), node));
        records.push(Record::NodeIndex(number as u16 + 1, format!("host-{number}")));
    }
    for number in 0..NETWORKS {
        let subnet = Subnet {
            subnet: format!("10.{number}.0.0/16").parse().unwrap(),
            gateway: [10, number as u8, 0, 1].into(),
        };
        let network =
            Network { vni: 9 + number as u32, subnets: vec![subnet], mtu: 1_450, internal: false };
        records.push(Record::Network(self::network(number), network));
    }
    let shop = Service {
        network: network(0),
        ports: vec![ServicePort { protocol: Protocol::Tcp, published: 80, target: 8080 }],
        balance: Method::RoundRobin,
        prefers_local: false,
        source: ClientSource::Client,
        health: None,
        drain_s: 10,
        replicas: None,
    };
    records.push(Record::Service("shop".into(), shop));
    for number in 0..endpoints {
        let claim = Claim::Endpoint {
            name: format!("endpoint-{number}"),
            node: format!("host-{}", number % hosts),
        };
        records.push(endpoint(number, hosts, 1));
        records.push(Record::Address(network(number), address(number), claim));
    }
    records.iter().map(entry).collect()
}

/// The median time of `times` calls.
fn timed<T>(times: usize, mut call: impl FnMut() -> T) -> Duration {
    let mut all: Vec<Duration> = (0..times)
        .map(|_| {
            let begun = Instant::now();
            black_box(call());
            begun.elapsed()
        })
        .collect();
    all.sort();
    all[all.len() / 2]
}

fn ms(time: Duration) -> String {
    format!("{:.2} ms", time.as_secs_f64() * 1e3)
}

fn us(time: Duration) -> String {
    format!("{:.2} us", time.as_secs_f64() * 1e6)
}

fn row(hosts: usize, endpoints: usize) -> Vec<String> {
    let entries = records(hosts, endpoints);
    let state: usize = entries.iter().map(|entry| entry.key.len() + entry.value.len()).sum();
    let list = timed(5, || View::of(&entries, Revision(1)));
    let (mut view, errors) = View::of(&entries, Revision(1));
    assert_eq!(errors, []);
    let (before, conflicts) = desired(&view, "host-0", &network(0));
    assert_eq!(conflicts, []);
    let mut revision = 1;
    let change = timed(20, || {
        revision += 1;
        let changed = entry(&endpoint(NETWORKS, hosts, revision));
        let changed = Entry { modified: Revision(revision), ..changed };
        view.apply(&Changes { revision: Revision(revision), events: vec![Event::Put(changed)] });
        let (now, _) = desired(&view, "host-0", &network(0));
        changes(&now, &before)
    });
    let derive = || tasks(&view, "shop", "host-0", &|_| true);
    let derived = timed(20, derive);
    let targets: BTreeMap<TargetId, Target> =
        derive().into_iter().map(|(id, task)| (id, task.target)).collect();
    let balancer = |method| {
        let mut balancer = Balancer::new(method, false);
        balancer.set(targets.clone());
        balancer
    };
    let table = timed(5, || balancer(Method::Source));
    let choice = |method| {
        let mut balancer = balancer(method);
        let now = Instant::now();
        let mut client = 0_u32;
        timed(1_000, || {
            client += 1;
            balancer.choose(IpAddr::V4(Ipv4Addr::from_bits(client)), &[], now)
        })
    };
    let per_second = (hosts - 1) as f64 / INTERVAL.as_secs_f64();
    // With the headers of UDP, IPv4 and Ethernet.
    let bytes = per_second * (Heartbeat::LENGTH + 8 + 20 + 14) as f64;
    vec![
        hosts.to_string(),
        endpoints.to_string(),
        format!("{:.1} MB", state as f64 / 1e6),
        ms(list),
        ms(change),
        ms(derived),
        format!("{} / {}", us(choice(Method::RoundRobin)), us(choice(Method::Source))),
        ms(table),
        (NETWORKS * (before.stations.len() * 2 + before.neighbours.len())).to_string(),
        format!("{per_second:.0} /s, {:.2} Mbit/s", bytes * 8.0 / 1e6),
    ]
}

fn main() {
    if !std::env::args().any(|argument| argument == "--bench") {
        println!("no measurement without --bench, which `cargo bench` passes");
        return;
    }
    println!(
        "| hosts | endpoints | state | list | change | tasks | choice | table | entries | heartbeats |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|");
    for (hosts, endpoints) in
        [(3, 100), (16, 1_000), (64, 10_000), (usize::from(MAX_HOSTS), 50_000)]
    {
        println!("| {} |", row(hosts, endpoints).join(" | "));
    }
}
