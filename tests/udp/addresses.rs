//! Addresses.

use super::*;
use tidegate_testbed::frames::{LinkSocket, Mac, ethernet, udp4, udp6};

#[test]
fn a_reply_comes_from_the_address_that_the_client_used() {
    let net = Topology::three();
    net.host.ip_all(
        "addr add 203.0.113.2/24 dev eth0
         addr add 198.51.100.7/32 dev lo
         addr add 2001:db8:1::2/64 dev eth0 nodad
         addr add 2001:db8:9::7/128 dev lo nodad",
    );
    let _echo = EchoServer::udp(&net.container, container(53));
    let _publisher =
        Publisher::start(&net.host, &format!("5353:53/udp --to {}", addr::CONTAINER_V4));
    // One socket talks to all addresses, with a session for each.
    let client = socket(&net.client, unspecified(host(5353)));
    let addresses = [addr::HOST_V4, Ipv4Addr::new(203, 0, 113, 2), Ipv4Addr::new(198, 51, 100, 7)];
    for round in 0..2 {
        for address in addresses {
            let to = SocketAddr::from((address, 5353));
            client.send_to(address.to_string().as_bytes(), to).unwrap();
            assert_eq!(receive(&client), (address.to_string().into_bytes(), to), "round {round}");
        }
    }
    let client = socket(&net.client, unspecified(host_v6(5353)));
    let addresses = ["2001:db8:1::1", "2001:db8:1::2", "2001:db8:9::7"];
    for address in addresses {
        let to = SocketAddr::from((address.parse::<Ipv6Addr>().unwrap(), 5353));
        client.send_to(address.as_bytes(), to).unwrap();
        assert_eq!(receive(&client), (address.as_bytes().to_vec(), to));
    }
    let client = socket(&net.host, unspecified(host(5353)));
    for address in [Ipv4Addr::LOCALHOST, Ipv4Addr::new(127, 0, 0, 9), addr::HOST_V4] {
        let to = SocketAddr::from((address, 5353));
        client.send_to(b"from the host itself", to).unwrap();
        assert_eq!(receive(&client), (b"from the host itself".to_vec(), to));
    }
}

#[test]
fn a_broadcast_is_answered_from_the_unicast_address_of_the_host() {
    let net = Topology::three();
    net.host.ip_all(
        "addr del 203.0.113.1/24 dev eth0
         addr add 203.0.113.1/24 broadcast 203.0.113.255 dev eth0",
    );
    let _echo = EchoServer::udp(&net.container, container(53));
    let _publisher =
        Publisher::start(&net.host, &format!("5353:53/udp --to {}", addr::CONTAINER_V4));
    let client = socket(&net.client, unspecified(host(5353)));
    client.set_broadcast(true).unwrap();
    client.send_to(b"anybody?", "203.0.113.255:5353").unwrap();
    assert_eq!(receive(&client), (b"anybody?".to_vec(), host(5353)));
}

#[test]
fn a_client_with_a_link_local_address_is_answered() {
    let net = Topology::three();
    let _echo = EchoServer::udp(&net.container, container(53));
    let _publisher =
        Publisher::start(&net.host, &format!("5353:53/udp --to {}", addr::CONTAINER_V4));
    let to = support::link_local(&net.host, &net.client, 5353);
    let client = socket(&net.client, unspecified(to));
    assert_eq!(echo(&client, to, b"link-local"), b"link-local");
}

#[test]
fn clients_and_their_sockets_have_separate_sessions() {
    let net = Topology::three();
    let neighbour = net.neighbour();
    let _peers = PeerServer::udp(&net.container, container(53));
    let publisher =
        Publisher::start(&net.host, &format!("5353:53/udp --to {}", addr::CONTAINER_V4));
    let clients = [&net.client, &net.client, &neighbour, &net.host]
        .map(|from| socket(from, unspecified(host(5353))));
    let ask_all = || {
        // All requests are sent before the first reply.
        for client in &clients {
            client.send_to(b"who am I?", host(5353)).unwrap();
        }
        clients.each_ref().map(|client| String::from_utf8(receive(client).0).unwrap())
    };
    let seen = ask_all();
    assert!(seen.iter().all(|peer| peer.starts_with("172.30.0.1:")), "{seen:?}");
    let mut distinct = seen.to_vec();
    distinct.sort();
    distinct.dedup();
    assert_eq!(distinct.len(), clients.len(), "{seen:?}");
    assert_eq!(ask_all(), seen, "a session keeps its socket");
    assert_eq!(publisher.metrics().port("sessions", PORT), clients.len() as u64);
}

