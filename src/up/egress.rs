//! Egress of a project's networks where no firewall masquerades: the NAT engine, behind a TUN
//! device.
//!
//! To containers it is the host, at an address of its own ([`registry::ENGINE_ADDRESSES`]): there
//! it answers DNS with what the host's servers say, and, if that was asked for, what the host has
//! on its loopback. By the same device come datagrams for published ports
//! ([`NatPublisher`](crate::nat_publish::NatPublisher)).

use super::layout::{Layout, fnv};
use crate::compose::Project;
use crate::host_context::HostContext;
use crate::port_guards::bridge_programs;
use rustix::process::{Resource, getrlimit};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, OnceLock, Weak};
use tidegate_model::{CidrSet, Feature, registry};
use tidegate_nat::{
    FloodListener, Nat, Policy, PolicyNetwork, Settings, StartError, Tun, TunOptions,
};
use tidegate_netns::{Family, Namespace, interface_index};
use tidegate_netsetup::{EngineDevice, NatIsolation, Network, Observed};
use tidegate_reactor::Descriptors;

/// Tables that are tried.
const ATTEMPTS: u32 = 16;

/// Descriptors that the engine may have at most: one for each flow.
const MOST_DESCRIPTORS: usize = 16_384;

/// How many flows containers may have, as far as can be set.
#[derive(Clone, Copy, Debug)]
pub struct NatLimits {
    /// In all.
    pub flows: u32,
    /// Of one endpoint.
    pub endpoint_flows: u32,
    /// Of one endpoint, those that nobody has answered.
    pub unanswered: u32,
}

impl Default for NatLimits {
    fn default() -> Self {
        Self { flows: 65_536, endpoint_flows: 16_384, unanswered: 1024 }
    }
}

/// The device, before there are networks.
#[derive(Debug)]
pub(super) struct Device {
    project: Arc<str>,
    tun: Tun,
    table: u32,
    link: Arc<DeviceLink>,
}

/// What the link of the device is made by, again if it has gone.
#[derive(Debug)]
pub(super) struct DeviceLink {
    namespace: Namespace,
    options: TunOptions,
    index: u32,
    /// Set once the engine runs. It ends when its owners let it go.
    nat: OnceLock<Weak<Nat>>,
}

impl DeviceLink {
    fn open(namespace: &Namespace, options: TunOptions) -> Result<(Tun, Self), StartError> {
        let tun = Tun::open(namespace, &options)?;
        let index = namespace.with(|| interface_index(&options.name)).flatten();
        let index =
            index.map_err(|source| StartError::Interface { name: options.name.clone(), source })?;
        // Programs at bridges know the device by its index. Its routes come after it.
        let options = TunOptions { index: Some(index), default_routes: Vec::new(), ..options };
        Ok((tun, Self { namespace: namespace.clone(), options, index, nat: OnceLock::new() }))
    }
}

impl EngineDevice for DeviceLink {
    fn index(&self) -> u32 {
        self.index
    }

    fn reopen(&self) -> io::Result<()> {
        // The engine's device may have another name now, and is not closed for one that cannot be
        // made.
        if self.namespace.with(|| interface_index(&self.options.name)).flatten().is_ok() {
            return Err(io::Error::new(
                io::ErrorKind::AlreadyExists,
                "another interface has its name",
            ));
        }
        let nat = self.nat.get().and_then(Weak::upgrade).ok_or(io::ErrorKind::NotConnected)?;
        nat.replace_device(|| Tun::open(&self.namespace, &self.options)).map_err(io::Error::other)
    }
}

impl Device {
    /// Makes the device of `project` where its networks will be.
    ///
    /// # Errors
    /// What is missing.
    pub(super) fn open(host_context: &HostContext, project: &Project) -> Result<Self, StartError> {
        if Feature::Tun.is_forced_off() {
            return Err(StartError::Device(io::ErrorKind::NotFound.into()));
        }
        let hash = fnv(project.name.as_bytes());
        let name = format!("{}t-{:08x}", registry::INTERFACE_PREFIX, hash as u32);
        let has_v6 = project.networks.values().any(|network| {
            let given = network.subnets.iter().any(|one| one.subnet.addr().is_ipv6());
            !network.internal && (network.enable_ipv6 || given)
        });
        let default_routes = if has_v6 { Family::ALL.to_vec() } else { vec![Family::V4] };
        let mut number = hash % u64::from(registry::EGRESS_TABLES);
        for attempt in 1.. {
            let table = registry::FIRST_EGRESS_TABLE + number as u32;
            let options = TunOptions {
                default_routes: default_routes.clone(),
                table,
                ..TunOptions::new(name.clone())
            };
            match DeviceLink::open(host_context.networks(), options) {
                // Another project has its routes there.
                Err(StartError::Interface { source, .. })
                    if source.kind() == io::ErrorKind::AlreadyExists && attempt < ATTEMPTS => {}
                opened => {
                    let (project, (tun, link)) = (project.name.as_str().into(), opened?);
                    return Ok(Self { project, tun, table, link: Arc::new(link) });
                }
            }
            number = (number + 1) % u64::from(registry::EGRESS_TABLES);
        }
        Err(StartError::Name(name))
    }

    /// How networks are led to it.
    pub(super) fn isolation(&self) -> NatIsolation {
        let device = self.tun.name().to_owned();
        NatIsolation { device, table: self.table, programs: bridge_programs() }
    }

    /// What restores its link.
    pub(super) fn link(&self) -> Arc<DeviceLink> {
        Arc::clone(&self.link)
    }

