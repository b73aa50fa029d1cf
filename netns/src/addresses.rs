//! The addresses and on-link subnets of a namespace, always current and without polling.
//!
//! # Theory of operation
//!
//! A netlink socket in the namespace subscribes to the multicast groups for address changes. Each
//! lookup first tries to receive from this socket. Usually the queue is empty and the cached table
//! is current. If there are messages, or if the queue has overflowed (`ENOBUFS`), the queue is
//! drained and then the table is read again. The contents of the messages are ignored. The order
//! matters: a change while the table is being read is detected by the next lookup.
//!
//! A lookup thus costs one system call, and its result is no older than that call. The kernel
//! announces an IPv4 address before the system call that adds it returns, and an IPv6 address after
//! duplicate address detection.
//!
//! An address counts while the kernel lists it, even if its interface is down. Routes without an
//! address (`ip route add local`, `ip route add ... dev`) are not considered.

use crate::netlink::Netlink;
use crate::routes::{connected_index, connected_interface, default_next_hop};
use crate::{ChangeListener, Family, Namespace, NamespaceId, Topic};
use ipnet::IpNet;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::{
    AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressScope,
};
use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use tidegate_model::LOOPBACK_INDEX;

/// The addresses of a namespace.
///
/// Can be shared between threads. Holds two file descriptors and needs no privileges once it is
/// open.
pub struct AddressBook {
    namespace: NamespaceId,
    changes: ChangeListener,
    state: Mutex<State>,
}

/// Open books created by [`AddressBook::of`]. An open book keeps its namespace alive, so its ID
/// cannot be reused.
static SHARED: Mutex<BTreeMap<NamespaceId, Weak<AddressBook>>> = Mutex::new(BTreeMap::new());

struct State {
    netlink: Netlink,
    table: Table,
    /// The table has changed and could not be read since.
    stale: bool,
}

impl AddressBook {
    /// Opens a book for `namespace` and subscribes to its changes.
    ///
    /// # Errors
    /// The namespace cannot be entered, or its addresses cannot be read.
    pub fn open(namespace: &Namespace) -> io::Result<Self> {
        let changes = ChangeListener::of(namespace, &[Topic::Addresses])?;
        let mut netlink = Netlink::open(namespace)?;
        let table = Table::read(&mut netlink)?;
        let state = Mutex::new(State { netlink, table, stale: false });
        Ok(Self { namespace: namespace.id(), changes, state })
    }

    /// Returns the open book of `namespace`, or opens one. Sharing matters because thousands of
    /// published ports may use the book of one host.
    ///
    /// # Errors
    /// Same as [`open`](Self::open).
    pub fn of(namespace: &Namespace) -> io::Result<Arc<Self>> {
        let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(open) = shared.get(&namespace.id()).and_then(Weak::upgrade) {
            return Ok(open);
        }
        let book = Arc::new(Self::open(namespace)?);
        shared.insert(namespace.id(), Arc::downgrade(&book));
        Ok(book)
    }

    /// Returns whether `ip` is an address of the namespace or in a loopback range.
    #[must_use]
    pub fn is_local(&self, ip: IpAddr) -> bool {
        self.current().table.is_local(ip)
    }

    /// Returns whether `ip` is in the subnet of an interface other than loopback. Includes the
    /// addresses of the interface itself.
    #[must_use]
    pub fn is_on_link(&self, ip: IpAddr) -> bool {
        self.current().table.is_on_link(ip)
    }

    /// Returns whether both addresses are in the subnet of the same interface, that is, on-link to
    /// each other.
    #[must_use]
    pub fn on_link_with(&self, a: IpAddr, b: IpAddr) -> bool {
        self.current().table.on_link_with(a, b)
    }

    /// Returns the address of the namespace on the subnet of `ip`, on an interface other than
    /// loopback: the one from which packets to `ip` are sent.
    #[must_use]
    pub fn own_on_link_with(&self, ip: IpAddr) -> Option<IpAddr> {
        self.current().table.own_on_link_with(ip)
    }

