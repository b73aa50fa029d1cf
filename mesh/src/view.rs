//! The cluster as one host knows it. Pure.
//!
//! A view follows a watch. After a lost watch, or a compacted history, the entries are listed
//! again, and the view is replaced. Readers compare two views and never see single events, so that
//! both ways have the same result.
//!
//! An entry that cannot be read is left out, and reported once for each of its versions: a newer or
//! defective host must not stop the others.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use crate::key::Key;
use crate::record::{
    Binding, Claim, Endpoint, EndpointKey, Network, Node, Record, RecordError, Service,
};
use crate::store::{Changes, Condition, Entry, Event, LeaseId, Revision};
use std::collections::BTreeMap;
use std::net::IpAddr;
use tidegate_model::Protocol;

/// The cluster at a revision.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct View {
    /// The revision up to which changes are included.
    pub revision: Revision,
    /// Hosts by ID.
    pub nodes: BTreeMap<String, Node>,
    /// IDs of hosts by number.
    pub node_indexes: BTreeMap<u16, String>,
    /// Networks by name.
    pub networks: BTreeMap<String, Network>,
    /// Names of networks by VNI.
    pub vnis: BTreeMap<u32, String>,
    /// Endpoints by network and name.
    pub endpoints: BTreeMap<EndpointKey, Endpoint>,
    /// Claims of addresses by network and address.
    pub addresses: BTreeMap<(String, IpAddr), Claim>,
    /// Services by name.
    pub services: BTreeMap<String, Service>,
    /// Names of services by published port.
    pub ports: BTreeMap<(Protocol, u16), String>,
    /// What hosts have made of services, by service and host.
    pub bindings: BTreeMap<(String, String), Binding>,
    /// The number of created networks.
    pub topology: u64,
    /// The last write of each key, also of entries that cannot be read.
    pub written: BTreeMap<Key, Written>,
}

/// The last write of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Written {
    /// Its revision.
    pub revision: Revision,
    /// The lease with which the entry ends.
    pub lease: Option<LeaseId>,
}

impl View {
    /// Builds a view from all `entries` at `revision`. Returns the entries that cannot be read.
    #[must_use]
    pub fn of(entries: &[Entry], revision: Revision) -> (Self, Vec<RecordError>) {
        let mut view = Self { revision, ..Self::default() };
        let errors = entries.iter().filter_map(|entry| view.put(entry).err()).collect();
        (view, errors)
    }

    /// Applies `changes`, which follow [`revision`](Self::revision). Returns the entries that
    /// cannot be read.
    pub fn apply(&mut self, changes: &Changes) -> Vec<RecordError> {
        let mut errors = Vec::new();
        // A listing has overtaken the watch.
        if changes.revision <= self.revision {
            return errors;
        }
        for event in &changes.events {
            match event {
                Event::Put(entry) => errors.extend(self.put(entry).err()),
                Event::Deleted(key) => self.remove(key),
            }
        }
        self.revision = changes.revision;
        errors
    }

    /// The condition that `key` is still as it is in this view.
    #[must_use]
    pub fn unmodified(&self, key: &Key) -> Condition {
        match self.written.get(key) {
            Some(written) => Condition::Unmodified(key.to_string(), written.revision),
            None => Condition::Absent(key.to_string()),
        }
    }

    /// The endpoints on `network`, by name.
    pub fn endpoints_on(&self, network: &str) -> impl Iterator<Item = (&str, &Endpoint)> {
        let from = self.endpoints.range((network.to_owned(), String::new())..);
        let here = from.take_while(move |((of, _), _)| of == network);
        here.map(|((_, name), endpoint)| (name.as_str(), endpoint))
    }

    /// The claims of addresses of `network`.
    pub fn claims_on(&self, network: &str) -> impl Iterator<Item = (IpAddr, &Claim)> {
        let first = IpAddr::from([0, 0, 0, 0]);
        let from = self.addresses.range((network.to_owned(), first)..);
        let here = from.take_while(move |((of, _), _)| of == network);
        here.map(|((_, address), claim)| (*address, claim))
    }

    fn put(&mut self, entry: &Entry) -> Result<(), RecordError> {
        // A previous version of the entry is no longer valid if this one cannot be read.
        self.remove(&entry.key);
        if let Ok(key) = entry.key.parse() {
            self.written.insert(key, Written { revision: entry.modified, lease: entry.lease });
        }
        match Record::try_from(entry)? {
            Record::Node(id, node) => drop(self.nodes.insert(id, node)),
            Record::NodeIndex(number, id) => drop(self.node_indexes.insert(number, id)),
            Record::Network(name, network) => drop(self.networks.insert(name, network)),
            Record::Vni(number, name) => drop(self.vnis.insert(number, name)),
            Record::Endpoint(network, name, endpoint) => {
                self.endpoints.insert((network, name), endpoint);
            }
            Record::Address(network, address, claim) => {
                self.addresses.insert((network, address), claim);
            }
            Record::Service(name, service) => drop(self.services.insert(name, service)),
            Record::Port(protocol, port, service) => {
                self.ports.insert((protocol, port), service);
            }
            Record::Binding(service, node, binding) => {
                self.bindings.insert((service, node), binding);
            }
            Record::Topology(number) => self.topology = number,
        }
        Ok(())
    }

