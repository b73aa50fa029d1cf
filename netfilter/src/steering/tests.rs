//! Frames through the programs, run by the kernel.

use super::*;
use std::net::{Ipv4Addr, Ipv6Addr};
use tidegate_testbed::frames::{Mac, arp, ethernet, icmp6, ipv4, ipv6, udp4, udp6};

const SANDBOX: Mac = [2, 0, 10, 9, 0, 2];
const OTHER_SANDBOX: Mac = [2, 0, 10, 9, 0, 3];
const ENDPOINT: Mac = [2, 0, 10, 9, 0, 7];
const GATEWAY: Mac = [2, 0, 10, 9, 0, 1];
const CLIENT4: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 7);
const ENDPOINT4: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 7);
const CLIENT6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 7);
const ENDPOINT6: Ipv6Addr = Ipv6Addr::new(0xfd09, 0, 0, 0, 0, 0, 0, 7);
const PORT: u16 = 40_000;
const SERVICE: u16 = 80;
const TCP: u8 = 6;
const UDP: u8 = 17;

/// Ports, and enough for the header of TCP.
fn transport(source: u16, destination: u16) -> Vec<u8> {
    let mut header = [source.to_be_bytes(), destination.to_be_bytes()].concat();
    header.resize(40, 0);
    header
}

fn request(mac: Mac, v6: bool, protocol: u8, port: u16) -> Vec<u8> {
    let payload = transport(port, SERVICE);
    match v6 {
        false => ethernet(ENDPOINT, mac, 0x0800, &ipv4(CLIENT4, ENDPOINT4, protocol, &payload)),
        true => ethernet(ENDPOINT, mac, 0x86dd, &ipv6(CLIENT6, ENDPOINT6, protocol, &payload)),
    }
}

fn to_gateway(v6: bool, protocol: u8, payload: &[u8]) -> Vec<u8> {
    match v6 {
        false => ethernet(GATEWAY, ENDPOINT, 0x0800, &ipv4(ENDPOINT4, CLIENT4, protocol, payload)),
        true => ethernet(GATEWAY, ENDPOINT, 0x86dd, &ipv6(ENDPOINT6, CLIENT6, protocol, payload)),
    }
}

fn reply(v6: bool, protocol: u8, port: u16) -> Vec<u8> {
    to_gateway(v6, protocol, &transport(SERVICE, port))
}

struct Programs {
    sandboxes: Sandboxes,
    steering: ReplySteering,
}

impl Programs {
    fn new() -> Self {
        let sandboxes = Sandboxes::new().unwrap();
        sandboxes.insert(MacAddress(SANDBOX)).unwrap();
        sandboxes.insert(MacAddress(OTHER_SANDBOX)).unwrap();
        let steering = ReplySteering::new(&sandboxes).unwrap();
        Self { sandboxes, steering }
    }

    /// Programs with TCP and UDP flows of both families.
    fn with_flows() -> Self {
        let programs = Self::new();
        for protocol in [TCP, UDP] {
            for v6 in [false, true] {
                programs.remember(&request(SANDBOX, v6, protocol, PORT));
            }
        }
        programs
    }

    fn remember(&self, frame: &[u8]) {
        let [remember, _] = &self.steering.hooks;
        assert_eq!(remember.program.output(frame), frame, "a frame to the endpoint is unchanged");
    }

    /// Returns the new destination of `frame`, if it is steered.
    #[track_caller]
    fn steer(&self, frame: &[u8]) -> Option<Mac> {
        let [_, steer] = &self.steering.hooks;
        let before = self.steering.steered().unwrap();
        let output = steer.program.output(frame);
        assert_eq!(output[6..], frame[6..], "the rest of the frame");
        let is_steered = self.steering.steered().unwrap() > before;
        assert_eq!(is_steered, output[..6] != frame[..6], "the counter");
        is_steered.then(|| output[..6].try_into().unwrap())
    }
}

#[test]
fn replies_of_flows_are_steered() {
    let programs = Programs::with_flows();
    for v6 in [false, true] {
        for protocol in [TCP, UDP] {
            assert_eq!(programs.steer(&reply(v6, protocol, PORT)), Some(SANDBOX));
            assert_eq!(programs.steer(&reply(v6, protocol, PORT + 1)), None, "another port");
            let service = to_gateway(v6, protocol, &transport(SERVICE + 1, PORT));
            assert_eq!(programs.steer(&service), None, "another port of the endpoint");
            assert_eq!(programs.steer(&request(ENDPOINT, v6, protocol, PORT)), None, "a request");
        }
        assert_eq!(programs.steer(&reply(v6, 132, PORT)), None, "SCTP");
    }
    let stranger = ipv4(ENDPOINT4, Ipv4Addr::new(198, 51, 100, 8), TCP, &transport(SERVICE, PORT));
    assert_eq!(programs.steer(&ethernet(GATEWAY, ENDPOINT, 0x0800, &stranger)), None);
}

