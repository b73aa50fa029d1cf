//! The exit of the proxy. `docker stop` waits for it without a limit, so it must be immediate,
//! whatever the proxy is doing.

use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use tidegate_testbed::server::{EchoServer, Source, StalledServer};
use tidegate_testbed::transfer;
use tidegate_testbed::{Namespace, Process, Protocol, Signal, Topology, addr, eventually};

use crate::driver::{
    LOOPBACK, LOOPBACK_UDP, Launch, SOON, back, command, connect, echo, front, udp,
};

/// The limit for the exit.
const EXIT_LIMIT: Duration = Duration::from_millis(200);

/// The signal of dockerd when a container stops, and that of the kernel when dockerd exits.
const BOTH: [Signal; 2] = [Signal::INT, Signal::TERM];

#[test]
fn either_signal_right_after_readiness_ends_it_with_success() {
    let host = Namespace::new();
    for arguments in [LOOPBACK, LOOPBACK_UDP] {
        for signal in BOTH {
            assert_prompt(|| {
                let proxy = Launch::new(&host, arguments).start().ready();
                end(proxy, signal)
            });
        }
    }
}

#[test]
fn a_hundred_connections_are_reset_on_both_sides() {
    let host = Namespace::new();
    let backend = host.run(|| TcpListener::bind(back())).unwrap();
    for signal in BOTH {
        assert_prompt(|| {
            // This also shows that the port is free immediately.
            let proxy = Launch::new(&host, LOOPBACK).start().ready();
            let pairs: Vec<_> = (0..100).map(|_| pair(&host, &backend)).collect();
            let took = end(proxy, signal);
            for (client, server) in pairs {
                assert_eq!(ending_of(client), Some(ErrorKind::ConnectionReset), "the client side");
                assert_eq!(ending_of(server), Some(ErrorKind::ConnectionReset), "the backend side");
            }
            took
        });
    }
}

#[test]
fn an_interrupted_transfer_never_looks_complete() {
    const LENGTH: u64 = 1 << 40;
    let host = Namespace::new();
    let _source = Source::tcp(&host, back(), 1, LENGTH);
    for signal in BOTH {
        let proxy = Launch::new(&host, LOOPBACK).start().ready();
        let mut client = connect(&host, front());
        // Enough payload to use splice(2).
        let mut head = vec![0; 16 << 20];
        client.read_exact(&mut head).unwrap();
        end(proxy, signal);
        let mut rest = head.as_slice().chain(client);
        let transfer = transfer::receive(&mut rest, 1);
        assert_eq!(transfer.wrong_at, None);
        assert_eq!(transfer.error, Some(ErrorKind::ConnectionReset));
    }
}

#[test]
fn stalled_connections_do_not_delay_the_exit() {
    let host = Namespace::new();
    let _server = StalledServer::tcp(&host, back());
    for signal in BOTH {
        assert_prompt(|| {
            let proxy = Launch::new(&host, LOOPBACK).start().ready();
            let clients: Vec<_> = (0..2).map(|_| blocked_connection(&host)).collect();
            let took = end(proxy, signal);
            drop(clients);
            took
        });
    }
}

#[test]
fn clients_are_reset_while_the_backend_is_dialled() {
    let net = Topology::three();
    let arguments = "-host-port 8080 -container-ip 172.30.0.77 -container-port 80";
    for signal in BOTH {
        assert_prompt(|| {
            let proxy = Launch::new(&net.host, arguments).start().ready();
            // No host has the address. The kernel reports that after three seconds.
            let clients: Vec<_> =
                (0..10).map(|_| connect(&net.client, (addr::HOST_V4, 8080))).collect();
            assert!(eventually(SOON, || dialling(&net.host) == clients.len()));
            let took = end(proxy, signal);
            for client in clients {
                assert_eq!(ending_of(client), Some(ErrorKind::ConnectionReset));
            }
            took
        });
    }
}

#[test]
fn open_udp_sessions_do_not_delay_the_exit() {
    let host = Namespace::new();
    let _server = EchoServer::udp(&host, back());
    for signal in BOTH {
        assert_prompt(|| {
            let proxy = Launch::new(&host, LOOPBACK_UDP).start().ready();
            let clients: Vec<_> = (0..100).map(|_| udp(&host, front())).collect();
            for client in &clients {
                client.send(b"?").unwrap();
                assert_eq!(client.recv(&mut [0; 10]).unwrap(), 1);
            }
            end(proxy, signal)
        });
        assert!(!host.is_bound(Protocol::Udp, 8080));
    }
}

