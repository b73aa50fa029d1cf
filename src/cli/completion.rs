//! Shell completion and manual pages, made from the command line's own description.

use anyhow::Context;
use clap::{Args, Command};
use clap_complete::Shell;
use std::io::Write;
use std::path::PathBuf;

/// Print a completion script for a shell
#[derive(Debug, Args)]
pub(super) struct Completion {
    /// Which shell
    shell: Shell,
}

impl Completion {
    pub(super) fn run(&self, command: &mut Command) -> anyhow::Result<()> {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, command, "tidegate", &mut script);
        match std::io::stdout().write_all(&script) {
            // `tidegate completion bash | head` is no failure.
            Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
            result => result.context("standard output"),
        }
    }
}

/// Write the manual pages into a directory
#[derive(Debug, Args)]
pub(super) struct Man {
    /// Where to; it must exist
    directory: PathBuf,
}

impl Man {
    pub(super) fn run(&self, command: Command) -> anyhow::Result<()> {
        clap_mangen::generate_to(command, &self.directory)
            .with_context(|| format!("manual pages into {}", self.directory.display()))
    }
}
