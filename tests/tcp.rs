//! A published TCP port, as both of its ends see it: real clients and servers with a real kernel between them.
//!
//! The client reaches the host's address, `tidegate publish` runs on the host, and the server is in a container
//! behind the host's bridge. Where what must happen is "as without a proxy", the test does the same thing over
//! the kernel's own path first and compares.

mod support;

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use rustix::process::{ForeignRawFd, Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use socket2::SockRef;
use support::{
    Backend, PATIENCE, Publisher, ask, connect, container, host, host_v6, is_ready, limit_open_files,
    read_all, read_to_end, reset, wait_for_reset, wait_until,
};
use tidegate_testbed::server::{EchoServer, PeerServer, Sink, Source};
use tidegate_testbed::transfer::{self, Transfer};
use tidegate_testbed::{Namespace, Pattern, Protocol, Signal, Topology, addr, procfs, raise_open_files};

const MIB: u64 = 1 << 20;

/// What is moved before a connection counts as fast.
const FAST: u64 = MIB;

/// How the published port is called where only IPv4 is looked at.
const PORT: &str = "0.0.0.0:8080/tcp";

// ---- payload

#[test]
fn a_quarter_of_a_gibibyte_arrives_whole_in_each_direction() {
    const LENGTH: u64 = 256 * MIB;
    let net = Topology::three();
    let sink = Sink::tcp(&net.container, container(80), 1);
    let _source = Source::tcp(&net.container, container(81), 2, LENGTH);
    let publisher = Publisher::start(&net.host, &format!("8080-8081:80-81 --to {}", addr::CONTAINER_V4));

    let mut up = connect(&net.client, host(8080));
    transfer::send(&mut up, 1, LENGTH).unwrap();
    up.shutdown(Shutdown::Write).unwrap();
    assert_eq!(sink.wait(1, PATIENCE), [Transfer::complete(LENGTH)]);

    let mut down = connect(&net.client, host(8081));
    down.shutdown(Shutdown::Write).unwrap();
    assert_eq!(transfer::receive(&mut down, 2), Transfer::complete(LENGTH));

    drop((up, down));
    let metrics = publisher.wait_for_metrics(|metrics| {
        metrics.port("connections", PORT) + metrics.port("connections", "0.0.0.0:8081/tcp") == 0
    });
    assert_eq!(metrics.labelled("bytes_total", PORT, "direction", "in"), LENGTH);
    assert_eq!(metrics.labelled("bytes_total", "0.0.0.0:8081/tcp", "direction", "out"), LENGTH);
}

#[test]
fn both_directions_run_at_once() {
    const LENGTH: u64 = 64 * MIB;
    let bed = Bed::new("");
    let (client, server) = bed.pair();
    thread::scope(|scope| {
        for (stream, seed) in [(&client, 1), (&server, 2)] {
            scope.spawn(move || {
                transfer::send(&mut &*stream, seed, LENGTH).unwrap();
                stream.shutdown(Shutdown::Write).unwrap();
            });
        }
        let at_server = scope.spawn(|| transfer::receive(&mut &server, 1));
        assert_eq!(transfer::receive(&mut &client, 2), Transfer::complete(LENGTH));
        assert_eq!(at_server.join().unwrap(), Transfer::complete(LENGTH));
    });
}

#[test]
fn writes_and_reads_of_odd_sizes_make_the_same_stream() {
    const LENGTH: usize = 8 << 20;
    let bed = Bed::new("");
    let (mut client, mut server) = bed.pair();
    thread::scope(|scope| {
        scope.spawn(move || {
            let mut pattern = Pattern::new(5);
            for size in odd_sizes(LENGTH, 7) {
                let mut chunk = vec![0; size];
                pattern.fill(&mut chunk);
                client.write_all(&chunk).unwrap();
            }
            client.shutdown(Shutdown::Write).unwrap();
            assert_eq!(read_to_end(&client), b"");
        });
        let mut pattern = Pattern::new(5);
        for size in odd_sizes(LENGTH, 11) {
            let mut chunk = vec![0; size];
            server.read_exact(&mut chunk).unwrap();
            assert_eq!(pattern.check(&chunk), Ok(()));
        }
        assert_eq!(read_to_end(&server), b"");
        drop(server);
    });
}

#[test]
fn connections_side_by_side_do_not_mix() {
    const CONNECTIONS: u64 = 48;
    const LENGTH: u64 = MIB;
    let net = Topology::three();
    let _echo = EchoServer::tcp(&net.container, container(80));
    let _publisher = Publisher::start(&net.host, &format!("8080:80 --to {}", addr::CONTAINER_V4));
    let streams: Vec<TcpStream> = (0..CONNECTIONS).map(|_| connect(&net.client, host(8080))).collect();
    thread::scope(|scope| {
        for (seed, stream) in streams.iter().enumerate() {
            scope.spawn(move || {
                transfer::send(&mut &*stream, seed as u64, LENGTH).unwrap();
                stream.shutdown(Shutdown::Write).unwrap();
            });
            scope.spawn(move || {
                assert_eq!(transfer::receive(&mut &*stream, seed as u64), Transfer::complete(LENGTH));
            });
        }
    });
}

#[test]
fn bytes_behind_urgent_data_arrive() {
    for (bed, moved) in Bed::each([1, FAST]) {
        let (client, server) = bed.pair_after(moved);
        send_around_urgent_data(&bed, &client, false);
        assert_eq!(read_past_urgent_data(&server), "beforeafter", "after {moved} bytes each way");
        assert_eq!(ask_and_answer(&client, &server), (b"more".to_vec(), b"an answer".to_vec()));
    }
}

#[test]
fn bytes_between_urgent_data_and_the_end_are_not_cut_off() {
    for (bed, moved) in Bed::each([1, FAST]) {
        let (client, server) = bed.pair_after(moved);
        send_around_urgent_data(&bed, &client, true);
        assert_eq!(read_past_urgent_data(&server), "beforeafter", "after {moved} bytes each way");
        assert_eq!(read_to_end(&server), b"");
    }
}

/// The end may arrive between two looks of the proxy, in the middle of its work: hence the many rounds.
#[test]
fn urgent_data_in_a_fast_transfer_never_cuts_it_short() {
    const ROUNDS: usize = 400;
    const BEHIND: usize = 5000;
    let bed = Bed::new("");
    for round in 0..ROUNDS {
        let (mut client, server) = bed.pair();
        let before = (256 << 10) + round % 64 * 1024;
        let received = thread::scope(|scope| {
            let received = scope.spawn(|| read_to_end(&server));
            client.write_all(&vec![b'<'; before]).unwrap();
            SockRef::from(&client).send_out_of_band(b"!").unwrap();
            client.write_all(&[b'>'; BEHIND]).unwrap();
            client.shutdown(Shutdown::Write).unwrap();
            received.join().unwrap()
        });
        let count = |wanted: u8| received.iter().filter(|byte| **byte == wanted).count();
        assert_eq!((count(b'<'), count(b'>')), (before, BEHIND), "round {round}");
    }
}

// ---- half-close

#[test]
fn a_client_that_has_said_all_gets_a_late_answer() {
    for (bed, length) in Bed::each([1000, FAST]) {
        let (client, server) = bed.pair();
        thread::scope(|scope| {
            scope.spawn(|| {
                transfer::send(&mut &client, 1, length).unwrap();
                client.shutdown(Shutdown::Write).unwrap();
            });
            assert_eq!(transfer::receive(&mut &server, 1), Transfer::complete(length));
            // The server has seen the end of the request; only now it begins.
            scope.spawn(|| {
                transfer::send(&mut &server, 2, length).unwrap();
                server.shutdown(Shutdown::Write).unwrap();
            });
            assert_eq!(transfer::receive(&mut &client, 2), Transfer::complete(length));
        });
    }
}

#[test]
fn a_server_that_has_said_all_gets_a_late_request() {
    for (bed, length) in Bed::each([1000, FAST]) {
        let (client, server) = bed.pair();
        thread::scope(|scope| {
            scope.spawn(|| {
                transfer::send(&mut &server, 1, length).unwrap();
                server.shutdown(Shutdown::Write).unwrap();
            });
            assert_eq!(transfer::receive(&mut &client, 1), Transfer::complete(length));
            scope.spawn(|| {
                transfer::send(&mut &client, 2, length).unwrap();
                client.shutdown(Shutdown::Write).unwrap();
            });
            assert_eq!(transfer::receive(&mut &server, 2), Transfer::complete(length));
        });
    }
}

#[test]
fn an_end_without_a_single_byte_is_passed_on() {
    let bed = Bed::new("");
    let (client, server) = bed.pair();
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(read_to_end(&server), b"");
    server.shutdown(Shutdown::Write).unwrap();
    assert_eq!(read_to_end(&client), b"");
    bed.publisher.wait_for_metrics(|metrics| metrics.port("connections", PORT) == 0);
}

// ---- resets

#[test]
fn a_reset_by_the_client_reaches_the_server() {
    for (bed, moved) in Bed::each([0, 1000, FAST]) {
        let (client, server) = bed.pair_after(moved);
        reset(client);
        assert_eq!(read_all(&server), (vec![], Some(io::ErrorKind::ConnectionReset)), "after {moved} bytes");
    }
}

#[test]
fn a_reset_by_the_server_reaches_the_client() {
    for (bed, moved) in Bed::each([0, 1000, FAST]) {
        let (client, server) = bed.pair_after(moved);
        reset(server);
        assert_eq!(read_all(&client), (vec![], Some(io::ErrorKind::ConnectionReset)), "after {moved} bytes");
    }
}

#[test]
fn a_reset_reaches_the_other_side_when_that_has_said_all() {
    for (bed, moved) in Bed::each([0, FAST]) {
        for by_client in [true, false] {
            let (resetter, other) = bed.ordered_pair_after(moved, by_client);
            other.shutdown(Shutdown::Write).unwrap();
            assert_eq!(read_to_end(&resetter), b"");
            reset(resetter);
            let seen = read_all(&other);
            assert_eq!(seen, (vec![], Some(io::ErrorKind::ConnectionReset)), "by client: {by_client}");
        }
    }
}

#[test]
fn a_reset_reaches_the_other_side_when_the_resetting_one_has_said_all() {
    for (bed, moved) in Bed::each([0, FAST]) {
        for by_client in [true, false] {
            let (resetter, other) = bed.ordered_pair_after(moved, by_client);
            resetter.shutdown(Shutdown::Write).unwrap();
            assert_eq!(read_to_end(&other), b"");
            reset(resetter);
            wait_for_reset(&other);
        }
    }
}

#[test]
fn a_reset_in_the_middle_of_a_transfer_never_looks_like_its_end() {
    let bed = Bed::new("");
    for by_client in [true, false] {
        let (sender, receiver) = bed.ordered_pair_after(0, by_client);
        thread::scope(|scope| {
            let received = scope.spawn(|| transfer::receive(&mut &receiver, 1));
            transfer::send(&mut &sender, 1, 8 * MIB).unwrap();
            reset(sender);
            let received = received.join().unwrap();
            assert_eq!((received.error, received.wrong_at), (Some(io::ErrorKind::ConnectionReset), None));
        });
    }
}

#[test]
fn what_a_server_sends_right_before_its_reset_arrives_as_without_a_proxy() {
    for (bed, moved) in Bed::each([1, FAST]) {
        same_as_without_a_proxy(&bed, moved, |_, client, mut server| {
            server.write_all(&[b'x'; 8192]).unwrap();
            reset(server);
            read_all(&client)
        });
    }
}

#[test]
fn what_a_client_sends_right_before_its_reset_arrives_as_without_a_proxy() {
    for (bed, moved) in Bed::each([1, FAST]) {
        same_as_without_a_proxy(&bed, moved, |_, mut client, server| {
            client.write_all(&[b'x'; 8192]).unwrap();
            reset(client);
            read_all(&server)
        });
    }
}

/// A web server that turns an upload down does this: it answers and closes while the client is still sending.
#[test]
fn the_answer_to_an_upload_that_is_turned_down_arrives_as_without_a_proxy() {
    for (mut bed, moved) in Bed::each([1, FAST]) {
        same_as_without_a_proxy(&bed, moved, |stop, client, mut server| {
            push_until_blocked(&client, &mut Pattern::new(3));
            // What the proxy does in the meantime is then not a matter of luck.
            stop(true);
            server.write_all(b"413 Content Too Large\r\n").unwrap();
            // With unread data, that is a reset.
            drop(server);
            stop(false);
            read_all(&client)
        });
        assert!(bed.publisher.process.is_running());
    }
}

#[test]
fn what_a_server_sends_right_before_it_closes_arrives() {
    for (bed, moved) in Bed::each([0, FAST]) {
        let (client, mut server) = bed.pair_after(moved);
        server.write_all(&[b'x'; 300_000]).unwrap();
        drop(server);
        let (bytes, error) = read_all(&client);
        assert_eq!((bytes.len(), error), (300_000, None));
    }
}

// ---- backends that are not there

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
fn a_backend_that_no_neighbour_answers_for_resets_the_client() {
    let net = Topology::three();
    // The kernel gives up after three probes; a second apart unless told otherwise.
    net.host.sysctl("net.ipv4.neigh.br0.retrans_time_ms", "50");
    net.host.sysctl("net.ipv6.neigh.br0.retrans_time_ms", "50");
    for backend in ["172.30.0.77", "fd30::77"] {
        let publisher = Publisher::start(&net.host, &format!("8080:80 --to {backend} --dial-timeout 1h"));
        assert_eq!(refused(&net.client, host(8080)), io::ErrorKind::ConnectionReset, "{backend}");
        publisher.wait_for_metrics(|metrics| metrics.refused(PORT, "backend_unreachable") == 1);
    }
}

#[test]
fn a_backend_that_never_answers_resets_the_client_after_the_dial_timeout() {
    let net = Topology::three();
    black_hole(&net.host);
    let publisher =
        Publisher::start(&net.host, &format!("8080:80 --to {} --dial-timeout 500ms", addr::CONTAINER_V4));
    let asked = Instant::now();
    assert_eq!(refused(&net.client, host(8080)), io::ErrorKind::ConnectionReset);
    assert!(asked.elapsed() >= Duration::from_millis(500), "{:?}", asked.elapsed());
    publisher.wait_for_metrics(|metrics| metrics.refused(PORT, "dial_timeout") == 1);
    wait_until("the dial has ended", || dials(&net.host) == 0);
    // A backend that comes back is reached again.
    heal(&net.host);
    let _echo = EchoServer::tcp(&net.container, container(80));
    assert_eq!(ask(&connect(&net.client, host(8080)), b"there again"), b"there again");
}

#[test]
fn a_client_that_resets_while_the_backend_is_dialled_ends_the_dial() {
    let net = Topology::three();
    black_hole(&net.host);
    let publisher =
        Publisher::start(&net.host, &format!("8080:80 --to {} --dial-timeout 1h", addr::CONTAINER_V4));
    let idle = publisher.process.open_fds();
    let mut impatient = connect(&net.client, host(8080));
    impatient.write_all(b"anybody there?").unwrap();
    wait_until("the backend is dialled", || dials(&net.host) == 1);
    reset(impatient);
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
    let _publisher =
        Publisher::start(&net.host, &format!("8080:80 --to {} --dial-timeout 1h", addr::CONTAINER_V4));
    let mut client = connect(&net.client, host(8080));
    client.write_all(b"a request").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    wait_until("the backend is dialled", || dials(&net.host) == 1);
    heal(&net.host);
    let mut server = backend.accept();
    assert_eq!(read_to_end(&server), b"a request");
    server.write_all(b"an answer").unwrap();
    drop(server);
    assert_eq!(read_to_end(&client), b"an answer");
}

#[test]
fn a_server_that_accepts_answers_and_resets_before_the_proxy_looks_is_heard() {
    let (bytes, error) = answered_before_the_proxy_looks(reset);
    assert_eq!((bytes.as_slice(), error), (&b"too busy"[..], Some(io::ErrorKind::ConnectionReset)));
}

#[test]
fn a_server_that_accepts_answers_and_closes_before_the_proxy_looks_is_heard() {
    let (bytes, error) = answered_before_the_proxy_looks(drop);
    assert_eq!((bytes.as_slice(), error), (&b"too busy"[..], None));
}

// ---- sockets and buffers

#[test]
fn both_sockets_have_no_delay_and_keep_alive_set() {
    let bed = Bed::new("");
    let (_client, _server) = bed.pair_after(1);
    let mut seen = 0;
    for socket in sockets_of(&bed.publisher) {
        let socket = SockRef::from(&socket);
        let port = |address: io::Result<socket2::SockAddr>| Some(address.ok()?.as_socket()?.port());
        let (local, peer) = (port(socket.local_addr()), port(socket.peer_addr()));
        if peer.is_some() && (local == Some(8080) || peer == Some(80)) {
            seen += 1;
            assert!(socket.tcp_nodelay().unwrap(), "{local:?} to {peer:?}");
            assert!(socket.keepalive().unwrap(), "{local:?} to {peer:?}");
            assert!(socket.tcp_keepalive_time().unwrap() <= Duration::from_secs(60), "{local:?} to {peer:?}");
        }
    }
    assert_eq!(seen, 2, "the client's socket and the backend's");
}

#[test]
fn messages_are_copied_and_streams_are_spliced() {
    let bed = Bed::new("");
    let pipes = || {
        let link =
            |name: &str| std::fs::read_link(format!("/proc/{}/fd/{name}", bed.publisher.process.pid()));
        let names = std::fs::read_dir(format!("/proc/{}/fd", bed.publisher.process.pid())).unwrap();
        let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| link(name).is_ok_and(|to| to.to_string_lossy().starts_with("pipe:"))).count()
    };
    let before = pipes();
    let (client, server) = bed.pair();
    for _ in 0..2000 {
        carry(&client, &server, 64);
        carry(&server, &client, 64);
    }
    assert_eq!(pipes(), before, "an exchange of small messages, however long, borrows no pipe");
    carry(&client, &server, 16 * MIB);
    assert_eq!(pipes(), before + 2, "a stream does, and the pool keeps it");
}

