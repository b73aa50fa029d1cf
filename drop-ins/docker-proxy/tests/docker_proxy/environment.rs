//! Features beyond docker-proxy, configured by environment variables that the proxy inherits from
//! dockerd.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::Path;

use tidegate_testbed::server::{EchoServer, PeerServer, Source, StalledServer};
use tidegate_testbed::{Namespace, Process, Protocol, Signal, Topology, addr, eventually};

use crate::driver::{
    LOOPBACK, LOOPBACK_UDP, Launch, SOON, assert_reset, back, connect, echo, front, udp,
};

const METRICS: &str = "TIDEGATE_PROXY_METRICS";
const LIMITS: &str = "TIDEGATE_PROXY_LIMITS";
const PROXY_PROTOCOL: &str = "TIDEGATE_PROXY_PROTOCOL";
const SOURCE: &str = "TIDEGATE_PROXY_SOURCE";

/// The arguments of a proxy to port 80 of the container.
const TO_CONTAINER: &str = "-host-port 8080 -container-ip 172.30.0.2 -container-port 80";

#[test]
fn metrics_of_a_tcp_port_are_exact() {
    let host = Namespace::new();
    let source = Source::tcp(&host, back(), 1, 4_321_000);
    let _proxy = Launch::new(&host, LOOPBACK).env(METRICS, "127.0.0.1:9464").start().ready();
    let mut client = connect(&host, front());
    client.write_all(&[7; 1234]).unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(std::io::copy(&mut client, &mut std::io::sink()).unwrap(), 4_321_000);
    assert_settles(
        &host,
        9464,
        &[
            (r#"tidegate_proxy_connections_total{publish="127.0.0.1:8080/tcp"}"#, 1),
            (r#"tidegate_proxy_connections{publish="127.0.0.1:8080/tcp"}"#, 0),
            (r#"tidegate_proxy_connection_resets_total{publish="127.0.0.1:8080/tcp"}"#, 0),
            (r#"tidegate_proxy_bytes_total{publish="127.0.0.1:8080/tcp",direction="in"}"#, 1234),
            (
                r#"tidegate_proxy_bytes_total{publish="127.0.0.1:8080/tcp",direction="out"}"#,
                4_321_000,
            ),
            (r#"tidegate_proxy_dial_seconds_count{publish="127.0.0.1:8080/tcp"}"#, 1),
            (r#"tidegate_proxy_connection_seconds_count{publish="127.0.0.1:8080/tcp"}"#, 1),
        ],
    );
    drop(source);
    // A connection without a backend is counted separately.
    assert_reset(&host, front());
    assert_settles(
        &host,
        9464,
        &[
            (
                r#"tidegate_proxy_refused_connections_total{publish="127.0.0.1:8080/tcp",reason="backend_refused"}"#,
                1,
            ),
            (r#"tidegate_proxy_connections_total{publish="127.0.0.1:8080/tcp"}"#, 2),
        ],
    );
    let (_, page) = scrape(&host, 9464, "/metrics");
    assert!(page.contains("tidegate_build_info{"), "{page}");
    assert!(page.contains("\nprocess_open_fds "), "{page}");
    assert!(
        !page.contains(&client.local_addr().unwrap().port().to_string()),
        "{page} contains the address of a peer"
    );
}

#[test]
fn metrics_of_a_udp_port_are_exact() {
    let host = Namespace::new();
    let _server = EchoServer::udp(&host, back());
    let _proxy = Launch::new(&host, LOOPBACK_UDP).env(METRICS, "127.0.0.1:9464").start().ready();
    let clients = [udp(&host, front()), udp(&host, front())];
    for length in [0, 100, 1200] {
        for client in &clients {
            client.send(&vec![7; length]).unwrap();
            client.recv(&mut [0; 2000]).unwrap();
        }
    }
    assert_settles(
        &host,
        9464,
        &[
            (r#"tidegate_proxy_sessions_total{publish="127.0.0.1:8080/udp"}"#, 2),
            (r#"tidegate_proxy_sessions{publish="127.0.0.1:8080/udp"}"#, 2),
            (r#"tidegate_proxy_datagrams_total{publish="127.0.0.1:8080/udp",direction="in"}"#, 6),
            (r#"tidegate_proxy_datagrams_total{publish="127.0.0.1:8080/udp",direction="out"}"#, 6),
            (r#"tidegate_proxy_bytes_total{publish="127.0.0.1:8080/udp",direction="in"}"#, 2600),
            (r#"tidegate_proxy_bytes_total{publish="127.0.0.1:8080/udp",direction="out"}"#, 2600),
        ],
    );
}

#[test]
fn proxies_of_a_host_share_a_range_of_metrics_ports() {
    let host = Namespace::new();
    let tcp = Launch::new(&host, LOOPBACK).env(METRICS, "127.0.0.1:9500-9501").start().ready();
    let _udp = Launch::new(&host, LOOPBACK_UDP).env(METRICS, "127.0.0.1:9500-9501").start().ready();
    assert!(scrape(&host, 9500, "/metrics").1.contains(r#"publish="127.0.0.1:8080/tcp""#));
    assert!(scrape(&host, 9501, "/metrics").1.contains(r#"publish="127.0.0.1:8080/udp""#));
    let third = LOOPBACK.replace("8080", "8081");
    // An exhausted range does not prevent a container from starting.
    let launch =
        Launch::new(&host, &third).env(METRICS, "127.0.0.1:9500-9501").env("TIDEGATE_LOG", "info");
    let third = launch.start().ready();
    let warning = third.wait_for_line("metrics are not served", SOON);
    assert!(warning.contains("ports 9500-9501 on 127.0.0.1 are in use"), "{warning}");
    drop(tcp);
    third.wait_for_line("metrics are served now", SOON);
    assert!(scrape(&host, 9500, "/metrics").1.contains(r#"publish="127.0.0.1:8081/tcp""#));
}

#[test]
fn the_metrics_endpoint_serves_only_metrics() {
    let host = Namespace::new();
    let _proxy = Launch::new(&host, LOOPBACK).env(METRICS, "127.0.0.1:9464").start().ready();
    assert_eq!(scrape(&host, 9464, "/elsewhere").0, "HTTP/1.1 404 Not Found");
    assert_eq!(scrape(&host, 9464, "/metrics?x=y").0, "HTTP/1.1 200 OK");
}

#[test]
fn without_configuration_only_its_port_is_open() {
    let host = Namespace::new();
    let _proxy = Launch::new(&host, LOOPBACK).env(METRICS, "").env(SOURCE, "").start().ready();
    assert_eq!(host.bound_ports(Protocol::Tcp), [8080].into());
    assert!(host.bound_ports(Protocol::Udp).is_empty());
}

#[test]
fn limits_have_the_names_of_the_flags_of_publish() {
    let host = Namespace::new();
    let _server = EchoServer::tcp(&host, back());
    let launch =
        Launch::new(&host, LOOPBACK).env(LIMITS, "max-client-connections=2,max-connections=9");
    let _proxy = launch.start().ready();
    let mut held = [connect(&host, front()), connect(&host, front())];
    assert_reset(&host, front());
    for client in &mut held {
        echo(client, b"still there");
    }
}

#[test]
fn version_1_of_the_proxy_protocol_carries_the_client() {
    let net = Topology::three();
    let backend = net.container.run(|| TcpListener::bind((addr::CONTAINER_V4, 80))).unwrap();
    for (host, family) in [(IpAddr::from(addr::HOST_V4), "TCP4"), (addr::HOST_V6.into(), "TCP6")] {
        let arguments = with_host(host);
        let _proxy = Launch::new(&net.host, &arguments).env(PROXY_PROTOCOL, "v1").start().ready();
        let (received, client) = one_connection(&net, &backend, host);
        let expected =
            format!("PROXY {family} {} {host} {} 8080\r\npayload", client.ip(), client.port());
        assert_eq!(String::from_utf8_lossy(&received), expected);
    }
}

#[test]
fn version_2_of_the_proxy_protocol_carries_the_client() {
    let net = Topology::three();
    let backend = net.container.run(|| TcpListener::bind((addr::CONTAINER_V4, 80))).unwrap();
    // Selected by its version, and by the source.
    for (variable, value) in [(PROXY_PROTOCOL, "v2"), (SOURCE, "proxy-protocol")] {
        for host in [IpAddr::from(addr::HOST_V4), addr::HOST_V6.into()] {
            let arguments = with_host(host);
            let _proxy = Launch::new(&net.host, &arguments).env(variable, value).start().ready();
            let (received, client) = one_connection(&net, &backend, host);
            assert_eq!(
                received,
                [version_2_header(client, (host, 8080).into()), b"payload".to_vec()].concat()
            );
        }
    }
}

#[test]
fn the_proxy_protocol_does_not_affect_datagrams() {
    let host = Namespace::new();
    let _server = EchoServer::udp(&host, back());
    let _proxy = Launch::new(&host, LOOPBACK_UDP).env(PROXY_PROTOCOL, "v2").start().ready();
    let client = udp(&host, front());
    client.send(b"payload").unwrap();
    let mut answer = [0; 100];
    let length = client.recv(&mut answer).unwrap();
    assert_eq!(&answer[..length], b"payload");
}

#[test]
fn an_invalid_variable_is_rejected_in_one_line() {
    let host = Namespace::new();
    let cases = [
        (
            LIMITS,
            "max-connections=0",
            r#"TIDEGATE_PROXY_LIMITS="max-connections=0": max-connections=0: a limit is a whole number of at least 1"#,
        ),
        (
            SOURCE,
            "nat",
            r#"TIDEGATE_PROXY_SOURCE="nat": "nat" is not proxy, client or proxy-protocol"#,
        ),
        (
            PROXY_PROTOCOL,
            "3",
            r#"TIDEGATE_PROXY_PROTOCOL="3": PROXY protocol version "3" is not known: say v1 or v2"#,
        ),
        (
            METRICS,
            "9464",
            r#"TIDEGATE_PROXY_METRICS="9464": metrics address "9464" is not ADDRESS:PORT or ADDRESS:PORT-PORT"#,
        ),
    ];
    for (variable, value, reason) in cases {
        let refusal = Launch::new(&host, LOOPBACK).env(variable, value).start().refused();
        assert_eq!(refusal.reason, reason);
        assert_eq!(refusal.stderr, format!("docker-proxy: error: {reason}\n"));
        assert_eq!(refusal.exit_code, Some(1));
    }
    let refusal = Launch::new(&host, LOOPBACK).env("TIDEGATE_LOG", "=/=").start().refused();
    assert!(
        refusal.reason.starts_with(r#"TIDEGATE_LOG="=/=" is not a log filter"#),
        "{}",
        refusal.reason
    );
    assert!(!refusal.reason.contains('\n'), "{}", refusal.reason);
    assert_eq!(refusal.exit_code, Some(1));
}

#[test]
fn the_client_address_is_shown_on_request_and_its_rules_are_removed() {
    let net = Topology::three();
    let run = tempfile::tempdir().unwrap();
    let _tcp = PeerServer::tcp(&net.container, (addr::CONTAINER_V4, 80).into());
    let _udp = PeerServer::udp(&net.container, (addr::CONTAINER_V4, 80).into());
    let before = rules(&net.host);
    for protocol in ["tcp", "udp"] {
        let mut proxy =
            showing_clients(&net, run.path(), &format!("-proto {protocol} {TO_CONTAINER}"));
        assert_eq!(
            seen_by_container(&net.client, protocol, (addr::HOST_V4, 8080)),
            addr::CLIENT_V4
        );
        assert_ne!(rules(&net.host), before, "a policy rule routes replies back");
        // The host itself is shown as the gateway.
        assert_eq!(seen_by_container(&net.host, protocol, (addr::HOST_V4, 8080)), addr::GATEWAY_V4);
        assert_eq!(proxy.stop(Signal::INT, SOON).code(), Some(0));
        assert_eq!(rules(&net.host), before);
    }
}

#[test]
fn proxies_that_show_the_client_do_not_affect_each_other() {
    let net = Topology::three();
    let run = tempfile::tempdir().unwrap();
    let _server = PeerServer::tcp(&net.container, (addr::CONTAINER_V4, 80).into());
    let before = rules(&net.host);
    let start = |ports: &str| showing_clients(&net, run.path(), &format!("{TO_CONTAINER} {ports}"));
    let seen = |port| seen_by_container(&net.client, "tcp", (addr::HOST_V4, port));
    let mut first = start("-host-port 8081");
    let mut second = start("-host-port 8082");
    // The IPv6 proxy that dockerd starts as well. The address of an IPv6 client cannot be the
    // source of packets to an IPv4 container.
    let mut third = start("-host-ip :: -host-port 8081");
    assert_eq!((seen(8081), seen(8082)), (addr::CLIENT_V4.into(), addr::CLIENT_V4.into()));
    assert_eq!(seen_by_container(&net.client, "tcp", (addr::HOST_V6, 8081)), addr::GATEWAY_V4);
    assert_eq!(first.stop(Signal::TERM, SOON).code(), Some(0));
    assert_eq!(seen(8082), addr::CLIENT_V4);

    // A killed proxy cannot clean up; the next one does.
    second.stop(Signal::KILL, SOON);
    let mut fourth = start("-host-port 8082");
    assert_eq!(seen(8082), addr::CLIENT_V4);
    for proxy in [&mut third, &mut fourth] {
        assert_eq!(proxy.stop(Signal::TERM, SOON).code(), Some(0));
    }
    assert_eq!(rules(&net.host), before);
}

#[test]
fn a_log_that_cannot_be_written_affects_no_connection() {
    let host = Namespace::new();
    let _server = EchoServer::tcp(&host, back());
    let mut proxy = short_of_descriptors(&host, "2>/dev/full");
    let mut first = connect(&host, front());
    echo(&mut first, b"first");
    let held = excess_connections(&host);
    for _ in 0..20 {
        echo(&mut first, b"still there");
    }
    drop(held);
    assert!(proxy.is_running());
    // The flood counts until the proxy has seen its connections close.
    let answered = || {
        let mut answer = [0; 4];
        let mut client = connect(&host, front());
        client.write_all(b"echo").and_then(|()| client.read_exact(&mut answer)).is_ok()
    };
    assert!((0..100).any(|_| answered() || {
        std::thread::sleep(std::time::Duration::from_millis(50));
        false
    }));
}

#[test]
fn a_warning_outside_of_a_terminal_is_plain_text() {
    let host = Namespace::new();
    let _server = StalledServer::tcp(&host, back());
    let proxy = short_of_descriptors(&host, "");
    let _held = excess_connections(&host);
    let line = proxy.wait_for_line("limit of connections reached", SOON);
    assert!(line.contains(" WARN ") && line.contains("publish=127.0.0.1:8080/tcp"), "{line:?}");
    assert!(!line.contains('\x1b'), "{line:?}");
}

/// More connections of one client than its share.
fn excess_connections(host: &Namespace) -> Vec<TcpStream> {
    host.run(|| (0..40).filter_map(|_| TcpStream::connect_timeout(&front(), SOON).ok()).collect())
}

#[test]
fn an_idle_proxy_prints_its_memory() {
    let host = Namespace::new();
    for (name, arguments) in [("tcp", LOOPBACK), ("udp", LOOPBACK_UDP)] {
        let proxy = Launch::new(&host, arguments).start().ready();
        println!(
            "idle {name} docker-proxy: PSS {} KB, RSS {} KB, {} descriptors",
            proxy.pss() / 1024,
            proxy.rss() / 1024,
            proxy.open_fds()
        );
        assert!(proxy.open_fds() < 20);
    }
}

fn with_host(host: IpAddr) -> String {
    format!("-host-ip {host} {TO_CONTAINER}")
}

/// Sends `payload` through the proxy. Returns the bytes that the backend received, and the address
/// of the client.
fn one_connection(net: &Topology, backend: &TcpListener, host: IpAddr) -> (Vec<u8>, SocketAddr) {
    let mut client = connect(&net.client, (host, 8080));
    client.write_all(b"payload").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    let (mut server, _) = backend.accept().unwrap();
    let mut received = Vec::new();
    server.read_to_end(&mut received).unwrap();
    (received, client.local_addr().unwrap())
}

/// Section 2.2 of the PROXY protocol specification: signature, version and command, family and
/// protocol, length, addresses, ports.
fn version_2_header(client: SocketAddr, host: SocketAddr) -> Vec<u8> {
    let mut header = b"\r\n\r\n\0\r\nQUIT\n\x21".to_vec();
    header.extend(if client.is_ipv4() { [0x11, 0, 12] } else { [0x21, 0, 36] });
    for end in [client, host] {
        match end.ip() {
            IpAddr::V4(ip) => header.extend(ip.octets()),
            IpAddr::V6(ip) => header.extend(ip.octets()),
        }
    }
    header.extend(client.port().to_be_bytes());
    header.extend(host.port().to_be_bytes());
    header
}

/// The status line and the body of a GET.
fn scrape(namespace: &Namespace, port: u16, path: &str) -> (String, String) {
    let mut stream = connect(namespace, ([127, 0, 0, 1], port));
    write!(stream, "GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").expect("an answer has a head");
    (head.lines().next().unwrap_or_default().to_owned(), body.to_owned())
}

/// Waits until the page has exactly these values, because counters may lag behind payload.
#[track_caller]
fn assert_settles(namespace: &Namespace, port: u16, expected: &[(&str, u64)]) {
    let mut page = String::new();
    let settled = eventually(SOON, || {
        page = scrape(namespace, port, "/metrics").1;
        let values: BTreeMap<&str, &str> =
            page.lines().filter_map(|line| line.rsplit_once(' ')).collect();
        expected
            .iter()
            .all(|(series, value)| values.get(series) == Some(&value.to_string().as_str()))
    });
    assert!(settled, "{expected:?} not reached in:\n{page}");
}

/// A proxy that logs a warning after a few clients.
#[track_caller]
fn short_of_descriptors(host: &Namespace, redirection: &str) -> Process {
    let mut shell = host.command("sh");
    let binary = env!("CARGO_BIN_EXE_docker-proxy");
    shell.args(["-c", &format!("ulimit -n 40; exec {binary} {LOOPBACK} {redirection}")]);
    shell.env("TIDEGATE_LOG", "warn");
    Launch::of(shell).start().ready()
}

/// A proxy on the host that shows clients to the container, with the run directory `run`.
#[track_caller]
fn showing_clients(net: &Topology, run: &Path, arguments: &str) -> Process {
    let launch = Launch::new(&net.host, arguments).env(SOURCE, "client");
    launch.env("TIDEGATE_RUN_DIR", run).start().ready()
}

/// The client address that a [`PeerServer`] behind `to` sees.
#[track_caller]
fn seen_by_container(from: &Namespace, protocol: &str, to: impl Into<SocketAddr>) -> IpAddr {
    let mut seen = String::new();
    if protocol == "tcp" {
        connect(from, to).read_to_string(&mut seen).unwrap();
    } else {
        let socket = udp(from, to);
        socket.send(b"?").unwrap();
        let mut answer = [0; 100];
        let length = socket.recv(&mut answer).unwrap();
        seen.push_str(std::str::from_utf8(&answer[..length]).unwrap());
    }
    seen.parse::<SocketAddr>().unwrap().ip()
}

/// The policy rules and the routes of all tables of the namespace.
fn rules(namespace: &Namespace) -> String {
    ["rule", "-6 rule", "route show table all", "-6 route show table all"]
        .map(|what| namespace.ip(&what.split(' ').collect::<Vec<_>>()))
        .concat()
}
