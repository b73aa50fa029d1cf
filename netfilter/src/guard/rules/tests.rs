use super::*;

pub(in crate::guard) const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];
const BRIDGE: [u8; 6] = [2, 0, 0, 0, 0, 1];

/// Evaluates `rules` on `frame`. The oracle for the back ends.
pub(in crate::guard) fn verdict(rules: &[Rule], frame: &[u8], tagged: bool) -> Verdict {
    let holds = |test: &Test| match test {
        Test::Tagged => tagged,
        Test::Bits { at, value, mask } => {
            frame.get(usize::from(*at)).is_some_and(|byte| byte & mask == *value)
        }
        Test::Bytes { at, value, not } => {
            let at = usize::from(*at);
            frame.get(at..at + value.len()).is_some_and(|bytes| (bytes == value) != *not)
        }
    };
    rules
        .iter()
        .find(|rule| rule.tests.iter().all(holds))
        .map_or(DEFAULT_VERDICT, |rule| rule.verdict)
}

pub(in crate::guard) fn policy() -> PortPolicy {
    PortPolicy {
        mac: MacAddress(MAC),
        bridge: MacAddress(BRIDGE),
        v4: vec![[10, 9, 0, 7].into()],
        v6: vec!["fd09::7".parse().unwrap()],
        any_address: false,
    }
}

pub(in crate::guard) fn ethernet(source: [u8; 6], ethertype: [u8; 2], payload: &[u8]) -> Vec<u8> {
    ethernet_to([0xff; 6], source, ethertype, payload)
}

pub(in crate::guard) fn ethernet_to(
    destination: [u8; 6],
    source: [u8; 6],
    ethertype: [u8; 2],
    payload: &[u8],
) -> Vec<u8> {
    [&destination[..], &source, &ethertype, payload].concat()
}

pub(in crate::guard) fn packet_v4(source: [u8; 4], protocol: u8) -> Vec<u8> {
    let mut packet = vec![0x45, 0, 0, 28, 0, 0, 0, 0, 64, protocol, 0, 0];
    packet.extend(source);
    packet.extend([10, 9, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0]);
    packet
}

pub(in crate::guard) fn packet_v6(source: &str, next: u8, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x60, 0, 0, 0, 0, payload.len() as u8, next, 255];
    packet.extend(source.parse::<Ipv6Addr>().unwrap().octets());
    packet.extend("ff02::1".parse::<Ipv6Addr>().unwrap().octets());
    packet.extend(payload);
    packet
}

fn arp_packet(operation: u8, mac: [u8; 6], sender: [u8; 4], target: [u8; 4]) -> Vec<u8> {
    [&ARP_FORMAT[..], &[0, operation], &mac, &sender, &[0; 6], &target].concat()
}

/// A neighbour solicitation or advertisement.
fn discovery(kind: u8, target: &str, option: Option<(u8, [u8; 6])>) -> Vec<u8> {
    let target = target.parse::<Ipv6Addr>().unwrap().octets();
    let mut message = [&[kind, 0, 0, 0, 0, 0, 0, 0][..], &target].concat();
    if let Some((kind, mac)) = option {
        message.extend([kind, 1]);
        message.extend(mac);
    }
    message
}

/// An ICMPv6 error that quotes a packet from `source` to `destination`.
fn error_v6(kind: u8, source: &str, destination: &str) -> Vec<u8> {
    let mut quoted = packet_v6(source, UDP, &[0; 8]);
    quoted[24..40].copy_from_slice(&destination.parse::<Ipv6Addr>().unwrap().octets());
    [&[kind, 0, 0, 0, 0, 0, 0, 0][..], &quoted].concat()
}

/// An ICMP message from the endpoint's address that quotes a packet to `destination`.
fn message_v4(kind: u8, destination: [u8; 4]) -> Vec<u8> {
    let mut quoted = packet_v4([198, 51, 100, 1], UDP);
    quoted[16..20].copy_from_slice(&destination);
    let header = packet_v4([10, 9, 0, 7], ICMP);
    [&header[..20], &[kind, 0, 0, 0, 0, 0, 0, 0], &quoted].concat()
}

