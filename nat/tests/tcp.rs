//! TCP through the engine, with real kernels on both sides.

mod common;

use common::{Net, Options, at, server};
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};
use tidegate_nat::flow_table::Limit;
use tidegate_nat::{Capabilities, DropReason, FlowKind};
use tidegate_testbed::eventually;
use tidegate_testbed::server::{EchoServer, PeerServer, Sink, Source, StalledServer};
use tidegate_testbed::transfer::{self, Transfer};

const BULK_BYTES: u64 = if common::OLD_KERNEL { 20 << 20 } else { 200 << 20 };
const TIMEOUT: Duration = Duration::from_secs(60);

/// Transfers `bytes` in both directions, over both families, and verifies each of them.
fn transfer_both_ways(net: &Net, bytes: u64) {
    for family in [0, 1] {
        let sink = Sink::tcp(&net.server, server(family, 7001), 3);
        let sent = net.container.run(|| {
            let mut stream = TcpStream::connect(sink.addr()).unwrap();
            transfer::send(&mut stream, 3, bytes).unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
            transfer::receive(&mut stream, 0)
        });
        assert_eq!(sent, Transfer::complete(0), "the server closes as well");
        assert_eq!(sink.wait(1, TIMEOUT), [Transfer::complete(bytes)]);

        let source = Source::tcp(&net.server, server(family, 7002), 4, bytes);
        let received = net.container.run(|| {
            let mut stream = TcpStream::connect(source.addr()).unwrap();
            transfer::receive(&mut stream, 4)
        });
        assert_eq!(received, Transfer::complete(bytes));
    }
}

#[test]
fn two_hundred_megabytes_are_transferred_both_ways() {
    transfer_both_ways(&Net::new(), BULK_BYTES);
}

#[test]
fn it_works_without_optional_kernel_features() {
    let options = Options { capabilities: Capabilities::NONE, ..Options::default() };
    transfer_both_ways(&Net::with(&options, |_| {}), BULK_BYTES);
}

#[test]
fn it_works_without_so_peek_off() {
    let capabilities = Capabilities { peek_offset: false, ..Capabilities::ALL };
    transfer_both_ways(
        &Net::with(&Options { capabilities, ..Options::default() }, |_| {}),
        BULK_BYTES,
    );
}

#[test]
fn it_works_without_device_offload() {
    let capabilities = Capabilities { tcp_offload: false, ..Capabilities::ALL };
    transfer_both_ways(
        &Net::with(&Options { capabilities, ..Options::default() }, |_| {}),
        BULK_BYTES / 4,
    );
}

#[test]
fn drops_at_the_device_lose_no_data() {
    let net = Net::with(&Options { queue_length: 3, ..Options::default() }, |_| {});
    thread::scope(|scope| {
        for port in 7100..7104 {
            let net = &net;
            scope.spawn(move || {
                let sink = Sink::tcp(&net.server, server(0, port), 3);
                net.container.run(|| {
                    let mut stream = TcpStream::connect(sink.addr()).unwrap();
                    transfer::send(&mut stream, 3, BULK_BYTES / 8).unwrap();
                });
                assert_eq!(sink.wait(1, TIMEOUT), [Transfer::complete(BULK_BYTES / 8)]);
            });
        }
    });
    let devices =
        net.container.run(|| std::fs::read_to_string("/proc/thread-self/net/dev").unwrap());
    let tun = devices.lines().find_map(|line| line.trim().strip_prefix("tun0:")).unwrap();
    let dropped: u64 = tun.split_whitespace().nth(11).unwrap().parse().unwrap();
    assert!(dropped > 0, "the device must drop packets: {devices}");
}

#[test]
fn an_mtu_of_65520_works() {
    transfer_both_ways(
        &Net::with(&Options { mtu: 65_520, ..Options::default() }, |_| {}),
        BULK_BYTES,
    );
}

