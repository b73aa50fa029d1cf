//! Backends that start, stop and move.

use super::*;

#[test]
fn a_backend_that_starts_late_serves_the_waiting_session() {
    let net = Topology::three();
    // By default the kernel reports a closed port once per second, after the first few times.
    net.container.sysctl("net.ipv4.icmp_ratelimit", "0");
    let publisher =
        Publisher::start(&net.host, &format!("5353:53/udp --to {}", addr::CONTAINER_V4));
    let client = socket(&net.client, unspecified(host(5353)));
    for sent in 1..=3 {
        client.send_to(b"too early", host(5353)).unwrap();
        // The kernel reported the closed port (ICMP), and the session survives.
        let metrics =
            publisher.wait_for_metrics(|metrics| metrics.dropped(PORT, "backend_refused") >= sent);
        assert_eq!(metrics.port("sessions", PORT), 1);
    }
    for round in 0..3 {
        // The same after the backend was running and stopped.
        let server = EchoServer::udp(&net.container, container(53));
        assert_eq!(echo(&client, host(5353), b"in time"), b"in time", "round {round}");
        let before = publisher.metrics().dropped(PORT, "backend_refused");
        drop(server);
        // A child process that another test starts may hold a copy of the socket for a moment.
        wait_until("the port is closed", || !net.container.is_bound(Protocol::Udp, 53));
        client.send_to(b"to a closed port", host(5353)).unwrap();
        publisher.wait_for_metrics(|metrics| metrics.dropped(PORT, "backend_refused") > before);
    }
    assert_eq!(publisher.metrics().port("sessions_total", PORT), 1);
}

#[test]
fn delivery_resumes_when_the_address_of_the_container_returns() {
    let net = Topology::three();
    let _echo = EchoServer::udp(&net.container, (Ipv4Addr::UNSPECIFIED, 53).into());
    let _publisher =
        Publisher::start(&net.host, &format!("5353:53/udp --to {}", addr::CONTAINER_V4));
    let client = socket(&net.client, unspecified(host(5353)));
    for _ in 0..3 {
        assert_eq!(echo(&client, host(5353), b"before"), b"before");
        net.container.ip(&["addr", "del", "172.30.0.2/24", "dev", "eth0"]);
        client.send_to(b"lost", host(5353)).unwrap();
        net.container.ip(&["addr", "add", "172.30.0.2/24", "dev", "eth0"]);
        assert_resumes(&client, host(5353));
    }
}

#[test]
fn delivery_resumes_when_a_container_returns_with_another_mac_address() {
    let net = Topology::three();
    let _echo = EchoServer::udp(&net.container, container(53));
    let _publisher =
        Publisher::start(&net.host, &format!("5353:53/udp --to {}", addr::CONTAINER_V4));
    let client = socket(&net.client, unspecified(host(5353)));
    assert_eq!(echo(&client, host(5353), b"before"), b"before");
    net.host.ip_all("link set port2 down");
    client.send_to(b"lost", host(5353)).unwrap();
    net.container.ip_all("link set eth0 address 02:00:00:00:00:55");
    // Announces the address, as the setup of a container does.
    net.container.sysctl("net.ipv4.conf.eth0.arp_notify", "1");
    net.container.ip_all("link set eth0 down\nlink set eth0 up");
    net.host.ip_all("link set port2 up\nneigh flush dev br0");
    assert_resumes(&client, host(5353));
}

#[test]
fn sessions_are_recreated_when_the_ipv4_address_of_the_bridge_changes() {
    bridge_address_changes(addr::CONTAINER_V4.into(), ["172.30.0.1/24", "172.30.0.254/24"]);
}

#[test]
fn sessions_are_recreated_when_the_ipv6_address_of_the_bridge_changes() {
    bridge_address_changes(addr::CONTAINER_V6.into(), ["fd30::1/64", "fd30::fe/64"]);
}