fn evaluate(frame: &[u8]) -> Verdict {
    verdict(&rules(&policy()), frame, false)
}

const OTHER: [u8; 6] = [2, 0, 0, 0, 0, 8];
const OWN: &str = "fd09::7";
const LINK_LOCAL: &str = "fe80::ff:fe00:7";

#[test]
fn icmp_messages_of_routers_are_dropped() {
    let frame = |kind| ethernet(MAC, IPV4, &message_v4(kind, [10, 9, 0, 7]));
    for kind in [ICMP_REDIRECT, ICMP_ADVERTISEMENT] {
        assert_eq!(evaluate(&frame(kind)), Verdict::Drop(SpoofReason::Router), "{kind}");
    }
    // A solicitation is one of hosts.
    assert_eq!(evaluate(&frame(10)), Verdict::Accept);
}

#[test]
fn link_local_address_matches_the_kernel() {
    assert_eq!(MacAddress(MAC).link_local().to_string(), LINK_LOCAL);
}

#[test]
fn foreign_ipv4_and_arp_sources_are_dropped() {
    use SpoofReason::{Arp, Ethertype, Ipv4Source, Mac};
    let own = [10, 9, 0, 7];
    let mut report = packet_v4([0; 4], IGMP);
    report[20] = IGMP_REPORTS[1];
    for (frame, expected) in [
        (ethernet(MAC, IPV4, &packet_v4(own, UDP)), Verdict::Accept),
        (ethernet(OTHER, IPV4, &packet_v4(own, UDP)), Verdict::Drop(Mac)),
        (ethernet(MAC, IPV4, &packet_v4([10, 9, 0, 8], UDP)), Verdict::Drop(Ipv4Source)),
        (ethernet(MAC, IPV4, &packet_v4([127, 0, 0, 1], UDP)), Verdict::Drop(Ipv4Source)),
        (ethernet(MAC, IPV4, &report), Verdict::Accept),
        (ethernet(MAC, IPV4, &packet_v4([0; 4], UDP)), Verdict::Drop(Ipv4Source)),
        (ethernet(MAC, ARP, &arp_packet(1, MAC, own, [10, 9, 0, 1])), Verdict::Accept),
        (ethernet(MAC, ARP, &arp_packet(2, MAC, own, [10, 9, 0, 1])), Verdict::Accept),
        (ethernet(MAC, ARP, &arp_packet(2, MAC, [10, 9, 0, 1], own)), Verdict::Drop(Arp)),
        (ethernet(MAC, ARP, &arp_packet(1, OTHER, own, own)), Verdict::Drop(Arp)),
        (ethernet(MAC, ARP, &arp_packet(1, MAC, [0; 4], own)), Verdict::Accept),
        (ethernet(MAC, ARP, &arp_packet(1, MAC, [0; 4], [10, 9, 0, 1])), Verdict::Drop(Arp)),
        (ethernet(MAC, ARP, &arp_packet(2, MAC, [0; 4], own)), Verdict::Drop(Arp)),
        (ethernet(MAC, [0x88, 0xa8], &[0; 60]), Verdict::Drop(Ethertype)),
        (ethernet(MAC, IPV4, &packet_v4(own, UDP)[..14]), Verdict::Drop(Ipv4Source)),
    ] {
        assert_eq!(evaluate(&frame), expected, "{frame:02x?}");
    }
    let tagged = ethernet(MAC, IPV4, &packet_v4(own, UDP));
    assert_eq!(verdict(&rules(&policy()), &tagged, true), Verdict::Drop(SpoofReason::Vlan));
}

