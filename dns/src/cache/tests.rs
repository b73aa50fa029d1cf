use super::*;
use crate::answer::{Response, SentQuery};
use std::time::Duration;

/// A response with this TTL in seconds.
fn answer(ttl: u8) -> Arc<Answer> {
    let head = [0, 7, 0x81, 0x80, 0, 1, 0, 1, 0, 0, 0, 0, 1, b'x', 0, 0, 1, 0, 1];
    let record = [0xc0, 12, 0, 1, 0, 1, 0, 0, 0, ttl, 0, 4, 192, 0, 2, 1];
    let message = [&head[..], &record].concat();
    match (SentQuery { id: 7, name: b"\x01x\0"[..].into(), kind: 1, exact: false }).read(&message) {
        Response::Answer(answer) => Arc::new(answer),
        other => panic!("{other:?}"),
    }
}

fn key_of(network: u32, servers: u32, number: u16) -> Key {
    let partition = Partition::of([network]);
    Key { partition, servers, kind: number, bits: Bits::default(), name: b"\x01x\0"[..].into() }
}

fn key(servers: u32, number: u16) -> Key {
    key_of(1, servers, number)
}

/// Size of an entry of these tests.
fn size() -> usize {
    answer(1).size() + 2 * 3 + OVERHEAD
}

#[test]
fn an_entry_expires_after_its_lifetime() {
    let mut cache = Cache::new(10_000);
    let now = Instant::now();
    cache.put(key(0, 1), answer(10), now);
    assert!(cache.get(&key(0, 1), now + Duration::from_millis(9_999)).is_some());
    assert!(cache.get(&key(0, 1), now + Duration::from_secs(10)).is_none());
    assert!(cache.get(&key(1, 1), now).is_none(), "another server list");
    cache.put(key(0, 2), answer(0), now);
    assert!(cache.get(&key(0, 2), now).is_none());
}

#[test]
fn partitions_do_not_share_entries() {
    let mut cache = Cache::new(10_000);
    let now = Instant::now();
    cache.put(key_of(1, 0, 1), answer(10), now);
    assert!(cache.get(&key_of(2, 0, 1), now).is_none());
    let both = Key { partition: Partition::of([1, 2]), ..key(0, 1) };
    assert!(cache.get(&both, now).is_none());
}

#[test]
fn a_full_cache_evicts_what_expires_first() {
    let now = Instant::now();
    let mut cache = Cache::new(3 * size());
    assert_eq!(cache.put(key(0, 1), answer(30), now), 0);
    assert_eq!(cache.put(key(0, 2), answer(10), now), 0);
    assert_eq!(cache.put(key(0, 3), answer(20), now), 0);
    assert_eq!(cache.put(key(0, 4), answer(5), now), 1);
    assert!(cache.get(&key(0, 2), now).is_none());
    assert_eq!(cache.len(), 3);
    assert_eq!(cache.put(key(0, 4), answer(50), now), 0, "it replaces the previous entry");
    let later = now + Duration::from_secs(25);
    assert_eq!(cache.put(key(0, 5), answer(5), later), 0, "expired entries are removed first");
    assert_eq!(cache.len(), 3);
    for number in 0..1000 {
        cache.put(key(0, number), answer(9), now);
    }
    assert!(cache.len() <= 3 && cache.size <= 3 * size() && cache.order.len() == cache.len());
}

#[test]
fn a_partition_that_floods_the_cache_evicts_its_own_entries() {
    let now = Instant::now();
    let mut cache = Cache::new(10 * size());
    // These expire first, but are evicted only if their partition holds most.
    for number in 0..3 {
        cache.put(key_of(1, 0, number), answer(5), now);
    }
    for number in 0..1_000 {
        cache.put(key_of(2, 0, number), answer(200), now);
    }
    let kept = |cache: &Cache, network: u32| {
        (0..1_000).filter(|number| cache.get(&key_of(network, 0, *number), now).is_some()).count()
    };
    assert_eq!((kept(&cache, 1), kept(&cache, 2)), (3, 7));
    for number in 0..1_000 {
        cache.put(key_of(3, 0, number), answer(5), now);
    }
    assert_eq!(
        (kept(&cache, 1), kept(&cache, 2), kept(&cache, 3)),
        (3, 4, 3),
        "the largest partition loses entries"
    );
    assert_eq!(cache.sizes.len(), cache.shares.len());
    let all: usize = cache.shares.values().map(|share| share.size).sum();
    assert_eq!((all, cache.order.len()), (cache.size, cache.len()));
}

#[test]
fn a_response_larger_than_every_share_is_not_cached() {
    let now = Instant::now();
    let mut cache = Cache::new(3 * size());
    for network in 1..=3 {
        cache.put(key_of(network, 0, 1), answer(50), now);
    }
    let long = Key { name: vec![b'x'; 100].into(), ..key_of(4, 0, 1) };
    assert_eq!(cache.put(long.clone(), answer(50), now), 0);
    assert!(cache.get(&long, now).is_none());
    assert_eq!(cache.put(key_of(4, 0, 1), answer(50), now), 1, "an entry of equal size evicts one");
}

#[test]
fn responses_of_a_server_list_can_be_dropped() {
    let mut cache = Cache::new(10_000);
    let now = Instant::now();
    cache.put(key(0, 1), answer(10), now);
    cache.put(key(1, 1), answer(10), now);
    cache.forget(0);
    assert!(cache.get(&key(0, 1), now).is_none());
    assert!(cache.get(&key(1, 1), now).is_some());
}
