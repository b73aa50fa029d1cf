//! Selectors of policy rules.

use crate::Family;
use std::fmt;
use std::net::IpAddr;
use tidegate_model::Protocol;

/// The selector of a rule. A packet matches if it meets all conditions that are set.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Selector {
    /// Address family of the packets and of the addresses below.
    pub family: Family,
    /// Packet mark, compared in full.
    pub mark: Option<u32>,
    /// Source address.
    pub from: Option<IpAddr>,
    /// Destination address.
    pub to: Option<IpAddr>,
    /// Transport protocol.
    pub protocol: Option<Protocol>,
    /// Source port. This condition makes the kernel parse the transport header of every packet
    /// routed in the namespace, including unrelated ones.
    pub source_port: Option<u16>,
    /// Input interface; `lo` for packets sent from the namespace itself.
    pub input_interface: Option<String>,
}

impl Selector {
    /// Creates a selector without conditions. [`steer`](super::PolicyRoute::steer) rejects it
    /// unless a condition is added, because it would match every packet.
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

    /// Creates a selector for packets with `mark`.
    #[must_use]
    pub fn marked(family: Family, mark: u32) -> Self {
        Self { mark: Some(mark), ..Self::new(family) }
    }

    /// Returns the reason why the selector is invalid, or `None`.
    pub(super) fn flaw(&self) -> Option<&'static str> {
        let foreign = |ip: &IpAddr| Family::of(*ip) != self.family;
        if self.conditions().all(|set| !set) {
            Some("it would match every packet")
        } else if self.from.iter().chain(&self.to).any(foreign) {
            Some("address of another family")
        } else {
            None
        }
    }

    /// Returns whether `other` has all conditions of `self`.
    ///
    /// In that case, a request to delete the rule of `self` may delete the rule of `other` instead,
    /// because the kernel ignores conditions that a deletion request omits.
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

/// Prints the syntax of ip-rule(8): `from 172.30.0.2 to 203.0.113.9 ipproto udp sport 53`.
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
    fn display_uses_the_syntax_of_ip_rule() {
        assert_eq!(reply("203.0.113.9").to_string(), "to 203.0.113.9 ipproto udp sport 53");
        assert_eq!(Selector::marked(Family::V6, 0x7467_0001).to_string(), "fwmark 0x74670001");
    }

    #[test]
    fn general_selector_covers_specific_one() {
        let all = Selector { to: None, ..reply("203.0.113.9") };
        assert!(all.covers(&reply("203.0.113.9")) && all.covers(&all));
        assert!(!reply("203.0.113.9").covers(&all));
        assert!(!reply("203.0.113.9").covers(&reply("203.0.113.8")));
        assert!(!all.covers(&Selector { family: Family::V6, ..all.clone() }));
    }

    #[test]
    fn selectors_that_match_everything_or_nothing_are_invalid() {
        assert!(Selector::new(Family::V4).flaw().is_some());
        assert!(reply("2001:db8::9").flaw().is_some());
        assert_eq!(reply("203.0.113.9").flaw(), None);
    }
}
