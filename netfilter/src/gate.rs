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
//! A packet without an ingress interface is not always one of the host, and not always sent of its
//! own accord. Without an ingress interface, a gate drops:
//!
//! | packet | reason |
//! |---|---|
//! | IPv4 with a source route option (LSRR, SSRR: RFC 791 section 3.1) | the host answers a source-routed packet along the reversed route, which a stranger has chosen (`__ip_options_echo`, net/ipv4), if `accept_source_route` is set |
//! | IPv6 with extension headers, without a socket | a fragment of a packet that the kernel has reassembled, forwarded and fragmented again (`ip6_fragment`, net/ipv6; IPv4 copies the interface). The fragments of the host belong to a socket |
//! | TCP SYN without a socket | the connection of a proxy in the kernel on behalf of another host (`synproxy_send_server_syn`, net/netfilter). Those of the host belong to a socket |
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
use crate::{guard, steering};
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
        let names = [guard::NAME, guard::BRIDGE_NAME, NAME, steering::REMEMBER, steering::STEER];
        for name in names {
            let attached = Clsact::open()?.attached(index, direction, name)?;
            count += usize::from(matches!(attached, Some(Attached::Program(_))));
        }
    }
    Ok(count)
}

/// Detaches all programs, such as gates and port guards, from the link with interface index `index`
/// in the calling thread's network namespace. For tests that run without them.
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
    /// Offset in the network header, and its length.
    const AT: u8 = 7;
    const END: u8 = 8;
    const STACK: u8 = 10;
    /// `bpf_skb_load_bytes_relative`, from `BPF_HDR_START_NET`.
    const LOAD: i32 = 68;
    const NETWORK: i32 = 1;
    const IPV4: u16 = 0x0800;
    const IPV6: u16 = 0x86dd;
    /// Lengths of headers without options and extension headers.
    const IPV4_HEADER: i32 = 20;
    const IPV6_HEADER: i32 = 40;
    /// Offset of the protocol in the IPv4 header, of the next header in that of IPv6, and of the
    /// flags in that of TCP.
    const PROTOCOL: i32 = 9;
    const NEXT_HEADER: i32 = 6;
    const FLAGS: i32 = 13;
    /// Next headers that can precede a fragment header, and the fragment header itself (RFC 8200
    /// section 4.5): hop-by-hop options, routing, fragment, destination options.
    const EXTENSIONS: [u32; 4] = [0, 43, 44, 60];
    const TCP: u32 = 6;
    const SYN: u32 = 0x02;
    const SYN_ACK: u32 = 0x12;
    /// Options of IPv4: end of the list, no operation, the source routes.
    const END_OF_OPTIONS: u32 = 0;
    const NO_OPERATION: u32 = 1;
    const SOURCE_ROUTES: [u32; 2] = [131, 137];
    /// Maximum number of options. The kernel writes at most three before a source route.
    const OPTIONS: u8 = 8;
    #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
    enum Label {
        Pass,
        Drop,
        Host,
        V4,
        V6,
        /// The option with this number.
        Option(u8),
        Flags,
    }
    let of = Instruction::new;
    // BPF_LDX | BPF_MEM | BPF_W
    let load = |offset| of(0x61, SCRATCH, CONTEXT, offset, 0);
    // BPF_JMP32 | BPF_JEQ | BPF_K
    let equal = |value: u32| of(0x16, SCRATCH, 0, 0, value.cast_signed());
    // BPF_ALU | BPF_AND | BPF_K
    let mask = |bits: u32| of(0x54, SCRATCH, 0, 0, bits.cast_signed());
    // BPF_LDX | BPF_MEM | BPF_DW; BPF_JMP | BPF_JNE | BPF_K
    let socket = of(0x79, SCRATCH, CONTEXT, field::SOCKET, 0);
    let is_set = of(0x55, SCRATCH, 0, 0, 0);
    // BPF_ALU64 | BPF_ADD | BPF_X
    let advance = |register| of(0x0f, AT, register, 0, 0);
    // Loads the byte of the packet at AT.
    let byte = |code: &mut Assembly<Label>| {
        code.extend([copy(FIRST, CONTEXT), copy(SCRATCH, AT), copy(THIRD, STACK), add(THIRD, -1)]);
        code.extend([set(FOURTH, 1), set(FIFTH, NETWORK), call(LOAD)]);
        code.jump(of(0x55, RESULT, 0, 0, 0), Label::Drop);
        // BPF_LDX | BPF_MEM | BPF_B
        code.push(of(0x71, SCRATCH, STACK, -1, 0));
    };
    let mut code = Assembly::new();
    code.extend([copy(CONTEXT, FIRST), load(field::INGRESS_INTERFACE)]);
    code.jump(equal(0), Label::Host);
    match policy {
        GatePolicy::Marked { mark, mask: bits } => {
            code.extend([load(field::MARK), mask(*bits)]);
            code.jump(equal(mark & bits), Label::Pass);
        }
        GatePolicy::From(links) => {
            links.iter().for_each(|link| code.jump(equal(*link), Label::Pass));
        }
    }
    code.jump(GO, Label::Drop);
    code.place(Label::Host);
    code.push(load(field::PROTOCOL));
    code.jump(equal(IPV6.to_be().into()), Label::V6);
    code.jump(equal(IPV4.to_be().into()), Label::V4);
    code.jump(GO, Label::Pass);
    code.place(Label::V4);
    code.push(set(AT, 0));
    byte(&mut code);
    // The length, in units of four bytes: BPF_ALU64 | BPF_LSH | BPF_K.
    code.extend([mask(0x0f), copy(END, SCRATCH), of(0x67, END, 0, 0, 2)]);
    code.push(set(AT, IPV4_HEADER));
    for number in 0..OPTIONS {
        code.place(Label::Option(number));
        // BPF_JMP | BPF_JGE | BPF_X
        code.jump(of(0x3d, AT, END, 0, 0), Label::Option(OPTIONS));
        byte(&mut code);
        SOURCE_ROUTES.iter().for_each(|option| code.jump(equal(*option), Label::Drop));
        code.jump(equal(END_OF_OPTIONS), Label::Option(OPTIONS));
        code.push(add(AT, 1));
        code.jump(equal(NO_OPERATION), Label::Option(number + 1));
        byte(&mut code);
        // The length includes the two bytes.
        code.extend([advance(SCRATCH), add(AT, -1)]);
    }
    code.place(Label::Option(OPTIONS));
    code.push(socket);
    code.jump(is_set, Label::Pass);
    code.push(set(AT, PROTOCOL));
    byte(&mut code);
    code.push(copy(AT, END));
    code.jump(equal(TCP), Label::Flags);
    code.jump(GO, Label::Pass);
    code.place(Label::V6);
    code.push(socket);
    code.jump(is_set, Label::Pass);
    code.push(set(AT, NEXT_HEADER));
    byte(&mut code);
    EXTENSIONS.iter().for_each(|header| code.jump(equal(*header), Label::Drop));
    code.push(set(AT, IPV6_HEADER));
    code.jump(equal(TCP), Label::Flags);
    code.jump(GO, Label::Pass);
    code.place(Label::Flags);
    code.push(add(AT, FLAGS));
    byte(&mut code);
    code.push(mask(SYN_ACK));
    code.jump(equal(SYN), Label::Drop);
    code.place(Label::Pass);
    code.extend([set(RESULT, verdict::NEXT), EXIT]);
    code.place(Label::Drop);
    code.extend([set(RESULT, verdict::DROP), EXIT]);
    code.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bpf::Program;

    /// The test run gives the packet a socket, and no ingress interface (`bpf_prog_test_run_skb`).
    #[test]
    fn packets_of_the_host_with_a_source_route_are_dropped() {
        let program = Program::load(NAME, &program(&GatePolicy::From(Vec::new()))).unwrap();
        let passes = |options: &[u8]| {
            let mut frame = [[2; 6], [4; 6]].concat();
            frame.extend([
                8,
                0,
                0x45 + options.len() as u8 / 4,
                0,
                0,
                60,
                0,
                0,
                0,
                0,
                64,
                17,
                0,
                0,
            ]);
            frame.extend([192, 0, 2, 1, 10, 9, 0, 7]);
            frame.extend(options);
            frame.resize(100, 131);
            program.test_run(&frame, 1).unwrap().0 == verdict::NEXT
        };
        let [record, stamp] = [[7, 7, 4, 0, 0, 0, 131], [68, 8, 5, 0, 131, 137, 0]];
        for route in [131, 137] {
            let route = [route, 7, 8, 192, 0, 2, 9, 0];
            assert!(!passes(&route));
            // As the kernel writes them: recorded route, timestamps, source route.
            assert!(!passes(&[&record[..], &stamp, &[137], &route, &[0]].concat()));
            assert!(!passes(&[&[1, 1, 1, 1][..], &route].concat()));
            assert!(passes(&[&[0, 0, 0, 0][..], &route].concat()), "after the end of the list");
        }
        // Bytes of other options, and of the payload, are no options.
        for options in [&[][..], &[148, 4, 0, 0], &[&record[..], &stamp, &[137, 0]].concat()] {
            assert!(passes(options), "{options:?}");
        }
    }
}
