//! The rules of port guards. Pure.
//!
//! # Theory of operation
//!
//! Rules are evaluated in order. The first rule with all tests passing decides; a frame that
//! matches no rule is dropped. A test beyond the end of the frame fails, negated or not. Three back
//! ends implement the same list: eBPF, classic BPF ([`compile`](super::compile)) and nftables
//! ([`nftables`](super::nftables)).
//!
//! ```text
//! destination 01:80:c2:00:00:00 to :0f  ─► drop
//! (with any source address allowed: see below)
//! VLAN tag                             ─► drop
//! own source MAC address and
//!   own IPv4 source, destination not 127.0.0.0/8, neither ICMP nor IGMP ─► accept
//!   own IPv6 source, no ICMPv6, extension headers or fragments ─► accept
//! foreign source MAC address           ─► drop
//! IPv4   destination 127.0.0.0/8 (RFC 1122, 3.2.1.3)          ─► drop
//!        IGMP queries (RFC 3376, 4.1)                         ─► drop
//!        source 0.0.0.0 for IGMP (RFC 3376, 4.2.13)           ─► accept
//!        own source, ICMP: no redirects, no router advertisements; errors only for packets to own
//!        addresses, not ICMP                                  ─► accept
//! IPv6   source `::`: duplicate address detection of own target (RFC 4862, 5.4.2), with no option
//!        but a nonce, MLD reports
//!        (RFC 3810, 5.2.13)                                         ─► accept
//!        own source: router and neighbour solicitations and advertisements with at most one option,
//!        the own link-layer address; neighbour advertisements for own targets only; no router advertisements, no
//!        redirects; errors only for packets to own addresses; extension headers that cannot hide any of
//!        these                                                      ─► accept
//! ARP    own sender, or probe for an own address ─► accept (RFC 5227, 2.1.1)
//! default                              ─► drop
//! ```
//!
//! An endpoint with `any_address` is restricted to its MAC address. It may send IPv4, IPv6 and ARP,
//! except for redirects and packets to 127.0.0.0/8. It may send ICMP errors to its neighbours. An
//! error that may reach the host, in a frame that is not unicast to a neighbour, must quote a
//! packet to an own address.
//!
//! ICMP errors are restricted because the host processes an error for any flow it tracks: it aborts
//! sockets, lowers the path MTU, or translates the error back to the container that owns the flow.
//! An error quotes the offending packet (RFC 792, RFC 4443, 2.4). An endpoint only receives packets
//! to its own addresses, so the quoted destination shows whether it may report an error.
//!
//! The link control group addresses (IEEE 802.1Q, table 8-1) come first, for every endpoint. A
//! bridge passes such a frame up on the bridge port instead of processing it (`br_handle_frame`,
//! net/bridge/br_input.c). The input interface of its packet is then the port, which no firewall
//! rule for the bridge matches.
//!
//! Receivers use the last link-layer address option of a message (`ndisc_parse_options`). Messages
//! with more than one option are therefore dropped without parsing the options.
//!
//! Every fragment carries the source address, but only the first carries the header of the payload.
//! A guard evaluates single frames, whereas the receiver reassembles the packet. The first fragment
//! of an ICMP error is therefore dropped, as is that of every ICMPv6 message except echoes. No
//! kernel fragments errors (at most 576 bytes, RFC 1812, 4.3.2.3, and 1280 bytes, RFC 4443, 2.4) or
//! neighbour discovery (RFC 6980).

use super::BridgePolicy;
use ipnet::IpNet;
use std::net::{Ipv4Addr, Ipv6Addr};
use tidegate_model::MacAddress;

/// The addresses of an endpoint, from which it may send.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortPolicy {
    /// MAC address of the endpoint.
    pub mac: MacAddress,
    /// MAC address of the bridge. A unicast frame to another address is for a neighbour, not for
    /// the host.
    pub bridge: MacAddress,
    /// IPv4 addresses of the endpoint.
    pub v4: Vec<Ipv4Addr>,
    /// IPv6 addresses of the endpoint, without the link-local address. If empty, all IPv6 is
    /// dropped.
    pub v6: Vec<Ipv6Addr>,
    /// Disables checks of source addresses other than `mac`, for endpoints with additional
    /// addresses (routers, VRRP).
    pub any_address: bool,
}

impl PortPolicy {
    /// Returns the permitted IPv6 source addresses: `v6`, and the link-local address derived from
    /// `mac`.
    fn v6_sources(&self) -> Vec<Ipv6Addr> {
        if self.v6.is_empty() {
            return Vec::new();
        }
        let mut all = self.v6.clone();
        all.push(self.mac.link_local());
        all
    }
}

