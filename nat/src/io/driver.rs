//! Driver: passes frames and socket events to the engine, and runs its timer.
//!
//! Frames are read as fast as possible, because the device queue is FIFO and would otherwise
//! determine which endpoint is served. [`Engine::classify`] drops floods when they are read, and a
//! [`FairQueue`] holds the other packets.

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

/// Maximum number of frames per read of the device. A flood sends fewer while these are read.
const FRAMES_PER_READ: usize = 256;

/// Maximum time for serving packets before sockets are served. Acknowledgements are sent after
/// that.
const SERVE: Duration = Duration::from_micros(250);

/// Number of packets served between two reads of the device.
const SERVED_BETWEEN_READS: usize = 16;

/// Frames up to this size in bytes are copied out of the read buffer; larger ones keep the buffer.
const COPIED: usize = 4096;

/// Maximum bytes of large frames to process directly while the queue is empty: one TCP window,
/// about 250 microseconds. Reading more before processing would evict all of them from the CPU
/// cache.
const DIRECT: usize = 1 << 20;

/// Number of dropped frames per read that indicates a flood.
const FLOOD: usize = 32;

/// Niceness of the thread during a flood, and the time for which it is kept afterwards.
///
/// Forwarding in the kernel has priority over every process. A thread that shares its CPU does not,
/// so the device queue of 4,096 packets overflows and drops packets of every endpoint. At other
/// times the niceness is unchanged, because bulk transfers are faster if the sender fills the queue
/// first (by a quarter on two cores).
const FLOOD_NICENESS: i32 = -10;
const AFTER_FLOOD: Duration = Duration::from_secs(1);

/// Maximum number of spare read buffers.
const SPARE_BUFFERS: usize = 16;

/// A read of at most this number of frames is a request rather than a stream, and no other endpoint
/// needs service.
const MAX_REQUEST_FRAMES: usize = 1;

/// Time to busy-poll for the reply to a request. A sleep and a wake-up take as long as an exchange
/// on the same host.
const POLL_TIME: Duration = Duration::from_micros(50);

/// Time for which an endpoint counts as busy after consecutive packets.
const BUSY_TIME: Duration = Duration::from_millis(1);

/// Tags of tokens in addition to [`FLOW`].
const DEVICE: u8 = 1;
const TIMER: u8 = 2;

/// Message to the loop.
#[derive(Debug)]
pub(crate) enum Message {
    /// Sets the policy for new flows.
    Policy(Box<Policy>),
    /// Replaces the TUN device; replies once the previous one is closed. A descriptor without a
    /// device replaces one whose link was deleted.
    Device(OwnedFd, mpsc::Sender<io::Result<()>>),
    Publish(Box<Publish>),
    /// Closes a port; replies once it is closed.
    Unpublish(ForwardId, mpsc::Sender<()>),
    /// Ends the flows of containers with these addresses; replies once they have ended.
    EndFlows(Vec<IpAddr>, mpsc::Sender<()>),
    Stop,
}

/// A port to publish.
#[derive(Debug)]
pub(crate) struct Publish {
    pub(crate) id: ForwardId,
    pub(crate) forward: Forward,
    /// The bound socket.
    pub(crate) socket: OwnedFd,
    pub(crate) guard: Option<Arc<dyn Guard>>,
    pub(crate) stats: Arc<ForwardStats>,
    /// Receives the result.
    pub(crate) done: mpsc::Sender<io::Result<()>>,
}

/// A queued frame without Ethernet header.
struct Frame {
    class: Class,
    bytes: FrameBytes,
}

enum FrameBytes {
    /// A copy of a small frame.
    Copied(Box<[u8]>),
    /// A read buffer and the range of the frame in it.
    InBuffer(Vec<u8>, Range<usize>),
}

/// Event handler of the loop; see the module.
pub(crate) struct Driver {
    engine: Engine<Kernel>,
    /// Queued packets.
    queue: FairQueue<Frame>,
    /// Spare read buffers. The most recently used one is next, because it is in the CPU cache.
    buffers: Vec<Vec<u8>>,
    timer: Option<Instant>,
    /// Time of the next router advertisement.
    advertise: Option<Instant>,
    /// Time until which to busy-poll for a reply to a request of the guest.
    expects_until: Option<Instant>,
    /// End of the current flood, and the niceness to restore.
    flood_until: Option<Instant>,
    niceness: i32,
    /// Bytes of large frames that may still bypass the queue in this turn.
    direct: usize,
    /// Endpoint of the latest packet of this read.
    latest: Option<IpAddr>,
    /// Endpoint that sends several packets in a row, and the time until which it counts as busy. A
    /// flood of another endpoint does not cause delayed ACKs.
    busy: Option<(IpAddr, Instant)>,
    /// Key of the device. Each device has its own key, so a late event of the previous device in
    /// the same turn is not attributed to the new one.
    device: Key,
    devices: Arena<()>,
    /// Key of the timer.
    key: Key,
}

