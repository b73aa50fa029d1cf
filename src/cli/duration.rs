//! Durations on the command line: `90s`, `500ms`, `2m`, `1h 30m`.

use std::time::Duration;

/// The upper bound of a timeout.
const MAX: Duration = Duration::from_secs(7 * 24 * 3600);

/// Parses a duration from 1 ms to 7 days.
pub(super) fn timeout(text: &str) -> Result<Duration, String> {
    let duration = optional_timeout(text)?;
    if duration.is_zero() { Err("it must be longer than 0".to_owned()) } else { Ok(duration) }
}

/// Like [`timeout`], with `0` allowed.
pub(super) fn optional_timeout(text: &str) -> Result<Duration, String> {
    let duration = match text {
        "0" => Duration::ZERO,
        _ => humantime::parse_duration(text)
            .map_err(|error| format!("{error} (use 90s, 500ms, 2m)"))?,
    };
    if duration > MAX { Err("it must be at most 7 days".to_owned()) } else { Ok(duration) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_units_and_bounds() {
        assert_eq!(timeout("90s"), Ok(Duration::from_secs(90)));
        assert_eq!(timeout("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(optional_timeout("0"), Ok(Duration::ZERO));
        for bad in ["0", "90", "-1s", "8days", "soon", ""] {
            assert!(timeout(bad).is_err(), "{bad}");
        }
    }
}
