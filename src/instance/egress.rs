//! Egress of a project's networks without a firewall: the NAT engine on a TUN device.
//!
//! Containers reach the host at an address of the engine ([`registry::ENGINE_ADDRESSES`]). There it
//! forwards DNS queries to the host's servers and, with `--allow-host-loopback`, connections to the
//! host's loopback. The device also carries the datagrams of UDP ports that the engine publishes
//! ([`NatPublisher`](tidegate_publish::nat_publish::NatPublisher)).

use super::flood_control::FloodControl;
use super::layout::Layout;
use crate::port_guards::bridge_programs;
use rustix::process::{Resource, getrlimit};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, OnceLock, Weak};
use tidegate_model::{CidrSet, Feature, registry};
use tidegate_nat::{Nat, Policy, PolicyNetwork, Settings, StartError, Tun, TunOptions};
use tidegate_netns::HostContext;
use tidegate_netns::{Family, Namespace, interface_index};
use tidegate_netsetup::{EngineDevice, NatIsolation, Network, Observed};
use tidegate_publish::limits::HeldBytes;
use tidegate_reactor::Descriptors;

/// Maximum number of routing tables to try.
const MAX_TABLE_ATTEMPTS: u32 = 16;

/// Maximum number of file descriptors of the engine. Each flow uses one.
const MAX_DESCRIPTORS: usize = 16_384;

/// Configurable flow limits of the NAT engine.
#[derive(Clone, Copy, Debug)]
pub struct NatLimits {
    /// All flows. Default: 65536.
    pub flows: u32,
    /// Flows of one endpoint. Default: 16384.
    pub endpoint_flows: u32,
    /// Unanswered flows of one endpoint. Default: 1024.
    pub unanswered: u32,
    /// Memory for data of connections that one side does not take.
    pub held: HeldBytes,
}

impl Default for NatLimits {
    fn default() -> Self {
        Self { flows: 65_536, endpoint_flows: 16_384, unanswered: 1024, held: HeldBytes::default() }
    }
}

/// The TUN device, before the engine runs.
#[derive(Debug)]
pub(super) struct Device {
    owner: Arc<str>,
    tun: Tun,
    table: u32,
    link: Arc<DeviceLink>,
}

/// Recreates the link of the device if it is removed.
#[derive(Debug)]
pub(super) struct DeviceLink {
    namespace: Namespace,
    options: TunOptions,
    index: u32,
    /// Set once the engine runs. Weak, so that it does not keep the engine alive.
    nat: OnceLock<Weak<Nat>>,
}

impl DeviceLink {
    fn open(namespace: &Namespace, options: TunOptions) -> Result<(Tun, Self), StartError> {
        let tun = Tun::open(namespace, &options)?;
        let index = namespace.with(|| interface_index(&options.name)).flatten();
        let index =
            index.map_err(|source| StartError::Interface { name: options.name.clone(), source })?;
        // BPF programs at bridges refer to the device by its index, so it has to stay the same. A
        // repair adds the routes after the device.
        let options = TunOptions { index: Some(index), default_routes: Vec::new(), ..options };
        Ok((tun, Self { namespace: namespace.clone(), options, index, nat: OnceLock::new() }))
    }
}

impl EngineDevice for DeviceLink {
    fn index(&self) -> u32 {
        self.index
    }

    fn reopen(&self) -> io::Result<()> {
        // If the name is taken, the new device cannot be created. The engine then keeps its current
        // one, which may have been renamed.
        if self.namespace.with(|| interface_index(&self.options.name)).flatten().is_ok() {
            return Err(io::Error::new(
                io::ErrorKind::AlreadyExists,
                format!("interface name {:?} is in use", self.options.name),
            ));
        }
        let nat = self.nat.get().and_then(Weak::upgrade).ok_or(io::ErrorKind::NotConnected)?;
        nat.replace_device(|| Tun::open(&self.namespace, &self.options)).map_err(io::Error::other)
    }
}

