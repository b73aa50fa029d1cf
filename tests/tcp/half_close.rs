//! Half-close.

use super::*;

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