#[test]
fn client_that_moves_to_another_host_takes_its_flow_along() {
    let programs = Programs::with_flows();
    for v6 in [false, true] {
        programs.remember(&request(OTHER_SANDBOX, v6, TCP, PORT));
        assert_eq!(programs.steer(&reply(v6, TCP, PORT)), Some(OTHER_SANDBOX));
        assert_eq!(programs.steer(&reply(v6, UDP, PORT)), Some(SANDBOX));
    }
}

#[test]
fn frames_of_members_and_of_sandboxes_that_left_have_no_effect() {
    let programs = Programs::new();
    let member = [2, 0, 10, 9, 0, 8];
    for v6 in [false, true] {
        programs.remember(&request(member, v6, TCP, PORT));
        assert_eq!(programs.steer(&reply(v6, TCP, PORT)), None);
        programs.remember(&request(SANDBOX, v6, TCP, PORT));
        // Does not replace the flow either.
        programs.remember(&request(member, v6, TCP, PORT));
        assert_eq!(programs.steer(&reply(v6, TCP, PORT)), Some(SANDBOX));
    }
    programs.sandboxes.remove(MacAddress(SANDBOX)).unwrap();
    for v6 in [false, true] {
        assert_eq!(programs.steer(&reply(v6, TCP, PORT)), None);
    }
}

#[test]
fn other_frames_are_unchanged() {
    let programs = Programs::with_flows();
    let mut tagged = reply(false, TCP, PORT);
    tagged.splice(12..12, [0x81, 0, 0, 5]);
    let mut priority = reply(true, TCP, PORT);
    priority.splice(12..12, [0x81, 0, 0, 0]);
    let mut group = reply(false, UDP, PORT);
    group[..6].copy_from_slice(&[0xff; 6]);
    let mut multicast = reply(true, UDP, PORT);
    multicast[..6].copy_from_slice(&[0x33, 0x33, 0, 0, 0, 1]);
    let echo = to_gateway(false, 1, &[8; 64]);
    let mut frames = vec![tagged, priority, group, multicast, echo];
    frames.push(arp(1, ENDPOINT, ENDPOINT4, CLIENT4));
    frames.push([reply(false, TCP, PORT), vec![0; 40]].concat());
    let last = frames.len() - 1;
    // A header length of 60 bytes: the ports are elsewhere.
    frames[last][14] = 0x4f;
    for frame in &frames {
        assert_eq!(programs.steer(frame), None, "{frame:02x?}");
    }
    // Neighbour discovery and other messages, quoting a packet as errors do.
    let quoted = &request(SANDBOX, true, UDP, PORT)[14..];
    for kind in (0..=255_u8).filter(|kind| !(1..=4).contains(kind)) {
        let message = [&[kind, 0, 0, 0, 0, 0, 0, 0][..], quoted].concat();
        let frame = ethernet(GATEWAY, ENDPOINT, 0x86dd, &icmp6(ENDPOINT6, CLIENT6, &message));
        assert_eq!(programs.steer(&frame), None, "ICMPv6 type {kind}");
    }
    let quoted = &request(SANDBOX, false, UDP, PORT)[14..];
    for kind in (0..=255_u8).filter(|kind| ![3, 11, 12].contains(kind)) {
        let message = [&[kind, 0, 0, 0, 0, 0, 0, 0][..], quoted].concat();
        assert_eq!(programs.steer(&to_gateway(false, 1, &message)), None, "ICMP type {kind}");
    }
}

#[test]
fn truncated_frames_are_unchanged() {
    let programs = Programs::with_flows();
    for v6 in [false, true] {
        let frame = reply(v6, UDP, PORT);
        let header = 14 + if v6 { 40 } else { 20 };
        for length in header..frame.len() {
            let steered = programs.steer(&frame[..length]);
            assert_eq!(steered.is_some(), length >= header + 4, "{length} bytes");
        }
    }
}

