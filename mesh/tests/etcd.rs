//! The store in real etcd servers, which run on loopback addresses of a network namespace.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};
use tidegate_mesh::store::{
    ClusterStore, Condition, Etcd as Store, EtcdOptions, EtcdTls, Event, StoreError, Transaction,
    Write, conformance,
};
use tidegate_testbed::hosts::Etcd;
use tidegate_testbed::{Namespace, Signal, find_program};
use tokio::time::timeout;

const SOON: Duration = Duration::from_secs(30);

/// Servers of one cluster, at loopback addresses of one namespace.
struct Cluster {
    net: Namespace,
    etcd: Etcd,
}

impl Cluster {
    fn new(members: u8) -> Self {
        Self::with(members, "http", |_| Vec::new())
    }

    fn with(members: u8, scheme: &str, more: impl Fn(&Path) -> Vec<String>) -> Self {
        let net = Namespace::new();
        let at = |number: u8| (net.clone(), [127, 0, 0, number].into());
        let etcd = Etcd::start_with((1..=members).map(at).collect(), scheme, more);
        Self { net, etcd }
    }

    fn options(&self) -> EtcdOptions {
        let servers = self.etcd.urls().split(',').map(str::to_owned).collect();
        EtcdOptions { servers, ..EtcdOptions::default() }
    }

    /// Runs `test`, with sockets in the namespace of the cluster.
    fn run(&mut self, test: impl AsyncFnOnce(&mut Self) + Send) {
        let net = self.net.clone();
        net.run(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.unwrap().block_on(test(self));
        });
    }
}

fn put(key: &str, value: &str) -> Transaction {
    let write = Write::Put { key: key.to_owned(), value: value.into(), lease: None };
    Transaction { conditions: Vec::new(), writes: vec![write] }
}

#[test]
fn conforms() {
    let mut cluster = Cluster::new(1);
    cluster.run(async |cluster| {
        let store = Store::connect(&cluster.options()).await.unwrap();
        conformance::run(&store, "tidegate/").await;
    });
}

#[test]
fn calls_succeed_while_one_of_three_servers_is_down_or_does_not_answer() {
    let mut cluster = Cluster::new(3);
    cluster.run(async |cluster| {
        let store = Store::connect(&cluster.options()).await.unwrap();
        // Stopped first, so that its connections are open. Any of them can be the leader.
        for (number, signal) in [(0, Signal::STOP), (0, Signal::CONT), (1, Signal::KILL)] {
            cluster.etcd.servers[number].signal(signal);
            let begun = Instant::now();
            for value in 0..60 {
                store.commit(put("key", &value.to_string())).await.unwrap().unwrap();
                let (entries, _) = store.list("key").await.unwrap();
                assert_eq!(entries[0].value, value.to_string().as_bytes(), "{signal:?}");
            }
            // An election, and one attempt in vain.
            assert!(begun.elapsed() < Duration::from_secs(5), "{signal:?}: {:?}", begun.elapsed());
        }
    });
}

/// A watch of a server that does not answer any longer ends, and is resumed without a loss.
#[test]
fn a_watch_is_resumed_at_another_server() {
    let mut cluster = Cluster::new(3);
    cluster.run(async |cluster| {
        let watched = EtcdOptions { servers: vec![cluster.etcd.url(2)], ..EtcdOptions::default() };
        let watching = Store::connect(&watched).await.unwrap();
        let others = vec![cluster.etcd.url(0), cluster.etcd.url(1)];
        let others = EtcdOptions { servers: others, ..EtcdOptions::default() };
        let writing = Store::connect(&others).await.unwrap();
        let first = writing.commit(put("w/1", "")).await.unwrap().unwrap();
        let mut watch = watching.watch("w/", first).await.unwrap();
        let second = writing.commit(put("w/2", "")).await.unwrap().unwrap();
        assert_eq!(timeout(SOON, watch.next()).await.unwrap().unwrap().revision, second);
        cluster.etcd.servers[2].signal(Signal::STOP);
        let begun = Instant::now();
        let ended = timeout(SOON, watch.next()).await.unwrap();
        assert!(matches!(ended, Err(StoreError::Unavailable(_))), "{ended:?}");
        assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
        let third = writing.commit(put("w/3", "")).await.unwrap().unwrap();
        let mut watch = writing.watch("w/", second).await.unwrap();
        let changes = timeout(SOON, watch.next()).await.unwrap().unwrap();
        assert_eq!(changes.revision, third);
        assert!(matches!(&changes.events[..], [Event::Put(entry)] if entry.key == "w/3"));
        cluster.etcd.servers[2].signal(Signal::CONT);
    });
}

