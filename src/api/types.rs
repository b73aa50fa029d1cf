//! The JSON types of the API, separate from internal types.

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use std::net::IpAddr;
use utoipa::ToSchema;

/// The running project.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub(crate) struct Status {
    /// Version of tidegate.
    #[schema(example = "0.1.0")]
    pub(crate) version: String,
    /// Commit of the build, or "unknown".
    pub(crate) commit: String,
    /// Name of the project.
    #[schema(example = "hello")]
    pub(crate) project: String,
    /// Path of the Compose file.
    #[schema(example = "/srv/hello/compose.yaml")]
    pub(crate) compose_file: String,
    /// Process id.
    pub(crate) pid: u32,
    /// Start time (RFC 3339, UTC).
    #[schema(example = "2026-01-31T12:00:00Z")]
    pub(crate) started: String,
    /// Isolation of the networks: "nftables", "iptables", or "without-firewall" (policy rules, and
    /// forwarding disabled on the bridges).
    #[schema(example = "nftables")]
    pub(crate) isolation: String,
    /// The metrics endpoint; null if it is disabled.
    pub(crate) metrics: Option<Metrics>,
    /// The services, in the order of the Compose file.
    pub(crate) services: Vec<Service>,
}

/// The metrics endpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub(crate) struct Metrics {
    /// The configured address, with a port or a range of ports.
    #[schema(example = "127.0.0.1:9464")]
    pub(crate) address: String,
    /// The address and port in use; null while another program occupies them and tidegate retries.
    #[schema(example = "127.0.0.1:9464")]
    pub(crate) served: Option<String>,
}

/// A service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub(crate) struct Service {
    /// The name of the service and of its endpoint.
    #[schema(example = "web")]
    pub(crate) name: String,
    /// The state of the service.
    pub(crate) state: State,
    /// The process id of its command while it runs.
    pub(crate) pid: Option<u32>,
    /// The number of restarts.
    pub(crate) restarts: u32,
    /// The last exit of its command.
    pub(crate) exit: Option<Exit>,
    /// When it entered this state (RFC 3339, UTC); null for adopted services.
    pub(crate) since: Option<String>,
}

/// The state of a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum State {
    /// Its namespaces are being set up.
    Starting,
    /// Its command is running.
    Running,
    /// Its command has exited and will be restarted.
    Restarting,
    /// Its command has exited and will not be restarted.
    Ended,
    /// An adopted namespace (`x-netns`); tidegate does not run its processes.
    Adopted,
    /// An adopted namespace whose path leads to no namespace: the container is down.
    Gone,
}

/// How a command exited: exactly one of the two is set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub(crate) struct Exit {
    /// Exit code.
    pub(crate) code: Option<i32>,
    /// The signal that killed it.
    pub(crate) signal: Option<i32>,
}

/// A network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub(crate) struct Network {
    /// The name of the network.
    #[schema(example = "front")]
    pub(crate) name: String,
    /// The bridge on the host.
    #[schema(example = "tg-front-1a2b")]
    pub(crate) bridge: String,
    /// Subnets, at most one per address family, IPv4 first.
    pub(crate) subnets: Vec<Subnet>,
    /// The network has no egress.
    pub(crate) internal: bool,
    /// Its endpoints can connect to each other.
    pub(crate) inter_container: bool,
    /// The MTU in bytes.
    pub(crate) mtu: u32,
    /// The names of its endpoints.
    pub(crate) endpoints: Vec<String>,
}

/// A subnet of a network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub(crate) struct Subnet {
    /// The prefix.
    #[schema(value_type = String, example = "172.28.0.0/24")]
    pub(crate) subnet: IpNet,
    /// The gateway address, which belongs to the host.
    #[schema(value_type = String, example = "172.28.0.1")]
    pub(crate) gateway: IpAddr,
}

