//! Sessions and their limits.

use super::*;

#[test]
fn an_idle_session_ends_and_releases_its_descriptor() {
    let net = Topology::three();
    let _echo = EchoServer::udp(&net.container, container(53));
    let arguments = format!("5353:53/udp --to {} --udp-idle-timeout 300ms", addr::CONTAINER_V4);
    let publisher = Publisher::start(&net.host, &arguments);
    let idle = publisher.process.open_fds();
    for round in 1..=3 {
        let clients: Vec<_> =
            (0..5).map(|_| socket(&net.client, unspecified(host(5353)))).collect();
        for client in &clients {
            assert_eq!(echo(client, host(5353), b"hello"), b"hello");
        }
        publisher.wait_for_metrics(|metrics| metrics.port("sessions", PORT) == 0);
        wait_until("the descriptors are back", || publisher.process.open_fds() <= idle);
        // The same socket opens a new session.
        assert_eq!(echo(&clients[0], host(5353), b"new session"), b"new session");
        publisher.wait_for_metrics(|metrics| metrics.port("sessions", PORT) == 0);
        assert_eq!(publisher.metrics().port("sessions_total", PORT), 6 * round);
        assert_eq!(publisher.metrics().port("evicted_sessions_total", PORT), 0);
    }
}

#[test]
fn traffic_in_one_direction_keeps_a_session_alive() {
    // Much longer than the pause between two datagrams, and much shorter than the test.
    const IDLE: Duration = Duration::from_millis(1500);
    const TALK: Duration = Duration::from_millis(4000);
    let net = Topology::three();
    let server = socket(&net.container, container(53));
    let arguments = format!(
        "5353:53/udp --to {} --udp-idle-timeout {}ms",
        addr::CONTAINER_V4,
        IDLE.as_millis()
    );
    let publisher = Publisher::start(&net.host, &arguments);
    let talker = socket(&net.client, unspecified(host(5353)));
    let listener = socket(&net.client, unspecified(host(5353)));
    let of_talker = open_session(&talker, host(5353), &server);
    let of_listener = open_session(&listener, host(5353), &server);
    let start = Instant::now();
    while start.elapsed() < TALK {
        talker.send_to(b"up", host(5353)).unwrap();
        server.send_to(b"down", of_listener).unwrap();
        assert_eq!(receive(&server), (b"up".to_vec(), of_talker));
        assert_eq!(receive(&listener).0, b"down");
        std::thread::sleep(Duration::from_millis(10));
    }
    let metrics = publisher.metrics();
    assert_eq!(metrics.port("sessions_total", PORT), 2);
    assert_eq!(metrics.port("sessions", PORT), 2);
}