#[test]
fn foreign_ipv6_and_neighbor_discovery_are_dropped() {
    use SpoofReason::{ExtensionHeader, IcmpError, Ipv6Source, NeighborDiscovery, Router};
    let mld = |kind| [&[ICMPV6, 0, 5, 2, 0, 0, 1, 0][..], &[kind, 0, 0, 0]].concat();
    let solicited = |target, option| discovery(NEIGHBOR_SOLICITATION, target, option);
    let advertised = |target, option| discovery(NEIGHBOR_ADVERTISEMENT, target, option);
    // Appends a second option with a foreign link-layer address.
    let second = |message: Vec<u8>, kind: u8| [&message[..], &[kind, 1], &OTHER].concat();
    let own_option = [&[1, 1][..], &MAC].concat();
    let quoting = |mut error: Vec<u8>, next: u8| {
        error[8 + 6] = next;
        error
    };
    let router_solicitation =
        |options: &[u8]| [&[ROUTER_SOLICITATION, 0, 0, 0, 0, 0, 0, 0][..], options].concat();
    for (source, next, payload, expected) in [
        (OWN, UDP, vec![0; 8], Verdict::Accept),
        (LINK_LOCAL, TCP, vec![0; 20], Verdict::Accept),
        ("fd09::8", UDP, vec![0; 8], Verdict::Drop(Ipv6Source)),
        ("fe80::8", UDP, vec![0; 8], Verdict::Drop(Ipv6Source)),
        ("::1", UDP, vec![0; 8], Verdict::Drop(Ipv6Source)),
        ("::", UDP, vec![0; 8], Verdict::Drop(Ipv6Source)),
        (OWN, ICMPV6, vec![128, 0, 0, 0], Verdict::Accept),
        // Duplicate address detection.
        ("::", ICMPV6, solicited(OWN, None), Verdict::Accept),
        ("::", ICMPV6, solicited(LINK_LOCAL, None), Verdict::Accept),
        ("::", ICMPV6, solicited("fd09::8", None), Verdict::Drop(Ipv6Source)),
        ("::", ICMPV6, advertised(OWN, None), Verdict::Drop(Ipv6Source)),
        // Resolution.
        (OWN, ICMPV6, solicited("fd09::1", Some((1, MAC))), Verdict::Accept),
        (OWN, ICMPV6, solicited("fd09::1", Some((1, OTHER))), Verdict::Drop(NeighborDiscovery)),
        (OWN, ICMPV6, advertised(OWN, Some((2, MAC))), Verdict::Accept),
        (OWN, ICMPV6, advertised(OWN, None), Verdict::Accept),
        (LINK_LOCAL, ICMPV6, advertised(OWN, Some((2, MAC))), Verdict::Accept),
        (OWN, ICMPV6, advertised("fd09::8", Some((2, MAC))), Verdict::Drop(NeighborDiscovery)),
        (OWN, ICMPV6, advertised(OWN, Some((2, OTHER))), Verdict::Drop(NeighborDiscovery)),
        // A nonce (RFC 7527, 4) is valid in duplicate address detection only; otherwise the own
        // link-layer address is the only valid option.
        ("::", ICMPV6, solicited(OWN, Some((14, OTHER))), Verdict::Accept),
        // No link-layer address (RFC 4861, 4.3).
        ("::", ICMPV6, solicited(OWN, Some((1, OTHER))), Verdict::Drop(Ipv6Source)),
        ("::", ICMPV6, solicited(OWN, Some((1, MAC))), Verdict::Drop(Ipv6Source)),
        (OWN, ICMPV6, solicited("fd09::1", None), Verdict::Accept),
        (OWN, ICMPV6, solicited("fd09::1", Some((14, OTHER))), Verdict::Drop(NeighborDiscovery)),
        (
            OWN,
            ICMPV6,
            second(solicited("fd09::1", Some((1, MAC))), 1),
            Verdict::Drop(NeighborDiscovery),
        ),
        (
            OWN,
            ICMPV6,
            second(solicited("fd09::1", Some((14, MAC))), 1),
            Verdict::Drop(NeighborDiscovery),
        ),
        (OWN, ICMPV6, second(advertised(OWN, Some((2, MAC))), 2), Verdict::Drop(NeighborDiscovery)),
        (
            OWN,
            ICMPV6,
            second(advertised(OWN, Some((14, MAC))), 2),
            Verdict::Drop(NeighborDiscovery),
        ),
        (OWN, ICMPV6, router_solicitation(&[]), Verdict::Accept),
        (OWN, ICMPV6, router_solicitation(&own_option), Verdict::Accept),
        (OWN, ICMPV6, second(router_solicitation(&[]), 1), Verdict::Drop(NeighborDiscovery)),
        (
            OWN,
            ICMPV6,
            second(router_solicitation(&own_option), 1),
            Verdict::Drop(NeighborDiscovery),
        ),
        // Routers.
        (LINK_LOCAL, ICMPV6, vec![ROUTER_ADVERTISEMENT; 16], Verdict::Drop(Router)),
        (LINK_LOCAL, ICMPV6, vec![REDIRECT; 16], Verdict::Drop(Router)),
        // Multicast listeners.
        ("::", HOP_BY_HOP, mld(143), Verdict::Accept),
        (LINK_LOCAL, HOP_BY_HOP, mld(143), Verdict::Accept),
        (LINK_LOCAL, HOP_BY_HOP, mld(ROUTER_ADVERTISEMENT), Verdict::Drop(ExtensionHeader)),
        ("::", HOP_BY_HOP, mld(ROUTER_ADVERTISEMENT), Verdict::Drop(Ipv6Source)),
        // After destination options, as sent by ip6_tunnel.
        (OWN, 60, vec![41, 0, 4, 1, 4, 1, 1, 0], Verdict::Accept),
        (OWN, 60, vec![ICMPV6, 0, 4, 1, 4, 1, 1, 0, 134], Verdict::Drop(ExtensionHeader)),
        (OWN, 60, vec![60, 0, 4, 1, 4, 1, 1, 0], Verdict::Drop(ExtensionHeader)),
        (OWN, 44, vec![ICMPV6, 0, 0, 1, 0, 0, 0, 1, 128], Verdict::Accept),
        (OWN, 44, vec![UDP, 0, 0, 1, 0, 0, 0, 1], Verdict::Accept),
        // An error in a first fragment; later fragments may have any payload.
        (OWN, 44, vec![ICMPV6, 0, 0, 1, 0, 0, 0, 1, 2], Verdict::Drop(IcmpError)),
        (OWN, 44, vec![ICMPV6, 0, 0, 9, 0, 0, 0, 1, 2], Verdict::Accept),
        (OWN, 44, vec![60, 0, 0, 1, 0, 0, 0, 1, ICMPV6], Verdict::Drop(ExtensionHeader)),
        (OWN, 44, vec![60, 0, 0, 1, 0, 0, 0, 1, 41], Verdict::Accept),
        (OWN, 44, vec![44, 0, 0, 1, 0, 0, 0, 1, UDP], Verdict::Drop(ExtensionHeader)),
        (OWN, 60, vec![44, 0, 4, 1, 4, 1, 1, 0], Verdict::Drop(ExtensionHeader)),
        // Errors that quote packets to own addresses and to foreign addresses.
        (OWN, ICMPV6, error_v6(1, "fd09::1", OWN), Verdict::Accept),
        (OWN, ICMPV6, error_v6(2, "2001:db8::1", LINK_LOCAL), Verdict::Accept),
        (OWN, ICMPV6, error_v6(2, OWN, "2001:db8::1"), Verdict::Drop(IcmpError)),
        (OWN, ICMPV6, error_v6(3, "fd09::1", "fd09::8"), Verdict::Drop(IcmpError)),
        (OWN, ICMPV6, vec![2, 0, 0, 0], Verdict::Drop(IcmpError)),
        // Quotes with a segment routing header, with ICMPv6, and with TCP.
        (OWN, ICMPV6, quoting(error_v6(1, "fd09::1", OWN), 43), Verdict::Drop(IcmpError)),
        (OWN, ICMPV6, quoting(error_v6(1, "fd09::1", OWN), ICMPV6), Verdict::Drop(IcmpError)),
        (OWN, ICMPV6, quoting(error_v6(1, "fd09::1", OWN), TCP), Verdict::Accept),
        // Fragmented router advertisement.
        (OWN, 44, vec![ICMPV6, 0, 0, 1, 0, 0, 0, 1, 134], Verdict::Drop(IcmpError)),
    ] {
        let frame = ethernet(MAC, IPV6, &packet_v6(source, next, &payload));
        assert_eq!(evaluate(&frame), expected, "{source} {next} {payload:02x?}");
    }
}

