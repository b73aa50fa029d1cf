//! Encoding of rules as nf_tables expressions, which operate on registers
//! (`include/uapi/linux/netfilter/nf_tables.h`).
//!
//! The encoding uses 4-byte registers (`NFT_REG32_*`). A concatenation occupies consecutive
//! registers, and every field starts in a new one. A match loads its packet field into the first
//! registers and compares; if the comparison fails, the kernel skips the rest of the rule.

use crate::table::{Action, Key, Match, Transport, Value};
use crate::wire::Attributes;
use std::net::IpAddr;
use std::num::NonZeroU32;

/// `NFTA_LIST_ELEM`.
pub(crate) const LIST_ELEMENT: u16 = 1;
/// `NFTA_DATA_VALUE`.
const DATA_VALUE: u16 = 1;
/// `NFTA_DATA_VERDICT`.
const DATA_VERDICT: u16 = 2;

/// The verdict register (`NFT_REG_VERDICT`).
const VERDICT: u32 = 0;
/// The first 4-byte register (`NFT_REG32_00`).
const FIRST: u32 = 8;

/// `NFPROTO_IPV4`, `NFPROTO_IPV6`.
const PROTOCOL_FAMILY: [u8; 2] = [2, 10];

/// Bytes of an interface name in registers (`IFNAMSIZ`).
pub(crate) const INTERFACE_LENGTH: usize = 16;

/// Encodes matches and actions as the expression list of a rule.
pub(crate) fn expressions(matches: &[Match], actions: &[Action]) -> Attributes {
    let mut list = Expressions::default();
    for one in matches {
        list.condition(one);
    }
    for one in actions {
        list.action(one);
    }
    list.0
}

/// Wraps a value in `struct nft_data` attributes (`NFTA_DATA_VALUE`).
pub(crate) fn data(bytes: &[u8]) -> Attributes {
    Attributes::default().bytes(DATA_VALUE, bytes)
}

/// Encodes `value`. A network is encoded as its first address.
pub(crate) fn bytes_of(value: &Value) -> Vec<u8> {
    match value {
        Value::Interface(name) => {
            let mut bytes = name.as_bytes().to_vec();
            bytes.resize(INTERFACE_LENGTH, 0);
            bytes
        }
        // A prefix match compares fewer bytes than the register holds.
        Value::InterfacePrefix(prefix) => prefix.as_bytes().to_vec(),
        Value::Group(group) => group.to_ne_bytes().to_vec(),
        Value::Net(net) => address(net.network()),
        Value::Protocol(protocol) => vec![number_of(*protocol)],
        Value::OtherProtocol(number) => vec![*number],
        Value::Port(port) => port.to_be_bytes().to_vec(),
        Value::Vni(vni) => vni.to_be_bytes()[1..].to_vec(),
    }
}