    /// Returns the addresses at which a container is reachable: those with global scope on
    /// interfaces other than loopback. IPv4 comes first; within each family, the interface of the
    /// default route comes first.
    #[must_use]
    pub fn container_addresses(&self) -> Vec<IpAddr> {
        let mut state = self.current();
        // On failure, the order of the interfaces applies.
        let preferred = Family::ALL.map(|family| {
            default_next_hop(&mut state.netlink, family)
                .ok()
                .flatten()
                .and_then(|hop| hop.interface)
        });
        state.table.container_addresses(preferred)
    }

    /// Returns the global addresses of the interface `name`, in the order of the kernel.
    ///
    /// # Errors
    /// `ENODEV` if the interface does not exist.
    pub fn of_interface(&self, name: &str) -> io::Result<Vec<IpAddr>> {
        let state = self.current();
        let index = state.netlink.interface_index(name)?;
        let entries = state.table.0.iter().filter(|entry| entry.interface == index && entry.global);
        Ok(entries.map(|entry| entry.own).collect())
    }

    /// Returns the gateway of the default route with the lowest metric in the main table.
    ///
    /// Returns `None` if there is no default route, or if it has no gateway.
    ///
    /// # Errors
    /// The routes cannot be read.
    pub fn gateway(&self, family: Family) -> io::Result<Option<IpAddr>> {
        Ok(default_next_hop(&mut self.state().netlink, family)?.and_then(|hop| hop.gateway))
    }

    /// Returns the index and name of the interface to which `ip` is on-link: packets to it from
    /// inside the namespace are sent directly, without a router.
    ///
    /// Returns `None` if `ip` is behind a router, local to the namespace, or unreachable.
    ///
    /// # Errors
    /// The routes cannot be read.
    pub fn connected_interface(&self, ip: IpAddr) -> io::Result<Option<(u32, String)>> {
        connected_interface(&mut self.state().netlink, ip)
    }

    /// Returns the index of the interface to which `ip` is on-link, as
    /// [`connected_interface`](Self::connected_interface). Needs no system call but those of
    /// netlink, so a sandboxed thread may call it.
    ///
    /// # Errors
    /// The routes cannot be read.
    pub fn connected_index(&self, ip: IpAddr) -> io::Result<Option<u32>> {
        connected_index(&mut self.state().netlink, ip)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the table after reading it again if it has changed.
    fn current(&self) -> MutexGuard<'_, State> {
        let mut state = self.state();
        if self.changes.drain() || state.stale {
            match Table::read(&mut state.netlink) {
                Ok(table) => (state.table, state.stale) = (table, false),
                Err(error) => {
                    state.stale = true;
                    tracing::warn!(%error, "addresses of namespace not readable; using last known");
                }
            }
        }
        state
    }
}

impl Drop for AddressBook {
    fn drop(&mut self) {
        let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        // Another book may have been opened concurrently.
        if shared.get(&self.namespace).is_some_and(|book| book.strong_count() == 0) {
            shared.remove(&self.namespace);
        }
    }
}

impl fmt::Debug for AddressBook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("AddressBook").field(&self.current().table).finish()
    }
}

/// One address of one interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    interface: u32,
    own: IpAddr,
    /// On-link prefix of `own`, or of the peer on a point-to-point link.
    subnet: IpNet,
    global: bool,
}

/// A snapshot of all addresses, in the order of the kernel: by interface, primary addresses before
/// secondary ones.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Table(Vec<Entry>);

impl Table {
    fn read(netlink: &mut Netlink) -> io::Result<Self> {
        let listed = netlink.dump(&RouteNetlinkMessage::GetAddress(AddressMessage::default()))?;
        Ok(Self(
            listed
                .into_iter()
                .filter_map(|message| match message {
                    RouteNetlinkMessage::NewAddress(address) => Entry::parse(&address),
                    _ => None,
                })
                .collect(),
        ))
    }

