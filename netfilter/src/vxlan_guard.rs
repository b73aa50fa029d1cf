//! VXLAN guards: no VXLAN datagram from or to the hosts of a cluster but those of the kernel.
//!
//! Two eBPF programs at each link of the host, for hosts without nftables:
//!
//! | packet to UDP port 4789 | verdict |
//! |---|---|
//! | received, with a VNI of the cluster, source not a VTEP | drop |
//! | received from a bridge with a VNI of the cluster | drop: a container with a forged source |
//! | received on `lo` with a VNI of the cluster | drop: a process of the host, to its own VTEP |
//! | forwarded to a VTEP, source not another VTEP | drop: a container, also after masquerade |
//! | forwarded to a VTEP from a bridge | drop: a container with a forged source |
//! | sent to a VTEP by a socket | drop: packets of a VXLAN device have none |
//! | anything else | pass |
//!
//! The programs see packets before their reassembly. The first fragment decides: if it is too short
//! to show the VNI, it is treated as one of the cluster. Unlike firewall rules, the first row also
//! drops datagrams that the host would forward.

use crate::bpf::assembly::{Assembly, EXIT, GO, Start, add, call, copy, map, set};
use crate::bpf::extension_headers::{HeaderWalk, WalkLabel};
use crate::bpf::foreign::ForeignLinks;
use crate::bpf::{Direction, HashSet, Instruction, field, verdict};
use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};
use tidegate_model::LOOPBACK_INDEX;

/// Maximum number of facts: VTEPs (twice), VNIs, bridges.
const CAPACITY: u32 = 16_384;

/// Length of a key: kind, value.
const KEY: usize = 20;

/// The owner of the guards: there is one in a namespace.
const OWNER: &str = "mesh";

/// The hooks, with the starts of the names of their programs.
const HOOKS: [(&str, Direction); 2] =
    [("tg_vxi_", Direction::Ingress), ("tg_vxo_", Direction::Egress)];

/// What the programs look up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum VxlanFact {
    /// The address of a host of the cluster.
    Vtep(IpAddr),
    /// The same, of another host than this one.
    Peer(IpAddr),
    /// A VNI of the cluster on this host.
    Vni(u32),
    /// The interface index of a bridge that is not the underlay.
    Bridge(u32),
}

impl VxlanFact {
    const fn kind(self) -> i32 {
        match self {
            Self::Vtep(IpAddr::V4(_)) => VTEP4,
            Self::Vtep(IpAddr::V6(_)) => VTEP6,
            Self::Peer(IpAddr::V4(_)) => PEER4,
            Self::Peer(IpAddr::V6(_)) => PEER6,
            Self::Vni(_) => VNI,
            Self::Bridge(_) => BRIDGE,
        }
    }

    fn key(self) -> [u8; KEY] {
        let mut key = [0; KEY];
        key[..4].copy_from_slice(&self.kind().to_ne_bytes());
        let value = &mut key[4..];
        match self {
            Self::Vtep(IpAddr::V4(ip)) | Self::Peer(IpAddr::V4(ip)) => {
                value[..4].copy_from_slice(&ip.octets());
            }
            Self::Vtep(IpAddr::V6(ip)) | Self::Peer(IpAddr::V6(ip)) => {
                value.copy_from_slice(&ip.octets());
            }
            // As in the packet.
            Self::Vni(vni) => value[..3].copy_from_slice(&vni.to_be_bytes()[1..]),
            Self::Bridge(index) => value[..4].copy_from_slice(&index.to_ne_bytes()),
        }
        key
    }
}

const VTEP4: i32 = 1;
const VTEP6: i32 = 2;
const PEER4: i32 = 3;
const PEER6: i32 = 4;
const VNI: i32 = 5;
const BRIDGE: i32 = 6;

/// The VXLAN guards of a namespace.
#[derive(Debug)]
pub struct VxlanGuard {
    links: ForeignLinks,
    set: HashSet,
    facts: Mutex<BTreeSet<VxlanFact>>,
}

impl VxlanGuard {
    /// Loads the programs for the network namespace with inode number `namespace`. `port` is the
    /// UDP port of VXLAN.
    ///
    /// # Errors
    /// `EPERM` without CAP_BPF and CAP_NET_ADMIN in the initial user namespace; `EINVAL` before
    /// Linux 6.6.
    pub fn new(namespace: u64, port: u16) -> io::Result<Self> {
        let set = HashSet::new("tg_vxlan", KEY as u32, CAPACITY)?;
        let links = ForeignLinks::load(OWNER, namespace, |links| {
            let code = |direction| program(direction, port, set.descriptor(), links.descriptor());
            HOOKS.map(|(prefix, direction)| (prefix, direction, code(direction))).into()
        })?;
        Ok(Self { links, set, facts: Mutex::default() })
    }

