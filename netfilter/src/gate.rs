//! Egress gates. A gate is a BPF program at the egress of a link. It persists after its process
//! exits and survives every flush of firewall rules; the kernel removes it together with the link.
//!
//! ```text
//!  forwarded, or sent by the host ─► gate: received on a link, and not allowed by the policy? ─► drop
//!                                              │ no
//!                                              ▼
//!                                            link
//! ```
//!
//! A packet without an ingress interface is not always one of the host: the kernel may reassemble a
//! forwarded IPv6 packet and fragment it again, and these fragments have none (`ip6_fragment`,
//! net/ipv6; IPv4 copies it). The fragments of the host belong to a socket. A gate therefore drops
//! IPv6 packets with extension headers that have neither.
//!
//! Policy routing rules with the same effect slow down every packet of the host. As soon as one
//! custom rule exists, the kernel does full route and source lookups and loses the hints that it
//! otherwise keeps between packets (`fib4_has_custom_rules`, net/ipv4).
//!
//! Gates need CAP_NET_ADMIN and CAP_BPF in the initial user namespace; capabilities in a child user
//! namespace are not sufficient. They are attached through tcx (Linux 6.6) if available, otherwise
//! through the `clsact` qdisc.

use crate::bpf::assembly::{Assembly, EXIT, GO, add, call, copy, set};
use crate::bpf::clsact::{Attached, Clsact};
use crate::bpf::{Direction, Instruction, LinkProgram, detach_tcx, field, tcx_programs, verdict};
use crate::guard;
use std::io;

/// Name of the program in bpftool-prog(8); at most 15 bytes.
const NAME: &str = "tg_gate";

/// Condition under which a gate passes a forwarded packet. Packets sent by the host always pass.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GatePolicy {
    /// The packet mark, masked with `mask`, equals `mark`.
    Marked {
        /// Expected value of the masked bits.
        mark: u32,
        /// Bits of the packet mark to compare.
        mask: u32,
    },
    /// The packet was received on one of the links with these interface indexes.
    From(Vec<u32>),
}

/// A loaded egress gate.
#[derive(Debug)]
pub struct Gate(LinkProgram);

impl Gate {
    /// Loads a gate that passes packets sent by the host and packets that satisfy `policy`.
    ///
    /// # Errors
    /// BPF programs are unavailable, or the kernel is older than Linux 5.1; `EPERM` without the
    /// required capabilities.
    pub fn new(policy: &GatePolicy) -> io::Result<Self> {
        LinkProgram::load(NAME, Direction::Egress, &program(policy)).map(Self)
    }

    /// Returns whether a gate with the same policy is attached to the link with interface index
    /// `index` in the calling thread's network namespace.
    ///
    /// # Errors
    /// `ENODEV` if the link does not exist.
    pub fn is_attached(&self, index: u32) -> io::Result<bool> {
        self.0.is_attached(index)
    }

    /// Attaches the gate to the link with interface index `index` in the calling thread's network
    /// namespace, ahead of existing programs. Does nothing if it is already attached.
    ///
    /// # Errors
    /// `ENODEV` if the link does not exist.
    pub fn attach(&self, index: u32) -> io::Result<()> {
        self.0.attach(index)
    }
}

/// Counts the programs attached to the link with interface index `index` in the calling thread's
/// network namespace. For tests.
#[doc(hidden)]
pub fn count_programs(index: u32) -> io::Result<usize> {
    let mut count = 0;
    for direction in [Direction::Ingress, Direction::Egress] {
        count += tcx_programs(index, direction)?.len();
        let names = [guard::NAME, guard::BRIDGE_NAME, NAME];
        for name in names {
            let attached = Clsact::open()?.attached(index, direction, name)?;
            count += usize::from(matches!(attached, Some(Attached::Program(_))));
        }
    }
    Ok(count)
}

/// Detaches all programs, gates and port guards, from the link with interface index `index` in the
/// calling thread's network namespace. For tests that run without them.
#[doc(hidden)]
pub fn detach_programs(index: u32) -> io::Result<()> {
    for direction in [Direction::Ingress, Direction::Egress] {
        for id in tcx_programs(index, direction)? {
            detach_tcx(index, direction, id)?;
        }
    }
    Clsact::open()?.delete(index)
}

fn program(policy: &GatePolicy) -> Vec<Instruction> {
    const RESULT: u8 = 0;
    const FIRST: u8 = 1;
    const SCRATCH: u8 = 2;
    const THIRD: u8 = 3;
    const FOURTH: u8 = 4;
    const FIFTH: u8 = 5;
    const CONTEXT: u8 = 6;
    const STACK: u8 = 10;
    /// `bpf_skb_load_bytes_relative`, from `BPF_HDR_START_NET`.
    const LOAD: i32 = 68;
    const NETWORK: i32 = 1;
    const IPV6: u16 = 0x86dd;
    /// Offset of the next header in the IPv6 header.
    const NEXT_HEADER: i32 = 6;
    /// Those that can precede a fragment header, and the fragment header itself (RFC 8200 section
    /// 4.5): hop-by-hop options, routing, fragment, destination options.
    const EXTENSIONS: [u32; 4] = [0, 43, 44, 60];
    #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
    enum Label {
        Pass,
        Drop,
        Host,
    }
    let of = Instruction::new;
    // BPF_LDX | BPF_MEM | BPF_W
    let load = |offset| of(0x61, SCRATCH, CONTEXT, offset, 0);
    // BPF_JMP32 | BPF_JEQ | BPF_K
    let equal = |value: u32| of(0x16, SCRATCH, 0, 0, value.cast_signed());
    let mut code = Assembly::new();
    code.extend([copy(CONTEXT, FIRST), load(field::INGRESS_INTERFACE)]);
    code.jump(equal(0), Label::Host);
    match policy {
        GatePolicy::Marked { mark, mask } => {
            code.push(load(field::MARK));
            // BPF_ALU | BPF_AND | BPF_K
            code.push(of(0x54, SCRATCH, 0, 0, mask.cast_signed()));
            code.jump(equal(mark & mask), Label::Pass);
        }
        GatePolicy::From(links) => {
            links.iter().for_each(|link| code.jump(equal(*link), Label::Pass));
        }
    }
    code.jump(GO, Label::Drop);
    code.place(Label::Host);
    // BPF_LDX | BPF_MEM | BPF_DW; BPF_JMP | BPF_JNE | BPF_K
    code.push(of(0x79, SCRATCH, CONTEXT, field::SOCKET, 0));
    code.jump(of(0x55, SCRATCH, 0, 0, 0), Label::Pass);
    code.push(load(field::PROTOCOL));
    code.jump(of(0x55, SCRATCH, 0, 0, IPV6.to_be().into()), Label::Pass);
    code.extend([copy(FIRST, CONTEXT), set(SCRATCH, NEXT_HEADER), copy(THIRD, STACK)]);
    code.extend([add(THIRD, -1), set(FOURTH, 1), set(FIFTH, NETWORK), call(LOAD)]);
    code.jump(of(0x55, RESULT, 0, 0, 0), Label::Drop);
    // BPF_LDX | BPF_MEM | BPF_B
    code.push(of(0x71, SCRATCH, STACK, -1, 0));
    EXTENSIONS.iter().for_each(|header| code.jump(equal(*header), Label::Drop));
    code.place(Label::Pass);
    code.extend([set(RESULT, verdict::NEXT), EXIT]);
    code.place(Label::Drop);
    code.extend([set(RESULT, verdict::DROP), EXIT]);
    code.finish()
}
