//! Client access, and the client addresses that backends see.

use super::*;

#[test]
fn only_clients_of_allowed_networks_are_accepted() {
    let net = Topology::three();
    let neighbour = net.neighbour();
    let _echo = EchoServer::tcp(&net.container, container(80));
    let arguments = format!(
        "8080:80 --to {} --allow 203.0.113.0/25 --allow 2001:db8:1::/64",
        addr::CONTAINER_V4
    );
    let publisher = Publisher::start(&net.host, &arguments);
    assert_eq!(ask(&connect(&net.client, host(8080)), b"v4"), b"v4");
    assert_eq!(ask(&connect(&net.client, host_v6(8080)), b"v6"), b"v6");
    let denied_clients = [
        (&neighbour, host(8080)),
        (&neighbour, host_v6(8080)),
        (&net.host, (Ipv4Addr::LOCALHOST, 8080).into()),
        (&net.host, (Ipv6Addr::LOCALHOST, 8080).into()),
    ];
    for (refusals, (from, to)) in (1..).zip(denied_clients) {
        assert_eq!(refused(from, to), io::ErrorKind::ConnectionReset, "{to}");
        publisher.wait_for_metrics(|metrics| {
            let of = |publish| metrics.refused(publish, "not_allowed");
            of(PORT) + of("[::]:8080/tcp") == refusals
        });
    }
}

#[test]
fn the_proxy_protocol_header_carries_the_client_and_the_destination_address() {
    let net = Topology::three();
    let backend = Backend::tcp(&net.container, container(80));
    for (options, version) in [
        ("--proxy-protocol v1", 1),
        ("--proxy-protocol v2", 2),
        ("--source proxy-protocol", 2),
        ("--source proxy-protocol --proxy-protocol v1", 1),
    ] {
        let _publisher =
            Publisher::start(&net.host, &format!("8080:80 --to {} {options}", addr::CONTAINER_V4));
        for to in [host(8080), host_v6(8080)] {
            let mut client = connect(&net.client, to);
            let expected = proxy_header(version, client.local_addr().unwrap(), to);
            let mut server = backend.accept();
            // The header arrives before the client sends anything.
            let mut header = vec![0; expected.len()];
            server.read_exact(&mut header).unwrap();
            assert_eq!(header, expected, "{options} to {to}");
            client.write_all(b"payload").unwrap();
            client.shutdown(Shutdown::Write).unwrap();
            assert_eq!(read_to_end(&server), b"payload");
            server.write_all(b"answer").unwrap();
            drop(server);
            assert_eq!(read_to_end(&client), b"answer");
        }
    }
}

#[test]
fn clients_of_either_family_reach_backends_of_either_family() {
    let net = Topology::three();
    let _v4 = PeerServer::tcp(&net.container, container(80));
    let _v6 = PeerServer::tcp(&net.container, (addr::CONTAINER_V6, 80).into());
    let _to_v4 = Publisher::start(&net.host, &format!("8080:80 --to {}", addr::CONTAINER_V4));
    for to in [host(8080), host_v6(8080)] {
        assert_eq!(peer_ip(&connect(&net.client, to)), IpAddr::from(addr::GATEWAY_V4), "{to}");
    }
    drop(_to_v4);
    let _to_v6 = Publisher::start(&net.host, &format!("8080:80 --to {}", addr::CONTAINER_V6));
    for to in [host(8080), host_v6(8080)] {
        assert_eq!(peer_ip(&connect(&net.client, to)), IpAddr::from(addr::GATEWAY_V6), "{to}");
    }
}

#[test]
fn a_port_published_on_one_address_is_closed_on_the_others() {
    let net = Topology::three();
    let _echo = EchoServer::tcp(&net.container, container(80));
    let arguments =
        format!("127.0.0.1:8080:80 [{}]:8081:80 --to {}", addr::HOST_V6, addr::CONTAINER_V4);
    let _publisher = Publisher::start(&net.host, &arguments);
    assert_eq!(
        ask(&connect(&net.host, (Ipv4Addr::LOCALHOST, 8080).into()), b"loopback"),
        b"loopback"
    );
    assert_eq!(ask(&connect(&net.client, host_v6(8081)), b"IPv6"), b"IPv6");
    for (from, to) in [
        (&net.client, host(8080)),
        (&net.client, host_v6(8080)),
        (&net.host, (Ipv6Addr::LOCALHOST, 8080).into()),
        (&net.client, host(8081)),
        (&net.host, (Ipv6Addr::LOCALHOST, 8081).into()),
    ] {
        let connected = from.run(|| TcpStream::connect_timeout(&to, TIMEOUT));
        assert_eq!(connected.unwrap_err().kind(), io::ErrorKind::ConnectionRefused, "{to}");
    }
}

#[test]
fn a_client_with_a_link_local_address_is_served() {
    let net = Topology::three();
    let _echo = EchoServer::tcp(&net.container, container(80));
    let _publisher = Publisher::start(&net.host, &format!("8080:80 --to {}", addr::CONTAINER_V4));
    let to = support::link_local(&net.host, &net.client, 8080);
    assert_eq!(ask(&connect(&net.client, to), b"link-local"), b"link-local");
}
