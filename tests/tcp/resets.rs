//! Resets.

use super::*;

#[test]
fn a_reset_by_the_client_reaches_the_server() {
    for (setup, moved) in Setup::each([0, 1000, FAST]) {
        let (client, server) = setup.pair_after(moved);
        reset(client);
        assert_eq!(
            read_all(&server),
            (vec![], Some(io::ErrorKind::ConnectionReset)),
            "after {moved} bytes"
        );
    }
}

#[test]
fn a_reset_by_the_server_reaches_the_client() {
    for (setup, moved) in Setup::each([0, 1000, FAST]) {
        let (client, server) = setup.pair_after(moved);
        reset(server);
        assert_eq!(
            read_all(&client),
            (vec![], Some(io::ErrorKind::ConnectionReset)),
            "after {moved} bytes"
        );
    }
}

#[test]
fn a_reset_reaches_a_peer_that_has_half_closed() {
    for (setup, moved) in Setup::each([0, FAST]) {
        for by_client in [true, false] {
            let (resetter, other) = setup.ordered_pair_after(moved, by_client);
            other.shutdown(Shutdown::Write).unwrap();
            assert_eq!(read_to_end(&resetter), b"");
            reset(resetter);
            let seen = read_all(&other);
            assert_eq!(
                seen,
                (vec![], Some(io::ErrorKind::ConnectionReset)),
                "by client: {by_client}"
            );
        }
    }
}

#[test]
fn a_reset_by_a_side_that_has_half_closed_reaches_the_peer() {
    for (setup, moved) in Setup::each([0, FAST]) {
        for by_client in [true, false] {
            let (resetter, other) = setup.ordered_pair_after(moved, by_client);
            resetter.shutdown(Shutdown::Write).unwrap();
            assert_eq!(read_to_end(&other), b"");
            reset(resetter);
            wait_for_reset(&other);
        }
    }
}

#[test]
fn a_reset_during_a_transfer_never_looks_like_its_end() {
    let setup = Setup::new("");
    for by_client in [true, false] {
        let (sender, receiver) = setup.ordered_pair_after(0, by_client);
        thread::scope(|scope| {
            let received = scope.spawn(|| transfer::receive(&mut &receiver, 1));
            transfer::send(&mut &sender, 1, 8 * MIB).unwrap();
            reset(sender);
            let received = received.join().unwrap();
            assert_eq!(
                (received.error, received.wrong_at),
                (Some(io::ErrorKind::ConnectionReset), None)
            );
        });
    }
}

#[test]
fn data_that_a_server_sends_before_its_reset_arrives_as_without_a_proxy() {
    for (setup, moved) in Setup::each([1, FAST]) {
        same_as_without_a_proxy(&setup, moved, |_, client, mut server| {
            server.write_all(&[b'x'; 8192]).unwrap();
            reset(server);
            read_all(&client)
        });
    }
}

#[test]
fn data_that_a_client_sends_before_its_reset_arrives_as_without_a_proxy() {
    for (setup, moved) in Setup::each([1, FAST]) {
        same_as_without_a_proxy(&setup, moved, |_, mut client, server| {
            client.write_all(&[b'x'; 8192]).unwrap();
            reset(client);
            read_all(&server)
        });
    }
}

/// This is how a web server rejects an upload: it responds and closes while the client is still
/// sending.
#[test]
fn the_response_to_a_rejected_upload_arrives_as_without_a_proxy() {
    for (mut setup, moved) in Setup::each([1, FAST]) {
        same_as_without_a_proxy(&setup, moved, |stop, client, mut server| {
            push_until_blocked(&client, &mut Pattern::new(3));
            // A stopped proxy makes the order of events deterministic.
            stop(true);
            server.write_all(b"413 Content Too Large\r\n").unwrap();
            // Closing with unread data sends a reset.
            drop(server);
            stop(false);
            read_all(&client)
        });
        assert!(setup.publisher.process.is_running());
    }
}

#[test]
fn data_that_a_server_sends_before_its_close_arrives() {
    for (setup, moved) in Setup::each([0, FAST]) {
        let (client, mut server) = setup.pair_after(moved);
        server.write_all(&[b'x'; 300_000]).unwrap();
        drop(server);
        let (bytes, error) = read_all(&client);
        assert_eq!((bytes.len(), error), (300_000, None));
    }
}
