//! `tidegate doctor`: checks what this host supports.
//!
//! ```text
//! probe ──► Host ──► judge ──► Row, Row, … ──► table, JSON, exit status
//! ```
//!
//! Probes query the kernel and decide nothing. Verdicts are pure functions, so that tests cover
//! them with constructed hosts. A feature is tried where possible, rather than inferred from the
//! kernel version: distributions backport features, and an LSM or a container can forbid what a
//! kernel supports.
//!
//! The host is not changed. Networks and devices are created in a temporary namespace
//! ([`probe::TRIAL`]), which ends with the process that created it.

mod host;
mod judge;
mod probe;
mod report;

pub use probe::{TRIAL, trial};
pub use report::{Report, Row, Verdict};

/// Probes this host and evaluates the result.
#[must_use]
pub fn examine() -> Report {
    Report { rows: judge::all(&probe::host()) }
}
