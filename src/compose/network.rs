//! Reads one network of a Compose file.

use super::error::{Fault, Site};
use super::project::{Names, Network, Subnet};
use super::service::addresses;
use super::value::{Field, Value};
use ipnet::IpNet;
use std::net::IpAddr;

const BRIDGE_NAME: &str = "com.docker.network.bridge.name";
const BRIDGE_ICC: &str = "com.docker.network.bridge.enable_icc";
const DRIVER_MTU: &str = "com.docker.network.driver.mtu";

/// The kernel's bounds of an MTU (`ETH_MIN_MTU`, `ETH_MAX_MTU`).
const MTU: std::ops::RangeInclusive<u32> = 68..=65_535;

/// The least MTU for IPv6: RFC 8200, section 5.
const MTU_V6: u32 = 1280;

/// An interface's name has so many bytes at most (`IFNAMSIZ`, less the final 0).
const INTERFACE_NAME: usize = 15;

/// A network, and where the parts stand that are compared with those of others.
pub(super) struct Draft {
    pub(super) network: Network,
    /// As many as there are subnets.
    pub(super) subnets: Vec<Site>,
    pub(super) bridge: Option<Site>,
}

impl Draft {
    pub(super) fn plain(network: Network) -> Self {
        Self { network, subnets: Vec::new(), bridge: None }
    }
}

/// Reads the section of a network.
pub(super) fn read(section: &Field<'_>) -> Result<Draft, Fault> {
    let mut draft = Draft::plain(Network::plain(section.key, section.site.place));
    let mut mtu_site = None;
    for field in section.value.fields_if_any()? {
        let value = &field.value;
        match field.key {
            "internal" => draft.network.internal = value.boolean()?,
            "enable_ipv6" => draft.network.enable_ipv6 = value.boolean()?,
            "driver" => expect_word(value, "bridge", "networks are bridges of this host")?,
            "driver_opts" => read_options(value, &mut draft, &mut mtu_site)?,
            "ipam" => read_ipam(value, &mut draft)?,
            "external" => {
                let problem =
                    "networks are made by tidegate up and taken down again; remove the key";
                return Err(field.site.fault(problem));
            }
            "x-dns" => {
                expect_word(
                    value,
                    "gateway",
                    "names are served in each container unless they are at the gateway",
                )?;
                draft.network.names = Names::AtGateway;
            }
            "x-dns-servers" => draft.network.dns = addresses(value)?,
            _ if field.is_extension() => {}
            _ => {
                return Err(field.site.fault(
                    "this key is not supported; remove it (a network takes driver, driver_opts, enable_ipv6, \
                     internal and ipam)",
                ));
            }
        }
    }
    check(&draft, mtu_site.as_ref())?;
    Ok(draft)
}

/// What keys say together, in whichever order they stand.
fn check(draft: &Draft, mtu_site: Option<&Site>) -> Result<(), Fault> {
    let Draft { network, subnets, .. } = draft;
    if network.enable_ipv6 {
        if let (Some(mtu), Some(site)) = (network.mtu.filter(|mtu| *mtu < MTU_V6), mtu_site) {
            return Err(site.fault(format!("{mtu} is too little for IPv6, which needs {MTU_V6}")));
        }
        return Ok(());
    }
    for (Subnet { subnet, .. }, site) in network.subnets.iter().zip(subnets) {
        if let IpNet::V6(_) = subnet {
            return Err(site
                .fault(format!("{subnet} is IPv6; say enable_ipv6: true on the network as well")));
        }
    }
    Ok(())
}

fn expect_word(value: &Value<'_>, only: &str, why: &str) -> Result<(), Fault> {
    let word = value.string()?;
    if word == only {
        return Ok(());
    }
    Err(value.fault(format!("{word:?} is not supported: {why}; say {only} or remove the key")))
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
                        "{text:?} is not an MTU: a number from {} to {}",
                        MTU.start(),
                        MTU.end()
                    ))
                };
                draft.network.mtu = Some(mtu.ok_or_else(bounds)?);
                *mtu_site = Some(value.site().clone());
            }
            _ => {
                return Err(field.site.fault(format!(
                    "this option is not supported; remove it (there are {BRIDGE_NAME}, {BRIDGE_ICC} and {DRIVER_MTU})"
                )));
            }
        }
    }
    Ok(())
}