#[test]
fn frames_to_link_control_groups_are_dropped() {
    for policy in [policy(), PortPolicy { any_address: true, ..policy() }] {
        let rules = rules(&policy);
        for (last, expected) in [
            (0, true),
            (1, true),
            (3, true),
            (0x0e, true),
            (0x0f, true),
            (0x10, false),
            (0x20, false),
        ] {
            let group = [0x01, 0x80, 0xc2, 0, 0, last];
            let frame = ethernet_to(group, MAC, IPV4, &packet_v4([10, 9, 0, 7], UDP));
            let expected =
                if expected { Verdict::Drop(SpoofReason::LinkControl) } else { Verdict::Accept };
            assert_eq!(verdict(&rules, &frame, false), expected, "{group:02x?} {policy:?}");
        }
    }
}

#[test]
fn icmp_errors_must_quote_packets_to_the_endpoint() {
    use SpoofReason::{IcmpError, Router};
    let (own, server) = ([10, 9, 0, 7], [198, 51, 100, 1]);
    for (kind, quoted, expected) in [
        (0, server, Verdict::Accept),
        (8, server, Verdict::Accept),
        (3, own, Verdict::Accept),
        (11, own, Verdict::Accept),
        (3, server, Verdict::Drop(IcmpError)),
        (4, server, Verdict::Drop(IcmpError)),
        (11, [10, 9, 0, 8], Verdict::Drop(IcmpError)),
        (12, server, Verdict::Drop(IcmpError)),
        (5, own, Verdict::Drop(Router)),
    ] {
        let message = message_v4(kind, quoted);
        assert_eq!(evaluate(&ethernet(MAC, IPV4, &message)), expected, "{kind} {quoted:?}");
        // A truncated error without the quoted destination is dropped.
        let short = evaluate(&ethernet(MAC, IPV4, &message[..44]));
        let expected = if [3, 11].contains(&kind) { Verdict::Drop(IcmpError) } else { expected };
        assert_eq!(short, expected, "{kind}, truncated");
    }
    // The kernel finds a ping socket by the echo identifier alone.
    let mut quotes_icmp = message_v4(3, own);
    quotes_icmp[20 + 8 + 9] = ICMP;
    let verdict = evaluate(&ethernet(MAC, IPV4, &quotes_icmp));
    assert_eq!(verdict, Verdict::Drop(IcmpError));
    let mut fragment = message_v4(3, own);
    for (field, expected) in [
        ([0x20, 0], Verdict::Drop(IcmpError)),
        ([0x20, 1], Verdict::Accept),
        ([0x01, 0], Verdict::Accept),
    ] {
        fragment[6..8].copy_from_slice(&field);
        assert_eq!(evaluate(&ethernet(MAC, IPV4, &fragment)), expected, "{field:02x?}");
    }
    let mut with_options = message_v4(8, server);
    with_options[0] = 0x46;
    let verdict = evaluate(&ethernet(MAC, IPV4, &with_options));
    assert_eq!(verdict, Verdict::Drop(IcmpError));
}

