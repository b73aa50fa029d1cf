//! The JSON types of the API, separate from internal types.

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::IpAddr;
use utoipa::ToSchema;

/// The running project.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Status {
    /// Version of tidegate.
    #[schema(example = "0.1.0")]
    pub version: String,
    /// Commit of the build, or "unknown".
    pub commit: String,
    /// Name of the project; "daemon" for a daemon.
    #[schema(example = "hello")]
    pub project: String,
    /// Path of the Compose file; null for a daemon.
    #[schema(example = "/srv/hello/compose.yaml")]
    pub compose_file: Option<String>,
    /// Path of the state file of a daemon; null for a project in the foreground.
    #[schema(example = "/var/lib/tidegate/state.redb")]
    pub state_file: Option<String>,
    /// Process id.
    pub pid: u32,
    /// Start time (RFC 3339, UTC).
    #[schema(example = "2026-01-31T12:00:00Z")]
    pub started: String,
    /// Isolation of the networks: "nftables", "iptables", or "without-firewall" (policy rules, and
    /// forwarding disabled on the bridges).
    #[schema(example = "nftables")]
    pub isolation: String,
    /// The metrics endpoint; null if it is disabled.
    pub metrics: Option<Metrics>,
    /// The services, in the order of the Compose file, or the endpoints of a daemon.
    pub services: Vec<Service>,
}

/// The metrics endpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Metrics {
    /// The configured address, with a port or a range of ports.
    #[schema(example = "127.0.0.1:9464")]
    pub address: String,
    /// The address and port in use; null while another program occupies them and tidegate retries.
    #[schema(example = "127.0.0.1:9464")]
    pub served: Option<String>,
}

/// A service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Service {
    /// The name of the service and of its endpoint.
    #[schema(example = "web")]
    pub name: String,
    /// The state of the service.
    pub state: State,
    /// The process id of its command while it runs.
    pub pid: Option<u32>,
    /// The number of restarts.
    pub restarts: u32,
    /// The last exit of its command.
    pub exit: Option<Exit>,
    /// When it entered this state (RFC 3339, UTC); null for adopted services.
    pub since: Option<String>,
}

/// The state of a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum State {
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
pub struct Exit {
    /// Exit code.
    pub code: Option<i32>,
    /// The signal that killed it.
    pub signal: Option<i32>,
}

/// A network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Network {
    /// The name of the network.
    #[schema(example = "front")]
    pub name: String,
    /// The bridge on the host.
    #[schema(example = "tg-front-1a2b")]
    pub bridge: String,
    /// What connects its endpoints: a bridge of this host, or bridges of all hosts of a cluster.
    #[serde(default)]
    pub driver: Driver,
    /// Subnets, at most one per address family, IPv4 first.
    pub subnets: Vec<Subnet>,
    /// The network has no egress.
    pub internal: bool,
    /// Its endpoints can connect to each other.
    pub inter_container: bool,
    /// The MTU in bytes.
    pub mtu: u32,
    /// The names of its endpoints.
    pub endpoints: Vec<String>,
}

/// What connects the endpoints of a network.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Driver {
    /// A bridge of this host.
    #[default]
    Bridge,
    /// Bridges of all hosts of the cluster, connected with VXLAN.
    Overlay,
}

/// A cluster to join.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewMembership {
    /// The name of this host in the cluster.
    #[schema(example = "host-a")]
    pub host: String,
    /// The address at which other hosts reach this one.
    #[schema(value_type = String, example = "192.0.2.1")]
    pub advertise: IpAddr,
    /// URLs of the etcd servers.
    #[schema(example = json!(["http://192.0.2.10:2379"]))]
    pub etcd: Vec<String>,
    /// User name of etcd.
    #[serde(default)]
    pub user: Option<String>,
    /// File with the password of the user.
    #[serde(default)]
    pub password_file: Option<String>,
    /// File with the certificates of the authorities of the servers, in PEM format.
    #[serde(default)]
    pub authorities: Option<String>,
    /// File with the certificate of this client, in PEM format.
    #[serde(default)]
    pub certificate: Option<String>,
    /// File with the private key of this client, in PEM format.
    #[serde(default)]
    pub key: Option<String>,
}