    fn remove(&mut self, key: &str) {
        let key = key.parse();
        if let Ok(key) = &key {
            self.written.remove(key);
        }
        match key {
            Ok(Key::Node(id)) => drop(self.nodes.remove(&id)),
            Ok(Key::NodeIndex(number)) => drop(self.node_indexes.remove(&number)),
            Ok(Key::Network(name)) => drop(self.networks.remove(&name)),
            Ok(Key::Vni(number)) => drop(self.vnis.remove(&number)),
            Ok(Key::Endpoint { network, name }) => drop(self.endpoints.remove(&(network, name))),
            Ok(Key::Address { network, address }) => {
                self.addresses.remove(&(network, address));
            }
            Ok(Key::Service(name)) => drop(self.services.remove(&name)),
            Ok(Key::Port(protocol, port)) => drop(self.ports.remove(&(protocol, port))),
            Ok(Key::Binding { service, node }) => drop(self.bindings.remove(&(service, node))),
            Ok(Key::Topology) => self.topology = 0,
            Err(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::PREFIX;
    use crate::record::{EndpointState, Role, Subnet};
    use crate::store::{ClusterStore, Embedded, Transaction, Write};
    use proptest::prelude::*;
    use tidegate_model::MacAddress;

    /// A random write: of a valid record, of an unreadable one, or a deletion.
    fn writes() -> impl Strategy<Value = Write> {
        let put = |record: Record| {
            let (key, value) = record.encode();
            Write::Put { key: key.to_string(), value, lease: None }
        };
        let name = || prop_oneof![Just("a".to_owned()), Just("b".to_owned())];
        let node = |index| Node {
            index,
            vtep: [192, 0, 2, 1].into(),
            boot: String::new(),
            machine: String::new(),
            mtu: 1500,
        };
        let network = |vni| Network {
            vni,
            subnets: vec![Subnet {
                subnet: "10.9.0.0/24".parse().unwrap(),
                gateway: [10, 9, 0, 1].into(),
            }],
            mtu: 1450,
            internal: false,
        };
        let endpoint = |generation| Endpoint {
            node: "a".into(),
            generation,
            addresses: vec![[10, 9, 0, 2].into()],
            mac: MacAddress([2; 6]),
            state: EndpointState::Ready,
            aliases: Vec::new(),
            hostname: None,
            role: Role::Container,
        };
        let address = IpAddr::from([10, 9, 0, 2]);
        prop_oneof![
            (name(), 0_u16..3).prop_map(move |(id, number)| put(Record::Node(id, node(number)))),
            (0_u16..3, name()).prop_map(move |(number, id)| put(Record::NodeIndex(number, id))),
            (name(), 1_u32..4)
                .prop_map(move |(name, vni)| put(Record::Network(name, network(vni)))),
            (1_u32..4, name()).prop_map(move |(vni, name)| put(Record::Vni(vni, name))),
            (name(), name(), 0_u64..3).prop_map(move |(network, name, generation)| put(
                Record::Endpoint(network, name, endpoint(generation))
            )),
            (name(), name()).prop_map(move |(network, name)| put(Record::Address(
                network,
                address,
                Claim::Endpoint { name, node: "a".into() }
            ))),
            name().prop_map(|id| Write::Put {
                key: Key::Node(id).to_string(),
                value: b"unreadable".to_vec(),
                lease: None
            }),
            name().prop_map(|id| Write::Delete(Key::Node(id).to_string())),
            name().prop_map(|name| Write::Delete(Key::Network(name).to_string())),
            (name(), name()).prop_map(|(network, name)| Write::Delete(
                Key::Endpoint { network, name }.to_string()
            )),
        ]
    }

    proptest! {
        /// Following a watch and listing again lead to the same view, from every revision.
        #[test]
        fn a_watch_and_a_list_agree(writes in proptest::collection::vec(writes(), 1..40), from in 0_usize..40) {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
            runtime.block_on(async {
                let store = Embedded::new();
                let mut views = Vec::new();
                for write in &writes {
                    let (entries, revision) = store.list(PREFIX).await.unwrap();
                    views.push(View::of(&entries, revision).0);
                    let transaction = Transaction { writes: vec![write.clone()], ..Transaction::default() };
                    store.commit(transaction).await.unwrap();
                }
                let (entries, revision) = store.list(PREFIX).await.unwrap();
                let (listed, _) = View::of(&entries, revision);
                let mut followed = views[from % views.len()].clone();
                if followed.revision < revision {
                    let mut watch = store.watch(PREFIX, followed.revision).await.unwrap();
                    while followed.revision < revision {
                        followed.apply(&watch.next().await.unwrap());
                    }
                }
                assert_eq!(followed, listed);
            });
        }
    }

    #[test]
    fn an_unreadable_version_hides_the_previous_one_and_is_reported() {
        let entry = |value: &str| Entry {
            key: "/tidegate/1/vni/7".into(),
            value: value.into(),
            lease: None,
            modified: Revision(1),
        };
        let (mut view, errors) = View::of(&[entry("\"front\"")], Revision(1));
        assert_eq!((view.vnis.len(), errors.len()), (1, 0));
        let changes = |entry| Changes { revision: Revision(2), events: vec![Event::Put(entry)] };
        let errors = view.apply(&changes(entry("7")));
        assert_eq!((view.vnis.len(), errors.len(), view.revision), (0, 1, Revision(2)));
    }
}
