//! The overlay networks of this host in the kernel: their VXLAN devices, the entries of these, and
//! the guards.
//!
//! Entries follow the view of the cluster ([`overlay`](crate::overlay)). A frame guard accepts a
//! sender before the kernel sends to it, and until the kernel has stopped to.

use crate::device::{Device, DeviceSpec, HostLink, LinkChanges, Links};
use crate::overlay::{Entries, changes, desired};
use crate::view::View;
use crate::vtep_guard::{VtepGuard, VtepPolicy};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use tidegate_model::{MacAddress, registry};
use tidegate_netfilter::FrameGuard;
use tidegate_netns::Namespace;

/// Key of what could not be programmed at the links of the host. No network has this name.
const LINKS: &str = "*";

/// An overlay network whose bridge exists on this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalNetwork {
    /// Its name.
    pub name: String,
    /// Its VNI.
    pub vni: u32,
    /// Name of the bridge.
    pub bridge: String,
    /// MTU of the network, in bytes.
    pub mtu: u32,
}

/// The kernel's side of the networks.
#[derive(Debug)]
pub struct Programmer {
    links: Links,
    namespace: Namespace,
    vtep: IpAddr,
    guard: VtepGuard,
    /// The link with the VTEP, once it was looked up.
    underlay: Option<HostLink>,
    networks: BTreeMap<String, Programmed>,
    /// What could not be programmed, by network.
    failures: BTreeMap<String, String>,
    /// Objects that other software had removed or changed.
    repairs: u64,
}

#[derive(Debug)]
struct Programmed {
    spec: DeviceSpec,
    device: Device,
    guard: FrameGuard,
    /// The entries in force.
    entries: Entries,
    /// The sandboxes of other hosts, which send from the addresses of clients.
    sandboxes: BTreeSet<MacAddress>,
}

impl Programmer {
    /// Opens the host's `namespace`, on the current runtime. `vtep` is the address of this host.
    ///
    /// # Errors
    /// The kernel lacks nftables or eBPF, which the guards need. The text names the remedy.
    pub fn open(namespace: &Namespace, vtep: IpAddr) -> io::Result<Self> {
        let needs = |what: &str, error: io::Error| {
            io::Error::new(
                error.kind(),
                format!(
                    "{what}: {error}; overlay networks need root and eBPF (CONFIG_BPF_SYSCALL) for their guards, and nftables (CONFIG_NF_TABLES) before Linux 6.6"
                ),
            )
        };
        let guard =
            VtepGuard::open(namespace, vtep).map_err(|error| needs("guard of VXLAN", error))?;
        FrameGuard::new().map_err(|error| needs("guard of VXLAN frames", error))?;
        Ok(Self {
            links: Links::open(namespace)?,
            namespace: namespace.clone(),
            vtep,
            guard,
            underlay: None,
            networks: BTreeMap::new(),
            failures: BTreeMap::new(),
            repairs: 0,
        })
    }

    /// Programs `networks` of the host `own` as `view` has it. What fails is tried again by the
    /// next call.
    pub async fn program(&mut self, networks: &[LocalNetwork], view: &View, own: &str) {
        let vteps = view.nodes.values().map(|node| node.vtep).chain([self.vtep]).collect();
        let vnis = networks.iter().map(|network| network.vni).collect();
        self.failures.retain(|key, _| key == LINKS);
        if self.underlay.is_none() {
            self.follow_links().await;
        }
        let policy = VtepPolicy { vteps, vnis, underlay: self.underlay.clone() };
        if let Err(error) = self.guard.apply(&policy) {
            self.failures.insert(String::new(), format!("guard of VXLAN: {error}"));
        }
        if !self.failures.is_empty() {
            // Without the guard, no device is added.
            return;
        }
        let names: BTreeSet<&str> = networks.iter().map(|network| network.name.as_str()).collect();
        let gone: Vec<String> =
            self.networks.keys().filter(|name| !names.contains(name.as_str())).cloned().collect();
        for name in gone {
            if let Some(old) = self.networks.remove(&name) {
                // The device may have gone with its bridge.
                let _ = old.device.remove().await;
            }
        }
        for network in networks {
            let (entries, _) = desired(view, own, &network.name);
            let sandboxes = view.endpoints_on(&network.name).filter(|(_, one)| one.is_sandbox());
            let sandboxes = sandboxes.map(|(_, one)| one.mac);
            let sandboxes = sandboxes.filter(|mac| entries.stations.contains_key(mac)).collect();
            if let Err(error) = self.program_one(network, &entries, sandboxes).await {
                // What is in force is unknown.
                self.networks.remove(&network.name);
                let failure = format!("network {}: VXLAN device: {error}", network.name);
                self.failures.insert(network.name.clone(), failure);
            }
        }
    }

