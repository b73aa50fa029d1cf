//! The loop that carries frames to the engine and events of sockets, and keeps its timer.

use super::sockets::{FLOW, Kernel};
use crate::engine::Engine;
use crate::host::Ready;
use crate::policy::Policy;
use crate::wire::head::MAX_PACKET;
use crate::wire::virtio;
use std::io;
use std::time::Instant;
use tidegate_reactor::{Arena, Context, Epoll, Handler, Interest, Key, Readiness, Token};

/// Frames read in one go. Acknowledgements leave after that.
const FRAMES_PER_READ: usize = 64;

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
    /// Names the one device and the one timer.
    key: Key,
}

impl Driver {
    /// Begins to watch the device.
    pub(crate) fn new(mut engine: Engine<Kernel>, epoll: &Epoll) -> io::Result<Self> {
        let key = Arena::new().insert(());
        epoll.add(&engine.host_mut().tun, Token::new(DEVICE, key), Interest::Readable)?;
        Ok(Self { engine, frame: vec![0; virtio::LENGTH + MAX_PACKET], timer: None, key })
    }

    fn read(&mut self, now: Instant) {
        for _ in 0..FRAMES_PER_READ {
            // An error is "nothing there", or a device whose namespace is gone, about which nothing can be done.
            match rustix::io::read(&self.engine.host_mut().tun, &mut self.frame[..]) {
                Ok(length) => self.engine.packet(&self.frame[..length], now),
                Err(_) => break,
            }
        }
        self.engine.flush(now);
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
}
