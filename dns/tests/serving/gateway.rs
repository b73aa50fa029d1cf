//! A server at a network's gateway, as Podman's is.

use crate::support::client::{question, send, told};
use crate::support::{House, handle};
use hickory_server::proto::op::Message;
use hickory_server::proto::rr::RecordType;
use std::net::{IpAddr, UdpSocket};
use std::time::Duration;
use tidegate_dns::NetworkSpec;
use tidegate_testbed::{Namespace, Topology, addr, eventually};

const PATIENCE: Duration = Duration::from_millis(500);

fn ask(from: &Namespace, server: IpAddr, name: &str) -> Option<String> {
    let bytes = question(7, name, RecordType::A).to_vec().unwrap();
    let answer = send(from, (server, 53).into(), &bytes, PATIENCE)?;
    Some(told(&Message::from_vec(&answer).unwrap()))
}

#[test]
fn a_network_is_served_at_its_gateway_to_who_comes_by_its_bridge() {
    let net = Topology::three();
    let neighbour = net.neighbour();
    let house = House::new(net.host.clone(), "");
    house.network("n1");
    house.network("n2");
    house.endpoint(
        "n1",
        "ptwo",
        &["al1", "8307d39d06d4"],
        &[&addr::CONTAINER_V4.to_string(), &addr::CONTAINER_V6.to_string()],
    );
    house.endpoint("n2", "ptwo", &[], &["172.31.0.2"]);
    house.endpoint("n2", "other", &[], &["172.31.0.3"]);
    let _guard = house.runtime.enter();
    let host = handle(&net.host);
    let v4 = house.resolver.serve_gateway(&host, "n1", addr::GATEWAY_V4.into(), "br0").unwrap();
    let _v6 = house.resolver.serve_gateway(&host, "n1", addr::GATEWAY_V6.into(), "br0").unwrap();
    let own = addr::CONTAINER_V4.to_string();
    for server in [IpAddr::from(addr::GATEWAY_V4), addr::GATEWAY_V6.into()] {
        for name in ["al1", "8307d39d06d4", "al1.n1"] {
            assert_eq!(ask(&net.container, server, name), Some(own.clone()), "{name} at {server}");
        }
        assert_eq!(
            ask(&net.container, server, "other"),
            Some("172.31.0.3".to_owned()),
            "it is on n2 too"
        );
        for name in ["al1", "other", "example.com"] {
            let told = ask(&neighbour, server, name);
            assert_eq!(told, Some("Refused".to_owned()), "{name}: no endpoint has its address");
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
fn a_gateways_port_that_is_taken_is_told_with_the_network() {
    let net = Topology::three();
    let house = House::new(net.host.clone(), "");
    house.network("n1");
    let taken = net.host.run(|| UdpSocket::bind("0.0.0.0:53").unwrap());
    let _guard = house.runtime.enter();
    let error =
        house.resolver.serve_gateway(&handle(&net.host), "n1", addr::GATEWAY_V4.into(), "br0");
    assert_eq!(
        error.unwrap_err().to_string(),
        "network \"n1\": 172.30.0.1:53 is in use by another DNS server"
    );
    drop(taken);
}

/// A router in a container may use any address: nobody at that gateway is certain.
#[test]
fn where_sources_are_not_verified_a_gateway_tells_everybody_the_names_of_its_network_alone() {
    let net = Topology::three();
    let neighbour = net.neighbour();
    let house = House::new(net.host.clone(), "");
    let spec = NetworkSpec { name: "n1".into(), internal: true, ..NetworkSpec::default() };
    house.network_with(&NetworkSpec { sources_are_verified: false, ..spec });
    house.network("n2");
    house.endpoint("n1", "ptwo", &[], &[&addr::CONTAINER_V4.to_string()]);
    house.endpoint("n2", "ptwo", &[], &["172.31.0.2"]);
    house.endpoint("n2", "other", &[], &["172.31.0.3"]);
    let _guard = house.runtime.enter();
    let host = handle(&net.host);
    let _serving =
        house.resolver.serve_gateway(&host, "n1", addr::GATEWAY_V4.into(), "br0").unwrap();
    for client in [&net.container, &neighbour] {
        let ask = |name| ask(client, addr::GATEWAY_V4.into(), name).unwrap();
        assert_eq!(ask("ptwo"), addr::CONTAINER_V4.to_string());
        assert_eq!(ask("other"), "NXDomain");
        assert_eq!(ask("example.com"), "Refused", "the network is internal");
    }
}
