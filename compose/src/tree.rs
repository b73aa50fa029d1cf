//! YAML as a tree of nodes with positions, within bounds.
//!
//! The builder turns the events of the parser into nodes. It expands aliases to copies and resolves
//! merge keys (`<<`) as YAML 1.1 does: the keys of a map take precedence over merged ones, and an
//! earlier merged map over a later one. It rejects ambiguous input: duplicate keys, a second
//! document, and tags other than `!!str`, `!!map` and `!!seq`.
//!
//! Bounds in addition to the file size: at most [`MAX_DEPTH`] levels of nesting and, after alias
//! expansion, at most [`MAX_VALUES`] keys and values with [`MAX_TEXT`] bytes of text.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use super::Position;
use super::error::{Fault, Site};
use saphyr_parser::{Event, Marker, Parser, ScalarStyle, Tag};
use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};

/// Maximum nesting depth.
pub(super) const MAX_DEPTH: usize = 64;

/// Maximum number of keys and values after alias expansion.
pub(super) const MAX_VALUES: usize = 100_000;

/// Maximum number of bytes of text in these keys and values.
pub(super) const MAX_TEXT: usize = 4 << 20;

/// The key that merges another map into its own.
const MERGE_KEY: &str = "<<";

/// A value in the file.
#[derive(Clone, Debug)]
pub(super) struct Node {
    pub(super) place: Position,
    pub(super) body: Body,
    size: Size,
    /// The levels below this node.
    height: usize,
}

/// The content of a value.
#[derive(Clone, Debug)]
pub(super) enum Body {
    Scalar { text: String, kind: Kind },
    List(Vec<Node>),
    Map(Vec<Entry>),
}

/// The type of a scalar in the core schema of YAML 1.2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Null,
    Bool,
    Number,
    Text,
}

/// A key of a map with its value.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub(super) key: String,
    pub(super) place: Position,
    pub(super) value: Node,
}

/// The share of a node in the bounds.
#[derive(Clone, Copy, Debug, Default)]
struct Size {
    values: usize,
    text: usize,
}

impl Size {
    fn of_scalar(text: &str) -> Self {
        Self { values: 1, text: text.len() }
    }

    fn plus(self, other: Self) -> Self {
        Self { values: self.values + other.values, text: self.text + other.text }
    }
}

/// Parses the only document of `text`; `None` if it is empty.
pub(super) fn read(text: &str) -> Result<Option<Node>, Fault> {
    let mut builder = Builder::default();
    for event in Parser::new_from_str(text.strip_prefix('\u{feff}').unwrap_or(text)) {
        match event {
            Ok((event, span)) => builder.event(event, place(span.start))?,
            Err(error) => {
                let site = Site { place: place(*error.marker()), ..builder.site(Position::START) };
                let message: String =
                    error.info().chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
                return Err(site.fault(format!("invalid YAML: {message}")));
            }
        }
    }
    Ok(builder.root)
}

fn place(marker: Marker) -> Position {
    Position { line: marker.line() as u64, column: marker.col() as u64 + 1 }
}

/// A list or a map before its end event.
struct Frame {
    place: Position,
    anchor: usize,
    collection: Collection,
}

enum Collection {
    List(Vec<Node>),
    Map(OpenMap),
}

#[derive(Default)]
struct OpenMap {
    entries: Vec<Entry>,
    keys: BTreeSet<String>,
    /// The key that waits for its value.
    pending: Option<Key>,
    /// The values of merge keys.
    merged: Vec<Node>,
}

struct Key {
    text: String,
    place: Position,
    merges: bool,
}

#[derive(Default)]
struct Builder {
    root: Option<Node>,
    documents: usize,
    open: Vec<Frame>,
    anchors: BTreeMap<usize, Node>,
    spent: Size,
}

