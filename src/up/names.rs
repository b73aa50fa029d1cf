//! Names of the project's services: a DNS server at 127.0.0.11 in each namespace, or at the
//! gateways of a network.

use super::layout::Layout;
use anyhow::Context;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use tidegate_compose::{Names, NetworkConfig, Project, Run, Service};
use tidegate_dns::{
    EndpointSpec, NetworkSpec, PORT, ResolvConf, Resolver, ResolverSettings, SERVER, ServeOptions,
    Serving,
};
use tidegate_netns::HostContext;
use tidegate_netns::{Namespace, interface_index};
use tokio::runtime::Handle;

/// File descriptors of a service's DNS server: a UDP and a TCP socket, twice during relocation.
pub(super) const DESCRIPTORS: usize = 4;

/// Source ports of queries to upstream servers. Each uses a file descriptor.
const SOURCE_PORTS: usize = 448;

/// TCP connections to upstream servers (`TCP_AT_ONCE` of the `dns` crate).
const CONNECTIONS: usize = 64;

/// Clients over TCP.
const TCP_CLIENTS: usize = 256;

/// File descriptors that all servers share.
pub(super) const SHARED_DESCRIPTORS: usize = SOURCE_PORTS + CONNECTIONS + TCP_CLIENTS;

/// The DNS servers of a project.
pub(super) struct NameServers {
    resolver: Arc<Resolver>,
    /// Runs the servers.
    runtime: Handle,
    /// Options by service. Services that query a gateway have none.
    options: BTreeMap<String, ServeOptions>,
    /// Servers by service, without those that are lent.
    serving: BTreeMap<String, Serving>,
    /// Servers at gateways, by network.
    at_gateways: BTreeMap<String, GatewayServers>,
}

/// The DNS servers at a network's gateways.
struct GatewayServers {
    bridge: String,
    gateways: Vec<IpAddr>,
    serving: Vec<Serving>,
}

/// A DNS server of a service, before its start.
pub(super) struct NewServer {
    resolver: Arc<Resolver>,
    runtime: Handle,
    service: String,
    options: ServeOptions,
    namespace: Namespace,
}

impl NewServer {
    /// Starts the server. Blocks, and root in the namespace can prolong that
    /// ([`endpoint_work`](super::endpoint_work)).
    ///
    /// # Errors
    /// The sockets or the redirection cannot be created. The text names the service.
    pub(super) fn start(self) -> anyhow::Result<Serving> {
        let _runtime = self.runtime.enter();
        let serving = self.resolver.serve(&self.namespace, &self.service, &self.options)?;
        tracing::debug!(endpoint = self.service, at = %serving.address(), redirected = serving.is_redirected(), "DNS server started");
        Ok(serving)
    }
}