/// The reason for a drop.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SpoofReason {
    /// Foreign source MAC address.
    Mac,
    /// VLAN tag.
    Vlan,
    /// Ethertype other than IPv4, IPv6 and ARP, or a truncated frame.
    Ethertype,
    /// ARP with a foreign sender.
    Arp,
    /// Foreign IPv4 source address.
    Ipv4Source,
    /// Foreign IPv6 source address.
    Ipv6Source,
    /// Neighbour discovery with a foreign target or link-layer address.
    NeighborDiscovery,
    /// ICMP or ICMPv6 router advertisement or redirect.
    Router,
    /// Extension headers that could hide an ICMPv6 message.
    ExtensionHeader,
    /// Destination is a link control group address (spanning tree, LLDP), which a bridge passes up
    /// on the port.
    LinkControl,
    /// Destination in 127.0.0.0/8, which a host with `route_localnet` accepts from a link.
    Loopback,
    /// ICMP or ICMPv6 error that quotes a packet not sent to the endpoint, or that is hidden by IP
    /// options or fragments.
    IcmpError,
}

impl SpoofReason {
    /// All reasons, in the order of their counters.
    pub const ALL: [Self; 12] = [
        Self::Mac,
        Self::Vlan,
        Self::Ethertype,
        Self::Arp,
        Self::Ipv4Source,
        Self::Ipv6Source,
        Self::NeighborDiscovery,
        Self::Router,
        Self::ExtensionHeader,
        Self::LinkControl,
        Self::Loopback,
        Self::IcmpError,
    ];

    /// Value of the metric label `reason`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Mac => "mac",
            Self::Vlan => "vlan",
            Self::Ethertype => "ethertype",
            Self::Arp => "arp",
            Self::Ipv4Source => "ipv4_source",
            Self::Ipv6Source => "ipv6_source",
            Self::NeighborDiscovery => "neighbor_discovery",
            Self::Router => "router",
            Self::ExtensionHeader => "extension_header",
            Self::LinkControl => "link_control",
            Self::Loopback => "loopback",
            Self::IcmpError => "icmp_error",
        }
    }
}

/// The outcome of a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Accept,
    /// Accepts the frame within the rate of the policer, and drops it otherwise.
    Police,
    Drop(SpoofReason),
}

/// Returns test lists for the accepted frames that are policed during a flood: those that may open
/// a TCP connection. A frame is policed if it passes any of the lists.
///
/// A SYN is recognised after a header of standard length. All packets with IP options, fragments or
/// extension headers, which hide the flags, are policed: by default no kernel sends a SYN in this
/// form.
pub(super) fn policed(policy: &PortPolicy) -> Vec<Vec<Test>> {
    /// SYN set, ACK clear.
    const SYN: u8 = 0x02;
    const SYN_ACK: u8 = 0x12;
    // Test the protocol first: the lists share it, so a non-TCP packet fails all of them with one
    // test.
    let v4 = || [is(at::V4_PROTOCOL, &[TCP]), is(at::ETHERTYPE, &IPV4)].into_iter();
    let v6 = |next: u8| [is(at::ETHERTYPE, &IPV6), is(at::V6_NEXT, &[next])].into_iter();
    let mut policed: Vec<Vec<Test>> = vec![
        v4().chain([Test::Bits { at: at::V4_TCP_FLAGS, value: SYN, mask: SYN_ACK }]).collect(),
        // Version 4, five words.
        v4().chain([is_not(at::V4_HEAD, &[0x45])]).collect(),
        // More fragments follow.
        v4().chain([Test::Bits { at: at::V4_FRAGMENT, value: 0x20, mask: 0x20 }]).collect(),
    ];
    if policy.any_address || !policy.v6.is_empty() {
        policed.push(
            v6(TCP)
                .chain([Test::Bits { at: at::V6_TCP_FLAGS, value: SYN, mask: SYN_ACK }])
                .collect(),
        );
        policed.extend(EXTENSIONS.into_iter().chain([FRAGMENT]).map(|next| v6(next).collect()));
    }
    policed
}

/// Verdict for frames that match no rule.
pub(super) const DEFAULT_VERDICT: Verdict = Verdict::Drop(SpoofReason::Ethertype);

/// A test on a frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Test {
    /// The bytes at offset `at`, counted from the Ethernet header, equal `value`, or differ from it
    /// with `not`.
    Bytes { at: u16, value: Vec<u8>, not: bool },
    /// The byte at offset `at`, masked with `mask`, equals `value`.
    Bits { at: u16, value: u8, mask: u8 },
    /// The frame had a VLAN tag, which the kernel has moved out of the frame (`skb_vlan_untag`).
    Tagged,
}

/// A rule: the verdict applies if all tests pass.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Rule {
    pub(super) tests: Vec<Test>,
    pub(super) verdict: Verdict,
}

