//! Encoding of tables as nf_tables messages.

use crate::expression::{INTERFACE_LENGTH, LIST_ELEMENT, address, bytes_of, data, expressions};
use crate::table::{Chain, Element, Field, Hook, Kind, Rule, Set, Value};
use crate::wire::{Attributes, Message, NFTABLES};
use ipnet::IpNet;
use std::net::IpAddr;

/// `NFT_MSG_*`.
pub(crate) mod request {
    pub(crate) const NEW_TABLE: u16 = 0;
    pub(crate) const GET_TABLE: u16 = 1;
    pub(crate) const DELETE_TABLE: u16 = 2;
    pub(crate) const NEW_CHAIN: u16 = 3;
    pub(crate) const GET_CHAIN: u16 = 4;
    pub(crate) const DELETE_CHAIN: u16 = 5;
    pub(crate) const NEW_RULE: u16 = 6;
    pub(crate) const GET_RULE: u16 = 7;
    pub(crate) const DELETE_RULE: u16 = 8;
    pub(crate) const NEW_SET: u16 = 9;
    pub(crate) const GET_SET: u16 = 10;
    pub(crate) const DELETE_SET: u16 = 11;
    pub(crate) const NEW_ELEMENTS: u16 = 12;
    pub(crate) const GET_ELEMENTS: u16 = 13;
    pub(crate) const DELETE_ELEMENTS: u16 = 14;
    pub(crate) const GET_GENERATION: u16 = 16;
}

/// `NFPROTO_INET`.
pub(crate) const INET: u8 = 1;

/// `NLM_F_CREATE`, and `NLM_F_APPEND` for rules.
pub(crate) const CREATE: u16 = 0x400;
pub(crate) const APPEND: u16 = 0x800;

/// Maximum bytes of set elements per message. The length field of an attribute limits it to 64 KiB.
const MAX_ELEMENTS_BYTES: usize = 48 << 10;

/// Builds a request for the `inet` family.
pub(crate) fn message(request: u16, flags: u16, attributes: Attributes, about: String) -> Message {
    Message { kind: NFTABLES << 8 | request, flags, family: INET, resource: 0, attributes, about }
}

/// Begins a transaction (`NFNL_MSG_BATCH_BEGIN`).
pub(crate) fn batch_begin() -> Message {
    batch(0x10)
}

/// Ends a transaction (`NFNL_MSG_BATCH_END`). The kernel applies the messages in between
/// atomically.
pub(crate) fn batch_end() -> Message {
    batch(0x11)
}

fn batch(kind: u16) -> Message {
    let about = "transaction".to_owned();
    Message {
        kind,
        flags: 0,
        family: 0,
        resource: NFTABLES,
        attributes: Attributes::default(),
        about,
    }
}

/// Creates a table, or sets the flags of an existing one.
pub(crate) fn new_table(name: &str, flags: u32) -> Message {
    let attributes = Attributes::default().text(1, name).number(2, flags);
    message(request::NEW_TABLE, CREATE, attributes, format!("table {name}"))
}

/// Deletes a table and its contents.
pub(crate) fn delete_table(name: &str) -> Message {
    let attributes = Attributes::default().text(1, name);
    message(request::DELETE_TABLE, 0, attributes, format!("table {name}"))
}

/// Creates a chain without rules.
pub(crate) fn new_chain(table: &str, chain: &Chain) -> Message {
    let mut attributes = Attributes::default().text(1, table).text(3, &chain.name);
    if let Some(base) = &chain.base {
        let hook = match base.hook {
            Hook::Prerouting => 0,
            Hook::Input => 1,
            Hook::Forward => 2,
            Hook::Output => 3,
            Hook::Postrouting => 4,
        };
        let kind = match base.kind {
            Kind::Filter => "filter",
            Kind::Nat => "nat",
        };
        let hook = Attributes::default().number(1, hook).bytes(2, &base.priority.to_be_bytes());
        // NF_ACCEPT
        attributes = attributes.nest(4, &hook).number(5, 1).text(7, kind);
    }
    message(
        request::NEW_CHAIN,
        CREATE,
        attributes,
        format!("chain {} of table {table}", chain.name),
    )
}

/// Deletes all rules of a chain.
pub(crate) fn flush_chain(table: &str, chain: &str) -> Message {
    let attributes = Attributes::default().text(1, table).text(2, chain);
    message(request::DELETE_RULE, 0, attributes, format!("rules of chain {chain} of table {table}"))
}

/// Deletes an empty chain.
pub(crate) fn delete_chain(table: &str, chain: &str) -> Message {
    let attributes = Attributes::default().text(1, table).text(3, chain);
    message(request::DELETE_CHAIN, 0, attributes, format!("chain {chain} of table {table}"))
}

