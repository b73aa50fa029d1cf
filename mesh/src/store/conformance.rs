//! What every [`ClusterStore`] must do. Panics where it does not.

use super::{ClusterStore, Condition, Event, LeaseId, Revision, StoreError, Transaction, Write};
use std::time::Duration;
use tokio::time::{sleep, timeout};

/// A time in which a store notifies watches.
const SOON: Duration = Duration::from_secs(10);

fn put(key: &str, value: &str, lease: Option<LeaseId>) -> Write {
    Write::Put { key: key.to_owned(), value: value.into(), lease }
}

fn unconditional(writes: impl Into<Vec<Write>>) -> Transaction {
    Transaction { conditions: Vec::new(), writes: writes.into() }
}

async fn committed(store: &dyn ClusterStore, transaction: Transaction) -> Revision {
    store.commit(transaction).await.unwrap().expect("the conditions hold")
}

/// Checks `store` with keys that start with `prefix`. Leaves none of them behind.
pub async fn run(store: &dyn ClusterStore, prefix: &str) {
    let key = |name: &str| format!("{prefix}{name}");
    let (a, b, other) = (key("part/a"), key("part/b"), key("parted"));
    let part = key("part/");

    // Listing is by prefix, in the order of keys, at one revision.
    let (entries, empty) = store.list(prefix).await.unwrap();
    assert_eq!(entries, []);
    let revision = committed(
        store,
        unconditional([put(&b, "2", None), put(&a, "1", None), put(&other, "3", None)]),
    )
    .await;
    assert!(revision > empty);
    let (entries, listed) = store.list(&part).await.unwrap();
    let keys: Vec<_> = entries.iter().map(|entry| (&*entry.key, &*entry.value)).collect();
    assert_eq!(keys, [(&*a, &b"1"[..]), (&*b, b"2")]);
    assert!(listed >= revision && entries.iter().all(|entry| entry.modified == revision));

    // Conditions decide together.
    let conditional = |conditions: &[Condition], value| Transaction {
        conditions: conditions.to_vec(),
        writes: vec![put(&a, value, None)],
    };
    let absent = conditional(&[Condition::Absent(a.clone())], "taken");
    assert_eq!(store.commit(absent).await.unwrap(), None);
    let below = |prefix: &str| conditional(&[Condition::NoneBelow(prefix.to_owned())], "1");
    assert_eq!(store.commit(below(&part)).await.unwrap(), None);
    let unmodified = Condition::Unmodified(a.clone(), revision);
    let both = [unmodified.clone(), Condition::Absent(b.clone())];
    assert_eq!(store.commit(conditional(&both, "half")).await.unwrap(), None);
    let both = [unmodified.clone(), Condition::NoneBelow(key("nothing/"))];
    let second = committed(store, conditional(&both, "4")).await;
    assert_eq!(store.commit(conditional(&[unmodified], "stale")).await.unwrap(), None);
    let (entries, _) = store.list(&a).await.unwrap();
    assert_eq!((&*entries[0].value, entries[0].modified), (&b"4"[..], second));

    // A watch begins after its revision and is limited to its prefix.
    let mut watch = store.watch(&part, revision).await.unwrap();
    let changes = timeout(SOON, watch.next()).await.unwrap().unwrap();
    assert_eq!(changes.revision, second);
    assert!(matches!(&changes.events[..], [Event::Put(entry)] if entry.value == b"4"));
    committed(store, unconditional([put(&other, "5", None)])).await;
    let third =
        committed(store, unconditional([Write::Delete(a.clone()), put(&b, "6", None)])).await;
    let changes = timeout(SOON, watch.next()).await.unwrap().unwrap();
    assert_eq!(changes.revision, third);
    let [Event::Deleted(deleted), Event::Put(entry)] = &changes.events[..] else {
        panic!("both changes of the revision: {changes:?}");
    };
    assert_eq!((deleted, &*entry.value), (&a, &b"6"[..]));
    // Dropping the future loses nothing.
    assert!(timeout(Duration::from_millis(50), watch.next()).await.is_err());
    committed(store, unconditional([put(&a, "7", None)])).await;
    let changes = timeout(SOON, watch.next()).await.unwrap().unwrap();
    assert!(matches!(&changes.events[..], [Event::Put(entry)] if entry.value == b"7"));

    // Invalid transactions change nothing.
    let twice = unconditional([put(&a, "x", None), put(&a, "y", None)]);
    assert!(matches!(store.commit(twice).await, Err(StoreError::Invalid(_))));
    let (entries, _) = store.list(&a).await.unwrap();
    assert_eq!(entries[0].value, b"7");

    leases(store, &key("leased/")).await;

    let keys = [a, b, other].map(Write::Delete);
    committed(store, unconditional(keys)).await;
    assert_eq!(store.list(prefix).await.unwrap().0, []);
}

async fn leases(store: &dyn ClusterStore, prefix: &str) {
    let key = |name: &str| format!("{prefix}{name}");
    const TTL: Duration = Duration::from_secs(2);
    let (kept, ending, moved) = (key("kept"), key("ending"), key("moved"));
    let alive = store.grant(TTL).await.unwrap();
    let lost = store.grant(TTL).await.unwrap();
    assert_ne!(alive, lost);
    let begin = committed(
        store,
        unconditional([
            put(&kept, "", Some(alive)),
            put(&ending, "", Some(lost)),
            put(&moved, "", Some(lost)),
        ]),
    )
    .await;
    // A write without the lease detaches the entry from it.
    let begin = begin.max(committed(store, unconditional([put(&moved, "free", None)])).await);
    let mut watch = store.watch(prefix, begin).await.unwrap();
    let expired = async {
        for _ in 0..20 {
            sleep(TTL / 4).await;
            store.keep_alive(alive).await.unwrap();
        }
    };
    let (changes, ()) = tokio::join!(timeout(SOON, watch.next()), expired);
    assert_eq!(changes.unwrap().unwrap().events, [Event::Deleted(ending.clone())]);
    let (entries, _) = store.list(prefix).await.unwrap();
    let keys: Vec<_> = entries.iter().map(|entry| &entry.key).collect();
    assert_eq!(keys, [&kept, &moved]);

    // An ended lease fences its owner.
    assert_eq!(store.keep_alive(lost).await, Err(StoreError::LeaseEnded));
    let late = unconditional([put(&ending, "late", Some(lost))]);
    assert_eq!(store.commit(late).await, Err(StoreError::LeaseEnded));
    // A condition that fails is reported first: the outcome of a repeated transaction is known.
    let repeated = Transaction {
        conditions: vec![Condition::Absent(kept.clone())],
        writes: vec![put(&kept, "", Some(alive))],
    };
    assert_eq!(store.commit(repeated).await.unwrap(), None);

    store.revoke(alive).await.unwrap();
    let changes = timeout(SOON, watch.next()).await.unwrap().unwrap();
    assert_eq!(changes.events, [Event::Deleted(kept)]);
    store.revoke(alive).await.unwrap();
    committed(store, unconditional([Write::Delete(moved)])).await;
    assert_eq!(store.list(prefix).await.unwrap().0, []);
}
