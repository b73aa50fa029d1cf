//! Which addresses are a namespace's own, and which are its neighbours: always current, without
//! polling.
//!
//! # Theory of operation
//!
//! A netlink socket made in the namespace is a member of the groups to which the kernel reports
//! every change of an address. A look-up first tries to receive from it: as a rule there is
//! nothing, and the table at hand is current. If there is something, or if there was too much for
//! the socket to hold (`ENOBUFS`), what it says does not matter: the queue is emptied, and then the
//! table is read anew. In this order, so that a change during the reading is noticed by the next
//! look-up.
//!
//! So a look-up costs one system call, and the answer is no older than that call. An IPv4 address
//! is announced before the program that added it goes on; an IPv6 address a moment later, when the
//! kernel has found that nobody else on the link has it.
//!
//! Addresses count from when the kernel lists them until it does not, also while their interface is
//! down. Routes without an address behind them (`ip route add local`, `ip route add ... dev`) are
//! not seen.

use crate::netlink::Netlink;
use crate::routes::{connected_interface, default_route};
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

/// The index of `lo`, which is the first interface of every namespace (`LOOPBACK_IFINDEX` in
/// `include/net/net_namespace.h`).
pub(crate) const LOOPBACK: u32 = 1;

/// The addresses of a namespace.
///
/// May be asked from several threads. Keeps two descriptors; needs no privilege once it is open.
pub struct AddressBook {
    namespace: NamespaceId,
    changes: ChangeListener,
    state: Mutex<State>,
}

/// Those that [`AddressBook::of`] has handed out and that are still in use. An open book keeps its
/// namespace alive, so no other one can have come by its id.
static SHARED: Mutex<BTreeMap<NamespaceId, Weak<AddressBook>>> = Mutex::new(BTreeMap::new());

struct State {
    netlink: Netlink,
    table: Table,
    /// The table could not be read when it had changed.
    stale: bool,
}

impl AddressBook {
    /// Begins to watch the addresses of `namespace`.
    ///
    /// # Errors
    /// The namespace cannot be entered, or its addresses not be read.
    pub fn open(namespace: &Namespace) -> io::Result<Self> {
        let changes = ChangeListener::of(namespace, &[Topic::Addresses])?;
        let mut netlink = Netlink::open(namespace)?;
        let table = Table::read(&mut netlink)?;
        let state = Mutex::new(State { netlink, table, stale: false });
        Ok(Self { namespace: namespace.id(), changes, state })
    }

    /// The book of `namespace` that this process has open, or a new one: thousands of ports may ask
    /// about one host.
    ///
    /// # Errors
    /// As of [`open`](Self::open).
    pub fn of(namespace: &Namespace) -> io::Result<Arc<Self>> {
        let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(open) = shared.get(&namespace.id()).and_then(Weak::upgrade) {
            return Ok(open);
        }
        let book = Arc::new(Self::open(namespace)?);
        shared.insert(namespace.id(), Arc::downgrade(&book));
        Ok(book)
    }

    /// Whether `ip` is one of the namespace's own addresses, or in a loopback range.
    #[must_use]
    pub fn is_local(&self, ip: IpAddr) -> bool {
        self.current().table.is_local(ip)
    }

    /// Whether some interface other than loopback has `ip` in its subnet, its own addresses
    /// included.
    #[must_use]
    pub fn is_on_link(&self, ip: IpAddr) -> bool {
        self.current().table.is_on_link(ip)
    }

    /// Whether some interface has both addresses in its subnet, so that they reach one another past
    /// any router.
    #[must_use]
    pub fn on_link_with(&self, a: IpAddr, b: IpAddr) -> bool {
        self.current().table.on_link_with(a, b)
    }

    /// The addresses by which a container is reached: those of global scope on interfaces other
    /// than loopback. IPv4 first, and of each family those of the interface that the default route
    /// uses.
    #[must_use]
    pub fn container_addresses(&self) -> Vec<IpAddr> {
        let mut state = self.current();
        // Without an answer the order is that of the interfaces.
        let preferred = Family::ALL.map(|family| {
            default_route(&mut state.netlink, family).ok().flatten().and_then(|way| way.interface)
        });
        state.table.container_addresses(preferred)
    }

    /// The addresses of an interface, of global scope, in the kernel's order.
    ///
    /// # Errors
    /// `ENODEV`: there is none of this name.
    pub fn of_interface(&self, name: &str) -> io::Result<Vec<IpAddr>> {
        let state = self.current();
        let index = state.netlink.interface_index(name)?;
        let entries = state.table.0.iter().filter(|entry| entry.interface == index && entry.global);
        Ok(entries.map(|entry| entry.own).collect())
    }

