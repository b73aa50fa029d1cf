use super::*;
use crate::message::Bits;
use crate::partition::Partition;
use proptest::prelude::*;
use std::collections::BTreeSet;
use std::rc::{Rc, Weak};

/// A waiter is a number, and a handle something whose drop can be observed.
type Table = Pending<u32, (), Rc<()>>;

fn key(partition: u32, name: u32) -> Key {
    Key {
        partition: Partition::of([partition]),
        servers: 0,
        kind: 1,
        bits: Bits::default(),
        name: name.to_be_bytes().into(),
    }
}

fn client_id(name: &str) -> ClientId {
    ClientId::Container(name.into())
}

fn table(in_flight: usize, waiters: usize, waiters_per_endpoint: usize, rate: u32) -> Table {
    Pending::new(Limits { in_flight, waiters, waiters_per_endpoint, rate: Rate::new(rate) })
}

/// Evicted waiters and the reasons.
fn reasons(evicted: &[Evicted<u32>]) -> Vec<(u32, Overload)> {
    evicted.iter().map(|one| (one.waiter, one.reason)).collect()
}

struct Scene {
    table: Table,
    now: Instant,
    evicted: Vec<Evicted<u32>>,
}

impl Scene {
    fn new(table: Table) -> Self {
        Self { table, now: Instant::now(), evicted: Vec::new() }
    }

    fn ask(&mut self, key: &Key, name: &str, waiter: u32) -> Admission {
        self.table.ask(key, client_id(name), self.now, || waiter, || (), &mut self.evicted)
    }

    /// Starts all queries that may start. Returns keys, owners and handles.
    fn start(&mut self) -> Vec<(Key, ClientId, Weak<()>)> {
        let mut started = Vec::new();
        while let Some(NextQuery { key, owner, .. }) =
            self.table.next_query(self.now, &mut self.evicted)
        {
            let flight = Rc::new(());
            started.push((key.clone(), owner, Rc::downgrade(&flight)));
            self.table.set_handle(&key, flight);
        }
        started
    }
}

#[test]
fn equal_queries_are_sent_once_and_all_clients_get_the_response() {
    let mut scene = Scene::new(table(10, 10, 10, 100));
    assert_eq!(scene.ask(&key(1, 1), "a", 1), Admission::New);
    assert_eq!(scene.ask(&key(1, 1), "b", 2), Admission::Joined);
    assert_eq!(scene.ask(&key(2, 1), "c", 3), Admission::New, "partitions do not share queries");
    let started = scene.start();
    assert_eq!(started.len(), 2);
    assert_eq!(scene.ask(&key(1, 1), "a", 4), Admission::Joined);
    let waiters: Vec<_> =
        scene.table.complete(&key(1, 1)).into_iter().map(|(_, waiter)| waiter).collect();
    assert_eq!(waiters, [1, 2, 4]);
    assert!(scene.evicted.is_empty());
    assert_eq!((scene.table.in_flight(), scene.table.waiters()), (1, 1));
}

#[test]
fn a_client_does_not_wait_in_the_queue_of_another_with_the_same_query() {
    let mut scene = Scene::new(table(100, 1_000, 1_000, 1));
    for name in 0..50 {
        scene.ask(&key(1, name), "greedy", name);
    }
    scene.ask(&key(1, 49), "modest", 100);
    let owners: Vec<_> = scene.start().into_iter().map(|(key, owner, _)| (key, owner)).collect();
    assert_eq!(owners, [(key(1, 0), client_id("greedy")), (key(1, 49), client_id("modest"))]);
}

#[test]
fn at_its_share_an_endpoint_loses_its_own_oldest() {
    let mut scene = Scene::new(table(100, 1_000, 3, 1));
    for waiter in 0..5 {
        scene.ask(&key(1, waiter), "greedy", waiter);
    }
    assert_eq!(reasons(&scene.evicted), [(0, Overload::Share), (1, Overload::Share)]);
    assert_eq!(scene.table.queued(), 3);
    scene.ask(&key(1, 9), "modest", 9);
    assert_eq!(scene.evicted.len(), 2);
    // Equal queries: a waiter is evicted, not the query.
    let mut scene = Scene::new(table(100, 1_000, 3, 10));
    scene.ask(&key(1, 1), "greedy", 0);
    let started = scene.start();
    for waiter in 1..4 {
        scene.ask(&key(1, 1), "greedy", waiter);
    }
    assert_eq!(reasons(&scene.evicted), [(0, Overload::Share)]);
    assert!(started[0].2.upgrade().is_some(), "the query is still in flight");
}

#[test]
fn at_the_limit_of_queries_in_flight_the_largest_holder_loses_its_oldest() {
    let mut scene = Scene::new(table(9, 100, 100, 100));
    for waiter in 0..9 {
        scene.ask(&key(1, waiter), "greedy", waiter);
    }
    let flights = scene.start();
    assert_eq!((flights.len(), scene.table.queued()), (6, 3), "the share of its partition");
    scene.ask(&key(1, 20), "modest", 20);
    let modest = scene.start();
    assert_eq!((&modest[0].0, modest.len()), (&key(1, 20), 1));
    assert_eq!(reasons(&scene.evicted), [(0, Overload::InFlight)]);
    assert!(flights[0].2.upgrade().is_none(), "the query was cancelled");
    // An entry with other waiters moves to one of them.
    scene.ask(&key(1, 1), "modest", 21);
    scene.ask(&key(1, 22), "third", 22);
    scene.start();
    assert_eq!(reasons(&scene.evicted)[1..], [(1, Overload::InFlight), (2, Overload::InFlight)]);
    assert!(flights[1].2.upgrade().is_some() && flights[2].2.upgrade().is_none());
    assert_eq!(scene.table.complete(&key(1, 1)), [(client_id("modest"), 21)]);
}