/// Offsets in a frame, in bytes.
mod at {
    pub(super) const DESTINATION_MAC: u16 = 0;
    pub(super) const SOURCE_MAC: u16 = 6;
    pub(super) const ETHERTYPE: u16 = 12;
    const NETWORK: u16 = 14;
    pub(super) const ARP_FORMAT: u16 = NETWORK;
    pub(super) const ARP_OPERATION: u16 = NETWORK + 6;
    pub(super) const ARP_SENDER_MAC: u16 = NETWORK + 8;
    pub(super) const ARP_SENDER: u16 = NETWORK + 14;
    pub(super) const ARP_TARGET: u16 = NETWORK + 24;
    pub(super) const V4_HEAD: u16 = NETWORK;
    pub(super) const V4_FRAGMENT: u16 = NETWORK + 6;
    pub(super) const V4_PROTOCOL: u16 = NETWORK + 9;
    /// In a header without options.
    pub(super) const V4_TCP_FLAGS: u16 = NETWORK + 20 + 13;
    pub(super) const V4_SOURCE: u16 = NETWORK + 12;
    pub(super) const V4_DESTINATION: u16 = NETWORK + 16;
    /// Type of an ICMP message after a header without options.
    pub(super) const V4_ICMP: u16 = NETWORK + 20;
    /// Protocol and destination of the packet quoted by an ICMP error (RFC 792).
    pub(super) const V4_QUOTED_PROTOCOL: u16 = V4_ICMP + 8 + 9;
    pub(super) const V4_QUOTED_DESTINATION: u16 = V4_ICMP + 8 + 16;
    /// Type of an IGMP message after the router alert option (RFC 3376, 4).
    pub(super) const V4_IGMP: u16 = NETWORK + 24;
    pub(super) const V6_PAYLOAD_LENGTH: u16 = NETWORK + 4;
    pub(super) const V6_NEXT: u16 = NETWORK + 6;
    pub(super) const V6_SOURCE: u16 = NETWORK + 8;
    pub(super) const V6_DESTINATION: u16 = NETWORK + 24;
    /// After the IPv6 header: type of an ICMPv6 message, or next header of an extension header.
    pub(super) const V6_PAYLOAD: u16 = NETWORK + 40;
    pub(super) const V6_TCP_FLAGS: u16 = V6_PAYLOAD + 13;
    /// Next header and destination of the packet quoted by an ICMPv6 error (RFC 4443, 3).
    pub(super) const V6_QUOTED_NEXT: u16 = V6_PAYLOAD + 8 + 6;
    pub(super) const V6_QUOTED_DESTINATION: u16 = V6_PAYLOAD + 8 + 24;
    /// Fragment header (RFC 8200, 4.5): the field with the offset in its upper 13 bits, and the
    /// payload.
    pub(super) const V6_FRAGMENT_OFFSET: u16 = V6_PAYLOAD + 2;
    pub(super) const AFTER_FRAGMENT: u16 = V6_PAYLOAD + 8;
    /// Target of neighbour solicitations and advertisements (RFC 4861, 4.3 and 4.4).
    pub(super) const ND_TARGET: u16 = V6_PAYLOAD + 8;
    /// Type of an ICMPv6 message after a hop-by-hop header of 8 bytes.
    pub(super) const AFTER_HOP_BY_HOP: u16 = V6_PAYLOAD + 8;
}

const IPV4: [u8; 2] = [0x08, 0x00];
const ARP: [u8; 2] = [0x08, 0x06];
const IPV6: [u8; 2] = [0x86, 0xdd];

/// Ethernet and IPv4, with address lengths 6 and 4.
const ARP_FORMAT: [u8; 6] = [0, 1, 0x08, 0x00, 6, 4];
const ARP_REQUEST: [u8; 2] = [0, 1];
const ARP_REPLY: [u8; 2] = [0, 2];

const ICMP: u8 = 1;
const IGMP: u8 = 2;
const TCP: u8 = 6;
const UDP: u8 = 17;
/// Protocol Independent Multicast, spoken by routers (RFC 7761).
const PIM: u8 = 103;
const ICMPV6: u8 = 58;
/// Hop-by-hop options, routing, authentication, destination options.
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const EXTENSIONS: [u8; 4] = [HOP_BY_HOP, ROUTING, 51, 60];
const FRAGMENT: u8 = 44;
/// Permitted next headers after an extension header: tunnels, TCP, UDP, GRE, ESP, no next header,
/// L2TP, SCTP. ICMPv6 is excluded because it could be neighbour discovery or an error; fragment and
/// further extension headers are excluded because they could hide ICMPv6.
const AFTER_EXTENSION: [u8; 9] = [4, TCP, UDP, 41, 47, 50, 59, 115, 132];

/// ICMP errors: destination unreachable, source quench, time exceeded, parameter problem (RFC 792).
const ICMP_ERRORS: [u8; 4] = [3, 4, 11, 12];
const ICMP_REDIRECT: u8 = 5;
/// Router advertisement (RFC 1256).
const ICMP_ADVERTISEMENT: u8 = 9;

/// IGMP reports of versions 1, 2 and 3, and leave group (RFC 3376, 4).
const IGMP_REPORTS: [u8; 4] = [0x12, 0x16, 0x22, 0x17];

/// Echo request, echo reply.
const ECHO_V6: [u8; 2] = [128, 129];

/// MLDv1 report, MLDv1 done, MLDv2 report.
const MLD_REPORTS: [u8; 3] = [131, 132, 143];
const ROUTER_SOLICITATION: u8 = 133;
const ROUTER_ADVERTISEMENT: u8 = 134;
const NEIGHBOR_SOLICITATION: u8 = 135;
const NEIGHBOR_ADVERTISEMENT: u8 = 136;
const REDIRECT: u8 = 137;
/// Messages of multicast routers (RFC 2710; RFC 4286).
const MLD_QUERY: u8 = 130;
const MULTICAST_ADVERTISEMENT: u8 = 151;

