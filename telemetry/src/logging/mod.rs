//! Logs: `tracing` to standard error, filtered by `TIDEGATE_LOG`, as text or as JSON.
//!
//! The filter is a level (`debug`) or a list of `target=level` (`info,tidegate_proxy=debug`).
//!
//! Events name their objects in fields with uniform names: `publish` for a published port,
//! `network`, and `endpoint` for a container. Addresses of peers and looked-up names appear only at
//! DEBUG and below. Repeated warnings and errors are counted instead of logged ([`repeats`]).

mod repeats;

pub use repeats::flush;

use repeats::Limiter;
use std::io::IsTerminal;
use std::str::FromStr;
use tracing_subscriber::Layer;
use tracing_subscriber::filter::{LevelFilter, ParseError, Targets};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

/// The environment variable with the filter.
pub const VARIABLE: &str = "TIDEGATE_LOG";

/// The environment variable with the format.
pub const FORMAT_VARIABLE: &str = "TIDEGATE_LOG_FORMAT";

/// The format of the log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// A line of text, with colours on a terminal
    #[default]
    Human,
    /// A JSON object per line
    Json,
}

impl FromStr for Format {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "human" => Ok(Self::Human),
            "json" => Ok(Self::Json),
            _ => Err(()),
        }
    }
}

/// An environment variable is invalid.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The filter is invalid.
    #[error(
        "{VARIABLE}={value:?} is not a log filter ({source}); use a level, or target=level,..."
    )]
    Filter {
        /// The value of the variable.
        value: String,
        /// The error of the parser.
        source: ParseError,
    },
    /// The format is unknown.
    #[error("{FORMAT_VARIABLE}={0:?} is not a log format; use human or json")]
    Format(String),
}

/// Returns the format `given` on the command line, or that of `TIDEGATE_LOG_FORMAT`.
///
/// # Errors
/// [`LogError`] if the variable is invalid.
pub fn format(given: Option<Format>) -> Result<Format, LogError> {
    match (given, std::env::var(FORMAT_VARIABLE)) {
        (Some(given), _) => Ok(given),
        (None, Ok(value)) if !value.is_empty() => {
            value.parse().map_err(|()| LogError::Format(value))
        }
        (None, _) => Ok(Format::default()),
    }
}

/// Starts logging to standard error. Without `TIDEGATE_LOG`, the level is `default`.
///
/// # Errors
/// [`LogError`] if `TIDEGATE_LOG` is invalid.
pub fn init(default: LevelFilter, format: Format) -> Result<(), LogError> {
    let filter = match std::env::var(VARIABLE) {
        Ok(value) if !value.is_empty() => {
            value.parse::<Targets>().map_err(|source| LogError::Filter { value, source })?
        }
        _ => Targets::new().with_default(default),
    };
    let output = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    let output = match format {
        Format::Human => {
            output.with_ansi(std::io::stderr().is_terminal()).with_target(false).boxed()
        }
        Format::Json => {
            output.json().flatten_event(true).with_current_span(false).with_span_list(false).boxed()
        }
    };
    // An event passes the filter before it reaches the limiter.
    tracing_subscriber::registry().with(output).with(Limiter).with(filter).init();
    Ok(())
}

/// Returns the error that ends the program, in the format of the log.
#[must_use]
pub fn last_word(format: Format, error: &str) -> String {
    match format {
        Format::Human => format!("tidegate: error: {error}\n"),
        Format::Json => {
            let now = humantime::format_rfc3339_micros(std::time::SystemTime::now()).to_string();
            let line = serde_json::json!({ "timestamp": now, "level": "ERROR", "message": error, "target": "tidegate" });
            format!("{line}\n")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_format_is_parsed_from_its_name() {
        assert_eq!("json".parse(), Ok(Format::Json));
        assert_eq!("human".parse(), Ok(Format::Human));
        for bad in ["JSON", "", "logfmt"] {
            assert!(bad.parse::<Format>().is_err(), "{bad}");
        }
    }

    #[test]
    fn the_last_word_is_a_line_of_the_log() {
        let line = last_word(Format::Json, "port 80/tcp is \"taken\"");
        let object: serde_json::Value = serde_json::from_str(line.trim_end()).unwrap();
        assert_eq!(
            (&object["level"], &object["message"]),
            (&"ERROR".into(), &"port 80/tcp is \"taken\"".into())
        );
        assert_eq!(last_word(Format::Human, "no"), "tidegate: error: no\n");
    }
}
