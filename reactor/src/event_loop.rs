//! The loop: wait, hand out events, run what was queued, expire timers, again.

use crate::Interest;
use crate::epoll::{Epoll, Readiness, Token, split};
use crate::mailbox::{Mailbox, Sender};
use crate::timers::Timers;
use std::io;
use std::time::{Duration, Instant};

/// Events taken from the kernel in one call. More would only delay the run queue behind them.
const EVENTS_PER_WAIT: usize = 256;

/// What runs on an [`EventLoop`]. One thread calls it, so it needs no locks.
///
/// # Theory of operation
/// Every round of the loop calls, in this order: [`message`](Self::message) for what other threads
/// sent, [`ready`](Self::ready) for each event, [`timer`](Self::timer) for each deadline that has
/// passed, and [`turn`](Self::turn) once. `ready` notes what is possible now; the work proper
/// belongs in `turn`, with a budget for each connection, so that a fast one does not starve the
/// rest.
pub trait Handler {
    /// What other threads may send to it.
    type Message: Send;

    /// The descriptor registered as `token` is ready. The token may be stale: look its key up.
    fn ready(&mut self, cx: &mut Context<'_>, token: Token, readiness: Readiness);

    /// A message from a [`Sender`].
    fn message(&mut self, cx: &mut Context<'_>, message: Self::Message);

    /// The deadline armed for `token` has passed. The token may be stale.
    fn timer(&mut self, cx: &mut Context<'_>, token: Token);

    /// Does the work that the events made possible. True if some is left: the loop then does not
    /// sleep.
    fn turn(&mut self, cx: &mut Context<'_>) -> bool;

    /// Until when something is expected so soon that falling asleep and being woken would take
    /// longer than to look again; in the past most of the time. See [`EventLoop`].
    fn expects_until(&self) -> Option<Instant> {
        None
    }
}

/// What a [`Handler`] may use of the loop it runs on.
#[derive(Debug)]
pub struct Context<'a> {
    /// Where descriptors are registered.
    pub epoll: &'a Epoll,
    /// The loop's timers.
    pub timers: &'a mut Timers,
    /// The time at which this round began: good enough for deadlines, and free.
    pub now: Instant,
    /// Which round this is, counted from 1.
    pub round: u64,
    stop: &'a mut bool,
}

impl Context<'_> {
    /// Ends the loop after this round.
    pub fn stop(&mut self) {
        *self.stop = true;
    }
}

/// The most that giving way may take, if nobody else wants the core: beyond it someone does.
const GAVE_WAY: Duration = Duration::from_micros(100);

/// How long a loop does not give way after someone has used that to the full.
const NO_MORE_GIVING_WAY: Duration = Duration::from_millis(100);

/// One thread's loop.
///
/// It sleeps in epoll_wait(2) when there is nothing to do. Falling asleep and being woken by
/// another core takes as long as two or three small exchanges, in a virtual machine longer. So
/// while the handler [expects](Handler::expects_until) something, the loop looks again and again,
/// giving way to whoever wants the core (sched_yield(2)) in between: with the client and the server
/// on the same two cores, they are who is waited for. Where a program that computes takes the core
/// instead, the loop does without for a while, because one that slept would be let in before it.
pub struct EventLoop<M> {
    epoll: Epoll,
    timers: Timers,
    mailbox: Mailbox<M>,
}

impl<M: Send> EventLoop<M> {
    /// A loop, and the way to send it messages.
    ///
    /// # Errors
    /// No descriptors left for the epoll instance or the eventfd.
    pub fn new() -> io::Result<(Self, Sender<M>)> {
        let epoll = Epoll::new()?;
        let (mailbox, sender) = Mailbox::new()?;
        epoll.add(&mailbox, Token::MAILBOX, Interest::Readable)?;
        Ok((Self { epoll, timers: Timers::default(), mailbox }, sender))
    }

    /// Where descriptors are registered, also before the loop runs.
    pub fn epoll(&self) -> &Epoll {
        &self.epoll
    }

    /// Runs `handler` on this thread until it calls [`Context::stop`].
    ///
    /// # Errors
    /// Only what makes waiting itself impossible; the handler deals with the errors of its sockets.
    pub fn run<H: Handler<Message = M>>(mut self, handler: &mut H) -> io::Result<()> {
        let mut events = Vec::with_capacity(EVENTS_PER_WAIT);
        let (mut more, mut stop) = (false, false);
        let mut now = Instant::now();
        let mut round = 0;
        let mut give_way_from = now;
        while !stop {
            events.clear();
            if more {
                self.epoll.wait(&mut events, Some(Duration::ZERO))?;
            } else {
                if let Some(until) = handler.expects_until()
                    && until > now
                    && now >= give_way_from
                {
                    give_way_from = self.look_until(until, &mut events)?;
                }
                if events.is_empty() {
                    let sleep = self.until_next_deadline(Instant::now());
                    self.epoll.wait(&mut events, sleep)?;
                }
            }
            now = Instant::now();
            round += 1;
            let mut cx = Context {
                epoll: &self.epoll,
                timers: &mut self.timers,
                now,
                round,
                stop: &mut stop,
            };
            if events.iter().any(|event| split(*event).0 == Token::MAILBOX) {
                for message in self.mailbox.take() {
                    handler.message(&mut cx, message);
                }
            }
            for (token, readiness) in events.iter().map(|event| split(*event)) {
                if token != Token::MAILBOX {
                    handler.ready(&mut cx, token, readiness);
                }
            }
            while let Some(token) = cx.timers.expire(now) {
                handler.timer(&mut cx, token);
            }
            more = handler.turn(&mut cx);
        }
        Ok(())
    }

    /// Looks for events until there are some or `until` has come. Returns from when on to do so
    /// again.
    fn look_until(
        &self,
        until: Instant,
        events: &mut Vec<rustix::event::epoll::Event>,
    ) -> io::Result<Instant> {
        let mut before = Instant::now();
        loop {
            self.epoll.wait(events, Some(Duration::ZERO))?;
            if !events.is_empty() || before >= until {
                return Ok(before);
            }
            std::thread::yield_now();
            let after = Instant::now();
            if after - before > GAVE_WAY {
                return Ok(after + NO_MORE_GIVING_WAY);
            }
            before = after;
        }
    }

    fn until_next_deadline(&self, now: Instant) -> Option<Duration> {
        self.timers.next_deadline().map(|deadline| deadline.saturating_duration_since(now))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Arena, Key};
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    /// Writes down what it is told and stops at the timer.
    struct Recorder {
        log: Vec<String>,
        key: Key,
        stream: UnixStream,
        turns: u32,
    }

    impl Handler for Recorder {
        type Message = &'static str;

        fn ready(&mut self, cx: &mut Context<'_>, token: Token, readiness: Readiness) {
            assert_eq!(token.key(), self.key);
            self.log.push(format!("ready readable={}", readiness.is_readable()));
            cx.epoll.remove(&self.stream).unwrap();
            cx.timers.arm(cx.now + Duration::from_millis(5), Token::new(3, self.key));
        }

        fn message(&mut self, cx: &mut Context<'_>, message: &'static str) {
            self.log.push(format!("message {message}"));
            cx.epoll.add(&self.stream, Token::new(1, self.key), Interest::Readable).unwrap();
        }

        fn timer(&mut self, cx: &mut Context<'_>, token: Token) {
            self.log.push(format!("timer {}", token.tag()));
            cx.stop();
        }

        fn turn(&mut self, _cx: &mut Context<'_>) -> bool {
            self.turns += 1;
            false
        }
    }

    #[test]
    fn messages_events_and_timers_reach_the_handler_without_spinning() {
        let (stream, mut other) = UnixStream::pair().unwrap();
        let (event_loop, sender) = EventLoop::new().unwrap();
        sender.send("hello").unwrap();
        other.write_all(b"x").unwrap();
        let mut recorder = Recorder { log: vec![], key: Arena::new().insert(()), stream, turns: 0 };
        event_loop.run(&mut recorder).unwrap();
        assert_eq!(recorder.log, ["message hello", "ready readable=true", "timer 3"]);
        assert!(recorder.turns <= 4, "{} rounds for three happenings", recorder.turns);
        assert_eq!(sender.send("too late"), Err(crate::Closed("too late")));
    }
}
