//! The on-disk form of the state.
//!
//! A record is a JSON object, stored under the text of the [`Name`] of its network, endpoint or
//! project.
//! This module describes the form completely: its types are separate from those of the state, so
//! that a change of the state does not change the form by accident.
//!
//! A change of the form increments [`FORMAT`], including a new optional field: an older version
//! would drop it when it writes the record. `testdata/format-N.jsonl` has samples of format N,
//! which remain readable.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use crate::{
    Endpoint, EtcdAccess, Membership, Name, Network, Project, PublishedPort, Service, State, Task,
};
use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tidegate_model::{MacAddress, Protocol, Restart};
use tidegate_netsetup::{self as netsetup, Attachment, Interface, Overlay, Subnet};

/// The format that this version writes. It also reads format 1, which has no projects and no DNS
/// servers of endpoints, format 2, which has no cluster and no overlay networks, and format 3,
/// which has no services of the cluster.
pub(crate) const FORMAT: u32 = 4;

/// A network.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct NetworkRecord {
    bridge: InterfaceRecord,
    /// IPv4 before IPv6.
    subnets: Vec<SubnetRecord>,
    internal: bool,
    inter_container: bool,
    /// In bytes.
    mtu: u32,
    dns: Vec<IpAddr>,
    names_at_gateway: bool,
    /// Since format 3.
    #[serde(default = "yes")]
    has_names: bool,
    /// Since format 3.
    #[serde(default)]
    overlay: Option<OverlayRecord>,
}

fn yes() -> bool {
    true
}

/// Since format 3.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct OverlayRecord {
    vni: u32,
    internal: bool,
}

/// The membership in a cluster, by the name of this host. Since format 3.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct MembershipRecord {
    advertise: IpAddr,
    servers: Vec<String>,
    user: Option<String>,
    password_file: Option<String>,
    authorities: Option<String>,
    certificate: Option<String>,
    key: Option<String>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SubnetRecord {
    subnet: IpNet,
    gateway: IpAddr,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct InterfaceRecord {
    name: String,
    mac: MacAddress,
}

/// An endpoint.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct EndpointRecord {
    /// Absolute path.
    namespace: String,
    hostname: Option<String>,
    /// Since format 2.
    #[serde(default)]
    dns: Vec<IpAddr>,
    /// In the order of the interfaces.
    attachments: Vec<AttachmentRecord>,
    /// Sorted.
    ports: Vec<PortRecord>,
    /// Since format 4.
    #[serde(default)]
    task: Option<TaskRecord>,
}

