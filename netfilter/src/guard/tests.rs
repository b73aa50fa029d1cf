//! Back ends compared with the rule list.

use super::compile::{classic, extended};
use super::rules::tests::{MAC, ethernet_to, packet_v4, packet_v6, policy, verdict};
use super::rules::{PortPolicy, Rule, Verdict, policed, rules};
use super::with_counters;
use crate::bpf::clsact::Classic;
use crate::bpf::{Counters, Program, verdict as code};

/// A linear congruential generator (Knuth, MMIX), for reproducible frames.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % limit
    }

    fn pick<'a, T: ?Sized>(&mut self, from: &[&'a T]) -> &'a T {
        from[self.below(from.len())]
    }

    /// Generates an almost valid frame: fields of the endpoint, some of them altered or truncated.
    fn frame(&mut self) -> Vec<u8> {
        let mac = if self.below(8) == 0 { [2, 0, 0, 0, 0, 9] } else { MAC };
        let to = *self.pick(&[
            &[0xff; 6],
            &[0xff; 6],
            &[1, 0x80, 0xc2, 0, 0, 0x0e],
            &[1, 0x80, 0xc2, 0, 0, 0x10],
        ]);
        let ethernet = |mac, ethertype, payload: &[u8]| ethernet_to(to, mac, ethertype, payload);
        let ethertype = *self.pick(&[&[8, 0], &[8, 6], &[0x86, 0xdd], &[0x86, 0xdd], &[0x81, 0]]);
        let source = self.pick(&["fd09::7", "fd09::8", "fe80::ff:fe00:7", "::", "::1"]);
        let next = *self.pick(&[&0_u8, &6, &17, &43, &44, &51, &58, &58, &58, &60]);
        let mut payload: Vec<u8> = (0..40).map(|_| self.below(256) as u8).collect();
        payload[0] = *self.pick(&[&58_u8, &6, &60, &128, &133, &134, &135, &136, &137, &143]);
        payload[1] = 0;
        if self.below(2) == 0 {
            payload[8..24]
                .copy_from_slice(&"fd09::7".parse::<std::net::Ipv6Addr>().unwrap().octets());
            payload[24..26].copy_from_slice(&[self.below(3) as u8, 1]);
            payload[26..32].copy_from_slice(&MAC);
        }
        payload[8] = if self.below(4) == 0 { 143 } else { payload[8] };
        payload.truncate(*self.pick(&[&8, &16, &24, &32, &40]));
        let mut frame = match ethertype {
            [8, 0] => {
                let source = [10, 9, 0, 7 * self.below(2) as u8];
                ethernet(mac, ethertype, &packet_v4(source, *self.pick(&[&2, &6, &17])))
            }
            [8, 6] => {
                let mut arp = vec![0, 1, 8, 0, 6, 4, 0, 1 + self.below(3) as u8];
                arp.extend(MAC);
                arp.extend([10, 9, 0, 7 * self.below(2) as u8]);
                arp.extend([0, 0, 0, 0, 0, 0, 10, 9, 0, 7]);
                ethernet(mac, ethertype, &arp)
            }
            _ => ethernet(mac, ethertype, &packet_v6(source, next, &payload)),
        };
        if self.below(4) == 0 {
            let at = self.below(frame.len());
            frame[at] ^= 1 << self.below(8);
        }
        if self.below(4) == 0 {
            frame.truncate(14 + self.below(frame.len() - 14));
        }
        frame
    }
}

/// Interprets the subset of classic BPF that guards use, like `net/core/filter.c`.
fn run(program: &[Classic], frame: &[u8]) -> i32 {
    let (mut at, mut accumulator) = (0, 0);
    loop {
        let Classic { code, jumps, k } = program[at];
        at += 1;
        let load = |length: usize| {
            let bytes = frame.get(k as usize..k as usize + length)?;
            Some(bytes.iter().fold(0, |all, byte| all << 8 | u32::from(*byte)))
        };
        let holds = match code {
            0x20 if k > 0xffff => {
                accumulator = 0;
                continue;
            }
            0x20 | 0x28 | 0x30 => {
                let Some(loaded) = load([4, 2, 1][usize::from(code - 0x20) / 8]) else { return 0 };
                accumulator = loaded;
                continue;
            }
            0x80 => {
                accumulator = frame.len() as u32;
                continue;
            }
            // BPF_ALU | BPF_AND | BPF_K
            0x54 => {
                accumulator &= k;
                continue;
            }
            0x05 => {
                at += k as usize;
                continue;
            }
            0x06 => return k.cast_signed(),
            0x15 => accumulator == k,
            0x35 => accumulator >= k,
            code => panic!("{code:#x}"),
        };
        at += usize::from(jumps[usize::from(!holds)]);
    }
}

fn policies() -> Vec<PortPolicy> {
    vec![
        policy(),
        PortPolicy { v6: Vec::new(), ..policy() },
        PortPolicy { v4: vec![[10, 9, 0, 7].into(), [10, 9, 0, 8].into()], ..policy() },
        PortPolicy { any_address: true, ..policy() },
    ]
}

fn expected(rules: &[Rule], frame: &[u8]) -> i32 {
    match verdict(rules, frame, false) {
        Verdict::Accept | Verdict::Police => code::NEXT,
        Verdict::Drop(_) => code::DROP,
    }
}

#[test]
fn classic_bpf_matches_the_rules() {
    let mut random = Random(1);
    for policy in policies() {
        let rules = rules(&policy);
        let program = classic(&rules);
        assert!(program.len() <= 4_096, "BPF_MAXINSNS: {}", program.len());
        for _ in 0..20_000 {
            let frame = random.frame();
            assert_eq!(run(&program, &frame), expected(&rules, &frame), "{policy:?} {frame:02x?}");
        }
    }
}

/// Runs in the kernel. Needs CAP_BPF.
#[test]
fn ebpf_matches_the_rules_and_counts_drops_by_reason() {
    let mut random = Random(2);
    for policy in policies() {
        let rules = rules(&policy);
        let counters = Counters::new("test", super::compile::COUNTERS).unwrap();
        let code = with_counters(extended(&rules, &policed(&policy)), &counters);
        let program = Program::load("test", &code).unwrap();
        let mut dropped = [0; super::SpoofReason::ALL.len()];
        for _ in 0..20_000 {
            let frame = random.frame();
            // The test run rejects frames shorter than their network header
            // (`bpf_prog_test_run_skb`).
            if frame.len() < 14 + 40 {
                continue;
            }
            let verdict = verdict(&rules, &frame, false);
            if let Verdict::Drop(reason) = verdict {
                dropped[reason as usize] += 1;
            }
            let (verdict, _) = program.test_run(&frame, 1).unwrap();
            assert_eq!(verdict, expected(&rules, &frame), "{frame:02x?}");
        }
        let counted: [u64; super::SpoofReason::ALL.len()] =
            std::array::from_fn(|number| counters.read(number as u32).unwrap());
        assert_eq!(dropped, counted);
    }
}
