//! Source guards: no packet of another link bears an address of a container network.
//!
//! A source guard is an eBPF program at the ingress of a link of the host that is no bridge of
//! tidegate. It drops packets with a source in a set of prefixes, before the host reassembles,
//! tracks, routes or answers them. Firewall rules come later: conntrack reassembles fragments of
//! all links together, and the kernel answers some invalid packets with an ICMP error, which
//! carries their payload to the forged source, before a rule sees them.
//!
//! | packet | verdict |
//! |---|---|
//! | unicast to another MAC address | pass: the host does not process it, a macvlan or a bridge may |
//! | VLAN tag with an ID | pass: it is for a VLAN device, which has a guard of its own |
//! | VLAN tag with ID 0 (a priority) | as without the tag, which the kernel ignores |
//! | a further VLAN tag after one with ID 0 | drop; with an ID: pass |
//! | multicast neighbour solicitation or advertisement | pass: a macvlan needs it, and the host answers at the same link only |
//! | source in a prefix | drop |
//! | anything else | pass |
//!
//! They follow the links of the host ([`ForeignLinks`]).

use crate::bpf::assembly::{Assembly, EXIT, GO, add, call, copy, map, set};
use crate::bpf::foreign::ForeignLinks;
use crate::bpf::{Direction, Instruction, PrefixSet, field, verdict};
use ipnet::IpNet;
use std::collections::BTreeSet;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Maximum number of prefixes per family.
const CAPACITY: u32 = 4_096;

/// The source guards of one owner.
#[derive(Debug)]
pub struct SourceGuard {
    links: ForeignLinks,
    /// IPv4, IPv6.
    prefixes: [PrefixSet; 2],
    refused: Mutex<BTreeSet<IpNet>>,
}

impl SourceGuard {
    /// Loads the program of `owner` for the network namespace with inode number `namespace`,
    /// without prefixes. Owners of several namespaces can have the same name.
    ///
    /// # Errors
    /// `EPERM` without CAP_BPF and CAP_NET_ADMIN in the initial user namespace; `EINVAL` before
    /// Linux 6.6.
    pub fn new(owner: &str, namespace: u64) -> io::Result<Self> {
        let prefixes =
            [PrefixSet::new("tg_src_v4", 4, CAPACITY)?, PrefixSet::new("tg_src_v6", 16, CAPACITY)?];
        let links = ForeignLinks::load(owner, namespace, |links| {
            let [v4, v6] = prefixes.each_ref().map(PrefixSet::descriptor);
            vec![("tg_src_", Direction::Ingress, program(v4, v6, links.descriptor()))]
        })?;
        Ok(Self { links, prefixes, refused: Mutex::default() })
    }

    /// Drops packets with a source in `net`.
    ///
    /// # Errors
    /// `ENOSPC` if there are too many prefixes.
    pub fn refuse(&self, net: IpNet) -> io::Result<()> {
        self.prefixes[usize::from(net.addr().is_ipv6())].insert(&octets(net), net.prefix_len())?;
        self.refused().insert(net.trunc());
        Ok(())
    }

    /// Passes packets with a source in `net` again.
    ///
    /// # Errors
    /// Errors of the kernel. A missing prefix is not an error.
    pub fn permit(&self, net: IpNet) -> io::Result<()> {
        self.prefixes[usize::from(net.addr().is_ipv6())].remove(&octets(net), net.prefix_len())?;
        self.refused().remove(&net.trunc());
        Ok(())
    }

    /// Returns whether packets with a source in `net` are dropped.
    pub fn refuses(&self, net: IpNet) -> bool {
        self.refused().contains(&net.trunc())
    }

    /// Attaches the guard to the link with interface index `index` in the calling thread's network
    /// namespace, instead of that of a previous process.
    ///
    /// # Errors
    /// `ENODEV` if the link does not exist.
    pub fn attach(&self, index: u32) -> io::Result<()> {
        self.links.attach(index)
    }

    /// Returns whether this guard is attached to the link with interface index `index` in the
    /// calling thread's network namespace.
    ///
    /// # Errors
    /// `ENODEV` if the link does not exist.
    pub fn is_attached(&self, index: u32) -> io::Result<bool> {
        self.links.is_attached(index)
    }

    /// Makes the guards at links that are not in `present`, the interface indexes of the links of
    /// the host, pass all packets: of links that are in another namespace now. Once there are
    /// guards of this process, this includes those of previous processes.
    ///
    /// # Errors
    /// Errors of the kernel.
    pub fn retain(&self, present: &BTreeSet<u32>) -> io::Result<()> {
        self.links.retain(present)
    }

    /// Detaches the guard, and that of a previous process.
    ///
    /// # Errors
    /// `ENODEV` if the link does not exist.
    pub fn detach(&self, index: u32) -> io::Result<()> {
        self.links.detach(index)
    }

