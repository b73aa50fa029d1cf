//! Servers at the gateway of a network, as with Podman.

use crate::support::client::{query, send, summary};
use crate::support::{TestBed, handle};
use hickory_server::proto::op::Message;
use hickory_server::proto::rr::RecordType;
use std::net::{IpAddr, UdpSocket};
use std::time::Duration;
use tidegate_dns::NetworkSpec;
use tidegate_testbed::{Namespace, Topology, addr, eventually};

const TIMEOUT: Duration = Duration::from_millis(500);

fn ask(from: &Namespace, server: IpAddr, name: &str) -> Option<String> {
    let bytes = query(7, name, RecordType::A).to_vec().unwrap();
    let answer = send(from, (server, 53).into(), &bytes, TIMEOUT)?;
    Some(summary(&Message::from_vec(&answer).unwrap()))
}

#[test]
fn a_gateway_serves_clients_on_its_bridge_only() {
    let net = Topology::three();
    let neighbour = net.neighbour();
    let bed = TestBed::new(net.host.clone(), "");
    bed.network("n1");
    bed.network("n2");
    bed.endpoint(
        "n1",
        "ptwo",
        &["al1", "8307d39d06d4"],
        &[&addr::CONTAINER_V4.to_string(), &addr::CONTAINER_V6.to_string()],
    );
    bed.endpoint("n2", "ptwo", &[], &["172.31.0.2"]);
    bed.endpoint("n2", "other", &[], &["172.31.0.3"]);
    let _guard = bed.runtime.enter();
    let host = handle(&net.host);
    let v4 = bed.resolver.serve_gateway(&host, "n1", addr::GATEWAY_V4.into(), "br0").unwrap();
    let _v6 = bed.resolver.serve_gateway(&host, "n1", addr::GATEWAY_V6.into(), "br0").unwrap();
    let own = addr::CONTAINER_V4.to_string();
    for server in [IpAddr::from(addr::GATEWAY_V4), addr::GATEWAY_V6.into()] {
        for name in ["al1", "8307d39d06d4", "al1.n1"] {
            assert_eq!(ask(&net.container, server, name), Some(own.clone()), "{name} at {server}");
        }
        assert_eq!(
            ask(&net.container, server, "other"),
            Some("172.31.0.3".to_owned()),
            "the client is on n2 too"
        );
        for name in ["al1", "other", "example.com"] {
            let summary = ask(&neighbour, server, name);
            assert_eq!(summary, Some("Refused".to_owned()), "{name}: no endpoint has its address");
        }
        assert_eq!(
            ask(&net.client, server, "al1"),
            None,
            "the gateway's address, by another interface"
        );
    }
    assert_eq!(v4.address(), (IpAddr::from(addr::GATEWAY_V4), 53).into());
    drop(v4);
    let free = || net.host.run(|| UdpSocket::bind((addr::GATEWAY_V4, 53))).is_ok();
    assert!(eventually(Duration::from_secs(2), free));
}

#[test]
fn a_port_in_use_at_a_gateway_is_reported_with_the_network() {
    let net = Topology::three();
    let bed = TestBed::new(net.host.clone(), "");
    bed.network("n1");
    let taken = net.host.run(|| UdpSocket::bind("0.0.0.0:53").unwrap());
    let _guard = bed.runtime.enter();
    let error =
        bed.resolver.serve_gateway(&handle(&net.host), "n1", addr::GATEWAY_V4.into(), "br0");
    assert_eq!(
        error.unwrap_err().to_string(),
        "network \"n1\": 172.30.0.1:53 is in use by another DNS server; stop it, or bind it to other addresses"
    );
    drop(taken);
}

/// A router in a container may use any address, so no client at its gateway is identified.
#[test]
fn without_source_verification_a_gateway_resolves_names_of_its_network_only() {
    let net = Topology::three();
    let neighbour = net.neighbour();
    let bed = TestBed::new(net.host.clone(), "");
    let spec = NetworkSpec { name: "n1".into(), internal: true, ..NetworkSpec::default() };
    bed.network_with(&NetworkSpec { sources_are_verified: false, ..spec });
    bed.network("n2");
    bed.endpoint("n1", "ptwo", &[], &[&addr::CONTAINER_V4.to_string()]);
    bed.endpoint("n2", "ptwo", &[], &["172.31.0.2"]);
    bed.endpoint("n2", "other", &[], &["172.31.0.3"]);
    let _guard = bed.runtime.enter();
    let host = handle(&net.host);
    let _serving = bed.resolver.serve_gateway(&host, "n1", addr::GATEWAY_V4.into(), "br0").unwrap();
    for client in [&net.container, &neighbour] {
        let ask = |name| ask(client, addr::GATEWAY_V4.into(), name).unwrap();
        assert_eq!(ask("ptwo"), addr::CONTAINER_V4.to_string());
        assert_eq!(ask("other"), "NXDomain");
        assert_eq!(ask("example.com"), "Refused", "the network is internal");
    }
}
