//! The loop that carries frames to the engine and events of sockets, and keeps its timer.
//!
//! Frames are read as fast as possible, so that not the device's own queue decides who is served,
//! which is first in, first out: [`Engine::classify`] drops floods there and then, and what is left
//! waits in a [`FairQueue`].

use super::sockets::{FLOW, Kernel, PORT};
use crate::engine::Engine;
use crate::engine::classify::Class;
use crate::fair_queue::{FairQueue, QueueLimits};
use crate::forward::{Forward, ForwardId, Guard};
use crate::host::Ready;
use crate::layer2::{self, ADVERTISEMENTS};
use crate::metrics::ForwardStats;
use crate::policy::Policy;
use crate::wire::head::MAX_PACKET;
use rustix::process::{getpriority_process, setpriority_process};
use std::io;
use std::net::IpAddr;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};
use tidegate_reactor::{Arena, Context, Epoll, Handler, Interest, Key, Readiness, Token};

/// Frames read off the device before packets are served. What a flood sends meanwhile is less.
const FRAMES_PER_READ: usize = 256;

/// How long packets are served before sockets have their turn. Acknowledgements leave after that.
const SERVE: Duration = Duration::from_micros(250);

/// Packets served between two reads of the device.
const SERVED_BETWEEN_READS: usize = 16;

/// Frames of this size are copied out of the buffer that they were read into; larger ones take the
/// buffer with them.
const COPIED: usize = 4096;

/// Bytes of large frames that are dealt with as they are read while the queue is empty: a window of
/// TCP, some 250 microseconds. To read more before the first is dealt with would drive all of them
/// out of the cache.
const DIRECT: usize = 1 << 20;

/// Frames of one read that are dropped make it a flood.
const FLOOD: usize = 32;

/// The niceness of the thread during a flood, and for how long after it.
///
/// A kernel that forwards does so ahead of every program. A thread that shares its core with others
/// does not, and the device's queue, which holds 4,096 packets, overflows with those of every
/// endpoint. At other times the niceness stays as it is: bulk transfers are faster where the sender
/// fills the queue first (by a quarter, on two cores).
const FLOOD_NICENESS: i32 = -10;
const AFTER_FLOOD: Duration = Duration::from_secs(1);

/// Buffers kept for frames to come.
const SPARE_BUFFERS: usize = 16;

/// A read that brings no more than that is a question rather than a stream, and there is nobody
/// else to be served.
const FEW: usize = 1;

/// How long the answer to it is looked for, instead of falling asleep and being woken, which takes
/// as long as an exchange does on one host.
const SOON: Duration = Duration::from_micros(50);

/// For how long packets in a row show that an endpoint has more to be served.
const BUSY: Duration = Duration::from_millis(1);

/// Tags of tokens, beside [`FLOW`].
const DEVICE: u8 = 1;
const TIMER: u8 = 2;

