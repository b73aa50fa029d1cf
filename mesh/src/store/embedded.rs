//! A store in this process, for a mesh of one host. Its contents end with the process.

use super::{
    Changes, ClusterStore, Condition, Connect, Entry, Event, LeaseId, MAX_WRITES, Revision,
    StoreError, StoreFuture, Transaction, Watch, Write,
};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

/// Events of the history that are kept. Watches of earlier revisions fail with
/// [`StoreError::Compacted`].
const MAX_HISTORY: usize = 65_536;

/// Smallest time of a lease.
const MIN_TTL: Duration = Duration::from_secs(1);

/// A store in this process.
#[derive(Clone, Debug)]
pub struct Embedded(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    contents: Mutex<Contents>,
    /// The revision of the last change, for watches.
    revision: watch::Sender<Revision>,
}

#[derive(Debug, Default)]
struct Contents {
    entries: BTreeMap<String, Entry>,
    revision: Revision,
    leases: BTreeMap<LeaseId, Lease>,
    last_lease: i64,
    history: VecDeque<(Revision, Event)>,
    /// The last revision whose events are no longer in the history.
    compacted: Revision,
}

#[derive(Debug)]
struct Lease {
    ttl: Duration,
    ends: Instant,
    keys: BTreeSet<String>,
}

impl Contents {
    /// Ends the leases that have expired. Each end is a revision.
    fn expire(&mut self, now: Instant) {
        let expired: Vec<_> =
            self.leases.iter().filter(|(_, lease)| lease.ends <= now).map(|(id, _)| *id).collect();
        for id in expired {
            self.end(id);
        }
    }

    fn end(&mut self, lease: LeaseId) {
        let Some(Lease { keys, .. }) = self.leases.remove(&lease) else { return };
        if !keys.is_empty() {
            self.revision.0 += 1;
        }
        for key in keys {
            self.entries.remove(&key);
            self.record(Event::Deleted(key));
        }
    }

    fn record(&mut self, event: Event) {
        self.history.push_back((self.revision, event));
        while self.history.len() > MAX_HISTORY {
            let Some((revision, _)) = self.history.pop_front() else { return };
            self.compacted = revision;
        }
        // The events of a revision are forgotten together.
        while self.history.front().is_some_and(|(revision, _)| *revision <= self.compacted) {
            self.history.pop_front();
        }
    }

    fn holds(&self, condition: &Condition) -> bool {
        match condition {
            Condition::Absent(key) => !self.entries.contains_key(key),
            Condition::NoneBelow(prefix) => {
                let mut from = self.entries.range(prefix.clone()..);
                from.next().is_none_or(|(key, _)| !key.starts_with(prefix.as_str()))
            }
            Condition::Unmodified(key, revision) => {
                self.entries.get(key).is_some_and(|entry| entry.modified == *revision)
            }
        }
    }

    fn commit(&mut self, transaction: Transaction) -> Result<Option<Revision>, StoreError> {
        let Transaction { conditions, writes } = transaction;
        if conditions.len().max(writes.len()) > MAX_WRITES {
            let error = format!("a transaction of more than {MAX_WRITES} writes or conditions");
            return Err(StoreError::Invalid(error));
        }
        let keys: BTreeSet<_> = writes.iter().map(Write::key).collect();
        if keys.len() < writes.len() {
            return Err(StoreError::Invalid("two writes of one key".to_owned()));
        }
        if !conditions.iter().all(|condition| self.holds(condition)) {
            return Ok(None);
        }
        let is_alive = |write: &Write| match write {
            Write::Put { lease: Some(lease), .. } => self.leases.contains_key(lease),
            _ => true,
        };
        if !writes.iter().all(is_alive) {
            return Err(StoreError::LeaseEnded);
        }
        let changes = |write: &Write| match write {
            Write::Put { .. } => true,
            Write::Delete(key) => self.entries.contains_key(key),
        };
        let writes: Vec<_> = writes.into_iter().filter(changes).collect();
        if !writes.is_empty() {
            self.revision.0 += 1;
        }
        for write in writes {
            self.detach(write.key());
            match write {
                Write::Put { key, value, lease } => {
                    if let Some(lease) = lease.and_then(|lease| self.leases.get_mut(&lease)) {
                        lease.keys.insert(key.clone());
                    }
                    let entry = Entry { key, value, lease, modified: self.revision };
                    self.entries.insert(entry.key.clone(), entry.clone());
                    self.record(Event::Put(entry));
                }
                Write::Delete(key) => {
                    self.entries.remove(&key);
                    self.record(Event::Deleted(key));
                }
            }
        }
        Ok(Some(self.revision))
    }

