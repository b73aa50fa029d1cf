//! Identity of a table and its contents.
//!
//! The kernel assigns each object a handle and never reuses it: table handles are unique among
//! tables, chain and rule handles within their table. A chain counts its rules, and a table its
//! chains and sets. A table is therefore unchanged if the handles and counts of its objects are
//! unchanged and each rule has the same expressions. The expressions are compared because a
//! replacement keeps the handle of the rule (`nf_tables_newrule`).

use crate::encode::{message, request};
use crate::wire::{Attributes, Message, NFTABLES, attribute, attributes, text};

/// `NLM_F_ECHO`.
const ECHO: u16 = 8;

/// Identity of a table at the time of its creation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TableIdentity(Vec<Object>);

impl TableIdentity {
    /// Builds the identity from the table and the chains and rules created with it.
    pub(crate) fn new(mut objects: Vec<Object>) -> Self {
        // Chains before rules: a rule lookup traverses its chain, and the rule count of the chain
        // detects most changes without one.
        objects.sort_by_key(|object| object.kind);
        Self(objects)
    }

    pub(crate) fn objects(&self) -> &[Object] {
        &self.0
    }
}

/// Type of an object. The variants are in the order of the requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum ObjectKind {
    Table,
    Chain,
    Rule,
}

impl ObjectKind {
    const ALL: [Self; 3] = [Self::Table, Self::Chain, Self::Rule];

    /// Requests that create and get an object (`NFT_MSG_*`).
    const fn requests(self) -> (u16, u16) {
        match self {
            Self::Table => (request::NEW_TABLE, request::GET_TABLE),
            Self::Chain => (request::NEW_CHAIN, request::GET_CHAIN),
            Self::Rule => (request::NEW_RULE, request::GET_RULE),
        }
    }

    /// Attributes that identify an object in a request.
    const fn key_attributes(self) -> &'static [u16] {
        match self {
            // NFTA_TABLE_NAME
            Self::Table => &[1],
            // NFTA_CHAIN_TABLE, _NAME
            Self::Chain => &[1, 3],
            // NFTA_RULE_TABLE, _CHAIN, _HANDLE
            Self::Rule => &[1, 2, 3],
        }
    }

    /// Attributes that are compared.
    const fn compared_attributes(self) -> &'static [u16] {
        match self {
            // NFTA_TABLE_FLAGS, _USE, _HANDLE
            Self::Table => &[2, 3, 4],
            // NFTA_CHAIN_HANDLE, _HOOK, _POLICY, _USE, _TYPE, _FLAGS
            Self::Chain => &[2, 4, 5, 6, 7, 10],
            // NFTA_RULE_EXPRESSIONS
            Self::Rule => &[4],
        }
    }

    /// Returns the values of the compared attributes.
    fn compared_values(self, attributes: &[u8]) -> Vec<Option<Vec<u8>>> {
        let values = self.compared_attributes().iter().map(|kind| attribute(attributes, *kind));
        match self {
            Self::Table | Self::Chain => values.map(|value| value.map(<[u8]>::to_vec)).collect(),
            Self::Rule => values.map(|value| value.map(without_counters)).collect(),
        }
    }
}

/// Returns the expressions of a rule without its counters, whose values change with the traffic.
pub(crate) fn without_counters(expressions: &[u8]) -> Vec<u8> {
    // NFTA_EXPR_NAME
    let is_counter = |expression| attribute(expression, 1).map(text).as_deref() == Some("counter");
    attributes(expressions)
        .filter(|(_, expression)| !is_counter(expression))
        .flat_map(|(_, expression)| expression.iter().copied())
        .collect()
}

/// A table, chain or rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Object {
    kind: ObjectKind,
    keys: Vec<Option<Vec<u8>>>,
    compared: Vec<Option<Vec<u8>>>,
}

impl Object {
    /// Requests an echo for `message` if it creates a table, chain or rule.
    pub(crate) fn request_echo(message: &mut Message) {
        if ObjectKind::ALL.iter().any(|kind| message_type(kind.requests().0) == message.kind) {
            message.flags |= ECHO;
        }
    }

    /// Parses an echo: its message type and attributes. Returns `None` for other types of objects.
    pub(crate) fn from_echo(kind: u16, attributes: &[u8]) -> Option<Self> {
        let kind =
            ObjectKind::ALL.into_iter().find(|one| message_type(one.requests().0) == kind)?;
        let keys = kind.key_attributes().iter().map(|key| attribute(attributes, *key));
        let keys = keys.map(|key| key.map(<[u8]>::to_vec)).collect();
        Some(Self { kind, keys, compared: kind.compared_values(attributes) })
    }

    /// Builds the request for the current attributes of the object.
    pub(crate) fn request(&self) -> Message {
        let mut request_attributes = Attributes::default();
        for (kind, key) in self.kind.key_attributes().iter().zip(&self.keys) {
            if let Some(key) = key {
                request_attributes = request_attributes.bytes(*kind, key);
            }
        }
        message(self.kind.requests().1, 0, request_attributes, String::new())
    }

    /// Returns whether the attributes of a reply equal those at creation.
    pub(crate) fn matches(&self, attributes: &[u8]) -> bool {
        self.kind.compared_values(attributes) == self.compared
    }
}

/// Returns the netlink message type of a request (`NFNL_SUBSYS_NFTABLES`).
fn message_type(request: u16) -> u16 {
    NFTABLES << 8 | request
}

#[cfg(test)]
mod tests {
    use super::*;
    use tidegate_netlink::{HEADER, Request};

    fn table(flags: u32, uses: u32) -> Vec<u8> {
        let attributes = Attributes::default().text(1, "ours").number(2, flags).number(3, uses);
        let attributes = attributes.bytes(4, &7_u64.to_be_bytes());
        let mut bytes = Vec::new();
        message(request::NEW_TABLE, 0, attributes, String::new()).write(0, 0, &mut bytes);
        bytes.split_off(HEADER + Message::HEAD)
    }

    #[test]
    fn table_is_requested_by_name_and_compared_by_flags_and_counts() {
        let created = Object::from_echo(message_type(request::NEW_TABLE), &table(0, 2)).unwrap();
        let key = Attributes::default().text(1, "ours");
        assert_eq!(created.request(), message(request::GET_TABLE, 0, key, String::new()));
        assert!(created.matches(&table(0, 2)));
        assert!(!created.matches(&table(1, 2)), "dormant");
        assert!(!created.matches(&table(0, 3)), "additional chain");
        assert_eq!(Object::from_echo(message_type(request::NEW_SET), &table(0, 2)), None);
    }

    #[test]
    fn rules_are_requested_after_chains() {
        let object = |request| Object::from_echo(message_type(request), &[]).unwrap();
        let [table, chain, rule] =
            [request::NEW_TABLE, request::NEW_CHAIN, request::NEW_RULE].map(object);
        let identity = TableIdentity::new(vec![rule.clone(), table.clone(), chain.clone()]);
        assert_eq!(identity.objects(), [table, chain, rule]);
    }
}