#[test]
fn messages_of_multicast_routers_are_dropped_and_reports_accepted() {
    let igmp = |options: &[u8], kind: u8| {
        let mut packet = packet_v4([10, 9, 0, 7], IGMP)[..20].to_vec();
        packet[0] = 0x45 + options.len() as u8 / 4;
        packet.extend(options);
        packet.extend([kind, 0, 0, 0, 0, 0, 0, 0]);
        evaluate(&ethernet(MAC, IPV4, &packet))
    };
    let dropped = Verdict::Drop(SpoofReason::Router);
    for options in [&[][..], &[0x94, 4, 0, 0]] {
        for kind in 0..=255 {
            // Reports of versions 1, 2 and 3, leave group.
            let expected =
                if [0x12, 0x16, 0x22, 0x17].contains(&kind) { Verdict::Accept } else { dropped };
            assert_eq!(igmp(options, kind), expected, "{kind:02x}");
        }
    }
    for words in 2..=10 {
        assert_eq!(igmp(&[1, 1, 1, 1].repeat(words), 0x22), dropped, "{words} words of options");
    }
    assert_eq!(evaluate(&ethernet(MAC, IPV4, &packet_v4([10, 9, 0, 7], PIM))), dropped);
    for (next, kind) in [(PIM, 0), (ICMPV6, 130), (ICMPV6, 151)] {
        let packet = packet_v6(LINK_LOCAL, next, &[kind; 24]);
        assert_eq!(evaluate(&ethernet(MAC, IPV6, &packet)), dropped, "{next} {kind}");
    }
}