/// Appends a rule to a chain.
pub(crate) fn new_rule(table: &str, chain: &str, rule: &Rule) -> Message {
    let attributes = Attributes::default().text(1, table).text(2, chain);
    let attributes = attributes.nest(4, &expressions(&rule.matches, &rule.actions));
    let attributes = match comment(&rule.comment) {
        Some(comment) => attributes.bytes(7, &comment),
        None => attributes,
    };
    let about = format!("rule {:?} in chain {chain} of table {table}", rule.comment);
    message(request::NEW_RULE, CREATE | APPEND, attributes, about)
}

/// Encodes a rule comment in the userdata format of nft(8): type, length, NUL-terminated text.
pub(crate) fn comment(text: &str) -> Option<Vec<u8>> {
    /// `NFTNL_UDATA_RULE_COMMENT` of libnftnl.
    const COMMENT: u8 = 0;
    let length = u8::try_from(text.len() + 1).ok()?;
    Some([&[COMMENT, length], text.as_bytes(), &[0]].concat())
}

/// Creates a set without elements. `id` must be unique within the transaction.
pub(crate) fn new_set(table: &str, set: &Set, id: u32) -> Message {
    /// `NFT_SET_*`.
    const CONSTANT: u32 = 2;
    const INTERVAL: u32 = 4;
    const MAP: u32 = 8;
    const CONCATENATION: u32 = 0x80;

    let concatenation = set.key.len() > 1;
    let flags = [
        (set.constant, CONSTANT),
        (set.intervals, INTERVAL),
        (!set.data.is_empty(), MAP),
        (concatenation, CONCATENATION),
    ];
    let flags = flags.iter().filter(|(is, _)| *is).fold(0, |flags, (_, flag)| flags | flag);
    let mut attributes = Attributes::default().text(1, table).text(2, &set.name).number(3, flags);
    attributes = attributes.number(4, type_of(&set.key)).number(5, length_of(&set.key));
    if !set.data.is_empty() {
        attributes = attributes.number(6, type_of(&set.data)).number(7, length_of(&set.data));
    }
    attributes = attributes.number(10, id);
    if set.key == [Field::Interface] {
        attributes = attributes.bytes(13, &key_byte_order());
    }
    let mut description = Attributes::default();
    if set.constant && !set.intervals {
        // NFTA_SET_DESC_SIZE: selects a hash table of fixed size, which is never resized during
        // lookups.
        description = description.number(1, set.elements.len().max(1) as u32);
    }
    if concatenation {
        let mut fields = Attributes::default();
        for field in &set.key {
            fields = fields.nest(LIST_ELEMENT, &Attributes::default().number(1, length(*field)));
        }
        // NFTA_SET_DESC_CONCAT
        description = description.nest(2, &fields);
    }
    if description != Attributes::default() {
        // NFTA_SET_DESC
        attributes = attributes.nest(9, &description);
    }
    message(request::NEW_SET, CREATE, attributes, format!("set {} of table {table}", set.name))
}

/// Set userdata that nft(8) needs to list interface names: the keys are in host byte order. Encoded
/// as type, length, value.
fn key_byte_order() -> Vec<u8> {
    /// `NFTNL_UDATA_SET_KEYBYTEORDER` of libnftnl.
    const KEY_BYTE_ORDER: u8 = 0;
    /// `BYTEORDER_HOST_ENDIAN` of nftables.
    const HOST: u32 = 1;
    [&[KEY_BYTE_ORDER, 4][..], &HOST.to_ne_bytes()].concat()
}

/// Deletes a set that no rule references.
pub(crate) fn delete_set(table: &str, set: &str) -> Message {
    let attributes = Attributes::default().text(1, table).text(2, set);
    message(request::DELETE_SET, 0, attributes, format!("set {set} of table {table}"))
}

/// Adds the elements of `set` to the set of that name, split into as many messages as necessary.
pub(crate) fn new_elements(table: &str, set: &Set) -> Vec<Message> {
    elements(request::NEW_ELEMENTS, CREATE, table, set)
}

/// Deletes the elements of `set` from the set of that name.
pub(crate) fn delete_elements(table: &str, set: &Set) -> Vec<Message> {
    elements(request::DELETE_ELEMENTS, 0, table, set)
}

fn elements(kind: u16, flags: u16, table: &str, set: &Set) -> Vec<Message> {
    let mut messages = Vec::new();
    let mut list = Attributes::default();
    let finish = |list: Attributes| {
        let attributes = Attributes::default().text(1, table).text(2, &set.name).nest(3, &list);
        message(kind, flags, attributes, format!("elements of set {} of table {table}", set.name))
    };
    for element in set.elements.iter().flat_map(|element| encode(set, element)) {
        if list.len() + element.len() > MAX_ELEMENTS_BYTES {
            messages.push(finish(std::mem::take(&mut list)));
        }
        list = list.nest(LIST_ELEMENT, &element);
    }
    if list.len() > 0 {
        messages.push(finish(list));
    }
    messages
}

