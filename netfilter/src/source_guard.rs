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
//! | VLAN tag | pass: it is for a VLAN device, which has a guard of its own |
//! | unicast to another MAC address | pass: the host does not process it, a macvlan or a bridge may |
//! | source in a prefix | drop |
//! | anything else | pass |
//!
//! Programs need tcx (Linux 6.6), because a `clsact` qdisc on a link of other software could not be
//! removed safely.

use crate::bpf::{
    Direction, Instruction, PrefixSet, Program, detach_stale, detach_tcx, field, tcx_programs,
    verdict,
};
use ipnet::IpNet;
use std::collections::BTreeSet;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};
use tidegate_model::{Feature, LOOPBACK_INDEX, registry};

/// Start of the name of a program, before the hash of its owner.
const PREFIX: &str = "tg_src_";

/// Maximum number of prefixes per family.
const CAPACITY: u32 = 4_096;

/// The source guards of one owner.
#[derive(Debug)]
pub struct SourceGuard {
    name: String,
    program: Program,
    /// IPv4, IPv6.
    prefixes: [PrefixSet; 2],
    refused: Mutex<BTreeSet<IpNet>>,
}

impl SourceGuard {
    /// Loads the program of `owner`, without prefixes.
    ///
    /// # Errors
    /// `EPERM` without CAP_BPF and CAP_NET_ADMIN in the initial user namespace; `EINVAL` before
    /// Linux 6.6.
    pub fn new(owner: &str) -> io::Result<Self> {
        if Feature::Tcx.is_forced_off() || Feature::BpfGuards.is_forced_off() {
            return Err(io::ErrorKind::Unsupported.into());
        }
        tcx_programs(LOOPBACK_INDEX, Direction::Ingress)?;
        let prefixes =
            [PrefixSet::new("tg_src_v4", 4, CAPACITY)?, PrefixSet::new("tg_src_v6", 16, CAPACITY)?];
        let hash = registry::folded_hash(owner.as_bytes()) as u32;
        let name = format!("{PREFIX}{hash:08x}");
        let code = program(prefixes[0].descriptor(), prefixes[1].descriptor());
        let program = Program::load(&name, &code)?;
        Ok(Self { name, program, prefixes, refused: Mutex::default() })
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
        self.program.attach_tcx(index, Direction::Ingress)?;
        detach_stale(index, Direction::Ingress, &self.name, self.program.id)
    }

    /// Returns whether this guard is attached to the link with interface index `index` in the
    /// calling thread's network namespace.
    ///
    /// # Errors
    /// `ENODEV` if the link does not exist.
    pub fn is_attached(&self, index: u32) -> io::Result<bool> {
        Ok(tcx_programs(index, Direction::Ingress)?.contains(&self.program.id))
    }

    /// Detaches the guard, and that of a previous process.
    ///
    /// # Errors
    /// `ENODEV` if the link does not exist.
    pub fn detach(&self, index: u32) -> io::Result<()> {
        detach_stale(index, Direction::Ingress, &self.name, self.program.id)?;
        match detach_tcx(index, Direction::Ingress, self.program.id) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            detached => detached,
        }
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
fn program(v4: i32, v6: i32) -> Vec<Instruction> {
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
    let of = Instruction::new;
    let copy = |to, from| of(0xbf, to, from, 0, 0);
    let set = |to, value| of(0xb7, to, 0, 0, value);
    let add = |to, value| of(0x07, to, 0, 0, value);
    let read = |to, offset| of(0x61, to, CONTEXT, offset, 0);
    let call = |helper| of(0x85, 0, 0, 0, helper);
    let exit = of(0x95, 0, 0, 0, 0);
    let map = |to, descriptor| [of(0x18, to, 1, 0, descriptor), of(0, 0, 0, 0, 0)];
    #[derive(Clone, Copy, PartialEq)]
    enum Label {
        Pass,
        V6,
        Found,
    }
    let mut code: Vec<Instruction> = Vec::new();
    let mut jumps: Vec<(usize, Label)> = Vec::new();
    let mut jump = |code: &mut Vec<Instruction>, instruction: Instruction, to: Label| {
        jumps.push((code.len(), to));
        code.push(instruction);
    };
    code.push(copy(CONTEXT, FIRST));
    code.push(read(FIRST, field::VLAN_PRESENT));
    // BPF_JMP | BPF_JNE | BPF_K, BPF_JEQ
    jump(&mut code, of(0x55, FIRST, 0, 0, 0), Label::Pass);
    code.push(read(FIRST, field::PACKET_TYPE));
    jump(&mut code, of(0x15, FIRST, 0, 0, OTHER_HOST), Label::Pass);
    code.push(read(FIRST, field::PROTOCOL));
    jump(&mut code, of(0x15, FIRST, 0, 0, IPV6.to_be().into()), Label::V6);
    jump(&mut code, of(0x55, FIRST, 0, 0, IPV4.to_be().into()), Label::Pass);
    // The key: prefix length, address.
    let look = |code: &mut Vec<Instruction>,
                jump: &mut dyn FnMut(&mut Vec<Instruction>, Instruction, Label),
                at: i32,
                length: i32,
                trie: i32| {
        let key = -(4 + length);
        code.extend([copy(FIRST, CONTEXT), set(SECOND, at), copy(THIRD, STACK)]);
        code.extend([add(THIRD, -length), set(FOURTH, length), set(FIFTH, NETWORK), call(LOAD)]);
        jump(code, of(0x55, RESULT, 0, 0, 0), Label::Pass);
        // BPF_ST | BPF_MEM | BPF_W
        code.push(of(0x62, STACK, 0, key as i16, 8 * length));
        code.extend(map(FIRST, trie));
        code.extend([copy(SECOND, STACK), add(SECOND, key), call(LOOKUP)]);
    };
    look(&mut code, &mut jump, 12, 4, v4);
    // BPF_JMP | BPF_JA
    jump(&mut code, of(0x05, 0, 0, 0, 0), Label::Found);
    let at_v6 = code.len();
    look(&mut code, &mut jump, 8, 16, v6);
    let found = code.len();
    jump(&mut code, of(0x15, RESULT, 0, 0, 0), Label::Pass);
    code.extend([set(RESULT, verdict::DROP), exit]);
    let pass = code.len();
    code.extend([set(RESULT, verdict::NEXT), exit]);
    for (at, to) in jumps {
        let target = match to {
            Label::Pass => pass,
            Label::V6 => at_v6,
            Label::Found => found,
        };
        code[at] = code[at].with_offset((target - at - 1) as i16);
    }
    code
}

#[cfg(test)]
mod tests {
    use super::*;

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
        let guard = SourceGuard::new("test").unwrap();
        let passes = |frame: &[u8]| guard.program.test_run(frame, 1).unwrap().0 == verdict::NEXT;
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
        guard.permit(net4).unwrap();
        guard.permit(net4).unwrap();
        assert!(passes(&v4) && !passes(&v6) && !guard.refuses(net4));
    }
}