    fn is_local(&self, ip: IpAddr) -> bool {
        let ip = ip.to_canonical();
        ip.is_loopback()
            || self.0.iter().any(|entry| entry.own == ip || entry.is_loopback_subnet(ip))
    }

    fn is_on_link(&self, ip: IpAddr) -> bool {
        let ip = ip.to_canonical();
        self.0.iter().any(|entry| entry.interface != LOOPBACK_INDEX && entry.subnet.contains(&ip))
    }

    fn on_link_with(&self, a: IpAddr, b: IpAddr) -> bool {
        let (a, b) = (a.to_canonical(), b.to_canonical());
        self.0.iter().any(|entry| entry.subnet.contains(&a) && entry.subnet.contains(&b))
    }

    fn own_on_link_with(&self, ip: IpAddr) -> Option<IpAddr> {
        let ip = ip.to_canonical();
        let mut on_link = self.0.iter().filter(|entry| {
            entry.interface != LOOPBACK_INDEX && entry.own != ip && entry.subnet.contains(&ip)
        });
        on_link.next().map(|entry| entry.own)
    }

    fn container_addresses(&self, preferred: [Option<u32>; 2]) -> Vec<IpAddr> {
        let mut entries: Vec<&Entry> = self
            .0
            .iter()
            .filter(|entry| entry.global && entry.interface != LOOPBACK_INDEX)
            .collect();
        // The sort is stable, so equal keys keep the order of the kernel.
        entries.sort_by_key(|entry| {
            let family = Family::of(entry.own);
            (family, preferred[family as usize] != Some(entry.interface))
        });
        entries.into_iter().map(|entry| entry.own).collect()
    }
}

impl Entry {
    /// Parses an address. Returns `None` if duplicate address detection has failed, because the
    /// address is unusable.
    fn parse(message: &AddressMessage) -> Option<Self> {
        let (mut address, mut local) = (None, None);
        let mut duplicate = message.header.flags.contains(AddressHeaderFlags::Dadfailed);
        for attribute in &message.attributes {
            match attribute {
                AddressAttribute::Address(ip) => address = Some(*ip),
                AddressAttribute::Local(ip) => local = Some(*ip),
                AddressAttribute::Flags(flags) => {
                    duplicate |= flags.contains(AddressFlags::Dadfailed);
                }
                _ => {}
            }
        }
        // On a point-to-point link IFA_ADDRESS is the peer. Otherwise IFA_ADDRESS and IFA_LOCAL are
        // equal, and IPv6 omits IFA_LOCAL.
        let own = local.or(address)?;
        let subnet = IpNet::new(address.unwrap_or(own), message.header.prefix_len).ok()?;
        let global = message.header.scope == AddressScope::Universe;
        (!duplicate).then_some(Self { interface: message.header.index, own, subnet, global })
    }

