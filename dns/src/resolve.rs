//! What becomes of a question: answered from the zones, denied, refused or forwarded. Pure.
//!
//! Somebody at a gateway who has no endpoint there is refused. For all others, in this order:
//!
//! 1. a name of an endpoint on one of the asker's networks: its addresses, or for other types that
//!    there are none;
//! 2. the name of an address: of an endpoint's the endpoint; of any other that no public server
//!    knows, that there is none;
//! 3. what is nobody else's business: `localhost`, names that are reserved for not being there,
//!    single labels, names of networks that the asker is not on;
//! 4. everything else is forwarded, for askers with egress.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use crate::message::{Data, Rcode, kind};
use crate::name::{Reverse, labels, reverse, suffixes};
use crate::servers::ServerList;
use crate::zone::View;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// What becomes of a question.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Resolution<'a> {
    /// Records, one at least.
    Answer(Vec<Data>),
    /// The name is there, and has no record of that type (RFC 2308 section 2.2). Where in it the
    /// zone begins.
    NoData(usize),
    /// There is no such name (RFC 2308 section 2.1). Where in it the zone begins.
    NxDomain(usize),
    /// We do not answer this, to this asker.
    Refused(Refusal),
    /// Other servers are asked: those of this list, or the host's.
    Forward(Option<&'a ServerList>),
}

/// Why a question is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// A question about messages or transfers, not about names (RFC 6895 section 3.1: 128 to 255,
    /// but for `ANY`).
    Type,
    /// The asker is on internal networks only.
    NoWayOut,
    /// The asker is at a gateway and has no endpoint on its network.
    Stranger,
}

impl Refusal {
    /// Its code of RFC 8914 section 4.
    pub(crate) fn extended(self) -> u16 {
        match self {
            // Not Supported, Prohibited
            Self::Type => 21,
            Self::NoWayOut | Self::Stranger => 18,
        }
    }
}

/// Settings that decide about questions.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Policy {
    /// Unknown names without a dot are forwarded too.
    pub(crate) forward_single_labels: bool,
}

/// Resolves `name` for who sees `view`. `turn` counts questions: it is whose address comes first
/// where several have a name.
pub(crate) fn resolve<'a>(
    view: &View<'a>,
    policy: Policy,
    name: &[u8],
    kind: u16,
    turn: u32,
) -> Resolution<'a> {
    if view.is_stranger() {
        return Resolution::Refused(Refusal::Stranger);
    }
    if is_meta(kind) {
        return Resolution::Refused(Refusal::Type);
    }
    if let Some(answers) = addresses(view, name, kind, turn) {
        return if answers.is_empty() {
            Resolution::NoData(0)
        } else {
            Resolution::Answer(answers)
        };
    }
    if let Some(local) = about_addresses(view, name, kind) {
        return local;
    }
    if let Some(special) = special(name, kind) {
        return special;
    }
    if labels(name) == 1 && !policy.forward_single_labels && !is_about_zones(kind) {
        return Resolution::NxDomain(name.len() - 1);
    }
    if let Some(zone) = view.hidden(name) {
        return Resolution::NxDomain(zone);
    }
    if view.may_forward() {
        Resolution::Forward(view.servers())
    } else {
        Resolution::Refused(Refusal::NoWayOut)
    }
}

/// Types that no record has (RFC 6895 section 3.1). `ANY` asks for records.
fn is_meta(kind: u16) -> bool {
    kind == kind::OPT || (kind::TKEY..=kind::MAILA).contains(&kind)
}

/// What validating resolvers ask of top-level domains: no host is looked for by these.
fn is_about_zones(kind: u16) -> bool {
    matches!(kind, kind::NS | kind::SOA | kind::DS | kind::DNSKEY)
}

/// The addresses of type `kind` of the endpoints that have a name: network by network, each
/// network's turned by `turn`. `None` if it is no name.
fn addresses(view: &View<'_>, name: &[u8], kind: u16, turn: u32) -> Option<Vec<Data>> {
    let wants = |one: u16| kind == one || kind == kind::ANY;
    let mut answers = Vec::new();
    let mut is_known = false;
    for endpoints in view.holders(name) {
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
            of_network.rotate_left(turn as usize % of_network.len());
        }
    }
    is_known.then_some(answers)
}

/// Questions about addresses, but for those that public servers know something about.
fn about_addresses<'a>(view: &View<'a>, name: &[u8], kind: u16) -> Option<Resolution<'a>> {
    // What is below the name of an address or a network, as services and delegations are (RFC 6763
    // section 11, RFC 2317), is as private as that.
    let (at, about) = suffixes(name).find_map(|(at, suffix)| Some((at, reverse(suffix)?)))?;
    match about {
        Reverse::Of(address) | Reverse::Part(address, _) if at > 0 => {
            let length = if let Reverse::Part(_, length) = about { length } else { u8::MAX };
            is_private(address, length).then_some(Resolution::NxDomain(at))
        }
        Reverse::Of(address) => {
            if let Some(endpoint) = view.holder(address) {
                let asks = matches!(kind, kind::PTR | kind::ANY);
                let pointer = || vec![Data::Ptr(endpoint.canonical.clone())];
                return Some(if asks {
                    Resolution::Answer(pointer())
                } else {
                    Resolution::NoData(0)
                });
            }
            let private = private_zone(name, address);
            if private.is_none() && !view.is_inside(address) {
                return None;
            }
            Some(Resolution::NxDomain(private.unwrap_or(0)))
        }
        // The zone itself, or part of one.
        Reverse::Part(address, length) => {
            is_private(address, length).then_some(Resolution::NoData(0))
        }
    }
}

/// Whether all addresses that have the first `length` bits of `address` are private.
fn is_private(address: IpAddr, length: u8) -> bool {
    private_nets().any(|net| net.contains(&address) && net.prefix_len() <= length)
}

/// Where in `name`, which is that of `address`, the private zone begins that it is in.
fn private_zone(name: &[u8], address: IpAddr) -> Option<usize> {
    let net = private_nets().find(|net| net.contains(&address))?;
    // Labels of `in-addr.arpa` or `ip6.arpa`, and those of the network's octets or nibbles, the
    // last one begun perhaps.
    let bits = if address.is_ipv4() { 8 } else { 4 };
    let keeps = 2 + usize::from(net.prefix_len().div_ceil(bits));
    let drops = labels(name).checked_sub(keeps)?;
    suffixes(name).nth(drops).map(|(at, _)| at)
}

/// Networks whose addresses have no names outside of where they are used (RFC 6303 section 4, RFC
/// 1918, RFC 6598, RFC 4193).
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

/// Names that no server has to be asked about.
fn special(name: &[u8], kind: u16) -> Option<Resolution<'static>> {
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
    /// The code that an answer to this has.
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
