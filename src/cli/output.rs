//! Standard output of commands that end by themselves.

use anyhow::Context;
use std::io::{self, Write};

/// Writes `text` to standard output. A closed pipe, as in `tidegate ps | head -1`, is no error.
///
/// # Errors
/// Other errors of standard output.
pub(super) fn print(text: &str) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        result => result.context("standard output"),
    }
}

/// Whether the reader of standard output has closed it.
pub(super) fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let error = error.downcast_ref::<io::Error>();
    error.is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}
