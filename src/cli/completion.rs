//! Shell completion and manual pages, generated from the definition of the command line.

use super::output::print;
use anyhow::Context;
use clap::{Args, Command};
use clap_complete::Shell;
use std::path::PathBuf;

/// Print a completion script for a shell
#[derive(Debug, Args)]
pub(super) struct Completion {
    /// The shell
    shell: Shell,
}

impl Completion {
    pub(super) fn run(&self, command: &mut Command) -> anyhow::Result<()> {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, command, "tidegate", &mut script);
        print(&String::from_utf8(script).context("completion script")?)
    }
}

/// Write the manual pages to a directory
#[derive(Debug, Args)]
pub(super) struct Man {
    /// An existing directory
    directory: PathBuf,
}

impl Man {
    pub(super) fn run(&self, command: Command) -> anyhow::Result<()> {
        clap_mangen::generate_to(command, &self.directory)
            .with_context(|| format!("manual pages into {}", self.directory.display()))
    }
}
