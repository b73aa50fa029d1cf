//! Traffic of every kind in identical rounds, and the expected counts.

use crate::scene::service_namespace;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpStream, UdpSocket};
use std::time::Duration;
use tidegate_testbed::server::{EchoServer, Sink, Source};
use tidegate_testbed::transfer::{self, Transfer};
use tidegate_testbed::{Namespace, Process, Topology, addr};

const SOON: Duration = Duration::from_secs(10);

/// The number of rounds.
pub(crate) const ROUNDS: u32 = 2;

/// Two containers on one network, with ports that are open and ports that are closed.
pub(crate) const PROJECT: &str = r#"
name: shop
networks: { home: { enable_ipv6: true, ipam: { config: [ { subnet: 10.81.1.0/24 }, { subnet: "fd81:1::/64" } ] } } }
services:
  box:
    command: [ sleep, "60" ]
    dns: 203.0.113.9
    networks: [ home ]
    ports: [ "8080:80", "8081:81", "5353:7/udp", "5354:9/udp" ]
  db: { command: [ sleep, "60" ], networks: [ home ] }
"#;

/// Bytes of each connection to the echo server, over IPv4 and IPv6.
const ECHOED: [u64; 2] = [1_000_003, 77_777];
/// Datagrams to the echo server, and their size.
const DATAGRAMS: (u64, usize) = (10, 333);
/// Datagrams to a closed port.
const LOST: u64 = 3;
/// Connections to a closed port.
const REFUSED: u64 = 3;
/// Bytes that a container sends to and receives from an external host.
const SENT: u64 = 300_007;
const RECEIVED: u64 = 700_001;
/// Datagrams that a container exchanges with an external host, and their size.
const OUTSIDE: (u64, usize) = (5, 100);
/// Datagrams from a container to a reserved address, which the engine rejects.
const FORBIDDEN: (u64, SocketAddr) =
    (4, SocketAddr::new(IpAddr::V4(Ipv4Addr::new(240, 0, 0, 1)), 9999));

/// DNS queries: name, type, number per round, and response code. External names are new in each
/// round, because responses are cached.
const QUESTIONS: [(&str, &str, u64, &str); 5] = [
    ("db", "A", 5, "NOERROR"),
    ("db", "AAAA", 2, "NOERROR"),
    ("nobody", "A", 3, "NXDOMAIN"),
    ("ROUND.example.test", "A", 4, "NOERROR"),
    // The external server refuses, and there is no other.
    ("ROUND.refused.test", "A", 1, "REFUSED"),
];

/// Servers in a container and outside, with their clients.
pub(crate) struct Traffic<'a> {
    net: &'a Topology,
    inside: Namespace,
    external: External,
    _echoes: [EchoServer; 2],
}

struct External {
    sink: Sink,
    source: Source,
    echo: EchoServer,
    _names: Process,
}

impl<'a> Traffic<'a> {
    /// Starts the servers for the project of `up`.
    #[track_caller]
    pub(crate) fn prepare(net: &'a Topology, up: &Process) -> Self {
        let inside = service_namespace(up, "box");
        let outside = |port| SocketAddr::new(IpAddr::from(addr::CLIENT_V4), port);
        let names = Process::spawn(net.client.command("dnsmasq").args([
            "--no-daemon",
            "--no-resolv",
            "--no-hosts",
            "--conf-file=/dev/null",
            "--listen-address=203.0.113.9",
            "--bind-interfaces",
            "--address=/example.test/192.0.2.77",
            "--local-ttl=60",
            "--pid-file=",
            "--user=root",
        ]));
        names.wait_for_line("started", SOON);
        let external = External {
            sink: Sink::tcp(&net.client, outside(7001), 3),
            source: Source::tcp(&net.client, outside(7002), 4, RECEIVED),
            echo: EchoServer::udp(&net.client, outside(7003)),
            _names: names,
        };
        let echoes = [
            EchoServer::tcp(&inside, "[::]:80".parse().unwrap()),
            EchoServer::udp(&inside, "[::]:7".parse().unwrap()),
        ];
        Self { net, inside, external, _echoes: echoes }
    }

