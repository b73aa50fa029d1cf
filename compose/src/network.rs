//! Parses the section of a network.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use super::error::{Fault, Site};
use super::project::{Names, NetworkConfig, SubnetConfig};
use super::service::addresses;
use super::value::{Field, Value};
use ipnet::IpNet;
use std::net::IpAddr;
use tidegate_model::validity::{
    INTERFACE_NAME, address_problem, is_interface_name, subnet_problem,
};

const BRIDGE_NAME: &str = "com.docker.network.bridge.name";
const BRIDGE_ICC: &str = "com.docker.network.bridge.enable_icc";
const DRIVER_MTU: &str = "com.docker.network.driver.mtu";

/// The range of an MTU in the kernel (`ETH_MIN_MTU` to `ETH_MAX_MTU`).
const MTU: std::ops::RangeInclusive<u32> = 68..=65_535;

/// The minimum MTU of IPv6 (RFC 8200, section 5).
const MTU_V6: u32 = 1280;

/// A network, with the positions of the parts that are checked against other networks.
pub(super) struct Draft {
    pub(super) network: NetworkConfig,
    /// One per subnet.
    pub(super) subnets: Vec<Site>,
    pub(super) bridge: Option<Site>,
}

impl Draft {
    pub(super) fn plain(network: NetworkConfig) -> Self {
        Self { network, subnets: Vec::new(), bridge: None }
    }
}

/// Parses the section of a network.
pub(super) fn read(section: &Field<'_>) -> Result<Draft, Fault> {
    let mut draft = Draft::plain(NetworkConfig::plain(section.key, section.site.place));
    let mut mtu_site = None;
    for field in section.value.fields_if_any()? {
        let value = &field.value;
        match field.key {
            "internal" => draft.network.internal = value.boolean()?,
            "enable_ipv6" => draft.network.enable_ipv6 = value.boolean()?,
            "driver" => expect_word(value, "bridge", "every network is a bridge on this host")?,
            "driver_opts" => read_options(value, &mut draft, &mut mtu_site)?,
            "ipam" => read_ipam(value, &mut draft)?,
            "external" => {
                let problem = "tidegate up creates and removes all networks; remove the key";
                return Err(field.site.fault(problem));
            }
            "x-dns" => {
                expect_word(
                    value,
                    "gateway",
                    "DNS is served in each container, or at the gateway",
                )?;
                draft.network.names = Names::AtGateway;
            }
            "x-dns-servers" => draft.network.dns = addresses(value)?,
            _ if field.is_extension() => {}
            _ => {
                return Err(field.site.fault(
                    "this key is not supported; remove it (supported: driver, driver_opts, enable_ipv6, internal, ipam)",
                ));
            }
        }
    }
    check(&draft, mtu_site.as_ref())?;
    Ok(draft)
}

/// Checks keys that depend on each other, whatever their order in the file.
fn check(draft: &Draft, mtu_site: Option<&Site>) -> Result<(), Fault> {
    let Draft { network, subnets, .. } = draft;
    if network.enable_ipv6 {
        if let (Some(mtu), Some(site)) = (network.mtu.filter(|mtu| *mtu < MTU_V6), mtu_site) {
            return Err(site.fault(format!(
                "{mtu} is below the IPv6 minimum of {MTU_V6}; raise it, or remove enable_ipv6"
            )));
        }
        return Ok(());
    }
    for (SubnetConfig { subnet, .. }, site) in network.subnets.iter().zip(subnets) {
        if let IpNet::V6(_) = subnet {
            return Err(site.fault(format!(
                "{subnet} is an IPv6 subnet; set enable_ipv6: true on the network"
            )));
        }
    }
    Ok(())
}

fn expect_word(value: &Value<'_>, only: &str, why: &str) -> Result<(), Fault> {
    let word = value.string()?;
    if word == only {
        return Ok(());
    }
    Err(value.fault(format!("{word:?} is not supported: {why}; use {only} or remove the key")))
}