impl Driver {
    /// Starts to watch the device.
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

    /// Replaces the device. Flows continue: their endpoints retransmit lost packets.
    fn set_device(&mut self, tun: OwnedFd, epoll: &Epoll) -> io::Result<()> {
        let device = self.devices.insert(());
        epoll.add(&tun, Token::new(DEVICE, device), Interest::Readable)?;
        let old = std::mem::replace(&mut self.engine.host_mut().tun, tun);
        // It is no longer watched if its link was deleted.
        let _ = epoll.remove(&old);
        self.devices.remove(std::mem::replace(&mut self.device, device));
        Ok(())
    }

    /// Sends a router advertisement if it is due.
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
        // The caller waits for the result.
        let _ = done.send(published);
    }

    /// Reads frames from the device and queues them by endpoint. Returns true if more may be
    /// available.
    fn read(&mut self, now: Instant) -> bool {
        // Dropped frames do not count as requests.
        let (mut frames, mut queued) = (0, 0);
        self.latest = None;
        while frames < FRAMES_PER_READ {
            let mut buffer =
                self.buffers.pop().unwrap_or_else(|| vec![0; layer2::HEAD + MAX_PACKET]);
            // The error is `EAGAIN`, or the link of the device was deleted and the owner must
            // replace the device.
            let host = self.engine.host_mut();
            let Ok(length) = rustix::io::read(&host.tun, &mut buffer[..]) else {
                self.keep(buffer);
                break;
            };
            frames += 1;
            let mut packet = 0..length;
            if let Some(layer2) = &mut host.layer2 {
                // If the reply does not fit the device queue, the guest requests it again.
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
            self.expects_until = (queued <= MAX_REQUEST_FRAMES).then_some(now + POLL_TIME);
        }
        if frames - queued >= FLOOD {
            self.note_flood(now);
        }
        frames == FRAMES_PER_READ
    }

    /// Raises the priority of the thread, if permitted (CAP_SYS_NICE).
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

    /// Queues a frame. Returns false if it is dropped.
    fn enqueue(&mut self, buffer: Vec<u8>, packet: Range<usize>, now: Instant) -> bool {
        let Some((class, parsed)) = self.engine.classify(&buffer[packet.clone()], now) else {
            self.keep(buffer);
            return false;
        };
        if self.latest == Some(class.endpoint) {
            self.busy = Some((class.endpoint, now + BUSY_TIME));
        }
        self.latest = Some(class.endpoint);
        // With a single guest nothing is queued: the device queue drops the excess unread.
        let may_be_direct =
            self.engine.has_one_guest() || packet.len() > COPIED && packet.len() <= self.direct;
        if self.queue.is_empty() && may_be_direct {
            // No other packet is queued, so the frame is processed directly, and the cached buffer
            // is reused for the next frame.
            self.direct = self.direct.saturating_sub(packet.len());
            self.update_ack_delay(&class, now);
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

    /// Serves queued packets for a limited time.
    fn serve(&mut self, now: Instant) {
        let until = now + SERVE;
        let mut served = 0;
        while let Some(frame) = self.queue.pop() {
            let bytes = match &frame.bytes {
                FrameBytes::Copied(bytes) => bytes,
                FrameBytes::InBuffer(buffer, packet) => &buffer[packet.clone()],
            };
            self.update_ack_delay(&frame.class, now);
            self.engine.packet(bytes, &frame.class, now);
            self.reuse(frame);
            served += 1;
            if served % SERVED_BETWEEN_READS == 0 {
                let later = Instant::now();
                if later >= until {
                    break;
                }
                // This finds packets of sparse endpoints before the rest of the backlog.
                self.read(later);
            }
        }
        self.engine.flush(now);
        self.engine.note_queue(self.queue.bytes());
    }

    fn update_ack_delay(&mut self, class: &Class, now: Instant) {
        let busy = |(endpoint, until)| endpoint == class.endpoint && now < until;
        self.engine.host_mut().delay_handshake_acks = self.busy.is_some_and(busy);
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
                // The link was deleted, or its namespace has ended. The level-triggered event would
                // repeat forever.
                let _ = cx.epoll.remove(&self.engine.host_mut().tun);
            }
            DEVICE => _ = self.read(cx.now),
            FLOW => self.engine.ready(token.key(), ready(readiness), cx.now),
            PORT => {
                self.engine.port_ready(token.key(), ready(readiness), cx.now);
                // The guest or the client is expected to reply soon.
                self.expects_until = Some(cx.now + POLL_TIME);
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
            Message::EndFlows(addresses, done) => {
                self.engine.end_flows_of(&addresses);
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