#[test]
fn half_closes_are_forwarded() {
    let net = Net::new();
    for family in [0, 1] {
        let echo = EchoServer::tcp(&net.server, server(family, 7));
        let answer = net.container.run(|| {
            let mut stream = TcpStream::connect(echo.addr()).unwrap();
            stream.write_all(b"question").unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).unwrap();
            answer
        });
        assert_eq!(answer, "question");
    }
    let gone = || net.nat.stats().flows(FlowKind::Tcp) == 0;
    assert!(eventually(Duration::from_secs(5), gone), "no flow remains");
}

#[test]
fn the_server_sees_the_address_of_the_host() {
    let net = Net::new();
    for family in [0, 1] {
        let peer = PeerServer::tcp(&net.server, server(family, 80));
        let seen = net.container.run(|| {
            let mut seen = String::new();
            TcpStream::connect(peer.addr()).unwrap().read_to_string(&mut seen).unwrap();
            seen
        });
        assert!(seen.contains(common::HOST[family]), "{seen}");
    }
}

#[test]
fn a_closed_port_refuses_immediately() {
    let net = Net::new();
    for family in [0, 1] {
        // On a busy machine a SYN may be lost, and is retransmitted after a second.
        let refused_at_once = (0..3).any(|_| {
            let begun = Instant::now();
            let error = net.container.run(|| TcpStream::connect(server(family, 9)).unwrap_err());
            assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
            begun.elapsed() < Duration::from_secs(1)
        });
        assert!(refused_at_once, "family {family}");
    }
}

#[test]
fn unreachable_destinations_are_reported() {
    let net = Net::new();
    for (address, kind) in [
        ("198.51.100.1", ErrorKind::NetworkUnreachable),
        ("192.0.2.77", ErrorKind::HostUnreachable),
        ("2001:db8:9::1", ErrorKind::NetworkUnreachable),
        ("2001:db8::77", ErrorKind::HostUnreachable),
    ] {
        let error = net.container.run(|| TcpStream::connect(at(address, 80)).unwrap_err());
        assert_eq!(error.kind(), kind, "{address}: {error}");
    }
}

