//! Signals that end an instance, and the one that has it check everything.

use std::io;
use tidegate_process::without_lost_signals;
use tokio::signal::unix::{Signal, SignalKind, signal};

/// Signals to this process.
pub(super) struct Signals {
    ends: [Signal; 4],
    check: Signal,
}

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
        without_lost_signals(|| {
            let [interrupt, terminate, hangup, quit] = Self::KINDS.map(signal);
            let ends = [interrupt?, terminate?, hangup?, quit?];
            Ok(Self { ends, check: signal(SignalKind::user_defined1())? })
        })
    }

    /// Waits for a signal. Returns whether it ends the instance; SIGUSR1 does not.
    pub(super) async fn any(&mut self) -> bool {
        tokio::select! {
            () = Self::end(&mut self.ends) => true,
            _ = self.check.recv() => false,
        }
    }

    /// Waits for a signal that ends the instance.
    pub(super) async fn next(&mut self) {
        Self::end(&mut self.ends).await;
    }

    async fn end([interrupt, terminate, hangup, quit]: &mut [Signal; 4]) {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = hangup.recv() => {}
            _ = quit.recv() => {}
        }
    }
}
