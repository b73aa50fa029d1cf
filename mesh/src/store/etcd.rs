//! A store in a cluster of etcd servers.
//!
//! Calls go to one server until it fails, then to the next, within the time of the call. The client
//! library would balance them over all servers and repeat none: with one of three servers down, a
//! fifth of the calls fail, and with one that accepts connections and does not answer, a third wait
//! in vain. Such a server is recognised by the time of an attempt and, for watches, by keep-alive
//! frames of HTTP/2.

use super::{
    Changes, ClusterStore, Condition, Connect, Entry, Event, LeaseId, Revision, StoreError,
    StoreFuture, Transaction, Watch, Write,
};
use etcd_client::{
    Certificate, Client, Compare, CompareOp, ConnectOptions, Error, EventType, GetOptions,
    Identity, KeyValue, PutOptions, TlsOptions, Txn, TxnOp, WatchOptions, WatchStream,
};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::sync::OnceCell;
use tokio::time::{Instant, sleep, timeout};
use tonic::Code;

/// Total time of a call.
const CALL_TIMEOUT: Duration = Duration::from_secs(5);

/// Time of one attempt. A healthy cluster answers in milliseconds, and elects a leader in about a
/// second.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(1);

/// Pause between two attempts.
const PAUSE: Duration = Duration::from_millis(50);

/// Interval of keep-alive frames, and the time to wait for the answer to one.
const KEEP_ALIVE: Duration = Duration::from_millis(500);

/// How to reach the servers.
#[derive(Clone, Default)]
pub struct EtcdOptions {
    /// URLs of the servers: `http://10.0.0.1:2379`.
    pub servers: Vec<String>,
    /// User name and password.
    pub user: Option<(String, String)>,
    /// For servers with an `https` URL.
    pub tls: Option<EtcdTls>,
}

/// Certificates, in PEM format.
#[derive(Clone, Default)]
pub struct EtcdTls {
    /// The certificates of the authorities that sign those of the servers.
    pub authorities: Vec<u8>,
    /// The certificate of this client, and its private key.
    pub identity: Option<(Vec<u8>, Vec<u8>)>,
}

/// Shows no credentials.
impl fmt::Debug for EtcdOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let user = self.user.as_ref().map(|(name, _)| name);
        f.debug_struct("EtcdOptions")
            .field("servers", &self.servers)
            .field("user", &user)
            .field("tls", &self.tls.is_some())
            .finish()
    }
}

/// A store in a cluster of etcd servers.
#[derive(Clone)]
pub struct Etcd(Arc<Inner>);

struct Inner {
    servers: Vec<Server>,
    options: ConnectOptions,
    /// Index of the server that calls go to.
    current: AtomicUsize,
}

struct Server {
    url: String,
    /// Connected by the first call. With a user, connecting includes a call.
    client: OnceCell<Client>,
}

impl fmt::Debug for Etcd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let servers: Vec<_> = self.0.servers.iter().map(|server| &server.url).collect();
        f.debug_struct("Etcd").field("servers", &servers).finish_non_exhaustive()
    }
}

impl Etcd {
    /// Connects to the servers, and checks that one of them answers.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`] if none answers in time, [`StoreError::Denied`] if the
    /// credentials are rejected, [`StoreError::Invalid`] for invalid URLs or certificates, and if
    /// no server is given.
    pub async fn connect(options: &EtcdOptions) -> Result<Self, StoreError> {
        if options.servers.is_empty() {
            return Err(StoreError::Invalid("no URL of an etcd server".to_owned()));
        }
        let mut connect = ConnectOptions::new()
            .with_keep_alive(KEEP_ALIVE, KEEP_ALIVE)
            .with_keep_alive_while_idle(true)
            .with_connect_timeout(ATTEMPT_TIMEOUT)
            .with_require_leader(true)
            .with_auto_token_refresh(true);
        if let Some((name, password)) = &options.user {
            connect = connect.with_user(name, password);
        }
        if let Some(tls) = &options.tls {
            let authorities = Certificate::from_pem(&tls.authorities);
            let mut config = TlsOptions::new().ca_certificate(authorities);
            if let Some((certificate, key)) = &tls.identity {
                config = config.identity(Identity::from_pem(certificate, key));
            }
            connect = connect.with_tls(config);
        }
        let server = |url: &String| Server { url: url.clone(), client: OnceCell::new() };
        let servers = options.servers.iter().map(server).collect();
        let store =
            Self(Arc::new(Inner { servers, options: connect, current: AtomicUsize::new(0) }));
        match store.list("\0").await {
            Ok(_) => Ok(store),
            Err(StoreError::Unavailable(reason)) => Err(StoreError::Unavailable(format!(
                "{reason} ({}); check the URLs, and whether etcd runs",
                options.servers.join(", ")
            ))),
            Err(error) => Err(error),
        }
    }