    /// Every IPv4 address in a subnet of `lo` is local (`fib_add_ifaddr`, net/ipv4/fib_frontend.c).
    /// Subnets other than 127.0.0.0/8 can be added to `lo`.
    fn is_loopback_subnet(&self, ip: IpAddr) -> bool {
        self.interface == LOOPBACK_INDEX && ip.is_ipv4() && self.subnet.contains(&ip)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    /// Builds a table from (interface, address/prefix). The scope is global except for loopback and
    /// link-local addresses.
    fn table(lines: &[(u32, &str)]) -> Table {
        let entry = |&(interface, text): &(u32, &str)| {
            let subnet: IpNet = text.parse().unwrap();
            let own = subnet.addr();
            let link_local = text.starts_with("fe80") || text.starts_with("169.254");
            Entry { interface, own, subnet, global: !own.is_loopback() && !link_local }
        };
        Table(lines.iter().map(entry).collect())
    }

    fn host() -> Table {
        table(&[
            (1, "127.0.0.1/8"),
            (1, "192.0.2.0/28"),
            (2, "203.0.113.1/24"),
            (3, "172.30.0.1/24"),
            (1, "::1/128"),
            (2, "2001:db8:1::1/64"),
            (2, "fe80::1/64"),
            (3, "fd30::1/64"),
        ])
    }

    #[test]
    fn own_addresses_and_loopback_ranges_are_local() {
        for local in
            ["203.0.113.1", "::ffff:203.0.113.1", "127.5.5.5", "::1", "fe80::1", "192.0.2.7"]
        {
            assert!(host().is_local(ip(local)), "{local}");
        }
        for other in ["203.0.113.9", "172.30.0.2", "fd30::2", "192.0.2.16", "::2"] {
            assert!(!host().is_local(ip(other)), "{other}");
        }
    }

    #[test]
    fn addresses_in_one_subnet_are_on_link() {
        let host = host();
        assert!(host.on_link_with(ip("172.30.0.2"), ip("172.30.0.3")));
        assert!(host.on_link_with(ip("::ffff:172.30.0.2"), ip("172.30.0.3")));
        assert!(host.on_link_with(ip("fd30::2"), ip("fd30::3")));
        assert!(!host.on_link_with(ip("203.0.113.9"), ip("172.30.0.2")));
        assert!(!host.on_link_with(ip("fd30::2"), ip("172.30.0.2")));
        assert_eq!(host.own_on_link_with(ip("fd30::2")), Some(ip("fd30::1")));
        assert_eq!(host.own_on_link_with(ip("::ffff:172.30.0.2")), Some(ip("172.30.0.1")));
        assert_eq!(host.own_on_link_with(ip("172.30.0.1")), None, "the host itself");
        assert_eq!(host.own_on_link_with(ip("192.0.2.7")), None, "loopback");
        assert!(host.is_on_link(ip("203.0.113.9")));
        assert!(!host.is_on_link(ip("198.51.100.1")));
        assert!(!host.is_on_link(ip("127.0.0.1")), "loopback is not a link");
    }

    #[test]
    fn container_addresses_start_with_ipv4_and_the_default_route() {
        let container = table(&[
            (1, "127.0.0.1/8"),
            (2, "10.1.0.2/16"),
            (3, "10.2.0.2/16"),
            (3, "10.2.0.3/16"),
            (2, "fd01::2/64"),
            (3, "fd02::2/64"),
            (3, "fe80::2/64"),
        ]);
        let texts = |preferred| {
            let addresses = container.container_addresses(preferred);
            addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(texts([Some(3), None]), "10.2.0.2 10.2.0.3 10.1.0.2 fd01::2 fd02::2");
        assert_eq!(texts([None, Some(3)]), "10.1.0.2 10.2.0.2 10.2.0.3 fd02::2 fd01::2");
    }

    #[test]
    fn point_to_point_peer_is_on_link_and_not_local() {
        let mut message = AddressMessage::default();
        message.header.index = 4;
        message.header.prefix_len = 32;
        message.attributes.push(AddressAttribute::Address(ip("10.9.0.2")));
        message.attributes.push(AddressAttribute::Local(ip("10.9.0.1")));
        let table = Table(vec![Entry::parse(&message).unwrap()]);
        assert!(table.is_local(ip("10.9.0.1")) && !table.is_local(ip("10.9.0.2")));
        assert!(table.is_on_link(ip("10.9.0.2")) && !table.is_on_link(ip("10.9.0.1")));
    }

    #[test]
    fn duplicate_address_is_omitted() {
        let mut message = AddressMessage::default();
        message.header.prefix_len = 64;
        message.attributes.push(AddressAttribute::Address(ip("fd30::2")));
        message
            .attributes
            .push(AddressAttribute::Flags(AddressFlags::Dadfailed | AddressFlags::Tentative));
        assert_eq!(Entry::parse(&message), None);
    }
}