impl Builder {
    fn event(&mut self, event: Event<'_>, at: Position) -> Result<(), Fault> {
        match event {
            Event::DocumentStart(_) => {
                self.documents += 1;
                if self.documents > 1 {
                    let fault = "second YAML document; a Compose file contains exactly one";
                    return Err(self.site(at).fault(fault));
                }
            }
            Event::Scalar(text, style, anchor, tag) => {
                let plain = style == ScalarStyle::Plain && !self.says_string(tag.as_deref(), at)?;
                let size = Size::of_scalar(&text);
                self.spend(size, at)?;
                let kind = if plain { kind(&text) } else { Kind::Text };
                let merges = plain && text == MERGE_KEY;
                let body = Body::Scalar { text: Cow::into_owned(text), kind };
                self.complete(Node { place: at, body, size, height: 0 }, anchor, merges)?;
            }
            Event::SequenceStart(anchor, tag) => {
                self.begin(Collection::List(Vec::new()), "seq", anchor, tag.as_deref(), at)?;
            }
            Event::MappingStart(anchor, tag) => {
                self.begin(Collection::Map(OpenMap::default()), "map", anchor, tag.as_deref(), at)?;
            }
            Event::SequenceEnd | Event::MappingEnd => {
                if let Some(frame) = self.open.pop() {
                    let node = self.close(frame.collection, frame.place)?;
                    self.complete(node, frame.anchor, false)?;
                }
            }
            Event::Alias(anchor) => {
                let Some(node) = self.anchors.get(&anchor) else {
                    return Err(self.site(at).fault("the alias refers to a node that contains it"));
                };
                let (size, node) = (node.size, node.clone());
                self.spend(size, at)?;
                self.complete(node, 0, false)?;
            }
            Event::Nothing | Event::StreamStart | Event::StreamEnd | Event::DocumentEnd => {}
        }
        Ok(())
    }

    /// Returns the site of the next value, at `place`.
    fn site(&self, place: Position) -> Site {
        self.open.iter().fold(Site::new(place, ""), |site, frame| match &frame.collection {
            Collection::List(items) => site.at_index(items.len(), place),
            Collection::Map(OpenMap { pending: Some(key), .. }) => site.at_key(&key.text, place),
            Collection::Map(_) => site,
        })
    }

    fn says_string(&self, tag: Option<&Tag>, at: Position) -> Result<bool, Fault> {
        tag.map_or(Ok(false), |tag| self.expect_tag(tag, "str", at).map(|()| true))
    }

    fn expect_tag(&self, tag: &Tag, core: &str, at: Position) -> Result<(), Fault> {
        if tag.is_yaml_core_schema() && tag.suffix == core {
            return Ok(());
        }
        let handle = if tag.is_yaml_core_schema() { "!!" } else { &tag.handle };
        let tag = format!("{handle}{}", tag.suffix);
        Err(self.site(at).fault(format!("tag {tag:?} is not supported; remove it")))
    }

    fn begin(
        &mut self,
        collection: Collection,
        core: &str,
        anchor: usize,
        tag: Option<&Tag>,
        place: Position,
    ) -> Result<(), Fault> {
        tag.map_or(Ok(()), |tag| self.expect_tag(tag, core, place))?;
        self.spend(Size { values: 1, text: 0 }, place)?;
        self.limit_depth(self.open.len() + 1, place)?;
        self.open.push(Frame { place, anchor, collection });
        Ok(())
    }

    fn limit_depth(&self, depth: usize, at: Position) -> Result<(), Fault> {
        if depth > MAX_DEPTH {
            return Err(Site::new(at, "")
                .fault(format!("values are nested more than {MAX_DEPTH} levels deep")));
        }
        Ok(())
    }

    fn spend(&mut self, size: Size, at: Position) -> Result<(), Fault> {
        self.spent = self.spent.plus(size);
        let bound = if self.spent.values > MAX_VALUES {
            format!("{MAX_VALUES} values")
        } else if self.spent.text > MAX_TEXT {
            format!("{} MiB of text", MAX_TEXT >> 20)
        } else {
            return Ok(());
        };
        Err(self
            .site(at)
            .fault(format!("the file exceeds {bound} after alias expansion; shorten it")))
    }

    fn close(&self, collection: Collection, place: Position) -> Result<Node, Fault> {
        let body = match collection {
            Collection::List(items) => Body::List(items),
            Collection::Map(OpenMap { mut entries, mut keys, merged, .. }) => {
                for entry in self.merged_entries(merged)? {
                    if keys.insert(entry.key.clone()) {
                        entries.push(entry);
                    }
                }
                Body::Map(entries)
            }
        };
        let own = Size { values: 1, text: 0 };
        let (size, height) = match &body {
            Body::Scalar { .. } => (own, 0),
            Body::List(items) => items.iter().fold((own, 1), |(size, height), item| {
                (size.plus(item.size), height.max(item.height + 1))
            }),
            Body::Map(entries) => entries.iter().fold((own, 1), |(size, height), entry| {
                let size = size.plus(Size::of_scalar(&entry.key)).plus(entry.value.size);
                (size, height.max(entry.value.height + 1))
            }),
        };
        Ok(Node { place, body, size, height })
    }