#[test]
fn a_stalled_server_is_sent_no_more_than_buffers_hold_and_goes_on_intact() {
    stalled_peer(true);
}

#[test]
fn a_stalled_client_is_sent_no_more_than_buffers_hold_and_goes_on_intact() {
    stalled_peer(false);
}

#[test]
fn a_stalled_connection_does_not_hold_up_another_on_the_same_loop() {
    let bed = Bed::new("--workers 1");
    let (stalled, stalled_server) = bed.pair_after(FAST);
    push_until_blocked(&stalled, &mut Pattern::new(1));
    push_until_blocked(&stalled_server, &mut Pattern::new(2));
    let (client, server) = bed.pair();
    carry(&client, &server, 16 * MIB);
    carry(&server, &client, 16 * MIB);
}

#[test]
fn bytes_left_behind_by_a_cut_connection_reach_no_other() {
    let bed = Bed::new("--workers 1 --splice-from 0");
    for by_client in [true, false, true, false] {
        let (sender, receiver) = bed.ordered_pair_after(FAST, by_client);
        // The proxy holds some of it when the connection is cut.
        push_until_blocked(&sender, &mut Pattern::new(13));
        reset(sender);
        drop(receiver);
        let (client, server) = bed.pair_after(4 * MIB);
        assert_eq!(ask_and_answer(&client, &server), (b"more".to_vec(), b"an answer".to_vec()));
    }
}