    /// Runs one round.
    #[track_caller]
    pub(crate) fn round(&self, round: u32) {
        self.net.client.run(|| {
            echo_over_tcp((addr::HOST_V4, 8080).into(), ECHOED[0]);
            echo_over_tcp((addr::HOST_V6, 8080).into(), ECHOED[1]);
            reset((addr::HOST_V4, 8080).into());
            for _ in 0..REFUSED {
                refused((addr::HOST_V4, 8081).into());
            }
            let socket = udp();
            exchange(&socket, (addr::HOST_V4, 5353).into(), DATAGRAMS);
            for _ in 0..LOST {
                socket.send_to(b"lost", (addr::HOST_V4, 5354)).unwrap();
                // One at a time: the error of a datagram is reported at the next.
                std::thread::sleep(Duration::from_millis(50));
            }
        });
        self.inside.run(|| {
            let mut stream = connect(self.external.sink.addr());
            transfer::send(&mut stream, 3, SENT).unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
            stream.read_to_end(&mut Vec::new()).unwrap();
            let received = transfer::receive(&mut connect(self.external.source.addr()), 4);
            assert_eq!(received, Transfer::complete(RECEIVED));
            let socket = udp();
            exchange(&socket, self.external.echo.addr(), OUTSIDE);
            for _ in 0..FORBIDDEN.0 {
                udp().send_to(b"forbidden", FORBIDDEN.1).unwrap();
            }
        });
        self.external.sink.wait(round as usize + 1, SOON);
        for (name, kind, times, _) in QUESTIONS {
            let name = &name.replace("ROUND", &format!("round{round}"));
            for _ in 0..times {
                self.inside.exec("dig", &["@127.0.0.11", "+tries=1", "+time=8", name, kind]);
            }
        }
    }

    /// Connections and sessions that stay open until the result is dropped.
    pub(crate) fn keep_open(&self) -> [TcpStream; 2] {
        let client = self.net.client.run(|| {
            let mut stream = connect((addr::HOST_V4, 8080).into());
            stream.write_all(b"stay").unwrap();
            stream.read_exact(&mut [0; 4]).unwrap();
            stream
        });
        let container = self.inside.run(|| {
            let mut stream = connect(self.external.sink.addr());
            stream.write_all(b"stay").unwrap();
            stream
        });
        [client, container]
    }