    async fn program_one(
        &mut self,
        network: &LocalNetwork,
        desired: &Entries,
        sandboxes: BTreeSet<MacAddress>,
    ) -> io::Result<()> {
        let spec = DeviceSpec {
            name: registry::vxlan_name(network.vni),
            bridge: network.bridge.clone(),
            vni: network.vni,
            vtep: self.vtep,
            mtu: network.mtu,
        };
        if self.networks.get(&network.name).is_none_or(|known| known.spec != spec) {
            let guard = FrameGuard::new()?;
            for (mac, address) in senders(desired) {
                guard.allow(mac, address)?;
            }
            let attach = |index| self.namespace.with(|| guard.attach(index))?;
            let device = self.links.ensure(&spec, attach).await?;
            let entries = device.entries().await?;
            let sandboxes = BTreeSet::new();
            let programmed = Programmed { spec, device, guard, entries, sandboxes };
            self.networks.insert(network.name.clone(), programmed);
        }
        let Some(known) = self.networks.get_mut(&network.name) else { return Ok(()) };
        let allowed: BTreeSet<_> = senders(&known.entries).collect();
        let wanted: BTreeSet<_> = senders(desired).collect();
        for (mac, address) in wanted.difference(&allowed) {
            known.guard.allow(*mac, *address)?;
        }
        for mac in sandboxes.difference(&known.sandboxes) {
            known.guard.allow_any(*mac)?;
        }
        for change in changes(desired, &known.entries) {
            known.device.execute(&change).await?;
            known.entries.execute(&change);
        }
        for (mac, address) in allowed.difference(&wanted) {
            known.guard.forbid(*mac, *address)?;
        }
        for mac in known.sandboxes.difference(&sandboxes) {
            known.guard.forbid_any(*mac)?;
        }
        known.sandboxes = sandboxes;
        Ok(())
    }

    /// Adapts the guard to the links of the host. Returns the number of links that had lost it.
    pub async fn follow_links(&mut self) -> usize {
        let (links, holder) =
            match (self.links.host_links().await, self.links.holder(self.vtep).await) {
                (Ok(links), Ok(holder)) => (links, holder),
                (Err(error), _) | (_, Err(error)) => {
                    self.failures.insert(LINKS.into(), format!("guard of VXLAN: links: {error}"));
                    return 0;
                }
            };
        self.underlay = links.iter().find(|link| Some(link.index) == holder).cloned();
        match self.guard.follow(&links) {
            Ok(lost) => {
                self.failures.remove(LINKS);
                lost
            }
            Err(error) => {
                self.failures.insert(LINKS.into(), format!("guard of VXLAN: {error}"));
                0
            }
        }
    }

    /// Compares the kernel with what was programmed, and restores what other software has changed.
    /// Networks that have to be programmed again are left to the next [`program`](Self::program).
    /// Returns descriptions of what was restored.
    pub async fn repair(&mut self) -> Vec<String> {
        let mut restored = Vec::new();
        let lost = self.follow_links().await;
        if lost > 0 {
            restored.push(format!("guards of VXLAN at {lost} links"));
        }
        match self.guard.repair() {
            Ok(true) => restored.push("rules that guard VXLAN".to_owned()),
            Ok(false) => {}
            Err(error) => drop(self.failures.insert(String::new(), error.to_string())),
        }
        let mut lost = Vec::new();
        for (name, known) in &mut self.networks {
            let is_guarded =
                self.namespace.with(|| known.guard.is_attached(known.device.index())).flatten();
            match is_guarded {
                Ok(true) => {}
                Ok(false) => {
                    let attached =
                        self.namespace.with(|| known.guard.attach(known.device.index())).flatten();
                    if attached.is_ok() {
                        restored.push(format!("guard of {}", known.spec.name));
                    }
                }
                Err(_) => {
                    restored.push(format!("VXLAN device {}", known.spec.name));
                    lost.push(name.clone());
                    continue;
                }
            }
            let Ok(found) = known.device.entries().await else { continue };
            if found != known.entries {
                let difference = changes(&known.entries, &found);
                let mut done = 0;
                for change in &difference {
                    done += usize::from(known.device.execute(change).await.is_ok());
                }
                restored.push(format!("{done} entries of {}", known.spec.name));
            }
        }
        for name in lost {
            self.networks.remove(&name);
        }
        self.repairs += restored.len() as u64;
        restored
    }

    /// Removes all devices and rules, also those of a previous process.
    ///
    /// # Errors
    /// Errors of the kernel.
    pub async fn remove(&mut self) -> io::Result<()> {
        self.networks.clear();
        self.links.sweep(&BTreeSet::new()).await?;
        self.guard.remove()
    }

    /// Removes devices of networks that are not in `networks`: those of a previous process.
    ///
    /// # Errors
    /// Errors of the kernel.
    pub async fn sweep(&self, networks: &[LocalNetwork]) -> io::Result<Vec<String>> {
        let kept = networks.iter().map(|network| registry::vxlan_name(network.vni)).collect();
        self.links.sweep(&kept).await
    }

    /// Notifications after which [`follow_links`](Self::follow_links) is due. `None` if it never
    /// is.
    ///
    /// # Errors
    /// Errors of the kernel.
    pub fn link_changes(&self) -> io::Result<Option<LinkChanges>> {
        self.guard.follows_links().then(|| LinkChanges::open(&self.namespace)).transpose()
    }

    /// What could not be programmed.
    pub fn failures(&self) -> impl Iterator<Item = &String> {
        self.failures.values()
    }

    /// Number of objects that were restored.
    #[must_use]
    pub fn repairs(&self) -> u64 {
        self.repairs
    }

    /// Figures by network.
    pub fn figures(&self) -> BTreeMap<String, NetworkFigures> {
        let figures = |known: &Programmed| NetworkFigures {
            stations: known.entries.stations.len(),
            dropped: known.guard.dropped().unwrap_or_default(),
        };
        self.networks.iter().map(|(name, known)| (name.clone(), figures(known))).collect()
    }
}

/// Figures of one network on this host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NetworkFigures {
    /// Endpoints of other hosts that are programmed.
    pub stations: usize,
    /// Frames from other hosts that were dropped, because their source is no endpoint.
    pub dropped: u64,
}

/// The sources that frames of other hosts may have.
fn senders(entries: &Entries) -> impl Iterator<Item = (MacAddress, IpAddr)> + '_ {
    entries.neighbours.iter().map(|(address, mac)| (*mac, *address))
}