    /// Detaches the guards of a previous process in the network namespace with inode number
    /// `namespace`, that of the calling thread, from the link with interface index `index`.
    ///
    /// # Errors
    /// `ENODEV` if the link does not exist.
    pub fn detach_stale(namespace: u64, index: u32) -> io::Result<()> {
        for hook in HOOKS {
            ForeignLinks::detach_stale(OWNER, namespace, index, hook)?;
        }
        Ok(())
    }

    /// Replaces the facts. New ones are added before old ones are removed.
    ///
    /// # Errors
    /// `E2BIG` if there are too many.
    pub fn set(&self, facts: &BTreeSet<VxlanFact>) -> io::Result<()> {
        let mut known = self.facts.lock().unwrap_or_else(PoisonError::into_inner);
        for fact in facts {
            if !known.contains(fact) {
                self.set.insert(&fact.key())?;
                known.insert(*fact);
            }
        }
        while let Some(fact) = known.difference(facts).next().copied() {
            self.set.remove(&fact.key())?;
            known.remove(&fact);
        }
        Ok(())
    }

    /// Attaches the guards to the link with interface index `index` in the calling thread's network
    /// namespace, instead of those of a previous process.
    ///
    /// # Errors
    /// `ENODEV` if the link does not exist.
    pub fn attach(&self, index: u32) -> io::Result<()> {
        self.links.attach(index)
    }

    /// Returns whether the guards are attached to the link with interface index `index` in the
    /// calling thread's network namespace.
    ///
    /// # Errors
    /// `ENODEV` if the link does not exist.
    pub fn is_attached(&self, index: u32) -> io::Result<bool> {
        self.links.is_attached(index)
    }

    /// Ends the effect of the guards at links that are not in `present`, the interface indexes of
    /// the links of the host, and of those of previous processes.
    ///
    /// # Errors
    /// Errors of the kernel.
    pub fn retain(&self, present: &BTreeSet<u32>) -> io::Result<()> {
        self.links.retain(present)
    }

    /// Detaches the guards, and those of a previous process.
    ///
    /// # Errors
    /// `ENODEV` if the link does not exist.
    pub fn detach(&self, index: u32) -> io::Result<()> {
        self.links.detach(index)
    }
}

