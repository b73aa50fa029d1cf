//! The engine as egress of bridges, on a host without a firewall. A policy rule routes packets of
//! each bridge to the device, which is in the namespace of the host.
//!
//! ```text
//!   client (external)          host                                     container, neighbour
//!   203.0.113.9      ───veth─── eth0      br0 (forwarding) ───veth───    172.30.0.2, .3
//!                                 ▲         │ rule: iif br0 lookup 777
//!                       sockets   │         ▼
//!                               engine ◄── tun0 (forwarding)
//! ```

mod common;

use common::{at, netns};
use std::io::ErrorKind;
use std::net::{IpAddr, Shutdown, TcpStream, UdpSocket};
use std::sync::Arc;
use std::time::Duration;
use tidegate_model::CidrSet;
use tidegate_nat::{DropReason, Nat, Policy, Settings, Tun, TunOptions};
use tidegate_netns::Family;
use tidegate_reactor::Descriptors;
use tidegate_testbed::server::{EchoServer, PeerServer, Sink, Source};
use tidegate_testbed::transfer::{self, Transfer};
use tidegate_testbed::{Namespace, Topology, addr};

const BULK_BYTES: u64 = if common::OLD_KERNEL { 10 << 20 } else { 100 << 20 };

fn start(net: &Topology, policy: Policy) -> Nat {
    let host = netns(&net.host);
    let tun =
        TunOptions { default_routes: Family::ALL.to_vec(), table: 777, ..TunOptions::new("tun0") };
    let tun = Tun::open(&host, &tun).unwrap();
    let mut settings = Settings::new(1500);
    settings.policy = policy;
    let nat = Nat::start(settings, tun, &host, Arc::new(Descriptors::of_process(256))).unwrap();
    net.host.ip_all(
        "rule add priority 100 iif br0 lookup 777
         -6 rule add priority 100 iif br0 lookup 777",
    );
    for link in ["br0", "tun0"] {
        net.host.sysctl(&format!("net.ipv4.conf.{link}.forwarding"), "1");
        net.host.sysctl(&format!("net.ipv4.conf.{link}.rp_filter"), "1");
        let forced = format!("net.ipv6.conf.{link}.force_forwarding");
        if net.host.has_sysctl(&forced) {
            net.host.sysctl(&forced, "1");
        } else {
            net.host.sysctl("net.ipv6.conf.all.forwarding", "1");
        }
    }
    nat
}

fn policy() -> Policy {
    Policy {
        sources: vec!["172.30.0.0/24".parse().unwrap(), "fd30::/64".parse().unwrap()],
        gateways: vec![addr::GATEWAY_V4.into(), addr::GATEWAY_V6.into()],
        ..Policy::default()
    }
}

fn transfer_both_ways(net: &Topology, container: &Namespace) {
    for external in [IpAddr::from(addr::CLIENT_V4), addr::CLIENT_V6.into()] {
        let sink = Sink::tcp(&net.client, (external, 7001).into(), 3);
        container.run(|| {
            let mut stream = TcpStream::connect(sink.addr()).unwrap();
            transfer::send(&mut stream, 3, BULK_BYTES).unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
        });
        assert_eq!(sink.wait(1, Duration::from_secs(60)), [Transfer::complete(BULK_BYTES)]);
        let source = Source::tcp(&net.client, (external, 7002).into(), 4, BULK_BYTES);
        let received = container.run(|| {
            let mut stream = TcpStream::connect(source.addr()).unwrap();
            transfer::receive(&mut stream, 4)
        });
        assert_eq!(received, Transfer::complete(BULK_BYTES));

        let echo = EchoServer::udp(&net.client, (external, 7003).into());
        let socket = container
            .run(|| UdpSocket::bind((if external.is_ipv4() { "0.0.0.0" } else { "::" }, 0)));
        let socket = socket.unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
        socket.connect(echo.addr()).unwrap();
        for size in [100, 1400, 9000] {
            socket.send(&vec![7; size]).unwrap();
            assert_eq!(socket.recv(&mut [0; 10_000]).unwrap(), size);
        }
    }
}

#[test]
fn bridges_have_egress_through_the_engine_and_no_ingress() {
    let net = Topology::builder().forwarding(false).build();
    let neighbour = net.neighbour();
    let _service = EchoServer::tcp(&net.container, (addr::CONTAINER_V4, 80).into());
    let nat = start(&net, policy());
    transfer_both_ways(&net, &net.container);
    transfer_both_ways(&net, &neighbour);

    let peer = PeerServer::udp(&net.client, (addr::CLIENT_V4, 9).into());
    let socket = net.container.run(|| UdpSocket::bind("0.0.0.0:0").unwrap());
    socket.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
    socket.send_to(b"who am I?", peer.addr()).unwrap();
    let mut seen = [0; 64];
    let length = socket.recv(&mut seen).unwrap();
    assert!(seen[..length].starts_with(addr::HOST_V4.to_string().as_bytes()));

    // The client has a route to the container through the host, but cannot reach it.
    net.client.ip(&["route", "replace", "172.30.0.0/24", "via", &addr::HOST_V4.to_string()]);
    let error = net.client.run(|| {
        let to = (addr::CONTAINER_V4, 80).into();
        TcpStream::connect_timeout(&to, Duration::from_secs(1)).unwrap_err()
    });
    assert!(matches!(error.kind(), ErrorKind::TimedOut | ErrorKind::HostUnreachable), "{error}");
    drop(nat);
    assert!(!net.host.ip(&["-o", "link"]).contains("tun0"));
    for family in ["-4", "-6"] {
        let routes = net.host.ip(&[family, "route", "show", "table", "all"]);
        assert!(!routes.contains("tun0") && !routes.contains("777"), "{routes}");
    }
}

#[test]
fn other_networks_are_rejected_although_the_host_reaches_them() {
    let net = Topology::builder().forwarding(false).build();
    let other = Namespace::new();
    net.host.ip_all(&format!(
        "link add br1 type veth peer name eth0 netns {}
         addr add 10.77.0.1/24 dev br1
         link set br1 up",
        other.path().display()
    ));
    other.ip_all(
        "addr add 10.77.0.2/24 dev eth0\nlink set eth0 up\nroute add default via 10.77.0.1",
    );
    let service = EchoServer::tcp(&other, at("10.77.0.2", 80));
    let mut policy = policy();
    let open = start(&net, policy.clone());
    let connects = || {
        net.container
            .run(|| TcpStream::connect_timeout(&service.addr(), Duration::from_secs(2)).is_ok())
    };
    assert!(connects(), "without a policy the engine forwards");
    policy.refused = CidrSet::parse(["10.77.0.0/24"]).unwrap();
    open.set_policy(policy);
    assert!(tidegate_testbed::eventually(Duration::from_secs(3), || !connects()));
    assert!(open.stats().dropped(DropReason::Policy) > 0);
}