    /// Expressions with their values after [`ROUNDS`] rounds and [`Traffic::keep_open`].
    pub(crate) fn expected(&self) -> Vec<(String, f64)> {
        let rounds = u64::from(ROUNDS);
        let mut all = Vec::new();
        let mut is = |expression: String, value: u64| all.push((expression, value as f64));
        let port = |family: &str, publish: &str, more: &str| {
            format!("tidegate_proxy_{family}{{publish=\"{publish}\"{more}}}")
        };
        let (v4, v6, dead) = ("0.0.0.0:8080/tcp", "[::]:8080/tcp", "0.0.0.0:8081/tcp");
        for direction in ["in", "out"] {
            let label = format!(", direction=\"{direction}\"");
            // A reset follows an echo of four bytes, and open connections have exchanged four.
            is(port("bytes_total", v4, &label), rounds * (ECHOED[0] + 4) + 4);
            is(port("bytes_total", v6, &label), rounds * ECHOED[1]);
            is(port("bytes_total", dead, &label), 0);
            is(port("datagrams_total", "0.0.0.0:5353/udp", &label), rounds * DATAGRAMS.0);
            is(
                port("bytes_total", "0.0.0.0:5353/udp", &label),
                rounds * DATAGRAMS.0 * DATAGRAMS.1 as u64,
            );
        }
        is(port("connections_total", v4, ""), 2 * rounds + 1);
        is(port("connections", v4, ""), 1);
        is(port("connections_total", v6, ""), rounds);
        is(port("connection_resets_total", v4, ""), rounds);
        is(port("connections_total", dead, ""), rounds * REFUSED);
        is(
            port("refused_connections_total", dead, ", reason=\"backend_refused\""),
            rounds * REFUSED,
        );
        is("sum(tidegate_proxy_refused_connections_total)".to_owned(), rounds * REFUSED);
        is(port("sessions_total", "0.0.0.0:5353/udp", ""), rounds);
        is(
            port("dropped_datagrams_total", "0.0.0.0:5354/udp", ", reason=\"backend_refused\""),
            rounds * LOST,
        );
        is("sum(tidegate_proxy_dropped_datagrams_total)".to_owned(), rounds * LOST);
        is(port("dial_seconds_count", v4, ""), 2 * rounds + 1);
        is(port("dial_seconds_count", v6, ""), rounds);
        is("sum(tidegate_proxy_dial_seconds_count)".to_owned(), 3 * rounds + 1);
        // Open connections have not ended.
        is(port("connection_seconds_count", v4, ""), 2 * rounds);
        is(port("connection_seconds_bucket", v6, ", le=\"+Inf\""), rounds);
        is(port("connection_seconds_count", dead, ""), 0);

        let nat =
            |family: &str, more: &str| format!("tidegate_nat_{family}{{network=\"shop\", {more}}}");
        let outside = OUTSIDE.0 * OUTSIDE.1 as u64;
        // The engine carries published UDP ports as well.
        let published = DATAGRAMS.0 * DATAGRAMS.1 as u64;
        is(nat("bytes_total", "direction=\"out\""), rounds * (SENT + outside + published) + 4);
        let lost = LOST * "lost".len() as u64;
        is(
            nat("bytes_total", "direction=\"in\""),
            rounds * (RECEIVED + outside + published + lost),
        );
        is(nat("flows_total", "protocol=\"tcp\""), 2 * rounds + 1);
        is(nat("flows_total", "protocol=\"udp\""), 3 * rounds);
        is(nat("dropped_packets_total", "reason=\"policy\""), rounds * FORBIDDEN.0);
        is("sum(tidegate_nat_connection_resets_total)".to_owned(), 0);

        for kind in ["A", "AAAA"] {
            for code in ["NOERROR", "NXDOMAIN", "REFUSED"] {
                let asked =
                    QUESTIONS.iter().filter(|question| question.1 == kind && question.3 == code);
                let asked: u64 = asked.map(|question| question.2).sum();
                if asked > 0 {
                    let labels = format!("network=\"home\", qtype=\"{kind}\", rcode=\"{code}\"");
                    is(format!("tidegate_dns_queries_total{{{labels}}}"), rounds * asked);
                }
            }
        }
        let asked: u64 = QUESTIONS.iter().map(|question| question.2).sum();
        is("sum(tidegate_dns_queries_total)".to_owned(), rounds * asked);
        // The first query for an external name is forwarded, the others are served from the cache.
        let server =
            |family: &str| format!("tidegate_dns_upstream_{family}{{server=\"203.0.113.9:53\"}}");
        is(server("queries_total"), rounds * 2);
        is(server("failures_total"), rounds);
        is(server("seconds_count"), rounds * 2);
        // The other instance sends no queries.
        is("sum(tidegate_dns_cache_lookups_total{result=\"miss\"})".to_owned(), rounds * 2);
        is("sum(tidegate_dns_cache_lookups_total{result=\"hit\"})".to_owned(), rounds * 3);

        let change = |change: &str| {
            format!(
                "tidegate_network_ruleset_update_seconds_count{{firewall=\"nftables\", change=\"{change}\"}}"
            )
        };
        is(change("all"), 1);
        is(change("ports"), rounds * 2);
        is("sum(tidegate_network_ruleset_update_failures_total)".to_owned(), 0);
        all
    }
}

fn connect(to: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect_timeout(&to, SOON).unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    stream
}

fn udp() -> UdpSocket {
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    socket.set_read_timeout(Some(SOON)).unwrap();
    socket
}

/// Sends `length` bytes and receives their echo, then both sides end in order.
#[track_caller]
fn echo_over_tcp(to: SocketAddr, length: u64) {
    let mut stream = connect(to);
    let mut sending = stream.try_clone().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            transfer::send(&mut sending, 9, length).unwrap();
            sending.shutdown(Shutdown::Write).unwrap();
        });
        assert_eq!(transfer::receive(&mut stream, 9), Transfer::complete(length));
    });
}

/// Receives an echo of four bytes and resets the connection.
#[track_caller]
fn reset(to: SocketAddr) {
    let mut stream = connect(to);
    stream.write_all(b"echo").unwrap();
    stream.read_exact(&mut [0; 4]).unwrap();
    socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
}

/// A connection that the port accepts and the container refuses.
#[track_caller]
fn refused(to: SocketAddr) {
    // The reset may come before connect(2) returns.
    let outcome = TcpStream::connect_timeout(&to, SOON).and_then(|mut stream| {
        stream.set_read_timeout(Some(SOON))?;
        stream.read(&mut [0; 1])
    });
    assert_eq!(outcome.unwrap_err().kind(), ErrorKind::ConnectionReset);
}

/// Sends datagrams one by one and receives the echo of each.
#[track_caller]
fn exchange(socket: &UdpSocket, to: SocketAddr, (count, length): (u64, usize)) {
    for _ in 0..count {
        socket.send_to(&vec![7; length], to).unwrap();
        assert_eq!(socket.recv(&mut vec![0; length + 1]).unwrap(), length);
    }
}
