//! `tidegate doctor`: what this host can and cannot do for tidegate.
//!
//! ```text
//! probe ──► Host ──► judge ──► Row, Row, … ──► table, JSON, exit status
//! ```
//!
//! Probing asks the kernel and decides nothing; judging is pure, so that every verdict is tested
//! against hosts that are only thought. What can be tried is tried, rather than concluded from a
//! version: distributions carry features back, and what a kernel can do an LSM or a container may
//! forbid.
//!
//! Nothing of the host changes. Networks and devices are made in a namespace of their own
//! ([`probe::TRIAL`]), which ends with the process that made it.

mod host;
mod judge;
mod probe;
mod report;

pub use probe::{TRIAL, trial};
pub use report::{Report, Row, Verdict};

/// Looks at this host and judges what it finds.
#[must_use]
pub fn examine() -> Report {
    Report { rows: judge::all(&probe::host()) }
}