    /// The next hop of the default route in the main table; the one of lowest metric if there are
    /// several.
    ///
    /// `None` without a default route, or if it leads to an interface and not to a router.
    ///
    /// # Errors
    /// The routes cannot be read.
    pub fn gateway(&self, family: Family) -> io::Result<Option<IpAddr>> {
        Ok(default_route(&mut self.state().netlink, family)?.and_then(|route| route.gateway))
    }

    /// Index and name of the interface behind which `ip` is on the same link: a packet to it from
    /// inside the namespace is sent to it and not to a router.
    ///
    /// `None` if the way leads over a router, to the namespace itself, or nowhere.
    ///
    /// # Errors
    /// The routes cannot be read.
    pub fn connected_interface(&self, ip: IpAddr) -> io::Result<Option<(u32, String)>> {
        connected_interface(&mut self.state().netlink, ip)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The table, read anew if it has changed.
    fn current(&self) -> MutexGuard<'_, State> {
        let mut state = self.state();
        if self.changes.drain() || state.stale {
            match Table::read(&mut state.netlink) {
                Ok(table) => (state.table, state.stale) = (table, false),
                Err(error) => {
                    state.stale = true;
                    tracing::warn!(%error, "cannot read the addresses of a namespace; using the last known");
                }
            }
        }
        state
    }
}

impl Drop for AddressBook {
    fn drop(&mut self) {
        let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        // Another may have been opened meanwhile.
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
    /// What is on the link: around `own`, or around the other end of a point-to-point link.
    subnet: IpNet,
    global: bool,
}

/// All addresses at one moment, in the kernel's order: by interface, and a primary address before
/// those that were added to it.
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
        self.0.iter().any(|entry| entry.interface != LOOPBACK && entry.subnet.contains(&ip))
    }

    fn on_link_with(&self, a: IpAddr, b: IpAddr) -> bool {
        let (a, b) = (a.to_canonical(), b.to_canonical());
        self.0.iter().any(|entry| entry.subnet.contains(&a) && entry.subnet.contains(&b))
    }

    fn container_addresses(&self, preferred: [Option<u32>; 2]) -> Vec<IpAddr> {
        let mut entries: Vec<&Entry> =
            self.0.iter().filter(|entry| entry.global && entry.interface != LOOPBACK).collect();
        // Stable, so what is equal keeps the kernel's order.
        entries.sort_by_key(|entry| {
            let family = Family::of(entry.own);
            (family, preferred[family as usize] != Some(entry.interface))
        });
        entries.into_iter().map(|entry| entry.own).collect()
    }
}

impl Entry {
    /// `None` for an address that cannot be used: someone else on the link has it.
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
        // On a point-to-point link IFA_ADDRESS is the other end; elsewhere both are the same, and
        // IPv6 then leaves IFA_LOCAL out.
        let own = local.or(address)?;
        let subnet = IpNet::new(address.unwrap_or(own), message.header.prefix_len).ok()?;
        let global = message.header.scope == AddressScope::Universe;
        (!duplicate).then_some(Self { interface: message.header.index, own, subnet, global })
    }

    /// Every IPv4 address in a subnet of `lo` is local (`fib_add_ifaddr` in the kernel's
    /// `net/ipv4/fib_frontend.c`), which is more than 127.0.0.0/8 if someone adds another.
    fn is_loopback_subnet(&self, ip: IpAddr) -> bool {
        self.interface == LOOPBACK && ip.is_ipv4() && self.subnet.contains(&ip)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    /// `interface address/prefix`, of global scope unless in a loopback or link-local range.
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
    fn neighbours_share_a_subnet() {
        let host = host();
        assert!(host.on_link_with(ip("172.30.0.2"), ip("172.30.0.3")));
        assert!(host.on_link_with(ip("::ffff:172.30.0.2"), ip("172.30.0.3")));
        assert!(host.on_link_with(ip("fd30::2"), ip("fd30::3")));
        assert!(!host.on_link_with(ip("203.0.113.9"), ip("172.30.0.2")));
        assert!(!host.on_link_with(ip("fd30::2"), ip("172.30.0.2")));
        assert!(host.is_on_link(ip("203.0.113.9")));
        assert!(!host.is_on_link(ip("198.51.100.1")));
        assert!(!host.is_on_link(ip("127.0.0.1")), "loopback is no link");
    }

    #[test]
    fn a_container_has_ipv4_first_and_the_interface_of_its_default_route() {
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
    fn the_other_end_of_a_point_to_point_link_is_on_link_and_not_local() {
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
    fn an_address_that_someone_else_has_is_left_out() {
        let mut message = AddressMessage::default();
        message.header.prefix_len = 64;
        message.attributes.push(AddressAttribute::Address(ip("fd30::2")));
        message
            .attributes
            .push(AddressAttribute::Flags(AddressFlags::Dadfailed | AddressFlags::Tentative));
        assert_eq!(Entry::parse(&message), None);
    }
}
