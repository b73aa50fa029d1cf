//! Errors of a Compose file, one line each: file, line, column, key, cause and remedy.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use super::{MAX_FILE, Position};
use std::io;
use std::path::{Path, PathBuf};
use tidegate_model::without_errno;

/// Maximum number of characters of a key in an error.
const KEY_SHOWN: usize = 64;

/// Why a Compose file is rejected.
#[derive(Debug, thiserror::Error)]
pub enum ComposeError {
    /// The file cannot be read.
    #[error("{}: {}", .path.display(), without_errno(&.cause.to_string()))]
    Read {
        /// The file.
        path: PathBuf,
        /// The error of the system call.
        cause: io::Error,
    },
    /// The file is larger than [`MAX_FILE`].
    #[error("{}: file is larger than {} KiB; shorten it", .path.display(), MAX_FILE / 1024)]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// The content is invalid.
    #[error("{}", line(.file, *.place, .key, .problem))]
    Invalid {
        /// The file as the user named it.
        file: PathBuf,
        /// The position in the file.
        place: Position,
        /// The key path, for example `services.web.ports[0]`; empty for the file as a whole.
        key: String,
        /// The cause and the remedy.
        problem: String,
    },
}

fn line(file: &Path, place: Position, key: &str, problem: &str) -> String {
    let colon = if key.is_empty() { "" } else { ": " };
    format!("{}:{}:{}: {key}{colon}{problem}", file.display(), place.line, place.column)
}

/// The position of a value and its key path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Site {
    pub(super) place: Position,
    pub(super) key: String,
}

impl Site {
    pub(super) fn new(place: Position, key: impl Into<String>) -> Self {
        Self { place, key: key.into() }
    }

    /// The file as a whole.
    pub(super) fn start() -> Self {
        Self::new(Position::START, "")
    }

    /// The value of `key`, at `place`.
    pub(super) fn at_key(&self, key: &str, place: Position) -> Self {
        let key = shown(key);
        Self::new(place, if self.key.is_empty() { key } else { format!("{}.{key}", self.key) })
    }

    /// The item `index` of a list, at `place`.
    pub(super) fn at_index(&self, index: usize, place: Position) -> Self {
        Self::new(place, format!("{}[{index}]", self.key))
    }

    pub(super) fn fault(&self, problem: impl Into<String>) -> Fault {
        Fault { site: self.clone(), problem: problem.into() }
    }
}

/// An error without the name of its file.
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

    /// Appends a remedy.
    pub(super) fn with_advice(mut self, advice: &str) -> Self {
        self.problem.push_str("; ");
        self.problem.push_str(advice);
        self
    }

    /// Returns the error as one line of text.
    pub(super) fn line(&self, file: &Path) -> String {
        line(file, self.site.place, &self.site.key, &self.problem)
    }
}

/// `key` as a component of a key path: shortened, and quoted if it contains separators.
fn shown(key: &str) -> String {
    let plain = |c: char| c.is_alphanumeric() || "._-/<".contains(c);
    let short: String = key.chars().take(KEY_SHOWN).collect();
    let short = if short.len() < key.len() { short + "..." } else { short };
    if !short.is_empty() && short.chars().all(plain) { short } else { format!("{short:?}") }
}
