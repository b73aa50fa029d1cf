//! TCP through the engine, with a real kernel at both ends.

mod common;

use common::{Net, Options, at, server};
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};
use tidegate_nat::{Capabilities, DropReason, FlowKind};
use tidegate_testbed::eventually;
use tidegate_testbed::server::{EchoServer, PeerServer, Sink, Source, StalledServer};
use tidegate_testbed::transfer::{self, Transfer};

const MUCH: u64 = if common::OLD_KERNEL { 20 << 20 } else { 200 << 20 };
const PATIENCE: Duration = Duration::from_secs(60);

/// Carries `bytes` up and down, over both families, and checks each of them.
fn carries(net: &Net, bytes: u64) {
    for family in [0, 1] {
        let sink = Sink::tcp(&net.server, server(family, 7001), 3);
        let sent = net.container.run(|| {
            let mut stream = TcpStream::connect(sink.addr()).unwrap();
            transfer::send(&mut stream, 3, bytes).unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
            transfer::receive(&mut stream, 0)
        });
        assert_eq!(sent, Transfer::complete(0), "the server closes in its turn");
        assert_eq!(sink.wait(1, PATIENCE), [Transfer::complete(bytes)]);

        let source = Source::tcp(&net.server, server(family, 7002), 4, bytes);
        let received = net.container.run(|| {
            let mut stream = TcpStream::connect(source.addr()).unwrap();
            transfer::receive(&mut stream, 4)
        });
        assert_eq!(received, Transfer::complete(bytes));
    }
}

#[test]
fn two_hundred_megabytes_go_up_and_down() {
    carries(&Net::new(), MUCH);
}

#[test]
fn without_any_new_feature_of_the_kernel_too() {
    let options = Options { capabilities: Capabilities::NONE, ..Options::default() };
    carries(&Net::with(&options, |_| {}), MUCH);
}

#[test]
fn without_so_peek_off_too() {
    let capabilities = Capabilities { peek_offset: false, ..Capabilities::ALL };
    carries(&Net::with(&Options { capabilities, ..Options::default() }, |_| {}), MUCH);
}

#[test]
fn without_offload_of_the_device_too() {
    let capabilities = Capabilities { tcp_offload: false, ..Capabilities::ALL };
    carries(&Net::with(&Options { capabilities, ..Options::default() }, |_| {}), MUCH / 4);
}

#[test]
fn a_device_that_drops_most_of_it_loses_nothing() {
    let net = Net::with(&Options { queue_length: 3, ..Options::default() }, |_| {});
    thread::scope(|scope| {
        for port in 7100..7104 {
            let net = &net;
            scope.spawn(move || {
                let sink = Sink::tcp(&net.server, server(0, port), 3);
                net.container.run(|| {
                    let mut stream = TcpStream::connect(sink.addr()).unwrap();
                    transfer::send(&mut stream, 3, MUCH / 8).unwrap();
                });
                assert_eq!(sink.wait(1, PATIENCE), [Transfer::complete(MUCH / 8)]);
            });
        }
    });
    let devices =
        net.container.run(|| std::fs::read_to_string("/proc/thread-self/net/dev").unwrap());
    let tun = devices.lines().find_map(|line| line.trim().strip_prefix("tun0:")).unwrap();
    let dropped: u64 = tun.split_whitespace().nth(11).unwrap().parse().unwrap();
    assert!(dropped > 0, "or it was no test: {devices}");
}

#[test]
fn an_mtu_of_65520_carries_as_well() {
    carries(&Net::with(&Options { mtu: 65_520, ..Options::default() }, |_| {}), MUCH);
}

#[test]
fn both_ends_see_each_others_half_close() {
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
    assert!(eventually(Duration::from_secs(5), gone), "nothing is left of what has ended");
}

#[test]
fn the_server_sees_the_host_and_not_the_container() {
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
fn a_closed_port_refuses_at_once() {
    let net = Net::new();
    for family in [0, 1] {
        // On a busy machine a SYN may be lost, and is sent again after a second.
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
fn what_cannot_be_reached_is_told_as_such() {
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
fn a_reset_of_either_end_reaches_the_other() {
    let net = Net::new();
    let listener = net.server.run(|| TcpListener::bind(server(0, 80)).unwrap());
    let reset = |stream: TcpStream| {
        socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
    };
    let connect = || {
        let client = net.container.run(|| TcpStream::connect(server(0, 80)).unwrap());
        (client, listener.accept().unwrap().0)
    };
    let (mut client, far_end) = connect();
    reset(far_end);
    assert_eq!(client.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    let (client, mut far_end) = connect();
    reset(client);
    assert_eq!(far_end.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
}

#[test]
fn a_server_that_does_not_read_stops_its_client_and_nobody_else() {
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
    assert!(pushed < 64 << 20, "{pushed} bytes went somewhere");
    carries(&net, 1 << 20);
}

#[test]
fn many_connections_at_once_all_get_their_answer() {
    let net = Net::new();
    let echo = EchoServer::tcp(&net.server, server(0, 7));
    common::ask_all_at_once(&net.container, echo.addr());
    assert_eq!(echo.served(), 800);
}

#[test]
fn a_server_is_dialled_more_often_in_a_minute_than_there_are_source_ports() {
    // Each connection that the container ends first leaves one in TIME_WAIT for a minute.
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
    assert_eq!(dropped, 0, "none was refused, to be asked for again");
}

#[test]
fn dropped_it_leaves_no_device_and_resets_what_it_carried() {
    let net = Net::new();
    let listener = net.server.run(|| TcpListener::bind(server(0, 80)).unwrap());
    let mut client = net.container.run(|| TcpStream::connect(server(0, 80)).unwrap());
    let mut far_end = listener.accept().unwrap().0;
    client.write_all(b"x").unwrap();
    far_end.read_exact(&mut [0]).unwrap();
    net.nat.stop();
    assert_eq!(far_end.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    assert!(!net.container.ip(&["-o", "link"]).contains("tun0"));
}