/// What the loop is told.
#[derive(Debug)]
pub(crate) enum Message {
    /// From now on this holds, for new flows.
    Policy(Box<Policy>),
    /// The TUN device from now on, and who hears that the one before is closed. One that is
    /// attached to no device takes the place of one whose link has gone.
    Device(OwnedFd, mpsc::Sender<io::Result<()>>),
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

/// A frame that waits, without Ethernet's header.
struct Frame {
    class: Class,
    bytes: FrameBytes,
}

enum FrameBytes {
    /// Of a small frame.
    Copied(Box<[u8]>),
    /// The part of a buffer that holds it.
    InBuffer(Vec<u8>, Range<usize>),
}

/// See the module.
pub(crate) struct Driver {
    engine: Engine<Kernel>,
    /// Packets that wait for their turn.
    queue: FairQueue<Frame>,
    /// Buffers that frames are read into; the one used last is used next, while it is in the cache.
    buffers: Vec<Vec<u8>>,
    timer: Option<Instant>,
    /// When the router of an Ethernet is to tell of itself.
    advertise: Option<Instant>,
    /// An answer to what the guest has just asked may come soon.
    expects_until: Option<Instant>,
    /// When the flood at hand will be over, and the niceness to return to.
    flood_until: Option<Instant>,
    niceness: i32,
    /// Bytes of large frames that need not be queued before the next turn ends.
    direct: usize,
    /// The endpoint of the latest packet of this read.
    latest: Option<IpAddr>,
    /// The endpoint that sends several packets in a row, and until when it is taken to. A flood of
    /// another one is no reason to put anything off.
    busy: Option<(IpAddr, Instant)>,
    /// Names the device. Another device has another key, so that an event of the one before it,
    /// which was reported in the same turn, is not taken for one of its own.
    device: Key,
    devices: Arena<()>,
    /// Names the one timer.
    key: Key,
}

impl Driver {
    /// Begins to watch the device.
    pub(crate) fn new(
        mut engine: Engine<Kernel>,
        limits: QueueLimits,
        epoll: &Epoll,
    ) -> io::Result<Self> {
        let key = Arena::new().insert(());
        let mut devices = Arena::new();
        let device = devices.insert(());
        epoll.add(&engine.host_mut().tun, Token::new(DEVICE, device), Interest::Readable)?;
        let advertises =
            engine.host_mut().layer2.as_ref().is_some_and(|of| of.advertisement().is_some());
        Ok(Self {
            engine,
            queue: FairQueue::new(limits),
            buffers: Vec::new(),
            timer: None,
            advertise: advertises.then(Instant::now),
            expects_until: None,
            flood_until: None,
            niceness: 0,
            direct: DIRECT,
            latest: None,
            busy: None,
            device,
            devices,
            key,
        })
    }

    /// Uses `tun` in the place of the device at hand. Flows stay: their endpoints send again what
    /// was lost.
    fn set_device(&mut self, tun: OwnedFd, epoll: &Epoll) -> io::Result<()> {
        let device = self.devices.insert(());
        epoll.add(&tun, Token::new(DEVICE, device), Interest::Readable)?;
        let old = std::mem::replace(&mut self.engine.host_mut().tun, tun);
        // It is not watched any more if its link has gone.
        let _ = epoll.remove(&old);
        self.devices.remove(std::mem::replace(&mut self.device, device));
        Ok(())
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
        let published =
            opened.and_then(|port| self.engine.publish(id, forward, port, guard, stats));
        // Who has asked waits for it.
        let _ = done.send(published);
    }

    /// Moves the frames that wait in the device, whose queue is first in, first out, to their
    /// endpoints' queues. True if there were more than can be read at once.
    fn read(&mut self, now: Instant) -> bool {
        // What is dropped says nothing about those who are served.
        let (mut frames, mut queued) = (0, 0);
        self.latest = None;
        while frames < FRAMES_PER_READ {
            let mut buffer =
                self.buffers.pop().unwrap_or_else(|| vec![0; layer2::HEAD + MAX_PACKET]);
            // An error is "nothing there", or a device whose link is gone, which is for the owner
            // to replace.
            let host = self.engine.host_mut();
            let Ok(length) = rustix::io::read(&host.tun, &mut buffer[..]) else {
                self.keep(buffer);
                break;
            };
            frames += 1;
            let mut packet = 0..length;
            if let Some(layer2) = &mut host.layer2 {
                // An answer that finds no room is asked for again.
                let tun = &host.tun;
                let answer = |answer: &[u8]| _ = rustix::io::write(tun, answer);
                match layer2.receive(&mut buffer[..length], answer).map(<[u8]>::len) {
                    Some(stripped) => packet.start = length - stripped,
                    None => {
                        self.keep(buffer);
                        continue;
                    }
                }
            }
            queued += usize::from(self.enqueue(buffer, packet, now));
        }
        if queued > 0 {
            self.expects_until = (queued <= FEW).then_some(now + SOON);
        }
        if frames - queued >= FLOOD {
            self.note_flood(now);
        }
        frames == FRAMES_PER_READ
    }

    /// Raises the thread's priority where it may, which takes CAP_SYS_NICE.
    fn note_flood(&mut self, now: Instant) {
        if self.flood_until.replace(now + AFTER_FLOOD).is_none()
            && let Ok(niceness) = getpriority_process(None)
        {
            self.niceness = niceness;
            let _ = setpriority_process(None, niceness.min(FLOOD_NICENESS));
        }
    }

