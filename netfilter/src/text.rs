//! Output of tables in the syntax of nft(8).

use crate::table::{
    Action, Chain, Element, Field, Hook, Key, Kind, Match, Rule, Set, Table, Transport, Value,
};
use std::fmt::{self, Display, Formatter};

/// Prints the table as input for `nft -f`. The alternate form `{:#}` omits set elements.
impl Display for Table {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        writeln!(f, "table inet {} {{", self.name)?;
        for (number, set) in self.sets.iter().enumerate() {
            if number > 0 {
                writeln!(f)?;
            }
            set.write(f)?;
        }
        for chain in &self.chains {
            writeln!(f)?;
            chain.write(f)?;
        }
        writeln!(f, "}}")
    }
}

impl Set {
    fn write(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let kind = if self.data.is_empty() { "set" } else { "map" };
        writeln!(f, "\t{kind} {} {{", self.name)?;
        let by = if self.key == [Field::Vni] { "typeof" } else { "type" };
        write!(f, "\t\t{by} {}", Joined(&self.key))?;
        if !self.data.is_empty() {
            write!(f, " : {}", Joined(&self.data))?;
        }
        writeln!(f)?;
        let flags = [(self.constant, "constant"), (self.intervals, "interval")];
        let flags: Vec<&str> = flags.iter().filter(|(is, _)| *is).map(|(_, flag)| *flag).collect();
        if !flags.is_empty() {
            writeln!(f, "\t\tflags {}", flags.join(","))?;
        }
        if !self.elements.is_empty() && !f.alternate() {
            write!(f, "\t\telements = {{ ")?;
            for (number, element) in self.elements.iter().enumerate() {
                if number > 0 {
                    write!(f, ",\n\t\t\t     ")?;
                }
                write!(f, "{element}")?;
            }
            writeln!(f, " }}")?;
        }
        writeln!(f, "\t}}")
    }
}

impl Display for Element {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "{}", Joined(&self.key))?;
        if !self.data.is_empty() {
            write!(f, " : {}", Joined(&self.data))?;
        }
        Ok(())
    }
}

impl Chain {
    fn write(&self, f: &mut Formatter<'_>) -> fmt::Result {
        writeln!(f, "\tchain {} {{", self.name)?;
        if let Some(base) = &self.base {
            let kind = match base.kind {
                Kind::Filter => "filter",
                Kind::Nat => "nat",
            };
            let hook = match base.hook {
                Hook::Prerouting => "prerouting",
                Hook::Input => "input",
                Hook::Forward => "forward",
                Hook::Output => "output",
                Hook::Postrouting => "postrouting",
            };
            writeln!(f, "\t\ttype {kind} hook {hook} priority {}; policy accept;", base.priority)?;
        }
        for rule in &self.rules {
            writeln!(f, "\t\t{rule}")?;
        }
        writeln!(f, "\t}}")
    }
}

impl Display for Rule {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        for one in &self.matches {
            write!(f, "{one} ")?;
        }
        for (number, one) in self.actions.iter().enumerate() {
            let separator = if number > 0 { " " } else { "" };
            write!(f, "{separator}{one}")?;
        }
        if !self.comment.is_empty() {
            write!(f, " comment \"{}\"", self.comment)?;
        }
        Ok(())
    }
}

impl Display for Match {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let negation = |not: &bool| if *not { "!= " } else { "" };
        match self {
            Self::In { keys, set, not } => write!(f, "{} {}@{set}", Joined(keys), negation(not)),
            Self::Is { key, value, not } => write!(f, "{key} {}{value}", negation(not)),
            Self::Established => f.write_str("ct state established,related"),
            Self::Known => f.write_str("ct state established"),
            Self::Translated => f.write_str("ct status snat,dnat"),
            Self::TranslatedSource => f.write_str("ct status snat"),
            Self::Invalid => f.write_str("ct state invalid"),
            Self::TranslatedDestination => f.write_str("ct status dnat"),
            Self::Reply => f.write_str("ct direction reply"),
            Self::ToHost => f.write_str("fib daddr type local"),
            Self::FromHostAddress => f.write_str("fib saddr type local"),
            Self::Family { v6 } => {
                f.write_str(if *v6 { "meta nfproto ipv6" } else { "meta nfproto ipv4" })
            }
            Self::NotToHost => f.write_str("fib daddr type != local"),
            Self::FromProcess => f.write_str("meta skuid >= 0"),
            Self::FromBridge => f.write_str("meta iifkind \"bridge\""),
            Self::FromHost => f.write_str("iif 0"),
            Self::NotIcmpv6 => f.write_str("meta l4proto != ipv6-icmp"),
            Self::Syn => f.write_str("tcp flags syn / syn,rst"),
            Self::Unfragmented => f.write_str("ip frag-off & 0x3fff 0"),
            Self::NextHeader(protocol) => {
                write!(f, "ip6 nexthdr {}", Value::Protocol(*protocol))
            }
        }
    }
}

