//! Logs: `tracing` to standard error, filtered by `TIDEGATE_LOG`, for people or as JSON.
//!
//! The filter is a level (`debug`) or a list of `target=level` (`info,tidegate_proxy=debug`).
//!
//! What an event is about it says in fields, whose names are the same everywhere: `publish` for a
//! published port, `network`, `endpoint` for a container. Who the peers are, and what names are
//! looked up, is nobody's business above DEBUG. Warnings and errors that repeat themselves are
//! counted instead ([`repeats`]).

mod repeats;

pub use repeats::flush;

use repeats::Limiter;
use std::io::IsTerminal;
use std::str::FromStr;
use tracing_subscriber::Layer;
use tracing_subscriber::filter::{LevelFilter, ParseError, Targets};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

/// The variable that sets the filter.
pub const VARIABLE: &str = "TIDEGATE_LOG";

/// The variable that sets the format.
pub const FORMAT_VARIABLE: &str = "TIDEGATE_LOG_FORMAT";

/// How logs are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// A line for people, in colours on a terminal
    #[default]
    Human,
    /// A JSON object on each line
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

/// Variables that are not understood.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// No filter.
    #[error("{VARIABLE}={value:?} is no log filter ({source}): say a level, or target=level,...")]
    Filter {
        /// What it is.
        value: String,
        /// What is wrong with it.
        source: ParseError,
    },
    /// No format.
    #[error("{FORMAT_VARIABLE}={0:?} is no format of logs: say human or json")]
    Format(String),
}

/// The format that was `asked` for, or else that of `TIDEGATE_LOG_FORMAT`.
///
/// # Errors
/// [`LogError`] when that is not understood.
pub fn format(asked: Option<Format>) -> Result<Format, LogError> {
    match (asked, std::env::var(FORMAT_VARIABLE)) {
        (Some(asked), _) => Ok(asked),
        (None, Ok(value)) if !value.is_empty() => {
            value.parse().map_err(|()| LogError::Format(value))
        }
        (None, _) => Ok(Format::default()),
    }
}

/// Sends logs to standard error from here on; without `TIDEGATE_LOG` those of `default` and worse.
///
/// # Errors
/// [`LogError`] when `TIDEGATE_LOG` is not understood.
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
    // What the filter lets through comes to the limiter first.
    tracing_subscriber::registry().with(output).with(Limiter).with(filter).init();
    Ok(())
}

/// The last word of a program that ends with an error, as the log has its lines.
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
    fn a_format_is_asked_for_by_its_name() {
        assert_eq!("json".parse(), Ok(Format::Json));
        assert_eq!("human".parse(), Ok(Format::Human));
        for bad in ["JSON", "", "logfmt"] {
            assert!(bad.parse::<Format>().is_err(), "{bad}");
        }
    }

    #[test]
    fn the_last_word_is_one_line_of_the_log() {
        let line = last_word(Format::Json, "port 80/tcp is \"taken\"");
        let object: serde_json::Value = serde_json::from_str(line.trim_end()).unwrap();
        assert_eq!(
            (&object["level"], &object["message"]),
            (&"ERROR".into(), &"port 80/tcp is \"taken\"".into())
        );
        assert_eq!(last_word(Format::Human, "no"), "tidegate: error: no\n");
    }
}
