//! The report: rows with verdicts, as a table and as JSON.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use serde::Serialize;
use std::fmt::{self, Write};

/// The result of a check, from best to worst.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// Fully supported.
    Ok,
    /// No action needed; also for what cannot be determined.
    Note,
    /// Works with reduced features or performance.
    Limited,
    /// Required by tidegate and not available.
    Missing,
}

impl Verdict {
    /// Returns the text in the table and in the JSON.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Note => "note",
            Self::Limited => "limited",
            Self::Missing => "missing",
        }
    }
}

/// One check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Row {
    /// The name of the check, stable for scripts.
    pub check: &'static str,
    /// The verdict.
    pub verdict: Verdict,
    /// The finding, in one line.
    pub found: String,
    /// The objects to which the finding refers.
    pub details: Vec<String>,
    /// A command or setting that resolves the finding.
    pub fix: Option<String>,
}

impl Row {
    fn new(check: &'static str, verdict: Verdict, found: impl Into<String>) -> Self {
        Self { check, verdict, found: found.into(), details: Vec::new(), fix: None }
    }

    pub(super) fn ok(check: &'static str, found: impl Into<String>) -> Self {
        Self::new(check, Verdict::Ok, found)
    }

    pub(super) fn note(check: &'static str, found: impl Into<String>) -> Self {
        Self::new(check, Verdict::Note, found)
    }

    pub(super) fn limited(check: &'static str, found: impl Into<String>) -> Self {
        Self::new(check, Verdict::Limited, found)
    }

    pub(super) fn missing(check: &'static str, found: impl Into<String>) -> Self {
        Self::new(check, Verdict::Missing, found)
    }

    pub(super) fn cannot_tell(check: &'static str, why: &str) -> Self {
        Self::new(check, Verdict::Note, format!("cannot tell: {why}"))
    }

    pub(super) fn fix(self, fix: impl Into<String>) -> Self {
        Self { fix: Some(fix.into()), ..self }
    }

    pub(super) fn details(self, details: Vec<String>) -> Self {
        Self { details, ..self }
    }
}

/// All checks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Report {
    /// The checks, in the order of the table.
    #[serde(rename = "checks")]
    pub rows: Vec<Row>,
}

impl Report {
    /// Returns whether everything that tidegate requires is available.
    #[must_use]
    pub fn is_sufficient(&self) -> bool {
        self.rows.iter().all(|row| row.verdict != Verdict::Missing)
    }
}

/// The table. Details and the fix follow their row, indented to the column of the finding.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.rows.iter().map(|row| row.check.len()).max().unwrap_or(0);
        let indent = " ".repeat(width + 2 + 7 + 2);
        writeln!(f, "{:width$}  {:7}  FOUND", "CHECK", "VERDICT")?;
        for row in &self.rows {
            writeln!(f, "{:width$}  {:7}  {}", row.check, row.verdict.as_str(), row.found)?;
            for detail in &row.details {
                writeln!(f, "{indent}- {detail}")?;
            }
            if let Some(fix) = &row.fix {
                writeln!(f, "{indent}fix: {fix}")?;
            }
        }
        let mut counts = String::new();
        for verdict in [Verdict::Ok, Verdict::Note, Verdict::Limited, Verdict::Missing] {
            let count = self.rows.iter().filter(|row| row.verdict == verdict).count();
            let separator = if counts.is_empty() { "" } else { ", " };
            write!(counts, "{separator}{count} {}", verdict.as_str())?;
        }
        writeln!(f, "\n{counts}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        let exposed = vec!["22/tcp: sshd (pid 1)".to_owned()];
        Report {
            rows: vec![
                Row::ok("kernel", "Linux 6.18"),
                Row::note("host-services", "one").details(exposed).fix("bind it"),
            ],
        }
    }

    #[test]
    fn details_and_fix_follow_their_row() {
        let expected = "\
CHECK          VERDICT  FOUND
kernel         ok       Linux 6.18
host-services  note     one
                        - 22/tcp: sshd (pid 1)
                        fix: bind it

1 ok, 1 note, 0 limited, 0 missing
";
        assert_eq!(report().to_string(), expected);
    }

    #[test]
    fn the_json_contains_the_same_rows() {
        let json = serde_json::to_value(report()).unwrap();
        assert_eq!(
            json["checks"][1],
            serde_json::json!({
                "check": "host-services", "verdict": "note", "found": "one",
                "details": ["22/tcp: sshd (pid 1)"], "fix": "bind it",
            })
        );
        assert_eq!(json["checks"][0]["fix"], serde_json::Value::Null);
    }

    #[test]
    fn only_a_missing_check_makes_a_host_insufficient() {
        let mut report = report();
        report.rows.push(Row::limited("tun", "none"));
        assert!(report.is_sufficient());
        report.rows.push(Row::missing("kernel", "Linux 4.19"));
        assert!(!report.is_sufficient());
    }
}
