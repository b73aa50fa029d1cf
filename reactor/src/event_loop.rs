//! The event loop: waits, dispatches events, runs queued work and expires timers.

use crate::Interest;
use crate::epoll::{Epoll, Readiness, Token, split};
use crate::mailbox::{Mailbox, Sender};
use crate::timers::Timers;
use std::io;
use std::time::{Duration, Instant};

/// Maximum number of events per wait. More would only delay the run queue.
const EVENTS_PER_WAIT: usize = 256;

/// Callbacks of an [`EventLoop`]. A single thread calls them, so no locks are needed.
///
/// # Theory of operation
/// Each iteration calls, in this order: [`message`](Self::message) for each message of another
/// thread, [`ready`](Self::ready) for each event, [`timer`](Self::timer) for each expired deadline,
/// and [`turn`](Self::turn) once. `ready` records readiness. The I/O belongs in `turn`, with a
/// budget for each connection, so that a fast connection does not starve the others.
pub trait Handler {
    /// The type of messages from other threads.
    type Message: Send;

    /// The descriptor registered as `token` is ready. The token may be stale, so its key must be
    /// looked up.
    fn ready(&mut self, cx: &mut Context<'_>, token: Token, readiness: Readiness);

    /// A message from a [`Sender`].
    fn message(&mut self, cx: &mut Context<'_>, message: Self::Message);

    /// The deadline armed for `token` has passed. The token may be stale.
    fn timer(&mut self, cx: &mut Context<'_>, token: Token);

    /// Performs the I/O for which descriptors are ready. Returns true if work is left, and the loop
    /// then does not sleep.
    fn turn(&mut self, cx: &mut Context<'_>) -> bool;

    /// The time until which the loop busy-polls instead of sleeping, because an event is expected
    /// sooner than a sleep and a wake-up take. Usually in the past. See [`EventLoop`].
    fn expects_until(&self) -> Option<Instant> {
        None
    }
}

/// Access of a [`Handler`] to its loop.
#[derive(Debug)]
pub struct Context<'a> {
    /// The epoll instance for registering descriptors.
    pub epoll: &'a Epoll,
    /// The loop's timers.
    pub timers: &'a mut Timers,
    /// The start time of this iteration. Accurate enough for deadlines, and needs no system call.
    pub now: Instant,
    /// The number of this iteration, starting at 1.
    pub round: u64,
    stop: &'a mut bool,
}

impl Context<'_> {
    /// Ends the loop after this iteration.
    pub fn stop(&mut self) {
        *self.stop = true;
    }
}

/// Maximum duration of sched_yield(2) if no other thread wants the core.
const MAX_YIELD: Duration = Duration::from_micros(100);

/// How long the loop stops busy polling after a yield that took longer than [`MAX_YIELD`].
const POLL_BACK_OFF: Duration = Duration::from_millis(100);

/// An event loop for one thread.
///
/// It sleeps in epoll_wait(2) when idle. A sleep and a wake-up by another core take as long as two
/// or three small exchanges, and longer in a virtual machine. While the handler
/// [expects events](Handler::expects_until), the loop therefore busy-polls and calls sched_yield(2)
/// between polls. If client and server share its cores, yielding lets them produce the awaited
/// event. If a compute-bound program takes the core instead, the loop stops polling for a while,
/// because the scheduler favours threads that slept.
pub struct EventLoop<M> {
    epoll: Epoll,
    timers: Timers,
    mailbox: Mailbox<M>,
}

impl<M: Send> EventLoop<M> {
    /// Creates a loop and a sender for messages to it.
    ///
    /// # Errors
    /// No descriptors are available for the epoll instance or the eventfd.
    pub fn new() -> io::Result<(Self, Sender<M>)> {
        let epoll = Epoll::new()?;
        let (mailbox, sender) = Mailbox::new()?;
        epoll.add(&mailbox, Token::MAILBOX, Interest::Readable)?;
        Ok((Self { epoll, timers: Timers::default(), mailbox }, sender))
    }

    /// The epoll instance, for registering descriptors before the loop runs.
    pub fn epoll(&self) -> &Epoll {
        &self.epoll
    }

    /// Runs `handler` on this thread until it calls [`Context::stop`].
    ///
    /// # Errors
    /// Only errors of the wait itself. The handler handles the errors of its sockets.
    pub fn run<H: Handler<Message = M>>(mut self, handler: &mut H) -> io::Result<()> {
        let mut events = Vec::with_capacity(EVENTS_PER_WAIT);
        let (mut more, mut stop) = (false, false);
        let mut now = Instant::now();
        let mut round = 0;
        let mut poll_from = now;
        while !stop {
            events.clear();
            if more {
                self.epoll.wait(&mut events, Some(Duration::ZERO))?;
            } else {
                if let Some(until) = handler.expects_until()
                    && until > now
                    && now >= poll_from
                {
                    poll_from = self.spin_until(until, &mut events)?;
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

    /// Polls until events arrive or `until` has passed. Returns the earliest time for polling
    /// again.
    fn spin_until(
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
            if after - before > MAX_YIELD {
                return Ok(after + POLL_BACK_OFF);
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

    /// Records its calls, and stops the loop at the timer.
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
        assert!(recorder.turns <= 4, "{} iterations for three events", recorder.turns);
        assert_eq!(sender.send("too late"), Err(crate::Closed("too late")));
    }
}
