//! Temporary changes of sysctls.

use crate::Namespace;
use rustix::fs::OFlags;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;

/// A sysctl of a namespace and its required value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sysctl {
    /// Name in the syntax of sysctl(8): `net.ipv4.fwmark_reflect`.
    pub name: String,
    /// Value, usually a number.
    pub value: String,
}

impl Sysctl {
    /// Creates `name = value`.
    pub fn new(name: impl Into<String>, value: impl Into<String>) -> Self {
        Self { name: name.into(), value: value.into() }
    }
}

impl fmt::Display for Sysctl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} = {}", self.name, self.value)
    }
}

/// The original value of a sysctl and the value set by tidegate.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Saved {
    pub(super) name: String,
    pub(super) original: String,
    pub(super) ours: String,
}

impl Saved {
    /// Restores the original value, unless the sysctl has been changed externally since.
    pub(super) fn restore(&self, namespace: &Namespace) -> io::Result<()> {
        let mut file = namespace.open_sysctl(&self.name, OFlags::RDWR)?;
        if read(&mut file)? != self.ours {
            tracing::debug!(sysctl = self.name, "sysctl changed externally; not restored");
            return Ok(());
        }
        write(&file, &self.original)
    }
}

/// A pending change of a sysctl, with its open file.
pub(super) struct Change {
    pub(super) saved: Saved,
    file: File,
}

impl Change {
    /// Compares the current value with `sysctl`. Returns `None` if they are equal.
    pub(super) fn needed(namespace: &Namespace, sysctl: &Sysctl) -> io::Result<Option<Self>> {
        let opened = namespace
            .open_sysctl(&sysctl.name, OFlags::RDWR)
            .and_then(|mut file| Ok((read(&mut file)?, file)));
        let (now, file) = match opened {
            Ok(opened) => opened,
            // A read-only sysctl may already have the required value.
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

    /// Applies the change.
    pub(super) fn apply(&self) -> io::Result<()> {
        write(&self.file, &self.saved.ours)
    }
}

fn read(file: &mut File) -> io::Result<String> {
    let mut text = String::new();
    file.read_to_string(&mut text)?;
    Ok(text.trim_end().to_owned())
}

/// Writes at offset 0; writes at other offsets are ignored (`kernel.sysctl_writes_strict`).
fn write(file: &File, value: &str) -> io::Result<()> {
    file.write_all_at(value.as_bytes(), 0)
}