/// The cluster, as this host knows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Mesh {
    /// The name of this host.
    #[schema(example = "host-a")]
    pub host: String,
    /// The etcd servers.
    pub etcd: Vec<String>,
    /// Whether etcd answers.
    pub connected: bool,
    /// Since when `connected` has had this value (RFC 3339, UTC).
    pub connected_since: String,
    /// The hosts.
    pub hosts: Vec<MeshHost>,
    /// The number of overlay networks.
    pub networks: usize,
    /// The services.
    #[serde(default)]
    pub services: Vec<MeshService>,
    /// What is wrong.
    pub problems: Vec<MeshProblem>,
}

/// A host of the cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MeshHost {
    /// Its name.
    #[schema(example = "host-b")]
    pub name: String,
    /// The address at which other hosts reach it; null if its record has ended.
    #[schema(value_type = Option<String>, example = "192.0.2.2")]
    pub address: Option<IpAddr>,
    /// Its state.
    pub state: HostState,
    /// Since when it has not been heard (RFC 3339, UTC).
    pub silent_since: Option<String>,
    /// The mean round-trip time, in microseconds.
    pub latency_us: Option<u64>,
    /// The number of its endpoints on overlay networks.
    pub endpoints: usize,
}

/// The state of a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum HostState {
    /// This host.
    Own,
    /// It is heard.
    Up,
    /// It is heard, but its record in etcd has ended.
    Unrecorded,
    /// It is not heard, and its record exists.
    Silent,
    /// It is not heard, and its record has ended.
    Down,
}

/// A service of the cluster: ports that every host publishes, and the tasks behind them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MeshService {
    /// Its name, also in DNS.
    #[schema(example = "shop")]
    pub name: String,
    /// The network on which its tasks are reached.
    #[schema(example = "front")]
    pub network: String,
    /// Its ports.
    pub ports: Vec<ServicePort>,
    /// Which task gets the next connection.
    pub balance: Balance,
    /// Tasks on the host that has accepted a connection are preferred.
    pub prefer_local: bool,
    /// What the tasks see of a client.
    pub source: ServiceSource,
    /// When a task is healthy.
    pub health: Option<HealthCheck>,
    /// Time for open connections when a task is detached, in seconds.
    pub drain_s: u32,
    /// Maximum number of tasks with connections; null for all.
    pub replicas: Option<u32>,
    /// Its tasks.
    pub tasks: Vec<ServiceTask>,
    /// What the hosts have made of it.
    pub hosts: Vec<ServiceHost>,
}

/// A published port of a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ServicePort {
    /// Transport protocol.
    pub protocol: Transport,
    /// The port on all hosts.
    pub published: u16,
    /// The port of the tasks.
    pub target: u16,
}

/// Which task of a service gets the next connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Balance {
    /// In turn, by weight.
    #[default]
    RoundRobin,
    /// The one with the fewest open connections for its weight.
    LeastConn,
    /// By the address of the client.
    Source,
}

/// What the tasks of a service see of a client.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ServiceSource {
    /// Its address.
    #[default]
    Client,
    /// An address of the network of the service.
    Proxy,
    /// The same, and the address of the client in a header of the PROXY protocol, version 2 (TCP).
    ProxyProtocol,
    /// The same with version 1.
    ProxyProtocolV1,
}

/// A health check, by the host of the task.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct HealthCheck {
    /// What is tried.
    pub probe: Probe,
    /// Time between two checks, in milliseconds.
    pub interval_ms: u64,
    /// Time for one check, in milliseconds.
    pub timeout_ms: u64,
    /// Failed checks in succession after which the task gets no more connections.
    pub retries: u32,
}

/// What a health check tries.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Probe {
    /// A TCP connection to this port of the task.
    Tcp(u16),
    /// A GET request, whose response has a status below 400.
    Http {
        /// The port of the task.
        port: u16,
        /// The path.
        path: String,
    },
}

/// A task of a service, as this host sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ServiceTask {
    /// The name of the endpoint.
    #[schema(example = "shop-1")]
    pub name: String,
    /// Its host.
    #[schema(example = "host-b")]
    pub host: String,
    /// Its addresses on the network of the service.
    #[schema(value_type = Vec<String>)]
    pub addresses: Vec<IpAddr>,
    /// Its share of the connections.
    pub weight: u16,
    /// Its state.
    pub state: TaskState,
    /// Open connections and UDP sessions through this host.
    pub open: u32,
    /// Connections and UDP sessions through this host.
    pub connections: u64,
    /// Connections through this host that it has not accepted.
    pub failures: u64,
    /// Times that this host has ejected it.
    pub ejections: u64,
}