/// A network namespace attached to networks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub(crate) struct Endpoint {
    /// The name of the endpoint and of its service.
    #[schema(example = "web")]
    pub(crate) name: String,
    /// The identity of the namespace, in the format of /proc/PID/ns/net.
    #[schema(example = "net:[4026532008]")]
    pub(crate) namespace: String,
    /// The path of the namespace, if it was adopted.
    #[schema(example = "/run/netns/web")]
    pub(crate) netns: Option<String>,
    /// Its attachments to networks.
    pub(crate) attachments: Vec<Attachment>,
    /// Its published ports.
    pub(crate) ports: Vec<Port>,
}

/// The attachment of an endpoint to a network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub(crate) struct Attachment {
    /// The name of the network.
    #[schema(example = "front")]
    pub(crate) network: String,
    /// The interface in the endpoint.
    #[schema(example = "eth0")]
    pub(crate) interface: String,
    /// The MAC address of that interface.
    #[schema(example = "02:5d:0a:9b:10:c4")]
    pub(crate) mac: String,
    /// Its addresses with the prefix length of the subnet.
    #[schema(value_type = Vec<String>, example = json!(["172.28.0.2/24"]))]
    pub(crate) addresses: Vec<IpNet>,
    /// The default route of the endpoint uses this network.
    pub(crate) default_route: bool,
}

/// A published port: one socket on the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub(crate) struct Port {
    /// The id of the port. Ids are not reused.
    pub(crate) id: u32,
    /// The endpoint that it forwards to.
    #[schema(example = "web")]
    pub(crate) endpoint: String,
    /// The label of the port in metrics.
    #[schema(example = "0.0.0.0:8080/tcp")]
    pub(crate) publish: String,
    /// The address on the host.
    #[schema(value_type = String, example = "0.0.0.0")]
    pub(crate) host_ip: IpAddr,
    /// The port on the host.
    pub(crate) host_port: u16,
    /// The transport protocol.
    pub(crate) protocol: Transport,
    /// The port in the endpoint.
    pub(crate) container_port: u16,
}

/// The transport protocol of a published port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Transport {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

/// Counters since the start, and current values. A rate is the difference of two samples with the
/// same `pid` and `started`, divided by the difference of their `elapsed_ms`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub(crate) struct Figures {
    /// Name of the project.
    #[schema(example = "hello")]
    pub(crate) project: String,
    /// Process id.
    pub(crate) pid: u32,
    /// Start time (RFC 3339, UTC).
    #[schema(example = "2026-01-31T12:00:00Z")]
    pub(crate) started: String,
    /// Milliseconds since the start, by a monotonic clock.
    pub(crate) elapsed_ms: u64,
    /// Published ports, one per socket, as in `/v1/ports`.
    pub(crate) ports: Vec<PortFigures>,
    /// TCP connections of all published ports.
    pub(crate) connections: Fill,
    /// File descriptors of published ports, connections and sessions.
    pub(crate) descriptors: Fill,
    /// Networks, as in `/v1/networks`.
    pub(crate) networks: Vec<NetworkFigures>,
    /// The NAT engine; null if the kernel masquerades, or without egress.
    pub(crate) nat: Option<NatFigures>,
    /// Upstream name servers.
    pub(crate) upstreams: Vec<UpstreamFigures>,
}

/// The fill level of a bounded table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub(crate) struct Fill {
    /// Entries in use.
    pub(crate) used: u64,
    /// The limit.
    pub(crate) limit: u64,
}

