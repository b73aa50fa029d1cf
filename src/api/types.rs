//! What the API says and is told, as JSON. Nothing of it is used inside, and nothing inside is told
//! as it is.

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use std::net::IpAddr;
use utoipa::ToSchema;

/// What runs here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub(crate) struct Status {
    /// Version of tidegate.
    #[schema(example = "0.1.0")]
    pub(crate) version: String,
    /// Commit that it was built from, or "unknown".
    pub(crate) commit: String,
    /// Name of the project.
    #[schema(example = "hello")]
    pub(crate) project: String,
    /// Path of the Compose file.
    #[schema(example = "/srv/hello/compose.yaml")]
    pub(crate) compose_file: String,
    /// Process id.
    pub(crate) pid: u32,
    /// When it was started (RFC 3339, UTC).
    #[schema(example = "2026-01-31T12:00:00Z")]
    pub(crate) started: String,
    /// How networks are kept closed: "nftables", "iptables", or "without-firewall", by policy rules
    /// and forwarding switched off on the bridges.
    #[schema(example = "nftables")]
    pub(crate) isolation: String,
    /// Where metrics are served; null if they are not wanted.
    pub(crate) metrics: Option<Metrics>,
    /// The services, in the order of the Compose file.
    pub(crate) services: Vec<Service>,
}

/// Where metrics are served.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub(crate) struct Metrics {
    /// Address and port, or range of ports, that were asked for.
    #[schema(example = "127.0.0.1:9464")]
    pub(crate) address: String,
    /// Address and port that answer; null while they are in use by another program, which is tried
    /// again.
    #[schema(example = "127.0.0.1:9464")]
    pub(crate) served: Option<String>,
}

/// A service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub(crate) struct Service {
    /// Its name, which is that of its endpoint too.
    #[schema(example = "web")]
    pub(crate) name: String,
    /// Where it is in its life.
    pub(crate) state: State,
    /// Process id of its command, while that runs.
    pub(crate) pid: Option<u32>,
    /// How often it was started again.
    pub(crate) restarts: u32,
    /// How its command ended last, if it has.
    pub(crate) exit: Option<Exit>,
    /// Since when it is in that state (RFC 3339, UTC); not known of adopted ones.
    pub(crate) since: Option<String>,
}

/// Where a service is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum State {
    /// Its surroundings are being set up.
    Starting,
    /// Its command runs.
    Running,
    /// Its command has ended and will be started again.
    Restarting,
    /// Its command has ended for good.
    Ended,
    /// A namespace that exists (`x-netns`): what runs in there is not tidegate's.
    Adopted,
    /// The same, and its path leads to no namespace now: the container is down.
    Gone,
}

/// How a command has ended: by one of the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub(crate) struct Exit {
    /// Exit code.
    pub(crate) code: Option<i32>,
    /// Number of the signal that killed it.
    pub(crate) signal: Option<i32>,
}

/// A network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub(crate) struct Network {
    /// Its name.
    #[schema(example = "front")]
    pub(crate) name: String,
    /// Interface of the host.
    #[schema(example = "tg-front-1a2b")]
    pub(crate) bridge: String,
    /// At most one of each family, IPv4 first.
    pub(crate) subnets: Vec<Subnet>,
    /// There is no egress.
    pub(crate) internal: bool,
    /// Its endpoints reach one another.
    pub(crate) inter_container: bool,
    /// Bytes that fit into one packet.
    pub(crate) mtu: u32,
    /// Names of the endpoints on it.
    pub(crate) endpoints: Vec<String>,
}

/// A subnet of a network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub(crate) struct Subnet {
    /// The subnet.
    #[schema(value_type = String, example = "172.28.0.0/24")]
    pub(crate) subnet: IpNet,
    /// The host's address in it.
    #[schema(value_type = String, example = "172.28.0.1")]
    pub(crate) gateway: IpAddr,
}

