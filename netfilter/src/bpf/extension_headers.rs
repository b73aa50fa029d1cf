//! Walk over the extension headers of an IPv6 packet (RFC 8200 section 4), unrolled: programs of
//! this crate have forward jumps only.

use super::Instruction;
use super::assembly::{Assembly, GO, Start, add};

/// Number of headers that a walk reads: one more than the extension headers that it passes.
const HEADERS: u8 = 8;

/// Hop-by-hop options, routing, destination options: with a length in units of eight bytes, without
/// the first one.
const OPTIONS: [u8; 3] = [0, 43, 60];
const FRAGMENT: u8 = 44;
/// Authentication header: its length is in units of four bytes, without the first two (RFC 4302
/// section 2.2).
const AUTHENTICATION: u8 = 51;

/// Bits of the fragment offset.
const OFFSET: u16 = 0xfff8;

/// Jump targets inside a walk, by number of the header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum WalkLabel {
    /// A header of any kind.
    Header(u8),
    /// A fragment header.
    Fragment(u8),
    /// A header with options.
    Options(u8),
    /// An authentication header.
    Authentication(u8),
}

/// A walk. It begins with the first next header in the register `next`, and the offset after the
/// IPv6 header in the register `at`. At the targets they describe the header found. The registers
/// are callee-saved.
pub(crate) struct HeaderWalk<'a, L> {
    /// Register of the context.
    pub(crate) context: u8,
    /// Register of the offset, from the start of the outer IP header.
    pub(crate) at: u8,
    /// Register of the next header.
    pub(crate) next: u8,
    /// Place of 2 bytes on the stack.
    pub(crate) bytes: i16,
    /// Place of 8 bytes on the stack, where the last fragment header is left.
    pub(crate) fragment: i16,
    /// Next headers at which the walk ends, each with its label.
    pub(crate) targets: &'a [(u8, L)],
    /// Fragments other than the first one.
    pub(crate) later: L,
    /// Any other next header.
    pub(crate) other: L,
    /// The packet ends inside an extension header.
    pub(crate) short: L,
    /// There are more extension headers than the walk reads.
    pub(crate) too_many: L,
    /// Makes labels of the program for the jumps inside the walk.
    pub(crate) label: &'a dyn Fn(WalkLabel) -> L,
}

impl<L: Copy + Ord> HeaderWalk<'_, L> {
    /// Appends the walk to `code`. Every path ends in a jump.
    pub(crate) fn assemble(&self, code: &mut Assembly<L>) {
        /// Scratch register.
        const LENGTH: u8 = 1;
        const STACK: u8 = 10;
        let of = Instruction::new;
        let &Self { context, at, next, bytes, fragment, label, .. } = self;
        // BPF_JMP | BPF_JEQ | BPF_K; BPF_LDX | BPF_MEM | BPF_B
        let equal = |value: u8| of(0x15, next, 0, 0, value.into());
        let byte = |to, place| of(0x71, to, STACK, place, 0);
        // BPF_ALU64 | BPF_LSH | BPF_K, BPF_ADD | BPF_X
        let shift = |bits| of(0x67, LENGTH, 0, 0, bits);
        let advance = of(0x0f, at, LENGTH, 0, 0);
        for number in 0..HEADERS {
            code.place(label(WalkLabel::Header(number)));
            for (value, target) in self.targets {
                code.jump(equal(*value), *target);
            }
            code.jump(equal(FRAGMENT), label(WalkLabel::Fragment(number)));
            for header in OPTIONS {
                code.jump(equal(header), label(WalkLabel::Options(number)));
            }
            code.jump(equal(AUTHENTICATION), label(WalkLabel::Authentication(number)));
            code.jump(GO, self.other);

            code.place(label(WalkLabel::Fragment(number)));
            code.load_packet(context, (Start::Network, at), (8, fragment), self.short);
            // BPF_LDX | BPF_MEM | BPF_H; BPF_JMP | BPF_JSET | BPF_K
            code.push(of(0x69, LENGTH, STACK, fragment + 2, 0));
            code.jump(of(0x45, LENGTH, 0, 0, OFFSET.to_be().into()), self.later);
            code.extend([byte(next, fragment), add(at, 8)]);
            code.jump(GO, label(WalkLabel::Header(number + 1)));

            code.place(label(WalkLabel::Authentication(number)));
            code.load_packet(context, (Start::Network, at), (2, bytes), self.short);
            code.extend([byte(next, bytes), byte(LENGTH, bytes + 1), shift(2), advance]);
            code.push(add(at, 8));
            code.jump(GO, label(WalkLabel::Header(number + 1)));

            code.place(label(WalkLabel::Options(number)));
            code.load_packet(context, (Start::Network, at), (2, bytes), self.short);
            code.extend([byte(next, bytes), byte(LENGTH, bytes + 1), shift(3), advance]);
            code.push(add(at, 8));
        }
        code.place(label(WalkLabel::Header(HEADERS)));
        code.jump(GO, self.too_many);
    }
}
