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
use tokio::runtime::Handle;

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
    /// What the servers run on.
    runtime: Handle,
    options: BTreeMap<String, ServeOptions>,
    /// By service. One that is lent is not among them.
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

/// A server of a service that is still to be made.
pub(super) struct NewServer {
    resolver: Arc<Resolver>,
    runtime: Handle,
    service: String,
    options: ServeOptions,
    namespace: Namespace,
}

impl NewServer {
    /// Makes it. Root in the namespace decides how long that takes.
    ///
    /// # Errors
    /// One line that names the service.
    pub(super) fn make(self) -> anyhow::Result<Serving> {
        let _runtime = self.runtime.enter();
        let serving = self.resolver.serve(&self.namespace, &self.service, &self.options)?;
        tracing::debug!(endpoint = self.service, at = %serving.address(), redirected = serving.is_redirected(), "names");
        Ok(serving)
    }
}

impl NameServers {
    /// Knows everybody on the networks of `layout`, and serves nobody yet but at gateways. Servers
    /// run on `runtime`.
    ///
    /// # Errors
    /// A limit, or a server of the file that is this one.
    pub(super) fn new(
        project: &Project,
        layout: &Layout,
        host_context: &HostContext,
        runtime: &Handle,
        ttl: Duration,
        forward_rate: u32,
    ) -> anyhow::Result<Self> {
        let _runtime = runtime.enter();
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
        let runtime = runtime.clone();
        Ok(Self { resolver, runtime, options, serving: BTreeMap::new(), at_gateways })
    }

    /// The server of `service` in `namespace`, to be made; none for who asks at a gateway.
    pub(super) fn new_server(&self, service: &str, namespace: &Namespace) -> Option<NewServer> {
        Some(NewServer {
            resolver: Arc::clone(&self.resolver),
            runtime: self.runtime.clone(),
            service: service.to_owned(),
            options: self.options.get(service)?.clone(),
            namespace: namespace.clone(),
        })
    }

    /// Whether `service` has a server, which is not lent.
    pub(super) fn serves(&self, service: &str) -> bool {
        self.serving.contains_key(service)
    }

    /// Lends the server of `service`, which answers as before.
    pub(super) fn lend(&mut self, service: &str) -> Option<Serving> {
        self.serving.remove(service)
    }

    /// Takes the server of `service` back, or a new one.
    pub(super) fn give_back(&mut self, service: &str, serving: Serving) {
        self.serving.insert(service.to_owned(), serving);
    }

    /// The services that have servers, which are not lent.
    pub(super) fn served(&self) -> Vec<String> {
        self.serving.keys().cloned().collect()
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
        let _runtime = self.runtime.enter();
        there.serving.clear();
        there.serve(&self.resolver, network, host)
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
            let Some(server) = self.new_server(&service.name, namespace) else { continue };
            match (server.make(), &service.run) {
                (Err(error), Run::Adopt(_)) => tracing::warn!(endpoint = service.name, "{error:#}"),
                (made, _) => self.give_back(&service.name, made?),
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