#[test]
fn ports_are_found_behind_options_and_extension_headers() {
    let programs = Programs::with_flows();
    let mut options = reply(false, TCP, PORT);
    options[14] = 0x47;
    options.splice(34..34, [1; 8]);
    assert_eq!(programs.steer(&options), Some(SANDBOX));
    let with = |first: u8, between: &[u8]| {
        to_gateway(true, first, &[between, &transport(SERVICE, PORT)].concat())
    };
    let cases: [(u8, Vec<u8>, bool); 8] = [
        (0, vec![TCP, 0, 1, 4, 0, 0, 0, 0], true),
        (43, [&[TCP, 2][..], &[0; 22]].concat(), true),
        (60, [[0, 0, 1, 4, 0, 0, 0, 0], [TCP, 0, 1, 4, 0, 0, 0, 0]].concat(), true),
        (51, [&[TCP, 4][..], &[0; 22]].concat(), true),
        // An atomic fragment (RFC 6946).
        (44, vec![TCP, 0, 0, 0, 0, 0, 0, 9], true),
        (60, [[60, 0, 1, 4, 0, 0, 0, 0].repeat(6), vec![TCP, 0, 1, 4, 0, 0, 0, 0]].concat(), true),
        (60, [[60, 0, 1, 4, 0, 0, 0, 0].repeat(7), vec![TCP, 0, 1, 4, 0, 0, 0, 0]].concat(), false),
        (59, Vec::new(), false),
    ];
    for (first, between, is_steered) in cases {
        let steered = programs.steer(&with(first, &between));
        assert_eq!(steered, is_steered.then_some(SANDBOX), "{first} {between:02x?}");
    }
    // Likewise in requests.
    let programs = Programs::new();
    let payload = [&[UDP, 0, 1, 4, 0, 0, 0, 0][..], &transport(PORT, SERVICE)].concat();
    let request = ipv6(CLIENT6, ENDPOINT6, 60, &payload);
    programs.remember(&ethernet(ENDPOINT, SANDBOX, 0x86dd, &request));
    assert_eq!(programs.steer(&reply(true, UDP, PORT)), Some(SANDBOX));
}

/// A fragment of IPv4 with `fields`, or of IPv6, with the identification `id`.
fn fragment(v6: bool, id: u16, fields: [u8; 2], payload: &[u8]) -> Vec<u8> {
    if v6 {
        let [high, low] = id.to_be_bytes();
        let head = [UDP, 0, fields[0], fields[1], 1, 2, high, low];
        return to_gateway(true, 44, &[&head[..], payload].concat());
    }
    let mut frame = to_gateway(false, UDP, payload);
    frame[18..20].copy_from_slice(&id.to_be_bytes());
    frame[20..22].copy_from_slice(&fields);
    frame
}

#[test]
fn fragments_follow_the_first_one_of_their_datagram() {
    for v6 in [false, true] {
        let programs = Programs::with_flows();
        let (first, middle, last) =
            if v6 { ([0, 1], [0, 41], [0, 80]) } else { ([0x20, 0], [0x20, 5], [0, 10]) };
        let payload = transport(SERVICE, PORT);
        let own = transport(SERVICE, PORT + 1);
        let steer = |id, fields, payload| programs.steer(&fragment(v6, id, fields, payload));
        assert_eq!(steer(1, last, &payload), None, "before the first fragment");
        for id in 1..100 {
            assert_eq!(steer(id, first, &payload), Some(SANDBOX));
            assert_eq!(steer(id, middle, &[0; 40]), Some(SANDBOX));
            assert_eq!(steer(id, last, &[0; 40]), Some(SANDBOX));
            // A datagram of a connection of the endpoint to the same address.
            assert_eq!(steer(id + 1_000, first, &own), None);
            assert_eq!(steer(id + 1_000, last, &[0; 40]), None);
            // With the same identification, which another socket can choose.
            assert_eq!(steer(id, first, &own), None);
            assert_eq!(steer(id, last, &[0; 40]), None);
            assert_eq!(steer(id, first, &payload), Some(SANDBOX));
        }
        programs.sandboxes.remove(MacAddress(SANDBOX)).unwrap();
        assert_eq!(steer(1, last, &[0; 40]), None);
    }
}

#[test]
fn first_fragments_of_requests_add_flows() {
    for v6 in [false, true] {
        let programs = Programs::new();
        let (frame, later) = match v6 {
            false => {
                let mut frame = request(SANDBOX, false, UDP, PORT);
                frame[20] = 0x20;
                let mut later = request(SANDBOX, false, UDP, PORT + 1);
                later[21] = 5;
                (frame, later)
            }
            true => {
                let packet = |field, port| {
                    let head = [UDP, 0, 0, field, 1, 2, 3, 4];
                    let payload = [&head[..], &transport(port, SERVICE)].concat();
                    let packet = ipv6(CLIENT6, ENDPOINT6, 44, &payload);
                    ethernet(ENDPOINT, SANDBOX, 0x86dd, &packet)
                };
                (packet(1, PORT), packet(41, PORT + 1))
            }
        };
        programs.remember(&frame);
        programs.remember(&later);
        assert_eq!(programs.steer(&reply(v6, UDP, PORT)), Some(SANDBOX));
        assert_eq!(programs.steer(&reply(v6, UDP, PORT + 1)), None, "not ports");
    }
}

