//! Payload.

use super::*;

#[test]
fn a_quarter_of_a_gibibyte_arrives_intact_in_each_direction() {
    const LENGTH: u64 = 256 * MIB;
    let net = Topology::three();
    let sink = Sink::tcp(&net.container, container(80), 1);
    let _source = Source::tcp(&net.container, container(81), 2, LENGTH);
    let publisher =
        Publisher::start(&net.host, &format!("8080-8081:80-81 --to {}", addr::CONTAINER_V4));

    let mut up = connect(&net.client, host(8080));
    transfer::send(&mut up, 1, LENGTH).unwrap();
    up.shutdown(Shutdown::Write).unwrap();
    assert_eq!(sink.wait(1, TIMEOUT), [Transfer::complete(LENGTH)]);

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
    let setup = Setup::new("");
    let (client, server) = setup.pair();
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
fn writes_and_reads_of_odd_sizes_yield_the_same_stream() {
    const LENGTH: usize = 8 << 20;
    let setup = Setup::new("");
    let (mut client, mut server) = setup.pair();
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
fn concurrent_connections_do_not_mix() {
    const CONNECTIONS: u64 = 48;
    const LENGTH: u64 = MIB;
    let net = Topology::three();
    let _echo = EchoServer::tcp(&net.container, container(80));
    let _publisher = Publisher::start(&net.host, &format!("8080:80 --to {}", addr::CONTAINER_V4));
    let streams: Vec<TcpStream> =
        (0..CONNECTIONS).map(|_| connect(&net.client, host(8080))).collect();
    thread::scope(|scope| {
        for (seed, stream) in streams.iter().enumerate() {
            scope.spawn(move || {
                transfer::send(&mut &*stream, seed as u64, LENGTH).unwrap();
                stream.shutdown(Shutdown::Write).unwrap();
            });
            scope.spawn(move || {
                assert_eq!(
                    transfer::receive(&mut &*stream, seed as u64),
                    Transfer::complete(LENGTH)
                );
            });
        }
    });
}

#[test]
fn bytes_after_urgent_data_arrive() {
    for (setup, moved) in Setup::each([1, FAST]) {
        let (client, server) = setup.pair_after(moved);
        send_around_urgent_data(&setup, &client, false);
        assert_eq!(read_past_urgent_data(&server), "beforeafter", "after {moved} bytes each way");
        assert_eq!(ask_and_answer(&client, &server), (b"more".to_vec(), b"an answer".to_vec()));
    }
}

#[test]
fn bytes_between_urgent_data_and_the_end_arrive() {
    for (setup, moved) in Setup::each([1, FAST]) {
        let (client, server) = setup.pair_after(moved);
        send_around_urgent_data(&setup, &client, true);
        assert_eq!(read_past_urgent_data(&server), "beforeafter", "after {moved} bytes each way");
        assert_eq!(read_to_end(&server), b"");
    }
}

/// The end may arrive between two reads of the proxy, which needs many rounds to occur.
#[test]
fn urgent_data_does_not_truncate_a_fast_transfer() {
    const ROUNDS: usize = 400;
    const BEHIND: usize = 5000;
    let setup = Setup::new("");
    for round in 0..ROUNDS {
        let (mut client, server) = setup.pair();
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
