//! The samples of a run, by metric, contender and round.

use std::collections::BTreeMap;

use crate::contender::Kind;
use crate::scenario::Metric;
use crate::stats::Summary;

/// All samples of a run.
#[derive(Default)]
pub(crate) struct Results {
    /// In the order of their first measurement.
    pub(crate) metrics: Vec<Metric>,
    /// The contenders of the run, in the order of columns.
    pub(crate) kinds: Vec<Kind>,
    pub(crate) failures: Vec<Failure>,
    /// The values by metric, contender and round.
    samples: BTreeMap<(String, Kind), BTreeMap<u32, f64>>,
}

/// A cell whose measurement failed.
pub(crate) struct Failure {
    pub(crate) round: u32,
    pub(crate) scenario: String,
    pub(crate) kind: Kind,
    pub(crate) error: String,
}

impl Results {
    /// Empty results for `kinds`.
    pub(crate) fn new(kinds: Vec<Kind>) -> Self {
        Self { kinds, ..Self::default() }
    }

    /// Adds one sample.
    pub(crate) fn add(&mut self, metric: &Metric, kind: Kind, round: u32, value: f64) {
        if !self.metrics.contains(metric) {
            self.metrics.push(metric.clone());
        }
        self.samples.entry((metric.name.clone(), kind)).or_default().insert(round, value);
    }

    /// The samples of one cell, in the order of rounds.
    pub(crate) fn samples(&self, metric: &str, kind: Kind) -> Vec<f64> {
        self.rounds(metric, kind).map(|(_, value)| value).collect()
    }

    /// The summary of one cell; `None` without samples.
    pub(crate) fn summary(&self, metric: &str, kind: Kind) -> Option<Summary> {
        Summary::of(&self.samples(metric, kind))
    }

    /// `ours / theirs` within each round, so that drift between rounds cancels out.
    pub(crate) fn ratios(&self, metric: &str, ours: Kind, theirs: Kind) -> Vec<f64> {
        let theirs: BTreeMap<u32, f64> = self.rounds(metric, theirs).collect();
        self.rounds(metric, ours)
            .filter_map(|(round, value)| Some(value / theirs.get(&round)?))
            // In a very short run, for example, a peer may have used no measurable CPU time.
            .filter(|ratio| ratio.is_finite())
            .collect()
    }

    /// The summary of the [`ratios`](Self::ratios).
    pub(crate) fn ratio(&self, metric: &str, ours: Kind, theirs: Kind) -> Option<Summary> {
        Summary::of(&self.ratios(metric, ours, theirs))
    }

    fn rounds(&self, metric: &str, kind: Kind) -> impl Iterator<Item = (u32, f64)> {
        let cell = self.samples.get(&(metric.to_owned(), kind));
        cell.into_iter().flatten().map(|(&round, &value)| (round, value))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Results of one metric, with a row of samples per contender; NaN omits a round.
    pub(crate) fn results(metric: &str, cells: &[(Kind, &[f64])]) -> Results {
        let mut results = Results::new(cells.iter().map(|(kind, _)| *kind).collect());
        let metric = Metric { name: metric.into(), title: metric.into(), unit: "1/s" };
        for (kind, samples) in cells {
            for (round, &value) in (0..).zip(*samples).filter(|(_, value)| !value.is_nan()) {
                results.add(&metric, *kind, round, value);
            }
        }
        results
    }

    #[test]
    fn ratios_pair_the_samples_of_a_round() {
        let cells: [(Kind, &[f64]); 2] =
            [(Kind::Publish, &[20.0, f64::NAN, 60.0]), (Kind::DockerProxy, &[10.0, 1.0, 20.0])];
        let results = results("x", &cells);
        let ratio = results.ratio("x", Kind::Publish, Kind::DockerProxy).unwrap();
        assert_eq!(ratio, Summary { median: 2.5, min: 2.0, max: 3.0 });
        assert_eq!(results.ratio("x", Kind::Publish, Kind::Socat), None);
        assert_eq!(results.ratio("y", Kind::Publish, Kind::DockerProxy), None);
    }

    #[test]
    fn a_peer_with_the_value_zero_yields_no_ratio() {
        let cells: [(Kind, &[f64]); 2] = [(Kind::Publish, &[1.0]), (Kind::DockerProxy, &[0.0])];
        assert_eq!(results("x", &cells).ratio("x", Kind::Publish, Kind::DockerProxy), None);
    }
}