/// A namespace that is attached to networks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub(crate) struct Endpoint {
    /// Its name, which is that of its service too.
    #[schema(example = "web")]
    pub(crate) name: String,
    /// Which namespace it is, as the links under /proc/PID/ns say.
    #[schema(example = "net:[4026532008]")]
    pub(crate) namespace: String,
    /// Path of the namespace, if it was adopted.
    #[schema(example = "/run/netns/web")]
    pub(crate) netns: Option<String>,
    /// Where it is attached.
    pub(crate) attachments: Vec<Attachment>,
    /// Its published ports.
    pub(crate) ports: Vec<Port>,
}

/// An endpoint on a network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub(crate) struct Attachment {
    /// Name of the network.
    #[schema(example = "front")]
    pub(crate) network: String,
    /// Interface in the endpoint.
    #[schema(example = "eth0")]
    pub(crate) interface: String,
    /// Hardware address of that interface.
    #[schema(example = "02:5d:0a:9b:10:c4")]
    pub(crate) mac: String,
    /// Its addresses, with the prefix length of their subnets.
    #[schema(value_type = Vec<String>, example = json!(["172.28.0.2/24"]))]
    pub(crate) addresses: Vec<IpNet>,
    /// The endpoint's default route leads by this network.
    pub(crate) default_route: bool,
}

/// A published port: one socket of the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub(crate) struct Port {
    /// Its number, which no other port gets afterwards.
    pub(crate) id: u32,
    /// The endpoint that it leads to.
    #[schema(example = "web")]
    pub(crate) endpoint: String,
    /// Its label in metrics.
    #[schema(example = "0.0.0.0:8080/tcp")]
    pub(crate) publish: String,
    /// Address of the host.
    #[schema(value_type = String, example = "0.0.0.0")]
    pub(crate) host_ip: IpAddr,
    /// Port of the host.
    pub(crate) host_port: u16,
    /// The transport.
    pub(crate) protocol: Transport,
    /// Port of the endpoint.
    pub(crate) container_port: u16,
}

/// The transport of a published port.
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

/// What has been counted since the start, and what there is now. A rate is the difference of two of
/// them, of the same `pid` and `started`, over the difference of their `elapsed_ms`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub(crate) struct Figures {
    /// Name of the project.
    #[schema(example = "hello")]
    pub(crate) project: String,
    /// Process id.
    pub(crate) pid: u32,
    /// When it was started (RFC 3339, UTC).
    #[schema(example = "2026-01-31T12:00:00Z")]
    pub(crate) started: String,
    /// Milliseconds since then, by a clock that is not set.
    pub(crate) elapsed_ms: u64,
    /// Published ports, one for each socket, as in `/v1/ports`.
    pub(crate) ports: Vec<PortFigures>,
    /// TCP connections of all published ports together.
    pub(crate) connections: Fill,
    /// File descriptors of published ports, connections and sessions.
    pub(crate) descriptors: Fill,
    /// Networks, as in `/v1/networks`.
    pub(crate) networks: Vec<NetworkFigures>,
    /// The NAT engine, if it is what leads containers out.
    pub(crate) nat: Option<NatFigures>,
    /// Name servers that questions were forwarded to.
    pub(crate) upstreams: Vec<UpstreamFigures>,
}

/// How full a table is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub(crate) struct Fill {
    /// What there is.
    pub(crate) used: u64,
    /// What there may be.
    pub(crate) limit: u64,
}

