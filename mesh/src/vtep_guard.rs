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
//! | received with one of our VNIs from a bridge other than the underlay | drop | a container with the address of a VTEP as a forged source |
//! | forwarded to a VTEP, source not a VTEP | drop | a container: masquerade would give it the address of this VTEP |
//! | forwarded to a VTEP from a bridge other than the underlay | drop | the same, with a forged source |
//! | sent to a VTEP through the socket of a process | drop | packets of a VXLAN device have no socket of a process |
//!
//! A sender that forges the address of a VTEP on the underlay is not recognised: that network has
//! to prevent it, or carry the traffic in WireGuard. Frames that pass are checked once more, by
//! their inner source ([`FrameGuard`](tidegate_netfilter::FrameGuard)).
//!
//! Received packets are matched by VNI, so that other VXLAN software of the host, such as a swarm,
//! is not affected.
//!
//! | mechanism | kernel | covers |
//! |---|---|---|
//! | nftables, in a table of its own | CONFIG_NF_TABLES | each packet, after reassembly |
//! | eBPF programs ([`VxlanGuard`]) | Linux 6.6 | the links of the host, new ones within milliseconds |

use crate::device::{HostLink, PORT};
use rustix::io::Errno;
use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;
use tidegate_model::{Feature, registry};
use tidegate_netfilter::{
    Action, Base, Chain, Change, Connection, Element, Field, Hook, Key, Kind, Match, Rule, Set,
    Table, Transport, Value, VxlanFact, VxlanGuard,
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
    /// The link with the VTEP of this host. It may be a bridge.
    pub underlay: Option<HostLink>,
}

/// The guard of a namespace.
#[derive(Debug)]
pub struct VtepGuard {
    namespace: Namespace,
    mechanism: Mechanism,
}

#[derive(Debug)]
enum Mechanism {
    Nftables(Rules),
    Programs(Programs),
}

impl VtepGuard {
    /// Opens a connection to nftables in `namespace`, or else loads programs. `own` is the VTEP of
    /// this host.
    ///
    /// # Errors
    /// The kernel has neither, or `EPERM`.
    pub fn open(namespace: &Namespace, own: IpAddr) -> io::Result<Self> {
        let open = || match Rules::open() {
            Ok(rules) => Ok(Mechanism::Nftables(rules)),
            Err(error) => match VxlanGuard::new(namespace.id().inode, PORT) {
                Ok(guard) => Ok(Mechanism::Programs(Programs::new(guard, own))),
                Err(_) => Err(error),
            },
        };
        Ok(Self { namespace: namespace.clone(), mechanism: namespace.with(open)?? })
    }

    /// Whether [`follow`](Self::follow) has to be called when the links of the host change.
    #[must_use]
    pub fn follows_links(&self) -> bool {
        matches!(self.mechanism, Mechanism::Programs(_))
    }

    /// Guards the links of the host, which are now `links`. Returns the number of those that had
    /// lost their guard.
    ///
    /// # Errors
    /// Errors of the kernel. Links that are removed concurrently are not an error.
    pub fn follow(&mut self, links: &[HostLink]) -> io::Result<usize> {
        let Mechanism::Programs(programs) = &mut self.mechanism else { return Ok(0) };
        self.namespace.with(|| programs.follow(links))?
    }

    /// Puts `policy` in force, unless it is already.
    ///
    /// # Errors
    /// The kernel rejects the rules. Those before are then still in force.
    pub fn apply(&mut self, policy: &VtepPolicy) -> io::Result<()> {
        match &mut self.mechanism {
            Mechanism::Nftables(rules) => rules.apply(policy),
            Mechanism::Programs(programs) => programs.apply(policy),
        }
    }

    /// Restores rules that other software has changed. Returns whether it has. Programs are
    /// restored by [`follow`](Self::follow).
    ///
    /// # Errors
    /// Errors of the kernel.
    pub fn repair(&mut self) -> io::Result<bool> {
        match &mut self.mechanism {
            Mechanism::Nftables(rules) => rules.repair(),
            Mechanism::Programs(_) => Ok(false),
        }
    }

    /// Removes the guard.
    ///
    /// # Errors
    /// Errors of the kernel.
    pub fn remove(&mut self) -> io::Result<()> {
        match &mut self.mechanism {
            Mechanism::Nftables(rules) => rules.remove(),
            Mechanism::Programs(programs) => self.namespace.with(|| programs.remove())?,
        }
    }

    /// Returns the namespace.
    #[must_use]
    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }
}

