//! Port guards as nftables chains of family `netdev`, one per bridge port, at the ingress hook of
//! its link.
//!
//! The kernel removes the chain with its link; the table must be deleted explicitly. The table is
//! not owned, so other processes can flush it.

use super::compile::BURST;
use super::rules::{DEFAULT_VERDICT, Rule, SpoofReason, Test, Verdict};
use super::{Dropped, Policer};
use crate::encode::{self, request};
use crate::expression::Expressions;
use crate::table::Action;
use crate::wire::{Attributes, Message, attribute, attributes, text};
use std::io;
use std::num::NonZeroU32;
use tidegate_netlink::NetlinkSocket;

/// `NFPROTO_NETDEV`.
const NETDEV: u8 = 5;

/// Ahead of other chains at the hook. `NF_IP_PRI_FIRST` is lower but unused in practice.
const PRIORITY: i32 = -1000;

/// Ethertypes of VLAN tags. For a tagged frame, nft_payload reconstructs the VLAN header, so the
/// tag appears in place of the ethertype (`nft_payload_copy_vlan`).
const VLAN_TAGS: [[u8; 2]; 2] = [[0x81, 0x00], [0x88, 0xa8]];
const ETHERTYPE: u16 = 12;

const BROADCAST: [u8; 6] = [0xff; 6];

/// Attaches `rules` at the ingress of `link`, as the chain `link` of `table`.
pub(super) fn attach(
    socket: &mut NetlinkSocket,
    table: &str,
    link: &str,
    rules: &[Rule],
    policer: Option<&Policer>,
) -> io::Result<()> {
    let mut messages = vec![encode::batch_begin(), netdev(encode::new_table(table, 0))];
    if has_chain(socket, table, link)? {
        messages.push(netdev(encode::flush_chain(table, link)));
        messages.push(netdev(encode::delete_chain(table, link)));
    }
    messages.push(new_chain(table, link));
    messages.extend(nft_rules(rules, policer).iter().map(|rule| new_rule(table, link, rule)));
    messages.push(encode::batch_end());
    match socket.send_all(&messages, |_, _| ())?.into_iter().next() {
        None => Ok(()),
        Some(rejected) => Err(rejected.source),
    }
}

/// Returns whether the chain of `link` exists and has the expected number of rules.
pub(super) fn is_attached(
    socket: &mut NetlinkSocket,
    table: &str,
    link: &str,
    rules: &[Rule],
    policer: Option<&Policer>,
) -> io::Result<bool> {
    let mut found = 0;
    for_each_rule(socket, table, link, |_| found += 1)?;
    Ok(found == nft_rules(rules, policer).len())
}

/// Reads the number of frames dropped at `link`, by reason.
pub(super) fn dropped(socket: &mut NetlinkSocket, table: &str, link: &str) -> io::Result<Dropped> {
    let mut dropped = Dropped::default();
    for_each_rule(socket, table, link, |rule| {
        let comment = attribute(rule, USERDATA).and_then(|data| data.get(2..)).map(text);
        let reason =
            SpoofReason::ALL.into_iter().find(|one| Some(one.as_str()) == comment.as_deref());
        let counter = match reason {
            Some(reason) => &mut dropped.spoofed[reason as usize],
            None if comment.as_deref() == Some(POLICED) => &mut dropped.policed,
            None => return,
        };
        let expressions = attributes(attribute(rule, EXPRESSIONS).unwrap_or_default());
        let packets = expressions.filter_map(|(_, expression)| {
            // NFTA_EXPR_NAME, NFTA_EXPR_DATA, NFTA_COUNTER_PACKETS
            let is_counter = attribute(expression, 1).map(text).as_deref() == Some("counter");
            let packets = attribute(attribute(expression, 2)?, 2).filter(|_| is_counter)?;
            Some(u64::from_be_bytes(packets.try_into().ok()?))
        });
        *counter += packets.sum::<u64>();
    })?;
    Ok(dropped)
}

