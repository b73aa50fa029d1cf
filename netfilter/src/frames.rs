//! Guards of VXLAN devices: source checks for the frames that other hosts send.
//!
//! The port of a VXLAN device carries the frames of many stations, so its guard looks the source up
//! in a set: MAC address and IP address together. It is an eBPF program with a hash map at the
//! ingress of the device.
//!
//! ```text
//! VLAN tag                                ─► drop
//! destination is a group address          ─► drop (nothing is flooded; hosts answer ARP themselves)
//! IPv4, IPv6: source MAC and IP in the set ─► pass
//! IPv4, IPv6: source MAC may use any IP   ─► pass, but no neighbour discovery
//! anything else                           ─► drop
//! ```
//!
//! Any IP is the source of an ingress proxy that connects with the addresses of its clients. Its
//! neighbour discovery passes with its own addresses only: receivers ignore messages with a hop
//! limit below 255 (RFC 4861 section 6.1, 7.1 and 8.1), so the guard drops packets with that hop
//! limit, unless TCP or UDP follows the IPv6 header. It thus need not walk extension headers.

use crate::bpf::assembly::{Assembly, EXIT, GO, add, call, copy, map, set};
use crate::bpf::{Counters, Direction, HashSet, Instruction, LinkProgram, field, verdict};
use std::io;
use std::net::IpAddr;
use tidegate_model::MacAddress;

/// Name of the program in bpftool(8); at most 15 bytes.
const NAME: &str = "tg_frames";

/// Maximum number of pairs of a MAC and an IP address.
const CAPACITY: u32 = 1 << 17;

/// Length of a key: address, padded with zeros; MAC address; mark.
const KEY: usize = 24;

/// Marks the key of an IPv4 address, which no IPv6 address equals then: those have the mark 0.
const IPV4_MARK: u16 = 0xffff;

/// Marks the key of a MAC address with any IP address. The address in the key is zero.
const ANY_MARK: u16 = 0xfffe;

/// The guard of one VXLAN device.
#[derive(Debug)]
pub struct FrameGuard {
    program: LinkProgram,
    senders: HashSet,
    drops: Counters,
}

impl FrameGuard {
    /// Loads a guard that drops all frames.
    ///
    /// # Errors
    /// `EPERM` without CAP_BPF and CAP_NET_ADMIN in the initial user namespace.
    pub fn new() -> io::Result<Self> {
        let senders = HashSet::new("tg_senders", KEY as u32, CAPACITY)?;
        let drops = Counters::new("tg_frame_drops", 1)?;
        let code = program(senders.descriptor(), drops.descriptor());
        let program = LinkProgram::load(NAME, Direction::Ingress, &code)?;
        Ok(Self { program, senders, drops })
    }

    /// Attaches the guard to the link with interface index `index` in the calling thread's network
    /// namespace, instead of that of a previous process.
    ///
    /// # Errors
    /// `ENODEV` if the link does not exist.
    pub fn attach(&self, index: u32) -> io::Result<()> {
        self.program.attach(index)
    }

    /// Returns whether this guard is attached to the link with interface index `index` in the
    /// calling thread's network namespace.
    ///
    /// # Errors
    /// `ENODEV` if the link does not exist.
    pub fn is_attached(&self, index: u32) -> io::Result<bool> {
        self.program.is_own_attached(index)
    }

    /// Passes frames from `mac` with the source `address`.
    ///
    /// # Errors
    /// `E2BIG` if the set is full.
    pub fn allow(&self, mac: MacAddress, address: IpAddr) -> io::Result<()> {
        self.senders.insert(&key(mac, address))
    }

    /// Drops frames from `mac` with the source `address`. Succeeds if they are dropped already.
    ///
    /// # Errors
    /// Errors of the kernel.
    pub fn forbid(&self, mac: MacAddress, address: IpAddr) -> io::Result<()> {
        self.senders.remove(&key(mac, address))
    }

    /// Passes IPv4 and IPv6 frames from `mac` with any source address, except for neighbour
    /// discovery.
    ///
    /// # Errors
    /// `E2BIG` if the set is full.
    pub fn allow_any(&self, mac: MacAddress) -> io::Result<()> {
        self.senders.insert(&any_key(mac))
    }

    /// Ends the effect of [`allow_any`](Self::allow_any): frames from `mac` pass with allowed
    /// addresses only. Succeeds if this is so already.
    ///
    /// # Errors
    /// Errors of the kernel.
    pub fn forbid_any(&self, mac: MacAddress) -> io::Result<()> {
        self.senders.remove(&any_key(mac))
    }

