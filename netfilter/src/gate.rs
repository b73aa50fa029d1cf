//! A gate at a link's egress: a BPF program that outlasts the process that attached it and every
//! flush of firewall rules. It goes with its link.
//!
//! ```text
//!  forwarded, or sent by the host ─► gate: came in by a link, without the mark, not by one that may? ─► drop
//!                                              │ no
//!                                              ▼
//!                                            link
//! ```
//!
//! Policy rules that do the same cost every packet of the host more: as soon as there is one, the
//! kernel looks routes and sources up in full, and has no hints from one packet to the next
//! (`fib4_has_custom_rules`, net/ipv4).
//!
//! Needs CAP_NET_ADMIN and CAP_BPF on the host itself; those of a user namespace do not count.
//! Attached through tcx (Linux 6.6), else through the qdisc `clsact`.

use crate::bpf::{Direction, Instruction, LinkProgram, detach_tcx, field, tcx_programs, verdict};
use std::io;

/// What lists of programs (bpftool-prog(8)) call it; at most 15 bytes.
const NAME: &str = "tg_gate";

/// What a gate lets pass besides what the host itself sends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GatePolicy {
    /// Packets that have `mark` in the bits of `mask` of their packet mark.
    Marked {
        /// The value.
        mark: u32,
        /// The bits that are compared.
        mask: u32,
    },
    /// Packets that came in by one of the links of these numbers.
    From(Vec<u32>),
}

/// The program, loaded.
#[derive(Debug)]
pub struct Gate(LinkProgram);

impl Gate {
    /// A gate that lets pass what the host itself sends, and what `policy` says.
    ///
    /// # Errors
    /// BPF programs are not available here: `EPERM` without the privilege.
    pub fn new(policy: &GatePolicy) -> io::Result<Self> {
        LinkProgram::load(NAME, Direction::Egress, &program(policy)).map(Self)
    }

    /// Whether a gate of the same policy is attached to the link numbered `index` of the calling
    /// thread's namespace.
    ///
    /// # Errors
    /// `ENODEV` without such a link.
    pub fn is_attached(&self, index: u32) -> io::Result<bool> {
        self.0.is_attached(index)
    }

    /// Attaches it to the link numbered `index` of the calling thread's namespace, ahead of what is
    /// there. If it is attached there already, nothing changes.
    ///
    /// # Errors
    /// `ENODEV` without such a link.
    pub fn attach(&self, index: u32) -> io::Result<()> {
        self.0.attach(index)
    }
}

/// How many programs are attached to the link numbered `index` of the calling thread's namespace:
/// for tests.
#[doc(hidden)]
pub fn count_programs(index: u32) -> io::Result<usize> {
    let count = |direction| tcx_programs(index, direction).map(|ids| ids.len());
    Ok(count(Direction::Ingress)? + count(Direction::Egress)?)
}

/// Detaches all programs from the link numbered `index` of the calling thread's namespace, gates
/// and port guards: for tests of what holds without them.
#[doc(hidden)]
pub fn detach_programs(index: u32) -> io::Result<()> {
    for direction in [Direction::Ingress, Direction::Egress] {
        for id in tcx_programs(index, direction)? {
            detach_tcx(index, direction, id)?;
        }
    }
    Ok(())
}

fn program(policy: &GatePolicy) -> Vec<Instruction> {
    const RESULT: u8 = 0;
    const CONTEXT: u8 = 1;
    const SCRATCH: u8 = 2;
    let of = Instruction::new;
    // BPF_LDX | BPF_MEM | BPF_W
    let load = |offset| of(0x61, SCRATCH, CONTEXT, offset, 0);
    // BPF_ALU64 | BPF_MOV | BPF_K
    let result = |verdict| of(0xb7, RESULT, 0, 0, verdict);
    // BPF_JMP32 | BPF_JEQ | BPF_K
    let equal = |value: u32| of(0x16, SCRATCH, 0, 0, value.cast_signed());
    let mut code = vec![result(verdict::NEXT), load(field::INGRESS_INTERFACE), equal(0)];
    match policy {
        GatePolicy::Marked { mark, mask } => {
            code.push(load(field::MARK));
            // BPF_ALU | BPF_AND | BPF_K
            code.push(of(0x54, SCRATCH, 0, 0, mask.cast_signed()));
            code.push(equal(mark & mask));
        }
        GatePolicy::From(links) => code.extend(links.iter().map(|link| equal(*link))),
    }
    code.push(result(verdict::DROP));
    let end = code.len();
    // BPF_JMP | BPF_EXIT
    code.push(of(0x95, 0, 0, 0, 0));
    for (at, one) in code.iter_mut().enumerate() {
        if one.is_conditional_jump() {
            *one = one.jumping((end - at - 1) as i16);
        }
    }
    code
}
