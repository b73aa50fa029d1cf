//! Limits on connections and descriptors.

use super::*;

/// Connects from `source`.
#[track_caller]
pub(super) fn connect_from(namespace: &Namespace, source: Ipv4Addr, to: SocketAddr) -> TcpStream {
    let connected = try_connect_from(namespace, source, to);
    support::with_timeouts(
        connected.unwrap_or_else(|error| panic!("connect from {source} to {to}: {error}")),
    )
}

fn try_connect_from(
    namespace: &Namespace,
    source: Ipv4Addr,
    to: SocketAddr,
) -> io::Result<TcpStream> {
    namespace.run(|| {
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)?;
        socket.bind(&SocketAddr::from((source, 0)).into())?;
        socket.connect_timeout(&to.into(), TIMEOUT)?;
        Ok(TcpStream::from(socket))
    })
}

/// The error of a client at `source` that the proxy refuses.
#[track_caller]
fn refused_from(namespace: &Namespace, source: Ipv4Addr, to: SocketAddr) -> io::ErrorKind {
    error_of_refused(try_connect_from(namespace, source, to))
}

#[test]
fn one_client_gets_two_thirds_of_a_port_and_freed_slots_are_reused() {
    let setup = Setup::new("--max-port-connections 6");
    route_many_addresses(&setup.net);
    let mut held: Vec<_> = (0..4).map(|_| setup.pair()).collect();
    for refusals in 1..=5 {
        assert_eq!(refused(&setup.net.client, host(8080)), io::ErrorKind::ConnectionReset);
        let metrics = setup.publisher.metrics();
        assert_eq!(metrics.refused(PORT, "client_limit"), refusals);
        assert_eq!(metrics.port("connections", PORT), 4);
    }
    assert!(!setup.backend.has_waiting(), "a refused client must not reach the backend");
    let warning = setup.publisher.process.wait_for_line("limit of connections reached", TIMEOUT);
    let fields = format!("limit=\"client_limit\" largest=\"{}\" connections=4", addr::CLIENT_V4);
    assert!(warning.contains(&fields), "{warning}");
    let others: Vec<_> = (1..=2)
        .map(|number| {
            (connect_from(&setup.net.client, address(number), host(8080)), setup.backend.accept())
        })
        .collect();
    for (client, server) in held.iter().chain(&others) {
        carry(client, server, 10_000);
        carry(server, client, 10_000);
    }
    held.pop();
    setup.publisher.wait_for_metrics(|metrics| metrics.port("connections", PORT) == 5);
    let (client, server) =
        (connect_from(&setup.net.client, address(3), host(8080)), setup.backend.accept());
    carry(&client, &server, 10_000);
    assert_eq!(setup.publisher.metrics().value("tidegate_proxy_client_connections_max"), 3.0);
    assert_eq!(setup.publisher.process.output().matches("limit of connections reached").count(), 1);
}

#[test]
fn at_a_full_port_a_smaller_client_evicts_the_idlest_connection_of_the_largest() {
    let setup = Setup::new("--max-port-connections 4");
    route_many_addresses(&setup.net);
    let held: Vec<_> = (0..3).map(|_| setup.pair()).collect();
    let (other, _) =
        (connect_from(&setup.net.client, address(1), host(8080)), setup.backend.accept());
    // Idle time counts in seconds: the first and the last connection are active, the middle one is
    // not.
    thread::sleep(Duration::from_millis(1100));
    carry(&held[0].0, &held[0].1, 100);
    carry(&held[2].1, &held[2].0, 100);
    let (newcomer, server) =
        (connect_from(&setup.net.client, address(2), host(8080)), setup.backend.accept());
    carry(&newcomer, &server, 10_000);
    wait_for_reset(&held[1].0);
    for (client, server) in [&held[0], &held[2]] {
        carry(client, server, 10_000);
    }
    let metrics = setup.publisher.metrics();
    assert_eq!(metrics.count("tidegate_proxy_evicted_connections_total{reason=\"port_limit\"}"), 1);
    assert_eq!(metrics.port("connection_resets_total", PORT), 1);
    // With one more connection, all clients have the same number: the next client is refused, and
    // no connection is evicted.
    let _one_more =
        (connect_from(&setup.net.client, address(3), host(8080)), setup.backend.accept());
    assert_eq!(
        refused_from(&setup.net.client, address(4), host(8080)),
        io::ErrorKind::ConnectionReset
    );
    let metrics = setup.publisher.metrics();
    assert_eq!(metrics.refused(PORT, "port_limit"), 1);
    assert_eq!(metrics.port("connection_resets_total", PORT), 2);
    drop(other);
}