    /// Starts the engine for the networks of `layout`, on a host that has what was `observed`.
    /// `floods` hears which endpoints flood.
    ///
    /// # Errors
    /// What is missing.
    pub(super) fn start(
        self,
        layout: &Layout,
        observed: &Observed,
        host_context: &HostContext,
        host_loopback: bool,
        limits: NatLimits,
        floods: Option<Arc<dyn FloodListener>>,
    ) -> Result<Egress, StartError> {
        let mut settings = Settings::new(self.tun.mtu());
        settings.network = self.project;
        settings.floods = floods;
        let policy = Policy { host_loopback, ..policy(layout, observed) };
        settings.policy.clone_from(&policy);
        // No container has more than a quarter of all flows, or a few could keep the others from
        // having any.
        let share = (descriptors() / 4).max(1);
        settings.limits.flows = limits.flows as usize;
        settings.limits.flows_per_source = share.min(limits.endpoint_flows as usize);
        settings.limits.unanswered_per_source = limits.unanswered as usize;
        let descriptors = Arc::new(Descriptors::new(descriptors()));
        let nat = Arc::new(Nat::start(settings, self.tun, host_context.ports(), descriptors)?);
        // Nobody else sets it.
        let _ = self.link.nat.set(Arc::downgrade(&nat));
        Ok(Egress { nat, policy })
    }
}

/// A running engine, and who may go where by it.
pub(super) struct Egress {
    nat: Arc<Nat>,
    policy: Policy,
}

impl Egress {
    /// The engine.
    pub(super) fn nat(&self) -> &Arc<Nat> {
        &self.nat
    }

    /// What containers are to reach as little as before, on a host that has what was `observed`.
    pub(super) fn look_again(&mut self, layout: &Layout, observed: &Observed) {
        let Policy { host_loopback, resolvers, .. } = std::mem::take(&mut self.policy);
        self.set(Policy { host_loopback, resolvers, ..policy(layout, observed) });
    }

    /// The host's DNS servers from here on.
    pub(super) fn set_resolvers(&mut self, resolvers: &[SocketAddr]) {
        let policy = std::mem::take(&mut self.policy);
        self.set(Policy { resolvers: resolvers.to_vec(), ..policy });
    }

    fn set(&mut self, policy: Policy) {
        self.policy = policy;
        self.nat.set_policy(self.policy.clone());
    }
}

/// The addresses of `endpoint` from which its answers go to the engine: those of the network that
/// its default route leads into.
pub(super) fn behind_it(layout: &Layout, endpoint: &str) -> Vec<IpAddr> {
    let endpoint = layout.desired.endpoints.iter().find(|one| one.name == endpoint);
    let attachments = endpoint.map(|one| one.attachments.as_slice()).unwrap_or_default();
    let there = attachments.iter().filter(|one| one.default_route);
    there.flat_map(|one| &one.addresses).map(ipnet::IpNet::addr).collect()
}

/// How many descriptors the engine may have: a quarter of what the process may.
pub(super) fn descriptors() -> usize {
    let limit =
        getrlimit(Resource::Nofile).current.map_or(MOST_DESCRIPTORS, |limit| limit as usize / 4);
    limit.min(MOST_DESCRIPTORS)
}

/// The engine's connects are the host's own: what networks shall not reach by way of the host has
/// to be refused here.
pub(super) fn policy(layout: &Layout, observed: &Observed) -> Policy {
    let networks = &layout.desired.networks;
    let subnets = |internal: bool| {
        let of = networks.iter().filter(move |network| internal || !network.internal);
        of.flat_map(|network| &network.subnets).map(|subnet| subnet.subnet.trunc())
    };
    let is_containers =
        |link: &str| is_bridge_of_containers(link) || observed.bridges.contains_key(link);
    let of_others = observed.routes.iter().filter(|(_, link)| is_containers(link));
    let with_egress = networks.iter().filter(|network| !network.internal);
    let own_share = |network: &Network| PolicyNetwork {
        name: network.name.clone(),
        subnets: network.subnets.iter().map(|one| one.subnet.trunc()).collect(),
    };
    Policy {
        sources: subnets(false).collect(),
        networks: with_egress.map(own_share).collect(),
        gateways: registry::ENGINE_ADDRESSES.to_vec(),
        refused: subnets(true).chain(of_others.map(|(net, _)| net.trunc())).collect::<CidrSet>(),
        // As with a firewall: what the host reaches.
        metadata: true,
        ..Policy::default()
    }
}

/// Whether `link` is a bridge that containers are on, somebody else's or ours.
pub(super) fn is_bridge_of_containers(link: &str) -> bool {
    // Docker's are `br-` and twelve digits; others call their own uplink `br-lan`.
    if let Some(id) = link.strip_prefix("br-") {
        return id.len() == 12 && id.bytes().all(|byte| byte.is_ascii_hexdigit());
    }
    registry::BRIDGES_OF_OTHERS.iter().any(|name| match name.strip_suffix('+') {
        Some(prefix) => link.starts_with(prefix),
        None => link == *name,
    }) || link.starts_with(registry::INTERFACE_PREFIX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bridges_of_others_are_known_by_their_names() {
        for (link, is) in [
            ("docker0", true),
            ("br-0123456789ab", true),
            ("virbr0", true),
            ("tg-front-1a2b", true),
        ] {
            assert_eq!(is_bridge_of_containers(link), is, "{link}");
        }
        for link in ["eth0", "br0", "wg0", "docker01", "br-lan", "br-ex"] {
            assert!(!is_bridge_of_containers(link), "{link}");
        }
    }
}