/// Creates the table without chains.
pub(super) fn make(socket: &mut NetlinkSocket, table: &str) -> io::Result<()> {
    let messages =
        [encode::batch_begin(), netdev(encode::new_table(table, 0)), encode::batch_end()];
    match socket.send_all(&messages, |_, _| ())?.into_iter().next() {
        None => Ok(()),
        Some(rejected) => Err(rejected.source),
    }
}

/// Returns whether the table exists.
pub(super) fn has_table(socket: &mut NetlinkSocket, table: &str) -> io::Result<bool> {
    let mut found = false;
    let request = encode::message(request::GET_TABLE, 0, Attributes::default(), String::new());
    // NFTA_TABLE_NAME
    socket.dump(&netdev(request), |_, one| {
        found |= attribute(one, 1).map(text).as_deref() == Some(table);
    })?;
    Ok(found)
}

/// Deletes the table if it exists.
pub(super) fn remove(socket: &mut NetlinkSocket, table: &str) -> io::Result<()> {
    let messages =
        [encode::batch_begin(), netdev(encode::delete_table(table)), encode::batch_end()];
    match socket.send_all(&messages, |_, _| ())?.into_iter().next() {
        Some(rejected) if rejected.source.kind() != io::ErrorKind::NotFound => Err(rejected.source),
        _ => Ok(()),
    }
}

/// `NFTA_RULE_EXPRESSIONS`, `NFTA_RULE_USERDATA`.
const EXPRESSIONS: u16 = 4;
const USERDATA: u16 = 7;

fn netdev(message: Message) -> Message {
    Message { family: NETDEV, ..message }
}

fn has_chain(socket: &mut NetlinkSocket, table: &str, chain: &str) -> io::Result<bool> {
    let mut found = false;
    let request = encode::message(request::GET_CHAIN, 0, Attributes::default(), String::new());
    socket.dump(&netdev(request), |_, one| {
        // NFTA_CHAIN_TABLE, NFTA_CHAIN_NAME
        let is = |kind, name| attribute(one, kind).map(text).as_deref() == Some(name);
        found |= is(1, table) && is(3, chain);
    })?;
    Ok(found)
}

fn for_each_rule(
    socket: &mut NetlinkSocket,
    table: &str,
    chain: &str,
    mut each: impl FnMut(&[u8]),
) -> io::Result<()> {
    let request = Attributes::default().text(1, table).text(2, chain);
    let request = encode::message(request::GET_RULE, 0, request, String::new());
    let listed = socket.dump(&netdev(request), |_, rule| {
        let is = |kind, name| attribute(rule, kind).map(text).as_deref() == Some(name);
        if is(1, table) && is(2, chain) {
            each(rule);
        }
    });
    match listed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        listed => listed,
    }
}

fn new_chain(table: &str, link: &str) -> Message {
    // NFTA_HOOK_HOOKNUM: NF_NETDEV_INGRESS; NFTA_HOOK_PRIORITY, NFTA_HOOK_DEV
    let hook = Attributes::default().number(1, 0).bytes(2, &PRIORITY.to_be_bytes()).text(3, link);
    // NFTA_CHAIN_TABLE, _NAME, _HOOK, _POLICY: NF_ACCEPT, _TYPE
    let attributes = Attributes::default().text(1, table).text(3, link);
    let attributes = attributes.nest(4, &hook).number(5, 1).text(7, "filter");
    let about = format!("port guard at {link:?}");
    netdev(encode::message(request::NEW_CHAIN, encode::CREATE, attributes, about))
}

/// Comment of policer rules.
const POLICED: &str = "policed";

/// A rule in the form of nftables: tests and an outcome.
struct NftRule {
    tests: Vec<Test>,
    end: End,
}

#[derive(Clone, Copy)]
enum End {
    Verdict(Verdict),
    /// Drops frames in excess of the rate.
    Police(NonZeroU32),
}

