//! The VXLAN device of an overlay network on this host, and its entries in the kernel.
//!
//! The device is a port of the bridge of the network, without learning and flooding, so the entries
//! alone decide where a frame goes. Both forwarding databases need an entry for a remote MAC
//! address: that of the device (`self`: the VTEP) and that of the bridge (`master`: the port). The
//! bridge answers ARP and neighbour solicitations for remote addresses itself, from permanent
//! neighbour entries (`neigh_suppress`).

use crate::overlay::{Change, Entries, changes};
use futures_util::stream::BoxStream;
use futures_util::{FutureExt, StreamExt, TryStreamExt};
use rtnetlink::packet_core::ErrorMessage;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::AddressAttribute;
use rtnetlink::packet_route::link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage};
use rtnetlink::packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use rtnetlink::{Handle, LinkBridgePort, LinkUnspec, LinkVxlan, MulticastGroup};
use rustix::io::Errno;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;
use tidegate_model::MacAddress;
use tidegate_netns::Namespace;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until};

/// UDP port of VXLAN (RFC 7348, 8.1).
pub const PORT: u16 = 4789;

/// Bytes that VXLAN adds to an IP packet: the outer IP and UDP headers, the VXLAN header and the
/// inner Ethernet header.
#[must_use]
pub const fn overhead(vtep: &IpAddr) -> u32 {
    match vtep {
        IpAddr::V4(_) => 20 + 8 + 8 + 14,
        IpAddr::V6(_) => 40 + 8 + 8 + 14,
    }
}

/// Start of the alias of a device, by which it is recognised. The parameters follow.
const ALIAS: &str = "tidegate overlay network";

/// A VXLAN device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceSpec {
    /// Name of the device.
    pub name: String,
    /// Name of the bridge, which must exist.
    pub bridge: String,
    /// The VNI of the network.
    pub vni: u32,
    /// The VTEP of this host: the source of its VXLAN packets.
    pub vtep: IpAddr,
    /// Its MTU: at most that of the underlay, less the [`overhead`].
    pub mtu: u32,
}

impl DeviceSpec {
    /// The alias of the device. A device with another one is replaced.
    fn alias(&self) -> String {
        format!("{ALIAS} {} {} {}", self.vni, self.vtep, self.mtu)
    }
}

/// The links of a namespace, through an rtnetlink socket.
#[derive(Debug)]
pub struct Links {
    namespace: Namespace,
    handle: Handle,
    task: JoinHandle<()>,
}

/// A VXLAN device that exists.
#[derive(Clone, Debug)]
pub struct Device {
    handle: Handle,
    device: u32,
    bridge: u32,
}

impl Drop for Links {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Links {
    /// Opens a socket in `namespace`, on the current runtime.
    ///
    /// # Errors
    /// Errors of the kernel.
    pub fn open(namespace: &Namespace) -> io::Result<Self> {
        let (handle, task) = crate::underlay::connect(namespace)?;
        Ok(Self { namespace: namespace.clone(), handle, task })
    }

    /// Returns the device of `spec` as a port of its bridge. An existing one that was created for
    /// the same `spec` is kept with its entries, and another one of tidegate is replaced. `guard`
    /// is called with the index of the device before it carries a frame.
    ///
    /// # Errors
    /// Errors of the kernel: `EEXIST` if a link of other software has the name, or the VNI is in
    /// use by another device, `ENOENT` if the bridge does not exist; errors of `guard`.
    pub async fn ensure(
        &self,
        spec: &DeviceSpec,
        guard: impl FnOnce(u32) -> io::Result<()>,
    ) -> io::Result<Device> {
        let bridge = self.find(&spec.bridge).await?.ok_or(io::ErrorKind::NotFound)?.index;
        let mut found = self.find(&spec.name).await?;
        if let Some(link) = &found {
            let Some(alias) = link.alias.as_ref().filter(|alias| alias.starts_with(ALIAS)) else {
                return Err(io::ErrorKind::AlreadyExists.into());
            };
            let joins = link.controller.is_none_or(|controller| controller == bridge);
            if *alias != spec.alias() || !joins {
                self.handle.link().del(link.index).execute().await.map_err(error)?;
                found = None;
            }
        }
        let device = match found {
            Some(link) => link.index,
            None => self.create(spec).await?,
        };
        let device = Device { handle: self.handle.clone(), device, bridge };
        let joined = async {
            self.configure(&spec.name)?;
            guard(device.device)?;
            device.join_bridge().await
        };
        let joined = joined.await;
        if joined.is_err() {
            let _ = device.remove().await;
        }
        joined.map(|()| device)
    }