#[test]
fn the_total_limit_resets_connections_and_one_port_leaves_room_for_another() {
    let net = Topology::three();
    route_many_addresses(&net);
    let backend = Backend::tcp(&net.container, container(80));
    let arguments = format!("8080:80 8081:80 --to {} --max-connections 6", addr::CONTAINER_V4);
    let publisher = Publisher::start(&net.host, &arguments);
    let pair =
        |number, port| (connect_from(&net.client, address(number), host(port)), backend.accept());
    let mut held: Vec<_> = (1..=5).map(|number| pair(number, 8080)).collect();
    let refused = |number, port| refused_from(&net.client, address(number), host(port));
    assert_eq!(refused(6, 8080), io::ErrorKind::ConnectionReset);
    assert_eq!(publisher.metrics().refused("0.0.0.0:8080/tcp", "port_limit"), 1);
    held.push(pair(6, 8081));
    for (refusals, port) in [(1, 8080), (2, 8080), (1, 8081)] {
        assert_eq!(refused(7, port), io::ErrorKind::ConnectionReset);
        let publish = format!("0.0.0.0:{port}/tcp");
        assert_eq!(publisher.metrics().refused(&publish, "total_limit"), refusals);
    }
    for (client, server) in &held {
        carry(client, server, 10_000);
    }
    held.pop();
    publisher.wait_for_metrics(|metrics| metrics.port("connections", "0.0.0.0:8081/tcp") == 0);
    let (client, server) = pair(8, 8081);
    carry(&client, &server, 10_000);
}

#[test]
fn with_64_descriptors_500_concurrent_clients_are_all_served() {
    raise_open_files(4096);
    let net = Topology::three();
    route_many_addresses(&net);
    let _echo = EchoServer::tcp(&net.container, container(80));
    let publisher = Publisher::start_with(
        &net.host,
        &format!("8080:80 --to {}", addr::CONTAINER_V4),
        |command| {
            limit_open_files(command, 64);
        },
    );
    let idle = publisher.process.open_fds();
    let mut established = connect(&net.client, host(8080));
    let mut echo = |text: &[u8]| {
        established.write_all(text).unwrap();
        let mut answer = vec![0; text.len()];
        established.read_exact(&mut answer).unwrap();
        assert_eq!(answer, text);
    };
    echo(b"before");
    let mut clients: Vec<TcpStream> =
        (0..500).map(|number| connect_from(&net.client, address(number), host(8080))).collect();
    for (number, client) in clients.iter_mut().enumerate() {
        client.write_all(format!("request {number}").as_bytes()).unwrap();
    }
    // No client disconnects, so everything that can be accepted has been.
    publisher
        .wait_for_metrics(|metrics| metrics.value("tidegate_proxy_accept_pauses_total") >= 1.0);
    echo(b"while all slots are taken");
    for client in &clients {
        client.shutdown(Shutdown::Write).unwrap();
    }
    for (number, client) in clients.iter().enumerate() {
        assert_eq!(read_to_end(client), format!("request {number}").as_bytes());
    }
    echo(b"after");
    assert_eq!(ask(&connect(&net.client, host(8080)), b"a newcomer"), b"a newcomer");
    drop(clients);
    wait_until("the descriptors are back", || publisher.process.open_fds() <= idle + 2);
    let metrics = publisher.metrics();
    assert_eq!(metrics.port("connections_total", PORT), 502);
    assert_eq!(metrics.port("connection_resets_total", PORT), 0);
}

