//! The loop that carries frames to the engine and events of sockets, and keeps its timer.

use super::sockets::{FLOW, Kernel, PORT};
use crate::engine::Engine;
use crate::forward::{Forward, ForwardId, Guard};
use crate::host::Ready;
use crate::layer2::{self, ADVERTISEMENTS};
use crate::metrics::ForwardStats;
use crate::policy::Policy;
use crate::wire::head::MAX_PACKET;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};
use tidegate_reactor::{Arena, Context, Epoll, Handler, Interest, Key, Readiness, Token};

/// Frames read in one go. Acknowledgements leave after that.
const FRAMES_PER_READ: usize = 64;

/// A read that brings no more than that is a question rather than a stream, and there is nobody else to be served.
const FEW: usize = 1;

/// How long the answer to it is looked for, instead of falling asleep and being woken, which takes as long as an exchange does on one
/// host.
const SOON: Duration = Duration::from_micros(50);

/// For how long a read that brings more shows that there are others to be served.
const BUSY: Duration = Duration::from_millis(1);

/// Tags of tokens, beside [`FLOW`].
const DEVICE: u8 = 1;
const TIMER: u8 = 2;

/// What the loop is told.
#[derive(Debug)]
pub(crate) enum Message {
    /// From now on this holds, for new flows.
    Policy(Box<Policy>),
    /// A port to be published.
    Publish(Box<Publish>),
    /// A port to be closed. The answer comes when it is.
    Unpublish(ForwardId, mpsc::Sender<()>),
    /// End.
    Stop,
}

/// A port to be published.
#[derive(Debug)]
pub(crate) struct Publish {
    /// What it is known by.
    pub(crate) id: ForwardId,
    /// Where it leads.
    pub(crate) forward: Forward,
    /// Its socket, bound.
    pub(crate) socket: OwnedFd,
    /// Who may ask there.
    pub(crate) guard: Option<Arc<dyn Guard>>,
    /// Its figures.
    pub(crate) stats: Arc<ForwardStats>,
    /// Hears how it went.
    pub(crate) done: mpsc::Sender<io::Result<()>>,
}

/// See the module.
pub(crate) struct Driver {
    engine: Engine<Kernel>,
    frame: Vec<u8>,
    timer: Option<Instant>,
    /// When the router of an Ethernet is to tell of itself.
    advertise: Option<Instant>,
    /// An answer to what the guest has just asked may come soon.
    expects_until: Option<Instant>,
    /// There is much to do, as far as one knows.
    busy_until: Option<Instant>,
    /// Names the one device and the one timer.
    key: Key,
}

impl Driver {
    /// Begins to watch the device.
    pub(crate) fn new(mut engine: Engine<Kernel>, epoll: &Epoll) -> io::Result<Self> {
        let key = Arena::new().insert(());
        epoll.add(&engine.host_mut().tun, Token::new(DEVICE, key), Interest::Readable)?;
        let advertises = engine.host_mut().layer2.as_ref().is_some_and(|of| of.advertisement().is_some());
        Ok(Self {
            engine,
            frame: vec![0; layer2::HEAD + MAX_PACKET],
            timer: None,
            advertise: advertises.then(Instant::now),
            expects_until: None,
            busy_until: None,
            key,
        })
    }

    /// Has the router of an Ethernet tell of itself, if it is time.
    fn advertise(&mut self, now: Instant) {
        let Some(due) = self.advertise.filter(|due| *due <= now) else { return };
        self.advertise = Some(due.max(now) + ADVERTISEMENTS);
        let host = self.engine.host_mut();
        if let Some(frame) = host.layer2.as_ref().and_then(|layer2| layer2.advertisement()) {
            let _ = rustix::io::write(&host.tun, &frame);
        }
    }

    fn publish(&mut self, publish: Publish) {
        let Publish { id, forward, socket, guard, stats, done } = publish;
        let opened = self.engine.host_mut().open_port(&forward, socket);
        let published = opened.and_then(|port| self.engine.publish(id, forward, port, guard, stats));
        // Who has asked waits for it.
        let _ = done.send(published);
    }

    fn read(&mut self, now: Instant) {
        self.engine.host_mut().crowded = self.busy_until.is_some_and(|until| now < until);
        let mut frames = 0;
        while frames < FRAMES_PER_READ {
            // An error is "nothing there", or a device whose namespace is gone, about which nothing can be done.
            let host = self.engine.host_mut();
            let Ok(length) = rustix::io::read(&host.tun, &mut self.frame[..]) else {
                break;
            };
            frames += 1;
            let frame = &mut self.frame[..length];
            if let Some(layer2) = &mut host.layer2 {
                // An answer that finds no room is asked for again.
                let tun = &host.tun;
                let packet = layer2.receive(frame, |answer| _ = rustix::io::write(tun, answer));
                if let Some(packet) = packet {
                    self.engine.packet(packet, now);
                }
            } else {
                self.engine.packet(frame, now);
            }
        }
        self.engine.flush(now);
        let few = frames <= FEW;
        self.expects_until = few.then_some(now + SOON);
        self.busy_until = if few { self.busy_until } else { Some(now + BUSY) };
    }
}

fn ready(readiness: Readiness) -> Ready {
    Ready {
        readable: readiness.is_readable(),
        writable: readiness.is_writable(),
        error: readiness.is_error(),
        more: readiness.is_read_closed() || readiness.is_urgent(),
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
            FLOW => self.engine.ready(token.key(), ready(readiness), cx.now),
            PORT => {
                self.engine.port_ready(token.key(), ready(readiness), cx.now);
                // The guest, or the client, will have something to say next.
                self.expects_until = Some(cx.now + SOON);
            }
            _ => {}
        }
    }

    fn message(&mut self, cx: &mut Context<'_>, message: Message) {
        match message {
            Message::Policy(policy) => self.engine.set_policy(*policy),
            Message::Publish(publish) => self.publish(*publish),
            Message::Unpublish(id, done) => {
                self.engine.unpublish(id);
                let _ = done.send(());
            }
            Message::Stop => {
                self.engine.shutdown();
                cx.stop();
            }
        }
    }

    fn timer(&mut self, cx: &mut Context<'_>, _token: Token) {
        self.timer = None;
        self.engine.handle_timeout(cx.now);
        self.advertise(cx.now);
    }

    fn turn(&mut self, cx: &mut Context<'_>) -> bool {
        let more = self.engine.turn(cx.now);
        let next = self.engine.poll_timeout().into_iter().chain(self.advertise).min();
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
