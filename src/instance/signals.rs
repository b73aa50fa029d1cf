//! Signals that end an instance.

use std::io;
use tokio::signal::unix::{Signal, SignalKind, signal};

/// Signals that end the project.
pub(super) struct Signals([Signal; 4]);

impl Signals {
    /// SIGINT (Ctrl-C), SIGTERM, SIGHUP (terminal closed) and SIGQUIT (Ctrl-\).
    const KINDS: [SignalKind; 4] = [
        SignalKind::interrupt(),
        SignalKind::terminate(),
        SignalKind::hangup(),
        SignalKind::quit(),
    ];

    /// Installs the handlers, which replace the default action (termination).
    pub(super) fn new() -> io::Result<Self> {
        let [interrupt, terminate, hangup, quit] = Self::KINDS.map(signal);
        Ok(Self([interrupt?, terminate?, hangup?, quit?]))
    }

    pub(super) async fn next(&mut self) {
        let [interrupt, terminate, hangup, quit] = &mut self.0;
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = hangup.recv() => {}
            _ = quit.recv() => {}
        }
    }
}
