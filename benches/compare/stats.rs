//! Statistics of samples.

/// The median of samples and their range.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Summary {
    /// The middle sample, or the mean of the two middle ones.
    pub(crate) median: f64,
    /// The smallest sample.
    pub(crate) min: f64,
    /// The largest sample.
    pub(crate) max: f64,
}

impl Summary {
    /// Summarises `samples`; `None` without samples.
    pub(crate) fn of(samples: &[f64]) -> Option<Self> {
        let mut sorted = samples.to_vec();
        sorted.sort_by(f64::total_cmp);
        let (min, max) = (*sorted.first()?, *sorted.last()?);
        let middle = sorted.len() / 2;
        let median = match sorted.len() % 2 {
            1 => sorted[middle],
            _ => (sorted[middle - 1] + sorted[middle]) / 2.0,
        };
        Some(Self { median, min, max })
    }

    /// The larger distance of an extreme from the median, relative to the median.
    pub(crate) fn spread(&self) -> f64 {
        let distance = (self.max - self.median).max(self.median - self.min);
        if distance == 0.0 { 0.0 } else { distance / self.median.abs() }
    }
}

/// The `q`-quantile (0 to 1) of `sorted`, by the nearest-rank method.
///
/// # Panics
///
/// If `sorted` is empty.
pub(crate) fn quantile(sorted: &[u32], q: f64) -> u32 {
    let rank = (q * sorted.len() as f64).ceil() as usize;
    sorted[rank.clamp(1, sorted.len()) - 1]
}

/// Whether `ratios` as a whole are below 1 at a confidence of 95%: the one-sided Wilcoxon
/// signed-rank test of their logarithms, by normal approximation. With fewer than six ratios, this
/// is never the case.
pub(crate) fn is_less_than_one(ratios: &[f64]) -> bool {
    let mut distances: Vec<f64> =
        ratios.iter().map(|ratio| ratio.ln()).filter(|of| *of != 0.0).collect();
    distances.sort_by(|a, b| a.abs().total_cmp(&b.abs()));
    let count = distances.len() as f64;
    let above: f64 =
        (1..).zip(&distances).filter(|(_, of)| **of > 0.0).map(|(rank, _)| f64::from(rank)).sum();
    let expected = count * (count + 1.0) / 4.0;
    let deviation = (count * (count + 1.0) * (2.0 * count + 1.0) / 24.0).sqrt();
    count >= 6.0 && (above - expected) / deviation < -1.645
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_of_odd_and_even_counts() {
        let odd = Summary::of(&[3.0, 1.0, 2.0]).unwrap();
        assert_eq!(odd, Summary { median: 2.0, min: 1.0, max: 3.0 });
        assert_eq!(Summary::of(&[4.0, 1.0, 2.0, 3.0]).unwrap().median, 2.5);
        assert_eq!(Summary::of(&[]), None);
    }

    #[test]
    fn spread_is_the_farther_extreme() {
        assert_eq!(Summary::of(&[9.0, 10.0, 15.0]).unwrap().spread(), 0.5);
        assert_eq!(Summary::of(&[0.0]).unwrap().spread(), 0.0);
    }

    #[test]
    fn a_difference_within_chance_does_not_count() {
        assert!(!is_less_than_one(&[]));
        assert!(!is_less_than_one(&[0.5; 5]), "too few");
        assert!(is_less_than_one(&[0.9; 6]));
        assert!(!is_less_than_one(&[0.9, 1.1, 0.95, 1.05, 0.98, 1.02]));
        assert!(!is_less_than_one(&[1.0; 20]));
        let mostly: Vec<f64> =
            (0..32).map(|round| if round % 4 == 0 { 1.02 } else { 0.97 }).collect();
        assert!(is_less_than_one(&mostly));
    }

    #[test]
    fn quantiles_by_nearest_rank() {
        let sorted: Vec<u32> = (1..=100).collect();
        assert_eq!(quantile(&sorted, 0.5), 50);
        assert_eq!(quantile(&sorted, 0.99), 99);
        assert_eq!(quantile(&sorted, 1.0), 100);
        assert_eq!(quantile(&[7], 0.0), 7);
    }
}
