//! Deadlines by token. The caller provides the current time.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use crate::Token;
use std::collections::BTreeSet;
use std::time::Instant;

/// A set of deadlines, earliest first.
///
/// There are no timer handles: the caller keeps the deadline and passes it to [`Self::disarm`]. To
/// extend a timeout on every packet, do not re-arm the timer each time. Let it fire, compare with
/// the time of the last packet, and arm it again.
#[derive(Debug, Default)]
pub struct Timers {
    deadlines: BTreeSet<(Instant, Token)>,
}

impl Timers {
    /// Arms a timer for `token` at `deadline`. Arming the same pair twice is one timer.
    pub fn arm(&mut self, deadline: Instant, token: Token) {
        self.deadlines.insert((deadline, token));
    }

    /// Cancels a timer of [`Self::arm`]; does nothing if it has fired already.
    pub fn disarm(&mut self, deadline: Instant, token: Token) {
        self.deadlines.remove(&(deadline, token));
    }

    /// The earliest deadline.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.deadlines.first().map(|(deadline, _)| *deadline)
    }

    /// Removes and returns the earliest timer that is due at `now`.
    pub fn expire(&mut self, now: Instant) -> Option<Token> {
        let first = *self.deadlines.first()?;
        (first.0 <= now).then(|| {
            self.deadlines.remove(&first);
            first.1
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Arena;
    use std::time::Duration;

    #[test]
    fn timers_fire_in_the_order_of_their_deadlines_and_not_before() {
        let mut arena = Arena::new();
        let token = |tag, arena: &mut Arena<()>| Token::new(tag, arena.insert(()));
        let (early, late, never) =
            (token(0, &mut arena), token(1, &mut arena), token(2, &mut arena));
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);

        let mut timers = Timers::default();
        timers.arm(at(20), late);
        timers.arm(at(10), early);
        timers.arm(at(15), never);
        timers.disarm(at(15), never);

        assert_eq!(timers.next_deadline(), Some(at(10)));
        assert_eq!(timers.expire(at(9)), None);
        assert_eq!(timers.expire(at(30)), Some(early));
        assert_eq!(timers.expire(at(30)), Some(late));
        assert_eq!(timers.expire(at(30)), None);
        assert_eq!(timers.next_deadline(), None);
    }
}
