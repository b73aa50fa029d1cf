//! Unreachable backends.

use super::*;

#[test]
fn a_closed_port_at_the_backend_resets_the_client_at_once() {
    let net = Topology::three();
    let publisher = Publisher::start(&net.host, &format!("8080:80 --to {}", addr::CONTAINER_V4));
    for round in 1..=20 {
        let asked = Instant::now();
        assert_eq!(refused(&net.client, host(8080)), io::ErrorKind::ConnectionReset);
        assert!(asked.elapsed() < Duration::from_secs(1), "{:?}", asked.elapsed());
        publisher.wait_for_metrics(|metrics| metrics.refused(PORT, "backend_refused") == round);
    }
    publisher.wait_for_metrics(|metrics| metrics.port("connections", PORT) == 0);
}

#[test]
fn a_backend_without_a_route_resets_the_client_at_once() {
    let net = Topology::three();
    net.host.ip_all(
        "route add unreachable 172.30.0.99
         route add blackhole 172.30.0.98
         route add prohibit 172.30.0.97
         -6 route add unreachable fd30::99",
    );
    for backend in ["172.30.0.99", "172.30.0.98", "172.30.0.97", "fd30::99"] {
        let publisher = Publisher::start(&net.host, &format!("8080:80 --to {backend}"));
        let asked = Instant::now();
        assert_eq!(refused(&net.client, host(8080)), io::ErrorKind::ConnectionReset, "{backend}");
        assert!(asked.elapsed() < Duration::from_secs(1), "{:?}", asked.elapsed());
        publisher.wait_for_metrics(|metrics| metrics.refused(PORT, "backend_unreachable") == 1);
    }
}

#[test]
fn a_backend_without_a_neighbour_entry_resets_the_client() {
    let net = Topology::three();
    // The kernel gives up after three probes, by default one second apart.
    net.host.sysctl("net.ipv4.neigh.br0.retrans_time_ms", "50");
    net.host.sysctl("net.ipv6.neigh.br0.retrans_time_ms", "50");
    for backend in ["172.30.0.77", "fd30::77"] {
        let publisher =
            Publisher::start(&net.host, &format!("8080:80 --to {backend} --dial-timeout 1h"));
        assert_eq!(refused(&net.client, host(8080)), io::ErrorKind::ConnectionReset, "{backend}");
        publisher.wait_for_metrics(|metrics| metrics.refused(PORT, "backend_unreachable") == 1);
    }
}

#[test]
fn a_silent_backend_resets_the_client_after_the_dial_timeout() {
    let net = Topology::three();
    black_hole(&net.host);
    let publisher = Publisher::start(
        &net.host,
        &format!("8080:80 --to {} --dial-timeout 500ms", addr::CONTAINER_V4),
    );
    let asked = Instant::now();
    assert_eq!(refused(&net.client, host(8080)), io::ErrorKind::ConnectionReset);
    assert!(asked.elapsed() >= Duration::from_millis(500), "{:?}", asked.elapsed());
    publisher.wait_for_metrics(|metrics| metrics.refused(PORT, "dial_timeout") == 1);
    wait_until("the dial has ended", || dials(&net.host) == 0);
    // The backend is reachable again.
    restore_path(&net.host);
    let _echo = EchoServer::tcp(&net.container, container(80));
    assert_eq!(ask(&connect(&net.client, host(8080)), b"reachable again"), b"reachable again");
}

#[test]
fn a_client_that_resets_while_the_backend_is_dialled_ends_the_dial() {
    let net = Topology::three();
    black_hole(&net.host);
    let publisher = Publisher::start(
        &net.host,
        &format!("8080:80 --to {} --dial-timeout 1h", addr::CONTAINER_V4),
    );
    let idle = publisher.process.open_fds();
    let mut client = connect(&net.client, host(8080));
    client.write_all(b"anybody there?").unwrap();
    wait_until("the backend is dialled", || dials(&net.host) == 1);
    reset(client);
    wait_until("the dial is abandoned", || dials(&net.host) == 0);
    let metrics = publisher.wait_for_metrics(|metrics| metrics.port("connections", PORT) == 0);
    assert_eq!(metrics.refused(PORT, "client_gone"), 1);
    wait_until("its descriptors are closed", || publisher.process.open_fds() <= idle);
}

#[test]
fn a_client_that_half_closes_while_the_backend_is_dialled_is_served() {
    let net = Topology::three();
    black_hole(&net.host);
    let backend = Backend::tcp(&net.container, container(80));
    let _publisher = Publisher::start(
        &net.host,
        &format!("8080:80 --to {} --dial-timeout 1h", addr::CONTAINER_V4),
    );
    let mut client = connect(&net.client, host(8080));
    client.write_all(b"a request").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    wait_until("the backend is dialled", || dials(&net.host) == 1);
    restore_path(&net.host);
    let mut server = backend.accept();
    assert_eq!(read_to_end(&server), b"a request");
    server.write_all(b"an answer").unwrap();
    drop(server);
    assert_eq!(read_to_end(&client), b"an answer");
}

#[test]
fn a_response_and_reset_before_the_proxy_reads_are_delivered() {
    let (bytes, error) = answered_before_the_proxy_reads(reset);
    assert_eq!((bytes.as_slice(), error), (&b"too busy"[..], Some(io::ErrorKind::ConnectionReset)));
}

#[test]
fn a_response_and_close_before_the_proxy_reads_are_delivered() {
    let (bytes, error) = answered_before_the_proxy_reads(drop);
    assert_eq!((bytes.as_slice(), error), (&b"too busy"[..], None));
}
