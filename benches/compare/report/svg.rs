//! A plot of all cells: a panel per metric, a bar per contender, and a whisker from the worst to
//! the best round.

use std::fmt::Write;

use super::{Report, number};
use crate::contender::Kind;
use crate::scenario::Metric;
use crate::stats::Summary;

const COLUMNS: usize = 3;
const PANEL_WIDTH: usize = 400;
const HEAD: usize = 90;
const TITLE: usize = 34;
const BAR: usize = 20;
const LABELS: usize = 110;
/// Width of the figure to the right of the longest bar.
const FIGURES: usize = 60;
const MARGIN: usize = 20;

/// Renders the report as an SVG document.
pub(super) fn render(report: &Report<'_>) -> String {
    let panels: Vec<String> =
        report.results.metrics.iter().map(|metric| panel(report, metric)).collect();
    let panel_height = TITLE + BAR * report.results.kinds.len() + MARGIN;
    let width = COLUMNS * PANEL_WIDTH + MARGIN;
    let height = HEAD + panels.len().div_ceil(COLUMNS) * panel_height;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"{width}\" height=\"{height}\" fill=\"#ffffff\"/>\n\
         <text x=\"{MARGIN}\" y=\"30\" font-size=\"18\">tidegate compared: medians, best and worst round</text>\n"
    );
    for (line, y) in report.machine.summary().lines().zip([52, 70]) {
        let _ = writeln!(
            svg,
            "<text x=\"{MARGIN}\" y=\"{y}\" fill=\"#555555\">{}</text>",
            escape(line)
        );
    }
    for (number, panel) in panels.iter().enumerate() {
        let (x, y) =
            (number % COLUMNS * PANEL_WIDTH + MARGIN, HEAD + number / COLUMNS * panel_height);
        let _ = write!(svg, "<g transform=\"translate({x} {y})\">\n{panel}</g>\n");
    }
    svg + "</svg>\n"
}

/// A panel of one metric, with its upper left corner at the origin.
fn panel(report: &Report<'_>, metric: &Metric) -> String {
    let summaries: Vec<(Kind, Summary)> = report
        .results
        .kinds
        .iter()
        .filter_map(|&kind| Some((kind, report.results.summary(&metric.name, kind)?)))
        .collect();
    let largest =
        summaries.iter().map(|(_, summary)| summary.max).fold(f64::MIN_POSITIVE, f64::max);
    let scale = (PANEL_WIDTH - LABELS - FIGURES - MARGIN) as f64 / largest;
    let mut svg = String::new();
    let title = escape(&format!("{} ({})", metric.title, metric.unit));
    let _ = writeln!(svg, "<text y=\"20\" font-weight=\"bold\">{title}</text>");
    for (number, (kind, summary)) in summaries.iter().enumerate() {
        svg += &bar(TITLE + number * BAR, *kind, summary, scale);
    }
    svg
}

fn bar(top: usize, kind: Kind, summary: &Summary, scale: f64) -> String {
    let colour = match kind {
        Kind::Dnat => "#8d99ae",
        kind if kind.is_ours() => "#1b7f79",
        _ => "#d9a05b",
    };
    // A figure may be slightly negative, such as memory that shrank.
    let end = |value: f64| LABELS as f64 + value.max(0.0) * scale;
    let (x, low, high) = (end(summary.median), end(summary.min), end(summary.max));
    let (baseline, middle) = (top + 12, top + 8);
    format!(
        "<text x=\"{label}\" y=\"{baseline}\" text-anchor=\"end\">{name}</text>\
         <rect x=\"{LABELS}\" y=\"{top}\" width=\"{width:.1}\" height=\"16\" fill=\"{colour}\"/>\
         <path d=\"M{low:.1} {middle}H{high:.1}\" stroke=\"#222222\"/>\
         <text x=\"{after:.1}\" y=\"{baseline}\">{value}</text>\n",
        label = LABELS - 6,
        name = kind.name(),
        width = x - LABELS as f64,
        after = high + 6.0,
        value = number(summary.median),
    )
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::tests::with_report;

    #[test]
    fn every_contender_has_a_bar_and_text_is_escaped() {
        with_report(|report| {
            let svg = render(report);
            assert_eq!(svg.matches("<rect").count(), 1 + 2);
            assert!(svg.contains("a CPU &lt;fast&gt;"));
            assert!(svg.contains("requests.rate (1/s)"));
        });
    }
}