/// Counters of a published port: one socket on the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub(crate) struct PortFigures {
    /// The id of the port.
    pub(crate) id: u32,
    /// The endpoint that it forwards to.
    #[schema(example = "web")]
    pub(crate) endpoint: String,
    /// The label of the port in metrics.
    #[schema(example = "0.0.0.0:8080/tcp")]
    pub(crate) publish: String,
    /// The port in the endpoint.
    pub(crate) container_port: u16,
    /// Open TCP connections or UDP sessions.
    pub(crate) open: Fill,
    /// Accepted TCP connections, including refused ones; UDP sessions created.
    pub(crate) begun: u64,
    /// TCP connections that were not connected to the endpoint.
    pub(crate) refused: u64,
    /// TCP connections that ended with a reset; UDP sessions evicted.
    pub(crate) cut: u64,
    /// Payload to the endpoint, in bytes.
    pub(crate) bytes_in: u64,
    /// Payload to clients, in bytes.
    pub(crate) bytes_out: u64,
    /// Datagrams to the endpoint.
    pub(crate) datagrams_in: u64,
    /// Datagrams to clients.
    pub(crate) datagrams_out: u64,
    /// Dropped datagrams.
    pub(crate) dropped: u64,
    /// Successful connects to the endpoint (TCP).
    pub(crate) dialled: u64,
    /// The total time of these connects, in microseconds.
    pub(crate) dial_us: u64,
}

/// Counters of a network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub(crate) struct NetworkFigures {
    /// The name of the network.
    #[schema(example = "front")]
    pub(crate) name: String,
    /// The names of its endpoints.
    pub(crate) endpoints: Vec<String>,
    /// Answered DNS queries. An endpoint on several networks counts on its first one.
    pub(crate) questions: u64,
    /// Of those, answered with SERVFAIL or REFUSED.
    pub(crate) questions_failed: u64,
    /// Of those, answered with NXDOMAIN.
    pub(crate) questions_unknown: u64,
}

/// Counters of the NAT engine. "In" is towards containers, "out" is towards external hosts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub(crate) struct NatFigures {
    /// Current flows of all protocols.
    pub(crate) flows: Fill,
    /// Of those, TCP connections.
    pub(crate) flows_tcp: u64,
    /// Flows created.
    pub(crate) begun: u64,
    /// Payload to containers, in bytes.
    pub(crate) bytes_in: u64,
    /// Payload to external hosts, in bytes.
    pub(crate) bytes_out: u64,
    /// Packets to containers through the TUN device.
    pub(crate) packets_in: u64,
    /// Packets from containers through the TUN device.
    pub(crate) packets_out: u64,
    /// Dropped packets.
    pub(crate) dropped: u64,
    /// TCP connections that failed or ended with a reset.
    pub(crate) resets: u64,
    /// Retransmissions to containers.
    pub(crate) retransmissions: u64,
}

/// Counters of an upstream name server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub(crate) struct UpstreamFigures {
    /// The address of the server.
    #[schema(example = "192.0.2.53:53")]
    pub(crate) server: String,
    /// Whether the server is tried first. A server that did not respond loses this.
    pub(crate) trusted: bool,
    /// Queries sent.
    pub(crate) asked: u64,
    /// Of those, without a response in time.
    pub(crate) silent: u64,
    /// Of those, answered with an error.
    pub(crate) failed: u64,
    /// Responses with a measured response time.
    pub(crate) answered: u64,
    /// The total of these response times, in microseconds.
    pub(crate) took_us: u64,
}

/// Ports to publish.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct NewPorts {
    /// The endpoint to forward to.
    #[schema(example = "web")]
    pub(crate) endpoint: String,
    /// Ports in the syntax of `docker run -p`: `[HOST_IP:][HOST_PORT[-END]:]PORT[-END][/tcp|udp]`.
    /// Without HOST_PORT, a free port is chosen. Without HOST_IP, the port is published on all IPv4
    /// and IPv6 addresses, and the response contains one port for each family.
    #[schema(example = "8081:80")]
    pub(crate) spec: String,
}

/// The new namespace of an adopted endpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct NewNamespace {
    /// The absolute path of the network namespace.
    #[schema(example = "/run/netns/web")]
    pub(crate) netns: String,
}

/// The error of a request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub(crate) struct ErrorBody {
    /// One line that names the object, the cause and the remedy.
    #[schema(example = "there is no endpoint \"wbe\"")]
    pub(crate) error: String,
}