    fn merged_entries(&self, merged: Vec<Node>) -> Result<Vec<Entry>, Fault> {
        let mut all = Vec::new();
        for node in merged {
            let place = node.place;
            let maps = match node.body {
                Body::List(maps) => maps,
                _ => vec![node],
            };
            for map in maps {
                let Body::Map(entries) = map.body else {
                    let site = self.site(place).at_key(MERGE_KEY, place);
                    return Err(site.fault("the merge key takes a map or a list of maps"));
                };
                all.extend(entries);
            }
        }
        Ok(all)
    }

    /// Stores a complete value: as its anchor, and in the innermost open collection.
    fn complete(&mut self, node: Node, anchor: usize, merges: bool) -> Result<(), Fault> {
        self.limit_depth(self.open.len() + node.height, node.place)?;
        if anchor != 0 {
            self.spend(node.size, node.place)?;
            self.anchors.insert(anchor, node.clone());
        }
        let Some(frame) = self.open.last_mut() else {
            self.root = Some(node);
            return Ok(());
        };
        match &mut frame.collection {
            Collection::List(items) => items.push(node),
            Collection::Map(map) => {
                if let Err(wrong) = map.add(node, merges) {
                    let site = self.site(wrong.place);
                    let site = wrong.key.map_or(site.clone(), |key| site.at_key(&key, wrong.place));
                    return Err(site.fault(wrong.problem));
                }
            }
        }
        Ok(())
    }
}

/// Why a map rejects a key.
struct WrongKey {
    place: Position,
    key: Option<String>,
    problem: String,
}

impl OpenMap {
    /// Adds the next key, or the value of the pending key.
    fn add(&mut self, node: Node, merges: bool) -> Result<(), WrongKey> {
        let Some(key) = self.pending.take() else {
            self.pending = Some(Key::new(node, merges)?);
            return Ok(());
        };
        if key.merges {
            self.merged.push(node);
            return Ok(());
        }
        let Key { text, place, .. } = key;
        if !self.keys.insert(text.clone()) {
            let first = self.entries.iter().find(|entry| entry.key == text);
            let line = first.map_or(0, |entry| entry.place.line);
            let problem = format!("duplicate key, first set in line {line}; remove one of them");
            return Err(WrongKey { place, key: Some(text), problem });
        }
        self.entries.push(Entry { key: text, place, value: node });
        Ok(())
    }
}

impl Key {
    fn new(node: Node, merges: bool) -> Result<Self, WrongKey> {
        let place = node.place;
        let problem = match node.body {
            Body::Scalar { kind: Kind::Null, .. } => "missing key",
            Body::Scalar { text, .. } => return Ok(Self { text, place, merges }),
            Body::List(_) | Body::Map(_) => {
                "a key must be a string, not a list or a map; put it in quotes"
            }
        };
        Err(WrongKey { place, key: None, problem: problem.to_owned() })
    }
}

/// Returns the type of a plain scalar in the core schema of YAML 1.2.
fn kind(plain: &str) -> Kind {
    match plain {
        "" | "~" | "null" | "Null" | "NULL" => Kind::Null,
        "true" | "True" | "TRUE" | "false" | "False" | "FALSE" => Kind::Bool,
        ".nan" | ".NaN" | ".NAN" => Kind::Number,
        _ if is_number(plain) => Kind::Number,
        _ => Kind::Text,
    }
}

fn is_number(plain: &str) -> bool {
    if let Some(digits) = plain.strip_prefix("0x") {
        return !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_hexdigit());
    }
    if let Some(digits) = plain.strip_prefix("0o") {
        return !digits.is_empty() && digits.bytes().all(|byte| matches!(byte, b'0'..=b'7'));
    }
    let magnitude = plain.strip_prefix(['-', '+']).unwrap_or(plain);
    matches!(magnitude, ".inf" | ".Inf" | ".INF")
        || (magnitude.starts_with(|c: char| c.is_ascii_digit() || c == '.')
            && magnitude.parse::<f64>().is_ok())
}
