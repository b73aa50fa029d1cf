//! Rivals to backends that do not answer.

use crate::scene::{
    Balancer, CLOSED, Event, HEDGE, Hanging, Scene, ask, assert_reset, dials, echo, reset, serve,
    wait_until,
};
use rustix::process::{Resource, getrlimit};
use std::io::{Read, Write};
use std::thread;
use std::time::{Duration, Instant};
use tidegate_model::Protocol;
use tidegate_proxy::DialFailure::{Refused, Silent};
use tidegate_proxy::ProxyProtocol;

/// Longer than the interval after which the kernel repeats a SYN.
const AFTER_RETRY: Duration = Duration::from_millis(1300);

#[test]
fn a_rival_of_a_silent_backend_gets_the_header_and_the_payload_once() {
    let hanging = Hanging::new();
    let upstream = Balancer::new(&[hanging.addr(), echo()], Some(HEDGE));
    let scene = Scene::with(Protocol::Tcp, upstream, |_, options| {
        options.proxy_protocol = Some(ProxyProtocol::V1);
    });
    let client = scene.connect();
    let (from, to) = (client.local_addr().unwrap(), client.peer_addr().unwrap());
    let header = format!("PROXY TCP4 {} {} {} {}\r\n", from.ip(), to.ip(), from.port(), to.port());
    let response = ask(&client, b"sent before any backend was connected");
    let expected = format!("{header}sent before any backend was connected");
    assert_eq!(String::from_utf8(response).unwrap(), expected);
    scene.assert_idle();
    assert_eq!(
        scene.upstream.events(),
        [Event::Opened(0), Event::Opened(1), Event::Connected(1), Event::Failed(0, Silent)]
    );
    assert_eq!(dials(hanging.addr()), 0);
    // The SYN of the first socket is not repeated.
    hanging.unblock();
    thread::sleep(AFTER_RETRY);
    assert!(!hanging.has_waiting());
}

#[test]
fn a_rival_starts_no_sooner_than_the_hedge_interval() {
    let hanging = Hanging::new();
    let interval = Duration::from_millis(200);
    let scene = Scene::tcp(Balancer::new(&[hanging.addr(), echo()], Some(interval)));
    let began = Instant::now();
    assert_eq!(ask(&scene.connect(), b"request"), b"request");
    assert!(began.elapsed() >= interval, "{:?}", began.elapsed());
}

#[test]
fn a_backend_that_answers_at_once_has_no_rival() {
    for interval in [Duration::ZERO, Duration::MAX] {
        let scene = Scene::tcp(Balancer::new(&[echo(), echo()], Some(interval)));
        assert_eq!(ask(&scene.connect(), b"request"), b"request");
        scene.assert_idle();
        assert_eq!(scene.upstream.events(), [Event::Opened(0), Event::Connected(0)]);
    }
}

#[test]
fn a_rival_that_refuses_is_replaced_at_once() {
    let hanging = Hanging::new();
    let interval = Duration::from_millis(200);
    let backends = [hanging.addr(), CLOSED, CLOSED, echo()];
    let scene = Scene::tcp(Balancer::new(&backends, Some(interval)));
    let began = Instant::now();
    assert_eq!(ask(&scene.connect(), b"request"), b"request");
    assert!(began.elapsed() < 2 * interval, "{:?}", began.elapsed());
    scene.assert_idle();
    assert_eq!(
        scene.upstream.events(),
        [
            Event::Opened(0),
            Event::Opened(1),
            Event::Failed(1, Refused),
            Event::Opened(2),
            Event::Failed(2, Refused),
            Event::Opened(3),
            Event::Connected(3),
            Event::Failed(0, Silent),
        ]
    );
}

#[test]
fn a_backend_that_answers_before_its_later_rivals_is_used_and_none_is_reported() {
    let hanging = [Hanging::new(), Hanging::new(), Hanging::new()];
    let scene = Scene::tcp(Balancer::new(&hanging.each_ref().map(Hanging::addr), Some(HEDGE)));
    let client = scene.connect();
    scene.upstream.wait_for(Event::Opened(2));
    hanging[0].unblock();
    let mut server = hanging[0].accept();
    server.write_all(b"a greeting").unwrap();
    drop(server);
    let mut greeting = Vec::new();
    (&client).read_to_end(&mut greeting).unwrap();
    assert_eq!(greeting, b"a greeting");
    assert_eq!(
        scene.upstream.events(),
        [Event::Opened(0), Event::Opened(1), Event::Opened(2), Event::Connected(0)]
    );
    drop(client);
    scene.assert_idle();
    assert!(hanging.iter().all(|hanging| dials(hanging.addr()) == 0));
}