    fn refused(&self) -> MutexGuard<'_, BTreeSet<IpNet>> {
        self.refused.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn octets(net: IpNet) -> Vec<u8> {
    match net.network() {
        std::net::IpAddr::V4(ip) => ip.octets().to_vec(),
        std::net::IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

/// The program, with the descriptors of its maps.
fn program(v4: i32, v6: i32, links: i32) -> Vec<Instruction> {
    const RESULT: u8 = 0;
    const FIRST: u8 = 1;
    const SECOND: u8 = 2;
    const THIRD: u8 = 3;
    const FOURTH: u8 = 4;
    const FIFTH: u8 = 5;
    const CONTEXT: u8 = 6;
    const STACK: u8 = 10;
    /// `bpf_map_lookup_elem`, `bpf_skb_load_bytes_relative` (Linux 4.18).
    const LOOKUP: i32 = 1;
    const LOAD: i32 = 68;
    /// `BPF_HDR_START_NET`: also on links without an Ethernet header.
    const NETWORK: i32 = 1;
    /// `PACKET_OTHERHOST`.
    const OTHER_HOST: i32 = 3;
    const IPV4: u16 = 0x0800;
    const IPV6: u16 = 0x86dd;
    /// Ethertypes of VLAN tags: 802.1Q, 802.1ad.
    const TAGS: [u16; 2] = [0x8100, 0x88a8];
    /// Bits of the VLAN ID.
    const VLAN_ID: u32 = 0x0fff;
    /// Next header ICMPv6, hop limit 255, as neighbour discovery needs (RFC 4861 section 7.1).
    const DISCOVERY: [u8; 2] = [58, 255];
    /// Types of neighbour solicitations and advertisements.
    const NEIGHBOUR: [i32; 2] = [135, 136];
    const MULTICAST: i32 = 0xff;
    let of = Instruction::new;
    let read = |to, offset| of(0x61, to, CONTEXT, offset, 0);
    #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
    enum Label {
        Pass,
        Drop,
        Untagged,
        Tagged,
        V6,
        Link,
    }
    let mut code = Assembly::new();
    code.push(copy(CONTEXT, FIRST));
    // BPF_JMP | BPF_JEQ | BPF_K, BPF_JNE
    code.push(read(FIRST, field::PACKET_TYPE));
    code.jump(of(0x15, FIRST, 0, 0, OTHER_HOST), Label::Pass);
    code.push(read(FIRST, field::VLAN_PRESENT));
    code.jump(of(0x15, FIRST, 0, 0, 0), Label::Untagged);
    code.push(read(FIRST, field::VLAN_TAG));
    // BPF_JMP | BPF_JSET | BPF_K
    code.jump(of(0x45, FIRST, 0, 0, VLAN_ID.cast_signed()), Label::Pass);
    code.place(Label::Untagged);
    code.push(read(FIRST, field::PROTOCOL));
    for tag in TAGS {
        code.jump(of(0x15, FIRST, 0, 0, tag.to_be().into()), Label::Tagged);
    }
    code.jump(of(0x15, FIRST, 0, 0, IPV6.to_be().into()), Label::V6);
    code.jump(of(0x55, FIRST, 0, 0, IPV4.to_be().into()), Label::Pass);
    // Loads `length` bytes from `at` in the network header to the stack.
    let load = |code: &mut Assembly<Label>, at, length, stack, short| {
        code.extend([copy(FIRST, CONTEXT), set(SECOND, at), copy(THIRD, STACK)]);
        code.extend([add(THIRD, stack), set(FOURTH, length), set(FIFTH, NETWORK), call(LOAD)]);
        code.jump(of(0x55, RESULT, 0, 0, 0), short);
    };
    // The key: prefix length, address.
    let look = |code: &mut Assembly<Label>, at, length: i32, trie| {
        let key = -(4 + length);
        load(code, at, length, -length, Label::Pass);
        // BPF_ST | BPF_MEM | BPF_W
        code.push(of(0x62, STACK, 0, key as i16, 8 * length));
        code.extend(map(FIRST, trie));
        code.extend([copy(SECOND, STACK), add(SECOND, key), call(LOOKUP)]);
    };
    look(&mut code, 12, 4, v4);
    code.jump(of(0x15, RESULT, 0, 0, 0), Label::Pass);
    code.jump(GO, Label::Link);
    code.place(Label::V6);
    look(&mut code, 8, 16, v6);
    code.jump(of(0x15, RESULT, 0, 0, 0), Label::Pass);
    // BPF_LDX | BPF_MEM | BPF_H, BPF_B
    let (half, byte) = (|at| of(0x69, FIRST, STACK, at, 0), |at| of(0x71, FIRST, STACK, at, 0));
    load(&mut code, 0, 41, -48, Label::Link);
    code.push(half(-48 + 6));
    code.jump(of(0x55, FIRST, 0, 0, u16::from_ne_bytes(DISCOVERY).into()), Label::Link);
    code.push(byte(-48 + 24));
    code.jump(of(0x55, FIRST, 0, 0, MULTICAST), Label::Link);
    code.push(byte(-48 + 40));
    for kind in NEIGHBOUR {
        code.jump(of(0x15, FIRST, 0, 0, kind), Label::Pass);
    }
    code.jump(GO, Label::Link);
    // The tag after one with ID 0: the ID decides.
    code.place(Label::Tagged);
    load(&mut code, 0, 2, -8, Label::Drop);
    code.push(half(-8));
    let id = (VLAN_ID as u16).to_be();
    code.jump(of(0x45, FIRST, 0, 0, id.into()), Label::Pass);
    code.place(Label::Link);
    code.push(read(FIRST, field::INTERFACE));
    // BPF_STX | BPF_MEM | BPF_W
    code.push(of(0x63, STACK, FIRST, -4, 0));
    code.extend(map(FIRST, links));
    code.extend([copy(SECOND, STACK), add(SECOND, -4), call(LOOKUP)]);
    code.jump(of(0x15, RESULT, 0, 0, 0), Label::Pass);
    code.place(Label::Drop);
    code.extend([set(RESULT, verdict::DROP), EXIT]);
    code.place(Label::Pass);
    code.extend([set(RESULT, verdict::NEXT), EXIT]);
    code.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use tidegate_model::LOOPBACK_INDEX;

    fn frame(ethertype: u16, source: &str) -> Vec<u8> {
        let mut frame = vec![0xff; 6];
        frame.extend([2, 0, 0, 0, 0, 1]);
        frame.extend(ethertype.to_be_bytes());
        match source.parse().unwrap() {
            std::net::IpAddr::V4(ip) => {
                frame.extend([0x45, 0, 0, 20, 0, 0, 0, 0, 64, 17, 0, 0]);
                frame.extend(ip.octets());
            }
            std::net::IpAddr::V6(ip) => {
                frame.extend([0x60, 0, 0, 0, 0, 0, 17, 64]);
                frame.extend(ip.octets());
            }
        }
        frame.resize(80, 0);
        frame
    }

    #[test]
    fn ebpf_drops_sources_of_the_prefixes_only() {
        let guard = SourceGuard::new("test", 1).unwrap();
        // The link of the test runs.
        guard.links.set().insert(&LOOPBACK_INDEX.to_ne_bytes()).unwrap();
        let passes = |frame: &[u8]| guard.links.test_run(0, frame) == verdict::NEXT;
        let (v4, v6) = (frame(0x0800, "10.9.0.7"), frame(0x86dd, "fd09::7"));
        assert!(passes(&v4) && passes(&v6), "no prefixes");
        let [net4, net6]: [IpNet; 2] = ["10.9.0.0/24", "fd09::/64"].map(|net| net.parse().unwrap());
        guard.refuse(net4).unwrap();
        guard.refuse(net6).unwrap();
        assert!(!passes(&v4) && !passes(&v6));
        assert!(guard.refuses(net4) && !guard.refuses("10.9.0.0/25".parse().unwrap()));
        for (ethertype, source) in
            [(0x0800, "10.9.1.7"), (0x86dd, "fd09:0:0:1::7"), (0x0806, "10.9.0.7")]
        {
            assert!(passes(&frame(ethertype, source)), "{source}");
        }
        // Neighbour discovery: multicast, with hop limit 255.
        let mut solicitation = v6.clone();
        solicitation[14 + 6] = 58;
        solicitation[14 + 7] = 255;
        solicitation[14 + 24] = 0xff;
        solicitation[14 + 40] = 135;
        assert!(passes(&solicitation));
        for (at, value) in [(6, 17), (7, 64), (24, 0xfd), (40, 128)] {
            let mut other = solicitation.clone();
            other[14 + at] = value;
            assert!(!passes(&other), "{at}");
        }
        // VLAN tags that the kernel has not removed are those after one with ID 0.
        for (ethertype, priority, id, pass) in [
            (0x8100, 0, 0, false),
            (0x88a8, 0xe0, 0, false),
            (0x8100, 0, 5, true),
            (0x88a8, 1, 0, true),
        ] {
            let mut tagged = frame(ethertype, "192.0.2.7");
            tagged[14..16].copy_from_slice(&[priority, id]);
            assert_eq!(passes(&tagged), pass, "{ethertype:x} {priority} {id}");
        }
        guard.links.set().remove(&LOOPBACK_INDEX.to_ne_bytes()).unwrap();
        assert!(passes(&v4) && passes(&v6), "a link that has left");
        guard.links.set().insert(&LOOPBACK_INDEX.to_ne_bytes()).unwrap();
        guard.permit(net4).unwrap();
        guard.permit(net4).unwrap();
        assert!(passes(&v4) && !passes(&v6) && !guard.refuses(net4));
        // The next process of the owner, once it has a guard, ends the effect of this one. Another
        // owner with the same name, in another namespace, does not.
        for (namespace, pass) in [(2, false), (1, true)] {
            let other = SourceGuard::new("test", namespace).unwrap();
            other.links.pretend(5);
            other.retain(&BTreeSet::from([5])).unwrap();
            assert_eq!(passes(&v6), pass, "namespace {namespace}");
        }
    }
}