/// The state of a task.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum TaskState {
    /// It gets connections.
    Ready,
    /// It is not healthy yet, or no longer.
    Starting,
    /// It gets no new connections, because it is detached.
    Draining,
    /// Its host is not heard.
    Silent,
    /// It is beyond the number of replicas.
    Standby,
    /// It has not accepted connections of this host, and gets none for some seconds.
    Ejected,
}

/// What a host has made of a service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ServiceHost {
    /// The host.
    #[schema(example = "host-a")]
    pub host: String,
    /// The ports that it serves.
    #[schema(example = json!(["80/tcp"]))]
    pub ports: Vec<String>,
    /// Why it does not serve the others.
    pub problem: Option<String>,
}

/// A service to create.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewMeshService {
    /// Its name, 1 to 63 characters.
    #[schema(example = "shop")]
    pub name: String,
    /// The network on which its tasks are reached.
    #[schema(example = "front")]
    pub network: String,
    /// Its ports, in the syntax of `docker run -p` without addresses.
    #[schema(example = json!(["80:8080"]))]
    pub ports: Vec<String>,
    /// Which task gets the next connection.
    #[serde(default)]
    pub balance: Balance,
    /// Prefer tasks on the host that has accepted a connection.
    #[serde(default)]
    pub prefer_local: bool,
    /// What the tasks see of a client.
    #[serde(default)]
    pub source: ServiceSource,
    /// When a task is healthy. Without it, it is when it is attached.
    #[serde(default)]
    pub health: Option<HealthCheck>,
    /// Time for open connections when a task is detached, in seconds.
    #[serde(default = "default_drain")]
    pub drain_s: u32,
    /// Maximum number of tasks with connections; null for all.
    #[serde(default)]
    pub replicas: Option<u32>,
}

fn default_drain() -> u32 {
    10
}

/// The number of tasks of a service with connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Scale {
    /// Maximum number of tasks with connections; null for all.
    pub replicas: Option<u32>,
}

/// The part of an endpoint in a service of the cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewTask {
    /// The service.
    #[schema(example = "shop")]
    pub service: String,
    /// Its share of the connections, in relation to the other tasks, 1 to 256.
    #[serde(default = "default_weight")]
    pub weight: u16,
    /// A command that succeeds while the task is healthy, in its network namespace.
    #[serde(default)]
    #[schema(example = json!(["/bin/sh", "-c", "test -e /run/ready"]))]
    pub health_command: Option<Vec<String>>,
}

fn default_weight() -> u16 {
    1
}

/// Something that is wrong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MeshProblem {
    /// What is wrong.
    pub problem: String,
    /// Since when (RFC 3339, UTC).
    pub since: String,
}

/// A subnet of a network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Subnet {
    /// The prefix.
    #[schema(value_type = String, example = "172.28.0.0/24")]
    pub subnet: IpNet,
    /// The gateway address, which belongs to the host.
    #[schema(value_type = String, example = "172.28.0.1")]
    pub gateway: IpAddr,
}

/// A network namespace attached to networks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Endpoint {
    /// The name of the endpoint and of its service.
    #[schema(example = "web")]
    pub name: String,
    /// The identity of the namespace, in the format of /proc/PID/ns/net.
    #[schema(example = "net:[4026532008]")]
    pub namespace: String,
    /// The path of the namespace, if it was adopted.
    #[schema(example = "/run/netns/web")]
    pub netns: Option<String>,
    /// Its attachments to networks.
    pub attachments: Vec<Attachment>,
    /// Its published ports.
    pub ports: Vec<Port>,
}

/// The attachment of an endpoint to a network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Attachment {
    /// The name of the network.
    #[schema(example = "front")]
    pub network: String,
    /// The interface in the endpoint.
    #[schema(example = "eth0")]
    pub interface: String,
    /// The MAC address of that interface.
    #[schema(example = "02:5d:0a:9b:10:c4")]
    pub mac: String,
    /// Its addresses with the prefix length of the subnet.
    #[schema(value_type = Vec<String>, example = json!(["172.28.0.2/24"]))]
    pub addresses: Vec<IpNet>,
    /// The default route of the endpoint uses this network.
    pub default_route: bool,
}

/// A published port: one socket on the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Port {
    /// The id of the port. Ids are not reused.
    pub id: u32,
    /// The endpoint that it forwards to.
    #[schema(example = "web")]
    pub endpoint: String,
    /// The label of the port in metrics.
    #[schema(example = "0.0.0.0:8080/tcp")]
    pub publish: String,
    /// The address on the host.
    #[schema(value_type = String, example = "0.0.0.0")]
    pub host_ip: IpAddr,
    /// The port on the host.
    pub host_port: u16,
    /// The transport protocol.
    pub protocol: Transport,
    /// The port in the endpoint.
    pub container_port: u16,
}