#[test]
fn without_a_quorum_calls_fail_in_time_and_succeed_afterwards() {
    let mut cluster = Cluster::new(3);
    cluster.run(async |cluster| {
        let store = Store::connect(&cluster.options()).await.unwrap();
        store.commit(put("kept", "1")).await.unwrap().unwrap();
        for number in [1, 2] {
            cluster.etcd.servers[number].stop(Signal::KILL, SOON);
        }
        let begun = Instant::now();
        let failed = store.commit(put("lost", "1")).await;
        assert!(matches!(failed, Err(StoreError::Unavailable(_))), "{failed:?}");
        assert!(begun.elapsed() < Duration::from_secs(8), "{:?}", begun.elapsed());
        for number in [1, 2] {
            cluster.etcd.restart(number);
        }
        let deadline = Instant::now() + SOON;
        while store.commit(put("kept", "2")).await.is_err() {
            assert!(Instant::now() < deadline, "no quorum");
        }
        let (entries, _) = store.list("kept").await.unwrap();
        assert_eq!(entries[0].value, b"2");
    });
}

/// A lease ends while its owner is cut off, and does not write any longer when it is back.
#[test]
fn a_host_that_was_silent_is_fenced() {
    let mut cluster = Cluster::new(1);
    cluster.run(async |cluster| {
        let store = Store::connect(&cluster.options()).await.unwrap();
        let lease = store.grant(Duration::from_secs(1)).await.unwrap();
        let claim = Transaction {
            conditions: vec![Condition::Absent("host".to_owned())],
            writes: vec![Write::Put { key: "host".into(), value: vec![], lease: Some(lease) }],
        };
        assert!(store.commit(claim.clone()).await.unwrap().is_some());
        let deadline = Instant::now() + SOON;
        while !store.list("host").await.unwrap().0.is_empty() {
            assert!(Instant::now() < deadline, "the lease does not end");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        assert_eq!(store.commit(claim).await, Err(StoreError::LeaseEnded));
        assert_eq!(store.keep_alive(lease).await, Err(StoreError::LeaseEnded));
    });
}

#[test]
fn a_compacted_history_is_reported() {
    let mut cluster = Cluster::new(1);
    cluster.run(async |cluster| {
        let store = Store::connect(&cluster.options()).await.unwrap();
        let first = store.commit(put("a", "1")).await.unwrap().unwrap();
        let second = store.commit(put("a", "2")).await.unwrap().unwrap();
        cluster.etcd.ctl(&["compact", &second.to_string()]);
        let mut watch = store.watch("a", first.min(second)).await.unwrap();
        let next = timeout(SOON, watch.next()).await.unwrap();
        // The changes after the first revision begin at the compacted one, which is kept.
        let early = match next {
            Ok(changes) => {
                assert_eq!(changes.revision, second);
                let mut watch = store.watch("a", tidegate_mesh::store::Revision(0)).await.unwrap();
                timeout(SOON, watch.next()).await.unwrap()
            }
            Err(error) => Err(error),
        };
        assert_eq!(early, Err(StoreError::Compacted));
    });
}

#[test]
fn users_are_authenticated() {
    let mut cluster = Cluster::new(1);
    cluster.run(async |cluster| {
        cluster.etcd.ctl(&["user", "add", "root:secret"]);
        cluster.etcd.ctl(&["user", "grant-role", "root", "root"]);
        cluster.etcd.ctl(&["auth", "enable"]);
        let with = |user: Option<(&str, &str)>| EtcdOptions {
            user: user.map(|(name, password)| (name.to_owned(), password.to_owned())),
            ..cluster.options()
        };
        let store = Store::connect(&with(Some(("root", "secret")))).await.unwrap();
        store.commit(put("a", "1")).await.unwrap().unwrap();
        for user in [None, Some(("root", "wrong")), Some(("nobody", "secret"))] {
            let refused = Store::connect(&with(user)).await.unwrap_err();
            assert!(matches!(refused, StoreError::Denied(_)), "{user:?}: {refused:?}");
        }
    });
}

/// Server and client have certificates of an authority of the test.
#[test]
fn servers_and_clients_have_certificates() {
    let certificates = |directory: &Path| {
        let sh = |script: &str| {
            let output =
                Command::new("sh").args(["-ec", script]).current_dir(directory).output().unwrap();
            assert!(output.status.success(), "{output:?}");
        };
        find_program("openssl").expect("openssl");
        sh(
            "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=ca \
            -keyout ca.key -out ca.pem 2>&1",
        );
        for name in ["server", "client"] {
            sh(&format!(
                "openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN={name} \
                   -keyout {name}.ec -out {name}.csr 2>&1
                 openssl pkcs8 -topk8 -nocrypt -in {name}.ec -out {name}.key
                 printf 'subjectAltName=IP:127.0.0.1\\nextendedKeyUsage=serverAuth,clientAuth\\n' > {name}.ext
                 openssl x509 -req -in {name}.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 \
                   -extfile {name}.ext -out {name}.pem 2>&1"
            ));
        }
        let path = |name: &str| directory.join(name).display().to_string();
        [
            "--cert-file".to_owned(),
            path("server.pem"),
            "--key-file".to_owned(),
            path("server.key"),
            "--trusted-ca-file".to_owned(),
            path("ca.pem"),
            "--client-cert-auth".to_owned(),
        ]
        .to_vec()
    };
    let mut cluster = Cluster::with(1, "https", certificates);
    cluster.run(async |cluster| {
        let read = |name: &str| std::fs::read(cluster.etcd.directory().join(name)).unwrap();
        let identity = Some((read("client.pem"), read("client.key")));
        let with = |identity| EtcdOptions {
            tls: Some(EtcdTls { authorities: read("ca.pem"), identity }),
            ..cluster.options()
        };
        let store = Store::connect(&with(identity)).await.unwrap();
        store.commit(put("a", "1")).await.unwrap().unwrap();
        assert!(Store::connect(&with(None)).await.is_err(), "no certificate of the client");
        let untrusted = EtcdTls { authorities: read("client.pem"), ..EtcdTls::default() };
        let untrusted = EtcdOptions { tls: Some(untrusted), ..cluster.options() };
        assert!(Store::connect(&untrusted).await.is_err(), "another authority");
    });
}

#[test]
fn servers_that_cannot_be_reached_are_named() {
    let net = Namespace::new();
    net.run(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let connect = async |url: &str| {
                let options =
                    EtcdOptions { servers: vec![url.to_owned()], ..EtcdOptions::default() };
                Store::connect(&options).await.unwrap_err()
            };
            let absent = connect("http://127.0.0.1:2379").await.to_string();
            assert!(absent.contains("(http://127.0.0.1:2379); check the URLs"), "{absent}");
            let listener = tokio::net::TcpListener::bind("127.0.0.1:2380").await.unwrap();
            let serve = async {
                loop {
                    let (mut client, _) = listener.accept().await.unwrap();
                    tokio::io::AsyncWriteExt::write_all(
                        &mut client,
                        b"HTTP/1.1 404 Not Found\r\n\r\n",
                    )
                    .await
                    .unwrap();
                }
            };
            let other = tokio::select! {
                error = connect("http://127.0.0.1:2380") => error.to_string(),
                () = serve => unreachable!(),
            };
            assert!(other.contains("(http://127.0.0.1:2380); check the URLs"), "{other}");
            assert!(matches!(connect("not a URL").await, StoreError::Invalid(_)));
        });
    });
}