/// Link-layer address options: of the source in solicitations, of the target in advertisements.
const SOURCE_LINK_LAYER: u8 = 1;
const TARGET_LINK_LAYER: u8 = 2;
/// Messages that may carry these options: type, length without options (RFC 4861, 4.1, 4.3 and
/// 4.4), option.
const DISCOVERY: [(u8, u16, u8); 3] = [
    (ROUTER_SOLICITATION, 8, SOURCE_LINK_LAYER),
    (NEIGHBOR_SOLICITATION, 24, SOURCE_LINK_LAYER),
    (NEIGHBOR_ADVERTISEMENT, 24, TARGET_LINK_LAYER),
];

/// Common prefix of the link control group addresses, 01:80:c2:00:00:00 to 01:80:c2:00:00:0f
/// (`is_link_local_ether_addr`).
const LINK_CONTROL: [u8; 5] = [0x01, 0x80, 0xc2, 0, 0];

fn is(at: u16, value: &[u8]) -> Test {
    Test::Bytes { at, value: value.to_vec(), not: false }
}

fn is_not(at: u16, value: &[u8]) -> Test {
    Test::Bytes { at, value: value.to_vec(), not: true }
}

fn rule(tests: impl IntoIterator<Item = Test>, verdict: Verdict) -> Rule {
    Rule { tests: tests.into_iter().collect(), verdict }
}

/// Builds the rules of `policy`. The most frequent frames of a busy endpoint come first, with few
/// and wide comparisons.
pub(super) fn rules(policy: &PortPolicy) -> Vec<Rule> {
    use Verdict::Drop;
    let group = at::DESTINATION_MAC + LINK_CONTROL.len() as u16;
    let link_control =
        [is(at::DESTINATION_MAC, &LINK_CONTROL), Test::Bits { at: group, value: 0, mask: 0xf0 }];
    let link_control = rule(link_control, Drop(SpoofReason::LinkControl));
    let foreign_mac = rule([is_not(at::SOURCE_MAC, &policy.mac.0)], Drop(SpoofReason::Mac));
    let mut rules = vec![link_control, rule([Test::Tagged], Drop(SpoofReason::Vlan))];
    if policy.any_address {
        rules.push(foreign_mac);
        rules.extend(any_address(policy));
        return rules;
    }
    rules.extend(own(policy));
    rules.push(foreign_mac);
    rules.extend(ipv4(policy));
    rules.extend(ipv6(policy));
    rules.extend(arp(policy));
    rules
}

/// Builds the rules at the ingress of a bridge. They accept ARP, and packets from addresses of the
/// network. For an internal network, these must be TCP, UDP or ICMP to its gateway addresses, or
/// neighbour discovery, so that nothing is forwarded, regardless of routes and policy rules.
pub(super) fn bridge_rules(policy: &BridgePolicy) -> Vec<Rule> {
    let mut rules = vec![rule([is(at::ETHERTYPE, &ARP)], Verdict::Accept)];
    let of = |net: &IpNet| if policy.internal { to_gateway(net) } else { from_members(net) };
    let (v6, v4): (Vec<&IpNet>, Vec<&IpNet>) =
        policy.gateways.iter().partition(|net| net.addr().is_ipv6());
    rules.extend(v4.into_iter().flat_map(of));
    rules.extend(routed_v6());
    rules.extend(v6.into_iter().flat_map(of));
    rules.push(rule([], Verdict::Drop(SpoofReason::Ethertype)));
    rules
}

/// Drops IPv6 routing headers, and what could hide one. The host would forward a packet along its
/// segments, or unpack the one inside (RFC 8986, 4; `ipv6_srh_rcv`, net/ipv6), which no guard sees.
fn routed_v6() -> Vec<Rule> {
    let drop = Verdict::Drop(SpoofReason::ExtensionHeader);
    let v6 = |next: u8| [is(at::ETHERTYPE, &IPV6), is(at::V6_NEXT, &[next])].into_iter();
    let mut rules = vec![rule(v6(ROUTING), drop)];
    rules.extend(
        EXTENSIONS.map(|inner| rule(v6(FRAGMENT).chain([is(at::V6_PAYLOAD, &[inner])]), drop)),
    );
    for extension in EXTENSIONS.into_iter().filter(|header| *header != ROUTING) {
        let last = AFTER_EXTENSION.iter().chain([&ICMPV6]);
        let more = last.map(|inner| is_not(at::V6_PAYLOAD, &[*inner]));
        rules.push(rule(v6(extension).chain(more), drop));
    }
    rules
}

/// Rules for packets from the subnet of `gateway`. Also accepted are IPv4 packets without a source
/// address (IGMP, DHCP), and IPv6 packets with a link-local source or none (duplicate address
/// detection).
fn from_members(gateway: &IpNet) -> Vec<Rule> {
    let accept = |ethertype: &[u8], at: u16, (network, prefix): (&[u8], u8)| {
        let from = within(at, network, prefix);
        rule([is(at::ETHERTYPE, ethertype)].into_iter().chain(from), Verdict::Accept)
    };
    match gateway {
        IpNet::V4(net) => {
            let subnet = (&net.network().octets()[..], net.prefix_len());
            [subnet, (&[0; 4], 32)].map(|from| accept(&IPV4, at::V4_SOURCE, from)).to_vec()
        }
        IpNet::V6(net) => {
            let subnet = (&net.network().octets()[..], net.prefix_len());
            let sources = [subnet, (&[0xfe, 0x80], 10), (&[0; 16], 128)];
            sources.map(|from| accept(&IPV6, at::V6_SOURCE, from)).to_vec()
        }
    }
}

