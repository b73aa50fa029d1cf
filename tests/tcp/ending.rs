//! Shutdown of the proxy.

use super::*;

#[test]
fn on_sigterm_new_clients_are_refused_and_transfers_complete() {
    let mut setup = Setup::new("--drain-timeout 1h");
    let (client, server) = setup.pair_after(FAST);
    setup.publisher.process.signal(Signal::TERM);
    setup.wait_until_closed();
    carry(&client, &server, 32 * MIB);
    carry(&server, &client, 32 * MIB);
    assert!(setup.publisher.process.is_running());
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(read_to_end(&server), b"");
    server.shutdown(Shutdown::Write).unwrap();
    assert_eq!(read_to_end(&client), b"");
    assert_eq!(setup.publisher.process.wait(TIMEOUT).code(), Some(0));
}

#[test]
fn data_in_flight_is_delivered_after_the_exit() {
    const LENGTH: u64 = 128 << 10;
    let mut setup = Setup::new("");
    let (client, server) = setup.pair();
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(read_to_end(&server), b"");
    // More than the window of a client that does not read yet.
    transfer::send(&mut &server, 4, LENGTH).unwrap();
    drop(server);
    setup.publisher.wait_for_metrics(|metrics| metrics.port("connections", PORT) == 0);
    assert!(unread(&client) < LENGTH, "all of it has already arrived");
    setup.publisher.process.signal(Signal::TERM);
    assert_eq!(setup.publisher.process.wait(TIMEOUT).code(), Some(0));
    assert_eq!(transfer::receive(&mut &client, 4), Transfer::complete(LENGTH));
}

#[test]
fn connections_that_outlast_the_drain_timeout_are_reset() {
    for options in ["--drain-timeout 300ms", "--drain-timeout 0"] {
        let mut setup = Setup::new(options);
        let pairs = [setup.pair(), setup.pair_after(FAST)];
        setup.publisher.process.signal(Signal::TERM);
        for (client, server) in &pairs {
            assert_eq!(
                read_all(client),
                (vec![], Some(io::ErrorKind::ConnectionReset)),
                "{options}"
            );
            assert_eq!(
                read_all(server),
                (vec![], Some(io::ErrorKind::ConnectionReset)),
                "{options}"
            );
        }
        assert_eq!(setup.publisher.process.wait(TIMEOUT).code(), Some(0));
    }
}

#[test]
fn a_second_signal_resets_at_once() {
    for (first, second) in
        [(Signal::TERM, Signal::TERM), (Signal::INT, Signal::INT), (Signal::INT, Signal::TERM)]
    {
        let mut setup = Setup::new("--drain-timeout 1h");
        let (client, server) = setup.pair_after(FAST);
        setup.publisher.process.signal(first);
        setup.wait_until_closed();
        carry(&client, &server, 1000);
        setup.publisher.process.signal(second);
        assert_eq!(read_all(&client), (vec![], Some(io::ErrorKind::ConnectionReset)));
        assert_eq!(read_all(&server), (vec![], Some(io::ErrorKind::ConnectionReset)));
        assert_eq!(setup.publisher.process.wait(TIMEOUT).code(), Some(0));
    }
}

#[test]
fn without_connections_either_signal_ends_the_process_at_once() {
    let net = Topology::three();
    for signal in [Signal::TERM, Signal::INT] {
        let mut publisher = Publisher::start(
            &net.host,
            &format!("8080:80 8080:80/udp --to {} --drain-timeout 1h", addr::CONTAINER_V4),
        );
        assert_eq!(publisher.process.stop(signal, TIMEOUT).code(), Some(0));
        assert!(!net.host.is_bound(Protocol::Tcp, 8080));
    }
}
