use super::*;
use crate::wire::checksum::pseudo_header;
use crate::wire::protocol;
use tidegate_model::MacAddress;

const GUEST: MacAddress = MacAddress([2, 0, 0, 0, 0, 7]);

fn layer2() -> Layer2 {
    let options = Layer2Options {
        network: "10.0.2.0/24".parse().unwrap(),
        gateway: "10.0.2.2".parse().unwrap(),
        name_server: Some("10.0.2.3".parse().unwrap()),
        v6: Some(Layer2V6 {
            prefix: "fd00::".parse().unwrap(),
            gateway: "fd00::2".parse().unwrap(),
            name_server: Some("fd00::3".parse().unwrap()),
        }),
        mac: None,
    };
    Layer2::new(options, GUEST, 1500)
}

/// A frame from the guest.
fn framed(to: MacAddress, kind: u16, payload: &[u8]) -> Vec<u8> {
    let mut bytes = frame(to, GUEST, kind);
    bytes.extend(payload);
    bytes
}

/// Returns the packet for the engine, and the reply without the virtio header.
fn receive(layer2: &mut Layer2, mut frame: Vec<u8>) -> (Option<Vec<u8>>, Option<Vec<u8>>) {
    let mut answered = None;
    let packet =
        layer2.receive(&mut frame, |answer| answered = Some(answer[virtio::LENGTH..].to_vec()));
    (packet.map(<[u8]>::to_vec), answered)
}

fn arp(operation: u8, sender: [u8; 4], target: [u8; 4]) -> Vec<u8> {
    let mut message =
        [&ARP_HEAD[..], &[0, operation], &GUEST.0, &sender, &[0; 6], &target].concat();
    // Ethernet pads frames to 60 bytes.
    message.resize(46, 0);
    framed(MacAddress::BROADCAST, kind::ARP, &message)
}

fn ipv4(source: [u8; 4], destination: [u8; 4]) -> Vec<u8> {
    let mut packet = vec![0x45, 0, 0, 20, 0, 0, 0, 0, 64, 17, 0, 0];
    packet.extend(source);
    packet.extend(destination);
    packet
}

#[test]
fn arp_is_answered_for_router_and_name_server_only() {
    let mut layer2 = layer2();
    for last in [2, 3] {
        let (packet, answer) = receive(&mut layer2, arp(1, [10, 0, 2, 100], [10, 0, 2, last]));
        let answer = answer.unwrap();
        assert_eq!((packet, answer.len()), (None, 42));
        let station = [0x52, 0x55, 10, 0, 2, last];
        assert_eq!((&answer[..6], &answer[6..12]), (&GUEST.0[..], &station[..]));
        assert_eq!(&answer[20..22], [0, 2]);
        assert_eq!((&answer[22..28], &answer[28..32]), (&station[..], &[10, 0, 2, last][..]));
        assert_eq!((&answer[32..38], &answer[38..42]), (&GUEST.0[..], &[10, 0, 2, 100][..]));
    }
    // A probe for the address of the guest itself must not be answered.
    assert_eq!(receive(&mut layer2, arp(1, [0; 4], [10, 0, 2, 100])), (None, None));
    assert_eq!(receive(&mut layer2, arp(2, [10, 0, 2, 2], [10, 0, 2, 2])), (None, None));
}

#[test]
fn packets_are_unwrapped_and_replies_reach_their_station() {
    let mut layer2 = layer2();
    let packet = ipv4([10, 0, 2, 100], [192, 0, 2, 1]);
    let router = ethernet::station_of_v4("10.0.2.2".parse().unwrap());
    let mut sent = framed(router, kind::IPV4, &packet);
    sent[0] = 1;
    let (passed, answer) = receive(&mut layer2, sent);
    assert_eq!(answer, None);
    let passed = passed.unwrap();
    assert_eq!((passed[0], &passed[virtio::LENGTH..]), (1, &packet[..]));
    let back = layer2.header(&ipv4([192, 0, 2, 1], [10, 0, 2, 100]));
    assert_eq!(back, ethernet::header(GUEST, router, kind::IPV4));
    // Another station, behind a bridge in the namespace.
    let other = MacAddress([2, 0, 0, 0, 0, 8]);
    let mut sent = framed(router, kind::IPV4, &ipv4([10, 0, 2, 101], [192, 0, 2, 1]));
    sent[virtio::LENGTH + 6..virtio::LENGTH + 12].copy_from_slice(&other.0);
    receive(&mut layer2, sent);
    for (last, station) in [(100, GUEST), (101, other)] {
        let back = layer2.header(&ipv4([192, 0, 2, 1], [10, 0, 2, last]));
        assert_eq!(back[..6], station.0);
    }
    // Addresses of the engine cannot be claimed, and broadcast packets are not passed on.
    receive(&mut layer2, framed(router, kind::IPV4, &ipv4([10, 0, 2, 2], [192, 0, 2, 1])));
    assert!(!layer2.neighbours.iter().any(|(ip, _)| layer2.is_own(*ip)));
    let all = framed(MacAddress::BROADCAST, kind::IPV4, &ipv4([10, 0, 2, 100], [10, 0, 2, 255]));
    assert_eq!(receive(&mut layer2, all), (None, None));
}

