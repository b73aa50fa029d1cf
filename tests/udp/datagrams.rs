//! Datagrams.

use super::*;

#[test]
fn datagrams_of_every_size_are_echoed_over_both_families() {
    let net = Topology::three();
    let _v4 = EchoServer::udp(&net.container, container(53));
    let _v6 = EchoServer::udp(&net.container, (addr::CONTAINER_V6, 53).into());
    for backend in [IpAddr::from(addr::CONTAINER_V4), IpAddr::from(addr::CONTAINER_V6)] {
        let publisher = Publisher::start(&net.host, &format!("5353:53/udp --to {backend}"));
        for to in [host(5353), host_v6(5353)] {
            let client = socket(&net.client, unspecified(to));
            for size in [0, 1, 2, 1199, 1472, 1473, 9000, MAX_PAYLOAD - 1, MAX_PAYLOAD] {
                let sent = payload(size, size as u64);
                client.send_to(&sent, to).unwrap();
                let (answer, from) = receive(&client);
                assert!(answer == sent, "{size} bytes to {to}: {} bytes returned", answer.len());
                assert_eq!(from, to, "{size} bytes");
            }
        }
        let metrics = publisher.metrics();
        for publish in [PORT, PORT_V6] {
            assert_eq!(metrics.port("sessions_total", publish), 1, "{publish} to {backend}");
        }
    }
}

#[test]
fn a_datagram_too_long_for_the_family_of_the_backend_is_counted_and_affects_no_other() {
    let net = Topology::three();
    let _echo = EchoServer::udp(&net.container, container(53));
    let publisher =
        Publisher::start(&net.host, &format!("5353:53/udp --to {}", addr::CONTAINER_V4));
    let client = socket(&net.client, unspecified(host_v6(5353)));
    assert_eq!(echo(&client, host_v6(5353), b"before"), b"before");
    // The length field of IPv6 does not include its header.
    client.send_to(&payload(MAX_PAYLOAD + 20, 1), host_v6(5353)).unwrap();
    publisher.wait_for_metrics(|metrics| metrics.dropped(PORT_V6, "too_long") == 1);
    assert_eq!(echo(&client, host_v6(5353), b"after"), b"after");
    assert_eq!(publisher.metrics().port("sessions_total", PORT_V6), 1);
}

/// For IPv4, the kernel drops datagrams with such a source.
#[test]
fn a_datagram_forged_from_a_published_port_causes_no_loop() {
    let net = Topology::three();
    let _echo = EchoServer::udp(&net.container, (addr::CONTAINER_V6, 53).into());
    let publisher = Publisher::start(
        &net.host,
        &format!("5353:53/udp 5454:53/udp --to {}", addr::CONTAINER_V6),
    );
    let client = socket(&net.client, unspecified(host_v6(5353)));
    for to in [host_v6(5353), host_v6(5454)] {
        assert_eq!(echo(&client, to, b"before"), b"before");
    }
    let backend = SocketAddr::from((addr::CONTAINER_V6, 53));
    for (claimed, to) in
        [(host_v6(5353), host_v6(5353)), (host_v6(5454), host_v6(5353)), (backend, host_v6(5353))]
    {
        net.client.run(|| {
            let forger =
                socket2::Socket::new(socket2::Domain::IPV6, socket2::Type::DGRAM, None).unwrap();
            forger.set_ip_transparent_v6(true).unwrap();
            forger.bind(&claimed.into()).unwrap();
            forger.send_to(b"for ever", &to.into()).unwrap();
        });
    }
    let metrics = publisher.wait_for_metrics(|metrics| metrics.dropped(PORT_V6, "reflected") == 3);
    assert_eq!(metrics.port("sessions_total", PORT_V6), 1, "only the session of the client");
    assert_eq!(echo(&client, host_v6(5353), b"after"), b"after");
}

