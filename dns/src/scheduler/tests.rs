use super::*;
use proptest::prelude::*;

fn source(partition: u32, name: &str) -> Source {
    Source { partition: Partition::of([partition]), client_id: ClientId::Container(name.into()) }
}

fn all(_: &Source) -> bool {
    true
}

/// Selects all items that may be forwarded now, in order.
fn turns(scheduler: &mut Scheduler<u32>, now: Instant) -> Vec<(Source, u32)> {
    std::iter::from_fn(|| scheduler.next(now, all).map(|turn| (turn.source, turn.item))).collect()
}

#[test]
fn round_robin_over_partitions_and_their_endpoints() {
    let now = Instant::now();
    let mut scheduler = Scheduler::new(Rate::new(100));
    let [greedy, modest, other] = [source(1, "greedy"), source(1, "modest"), source(2, "other")];
    for number in 0..6 {
        scheduler.push(&greedy, number, now);
    }
    for number in 10..12 {
        scheduler.push(&modest, number, now);
        scheduler.push(&other, number, now);
    }
    let order: Vec<_> = turns(&mut scheduler, now).into_iter().map(|(_, item)| item).collect();
    assert_eq!(order, [0, 10, 10, 11, 1, 11, 2, 3, 4, 5]);
}

#[test]
fn an_endpoint_has_a_burst_and_then_its_rate() {
    let start = Instant::now();
    let mut scheduler = Scheduler::new(Rate::new(10));
    let greedy = source(1, "greedy");
    for number in 0..100 {
        scheduler.push(&greedy, number, start);
    }
    assert_eq!(turns(&mut scheduler, start).len(), 10);
    let mut now = start;
    let mut count = 10;
    while count < 20 {
        now = scheduler.wakes_at().unwrap();
        count += turns(&mut scheduler, now).len();
    }
    assert_eq!((now - start).as_millis(), 1_000);
    assert_eq!(scheduler.queued(), 80);
}

#[test]
fn put_back_restores_token_and_position() {
    let now = Instant::now();
    let mut scheduler = Scheduler::new(Rate::new(1));
    let one = source(1, "one");
    scheduler.push(&one, 1, now);
    scheduler.push(&one, 2, now);
    let turn = scheduler.next(now, all).unwrap();
    scheduler.put_back(turn, now);
    assert_eq!(scheduler.front(&one), Some(&1));
    let at = scheduler.wakes_at().unwrap_or(now);
    assert_eq!(turns(&mut scheduler, at), [(one, 1)]);
}

#[test]
fn endpoints_that_are_not_allowed_do_not_block_others() {
    let now = Instant::now();
    let mut scheduler = Scheduler::new(Rate::new(100));
    let [blocked, free] = [source(1, "blocked"), source(1, "free")];
    scheduler.push(&blocked, 1, now);
    scheduler.push(&free, 2, now);
    let not_blocked = |source: &Source| *source != blocked;
    assert_eq!(scheduler.next(now, not_blocked).map(|turn| turn.item), Some(2));
    assert_eq!(scheduler.next(now, not_blocked), None);
    assert_eq!(turns(&mut scheduler, now), [(blocked, 1)]);
}

#[test]
fn expired_items_are_removed_and_no_state_is_left() {
    let start = Instant::now();
    let max_wait = Duration::from_secs(2);
    let mut scheduler = Scheduler::new(Rate::new(1));
    let one = source(1, "one");
    for number in 0..3 {
        scheduler.push(&one, number, start);
    }
    assert_eq!(turns(&mut scheduler, start).len(), 1);
    assert_eq!(scheduler.expire(start + max_wait / 2, max_wait), []);
    let expired = scheduler.expire(start + max_wait, max_wait);
    assert_eq!(expired, [(one.clone(), 1), (one, 2)]);
    let end = start + max_wait * 2;
    assert_eq!(turns(&mut scheduler, end), []);
    scheduler.expire(end, max_wait);
    assert!(scheduler.is_empty() && scheduler.ring.is_empty() && scheduler.parked.is_empty());
}

#[derive(Clone, Debug)]
enum Step {
    Push(u32, u8),
    Next,
    PopFront(u32, u8),
    PutBack,
    Pass(u64),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0_u32..3, 0_u8..3).prop_map(|(partition, name)| Step::Push(partition, name)),
        4 => Just(Step::Next),
        1 => (0_u32..3, 0_u8..3).prop_map(|(partition, name)| Step::PopFront(partition, name)),
        1 => Just(Step::PutBack),
        2 => (0_u64..1_500).prop_map(Step::Pass),
    ]
}

