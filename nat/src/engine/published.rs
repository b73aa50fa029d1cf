//! Published ports, and the UDP sessions of their clients.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use crate::forward::{Forward, ForwardId, Guard};
use crate::host::{Host, Port};
use crate::metrics::ForwardStats;
use std::collections::VecDeque;
use std::sync::Arc;
use tidegate_reactor::Key;

/// A published port.
pub(super) struct Published<H: Host> {
    pub(super) id: ForwardId,
    pub(super) forward: Forward,
    pub(super) port: Port<H::Listener, H::Datagrams>,
    pub(super) guard: Option<Arc<dyn Guard>>,
    pub(super) stats: Arc<ForwardStats>,
}

/// Sessions of one client of published ports.
#[derive(Debug, Default)]
pub(super) struct ClientSessions {
    pub(super) held: usize,
    /// Sessions in order of creation; some have ended.
    pub(super) oldest_first: VecDeque<Key>,
}

/// Number of oldest sessions to search for an unanswered one.
const SCAN_LIMIT: usize = 64;

impl ClientSessions {
    pub(super) fn begin(&mut self, flow: Key) {
        self.held += 1;
        self.oldest_first.push_back(flow);
    }

    /// Removes ended sessions, if they are more than half.
    pub(super) fn compact(&mut self, exists: impl Fn(Key) -> bool) {
        if self.oldest_first.len() > 2 * self.held + SCAN_LIMIT {
            self.oldest_first.retain(|flow| exists(*flow));
        }
    }

    /// The session to evict: the oldest unanswered one among the first [`SCAN_LIMIT`], or the
    /// oldest.
    pub(super) fn oldest(
        &mut self,
        exists: impl Fn(Key) -> bool,
        is_unanswered: impl Fn(Key) -> bool,
    ) -> Option<Key> {
        while self.oldest_first.front().is_some_and(|flow| !exists(*flow)) {
            self.oldest_first.pop_front();
        }
        let unanswered =
            self.oldest_first.iter().take(SCAN_LIMIT).find(|flow| is_unanswered(**flow));
        unanswered.or(self.oldest_first.front()).copied()
    }
}

impl<H: Host> Published<H> {
    pub(super) fn port_mut(&mut self) -> &mut Port<H::Listener, H::Datagrams> {
        &mut self.port
    }
}
