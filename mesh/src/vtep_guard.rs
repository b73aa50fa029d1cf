//! The guard of the host's VXLAN endpoint (VTEP).
//!
//! VXLAN has no authentication: any datagram with a known VNI to port 4789 of a host injects a
//! frame into the network. The guard accepts such datagrams from the VTEPs of the cluster
//! only, and keeps containers and processes of this host from sending any.
//!
//! | packet | verdict | reason |
//! |---|---|---|
//! | received on `lo` with one of our VNIs | drop | a process of the host, to its own VTEP |
//! | received with one of our VNIs, source not a VTEP | drop | a host outside the cluster, or a container |
//! | forwarded to a VTEP, source not a VTEP | drop | a container: masquerade would give it the address of this VTEP |
//! | forwarded to a VTEP from a bridge | drop | the same, with the address of a VTEP as a forged source |
//! | sent to a VTEP through the socket of a process | drop | packets of a VXLAN device have no socket of a process |
//!
//! A sender that forges the address of a VTEP on the underlay is not recognised: that network has
//! to prevent it, or carry the traffic in WireGuard. Frames that pass are checked once more, by
//! their inner source ([`FrameGuard`](tidegate_netfilter::FrameGuard)).
//!
//! Received packets are matched by VNI, so that other VXLAN software of the host, such as a swarm,
//! is not affected.

use crate::device::PORT;
use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;
use tidegate_model::{Feature, registry};
use tidegate_netfilter::{
    Action, Base, Chain, Change, Connection, Element, Field, Hook, Key, Kind, Match, Rule, Set,
    Table, Transport, Value,
};
use tidegate_netns::Namespace;

/// Between reassembly (`NF_IP_PRI_CONNTRACK_DEFRAG`) and the rules of other software.
const PRIORITY: i32 = -350;

/// What the guard enforces.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VtepPolicy {
    /// VTEPs of the cluster, that of this host included.
    pub vteps: BTreeSet<IpAddr>,
    /// The VNIs of the networks on this host.
    pub vnis: BTreeSet<u32>,
}

/// The guard of a namespace, as an nftables table of its own. It applies with every firewall: a
/// packet that is dropped in one table is not accepted by another.
#[derive(Debug)]
pub struct VtepGuard {
    namespace: Namespace,
    connection: Connection,
    /// Other processes cannot change the table.
    owns: bool,
    /// What is in force, with the fingerprint of the table.
    applied: Option<(VtepPolicy, Option<u64>)>,
}

impl VtepGuard {
    /// Opens a connection to nftables in `namespace`.
    ///
    /// # Errors
    /// The kernel lacks nftables, or `EPERM`.
    pub fn open(namespace: &Namespace) -> io::Result<Self> {
        namespace.with(|| {
            let mut connection = Connection::open()?;
            let owns = connection.can_own().map_err(io::Error::other)?;
            let owns = owns && !Feature::OwnedTables.is_forced_off();
            Ok(Self { namespace: namespace.clone(), connection, owns, applied: None })
        })?
    }

    /// Puts `policy` in force, unless it is already.
    ///
    /// # Errors
    /// The kernel rejects the rules. Those before are then still in force.
    pub fn apply(&mut self, policy: &VtepPolicy) -> io::Result<()> {
        if self.applied.as_ref().is_some_and(|(applied, _)| applied == policy) {
            return Ok(());
        }
        let change = Change::Replace { table: table(policy), owned: self.owns };
        self.connection.commit(&[change]).map_err(io::Error::other)?;
        let fingerprint = match self.owns {
            true => None,
            false => self.connection.fingerprint(registry::NFTABLES_MESH_TABLE, |_| true)?,
        };
        self.applied = Some((policy.clone(), fingerprint));
        Ok(())
    }

    /// Restores rules that other software has changed. Returns whether it has.
    ///
    /// # Errors
    /// Errors of the kernel.
    pub fn repair(&mut self) -> io::Result<bool> {
        let Some((policy, known)) = self.applied.clone() else { return Ok(false) };
        let name = registry::NFTABLES_MESH_TABLE;
        let holds = match self.owns {
            true => self.connection.owns(name)?,
            false => self.connection.fingerprint(name, |_| true)? == known,
        };
        if !holds {
            self.applied = None;
            self.apply(&policy)?;
        }
        Ok(!holds)
    }

