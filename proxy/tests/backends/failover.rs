//! Backends that fail while they are dialled.

use crate::scene::{
    Balancer, CLOSED, Event, HEDGE, Hanging, NO_ROUTE, Scene, TIMEOUT, ask, assert_reset, dials,
    echo, reset, wait_until,
};
use std::time::{Duration, Instant};
use tidegate_model::Protocol;
use tidegate_proxy::DialFailure::{Refused, Silent};
use tidegate_proxy::Refusal;
use tidegate_proxy::tcp::{MAX_IN_FLIGHT, MAX_TRIES};

#[test]
fn a_backend_that_refuses_is_replaced_by_the_next() {
    let scene = Scene::tcp(Balancer::new(&[CLOSED, CLOSED, echo()], None));
    assert_eq!(ask(&scene.connect(), b"request"), b"request");
    scene.assert_idle();
    assert_eq!(
        scene.upstream.events(),
        [
            Event::Opened(0),
            Event::Failed(0, Refused),
            Event::Opened(1),
            Event::Failed(1, Refused),
            Event::Opened(2),
            Event::Connected(2),
        ]
    );
    assert_eq!(scene.snapshot().refused.iter().sum::<u64>(), 0);
    assert_eq!(scene.snapshot().dial.count(), 1);
}

#[test]
fn only_the_lease_of_the_backend_in_use_is_held() {
    let scene = Scene::tcp(Balancer::new(&[CLOSED, echo()], None));
    let client = scene.connect();
    scene.upstream.wait_for(Event::Connected(1));
    assert_eq!(scene.upstream.leases(), 1);
    drop(client);
    scene.assert_idle();
}

#[test]
fn a_client_is_reset_when_all_backends_refuse() {
    let scene = Scene::tcp(Balancer::new(&[CLOSED; 3], Some(HEDGE)));
    assert_reset(&scene.connect());
    scene.assert_idle();
    assert_eq!(scene.upstream.count(|event| matches!(event, Event::Opened(_))), 3);
    assert_eq!(scene.upstream.count(|event| matches!(event, Event::Failed(_, Refused))), 3);
    assert_eq!(scene.refused(Refusal::BackendRefused), 1);
}

#[test]
fn the_number_of_backends_dialled_for_a_connection_is_limited() {
    let scene = Scene::tcp(Balancer::new(&[CLOSED; MAX_TRIES + 4], None));
    assert_reset(&scene.connect());
    scene.assert_idle();
    assert_eq!(scene.upstream.count(|event| matches!(event, Event::Opened(_))), MAX_TRIES);
    assert_eq!(scene.refused(Refusal::BackendRefused), 1);
}

#[test]
fn a_backend_that_cannot_be_dialled_is_skipped() {
    let scene = Scene::tcp(Balancer::new(&[CLOSED, NO_ROUTE, NO_ROUTE, echo()], None));
    assert_eq!(ask(&scene.connect(), b"request"), b"request");
    let scene = Scene::tcp(Balancer::new(&[CLOSED, NO_ROUTE], None));
    assert_reset(&scene.connect());
    scene.assert_idle();
    assert_eq!(scene.refused(Refusal::BackendUnreachable), 1, "the reason of the last failure");
}

#[test]
fn a_backend_that_refuses_late_is_replaced() {
    let hanging = Hanging::new();
    let address = hanging.addr();
    let scene = Scene::tcp(Balancer::new(&[address, CLOSED, echo()], None));
    let client = scene.connect();
    wait_until("the backend is dialled", || dials(address) == 1);
    drop(hanging);
    assert_eq!(ask(&client, b"request"), b"request");
    scene.assert_idle();
    assert_eq!(
        scene.upstream.events(),
        [
            Event::Opened(0),
            Event::Failed(0, Refused),
            Event::Opened(1),
            Event::Failed(1, Refused),
            Event::Opened(2),
            Event::Connected(2),
        ]
    );
}

#[test]
fn silent_backends_are_reported_at_the_dial_timeout() {
    let hanging: Vec<_> = (0..MAX_IN_FLIGHT + 2).map(|_| Hanging::new()).collect();
    let addresses: Vec<_> = hanging.iter().map(Hanging::addr).collect();
    let upstream = Balancer::new(&addresses, Some(HEDGE));
    let timeout = 15 * HEDGE;
    let scene = Scene::with(Protocol::Tcp, upstream, |settings, _| settings.dial_timeout = timeout);
    let asked = Instant::now();
    assert_reset(&scene.connect());
    assert!(asked.elapsed() >= timeout && asked.elapsed() < TIMEOUT, "{:?}", asked.elapsed());
    scene.assert_idle();
    let ids = 0..MAX_IN_FLIGHT as u64;
    let expected = ids.clone().map(Event::Opened).chain(ids.map(|id| Event::Failed(id, Silent)));
    assert_eq!(scene.upstream.events(), expected.collect::<Vec<_>>());
    assert_eq!(scene.refused(Refusal::DialTimeout), 1);
    assert!(addresses.iter().all(|address| dials(*address) == 0));
}

#[test]
fn a_client_that_leaves_during_the_dial_is_no_failure_of_the_backends() {
    let hanging: [_; MAX_IN_FLIGHT] = std::array::from_fn(|_| Hanging::new());
    let addresses = hanging.each_ref().map(Hanging::addr);
    let scene = Scene::tcp(Balancer::new(&addresses, Some(HEDGE)));
    let client = scene.connect();
    wait_until("all backends are dialled", || addresses.iter().all(|address| dials(*address) == 1));
    assert_eq!(scene.upstream.leases(), MAX_IN_FLIGHT);
    reset(client);
    scene.assert_idle();
    assert!(addresses.iter().all(|address| dials(*address) == 0));
    assert_eq!(scene.upstream.count(|event| !matches!(event, Event::Opened(_))), 0);
    assert_eq!(scene.refused(Refusal::ClientGone), 1);
}

#[test]
fn ports_that_close_end_their_dials_without_a_report() {
    let hanging = [Hanging::new(), Hanging::new()];
    let addresses = hanging.each_ref().map(Hanging::addr);
    let scene = Scene::tcp(Balancer::new(&addresses, Some(HEDGE)));
    let client = scene.connect();
    wait_until("both backends are dialled", || {
        addresses.iter().all(|address| dials(*address) == 1)
    });
    scene.engine.stop();
    assert_reset(&client);
    assert_eq!(scene.upstream.leases(), 0);
    wait_until("the dials have ended", || addresses.iter().all(|address| dials(*address) == 0));
    assert_eq!(scene.upstream.count(|event| !matches!(event, Event::Opened(_))), 0);
}

/// Without a hedge interval, only failures lead to another backend.
#[test]
fn an_upstream_without_hedging_waits_for_its_backend() {
    let hanging = Hanging::new();
    let scene = Scene::tcp(Balancer::new(&[hanging.addr(), echo()], None));
    let client = scene.connect();
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(scene.upstream.events(), [Event::Opened(0)]);
    hanging.unblock();
    let _server = hanging.accept();
    scene.upstream.wait_for(Event::Connected(0));
    drop(client);
}