#[test]
fn packets_to_loopback_addresses_are_dropped() {
    for policy in [policy(), PortPolicy { any_address: true, ..policy() }] {
        let mut packet = packet_v4([10, 9, 0, 7], UDP);
        packet[16..20].copy_from_slice(&[127, 0, 0, 1]);
        for protocol in [TCP, UDP, ICMP, 132] {
            packet[9] = protocol;
            assert_eq!(
                verdict(&rules(&policy), &ethernet(MAC, IPV4, &packet), false),
                Verdict::Drop(SpoofReason::Loopback),
                "{protocol} {policy:?}"
            );
        }
    }
}

#[test]
fn without_an_ipv6_address_there_is_no_ipv6() {
    let policy = PortPolicy { v6: Vec::new(), ..policy() };
    let frame = ethernet(MAC, IPV6, &packet_v6(LINK_LOCAL, UDP, &[0; 8]));
    assert_eq!(verdict(&rules(&policy), &frame, false), Verdict::Drop(SpoofReason::Ipv6Source));
}

#[test]
fn internal_guard_accepts_packets_to_the_gateway_only() {
    let gateways = ["10.9.0.1/20", "fd09::1/64"].map(|net| net.parse().unwrap());
    let rules = bridge_rules(&BridgePolicy { gateways: gateways.to_vec(), internal: true });
    let evaluate = |ethertype: [u8; 2], packet: &[u8]| {
        verdict(&rules, &ethernet(MAC, ethertype, packet), false)
    };
    let denied = Verdict::Drop(SpoofReason::Ethertype);
    for (source, to, expected) in [
        ([10, 9, 15, 7], [10, 9, 0, 1], Verdict::Accept),
        ([10, 9, 16, 7], [10, 9, 0, 1], denied),
        ([203, 0, 113, 9], [10, 9, 0, 1], denied),
        ([10, 9, 0, 7], [203, 0, 113, 1], denied),
        ([10, 9, 0, 7], [10, 9, 15, 255], denied),
        ([10, 9, 0, 7], [255; 4], denied),
    ] {
        let mut packet = packet_v4(source, UDP);
        packet[16..20].copy_from_slice(&to);
        assert_eq!(evaluate(IPV4, &packet), expected, "{source:?} to {to:?}");
        packet[0] = 0x46;
        assert_eq!(evaluate(IPV4, &packet), denied, "{source:?} to {to:?}, with options");
    }
    for (source, to, next, kind, expected) in [
        ("fd09::7", "fd09::1", TCP, 0, Verdict::Accept),
        ("fd09::7", "2001:db8::1", TCP, 0, denied),
        ("2001:db8::9", "fd09::1", TCP, 0, denied),
        ("::", "fd09::1", ICMPV6, 128, denied),
        ("fe80::7", "fe80::1", TCP, 0, denied),
        ("fe80::7", "fe80::1", ICMPV6, 128, denied),
        ("fe80::7", "ff02::1", UDP, 0, denied),
        ("fd09::7", "ff02::1:ff00:1", ICMPV6, NEIGHBOR_SOLICITATION, Verdict::Accept),
        ("fd09::7", "fe80::1", ICMPV6, NEIGHBOR_ADVERTISEMENT, Verdict::Accept),
        ("fe80::7", "fd09::1", ICMPV6, NEIGHBOR_SOLICITATION, Verdict::Accept),
        ("fd09::7", "2001:db8:1::9", ICMPV6, NEIGHBOR_SOLICITATION, denied),
        ("fd09::7", "fd09::9", ICMPV6, NEIGHBOR_ADVERTISEMENT, denied),
        ("fd09::7", "ff0e::1", ICMPV6, NEIGHBOR_ADVERTISEMENT, denied),
    ] {
        let mut packet = packet_v6(source, next, &[kind; 24]);
        packet[24..40].copy_from_slice(&to.parse::<Ipv6Addr>().unwrap().octets());
        assert_eq!(evaluate(IPV6, &packet), expected, "{source} to {to}");
    }
    assert_eq!(evaluate(ARP, &[0; 28]), Verdict::Accept);
    assert_eq!(evaluate([0x88, 0xcc], &[0; 28]), denied);
    // Tunnels and other protocols, also in fragments.
    for protocol in 0..=255 {
        let mut packet = packet_v4([10, 9, 0, 7], protocol);
        packet[16..20].copy_from_slice(&[10, 9, 0, 1]);
        let accepted = [TCP, UDP, ICMP].contains(&protocol);
        assert_eq!(evaluate(IPV4, &packet) == Verdict::Accept, accepted, "{protocol}");
        let accepted = [TCP, UDP, ICMPV6].contains(&protocol);
        for (next, payload) in [(protocol, 0), (FRAGMENT, protocol)] {
            let mut packet = packet_v6("fd09::7", next, &[payload, 0, 0, 1, 0, 0, 0, 1]);
            packet[24..40].copy_from_slice(&"fd09::1".parse::<Ipv6Addr>().unwrap().octets());
            assert_eq!(evaluate(IPV6, &packet) == Verdict::Accept, accepted, "{next} {payload}");
        }
    }
}

