//! Sysctls that are changed for a while.

use crate::Namespace;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;

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
        let mut file = namespace.open_sysctl(&self.name)?;
        if read(&mut file)? != self.ours {
            tracing::debug!(sysctl = self.name, "set by someone else meanwhile; left as it is");
            return Ok(());
        }
        write(&file, &self.original)
    }
}

/// A sysctl that has another value than it is to have, open.
pub(super) struct Change {
    pub(super) saved: Saved,
    file: File,
}

impl Change {
    /// Looks what has to be done; `None` if nothing.
    pub(super) fn needed(namespace: &Namespace, sysctl: &Sysctl) -> io::Result<Option<Self>> {
        let opened =
            namespace.open_sysctl(&sysctl.name).and_then(|mut file| Ok((read(&mut file)?, file)));
        let (now, file) = match opened {
            Ok(opened) => opened,
            // What cannot be written may have the value all the same.
            Err(error) => match namespace.sysctl(&sysctl.name) {
                Ok(now) if now == sysctl.value => return Ok(None),
                _ => return Err(error),
            },
        };
        if now == sysctl.value {
            return Ok(None);
        }
        let saved = Saved { name: sysctl.name.clone(), original: now, ours: sysctl.value.clone() };
        Ok(Some(Self { saved, file }))
    }

    /// Does it.
    pub(super) fn make(&self) -> io::Result<()> {
        write(&self.file, &self.saved.ours)
    }
}

fn read(file: &mut File) -> io::Result<String> {
    let mut text = String::new();
    file.read_to_string(&mut text)?;
    Ok(text.trim_end().to_owned())
}

/// At the beginning of the file: anywhere else is not heeded (`kernel.sysctl_writes_strict`).
fn write(file: &File, value: &str) -> io::Result<()> {
    file.write_all_at(value.as_bytes(), 0)
}
