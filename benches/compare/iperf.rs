//! The part of iperf3's JSON output that is used.

use anyhow::{Context, Result, bail};
use serde_json::Value;

/// What the receiving side counted.
#[derive(Debug, PartialEq)]
pub(crate) struct Report {
    pub(crate) bits_per_second: f64,
    pub(crate) bytes: f64,
}

impl Report {
    /// Reads the output of `iperf3 -J`, which reports failures in it as well.
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
    fn the_receivers_sum_is_taken() {
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