#[test]
fn a_full_table_evicts_the_longest_idle_unanswered_session() {
    let net = Topology::three();
    let server = socket(&net.container, container(53));
    let arguments = format!(
        "5353:53/udp --to {} --udp-max-sessions 8 --udp-idle-timeout 1h",
        addr::CONTAINER_V4
    );
    let publisher = Publisher::start(&net.host, &arguments);
    let idle = publisher.process.open_fds();
    let open_session = |client: &UdpSocket| open_session(client, host(5353), &server);
    let answered = |client: &UdpSocket| {
        let upstream = open_session(client);
        server.send_to(b"an answer", upstream).unwrap();
        assert_eq!(receive(client).0, b"an answer");
        upstream
    };
    let new_socket = || socket(&net.client, unspecified(host(5353)));

    let answered_clients: Vec<UdpSocket> = (0..4).map(|_| new_socket()).collect();
    let answered_upstreams: Vec<SocketAddr> = answered_clients.iter().map(answered).collect();
    let unanswered: Vec<UdpSocket> = (0..20).map(|_| new_socket()).collect();
    let unanswered_upstreams: Vec<SocketAddr> = unanswered.iter().map(open_session).collect();
    let metrics = publisher.metrics();
    assert_eq!(metrics.port("sessions", PORT), 8);
    assert_eq!(metrics.port("sessions_total", PORT), 24);
    assert_eq!(metrics.port("evicted_sessions_total", PORT), 16);
    wait_until("the evicted ones have closed", || publisher.process.open_fds() <= idle + 8);
    // The answered sessions and the newest unanswered ones are kept.
    for (client, upstream) in answered_clients.iter().zip(&answered_upstreams) {
        assert_eq!(open_session(client), *upstream);
    }
    assert_eq!(open_session(&unanswered[19]), unanswered_upstreams[19]);
    assert_eq!(publisher.metrics().port("evicted_sessions_total", PORT), 16);

    // Four more answered sessions evict the last unanswered ones; then the longest idle answered
    // session is evicted.
    let more: Vec<UdpSocket> = (0..4).map(|_| new_socket()).collect();
    for client in &more {
        answered(client);
    }
    assert_eq!(
        open_session(&answered_clients[0]),
        answered_upstreams[0],
        "a datagram refreshes it, so its neighbour is the longest idle"
    );
    answered(&new_socket());
    assert_eq!(open_session(&answered_clients[0]), answered_upstreams[0]);
    assert_ne!(
        open_session(&answered_clients[1]),
        answered_upstreams[1],
        "a new session, because the old one was evicted"
    );
    let metrics = publisher.metrics();
    assert_eq!(metrics.port("sessions", PORT), 8);
    assert_eq!(metrics.port("evicted_sessions_total", PORT), 16 + 4 + 2);
}

#[test]
fn a_source_at_its_share_replaces_only_its_own_longest_idle_session() {
    let net = Topology::three();
    net.client.ip(&["addr", "add", "203.0.113.10/24", "dev", "eth0"]);
    let _echo = EchoServer::udp(&net.container, container(53));
    let arguments = format!("5353:53/udp --to {} --udp-max-source-sessions 3", addr::CONTAINER_V4);
    let publisher = Publisher::start(&net.host, &arguments);
    let from = |address: Ipv4Addr| socket(&net.client, (address, 0).into());
    let other = from(Ipv4Addr::new(203, 0, 113, 10));
    assert_eq!(echo(&other, host(5353), b"another"), b"another");
    // Each from a new port, like a resolver: all are served.
    for number in 0..20_u8 {
        assert_eq!(echo(&from(addr::CLIENT_V4), host(5353), &[number]), [number]);
    }
    assert_eq!(echo(&other, host(5353), b"still open"), b"still open");
    let metrics = publisher.metrics();
    assert_eq!(metrics.port("sessions", PORT), 4);
    assert_eq!(metrics.port("sessions_total", PORT), 21);
    assert_eq!(metrics.port("evicted_sessions_total", PORT), 17);
}

#[test]
fn six_thousand_concurrent_ports_of_one_address_lose_nothing() {
    const PORTS: usize = 6000;
    raise_open_files(PORTS as u64 + 1000);
    let net = Topology::three();
    let _echo = EchoServer::udp(&net.container, container(53));
    let publisher =
        Publisher::start(&net.host, &format!("5353:53/udp --to {}", addr::CONTAINER_V4));
    let clients: Vec<UdpSocket> =
        (0..PORTS).map(|_| socket(&net.client, unspecified(host(5353)))).collect();
    for (number, batch) in clients.chunks(100).enumerate() {
        for client in batch {
            client.send_to(b"a question", host(5353)).unwrap();
        }
        // Paced by the proxy, because other buffers on the path hold only a few hundred packets.
        let sent = 100 * (number as u64 + 1);
        publisher.wait_for_metrics(|metrics| metrics.port("sessions_total", PORT) == sent);
    }
    for client in &clients {
        assert_eq!(receive(client).0, b"a question");
    }
    let metrics = publisher.metrics();
    assert_eq!(metrics.port("sessions_total", PORT), PORTS as u64);
    assert_eq!(metrics.port("evicted_sessions_total", PORT), 0);
}

