//! `tidegate doctor`: what this host can and cannot do.

use crate::doctor::examine;
use anyhow::Context;
use clap::Args;
use std::io::Write;

/// Tell what this host can and cannot do for tidegate, and the fix for each
///
/// Asks as the user who calls it: root and an ordinary user get different answers. Nothing of the
/// host changes; what has to be tried is tried in a namespace that is made for it and goes with it.
#[derive(Debug, Args)]
#[command(
    after_help = "Verdicts:\n  ok       all there\n  note     nothing to do, but good to know; also what cannot be told\n  \
    limited  it works without: less of it, slower, or only in part\n  missing  something that tidegate needs\n\n\
    Exit status: 0 if nothing is missing, 1 otherwise."
)]
pub(super) struct Doctor {
    /// Tell it as JSON
    #[arg(long)]
    json: bool,
}

impl Doctor {
    /// True if nothing that tidegate needs is missing.
    pub(super) fn run(&self) -> anyhow::Result<bool> {
        let report = examine();
        let mut out = std::io::stdout().lock();
        let written = if self.json {
            let json = serde_json::to_string(&report).context("JSON")?;
            writeln!(out, "{json}")
        } else {
            write!(out, "{report}")
        };
        match written.and_then(|()| out.flush()) {
            // Whoever read it has seen enough; the exit status says the rest.
            Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => {}
            result => result.context("standard output")?,
        }
        Ok(report.is_sufficient())
    }
}