#[test]
fn connections_that_wait_cost_no_cpu() {
    let bed = Bed::new("");
    let idle = bed.pair_after(FAST);
    let half_closed = [bed.pair_after(1), bed.pair_after(FAST)];
    half_closed[0].0.shutdown(Shutdown::Write).unwrap();
    half_closed[1].1.shutdown(Shutdown::Write).unwrap();
    let stalled = bed.pair_after(FAST);
    push_until_blocked(&stalled.0, &mut Pattern::new(1));
    // Blocked in one direction, ended in the other.
    stalled.1.shutdown(Shutdown::Write).unwrap();
    assert_eq!(read_to_end(&stalled.0), b"");
    assert_idle(&bed.publisher);
    drop(idle);
}

#[test]
fn connections_that_end_as_soon_as_they_begin_leave_nothing_behind() {
    const ROUNDS: u64 = 1000;
    let net = Topology::three();
    let server = PeerServer::tcp(&net.container, container(80));
    let arguments = format!("8080:80 8081:81 --to {}", addr::CONTAINER_V4);
    let publisher = Publisher::start(&net.host, &arguments);
    let idle = publisher.process.open_fds();
    net.client.run(|| {
        for _ in 0..ROUNDS {
            // Reset before, while or after the backend is dialled.
            reset(TcpStream::connect(host(8080)).unwrap());
            drop(TcpStream::connect(host(8080)).unwrap());
            // A closed port, whose reset may be faster than connect(2).
            drop(TcpStream::connect(host(8081)));
        }
    });
    let metrics = publisher.wait_for_metrics(|metrics| {
        let served = |publish| metrics.port("connections_total", publish);
        served(PORT) == 2 * ROUNDS
            && served("0.0.0.0:8081/tcp") == ROUNDS
            && metrics.port("connections", PORT) + metrics.port("connections", "0.0.0.0:8081/tcp") == 0
    });
    assert_eq!(metrics.refused(PORT, "backend_unreachable"), 0);
    // Pipes are kept for the next connections.
    wait_until("the descriptors are back", || publisher.process.open_fds() <= idle + 4);
    assert_eq!(peer_ip(&connect(&net.client, host(8080))), IpAddr::from(addr::GATEWAY_V4));
    drop(server);
}

