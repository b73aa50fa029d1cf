//! A thousand containers with a server each, in a process of its own.

#[path = "support/mod.rs"]
mod support;

use std::time::{Duration, Instant};
use support::{TestBed, handle};
use tidegate_dns::ServeOptions;
use tidegate_testbed::{Namespace, procfs};

const CONTAINERS: usize = 1_000;
/// Limit of the memory of all servers in bytes.
const BYTES: u64 = 64 << 20;
const TIME: Duration = Duration::from_secs(1);

#[test]
fn a_thousand_servers_cost_less_than_64_mb_and_a_second() {
    let bed = TestBed::new(Namespace::new(), "");
    bed.network("un1");
    for number in 0..CONTAINERS {
        let address = std::net::Ipv4Addr::from(0x0a09_0002 + number as u32).to_string();
        bed.endpoint("un1", &format!("c{number}"), &["all"], &[&address]);
    }
    let namespaces: Vec<_> = (0..CONTAINERS).map(|_| Namespace::new()).collect();
    let handles: Vec<_> = namespaces.iter().map(handle).collect();
    let before = procfs::rss(std::process::id()).unwrap();
    let _guard = bed.runtime.enter();
    let start = Instant::now();
    let serving: Vec<_> = (0..CONTAINERS)
        .map(|number| {
            bed.resolver
                .serve(&handles[number], &format!("c{number}"), &ServeOptions::default())
                .unwrap()
        })
        .collect();
    let took = start.elapsed();
    assert!(serving.iter().all(tidegate_dns::Serving::is_redirected));
    let bytes =
        support::client::query(1, "c7", hickory_server::proto::rr::RecordType::A).to_vec().unwrap();
    for namespace in namespaces.iter().step_by(10) {
        let server = support::client::SERVER.parse().unwrap();
        assert!(support::client::send(namespace, server, &bytes, Duration::from_secs(2)).is_some());
    }
    let grown = procfs::rss(std::process::id()).unwrap().saturating_sub(before);
    let start = Instant::now();
    drop(serving);
    println!(
        "{CONTAINERS} servers: {took:?}, {} KiB more; stopped in {:?}",
        grown >> 10,
        start.elapsed()
    );
    assert!(grown < BYTES, "{grown} bytes");
    assert!(took < TIME, "{took:?}");
    assert!(start.elapsed() < TIME, "{:?}", start.elapsed());
}
