//! `tidegate doctor`: checks the host.

use super::output::print;
use crate::doctor::examine;
use anyhow::Context;
use clap::Args;

/// Check what this host supports, with a fix for each limitation
///
/// The results hold for the calling user: root and an ordinary user get different ones. The host is
/// not changed. Trials run in a temporary namespace.
#[derive(Debug, Args)]
#[command(
    after_help = "Verdicts:\n  ok       fully supported\n  note     no action needed; also for what cannot be determined\n  \
    limited  works with reduced features or performance\n  missing  required by tidegate and not available\n\n\
    Exit status: 0 if nothing is missing, 1 otherwise."
)]
pub(super) struct Doctor {
    /// Print the report as JSON
    #[arg(long)]
    json: bool,
}

impl Doctor {
    /// Prints the report. True if nothing that tidegate requires is missing.
    pub(super) fn run(&self) -> anyhow::Result<bool> {
        let report = examine();
        let text = if self.json {
            format!("{}\n", serde_json::to_string(&report).context("JSON")?)
        } else {
            report.to_string()
        };
        // If the reader closed the pipe, the exit status still carries the result.
        print(&text)?;
        Ok(report.is_sufficient())
    }
}