#[test]
fn a_bridge_guard_drops_routing_headers() {
    for internal in [false, true] {
        let gateways = ["fd09::1/64".parse().unwrap()].to_vec();
        let rules = bridge_rules(&BridgePolicy { gateways, internal });
        for (next, inner, accepted) in [
            (43, UDP, false),
            (43, 41, false),
            (HOP_BY_HOP, 43, false),
            (60, 43, false),
            (51, 43, false),
            (FRAGMENT, 43, false),
            (HOP_BY_HOP, 60, false),
            (60, FRAGMENT, false),
            (FRAGMENT, 60, false),
            (HOP_BY_HOP, ICMPV6, !internal),
            (60, UDP, !internal),
            (FRAGMENT, UDP, true),
        ] {
            let mut packet = packet_v6("fd09::7", next, &[inner, 0, 0, 0, 0, 0, 0, 0]);
            packet[24..40].copy_from_slice(&"fd09::1".parse::<Ipv6Addr>().unwrap().octets());
            let verdict = verdict(&rules, &ethernet(MAC, IPV6, &packet), false);
            assert_eq!(verdict == Verdict::Accept, accepted, "{internal} {next} {inner}");
        }
    }
}

#[test]
fn a_bridge_guard_accepts_sources_of_its_subnets_only() {
    let gateways = ["10.9.0.1/24".parse().unwrap(), "fd09::1/64".parse().unwrap()].to_vec();
    let rules = bridge_rules(&BridgePolicy { gateways, internal: false });
    let accepts = |ethertype: [u8; 2], packet: &[u8]| {
        verdict(&rules, &ethernet(MAC, ethertype, packet), false) == Verdict::Accept
    };
    for (source, accepted) in [
        ([10, 9, 0, 7], true),
        ([10, 9, 0, 255], true),
        ([0, 0, 0, 0], true),
        ([10, 9, 1, 7], false),
        ([198, 51, 100, 2], false),
        ([127, 0, 0, 1], false),
    ] {
        assert_eq!(accepts(IPV4, &packet_v4(source, 17)), accepted, "{source:?}");
    }
    for (source, accepted) in [
        ("fd09::7", true),
        ("fe80::7", true),
        ("::", true),
        ("fd09:0:0:1::7", false),
        ("::1", false),
        ("2001:db8::2", false),
    ] {
        assert_eq!(accepts(IPV6, &packet_v6(source, 17, &[0; 8])), accepted, "{source}");
    }
    assert!(accepts(ARP, &[0; 28]), "ARP");
    assert!(!accepts([0x88, 0x47], &[0; 40]), "MPLS");
}