/// `NFTA_SET_ELEM_*`.
mod element {
    pub(super) const KEY: u16 = 1;
    pub(super) const DATA: u16 = 2;
    pub(super) const FLAGS: u16 = 3;
    pub(super) const KEY_END: u16 = 10;
    /// `NFT_SET_ELEM_INTERVAL_END`.
    pub(super) const INTERVAL_END: u32 = 1;
}

/// Encodes one element. In an interval set without concatenation, a range is encoded as its first
/// value and an end marker at the first value after it.
fn encode(set: &Set, element: &Element) -> Vec<Attributes> {
    let [first, last] = [true, false].map(|first| concatenated(&element.key, first));
    let mut encoded = Attributes::default().nest(element::KEY, &data(&first));
    if set.intervals && set.key.len() > 1 {
        encoded = encoded.nest(element::KEY_END, &data(&last));
    }
    if !element.data.is_empty() {
        encoded = encoded.nest(element::DATA, &data(&concatenated(&element.data, true)));
    }
    let mut all = vec![encoded];
    if set.intervals && set.key.len() == 1 {
        // A range up to the highest value has no successor and no end marker.
        if let Some(end) = successor(&last) {
            let end = Attributes::default().nest(element::KEY, &data(&end));
            all.push(end.number(element::FLAGS, element::INTERVAL_END));
        }
    }
    all
}

/// Concatenates values. Several values are padded to multiples of 4 bytes each. A network
/// contributes its first or last address.
fn concatenated(values: &[Value], first: bool) -> Vec<u8> {
    let mut bytes = Vec::new();
    for value in values {
        bytes.extend(match value {
            Value::Net(net) if !first => address(last_of(net)),
            value => bytes_of(value),
        });
        if values.len() > 1 {
            bytes.resize(bytes.len().next_multiple_of(4), 0);
        }
    }
    bytes
}

fn last_of(net: &IpNet) -> IpAddr {
    // `Ipv6Net::broadcast` returns the last address of the prefix.
    match net {
        IpNet::V4(net) => net.broadcast().into(),
        IpNet::V6(net) => net.broadcast().into(),
    }
}

/// Returns `bytes` + 1, as a number in network byte order.
fn successor(bytes: &[u8]) -> Option<Vec<u8>> {
    let mut next = bytes.to_vec();
    for byte in next.iter_mut().rev() {
        let (sum, carries) = byte.overflowing_add(1);
        *byte = sum;
        if !carries {
            return Some(next);
        }
    }
    None
}

/// Type number of nft(8), which the kernel stores without interpreting it (`enum datatypes` of
/// nftables). A concatenation uses 6 bits per type.
fn type_of(fields: &[Field]) -> u32 {
    fields.iter().fold(0, |all, field| {
        all << 6
            | match field {
                Field::Interface => 41,
                Field::Ipv4 => 7,
                Field::Ipv6 => 8,
                Field::Protocol => 12,
                Field::Port => 13,
                // "integer"
                Field::Vni => 4,
            }
    })
}

/// Length of a value in bytes.
fn length(field: Field) -> u32 {
    match field {
        Field::Interface => INTERFACE_LENGTH as u32,
        Field::Ipv4 => 4,
        Field::Ipv6 => 16,
        Field::Protocol => 1,
        Field::Port => 2,
        Field::Vni => 3,
    }
}

/// Length of the output of [`concatenated`] in bytes.
fn length_of(fields: &[Field]) -> u32 {
    match fields {
        [field] => length(*field),
        fields => fields.iter().map(|field| length(*field).next_multiple_of(4)).sum(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn successor_carries_and_stops_at_the_maximum() {
        assert_eq!(successor(&[10, 9, 1, 255]), Some(vec![10, 9, 2, 0]));
        assert_eq!(successor(&[255, 255]), None);
    }

    #[test]
    fn elements_of_a_large_set_are_split() {
        let port = |port| Element { key: vec![Value::Port(port)], data: Vec::new() };
        let set = Set {
            name: "ports".to_owned(),
            key: vec![Field::Port],
            data: Vec::new(),
            intervals: false,
            constant: false,
            elements: (1..=10_000).map(port).collect(),
        };
        let messages = new_elements("t", &set);
        assert!(messages.len() > 1);
        assert!(messages.iter().all(|message| message.attributes.len() < 65_000));
    }
}
