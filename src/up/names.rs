//! Names of the project's services: the DNS server of each, at 127.0.0.11.

use super::layout::Layout;
use crate::compose::{Names, Network, Project, Run, Service};
use crate::host_context::HostContext;
use anyhow::Context;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use tidegate_dns::{
    EndpointSpec, NetworkSpec, PORT, ResolvConf, Resolver, SERVER, ServeOptions, Serving, Settings,
};
use tidegate_netns::{Namespace, interface_index};

/// Descriptors that a service's server keeps: a UDP and a TCP socket, twice while it moves.
pub(super) const DESCRIPTORS: usize = 4;

/// Source ports for questions to other servers, connections to them (`TCP_AT_ONCE` of the `dns`
/// crate), and clients over TCP: a descriptor each.
const SOURCE_PORTS: usize = 448;
const CONNECTIONS: usize = 64;
const TCP_CLIENTS: usize = 256;

/// Descriptors that all servers have in common.
pub(super) const SHARED_DESCRIPTORS: usize = SOURCE_PORTS + CONNECTIONS + TCP_CLIENTS;

/// The servers of a project.
pub(super) struct NameServers {
    resolver: Arc<Resolver>,
    options: BTreeMap<String, ServeOptions>,
    /// By service.
    serving: BTreeMap<String, Serving>,
    /// Networks that are served at their gateways, by name.
    at_gateways: BTreeMap<String, AtGateway>,
}

/// The servers at a network's gateways.
struct AtGateway {
    bridge: String,
    gateways: Vec<IpAddr>,
    serving: Vec<Serving>,
}

impl NameServers {
    /// Knows everybody on the networks of `layout`, and serves nobody yet but at gateways.
    ///
    /// # Errors
    /// A limit, or a server of the file that is this one.
    pub(super) fn new(
        project: &Project,
        layout: &Layout,
        host_context: &HostContext,
        ttl: Duration,
        forward_rate: u32,
    ) -> anyhow::Result<Self> {
        let mut settings =
            Settings { ttl, forward_rate, ..Settings::new(host_context.ports().clone()) };
        settings.networks = host_context.networks().clone();
        settings.source_ports = SOURCE_PORTS;
        settings.tcp_clients_in_all = TCP_CLIENTS;
        let resolver = Resolver::new(settings).context("names")?;
        resolver.set_bridges(super::bridge_indexes(layout, host_context.networks())?.into_values());
        for network in &layout.desired.networks {
            resolver
                .add_network(&NetworkSpec {
                    name: network.name.clone(),
                    subnets: network.subnets.iter().map(|subnet| subnet.subnet.trunc()).collect(),
                    internal: network.internal,
                    servers: project
                        .networks
                        .get(&network.name)
                        .map(servers_of_network)
                        .unwrap_or_default(),
                    sources_are_verified: layout.desired.verifies_sources(&network.name),
                })
                .context("names")?;
        }
        for endpoint in &layout.desired.endpoints {
            let Some(service) =
                project.services.iter().find(|service| service.name == endpoint.name)
            else {
                continue;
            };
            for (attachment, there) in service.networks.iter().zip(&endpoint.attachments) {
                resolver
                    .add_endpoint(
                        &attachment.network,
                        &EndpointSpec {
                            container: service.name.clone(),
                            name: service.name.clone(),
                            aliases: attachment.aliases.clone(),
                            hostname: service.hostname.clone(),
                            addresses: there.addresses.iter().map(ipnet::IpNet::addr).collect(),
                        },
                    )
                    .context("names")?;
            }
        }
        let mut at_gateways = BTreeMap::new();
        for network in &layout.desired.networks {
            if is_at_gateway(project, &network.name) {
                let bridge = network.bridge.name.clone();
                let gateways = network.subnets.iter().map(|subnet| subnet.gateway).collect();
                let mut there = AtGateway { bridge, gateways, serving: Vec::new() };
                there.serve(&resolver, &network.name, host_context.networks())?;
                at_gateways.insert(network.name.clone(), there);
            }
        }
        let servers = |service: &Service| {
            service.dns.iter().map(|server| SocketAddr::new(*server, PORT)).collect()
        };
        let options = project
            .services
            .iter()
            .filter(|service| gateway(project, layout, service).is_none())
            .map(|service| {
                (
                    service.name.clone(),
                    ServeOptions { servers: servers(service), ..ServeOptions::default() },
                )
            })
            .collect();
        let resolver = Arc::new(resolver);
        Ok(Self { resolver, options, serving: BTreeMap::new(), at_gateways })
    }

