use super::*;
use crate::message::Bits;
use crate::partition::Partition;
use proptest::prelude::*;
use std::collections::BTreeSet;
use std::rc::{Rc, Weak};

/// A waiter is its number, and a flight something that can be seen to go.
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

fn asker(name: &str) -> Asker {
    Asker::Container(name.into())
}

fn table(flights: usize, waiters: usize, waiters_of_one: usize, rate: u32) -> Table {
    Pending::new(Limits { flights, waiters, waiters_of_one, rate: Rate::new(rate) })
}

/// What is told to whom.
fn told(yielded: &[Yielded<u32>]) -> Vec<(u32, Overload)> {
    yielded.iter().map(|one| (one.waiter, one.reason)).collect()
}

struct Scene {
    table: Table,
    now: Instant,
    yielded: Vec<Yielded<u32>>,
}

impl Scene {
    fn new(table: Table) -> Self {
        Self { table, now: Instant::now(), yielded: Vec::new() }
    }

    fn ask(&mut self, key: &Key, name: &str, waiter: u32) -> Asked {
        self.table.ask(key, asker(name), self.now, || waiter, || (), &mut self.yielded)
    }

    /// Launches all that may go: who owns what, and the flights.
    fn launch(&mut self) -> Vec<(Key, Asker, Weak<()>)> {
        let mut launched = Vec::new();
        while let Some(Launch { key, owner, .. }) = self.table.launch(self.now, &mut self.yielded) {
            let flight = Rc::new(());
            launched.push((key.clone(), owner, Rc::downgrade(&flight)));
            self.table.launched(&key, flight);
        }
        launched
    }
}

#[test]
fn equal_questions_are_one_and_everybody_hears() {
    let mut scene = Scene::new(table(10, 10, 10, 100));
    assert_eq!(scene.ask(&key(1, 1), "a", 1), Asked::New);
    assert_eq!(scene.ask(&key(1, 1), "b", 2), Asked::Joined);
    assert_eq!(
        scene.ask(&key(2, 1), "c", 3),
        Asked::New,
        "another partition's is another question"
    );
    let launched = scene.launch();
    assert_eq!(launched.len(), 2);
    assert_eq!(scene.ask(&key(1, 1), "a", 4), Asked::Joined);
    let waiters: Vec<_> =
        scene.table.land(&key(1, 1)).into_iter().map(|(_, waiter)| waiter).collect();
    assert_eq!(waiters, [1, 2, 4]);
    assert!(scene.yielded.is_empty());
    assert_eq!((scene.table.flights(), scene.table.waiters()), (1, 1));
}

#[test]
fn a_neighbour_that_asks_the_same_does_not_wait_in_the_queue_of_a_greedy_one() {
    let mut scene = Scene::new(table(100, 1_000, 1_000, 1));
    for name in 0..50 {
        scene.ask(&key(1, name), "greedy", name);
    }
    scene.ask(&key(1, 49), "modest", 100);
    let owners: Vec<_> = scene.launch().into_iter().map(|(key, owner, _)| (key, owner)).collect();
    assert_eq!(owners, [(key(1, 0), asker("greedy")), (key(1, 49), asker("modest"))]);
}

#[test]
fn at_its_share_an_endpoint_loses_its_own_oldest() {
    let mut scene = Scene::new(table(100, 1_000, 3, 1));
    for waiter in 0..5 {
        scene.ask(&key(1, waiter), "greedy", waiter);
    }
    assert_eq!(told(&scene.yielded), [(0, Overload::Share), (1, Overload::Share)]);
    assert_eq!(scene.table.queued(), 3);
    scene.ask(&key(1, 9), "modest", 9);
    assert_eq!(scene.yielded.len(), 2);
    // Equal ones: the waiter yields, not the question.
    let mut scene = Scene::new(table(100, 1_000, 3, 10));
    scene.ask(&key(1, 1), "greedy", 0);
    let launched = scene.launch();
    for waiter in 1..4 {
        scene.ask(&key(1, 1), "greedy", waiter);
    }
    assert_eq!(told(&scene.yielded), [(0, Overload::Share)]);
    assert!(launched[0].2.upgrade().is_some(), "it is still asked");
}

#[test]
fn at_the_limit_of_flights_the_largest_holder_loses_its_oldest() {
    let mut scene = Scene::new(table(9, 100, 100, 100));
    for waiter in 0..9 {
        scene.ask(&key(1, waiter), "greedy", waiter);
    }
    let flights = scene.launch();
    assert_eq!((flights.len(), scene.table.queued()), (6, 3), "its partition's share");
    scene.ask(&key(1, 20), "modest", 20);
    let of_modest = scene.launch();
    assert_eq!((&of_modest[0].0, of_modest.len()), (&key(1, 20), 1));
    assert_eq!(told(&scene.yielded), [(0, Overload::Flights)]);
    assert!(flights[0].2.upgrade().is_none(), "it is no longer asked");
    // What others wait for goes on in their name.
    scene.ask(&key(1, 1), "modest", 21);
    scene.ask(&key(1, 22), "third", 22);
    scene.launch();
    assert_eq!(told(&scene.yielded)[1..], [(1, Overload::Flights), (2, Overload::Flights)]);
    assert!(flights[1].2.upgrade().is_some() && flights[2].2.upgrade().is_none());
    assert_eq!(scene.table.land(&key(1, 1)), [(asker("modest"), 21)]);
}