    /// Repeats `attempt` until it succeeds, fails for good, or its time is over.
    async fn call<T, F: Future<Output = Result<T, Error>>>(
        &self,
        attempt: impl Fn(Client) -> F,
    ) -> Result<T, StoreError> {
        let Inner { servers, options, current } = &*self.0;
        let deadline = Instant::now() + CALL_TIMEOUT;
        let mut tries = 0;
        loop {
            let number = current.load(Ordering::Relaxed);
            let Server { url, client } = &servers[number];
            let asked = async {
                let connect = || Client::connect([url], Some(options.clone()));
                attempt(client.get_or_try_init(connect).await?.clone()).await
            };
            let error = match timeout(ATTEMPT_TIMEOUT, asked).await {
                Ok(Ok(result)) => return Ok(result),
                Ok(Err(error)) => failed(&error),
                Err(_) => StoreError::Unavailable(format!("{url} does not answer")),
            };
            if !matches!(error, StoreError::Unavailable(_)) || Instant::now() >= deadline {
                return Err(error);
            }
            // Another call may have moved on already.
            let next = (number + 1) % servers.len();
            let _ = current.compare_exchange(number, next, Ordering::Relaxed, Ordering::Relaxed);
            tries += 1;
            if tries % servers.len() == 0 {
                sleep(PAUSE).await;
            }
        }
    }
}

/// Classifies an error of the client library.
fn failed(error: &Error) -> StoreError {
    let Error::GRpcStatus(status) = error else {
        return match error {
            Error::InvalidArgs(_) | Error::InvalidUri(_) | Error::InvalidMetadataValue(_) => {
                StoreError::Invalid(error.to_string())
            }
            _ => StoreError::Unavailable(error.to_string()),
        };
    };
    let message = || status.message().to_owned();
    match status.code() {
        // "requested lease not found" is the only object of our calls that can be missing.
        Code::NotFound => StoreError::LeaseEnded,
        Code::OutOfRange => StoreError::Compacted,
        Code::Unauthenticated | Code::PermissionDenied => StoreError::Denied(message()),
        // etcd answers a wrong password, and a missing user name, with this code.
        Code::InvalidArgument if is_about_credentials(status.message()) => {
            StoreError::Denied(message())
        }
        Code::InvalidArgument | Code::FailedPrecondition | Code::Unimplemented => {
            StoreError::Invalid(message())
        }
        _ => StoreError::Unavailable(match status.message() {
            text if text.contains("h2 protocol error") => format!("connection lost ({text})"),
            text => text.to_owned(),
        }),
    }
}

/// Returns whether an error of etcd with the code `InvalidArgument` is one of
/// `ErrGRPCAuthFailed` and `ErrGRPCUserEmpty` (etcdserver/api/v3rpc/rpctypes/error.go).
fn is_about_credentials(message: &str) -> bool {
    ["authentication failed", "user name is empty"].iter().any(|text| message.contains(text))
}

fn revision(number: i64) -> Revision {
    Revision(number.try_into().unwrap_or_default())
}

fn number(revision: Revision) -> i64 {
    revision.0.try_into().unwrap_or(i64::MAX)
}

fn entry(found: &KeyValue) -> Entry {
    Entry {
        key: String::from_utf8_lossy(found.key()).into_owned(),
        value: found.value().to_vec(),
        lease: Some(LeaseId(found.lease())).filter(|lease| lease.0 != 0),
        modified: revision(found.mod_revision()),
    }
}

impl Connect for EtcdOptions {
    fn connect(&self) -> StoreFuture<'_, Arc<dyn ClusterStore>> {
        Box::pin(async {
            let store: Arc<dyn ClusterStore> = Arc::new(Etcd::connect(self).await?);
            Ok(store)
        })
    }
}

impl ClusterStore for Etcd {
    fn list<'a>(&'a self, prefix: &'a str) -> StoreFuture<'a, (Vec<Entry>, Revision)> {
        Box::pin(async move {
            let listed = self
                .call(|mut client| async move {
                    client.get(prefix, Some(GetOptions::new().with_prefix())).await
                })
                .await?;
            let at = listed.header().map(|header| revision(header.revision()));
            Ok((listed.kvs().iter().map(entry).collect(), at.unwrap_or_default()))
        })
    }

