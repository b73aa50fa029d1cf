//! nftables tables as plain values.
//!
//! Covers the subset of the nftables language that tidegate uses. The doc comment of each item
//! gives its nft(8) syntax. The family is always `inet`: one table for IPv4 and IPv6.

use ipnet::IpNet;

/// A table: `table inet NAME`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Table {
    /// Name, at most 255 bytes (`NFT_NAME_MAXLEN` less the NUL).
    pub name: String,
    /// Sets and maps with unique names.
    pub sets: Vec<Set>,
    /// Chains with unique names. Jump targets precede the chains that jump to them.
    pub chains: Vec<Chain>,
}

/// A named set, or a map if `data` is not empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Set {
    /// Name, at most 255 bytes (`NFT_NAME_MAXLEN` less the NUL).
    pub name: String,
    /// Type of the elements; several fields form a concatenation.
    pub key: Vec<Field>,
    /// Type of the mapped data; empty for a set.
    pub data: Vec<Field>,
    /// Elements may be ranges (`flags interval`).
    pub intervals: bool,
    /// The elements never change (`flags constant`). Speeds up lookups in sets without intervals.
    pub constant: bool,
    /// The elements. Ranges do not overlap.
    pub elements: Vec<Element>,
}

/// An element of a set.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Element {
    /// One value per field of the set's key.
    pub key: Vec<Value>,
    /// One value per field of the set's data.
    pub data: Vec<Value>,
}

/// The type of a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Field {
    /// `ifname`.
    Interface,
    /// `ipv4_addr`.
    Ipv4,
    /// `ipv6_addr`.
    Ipv6,
    /// `inet_proto`.
    Protocol,
    /// `inet_service`.
    Port,
    /// `typeof vxlan vni`.
    Vni,
}

/// A value of a [`Field`].
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Value {
    /// An interface name.
    Interface(String),
    /// All interfaces whose name has this prefix.
    InterfacePrefix(String),
    /// An interface group (ip-link(8), `group`).
    Group(u32),
    /// An address, or a prefix in a set with intervals.
    Net(IpNet),
    /// A protocol.
    Protocol(Transport),
    /// Any other protocol, by number.
    OtherProtocol(u8),
    /// A port.
    Port(u16),
    /// The number of a VXLAN network, 24 bits.
    Vni(u32),
}

/// A transport protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Transport {
    /// `tcp`, 6.
    Tcp,
    /// `udp`, 17.
    Udp,
}

/// A chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chain {
    /// Name, at most 255 bytes (`NFT_NAME_MAXLEN` less the NUL).
    pub name: String,
    /// The hook of a base chain, `None` for a regular chain. The policy is always `accept`.
    pub base: Option<Base>,
    /// The rules, in order of evaluation.
    pub rules: Vec<Rule>,
}

/// `type KIND hook HOOK priority PRIORITY`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Base {
    /// Chain type.
    pub kind: Kind,
    /// Hook of the chain.
    pub hook: Hook,
    /// Chains with lower values are traversed first (`raw` is -300, `mangle` -150, `dstnat` -100,
    /// `filter` 0, `srcnat` 100).
    pub priority: i32,
}

/// A base chain type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `filter`.
    Filter,
    /// `nat`: traversed by the first packet of a connection only.
    Nat,
}

/// A netfilter hook (`NF_INET_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// `prerouting`.
    Prerouting,
    /// `input`.
    Input,
    /// `forward`.
    Forward,
    /// `output`.
    Output,
    /// `postrouting`.
    Postrouting,
}

/// A rule: `actions` run in order if all `matches` hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// The conditions, all of which must hold.
    pub matches: Vec<Match>,
    /// The statements, in order of execution.
    pub actions: Vec<Action>,
    /// The comment of the rule, at most 128 bytes, without quotes.
    pub comment: String,
}