impl Display for Action {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Count => f.write_str("counter"),
            Self::Accept => f.write_str("accept"),
            Self::Drop => f.write_str("drop"),
            Self::Return => f.write_str("return"),
            Self::Jump(chain) => write!(f, "jump {chain}"),
            Self::Goto(chain) => write!(f, "goto {chain}"),
            Self::Mark { value, mask } => {
                write!(f, "meta mark set meta mark & {:#010x} ^ {value:#010x}", !mask)
            }
            Self::ClampSegments => f.write_str("tcp option maxseg size set rt mtu"),
            Self::SetPort { protocol, source, port } => {
                let side = if *source { "sport" } else { "dport" };
                write!(f, "{} {side} set {port}", Value::Protocol(*protocol))
            }
            Self::Masquerade => f.write_str("masquerade"),
            Self::MasqueradeTo { first, last } if first == last => {
                write!(f, "masquerade to :{first}")
            }
            Self::MasqueradeTo { first, last } => write!(f, "masquerade to :{first}-{last}"),
            Self::Translate { keys, map, v6 } => {
                let family = if *v6 { "ip6" } else { "ip" };
                write!(f, "dnat {family} to {} map @{map}", Joined(keys))
            }
        }
    }
}

impl Display for Key {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::InInterface => "iifname",
            Self::OutInterface => "oifname",
            Self::InGroup => "iifgroup",
            Self::OutGroup => "oifgroup",
            Self::SourceV4 => "ip saddr",
            Self::SourceV6 => "ip6 saddr",
            Self::DestinationV4 => "ip daddr",
            Self::DestinationV6 => "ip6 daddr",
            Self::OriginalSourceV4 => "ct original ip saddr",
            Self::OriginalSourceV6 => "ct original ip6 saddr",
            Self::OriginalDestinationV4 => "ct original ip daddr",
            Self::OriginalDestinationV6 => "ct original ip6 daddr",
            Self::ReplySourceV4 => "ct reply ip saddr",
            Self::ReplySourceV6 => "ct reply ip6 saddr",
            Self::Protocol => "meta l4proto",
            Self::SourcePort => "th sport",
            Self::DestinationPort => "th dport",
            Self::Vni => "vxlan vni",
        })
    }
}

impl Display for Field {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Interface => "ifname",
            Self::Ipv4 => "ipv4_addr",
            Self::Ipv6 => "ipv6_addr",
            Self::Protocol => "inet_proto",
            Self::Port => "inet_service",
            Self::Vni => "vxlan vni",
        })
    }
}

impl Display for Value {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Interface(name) => write!(f, "\"{name}\""),
            Self::InterfacePrefix(prefix) => write!(f, "\"{prefix}*\""),
            Self::Group(group) => write!(f, "{group}"),
            Self::Net(net) if net.prefix_len() == net.max_prefix_len() => {
                write!(f, "{}", net.addr())
            }
            Self::Net(net) => write!(f, "{}", net.trunc()),
            Self::Protocol(Transport::Tcp) => f.write_str("tcp"),
            Self::Protocol(Transport::Udp) => f.write_str("udp"),
            // Names from getprotobynumber(3), as printed by nft(8).
            Self::OtherProtocol(1) => f.write_str("icmp"),
            Self::OtherProtocol(58) => f.write_str("ipv6-icmp"),
            Self::OtherProtocol(132) => f.write_str("sctp"),
            Self::OtherProtocol(136) => f.write_str("udplite"),
            Self::OtherProtocol(number) => write!(f, "{number}"),
            Self::Port(port) => write!(f, "{port}"),
            Self::Vni(vni) => write!(f, "{vni}"),
        }
    }
}

/// Prints a concatenation.
struct Joined<'a, T>(&'a [T]);

impl<T: Display> Display for Joined<'_, T> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        for (number, one) in self.0.iter().enumerate() {
            let separator = if number > 0 { " . " } else { "" };
            write!(f, "{separator}{one}")?;
        }
        Ok(())
    }
}