#[test]
fn the_number_of_recorded_stations_is_limited() {
    let mut layer2 = layer2();
    for n in 0..100_000_u32 {
        let [a, b, c, d] = n.to_be_bytes();
        layer2.learn(Ipv4Addr::new(10, b, c, d).into(), MacAddress([2, 0, a, b, c, d]));
    }
    assert_eq!(layer2.neighbours.len(), MOST_NEIGHBOURS);
    assert_eq!(
        layer2.station(Ipv4Addr::from_bits(0x0a00_0000 | 99_999).into()).0[3..],
        [1, 0x86, 0x9f]
    );
}

fn icmpv6(source: &str, destination: &str, mut message: Vec<u8>) -> Vec<u8> {
    let (source, destination): (Ipv6Addr, Ipv6Addr) =
        (source.parse().unwrap(), destination.parse().unwrap());
    let sum = pseudo_header(source.into(), destination.into(), protocol::ICMPV6, message.len());
    let sum = sum.bytes(&message).finish();
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    let mut packet = vec![0x60, 0, 0, 0, 0, message.len() as u8, protocol::ICMPV6, 255];
    packet.extend(source.octets());
    packet.extend(destination.octets());
    packet.extend(message);
    framed(ethernet::group_address(destination), kind::IPV6, &packet)
}

#[test]
fn neighbour_and_router_solicitations_are_answered() {
    let mut layer2 = layer2();
    let solicit = |target: &str| {
        let target: Ipv6Addr = target.parse().unwrap();
        [&[135, 0, 0, 0, 0, 0, 0, 0][..], &target.octets(), &[1, 1], &GUEST.0].concat()
    };
    for target in ["fd00::2", "fd00::3", "fe80::2"] {
        let (packet, answer) =
            receive(&mut layer2, icmpv6("fd00::100", "ff02::1:ff00:2", solicit(target)));
        let answer = answer.unwrap();
        assert_eq!((packet, &answer[..6]), (None, &GUEST.0[..]));
        let advertised = &answer[ethernet::LENGTH + 40..];
        assert_eq!((advertised[0], advertised[4]), (136, 0xe0));
        assert_eq!(advertised[8..24], target.parse::<Ipv6Addr>().unwrap().octets());
        assert_eq!(advertised[24..26], [2, 1]);
        let ends =
            [8, 24].map(|at| v6::address_at(&answer[ethernet::LENGTH..], at).unwrap().into());
        let sum = pseudo_header(ends[0], ends[1], protocol::ICMPV6, advertised.len());
        assert_eq!(sum.bytes(advertised).finish(), 0);
    }
    assert_eq!(
        receive(&mut layer2, icmpv6("::", "ff02::1:ff00:100", solicit("fd00::100"))),
        (None, None)
    );
    let mut wrong = icmpv6("fd00::100", "ff02::1:ff00:2", solicit("fd00::2"));
    *wrong.last_mut().unwrap() ^= 1;
    assert_eq!(receive(&mut layer2, wrong), (None, None), "wrong checksum");

    let (_, answer) =
        receive(&mut layer2, icmpv6("fe80::7", "ff02::2", vec![133, 0, 0, 0, 0, 0, 0, 0]));
    let answer = answer.unwrap();
    let advertised = &answer[ethernet::LENGTH + 40..];
    assert_eq!((advertised[0], &advertised[6..8]), (134, &9000_u16.to_be_bytes()[..]));
    assert!(
        advertised.windows(18).any(|window| window[..2] == [0, 0] && window[2..4] == [0xfd, 0])
    );
    assert_eq!(layer2.advertisement().unwrap()[virtio::LENGTH..][..6], [0x33, 0x33, 0, 0, 0, 1]);
}

