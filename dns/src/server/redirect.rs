//! Redirect of 127.0.0.11:53 to the ports of a server, in the container's network namespace.
//!
//! ```text
//! table inet tidegate_dns {
//!     chain questions {
//!         type filter hook output priority -150; policy accept;
//!         ip daddr 127.0.0.11 udp dport 53 udp dport set 40001
//!         ip daddr 127.0.0.11 tcp dport 53 tcp dport set 40002
//!     }
//!     chain answers {
//!         type filter hook output priority -300; policy accept;
//!         ip saddr 127.0.0.11 udp sport 40001 udp sport set 53
//!         ip saddr 127.0.0.11 tcp sport 40002 tcp sport set 53
//!     }
//! }
//! ```
//!
//! The rules rewrite the port of each packet and keep no state. A translation (`dnat`, as Docker
//! uses) costs a conntrack entry per query and a quarter of the response time, and name resolution
//! fails in a busy container when the conntrack table is full. If a container uses conntrack for
//! other reasons, conntrack sees port 53 in both directions: queries are rewritten after connection
//! tracking (-200), responses before it.

use crate::resolv_conf::{PORT, SERVER};
use std::net::IpAddr;
use tidegate_model::registry::NFTABLES_DNS_TABLE;
use tidegate_netfilter::{
    Action, Base, Chain, Change, Connection, Error, Hook, Key, Kind, Match, Rule, Table,
    TableIdentity, Transport, Value,
};
use tidegate_netns::{Namespace, drop_in_background};

/// Priorities `mangle` and `raw` of nft(8); connection tracking has priority -200.
const AFTER_TRACKING: i32 = -150;
const BEFORE_TRACKING: i32 = -300;

/// The installed table. Removed on drop.
///
/// Root in the container can block every method for any length of time: the kernel serializes the
/// transactions of a network namespace (`commit_mutex`, which closing an nftables socket also
/// takes), and each transaction traverses all chains of the namespace (`nf_tables_commit`).
#[derive(Debug)]
pub(super) struct Redirect {
    namespace: Namespace,
    ports: (u16, u16),
    identity: TableIdentity,
}

impl Redirect {
    /// Redirects port 53 to `ports`, (UDP, TCP).
    pub(super) fn set_up(namespace: &Namespace, ports: (u16, u16)) -> Result<Self, Error> {
        let identity = make(namespace, ports)?;
        Ok(Self { namespace: namespace.clone(), ports, identity })
    }

    /// Replaces the table if it was modified or deleted. Returns whether it was replaced.
    pub(super) fn repair(&mut self) -> Result<bool, Error> {
        let identity = &self.identity;
        let is_intact = || Connection::open()?.is_intact(identity);
        if self.namespace.with(is_intact)?? {
            return Ok(false);
        }
        self.identity = make(&self.namespace, self.ports)?;
        Ok(true)
    }
}

/// Creates the table, or replaces an existing one.
fn make(namespace: &Namespace, ports: (u16, u16)) -> Result<TableIdentity, Error> {
    let table = table(ports);
    namespace.with(|| Connection::open()?.replace(table))?
}

impl Drop for Redirect {
    fn drop(&mut self) {
        let change = Change::Remove { table: NFTABLES_DNS_TABLE.to_owned() };
        let remove = || {
            let mut connection = Connection::open()?;
            connection.commit(&[change])?;
            // Closing the socket frees the deleted objects after an RCU grace period of about
            // 12 ms. A thousand servers that stop together would wait for it one after another.
            drop_in_background(connection);
            Ok::<_, Error>(())
        };
        if let Err(error) = self.namespace.with(remove).map_err(Error::from).flatten() {
            tracing::debug!(namespace = %self.namespace.id(), %error, "DNS redirect not removed");
        }
    }
}

fn table((udp, tcp): (u16, u16)) -> Table {
    let is = |key, value| Match::Is { key, value, not: false };
    let server = || Value::Net(IpAddr::from(SERVER).into());
    let rules = |address, side, source: bool| {
        let rule = |protocol, from, to| Rule {
            matches: vec![
                is(address, server()),
                is(Key::Protocol, Value::Protocol(protocol)),
                is(side, Value::Port(from)),
            ],
            actions: vec![Action::SetPort { protocol, source, port: to }],
            comment: "DNS of containers".to_owned(),
        };
        let ends = |port| if source { (port, PORT) } else { (PORT, port) };
        [(Transport::Udp, ends(udp)), (Transport::Tcp, ends(tcp))]
            .map(|(protocol, (from, to))| rule(protocol, from, to))
    };
    let chain = |name: &str, priority, rules: [Rule; 2]| Chain {
        name: name.to_owned(),
        base: Some(Base { kind: Kind::Filter, hook: Hook::Output, priority }),
        rules: rules.into(),
    };
    let queries = rules(Key::DestinationV4, Key::DestinationPort, false);
    let responses = rules(Key::SourceV4, Key::SourcePort, true);
    let chains = vec![
        chain("questions", AFTER_TRACKING, queries),
        chain("answers", BEFORE_TRACKING, responses),
    ];
    Table { name: NFTABLES_DNS_TABLE.to_owned(), sets: Vec::new(), chains }
}
