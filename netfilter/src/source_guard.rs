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
//! | unicast to another MAC address than those of the host's bridges and links | pass: the host does not process it, a macvlan or a bridge may |
//! | VLAN tag with an ID | pass: it is for a VLAN device, which has a guard of its own |
//! | VLAN tag with ID 0 (a priority) | as without the tag, which the kernel ignores |
//! | a further VLAN tag after one with ID 0 | drop; with an ID: pass |
//! | multicast neighbour solicitation or advertisement | pass: a macvlan needs it, and the host answers at the same link only |
//! | source in a prefix | drop |
//! | IPv6 source that is an address of the host, a link-local one at the link that has it | drop: a reply would go to a socket of the host, through `lo`. The kernel checks this for IPv4 only (`fib_validate_source`) |
//! | anything else | pass |
//!
//! They follow the links of the host ([`ForeignLinks`]).

use crate::bpf::assembly::{Assembly, EXIT, GO, add, call, copy, map, set};
use crate::bpf::foreign::ForeignLinks;
use crate::bpf::{Direction, HashSet, Instruction, PrefixSet, field, verdict};
use ipnet::IpNet;
use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Mutex, MutexGuard, PoisonError};
use tidegate_model::MacAddress;

/// Maximum number of prefixes per family, and of own addresses.
const CAPACITY: u32 = 16_384;

/// Length of the keys for own link-local addresses: interface index, address.
const LINK_LOCAL_KEY: usize = 20;

/// Length of the keys for MAC addresses, padded with zeros.
const STATION_KEY: usize = 8;

/// The source guards of one owner.
#[derive(Debug)]
pub struct SourceGuard {
    links: ForeignLinks,
    /// IPv4, IPv6.
    prefixes: [PrefixSet; 2],
    refused: Mutex<BTreeSet<IpNet>>,
    link_locals: HashSet,
    stations: HashSet,
    own: Mutex<OwnAddresses>,
}

