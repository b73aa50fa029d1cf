//! Reports: text on the terminal; JSON, SVG and Markdown in files.

mod json;
mod svg;
mod table;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::figures::Outcome;
use crate::machine::Machine;
use crate::results::Results;
use table::{Style, Table};

/// The content of a report.
pub(crate) struct Report<'a> {
    pub(crate) machine: &'a Machine,
    pub(crate) outcomes: &'a [Outcome],
    pub(crate) results: &'a Results,
}

impl Report<'_> {
    /// The report as plain text.
    pub(crate) fn text(&self) -> String {
        self.render(Style::Plain)
    }

    /// Writes `stem.json`, `stem.svg` and `stem.md` into `directory`, which is created if
    /// necessary.
    pub(crate) fn write(&self, directory: &Path, stem: &str) -> Result<Vec<PathBuf>> {
        fs::create_dir_all(directory).with_context(|| format!("make {}", directory.display()))?;
        let picture = format!("\n![every cell, median and extremes]({stem}.svg)\n");
        let files = [
            ("json", json::render(self)),
            ("svg", svg::render(self)),
            ("md", self.render(Style::Markdown) + &picture),
        ];
        let mut written = Vec::new();
        for (extension, content) in files {
            let path = directory.join(format!("{stem}.{extension}"));
            fs::write(&path, content).with_context(|| format!("write {}", path.display()))?;
            written.push(path);
        }
        Ok(written)
    }

    fn render(&self, style: Style) -> String {
        let mut text = style.heading(1, "tidegate compared");
        text += &format!("{}\n\n", self.machine.summary());
        text += &self.versions().render(style);
        text += &style.heading(2, "Figures: the worst cell of each, median of the rounds");
        text += &self.figures().render(style);
        text += &style.heading(2, "Cells: median, and how far the farthest round lies from it");
        text += &self.cells().render(style);
        if !self.results.failures.is_empty() {
            text += &style.heading(2, "Cells that failed");
            text += &self.failures().render(style);
        }
        text
    }

    fn versions(&self) -> Table {
        let mut table = Table::new(&["program", "version"]);
        for (name, version) in &self.machine.versions {
            table.row([name.clone(), version.clone()]);
        }
        table
    }

    fn figures(&self) -> Table {
        let mut table =
            Table::new(&["figure", "value", "rounds", "floor", "stretch", "verdict", "worst cell"]);
        for outcome in self.outcomes {
            let figure = outcome.figure;
            let with_unit = |value: f64| match figure.unit {
                "x" => format!("{}x", number(value)),
                unit => format!("{} {unit}", number(value)),
            };
            let (value, rounds, cell) = match &outcome.worst {
                Some((cell, worst)) => (
                    with_unit(worst.median),
                    format!("{}..{}", number(worst.min), number(worst.max)),
                    *cell,
                ),
                None => Default::default(),
            };
            table.row([
                figure.title.to_owned(),
                value,
                rounds,
                with_unit(figure.floor),
                figure.stretch.map(with_unit).unwrap_or_default(),
                outcome.verdict.text().to_owned(),
                cell.to_owned(),
            ]);
        }
        table
    }

    fn cells(&self) -> Table {
        let names = self.results.kinds.iter().map(|kind| kind.name());
        let header: Vec<&str> = ["cell", "unit"].into_iter().chain(names).collect();
        let mut table = Table::new(&header);
        for metric in &self.results.metrics {
            let values = self.results.kinds.iter().map(|&kind| {
                self.results.summary(&metric.name, kind).map_or_else(String::new, |summary| {
                    let spread = summary.spread() * 100.0;
                    format!("{} ±{spread:.0}%", number(summary.median))
                })
            });
            table.row([metric.title.clone(), metric.unit.to_owned()].into_iter().chain(values));
        }
        table
    }

    fn failures(&self) -> Table {
        let mut table = Table::new(&["round", "cell", "contender", "error"]);
        for failure in &self.results.failures {
            table.row([
                (failure.round + 1).to_string(),
                failure.scenario.clone(),
                failure.kind.name().to_owned(),
                // The error may contain the whole output of a program.
                failure.error.lines().next().unwrap_or_default().to_owned(),
            ]);
        }
        table
    }
}

/// Three significant digits, or more before the decimal point.
pub(crate) fn number(value: f64) -> String {
    let digits = match value.abs() {
        0.0 => 0,
        below if below < 0.995 => 3,
        below if below < 9.95 => 2,
        below if below < 99.5 => 1,
        _ => 0,
    };
    format!("{value:.digits$}")
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::contender::Kind;
    use crate::figures::judge_all;
    use crate::results::tests::results;

    /// A report with one metric of two contenders.
    pub(crate) fn with_report(check: impl FnOnce(&Report<'_>)) {
        let cells: [(Kind, &[f64]); 2] =
            [(Kind::Publish, &[30.0, 31.0]), (Kind::DockerProxy, &[10.0, 10.0])];
        let results = results("requests.rate", &cells);
        let machine = Machine {
            date: "2026-09-13T10:20Z".into(),
            kernel: "Linux 6.18".into(),
            cpu: "a CPU <fast>".into(),
            cores: 2,
            load_before: "0.10".into(),
            congestion_control: "reno".into(),
            versions: vec![("iperf3".into(), "iperf 3.12".into())],
            rounds: 2,
            seconds: 1,
            quick: false,
        };
        check(&Report { machine: &machine, outcomes: &judge_all(&results), results: &results });
    }

    #[test]
    fn the_text_contains_machine_figures_and_cells() {
        with_report(|report| {
            let text = report.text();
            assert!(text.contains("reno"), "{text}");
            assert!(text.contains("3.05x") && text.contains("3.00..3.10"), "{text}");
            assert!(text.contains("10.0 ±0%"), "{text}");
        });
    }

    #[test]
    fn numbers_have_three_significant_digits() {
        let shown = [0.0, 0.1234, 0.9951, 1.234, 9.96, 12.34, 99.6, 1234.5].map(number);
        assert_eq!(shown, ["0", "0.123", "1.00", "1.23", "10.0", "12.3", "100", "1234"]);
    }
}