/// A condition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Match {
    /// Lookup of the concatenated `keys` in a set: `iifname . ip daddr @own`, or with `not`:
    /// `iifname != @bridges`.
    In {
        /// Packet field to match.
        keys: Vec<Key>,
        /// The set's name.
        set: String,
        /// Negates the match.
        not: bool,
    },
    /// Comparison of `key` with `value`: `iifname "lo"`, `ip daddr 127.0.0.0/8`.
    Is {
        /// Packet field to match.
        key: Key,
        /// The value.
        value: Value,
        /// Negates the match.
        not: bool,
    },
    /// `ct state established,related`.
    Established,
    /// `ct state established`: part of a tracked connection. Excludes related packets such as ICMP
    /// errors.
    Known,
    /// `ct status snat,dnat`: source or destination was translated.
    Translated,
    /// `ct state invalid`.
    Invalid,
    /// `ct status snat`: source was translated.
    TranslatedSource,
    /// `ct status dnat`: destination was translated.
    TranslatedDestination,
    /// `ct direction reply`: sent by the responder of the connection.
    Reply,
    /// `fib daddr type local`: destination is a unicast address of the host.
    ToHost,
    /// `fib saddr type local`: source is an address of the host.
    FromHostAddress,
    /// `fib daddr type != local`: destination is a broadcast, multicast or remote address.
    NotToHost,
    /// `meta skuid >= 0`: sent through the socket of a process. Packets that the kernel makes
    /// itself have none, such as those of VXLAN devices.
    FromProcess,
    /// `meta iifkind bridge`: received on a bridge.
    FromBridge,
    /// `iif 0`: no input interface, so the packet is sent by the host. Valid in `postrouting`,
    /// where the kernel sets the input interface since Linux 5.7 (`ip_output`, `ip6_output`).
    FromHost,
    /// `meta nfproto ipv6`, or `ipv4`.
    Family {
        /// IPv6.
        v6: bool,
    },
    /// `meta l4proto != ipv6-icmp`.
    NotIcmpv6,
    /// `tcp flags syn / syn,rst`: SYN or SYN-ACK.
    Syn,
    /// `ip frag-off & 0x3fff 0`: an IPv4 packet that is not a fragment.
    Unfragmented,
    /// `ip6 nexthdr`: an IPv6 packet with this header after the IPv6 header.
    NextHeader(Transport),
}

/// A packet field. Fields of one address family do not match packets of the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Key {
    /// `iifname`.
    InInterface,
    /// `oifname`.
    OutInterface,
    /// `iifgroup`.
    InGroup,
    /// `oifgroup`.
    OutGroup,
    /// `ip saddr`.
    SourceV4,
    /// `ip6 saddr`.
    SourceV6,
    /// `ip daddr`.
    DestinationV4,
    /// `ip6 daddr`.
    DestinationV6,
    /// `ct original ip saddr`: the initiator of the connection.
    OriginalSourceV4,
    /// `ct original ip6 saddr`.
    OriginalSourceV6,
    /// `ct original ip daddr`: the destination before destination NAT.
    OriginalDestinationV4,
    /// `ct original ip6 daddr`.
    OriginalDestinationV6,
    /// `ct reply ip saddr`: the responder after destination NAT.
    ReplySourceV4,
    /// `ct reply ip6 saddr`.
    ReplySourceV6,
    /// `meta l4proto`.
    Protocol,
    /// `th sport`.
    SourcePort,
    /// `th dport`.
    DestinationPort,
    /// `vxlan vni`: bytes 4 to 6 of the payload of UDP (RFC 7348, 5). For packets that are known
    /// to be of UDP.
    Vni,
}

/// A statement of a rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// `counter`.
    Count,
    /// `accept`.
    Accept,
    /// `drop`.
    Drop,
    /// `return`.
    Return,
    /// `jump CHAIN`.
    Jump(String),
    /// `goto CHAIN`: evaluation does not return to this chain.
    Goto(String),
    /// `meta mark set meta mark & 0xKEPT ^ 0xVALUE`: sets the bits of `mask` to `value` and keeps
    /// the others.
    Mark {
        /// New value of the bits.
        value: u32,
        /// Bits to set.
        mask: u32,
    },
    /// `tcp option maxseg size set rt mtu`: clamps the MSS to the path MTU.
    ClampSegments,
    /// `udp dport set PORT` (`tcp`, `sport`): rewrites the port of this packet and updates its
    /// checksum, without a conntrack entry. Valid for packets of `protocol` only.
    SetPort {
        /// Determines the offset of the checksum.
        protocol: Transport,
        /// Rewrites the source port instead of the destination port.
        source: bool,
        /// The new port.
        port: u16,
    },
    /// `masquerade`.
    Masquerade,
    /// `masquerade to :FIRST-LAST`: restricts the translated source port to a range. For protocols
    /// with ports.
    MasqueradeTo {
        /// The lowest port, inclusive.
        first: u16,
        /// The highest port, inclusive.
        last: u16,
    },
    /// `dnat ip to KEYS map @MAP` (`ip6`). The map data is an address and a port.
    Translate {
        /// Lookup key.
        keys: Vec<Key>,
        /// The map's name.
        map: String,
        /// Address family IPv6.
        v6: bool,
    },
}
