//! The shared state of a cluster: a key-value store with revisions, leases and watches.
//!
//! # Theory of operation
//!
//! The semantics are those of etcd. Every transaction that writes creates one new [`Revision`] of
//! the whole store. A reader lists the entries at a revision and watches the changes after it, so
//! that it misses none. An entry can be attached to a lease and is deleted when the lease ends: a
//! write with a lease that has ended fails, which fences a host that was silent for too long.
//!
//! ```text
//!            list at R          changes after R
//!   reader ────────────► state ────────────────► state at R+1, R+2, ...
//!                          ▲                           │ Compacted, or a silent server
//!                          └───────────────────────────┘
//! ```
//!
//! A failed call leaves it unknown whether the server has executed it. Calls that only read can be
//! repeated. A transaction can be repeated if its conditions reject the second execution: the
//! caller then compares the stored value with its own ([`Transaction`]).
//!
//! | store | use |
//! |---|---|
//! | [`Embedded`] | one host, without a server |
//! | `Etcd` (feature `etcd`) | a cluster of etcd servers, 3.4 or newer |
//!
//! All stores pass one conformance suite ([`conformance`]).

#[doc(hidden)]
pub mod conformance;
mod embedded;
#[cfg(feature = "etcd")]
mod etcd;

pub use embedded::Embedded;
#[cfg(feature = "etcd")]
pub use etcd::{Etcd, EtcdOptions, EtcdTls};

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

/// A future of a store, which the caller awaits or drops.
pub type StoreFuture<'a, T> = Pin<Box<dyn Future<Output = Result<T, StoreError>> + Send + 'a>>;

/// A version of the whole store. Revisions increase; the first write creates revision 1 or later.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Revision(pub u64);

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Identifies a lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LeaseId(pub i64);

/// A key with its value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The key.
    pub key: String,
    /// The value.
    pub value: Vec<u8>,
    /// The lease with which the entry ends.
    pub lease: Option<LeaseId>,
    /// The revision of the last write.
    pub modified: Revision,
}

/// A condition of a [`Transaction`].
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Condition {
    /// The key does not exist.
    Absent(String),
    /// No key starts with this prefix.
    NoneBelow(String),
    /// The key exists and was last written at this revision.
    Unmodified(String, Revision),
}

/// A write of a [`Transaction`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Write {
    /// Creates or replaces an entry.
    Put {
        /// The key.
        key: String,
        /// The value.
        value: Vec<u8>,
        /// The lease with which the entry ends.
        lease: Option<LeaseId>,
    },
    /// Deletes an entry. Has no effect if it does not exist.
    Delete(String),
}

impl Write {
    pub(crate) fn key(&self) -> &str {
        match self {
            Self::Put { key, .. } | Self::Delete(key) => key,
        }
    }
}

/// Writes that are executed together if all conditions hold. At most one write per key, and at most
/// [`MAX_WRITES`] writes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Transaction {
    /// All of them must hold.
    pub conditions: Vec<Condition>,
    /// The writes.
    pub writes: Vec<Write>,
}

impl Transaction {
    /// Adds the conditions and writes of `other`.
    pub fn extend(&mut self, other: Self) {
        self.conditions.extend(other.conditions);
        self.writes.extend(other.writes);
    }
}

/// Maximum number of writes, and of conditions, of a transaction (`--max-txn-ops` of etcd).
pub const MAX_WRITES: usize = 128;

/// A change of one entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The entry was created or replaced.
    Put(Entry),
    /// The entry with this key was deleted, or its lease has ended.
    Deleted(String),
}

/// The changes of one or more consecutive revisions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Changes {
    /// The last of the revisions.
    pub revision: Revision,
    /// The changes in order. Those of one revision are never split.
    pub events: Vec<Event>,
}

/// Why a call failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// No server has answered in time. The call may have been executed.
    #[error("the cluster store does not answer: {0}")]
    Unavailable(String),
    /// The lease has expired or was revoked. Nothing was written.
    #[error("cluster store: the lease of this host has expired")]
    LeaseEnded,
    /// The changes after the requested revision are no longer stored. List again.
    #[error("cluster store: the history was compacted")]
    Compacted,
    /// The credentials are missing or insufficient.
    #[error("cluster store: access denied: {0}; check --user, the certificate and the role")]
    Denied(String),
    /// The request is invalid, or the server is not a supported store.
    #[error("cluster store: {0}")]
    Invalid(String),
}

/// A watch of the entries with a common prefix.
pub trait Watch: Send {
    /// Waits for the next changes. After an error, a new watch is required.
    ///
    /// Dropping the future loses no change.
    fn next(&mut self) -> StoreFuture<'_, Changes>;
}

/// Creates a store.
pub trait Connect: Send + Sync + fmt::Debug {
    /// Connects to the store, and checks that it answers.
    fn connect(&self) -> StoreFuture<'_, Arc<dyn ClusterStore>>;
}

/// The shared state of a cluster.
pub trait ClusterStore: Send + Sync + fmt::Debug {
    /// Lists the entries whose keys start with `prefix`, in the order of their keys, and returns
    /// the revision at which they were read.
    fn list<'a>(&'a self, prefix: &'a str) -> StoreFuture<'a, (Vec<Entry>, Revision)>;

    /// Executes `transaction`. Returns the new revision, or `None` if a condition does not hold.
    fn commit(&self, transaction: Transaction) -> StoreFuture<'_, Option<Revision>>;

    /// Creates a lease that ends `ttl` after it was last kept alive. Stores round up to seconds.
    fn grant(&self, ttl: Duration) -> StoreFuture<'_, LeaseId>;

    /// Restarts the time of `lease`.
    fn keep_alive(&self, lease: LeaseId) -> StoreFuture<'_, ()>;

    /// Ends `lease` and deletes its entries. Succeeds if it has already ended.
    fn revoke(&self, lease: LeaseId) -> StoreFuture<'_, ()>;

    /// Watches the entries whose keys start with `prefix`, from the first revision after `after`.
    fn watch<'a>(&'a self, prefix: &'a str, after: Revision) -> StoreFuture<'a, Box<dyn Watch>>;
}