/// Encodes an address.
pub(crate) fn address(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

fn number_of(protocol: Transport) -> u8 {
    match protocol {
        Transport::Tcp => 6,
        Transport::Udp => 17,
    }
}

/// Number of 4-byte registers for the value of `key`.
fn registers(key: Key) -> u32 {
    match key {
        Key::InInterface
        | Key::OutInterface
        | Key::SourceV6
        | Key::DestinationV6
        | Key::OriginalSourceV6
        | Key::OriginalDestinationV6
        | Key::ReplySourceV6 => 4,
        Key::OriginalSourceV4 | Key::OriginalDestinationV4 | Key::ReplySourceV4 => 1,
        Key::InGroup
        | Key::OutGroup
        | Key::SourceV4
        | Key::DestinationV4
        | Key::Protocol
        | Key::SourcePort
        | Key::DestinationPort
        | Key::Vni => 1,
    }
}

/// `NFTA_META_*` and `NFT_META_*`.
mod meta {
    pub(super) const DESTINATION: u16 = 1;
    pub(super) const KEY: u16 = 2;
    pub(super) const SOURCE: u16 = 3;
    pub(super) const ETHERTYPE: u32 = 1;
    pub(super) const MARK: u32 = 3;
    pub(super) const IN_INDEX: u32 = 4;
    pub(super) const IN_INTERFACE: u32 = 6;
    pub(super) const OUT_INTERFACE: u32 = 7;
    pub(super) const USER: u32 = 10;
    pub(super) const FAMILY: u32 = 15;
    pub(super) const PROTOCOL: u32 = 16;
    pub(super) const PACKET_TYPE: u32 = 19;
    pub(super) const IN_GROUP: u32 = 21;
    pub(super) const OUT_GROUP: u32 = 22;
    pub(super) const IN_KIND: u32 = 26;
}

/// `NFTA_FIB_F_*`.
mod fib {
    pub(super) const SOURCE: u32 = 1;
    pub(super) const DESTINATION: u32 = 2;
}

/// `NFT_CMP_EQ`, `NFT_CMP_NEQ`.
const EQUAL: u32 = 0;
const DIFFERENT: u32 = 1;
/// `NFT_CMP_GTE`.
const AT_LEAST: u32 = 5;

/// Header bases of payload expressions (`NFT_PAYLOAD_NETWORK_HEADER`,
/// `NFT_PAYLOAD_TRANSPORT_HEADER`).
const NETWORK: u32 = 1;
const TRANSPORT: u32 = 2;

/// The expressions of one rule, in order.
#[derive(Default)]
pub(crate) struct Expressions(Attributes);

impl Expressions {
    /// Returns the encoded list.
    pub(crate) fn into_attributes(self) -> Attributes {
        self.0
    }

    /// Loads `length` bytes at offset `at` of a frame without VLAN tags, counted from the Ethernet
    /// header; at most 16 bytes. If the frame is too short, the rule does not match.
    ///
    /// Data after the Ethernet header is loaded relative to the network header, in aligned words if
    /// possible. The kernel reads aligned words in place (`nft_payload_fast_eval`) and copies
    /// everything else (`skb_copy_bits`).
    pub(crate) fn load_frame(&mut self, at: u16, length: usize) {
        /// `NFT_PAYLOAD_LL_HEADER`.
        const LINK: u32 = 0;
        const ETHERNET: u16 = 14;
        match at.checked_sub(ETHERNET) {
            Some(at) if at.is_multiple_of(4) && length.is_multiple_of(4) => {
                for word in 0..length as u32 / 4 {
                    self.payload(NETWORK, u32::from(at) + 4 * word, 4, FIRST + word);
                }
            }
            Some(at) => self.payload(NETWORK, at.into(), length as u32, FIRST),
            None => self.payload(LINK, at.into(), length as u32, FIRST),
        }
    }

    /// Matches if the loaded value equals `value`, or differs from it with `not`.
    pub(crate) fn loaded_is(&mut self, value: &[u8], not: bool) {
        self.compare(if not { DIFFERENT } else { EQUAL }, value);
    }

    /// Matches if the loaded byte, masked with `mask`, equals `value`.
    pub(crate) fn loaded_bits_are(&mut self, mask: u8, value: u8) {
        self.masked(&[mask], EQUAL, &[value]);
    }

    /// Matches packets in excess of `rate` per second, after a burst of `burst`
    /// (`net/netfilter/nft_limit.c`).
    pub(crate) fn over_rate(&mut self, rate: NonZeroU32, burst: u32) {
        // NFTA_LIMIT_RATE, _UNIT in seconds, _BURST, _TYPE: NFT_LIMIT_PKTS, _FLAGS: NFT_LIMIT_F_INV
        let limit = Attributes::default().bytes(1, &u64::from(rate.get()).to_be_bytes());
        let limit = limit.bytes(2, &1_u64.to_be_bytes()).number(3, burst).number(4, 0).number(5, 1);
        self.push("limit", &limit);
    }

    /// Matches frames by ethertype as parsed by the kernel (`skb->protocol`).
    pub(crate) fn ethertype_is(&mut self, ethertype: &[u8]) {
        self.meta(meta::ETHERTYPE, FIRST);
        self.compare(EQUAL, ethertype);
    }

    /// Matches frames to a multicast MAC address other than broadcast, as classified by the kernel
    /// (`eth_type_trans`).
    pub(crate) fn is_multicast(&mut self) {
        /// `PACKET_MULTICAST` (include/uapi/linux/if_packet.h).
        const MULTICAST: u8 = 2;
        self.meta(meta::PACKET_TYPE, FIRST);
        self.compare(EQUAL, &[MULTICAST]);
    }

    fn push(&mut self, name: &str, data: &Attributes) {
        // NFTA_EXPR_NAME, NFTA_EXPR_DATA
        let expression = Attributes::default().text(1, name).nest(2, data);
        let list = std::mem::take(&mut self.0);
        self.0 = list.nest(LIST_ELEMENT, &expression);
    }

    fn meta(&mut self, key: u32, register: u32) {
        let load = Attributes::default().number(meta::DESTINATION, register).number(meta::KEY, key);
        self.push("meta", &load);
    }

    /// Compares the first registers with `value`.
    fn compare(&mut self, operation: u32, value: &[u8]) {
        let compare =
            Attributes::default().number(1, FIRST).number(2, operation).nest(3, &data(value));
        self.push("cmp", &compare);
    }

    fn payload(&mut self, base: u32, offset: u32, length: u32, register: u32) {
        let load = Attributes::default().number(1, register).number(2, base);
        self.push("payload", &load.number(3, offset).number(4, length));
    }

    /// Masks the first registers, then XORs them with `flip`.
    fn bitwise(&mut self, mask: &[u8], flip: &[u8]) {
        let bits =
            Attributes::default().number(1, FIRST).number(2, FIRST).number(3, mask.len() as u32);
        self.push("bitwise", &bits.nest(4, &data(mask)).nest(5, &data(flip)));
    }

    /// Masks the first registers and compares the result with `value`.
    fn masked(&mut self, mask: &[u8], operation: u32, value: &[u8]) {
        self.bitwise(mask, &vec![0; mask.len()]);
        self.compare(operation, value);
    }

    /// Matches the address family of `key`, if it has one.
    fn match_family_of(&mut self, key: Key) {
        let v6 = match key {
            Key::SourceV4 | Key::DestinationV4 => false,
            Key::SourceV6 | Key::DestinationV6 => true,
            Key::InInterface
            | Key::OutInterface
            | Key::InGroup
            | Key::OutGroup
            | Key::Protocol
            | Key::SourcePort
            | Key::DestinationPort
            | Key::Vni => return,
            // The kernel checks the family (`nft_ct_get_eval`).
            Key::OriginalSourceV4
            | Key::OriginalSourceV6
            | Key::OriginalDestinationV4
            | Key::OriginalDestinationV6
            | Key::ReplySourceV4
            | Key::ReplySourceV6 => return,
        };
        self.family(v6);
    }

    /// Matches packets of one family.
    fn family(&mut self, v6: bool) {
        self.meta(meta::FAMILY, FIRST);
        self.compare(EQUAL, &[PROTOCOL_FAMILY[usize::from(v6)]]);
    }

    /// Compares the type of an address of the packet with that of an address of the host
    /// (`RTN_LOCAL`).
    fn host_address(&mut self, address: u32, operation: u32) {
        const LOCAL: u32 = 2;
        // NFTA_FIB_DREG; NFTA_FIB_RESULT: NFT_FIB_RESULT_ADDRTYPE; NFTA_FIB_FLAGS
        let lookup = Attributes::default().number(1, FIRST).number(2, 3).number(3, address);
        self.push("fib", &lookup);
        self.compare(operation, &LOCAL.to_ne_bytes());
    }

    fn load(&mut self, key: Key, register: u32) {
        match key {
            Key::InInterface => self.meta(meta::IN_INTERFACE, register),
            Key::OutInterface => self.meta(meta::OUT_INTERFACE, register),
            Key::InGroup => self.meta(meta::IN_GROUP, register),
            Key::OutGroup => self.meta(meta::OUT_GROUP, register),
            Key::Protocol => self.meta(meta::PROTOCOL, register),
            Key::SourceV4 => self.payload(NETWORK, 12, 4, register),
            Key::DestinationV4 => self.payload(NETWORK, 16, 4, register),
            Key::SourceV6 => self.payload(NETWORK, 8, 16, register),
            Key::DestinationV6 => self.payload(NETWORK, 24, 16, register),
            Key::SourcePort => self.payload(TRANSPORT, 0, 2, register),
            Key::DestinationPort => self.payload(TRANSPORT, 2, 2, register),
            Key::Vni => self.payload(TRANSPORT, 12, 3, register),
            Key::OriginalSourceV4 => {
                self.load_ct(ct::SOURCE_V4, Some(ct::ORIGINAL), register);
            }
            Key::OriginalSourceV6 => {
                self.load_ct(ct::SOURCE_V6, Some(ct::ORIGINAL), register);
            }
            Key::OriginalDestinationV4 => {
                self.load_ct(ct::DESTINATION_V4, Some(ct::ORIGINAL), register);
            }
            Key::OriginalDestinationV6 => {
                self.load_ct(ct::DESTINATION_V6, Some(ct::ORIGINAL), register);
            }
            Key::ReplySourceV4 => self.load_ct(ct::SOURCE_V4, Some(ct::REPLY), register),
            Key::ReplySourceV6 => self.load_ct(ct::SOURCE_V6, Some(ct::REPLY), register),
        }
    }

    /// Loads `keys` into consecutive registers.
    fn load_all(&mut self, keys: &[Key]) {
        for key in keys {
            self.match_family_of(*key);
        }
        let mut register = FIRST;
        for key in keys {
            self.load(*key, register);
            register += registers(*key);
        }
    }

    fn condition(&mut self, condition: &Match) {
        match condition {
            Match::In { keys, set, not } => {
                self.load_all(keys);
                // NFTA_LOOKUP_SET, NFTA_LOOKUP_SREG, NFTA_LOOKUP_FLAGS: NFT_LOOKUP_F_INV
                let lookup = Attributes::default().text(1, set).number(2, FIRST);
                let lookup = if *not { lookup.number(5, 1) } else { lookup };
                self.push("lookup", &lookup);
            }
            Match::Is { key, value, not } => {
                self.load_all(&[*key]);
                let operation = if *not { DIFFERENT } else { EQUAL };
                match value {
                    Value::Net(net) if net.prefix_len() < net.max_prefix_len() => {
                        self.masked(&address(net.netmask()), operation, &bytes_of(value));
                    }
                    _ => self.compare(operation, &bytes_of(value)),
                }
            }
            Match::Established => self.ct_has_any(ct::STATE, ct::ESTABLISHED | ct::RELATED),
            Match::Known => self.ct_has_any(ct::STATE, ct::ESTABLISHED),
            Match::Translated => {
                self.ct_has_any(ct::STATUS, ct::TRANSLATED_SOURCE | ct::TRANSLATED_DESTINATION);
            }
            Match::Invalid => self.ct_has_any(ct::STATE, ct::INVALID),
            Match::TranslatedSource => self.ct_has_any(ct::STATUS, ct::TRANSLATED_SOURCE),
            Match::TranslatedDestination => self.ct_has_any(ct::STATUS, ct::TRANSLATED_DESTINATION),
            Match::Reply => {
                self.load_ct(ct::DIRECTION, None, FIRST);
                self.compare(EQUAL, &[ct::REPLY]);
            }
            Match::ToHost => self.host_address(fib::DESTINATION, EQUAL),
            Match::NotToHost => self.host_address(fib::DESTINATION, DIFFERENT),
            Match::FromHostAddress => self.host_address(fib::SOURCE, EQUAL),
            Match::Family { v6 } => self.family(*v6),
            // The load fails without a socket of a process, and ends the rule.
            Match::FromProcess => {
                self.meta(meta::USER, FIRST);
                self.compare(AT_LEAST, &0_u32.to_ne_bytes());
            }
            Match::FromBridge => {
                self.meta(meta::IN_KIND, FIRST);
                self.compare(EQUAL, &bytes_of(&Value::Interface("bridge".to_owned())));
            }
            Match::FromHost => {
                self.meta(meta::IN_INDEX, FIRST);
                self.compare(EQUAL, &0_u32.to_ne_bytes());
            }
            Match::NotIcmpv6 => {
                /// `IPPROTO_ICMPV6`.
                const ICMPV6: u8 = 58;
                self.meta(meta::PROTOCOL, FIRST);
                self.compare(DIFFERENT, &[ICMPV6]);
            }
            Match::Syn => {
                self.meta(meta::PROTOCOL, FIRST);
                self.compare(EQUAL, &[number_of(Transport::Tcp)]);
                self.payload(TRANSPORT, 13, 1, FIRST);
                // SYN is 2, RST 4.
                self.masked(&[2 | 4], EQUAL, &[2]);
            }
            Match::Unfragmented => {
                self.family(false);
                self.payload(NETWORK, 6, 2, FIRST);
                // More fragments, and the offset (RFC 791, 3.1).
                self.masked(&[0x3f, 0xff], EQUAL, &[0, 0]);
            }
            Match::NextHeader(protocol) => {
                self.family(true);
                self.payload(NETWORK, 6, 1, FIRST);
                self.compare(EQUAL, &[number_of(*protocol)]);
            }
        }
    }

    /// Loads the conntrack field `key`, with a direction for fields of tuples.
    fn load_ct(&mut self, key: u32, direction: Option<u8>, register: u32) {
        // NFTA_CT_DREG, NFTA_CT_KEY, NFTA_CT_DIRECTION
        let load = Attributes::default().number(1, register).number(2, key);
        let load = match direction {
            Some(direction) => load.bytes(3, &[direction]),
            None => load,
        };
        self.push("ct", &load);
    }

    /// Matches if the conntrack field `key` has one of `bits` set.
    fn ct_has_any(&mut self, key: u32, bits: u32) {
        self.load_ct(key, None, FIRST);
        self.masked(&bits.to_ne_bytes(), DIFFERENT, &0_u32.to_ne_bytes());
    }

    pub(crate) fn action(&mut self, action: &Action) {
        match action {
            // NFTA_COUNTER_BYTES, NFTA_COUNTER_PACKETS
            Action::Count => {
                self.push("counter", &Attributes::default().bytes(1, &[0; 8]).bytes(2, &[0; 8]));
            }
            Action::Accept => self.verdict(verdict::ACCEPT, None),
            Action::Drop => self.verdict(verdict::DROP, None),
            Action::Return => self.verdict(verdict::RETURN, None),
            Action::Jump(chain) => self.verdict(verdict::JUMP, Some(chain)),
            Action::Goto(chain) => self.verdict(verdict::GOTO, Some(chain)),
            Action::Mark { value, mask } => {
                self.meta(meta::MARK, FIRST);
                self.bitwise(&(!mask).to_ne_bytes(), &value.to_ne_bytes());
                let store =
                    Attributes::default().number(meta::KEY, meta::MARK).number(meta::SOURCE, FIRST);
                self.push("meta", &store);
            }
            Action::ClampSegments => {
                // NFTA_RT_DREG; NFTA_RT_KEY: NFT_RT_TCPMSS
                self.push("rt", &Attributes::default().number(1, FIRST).number(2, 3));
                // NFTA_BYTEORDER_SREG, _DREG; _OP: NFT_BYTEORDER_HTON; _LEN, _SIZE
                let swap = Attributes::default().number(1, FIRST).number(2, FIRST).number(3, 1);
                self.push("byteorder", &swap.number(4, 2).number(5, 2));
                // NFTA_EXTHDR_TYPE: TCPOPT_MAXSEG; _OFFSET, _LEN; _OP: NFT_EXTHDR_OP_TCPOPT; _SREG
                let option = Attributes::default().bytes(2, &[2]).number(3, 2).number(4, 2);
                self.push("exthdr", &option.number(6, 1).number(7, FIRST));
            }
            Action::SetPort { protocol, source, port } => {
                // NFTA_IMMEDIATE_DREG, NFTA_IMMEDIATE_DATA
                let load =
                    Attributes::default().number(1, FIRST).nest(2, &data(&port.to_be_bytes()));
                self.push("immediate", &load);
                let checksum = match protocol {
                    Transport::Tcp => 16,
                    Transport::Udp => 6,
                };
                // NFTA_PAYLOAD_BASE, _OFFSET, _LEN, _SREG; _CSUM_TYPE: NFT_PAYLOAD_CSUM_INET;
                // _CSUM_OFFSET
                let store = Attributes::default()
                    .number(2, TRANSPORT)
                    .number(3, if *source { 0 } else { 2 });
                let store = store.number(4, 2).number(5, FIRST).number(6, 1).number(7, checksum);
                self.push("payload", &store);
            }
            Action::Masquerade => self.push("masq", &Attributes::default()),
            Action::MasqueradeTo { first, last } => {
                let registers = [FIRST, if first == last { FIRST } else { FIRST + 1 }];
                for (register, port) in
                    registers.iter().zip([first, last]).take(1 + usize::from(first != last))
                {
                    // NFTA_IMMEDIATE_DREG, NFTA_IMMEDIATE_DATA
                    let port = data(&port.to_be_bytes());
                    self.push(
                        "immediate",
                        &Attributes::default().number(1, *register).nest(2, &port),
                    );
                }
                // NFTA_MASQ_FLAGS: NF_NAT_RANGE_PROTO_SPECIFIED; _REG_PROTO_MIN, _REG_PROTO_MAX
                let masquerade = Attributes::default().number(1, 1 << 1).number(2, registers[0]);
                self.push("masq", &masquerade.number(3, registers[1]));
            }
            Action::Translate { keys, map, v6 } => {
                self.load_all(keys);
                // NFTA_LOOKUP_SET, _SREG, _DREG
                self.push(
                    "lookup",
                    &Attributes::default().text(1, map).number(2, FIRST).number(3, FIRST),
                );
                let port =
                    FIRST + registers(if *v6 { Key::DestinationV6 } else { Key::DestinationV4 });
                // NFTA_NAT_TYPE: NFT_NAT_DNAT; _FAMILY, _REG_ADDR_MIN, _REG_PROTO_MIN
                let family = u32::from(PROTOCOL_FAMILY[usize::from(*v6)]);
                let translate = Attributes::default().number(1, 1).number(2, family);
                self.push("nat", &translate.number(3, FIRST).number(5, port));
            }
        }
    }

    fn verdict(&mut self, code: i32, chain: Option<&str>) {
        // NFTA_VERDICT_CODE, NFTA_VERDICT_CHAIN
        let verdict = Attributes::default().bytes(1, &code.to_be_bytes());
        let verdict = match chain {
            Some(chain) => verdict.text(2, chain),
            None => verdict,
        };
        let data = Attributes::default().nest(DATA_VERDICT, &verdict);
        // NFTA_IMMEDIATE_DREG, NFTA_IMMEDIATE_DATA
        self.push("immediate", &Attributes::default().number(1, VERDICT).nest(2, &data));
    }
}

/// `NFT_CT_*`, `NF_CT_STATE_*`, `IPS_*`.
mod ct {
    pub(super) const STATE: u32 = 0;
    pub(super) const DIRECTION: u32 = 1;
    pub(super) const STATUS: u32 = 2;
    pub(super) const SOURCE_V4: u32 = 19;
    pub(super) const DESTINATION_V4: u32 = 20;
    pub(super) const SOURCE_V6: u32 = 21;
    pub(super) const DESTINATION_V6: u32 = 22;
    /// `IP_CT_DIR_*`.
    pub(super) const ORIGINAL: u8 = 0;
    pub(super) const REPLY: u8 = 1;
    pub(super) const INVALID: u32 = 1;
    pub(super) const ESTABLISHED: u32 = 2;
    pub(super) const RELATED: u32 = 4;
    pub(super) const TRANSLATED_SOURCE: u32 = 1 << 4;
    pub(super) const TRANSLATED_DESTINATION: u32 = 1 << 5;
}

/// `NF_*` and `NFT_*`.
mod verdict {
    pub(super) const DROP: i32 = 0;
    pub(super) const ACCEPT: i32 = 1;
    pub(super) const JUMP: i32 = -3;
    pub(super) const GOTO: i32 = -4;
    pub(super) const RETURN: i32 = -5;
}