#[test]
fn at_the_limit_of_waiters_the_largest_holder_loses_one_and_equal_holders_are_refused() {
    let mut scene = Scene::new(table(100, 6, 100, 100));
    for waiter in 0..4 {
        assert_eq!(scene.ask(&key(1, waiter), "greedy", waiter), Admission::New);
    }
    assert_eq!(scene.ask(&key(1, 5), "greedy", 5), Admission::Refused);
    assert_eq!(scene.ask(&key(1, 6), "modest", 6), Admission::New);
    assert_eq!(reasons(&scene.evicted), [(0, Overload::Waiters)]);
    assert_eq!(scene.ask(&key(2, 7), "other", 7), Admission::New, "its partition has free units");
}

#[test]
fn waiters_expire_in_the_queue() {
    let mut scene = Scene::new(table(1, 100, 100, 100));
    scene.ask(&key(1, 1), "a", 1);
    scene.ask(&key(1, 2), "a", 2);
    assert_eq!(scene.start().len(), 1);
    scene.now += QUEUE_TIME;
    scene.table.expire(scene.now, &mut scene.evicted);
    assert_eq!(reasons(&scene.evicted), [(2, Overload::Queue)]);
    assert_eq!(scene.table.complete(&key(1, 1)).len(), 1);
    scene.now += QUEUE_TIME;
    scene.start();
    scene.table.expire(scene.now, &mut scene.evicted);
    assert!(scene.table.is_idle());
}

#[derive(Clone, Debug)]
enum Step {
    Ask { partition: u32, name: u32, client_id: u8 },
    Start,
    Complete(u32, u32),
    Pass(u64),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0_u32..2, 0_u32..5, 0_u8..3)
            .prop_map(|(partition, name, client_id)| Step::Ask { partition, name, client_id }),
        3 => Just(Step::Start),
        3 => (0_u32..2, 0_u32..5).prop_map(|(partition, name)| Step::Complete(partition, name)),
        1 => (0_u64..1_500).prop_map(Step::Pass),
    ]
}

proptest! {
    /// For any sequence of operations, every waiter gets one response, limits hold, and the largest
    /// holder is evicted.
    #[test]
    fn every_waiter_gets_one_response_and_limits_hold(steps in prop::collection::vec(step(), 1..400)) {
        const LIMITS: [usize; 3] = [3, 9, 4];
        let [flights, waiters, of_one] = LIMITS;
        let mut scene = Scene::new(table(flights, waiters, of_one, 4));
        let mut waiting = BTreeSet::new();
        let mut next = 0;
        for step in steps {
            let before = scene.evicted.len();
            match step {
                Step::Ask { partition, name, client_id } => {
                    let asked = scene.ask(&key(partition, name), &client_id.to_string(), next);
                    if asked != Admission::Refused {
                        waiting.insert(next);
                    }
                    next += 1;
                }
                Step::Start => drop(scene.start()),
                Step::Complete(partition, name) => {
                    for (_, waiter) in scene.table.complete(&key(partition, name)) {
                        prop_assert!(waiting.remove(&waiter));
                    }
                }
                Step::Pass(millis) => {
                    scene.now += Duration::from_millis(millis);
                    scene.table.expire(scene.now, &mut scene.evicted);
                }
            }
            for one in &scene.evicted[before..] {
                prop_assert!(waiting.remove(&one.waiter), "{one:?}");
            }
            prop_assert!(scene.table.in_flight() <= flights);
            prop_assert!(scene.table.max_waiters() <= of_one);
            prop_assert_eq!(scene.table.waiters(), waiting.len());
            prop_assert!(waiting.len() <= waiters);
            prop_assert_eq!(scene.table.owned.len(), scene.table.in_flight());
            for query in scene.table.queries.values() {
                prop_assert_eq!(query.clients.values().sum::<usize>(), query.waiters.len());
                let owner = query.in_flight.as_ref().map(|in_flight| &in_flight.owner.client_id);
                prop_assert!(owner.is_none_or(|owner| query.clients.contains_key(owner)));
            }
        }
        // In the end every waiter gets a response.
        for _ in 0..100 {
            scene.now += Duration::from_millis(100);
            let before = scene.evicted.len();
            for (key, _, _) in scene.start() {
                for (_, waiter) in scene.table.complete(&key) {
                    prop_assert!(waiting.remove(&waiter));
                }
            }
            scene.table.expire(scene.now, &mut scene.evicted);
            for one in &scene.evicted[before..] {
                prop_assert!(waiting.remove(&one.waiter));
            }
            let in_flight: Vec<Key> = scene.table.owned.values().cloned().collect();
            for key in in_flight {
                for (_, waiter) in scene.table.complete(&key) {
                    prop_assert!(waiting.remove(&waiter));
                }
            }
        }
        prop_assert!(waiting.is_empty(), "{waiting:?}");
        prop_assert!(scene.table.is_idle() && scene.table.queries.is_empty());
    }
}
