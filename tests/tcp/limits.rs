//! Limits.

use super::*;

#[test]
fn connections_beyond_the_limit_of_a_port_are_reset_and_a_freed_place_is_used_again() {
    let bed = Bed::new("--max-port-connections 3");
    let mut held: Vec<_> = (0..3).map(|_| bed.pair()).collect();
    for refusals in 1..=5 {
        assert_eq!(refused(&bed.net.client, host(8080)), io::ErrorKind::ConnectionReset);
        let metrics = bed.publisher.metrics();
        assert_eq!(metrics.refused(PORT, "port_limit"), refusals);
        assert_eq!(metrics.port("connections", PORT), 3);
    }
    assert!(!bed.backend.has_waiting(), "a refused client must not reach the backend");
    for (client, server) in &held {
        carry(client, server, 10_000);
        carry(server, client, 10_000);
    }
    held.pop();
    bed.publisher.wait_for_metrics(|metrics| metrics.port("connections", PORT) == 2);
    let (client, server) = bed.pair();
    carry(&client, &server, 10_000);
}

#[test]
fn connections_beyond_the_limit_of_all_ports_are_reset() {
    let net = Topology::three();
    let backend = Backend::tcp(&net.container, container(80));
    let arguments = format!("8080:80 8081:80 --to {} --max-connections 3", addr::CONTAINER_V4);
    let publisher = Publisher::start(&net.host, &arguments);
    let pair = |port| (connect(&net.client, host(port)), backend.accept());
    let mut held = vec![pair(8080), pair(8081), pair(8081)];
    for (refusals, port) in [(1, 8080), (2, 8080), (1, 8081)] {
        assert_eq!(refused(&net.client, host(port)), io::ErrorKind::ConnectionReset);
        let publish = format!("0.0.0.0:{port}/tcp");
        assert_eq!(publisher.metrics().refused(&publish, "total_limit"), refusals);
    }
    for (client, server) in &held {
        carry(client, server, 10_000);
    }
    held.pop();
    publisher.wait_for_metrics(|metrics| metrics.port("connections", "0.0.0.0:8081/tcp") == 1);
    let (client, server) = pair(8080);
    carry(&client, &server, 10_000);
}

#[test]
fn with_64_descriptors_500_clients_at_once_are_all_answered() {
    raise_open_files(4096);
    let net = Topology::three();
    let _echo = EchoServer::tcp(&net.container, container(80));
    let publisher =
        Publisher::start_with(&net.host, &format!("8080:80 --to {}", addr::CONTAINER_V4), |command| {
            limit_open_files(command, 64);
        });
    let idle = publisher.process.open_fds();
    let mut old_friend = connect(&net.client, host(8080));
    let mut greet = |text: &[u8]| {
        old_friend.write_all(text).unwrap();
        let mut answer = vec![0; text.len()];
        old_friend.read_exact(&mut answer).unwrap();
        assert_eq!(answer, text);
    };
    greet(b"before");
    let mut clients: Vec<TcpStream> = (0..500).map(|_| connect(&net.client, host(8080))).collect();
    for (number, client) in clients.iter_mut().enumerate() {
        client.write_all(format!("request {number}").as_bytes()).unwrap();
    }
    // Nobody leaves: what can be accepted has been.
    publisher.wait_for_metrics(|metrics| metrics.value("tidegate_proxy_accept_pauses_total") >= 1.0);
    greet(b"while there is no room for anybody else");
    for client in &clients {
        client.shutdown(Shutdown::Write).unwrap();
    }
    for (number, client) in clients.iter().enumerate() {
        assert_eq!(read_to_end(client), format!("request {number}").as_bytes());
    }
    greet(b"after");
    assert_eq!(ask(&connect(&net.client, host(8080)), b"a newcomer"), b"a newcomer");
    drop(clients);
    wait_until("the descriptors are back", || publisher.process.open_fds() <= idle + 2);
    let metrics = publisher.metrics();
    assert_eq!(metrics.port("connections_total", PORT), 502);
    assert_eq!(metrics.port("connection_resets_total", PORT), 0);
}

#[test]
fn waiting_for_descriptors_costs_next_to_no_cpu() {
    let net = Topology::three();
    let echo = EchoServer::tcp(&net.container, container(80));
    let publisher =
        Publisher::start_with(&net.host, &format!("8080:80 --to {}", addr::CONTAINER_V4), |command| {
            limit_open_files(command, 64);
        });
    let clients: Vec<TcpStream> = (0..60).map(|_| connect(&net.client, host(8080))).collect();
    publisher.wait_for_metrics(|metrics| metrics.value("tidegate_proxy_accept_pauses_total") >= 1.0);
    assert_idle(&publisher);
    // Those who hold the places go without a word; the others get them.
    let (served, waiting) = (echo.open_connections(), clients.len() - echo.open_connections());
    assert!(served > 0 && waiting > 0, "{served} served, {waiting} waiting");
    for client in &clients {
        client.shutdown(Shutdown::Write).unwrap();
        assert_eq!(read_to_end(client), b"");
    }
    assert_eq!(echo.served(), 60);
}

#[test]
fn thirty_thousand_connections_one_after_another_leave_nothing_behind() {
    let net = Topology::three();
    let _echo = EchoServer::tcp(&net.container, container(80));
    let publisher = Publisher::start(&net.host, &format!("8080:80 --to {}", addr::CONTAINER_V4));
    for namespace in [&net.client, &net.host] {
        // Each connection leaves its port in TIME_WAIT for a minute.
        namespace.sysctl("net.ipv4.ip_local_port_range", "1024 65535");
    }
    ask_in_turn(&net.client, 1000);
    publisher.wait_for_metrics(|metrics| metrics.port("connections", PORT) == 0);
    let (fds, memory) = (publisher.process.open_fds(), publisher.process.rss());

    ask_in_turn(&net.client, 30_000);

    let metrics = publisher.wait_for_metrics(|metrics| metrics.port("connections", PORT) == 0);
    assert_eq!(metrics.port("connections_total", PORT), 31_000);
    wait_until("the descriptors are back", || publisher.process.open_fds() <= fds);
    let grown = publisher.process.rss().saturating_sub(memory);
    assert!(grown < 2 * MIB, "{grown} bytes more than after 1,000 connections");
    assert_idle(&publisher);
}

#[test]
fn a_backend_is_dialled_more_often_in_a_minute_than_there_are_source_ports() {
    let net = Topology::three();
    net.client.sysctl("net.ipv4.ip_local_port_range", "1024 65535");
    // Each connection that the client's side ends first leaves one in TIME_WAIT for a minute.
    net.host.sysctl("net.ipv4.ip_local_port_range", "40000 40499");
    let _echo = EchoServer::tcp(&net.container, container(80));
    let publisher = Publisher::start(&net.host, &format!("8080:80 --to {}", addr::CONTAINER_V4));
    ask_in_turn(&net.client, 2000);
    assert_eq!(publisher.metrics().port("connections_total", PORT), 2000);
}
