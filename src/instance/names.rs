//! Names of the project's services: a DNS server at 127.0.0.11 in each namespace, or at the
//! gateways of a network.

use super::layout::Layout;
use anyhow::Context;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use tidegate_compose::{Names, NetworkConfig, Project, Service};
use tidegate_control::Name;
use tidegate_dns::{
    EndpointSpec, NetworkSpec, PORT, ResolvConf, Resolver, ResolverSettings, SERVER, ServeOptions,
    Serving,
};
use tidegate_netns::HostContext;
use tidegate_netns::{Namespace, interface_index};
use tidegate_netsetup::{Attachment, Endpoint, Network};
use tokio::runtime::Handle;

/// File descriptors of an endpoint's DNS server: a UDP and a TCP socket.
pub(super) const DESCRIPTORS: u32 = 2;

/// File descriptors of servers that are relocated, which have further sockets until then.
const RELOCATED: usize = 2 * 64;

/// DNS servers that are started at the same time, each on a thread.
const STARTS_AT_ONCE: usize = 128;

/// Source ports of queries to upstream servers. Each uses a file descriptor.
const SOURCE_PORTS: usize = 448;

/// TCP connections to upstream servers (`TCP_AT_ONCE` of the `dns` crate).
const CONNECTIONS: usize = 64;

/// Clients over TCP.
const TCP_CLIENTS: usize = 256;

/// File descriptors that all servers share.
pub(super) const SHARED_DESCRIPTORS: usize = SOURCE_PORTS + CONNECTIONS + TCP_CLIENTS + RELOCATED;

/// DNS options of a network.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct NetworkDns {
    /// Upstream servers; empty for those of the host.
    pub(super) servers: Vec<IpAddr>,
    /// The network has DNS servers at its gateways.
    pub(super) at_gateway: bool,
    /// Endpoints have no names on the network.
    pub(super) nameless: bool,
}

/// Names and DNS options of an endpoint.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct EndpointDns {
    pub(super) hostname: Option<String>,
    /// Upstream servers; empty for those of its networks.
    pub(super) servers: Vec<IpAddr>,
    /// Additional names by network.
    pub(super) aliases: BTreeMap<String, Vec<String>>,
}

impl NetworkDns {
    /// The options of `network` of a Compose file.
    pub(super) fn of(network: &NetworkConfig) -> Self {
        let at_gateway = network.names == Names::AtGateway;
        Self { servers: network.dns.clone(), at_gateway, nameless: false }
    }
}

impl EndpointDns {
    /// The names and options of `service` of a Compose file.
    pub(super) fn of(service: &Service) -> Self {
        let aliases = service.networks.iter().map(|one| (one.network.clone(), one.aliases.clone()));
        Self {
            hostname: service.hostname.clone(),
            servers: service.dns.clone(),
            aliases: aliases.collect(),
        }
    }
}

/// The DNS servers of networks and endpoints.
pub(super) struct NameServers {
    resolver: Arc<Resolver>,
    /// The namespace of the bridges.
    host: Namespace,
    /// Runs the servers.
    runtime: Handle,
    /// Options by service. Services that query a gateway have none.
    options: BTreeMap<String, ServeOptions>,
    /// Servers by service, without those that are lent.
    serving: BTreeMap<String, Serving>,
    /// Servers at gateways, by network.
    at_gateways: BTreeMap<String, GatewayServers>,
    /// Networks on which endpoints have no names.
    nameless: BTreeSet<String>,
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
    /// Starts the resolver, without networks. All servers run on `runtime`. `forward_rate` is in
    /// queries per second of an endpoint.
    ///
    /// # Errors
    /// The resolver cannot be started.
    pub(super) fn new(
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
        Ok(Self {
            resolver: Arc::new(Resolver::new(settings).context("names")?),
            host: host_context.networks().clone(),
            runtime: runtime.clone(),
            options: BTreeMap::new(),
            serving: BTreeMap::new(),
            at_gateways: BTreeMap::new(),
            nameless: BTreeSet::new(),
        })
    }

