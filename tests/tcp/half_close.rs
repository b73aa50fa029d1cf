//! Half-close.

use super::*;

#[test]
fn a_client_that_has_half_closed_gets_a_late_response() {
    for (setup, length) in Setup::each([1000, FAST]) {
        let (client, server) = setup.pair();
        thread::scope(|scope| {
            scope.spawn(|| {
                transfer::send(&mut &client, 1, length).unwrap();
                client.shutdown(Shutdown::Write).unwrap();
            });
            assert_eq!(transfer::receive(&mut &server, 1), Transfer::complete(length));
            // The server has read the end of the request and starts only now.
            scope.spawn(|| {
                transfer::send(&mut &server, 2, length).unwrap();
                server.shutdown(Shutdown::Write).unwrap();
            });
            assert_eq!(transfer::receive(&mut &client, 2), Transfer::complete(length));
        });
    }
}

#[test]
fn a_server_that_has_half_closed_gets_a_late_request() {
    for (setup, length) in Setup::each([1000, FAST]) {
        let (client, server) = setup.pair();
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
fn an_end_without_payload_is_forwarded() {
    let setup = Setup::new("");
    let (client, server) = setup.pair();
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(read_to_end(&server), b"");
    server.shutdown(Shutdown::Write).unwrap();
    assert_eq!(read_to_end(&client), b"");
    setup.publisher.wait_for_metrics(|metrics| metrics.port("connections", PORT) == 0);
}