impl NameServers {
    /// Registers the names of all endpoints of `layout` and starts the servers at gateways. All
    /// servers run on `runtime`. `forward_rate` is in queries per second of an endpoint.
    ///
    /// # Errors
    /// A limit is reached, a gateway cannot be bound, or an upstream server in the file is the DNS
    /// server of the project itself.
    pub(super) fn new(
        project: &Project,
        layout: &Layout,
        host_context: &HostContext,
        runtime: &Handle,
        ttl: Duration,
        forward_rate: u32,
    ) -> anyhow::Result<Self> {
        let _runtime = runtime.enter();
        let mut settings = ResolverSettings {
            ttl,
            forward_rate,
            ..ResolverSettings::new(host_context.ports().clone())
        };
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
            for (attachment, laid_out) in service.networks.iter().zip(&endpoint.attachments) {
                resolver
                    .add_endpoint(
                        &attachment.network,
                        &EndpointSpec {
                            container: service.name.clone(),
                            name: service.name.clone(),
                            aliases: attachment.aliases.clone(),
                            hostname: service.hostname.clone(),
                            addresses: laid_out.addresses.iter().map(ipnet::IpNet::addr).collect(),
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
                let mut servers = GatewayServers { bridge, gateways, serving: Vec::new() };
                servers.start(&resolver, &network.name, host_context.networks())?;
                at_gateways.insert(network.name.clone(), servers);
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

    /// Returns the server of `service` in `namespace`, to be started. `None` if the service queries
    /// a gateway.
    pub(super) fn new_server(&self, service: &str, namespace: &Namespace) -> Option<NewServer> {
        Some(NewServer {
            resolver: Arc::clone(&self.resolver),
            runtime: self.runtime.clone(),
            service: service.to_owned(),
            options: self.options.get(service)?.clone(),
            namespace: namespace.clone(),
        })
    }

    /// Returns whether `service` has a server that is not lent.
    pub(super) fn serves(&self, service: &str) -> bool {
        self.serving.contains_key(service)
    }

    /// Lends the server of `service`, which continues to answer queries.
    pub(super) fn lend(&mut self, service: &str) -> Option<Serving> {
        self.serving.remove(service)
    }

    /// Takes back the server of `service`, or takes a new one.
    pub(super) fn give_back(&mut self, service: &str, serving: Serving) {
        self.serving.insert(service.to_owned(), serving);
    }

    /// Returns the services whose servers are not lent.
    pub(super) fn served(&self) -> Vec<String> {
        self.serving.keys().cloned().collect()
    }

    /// Restarts the servers at the gateways of `network` in `host`, if it has any, after its bridge
    /// was recreated. Their sockets are bound to the index of the previous bridge.
    ///
    /// # Errors
    /// A gateway cannot be bound. The text names the network.
    pub(super) fn serve_at_gateways_again(
        &mut self,
        network: &str,
        host: &Namespace,
    ) -> anyhow::Result<()> {
        let Some(servers) = self.at_gateways.get_mut(network) else { return Ok(()) };
        let _runtime = self.runtime.enter();
        servers.serving.clear();
        servers.start(&self.resolver, network, host)
    }

    /// Starts the server of each service in its namespace.
    ///
    /// # Errors
    /// The server of a service that tidegate runs cannot be started. That of an adopted container
    /// is only logged, since the container can have its own server at the address.
    pub(super) fn serve_all(
        &mut self,
        project: &Project,
        namespaces: &BTreeMap<String, Namespace>,
    ) -> anyhow::Result<()> {
        for service in &project.services {
            let Some(namespace) = namespaces.get(&service.name) else { continue };
            let Some(server) = self.new_server(&service.name, namespace) else { continue };
            match (server.start(), &service.run) {
                (Err(error), Run::Adopt(_)) => tracing::warn!(endpoint = service.name, "{error:#}"),
                (started, _) => self.give_back(&service.name, started?),
            }
        }
        Ok(())
    }

    /// Returns the resolver of all servers.
    pub(super) fn resolver(&self) -> Arc<Resolver> {
        Arc::clone(&self.resolver)
    }
}

impl GatewayServers {
    fn start(
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

fn servers_of_network(network: &NetworkConfig) -> Vec<SocketAddr> {
    network.dns.iter().map(|server| SocketAddr::new(*server, PORT)).collect()
}

fn is_at_gateway(project: &Project, network: &str) -> bool {
    project
        .networks
        .get(network)
        .is_some_and(|network: &NetworkConfig| network.names == Names::AtGateway)
}

/// Returns the gateway that `service` queries, if all its networks have DNS servers at their
/// gateways.
fn gateway(project: &Project, layout: &Layout, service: &Service) -> Option<IpAddr> {
    if !service.networks.iter().all(|one| is_at_gateway(project, &one.network)) {
        return None;
    }
    let first = &service.networks.first()?.network;
    let network = layout.desired.networks.iter().find(|network| network.name == *first)?;
    network.subnets.first().map(|subnet| subnet.gateway)
}

/// `/etc/resolv.conf` of `service`. `host` is that of the host.
pub(super) fn resolv_conf(
    project: &Project,
    layout: &Layout,
    service: &Service,
    host: &ResolvConf,
) -> String {
    let server = gateway(project, layout, service).unwrap_or(SERVER.into());
    host.for_container(server, &service.dns_search, &service.dns_options)
}

/// Returns the host's `/etc/resolv.conf`, or an empty one if it cannot be read.
pub(super) fn host_resolv_conf() -> ResolvConf {
    let text = fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    ResolvConf::parse(&text, &|name| interface_index(name).ok())
}

/// `/etc/hosts` of a service: localhost, and its own addresses with its names.
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
