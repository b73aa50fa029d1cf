//! Compilation of rules to eBPF and classic BPF, through a common intermediate representation.
//! Pure.
//!
//! The steps follow classic BPF: loads at an offset of the frame, comparisons with a constant,
//! forward jumps. In classic BPF a load beyond the end of the frame terminates the program with 0,
//! which means "accept". The steps therefore compare the length first.
//!
//! eBPF has the same loads (`BPF_LD | BPF_ABS`), but implements each as a function call
//! (`bpf_gen_ld_abs`). The eBPF program uses direct packet access instead, after it has linearised
//! the part that the rules read (`bpf_skb_pull_data`).

use super::rules::{DEFAULT_VERDICT, Rule, SpoofReason, Test, Verdict};
use crate::bpf::assembly::{Assembly, EXIT, GO, add, call, copy, map, set};
use crate::bpf::clsact::Classic;
use crate::bpf::{Instruction, field, verdict};

/// Length of the Ethernet header. Every frame has one (`eth_type_trans`).
const ETHERNET: u16 = 14;

/// Width of a load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Width {
    Byte,
    Half,
    Word,
}

impl Width {
    const fn bytes(self) -> usize {
        match self {
            Self::Byte => 1,
            Self::Half => 2,
            Self::Word => 4,
        }
    }

    /// `BPF_LD | BPF_ABS` of that width, in classic BPF.
    const fn classic_load(self) -> u16 {
        match self {
            Self::Byte => 0x30,
            Self::Half => 0x28,
            Self::Word => 0x20,
        }
    }

    /// `BPF_LDX | BPF_MEM` of that width, in eBPF.
    const fn extended_load(self) -> u8 {
        match self {
            Self::Byte => 0x71,
            Self::Half => 0x69,
            Self::Word => 0x61,
        }
    }

    /// Converts `constant` from network byte order to the result of a direct load of this width.
    fn as_loaded(self, constant: u32) -> u32 {
        match self {
            Self::Byte => constant,
            Self::Half => (constant as u16).to_be().into(),
            Self::Word => constant.to_be(),
        }
    }
}

/// Identifier of a jump target.
type Label = usize;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// Loads part of the frame into the accumulator.
    Load(Width, u16),
    /// Sets the accumulator to a non-zero value if the frame had a VLAN tag.
    Tagged,
    /// Jumps if the accumulator equals the constant, or differs from it. The width is that of the
    /// preceding load.
    IfEqual(Width, u32, Label),
    IfDifferent(Width, u32, Label),
    /// Jumps if the frame has fewer bytes than the constant.
    IfShorter(u16, Label),
    /// Masks the accumulator.
    And(u8),
    /// Defines a label.
    Define(Label),
    Jump(Label),
    End(Verdict),
}

/// Compiles `rules` to steps. The verdict is `otherwise` if no rule matches. `labels` counts the
/// labels in use.
fn steps(rules: &[Rule], otherwise: Verdict, labels: &mut Label) -> Vec<Step> {
    let mut steps = Vec::new();
    if !tree(rules, 0, ETHERNET, labels, &mut steps) {
        steps.push(Step::End(otherwise));
    }
    steps
}

/// Compiles the tests of `rules` from number `depth` on, in frames of at least `known` bytes.
/// Adjacent rules with the same next test share it. Returns whether one of the rules always
/// matches. The steps otherwise continue behind the last one if no rule matches.
fn tree(
    mut rules: &[Rule],
    depth: usize,
    known: u16,
    labels: &mut Label,
    steps: &mut Vec<Step>,
) -> bool {
    while let Some(rule) = rules.first() {
        let Some(test) = rule.tests.get(depth) else {
            steps.push(Step::End(rule.verdict));
            // The verifier rejects unreachable instructions (`check_cfg`), such as those of the
            // other rules.
            return true;
        };
        let others = rules.iter().position(|other| other.tests.get(depth) != Some(test));
        let (same, others) = rules.split_at(others.unwrap_or(rules.len()));
        let mismatch = *labels;
        *labels += 1;
        let end = match test {
            Test::Bits { at, .. } => at + 1,
            Test::Bytes { at, value, .. } => at + value.len() as u16,
            Test::Tagged => 0,
        };
        if end > known {
            steps.push(Step::IfShorter(end, mismatch));
        }
        match test {
            Test::Bits { at, value, mask } => {
                steps.extend([Step::Load(Width::Byte, *at), Step::And(*mask)]);
                steps.push(Step::IfDifferent(Width::Byte, (*value).into(), mismatch));
            }
            Test::Tagged => {
                steps.extend([Step::Tagged, Step::IfEqual(Width::Word, 0, mismatch)]);
            }
            Test::Bytes { at, value, not } => compare(*at, value, *not, mismatch, labels, steps),
        }
        tree(same, depth + 1, known.max(end), labels, steps);
        steps.push(Step::Define(mismatch));
        rules = others;
    }
    false
}