/// The program for `direction`, with the descriptors of its maps.
fn program(direction: Direction, port: u16, facts: i32, links: i32) -> Vec<Instruction> {
    const RESULT: u8 = 0;
    const FIRST: u8 = 1;
    const SECOND: u8 = 2;
    const CONTEXT: u8 = 6;
    /// Offset in the network header, in the end that of the UDP header.
    const AT: u8 = 7;
    /// 1 for IPv6.
    const FAMILY: u8 = 8;
    /// Next header.
    const NEXT: u8 = 9;
    const STACK: u8 = 10;
    /// Places on the stack: the key with its value, and bytes of the packet.
    const PLACE: i16 = -(KEY as i16);
    const VALUE: i16 = PLACE + 4;
    const BYTES: i16 = -24;
    const FRAGMENT: i16 = -32;
    /// `bpf_map_lookup_elem`.
    const LOOKUP: i32 = 1;
    /// `PACKET_OTHERHOST`.
    const OTHER_HOST: i32 = 3;
    const IPV4: u16 = 0x0800;
    const IPV6: u16 = 0x86dd;
    /// Ethertypes of VLAN tags: 802.1Q, 802.1ad.
    const TAGS: [u16; 2] = [0x8100, 0x88a8];
    /// Bits of the VLAN ID, and of the fragment offset in IPv4.
    const VLAN_ID: u16 = 0x0fff;
    const OFFSET4: u16 = 0x1fff;
    const UDP: u8 = 17;
    #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
    enum Label {
        Untagged,
        Tagged,
        V4,
        V6,
        Walk(WalkLabel),
        Udp,
        Ours,
        Family(u8),
        Found(u8),
        Sent,
        Link,
        Pass,
    }
    let of = Instruction::new;
    let read = |to, offset| of(0x61, to, CONTEXT, offset, 0);
    // BPF_JMP | BPF_JEQ | BPF_K, BPF_JNE, BPF_JSET
    let equal = |register, value| of(0x15, register, 0, 0, value);
    let unequal = |register, value| of(0x55, register, 0, 0, value);
    let any_bit = |register, bits: u16| of(0x45, register, 0, 0, bits.to_be().into());
    // BPF_LDX | BPF_MEM of a byte and of a half word
    let byte = |to, at| of(0x71, to, STACK, at, 0);
    let half = |to, at| of(0x69, to, STACK, at, 0);
    // Loads `length` bytes at AT to the stack.
    let load = |code: &mut Assembly<Label>, length, stack: i16, short| {
        code.load_packet(CONTEXT, (Start::Network, AT), (length, stack), short);
    };
    // Clears the key of `kind`.
    let begin = |code: &mut Assembly<Label>, kind| {
        // BPF_ST | BPF_MEM | BPF_DW, BPF_W
        code.extend([of(0x7a, STACK, 0, VALUE, 0), of(0x7a, STACK, 0, VALUE + 8, 0)]);
        code.push(of(0x62, STACK, 0, PLACE, kind));
    };
    let look = |code: &mut Assembly<Label>, place: i16, descriptor| {
        code.extend(map(FIRST, descriptor));
        code.extend([copy(SECOND, STACK), add(SECOND, place.into()), call(LOOKUP)]);
    };
    // BPF_STX | BPF_MEM | BPF_W
    let put = |register, at| of(0x63, STACK, register, at, 0);
    // Looks up the address at `offsets` by family. Leaves the result in RESULT.
    let address = |code: &mut Assembly<Label>, number, kinds: [i32; 2], offsets: [i32; 2]| {
        code.jump(equal(FAMILY, 1), Label::Family(number));
        begin(code, kinds[0]);
        code.push(set(AT, offsets[0]));
        load(code, 4, VALUE, Label::Pass);
        code.jump(GO, Label::Found(number));
        code.place(Label::Family(number));
        begin(code, kinds[1]);
        code.push(set(AT, offsets[1]));
        load(code, 16, VALUE, Label::Pass);
        code.place(Label::Found(number));
        look(code, PLACE, facts);
    };
    // Looks up the bridge with the interface index in `register`. Leaves the result in RESULT.
    let bridge = |code: &mut Assembly<Label>, register| {
        begin(code, BRIDGE);
        code.push(put(register, VALUE));
        look(code, PLACE, facts);
    };
    let (sources, destinations) = ([12, 8], [16, 24]);
    let mut code = Assembly::new();
    code.push(copy(CONTEXT, FIRST));
    if direction == Direction::Ingress {
        code.push(read(FIRST, field::PACKET_TYPE));
        code.jump(equal(FIRST, OTHER_HOST), Label::Pass);
    }
    code.push(read(FIRST, field::VLAN_PRESENT));
    code.jump(equal(FIRST, 0), Label::Untagged);
    code.push(read(FIRST, field::VLAN_TAG));
    code.jump(of(0x45, FIRST, 0, 0, VLAN_ID.into()), Label::Pass);
    code.place(Label::Untagged);
    code.push(read(FIRST, field::PROTOCOL));
    for tag in TAGS {
        code.jump(equal(FIRST, tag.to_be().into()), Label::Tagged);
    }
    code.jump(equal(FIRST, IPV4.to_be().into()), Label::V4);
    code.jump(equal(FIRST, IPV6.to_be().into()), Label::V6);
    code.jump(GO, Label::Pass);
    // The tag after one with ID 0: the ID decides.
    code.place(Label::Tagged);
    code.push(set(AT, 0));
    load(&mut code, 2, BYTES, Label::Link);
    code.push(half(FIRST, BYTES));
    code.jump(any_bit(FIRST, VLAN_ID), Label::Pass);
    code.jump(GO, Label::Link);

    code.place(Label::V4);
    code.extend([set(FAMILY, 0), set(AT, 6)]);
    load(&mut code, 4, BYTES, Label::Pass);
    code.push(half(FIRST, BYTES));
    code.jump(any_bit(FIRST, OFFSET4), Label::Pass);
    code.push(byte(FIRST, BYTES + 3));
    code.jump(unequal(FIRST, UDP.into()), Label::Pass);
    code.push(set(AT, 0));
    load(&mut code, 1, BYTES, Label::Pass);
    // BPF_ALU64 | BPF_AND | BPF_K, BPF_LSH: the length is in units of four bytes.
    code.extend([byte(AT, BYTES), of(0x57, AT, 0, 0, 0x0f), of(0x67, AT, 0, 0, 2)]);
    code.jump(GO, Label::Udp);

    code.place(Label::V6);
    code.extend([set(FAMILY, 1), set(AT, 6)]);
    load(&mut code, 1, BYTES, Label::Pass);
    code.extend([byte(NEXT, BYTES), set(AT, 40)]);
    let walk = HeaderWalk {
        context: CONTEXT,
        at: AT,
        next: NEXT,
        bytes: BYTES,
        fragment: FRAGMENT,
        targets: &[(UDP, Label::Udp)],
        later: Label::Pass,
        other: Label::Pass,
        short: Label::Pass,
        // Dropped: the kernel accepts more headers.
        too_many: Label::Link,
        label: &Label::Walk,
    };
    walk.assemble(&mut code);

    code.place(Label::Udp);
    load(&mut code, 4, BYTES, Label::Pass);
    code.push(half(FIRST, BYTES + 2));
    code.jump(unequal(FIRST, port.to_be().into()), Label::Pass);
    match direction {
        Direction::Ingress => {
            // After the UDP header and the flags.
            code.push(add(AT, 12));
            begin(&mut code, VNI);
            load(&mut code, 3, VALUE, Label::Ours);
            look(&mut code, PLACE, facts);
            code.jump(equal(RESULT, 0), Label::Pass);
            code.place(Label::Ours);
            code.push(read(FIRST, field::INTERFACE));
            code.jump(equal(FIRST, LOOPBACK_INDEX.cast_signed()), Label::Link);
            bridge(&mut code, FIRST);
            code.jump(unequal(RESULT, 0), Label::Link);
            address(&mut code, 0, [VTEP4, VTEP6], sources);
            code.jump(unequal(RESULT, 0), Label::Pass);
        }
        Direction::Egress => {
            address(&mut code, 0, [VTEP4, VTEP6], destinations);
            code.jump(equal(RESULT, 0), Label::Pass);
            code.push(read(FIRST, field::INGRESS_INTERFACE));
            code.jump(equal(FIRST, 0), Label::Sent);
            bridge(&mut code, FIRST);
            code.jump(unequal(RESULT, 0), Label::Link);
            address(&mut code, 1, [PEER4, PEER6], sources);
            code.jump(unequal(RESULT, 0), Label::Pass);
            code.jump(GO, Label::Link);
            code.place(Label::Sent);
            // BPF_LDX | BPF_MEM | BPF_DW
            code.push(of(0x79, FIRST, CONTEXT, field::SOCKET, 0));
            code.jump(equal(FIRST, 0), Label::Pass);
        }
    }
    code.place(Label::Link);
    code.extend([read(FIRST, field::INTERFACE), put(FIRST, BYTES)]);
    look(&mut code, BYTES, links);
    code.jump(equal(RESULT, 0), Label::Pass);
    code.extend([set(RESULT, verdict::DROP), EXIT]);
    code.place(Label::Pass);
    code.extend([set(RESULT, verdict::NEXT), EXIT]);
    code.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    const INGRESS: usize = 0;
    const EGRESS: usize = 1;

    /// A VXLAN datagram with `between` between the IP header, or its fragment fields, and UDP.
    fn datagram(source: &str, to: &str, first: u8, between: &[u8], vni: u32) -> Vec<u8> {
        let mut frame = [[0xff; 6], [2; 6]].concat();
        match (source.parse().unwrap(), to.parse().unwrap()) {
            (IpAddr::V4(source), IpAddr::V4(to)) => {
                let length = 5 + between.len() as u8 / 4;
                frame.extend([8, 0, 0x40 | length, 0, 0, 200, 0, 0, 0, 0, 64, first, 0, 0]);
                frame.extend([source.octets(), to.octets()].concat());
            }
            (IpAddr::V6(source), IpAddr::V6(to)) => {
                frame.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, 160, first, 64]);
                frame.extend([source.octets(), to.octets()].concat());
            }
            _ => unreachable!(),
        }
        frame.extend(between);
        frame.extend([0xc0, 0, 0x12, 0xb5, 0, 100, 0, 0, 8, 0, 0, 0]);
        frame.extend(&vni.to_be_bytes()[1..]);
        frame.resize(200, 0);
        frame
    }

    fn guard() -> VxlanGuard {
        let guard = VxlanGuard::new(1, 4789).unwrap();
        let ips =
            ["192.0.2.1", "192.0.2.2", "2001:db8::1", "2001:db8::2"].map(|ip| ip.parse().unwrap());
        let mut facts: BTreeSet<VxlanFact> = ips.map(VxlanFact::Vtep).into();
        facts.extend([VxlanFact::Peer(ips[1]), VxlanFact::Peer(ips[3]), VxlanFact::Vni(0x123456)]);
        guard.set(&facts).unwrap();
        guard
    }

    /// Test runs are at `lo`, where no source is accepted: which frames are examined at all.
    #[test]
    fn datagrams_are_found_behind_options_and_fragment_headers() {
        let guard = guard();
        let passes = |frame: &[u8]| guard.links.test_run(INGRESS, frame) == verdict::NEXT;
        let (v4, v6) = ("192.0.2.9", "2001:db8::9");
        let to = |source: &str| if source == v4 { "192.0.2.1" } else { "2001:db8::1" };
        let plain = |source| datagram(source, to(source), 17, &[], 0x123456);
        assert!(passes(&plain(v4)), "a link that is not in the set");
        guard.links.set().insert(&LOOPBACK_INDEX.to_ne_bytes()).unwrap();
        for source in [v4, v6] {
            assert!(!passes(&plain(source)));
            assert!(passes(&datagram(source, to(source), 17, &[], 0x123457)), "another VNI");
            let mut other = plain(source);
            let port = other.len() - (200 - if source == v4 { 14 + 20 } else { 14 + 40 }) + 3;
            other[port] ^= 1;
            assert!(passes(&other), "another port");
            // Too short to show the VNI.
            let end = port + 8;
            assert!(!passes(&plain(source)[..end]));
        }
        assert!(!passes(&datagram(v4, to(v4), 17, &[1; 40], 0x123456)), "options");
        assert!(passes(&datagram(v4, to(v4), 6, &[], 0x123456)), "TCP");
        let mut part = plain(v4);
        part[20] = 0x20;
        assert!(!passes(&part), "first fragment");
        part[21] = 1;
        assert!(passes(&part), "another fragment");
        let (options, fragment) =
            ([0, 0, 1, 4, 0, 0, 0, 0], |next, low| [next, 0, 0, low, 0, 0, 0, 1]);
        let cases: [(u8, Vec<u8>, bool); 7] = [
            (44, fragment(17, 1).to_vec(), false),
            (44, fragment(17, 8).to_vec(), true),
            (0, [[44, 0, 1, 4, 0, 0, 0, 0], fragment(17, 1)].concat(), false),
            (60, [&[17, 2][..], &[0; 22]].concat(), false),
            (43, [[17, 0, 0, 0, 0, 0, 0, 0]].concat(), false),
            (51, [&[17, 4][..], &[0; 22]].concat(), false),
            (59, Vec::new(), true),
        ];
        for (first, between, pass) in cases {
            let frame = datagram(v6, to(v6), first, &between, 0x123456);
            assert_eq!(passes(&frame), pass, "{first} {between:?}");
        }
        let many = [&options.repeat(8)[..], &[17, 0, 1, 4, 0, 0, 0, 0]].concat();
        assert!(!passes(&datagram(v6, to(v6), 0, &many, 0x123456)), "too many headers");
        // A VTEP is not accepted at `lo`.
        assert!(!passes(&datagram("192.0.2.2", "192.0.2.1", 17, &[], 0x123456)));
        guard.set(&BTreeSet::new()).unwrap();
        assert!(passes(&plain(v4)), "no VNI");
    }

    /// Test runs give the packet a socket.
    #[test]
    fn datagrams_of_sockets_to_vteps_are_dropped() {
        let guard = guard();
        guard.links.set().insert(&LOOPBACK_INDEX.to_ne_bytes()).unwrap();
        let passes = |to: &str, vni| {
            let source = if to.contains(':') { "2001:db8::1" } else { "192.0.2.1" };
            guard.links.test_run(EGRESS, &datagram(source, to, 17, &[], vni)) == verdict::NEXT
        };
        assert!(!passes("192.0.2.2", 7) && !passes("2001:db8::2", 0x123456));
        assert!(passes("192.0.2.9", 7) && passes("2001:db8::9", 0x123456));
    }
}