/// Rules for packets from the subnet of `gateway` to it, and for neighbour discovery.
fn to_gateway(gateway: &IpNet) -> Vec<Rule> {
    match gateway {
        IpNet::V4(net) => {
            // No options: a source route (RFC 791, 3.1) would be forwarded.
            let mut tests = vec![is(at::ETHERTYPE, &IPV4), is(at::V4_HEAD, &[0x45])];
            tests.extend(within(at::V4_SOURCE, &net.network().octets(), net.prefix_len()));
            tests.push(is(at::V4_DESTINATION, &net.addr().octets()));
            // Other protocols could be tunnels.
            let of = |protocol| {
                let protocol = is(at::V4_PROTOCOL, &[protocol]);
                rule([protocol].into_iter().chain(tests.clone()), Verdict::Accept)
            };
            [TCP, UDP, ICMP].map(of).into()
        }
        IpNet::V6(net) => {
            let v6 = || is(at::ETHERTYPE, &IPV6);
            let mut tests = vec![v6()];
            tests.extend(within(at::V6_SOURCE, &net.network().octets(), net.prefix_len()));
            tests.push(is(at::V6_DESTINATION, &net.addr().octets()));
            let mut rules = Vec::new();
            for protocol in [TCP, UDP, ICMPV6] {
                let plain = vec![is(at::V6_NEXT, &[protocol])];
                let part = vec![is(at::V6_NEXT, &[FRAGMENT]), is(at::V6_PAYLOAD, &[protocol])];
                rules.extend(
                    [plain, part]
                        .map(|one| rule(one.into_iter().chain(tests.clone()), Verdict::Accept)),
                );
            }
            // To the gateway and to link-local destinations (fe80::/10, ff02::/16). Other
            // destinations would be forwarded.
            let destinations: [(&[u8], u8); 3] =
                [(&net.addr().octets(), 128), (&[0xfe, 0x80], 10), (&[0xff, 0x02], 16)];
            for kind in [NEIGHBOR_SOLICITATION, NEIGHBOR_ADVERTISEMENT] {
                for (destination, prefix) in destinations {
                    let head = [v6(), is(at::V6_NEXT, &[ICMPV6]), is(at::V6_PAYLOAD, &[kind])];
                    let to = within(at::V6_DESTINATION, destination, prefix);
                    rules.push(rule(head.into_iter().chain(to), Verdict::Accept));
                }
            }
            rules
        }
    }
}

/// Returns tests that match an address at offset `at` within a prefix.
fn within(at: u16, network: &[u8], prefix: u8) -> Vec<Test> {
    let (bytes, bits) = (usize::from(prefix / 8), prefix % 8);
    let mut tests = Vec::new();
    if bytes > 0 {
        tests.push(is(at, &network[..bytes]));
    }
    if bits > 0 {
        let mask = 0xff << (8 - bits);
        tests.push(Test::Bits { at: at + bytes as u16, value: network[bytes] & mask, mask });
    }
    tests
}

/// Rules for packets from own addresses that need no further inspection.
fn own(policy: &PortPolicy) -> Vec<Rule> {
    // The source MAC address and the ethertype are adjacent, so one comparison covers both.
    let head = |ethertype: &[u8]| is(at::SOURCE_MAC, &[&policy.mac.0[..], ethertype].concat());
    let plain = |protocol: &u8| is_not(at::V6_NEXT, &[*protocol]);
    let v4 = policy.v4.iter().map(|ip| {
        vec![
            head(&IPV4),
            not_to_loopback(),
            is(at::V4_SOURCE, &ip.octets()),
            is_not(at::V4_PROTOCOL, &[ICMP]),
            is_not(at::V4_PROTOCOL, &[IGMP]),
            is_not(at::V4_PROTOCOL, &[PIM]),
        ]
    });
    let v6 = policy.v6_sources().into_iter().map(|ip| {
        let tests = [head(&IPV6), is(at::V6_SOURCE, &ip.octets()), is_not(at::V6_NEXT, &[ICMPV6])];
        let others = EXTENSIONS.iter().chain([&FRAGMENT, &PIM]).map(plain);
        tests.into_iter().chain(others).collect()
    });
    v4.chain(v6).map(|tests: Vec<Test>| rule(tests, Verdict::Accept)).collect()
}

/// 127.0.0.0/8.
const LOOPBACK: [u8; 1] = [127];

fn not_to_loopback() -> Test {
    is_not(at::V4_DESTINATION, &LOOPBACK)
}

/// Drops packets to IPv4 loopback addresses. The kernel drops packets to `::1` itself
/// (`ip6_rcv_core`).
fn to_loopback() -> Rule {
    let tests = [is(at::ETHERTYPE, &IPV4), is(at::V4_DESTINATION, &LOOPBACK)];
    rule(tests, Verdict::Drop(SpoofReason::Loopback))
}