/// Compiles `rules` to steps. Accepted frames that pass one of the `policed` tests are policed.
fn policed_steps(rules: &[Rule], policed: &[Vec<Test>]) -> Vec<Step> {
    let mut labels = 0;
    let mut all = steps(rules, DEFAULT_VERDICT, &mut labels);
    // The verifier rejects unreachable instructions.
    if policed.is_empty() || !all.contains(&Step::End(Verdict::Accept)) {
        return all;
    }
    let police = labels;
    labels += 1;
    for step in &mut all {
        if *step == Step::End(Verdict::Accept) {
            *step = Step::Jump(police);
        }
    }
    all.push(Step::Define(police));
    let rule = |tests: &Vec<Test>| Rule { tests: tests.clone(), verdict: Verdict::Police };
    let policed: Vec<Rule> = policed.iter().map(rule).collect();
    all.extend(steps(&policed, Verdict::Accept, &mut labels));
    all
}

/// Compares the bytes at `at` with `value`. Jumps to `mismatch` if they differ, or with `not` if
/// they are equal.
fn compare(
    at: u16,
    value: &[u8],
    not: bool,
    mismatch: Label,
    labels: &mut Label,
    steps: &mut Vec<Step>,
) {
    let differs = *labels;
    let mut rest = value;
    let mut at = at;
    while !rest.is_empty() {
        let width = match rest.len() {
            1 => Width::Byte,
            2 | 3 => Width::Half,
            _ => Width::Word,
        };
        let (now, later) = rest.split_at(width.bytes());
        let constant = now.iter().fold(0, |all, byte| all << 8 | u32::from(*byte));
        let load = Step::Load(width, at);
        // A comparison preserves the accumulator.
        if !matches!(steps[..], [.., before, Step::IfEqual(..) | Step::IfDifferent(..)] if before == load)
        {
            steps.push(load);
        }
        steps.push(match (not, later.is_empty()) {
            (false, _) => Step::IfDifferent(width, constant, mismatch),
            (true, false) => Step::IfDifferent(width, constant, differs),
            (true, true) => Step::IfEqual(width, constant, mismatch),
        });
        at += width.bytes() as u16;
        rest = later;
    }
    if steps.iter().any(|step| matches!(step, Step::IfDifferent(_, _, label) if *label == differs))
    {
        steps.push(Step::Define(differs));
        *labels += 1;
    }
}

/// eBPF registers: result, call arguments, callee-saved registers (context, start and end of the
/// frame), stack.
mod register {
    pub(super) const RESULT: u8 = 0;
    pub(super) const FIRST: u8 = 1;
    pub(super) const SECOND: u8 = 2;
    pub(super) const THIRD: u8 = 3;
    pub(super) const CONTEXT: u8 = 6;
    pub(super) const BEGIN: u8 = 7;
    pub(super) const END: u8 = 8;
    /// Reused once the frame is no longer needed.
    pub(super) const INTERVAL: u8 = BEGIN;
    pub(super) const NOW: u8 = END;
    pub(super) const STACK: u8 = 10;
}

/// Jumps with an unresolved distance: index of the instruction, target label.
type Pending = Vec<(usize, Label)>;