#[test]
fn metrics_count_every_datagram_and_byte() {
    let net = Topology::three();
    let _echo = EchoServer::udp(&net.container, container(53));
    let publisher =
        Publisher::start(&net.host, &format!("5353:53/udp --to {}", addr::CONTAINER_V4));
    let client = socket(&net.client, unspecified(host(5353)));
    let sizes = [0, 1, 1200, 9000, MAX_PAYLOAD];
    for size in sizes {
        assert_eq!(echo(&client, host(5353), &payload(size, 1)).len(), size);
    }
    let (datagrams, bytes) = (sizes.len() as u64, sizes.iter().sum::<usize>() as u64);
    // A reply may arrive before it is counted.
    let metrics = publisher.wait_for_metrics(|metrics| {
        let value = |name, direction| metrics.labelled(name, PORT, "direction", direction);
        ["in", "out"].iter().all(|direction| {
            (value("datagrams_total", direction), value("bytes_total", direction))
                == (datagrams, bytes)
        })
    });
    assert_eq!(metrics.port("sessions", PORT), 1);
    assert_eq!(metrics.port("sessions", PORT_V6), 0);
}

#[test]
fn twenty_thousand_sources_are_bounded_and_do_not_evict_an_active_client() {
    const SOURCES: u32 = 20_000;
    const BATCH: usize = 100;
    const SESSIONS: usize = 1000;
    let net = Topology::three();
    support::route_many_addresses(&net);
    let _server = SelectiveServer::start(&net.container, container(53));
    let arguments = format!(
        "5353:53/udp --to {} --udp-max-sessions {SESSIONS} --udp-max-source-sessions 100",
        addr::CONTAINER_V4
    );
    let publisher = Publisher::start(&net.host, &arguments);
    let idle = publisher.process.open_fds();
    let active = socket(&net.client, unspecified(host(5353)));
    assert_eq!(echo(&active, host(5353), b"?answer me"), b"?answer me");

    let mut memory = 0;
    for batch in (0..SOURCES).step_by(BATCH) {
        net.client.run(|| {
            for number in batch..batch + BATCH as u32 {
                let forged =
                    UdpSocket::bind((support::address(number), 1024 + number as u16)).unwrap();
                forged.send_to(b"forged", host(5353)).unwrap();
            }
        });
        // Paced by the proxy.
        let sent = u64::from(batch) + BATCH as u64;
        publisher.wait_for_metrics(|metrics| metrics.port("sessions_total", PORT) > sent);
        assert_eq!(echo(&active, host(5353), b"?still there"), b"?still there");
        assert!(publisher.process.open_fds() <= idle + SESSIONS);
        if sent == u64::from(SOURCES) / 4 {
            memory = publisher.process.rss();
        }
    }
    let metrics = publisher.metrics();
    assert_eq!(metrics.port("sessions", PORT), SESSIONS as u64);
    assert_eq!(
        metrics.port("sessions_total", PORT),
        u64::from(SOURCES) + 1,
        "the active client kept its session"
    );
    let evicted = u64::from(SOURCES) + 1 - SESSIONS as u64;
    assert_eq!(metrics.port("evicted_sessions_total", PORT), evicted);
    let grown = publisher.process.rss().saturating_sub(memory);
    assert!(grown < 1 << 20, "{grown} bytes more than after a quarter of them");

    // One address with as many ports gets only its share.
    let greedy: Vec<UdpSocket> =
        (0..150).map(|_| socket(&net.client, unspecified(host(5353)))).collect();
    for client in &greedy {
        client.send_to(b"greedy", host(5353)).unwrap();
    }
    let metrics = publisher.wait_for_metrics(|metrics| {
        metrics.port("sessions_total", PORT) == u64::from(SOURCES) + 1 + greedy.len() as u64
    });
    assert_eq!(metrics.port("sessions", PORT), SESSIONS as u64);
    assert_eq!(echo(&active, host(5353), b"?still there"), b"?still there");
}