fn interface_name(value: &Value<'_>) -> Result<String, Fault> {
    let name = value.string()?;
    let allowed = |c: char| c.is_ascii_graphic() && !matches!(c, '/' | ':' | '%');
    let special = matches!(name.as_str(), "." | ".." | "all" | "default");
    if name.is_empty() || name.len() > INTERFACE_NAME || special || !name.chars().all(allowed) {
        return Err(value.fault(format!(
            "{name:?} cannot be the name of an interface: 1 to {INTERFACE_NAME} characters, no spaces, slashes or colons"
        )));
    }
    Ok(name)
}

fn read_ipam(ipam: &Value<'_>, draft: &mut Draft) -> Result<(), Fault> {
    for field in ipam.fields_if_any()? {
        match field.key {
            "driver" => expect_word(&field.value, "default", "tidegate chooses addresses itself")?,
            "config" if field.value.is_null() => {}
            "config" => {
                for item in field.value.items()? {
                    read_subnet(&item, draft)?;
                }
            }
            _ if field.is_extension() => {}
            _ => {
                let problem = "this key is not supported; remove it (ipam takes driver and config)";
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
                let problem =
                    "this key is not supported; remove it (config takes subnet and gateway)";
                return Err(field.site.fault(problem));
            }
        }
    }
    let Some((subnet, site)) = subnet else {
        return Err(item.fault("there is no subnet; give one, as in subnet: 10.9.0.0/24"));
    };
    if let Some((gateway, value)) = &gateway
        && let Some(problem) = unusable(*gateway, &subnet)
    {
        return Err(value.fault(format!("{gateway} cannot be a gateway: {problem}")));
    }
    let same_family = |other: &Subnet| other.subnet.addr().is_ipv4() == subnet.addr().is_ipv4();
    if let Some(other) = draft.network.subnets.iter().find(|other| same_family(other)) {
        let family = if subnet.addr().is_ipv4() { "IPv4" } else { "IPv6" };
        return Err(site.fault(format!(
            "{} is there already; a network has one subnet of {family}",
            other.subnet
        )));
    }
    draft.network.subnets.push(Subnet { subnet, gateway: gateway.map(|(address, _)| address) });
    draft.subnets.push(site);
    Ok(())
}

fn parse_subnet(value: &Value<'_>) -> Result<IpNet, Fault> {
    let subnet: IpNet = value.parsed("a subnet, as 10.9.0.0/24 or fd09::/64 is one")?;
    if subnet.trunc() != subnet {
        return Err(
            value.fault(format!("{subnet} has bits behind its prefix; say {}", subnet.trunc()))
        );
    }
    // The network itself, a gateway, a service, and for IPv4 the broadcast address.
    if subnet.max_prefix_len() - subnet.prefix_len() < 2 {
        return Err(value.fault(format!("{subnet} is too small for a gateway and a service")));
    }
    let address = subnet.addr();
    if address.is_loopback()
        || address.is_multicast()
        || address.is_unspecified()
        || subnet.prefix_len() == 0
    {
        return Err(
            value.fault(format!("{subnet} has no addresses for hosts; choose a private range"))
        );
    }
    Ok(subnet)
}

/// Why `address` cannot belong to a host of `subnet`, if it cannot.
pub(super) fn unusable(address: IpAddr, subnet: &IpNet) -> Option<String> {
    if !subnet.contains(&address) {
        Some(format!("it is not in {subnet}"))
    } else if address == subnet.network() {
        Some(format!("it is the address of {subnet} itself"))
    } else if address.is_ipv4() && address == subnet.broadcast() {
        Some(format!("it is the broadcast address of {subnet}"))
    } else {
        None
    }
}