    /// Returns the number of dropped frames.
    ///
    /// # Errors
    /// Errors of the kernel.
    pub fn dropped(&self) -> io::Result<u64> {
        self.drops.read(0)
    }

    /// Runs the program on `frame`. Returns whether it passes. For tests.
    #[doc(hidden)]
    pub fn passes(&self, frame: &[u8]) -> io::Result<bool> {
        Ok(self.program.test_run(frame)? == verdict::NEXT)
    }
}

fn key(mac: MacAddress, address: IpAddr) -> [u8; KEY] {
    let mut key = [0; KEY];
    key[16..22].copy_from_slice(&mac.0);
    match address {
        IpAddr::V4(ip) => {
            key[..4].copy_from_slice(&ip.octets());
            key[22..].copy_from_slice(&IPV4_MARK.to_be_bytes());
        }
        IpAddr::V6(ip) => key[..16].copy_from_slice(&ip.octets()),
    }
    key
}

fn any_key(mac: MacAddress) -> [u8; KEY] {
    let mut key = [0; KEY];
    key[16..22].copy_from_slice(&mac.0);
    key[22..].copy_from_slice(&ANY_MARK.to_be_bytes());
    key
}

/// The program, with the descriptors of its maps.
fn program(senders: i32, drops: i32) -> Vec<Instruction> {
    const RESULT: u8 = 0;
    const FIRST: u8 = 1;
    const SECOND: u8 = 2;
    const CONTEXT: u8 = 6;
    const BEGIN: u8 = 7;
    const END: u8 = 8;
    const STACK: u8 = 10;
    /// Place of the key on the stack.
    const AT: i16 = -(KEY as i16);
    const IPV4: u16 = 0x0800;
    const IPV6: u16 = 0x86dd;
    const ETHERNET: i16 = 14;
    /// Offsets in the IPv6 header, and the hop limit of neighbour discovery.
    const NEXT_HEADER: i16 = ETHERNET + 6;
    const HOP_LIMIT: i16 = ETHERNET + 7;
    const DISCOVERY_LIMIT: i32 = 255;
    const TCP: i32 = 6;
    const UDP: i32 = 17;
    let of = Instruction::new;
    // BPF_LDX | BPF_MEM of a word, a half word and a byte; BPF_STX | BPF_MEM of a word and a half
    // word
    let word = |to, from, at| of(0x61, to, from, at, 0);
    let half = |to, from, at| of(0x69, to, from, at, 0);
    let byte = |to, from, at| of(0x71, to, from, at, 0);
    let put_word = |from, at| of(0x63, STACK, from, at, 0);
    let put_half = |from, at| of(0x6b, STACK, from, at, 0);
    // BPF_ST | BPF_MEM of a double word and a half word
    let zero = |at| of(0x7a, STACK, 0, at, 0);
    let mark = |at, mark: u16| of(0x6a, STACK, 0, at, mark.to_be().into());
    const LOOKUP: i32 = 1;
    const PULL: i32 = 39;

    #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
    enum Label {
        Drop,
        V6,
        Look,
        Any,
        Pass,
        Out,
    }
    let mut code = Assembly::new();
    let look = |code: &mut Assembly<Label>| {
        code.extend(map(FIRST, senders));
        code.extend([copy(SECOND, STACK), add(SECOND, AT.into()), call(LOOKUP)]);
    };
    code.extend([copy(CONTEXT, FIRST), set(SECOND, 54), call(PULL)]);
    code.extend([word(FIRST, CONTEXT, field::VLAN_PRESENT)]);
    // BPF_JMP | BPF_JNE | BPF_K
    code.jump(of(0x55, FIRST, 0, 0, 0), Label::Drop);
    code.extend([word(BEGIN, CONTEXT, field::DATA), word(END, CONTEXT, field::DATA_END)]);
    code.extend([copy(FIRST, BEGIN), add(FIRST, 34)]);
    // BPF_JMP | BPF_JGT | BPF_X
    code.jump(of(0x2d, FIRST, END, 0, 0), Label::Drop);
    code.push(byte(FIRST, BEGIN, 0));
    // BPF_JMP | BPF_JSET | BPF_K: the group bit
    code.jump(of(0x45, FIRST, 0, 0, 1), Label::Drop);
    code.extend([zero(AT), zero(AT + 8), zero(AT + 16)]);
    for part in 0..3 {
        code.extend([half(FIRST, BEGIN, 6 + 2 * part), put_half(FIRST, AT + 16 + 2 * part)]);
    }
    code.push(half(FIRST, BEGIN, 12));
    // BPF_JMP | BPF_JEQ | BPF_K, BPF_JNE
    code.jump(of(0x15, FIRST, 0, 0, IPV6.to_be().into()), Label::V6);
    code.jump(of(0x55, FIRST, 0, 0, IPV4.to_be().into()), Label::Drop);
    code.extend([mark(AT + 22, IPV4_MARK), word(FIRST, BEGIN, ETHERNET + 12), put_word(FIRST, AT)]);
    code.jump(GO, Label::Look);
    code.place(Label::V6);
    code.extend([copy(FIRST, BEGIN), add(FIRST, 54)]);
    code.jump(of(0x2d, FIRST, END, 0, 0), Label::Drop);
    for part in 0..4 {
        code.extend([word(FIRST, BEGIN, ETHERNET + 8 + 4 * part), put_word(FIRST, AT + 4 * part)]);
    }
    // Neighbour discovery needs its own address: skips the second look-up.
    look(&mut code);
    code.jump(of(0x55, RESULT, 0, 0, 0), Label::Pass);
    code.push(byte(FIRST, BEGIN, HOP_LIMIT));
    code.jump(of(0x55, FIRST, 0, 0, DISCOVERY_LIMIT), Label::Any);
    code.push(byte(FIRST, BEGIN, NEXT_HEADER));
    code.jump(of(0x15, FIRST, 0, 0, TCP), Label::Any);
    code.jump(of(0x15, FIRST, 0, 0, UDP), Label::Any);
    code.jump(GO, Label::Drop);
    code.place(Label::Look);
    look(&mut code);
    code.jump(of(0x55, RESULT, 0, 0, 0), Label::Pass);
    code.place(Label::Any);
    code.extend([zero(AT), zero(AT + 8), mark(AT + 22, ANY_MARK)]);
    look(&mut code);
    code.jump(of(0x15, RESULT, 0, 0, 0), Label::Drop);
    code.place(Label::Pass);
    code.extend([set(RESULT, verdict::NEXT), EXIT]);
    code.place(Label::Drop);
    // BPF_ST | BPF_MEM | BPF_W
    code.push(of(0x62, STACK, 0, -4, 0));
    code.extend(map(FIRST, drops));
    code.extend([copy(SECOND, STACK), add(SECOND, -4), call(LOOKUP)]);
    code.jump(of(0x15, RESULT, 0, 0, 0), Label::Out);
    // BPF_STX | BPF_ATOMIC | BPF_DW, BPF_ADD
    code.extend([set(FIRST, 1), of(0xdb, RESULT, FIRST, 0, 0)]);
    code.place(Label::Out);
    code.extend([set(RESULT, verdict::DROP), EXIT]);
    code.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: MacAddress = MacAddress([2, 0, 10, 9, 0, 7]);

    fn frame(to: u8, from: MacAddress, ethertype: u16, source: IpAddr) -> Vec<u8> {
        let mut frame = vec![to, 0, 10, 9, 0, 8];
        frame.extend(from.0);
        frame.extend(ethertype.to_be_bytes());
        match source {
            IpAddr::V4(ip) => {
                frame.extend([0x45, 0, 0, 20, 0, 0, 0, 0, 64, 17, 0, 0]);
                frame.extend(ip.octets());
                frame.extend([10, 9, 0, 8]);
            }
            IpAddr::V6(ip) => {
                frame.extend([0x60, 0, 0, 0, 0, 0, 17, 64]);
                frame.extend(ip.octets());
                frame.extend([0; 16]);
            }
        }
        frame.resize(64, 0);
        frame
    }

    #[test]
    fn ebpf_passes_frames_of_known_senders_only() {
        let guard = FrameGuard::new().unwrap();
        let (v4, v6): (IpAddr, IpAddr) = ("10.9.0.7".parse().unwrap(), "fd09::7".parse().unwrap());
        let mapped = "::ffff:10.9.0.7".parse().unwrap();
        let (four, six) = (frame(2, MAC, 0x0800, v4), frame(2, MAC, 0x86dd, v6));
        assert!(!guard.passes(&four).unwrap() && !guard.passes(&six).unwrap(), "an empty set");
        guard.allow(MAC, v4).unwrap();
        guard.allow(MAC, v6).unwrap();
        assert!(guard.passes(&four).unwrap() && guard.passes(&six).unwrap());
        let before = guard.dropped().unwrap();
        let other = MacAddress([2, 0, 10, 9, 0, 9]);
        let forged = [
            frame(2, other, 0x0800, v4),
            frame(2, MAC, 0x0800, "10.9.0.9".parse().unwrap()),
            frame(2, MAC, 0x86dd, "fd09::9".parse().unwrap()),
            frame(2, MAC, 0x86dd, "fe80::a:9ff:fe09:7".parse().unwrap()),
            frame(2, MAC, 0x86dd, mapped),
            frame(2, MAC, 0x0806, v4),
            frame(2, MAC, 0x8100, v4),
            frame(0x33, MAC, 0x86dd, v6),
            frame(0xff, MAC, 0x0800, v4),
        ];
        for one in &forged {
            assert!(!guard.passes(one).unwrap(), "{one:x?}");
        }
        assert_eq!(guard.dropped().unwrap() - before, forged.len() as u64);
        guard.forbid(MAC, v4).unwrap();
        guard.forbid(MAC, v4).unwrap();
        assert!(!guard.passes(&four).unwrap() && guard.passes(&six).unwrap());
    }

    #[test]
    fn any_source_passes_from_its_mac_address_only_and_without_discovery() {
        const SANDBOX: MacAddress = MacAddress([2, 0, 10, 9, 0, 2]);
        let guard = FrameGuard::new().unwrap();
        let passes = |frame: &[u8]| guard.passes(frame).unwrap();
        let (v4, v6): (IpAddr, IpAddr) =
            ("198.51.100.7".parse().unwrap(), "2001:db8::7".parse().unwrap());
        let own: IpAddr = "fd09::2".parse().unwrap();
        let packet = |mac, source, next: u8, limit: u8, kind: u8| {
            let mut frame = frame(2, mac, 0x86dd, source);
            (frame[20], frame[21]) = (next, limit);
            frame.resize(14 + 40, 0);
            frame.extend([kind, 0, 0, 0]);
            frame.resize(100, 0);
            frame
        };
        let (four, six) = (frame(2, SANDBOX, 0x0800, v4), frame(2, SANDBOX, 0x86dd, v6));
        guard.allow(MAC, v4).unwrap();
        guard.allow(SANDBOX, own).unwrap();
        assert!(!passes(&four) && !passes(&six));
        guard.allow_any(SANDBOX).unwrap();
        assert!(passes(&four) && passes(&six));
        assert!(passes(&frame(2, SANDBOX, 0x0800, "10.9.0.9".parse().unwrap())));
        let mut ttl = four.clone();
        (ttl[20], ttl[21], ttl[22]) = (0, 255, 255);
        assert!(passes(&ttl), "these bytes are others in IPv4");
        for (next, limit, pass) in [(6, 255, true), (17, 255, true), (58, 64, true), (44, 64, true)]
        {
            assert_eq!(passes(&packet(SANDBOX, v6, next, limit, 1)), pass, "{next} {limit}");
        }
        for kind in 133..=137 {
            // Also behind extension headers.
            for next in [58, 0, 43, 44, 51, 60] {
                assert!(!passes(&packet(SANDBOX, v6, next, 255, kind)), "{next} {kind}");
                assert!(passes(&packet(SANDBOX, own, next, 255, kind)), "its own address");
            }
        }
        let others = [
            frame(2, MAC, 0x0800, "198.51.100.8".parse().unwrap()),
            frame(2, MAC, 0x86dd, v6),
            // The key of the sandbox, as an address.
            frame(2, MAC, 0x0800, "0.0.0.0".parse().unwrap()),
            frame(2, MAC, 0x86dd, "::".parse().unwrap()),
            frame(2, MacAddress([2, 0, 10, 9, 0, 3]), 0x0800, v4),
            frame(2, SANDBOX, 0x0806, v4),
            frame(2, SANDBOX, 0x8100, v4),
            frame(0xff, SANDBOX, 0x0800, v4),
            frame(0x33, SANDBOX, 0x86dd, v6),
        ];
        let before = guard.dropped().unwrap();
        for one in &others {
            assert!(!passes(one), "{one:x?}");
        }
        assert_eq!(guard.dropped().unwrap() - before, others.len() as u64);
        guard.forbid_any(SANDBOX).unwrap();
        guard.forbid_any(SANDBOX).unwrap();
        assert!(!passes(&four) && !passes(&six) && passes(&frame(2, SANDBOX, 0x86dd, own)));
    }
}