/// Removes the guard of a previous process in `namespace`, whose links are `links`, if there is
/// one.
///
/// # Errors
/// Errors of the kernel.
pub fn remove_stale(namespace: &Namespace, links: &[HostLink]) -> io::Result<()> {
    let remove = || {
        for link in links {
            accept_gone(VxlanGuard::detach_stale(namespace.id().inode, link.index))?;
        }
        let Ok(mut connection) = Connection::open() else { return Ok(()) };
        let table = registry::NFTABLES_MESH_TABLE.to_owned();
        if connection.tables()?.iter().any(|listed| listed.name == table) {
            connection.commit(&[Change::Remove { table }]).map_err(io::Error::other)?;
        }
        Ok(())
    };
    namespace.with(remove)?
}

/// Passes the error that a link does not exist.
fn accept_gone(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.raw_os_error() == Some(Errno::NODEV.raw_os_error()) => Ok(()),
        result => result,
    }
}

/// Programs at the links of the host.
#[derive(Debug)]
struct Programs {
    guard: VxlanGuard,
    own: IpAddr,
    policy: VtepPolicy,
    links: Vec<HostLink>,
    /// Interface indexes of the links with a guard.
    guarded: BTreeSet<u32>,
}

impl Programs {
    fn new(guard: VxlanGuard, own: IpAddr) -> Self {
        let (policy, links, guarded) = Default::default();
        Self { guard, own, policy, links, guarded }
    }

    fn apply(&mut self, policy: &VtepPolicy) -> io::Result<()> {
        self.policy.clone_from(policy);
        let VtepPolicy { vteps, vnis, underlay } = policy;
        let peers = vteps.iter().filter(|ip| **ip != self.own);
        let facts = vteps.iter().map(|ip| VxlanFact::Vtep(*ip));
        let facts = facts.chain(peers.map(|ip| VxlanFact::Peer(*ip)));
        let facts = facts.chain(vnis.iter().map(|vni| VxlanFact::Vni(*vni)));
        let bridges =
            self.links.iter().filter(|link| link.is_bridge && Some(*link) != underlay.as_ref());
        let bridges = bridges.map(|link| VxlanFact::Bridge(link.index));
        self.guard.set(&facts.chain(bridges).collect())
    }

    fn follow(&mut self, links: &[HostLink]) -> io::Result<usize> {
        if self.links != links {
            links.clone_into(&mut self.links);
            self.apply(&self.policy.clone())?;
        }
        let present: BTreeSet<u32> = links.iter().map(|link| link.index).collect();
        let (mut lost, mut failed) = (0, None);
        for index in &present {
            if self.guard.is_attached(*index).unwrap_or_default() {
                continue;
            }
            match self.guard.attach(*index) {
                Ok(()) => lost += usize::from(!self.guarded.insert(*index)),
                Err(error) => failed = accept_gone(Err(error)).err().or(failed),
            }
        }
        self.guarded.retain(|index| present.contains(index));
        self.guard.retain(&present)?;
        failed.map_or(Ok(lost), Err)
    }

    fn remove(&mut self) -> io::Result<()> {
        for index in std::mem::take(&mut self.guarded) {
            accept_gone(self.guard.detach(index))?;
        }
        Ok(())
    }
}

/// Rules in an nftables table of their own. They apply with every firewall: a packet that is
/// dropped in one table is not accepted by another.
#[derive(Debug)]
struct Rules {
    connection: Connection,
    /// Other processes cannot change the table.
    owns: bool,
    /// What is in force, with the fingerprint of the table.
    applied: Option<(VtepPolicy, Option<u64>)>,
}

impl Rules {
    /// Opens a connection in the calling thread's namespace.
    fn open() -> io::Result<Self> {
        if Feature::MeshRules.is_forced_off() {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let mut connection = Connection::open()?;
        let owns = connection.can_own().map_err(io::Error::other)?;
        let owns = owns && !Feature::OwnedTables.is_forced_off();
        Ok(Self { connection, owns, applied: None })
    }

    fn apply(&mut self, policy: &VtepPolicy) -> io::Result<()> {
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

    fn repair(&mut self) -> io::Result<bool> {
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

    fn remove(&mut self) -> io::Result<()> {
        self.applied = None;
        let table = registry::NFTABLES_MESH_TABLE.to_owned();
        self.connection.commit(&[Change::Remove { table }]).map_err(io::Error::other)
    }
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
    let from_bridge = || {
        let name = policy.underlay.as_ref().map(|link| Value::Interface(link.name.clone()));
        let not = |value| Match::Is { key: Key::InInterface, value, not: true };
        [Match::FromBridge].into_iter().chain(name.map(not))
    };
    let forged = [ours()].into_iter().chain(from_bridge()).collect();
    let mut input = vec![
        drop(vec![ours(), lo], "from a process of this host"),
        drop(forged, "from a container"),
    ];
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
        let forged = [to_vtep()].into_iter().chain(from_bridge()).collect();
        forward.push(drop(forged, "from a container"));
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
