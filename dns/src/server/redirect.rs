//! The way from 127.0.0.11:53 to the ports of a server, in the container's namespace.
//!
//! ```text
//! table inet tidegate_dns {
//!     map ports { type inet_proto : ipv4_addr . inet_service; elements = { tcp : 127.0.0.11 . 40001, udp : 127.0.0.11 . 40002 } }
//!     chain output {
//!         type nat hook output priority -100; policy accept;
//!         ip daddr 127.0.0.11 th dport 53 dnat ip to meta l4proto map @ports
//!     }
//! }
//! ```
//!
//! The kernel's connection tracking turns answers round again: they come from port 53.

use crate::resolv_conf::{PORT, SERVER};
use std::net::IpAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use tidegate_model::registry::NFTABLES_DNS_TABLE;
use tidegate_netfilter::{
    Action, Base, Chain, Change, Connection, Element, Error, Field, Hook, Key, Kind, Match, Rule, Set, Table,
    Transport, Value,
};
use tidegate_netns::Namespace;

/// Name of the map.
const MAP: &str = "ports";
/// `dstnat` of nft(8).
const PRIORITY: i32 = -100;
/// Threads that close connections.
const CLOSERS: usize = 64;

/// The rule, as long as this is there.
#[derive(Debug)]
pub(super) struct Redirect(Namespace);

impl Redirect {
    /// Leads port 53 to `ports`: of UDP, of TCP.
    pub(super) fn set_up(namespace: &Namespace, ports: (u16, u16)) -> Result<Self, Error> {
        let change = Change::Replace { table: table(ports), owned: false };
        namespace.with(|| Connection::open()?.commit(&[change]))??;
        Ok(Self(namespace.clone()))
    }
}

impl Drop for Redirect {
    fn drop(&mut self) {
        let change = Change::Remove { table: NFTABLES_DNS_TABLE.to_owned() };
        let remove = || {
            let mut connection = Connection::open()?;
            connection.commit(&[change])?;
            close_elsewhere(connection);
            Ok::<_, Error>(())
        };
        if let Err(error) = self.0.with(remove).map_err(Error::from).flatten() {
            tracing::debug!(namespace = %self.0.id(), %error, "the redirection of DNS stays");
        }
    }
}

/// Closes what has deleted something: the kernel lets go of that then, after a grace period of some 12 ms, which a thousand servers that end together would
/// have to wait for one after the other.
fn close_elsewhere(connection: Connection) {
    static CLOSING: AtomicUsize = AtomicUsize::new(0);
    if CLOSING.fetch_add(1, Ordering::Relaxed) < CLOSERS {
        let close = move || {
            drop(connection);
            CLOSING.fetch_sub(1, Ordering::Relaxed);
        };
        // Without a thread it is closed here and now.
        if std::thread::Builder::new().name("tidegate-dns".into()).spawn(close).is_ok() {
            return;
        }
    }
    CLOSING.fetch_sub(1, Ordering::Relaxed);
}

fn table((udp, tcp): (u16, u16)) -> Table {
    let server = || Value::Net(IpAddr::from(SERVER).into());
    let port = |protocol, port| Element {
        key: vec![Value::Protocol(protocol)],
        data: vec![server(), Value::Port(port)],
    };
    let map = Set {
        name: MAP.to_owned(),
        key: vec![Field::Protocol],
        data: vec![Field::Ipv4, Field::Port],
        intervals: false,
        elements: vec![port(Transport::Tcp, tcp), port(Transport::Udp, udp)],
    };
    let is = |key, value| Match::Is { key, value, not: false };
    let rule = Rule {
        matches: vec![is(Key::DestinationV4, server()), is(Key::DestinationPort, Value::Port(PORT))],
        actions: vec![Action::Translate { keys: vec![Key::Protocol], map: MAP.to_owned(), v6: false }],
        why: "names of containers".to_owned(),
    };
    let chain = Chain {
        name: "output".to_owned(),
        base: Some(Base { kind: Kind::Nat, hook: Hook::Output, priority: PRIORITY }),
        rules: vec![rule],
    };
    Table { name: NFTABLES_DNS_TABLE.to_owned(), sets: vec![map], chains: vec![chain] }
}
