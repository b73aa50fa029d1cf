//! The order of measurements: within a round, all contenders of a cell run before the next cell.
//!
//! A machine drifts: its clock, its other load, its caches. Contenders measured right after each
//! other drift together, so ratios within a round are stable when absolute figures are not. The
//! first contender of a cell changes every round, so that no contender always follows the same one.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use anyhow::{Result, anyhow};

use crate::contender::Contender;
use crate::lab::Lab;
use crate::options::Options;
use crate::report::number;
use crate::results::{Failure, Results};
use crate::scenario::{Metric, Scenario};

/// Runs all scenarios with all contenders and shows progress on standard error.
pub(crate) fn run(
    options: &Options,
    scenarios: &[Box<dyn Scenario>],
    contenders: &[Contender],
) -> Results {
    let mut results = Results::new(contenders.iter().map(|contender| contender.kind).collect());
    for round in 0..options.rounds {
        for scenario in scenarios.iter().filter(|scenario| round < scenario.most_rounds()) {
            eprint!("round {} of {}  {:<15}", round + 1, options.rounds, scenario.name());
            for contender in turn(contenders, round) {
                if scenario.takes(contender.kind) {
                    cell(options, round, scenario.as_ref(), contender, &mut results);
                }
            }
            eprintln!();
        }
    }
    results
}

/// `contenders`, starting with another one each round.
fn turn(contenders: &[Contender], round: u32) -> impl Iterator<Item = &Contender> {
    let first = round as usize % contenders.len().max(1);
    contenders[first..].iter().chain(&contenders[..first])
}

/// Measures one cell once. A failure is recorded and does not stop the run.
fn cell(
    options: &Options,
    round: u32,
    scenario: &dyn Scenario,
    contender: &Contender,
    results: &mut Results,
) {
    let kind = contender.kind;
    let metrics = scenario.metrics();
    match measure(options, scenario, contender) {
        Ok(values) => {
            debug_assert_eq!(values.len(), metrics.len(), "{}", scenario.name());
            for (metric, value) in metrics.iter().zip(&values) {
                if let Some(value) = *value {
                    results.add(metric, kind, round, value);
                }
            }
            eprint!("  {} {}", kind.name(), first_value(&metrics, &values));
        }
        Err(error) => {
            let error = format!("{error:#}");
            eprint!("\n    {} FAILED: {error}\n   ", kind.name());
            results.failures.push(Failure { round, scenario: scenario.name(), kind, error });
        }
    }
}

fn measure(
    options: &Options,
    scenario: &dyn Scenario,
    contender: &Contender,
) -> Result<Vec<Option<f64>>> {
    // The testbed panics on a failed setup; guards clean up during unwinding.
    catch_unwind(AssertUnwindSafe(|| {
        let lab = Lab::new(&options.congestion_control);
        scenario.measure(&lab, contender, Duration::from_secs(options.seconds))
    }))
    .unwrap_or_else(|panic| Err(anyhow!(panic_message(panic.as_ref()))))
}

fn first_value(metrics: &[Metric], values: &[Option<f64>]) -> String {
    let mut both = metrics.iter().zip(values);
    both.find_map(|(metric, value)| Some(format!("{} {}", number((*value)?), metric.unit)))
        .unwrap_or_default()
}

fn panic_message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("panic").to_owned()
}