fn is_tag(bytes: &[u8]) -> bool {
    VLAN_TAGS.iter().any(|tag| tag == bytes)
}

/// Converts rules for nftables. Tagged frames have the ethertype of the tag here, which no other
/// rule accepts. The rules for tags therefore come last, where they do not slow down the endpoint's
/// valid frames.
///
/// The policer comes first. Frames within its rate are still subject to the rules.
fn nft_rules(rules: &[Rule], policer: Option<&Policer>) -> Vec<NftRule> {
    let (tagged, others): (Vec<&Rule>, Vec<&Rule>) =
        rules.iter().partition(|rule| rule.tests == [Test::Tagged]);
    let mut all = Vec::new();
    if let Some((rate, policed)) = policer {
        let rules =
            policed.iter().map(|tests| NftRule { tests: tests.clone(), end: End::Police(*rate) });
        all.extend(rules);
    }
    for rule in others {
        all.push(NftRule { tests: rule.tests.clone(), end: End::Verdict(rule.verdict) });
    }
    for rule in tagged {
        let is = |tag: [u8; 2]| Test::Bytes { at: ETHERTYPE, value: tag.to_vec(), not: false };
        let end = End::Verdict(rule.verdict);
        all.extend(VLAN_TAGS.map(|tag| NftRule { tests: vec![is(tag)], end }));
    }
    all.push(NftRule { tests: Vec::new(), end: End::Verdict(DEFAULT_VERDICT) });
    all
}

fn new_rule(table: &str, link: &str, rule: &NftRule) -> Message {
    let mut expressions = Expressions::default();
    let mut loaded = None;
    for test in &rule.tests {
        let (at, value, not) = match test {
            Test::Bytes { at, value, not } => (at, value, not),
            Test::Bits { at, value, mask } => {
                expressions.load_frame(*at, 1);
                expressions.loaded_bits_are(*mask, *value);
                loaded = None;
                continue;
            }
            // Already converted to ethertype tests.
            Test::Tagged => continue,
        };
        // Except for VLAN tags, an ethertype in the frame equals the ethertype parsed by the
        // kernel. Testing the latter first costs a fraction of a load from the frame.
        let ethertype = usize::from(ETHERTYPE.wrapping_sub(*at));
        if let Some(ethertype) =
            value.get(ethertype..ethertype + 2).filter(|_| !not && !is_tag(value))
        {
            expressions.ethertype_is(ethertype);
            loaded = None;
        }
        // The same holds for the group bit of the destination.
        if *at == 0 && !not && value[0] & 1 == 1 && *value != BROADCAST[..value.len()] {
            expressions.is_multicast();
            loaded = None;
        }
        if loaded != Some((*at, value.len())) {
            expressions.load_frame(*at, value.len());
            loaded = Some((*at, value.len()));
        }
        expressions.loaded_is(value, *not);
    }
    let comment = match rule.end {
        End::Verdict(Verdict::Accept | Verdict::Police) => {
            expressions.action(&Action::Accept);
            None
        }
        End::Verdict(Verdict::Drop(reason)) => {
            expressions.action(&Action::Count);
            expressions.action(&Action::Drop);
            encode::comment(reason.as_str())
        }
        End::Police(rate) => {
            expressions.over_rate(rate, BURST.unsigned_abs());
            expressions.action(&Action::Count);
            expressions.action(&Action::Drop);
            encode::comment(POLICED)
        }
    };
    let attributes = Attributes::default().text(1, table).text(2, link);
    let mut attributes = attributes.nest(EXPRESSIONS, &expressions.into_attributes());
    if let Some(comment) = comment {
        attributes = attributes.bytes(USERDATA, &comment);
    }
    let flags = encode::CREATE | encode::APPEND;
    netdev(encode::message(request::NEW_RULE, flags, attributes, format!("port guard at {link:?}")))
}