/// The transport protocol of a published port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
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
pub struct Figures {
    /// Name of the project.
    #[schema(example = "hello")]
    pub project: String,
    /// Process id.
    pub pid: u32,
    /// Start time (RFC 3339, UTC).
    #[schema(example = "2026-01-31T12:00:00Z")]
    pub started: String,
    /// Milliseconds since the start, by a monotonic clock.
    pub elapsed_ms: u64,
    /// Published ports, one per socket, as in `/v1/ports`.
    pub ports: Vec<PortFigures>,
    /// TCP connections of all published ports.
    pub connections: Fill,
    /// File descriptors of published ports, connections and sessions.
    pub descriptors: Fill,
    /// Networks, as in `/v1/networks`.
    pub networks: Vec<NetworkFigures>,
    /// The NAT engine; null if the kernel masquerades, or without egress.
    pub nat: Option<NatFigures>,
    /// Upstream name servers.
    pub upstreams: Vec<UpstreamFigures>,
}

/// The fill level of a bounded table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Fill {
    /// Entries in use.
    pub used: u64,
    /// The limit.
    pub limit: u64,
}

/// Counters of a published port: one socket on the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PortFigures {
    /// The id of the port.
    pub id: u32,
    /// The endpoint that it forwards to.
    #[schema(example = "web")]
    pub endpoint: String,
    /// The label of the port in metrics.
    #[schema(example = "0.0.0.0:8080/tcp")]
    pub publish: String,
    /// The port in the endpoint.
    pub container_port: u16,
    /// Open TCP connections or UDP sessions.
    pub open: Fill,
    /// Accepted TCP connections, including refused ones; UDP sessions created.
    pub begun: u64,
    /// TCP connections that were not connected to the endpoint.
    pub refused: u64,
    /// TCP connections that ended with a reset; UDP sessions evicted.
    pub cut: u64,
    /// Payload to the endpoint, in bytes.
    pub bytes_in: u64,
    /// Payload to clients, in bytes.
    pub bytes_out: u64,
    /// Datagrams to the endpoint.
    pub datagrams_in: u64,
    /// Datagrams to clients.
    pub datagrams_out: u64,
    /// Dropped datagrams.
    pub dropped: u64,
    /// Successful connects to the endpoint (TCP).
    pub dialled: u64,
    /// The total time of these connects, in microseconds.
    pub dial_us: u64,
}

/// Counters of a network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NetworkFigures {
    /// The name of the network.
    #[schema(example = "front")]
    pub name: String,
    /// The names of its endpoints.
    pub endpoints: Vec<String>,
    /// Answered DNS queries. An endpoint on several networks counts on its first one.
    pub questions: u64,
    /// Of those, answered with SERVFAIL or REFUSED.
    pub questions_failed: u64,
    /// Of those, answered with NXDOMAIN.
    pub questions_unknown: u64,
}

/// Counters of the NAT engine. "In" is towards containers, "out" is towards external hosts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NatFigures {
    /// Current flows of all protocols.
    pub flows: Fill,
    /// Of those, TCP connections.
    pub flows_tcp: u64,
    /// Flows created.
    pub begun: u64,
    /// Payload to containers, in bytes.
    pub bytes_in: u64,
    /// Payload to external hosts, in bytes.
    pub bytes_out: u64,
    /// Packets to containers through the TUN device.
    pub packets_in: u64,
    /// Packets from containers through the TUN device.
    pub packets_out: u64,
    /// Dropped packets.
    pub dropped: u64,
    /// TCP connections that failed or ended with a reset.
    pub resets: u64,
    /// Retransmissions to containers.
    pub retransmissions: u64,
}

/// Counters of an upstream name server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct UpstreamFigures {
    /// The address of the server.
    #[schema(example = "192.0.2.53:53")]
    pub server: String,
    /// Whether the server is tried first. A server that did not respond loses this.
    pub trusted: bool,
    /// Queries sent.
    pub asked: u64,
    /// Of those, without a response in time.
    pub silent: u64,
    /// Of those, answered with an error.
    pub failed: u64,
    /// Responses with a measured response time.
    pub answered: u64,
    /// The total of these response times, in microseconds.
    pub took_us: u64,
}