#[test]
fn with_64_descriptors_a_greedy_client_does_not_lock_out_others() {
    raise_open_files(4096);
    let net = Topology::three();
    route_many_addresses(&net);
    let _echo = EchoServer::tcp(&net.container, container(80));
    let publisher = Publisher::start_with(
        &net.host,
        &format!("8080:80 8081:80 --to {}", addr::CONTAINER_V4),
        |command| {
            limit_open_files(command, 64);
        },
    );
    let over = std::sync::atomic::AtomicBool::new(false);
    thread::scope(|scope| {
        // Three threads that send nothing and reconnect in a loop.
        for _ in 0..3 {
            scope.spawn(|| {
                net.client.run(|| {
                    let mut held = Vec::new();
                    while !over.load(std::sync::atomic::Ordering::Relaxed) && held.len() < 3000 {
                        held.extend(TcpStream::connect_timeout(&host(8080), TIMEOUT));
                        thread::sleep(Duration::from_millis(1));
                    }
                });
            });
        }
        publisher.wait_for_metrics(|metrics| metrics.refused(PORT, "client_limit") > 20);
        for number in 0..100 {
            for port in [8080, 8081] {
                let client = connect_from(&net.client, address(number), host(port));
                assert_eq!(ask(&client, b"a newcomer"), b"a newcomer");
            }
        }
        over.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    let metrics = publisher.metrics();
    assert_eq!(metrics.refused(PORT, "exhausted"), 0);
    assert_eq!(metrics.value("tidegate_proxy_accept_pauses_total"), 0.0);
}

/// The response times of `count` requests, each on its own connection from an address of its own:
/// the median and the 99th percentile.
fn requests(from: &Namespace, count: u32, port: u16) -> (Duration, Duration) {
    let mut times: Vec<Duration> = (0..count)
        .map(|number| {
            let begun = Instant::now();
            let client = connect_from(from, address(number % 50), host(port));
            assert_eq!(ask(&client, b"a request"), b"a request");
            begun.elapsed()
        })
        .collect();
    times.sort_unstable();
    (times[times.len() / 2], times[times.len() * 99 / 100])
}

#[test]
fn a_client_at_its_share_hardly_delays_the_requests_of_others() {
    const COUNT: u32 = 500;
    raise_open_files(4096);
    let net = Topology::three();
    route_many_addresses(&net);
    let _echo = EchoServer::tcp(&net.container, container(80));
    let arguments = format!("8080:80 8081:80 --to {} --max-connections 600", addr::CONTAINER_V4);
    let publisher = Publisher::start(&net.host, &arguments);
    let over = std::sync::atomic::AtomicBool::new(false);
    let baseline = [requests(&net.client, COUNT, 8080), requests(&net.client, COUNT, 8081)];
    let (loaded, held) = thread::scope(|scope| {
        scope.spawn(|| {
            net.client.run(|| {
                let mut held = Vec::new();
                while !over.load(std::sync::atomic::Ordering::Relaxed) {
                    // Its share first, and then one more connection per millisecond.
                    match TcpStream::connect_timeout(&host(8080), TIMEOUT) {
                        Ok(client) if held.len() < 400 => held.push(client),
                        _ => thread::sleep(Duration::from_millis(1)),
                    }
                }
            });
        });
        publisher.wait_for_metrics(|metrics| metrics.refused(PORT, "client_limit") > 100);
        let held = publisher.metrics().value("tidegate_proxy_client_connections_max");
        let loaded = [requests(&net.client, COUNT, 8080), requests(&net.client, COUNT, 8081)];
        over.store(true, std::sync::atomic::Ordering::Relaxed);
        (loaded, held)
    });
    println!("baseline {baseline:?}, with a client of {held} connections {loaded:?} (median, 99%)");
    assert!(held >= 390.0, "{held} connections are less than the share");
    for ((_, baseline), (_, loaded)) in baseline.iter().zip(&loaded) {
        // The bound allows for a busy machine; the printed figures are exact.
        assert!(
            *loaded < *baseline * 4 + Duration::from_millis(20),
            "{baseline:?} baseline, {loaded:?} loaded"
        );
    }
    let metrics = publisher.metrics();
    for port in [PORT, "0.0.0.0:8081/tcp"] {
        assert_eq!(metrics.port("connection_resets_total", port), 0);
        assert_eq!(metrics.refused(port, "port_limit") + metrics.refused(port, "total_limit"), 0);
    }
}

#[test]
fn waiting_for_descriptors_uses_almost_no_cpu() {
    let net = Topology::three();
    route_many_addresses(&net);
    let echo = EchoServer::tcp(&net.container, container(80));
    let publisher = Publisher::start_with(
        &net.host,
        &format!("8080:80 --to {}", addr::CONTAINER_V4),
        |command| {
            limit_open_files(command, 64);
        },
    );
    let clients: Vec<TcpStream> =
        (0..60).map(|number| connect_from(&net.client, address(number), host(8080))).collect();
    publisher
        .wait_for_metrics(|metrics| metrics.value("tidegate_proxy_accept_pauses_total") >= 1.0);
    assert_idle(&publisher);
    // The connections that are served close silently, and the waiting ones take over.
    let (served, waiting) = (echo.open_connections(), clients.len() - echo.open_connections());
    assert!(served > 0 && waiting > 0, "{served} served, {waiting} waiting");
    for client in &clients {
        client.shutdown(Shutdown::Write).unwrap();
        assert_eq!(read_to_end(client), b"");
    }
    assert_eq!(echo.served(), 60);
}

#[test]
fn thirty_thousand_sequential_connections_leave_no_state() {
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
fn a_backend_is_dialled_more_often_per_minute_than_there_are_source_ports() {
    let net = Topology::three();
    net.client.sysctl("net.ipv4.ip_local_port_range", "1024 65535");
    // Each connection that the client ends first leaves a port in TIME_WAIT for a minute.
    net.host.sysctl("net.ipv4.ip_local_port_range", "40000 40499");
    let _echo = EchoServer::tcp(&net.container, container(80));
    let publisher = Publisher::start(&net.host, &format!("8080:80 --to {}", addr::CONTAINER_V4));
    ask_in_turn(&net.client, 2000);
    assert_eq!(publisher.metrics().port("connections_total", PORT), 2000);
}