impl Device {
    /// Creates the device of the networks of `owner` in their namespace, with a default route for
    /// IPv4 and, with `v6`, for IPv6.
    ///
    /// # Errors
    /// There is no `/dev/net/tun`, or the device or its routes cannot be created.
    pub(super) fn open(
        host_context: &HostContext,
        owner: &str,
        v6: bool,
    ) -> Result<Self, StartError> {
        if Feature::Tun.is_forced_off() {
            return Err(StartError::Device(io::ErrorKind::NotFound.into()));
        }
        let hash = registry::folded_hash(owner.as_bytes());
        let name = format!("{}t-{:08x}", registry::INTERFACE_PREFIX, hash as u32);
        let default_routes = if v6 { Family::ALL.to_vec() } else { vec![Family::V4] };
        let mut number = hash % u64::from(registry::EGRESS_TABLES);
        for attempt in 1.. {
            let table = registry::FIRST_EGRESS_TABLE + number as u32;
            let options = TunOptions {
                default_routes: default_routes.clone(),
                table,
                ..TunOptions::new(name.clone())
            };
            match DeviceLink::open(host_context.networks(), options) {
                // Another project uses this table.
                Err(StartError::Interface { source, .. })
                    if source.kind() == io::ErrorKind::AlreadyExists
                        && attempt < MAX_TABLE_ATTEMPTS => {}
                opened => {
                    let (owner, (tun, link)) = (owner.into(), opened?);
                    return Ok(Self { owner, tun, table, link: Arc::new(link) });
                }
            }
            number = (number + 1) % u64::from(registry::EGRESS_TABLES);
        }
        Err(StartError::Name(name))
    }

    /// Returns the isolation that routes egress of networks to the device.
    pub(super) fn isolation(&self) -> NatIsolation {
        let device = self.tun.name().to_owned();
        NatIsolation { device, table: self.table, programs: bridge_programs() }
    }

    /// Returns the handle that recreates the device.
    pub(super) fn link(&self) -> Arc<DeviceLink> {
        Arc::clone(&self.link)
    }

    /// Starts the engine for the networks of `layout`. `floods` is notified of flooding endpoints.
    ///
    /// # Errors
    /// The host lacks a resource for the engine.
    pub(super) fn start(
        self,
        layout: &Layout,
        observed: &Observed,
        host_context: &HostContext,
        host_loopback: bool,
        limits: NatLimits,
        floods: Option<FloodControl>,
    ) -> Result<Egress, StartError> {
        let mut settings = Settings::new(self.tun.mtu());
        settings.network = self.owner;
        settings.floods = floods.as_ref().map(FloodControl::listener);
        let policy = Policy { host_loopback, ..policy(layout, observed) };
        settings.policy.clone_from(&policy);
        // At most a quarter of all flows for one endpoint, so that a few endpoints cannot exhaust
        // the engine.
        let share = (descriptors() / 4).max(1);
        settings.limits.flows = limits.flows as usize;
        settings.limits.flows_per_source = share.min(limits.endpoint_flows as usize);
        settings.limits.held_bytes = limits.held.bytes();
        settings.limits.unanswered_per_source = limits.unanswered as usize;
        let descriptors = Arc::new(Descriptors::new(descriptors()));
        let nat = Arc::new(Nat::start(settings, self.tun, host_context.ports(), descriptors)?);
        // Cannot fail: this is the only call.
        let _ = self.link.nat.set(Arc::downgrade(&nat));
        Ok(Egress { nat, policy, floods })
    }
}

/// A running engine with its access policy.
pub(super) struct Egress {
    nat: Arc<Nat>,
    policy: Policy,
    floods: Option<FloodControl>,
}

impl Egress {
    /// Returns the engine.
    pub(super) fn nat(&self) -> &Arc<Nat> {
        &self.nat
    }