/// Ports to publish.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewPorts {
    /// The endpoint to forward to.
    #[schema(example = "web")]
    pub endpoint: String,
    /// Ports in the syntax of `docker run -p`: `[HOST_IP:][HOST_PORT[-END]:]PORT[-END][/tcp|udp]`.
    /// Without HOST_PORT, a free port is chosen. Without HOST_IP, the port is published on all IPv4
    /// and IPv6 addresses, and the response contains one port for each family.
    #[schema(example = "8081:80")]
    pub spec: String,
}

/// The new namespace of an adopted endpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewNamespace {
    /// The absolute path of the network namespace.
    #[schema(example = "/run/netns/web")]
    pub netns: String,
}

/// The error of a request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ErrorBody {
    /// One line that names the object, the cause and the remedy.
    #[schema(example = "there is no endpoint \"wbe\"")]
    pub error: String,
}

/// A network to create.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewNetwork {
    /// The name of the network, 1 to 63 characters.
    #[schema(example = "front")]
    pub name: String,
    /// An overlay network exists on all hosts of the cluster.
    #[serde(default)]
    pub driver: Driver,
    /// Rejected if true: VXLAN is not encrypted.
    #[serde(default)]
    pub encrypted: bool,
    /// Subnets, at most one per address family. A missing one is chosen.
    #[serde(default)]
    pub subnets: Vec<NewSubnet>,
    /// The network has an IPv6 subnet. Implied by a subnet of that family.
    #[serde(default)]
    pub ipv6: bool,
    /// The network has no egress.
    #[serde(default)]
    pub internal: bool,
    /// Its endpoints cannot connect to each other.
    #[serde(default)]
    pub isolated: bool,
    /// The MTU in bytes. If null, that of the host's default route.
    #[serde(default)]
    pub mtu: Option<u32>,
    /// The name of the bridge. If null, it is derived from the name of the network.
    #[serde(default)]
    pub bridge: Option<String>,
    /// Upstream DNS servers. If empty, those of the host.
    #[serde(default)]
    #[schema(value_type = Vec<String>)]
    pub dns: Vec<IpAddr>,
    /// DNS is served at the gateway addresses, instead of in each container.
    #[serde(default)]
    pub dns_at_gateway: bool,
}

/// A subnet of a network to create.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewSubnet {
    /// The prefix.
    #[schema(value_type = String, example = "10.9.0.0/24")]
    pub subnet: IpNet,
    /// The gateway address. If null, the first address.
    #[serde(default)]
    #[schema(value_type = Option<String>, example = "10.9.0.1")]
    pub gateway: Option<IpAddr>,
}

/// A network namespace to attach to networks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewEndpoint {
    /// The name of the endpoint, 1 to 63 characters.
    #[schema(example = "web")]
    pub name: String,
    /// The absolute path of the network namespace.
    #[schema(example = "/run/netns/web")]
    pub netns: String,
    /// Its networks, in the order of its interfaces. The first one that is not internal provides
    /// the default route.
    pub networks: Vec<NewAttachment>,
    /// An additional DNS name on all networks.
    #[serde(default)]
    pub hostname: Option<String>,
    /// Ports to publish, in the syntax of `docker run -p`.
    #[serde(default)]
    #[schema(example = json!(["8080:80"]))]
    pub ports: Vec<String>,
    /// The service of the cluster that it belongs to.
    #[serde(default)]
    pub task: Option<NewTask>,
}

/// An attachment to create.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewAttachment {
    /// The name of the network.
    #[schema(example = "front")]
    pub network: String,
    /// Fixed addresses, at most one per address family. The others are chosen.
    #[serde(default)]
    #[schema(value_type = Vec<String>)]
    pub addresses: Vec<IpAddr>,
    /// Additional DNS names on this network.
    #[serde(default)]
    pub aliases: Vec<String>,
    /// The endpoint may also send from other addresses (routers, VRRP).
    #[serde(default)]
    pub any_source: bool,
}

/// A project to bring up in the background.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewProject {
    /// The name of the project, 1 to 63 characters.
    #[schema(example = "shop")]
    pub name: String,
    /// The absolute path of its Compose file, for reports.
    #[serde(default)]
    #[schema(example = "/srv/shop/compose.yaml")]
    pub compose_file: Option<String>,
    /// The time between SIGTERM and SIGKILL when its services are stopped, in milliseconds.
    #[serde(default = "ten_seconds")]
    #[schema(default = 10000)]
    pub grace_ms: u64,
    /// Its networks. They are named `PROJECT/NAME` elsewhere.
    pub networks: Vec<NewNetwork>,
    /// Its services, in order. Their endpoints are named `PROJECT/NAME` elsewhere.
    pub services: Vec<NewService>,
}