#[test]
fn a_burst_of_mixed_sizes_keeps_every_boundary() {
    let net = Topology::three();
    let server = socket(&net.container, container(53));
    let _publisher =
        Publisher::start(&net.host, &format!("5353:53/udp --to {}", addr::CONTAINER_V4));
    let client = socket(&net.client, unspecified(host(5353)));
    let upstream = open_session(&client, host(5353), &server);
    // Runs of equal sizes, which may be batched, and sizes that must not be.
    let sizes = [
        1200,
        1200,
        1200,
        700,
        0,
        0,
        1200,
        1200,
        1,
        1,
        1,
        0,
        1473,
        1473,
        5,
        1200,
        9000,
        9000,
        3,
        MAX_PAYLOAD,
        1200,
        1200,
        1201,
        1200,
        0,
        MAX_PAYLOAD,
        2,
    ];
    for round in 0..8 {
        let sent: Vec<Vec<u8>> =
            sizes.iter().zip(round * 100..).map(|(size, seed)| payload(*size, seed)).collect();
        for datagram in &sent {
            client.send_to(datagram, host(5353)).unwrap();
        }
        assert_same_datagrams(&sent, &server);
        for datagram in &sent {
            server.send_to(datagram, upstream).unwrap();
        }
        assert_same_datagrams(&sent, &client);
    }
}

#[test]
fn gso_segments_arrive_intact_in_each_direction() {
    const SEGMENT: u16 = 1200;
    let net = Topology::three();
    for (listen, to) in
        [(container(53), host(5353)), ((addr::CONTAINER_V6, 53).into(), host_v6(5353))]
    {
        let server = socket(&net.container, listen);
        let publisher = Publisher::start(&net.host, &format!("5353:53/udp --to {}", listen.ip()));
        let client = socket(&net.client, unspecified(to));
        let upstream = open_session(&client, to, &server);
        // The last segment is shorter.
        let batches: Vec<Vec<u8>> =
            (0..20).map(|seed| payload(50 * usize::from(SEGMENT) + 77, seed)).collect();
        let segments: Vec<Vec<u8>> = batches
            .iter()
            .flat_map(|batch| batch.chunks(SEGMENT.into()))
            .map(<[u8]>::to_vec)
            .collect();
        segment_sends(&client, SEGMENT);
        for batch in &batches {
            client.send_to(batch, to).unwrap();
        }
        assert_same_datagrams(&segments, &server);
        segment_sends(&server, SEGMENT);
        for batch in &batches {
            server.send_to(batch, upstream).unwrap();
        }
        assert_same_datagrams(&segments, &client);
        let publish = if to.is_ipv4() { PORT } else { PORT_V6 };
        let count = segments.len() as u64;
        publisher.wait_for_metrics(|metrics| {
            let datagrams =
                |direction| metrics.labelled("datagrams_total", publish, "direction", direction);
            // One more datagram opened the session.
            (datagrams("in"), datagrams("out")) == (count + 1, count)
        });
    }
}

#[test]
fn gso_segments_larger_than_the_mtu_to_the_container_arrive() {
    let net = Topology::three();
    let server = socket(&net.container, container(53));
    let publisher =
        Publisher::start(&net.host, &format!("5353:53/udp --to {}", addr::CONTAINER_V4));
    let client = socket(&net.client, unspecified(host(5353)));
    open_session(&client, host(5353), &server);
    // The MTU of the bridge follows its port.
    net.host.ip(&["link", "set", "port2", "mtu", "1200"]);
    oversized_segments(&client, host(5353), &server);
    // This includes a client with a session that starts under this MTU.
    let another = socket(&net.client, unspecified(host(5353)));
    oversized_segments(&another, host(5353), &server);
    let metrics = publisher.metrics();
    assert_eq!(metrics.dropped(PORT, "too_long"), 0);
    assert_eq!(metrics.port("sessions_total", PORT), 2);
}

#[test]
fn gso_segments_larger_than_the_mtu_to_the_client_arrive() {
    let net = Topology::three();
    let server = socket(&net.container, container(53));
    let _publisher =
        Publisher::start(&net.host, &format!("5353:53/udp --to {}", addr::CONTAINER_V4));
    for namespace in [&net.client, &net.host] {
        namespace.ip(&["link", "set", "eth0", "mtu", "1280"]);
    }
    for to in [host(5353), host_v6(5353)] {
        let client = socket(&net.client, unspecified(to));
        let upstream = open_session(&client, to, &server);
        oversized_segments(&server, upstream, &client);
    }
}
