//! Logs: `tracing` to standard error, filtered by `TIDEGATE_LOG`.
//!
//! The filter is a level (`debug`) or a list of `target=level` (`info,tidegate_proxy=debug`).

use std::io::IsTerminal;
use tracing_subscriber::filter::{LevelFilter, ParseError, Targets};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

/// The variable that sets the filter.
pub const VARIABLE: &str = "TIDEGATE_LOG";

/// A filter that is not understood.
#[derive(Debug, thiserror::Error)]
#[error("{VARIABLE}={value:?} is no log filter ({source}): say a level, or target=level,...")]
pub struct FilterError {
    value: String,
    source: ParseError,
}

/// Sends logs to standard error from here on; without `TIDEGATE_LOG` those of `default` and worse.
///
/// # Errors
/// [`FilterError`] when `TIDEGATE_LOG` is not understood.
pub fn init(default: LevelFilter) -> Result<(), FilterError> {
    let filter = match std::env::var(VARIABLE) {
        Ok(value) if !value.is_empty() => {
            value.parse::<Targets>().map_err(|source| FilterError { value, source })?
        }
        _ => Targets::new().with_default(default),
    };
    let output = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false);
    tracing_subscriber::registry().with(output).with(filter).init();
    Ok(())
}
