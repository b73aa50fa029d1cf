//! What packets a rule is about.

use crate::Family;
use std::fmt;
use std::net::IpAddr;
use tidegate_model::Protocol;

/// The packets that a rule applies to: those that meet every condition that is set.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Selector {
    /// The packets' family; the addresses are of the same.
    pub family: Family,
    /// The packet's mark, the whole of it.
    pub mark: Option<u32>,
    /// The source address.
    pub from: Option<IpAddr>,
    /// The destination address.
    pub to: Option<IpAddr>,
    /// The transport.
    pub protocol: Option<Protocol>,
    /// The source port. Makes the kernel look into the transport header of every packet that is
    /// routed in the namespace, also of those that are none of ours.
    pub source_port: Option<u16>,
    /// The interface the packet came in by; `lo` for packets of the namespace's own.
    pub input_interface: Option<String>,
}

impl Selector {
    /// No condition yet. [`steer`](super::PolicyRoute::steer) refuses it as it is: every packet
    /// would match.
    #[must_use]
    pub const fn new(family: Family) -> Self {
        Self {
            family,
            mark: None,
            from: None,
            to: None,
            protocol: None,
            source_port: None,
            input_interface: None,
        }
    }

    /// Packets with this mark.
    #[must_use]
    pub fn marked(family: Family, mark: u32) -> Self {
        Self { mark: Some(mark), ..Self::new(family) }
    }

    /// What is wrong with it, if anything is.
    pub(super) fn flaw(&self) -> Option<&'static str> {
        let alien = |ip: &IpAddr| Family::of(*ip) != self.family;
        if self.conditions().all(|set| !set) {
            Some("it would match every packet")
        } else if self.from.iter().chain(&self.to).any(alien) {
            Some("the addresses are not of its family")
        } else {
            None
        }
    }

    /// Whether every condition of this one is one of `other`'s, too.
    ///
    /// Then the kernel, told to delete the rule of this one, may delete that of `other`: a
    /// condition that a request leaves out is one that may be anything.
    pub(super) fn covers(&self, other: &Self) -> bool {
        fn meets<T: PartialEq>(mine: Option<&T>, other: Option<&T>) -> bool {
            mine.is_none() || mine == other
        }
        self.family == other.family
            && meets(self.mark.as_ref(), other.mark.as_ref())
            && meets(self.from.as_ref(), other.from.as_ref())
            && meets(self.to.as_ref(), other.to.as_ref())
            && meets(self.protocol.as_ref(), other.protocol.as_ref())
            && meets(self.source_port.as_ref(), other.source_port.as_ref())
            && meets(self.input_interface.as_ref(), other.input_interface.as_ref())
    }

    fn conditions(&self) -> impl Iterator<Item = bool> {
        [
            self.mark.is_some(),
            self.from.is_some(),
            self.to.is_some(),
            self.protocol.is_some(),
            self.source_port.is_some(),
            self.input_interface.is_some(),
        ]
        .into_iter()
    }
}

/// As ip-rule(8) takes it: `from 172.30.0.2 to 203.0.113.9 ipproto udp sport 53`.
impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let conditions = [
            self.from.map(|ip| format!("from {ip}")),
            self.to.map(|ip| format!("to {ip}")),
            self.mark.map(|mark| format!("fwmark {mark:#x}")),
            self.input_interface.as_ref().map(|name| format!("iif {name}")),
            self.protocol.map(|protocol| format!("ipproto {protocol}")),
            self.source_port.map(|port| format!("sport {port}")),
        ];
        let conditions: Vec<String> = conditions.into_iter().flatten().collect();
        if conditions.is_empty() {
            f.write_str("from all")
        } else {
            f.write_str(&conditions.join(" "))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reply(client: &str) -> Selector {
        Selector {
            to: Some(client.parse().unwrap()),
            protocol: Some(Protocol::Udp),
            source_port: Some(53),
            ..Selector::new(Family::V4)
        }
    }

    #[test]
    fn it_reads_as_ip_rule_takes_it() {
        assert_eq!(reply("203.0.113.9").to_string(), "to 203.0.113.9 ipproto udp sport 53");
        assert_eq!(Selector::marked(Family::V6, 0x7467_0001).to_string(), "fwmark 0x74670001");
    }

    #[test]
    fn the_more_general_covers_the_more_special() {
        let all = Selector { to: None, ..reply("203.0.113.9") };
        assert!(all.covers(&reply("203.0.113.9")) && all.covers(&all));
        assert!(!reply("203.0.113.9").covers(&all));
        assert!(!reply("203.0.113.9").covers(&reply("203.0.113.8")));
        assert!(!all.covers(&Selector { family: Family::V6, ..all.clone() }));
    }

    #[test]
    fn what_would_catch_everything_or_nothing_is_flawed() {
        assert!(Selector::new(Family::V4).flaw().is_some());
        assert!(reply("2001:db8::9").flaw().is_some());
        assert_eq!(reply("203.0.113.9").flaw(), None);
    }
}
