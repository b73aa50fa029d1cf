//! Formatting of figures with units and few digits.

use std::cmp::Ordering;
use std::time::Duration;

/// A cell of a table. NaN stands for a number that is not known yet.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Cell {
    /// A name.
    Text(String),
    /// An absolute number.
    Count(u64),
    /// Events per second.
    Rate(f64),
    /// Errors per second. Every value above 0 is highlighted.
    Errors(f64),
    /// Bytes per second.
    Bytes(f64),
    /// Seconds.
    Time(f64),
}

impl Cell {
    /// Returns the text of the cell.
    pub(crate) fn show(&self) -> String {
        match self {
            Self::Text(text) => text.clone(),
            Self::Count(count) => number(*count as f64),
            Self::Rate(rate) | Self::Errors(rate) => rate_of(*rate),
            Self::Bytes(bytes) => bytes_of(*bytes),
            Self::Time(seconds) => time(*seconds),
        }
    }

    /// Returns whether the cell is a name. Names are left-aligned and sort in ascending order.
    pub(crate) fn is_text(&self) -> bool {
        matches!(self, Self::Text(_))
    }

    /// Returns whether the cell counts errors and is not 0.
    pub(crate) fn is_error(&self) -> bool {
        matches!(self, Self::Errors(rate) if *rate > 0.0)
    }

    /// Returns the sort order: names in natural order, numbers from the largest, unknown numbers
    /// last.
    pub(crate) fn compare(&self, other: &Self) -> Ordering {
        let key = |cell: &Self| match cell {
            Self::Text(_) => f64::NAN,
            Self::Count(count) => *count as f64,
            Self::Rate(value) | Self::Errors(value) | Self::Bytes(value) | Self::Time(value) => {
                *value
            }
        };
        match (self, other) {
            (Self::Text(one), Self::Text(two)) => natural(one).cmp(&natural(two)),
            _ => match (key(self), key(other)) {
                (one, two) if one.is_nan() || two.is_nan() => one.is_nan().cmp(&two.is_nan()),
                (one, two) => two.total_cmp(&one),
            },
        }
    }
}

/// Splits text for natural order, so that `80` sorts before `8080`, and `web2` before `web10`.
fn natural(text: &str) -> Vec<(char, u64)> {
    let mut pieces = Vec::new();
    let mut digits = 0u64;
    let mut in_number = false;
    for c in text.chars() {
        match c.to_digit(10) {
            Some(digit) => {
                digits = digits.saturating_mul(10).saturating_add(digit.into());
                in_number = true;
            }
            None => {
                if std::mem::take(&mut in_number) {
                    pieces.push(('0', std::mem::take(&mut digits)));
                }
                pieces.push((c, 0));
            }
        }
    }
    if in_number {
        pieces.push(('0', digits));
    }
    pieces
}

/// `7`, `9999`, `65.5k`, `1.05M`.
pub(crate) fn number(value: f64) -> String {
    if value < 10_000.0 { format!("{value:.0}") } else { scaled(value, ["k", "M", "G", "T"]) }
}

/// `0`, `0.4`, `35`, `12.3k`; `-` if unknown.
pub(crate) fn rate_of(value: f64) -> String {
    match value {
        value if value.is_nan() => "-".to_owned(),
        value if value > 0.0 && value < 0.05 => "<0.1".to_owned(),
        value if value > 0.0 && value < 9.95 => format!("{value:.1}"),
        value => number(value),
    }
}

/// `0 B`, `512 B`, `1.23 MB`.
pub(crate) fn bytes_of(value: f64) -> String {
    match value {
        value if value.is_nan() => "-".to_owned(),
        value if value < 999.5 => format!("{value:.0} B"),
        value => scaled(value, [" kB", " MB", " GB", " TB"]),
    }
}