#[test]
fn at_the_limit_of_waiters_the_largest_holder_yields_and_equals_are_refused() {
    let mut scene = Scene::new(table(100, 6, 100, 100));
    for waiter in 0..4 {
        assert_eq!(scene.ask(&key(1, waiter), "greedy", waiter), Asked::New);
    }
    assert_eq!(scene.ask(&key(1, 5), "greedy", 5), Asked::Refused);
    assert_eq!(scene.ask(&key(1, 6), "modest", 6), Asked::New);
    assert_eq!(told(&scene.yielded), [(0, Overload::Waiters)]);
    assert_eq!(scene.ask(&key(2, 7), "other", 7), Asked::New, "its partition has room");
}

#[test]
fn who_waits_too_long_for_a_turn_is_told() {
    let mut scene = Scene::new(table(1, 100, 100, 100));
    scene.ask(&key(1, 1), "a", 1);
    scene.ask(&key(1, 2), "a", 2);
    assert_eq!(scene.launch().len(), 1);
    scene.now += QUEUE_TIME;
    scene.table.expire(scene.now, &mut scene.yielded);
    assert_eq!(told(&scene.yielded), [(2, Overload::Queue)]);
    assert_eq!(scene.table.land(&key(1, 1)).len(), 1);
    scene.now += QUEUE_TIME;
    scene.launch();
    scene.table.expire(scene.now, &mut scene.yielded);
    assert!(scene.table.is_idle());
}

#[derive(Clone, Debug)]
enum Step {
    Ask { partition: u32, name: u32, asker: u8 },
    Launch,
    Land(u32, u32),
    Pass(u64),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0_u32..2, 0_u32..5, 0_u8..3)
            .prop_map(|(partition, name, asker)| Step::Ask { partition, name, asker }),
        3 => Just(Step::Launch),
        3 => (0_u32..2, 0_u32..5).prop_map(|(partition, name)| Step::Land(partition, name)),
        1 => (0_u64..1_500).prop_map(Step::Pass),
    ]
}

proptest! {
    /// Whatever is asked: every waiter hears once, limits hold, and who yields holds most.
    #[test]
    fn everybody_hears_once_and_limits_hold(steps in prop::collection::vec(step(), 1..400)) {
        const LIMITS: [usize; 3] = [3, 9, 4];
        let [flights, waiters, of_one] = LIMITS;
        let mut scene = Scene::new(table(flights, waiters, of_one, 4));
        let mut waiting = BTreeSet::new();
        let mut next = 0;
        for step in steps {
            let before = scene.yielded.len();
            match step {
                Step::Ask { partition, name, asker } => {
                    let asked = scene.ask(&key(partition, name), &asker.to_string(), next);
                    if asked != Asked::Refused {
                        waiting.insert(next);
                    }
                    next += 1;
                }
                Step::Launch => drop(scene.launch()),
                Step::Land(partition, name) => {
                    for (_, waiter) in scene.table.land(&key(partition, name)) {
                        prop_assert!(waiting.remove(&waiter));
                    }
                }
                Step::Pass(millis) => {
                    scene.now += Duration::from_millis(millis);
                    scene.table.expire(scene.now, &mut scene.yielded);
                }
            }
            for one in &scene.yielded[before..] {
                prop_assert!(waiting.remove(&one.waiter), "{one:?}");
            }
            prop_assert!(scene.table.flights() <= flights);
            prop_assert!(scene.table.most_waiters() <= of_one);
            prop_assert_eq!(scene.table.waiters(), waiting.len());
            prop_assert!(waiting.len() <= waiters);
            prop_assert_eq!(scene.table.owned.len(), scene.table.flights());
            for question in scene.table.questions.values() {
                prop_assert_eq!(question.askers.values().sum::<usize>(), question.waiters.len());
                let owner = question.flight.as_ref().map(|flight| &flight.owner.asker);
                prop_assert!(owner.is_none_or(|owner| question.askers.contains_key(owner)));
            }
        }
        // Nobody is forgotten.
        for _ in 0..100 {
            scene.now += Duration::from_millis(100);
            let before = scene.yielded.len();
            for (key, _, _) in scene.launch() {
                for (_, waiter) in scene.table.land(&key) {
                    prop_assert!(waiting.remove(&waiter));
                }
            }
            scene.table.expire(scene.now, &mut scene.yielded);
            for one in &scene.yielded[before..] {
                prop_assert!(waiting.remove(&one.waiter));
            }
            let flying: Vec<Key> = scene.table.owned.values().cloned().collect();
            for key in flying {
                for (_, waiter) in scene.table.land(&key) {
                    prop_assert!(waiting.remove(&waiter));
                }
            }
        }
        prop_assert!(waiting.is_empty(), "{waiting:?}");
        prop_assert!(scene.table.is_idle() && scene.table.questions.is_empty());
    }
}
