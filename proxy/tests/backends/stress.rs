//! Many connections to backends of which most fail.

use crate::scene::{Balancer, CLOSED, Event, Hanging, Scene, ask, connections, dials, echo};
use std::thread;
use std::time::Duration;
use tidegate_model::Protocol;
use tidegate_proxy::DialFailure;

const THREADS: usize = 16;
const CONNECTIONS_PER_THREAD: usize = 125;

#[test]
fn every_connection_succeeds_while_a_backend_within_the_limits_is_good() {
    let hanging = [Hanging::new(), Hanging::new()];
    let backends =
        [hanging[0].addr(), CLOSED, CLOSED, hanging[1].addr(), CLOSED, echo(), CLOSED, echo()];
    let upstream = Balancer::new(&backends, Some(Duration::from_millis(5)))
        .starting_at(|flow| usize::from(flow.client.port()) / 2);
    let scene = Scene::with(Protocol::Tcp, upstream, |settings, _| settings.workers = 2);
    thread::scope(|scope| {
        for number in 0..THREADS {
            let scene = &scene;
            scope.spawn(move || {
                for round in 0..CONNECTIONS_PER_THREAD {
                    let size = (number * 7919 + round * 104_729) % 20_000;
                    let request: Vec<u8> = (0..size).map(|at| (at * 31 + round) as u8).collect();
                    assert!(ask(&scene.connect(), &request) == request, "{size} bytes differ");
                }
            });
        }
    });
    scene.assert_idle();
    let port = scene.snapshot();
    let total = THREADS * CONNECTIONS_PER_THREAD;
    assert_eq!((port.accepted, port.cut), (total as u64, 0));
    assert_eq!(port.refused.iter().sum::<u64>(), 0);
    for address in backends {
        // One connection fills the backlog.
        let own = usize::from(hanging.iter().any(|hanging| hanging.addr() == address));
        assert_eq!((dials(address), connections(address)), (0, own), "{address}");
    }

    let events = &scene.upstream.events();
    let of = |which: &dyn Fn(&Event) -> bool| events.iter().filter(|event| which(event)).count();
    assert_eq!(of(&|event| matches!(event, Event::Connected(_))), total);
    for id in 0..backends.len() as u64 {
        let is_good = [5, 7].contains(&id);
        let opened = of(&|event| *event == Event::Opened(id));
        let connected = of(&|event| *event == Event::Connected(id));
        let refused = of(&|event| *event == Event::Failed(id, DialFailure::Refused));
        let silent = of(&|event| *event == Event::Failed(id, DialFailure::Silent));
        println!(
            "{id}: {opened} opened, {connected} connected, {refused} refused, {silent} silent"
        );
        assert!(opened > 0 && connected + refused + silent <= opened);
        assert_eq!(connected > 0, is_good, "{id}");
        let is_closed = backends[id as usize] == CLOSED;
        assert_eq!(refused > 0, is_closed, "{id}");
        assert!(!is_closed || refused == opened, "{id}");
    }
}