proptest! {
    /// Every queued item is selected once and in the order of its endpoint, no endpoint exceeds its
    /// rate, and no endpoint with a token is skipped.
    #[test]
    fn no_item_is_lost_and_rates_hold(steps in prop::collection::vec(step(), 1..300)) {
        const RATE: u32 = 3;
        let name = |partition: u32, number: u8| source(partition, &number.to_string());
        let start = Instant::now();
        let mut now = start;
        let mut scheduler = Scheduler::new(Rate::new(RATE));
        let mut queues: BTreeMap<Source, VecDeque<u32>> = BTreeMap::new();
        let mut selected: BTreeMap<Source, u32> = BTreeMap::new();
        let mut next = 0;
        for step in steps {
            match step {
                Step::Push(partition, number) => {
                    let source = name(partition, number);
                    scheduler.push(&source, next, now);
                    queues.entry(source).or_default().push_back(next);
                    next += 1;
                }
                Step::PopFront(partition, number) => {
                    let source = name(partition, number);
                    let expected = queues.get_mut(&source).and_then(VecDeque::pop_front);
                    prop_assert_eq!(scheduler.pop_front(&source), expected);
                }
                Step::PutBack => {
                    if let Some(turn) = scheduler.next(now, all) {
                        scheduler.put_back(turn, now);
                    }
                }
                Step::Pass(millis) => now += Duration::from_millis(millis),
                Step::Next => match scheduler.next(now, all) {
                    Some(turn) => {
                        let expected = queues.get_mut(&turn.source).and_then(VecDeque::pop_front);
                        prop_assert_eq!(Some(turn.item), expected);
                        *selected.entry(turn.source).or_default() += 1;
                    }
                    None => {
                        let waits = queues.values().any(|queue| !queue.is_empty());
                        prop_assert!(!waits || scheduler.wakes_at().is_some_and(|at| at > now));
                    }
                },
            }
            let seconds = (now - start).as_secs_f64();
            let most = f64::from(RATE) * (1.0 + seconds) + 1.0;
            prop_assert!(selected.values().all(|count| f64::from(*count) <= most));
            prop_assert_eq!(scheduler.queued(), queues.values().map(VecDeque::len).sum::<usize>());
        }
        // All items are selected within a bounded time.
        for _ in 0..1_000 {
            while let Some(turn) = scheduler.next(now, all) {
                let expected = queues.get_mut(&turn.source).and_then(VecDeque::pop_front);
                prop_assert_eq!(Some(turn.item), expected);
            }
            now += Duration::from_millis(334);
        }
        prop_assert!(queues.values().all(VecDeque::is_empty));
    }

    /// Of endpoints with items queued at all times, none gets more than one turn more than another
    /// of its partition, and no partition more than one more than another.
    #[test]
    fn turns_are_distributed_evenly(queued in prop::collection::vec((0_u32..3, 0_u8..4), 2..12), taken in 1_usize..200) {
        let now = Instant::now();
        let mut scheduler = Scheduler::new(Rate::new(1_000));
        let sources: BTreeSet<Source> =
            queued.iter().map(|(partition, number)| source(*partition, &number.to_string())).collect();
        for item in 0..200 {
            sources.iter().for_each(|source| scheduler.push(source, item, now));
        }
        let mut of: BTreeMap<&Source, usize> = sources.iter().map(|source| (source, 0)).collect();
        for _ in 0..taken {
            let Some(turn) = scheduler.next(now, all) else { break };
            *of.get_mut(&turn.source).unwrap() += 1;
        }
        let spread = |counts: &[usize]| {
            counts.iter().max().unwrap_or(&0) - counts.iter().min().unwrap_or(&0)
        };
        let mut partitions: BTreeMap<&Partition, Vec<usize>> = BTreeMap::new();
        for (source, count) in of {
            partitions.entry(&source.partition).or_default().push(count);
        }
        prop_assert!(partitions.values().all(|counts| spread(counts) <= 1));
        let sums: Vec<usize> = partitions.values().map(|counts| counts.iter().sum()).collect();
        prop_assert!(spread(&sums) <= 1, "{sums:?}");
    }
}