    /// Removes the rules.
    ///
    /// # Errors
    /// Errors of the kernel.
    pub fn remove(&mut self) -> io::Result<()> {
        self.applied = None;
        let table = registry::NFTABLES_MESH_TABLE.to_owned();
        self.connection.commit(&[Change::Remove { table }]).map_err(io::Error::other)
    }

    /// Returns the namespace.
    #[must_use]
    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }
}

/// Removes the rules of a previous process in `namespace`, if there are any.
///
/// # Errors
/// Errors of the kernel.
pub fn remove_stale(namespace: &Namespace) -> io::Result<()> {
    let remove = || {
        let mut connection = Connection::open()?;
        let table = registry::NFTABLES_MESH_TABLE.to_owned();
        if connection.tables()?.iter().any(|listed| listed.name == table) {
            connection.commit(&[Change::Remove { table }]).map_err(io::Error::other)?;
        }
        Ok(())
    };
    namespace.with(remove)?
}

/// The families: digit in the names of sets, type, source, destination.
const FAMILIES: [(char, Field, Key, Key); 2] = [
    ('4', Field::Ipv4, Key::SourceV4, Key::DestinationV4),
    ('6', Field::Ipv6, Key::SourceV6, Key::DestinationV6),
];

/// Renders the table.
#[must_use]
pub fn table(policy: &VtepPolicy) -> Table {
    let element = |value| Element { key: vec![value], data: Vec::new() };
    let set = |name: String, field, elements| Set {
        name,
        key: vec![field],
        data: Vec::new(),
        intervals: false,
        constant: false,
        elements,
    };
    let is_in = |key, set: String, not| Match::In { keys: vec![key], set, not };
    let drop = |matches: Vec<Match>, comment: &str| Rule {
        matches: vxlan().into_iter().chain(matches).collect(),
        actions: vec![Action::Count, Action::Drop],
        comment: comment.to_owned(),
    };
    let vnis = policy.vnis.iter().map(|vni| element(Value::Vni(*vni))).collect();
    let mut sets = vec![set("vnis".to_owned(), Field::Vni, vnis)];
    let ours = || is_in(Key::Vni, "vnis".to_owned(), false);
    let lo = Value::Interface("lo".to_owned());
    let lo = Match::Is { key: Key::InInterface, value: lo, not: false };
    let mut input = vec![drop(vec![ours(), lo], "from a process of this host")];
    let (mut forward, mut output) = (Vec::new(), Vec::new());
    for (digit, field, source, destination) in FAMILIES {
        let vteps = format!("vteps{digit}");
        let of_family = policy.vteps.iter().filter(|ip| ip.is_ipv6() == (digit == '6'));
        let elements = of_family.map(|ip| element(Value::Net((*ip).into()))).collect();
        sets.push(set(vteps.clone(), field, elements));
        let outside = || is_in(source, vteps.clone(), true);
        let to_vtep = || is_in(destination, vteps.clone(), false);
        input.push(drop(vec![ours(), outside()], "not from a host of the cluster"));
        forward.push(drop(vec![to_vtep(), outside()], "not from a host of the cluster"));
        forward.push(drop(vec![to_vtep(), Match::FromBridge], "from a container"));
        output.push(drop(vec![to_vtep(), Match::FromProcess], "from a process of this host"));
    }
    let chain = |name: &str, hook, rules| Chain {
        name: name.to_owned(),
        base: Some(Base { kind: Kind::Filter, hook, priority: PRIORITY }),
        rules,
    };
    Table {
        name: registry::NFTABLES_MESH_TABLE.to_owned(),
        sets,
        chains: vec![
            chain("input", Hook::Input, input),
            chain("forward", Hook::Forward, forward),
            chain("output", Hook::Output, output),
        ],
    }
}

/// Matches datagrams to the port of VXLAN.
fn vxlan() -> [Match; 2] {
    let protocol = Value::Protocol(Transport::Udp);
    let port = Value::Port(PORT);
    [
        Match::Is { key: Key::Protocol, value: protocol, not: false },
        Match::Is { key: Key::DestinationPort, value: port, not: false },
    ]
}
