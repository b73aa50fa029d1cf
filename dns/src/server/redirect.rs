//! The way from 127.0.0.11:53 to the ports of a server, in the container's namespace.
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
//! Ports are rewritten, packet by packet, and nothing is remembered: a translation (`dnat`, what
//! Docker has) costs an entry of connection tracking for each question, a quarter of the time that
//! an answer takes, and the names of a busy container when that table is full. Where a container
//! tracks connections for reasons of its own, it sees both directions with port 53: questions are
//! rewritten after that (-200), answers before.

use crate::resolv_conf::{PORT, SERVER};
use std::net::IpAddr;
use tidegate_model::registry::NFTABLES_DNS_TABLE;
use tidegate_netfilter::{
    Action, Base, Chain, Change, Connection, Error, Hook, Key, Kind, Match, Rule, Table,
    TableIdentity, Transport, Value,
};
use tidegate_netns::{Namespace, drop_elsewhere};

/// `mangle` and `raw` of nft(8); connections are tracked at -200.
const AFTER_TRACKING: i32 = -150;
const BEFORE_TRACKING: i32 = -300;

/// The table, as long as this is there.
///
/// Every method blocks for as long as root in the container likes: the kernel carries out one
/// transaction of a namespace at a time (`commit_mutex`, which closing a socket of nftables takes
/// as well), and each visits all chains that the namespace has (`nf_tables_commit`).
#[derive(Debug)]
pub(super) struct Redirect {
    namespace: Namespace,
    ports: (u16, u16),
    identity: TableIdentity,
}

impl Redirect {
    /// Leads port 53 to `ports`: of UDP, of TCP.
    pub(super) fn set_up(namespace: &Namespace, ports: (u16, u16)) -> Result<Self, Error> {
        let identity = make(namespace, ports)?;
        Ok(Self { namespace: namespace.clone(), ports, identity })
    }

    /// Makes the table again if it is not as it was made. Whether it was not.
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

/// Makes the table, in the place of one that is there.
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
            // The kernel lets go of what was deleted when the socket is closed, after a grace
            // period of some 12 ms, which a thousand servers that end together would have to wait
            // for one after the other.
            drop_elsewhere(connection);
            Ok::<_, Error>(())
        };
        if let Err(error) = self.namespace.with(remove).map_err(Error::from).flatten() {
            tracing::debug!(namespace = %self.namespace.id(), %error, "the redirection of DNS stays");
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
            why: "names of containers".to_owned(),
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
    let questions = rules(Key::DestinationV4, Key::DestinationPort, false);
    let answers = rules(Key::SourceV4, Key::SourcePort, true);
    let chains = vec![
        chain("questions", AFTER_TRACKING, questions),
        chain("answers", BEFORE_TRACKING, answers),
    ];
    Table { name: NFTABLES_DNS_TABLE.to_owned(), sets: Vec::new(), chains }
}
