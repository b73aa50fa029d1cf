//! Assembly of eBPF programs: common instructions, and forward jumps to labels.

use super::Instruction;
use std::collections::BTreeMap;

/// `BPF_JMP | BPF_EXIT`.
pub(crate) const EXIT: Instruction = Instruction::new(0x95, 0, 0, 0, 0);

/// `BPF_JMP | BPF_JA`.
pub(crate) const GO: Instruction = Instruction::new(0x05, 0, 0, 0, 0);

/// `BPF_ALU64 | BPF_MOV` of a register.
pub(crate) const fn copy(to: u8, from: u8) -> Instruction {
    Instruction::new(0xbf, to, from, 0, 0)
}

/// `BPF_ALU64 | BPF_MOV` of a constant.
pub(crate) const fn set(to: u8, value: i32) -> Instruction {
    Instruction::new(0xb7, to, 0, 0, value)
}

/// `BPF_ALU64 | BPF_ADD` of a constant.
pub(crate) const fn add(to: u8, value: i32) -> Instruction {
    Instruction::new(0x07, to, 0, 0, value)
}

/// `BPF_JMP | BPF_CALL` of the helper with this number (`enum bpf_func_id`).
pub(crate) const fn call(helper: i32) -> Instruction {
    Instruction::new(0x85, 0, 0, 0, helper)
}

/// `BPF_LD | BPF_IMM | BPF_DW` with `BPF_PSEUDO_MAP_FD`, which takes two slots.
pub(crate) const fn map(to: u8, descriptor: i32) -> [Instruction; 2] {
    [Instruction::new(0x18, to, 1, 0, descriptor), Instruction::new(0, 0, 0, 0, 0)]
}

/// Registers of results and of call arguments.
const RESULT: u8 = 0;
const ARGUMENTS: [u8; 5] = [1, 2, 3, 4, 5];
/// The frame pointer.
const STACK: u8 = 10;

/// Start of an offset in a packet (`enum bpf_hdr_start_off`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Start {
    /// The Ethernet header.
    Ethernet = 0,
    /// The IP header.
    Network = 1,
}

/// A program with jumps to labels of type `L`.
pub(crate) struct Assembly<L> {
    code: Vec<Instruction>,
    /// Jumps with an unresolved distance: index of the instruction, target.
    jumps: Vec<(usize, L)>,
    places: BTreeMap<L, usize>,
}

impl<L: Copy + Ord> Assembly<L> {
    pub(crate) fn new() -> Self {
        Self { code: Vec::new(), jumps: Vec::new(), places: BTreeMap::new() }
    }

    pub(crate) fn push(&mut self, instruction: Instruction) {
        self.code.push(instruction);
    }

    pub(crate) fn extend(&mut self, instructions: impl IntoIterator<Item = Instruction>) {
        self.code.extend(instructions);
    }

    /// Adds the jump `instruction` to `label`, which is placed later.
    pub(crate) fn jump(&mut self, instruction: Instruction, label: L) {
        self.jumps.push((self.code.len(), label));
        self.code.push(instruction);
    }

    /// Places `label` before the next instruction.
    pub(crate) fn place(&mut self, label: L) {
        self.places.insert(label, self.code.len());
    }

    /// Loads `length` bytes of the packet to the stack, from the offset in register `at`: also of
    /// packets whose headers are not linear (`bpf_skb_load_bytes_relative`, Linux 4.18). Jumps to
    /// `short` if the packet ends before. `context` is the register of the context. Overwrites the
    /// registers 0 to 5.
    pub(crate) fn load_packet(
        &mut self,
        context: u8,
        (start, at): (Start, u8),
        (length, stack): (i32, i16),
        short: L,
    ) {
        const LOAD: i32 = 68;
        let [first, second, third, fourth, fifth] = ARGUMENTS;
        self.extend([copy(first, context), copy(second, at), copy(third, STACK)]);
        self.extend([add(third, stack.into()), set(fourth, length), set(fifth, start as i32)]);
        self.push(call(LOAD));
        // BPF_JMP | BPF_JNE | BPF_K
        self.jump(Instruction::new(0x55, RESULT, 0, 0, 0), short);
    }

    /// Resolves the jumps.
    pub(crate) fn finish(mut self) -> Vec<Instruction> {
        for (from, label) in self.jumps {
            // Programs are far shorter than 32,767 instructions.
            let distance = (self.places[&label] - from - 1) as i16;
            self.code[from] = self.code[from].with_offset(distance);
        }
        self.code
    }
}