    async fn create(&self, spec: &DeviceSpec) -> io::Result<u32> {
        let link = LinkVxlan::new(&spec.name, spec.vni).port(PORT).learning(false).mtu(spec.mtu);
        let link = match spec.vtep {
            IpAddr::V4(vtep) => link.local(vtep),
            IpAddr::V6(vtep) => link.local6(vtep),
        };
        let link = link.append_extra_attribute(LinkAttribute::IfAlias(spec.alias()));
        self.handle.link().add(link.build()).execute().await.map_err(error)?;
        let created = self.find(&spec.name).await?.ok_or(io::ErrorKind::NotFound)?;
        if created.alias.is_none() {
            // Not every kernel takes the alias of a new link.
            let alias = LinkAttribute::IfAlias(spec.alias());
            let alias = LinkUnspec::new_with_index(created.index).append_extra_attribute(alias);
            self.handle.link().set(alias.build()).execute().await.map_err(error)?;
        }
        Ok(created.index)
    }

    /// As at other bridge ports, no packet is for the host.
    fn configure(&self, name: &str) -> io::Result<()> {
        for (setting, value) in [("rp_filter", "1"), ("arp_ignore", "8")] {
            self.namespace.set_sysctl(&format!("net.ipv4.conf.{name}.{setting}"), value)?;
        }
        match self.namespace.set_sysctl(&format!("net.ipv6.conf.{name}.disable_ipv6"), "1") {
            // Without IPv6 in the kernel.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            set => set,
        }
    }

    /// Removes the devices of overlay networks whose names are not in `kept`. Returns their names.
    ///
    /// # Errors
    /// Errors of the kernel.
    pub async fn sweep(&self, kept: &BTreeSet<String>) -> io::Result<Vec<String>> {
        let mut links = self.handle.link().get().execute();
        let mut stale = Vec::new();
        while let Some(message) = links.try_next().await.map_err(error)? {
            let link = Link::of(&message);
            let is_ours = link.alias.is_some_and(|alias| alias.starts_with(ALIAS));
            if let Some(name) = link.name.filter(|name| is_ours && !kept.contains(name)) {
                stale.push((name, link.index));
            }
        }
        let mut removed = Vec::new();
        for (name, index) in stale {
            accept_absent(self.handle.link().del(index).execute().await.map_err(error))?;
            removed.push(name);
        }
        Ok(removed)
    }

    /// Returns the links on which the host receives packets: all but the devices of overlay
    /// networks, bridge ports, and links whose packets go to the reader of a device.
    ///
    /// # Errors
    /// Errors of the kernel.
    pub async fn host_links(&self) -> io::Result<Vec<HostLink>> {
        let mut links = self.handle.link().get().execute();
        let mut all = Vec::new();
        while let Some(message) = links.try_next().await.map_err(error)? {
            all.push(Link::of(&message));
        }
        let bridges: BTreeSet<u32> =
            all.iter().filter(|link| link.is_bridge).map(|link| link.index).collect();
        let is_of_host = |link: &Link| {
            let is_port = link.controller.is_some_and(|index| bridges.contains(&index));
            let is_overlay = link.alias.as_ref().is_some_and(|alias| alias.starts_with(ALIAS));
            !(is_port || is_overlay || link.is_tap)
        };
        let links = all.into_iter().filter(is_of_host);
        let links = links.filter_map(|link| {
            Some(HostLink { index: link.index, name: link.name?, is_bridge: link.is_bridge })
        });
        Ok(links.collect())
    }

    /// Returns the interface index of the link with `address`.
    ///
    /// # Errors
    /// Errors of the kernel.
    pub async fn holder(&self, address: IpAddr) -> io::Result<Option<u32>> {
        let mut found = self.handle.address().get().set_address_filter(address).execute();
        while let Some(message) = found.try_next().await.map_err(error)? {
            let is_it = message.attributes.iter().any(|attribute| match attribute {
                AddressAttribute::Local(ip) | AddressAttribute::Address(ip) => *ip == address,
                _ => false,
            });
            if is_it {
                return Ok(Some(message.header.index));
            }
        }
        Ok(None)
    }