#[test]
fn only_clients_of_the_allowed_networks_get_a_session() {
    let net = Topology::three();
    let neighbour = net.neighbour();
    let _echo = EchoServer::udp(&net.container, container(53));
    let arguments = format!("5353:53/udp --to {} --allow 203.0.113.0/25", addr::CONTAINER_V4);
    let publisher = Publisher::start(&net.host, &arguments);
    let client = socket(&net.client, unspecified(host(5353)));
    assert_eq!(echo(&client, host(5353), b"welcome"), b"welcome");
    let denied = socket(&neighbour, unspecified(host(5353)));
    denied.send_to(b"let me in", host(5353)).unwrap();
    let metrics = publisher.wait_for_metrics(|metrics| metrics.dropped(PORT, "not_allowed") == 1);
    assert_eq!(metrics.port("sessions_total", PORT), 1);
}

/// The kernel delivers IPv6 packets from an IPv4-mapped source, although nothing can send from such
/// an address. The allow-list would take the client for one with the IPv4 address.
#[test]
fn datagrams_from_ipv4_mapped_addresses_are_dropped() {
    let net = Topology::three();
    let container = net.container.run(|| UdpSocket::bind(container(53))).unwrap();
    container.set_read_timeout(Some(TIMEOUT)).unwrap();
    let arguments = format!(
        "5353:53/udp --to {} --allow 203.0.113.0/24 --allow 2001:db8:1::/64",
        addr::CONTAINER_V4
    );
    let _publisher = Publisher::start(&net.host, &arguments);
    let link = LinkSocket::sender(&net.client, "eth0");
    let macs = [&net.host, &net.client].map(mac);
    let SocketAddr::V6(host) = host_v6(5353) else { unreachable!() };
    let forged = |source: &str| {
        let source = (source.parse().unwrap(), 4000);
        ethernet(macs[0], macs[1], 0x86dd, &udp6(source, (*host.ip(), 5353), b"forged"))
    };
    for source in ["::ffff:203.0.113.7", "::ffff:127.0.0.1", "::ffff:203.0.113.1"] {
        link.send(&forged(source));
    }
    // For comparison: a forged source of an allowed network.
    link.send(&forged("2001:db8:1::77"));
    let client = socket(&net.client, unspecified(host.into()));
    client.send_to(b"client", host).unwrap();
    let mut buffer = [0; 20];
    let seen = [(); 2].map(|()| {
        let length = container.recv(&mut buffer).unwrap();
        String::from_utf8_lossy(&buffer[..length]).into_owned()
    });
    assert_eq!(seen, ["forged", "client"], "that of an allowed IPv6 source, and the client");
}

/// To the unspecified address, the kernel sends a reply to the loopback address, where services
/// trust everyone.
#[test]
fn datagrams_from_the_unspecified_address_are_dropped() {
    let net = Topology::three();
    let _echo = EchoServer::udp(&net.container, container(53));
    let arguments = format!("5353:53/udp --to {}", addr::CONTAINER_V4);
    let publisher = Publisher::start(&net.host, &arguments);
    let services = ["127.0.0.1:6001", "[::1]:6001"]
        .map(|address| net.host.run(|| UdpSocket::bind(address)).unwrap());
    let link = LinkSocket::sender(&net.client, "eth0");
    let (to, from) = (mac(&net.host), mac(&net.client));
    let SocketAddr::V6(host) = host_v6(5353) else { unreachable!() };
    let forged6 = udp6((Ipv6Addr::UNSPECIFIED, 6001), (*host.ip(), 5353), b"forged");
    // IPv4 accepts the source in a broadcast only.
    let forged4 = udp4((Ipv4Addr::UNSPECIFIED, 6001), (Ipv4Addr::BROADCAST, 5353), b"forged");
    link.send(&ethernet(to, from, 0x86dd, &forged6));
    link.send(&ethernet([0xff; 6], from, 0x0800, &forged4));
    let client = socket(&net.client, unspecified(host.into()));
    assert_eq!(echo(&client, host.into(), b"client"), b"client");
    for service in services {
        service.set_nonblocking(true).unwrap();
        let received = service.recv(&mut [0; 20]);
        assert!(received.is_err(), "{:?}: {received:?}", service.local_addr());
    }
    assert_eq!(publisher.metrics().port("sessions_total", "[::]:5353/udp"), 1);
}

fn mac(namespace: &Namespace) -> Mac {
    let text = namespace.ip(&["-o", "link", "show", "eth0"]);
    let mac = text.split_once("link/ether ").unwrap().1;
    let bytes = mac.split(' ').next().unwrap().split(':');
    let bytes: Vec<u8> = bytes.map(|byte| u8::from_str_radix(byte, 16).unwrap()).collect();
    Mac::try_from(bytes).unwrap()
}
