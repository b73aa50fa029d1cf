//! Restart policies of services.

/// The restart policy: what happens when the command exits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Restart {
    /// The service is not restarted.
    #[default]
    No,
    /// It is restarted after a failure (exit code other than 0, or killed by a signal), `max` times
    /// at most; without `max`, without limit.
    OnFailure {
        /// Maximum number of restarts, at least 1.
        max: Option<u32>,
    },
    /// It is always restarted.
    Always,
    /// It is restarted unless it was stopped on purpose. This differs from `Always` only where
    /// services start after a reboot; tidegate does not start them.
    UnlessStopped,
}
