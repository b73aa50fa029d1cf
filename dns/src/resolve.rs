//! Resolution of a query: answered locally, denied, refused or forwarded. Pure.
//!
//! A client at a gateway without an endpoint on that network is refused. For all others, in this
//! order:
//!
//! 1. the name of an endpoint on a network of the client: its addresses, or NODATA for other types;
//! 2. a reverse name: of the address of an endpoint, the endpoint; of any other private address or
//!    an address in a subnet of any network, NXDOMAIN;
//! 3. names that are never forwarded: `localhost`, reserved names that do not exist, names with a
//!    single label, and names of networks that the client is not on;
//! 4. all other names are forwarded if the client has egress.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use crate::message::{Data, Rcode, kind};
use crate::name::{Reverse, labels, reverse, suffixes};
use crate::servers::ServerList;
use crate::zone::View;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// The result of resolving a query.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Resolution<'a> {
    /// One or more records.
    Answer(Vec<Data>),
    /// The name exists but has no record of the type (RFC 2308 section 2.2). The value is the
    /// offset of the zone in the name.
    NoData(usize),
    /// The name does not exist (RFC 2308 section 2.1). The value is the offset of the zone in the
    /// name.
    NxDomain(usize),
    Refused(Refusal),
    /// Forwarded to the servers of this list; `None`: those of the host.
    Forward(Option<&'a ServerList>),
}

/// Why a query is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// A meta type, which is not a type of records (RFC 6895 section 3.1: 128 to 255, except
    /// `ANY`).
    Type,
    /// The client is on internal networks only.
    NoEgress,
    /// The client is at a gateway and has no endpoint on that network.
    UnknownClient,
}

impl Refusal {
    /// The extended error code (RFC 8914 section 4).
    pub(crate) fn extended(self) -> u16 {
        match self {
            // 21: Not Supported; 18: Prohibited.
            Self::Type => 21,
            Self::NoEgress | Self::UnknownClient => 18,
        }
    }
}

/// Settings of resolution.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Policy {
    /// Unknown names with a single label are forwarded.
    pub(crate) forward_single_labels: bool,
}

/// Resolves `name` (wire format, lower case) for the client of `view`. `rotation` counts queries
/// and rotates the addresses of a name.
pub(crate) fn resolve<'a>(
    view: &View<'a>,
    policy: Policy,
    name: &[u8],
    kind: u16,
    rotation: u32,
) -> Resolution<'a> {
    if view.is_unknown_client() {
        return Resolution::Refused(Refusal::UnknownClient);
    }
    if is_meta(kind) {
        return Resolution::Refused(Refusal::Type);
    }
    if let Some(answers) = addresses(view, name, kind, rotation) {
        return if answers.is_empty() {
            Resolution::NoData(0)
        } else {
            Resolution::Answer(answers)
        };
    }
    if let Some(local) = resolve_reverse(view, name, kind) {
        return local;
    }
    if let Some(reserved) = resolve_reserved(name, kind) {
        return reserved;
    }
    if labels(name) == 1 && !policy.forward_single_labels && !is_zone_query(kind) {
        return Resolution::NxDomain(name.len() - 1);
    }
    if let Some(zone) = view.hidden(name) {
        return Resolution::NxDomain(zone);
    }
    if view.may_forward() {
        Resolution::Forward(view.servers())
    } else {
        Resolution::Refused(Refusal::NoEgress)
    }
}

/// Whether `kind` is a meta type (RFC 6895 section 3.1). `ANY` requests records.
fn is_meta(kind: u16) -> bool {
    kind == kind::OPT || (kind::TKEY..=kind::MAILA).contains(&kind)
}

/// Types that validating resolvers query for top-level domains and that no address lookup uses.
fn is_zone_query(kind: u16) -> bool {
    matches!(kind, kind::NS | kind::SOA | kind::DS | kind::DNSKEY)
}

/// The addresses of type `kind` of the endpoints with a name, by network, each network rotated by
/// `rotation`. `None` if no endpoint has the name.
fn addresses(view: &View<'_>, name: &[u8], kind: u16, rotation: u32) -> Option<Vec<Data>> {
    let wants = |one: u16| kind == one || kind == kind::ANY;
    let mut answers = Vec::new();
    let mut is_known = false;
    for endpoints in view.endpoints_with_name(name) {
        let start = answers.len();
        for endpoint in endpoints {
            is_known = true;
            if wants(kind::A) {
                answers.extend(endpoint.v4.iter().map(|ip| Data::A(*ip)));
            }
            if wants(kind::AAAA) {
                answers.extend(endpoint.v6.iter().map(|ip| Data::Aaaa(*ip)));
            }
        }
        let of_network = &mut answers[start..];
        if of_network.len() > 1 {
            of_network.rotate_left(rotation as usize % of_network.len());
        }
    }
    is_known.then_some(answers)
}