    /// Adds a network, whose bridge must exist, and starts its servers at gateways. `verified`:
    /// source addresses on the network identify endpoints.
    ///
    /// # Errors
    /// A limit is reached, a gateway cannot be bound, or an upstream server is the DNS server of
    /// this process. The network is then not added.
    pub(super) fn add_network(
        &mut self,
        network: &Network,
        dns: &NetworkDns,
        verified: bool,
    ) -> anyhow::Result<()> {
        if dns.nameless {
            self.nameless.insert(network.name.clone());
            return Ok(());
        }
        let _runtime = self.runtime.enter();
        self.resolver
            .add_network(&NetworkSpec {
                name: network.name.clone(),
                domain: Some(dns_name(&network.name).to_owned()),
                subnets: network.subnets.iter().map(|subnet| subnet.subnet.trunc()).collect(),
                internal: network.is_closed(),
                servers: dns.servers.iter().map(|ip| SocketAddr::new(*ip, PORT)).collect(),
                sources_are_verified: verified,
            })
            .context("names")?;
        if dns.at_gateway {
            let bridge = network.bridge.name.clone();
            let gateways = network.subnets.iter().map(|subnet| subnet.gateway).collect();
            let mut servers = GatewayServers { bridge, gateways, serving: Vec::new() };
            let started = servers.start(&self.resolver, &network.name, &self.host);
            if started.is_err() {
                self.resolver.remove_network(&network.name);
            }
            started?;
            self.at_gateways.insert(network.name.clone(), servers);
        }
        Ok(())
    }

    /// Removes a network, which must have no endpoints.
    pub(super) fn remove_network(&mut self, name: &str) {
        if self.nameless.remove(name) {
            return;
        }
        self.at_gateways.remove(name);
        self.resolver.remove_network(name);
    }

    /// Adds the names of `endpoint`. Its server is not started.
    ///
    /// # Errors
    /// A limit is reached. The names are then not added.
    pub(super) fn add_endpoint(
        &mut self,
        endpoint: &Endpoint,
        dns: &EndpointDns,
    ) -> anyhow::Result<()> {
        self.add_names(endpoint, dns, |attachment| {
            attachment.addresses.iter().map(ipnet::IpNet::addr).collect()
        })?;
        let queries_gateway = endpoint
            .attachments
            .iter()
            .all(|attachment| self.at_gateways.contains_key(&attachment.network));
        if !queries_gateway && !is_sandbox(&endpoint.name) {
            let servers = dns.servers.iter().map(|ip| SocketAddr::new(*ip, PORT)).collect();
            let options = ServeOptions { servers, ..ServeOptions::default() };
            self.options.insert(endpoint.name.clone(), options);
        }
        Ok(())
    }

    /// Adds the names of `endpoint`, which waits for its namespace, without addresses. They are
    /// private: an upstream server would otherwise be asked for `NAME.NETWORK`.
    pub(super) fn add_waiting_endpoint(&self, endpoint: &Endpoint, dns: &EndpointDns) {
        if let Err(error) = self.add_names(endpoint, dns, |_| Vec::new()) {
            tracing::warn!(endpoint = endpoint.name, "names not reserved: {error:#}");
        }
    }

    fn add_names(
        &self,
        endpoint: &Endpoint,
        dns: &EndpointDns,
        addresses: impl Fn(&Attachment) -> Vec<IpAddr>,
    ) -> anyhow::Result<()> {
        for attachment in self.named(endpoint) {
            let spec = EndpointSpec {
                container: endpoint.name.clone(),
                name: dns_name(&endpoint.name).to_owned(),
                aliases: dns.aliases.get(&attachment.network).cloned().unwrap_or_default(),
                hostname: dns.hostname.clone(),
                addresses: addresses(attachment),
            };
            if let Err(error) = self.resolver.add_endpoint(&attachment.network, &spec) {
                self.remove_names(endpoint);
                return Err(error).context("names");
            }
        }
        Ok(())
    }

    /// The attachments of `endpoint` to networks on which it has names.
    fn named<'a>(&'a self, endpoint: &'a Endpoint) -> impl Iterator<Item = &'a Attachment> {
        let is_named = |one: &&Attachment| {
            !is_sandbox(&endpoint.name) && !self.nameless.contains(&one.network)
        };
        endpoint.attachments.iter().filter(is_named)
    }