#[test]
fn signals_inherited_as_ignored_still_end_it() {
    let host = Namespace::new();
    for signal in BOTH {
        let mut shell = host.command("sh");
        let binary = env!("CARGO_BIN_EXE_docker-proxy");
        shell.args(["-c", &format!("trap '' HUP INT TERM; exec {binary} {LOOPBACK}")]);
        let mut proxy = Launch::of(shell).start().ready();
        proxy.signal(Signal::HUP);
        echo_once(&host);
        end(proxy, signal);
    }
}

#[test]
fn it_ends_with_the_thread_that_started_it() {
    let host = Namespace::new();
    let launch = Launch::new(&host, LOOPBACK).with_parent_death_signal();
    let mut proxy = thread::spawn(|| launch.start().ready()).join().unwrap();
    assert_eq!(proxy.wait(SOON).code(), Some(0));
    assert!(!host.is_bound(Protocol::Tcp, 8080));
}

#[test]
fn a_signal_during_the_start_ends_it() {
    let host = Namespace::new();
    for signal in BOTH {
        for microseconds in (0..5000).step_by(250) {
            let mut proxy = Process::spawn(&mut command(&host, LOOPBACK));
            let begun = Instant::now();
            while begun.elapsed() < Duration::from_micros(microseconds) {
                std::hint::spin_loop();
            }
            // The signal kills the proxy before its handlers are installed; afterwards the proxy
            // exits itself.
            let status = proxy.stop(signal, SOON);
            let by_kernel =
                std::os::unix::process::ExitStatusExt::signal(&status) == Some(signal.as_raw());
            assert!(status.success() || by_kernel, "{status}");
        }
    }
    assert!(host.bound_ports(Protocol::Tcp).is_empty());
}

/// Ends `proxy`, which must exit with 0, and returns the duration.
#[track_caller]
fn end(mut proxy: Process, signal: Signal) -> Duration {
    let begun = Instant::now();
    assert_eq!(proxy.stop(signal, SOON).code(), Some(0), "{signal:?}: {}", proxy.output());
    begun.elapsed()
}

/// Runs `round`, which ends a proxy, several times. A busy machine may delay some rounds, but not
/// most.
#[track_caller]
fn assert_prompt(mut round: impl FnMut() -> Duration) {
    let mut rounds: Vec<Duration> = (0..3).map(|_| round()).collect();
    rounds.sort();
    assert!(rounds[1] < EXIT_LIMIT, "ending took {rounds:?}");
}

/// A connection through the proxy: the end of the client and that of the backend, after payload in
/// both directions.
fn pair(host: &Namespace, backend: &TcpListener) -> (TcpStream, TcpStream) {
    let mut client = connect(host, front());
    let (mut server, _) = backend.accept().unwrap();
    server.set_read_timeout(Some(SOON)).unwrap();
    let mut byte = [0; 1];
    client.write_all(b"a").unwrap();
    server.read_exact(&mut byte).unwrap();
    server.write_all(b"b").unwrap();
    client.read_exact(&mut byte).unwrap();
    (client, server)
}

/// The error that ended a stream; `None` for an orderly end.
fn ending_of(mut stream: TcpStream) -> Option<ErrorKind> {
    std::io::copy(&mut stream, &mut std::io::sink()).err().map(|error| error.kind())
}

/// A connection whose buffers are full.
fn blocked_connection(host: &Namespace) -> TcpStream {
    let mut client = connect(host, front());
    client.set_write_timeout(Some(Duration::from_millis(100))).unwrap();
    let chunk = vec![0; 1 << 20];
    while client.write_all(&chunk).is_ok() {}
    client
}

/// The number of connections of `namespace` in SYN_SENT (state 02 in `/proc/net/tcp`).
fn dialling(namespace: &Namespace) -> usize {
    let table = namespace.run(|| std::fs::read_to_string("/proc/thread-self/net/tcp")).unwrap();
    table.lines().filter(|line| line.split_ascii_whitespace().nth(3) == Some("02")).count()
}

fn echo_once(host: &Namespace) {
    let _server = EchoServer::tcp(host, back());
    echo(&mut connect(host, front()), b"alive");
}