/// Drops ICMP messages of the type `kind`, which only routers send.
fn of_routers_v4(kind: u8) -> Rule {
    let tests = icmp_v4().chain([is(at::V4_HEAD, &WITHOUT_OPTIONS)]).chain(first_fragment_v4());
    let tests = tests.chain([is(at::V4_ICMP, &[kind])]);
    rule(tests, Verdict::Drop(SpoofReason::Router))
}

/// IPv4 version and header length without options: version 4, five 32-bit words.
const WITHOUT_OPTIONS: [u8; 1] = [0x45];

fn icmp_v4() -> impl Iterator<Item = Test> {
    [is(at::ETHERTYPE, &IPV4), is(at::V4_PROTOCOL, &[ICMP])].into_iter()
}

/// Tests for fragment offset 0. Later fragments carry no ICMP header.
fn first_fragment_v4() -> [Test; 2] {
    let upper = Test::Bits { at: at::V4_FRAGMENT, value: 0, mask: 0x1f };
    [upper, is(at::V4_FRAGMENT + 1, &[0])]
}

/// Drops ICMP errors unless they quote a packet to one of `own`. ICMP with IP options is dropped as
/// well: options shift the type field, and no kernel sends errors with options.
fn icmp_errors_v4(own: &[Ipv4Addr]) -> Vec<Rule> {
    let first = || icmp_v4().chain(first_fragment_v4());
    let dropped = Verdict::Drop(SpoofReason::IcmpError);
    // A first fragment can end before the quote, and its frame carry a decoy quote as padding. The
    // receiver then takes the quote from the next fragment.
    let unfragmented = Test::Bits { at: at::V4_FRAGMENT, value: 0, mask: 0x20 };
    let mut rules = vec![rule(first().chain([is_not(at::V4_HEAD, &WITHOUT_OPTIONS)]), dropped)];
    for kind in ICMP_ERRORS {
        let error = || first().chain([is(at::V4_ICMP, &[kind])]);
        rules.extend(own.iter().map(|ip| {
            let quotes_own = is(at::V4_QUOTED_DESTINATION, &ip.octets());
            let quotes_no_icmp = is_not(at::V4_QUOTED_PROTOCOL, &[ICMP]);
            let tests = [unfragmented.clone(), quotes_own, quotes_no_icmp];
            rule(error().chain(tests), Verdict::Accept)
        }));
        rules.push(rule(error(), dropped));
    }
    rules
}

/// Tests for an ICMPv6 error: types below 128 (RFC 4443, 2.1).
fn is_error_v6(at: u16) -> Test {
    Test::Bits { at, value: 0, mask: 0x80 }
}

/// Drops ICMPv6 errors like [`icmp_errors_v4`]. Errors in fragments or after extension headers are
/// always dropped.
fn icmp_errors_v6(own: &[Ipv6Addr]) -> Vec<Rule> {
    let dropped = Verdict::Drop(SpoofReason::IcmpError);
    let head = |next: u8| [is(at::ETHERTYPE, &IPV6), is(at::V6_NEXT, &[next])].into_iter();
    let error = || head(ICMPV6).chain([is_error_v6(at::V6_PAYLOAD)]);
    // The kernel uses the last segment of a quoted segment routing header as the destination
    // (`seg6_icmp_srh`), so errors must quote packets without extension headers. Quotes of ICMPv6
    // are rejected as well: the kernel finds a ping socket by the echo identifier alone.
    let quotes_plain_packet = || {
        let extensions = EXTENSIONS.into_iter().chain([FRAGMENT, ICMPV6, 135, 139, 140]);
        extensions.map(|next| is_not(at::V6_QUOTED_NEXT, &[next]))
    };
    let mut rules: Vec<Rule> = own
        .iter()
        .map(|ip| {
            let quotes_own = is(at::V6_QUOTED_DESTINATION, &ip.octets());
            let tests = [quotes_own].into_iter().chain(quotes_plain_packet());
            rule(error().chain(tests), Verdict::Accept)
        })
        .collect();
    rules.push(rule(error(), dropped));
    let first = || {
        let upper = is(at::V6_FRAGMENT_OFFSET, &[0]);
        let lower = Test::Bits { at: at::V6_FRAGMENT_OFFSET + 1, value: 0, mask: 0xf8 };
        head(FRAGMENT).chain([upper, lower])
    };
    let of = |inner: u8| is(at::V6_PAYLOAD, &[inner]);
    rules.extend(ECHO_V6.map(|kind| {
        rule(first().chain([of(ICMPV6), is(at::AFTER_FRAGMENT, &[kind])]), Verdict::Accept)
    }));
    rules.push(rule(first().chain([of(ICMPV6)]), dropped));
    for extension in EXTENSIONS {
        let harmless = AFTER_EXTENSION.iter().map(|inner| is_not(at::AFTER_FRAGMENT, &[*inner]));
        rules.push(rule(
            first().chain([of(extension)]).chain(harmless),
            Verdict::Drop(SpoofReason::ExtensionHeader),
        ));
    }
    rules.push(rule(first().chain([of(FRAGMENT)]), Verdict::Drop(SpoofReason::ExtensionHeader)));
    rules
}