    /// Serves `service` in `namespace` from here on, and no longer where it was.
    ///
    /// # Errors
    /// One line that names the service.
    pub(super) fn serve(&mut self, service: &str, namespace: &Namespace) -> anyhow::Result<()> {
        self.serving.remove(service);
        // Who asks at a gateway has none.
        let Some(options) = self.options.get(service).cloned() else { return Ok(()) };
        let serving = self.resolver.serve(namespace, service, &options)?;
        tracing::debug!(endpoint = service, at = %serving.address(), redirected = serving.is_redirected(), "names");
        self.serving.insert(service.to_owned(), serving);
        Ok(())
    }

    /// Serves `network` at its gateways in `host` again, if it was, because its bridge was made
    /// again: the sockets are bound to the index of the bridge that has gone.
    ///
    /// # Errors
    /// One line that names the network.
    pub(super) fn serve_at_gateways_again(
        &mut self,
        network: &str,
        host: &Namespace,
    ) -> anyhow::Result<()> {
        let Some(there) = self.at_gateways.get_mut(network) else { return Ok(()) };
        there.serving.clear();
        there.serve(&self.resolver, network, host)
    }

    /// Restores what leads to the server of `service`, if other software has removed it. Whether it
    /// had.
    ///
    /// # Errors
    /// One line that names the service.
    pub(super) fn repair(&mut self, service: &str) -> anyhow::Result<bool> {
        let Some(serving) = self.serving.get_mut(service) else { return Ok(false) };
        serving.repair().with_context(|| format!("DNS of container {service:?}"))
    }

    /// Serves `service` in `namespace`, unless it is served already.
    ///
    /// # Errors
    /// One line that names the service.
    pub(super) fn serve_if_unserved(
        &mut self,
        service: &str,
        namespace: &Namespace,
    ) -> anyhow::Result<()> {
        if self.serving.contains_key(service) { Ok(()) } else { self.serve(service, namespace) }
    }

    /// Serves everybody where they are.
    ///
    /// # Errors
    /// Of a service that is run here. An adopted container may have a server of its own there; that
    /// is only told.
    pub(super) fn serve_all(
        &mut self,
        project: &Project,
        namespaces: &BTreeMap<String, Namespace>,
    ) -> anyhow::Result<()> {
        for service in &project.services {
            let Some(namespace) = namespaces.get(&service.name) else { continue };
            match (self.serve(&service.name, namespace), &service.run) {
                (Err(error), Run::Adopt(_)) => tracing::warn!(endpoint = service.name, "{error:#}"),
                (result, _) => result?,
            }
        }
        Ok(())
    }

    /// For a scrape.
    pub(super) fn resolver(&self) -> Arc<Resolver> {
        Arc::clone(&self.resolver)
    }
}

impl AtGateway {
    fn serve(
        &mut self,
        resolver: &Resolver,
        network: &str,
        host: &Namespace,
    ) -> anyhow::Result<()> {
        for gateway in &self.gateways {
            self.serving.push(resolver.serve_gateway(host, network, *gateway, &self.bridge)?);
        }
        Ok(())
    }
}

fn servers_of_network(network: &Network) -> Vec<SocketAddr> {
    network.dns.iter().map(|server| SocketAddr::new(*server, PORT)).collect()
}

fn is_at_gateway(project: &Project, network: &str) -> bool {
    project.networks.get(network).is_some_and(|network: &Network| network.names == Names::AtGateway)
}

/// The gateway that `service` asks, if all its networks are served at theirs.
fn gateway(project: &Project, layout: &Layout, service: &Service) -> Option<IpAddr> {
    if !service.networks.iter().all(|there| is_at_gateway(project, &there.network)) {
        return None;
    }
    let first = &service.networks.first()?.network;
    let network = layout.desired.networks.iter().find(|network| network.name == *first)?;
    network.subnets.first().map(|subnet| subnet.gateway)
}

/// `/etc/resolv.conf` of `service`, where the host's says `host`.
pub(super) fn resolv_conf(
    project: &Project,
    layout: &Layout,
    service: &Service,
    host: &ResolvConf,
) -> String {
    let server = gateway(project, layout, service).unwrap_or(SERVER.into());
    host.for_container(server, &service.dns_search, &service.dns_options)
}

/// What the host's own says.
pub(super) fn host_resolv_conf() -> ResolvConf {
    let text = fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    ResolvConf::parse(&text, &|name| interface_index(name).ok())
}

/// `/etc/hosts` of a service: what it is itself.
pub(super) fn hosts(layout: &Layout, service: &str, hostname: &str) -> String {
    let mut text =
        String::from("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n");
    for address in layout.addresses.get(service).into_iter().flatten() {
        let names =
            if hostname == service { service.to_owned() } else { format!("{hostname} {service}") };
        // Writing to a string does not fail.
        let _ = writeln!(text, "{address}\t{names}");
    }
    text
}
