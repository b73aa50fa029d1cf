//! Why a Compose file cannot be used: file, line, column, key, what is wrong and what to do, in one
//! line.

use super::{MAX_FILE, Place};
use crate::port_error::without_numbers;
use std::io;
use std::path::{Path, PathBuf};

/// A key longer than so many characters is cut in messages.
const KEY_SHOWN: usize = 64;

/// Why a Compose file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ComposeError {
    /// It cannot be read.
    #[error("{}: {}", .path.display(), without_numbers(&.cause.to_string()))]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        cause: io::Error,
    },
    /// It is larger than [`MAX_FILE`].
    #[error("{}: larger than {} KiB; a Compose file for tidegate has to be smaller", .path.display(), MAX_FILE / 1024)]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// Something in it is wrong.
    #[error("{}", line(.file, *.place, .key, .problem))]
    Invalid {
        /// The file, as it was named.
        file: PathBuf,
        /// Where in it.
        place: Place,
        /// The path of keys, `services.web.ports[0]`; empty for the file as a whole.
        key: String,
        /// What is wrong and what to do.
        problem: String,
    },
}

fn line(file: &Path, place: Place, key: &str, problem: &str) -> String {
    let colon = if key.is_empty() { "" } else { ": " };
    format!("{}:{}:{}: {key}{colon}{problem}", file.display(), place.line, place.column)
}

/// A value's position and path of keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Site {
    pub(super) place: Place,
    pub(super) key: String,
}

impl Site {
    pub(super) fn new(place: Place, key: impl Into<String>) -> Self {
        Self { place, key: key.into() }
    }

    /// The file as a whole.
    pub(super) fn start() -> Self {
        Self::new(Place::START, "")
    }

    /// What stands under `key`, at `place`.
    pub(super) fn at_key(&self, key: &str, place: Place) -> Self {
        let key = shown(key);
        Self::new(place, if self.key.is_empty() { key } else { format!("{}.{key}", self.key) })
    }

    /// The item `index` of a list, at `place`.
    pub(super) fn at_index(&self, index: usize, place: Place) -> Self {
        Self::new(place, format!("{}[{index}]", self.key))
    }

    pub(super) fn fault(&self, problem: impl Into<String>) -> Fault {
        Fault { site: self.clone(), problem: problem.into() }
    }
}

/// An error that does not know its file yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Fault {
    site: Site,
    problem: String,
}

impl Fault {
    pub(super) fn in_file(self, file: &Path) -> ComposeError {
        let Site { place, key } = self.site;
        ComposeError::Invalid { file: file.to_owned(), place, key, problem: self.problem }
    }

    /// The same with what to do.
    pub(super) fn with_advice(mut self, advice: &str) -> Self {
        self.problem.push_str("; ");
        self.problem.push_str(advice);
        self
    }

    /// The line that it is.
    pub(super) fn line(&self, file: &Path) -> String {
        line(file, self.site.place, &self.site.key, &self.problem)
    }
}

/// `key` as a piece of a path of keys: short, and quoted if it could be taken for something else.
fn shown(key: &str) -> String {
    let plain = |c: char| c.is_alphanumeric() || "._-/<".contains(c);
    let short: String = key.chars().take(KEY_SHOWN).collect();
    let short = if short.len() < key.len() { short + "..." } else { short };
    if !short.is_empty() && short.chars().all(plain) { short } else { format!("{short:?}") }
}
