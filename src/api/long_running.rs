//! Connections without a limit of time.

use super::problem::Problem;
use std::sync::{Arc, OnceLock};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Maximum number of clients without a limit of time.
pub(super) const MAX_LONG_RUNNING: usize = 16;

/// Lifts the limit of time of a connection: services start or stop, or their logs are followed.
#[derive(Clone, Debug)]
pub(super) struct LongRunning {
    places: Arc<Semaphore>,
    place: Arc<OnceLock<OwnedSemaphorePermit>>,
}

impl LongRunning {
    /// A connection that competes for `places` with others. There are [`MAX_LONG_RUNNING`].
    pub(super) fn of(places: &Arc<Semaphore>) -> Self {
        Self { places: Arc::clone(places), place: Arc::default() }
    }

    /// Lifts the limit.
    ///
    /// # Errors
    /// [`MAX_LONG_RUNNING`] connections have no limit already.
    pub(super) fn lift(&self) -> Result<(), Problem> {
        let place = Arc::clone(&self.places).try_acquire_owned().map_err(|_| {
            Problem::conflict(&format!(
                "{MAX_LONG_RUNNING} clients follow logs, or wait for services; end one of them first"
            ))
        })?;
        // Fails if it was lifted before.
        let _ = self.place.set(place);
        Ok(())
    }

    /// Returns whether the limit was lifted.
    pub(super) fn is_lifted(&self) -> bool {
        self.place.get().is_some()
    }
}
