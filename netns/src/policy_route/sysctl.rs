//! Sysctls that are changed for a while.

use crate::Namespace;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::io;

/// A sysctl of a namespace and the value it is to have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sysctl {
    /// As sysctl(8) writes it: `net.ipv4.fwmark_reflect`.
    pub name: String,
    /// One word, a number as a rule.
    pub value: String,
}

impl Sysctl {
    /// `name = value`.
    pub fn new(name: impl Into<String>, value: impl Into<String>) -> Self {
        Self { name: name.into(), value: value.into() }
    }
}

impl fmt::Display for Sysctl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} = {}", self.name, self.value)
    }
}

/// What a sysctl was, and what we made of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Saved {
    pub(super) name: String,
    pub(super) original: String,
    pub(super) ours: String,
}

impl Saved {
    /// Puts the original value back, unless someone else has set another since: then it is theirs.
    pub(super) fn restore(&self, namespace: &Namespace) -> io::Result<()> {
        if namespace.sysctl(&self.name)? != self.ours {
            tracing::debug!(sysctl = self.name, "set by someone else meanwhile; left as it is");
            return Ok(());
        }
        namespace.set_sysctl(&self.name, &self.original)
    }
}