/// Compiles to eBPF. The program counts drops by reason in an array map with [`COUNTERS`] entries,
/// which it needs before it is loaded ([`Instruction::with_map`]).
///
/// Accepted frames that match a `policed` test are dropped in excess of a rate, which is also
/// stored in the array ([`INTERVAL`]). The policer is GCRA (ITU-T I.371, annex A): [`DUE`] is the
/// theoretical arrival time of the next frame, with a tolerance of [`BURST`] intervals.
pub(super) fn extended(rules: &[Rule], policed: &[Vec<Test>]) -> Vec<Instruction> {
    use register::{BEGIN, CONTEXT, END, FIRST, RESULT, SECOND, STACK};
    let of = Instruction::new;
    let steps = policed_steps(rules, policed);
    let polices = steps.contains(&Step::End(Verdict::Police));
    let longest = steps.iter().map(|step| match step {
        Step::IfShorter(length, _) => *length,
        _ => ETHERNET,
    });
    let longest = longest.max().unwrap_or(ETHERNET);
    // BPF_LDX | BPF_MEM | BPF_W
    let read = |to, offset| of(0x61, to, CONTEXT, offset, 0);
    // BPF_JMP | BPF_JGT | BPF_X: jumps if FIRST is beyond the end of the frame.
    let beyond = |offset| of(0x2d, FIRST, END, offset, 0);
    let (count, police, accept) = (Label::MAX, Label::MAX - 1, Label::MAX - 2);
    let mut code = Assembly::new();
    code.extend([
        copy(CONTEXT, FIRST),
        read(BEGIN, field::DATA),
        read(END, field::DATA_END),
        // Pulls the whole frame if it is shorter.
        set(SECOND, longest.into()),
        read(RESULT, field::LENGTH),
        // BPF_JMP | BPF_JGE | BPF_X
        of(0x3d, RESULT, SECOND, 1, 0),
        copy(SECOND, RESULT),
        copy(FIRST, BEGIN),
        // BPF_ALU64 | BPF_ADD | BPF_X
        of(0x0f, FIRST, SECOND, 0, 0),
        // BPF_JMP | BPF_JLE | BPF_X: skips the call, which may copy the frame, if the part that the
        // rules read is linear.
        of(0xbd, FIRST, END, 4, 0),
        copy(FIRST, CONTEXT),
        // bpf_skb_pull_data
        call(39),
        read(BEGIN, field::DATA),
        read(END, field::DATA_END),
        copy(FIRST, BEGIN),
        add(FIRST, ETHERNET.into()),
    ]);
    // For the verifier: no frame is shorter than an Ethernet header.
    code.extend([beyond(1), of(0x05, 0, 0, 2, 0), set(RESULT, verdict::DROP), EXIT]);
    for step in steps {
        // BPF_JMP32 | BPF_K
        let compare = |operation: u8, width: Width, constant| {
            of(operation | 0x06, RESULT, 0, 0, width.as_loaded(constant).cast_signed())
        };
        match step {
            Step::Load(width, at) => {
                code.push(of(width.extended_load(), RESULT, BEGIN, at.cast_signed(), 0));
            }
            // BPF_ALU | BPF_AND | BPF_K
            Step::And(bits) => code.push(of(0x54, RESULT, 0, 0, bits.into())),
            Step::Tagged => code.push(read(RESULT, field::VLAN_PRESENT)),
            // BPF_JEQ, BPF_JNE
            Step::IfEqual(width, constant, label) => {
                code.jump(compare(0x10, width, constant), label);
            }
            Step::IfDifferent(width, constant, label) => {
                code.jump(compare(0x50, width, constant), label);
            }
            Step::IfShorter(length, label) => {
                code.extend([copy(FIRST, BEGIN), add(FIRST, length.into())]);
                // BPF_JMP | BPF_JLE | BPF_X: skips the jump. The verifier follows the branch that
                // is not taken first, here the one without knowledge of the length. It then prunes
                // all other paths to the label, where they know more. The opposite order takes six
                // times as long.
                code.push(of(0xbd, FIRST, END, 1, 0));
                code.jump(GO, label);
            }
            Step::Define(label) => code.place(label),
            Step::Jump(label) => code.jump(GO, label),
            Step::End(Verdict::Accept) => code.extend([set(RESULT, verdict::NEXT), EXIT]),
            Step::End(Verdict::Police) => code.jump(GO, police),
            Step::End(Verdict::Drop(reason)) => {
                code.push(set(FIRST, reason as i32));
                code.jump(GO, count);
            }
        }
    }
    // Looks up the array entry with index FIRST: stores the index on the stack (BPF_STX | BPF_MEM |
    // BPF_W), loads the map (BPF_LD | BPF_IMM | BPF_DW with BPF_PSEUDO_MAP_FD, two instructions
    // long) and calls bpf_map_lookup_elem.
    let [load, second] = map(FIRST, 0);
    let find = [
        of(0x63, STACK, FIRST, -4, 0),
        copy(SECOND, STACK),
        add(SECOND, -4),
        load,
        second,
        call(1),
    ];
    // BPF_JMP | BPF_JEQ | BPF_K: jumps if the register is zero.
    let is_zero = |register, offset| of(0x15, register, 0, offset, 0);
    if polices {
        use register::{INTERVAL as EVERY, NOW};
        // BPF_LDX | BPF_MEM | BPF_DW
        let load = |to, from| of(0x79, to, from, 0, 0);
        code.place(police);
        code.push(set(FIRST, INTERVAL as i32));
        code.extend(find);
        code.jump(is_zero(RESULT, 0), accept);
        code.push(load(EVERY, RESULT));
        code.jump(is_zero(EVERY, 0), accept);
        // bpf_ktime_get_ns
        code.extend([call(5), copy(NOW, RESULT), set(FIRST, DUE as i32)]);
        code.extend(find);
        code.jump(is_zero(RESULT, 0), accept);
        code.extend([
            load(FIRST, RESULT),
            // Lower bound of the arrival time: now minus the burst. BPF_ALU64 | BPF_MUL | BPF_K,
            // BPF_ALU64 | BPF_SUB | BPF_X
            copy(SECOND, EVERY),
            of(0x27, SECOND, 0, 0, BURST),
            copy(register::THIRD, NOW),
            of(0x1f, register::THIRD, SECOND, 0, 0),
            // BPF_JMP | BPF_JGE | BPF_X
            of(0x3d, FIRST, register::THIRD, 1, 0),
            copy(FIRST, register::THIRD),
            // BPF_JMP | BPF_JGT | BPF_X: the frame is too early; skips the update and the accept.
            of(0x2d, FIRST, NOW, 4, 0),
            // BPF_ALU64 | BPF_ADD | BPF_X; BPF_STX | BPF_MEM | BPF_DW
            of(0x0f, FIRST, EVERY, 0, 0),
            of(0x7b, RESULT, FIRST, 0, 0),
        ]);
        code.place(accept);
        code.extend([set(RESULT, verdict::NEXT), EXIT, set(FIRST, POLICED as i32)]);
    }
    code.place(count);
    code.extend(find);
    code.extend([
        // Skips the next two instructions.
        is_zero(RESULT, 2),
        set(FIRST, 1),
        // BPF_STX | BPF_ATOMIC | BPF_DW, BPF_ADD
        of(0xdb, RESULT, FIRST, 0, 0),
        set(RESULT, verdict::DROP),
        EXIT,
    ]);
    code.finish()
}