/// Three significant digits with a decimal unit prefix.
fn scaled(mut value: f64, units: [&str; 4]) -> String {
    let mut unit = "";
    for next in units {
        if value < 999.5 {
            break;
        }
        value /= 1000.0;
        unit = next;
    }
    match value {
        value if value < 9.995 => format!("{value:.2}{unit}"),
        value if value < 99.95 => format!("{value:.1}{unit}"),
        value => format!("{value:.0}{unit}"),
    }
}

/// `0.05 ms`, `12 ms`, `1.2 s`; `-` if unknown.
pub(crate) fn time(seconds: f64) -> String {
    match seconds {
        seconds if seconds.is_nan() => "-".to_owned(),
        seconds if seconds < 0.000_995 => format!("{:.2} ms", seconds * 1e3),
        seconds if seconds < 0.009_95 => format!("{:.1} ms", seconds * 1e3),
        seconds if seconds < 0.9995 => format!("{:.0} ms", seconds * 1e3),
        seconds => format!("{seconds:.1} s"),
    }
}

/// `12s`, `2m 05s`, `3h 12m`, `4d 3h`.
pub(crate) fn age(age: Duration) -> String {
    let seconds = age.as_secs();
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    match () {
        () if minutes == 0 => format!("{seconds}s"),
        () if hours == 0 => format!("{minutes}m {:02}s", seconds % 60),
        () if days == 0 => format!("{hours}h {:02}m", minutes % 60),
        () => format!("{days}d {}h", hours % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_three_digits_and_a_unit() {
        for (value, shown) in [
            (0.0, "0"),
            (9999.0, "9999"),
            (10_000.0, "10.0k"),
            (65_536.0, "65.5k"),
            (1_048_576.0, "1.05M"),
        ] {
            assert_eq!(number(value), shown);
        }
        for (value, shown) in [
            (f64::NAN, "-"),
            (0.0, "0"),
            (0.01, "<0.1"),
            (0.4, "0.4"),
            (9.96, "10"),
            (35.2, "35"),
            (12_345.0, "12.3k"),
        ] {
            assert_eq!(rate_of(value), shown);
        }
        for (value, shown) in [
            (0.0, "0 B"),
            (512.0, "512 B"),
            (999.9, "1.00 kB"),
            (1_234_567.0, "1.23 MB"),
            (99_960_000.0, "100 MB"),
            (7e12, "7.00 TB"),
            (7e15, "7000 TB"),
        ] {
            assert_eq!(bytes_of(value), shown);
        }
        for (value, shown) in [
            (f64::NAN, "-"),
            (0.000_05, "0.05 ms"),
            (0.0012, "1.2 ms"),
            (0.0123, "12 ms"),
            (1.2, "1.2 s"),
        ] {
            assert_eq!(time(value), shown);
        }
        for (value, shown) in
            [(12, "12s"), (125, "2m 05s"), (11_520, "3h 12m"), (4 * 86_400 + 3 * 3600, "4d 3h")]
        {
            assert_eq!(age(Duration::from_secs(value)), shown);
        }
    }

    #[test]
    fn large_numbers_sort_first_unknown_ones_last_and_names_naturally() {
        let mut cells = [Cell::Rate(1.0), Cell::Rate(f64::NAN), Cell::Rate(30.0), Cell::Rate(2.0)];
        cells.sort_by(Cell::compare);
        let shown: Vec<String> = cells.iter().map(Cell::show).collect();
        assert_eq!(shown, ["30", "2.0", "1.0", "-"]);
        let mut names: Vec<Cell> =
            ["0.0.0.0:8080/tcp", "0.0.0.0:80/tcp", "10.0.0.1:80/tcp", "[::]:9/udp"]
                .map(|name| Cell::Text(name.into()))
                .into();
        names.sort_by(Cell::compare);
        let shown: Vec<String> = names.iter().map(Cell::show).collect();
        assert_eq!(shown, ["0.0.0.0:80/tcp", "0.0.0.0:8080/tcp", "10.0.0.1:80/tcp", "[::]:9/udp"]);
    }
}
