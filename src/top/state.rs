//! The state of the view: the latest figures, the selected view, the sort order and the filter.

use super::rates::Rates;
use super::sheet::{Order, Sheet, View};
use std::time::Duration;
use tidegate_api::types::Figures;

/// Maximum length of the filter, in characters.
pub(super) const LONGEST_FILTER: usize = 64;

/// See the [module](self).
#[derive(Debug)]
pub(crate) struct State {
    pub(super) view: View,
    pub(super) order: Order,
    pub(super) filter: String,
    /// The filter is being typed.
    pub(super) typing: bool,
    /// The first visible row.
    pub(super) scroll: usize,
    pub(super) interval: Duration,
    pub(super) rates: Rates,
    /// Why the last poll failed. The figures are stale while it is set.
    pub(super) lost: Option<String>,
    last: Figures,
}

impl State {
    /// A state with the first figures, before any rate is known.
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

    /// Takes the answer of the API, or the error of the poll.
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

    /// Returns the table of the selected view.
    pub(super) fn sheet(&self) -> Sheet {
        Sheet::new(self.view, &self.rates, self.order, &self.filter)
    }

    /// Returns the number of rows of each view, without the filter.
    pub(super) fn sizes(&self) -> [usize; View::ALL.len()] {
        let rates = &self.rates;
        [rates.ports.len(), rates.endpoints.len(), rates.networks.len(), rates.upstreams.len()]
    }
}