/// Figures of a published port: one socket of the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub(crate) struct PortFigures {
    /// Its number.
    pub(crate) id: u32,
    /// The endpoint that it leads to.
    #[schema(example = "web")]
    pub(crate) endpoint: String,
    /// Its label in metrics.
    #[schema(example = "0.0.0.0:8080/tcp")]
    pub(crate) publish: String,
    /// Port of the endpoint.
    pub(crate) container_port: u16,
    /// TCP connections or UDP sessions now.
    pub(crate) open: Fill,
    /// TCP connections that clients made, refused ones included; UDP sessions begun.
    pub(crate) begun: u64,
    /// TCP connections that never reached the endpoint.
    pub(crate) refused: u64,
    /// TCP connections that ended in a reset; UDP sessions that had to make room.
    pub(crate) cut: u64,
    /// Payload to the endpoint, in bytes.
    pub(crate) bytes_in: u64,
    /// Payload to clients, in bytes.
    pub(crate) bytes_out: u64,
    /// Datagrams to the endpoint.
    pub(crate) datagrams_in: u64,
    /// Datagrams to clients.
    pub(crate) datagrams_out: u64,
    /// Datagrams that were not carried.
    pub(crate) dropped: u64,
    /// Times that the endpoint was reached (TCP).
    pub(crate) dialled: u64,
    /// Microseconds that took, of all of them together.
    pub(crate) dial_us: u64,
}

/// Figures of a network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub(crate) struct NetworkFigures {
    /// Its name.
    #[schema(example = "front")]
    pub(crate) name: String,
    /// Names of the endpoints on it.
    pub(crate) endpoints: Vec<String>,
    /// Questions for names that were answered; of endpoints on several networks, those of the
    /// first.
    pub(crate) questions: u64,
    /// Of those, with SERVFAIL or REFUSED.
    pub(crate) questions_failed: u64,
    /// Of those, that there is no such name.
    pub(crate) questions_unknown: u64,
}

/// Figures of the NAT engine. Out is to the world, in to the containers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub(crate) struct NatFigures {
    /// Flows now, of all protocols.
    pub(crate) flows: Fill,
    /// Of those, TCP connections.
    pub(crate) flows_tcp: u64,
    /// Flows begun.
    pub(crate) begun: u64,
    /// Payload to containers, in bytes.
    pub(crate) bytes_in: u64,
    /// Payload to the world, in bytes.
    pub(crate) bytes_out: u64,
    /// Packets that crossed its device, to containers.
    pub(crate) packets_in: u64,
    /// Packets that crossed its device, from containers.
    pub(crate) packets_out: u64,
    /// Packets that were not carried.
    pub(crate) dropped: u64,
    /// TCP connections that reached nobody, or ended in a reset.
    pub(crate) resets: u64,
    /// Times that something was sent to a container again.
    pub(crate) retransmissions: u64,
}

/// Figures of a name server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub(crate) struct UpstreamFigures {
    /// Its address.
    #[schema(example = "192.0.2.53:53")]
    pub(crate) server: String,
    /// Others are not asked before it because it was silent.
    pub(crate) trusted: bool,
    /// Questions sent.
    pub(crate) asked: u64,
    /// Of those, not answered in time, or not at all.
    pub(crate) silent: u64,
    /// Of those, answered with a failure.
    pub(crate) failed: u64,
    /// Answers of which the time was taken.
    pub(crate) answered: u64,
    /// Microseconds that those took together.
    pub(crate) took_us: u64,
}

/// Ports to publish.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct NewPorts {
    /// The endpoint that they shall lead to.
    #[schema(example = "web")]
    pub(crate) endpoint: String,
    /// In the grammar of `docker run -p`: `[HOST_IP:][HOST_PORT[-END]:]PORT[-END][/tcp|udp]`.
    /// Without a HOST_PORT a free one is found; without a HOST_IP it is all addresses, IPv4 and
    /// IPv6, a port of the answer for each.
    #[schema(example = "8081:80")]
    pub(crate) spec: String,
}

/// Where the container of an adopted endpoint is now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct NewNamespace {
    /// Path of its network namespace, an absolute one.
    #[schema(example = "/run/netns/web")]
    pub(crate) netns: String,
}

/// Why a request was not fulfilled.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub(crate) struct ErrorBody {
    /// One line that names the object and says what to do.
    #[schema(example = "there is no endpoint \"wbe\"")]
    pub(crate) error: String,
}