/// Drops messages of multicast routers: IGMP other than reports (queries, and advertisements of RFC
/// 4286), and PIM. A bridge treats the port that receives one as a router port and forwards all
/// multicast to it (`br_ip4_multicast_query`, `br_multicast_pim`).
fn of_multicast_routers_v4() -> Vec<Rule> {
    let drop = Verdict::Drop(SpoofReason::Router);
    let of = |protocol| [is(at::ETHERTYPE, &IPV4), is(at::V4_PROTOCOL, &[protocol])].into_iter();
    let heads = [(0x45, at::V4_ICMP), (0x46, at::V4_IGMP)];
    let mut rules = vec![rule(of(PIM), drop)];
    for (head, at) in heads {
        let others = IGMP_REPORTS.iter().map(|kind| is_not(at, &[*kind]));
        rules.push(rule(of(IGMP).chain([is(at::V4_HEAD, &[head])]).chain(others), drop));
    }
    // With more options, the type is at another place.
    rules.push(rule(of(IGMP).chain(heads.map(|(head, _)| is_not(at::V4_HEAD, &[head]))), drop));
    rules
}

/// Drops extension headers that could precede ICMPv6.
fn hidden_v6() -> impl Iterator<Item = Rule> {
    EXTENSIONS.into_iter().map(|extension| {
        let head = [is(at::ETHERTYPE, &IPV6), is(at::V6_NEXT, &[extension])].into_iter();
        let harmless = AFTER_EXTENSION.iter().map(|inner| is_not(at::V6_PAYLOAD, &[*inner]));
        rule(head.chain(harmless), Verdict::Drop(SpoofReason::ExtensionHeader))
    })
}

/// Rules for an endpoint with `any_address`, after the check of the MAC address.
fn any_address(policy: &PortPolicy) -> Vec<Rule> {
    use Verdict::{Accept, Drop};
    let v6 = || is(at::ETHERTYPE, &IPV6);
    let plain = EXTENSIONS.into_iter().chain([ICMPV6, FRAGMENT]);
    let plain = plain.map(|next| is_not(at::V6_NEXT, &[next]));
    // Most traffic first; the remaining rules concern ICMP.
    let mut rules = vec![
        rule(
            [is(at::ETHERTYPE, &IPV4), is_not(at::V4_PROTOCOL, &[ICMP]), not_to_loopback()],
            Accept,
        ),
        rule([v6()].into_iter().chain(plain), Accept),
        to_loopback(),
        of_routers_v4(ICMP_REDIRECT),
        rule(
            [v6(), is(at::V6_NEXT, &[ICMPV6]), is(at::V6_PAYLOAD, &[REDIRECT])],
            Drop(SpoofReason::Router),
        ),
    ];
    // ICMP unicast to a neighbour may concern traffic that the endpoint forwards. The bridge itself
    // receives group frames and frames to its own address.
    let unicast = Test::Bits { at: at::DESTINATION_MAC, value: 0, mask: 1 };
    for icmp in [
        [is(at::ETHERTYPE, &IPV4), is(at::V4_PROTOCOL, &[ICMP])],
        [v6(), is(at::V6_NEXT, &[ICMPV6])],
    ] {
        let to_neighbour = [unicast.clone(), is_not(at::DESTINATION_MAC, &policy.bridge.0)];
        rules.push(rule(icmp.into_iter().chain(to_neighbour), Accept));
    }
    rules.extend(icmp_errors_v4(&policy.v4));
    rules.extend(icmp_errors_v6(&policy.v6_sources()));
    rules.extend(MLD_REPORTS.iter().map(|kind| rule(mld(*kind), Accept)));
    rules.extend(hidden_v6());
    rules.extend([IPV4, IPV6, ARP].map(|ethertype| rule([is(at::ETHERTYPE, &ethertype)], Accept)));
    rules
}

fn ipv4(policy: &PortPolicy) -> Vec<Rule> {
    let v4 = || is(at::ETHERTYPE, &IPV4);
    let foreign_source = Verdict::Drop(SpoofReason::Ipv4Source);
    if policy.v4.is_empty() {
        return vec![rule([v4()], foreign_source)];
    }
    let igmp = [v4(), is(at::V4_SOURCE, &[0; 4]), is(at::V4_PROTOCOL, &[IGMP])];
    let mut rules = vec![to_loopback()];
    rules.extend(of_multicast_routers_v4());
    rules.push(rule(igmp, Verdict::Accept));
    let foreign = policy.v4.iter().map(|ip| is_not(at::V4_SOURCE, &ip.octets()));
    rules.push(rule([v4()].into_iter().chain(foreign), foreign_source));
    // From here on the source is valid and the protocol is ICMP or IGMP.
    rules.extend([ICMP_REDIRECT, ICMP_ADVERTISEMENT].map(of_routers_v4));
    rules.extend(icmp_errors_v4(&policy.v4));
    rules.extend(
        policy.v4.iter().map(|ip| rule([v4(), is(at::V4_SOURCE, &ip.octets())], Verdict::Accept)),
    );
    // The frame is truncated.
    rules.push(rule([v4()], foreign_source));
    rules
}