// ---- limits

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

// ---- who may come, and who they are said to be

#[test]
fn only_clients_of_the_allowed_networks_are_let_in() {
    let net = Topology::three();
    let neighbour = net.neighbour();
    let _echo = EchoServer::tcp(&net.container, container(80));
    let arguments =
        format!("8080:80 --to {} --allow 203.0.113.0/25 --allow 2001:db8:1::/64", addr::CONTAINER_V4);
    let publisher = Publisher::start(&net.host, &arguments);
    assert_eq!(ask(&connect(&net.client, host(8080)), b"v4"), b"v4");
    assert_eq!(ask(&connect(&net.client, host_v6(8080)), b"v6"), b"v6");
    let strangers = [
        (&neighbour, host(8080)),
        (&neighbour, host_v6(8080)),
        (&net.host, (Ipv4Addr::LOCALHOST, 8080).into()),
        (&net.host, (Ipv6Addr::LOCALHOST, 8080).into()),
    ];
    for (refusals, (from, to)) in (1..).zip(strangers) {
        assert_eq!(refused(from, to), io::ErrorKind::ConnectionReset, "{to}");
        publisher.wait_for_metrics(|metrics| {
            let of = |publish| metrics.refused(publish, "not_allowed");
            of(PORT) + of("[::]:8080/tcp") == refusals
        });
    }
}