    async fn find(&self, name: &str) -> io::Result<Option<Link>> {
        let mut found = self.handle.link().get().match_name(name.to_owned()).execute();
        match found.try_next().await.map_err(error) {
            Ok(message) => Ok(message.as_ref().map(Link::of)),
            Err(error) if error.raw_os_error() == Some(Errno::NODEV.raw_os_error()) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// A link on which the host receives packets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostLink {
    /// Interface index.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Whether it is a bridge.
    pub is_bridge: bool,
}

/// Notifications about the links of a namespace.
pub struct LinkChanges {
    messages: BoxStream<'static, ()>,
    /// When the first notification that was not reported yet is due.
    due: Option<Instant>,
    task: JoinHandle<()>,
}

impl LinkChanges {
    /// Time from a notification to its report. Changes come in groups.
    const PAUSE: Duration = Duration::from_millis(20);

    /// Subscribes in `namespace`, on the current runtime.
    ///
    /// # Errors
    /// Errors of the kernel.
    pub fn open(namespace: &Namespace) -> io::Result<Self> {
        let open = || rtnetlink::new_multicast_connection(&[MulticastGroup::Link]);
        let (task, _, messages) = crate::underlay::spawn(namespace, open)?;
        Ok(Self { messages: messages.map(drop).boxed(), due: None, task })
    }

    /// Waits until links have changed. Dropping the future loses no change.
    pub async fn changed(&mut self) {
        let due = match self.due {
            Some(due) => due,
            None if self.messages.next().await.is_none() => return std::future::pending().await,
            None => *self.due.insert(Instant::now() + Self::PAUSE),
        };
        sleep_until(due).await;
        while let Some(Some(())) = self.messages.next().now_or_never() {}
        self.due = None;
    }
}

impl std::fmt::Debug for LinkChanges {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LinkChanges").field("due", &self.due).finish_non_exhaustive()
    }
}

impl Drop for LinkChanges {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A link as the kernel reports it.
struct Link {
    index: u32,
    name: Option<String>,
    alias: Option<String>,
    controller: Option<u32>,
    is_bridge: bool,
    /// A macvtap or ipvtap link: the reader of its device receives its packets, not the host.
    is_tap: bool,
}

impl Link {
    fn of(message: &LinkMessage) -> Self {
        let mut link = Self {
            index: message.header.index,
            name: None,
            alias: None,
            controller: None,
            is_bridge: false,
            is_tap: false,
        };
        for attribute in &message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name = Some(name.clone()),
                LinkAttribute::IfAlias(alias) => link.alias = Some(alias.clone()),
                LinkAttribute::Controller(index) => link.controller = Some(*index),
                LinkAttribute::LinkInfo(info) => {
                    let is = |kind| info.contains(&LinkInfo::Kind(kind));
                    link.is_bridge = is(InfoKind::Bridge);
                    link.is_tap = is(InfoKind::MacVtap) || is(InfoKind::Other("ipvtap".into()));
                }
                _ => {}
            }
        }
        link
    }
}

impl Device {
    async fn join_bridge(&self) -> io::Result<()> {
        let Self { handle, device, bridge } = self;
        let enslave = LinkUnspec::new_with_index(*device).controller(*bridge).build();
        handle.link().set(enslave).execute().await.map_err(error)?;
        let port = LinkBridgePort::new(*device)
            .learning(false)
            .flood(false)
            .mcast_flood(false)
            .bcast_flood(false)
            .neigh_suppress(true)
            .build();
        handle.link().set_port(port).execute().await.map_err(error)?;
        // Up last: it carries no frame before its port is configured.
        let up = LinkUnspec::new_with_index(*device).up().build();
        handle.link().set(up).execute().await.map_err(error)
    }

    /// Removes the device, with its entries. The neighbour entries of the bridge stay.
    ///
    /// # Errors
    /// Errors of the kernel.
    pub async fn remove(&self) -> io::Result<()> {
        self.handle.link().del(self.device).execute().await.map_err(error)
    }

    /// Returns the interface index of the device.
    #[must_use]
    pub fn index(&self) -> u32 {
        self.device
    }

