//! Deadlines by token. Pure: the caller brings the time.

use crate::Token;
use std::collections::BTreeSet;
use std::time::Instant;

/// A set of deadlines, the next one first.
///
/// Whoever arms a timer keeps the deadline and disarms with it; there is no handle. A timer that
/// only has to be pushed back on every packet is not worth a re-arm each time: let it fire, look
/// when the last packet was, and arm it again.
#[derive(Debug, Default)]
pub struct Timers {
    deadlines: BTreeSet<(Instant, Token)>,
}

impl Timers {
    /// Makes `token` due at `deadline`; the same pair twice is one timer.
    pub fn arm(&mut self, deadline: Instant, token: Token) {
        self.deadlines.insert((deadline, token));
    }

    /// Takes back what [`Self::arm`] did; no harm if it has fired already.
    pub fn disarm(&mut self, deadline: Instant, token: Token) {
        self.deadlines.remove(&(deadline, token));
    }

    /// When the next timer is due.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.deadlines.first().map(|(deadline, _)| *deadline)
    }

    /// Takes out one timer that is due at `now`, earliest first.
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