    /// Detaches the entry with `key` from its lease.
    fn detach(&mut self, key: &str) {
        let lease = self.entries.get(key).and_then(|entry| entry.lease);
        if let Some(lease) = lease.and_then(|lease| self.leases.get_mut(&lease)) {
            lease.keys.remove(key);
        }
    }

    /// The changes after `after` of entries with `prefix`.
    fn changes(&self, prefix: &str, after: Revision) -> Result<Option<Changes>, StoreError> {
        if after < self.compacted {
            return Err(StoreError::Compacted);
        }
        let is_one = |event: &Event| match event {
            Event::Put(entry) => entry.key.starts_with(prefix),
            Event::Deleted(key) => key.starts_with(prefix),
        };
        let begin = self.history.partition_point(|(revision, _)| *revision <= after);
        let events: Vec<_> = self
            .history
            .range(begin..)
            .map(|(_, event)| event)
            .filter(|one| is_one(one))
            .cloned()
            .collect();
        Ok((!events.is_empty()).then_some(Changes { revision: self.revision, events }))
    }
}

impl Embedded {
    /// Creates an empty store.
    #[must_use]
    pub fn new() -> Self {
        let contents = Mutex::new(Contents::default());
        Self(Arc::new(Shared { contents, revision: watch::Sender::new(Revision::default()) }))
    }

    /// Forgets the history up to `revision`, as an operator of etcd may do at any time.
    pub fn compact(&self, revision: Revision) {
        self.with(|contents| {
            contents.compacted = contents.compacted.max(revision.min(contents.revision));
            while contents.history.front().is_some_and(|(old, _)| *old <= contents.compacted) {
                contents.history.pop_front();
            }
        });
    }

    /// Calls `f` after leases have expired, and notifies watches of changes.
    fn with<T>(&self, f: impl FnOnce(&mut Contents) -> T) -> T {
        let mut contents = self.lock();
        contents.expire(Instant::now());
        let result = f(&mut contents);
        let revision = contents.revision;
        drop(contents);
        self.0.revision.send_if_modified(|known| std::mem::replace(known, revision) != revision);
        result
    }

    fn lock(&self) -> MutexGuard<'_, Contents> {
        self.0.contents.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The time at which the next lease ends.
    fn next_end(&self) -> Option<Instant> {
        self.lock().leases.values().map(|lease| lease.ends).min()
    }
}

impl Default for Embedded {
    fn default() -> Self {
        Self::new()
    }
}

impl Connect for Embedded {
    fn connect(&self) -> StoreFuture<'_, Arc<dyn ClusterStore>> {
        let store: Arc<dyn ClusterStore> = Arc::new(self.clone());
        Box::pin(future::ready(Ok(store)))
    }
}

impl ClusterStore for Embedded {
    fn list<'a>(&'a self, prefix: &'a str) -> StoreFuture<'a, (Vec<Entry>, Revision)> {
        let listed = self.with(|contents| {
            let entries = contents.entries.range(prefix.to_owned()..);
            let entries = entries.take_while(|(key, _)| key.starts_with(prefix));
            (entries.map(|(_, entry)| entry.clone()).collect(), contents.revision)
        });
        Box::pin(future::ready(Ok(listed)))
    }