    /// Returns the entries that the kernel holds.
    ///
    /// # Errors
    /// Errors of the kernel.
    pub async fn entries(&self) -> io::Result<Entries> {
        let mut entries = Entries::default();
        let (mut vteps, mut ports) = (BTreeMap::new(), BTreeSet::new());
        let mut found = self.neighbours(AddressFamily::Bridge);
        while let Some(message) = found.try_next().await.map_err(error)? {
            let Some(mac) = mac(&message).filter(|_| message.header.ifindex == self.device) else {
                continue;
            };
            if message.header.flags.contains(NeighbourFlags::Own) {
                vteps.extend(destination(&message).map(|vtep| (mac, vtep)));
            } else if message.header.state == NeighbourState::Noarp {
                ports.insert(mac);
            }
        }
        for mac in ports.union(&vteps.keys().copied().collect()) {
            // An incomplete pair is none of the desired ones, and is replaced.
            let vtep = vteps.get(mac).filter(|_| ports.contains(mac)).copied();
            entries.stations.insert(*mac, vtep.unwrap_or(Ipv4Addr::UNSPECIFIED.into()));
        }
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut found = self.neighbours(family);
            while let Some(message) = found.try_next().await.map_err(error)? {
                let is_ours = message.header.ifindex == self.bridge
                    && message.header.state == NeighbourState::Permanent;
                if let (true, Some(mac), Some(address)) =
                    (is_ours, mac(&message), destination(&message))
                {
                    entries.neighbours.insert(address, mac);
                }
            }
        }
        Ok(entries)
    }

    fn neighbours(
        &self,
        family: AddressFamily,
    ) -> impl futures_util::TryStream<Ok = NeighbourMessage, Error = rtnetlink::Error> + Unpin {
        let request = self.handle.neighbours().get().set_address_family(family);
        Box::pin(request.execute())
    }

    /// Makes the entries of the kernel equal to `desired`. Returns the number of changes.
    ///
    /// # Errors
    /// Errors of the kernel. The changes before the failed one are in force.
    pub async fn reconcile(&self, desired: &Entries) -> io::Result<usize> {
        let changes = changes(desired, &self.entries().await?);
        for change in &changes {
            self.execute(change).await?;
        }
        Ok(changes.len())
    }

    /// Executes one change.
    ///
    /// # Errors
    /// Errors of the kernel.
    pub async fn execute(&self, change: &Change) -> io::Result<()> {
        let neighbours = self.handle.neighbours();
        match change {
            Change::AddStation(mac, vtep) => {
                let entry = neighbours.add_bridge(self.device, &mac.0).replace();
                let entry = entry.destination(*vtep).state(NeighbourState::Permanent);
                entry.flags(NeighbourFlags::Own).execute().await.map_err(error)?;
                let entry = neighbours.add_bridge(self.device, &mac.0).replace();
                let entry = entry.state(NeighbourState::Noarp);
                entry.flags(NeighbourFlags::Controller).execute().await.map_err(error)
            }
            Change::RemoveStation(mac) => {
                for flags in [NeighbourFlags::Controller, NeighbourFlags::Own] {
                    let mut entry = neighbours.add_bridge(self.device, &mac.0).flags(flags);
                    let entry = entry.message_mut().clone();
                    accept_absent(neighbours.del(entry).execute().await.map_err(error))?;
                }
                Ok(())
            }
            Change::AddNeighbour(address, mac) => {
                let entry = neighbours.add(self.bridge, *address).replace();
                let entry = entry.state(NeighbourState::Permanent).link_layer_address(&mac.0);
                entry.execute().await.map_err(error)
            }
            Change::RemoveNeighbour(address) => {
                let mut entry = neighbours.add(self.bridge, *address);
                let entry = entry.message_mut().clone();
                accept_absent(neighbours.del(entry).execute().await.map_err(error))
            }
        }
    }
}

fn mac(message: &NeighbourMessage) -> Option<MacAddress> {
    message.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::LinkLayerAddress(bytes) => {
            bytes.as_slice().try_into().ok().map(MacAddress)
        }
        _ => None,
    })
}

fn destination(message: &NeighbourMessage) -> Option<IpAddr> {
    message.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::Destination(NeighbourAddress::Inet(ip)) => Some(IpAddr::V4(*ip)),
        NeighbourAttribute::Destination(NeighbourAddress::Inet6(ip)) => Some(IpAddr::V6(*ip)),
        // In entries of the family AF_BRIDGE.
        NeighbourAttribute::Destination(NeighbourAddress::Other(bytes)) => {
            let v4 = || Some(IpAddr::from(<[u8; 4]>::try_from(bytes.as_slice()).ok()?));
            let v6 = || Some(IpAddr::from(<[u8; 16]>::try_from(bytes.as_slice()).ok()?));
            v4().or_else(v6)
        }
        _ => None,
    })
}

fn accept_absent(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

fn error(error: rtnetlink::Error) -> io::Error {
    match error {
        rtnetlink::Error::NetlinkError(ErrorMessage { code: Some(code), .. }) => {
            io::Error::from_raw_os_error(code.get().abs())
        }
        error => io::Error::other(error),
    }
}
