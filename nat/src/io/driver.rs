//! The loop that carries frames to the engine and events of sockets, and keeps its timer.

use super::sockets::{FLOW, Kernel};
use crate::engine::Engine;
use crate::host::Ready;
use crate::policy::Policy;
use crate::wire::head::MAX_PACKET;
use crate::wire::virtio;
use std::io;
use std::time::{Duration, Instant};
use tidegate_reactor::{Arena, Context, Epoll, Handler, Interest, Key, Readiness, Token};

/// Frames read in one go. Acknowledgements leave after that.
const FRAMES_PER_READ: usize = 64;

/// A read that brings no more than that is a question rather than a stream, and there is nobody else to be served.
const FEW: usize = 1;

/// How long the answer to it is looked for, instead of falling asleep and being woken, which takes as long as an exchange does on one
/// host.
const SOON: Duration = Duration::from_micros(50);

/// Tags of tokens, beside [`FLOW`].
const DEVICE: u8 = 1;
const TIMER: u8 = 2;

/// What the loop is told.
#[derive(Debug)]
pub(crate) enum Message {
    /// From now on this holds, for new flows.
    Policy(Box<Policy>),
    /// End.
    Stop,
}

/// See the module.
pub(crate) struct Driver {
    engine: Engine<Kernel>,
    frame: Vec<u8>,
    timer: Option<Instant>,
    /// An answer to what the guest has just asked may come soon.
    expects_until: Option<Instant>,
    /// Names the one device and the one timer.
    key: Key,
}

impl Driver {
    /// Begins to watch the device.
    pub(crate) fn new(mut engine: Engine<Kernel>, epoll: &Epoll) -> io::Result<Self> {
        let key = Arena::new().insert(());
        epoll.add(&engine.host_mut().tun, Token::new(DEVICE, key), Interest::Readable)?;
        Ok(Self {
            engine,
            frame: vec![0; virtio::LENGTH + MAX_PACKET],
            timer: None,
            expects_until: None,
            key,
        })
    }

    fn read(&mut self, now: Instant) {
        let mut frames = 0;
        while frames < FRAMES_PER_READ {
            // An error is "nothing there", or a device whose namespace is gone, about which nothing can be done.
            let Ok(length) = rustix::io::read(&self.engine.host_mut().tun, &mut self.frame[..]) else {
                break;
            };
            self.engine.packet(&self.frame[..length], now);
            frames += 1;
        }
        self.engine.flush(now);
        self.expects_until = (frames <= FEW).then_some(now + SOON);
    }
}

impl Handler for Driver {
    type Message = Message;

    fn ready(&mut self, cx: &mut Context<'_>, token: Token, readiness: Readiness) {
        match token.tag() {
            DEVICE if readiness.is_error() => {
                // The namespace has ended, and the device with it.
                let _ = cx.epoll.remove(&self.engine.host_mut().tun);
            }
            DEVICE => self.read(cx.now),
            FLOW => {
                let ready = Ready {
                    readable: readiness.is_readable(),
                    writable: readiness.is_writable(),
                    error: readiness.is_error(),
                    more: readiness.is_read_closed() || readiness.is_urgent(),
                };
                self.engine.ready(token.key(), ready, cx.now);
            }
            _ => {}
        }
    }

    fn message(&mut self, cx: &mut Context<'_>, message: Message) {
        match message {
            Message::Policy(policy) => self.engine.set_policy(*policy),
            Message::Stop => {
                self.engine.shutdown();
                cx.stop();
            }
        }
    }

    fn timer(&mut self, cx: &mut Context<'_>, _token: Token) {
        self.timer = None;
        self.engine.handle_timeout(cx.now);
    }

    fn turn(&mut self, cx: &mut Context<'_>) -> bool {
        let more = self.engine.turn(cx.now);
        let next = self.engine.poll_timeout();
        if next != self.timer {
            let token = Token::new(TIMER, self.key);
            if let Some(armed) = self.timer {
                cx.timers.disarm(armed, token);
            }
            if let Some(next) = next {
                cx.timers.arm(next, token);
            }
            self.timer = next;
        }
        more
    }

    fn expects_until(&self) -> Option<Instant> {
        self.expects_until
    }
}