    /// Adapts to the networks of `layout`, and denies access to the container networks of other
    /// software that were `observed`.
    pub(super) fn update_policy(&mut self, layout: &Layout, observed: &Observed) {
        let Policy { host_loopback, resolvers, .. } = self.policy.clone();
        self.set(Policy { host_loopback, resolvers, ..policy(layout, observed) });
        self.update_ports(layout);
    }

    /// Sets the host's DNS servers.
    pub(super) fn set_resolvers(&mut self, resolvers: &[SocketAddr]) {
        let policy = self.policy.clone();
        self.set(Policy { resolvers: resolvers.to_vec(), ..policy });
    }

    fn set(&mut self, policy: Policy) {
        // The engine checks all flows against a new policy.
        if self.policy == policy {
            return;
        }
        self.policy = policy;
        self.nat.set_policy(self.policy.clone());
    }

    /// Adapts the policing of floods to the endpoints of `layout`.
    pub(super) fn update_ports(&self, layout: &Layout) {
        if let Some(floods) = &self.floods {
            floods.set_ports(&layout.desired);
        }
    }
}

/// Returns the addresses of `endpoint` from which replies reach the engine: those on the network of
/// its default route.
pub(super) fn addresses_behind_engine(layout: &Layout, endpoint: &str) -> Vec<IpAddr> {
    let endpoint = layout.desired.endpoints.iter().find(|one| one.name == endpoint);
    let attachments = endpoint.map(|one| one.attachments.as_slice()).unwrap_or_default();
    let egress = attachments.iter().filter(|one| one.default_route);
    egress.flat_map(|one| &one.addresses).map(ipnet::IpNet::addr).collect()
}

/// File descriptor budget of the engine: a quarter of RLIMIT_NOFILE, at most [`MAX_DESCRIPTORS`].
pub(super) fn descriptors() -> usize {
    let limit =
        getrlimit(Resource::Nofile).current.map_or(MAX_DESCRIPTORS, |limit| limit as usize / 4);
    limit.min(MAX_DESCRIPTORS)
}

/// Returns the access policy of the engine. Its sockets belong to the host, so no forwarding rule
/// of the host applies to them. The policy therefore denies access to all container networks, of
/// tidegate and of other software.
pub(super) fn policy(layout: &Layout, observed: &Observed) -> Policy {
    let networks = &layout.desired.networks;
    let subnets = |internal: bool| {
        let of = networks.iter().filter(move |network| network.internal == internal);
        of.flat_map(|network| &network.subnets).map(|subnet| subnet.subnet.trunc())
    };
    let is_containers =
        |link: &str| is_bridge_of_containers(link) || observed.bridges.contains_key(link);
    let of_others = observed.routes.iter().filter(|(_, link)| is_containers(link));
    let with_egress = networks.iter().filter(|network| !network.internal);
    let policy_network = |network: &Network| PolicyNetwork {
        name: network.name.clone(),
        subnets: network.subnets.iter().map(|one| one.subnet.trunc()).collect(),
    };
    Policy {
        sources: subnets(false).collect(),
        internal: subnets(true).collect(),
        networks: with_egress.map(policy_network).collect(),
        gateways: registry::ENGINE_ADDRESSES.to_vec(),
        refused: subnets(false)
            .chain(subnets(true))
            .chain(of_others.map(|(net, _)| net.trunc()))
            .collect::<CidrSet>(),
        ..Policy::default()
    }
}

/// Returns whether `link` has the name of a container bridge, of tidegate or of other software.
pub(super) fn is_bridge_of_containers(link: &str) -> bool {
    // Docker uses `br-` and 12 hexadecimal digits. `br-lan` is a usual name for an uplink.
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
    fn container_bridges_are_recognized_by_name() {
        for link in ["docker0", "br-0123456789ab", "virbr0", "tg-front-1a2b"] {
            assert!(is_bridge_of_containers(link), "{link}");
        }
        for link in ["eth0", "br0", "wg0", "docker01", "br-lan", "br-ex"] {
            assert!(!is_bridge_of_containers(link), "{link}");
        }
    }
}