/// The part of an endpoint in a service of the cluster.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct TaskRecord {
    service: String,
    weight: u16,
    health_command: Option<Vec<String>>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct AttachmentRecord {
    network: Name,
    aliases: Vec<String>,
    host_end: InterfaceRecord,
    inside: InterfaceRecord,
    /// With the prefix length of the subnet.
    addresses: Vec<IpNet>,
    default_route: bool,
    any_source: bool,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct PortRecord {
    address: IpAddr,
    host_port: u16,
    container_port: u16,
    /// `tcp`, `udp` or `sctp`.
    protocol: String,
}

/// A project. Since format 2.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ProjectRecord {
    /// Path of the Compose file.
    file: Option<String>,
    grace_ms: u64,
    services: Vec<ServiceRecord>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ServiceRecord {
    name: String,
    command: Vec<String>,
    environment: BTreeMap<String, String>,
    /// Absolute path.
    working_dir: String,
    dns_search: Vec<String>,
    dns_options: Vec<String>,
    restart: RestartRecord,
    depends_on: Vec<String>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum RestartRecord {
    No,
    /// With the maximum number of restarts.
    OnFailure(Option<u32>),
    Always,
    UnlessStopped,
}

/// A record that is not valid.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RecordError {
    #[error("{0}")]
    Name(#[from] crate::NameError),
    #[error("{0}")]
    Json(#[from] serde_json::Error),
    #[error("{0}")]
    Protocol(#[from] tidegate_model::UnknownProtocol),
    #[error("path {0:?} is not UTF-8")]
    Path(std::path::PathBuf),
    #[error("network {0} does not exist")]
    UnknownNetwork(Name),
}

/// A value with a record.
pub(crate) trait Record: PartialEq + Sized {
    /// Returns the value with `name` from its record.
    fn read(name: Name, record: &[u8]) -> Result<Self, RecordError>;
    /// Returns the record.
    fn write(&self) -> Result<Vec<u8>, RecordError>;
    /// Returns the key of the record.
    fn name(&self) -> &Name;
}

impl Record for Network {
    fn read(name: Name, record: &[u8]) -> Result<Self, RecordError> {
        let record: NetworkRecord = serde_json::from_slice(record)?;
        let subnet = |one: SubnetRecord| Subnet { subnet: one.subnet, gateway: one.gateway };
        Ok(Self {
            setup: netsetup::Network {
                name: name.to_string(),
                bridge: record.bridge.into(),
                subnets: record.subnets.into_iter().map(subnet).collect(),
                internal: record.internal,
                inter_container: record.inter_container,
                mtu: record.mtu,
                overlay: record
                    .overlay
                    .map(|OverlayRecord { vni, internal }| Overlay { vni, internal }),
            },
            name,
            dns: record.dns,
            names_at_gateway: record.names_at_gateway,
            has_names: record.has_names,
        })
    }

    fn write(&self) -> Result<Vec<u8>, RecordError> {
        // Complete patterns, so that a new field of the state is not forgotten here.
        let Self { name: _, setup, dns, names_at_gateway, has_names } = self;
        let netsetup::Network { name: _, bridge, subnets, internal, inter_container, mtu, overlay } =
            setup;
        let subnet = |one: &Subnet| SubnetRecord { subnet: one.subnet, gateway: one.gateway };
        Ok(serde_json::to_vec(&NetworkRecord {
            bridge: bridge.into(),
            subnets: subnets.iter().map(subnet).collect(),
            internal: *internal,
            inter_container: *inter_container,
            mtu: *mtu,
            dns: dns.clone(),
            names_at_gateway: *names_at_gateway,
            has_names: *has_names,
            overlay: overlay.map(|Overlay { vni, internal }| OverlayRecord { vni, internal }),
        })?)
    }

    fn name(&self) -> &Name {
        &self.name
    }
}

impl Record for Endpoint {
    fn read(name: Name, record: &[u8]) -> Result<Self, RecordError> {
        let record: EndpointRecord = serde_json::from_slice(record)?;
        let mut aliases = BTreeMap::new();
        let mut attachments = Vec::new();
        for one in record.attachments {
            attachments.push(Attachment {
                network: one.network.to_string(),
                host_end: one.host_end.into(),
                inside: one.inside.into(),
                addresses: one.addresses,
                default_route: one.default_route,
                any_address: one.any_source,
            });
            aliases.insert(one.network, one.aliases);
        }
        let port = |one: PortRecord| -> Result<PublishedPort, RecordError> {
            Ok(PublishedPort {
                protocol: one.protocol.parse::<Protocol>()?,
                address: one.address,
                host_port: one.host_port,
                container_port: one.container_port,
            })
        };
        let mut ports: Vec<PublishedPort> =
            record.ports.into_iter().map(port).collect::<Result<_, _>>()?;
        ports.sort();
        Ok(Self {
            setup: netsetup::Endpoint { name: name.to_string(), attachments },
            name,
            aliases,
            hostname: record.hostname,
            dns: record.dns,
            namespace: record.namespace.into(),
            ports,
            task: record.task.map(|TaskRecord { service, weight, health_command }| Task {
                service,
                weight,
                health_command,
            }),
        })
    }

    fn write(&self) -> Result<Vec<u8>, RecordError> {
        let Self { name: _, setup, aliases, hostname, dns, namespace, ports, task } = self;
        let netsetup::Endpoint { name: _, attachments } = setup;
        let attachment = |one: &Attachment| -> Result<AttachmentRecord, RecordError> {
            let Attachment { network, host_end, inside, addresses, default_route, any_address } =
                one;
            let network: Name = network.parse()?;
            Ok(AttachmentRecord {
                aliases: aliases.get(&network).cloned().unwrap_or_default(),
                network,
                host_end: host_end.into(),
                inside: inside.into(),
                addresses: addresses.clone(),
                default_route: *default_route,
                any_source: *any_address,
            })
        };
        let port = |one: &PublishedPort| {
            let PublishedPort { protocol, address, host_port, container_port } = *one;
            PortRecord { address, host_port, container_port, protocol: protocol.to_string() }
        };
        Ok(serde_json::to_vec(&EndpointRecord {
            namespace: utf8(namespace)?,
            hostname: hostname.clone(),
            dns: dns.clone(),
            attachments: attachments.iter().map(attachment).collect::<Result<_, _>>()?,
            ports: ports.iter().map(port).collect(),
            task: task.clone().map(|Task { service, weight, health_command }| TaskRecord {
                service,
                weight,
                health_command,
            }),
        })?)
    }

    fn name(&self) -> &Name {
        &self.name
    }
}

impl Record for Project {
    fn read(name: Name, record: &[u8]) -> Result<Self, RecordError> {
        let record: ProjectRecord = serde_json::from_slice(record)?;
        let service = |one: ServiceRecord| Service {
            name: one.name,
            command: one.command,
            environment: one.environment,
            working_dir: one.working_dir.into(),
            dns_search: one.dns_search,
            dns_options: one.dns_options,
            restart: match one.restart {
                RestartRecord::No => Restart::No,
                RestartRecord::OnFailure(max) => Restart::OnFailure { max },
                RestartRecord::Always => Restart::Always,
                RestartRecord::UnlessStopped => Restart::UnlessStopped,
            },
            depends_on: one.depends_on,
        };
        Ok(Self {
            name,
            file: record.file.map(Into::into),
            grace: Duration::from_millis(record.grace_ms),
            services: record.services.into_iter().map(service).collect(),
        })
    }

    fn write(&self) -> Result<Vec<u8>, RecordError> {
        let Self { name: _, file, grace, services } = self;
        let service = |one: &Service| -> Result<ServiceRecord, RecordError> {
            let Service {
                name,
                command,
                environment,
                working_dir,
                dns_search,
                dns_options,
                restart,
                depends_on,
            } = one;
            Ok(ServiceRecord {
                name: name.clone(),
                command: command.clone(),
                environment: environment.clone(),
                working_dir: utf8(working_dir)?,
                dns_search: dns_search.clone(),
                dns_options: dns_options.clone(),
                restart: match restart {
                    Restart::No => RestartRecord::No,
                    Restart::OnFailure { max } => RestartRecord::OnFailure(*max),
                    Restart::Always => RestartRecord::Always,
                    Restart::UnlessStopped => RestartRecord::UnlessStopped,
                },
                depends_on: depends_on.clone(),
            })
        };
        Ok(serde_json::to_vec(&ProjectRecord {
            file: file.as_deref().map(utf8).transpose()?,
            grace_ms: u64::try_from(grace.as_millis()).unwrap_or(u64::MAX),
            services: services.iter().map(service).collect::<Result<_, _>>()?,
        })?)
    }

    fn name(&self) -> &Name {
        &self.name
    }
}

impl Record for Membership {
    fn read(name: Name, record: &[u8]) -> Result<Self, RecordError> {
        let record: MembershipRecord = serde_json::from_slice(record)?;
        let etcd = EtcdAccess {
            servers: record.servers,
            user: record.user,
            password_file: record.password_file.map(Into::into),
            authorities: record.authorities.map(Into::into),
            certificate: record.certificate.map(Into::into),
            key: record.key.map(Into::into),
        };
        Ok(Self { host: name, advertise: record.advertise, etcd })
    }

    fn write(&self) -> Result<Vec<u8>, RecordError> {
        let Self { host: _, advertise, etcd } = self;
        let EtcdAccess { servers, user, password_file, authorities, certificate, key } = etcd;
        let path = |path: &Option<std::path::PathBuf>| path.as_deref().map(utf8).transpose();
        Ok(serde_json::to_vec(&MembershipRecord {
            advertise: *advertise,
            servers: servers.clone(),
            user: user.clone(),
            password_file: path(password_file)?,
            authorities: path(authorities)?,
            certificate: path(certificate)?,
            key: path(key)?,
        })?)
    }

    fn name(&self) -> &Name {
        &self.host
    }
}

fn utf8(path: &Path) -> Result<String, RecordError> {
    path.to_str().map(str::to_owned).ok_or_else(|| RecordError::Path(path.to_owned()))
}

impl From<&Interface> for InterfaceRecord {
    fn from(interface: &Interface) -> Self {
        Self { name: interface.name.clone(), mac: interface.mac }
    }
}

impl From<InterfaceRecord> for Interface {
    fn from(record: InterfaceRecord) -> Self {
        Self { name: record.name, mac: record.mac }
    }
}

/// Adds the value of a record to `values`.
pub(crate) fn read_into<T: Record>(
    values: &mut BTreeMap<Name, Arc<T>>,
    key: &str,
    record: &[u8],
) -> Result<(), RecordError> {
    let value = T::read(key.parse()?, record)?;
    values.insert(value.name().clone(), Arc::new(value));
    Ok(())
}

/// Checks that the networks of every endpoint exist. Returns the first endpoint without one, and
/// its network.
pub(crate) fn dangling(state: &State) -> Option<(&Name, RecordError)> {
    state.endpoints.values().find_map(|endpoint| {
        let mut networks = endpoint.aliases.keys();
        let missing = networks.find(|network| !state.networks.contains_key(*network))?;
        Some((&endpoint.name, RecordError::UnknownNetwork(missing.clone())))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Deserialize)]
    struct Sample {
        table: String,
        key: String,
        record: serde_json::Value,
    }

    fn round_trip<T: Record>(key: &str, record: &[u8]) -> Vec<u8> {
        T::read(key.parse().unwrap(), record).unwrap().write().unwrap()
    }

    /// Returns the records as they are read and written again.
    fn written_again(samples: &str) -> Vec<(Sample, serde_json::Value)> {
        let again = |line: &str| {
            let sample: Sample = serde_json::from_str(line).unwrap();
            let bytes = serde_json::to_vec(&sample.record).unwrap();
            let written = match sample.table.as_str() {
                "networks" => round_trip::<Network>(&sample.key, &bytes),
                "endpoints" => round_trip::<Endpoint>(&sample.key, &bytes),
                "projects" => round_trip::<Project>(&sample.key, &bytes),
                "mesh" => round_trip::<Membership>(&sample.key, &bytes),
                table => panic!("table {table}"),
            };
            (sample, serde_json::from_slice(&written).unwrap())
        };
        samples.lines().map(again).collect()
    }

    /// Every record of the format is read, and written as the same JSON.
    #[test]
    fn samples_of_format_4_are_read_completely() {
        let samples = written_again(include_str!("testdata/format-4.jsonl"));
        assert_eq!(samples.len(), 10);
        for (sample, written) in samples {
            assert_eq!(written, sample.record);
        }
        assert_eq!(FORMAT, 4, "add samples of the new format");
    }

    /// Completes a sample of an earlier format.
    fn complete(sample: &mut Sample) {
        match sample.table.as_str() {
            "endpoints" => {
                if sample.record.get("dns").is_none() {
                    sample.record["dns"] = serde_json::json!([]);
                }
                sample.record["task"] = serde_json::Value::Null;
            }
            "networks" if sample.record.get("has_names").is_none() => {
                sample.record["has_names"] = true.into();
                sample.record["overlay"] = serde_json::Value::Null;
            }
            _ => {}
        }
    }

    #[test]
    fn samples_of_format_3_have_no_services_of_the_cluster() {
        let samples = written_again(include_str!("testdata/format-3.jsonl"));
        assert_eq!(samples.len(), 10);
        for (mut sample, written) in samples {
            complete(&mut sample);
            assert_eq!(written, sample.record);
        }
    }

    #[test]
    fn samples_of_format_2_have_no_overlay_networks() {
        let samples = written_again(include_str!("testdata/format-2.jsonl"));
        assert_eq!(samples.len(), 7);
        for (mut sample, written) in samples {
            complete(&mut sample);
            assert_eq!(written, sample.record);
        }
    }

    #[test]
    fn samples_of_format_1_have_no_dns_servers_of_endpoints() {
        let samples = written_again(include_str!("testdata/format-1.jsonl"));
        assert_eq!(samples.len(), 5);
        for (mut sample, written) in samples {
            complete(&mut sample);
            assert_eq!(written, sample.record);
        }
    }

    #[test]
    fn an_unknown_field_is_an_error_instead_of_being_dropped() {
        let line = include_str!("testdata/format-1.jsonl").lines().next().unwrap();
        let mut sample: Sample = serde_json::from_str(line).unwrap();
        sample.record["colour"] = "blue".into();
        let record = serde_json::to_vec(&sample.record).unwrap();
        let error = Network::read(sample.key.parse().unwrap(), &record).unwrap_err();
        assert!(error.to_string().contains("unknown field `colour`"), "{error}");
    }
}