#[test]
fn the_proxy_protocol_header_tells_the_client_and_the_address_it_used() {
    let net = Topology::three();
    let backend = Backend::tcp(&net.container, container(80));
    for (options, version) in [
        ("--proxy-protocol v1", 1),
        ("--proxy-protocol v2", 2),
        ("--source proxy-protocol", 2),
        ("--source proxy-protocol --proxy-protocol v1", 1),
    ] {
        let _publisher =
            Publisher::start(&net.host, &format!("8080:80 --to {} {options}", addr::CONTAINER_V4));
        for to in [host(8080), host_v6(8080)] {
            let mut client = connect(&net.client, to);
            let expected = proxy_header(version, client.local_addr().unwrap(), to);
            let mut server = backend.accept();
            // It comes before the client has said anything.
            let mut header = vec![0; expected.len()];
            server.read_exact(&mut header).unwrap();
            assert_eq!(header, expected, "{options} to {to}");
            client.write_all(b"payload").unwrap();
            client.shutdown(Shutdown::Write).unwrap();
            assert_eq!(read_to_end(&server), b"payload");
            server.write_all(b"answer").unwrap();
            drop(server);
            assert_eq!(read_to_end(&client), b"answer");
        }
    }
}

#[test]
fn clients_of_either_family_reach_backends_of_either_family() {
    let net = Topology::three();
    let _v4 = PeerServer::tcp(&net.container, container(80));
    let _v6 = PeerServer::tcp(&net.container, (addr::CONTAINER_V6, 80).into());
    let _to_v4 = Publisher::start(&net.host, &format!("8080:80 --to {}", addr::CONTAINER_V4));
    for to in [host(8080), host_v6(8080)] {
        assert_eq!(peer_ip(&connect(&net.client, to)), IpAddr::from(addr::GATEWAY_V4), "{to}");
    }
    drop(_to_v4);
    let _to_v6 = Publisher::start(&net.host, &format!("8080:80 --to {}", addr::CONTAINER_V6));
    for to in [host(8080), host_v6(8080)] {
        assert_eq!(peer_ip(&connect(&net.client, to)), IpAddr::from(addr::GATEWAY_V6), "{to}");
    }
}

#[test]
fn a_port_published_on_one_address_is_closed_on_the_others() {
    let net = Topology::three();
    let _echo = EchoServer::tcp(&net.container, container(80));
    let arguments = format!("127.0.0.1:8080:80 [{}]:8081:80 --to {}", addr::HOST_V6, addr::CONTAINER_V4);
    let _publisher = Publisher::start(&net.host, &arguments);
    assert_eq!(ask(&connect(&net.host, (Ipv4Addr::LOCALHOST, 8080).into()), b"loopback"), b"loopback");
    assert_eq!(ask(&connect(&net.client, host_v6(8081)), b"IPv6"), b"IPv6");
    for (from, to) in [
        (&net.client, host(8080)),
        (&net.client, host_v6(8080)),
        (&net.host, (Ipv6Addr::LOCALHOST, 8080).into()),
        (&net.client, host(8081)),
        (&net.host, (Ipv6Addr::LOCALHOST, 8081).into()),
    ] {
        let connected = from.run(|| TcpStream::connect_timeout(&to, PATIENCE));
        assert_eq!(connected.unwrap_err().kind(), io::ErrorKind::ConnectionRefused, "{to}");
    }
}

#[test]
fn a_client_with_a_link_local_address_is_served() {
    let net = Topology::three();
    let _echo = EchoServer::tcp(&net.container, container(80));
    let _publisher = Publisher::start(&net.host, &format!("8080:80 --to {}", addr::CONTAINER_V4));
    let to = support::link_local(&net.host, &net.client, 8080);
    assert_eq!(ask(&connect(&net.client, to), b"from next door"), b"from next door");
}

// ---- the end

#[test]
fn on_sigterm_new_clients_are_refused_and_running_transfers_complete() {
    let mut bed = Bed::new("--drain-timeout 1h");
    let (client, server) = bed.pair_after(FAST);
    bed.publisher.process.signal(Signal::TERM);
    bed.wait_until_closed();
    carry(&client, &server, 32 * MIB);
    carry(&server, &client, 32 * MIB);
    assert!(bed.publisher.process.is_running());
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(read_to_end(&server), b"");
    server.shutdown(Shutdown::Write).unwrap();
    assert_eq!(read_to_end(&client), b"");
    assert_eq!(bed.publisher.process.wait(PATIENCE).code(), Some(0));
}

#[test]
fn what_was_answered_before_the_exit_arrives_after_it() {
    const LENGTH: u64 = 256 << 10;
    let mut bed = Bed::new("");
    let (client, server) = bed.pair();
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(read_to_end(&server), b"");
    // More than the window of a client takes that does not read yet.
    transfer::send(&mut &server, 4, LENGTH).unwrap();
    drop(server);
    bed.publisher.wait_for_metrics(|metrics| metrics.port("connections", PORT) == 0);
    assert!(unread(&client) < LENGTH, "it is all there already");
    bed.publisher.process.signal(Signal::TERM);
    assert_eq!(bed.publisher.process.wait(PATIENCE).code(), Some(0));
    assert_eq!(transfer::receive(&mut &client, 4), Transfer::complete(LENGTH));
}

