//! The instructions of the programs.

use crate::bpf::assembly::{Assembly, EXIT, GO, Start, add, call, copy, map, set};
use crate::bpf::extension_headers::{HeaderWalk, WalkLabel};
use crate::bpf::{Instruction, field, verdict};

/// Length of a key of `stations`, and of a value of the other maps: MAC address, padded.
pub(super) const STATION: usize = 8;

/// Length of a key of a flow: address of the client, of the endpoint (IPv4 addresses mapped to
/// IPv6), their ports, protocol. A datagram has the fragment identification in place of the ports,
/// and [`DATAGRAM`] in the protocol. All in network byte order, the protocol in that of the host.
pub(super) const KEY: usize = 40;

/// Marks the key of a datagram.
const DATAGRAM: i32 = 0x100;

/// What a program does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// Adds the flows of sandboxes. Clients are the sources.
    Remember,
    /// Rewrites the destination MAC address of replies. Clients are the destinations.
    Steer,
}

/// Descriptors of the maps.
pub(super) struct Maps {
    pub(super) stations: i32,
    pub(super) flows: i32,
    pub(super) datagrams: i32,
    pub(super) steered: i32,
}

/// The program for `role`.
pub(super) fn program(role: Role, maps: &Maps) -> Vec<Instruction> {
    const RESULT: u8 = 0;
    const FIRST: u8 = 1;
    const SECOND: u8 = 2;
    const THIRD: u8 = 3;
    const FOURTH: u8 = 4;
    const FIFTH: u8 = 5;
    const CONTEXT: u8 = 6;
    /// Offset in the network header.
    const AT: u8 = 7;
    /// Protocol.
    const NEXT: u8 = 8;
    const STACK: u8 = 10;
    /// Places on the stack: the key; its last 8 bytes for the datagram that the frame begins, or
    /// zeros; the MAC address; the last fragment header; an IP header.
    const CLIENT: i16 = -(KEY as i16);
    const ENDPOINT: i16 = CLIENT + 16;
    const PORTS: i16 = ENDPOINT + 16;
    const PROTOCOL: i16 = PORTS + 4;
    const BEGUN: i16 = CLIENT - 8;
    const MAC: i16 = BEGUN - 8;
    const FRAGMENT: i16 = MAC - 8;
    const BYTES: i16 = FRAGMENT - 40;
    /// `bpf_map_lookup_elem`, `bpf_map_update_elem`, `bpf_map_delete_elem`, `bpf_skb_store_bytes`.
    const LOOKUP: i32 = 1;
    const UPDATE: i32 = 2;
    const DELETE: i32 = 3;
    const STORE: i32 = 9;
    /// `PACKET_BROADCAST`, `PACKET_MULTICAST`.
    const GROUPS: [i32; 2] = [1, 2];
    const MAC_LENGTH: i32 = 6;
    const IPV4: u16 = 0x0800;
    const IPV6: u16 = 0x86dd;
    const IPV4_LENGTH: i32 = 20;
    const IPV6_LENGTH: i32 = 40;
    /// Fragment fields of IPv4 and of IPv6: offset, more fragments.
    const OFFSET4: u16 = 0x1fff;
    const MORE4: u16 = 0x2000;
    const MORE6: u16 = 0x0001;
    /// The third word of an IPv4 address mapped to IPv6 (RFC 4291 section 2.5.5.2).
    const MAPPED: u32 = 0xffff;
    const ICMP: u8 = 1;
    const TCP: u8 = 6;
    const UDP: u8 = 17;
    const ICMPV6: u8 = 58;
    /// Destination unreachable, time exceeded, parameter problem (RFC 792). Source quench is
    /// obsolete (RFC 6633).
    const ICMP_ERRORS: [i32; 3] = [3, 11, 12];
    /// Destination unreachable, packet too big, time exceeded, parameter problem (RFC 4443): from 1
    /// to this one. Neighbour discovery has the types 133 to 137.
    const LAST_ICMPV6_ERROR: i32 = 4;
    /// Length of the ICMP header before the quoted packet.
    const ICMP_LENGTH: i32 = 8;
    #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
    enum Label {
        V4,
        V6,
        Walk(WalkLabel),
        Whole4,
        Ports6,
        Ports,
        Later4,
        Later6,
        Later,
        Icmp4,
        Icmp6,
        Quoted4,
        QuotedWalk(WalkLabel),
        QuotedPorts,
        Flow,
        Hit,
        Rewrite,
        Insert,
        Pass,
    }
    let of = Instruction::new;
    let read = |to, offset| of(0x61, to, CONTEXT, offset, 0);
    // BPF_JMP | BPF_JEQ | BPF_K, BPF_JNE, BPF_JGT, BPF_JSET
    let equal = |register, value| of(0x15, register, 0, 0, value);
    let unequal = |register, value| of(0x55, register, 0, 0, value);
    let above = |register, value| of(0x25, register, 0, 0, value);
    let any_bit = |register, bits: u16| of(0x45, register, 0, 0, bits.to_be().into());
    // BPF_LDX | BPF_MEM of a byte, a half word, a word and a double word of the stack
    let byte = |to, at| of(0x71, to, STACK, at, 0);
    let half = |to, at| of(0x69, to, STACK, at, 0);
    let word = |to, at| of(0x61, to, STACK, at, 0);
    let double = |to, at| of(0x79, to, STACK, at, 0);
    // BPF_STX | BPF_MEM
    let put_half = |from, at| of(0x6b, STACK, from, at, 0);
    let put_word = |from, at| of(0x63, STACK, from, at, 0);
    let put_double = |from, at| of(0x7b, STACK, from, at, 0);
    // BPF_ST | BPF_MEM
    let zero = |at| of(0x7a, STACK, 0, at, 0);
    let store_word = |at, value| of(0x62, STACK, 0, at, value);
    // BPF_ALU64 | BPF_AND | BPF_K, BPF_OR, BPF_LSH
    let and = |register, bits: i32| of(0x57, register, 0, 0, bits);
    let or = |register, bits: i32| of(0x47, register, 0, 0, bits);
    let shift = |register, bits: i32| of(0x67, register, 0, 0, bits);
    // BPF_ALU64 | BPF_ADD | BPF_X
    let plus = |register, other| of(0x0f, register, other, 0, 0);
    let load = |code: &mut Assembly<Label>, length, stack| {
        code.load_packet(CONTEXT, (Start::Network, AT), (length, stack), Label::Pass);
    };
    let look = |code: &mut Assembly<Label>, place: i16, descriptor| {
        code.extend(map(FIRST, descriptor));
        code.extend([copy(SECOND, STACK), add(SECOND, place.into()), call(LOOKUP)]);
    };
    // Stores the MAC address with the key.
    let update = |code: &mut Assembly<Label>, descriptor| {
        code.extend(map(FIRST, descriptor));
        code.extend([copy(SECOND, STACK), add(SECOND, CLIENT.into())]);
        code.extend([copy(THIRD, STACK), add(THIRD, MAC.into()), set(FOURTH, 0), call(UPDATE)]);
    };
    let is_steering = role == Role::Steer;
    let mut code = Assembly::new();
    code.extend([copy(CONTEXT, FIRST), read(FIRST, field::VLAN_PRESENT)]);
    code.jump(unequal(FIRST, 0), Label::Pass);
    if is_steering {
        code.push(read(FIRST, field::PACKET_TYPE));
        GROUPS.iter().for_each(|group| code.jump(equal(FIRST, *group), Label::Pass));
        code.push(zero(BEGUN));
    } else {
        code.extend([zero(MAC), set(AT, MAC_LENGTH)]);
        code.load_packet(CONTEXT, (Start::Ethernet, AT), (MAC_LENGTH, MAC), Label::Pass);
        look(&mut code, MAC, maps.stations);
        code.jump(equal(RESULT, 0), Label::Pass);
    }
    code.push(read(FIRST, field::PROTOCOL));
    code.jump(equal(FIRST, IPV4.to_be().into()), Label::V4);
    code.jump(equal(FIRST, IPV6.to_be().into()), Label::V6);
    code.jump(GO, Label::Pass);

    let later = |label| if is_steering { label } else { Label::Pass };
    code.place(Label::V4);
    code.push(set(AT, 0));
    load(&mut code, IPV4_LENGTH, BYTES);
    let (client, endpoint) = if is_steering { (16, 12) } else { (12, 16) };
    for (place, address) in [(CLIENT, client), (ENDPOINT, endpoint)] {
        code.extend([zero(place), store_word(place + 8, MAPPED.to_be().cast_signed())]);
        code.extend([word(FIRST, BYTES + address), put_word(FIRST, place + 12)]);
    }
    code.extend([byte(NEXT, BYTES + 9), half(FIRST, BYTES + 6)]);
    code.jump(any_bit(FIRST, OFFSET4), later(Label::Later4));
    if is_steering {
        code.push(and(FIRST, MORE4.to_be().into()));
        code.jump(equal(FIRST, 0), Label::Whole4);
        code.extend([half(FIRST, BYTES + 4), put_word(FIRST, BEGUN)]);
        code.extend([copy(FIRST, NEXT), or(FIRST, DATAGRAM), put_word(FIRST, BEGUN + 4)]);
        code.place(Label::Whole4);
    }
    // The length is in units of four bytes.
    code.extend([byte(AT, BYTES), and(AT, 0x0f), shift(AT, 2)]);
    code.jump(equal(NEXT, TCP.into()), Label::Ports);
    code.jump(equal(NEXT, UDP.into()), Label::Ports);
    if is_steering {
        code.jump(equal(NEXT, ICMP.into()), Label::Icmp4);
    }
    code.jump(GO, Label::Pass);

    code.place(Label::V6);
    code.push(set(AT, 0));
    load(&mut code, IPV6_LENGTH, BYTES);
    let (client, endpoint) = if is_steering { (24, 8) } else { (8, 24) };
    for (place, address) in [(CLIENT, client), (ENDPOINT, endpoint)] {
        for part in [0, 8] {
            code.extend([double(FIRST, BYTES + address + part), put_double(FIRST, place + part)]);
        }
    }
    code.extend([byte(NEXT, BYTES + 6), set(AT, IPV6_LENGTH), zero(FRAGMENT)]);
    let walk = HeaderWalk {
        context: CONTEXT,
        at: AT,
        next: NEXT,
        bytes: BYTES,
        fragment: FRAGMENT,
        targets: match role {
            Role::Remember => &[(TCP, Label::Ports), (UDP, Label::Ports)],
            Role::Steer => &[(TCP, Label::Ports6), (UDP, Label::Ports6), (ICMPV6, Label::Icmp6)],
        },
        later: later(Label::Later6),
        other: Label::Pass,
        short: Label::Pass,
        too_many: Label::Pass,
        label: &Label::Walk,
    };
    walk.assemble(&mut code);
    if is_steering {
        code.place(Label::Later4);
        code.extend([half(FIRST, BYTES + 4), put_word(FIRST, PORTS)]);
        code.extend([copy(FIRST, NEXT), or(FIRST, DATAGRAM), put_word(FIRST, PROTOCOL)]);
        code.jump(GO, Label::Later);
        code.place(Label::Later6);
        code.extend([word(FIRST, FRAGMENT + 4), put_word(FIRST, PORTS)]);
        code.push(store_word(PROTOCOL, DATAGRAM));
        code.place(Label::Later);
        look(&mut code, CLIENT, maps.datagrams);
        code.jump(equal(RESULT, 0), Label::Pass);
        code.jump(GO, Label::Hit);

        // The quoted packet has the source and the destination of the flow.
        code.place(Label::Icmp4);
        load(&mut code, 1, BYTES);
        code.push(byte(FIRST, BYTES));
        ICMP_ERRORS.iter().for_each(|kind| code.jump(equal(FIRST, *kind), Label::Quoted4));
        code.jump(GO, Label::Pass);
        code.place(Label::Quoted4);
        code.push(add(AT, ICMP_LENGTH));
        load(&mut code, IPV4_LENGTH, BYTES);
        code.extend([byte(NEXT, BYTES + 9), half(FIRST, BYTES + 6)]);
        code.jump(any_bit(FIRST, OFFSET4), Label::Pass);
        code.extend([byte(FIRST, BYTES), and(FIRST, 0x0f), shift(FIRST, 2), plus(AT, FIRST)]);
        code.jump(equal(NEXT, TCP.into()), Label::QuotedPorts);
        code.jump(equal(NEXT, UDP.into()), Label::QuotedPorts);
        code.jump(GO, Label::Pass);

        code.place(Label::Icmp6);
        load(&mut code, 1, BYTES);
        code.push(byte(FIRST, BYTES));
        code.jump(equal(FIRST, 0), Label::Pass);
        code.jump(above(FIRST, LAST_ICMPV6_ERROR), Label::Pass);
        code.push(add(AT, ICMP_LENGTH + 6));
        load(&mut code, 1, BYTES);
        code.extend([byte(NEXT, BYTES), add(AT, IPV6_LENGTH - 6)]);
        HeaderWalk {
            targets: &[(TCP, Label::QuotedPorts), (UDP, Label::QuotedPorts)],
            later: Label::Pass,
            label: &Label::QuotedWalk,
            ..walk
        }
        .assemble(&mut code);
        code.place(Label::QuotedPorts);
        load(&mut code, 4, PORTS);
        code.jump(GO, Label::Flow);

        code.place(Label::Ports6);
        code.push(half(FIRST, FRAGMENT + 2));
        code.extend([and(FIRST, MORE6.to_be().into())]);
        code.jump(equal(FIRST, 0), Label::Ports);
        code.extend([word(FIRST, FRAGMENT + 4), put_word(FIRST, BEGUN)]);
        code.push(store_word(BEGUN + 4, DATAGRAM));
    }

    code.place(Label::Ports);
    if is_steering {
        load(&mut code, 4, BYTES);
        code.extend([half(FIRST, BYTES), half(SECOND, BYTES + 2)]);
        code.extend([put_half(FIRST, PORTS + 2), put_half(SECOND, PORTS)]);
    } else {
        load(&mut code, 4, PORTS);
    }
    code.place(Label::Flow);
    code.push(put_word(NEXT, PROTOCOL));
    look(&mut code, CLIENT, maps.flows);
    match role {
        Role::Remember => {
            code.jump(equal(RESULT, 0), Label::Insert);
            // BPF_LDX | BPF_MEM | BPF_DW; BPF_JMP | BPF_JEQ | BPF_X
            code.extend([of(0x79, FIRST, RESULT, 0, 0), double(SECOND, MAC)]);
            code.jump(of(0x1d, FIRST, SECOND, 0, 0), Label::Pass);
            code.place(Label::Insert);
            update(&mut code, maps.flows);
        }
        Role::Steer => {
            code.jump(unequal(RESULT, 0), Label::Hit);
            // A datagram of another socket. Its identification may be that of an earlier one.
            code.push(double(FIRST, BEGUN));
            code.jump(equal(FIRST, 0), Label::Pass);
            code.push(put_double(FIRST, PORTS));
            code.extend(map(FIRST, maps.datagrams));
            code.extend([copy(SECOND, STACK), add(SECOND, CLIENT.into()), call(DELETE)]);
            code.jump(GO, Label::Pass);
            code.place(Label::Hit);
            code.extend([of(0x79, FIRST, RESULT, 0, 0), put_double(FIRST, MAC)]);
            look(&mut code, MAC, maps.stations);
            code.jump(equal(RESULT, 0), Label::Pass);
            code.push(double(FIRST, BEGUN));
            code.jump(equal(FIRST, 0), Label::Rewrite);
            code.push(put_double(FIRST, PORTS));
            update(&mut code, maps.datagrams);
            code.place(Label::Rewrite);
            // Checksums do not cover the Ethernet header.
            code.extend([copy(FIRST, CONTEXT), set(SECOND, 0), copy(THIRD, STACK)]);
            code.extend([add(THIRD, MAC.into()), set(FOURTH, MAC_LENGTH), set(FIFTH, 0)]);
            code.push(call(STORE));
            code.jump(unequal(RESULT, 0), Label::Pass);
            code.push(store_word(BYTES, 0));
            look(&mut code, BYTES, maps.steered);
            code.jump(equal(RESULT, 0), Label::Pass);
            // BPF_STX | BPF_ATOMIC | BPF_DW, BPF_ADD
            code.extend([set(FIRST, 1), of(0xdb, RESULT, FIRST, 0, 0)]);
        }
    }
    code.place(Label::Pass);
    code.extend([set(RESULT, verdict::NEXT), EXIT]);
    code.finish()
}
