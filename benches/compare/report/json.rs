//! The results as JSON with all samples, so that they can be analysed again without a new
//! measurement.

use serde_json::{Map, Value, json};

use super::Report;

/// Renders the report as JSON, indented.
pub(super) fn render(report: &Report<'_>) -> String {
    let value = json!({
        "machine": machine(report),
        "figures": report.outcomes.iter().map(|outcome| {
            let figure = outcome.figure;
            json!({
                "title": figure.title,
                "unit": figure.unit,
                "value": outcome.worst.map(|(_, worst)| worst.median),
                "min": outcome.worst.map(|(_, worst)| worst.min),
                "max": outcome.worst.map(|(_, worst)| worst.max),
                "worst_cell": outcome.worst.map(|(cell, _)| cell),
                "floor": figure.floor,
                "stretch": figure.stretch,
                "verdict": outcome.verdict.text(),
            })
        }).collect::<Vec<_>>(),
        "cells": report.results.metrics.iter().map(|metric| {
            let samples: Map<String, Value> = report.results.kinds.iter()
                .map(|&kind| (kind, report.results.samples(&metric.name, kind)))
                .filter(|(_, samples)| !samples.is_empty())
                .map(|(kind, samples)| (kind.name().to_owned(), json!(samples)))
                .collect();
            json!({ "name": metric.name, "title": metric.title, "unit": metric.unit, "samples": samples })
        }).collect::<Vec<_>>(),
        "failures": report.results.failures.iter().map(|failure| json!({
            "round": failure.round + 1,
            "cell": failure.scenario,
            "contender": failure.kind.name(),
            "error": failure.error,
        })).collect::<Vec<_>>(),
    });
    format!("{value:#}\n")
}

fn machine(report: &Report<'_>) -> Value {
    let machine = report.machine;
    let versions: Map<String, Value> =
        machine.versions.iter().map(|(name, version)| (name.clone(), json!(version))).collect();
    json!({
        "date": machine.date,
        "kernel": machine.kernel,
        "cpu": machine.cpu,
        "cores": machine.cores,
        "load_before": machine.load_before,
        "congestion_control": machine.congestion_control,
        "versions": versions,
        "rounds": machine.rounds,
        "seconds_per_cell": machine.seconds,
        "quick": machine.quick,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::tests::with_report;

    #[test]
    fn samples_and_verdicts_are_kept() {
        with_report(|report| {
            let value: Value = serde_json::from_str(&render(report)).unwrap();
            assert_eq!(value["cells"][0]["samples"]["tidegate"], json!([30.0, 31.0]));
            let figures = value["figures"].as_array().unwrap();
            let requests =
                figures.iter().find(|figure| figure["worst_cell"] == "requests.rate").unwrap();
            assert_eq!(requests["verdict"], "stretch");
            assert_eq!(value["machine"]["cores"], 2);
        });
    }
}