/// What the host is known by.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OwnAddresses {
    /// MAC addresses of bridges of other software, and of their ports.
    pub stations: BTreeSet<MacAddress>,
    /// IPv6 addresses of the host with the interface indexes of their links, including those of
    /// subnet-router anycast.
    pub v6: BTreeSet<(u32, Ipv6Addr)>,
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
        let link_locals = HashSet::new("tg_src_local", LINK_LOCAL_KEY as u32, CAPACITY)?;
        let stations = HashSet::new("tg_src_macs", STATION_KEY as u32, CAPACITY)?;
        let links = ForeignLinks::load(owner, namespace, |links| {
            let [v4, v6] = prefixes.each_ref().map(PrefixSet::descriptor);
            let [locals, stations, links] =
                [&link_locals, &stations, links].map(HashSet::descriptor);
            vec![(
                "tg_src_",
                Direction::Ingress,
                program(&Maps { v4, v6, locals, stations, links }),
            )]
        })?;
        let (refused, own) = Default::default();
        Ok(Self { links, prefixes, refused, link_locals, stations, own })
    }

    /// Replaces the addresses of the host. New ones are added before old ones are removed.
    ///
    /// # Errors
    /// `E2BIG` or `ENOSPC` if there are too many.
    pub fn set_own(&self, own: &OwnAddresses) -> io::Result<()> {
        let mut known = self.own.lock().unwrap_or_else(PoisonError::into_inner);
        if *known == *own {
            return Ok(());
        }
        for mac in own.stations.difference(&known.stations) {
            self.stations.insert(&station(*mac))?;
        }
        for (link, ip) in own.v6.difference(&known.v6) {
            match ip.is_unicast_link_local() {
                true => self.link_locals.insert(&link_local(*link, *ip))?,
                false => self.prefixes[1].insert(&ip.octets(), 128)?,
            }
        }
        for mac in known.stations.difference(&own.stations) {
            self.stations.remove(&station(*mac))?;
        }
        for (link, ip) in known.v6.difference(&own.v6) {
            // The same address may be at another link, and a network may consist of it.
            let is_needed = own.v6.iter().any(|(_, other)| other == ip)
                || self.refuses(IpNet::from(IpAddr::V6(*ip)));
            match ip.is_unicast_link_local() {
                true => self.link_locals.remove(&link_local(*link, *ip))?,
                false if is_needed => {}
                false => self.prefixes[1].remove(&ip.octets(), 128)?,
            }
        }
        known.clone_from(own);
        Ok(())
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

fn station(mac: MacAddress) -> [u8; STATION_KEY] {
    let mut key = [0; STATION_KEY];
    key[..6].copy_from_slice(&mac.0);
    key
}

fn link_local(link: u32, ip: Ipv6Addr) -> [u8; LINK_LOCAL_KEY] {
    let mut key = [0; LINK_LOCAL_KEY];
    key[..4].copy_from_slice(&link.to_ne_bytes());
    key[4..].copy_from_slice(&ip.octets());
    key
}

fn octets(net: IpNet) -> Vec<u8> {
    match net.network() {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

/// Descriptors of the maps. The program uses `links` last ([`ForeignLinks`]).
struct Maps {
    v4: i32,
    v6: i32,
    locals: i32,
    stations: i32,
    links: i32,
}

/// The program, with the descriptors of its maps.
fn program(&Maps { v4, v6, locals, stations, links }: &Maps) -> Vec<Instruction> {
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
    /// `BPF_HDR_START_MAC`, and `BPF_HDR_START_NET`: also on links without an Ethernet header.
    const ETHERNET: i32 = 0;
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
        Received,
        Untagged,
        Tagged,
        V6,
        Own,
        Link,
    }
    let mut code = Assembly::new();
    code.push(copy(CONTEXT, FIRST));
    // BPF_JMP | BPF_JEQ | BPF_K, BPF_JNE
    code.push(read(FIRST, field::PACKET_TYPE));
    code.jump(of(0x55, FIRST, 0, 0, OTHER_HOST), Label::Received);
    // At the port of a bridge, the packet may be for the bridge. BPF_ST | BPF_MEM | BPF_DW
    code.push(of(0x7a, STACK, 0, -8, 0));
    code.extend([copy(FIRST, CONTEXT), set(SECOND, 0), copy(THIRD, STACK), add(THIRD, -8)]);
    code.extend([set(FOURTH, 6), set(FIFTH, ETHERNET), call(LOAD)]);
    code.jump(of(0x55, RESULT, 0, 0, 0), Label::Pass);
    code.extend(map(FIRST, stations));
    code.extend([copy(SECOND, STACK), add(SECOND, -8), call(LOOKUP)]);
    code.jump(of(0x15, RESULT, 0, 0, 0), Label::Pass);
    code.place(Label::Received);
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
    code.jump(of(0x55, RESULT, 0, 0, 0), Label::Own);
    // The address is on the stack. BPF_STX | BPF_MEM | BPF_W
    code.extend([read(FIRST, field::INTERFACE), of(0x63, STACK, FIRST, -20, 0)]);
    code.extend(map(FIRST, locals));
    code.extend([copy(SECOND, STACK), add(SECOND, -20), call(LOOKUP)]);
    code.jump(of(0x15, RESULT, 0, 0, 0), Label::Pass);
    code.place(Label::Own);
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
            IpAddr::V4(ip) => {
                frame.extend([0x45, 0, 0, 20, 0, 0, 0, 0, 64, 17, 0, 0]);
                frame.extend(ip.octets());
            }
            IpAddr::V6(ip) => {
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
        // A packet to another station may be for a bridge.
        let mut other = v4.clone();
        let mac = MacAddress([2, 0, 0, 0, 0, 9]);
        other[..6].copy_from_slice(&mac.0);
        assert!(passes(&other));
        let mut own = OwnAddresses { stations: [mac].into(), ..OwnAddresses::default() };
        guard.set_own(&own).unwrap();
        assert!(!passes(&other));
        // Own addresses of IPv6: of any link, and link-local ones of the link.
        let addresses = ["2001:db8::1", "fe80::1", "fe80::2"].map(|ip| ip.parse().unwrap());
        let [at_any, here, elsewhere] = addresses;
        own.v6 = [(7, at_any), (LOOPBACK_INDEX, here), (7, elsewhere)].into();
        guard.set_own(&own).unwrap();
        let from = |ip: Ipv6Addr| passes(&frame(0x86dd, &ip.to_string()));
        assert_eq!(addresses.map(from), [false, false, true]);
        own.v6 = [(8, at_any)].into();
        guard.set_own(&own).unwrap();
        assert_eq!(addresses.map(from), [false, true, true]);
        guard.set_own(&OwnAddresses::default()).unwrap();
        assert_eq!(addresses.map(from), [true; 3]);
        assert!(passes(&other));
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