/// Resolves reverse names, except those of public addresses.
fn resolve_reverse<'a>(view: &View<'a>, name: &[u8], kind: u16) -> Option<Resolution<'a>> {
    // Names below a private reverse name, as for service discovery (RFC 6763 section 11) and
    // classless delegation (RFC 2317), are private too.
    let (at, about) = suffixes(name).find_map(|(at, suffix)| Some((at, reverse(suffix)?)))?;
    match about {
        Reverse::Address(address) | Reverse::Prefix(address, _) if at > 0 => {
            let length = if let Reverse::Prefix(_, length) = about { length } else { u8::MAX };
            is_private(address, length).then_some(Resolution::NxDomain(at))
        }
        Reverse::Address(address) => {
            if let Some(endpoint) = view.endpoint_with_address(address) {
                let asks = matches!(kind, kind::PTR | kind::ANY);
                let pointer = || vec![Data::Ptr(endpoint.canonical.clone())];
                return Some(if asks {
                    Resolution::Answer(pointer())
                } else {
                    Resolution::NoData(0)
                });
            }
            let private = private_zone(name, address);
            if private.is_none() && !view.is_in_any_subnet(address) {
                return None;
            }
            Some(Resolution::NxDomain(private.unwrap_or(0)))
        }
        // The name of a reverse zone, or of a domain in it.
        Reverse::Prefix(address, length) => {
            is_private(address, length).then_some(Resolution::NoData(0))
        }
    }
}

/// Whether all addresses in `address`/`length` are private.
fn is_private(address: IpAddr, length: u8) -> bool {
    private_nets().any(|net| net.contains(&address) && net.prefix_len() <= length)
}

/// The offset in `name`, the reverse name of `address`, of the private zone that contains it.
fn private_zone(name: &[u8], address: IpAddr) -> Option<usize> {
    let net = private_nets().find(|net| net.contains(&address))?;
    // The two labels of `in-addr.arpa` or `ip6.arpa`, and those of the octets or nibbles of the
    // network, the last one possibly partial.
    let bits = if address.is_ipv4() { 8 } else { 4 };
    let keeps = 2 + usize::from(net.prefix_len().div_ceil(bits));
    let drops = labels(name).checked_sub(keeps)?;
    suffixes(name).nth(drops).map(|(at, _)| at)
}

/// Networks whose addresses have no public reverse names (RFC 6303 section 4, RFC 1918, RFC 6598,
/// RFC 4193).
fn private_nets() -> impl Iterator<Item = IpNet> {
    const V4: [(Ipv4Addr, u8); 10] = [
        (Ipv4Addr::new(0, 0, 0, 0), 8),
        (Ipv4Addr::new(10, 0, 0, 0), 8),
        (Ipv4Addr::new(100, 64, 0, 0), 10),
        (Ipv4Addr::new(127, 0, 0, 0), 8),
        (Ipv4Addr::new(169, 254, 0, 0), 16),
        (Ipv4Addr::new(172, 16, 0, 0), 12),
        (Ipv4Addr::new(192, 0, 2, 0), 24),
        (Ipv4Addr::new(192, 168, 0, 0), 16),
        (Ipv4Addr::new(198, 51, 100, 0), 24),
        (Ipv4Addr::new(203, 0, 113, 0), 24),
    ];
    const V6: [(Ipv6Addr, u8); 5] = [
        (Ipv6Addr::UNSPECIFIED, 128),
        (Ipv6Addr::LOCALHOST, 128),
        (Ipv6Addr::new(0xfc00, 0, 0, 0, 0, 0, 0, 0), 7),
        (Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0), 10),
        (Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0), 32),
    ];
    let v4 = V4.into_iter().map(|(ip, length)| IpNet::V4(Ipv4Net::new_assert(ip, length)));
    v4.chain(V6.into_iter().map(|(ip, length)| IpNet::V6(Ipv6Net::new_assert(ip, length))))
}

/// Resolves reserved names.
fn resolve_reserved(name: &[u8], kind: u16) -> Option<Resolution<'static>> {
    let ends_with =
        |zone: &[u8]| suffixes(name).find(|(_, suffix)| *suffix == zone).map(|(at, _)| at);
    // RFC 6761 section 6.3: "Caching DNS servers SHOULD recognize localhost names as special and
    // SHOULD NOT attempt to look up NS records for them".
    if let Some(zone) = ends_with(b"\x09localhost\0") {
        return Some(match kind {
            kind::A => Resolution::Answer(vec![Data::A(Ipv4Addr::LOCALHOST)]),
            kind::AAAA => Resolution::Answer(vec![Data::Aaaa(Ipv6Addr::LOCALHOST)]),
            _ => Resolution::NoData(zone),
        });
    }
    // RFC 6761 section 6.4, RFC 7686 section 2, RFC 9462 section 6.4.
    let absent = [&b"\x07invalid\0"[..], b"\x05onion\0", b"\x08resolver\x04arpa\0"];
    absent.into_iter().find_map(ends_with).map(Resolution::NxDomain)
}

impl Resolution<'_> {
    pub(crate) fn rcode(&self) -> Rcode {
        match self {
            Self::Answer(_) | Self::NoData(_) | Self::Forward(_) => Rcode::NoError,
            Self::NxDomain(_) => Rcode::NxDomain,
            Self::Refused(_) => Rcode::Refused,
        }
    }
}

#[cfg(test)]
mod tests;