fn read_options(
    options: &Value<'_>,
    draft: &mut Draft,
    mtu_site: &mut Option<Site>,
) -> Result<(), Fault> {
    for field in options.fields_if_any()? {
        let value = &field.value;
        match field.key {
            BRIDGE_NAME => {
                draft.network.bridge = Some(interface_name(value)?);
                draft.bridge = Some(value.site().clone());
            }
            BRIDGE_ICC => draft.network.inter_container = value.boolean()?,
            DRIVER_MTU => {
                let text = value.scalar()?;
                let mtu = text.parse().ok().filter(|mtu| MTU.contains(mtu));
                let bounds = || {
                    value.fault(format!(
                        "{text:?} is not a valid MTU: use a number from {} to {}",
                        MTU.start(),
                        MTU.end()
                    ))
                };
                draft.network.mtu = Some(mtu.ok_or_else(bounds)?);
                *mtu_site = Some(value.site().clone());
            }
            _ => {
                return Err(field.site.fault(format!(
                    "this option is not supported; remove it (supported: {BRIDGE_NAME}, {BRIDGE_ICC}, {DRIVER_MTU})"
                )));
            }
        }
    }
    Ok(())
}

fn interface_name(value: &Value<'_>) -> Result<String, Fault> {
    let name = value.string()?;
    if !is_interface_name(&name) {
        return Err(value.fault(format!(
            "{name:?} is not a valid interface name: use 1 to {INTERFACE_NAME} characters without spaces, slashes or colons, and without a + at the end"
        )));
    }
    Ok(name)
}

fn read_ipam(ipam: &Value<'_>, draft: &mut Draft) -> Result<(), Fault> {
    for field in ipam.fields_if_any()? {
        match field.key {
            "driver" => {
                expect_word(&field.value, "default", "tidegate allocates addresses itself")?;
            }
            "config" if field.value.is_null() => {}
            "config" => {
                for item in field.value.items()? {
                    read_subnet(&item, draft)?;
                }
            }
            _ if field.is_extension() => {}
            _ => {
                let problem = "this key is not supported; remove it (supported: driver, config)";
                return Err(field.site.fault(problem));
            }
        }
    }
    Ok(())
}

fn read_subnet(item: &Value<'_>, draft: &mut Draft) -> Result<(), Fault> {
    let (mut subnet, mut gateway) = (None, None);
    for field in item.fields()? {
        match field.key {
            "subnet" => subnet = Some((parse_subnet(&field.value)?, field.value.site().clone())),
            "gateway" => {
                gateway = Some((field.value.parsed::<IpAddr>("an IP address")?, field.value));
            }
            _ if field.is_extension() => {}
            _ => {
                let problem = "this key is not supported; remove it (supported: subnet, gateway)";
                return Err(field.site.fault(problem));
            }
        }
    }
    let Some((subnet, site)) = subnet else {
        return Err(item.fault("no subnet is set; add one, for example subnet: 10.9.0.0/24"));
    };
    if let Some((gateway, value)) = &gateway
        && let Some(problem) = address_problem(*gateway, &subnet)
    {
        return Err(value.fault(format!("{gateway} is not usable as the gateway: {problem}")));
    }
    let same_family =
        |other: &SubnetConfig| other.subnet.addr().is_ipv4() == subnet.addr().is_ipv4();
    if let Some(other) = draft.network.subnets.iter().find(|other| same_family(other)) {
        let family = if subnet.addr().is_ipv4() { "IPv4" } else { "IPv6" };
        return Err(site.fault(format!(
            "{} is already set; a network has at most one {family} subnet",
            other.subnet
        )));
    }
    draft
        .network
        .subnets
        .push(SubnetConfig { subnet, gateway: gateway.map(|(address, _)| address) });
    draft.subnets.push(site);
    Ok(())
}

fn parse_subnet(value: &Value<'_>) -> Result<IpNet, Fault> {
    let subnet: IpNet = value.parsed("a subnet such as 10.9.0.0/24 or fd09::/64")?;
    match subnet_problem(&subnet) {
        Some(problem) => Err(value.fault(format!("{subnet} is not usable: {problem}"))),
        None => Ok(subnet),
    }
}