#[test]
fn connections_that_outlast_the_drain_timeout_are_reset() {
    for options in ["--drain-timeout 300ms", "--drain-timeout 0"] {
        let mut bed = Bed::new(options);
        let pairs = [bed.pair(), bed.pair_after(FAST)];
        bed.publisher.process.signal(Signal::TERM);
        for (client, server) in &pairs {
            assert_eq!(read_all(client), (vec![], Some(io::ErrorKind::ConnectionReset)), "{options}");
            assert_eq!(read_all(server), (vec![], Some(io::ErrorKind::ConnectionReset)), "{options}");
        }
        assert_eq!(bed.publisher.process.wait(PATIENCE).code(), Some(0));
    }
}

#[test]
fn a_second_signal_cuts_at_once() {
    for (first, second) in
        [(Signal::TERM, Signal::TERM), (Signal::INT, Signal::INT), (Signal::INT, Signal::TERM)]
    {
        let mut bed = Bed::new("--drain-timeout 1h");
        let (client, server) = bed.pair_after(FAST);
        bed.publisher.process.signal(first);
        bed.wait_until_closed();
        carry(&client, &server, 1000);
        bed.publisher.process.signal(second);
        assert_eq!(read_all(&client), (vec![], Some(io::ErrorKind::ConnectionReset)));
        assert_eq!(read_all(&server), (vec![], Some(io::ErrorKind::ConnectionReset)));
        assert_eq!(bed.publisher.process.wait(PATIENCE).code(), Some(0));
    }
}

#[test]
fn without_connections_either_signal_ends_it_at_once() {
    let net = Topology::three();
    for signal in [Signal::TERM, Signal::INT] {
        let mut publisher = Publisher::start(
            &net.host,
            &format!("8080:80 8080:80/udp --to {} --drain-timeout 1h", addr::CONTAINER_V4),
        );
        assert_eq!(publisher.process.stop(signal, PATIENCE).code(), Some(0));
        assert!(!net.host.is_bound(Protocol::Tcp, 8080));
    }
}

// ---- helpers

/// A published port 8080 in front of a backend whose connections the test takes by hand.
struct Bed {
    net: Topology,
    backend: Backend,
    publisher: Publisher,
}

impl Bed {
    #[track_caller]
    fn new(options: &str) -> Self {
        let net = Topology::three();
        let backend = Backend::tcp(&net.container, container(80));
        let publisher =
            Publisher::start(&net.host, &format!("8080:80 --to {} {options}", addr::CONTAINER_V4));
        Self { net, backend, publisher }
    }

    /// One that copies and one that splices, whatever a read brings, for each of `amounts`.
    fn each<const N: usize>(amounts: [u64; N]) -> impl Iterator<Item = (Self, u64)> {
        let ways = ["--splice-from 1000000000", "--splice-from 0"];
        ways.into_iter().flat_map(move |way| amounts.map(|moved| (Self::new(way), moved)))
    }

    /// A connection: the client's end and the server's.
    #[track_caller]
    fn pair(&self) -> (TcpStream, TcpStream) {
        (connect(&self.net.client, host(8080)), self.backend.accept())
    }

    /// One over which so many bytes have gone each way.
    #[track_caller]
    fn pair_after(&self, moved: u64) -> (TcpStream, TcpStream) {
        let (client, server) = self.pair();
        carry(&client, &server, moved);
        carry(&server, &client, moved);
        (client, server)
    }

    /// The same with the client's end first, or the server's.
    #[track_caller]
    fn ordered_pair_after(&self, moved: u64, client_first: bool) -> (TcpStream, TcpStream) {
        let (client, server) = self.pair_after(moved);
        if client_first { (client, server) } else { (server, client) }
    }

    #[track_caller]
    fn wait_until_closed(&self) {
        wait_until("the port is closed", || !self.net.host.is_bound(Protocol::Tcp, 8080));
        assert_eq!(refused(&self.net.client, host(8080)), io::ErrorKind::ConnectionRefused);
    }
}

/// Sends `length` bytes over a connection and checks what arrives.
#[track_caller]
fn carry(from: &TcpStream, to: &TcpStream, length: u64) {
    thread::scope(|scope| {
        scope.spawn(|| transfer::send(&mut &*from, 9, length).unwrap());
        let arrived = transfer::receive(&mut to.take(length), 9);
        assert_eq!(arrived, Transfer::complete(length));
    });
}

/// Connects, and returns how the proxy turns the client away: never with an orderly end.
#[track_caller]
fn refused(from: &Namespace, to: SocketAddr) -> io::ErrorKind {
    match from.run(|| TcpStream::connect_timeout(&to, PATIENCE)) {
        Ok(stream) => {
            let (bytes, error) = read_all(&support::patient(stream));
            assert_eq!(bytes, b"");
            error.expect("the connection looks as if it had been served")
        }
        // So fast that connect(2) had not returned yet; a closed port is another kind.
        Err(error) => error.kind(),
    }
}

/// One connection after another, each with a request of its own that an echo server answers.
#[track_caller]
fn ask_in_turn(from: &Namespace, count: u32) {
    from.run(|| {
        for number in 0..count {
            let stream = support::patient(TcpStream::connect(host(8080)).unwrap());
            assert_eq!(ask(&stream, &number.to_be_bytes()), number.to_be_bytes(), "connection {number}");
        }
    });
}

/// Lets packets to the container vanish, as behind a cable that was pulled: they go to a hardware address
/// that nobody has.
fn black_hole(host: &Namespace) {
    let container = addr::CONTAINER_V4.to_string();
    host.ip(&[
        "neigh",
        "replace",
        &container,
        "lladdr",
        "02:00:00:00:00:99",
        "dev",
        "br0",
        "nud",
        "permanent",
    ]);
}

