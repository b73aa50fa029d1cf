//! Sockets and buffers.

use super::*;

#[test]
fn both_sockets_use_no_delay_and_keep_alive() {
    let setup = Setup::new("");
    let (_client, _server) = setup.pair_after(1);
    let mut seen = 0;
    for socket in sockets_of(&setup.publisher) {
        let socket = SockRef::from(&socket);
        let port = |address: io::Result<socket2::SockAddr>| Some(address.ok()?.as_socket()?.port());
        let (local, peer) = (port(socket.local_addr()), port(socket.peer_addr()));
        if peer.is_some() && (local == Some(8080) || peer == Some(80)) {
            seen += 1;
            assert!(socket.tcp_nodelay().unwrap(), "{local:?} to {peer:?}");
            assert!(socket.keepalive().unwrap(), "{local:?} to {peer:?}");
            assert!(
                socket.tcp_keepalive_time().unwrap() <= Duration::from_secs(60),
                "{local:?} to {peer:?}"
            );
        }
    }
    assert_eq!(seen, 2, "the sockets of the client and of the backend");
}

#[test]
fn messages_are_copied_and_streams_are_spliced() {
    let setup = Setup::new("");
    let pipes = || {
        let link = |name: &str| {
            std::fs::read_link(format!("/proc/{}/fd/{name}", setup.publisher.process.pid()))
        };
        let names =
            std::fs::read_dir(format!("/proc/{}/fd", setup.publisher.process.pid())).unwrap();
        let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names
            .filter(|name| link(name).is_ok_and(|to| to.to_string_lossy().starts_with("pipe:")))
            .count()
    };
    let before = pipes();
    let (client, server) = setup.pair();
    for _ in 0..2000 {
        carry(&client, &server, 64);
        carry(&server, &client, 64);
    }
    assert_eq!(pipes(), before, "small messages never use a pipe");
    carry(&client, &server, 16 * MIB);
    assert_eq!(pipes(), before + 2, "a stream uses a pipe, which the pool keeps");
}

#[test]
fn a_stalled_server_is_sent_only_what_buffers_hold_and_resumes_intact() {
    stalled_peer(true);
}

#[test]
fn a_stalled_client_is_sent_only_what_buffers_hold_and_resumes_intact() {
    stalled_peer(false);
}

#[test]
fn a_stalled_connection_does_not_block_another_on_the_same_loop() {
    let setup = Setup::new("--workers 1");
    let (stalled, stalled_server) = setup.pair_after(FAST);
    push_until_blocked(&stalled, &mut Pattern::new(1));
    push_until_blocked(&stalled_server, &mut Pattern::new(2));
    let (client, server) = setup.pair();
    carry(&client, &server, 16 * MIB);
    carry(&server, &client, 16 * MIB);
}

#[test]
fn buffered_bytes_of_a_reset_connection_reach_no_other() {
    let setup = Setup::new("--workers 1 --splice-from 0");
    for by_client in [true, false, true, false] {
        let (sender, receiver) = setup.ordered_pair_after(FAST, by_client);
        // The proxy holds some of the bytes at the reset.
        push_until_blocked(&sender, &mut Pattern::new(13));
        reset(sender);
        drop(receiver);
        let (client, server) = setup.pair_after(4 * MIB);
        assert_eq!(ask_and_answer(&client, &server), (b"more".to_vec(), b"an answer".to_vec()));
    }
}

#[test]
fn waiting_connections_use_no_cpu() {
    let setup = Setup::new("");
    let idle = setup.pair_after(FAST);
    let half_closed = [setup.pair_after(1), setup.pair_after(FAST)];
    half_closed[0].0.shutdown(Shutdown::Write).unwrap();
    half_closed[1].1.shutdown(Shutdown::Write).unwrap();
    let stalled = setup.pair_after(FAST);
    push_until_blocked(&stalled.0, &mut Pattern::new(1));
    // Blocked in one direction and ended in the other.
    stalled.1.shutdown(Shutdown::Write).unwrap();
    assert_eq!(read_to_end(&stalled.0), b"");
    assert_idle(&setup.publisher);
    drop(idle);
}

#[test]
fn short_lived_connections_leave_no_state() {
    const ROUNDS: u64 = 1000;
    let net = Topology::three();
    let server = PeerServer::tcp(&net.container, container(80));
    let arguments = format!("8080:80 8081:81 --to {}", addr::CONTAINER_V4);
    let publisher = Publisher::start(&net.host, &arguments);
    let idle = publisher.process.open_fds();
    net.client.run(|| {
        for _ in 0..ROUNDS {
            // The reset comes before, during or after the connect to the backend.
            reset(TcpStream::connect(host(8080)).unwrap());
            drop(TcpStream::connect(host(8080)).unwrap());
            // The reset of a closed port may come before connect(2) returns.
            drop(TcpStream::connect(host(8081)));
        }
    });
    let metrics = publisher.wait_for_metrics(|metrics| {
        let served = |publish| metrics.port("connections_total", publish);
        served(PORT) == 2 * ROUNDS
            && served("0.0.0.0:8081/tcp") == ROUNDS
            && metrics.port("connections", PORT) + metrics.port("connections", "0.0.0.0:8081/tcp")
                == 0
    });
    assert_eq!(metrics.refused(PORT, "backend_unreachable"), 0);
    // The pool keeps pipes for later connections.
    wait_until("the descriptors are back", || publisher.process.open_fds() <= idle + 4);
    assert_eq!(peer_ip(&connect(&net.client, host(8080))), IpAddr::from(addr::GATEWAY_V4));
    drop(server);
}