    /// Removes the names of `endpoint`. Returns its server, which may block when it is dropped
    /// ([`endpoint_work`](super::endpoint_work)).
    pub(super) fn remove_endpoint(&mut self, endpoint: &Endpoint) -> Option<Serving> {
        self.remove_names(endpoint);
        self.options.remove(&endpoint.name);
        self.serving.remove(&endpoint.name)
    }

    fn remove_names(&self, endpoint: &Endpoint) {
        for attachment in self.named(endpoint) {
            let (network, name) = (&attachment.network, &endpoint.name);
            self.resolver.remove_endpoint(network, name, dns_name(name));
        }
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

    /// Restarts the servers at the gateways of `network`, if it has any, after its bridge
    /// was recreated. Their sockets are bound to the index of the previous bridge.
    ///
    /// # Errors
    /// A gateway cannot be bound. The text names the network.
    pub(super) fn serve_at_gateways_again(&mut self, network: &str) -> anyhow::Result<()> {
        let Some(servers) = self.at_gateways.get_mut(network) else { return Ok(()) };
        let _runtime = self.runtime.enter();
        servers.serving.clear();
        servers.start(&self.resolver, network, &self.host)
    }

    /// Starts the server of each endpoint in its namespace.
    ///
    /// # Errors
    /// The server of a service that tidegate runs cannot be started. That of an adopted container
    /// is only logged, since the container can have its own server at the address.
    pub(super) fn serve_all(
        &mut self,
        namespaces: &BTreeMap<String, Namespace>,
        is_adopted: impl Fn(&str) -> bool,
    ) -> anyhow::Result<()> {
        let servers = namespaces.iter().filter_map(|(endpoint, namespace)| {
            Some((endpoint, self.new_server(endpoint, namespace)?))
        });
        let mut servers: Vec<_> = servers.collect();
        // Replacing the table of a killed process takes an RCU grace period, tens of milliseconds.
        // Servers that start at the same time share it.
        while !servers.is_empty() {
            let next = servers.split_off(servers.len().saturating_sub(STARTS_AT_ONCE));
            let started: Vec<_> = std::thread::scope(|scope| {
                let starts: Vec<_> = next
                    .into_iter()
                    .map(|(endpoint, server)| (endpoint, scope.spawn(|| server.start())))
                    .collect();
                let join = |thread: std::thread::ScopedJoinHandle<'_, _>| {
                    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
                };
                starts.into_iter().map(|(endpoint, thread)| (endpoint, join(thread))).collect()
            });
            for (endpoint, started) in started {
                match started {
                    Err(error) if is_adopted(endpoint) => tracing::warn!(endpoint, "{error:#}"),
                    started => self.give_back(endpoint, started?),
                }
            }
        }
        Ok(())
    }

    /// Returns the resolver of all servers.
    pub(super) fn resolver(&self) -> Arc<Resolver> {
        Arc::clone(&self.resolver)
    }
}

/// Whether the endpoint is a sandbox, which has no names and resolves none.
pub(super) fn is_sandbox(endpoint: &str) -> bool {
    endpoint.parse().is_ok_and(|name: Name| name.is_sandbox())
}

/// The DNS name of an endpoint or a network: its name within its project.
pub(super) fn dns_name(name: &str) -> &str {
    name.rsplit_once('/').map_or(name, |(_, name)| name)
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
    let addresses = layout.addresses.get(service).map(Vec::as_slice).unwrap_or_default();
    hosts_of(addresses, service, hostname)
}

/// `/etc/hosts` of a service with `addresses`.
pub(super) fn hosts_of(addresses: &[IpAddr], service: &str, hostname: &str) -> String {
    let mut text =
        String::from("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n");
    for address in addresses {
        let names =
            if hostname == service { service.to_owned() } else { format!("{hostname} {service}") };
        // Writing to a string does not fail.
        let _ = writeln!(text, "{address}\t{names}");
    }
    text
}