/// The end of [`black_hole`].
fn heal(host: &Namespace) {
    host.ip(&["neigh", "del", &addr::CONTAINER_V4.to_string(), "dev", "br0"]);
}

/// The server accepts, says "too busy" and ends the connection with `end`, all of it before the proxy learns that its
/// dial has succeeded. Returns what the client sees, which is what it would see without a proxy.
fn answered_before_the_proxy_looks(end: impl FnOnce(TcpStream)) -> (Vec<u8>, Option<io::ErrorKind>) {
    let net = Topology::three();
    let backend = Backend::tcp(&net.container, container(80));
    black_hole(&net.host);
    let arguments = format!("8080:80 --to {} --dial-timeout 1h", addr::CONTAINER_V4);
    let publisher = Publisher::start(&net.host, &arguments);
    let client = connect(&net.client, host(8080));
    wait_until("the backend is dialled", || dials(&net.host) == 1);
    pause(&publisher, true);
    heal(&net.host);
    let mut server = backend.accept();
    server.write_all(b"too busy").unwrap();
    end(server);
    pause(&publisher, false);
    if !is_ready(&client, PollFlags::IN, PATIENCE) {
        return (vec![], None);
    }
    // An orderly end of the server does not end the client's half.
    client.shutdown(Shutdown::Write).ok();
    read_all(&client)
}

/// Stops the publisher where it is, or lets it go on.
#[track_caller]
fn pause(publisher: &Publisher, on: bool) {
    let pid = publisher.process.pid();
    let signal = if on { Signal::STOP } else { Signal::CONT };
    rustix::process::kill_process(Pid::from_raw(pid as i32).unwrap(), signal).unwrap();
    if on {
        wait_until("the publisher has stopped", || procfs::state(pid) == Some('T'));
    }
}

/// How many connections from `namespace` to port 80 have been begun and not been answered.
fn dials(namespace: &Namespace) -> usize {
    let table = namespace.run(|| std::fs::read_to_string("/proc/thread-self/net/tcp").unwrap());
    // Behind the number of the line: local address, remote address, state (02 is SYN_SENT), all in hex.
    let dialling = |line: &&str| {
        let mut fields = line.split_ascii_whitespace().skip(2);
        fields.next().is_some_and(|remote| remote.ends_with(":0050")) && fields.next() == Some("02")
    };
    table.lines().filter(dialling).count()
}

/// Copies of all of the publisher's sockets.
fn sockets_of(publisher: &Publisher) -> Vec<OwnedFd> {
    let pid = publisher.process.pid();
    let process = pidfd_open(Pid::from_raw(pid as i32).unwrap(), PidfdFlags::empty()).unwrap();
    let descriptors = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let sockets = descriptors.flatten().filter(|entry| {
        std::fs::read_link(entry.path()).is_ok_and(|target| target.to_string_lossy().starts_with("socket:"))
    });
    let numbers = sockets.map(|entry| entry.file_name().to_string_lossy().parse::<ForeignRawFd>().unwrap());
    numbers.map(|number| pidfd_getfd(&process, number, PidfdGetfdFlags::empty()).unwrap()).collect()
}

/// Looks at the publisher's use of the CPU for a while in which there is nothing to do.
#[track_caller]
fn assert_idle(publisher: &Publisher) {
    const WATCH: Duration = Duration::from_millis(500);
    let before = publisher.process.cpu_seconds();
    thread::sleep(WATCH);
    let used = publisher.process.cpu_seconds() - before;
    assert!(used < 0.1, "{used} s of CPU time in {WATCH:?} of idleness");
}

/// Sends as much of `pattern` as is taken without anybody reading at the other end; returns how much.
fn push_until_blocked(mut stream: &TcpStream, pattern: &mut Pattern) -> u64 {
    /// Longer than acknowledgements and window updates take.
    const QUIET: Duration = Duration::from_millis(400);
    stream.set_nonblocking(true).unwrap();
    let start = pattern.position();
    let mut chunk = vec![0; 64 << 10];
    'push: loop {
        let before = pattern.clone();
        pattern.fill(&mut chunk);
        let mut sent = 0;
        while sent < chunk.len() {
            match stream.write(&chunk[sent..]) {
                Ok(count) => sent += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if !is_ready(&stream, PollFlags::OUT, QUIET) {
                        *pattern = before;
                        pattern.fill(&mut chunk[..sent]);
                        break 'push;
                    }
                }
                Err(error) => panic!("push: {error}"),
            }
        }
    }
    stream.set_nonblocking(false).unwrap();
    pattern.position() - start
}

/// One side stops reading, the other sends until it is blocked: at once, and after a phase in which the connection was
/// fast and its windows have grown. What the proxy and its sockets hold is then bounded, and nothing of it is lost.
fn stalled_peer(server_stalls: bool) {
    const FAST_PHASE: u64 = 64 * MIB;
    const MOST: u64 = 4 * MIB;
    let bed = Bed::new("");
    let mut figures = Vec::new();
    for fast_phase in [0, FAST_PHASE, FAST_PHASE, FAST_PHASE] {
        let (sender, receiver) = bed.ordered_pair_after(0, server_stalls);
        carry(&sender, &receiver, fast_phase);
        let mut pattern = Pattern::new(9);
        let accepted = push_until_blocked(&sender, &mut pattern);
        let held = accepted - unsent(&sender) - unread(&receiver);
        figures.push(held);
        println!(
            "stalled {} after {} MiB: {accepted} bytes accepted, of them {} in the sender's buffer, \
             {} in the receiver's, {held} in between",
            if server_stalls { "server" } else { "client" },
            fast_phase / MIB,
            unsent(&sender),
            unread(&receiver),
        );
        // Nothing was lost, nothing is stuck.
        thread::scope(|scope| {
            let arrived = scope.spawn(|| transfer::receive(&mut &receiver, 9));
            let mut rest = vec![0; 8 << 20];
            pattern.fill(&mut rest);
            (&sender).write_all(&rest).unwrap();
            sender.shutdown(Shutdown::Write).unwrap();
            assert_eq!(arrived.join().unwrap(), Transfer::complete(accepted + rest.len() as u64));
        });
    }
    assert!(figures.iter().all(|held| *held < MOST), "bytes held by the proxy: {figures:?}");
}