#[test]
fn resets_are_forwarded_both_ways() {
    let net = Net::new();
    let listener = net.server.run(|| TcpListener::bind(server(0, 80)).unwrap());
    let reset = |stream: TcpStream| {
        socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
    };
    let connect = || {
        let client = net.container.run(|| TcpStream::connect(server(0, 80)).unwrap());
        (client, listener.accept().unwrap().0)
    };
    let (mut client, remote) = connect();
    reset(remote);
    assert_eq!(client.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    let (client, mut remote) = connect();
    reset(client);
    assert_eq!(remote.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
}

#[test]
fn a_stalled_server_blocks_only_its_own_client() {
    let net = Net::new();
    let stalled = StalledServer::tcp(&net.server, server(0, 80));
    let pushed = net.container.run(|| {
        let mut stream = TcpStream::connect(stalled.addr()).unwrap();
        stream.set_write_timeout(Some(Duration::from_secs(2))).unwrap();
        let mut pushed = 0usize;
        while let Ok(count) = stream.write(&[0; 1 << 16]) {
            pushed += count;
        }
        pushed
    });
    assert!(pushed < 64 << 20, "{pushed} bytes were accepted");
    transfer_both_ways(&net, 1 << 20);
}

#[test]
fn concurrent_connections_are_all_served() {
    let net = Net::new();
    let echo = EchoServer::tcp(&net.server, server(0, 7));
    common::echo_concurrently(&net.container, echo.addr());
    assert_eq!(echo.served(), 800);
}

#[test]
fn connections_per_minute_may_exceed_the_source_port_range() {
    // Each connection that the container closes first leaves one in TIME_WAIT for a minute.
    let net = Net::with(&Options { ports: Some("40000 40499"), ..Options::default() }, |_| {});
    let echo = EchoServer::tcp(&net.server, server(0, 7));
    net.container.run(|| {
        for _ in 0..2000 {
            let mut stream = TcpStream::connect(echo.addr()).unwrap();
            stream.write_all(b"x").unwrap();
            stream.read_exact(&mut [0]).unwrap();
        }
    });
    let dropped = net.nat.stats().dropped(DropReason::Descriptors);
    assert_eq!(dropped, 0, "no connection was dropped");
}

#[test]
fn stopping_removes_the_device_and_resets_connections() {
    let net = Net::new();
    let listener = net.server.run(|| TcpListener::bind(server(0, 80)).unwrap());
    let mut client = net.container.run(|| TcpStream::connect(server(0, 80)).unwrap());
    let mut remote = listener.accept().unwrap().0;
    client.write_all(b"x").unwrap();
    remote.read_exact(&mut [0]).unwrap();
    net.nat.stop();
    assert_eq!(remote.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    assert!(!net.container.ip(&["-o", "link"]).contains("tun0"));
}

/// Kernel memory of the TCP sockets of the host, in bytes: allocated for received data, and queued
/// for sending.
fn socket_memory(net: &Net) -> usize {
    let output = net.host.command("ss").args(["-tmnH"]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let sizes = text.split("skmem:(").skip(1).flat_map(|rest| {
        rest.split(')').next().unwrap().split(',').filter_map(|part| {
            part.strip_prefix('r').or(part.strip_prefix('w'))?.parse::<usize>().ok()
        })
    });
    sizes.sum()
}

const BUDGET: usize = 16 << 20;

/// Waits until `net` is quiet, and verifies that connections which one side does not read hold at
/// most [`BUDGET`], and that a large transfer of the same container still succeeds.
fn assert_within_budget(net: &Net, port: u16) {
    let quiet = eventually(Duration::from_secs(20), || {
        let before = socket_memory(net);
        thread::sleep(Duration::from_millis(300));
        before == socket_memory(net)
    });
    assert!(quiet);
    let stats = net.nat.stats();
    let (memory, held) = (socket_memory(net), stats.held_bytes.get() as usize);
    assert!((1..=BUDGET).contains(&memory), "{memory}: {}", net.counters());
    assert!((1..=BUDGET).contains(&held), "{held}: {}", net.counters());
    let source = Source::tcp(&net.server, server(0, port), 6, 8 << 20);
    let received = net.container.run(|| {
        let mut stream = TcpStream::connect(source.addr()).unwrap();
        transfer::receive(&mut stream, 6)
    });
    assert_eq!(received, Transfer::complete(8 << 20));
}

#[test]
fn data_that_the_container_does_not_read_stays_within_the_byte_budget() {
    let net = Net::with(&Options::default(), |settings| settings.limits.held_bytes = BUDGET);
    let source = Source::tcp(&net.server, server(0, 7003), 5, 64 << 20);
    // Reads enough for a wide buffer, and then nothing more.
    let streams: Vec<TcpStream> = net.container.run(|| {
        let mut buffer = vec![0; 2 << 20];
        let connect = || {
            let mut stream = TcpStream::connect(source.addr()).unwrap();
            let _ = stream.read_exact(&mut buffer);
            stream
        };
        std::iter::repeat_with(connect).take(60).collect()
    });
    assert_within_budget(&net, 7004);
    let stats = net.nat.stats();
    let evicted = stats.evicted_by_limit[Limit::HeldBytes as usize].get();
    assert!((10..60).contains(&evicted), "{evicted}");
    drop(streams);
    assert!(eventually(Duration::from_secs(10), || stats.held_bytes.get() == 0));
}

#[test]
fn data_that_the_server_does_not_read_stays_within_the_byte_budget() {
    let net = Net::with(&Options::default(), |settings| settings.limits.held_bytes = BUDGET);
    let stalled = StalledServer::tcp(&net.server, server(0, 7005));
    let streams: Vec<TcpStream> = net.container.run(|| {
        let connect = || {
            let mut stream = TcpStream::connect(stalled.addr()).unwrap();
            stream.set_nonblocking(true).unwrap();
            for _ in 0..200 {
                match stream.write(&[7; 64 << 10]) {
                    Ok(_) => {}
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {
                        thread::sleep(Duration::from_millis(1));
                    }
                    Err(_) => break,
                }
            }
            stream
        };
        std::iter::repeat_with(connect).take(60).collect()
    });
    assert_within_budget(&net, 7006);
    drop(streams);
}
