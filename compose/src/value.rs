//! Typed access to the values of the tree: key paths, variables, and errors with positions.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use super::error::{Fault, Site};
use super::interpolate::Interpolation;
use super::tree::{Body, Kind, MAX_TEXT, Node};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::fmt::Display;
use std::str::FromStr;

/// The state that all values of a file share.
pub(super) struct Context<'a> {
    env: &'a dyn Fn(&str) -> Option<String>,
    /// Total bytes of interpolated values.
    spent: Cell<usize>,
    /// The unset variables, with the first use of each.
    warnings: RefCell<BTreeMap<String, Fault>>,
}

impl<'a> Context<'a> {
    pub(super) fn new(env: &'a dyn Fn(&str) -> Option<String>) -> Self {
        Self { env, spent: Cell::new(0), warnings: RefCell::new(BTreeMap::new()) }
    }

    /// A variable of this process.
    pub(super) fn variable(&self, name: &str) -> Option<String> {
        (self.env)(name)
    }

    /// Warnings for the user, which do not reject the file.
    pub(super) fn warnings(&self) -> Vec<Fault> {
        self.warnings.borrow().values().cloned().collect()
    }

    fn interpolate(&self, text: &str, site: &Site) -> Result<String, Fault> {
        let allowance = MAX_TEXT.saturating_sub(self.spent.get());
        let mut interpolation = Interpolation::new(self.env, allowance);
        let value = interpolation.of(text).map_err(|error| site.fault(error.to_string()))?;
        self.spent.set(self.spent.get() + value.len());
        let mut warnings = self.warnings.borrow_mut();
        for name in interpolation.unset {
            let warning = site.fault(format!("variable {name} is not set; using an empty string"));
            warnings.entry(name).or_insert(warning);
        }
        Ok(value)
    }
}

/// A value in the file.
#[derive(Clone)]
pub(super) struct Value<'a> {
    node: &'a Node,
    site: Site,
    context: &'a Context<'a>,
}

/// A key of a map with its value.
pub(super) struct Field<'a> {
    pub(super) key: &'a str,
    /// The position of the key, and the key path including it.
    pub(super) site: Site,
    pub(super) value: Value<'a>,
}

impl Field<'_> {
    /// Returns whether the key is an extension: `x-anything`.
    pub(super) fn is_extension(&self) -> bool {
        self.key.starts_with("x-")
    }
}

impl<'a> Value<'a> {
    /// The value of the file as a whole.
    pub(super) fn root(node: &'a Node, context: &'a Context<'a>) -> Self {
        Self { node, site: Site::new(node.place, ""), context }
    }

    /// Returns the position of the value; that of its key if the value is missing.
    pub(super) fn site(&self) -> &Site {
        &self.site
    }

    pub(super) fn context(&self) -> &'a Context<'a> {
        self.context
    }

    pub(super) fn fault(&self, problem: impl Into<String>) -> Fault {
        self.site.fault(problem)
    }

    pub(super) fn is_null(&self) -> bool {
        matches!(self.node.body, Body::Scalar { kind: Kind::Null, .. })
    }

    pub(super) fn is_list(&self) -> bool {
        matches!(self.node.body, Body::List(_))
    }

    pub(super) fn is_map(&self) -> bool {
        matches!(self.node.body, Body::Map(_))
    }

    /// Returns the error for a value of the wrong type.
    pub(super) fn expected(&self, noun: &str) -> Fault {
        let found = match &self.node.body {
            Body::Scalar { kind: Kind::Null, .. } => "nothing".to_owned(),
            Body::Scalar { kind: Kind::Bool, text } => format!("the boolean {text}"),
            Body::Scalar { kind: Kind::Number, text } => format!("the number {text}"),
            Body::Scalar { kind: Kind::Text, .. } => "a string".to_owned(),
            Body::List(_) => "a list".to_owned(),
            Body::Map(_) => "a map".to_owned(),
        };
        self.fault(format!("expected {noun}, found {found}"))
    }

    /// Returns the entries of a map, in their order.
    pub(super) fn fields(&self) -> Result<Vec<Field<'a>>, Fault> {
        let Body::Map(entries) = &self.node.body else { return Err(self.expected("a map")) };
        let fields = entries.iter().map(|entry| {
            let site = self.site.at_key(&entry.key, entry.place);
            let mut value = Value { node: &entry.value, site: site.clone(), context: self.context };
            if !value.is_null() {
                value.site.place = entry.value.place;
            }
            Field { key: &entry.key, site, value }
        });
        Ok(fields.collect())
    }

    /// Returns the entries of a map; none if the value is null.
    pub(super) fn fields_if_any(&self) -> Result<Vec<Field<'a>>, Fault> {
        if self.is_null() { Ok(Vec::new()) } else { self.fields() }
    }

    /// Returns the items of a list.
    pub(super) fn items(&self) -> Result<Vec<Self>, Fault> {
        let Body::List(items) = &self.node.body else { return Err(self.expected("a list")) };
        let items = items.iter().enumerate().map(|(index, node)| Value {
            node,
            site: self.site.at_index(index, node.place),
            context: self.context,
        });
        Ok(items.collect())
    }

    /// A string with its variables expanded.
    pub(super) fn string(&self) -> Result<String, Fault> {
        match &self.node.body {
            Body::Scalar { kind: Kind::Text, text } => self.context.interpolate(text, &self.site),
            Body::Scalar { kind: Kind::Bool | Kind::Number, .. } => {
                Err(self.expected("a string").with_advice("put it in quotes"))
            }
            _ => Err(self.expected("a string")),
        }
    }

    /// A string, a number or a boolean as written, with its variables expanded.
    pub(super) fn scalar(&self) -> Result<String, Fault> {
        match &self.node.body {
            Body::Scalar { kind: Kind::Text, .. } => self.string(),
            Body::Scalar { kind: Kind::Bool | Kind::Number, text } => Ok(text.clone()),
            _ => Err(self.expected("a string or a number")),
        }
    }

    /// `true` or `false`. As in Compose, it may be a string, because a variable always is.
    pub(super) fn boolean(&self) -> Result<bool, Fault> {
        let text = match &self.node.body {
            Body::Scalar { kind: Kind::Bool | Kind::Text, .. } => self.scalar()?,
            _ => return Err(self.expected("true or false")),
        };
        match text.to_ascii_lowercase().as_str() {
            "true" => Ok(true),
            "false" => Ok(false),
            _ => Err(self.fault(format!("expected true or false, found {text:?}"))),
        }
    }

    /// A string parsed as a `T`. Errors call the expected type `noun`.
    pub(super) fn parsed<T: FromStr>(&self, noun: &str) -> Result<T, Fault> {
        let text = self.string()?;
        text.parse().map_err(|_| self.fault(format!("{text:?} is not {noun}")))
    }

    /// `result`, with its error attributed to this value.
    pub(super) fn checked<T, E: Display>(&self, result: Result<T, E>) -> Result<T, Fault> {
        result.map_err(|error| self.fault(error.to_string()))
    }
}
