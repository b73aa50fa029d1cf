//! The parts of the JSON output of iperf3 that are used.

use anyhow::{Context, Result, bail};
use serde_json::Value;

/// The result of the receiving side.
#[derive(Debug, PartialEq)]
pub(crate) struct Report {
    pub(crate) bits_per_second: f64,
    pub(crate) bytes: f64,
}

impl Report {
    /// Parses the output of `iperf3 -J`, which also contains errors.
    pub(crate) fn parse(text: &str) -> Result<Self> {
        let value: Value =
            serde_json::from_str(text).with_context(|| format!("not JSON: {text:?}"))?;
        if let Some(error) = value["error"].as_str() {
            bail!("{error}");
        }
        let sum = &value["end"]["sum_received"];
        let number =
            |name: &str| sum[name].as_f64().with_context(|| format!("no end.sum_received.{name}"));
        Ok(Self { bits_per_second: number("bits_per_second")?, bytes: number("bytes")? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sum_of_the_receiver_is_used() {
        let text = r#"{"start": {}, "end": {"sum_sent": {"bytes": 9, "bits_per_second": 90.0},
            "sum_received": {"bytes": 5, "bits_per_second": 40.5}}}"#;
        assert_eq!(Report::parse(text).unwrap(), Report { bits_per_second: 40.5, bytes: 5.0 });
    }

    #[test]
    fn a_failure_is_an_error() {
        let refused = r#"{"start": {}, "end": {}, "error": "unable to connect to server"}"#;
        assert_eq!(Report::parse(refused).unwrap_err().to_string(), "unable to connect to server");
        assert!(Report::parse("iperf3: command not understood").is_err());
        assert!(Report::parse(r#"{"end": {}}"#).is_err());
    }
}