/// What a socket was given to send and the other side has not acknowledged, in bytes.
fn unsent(stream: &TcpStream) -> u64 {
    let mut count: libc::c_int = 0;
    // SAFETY: the request writes one integer to where the pointer leads (SIOCOUTQ in tcp(7)).
    let result = unsafe { libc::ioctl(stream.as_raw_fd(), libc::TIOCOUTQ, &raw mut count) };
    assert_eq!(result, 0, "SIOCOUTQ: {}", io::Error::last_os_error());
    count as u64
}

/// What has arrived at a socket and was not read, in bytes.
fn unread(stream: &TcpStream) -> u64 {
    rustix::io::ioctl_fionread(stream).unwrap()
}

/// Does `scene` over the kernel's own path and through the published port, and compares what comes of it. The scene
/// is given a way to stop the proxy (true) and to let it go on.
fn same_as_without_a_proxy<T: PartialEq + std::fmt::Debug>(
    bed: &Bed,
    moved: u64,
    scene: impl Fn(&dyn Fn(bool), TcpStream, TcpStream) -> T,
) {
    let direct = (connect(&bed.net.client, container(80)), bed.backend.accept());
    carry(&direct.0, &direct.1, moved);
    carry(&direct.1, &direct.0, moved);
    let expected = scene(&|_| {}, direct.0, direct.1);

    let (client, server) = bed.pair_after(moved);
    let stop = |on| pause(&bed.publisher, on);
    assert_eq!(scene(&stop, client, server), expected, "after {moved} bytes each way");
}

/// The rest of a connection: a last request and its answer.
fn ask_and_answer(mut client: &TcpStream, mut server: &TcpStream) -> (Vec<u8>, Vec<u8>) {
    client.write_all(b"more").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    let request = read_to_end(server);
    server.write_all(b"an answer").unwrap();
    server.shutdown(Shutdown::Write).unwrap();
    (request, read_to_end(client))
}

/// Sends a byte of urgent data between others (and then the end), all of it before the proxy looks.
fn send_around_urgent_data(bed: &Bed, mut client: &TcpStream, and_the_end: bool) {
    pause(&bed.publisher, true);
    client.write_all(b"before").unwrap();
    SockRef::from(client).send_out_of_band(b"!").unwrap();
    client.write_all(b"after").unwrap();
    if and_the_end {
        client.shutdown(Shutdown::Write).unwrap();
    }
    pause(&bed.publisher, false);
}

/// Reads what [`send_around_urgent_data`] has sent. Whether the urgent byte itself comes in line is left open: a
/// program chooses that with SO_OOBINLINE.
#[track_caller]
fn read_past_urgent_data(mut server: &TcpStream) -> String {
    let mut seen = Vec::new();
    while !seen.ends_with(b"after") && is_ready(server, PollFlags::IN, Duration::from_secs(10)) {
        let mut chunk = [0; 64];
        match server.read(&mut chunk).unwrap() {
            0 => break,
            read => seen.extend_from_slice(&chunk[..read]),
        }
    }
    seen.retain(|byte| *byte != b'!');
    String::from_utf8_lossy(&seen).into_owned()
}

/// The header of section 2.1 or 2.2 of HAProxy's "The PROXY protocol".
fn proxy_header(version: u8, client: SocketAddr, local: SocketAddr) -> Vec<u8> {
    if version == 1 {
        let family = if client.is_ipv4() { "TCP4" } else { "TCP6" };
        let (from, to) = (client.ip(), local.ip());
        return format!("PROXY {family} {from} {to} {} {}\r\n", client.port(), local.port()).into_bytes();
    }
    let octets = |ip| match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    };
    let addresses = [octets(client.ip()), octets(local.ip())].concat();
    let (family, length) = if client.is_ipv4() { (0x11, 12) } else { (0x21, 36) };
    let mut header = b"\r\n\r\n\0\r\nQUIT\n".to_vec();
    header.extend([0x21, family, 0, length]);
    header.extend(addresses);
    header.extend(client.port().to_be_bytes());
    header.extend(local.port().to_be_bytes());
    header
}

/// The address under which a [`PeerServer`] sees us.
#[track_caller]
fn peer_ip(stream: &TcpStream) -> IpAddr {
    let text = String::from_utf8(read_to_end(stream)).unwrap();
    text.parse::<SocketAddr>().unwrap_or_else(|error| panic!("{text:?}: {error}")).ip()
}

/// Sizes from 1 to 70,000 that sum up to `total`.
fn odd_sizes(total: usize, seed: u64) -> Vec<usize> {
    let mut random = Pattern::new(seed);
    let (mut sizes, mut left) = (Vec::new(), total);
    while left > 0 {
        let mut bytes = [0; 4];
        random.fill(&mut bytes);
        let number = u32::from_le_bytes(bytes) as usize;
        // Half of them small.
        let size = if number.is_multiple_of(2) { number / 2 % 100 } else { number / 2 % 70_000 } + 1;
        sizes.push(size.min(left));
        left -= size.min(left);
    }
    sizes
}