#[test]
fn errors_that_quote_a_flow_are_steered() {
    let programs = Programs::with_flows();
    let errors: [(bool, &[u8]); 2] = [(false, &[3, 11, 12]), (true, &[1, 2, 3, 4])];
    for (v6, kinds) in errors {
        let protocol = if v6 { 58 } else { 1 };
        let message = |kind: u8, quoted: &[u8]| {
            to_gateway(v6, protocol, &[&[kind, 3, 0, 0, 0, 0, 0, 0], quoted].concat())
        };
        for kind in kinds {
            for protocol in [TCP, UDP] {
                let quoted = request(SANDBOX, v6, protocol, PORT);
                assert_eq!(programs.steer(&message(*kind, &quoted[14..])), Some(SANDBOX));
                let header = if v6 { 40 } else { 20 };
                assert_eq!(
                    programs.steer(&message(*kind, &quoted[14..14 + header + 8])),
                    Some(SANDBOX),
                    "the shortest quotation (RFC 792)"
                );
                let own = reply(v6, protocol, PORT);
                assert_eq!(programs.steer(&message(*kind, &own[14..])), None, "a reply");
                let other = request(SANDBOX, v6, protocol, PORT + 1);
                assert_eq!(programs.steer(&message(*kind, &other[14..])), None, "another flow");
            }
        }
    }
    let mut quoted = request(SANDBOX, false, UDP, PORT)[14..].to_vec();
    quoted[0] = 0x46;
    quoted.splice(20..20, [1; 4]);
    let error = to_gateway(false, 1, &[&[3, 3, 0, 0, 0, 0, 0, 0], &quoted[..]].concat());
    assert_eq!(programs.steer(&error), Some(SANDBOX), "options");
    quoted[7] = 1;
    let error = to_gateway(false, 1, &[&[3, 3, 0, 0, 0, 0, 0, 0], &quoted[..]].concat());
    assert_eq!(programs.steer(&error), None, "a fragment without ports");
    let inner = [&[UDP, 0, 1, 4, 0, 0, 0, 0][..], &transport(PORT, SERVICE)].concat();
    let quoted = ipv6(CLIENT6, ENDPOINT6, 60, &inner);
    let error = to_gateway(true, 58, &[&[1, 4, 0, 0, 0, 0, 0, 0], &quoted[..]].concat());
    assert_eq!(programs.steer(&error), Some(SANDBOX), "extension headers");
}

#[test]
fn new_flows_evict_old_ones() {
    let programs = Programs::new();
    let request = |number: u32| {
        let client = (Ipv4Addr::from(0xc633_0000 | number), PORT);
        ethernet(ENDPOINT, SANDBOX, 0x0800, &udp4(client, (ENDPOINT4, SERVICE), &[0; 8]))
    };
    let reply = |number: u32| {
        let client = (Ipv4Addr::from(0xc633_0000 | number), PORT);
        ethernet(GATEWAY, ENDPOINT, 0x0800, &udp4((ENDPOINT4, SERVICE), client, &[0; 8]))
    };
    for number in 0..4 * FLOWS {
        programs.remember(&request(number));
        assert_eq!(programs.steer(&reply(number)), Some(SANDBOX), "flow {number}");
    }
    let kept = (0..4 * FLOWS).filter(|number| programs.steer(&reply(*number)).is_some()).count();
    assert!((FLOWS as usize / 2..=FLOWS as usize).contains(&kept), "{kept} flows");
    let evicted = (0..4 * FLOWS).find(|number| programs.steer(&reply(*number)).is_none()).unwrap();
    programs.remember(&request(evicted));
    assert_eq!(programs.steer(&reply(evicted)), Some(SANDBOX));
    // Of IPv6, too, and its own flows stay.
    let v6 = udp6((CLIENT6, PORT), (ENDPOINT6, SERVICE), &[]);
    programs.remember(&ethernet(ENDPOINT, SANDBOX, 0x86dd, &v6));
    assert_eq!(programs.steer(&self::reply(true, UDP, PORT)), Some(SANDBOX));
}
