//! What identifies a table and its contents.
//!
//! The kernel numbers what is made, and gives no number to two tables, or to two objects of one
//! table. A chain counts its rules and a table its chains and sets. So a table is as it was made if
//! what it consists of is found under its number, the counts are the same, and each rule says the
//! same: one that takes the place of another keeps its number (`nf_tables_newrule`).

use crate::encode::{message, request};
use crate::wire::{Attributes, Message, NFTABLES, attribute, attributes, text};

/// `NLM_F_ECHO`.
const ECHO: u16 = 8;

/// A table as it was made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TableIdentity(Vec<Object>);

impl TableIdentity {
    /// The table, and then the chains and rules that were made with it.
    pub(crate) fn new(mut objects: Vec<Object>) -> Self {
        // Chains before rules: the kernel looks a rule up by going through all of its chain, and
        // how many a chain has it tells with the chain.
        objects.sort_by_key(|object| object.kind);
        Self(objects)
    }

    pub(crate) fn objects(&self) -> &[Object] {
        &self.0
    }
}

/// What an object is. In the order in which they are asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum ObjectKind {
    Table,
    Chain,
    Rule,
}

impl ObjectKind {
    const ALL: [Self; 3] = [Self::Table, Self::Chain, Self::Rule];

    /// The requests that make and get one (`NFT_MSG_*`).
    const fn requests(self) -> (u16, u16) {
        match self {
            Self::Table => (request::NEW_TABLE, request::GET_TABLE),
            Self::Chain => (request::NEW_CHAIN, request::GET_CHAIN),
            Self::Rule => (request::NEW_RULE, request::GET_RULE),
        }
    }

    /// The attributes that a request for one names it by.
    const fn names(self) -> &'static [u16] {
        match self {
            // NFTA_TABLE_NAME
            Self::Table => &[1],
            // NFTA_CHAIN_TABLE, _NAME
            Self::Chain => &[1, 3],
            // NFTA_RULE_TABLE, _CHAIN, _HANDLE
            Self::Rule => &[1, 2, 3],
        }
    }

    /// The attributes that are compared.
    const fn compared(self) -> &'static [u16] {
        match self {
            // NFTA_TABLE_FLAGS, _USE, _HANDLE
            Self::Table => &[2, 3, 4],
            // NFTA_CHAIN_HANDLE, _HOOK, _POLICY, _USE, _TYPE, _FLAGS
            Self::Chain => &[2, 4, 5, 6, 7, 10],
            // NFTA_RULE_EXPRESSIONS
            Self::Rule => &[4],
        }
    }

    /// The values of those attributes.
    fn compared_of(self, attributes: &[u8]) -> Vec<Option<Vec<u8>>> {
        let values = self.compared().iter().map(|kind| attribute(attributes, *kind));
        match self {
            Self::Table | Self::Chain => values.map(|value| value.map(<[u8]>::to_vec)).collect(),
            Self::Rule => values.map(|value| value.map(without_counts)).collect(),
        }
    }
}

/// The expressions of a rule, but for counters.
pub(crate) fn without_counts(expressions: &[u8]) -> Vec<u8> {
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
    names: Vec<Option<Vec<u8>>>,
    compared: Vec<Option<Vec<u8>>>,
}

impl Object {
    /// Has the kernel echo what it makes of `message`, if that makes such an object.
    pub(crate) fn have_echoed(message: &mut Message) {
        if ObjectKind::ALL.iter().any(|kind| of_nftables(kind.requests().0) == message.kind) {
            message.flags |= ECHO;
        }
    }

    /// The object that an echo of this type, with these attributes, tells of.
    pub(crate) fn made(kind: u16, attributes: &[u8]) -> Option<Self> {
        let kind = ObjectKind::ALL.into_iter().find(|one| of_nftables(one.requests().0) == kind)?;
        let names = kind.names().iter().map(|name| attribute(attributes, *name));
        let names = names.map(|name| name.map(<[u8]>::to_vec)).collect();
        Some(Self { kind, names, compared: kind.compared_of(attributes) })
    }

    /// Asks for it.
    pub(crate) fn request(&self) -> Message {
        let mut asked = Attributes::default();
        for (kind, name) in self.kind.names().iter().zip(&self.names) {
            if let Some(name) = name {
                asked = asked.bytes(*kind, name);
            }
        }
        message(self.kind.requests().1, 0, asked, String::new())
    }

    /// Whether these attributes, with which the request was answered, are those that it had.
    pub(crate) fn is(&self, attributes: &[u8]) -> bool {
        self.kind.compared_of(attributes) == self.compared
    }
}

fn of_nftables(request: u16) -> u16 {
    NFTABLES << 8 | request
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::{NETLINK_HEADER, Request};

    fn table(flags: u32, uses: u32) -> Vec<u8> {
        let attributes = Attributes::default().text(1, "ours").number(2, flags).number(3, uses);
        let attributes = attributes.bytes(4, &7_u64.to_be_bytes());
        let mut bytes = Vec::new();
        message(request::NEW_TABLE, 0, attributes, String::new()).write(0, 0, &mut bytes);
        bytes.split_off(NETLINK_HEADER + Message::HEAD)
    }

    #[test]
    fn an_object_is_asked_for_by_name_and_told_by_its_number_and_counts() {
        let made = Object::made(of_nftables(request::NEW_TABLE), &table(0, 2)).unwrap();
        let asked = Attributes::default().text(1, "ours");
        assert_eq!(made.request(), message(request::GET_TABLE, 0, asked, String::new()));
        assert!(made.is(&table(0, 2)));
        assert!(!made.is(&table(1, 2)), "dormant");
        assert!(!made.is(&table(0, 3)), "one chain more");
        assert_eq!(Object::made(of_nftables(request::NEW_SET), &table(0, 2)), None);
    }

    #[test]
    fn rules_are_asked_for_behind_their_chains() {
        let object = |request| Object::made(of_nftables(request), &[]).unwrap();
        let [table, chain, rule] =
            [request::NEW_TABLE, request::NEW_CHAIN, request::NEW_RULE].map(object);
        let identity = TableIdentity::new(vec![rule.clone(), table.clone(), chain.clone()]);
        assert_eq!(identity.objects(), [table, chain, rule]);
    }
}