fn dhcp(kind: u8, station: MacAddress, options: &[u8]) -> Vec<u8> {
    let mut message = vec![1, 1, 6, 0, 1, 2, 3, 4];
    message.resize(28, 0);
    message.extend(station.0);
    message.resize(236, 0);
    message.extend([99, 130, 83, 99, 53, 1, kind]);
    message.extend(options);
    message.push(255);
    let length = (8 + message.len()) as u16;
    let mut packet = ipv4([0; 4], [255; 4]);
    packet[2..4].copy_from_slice(&(20 + length).to_be_bytes());
    packet.extend([0, 68, 0, 67]);
    packet.extend(length.to_be_bytes());
    packet.extend([0, 0]);
    packet.extend(message);
    framed(MacAddress::BROADCAST, kind::IPV4, &packet)
}

/// Type, address and options of a reply.
fn parse_reply(answer: &[u8]) -> (u8, Ipv4Addr, Vec<(u8, Vec<u8>)>) {
    let message = &answer[ethernet::LENGTH + 28..];
    assert_eq!((message[0], &message[4..8]), (2, &[1, 2, 3, 4][..]));
    let (mut options, mut found) = (&message[240..], Vec::new());
    while let [code, length, rest @ ..] = options
        && *code != 255
    {
        let (value, rest) = rest.split_at(usize::from(*length));
        found.push((*code, value.to_vec()));
        options = rest;
    }
    (found[0].1[0], ipv4_at(message, 16).unwrap(), found)
}

#[test]
fn addresses_are_leased() {
    let mut layer2 = layer2();
    let (packet, answer) = receive(&mut layer2, dhcp(1, GUEST, &[]));
    assert_eq!(packet, None);
    let (kind, address, options) = parse_reply(&answer.unwrap());
    assert_eq!((kind, address.to_string()), (2, "10.0.2.15".to_owned()));
    for (code, value) in [
        (1, &[255, 255, 255, 0][..]),
        (3, &[10, 0, 2, 2]),
        (6, &[10, 0, 2, 3]),
        (26, &[5, 220]),
        (51, &[0, 1, 81, 128]),
        (54, &[10, 0, 2, 2]),
    ] {
        assert!(options.contains(&(code, value.to_vec())), "option {code}: {options:?}");
    }
    let (_, answer) =
        receive(&mut layer2, dhcp(3, GUEST, &[50, 4, 10, 0, 2, 15, 54, 4, 10, 0, 2, 2]));
    assert_eq!(parse_reply(&answer.unwrap()).0, 5);
    // A request for an address of another network gets a broadcast NAK.
    let (_, answer) = receive(&mut layer2, dhcp(3, GUEST, &[50, 4, 192, 168, 0, 9]));
    let answer = answer.unwrap();
    assert_eq!((parse_reply(&answer).0, &answer[..6]), (6, &[0xff; 6][..]));
    // A request to another server is ignored.
    assert_eq!(receive(&mut layer2, dhcp(3, GUEST, &[54, 4, 10, 0, 2, 9])), (None, None));
    // Another station requests a specific address; more stations than addresses request any.
    let (_, answer) =
        receive(&mut layer2, dhcp(1, MacAddress([2, 0, 0, 0, 1, 1]), &[50, 4, 10, 0, 2, 20]));
    assert_eq!(parse_reply(&answer.unwrap()).1.to_string(), "10.0.2.20");
    for n in 0..40 {
        let (_, answer) = receive(&mut layer2, dhcp(1, MacAddress([2, 0, 0, 0, 2, n]), &[]));
        let (kind, address, _) = parse_reply(&answer.unwrap());
        assert!(kind == 2 && (15..31).contains(&address.octets()[3]), "{address}");
    }
}

#[test]
fn malformed_frames_do_not_panic() {
    let mut layer2 = layer2();
    let samples = [
        arp(1, [10, 0, 2, 100], [10, 0, 2, 2]),
        dhcp(1, GUEST, &[50, 4, 10, 0, 2, 20, 54, 4, 10, 0, 2, 2]),
        icmpv6("fe80::7", "ff02::2", vec![133, 0, 0, 0, 0, 0, 0, 0]),
        icmpv6("fd00::100", "ff02::1:ff00:2", vec![135; 32]),
        framed(GUEST, kind::IPV4, &ipv4([10, 0, 2, 100], [192, 0, 2, 1])),
    ];
    let mut noise = 1_u64;
    for sample in &samples {
        for length in 0..sample.len() {
            receive(&mut layer2, sample[..length].to_vec());
        }
        for _ in 0..20_000 {
            let mut strange = sample.clone();
            for _ in 0..3 {
                noise = noise
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1_442_695_040_888_963_407);
                let at = (noise >> 33) as usize % strange.len();
                strange[at] = (noise >> 24) as u8;
            }
            receive(&mut layer2, strange);
        }
    }
    let _ = layer2.header(&[]);
    let _ = layer2.header(&[0x60]);
}