#[test]
fn with_64_descriptors_all_clients_are_served_and_one_client_leaves_a_third_to_others() {
    let net = Topology::three();
    net.client.ip(&["addr", "add", "203.0.113.10/24", "dev", "eth0"]);
    let _echo = EchoServer::udp(&net.container, container(53));
    let arguments = format!("5353:53/udp --to {}", addr::CONTAINER_V4);
    let publisher = Publisher::start_with(&net.host, &arguments, |command| {
        support::limit_open_files(command, 64);
    });
    let other = socket(&net.client, (Ipv4Addr::new(203, 0, 113, 10), 0).into());
    assert_eq!(echo(&other, host(5353), b"hello"), b"hello");
    // Kept open, so that no two of them have the same port.
    let mut clients = Vec::new();
    for number in 0..100 {
        let client = socket(&net.client, unspecified(host(5353)));
        assert_eq!(echo(&client, host(5353), &[number]), [number]);
        clients.push(client);
    }
    assert_eq!(echo(&other, host(5353), b"and again"), b"and again");
    let metrics = publisher.metrics();
    assert_eq!(metrics.port("sessions_total", PORT), 101, "the other client kept its session");
    assert_eq!(metrics.dropped(PORT, "exhausted"), 0);
    let free = metrics.value("tidegate_proxy_descriptors_limit")
        - metrics.value("tidegate_proxy_descriptors");
    let held = metrics.port("sessions", PORT) as f64 - 1.0;
    assert!((2.0 * free - held).abs() <= 2.0, "{held} held, {free} free");
}

#[test]
fn unanswered_clients_do_not_lock_out_others_when_descriptors_are_short() {
    let net = Topology::three();
    let server = socket(&net.container, container(53));
    let arguments = format!("5353:53/udp --to {}", addr::CONTAINER_V4);
    let publisher = Publisher::start_with(&net.host, &arguments, |command| {
        support::limit_open_files(command, 64);
    });
    let active = socket(&net.client, unspecified(host(5353)));
    let upstream = open_session(&active, host(5353), &server);
    server.send_to(b"welcome", upstream).unwrap();
    assert_eq!(receive(&active).0, b"welcome");
    let silent: Vec<UdpSocket> =
        (0..100).map(|_| socket(&net.client, unspecified(host(5353)))).collect();
    for client in &silent {
        client.send_to(b"ignore me", host(5353)).unwrap();
        std::thread::sleep(Duration::from_millis(5));
    }
    let late = socket(&net.client, unspecified(host(5353)));
    server.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
    let arrived = |wanted: &[u8]| {
        let mut buffer = [0; 100];
        std::iter::from_fn(|| {
            server
                .recv_from(&mut buffer)
                .ok()
                .map(|(length, from)| (buffer[..length].to_vec(), from))
        })
        .find(|(datagram, _)| datagram == wanted)
        .map(|(_, from)| from)
    };
    wait_until("a late client gets a session", || {
        late.send_to(b"let me in", host(5353)).unwrap();
        arrived(b"let me in").is_some()
    });
    active.send_to(b"still there", host(5353)).unwrap();
    assert_eq!(arrived(b"still there"), Some(upstream), "by the same session as before");
    assert!(publisher.metrics().port("evicted_sessions_total", PORT) > 0);
}

#[test]
fn sessions_do_not_delay_the_exit() {
    let net = Topology::three();
    let _echo = EchoServer::udp(&net.container, container(53));
    let mut publisher = Publisher::start(
        &net.host,
        &format!("5353:53/udp --to {} --drain-timeout 1h", addr::CONTAINER_V4),
    );
    let client = socket(&net.client, unspecified(host(5353)));
    assert_eq!(echo(&client, host(5353), b"hello"), b"hello");
    assert_eq!(publisher.process.stop(Signal::TERM, TIMEOUT).code(), Some(0));
}