/// Tests for an MLD message after a hop-by-hop header of 8 bytes with the router alert option (RFC
/// 2710, 3).
fn mld(kind: u8) -> impl Iterator<Item = Test> {
    let head = [is(at::ETHERTYPE, &IPV6), is(at::V6_NEXT, &[HOP_BY_HOP])].into_iter();
    head.chain([is(at::V6_PAYLOAD, &[ICMPV6, 0]), is(at::AFTER_HOP_BY_HOP, &[kind])])
}

fn arp(policy: &PortPolicy) -> Vec<Rule> {
    let arp = || is(at::ETHERTYPE, &ARP);
    let mut rules = Vec::new();
    for own in policy.v4.iter().map(Ipv4Addr::octets) {
        let head = |operation: &[u8], sender: &[u8]| {
            vec![
                arp(),
                is(at::ARP_FORMAT, &ARP_FORMAT),
                is(at::ARP_OPERATION, operation),
                is(at::ARP_SENDER_MAC, &policy.mac.0),
                is(at::ARP_SENDER, sender),
            ]
        };
        rules.push(rule(head(&ARP_REQUEST, &own), Verdict::Accept));
        rules.push(rule(head(&ARP_REPLY, &own), Verdict::Accept));
        let mut probe = head(&ARP_REQUEST, &[0; 4]);
        probe.push(is(at::ARP_TARGET, &own));
        rules.push(rule(probe, Verdict::Accept));
    }
    rules.push(rule([arp()], Verdict::Drop(SpoofReason::Arp)));
    rules
}

/// Length of a neighbour solicitation without options (RFC 4861, 4.3).
const SOLICITATION_LENGTH: u16 = 24;

/// Type of the option by which a host recognises its own solicitation when it is looped back (RFC
/// 3971, 5.3.2; RFC 7527).
const NONCE: u8 = 14;

fn ipv6(policy: &PortPolicy) -> Vec<Rule> {
    use Verdict::{Accept, Drop};
    let v6 = || is(at::ETHERTYPE, &IPV6);
    let own = policy.v6_sources();
    if own.is_empty() {
        return vec![rule([v6()], Drop(SpoofReason::Ipv6Source))];
    }
    let unspecified = || is(at::V6_SOURCE, &[0; 16]);
    let next = |protocol: u8| is(at::V6_NEXT, &[protocol]);
    let icmp = |kind: u8| [v6(), next(ICMPV6), is(at::V6_PAYLOAD, &[kind])];
    let with = |head: [Test; 3], more: Vec<Test>| head.into_iter().chain(more);

    let mut rules = Vec::new();
    for target in &own {
        let detection = |length: u16| {
            let length = is(at::V6_PAYLOAD_LENGTH, &length.to_be_bytes());
            let target = is(at::ND_TARGET, &target.octets());
            with(icmp(NEIGHBOR_SOLICITATION), vec![unspecified(), target, length])
        };
        rules.push(rule(detection(SOLICITATION_LENGTH), Accept));
        let nonce = is(at::V6_PAYLOAD + SOLICITATION_LENGTH, &[NONCE, 1]);
        rules.push(rule(detection(SOLICITATION_LENGTH + 8).chain([nonce]), Accept));
    }
    rules.extend(MLD_REPORTS.iter().map(|kind| {
        let from_unspecified = mld(*kind).chain([unspecified()]);
        rule(from_unspecified, Accept)
    }));
    let foreign = own.iter().map(|ip| is_not(at::V6_SOURCE, &ip.octets()));
    rules.push(rule([v6()].into_iter().chain(foreign), Drop(SpoofReason::Ipv6Source)));

    // From here on the source is valid.
    for kind in [ROUTER_ADVERTISEMENT, REDIRECT, MLD_QUERY, MULTICAST_ADVERTISEMENT] {
        rules.push(rule(icmp(kind), Drop(SpoofReason::Router)));
    }
    rules.push(rule([v6(), next(PIM)], Drop(SpoofReason::Router)));
    let foreign = own.iter().map(|ip| is_not(at::ND_TARGET, &ip.octets())).collect();
    let spoofed = Drop(SpoofReason::NeighborDiscovery);
    rules.push(rule(with(icmp(NEIGHBOR_ADVERTISEMENT), foreign), spoofed));
    for (kind, length, option) in DISCOVERY {
        let long = |length: u16| is(at::V6_PAYLOAD_LENGTH, &length.to_be_bytes());
        let own_option = is(at::V6_PAYLOAD + length, &[&[option, 1], &policy.mac.0[..]].concat());
        rules.push(rule(with(icmp(kind), vec![long(length)]), Accept));
        rules.push(rule(with(icmp(kind), vec![long(length + 8), own_option]), Accept));
        rules.push(rule(icmp(kind), spoofed));
    }
    rules.extend(MLD_REPORTS.iter().map(|kind| rule(mld(*kind), Accept)));
    rules.extend(icmp_errors_v6(&own));
    rules.extend(hidden_v6());
    rules.push(rule([v6()], Accept));
    rules
}

#[cfg(test)]
pub(super) mod tests;
