//! What is shown and how: the figures that came last, the view, the order, the filter.

use super::rates::Rates;
use super::sheet::{Order, Sheet, View};
use crate::api::types::Figures;
use std::time::Duration;

/// The longest filter, in characters.
pub(super) const LONGEST_FILTER: usize = 64;

/// See the [module](self).
#[derive(Debug)]
pub(crate) struct State {
    pub(super) view: View,
    pub(super) order: Order,
    pub(super) filter: String,
    /// The filter is being typed.
    pub(super) typing: bool,
    /// The first row that is shown.
    pub(super) scroll: usize,
    pub(super) interval: Duration,
    pub(super) rates: Rates,
    /// Why the figures are old.
    pub(super) lost: Option<String>,
    last: Figures,
}

impl State {
    /// With the first figures.
    pub(crate) fn new(
        view: View,
        order: Order,
        filter: String,
        interval: Duration,
        first: Figures,
    ) -> Self {
        let rates = Rates::between(None, &first);
        Self {
            view,
            order,
            filter,
            typing: false,
            scroll: 0,
            interval,
            rates,
            lost: None,
            last: first,
        }
    }

    /// What the API has said, or why it has not.
    pub(crate) fn take(&mut self, answer: Result<Figures, String>) {
        match answer {
            Ok(figures) => {
                self.rates = Rates::between(Some(&self.last), &figures);
                self.last = figures;
                self.lost = None;
            }
            Err(reason) => self.lost = Some(reason),
        }
    }

    /// The table that is looked at.
    pub(super) fn sheet(&self) -> Sheet {
        Sheet::new(self.view, &self.rates, self.order, &self.filter)
    }

    /// How many rows each view has, filtered or not.
    pub(super) fn sizes(&self) -> [usize; View::ALL.len()] {
        let rates = &self.rates;
        [rates.ports.len(), rates.endpoints.len(), rates.networks.len(), rates.upstreams.len()]
    }
}