    fn commit(&self, transaction: Transaction) -> StoreFuture<'_, Option<Revision>> {
        let compare = |condition: &Condition| match condition {
            Condition::Absent(key) => Compare::create_revision(key.as_str(), CompareOp::Equal, 0),
            // The comparison of a range holds if it holds for all of its keys. None has 0.
            Condition::NoneBelow(prefix) => {
                Compare::create_revision(prefix.as_str(), CompareOp::Equal, 0).with_prefix()
            }
            Condition::Unmodified(key, at) => {
                Compare::mod_revision(key.as_str(), CompareOp::Equal, number(*at))
            }
        };
        let operation = |write: Write| match write {
            Write::Put { key, value, lease } => {
                let lease = PutOptions::new().with_lease(lease.map_or(0, |lease| lease.0));
                TxnOp::put(key, value, Some(lease))
            }
            Write::Delete(key) => TxnOp::delete(key, None),
        };
        let conditions: Vec<_> = transaction.conditions.iter().map(compare).collect();
        let operations: Vec<_> = transaction.writes.into_iter().map(operation).collect();
        let txn = Txn::new().when(conditions).and_then(operations);
        Box::pin(async move {
            let attempt = |mut client: Client| {
                let txn = txn.clone();
                async move { client.txn(txn).await }
            };
            let done = self.call(attempt).await?;
            let at = done.header().map(|header| revision(header.revision())).unwrap_or_default();
            Ok(done.succeeded().then_some(at))
        })
    }

    fn grant(&self, ttl: Duration) -> StoreFuture<'_, LeaseId> {
        let seconds = ttl.as_secs() + u64::from(ttl.subsec_nanos() > 0);
        let seconds = i64::try_from(seconds.max(1)).unwrap_or(i64::MAX);
        Box::pin(async move {
            let attempt =
                |mut client: Client| async move { client.lease_grant(seconds, None).await };
            let lease = self.call(attempt).await?;
            Ok(LeaseId(lease.id()))
        })
    }

    fn keep_alive(&self, lease: LeaseId) -> StoreFuture<'_, ()> {
        Box::pin(async move {
            self.call(|mut client| async move {
                match client.lease_keep_alive(lease.0).await {
                    // The library has one error for a lease that has ended and for a lost
                    // connection.
                    Err(error @ Error::LeaseKeepAliveError(_)) => {
                        let left = client.lease_time_to_live(lease.0, None).await?.ttl();
                        if left <= 0 { Ok(Err(StoreError::LeaseEnded)) } else { Err(error) }
                    }
                    kept => kept.map(|_| Ok(())),
                }
            })
            .await?
        })
    }

    fn revoke(&self, lease: LeaseId) -> StoreFuture<'_, ()> {
        Box::pin(async move {
            let attempt = |mut client: Client| async move { client.lease_revoke(lease.0).await };
            match self.call(attempt).await {
                Ok(_) | Err(StoreError::LeaseEnded) => Ok(()),
                Err(error) => Err(error),
            }
        })
    }

    fn watch<'a>(&'a self, prefix: &'a str, after: Revision) -> StoreFuture<'a, Box<dyn Watch>> {
        let options =
            WatchOptions::new().with_prefix().with_start_revision(number(after).saturating_add(1));
        Box::pin(async move {
            let attempt = |mut client: Client| {
                let options = options.clone();
                async move { client.watch(prefix, Some(options)).await }
            };
            let stream = self.call(attempt).await?;
            let watch: Box<dyn Watch> = Box::new(EtcdWatch(stream));
            Ok(watch)
        })
    }
}

struct EtcdWatch(WatchStream);

impl Watch for EtcdWatch {
    fn next(&mut self) -> StoreFuture<'_, Changes> {
        Box::pin(async move {
            loop {
                let message = self.0.message().await.map_err(|error| failed(&error))?;
                let Some(message) = message else {
                    return Err(StoreError::Unavailable("the server has ended a watch".to_owned()));
                };
                if message.canceled() {
                    return Err(match message.compact_revision() {
                        0 => StoreError::Unavailable(message.cancel_reason().to_owned()),
                        _ => StoreError::Compacted,
                    });
                }
                let found = message.events().iter().filter_map(|event| {
                    let found = event.kv()?;
                    let event = match event.event_type() {
                        EventType::Put => Event::Put(entry(found)),
                        EventType::Delete => {
                            Event::Deleted(String::from_utf8_lossy(found.key()).into_owned())
                        }
                    };
                    Some((revision(found.mod_revision()), event))
                });
                let (revisions, events): (Vec<_>, Vec<_>) = found.unzip();
                // The first message of a watch has no events.
                if let Some(last) = revisions.into_iter().max() {
                    return Ok(Changes { revision: last, events });
                }
            }
        })
    }
}