#[test]
fn any_address_restricts_the_endpoint_to_its_mac_address() {
    use SpoofReason::{Ethertype, IcmpError, Mac, Router, Vlan};
    let rules = rules(&PortPolicy { any_address: true, ..policy() });
    let evaluate = |to, source, ethertype, packet: &[u8]| {
        verdict(&rules, &ethernet_to(to, source, ethertype, packet), false)
    };
    let foreign = packet_v4([198, 51, 100, 1], UDP);
    let foreign_v6 = packet_v6("2001:db8::9", UDP, &[0; 8]);
    let fragment = packet_v6("2001:db8::9", 44, &[UDP, 0, 0, 1, 0, 0, 0, 1]);
    let server = [198, 51, 100, 1];
    let error = message_v4(3, server);
    let error_v6 = packet_v6(OWN, ICMPV6, &error_v6(2, "fd09::8", "2001:db8::1"));
    let group = [0x33, 0x33, 0, 0, 0, 1];
    for (to, source, ethertype, packet, expected) in [
        (BRIDGE, MAC, IPV4, &foreign[..], Verdict::Accept),
        (BRIDGE, OTHER, IPV4, &foreign, Verdict::Drop(Mac)),
        (BRIDGE, MAC, IPV6, &foreign_v6, Verdict::Accept),
        (BRIDGE, MAC, IPV6, &fragment, Verdict::Accept),
        (BRIDGE, MAC, ARP, &[0; 28], Verdict::Accept),
        (BRIDGE, MAC, [0x88, 0x64], &[0; 28], Verdict::Drop(Ethertype)),
        // It forwards for its neighbours and sends errors to them.
        (OTHER, MAC, IPV4, &error, Verdict::Accept),
        (OTHER, MAC, IPV6, &error_v6, Verdict::Accept),
        (BRIDGE, MAC, IPV4, &error, Verdict::Drop(IcmpError)),
        (BRIDGE, MAC, IPV6, &error_v6, Verdict::Drop(IcmpError)),
        ([0xff; 6], MAC, IPV4, &error, Verdict::Drop(IcmpError)),
        (group, MAC, IPV6, &error_v6, Verdict::Drop(IcmpError)),
        (BRIDGE, MAC, IPV4, &message_v4(3, [10, 9, 0, 7]), Verdict::Accept),
        (BRIDGE, MAC, IPV4, &message_v4(8, server), Verdict::Accept),
        (OTHER, MAC, IPV4, &message_v4(5, server), Verdict::Drop(Router)),
    ] {
        assert_eq!(evaluate(to, source, ethertype, packet), expected, "{to:02x?} {packet:02x?}");
    }
    let tagged = verdict(&rules, &ethernet(MAC, IPV4, &foreign), true);
    assert_eq!(tagged, Verdict::Drop(Vlan));
}