fn ten_seconds() -> u64 {
    10_000
}

/// A service of a project: a command, or an adopted network namespace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewService {
    /// The name of the service, 1 to 63 characters. It is a DNS name on its networks.
    #[schema(example = "web")]
    pub name: String,
    /// The program and its arguments, which run in a new network namespace. Empty with `netns`.
    #[serde(default)]
    pub command: Vec<String>,
    /// The absolute path of the network namespace to adopt, instead of a command.
    #[serde(default)]
    pub netns: Option<String>,
    /// Environment variables of the command in addition to PATH, HOME, LANG, TERM and USER of the
    /// daemon.
    #[serde(default)]
    pub environment: BTreeMap<String, String>,
    /// The host name, also a DNS name on its networks. If null, the name of the service.
    #[serde(default)]
    pub hostname: Option<String>,
    /// The absolute path of the working directory of the command.
    #[serde(default = "root")]
    #[schema(example = "/srv/shop")]
    pub working_dir: String,
    /// Its networks, in the order of its interfaces. The first one that is not internal provides
    /// the default route.
    pub networks: Vec<NewAttachment>,
    /// Ports to publish, in the syntax of `docker run -p`.
    #[serde(default)]
    pub ports: Vec<String>,
    /// Upstream DNS servers. If empty, those of its networks.
    #[serde(default)]
    #[schema(value_type = Vec<String>)]
    pub dns: Vec<IpAddr>,
    /// DNS search domains. If empty, those of the host.
    #[serde(default)]
    pub dns_search: Vec<String>,
    /// Options of resolv.conf(5).
    #[serde(default)]
    pub dns_options: Vec<String>,
    /// What happens when the command exits.
    #[serde(default)]
    pub restart: RestartPolicy,
    /// The maximum number of restarts with `on-failure`. If null, there is no limit.
    #[serde(default)]
    pub max_restarts: Option<u32>,
    /// The services that have to run before this one starts.
    #[serde(default)]
    pub depends_on: Vec<String>,
}

fn root() -> String {
    "/".to_owned()
}

/// A restart policy, as in Compose.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum RestartPolicy {
    /// The command is not restarted.
    #[default]
    No,
    /// It is restarted after an exit code other than 0, and after a signal.
    OnFailure,
    /// It is always restarted.
    Always,
    /// The same.
    UnlessStopped,
}

/// A project in the background.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Project {
    /// The name of the project.
    #[schema(example = "shop")]
    pub name: String,
    /// The path of its Compose file.
    #[schema(example = "/srv/shop/compose.yaml")]
    pub compose_file: Option<String>,
    /// The process that runs its services, which outlives the daemon; null while it is started.
    pub supervisor: Option<u32>,
    /// The names of its networks, as `PROJECT/NAME`.
    pub networks: Vec<String>,
    /// Its services. Their names are `PROJECT/NAME`.
    pub services: Vec<Service>,
}

/// A line of output of a service. The logs are a sequence of such objects, one per line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct LogLine {
    /// The name of the service in the project.
    #[schema(example = "web")]
    pub service: String,
    /// Where it comes from.
    pub stream: OutputStream,
    /// When it was written (RFC 3339 with milliseconds, UTC).
    #[schema(example = "2026-01-31T12:00:00.000Z")]
    pub time: String,
    /// The line, without its end.
    pub text: String,
}

/// Where a line of the logs comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum OutputStream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
    /// A message of tidegate about the service, for instance its exit.
    Notice,
}

/// A change of an object. The events are a sequence of such objects, one per line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Event {
    /// When it was observed (RFC 3339 with milliseconds, UTC).
    #[schema(example = "2026-01-31T12:00:00.000Z")]
    pub time: String,
    /// What happened.
    pub change: Change,
    /// The kind of the object.
    pub kind: ObjectKind,
    /// The name of the object; for a port the label `0.0.0.0:8080/tcp`.
    #[schema(example = "shop/web")]
    pub name: String,
    /// The current state of a service, the last one if it was removed; null for other objects.
    pub service: Option<Service>,
}

/// What happened to an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Change {
    /// It was created.
    Added,
    /// It was removed.
    Removed,
    /// The state of a service has changed.
    Changed,
}

/// The kind of an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum ObjectKind {
    /// A network.
    Network,
    /// An endpoint.
    Endpoint,
    /// A published port.
    Port,
    /// A project in the background.
    Project,
    /// A service, or an adopted endpoint.
    Service,
}