    fn note_end_of_flood(&mut self, now: Instant) {
        if self.flood_until.is_some_and(|until| until <= now) {
            self.flood_until = None;
            let _ = setpriority_process(None, self.niceness);
        }
    }

    /// Puts a frame into its endpoint's queue. False if it is dropped.
    fn enqueue(&mut self, buffer: Vec<u8>, packet: Range<usize>, now: Instant) -> bool {
        let Some((class, parsed)) = self.engine.classify(&buffer[packet.clone()], now) else {
            self.keep(buffer);
            return false;
        };
        if self.latest == Some(class.endpoint) {
            self.busy = Some((class.endpoint, now + BUSY));
        }
        self.latest = Some(class.endpoint);
        // Of one guest nothing is queued: what is too much the device's own queue drops, unread.
        let may_be_direct =
            self.engine.has_one_guest() || packet.len() > COPIED && packet.len() <= self.direct;
        if self.queue.is_empty() && may_be_direct {
            // Nobody else waits, as far as has been read: the buffer that is in the cache serves
            // the next frame too.
            self.direct = self.direct.saturating_sub(packet.len());
            self.set_crowded(&class, now);
            self.engine.serve(&parsed, &class, now);
            self.keep(buffer);
            return true;
        }
        let (bytes, frame) = if packet.len() <= COPIED {
            let copied = FrameBytes::Copied(buffer[packet.clone()].into());
            self.keep(buffer);
            (packet.len(), copied)
        } else {
            (buffer.len(), FrameBytes::InBuffer(buffer, packet))
        };
        let frame = Frame { class, bytes: frame };
        self.queue.push(class.network, class.endpoint, class.cost, bytes, frame);
        while let Some((_, frame)) = self.queue.drop_excess() {
            self.engine.note_queue_drop(&frame.class, now);
            self.reuse(frame);
        }
        true
    }

    /// Has the engine deal with the packets whose turn it is, for a while.
    fn serve(&mut self, now: Instant) {
        let until = now + SERVE;
        let mut served = 0;
        while let Some(frame) = self.queue.pop() {
            let bytes = match &frame.bytes {
                FrameBytes::Copied(bytes) => bytes,
                FrameBytes::InBuffer(buffer, packet) => &buffer[packet.clone()],
            };
            self.set_crowded(&frame.class, now);
            self.engine.packet(bytes, &frame.class, now);
            self.reuse(frame);
            served += 1;
            if served % SERVED_BETWEEN_READS == 0 {
                let later = Instant::now();
                if later >= until {
                    break;
                }
                // Whoever asks now and then is found before what is left of the backlog.
                self.read(later);
            }
        }
        self.engine.flush(now);
        self.engine.note_queue(self.queue.bytes());
    }

    fn set_crowded(&mut self, class: &Class, now: Instant) {
        let busy = |(endpoint, until)| endpoint == class.endpoint && now < until;
        self.engine.host_mut().crowded = self.busy.is_some_and(busy);
    }

    fn reuse(&mut self, frame: Frame) {
        if let FrameBytes::InBuffer(buffer, _) = frame.bytes {
            self.keep(buffer);
        }
    }

    fn keep(&mut self, buffer: Vec<u8>) {
        if self.buffers.len() < SPARE_BUFFERS {
            self.buffers.push(buffer);
        }
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
            DEVICE if token.key() != self.device => {}
            DEVICE if readiness.is_error() => {
                // Its link was deleted, or the namespace has ended. Level-triggered, it would be
                // reported for ever.
                let _ = cx.epoll.remove(&self.engine.host_mut().tun);
            }
            DEVICE => _ = self.read(cx.now),
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
            Message::Device(tun, done) => _ = done.send(self.set_device(tun, cx.epoll)),
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
        self.serve(cx.now);
        self.direct = DIRECT;
        self.note_end_of_flood(cx.now);
        let more = self.engine.turn(cx.now) || !self.queue.is_empty();
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