    fn commit(&self, transaction: Transaction) -> StoreFuture<'_, Option<Revision>> {
        Box::pin(future::ready(self.with(|contents| contents.commit(transaction))))
    }

    fn grant(&self, ttl: Duration) -> StoreFuture<'_, LeaseId> {
        let lease = self.with(|contents| {
            contents.last_lease += 1;
            let id = LeaseId(contents.last_lease);
            let ttl = ttl.max(MIN_TTL);
            let lease = Lease { ttl, ends: Instant::now() + ttl, keys: BTreeSet::new() };
            contents.leases.insert(id, lease);
            id
        });
        Box::pin(future::ready(Ok(lease)))
    }

    fn keep_alive(&self, lease: LeaseId) -> StoreFuture<'_, ()> {
        let kept = self.with(|contents| {
            let lease = contents.leases.get_mut(&lease).ok_or(StoreError::LeaseEnded)?;
            lease.ends = Instant::now() + lease.ttl;
            Ok(())
        });
        Box::pin(future::ready(kept))
    }

    fn revoke(&self, lease: LeaseId) -> StoreFuture<'_, ()> {
        self.with(|contents| contents.end(lease));
        Box::pin(future::ready(Ok(())))
    }

    fn watch<'a>(&'a self, prefix: &'a str, after: Revision) -> StoreFuture<'a, Box<dyn Watch>> {
        let watch: Box<dyn Watch> = Box::new(EmbeddedWatch {
            store: self.clone(),
            revision: self.0.revision.subscribe(),
            prefix: prefix.to_owned(),
            after,
        });
        Box::pin(future::ready(Ok(watch)))
    }
}

struct EmbeddedWatch {
    store: Embedded,
    revision: watch::Receiver<Revision>,
    prefix: String,
    after: Revision,
}

impl Watch for EmbeddedWatch {
    fn next(&mut self) -> StoreFuture<'_, Changes> {
        Box::pin(async move {
            loop {
                self.revision.mark_unchanged();
                let changes =
                    self.store.with(|contents| contents.changes(&self.prefix, self.after));
                if let Some(changes) = changes? {
                    self.after = changes.revision;
                    return Ok(changes);
                }
                let end = self.store.next_end();
                tokio::select! {
                    // The sender is in the store, which this watch holds.
                    _ = self.revision.changed() => {}
                    () = sleep_until(end.unwrap_or_else(Instant::now)), if end.is_some() => {}
                }
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::conformance;
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn conforms() {
        conformance::run(&Embedded::new(), "embedded/").await;
    }

    #[tokio::test]
    async fn a_watch_of_a_forgotten_revision_fails() {
        let store = Embedded::new();
        let put = |value: &str| Transaction {
            writes: vec![Write::Put { key: "a".into(), value: value.into(), lease: None }],
            ..Transaction::default()
        };
        let first = store.commit(put("1")).await.unwrap().unwrap();
        let second = store.commit(put("2")).await.unwrap().unwrap();
        store.compact(second);
        let mut watch = store.watch("", first).await.unwrap();
        assert_eq!(watch.next().await, Err(StoreError::Compacted));
        let mut watch = store.watch("", second).await.unwrap();
        let third = store.commit(put("3")).await.unwrap().unwrap();
        assert_eq!(watch.next().await.unwrap().revision, third);
    }

    #[tokio::test]
    async fn the_history_is_bounded() {
        let store = Embedded::new();
        let put = |value: usize| Transaction {
            writes: vec![Write::Put { key: "a".into(), value: vec![value as u8], lease: None }],
            ..Transaction::default()
        };
        for value in 0..MAX_HISTORY + 10 {
            store.commit(put(value)).await.unwrap();
        }
        let length = store.lock().history.len();
        assert_eq!(length, MAX_HISTORY);
        let mut watch = store.watch("", Revision(1)).await.unwrap();
        assert_eq!(watch.next().await, Err(StoreError::Compacted));
    }
}