#[test]
fn the_dial_continues_with_its_rivals_when_the_first_backend_refuses() {
    let (first, rival) = (Hanging::new(), Hanging::new());
    let address = first.addr();
    let scene = Scene::tcp(Balancer::new(&[address, rival.addr()], Some(HEDGE)));
    let mut client = scene.connect();
    client.write_all(b"request").unwrap();
    scene.upstream.wait_for(Event::Opened(1));
    drop(first);
    scene.upstream.wait_for(Event::Failed(0, Refused));
    assert_eq!((dials(address), scene.upstream.leases()), (0, 1));
    rival.unblock();
    let mut server = rival.accept();
    let mut request = [0; 7];
    server.read_exact(&mut request).unwrap();
    assert_eq!(&request, b"request");
    assert_eq!(
        scene.upstream.events(),
        [Event::Opened(0), Event::Opened(1), Event::Failed(0, Refused), Event::Connected(1)]
    );
    drop((client, server));
    scene.assert_idle();
}

#[test]
fn of_two_backends_that_answer_in_one_round_the_first_is_used() {
    let hanging = [Hanging::new(), Hanging::new()];
    let scene = Scene::tcp(Balancer::new(&hanging.each_ref().map(Hanging::addr), Some(HEDGE)));
    let mut client = scene.connect();
    client.write_all(b"request").unwrap();
    scene.upstream.wait_for(Event::Opened(1));
    let (is_blocked, release) = scene.upstream.block_next_open();
    let _other = scene.connect();
    is_blocked.recv().unwrap();
    let [mut server, loser] = hanging.each_ref().map(|hanging| {
        hanging.unblock();
        hanging.accept()
    });
    release.send(()).unwrap();
    let mut request = [0; 7];
    server.read_exact(&mut request).unwrap();
    assert_eq!(&request, b"request");
    assert_reset(&loser);
    assert_eq!(scene.upstream.events(), [Event::Opened(0), Event::Opened(1), Event::Connected(0)]);
    drop((client, server));
    scene.assert_idle();
}

/// The events of both sockets are reported in one round: first the success of the rival, then the
/// reset of the socket that it replaces.
#[test]
fn an_error_of_the_replaced_socket_does_not_affect_the_winner() {
    let (first, rival) = (Hanging::new(), Hanging::new());
    let address = first.addr();
    let scene = Scene::tcp(Balancer::new(&[address, rival.addr()], Some(HEDGE)));
    let mut client = scene.connect();
    client.write_all(b"request").unwrap();
    scene.upstream.wait_for(Event::Opened(1));
    let (is_blocked, release) = scene.upstream.block_next_open();
    let _other = scene.connect();
    is_blocked.recv().unwrap();
    rival.unblock();
    let mut server = rival.accept();
    assert_eq!(dials(address), 1, "the first socket has no answer yet");
    drop(first);
    wait_until("the first socket is reset", || dials(address) == 0);
    release.send(()).unwrap();
    let mut request = [0; 7];
    server.read_exact(&mut request).unwrap();
    assert_eq!(&request, b"request");
    server.write_all(b"response").unwrap();
    drop(server);
    let mut response = Vec::new();
    client.read_to_end(&mut response).unwrap();
    assert_eq!(response, b"response");
    assert_eq!(
        scene.upstream.events(),
        [Event::Opened(0), Event::Opened(1), Event::Failed(0, Refused), Event::Connected(1)]
    );
    drop(client);
    scene.assert_idle();
    assert_eq!(scene.snapshot().cut, 0);
}

#[test]
fn without_a_free_descriptor_the_dial_continues_without_a_rival() {
    without_a_free_descriptor(HEDGE);
}

#[test]
fn without_a_free_descriptor_and_without_an_interval_the_loop_continues() {
    without_a_free_descriptor(Duration::ZERO);
}

fn without_a_free_descriptor(interval: Duration) {
    let hanging = Hanging::new();
    let upstream = Balancer::new(&[hanging.addr(), echo()], Some(interval));
    let scene = Scene::with(Protocol::Tcp, upstream, |settings, _| {
        // The engine itself reserves two for each loop.
        let limit = getrlimit(Resource::Nofile).current.expect("a limit on descriptors");
        settings.reserved_descriptors = limit as usize - 2 - 2;
    });
    assert_eq!(scene.engine.descriptors_left(), 2);
    let mut client = scene.connect();
    client.write_all(b"request").unwrap();
    scene.upstream.wait_for(Event::Opened(0));
    assert_eq!(scene.engine.descriptors_left(), 0);
    thread::sleep(10 * HEDGE);
    hanging.unblock();
    let mut server = hanging.accept();
    let mut request = [0; 7];
    server.read_exact(&mut request).unwrap();
    assert_eq!(&request, b"request");
    assert_eq!(scene.upstream.events(), [Event::Opened(0), Event::Connected(0)]);
    drop((client, server));
    scene.assert_idle();
}

#[test]
fn a_backend_that_accepts_and_resets_was_reached() {
    let refusing = serve(reset);
    let scene = Scene::tcp(Balancer::new(&[refusing, echo()], Some(HEDGE)));
    assert_reset(&scene.connect());
    scene.assert_idle();
    assert_eq!(scene.upstream.events(), [Event::Opened(0), Event::Connected(0)]);
    assert_eq!(scene.snapshot().cut, 1);
}