/// Compiles to classic BPF. The program has no counters; the qdisc counts all drops in one sum.
pub(super) fn classic(rules: &[Rule]) -> Vec<Classic> {
    /// `SKF_AD_OFF + SKF_AD_VLAN_TAG_PRESENT`.
    const VLAN_PRESENT: u32 = 0xffff_f000 + 48;
    let of = |code, jumps, k| Classic { code, jumps, k };
    let mut code = Vec::new();
    let mut pending = Pending::new();
    let mut places = std::collections::BTreeMap::new();
    for step in steps(rules, DEFAULT_VERDICT, &mut 0) {
        // Conditional jumps have 8-bit distances. Each one therefore only skips, or does not skip,
        // an unconditional jump.
        let mut jump = |operation, jumps, constant, label, code: &mut Vec<Classic>| {
            code.push(of(operation, jumps, constant));
            pending.push((code.len(), label));
            // BPF_JMP | BPF_JA
            code.push(of(0x05, [0, 0], 0));
        };
        match step {
            Step::Load(width, at) => code.push(of(width.classic_load(), [0, 0], at.into())),
            // BPF_ALU | BPF_AND | BPF_K
            Step::And(bits) => code.push(of(0x54, [0, 0], bits.into())),
            Step::Tagged => code.push(of(0x20, [0, 0], VLAN_PRESENT)),
            // BPF_JEQ, BPF_JGE (negated: "shorter")
            Step::IfEqual(_, constant, label) => jump(0x15, [0, 1], constant, label, &mut code),
            Step::IfDifferent(_, constant, label) => jump(0x15, [1, 0], constant, label, &mut code),
            Step::IfShorter(length, label) => {
                // BPF_LD | BPF_W | BPF_LEN
                code.push(of(0x80, [0, 0], 0));
                jump(0x35, [1, 0], length.into(), label, &mut code);
            }
            Step::Define(label) => drop(places.insert(label, code.len())),
            Step::Jump(label) => {
                pending.push((code.len(), label));
                // BPF_JMP | BPF_JA
                code.push(of(0x05, [0, 0], 0));
            }
            // BPF_RET | BPF_K
            Step::End(end) => code.push(of(0x06, [0, 0], result(end))),
        }
    }
    for (from, label) in pending {
        code[from].k = (places[&label] - from - 1) as u32;
    }
    code
}

fn result(end: Verdict) -> u32 {
    match end {
        Verdict::Accept | Verdict::Police => verdict::NEXT.cast_unsigned(),
        Verdict::Drop(_) => verdict::DROP.cast_unsigned(),
    }
}

/// Array index of the frames dropped by the policer. Indexes below it count [`SpoofReason::ALL`].
pub(super) const POLICED: u32 = SpoofReason::ALL.len() as u32;
/// Array index of the interval between policed frames, in nanoseconds; 0 while the policer is off.
pub(super) const INTERVAL: u32 = POLICED + 1;
/// Array index of the theoretical arrival time of the next policed frame, on the monotonic clock.
pub(super) const DUE: u32 = INTERVAL + 1;
/// Length of the array.
pub(super) const COUNTERS: u32 = DUE + 1;

/// Burst tolerance of the policer, in frames.
pub(super) const BURST: i32 = 32;
