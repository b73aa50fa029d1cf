//! A table of nftables as a value.
//!
//! Only what tidegate uses of the language, each with the name that nft(8) has for it in its
//! comment. The family is always `inet`: one table for IPv4 and IPv6.

use ipnet::IpNet;

/// A table: `table inet NAME`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Table {
    /// Its name.
    pub name: String,
    /// Sets and maps; names differ.
    pub sets: Vec<Set>,
    /// Chains, the ones that are jumped to before those that jump; names differ.
    pub chains: Vec<Chain>,
}

/// A named set, or with `data` a map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Set {
    /// Its name.
    pub name: String,
    /// What its elements consist of; with more than one field a concatenation.
    pub key: Vec<Field>,
    /// What an element leads to; empty for a set.
    pub data: Vec<Field>,
    /// Elements may be ranges (`flags interval`).
    pub intervals: bool,
    /// The elements stay as they are (`flags constant`), which makes a set without intervals
    /// quicker to ask.
    pub constant: bool,
    /// The elements. None is part of another.
    pub elements: Vec<Element>,
}

/// An element of a set.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Element {
    /// One value for each field of the set's key.
    pub key: Vec<Value>,
    /// One for each field of its data.
    pub data: Vec<Value>,
}

/// A type of values.
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
}

/// A value of a [`Field`].
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Value {
    /// An interface's name.
    Interface(String),
    /// All interfaces with names that begin so.
    InterfacePrefix(String),
    /// A group of interfaces (ip-link(8), `group`).
    Group(u32),
    /// An address, or in a set with intervals all of a network.
    Net(IpNet),
    /// A protocol.
    Protocol(Transport),
    /// Another protocol, by its number.
    OtherProtocol(u8),
    /// A port.
    Port(u16),
}

/// A protocol above IP.
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
    /// Its name.
    pub name: String,
    /// Where packets come from; `None` for a chain that is jumped to. Its policy is always
    /// `accept`.
    pub base: Option<Base>,
    /// Its rules.
    pub rules: Vec<Rule>,
}

/// `type KIND hook HOOK priority PRIORITY`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Base {
    /// What its rules may do.
    pub kind: Kind,
    /// Which packets it sees.
    pub hook: Hook,
    /// Chains with lower ones see them first (`raw` is -300, `mangle` -150, `dstnat` -100, `filter`
    /// 0, `srcnat` 100).
    pub priority: i32,
}

/// A kind of base chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `filter`.
    Filter,
    /// `nat`: sees the first packet of a connection.
    Nat,
}

/// A hook of the kernel (`NF_INET_*`).
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

/// A rule: if all of `matches` hold, `actions` are carried out in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// The conditions.
    pub matches: Vec<Match>,
    /// What follows.
    pub actions: Vec<Action>,
    /// Why: the rule's comment, at most 128 bytes. No quotes.
    pub why: String,
}

/// A condition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Match {
    /// What `keys` give, concatenated, is in the set of this name: `iifname . ip daddr @own`. With
    /// `not` it is not: `iifname != @bridges`.
    In {
        /// What of the packet.
        keys: Vec<Key>,
        /// The set's name.
        set: String,
        /// The opposite.
        not: bool,
    },
    /// What `key` gives is that value: `iifname "lo"`, `ip daddr 127.0.0.0/8`.
    Is {
        /// What of the packet.
        key: Key,
        /// The value.
        value: Value,
        /// The opposite.
        not: bool,
    },
    /// `ct state established,related`.
    Established,
    /// `ct state established`: a part of a connection that is known, not only about one.
    Known,
    /// `ct status snat,dnat`: one of its ends was translated.
    Translated,
    /// `ct state invalid`.
    Invalid,
    /// `ct status dnat`: its destination was translated.
    TranslatedDestination,
    /// `ct direction reply`: it answers what began the connection.
    Reply,
    /// `fib daddr type local`: its destination is a unicast address of the host.
    ToHost,
    /// `fib saddr type local`: its source is an address of the host.
    FromHostAddress,
    /// `fib daddr type != local`: its destination is a broadcast or multicast address, or
    /// elsewhere.
    NotToHost,
    /// `iif 0`: it did not come in by an interface, so the host itself sends it. In `postrouting`,
    /// where the kernel gives the input interface from Linux 5.7 on (`ip_output`, `ip6_output`).
    FromHost,
    /// `meta nfproto ipv6`, or `ipv4`.
    Family {
        /// IPv6.
        v6: bool,
    },
    /// `meta l4proto != ipv6-icmp`.
    NotIcmpv6,
    /// `tcp flags syn / syn,rst`: it begins a connection, or accepts one.
    Syn,
}

/// What of a packet. Those of one family do not match packets of the other.
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
    /// `ct original ip saddr`: who began the connection.
    OriginalSourceV4,
    /// `ct original ip6 saddr`.
    OriginalSourceV6,
    /// `ct original ip daddr`: whom it was addressed to, before destination NAT.
    OriginalDestinationV4,
    /// `ct original ip6 daddr`.
    OriginalDestinationV6,
    /// `ct reply ip saddr`: who answers, behind destination NAT.
    ReplySourceV4,
    /// `ct reply ip6 saddr`.
    ReplySourceV6,
    /// `meta l4proto`.
    Protocol,
    /// `th sport`.
    SourcePort,
    /// `th dport`.
    DestinationPort,
}

/// What is done with a packet.
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
    /// `goto CHAIN`: a packet that comes to its end does not come back.
    Goto(String),
    /// `meta mark set meta mark & 0xKEPT ^ 0xVALUE`: `value` in the bits of `mask`, the others as
    /// they were.
    Mark {
        /// The new bits.
        value: u32,
        /// Which bits.
        mask: u32,
    },
    /// `tcp option maxseg size set rt mtu`: segments fit the path.
    ClampSegments,
    /// `udp dport set PORT` (`tcp`, `sport`): in this packet, with its checksum, and without the
    /// kernel remembering it. Of packets of `protocol` only.
    SetPort {
        /// Where in the packet the checksum is.
        protocol: Transport,
        /// The source's port, not the destination's.
        source: bool,
        /// The new port.
        port: u16,
    },
    /// `masquerade`.
    Masquerade,
    /// `masquerade to :FIRST-LAST`: the source port is in that range behind it. For protocols that
    /// have ports.
    MasqueradeTo {
        /// The lowest port.
        first: u16,
        /// The highest one.
        last: u16,
    },
    /// `dnat ip to KEYS map @MAP` (`ip6`), the map's data an address and a port.
    Translate {
        /// What of the packet is looked up.
        keys: Vec<Key>,
        /// The map's name.
        map: String,
        /// Of IPv6.
        v6: bool,
    },
}
