//! One connection: what arrives from the guest, and what becomes of it (RFC 9293 section 3.10.7).

use super::queue::{OutOfOrder, Pending};
use super::seq::{before, later, up_to};
use super::{Io, MAX_SCALE, Params};
use crate::host::{Host, Ready};
use crate::metrics::{DropReason, ForwardStats};
use crate::wire::tcp::{Options, Segment, flags};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tidegate_reactor::Key;

/// How long a timestamp of the guest is held against it (RFC 7323 section 5.5).
const PAWS_IDLE: Duration = Duration::from_secs(24 * 24 * 3600);

/// How long a busy engine lets a far end wait for the last segment of the handshake, for the
/// guest's first bytes to carry it: most have something to say at once. It spares a segment, and
/// one of the far end's two wake-ups.
const HANDSHAKE_ACK_DELAY: Duration = Duration::from_millis(1);

/// What a guest takes at least that does not say: RFC 9293 section 3.7.1.
const DEFAULT_MSS: [u16; 2] = [536, 1220];

/// No write is smaller than this for a guest's odd ideas of its MSS (the kernel's `TCP_MIN_MSS`).
const MIN_MSS: u16 = 88;

/// Where a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// The host's socket is connecting.
    Dialling,
    /// A client is there, and the guest is asked to accept it.
    Calling,
    /// It is connected.
    Open,
    /// All is done; the guest's FIN may come again.
    Lingering,
}

/// What became of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It goes on.
    Alive,
    /// It is over, and both ends know.
    Done,
    /// It was cut, and both ends know.
    Reset,
    /// The guest begins a new one under the same five-tuple.
    Replaced,
    /// It goes on; but the segment was none of its own, and is to be answered as one of no
    /// connection.
    Stray,
}

/// What a connection begins with.
#[derive(Clone, Copy, Debug)]
pub struct Opening {
    /// The guest's end.
    pub inside: SocketAddr,
    /// The far end, as the guest addresses it.
    pub outside: SocketAddr,
    /// Our initial sequence number.
    pub iss: u32,
    /// What our timestamps are offset by.
    pub clock_offset: u32,
}

/// The guest's timestamps.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stamps {
    /// The one to echo (`TS.Recent`).
    pub(super) recent: u32,
    pub(super) since: Instant,
    pub(super) offset: u32,
}

/// A connection, and the socket `S` that it goes on with.
#[derive(Debug)]
pub struct Connection<S> {
    pub(super) opening: Opening,
    pub(super) phase: Phase,
    pub(super) stream: Option<S>,

    // Guest to host.
    pub(super) irs: u32,
    pub(super) rcv_nxt: u32,
    /// The right edge of the window that the guest was told of.
    pub(super) rcv_edge: u32,
    pub(super) pending: Pending,
    pub(super) early: OutOfOrder,
    /// The number of the guest's FIN, when it is known.
    pub(super) guest_fin: Option<u32>,
    pub(super) host_shut: bool,

    // Host to guest; see the module.
    pub(super) queue_base: u32,
    pub(super) snd_una: u32,
    pub(super) snd_nxt: u32,
    pub(super) snd_max: u32,
    pub(super) snd_wnd: u32,
    pub(super) wl1: u32,
    pub(super) wl2: u32,
    pub(super) guest_scale: Option<u8>,
    pub(super) mss: u16,
    pub(super) stamps: Option<Stamps>,
    pub(super) dup_acks: u8,
    /// Until this is acknowledged, duplicates say nothing new.
    pub(super) recover: Option<u32>,
    /// The number of our FIN, when the far end has closed.
    pub(super) fin: Option<u32>,
    /// The guest's FIN came after ours.
    pub(super) closed_first: bool,

    pub(super) readable: bool,
    /// A short look does not mean that the queue is empty.
    pub(super) may_hide: bool,
    pub(super) writable: bool,
    pub(super) need_ack: bool,
    /// Up to where the guest has been told that all has come.
    pub(super) acknowledged: u32,
    /// Since when the acknowledgement that is owed waits for something that carries it.
    pub(super) owed_since: Option<Instant>,
    /// Whether the engine has it in its queue.
    pub queued: bool,

    /// Timeouts in a row that nothing came of.
    pub(super) retries: u8,
    /// Probes of a window that is still closed.
    pub(super) probes: u8,
    pub(super) resend_at: Option<Instant>,
    pub(super) probe_at: Option<Instant>,
    /// When the far end hears that it is connected, if the guest has said nothing until then.
    pub(super) handshake_ack_at: Option<Instant>,
    pub(super) active: Instant,
    /// When its timer is armed for, if it is; the engine's.
    pub timer: Option<Instant>,
    /// What it is known by, once it is.
    pub(crate) key: Option<Key>,
    pub(super) challenged: Option<Instant>,
    /// Of one that came in by a published port.
    pub(crate) inbound: Option<Inbound>,
}

/// Where a client's connection came in.
#[derive(Debug)]
pub(crate) struct Inbound {
    /// The figures of the port.
    pub(crate) stats: Arc<ForwardStats>,
    /// The client, by its share ([`share_of`](tidegate_model::share_of)).
    pub(crate) client: IpAddr,
}

impl Inbound {
    /// The figures of the port, if the connection came in by one.
    pub(super) fn stats_of(inbound: Option<&Self>) -> Option<&ForwardStats> {
        inbound.map(|inbound| &*inbound.stats)
    }
}

impl<S> Connection<S> {
    /// A connection for `syn`, with a socket that is connecting.
    pub fn new(
        opening: Opening,
        syn: &Segment<'_>,
        stream: S,
        params: &Params,
        now: Instant,
    ) -> Self {
        let mut connection = Self::begun(opening, Phase::Dialling, stream, now);
        connection.adopt_syn(syn, params, now);
        connection
    }

    /// A connection for a client, who is asked in with the first segment to the guest.
    pub fn call<H: Host<Stream = S>>(opening: Opening, stream: S, io: &mut Io<'_, H>) -> Self {
        let mut connection = Self::begun(opening, Phase::Calling, stream, io.now);
        connection.writable = true;
        connection.send_syn(io);
        connection
    }

    fn begun(opening: Opening, phase: Phase, stream: S, now: Instant) -> Self {
        let Opening { iss, .. } = opening;
        Self {
            opening,
            phase,
            stream: Some(stream),
            irs: 0,
            rcv_nxt: 0,
            acknowledged: 0,
            rcv_edge: 0,
            pending: Pending::default(),
            early: OutOfOrder::default(),
            guest_fin: None,
            host_shut: false,
            queue_base: iss.wrapping_add(1),
            snd_una: iss,
            snd_nxt: iss,
            snd_max: iss,
            snd_wnd: 0,
            wl1: 0,
            wl2: iss,
            guest_scale: None,
            mss: MIN_MSS,
            stamps: None,
            dup_acks: 0,
            recover: None,
            fin: None,
            closed_first: false,
            readable: false,
            may_hide: false,
            writable: false,
            need_ack: false,
            owed_since: None,
            queued: false,
            retries: 0,
            probes: 0,
            resend_at: None,
            probe_at: None,
            handshake_ack_at: None,
            active: now,
            timer: None,
            key: None,
            challenged: None,
            inbound: None,
        }
    }

    /// Takes over what the guest's SYN says: its number, and what it can do.
    fn adopt_syn(&mut self, syn: &Segment<'_>, params: &Params, now: Instant) {
        let v6 = self.opening.inside.is_ipv6();
        let headers = 20 + if v6 { 40 } else { 20 };
        self.stamps = syn.options.timestamps.map(|(recent, _)| Stamps {
            recent,
            since: now,
            offset: self.opening.clock_offset,
        });
        let offered = syn.options.mss.unwrap_or(DEFAULT_MSS[usize::from(v6)]).max(MIN_MSS);
        self.mss = offered.min(params.mtu.saturating_sub(headers)) - self.options_length();
        self.irs = syn.sequence;
        self.rcv_nxt = syn.sequence.wrapping_add(1);
        (self.rcv_edge, self.acknowledged) = (self.rcv_nxt, self.rcv_nxt);
        // The window of a SYN is never scaled (RFC 7323 section 2.2).
        self.snd_wnd = u32::from(syn.window);
        self.wl1 = syn.sequence;
        self.guest_scale = syn.options.scale.map(|scale| scale.min(MAX_SCALE));
    }

    /// Where it is.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// Its socket, for as long as it has one.
    pub fn stream(&self) -> Option<&S> {
        self.stream.as_ref()
    }

    /// Has its socket watched, under what the connection is known by from now on.
    ///
    /// # Errors
    /// The kernel watches no more sockets.
    pub fn watched_as<H: Host<Stream = S>>(&mut self, key: Key, host: &mut H) -> io::Result<Ready> {
        self.key = Some(key);
        self.stream.as_mut().map_or(Ok(Ready::default()), |stream| host.watch_stream(stream, key))
    }

    /// Takes the socket out, to be ended.
    pub fn take_stream(&mut self) -> Option<S> {
        self.stream.take()
    }

    /// Bytes that it has buffered.
    pub fn buffered(&self) -> usize {
        self.pending.len() + self.early.len()
    }

    /// Whether the guest has acknowledged our SYN.
    pub fn is_established(&self) -> bool {
        self.phase != Phase::Dialling && self.snd_una != self.opening.iss
    }

    /// The number of the guest's SYN.
    pub fn initial_sequence(&self) -> u32 {
        self.irs
    }

    /// Notes what the socket is ready for.
    pub fn note(&mut self, ready: Ready) {
        self.readable |= ready.readable || ready.error;
        self.may_hide |= ready.more || ready.error;
        self.writable |= ready.writable || ready.error;
    }

    /// The guest, or a router behind it, takes packets of `mtu` bytes at most (RFC 1191).
    pub fn reduce_mtu(&mut self, mtu: u32) {
        let headers = if self.opening.inside.is_ipv6() { 60 } else { 40 } + self.options_length();
        let mss = mtu.saturating_sub(headers.into()).min(u32::from(self.mss)) as u16;
        if (MIN_MSS..self.mss).contains(&mss) {
            self.mss = mss;
            self.go_back();
        }
    }

    /// The far end has accepted: so do we.
    pub fn connected<H: Host<Stream = S>>(&mut self, io: &mut Io<'_, H>) {
        self.phase = Phase::Open;
        self.writable = true;
        self.active = io.now;
        let quiet = self.stream.as_ref().is_some_and(|stream| io.host.is_quiet(stream));
        self.handshake_ack_at = quiet.then(|| io.now + HANDSHAKE_ACK_DELAY);
        self.send_syn_ack(io);
    }

    /// The far end hears that it is connected, in case that it is the one to speak first.
    pub(super) fn say_hello<H: Host<Stream = S>>(&mut self, io: &mut Io<'_, H>) {
        self.handshake_ack_at = None;
        if let Some(stream) = &mut self.stream {
            io.host.say_hello(stream);
        }
    }

    /// A segment of this connection has arrived.
    pub fn segment<H: Host<Stream = S>>(
        &mut self,
        segment: &Segment<'_>,
        io: &mut Io<'_, H>,
    ) -> Outcome {
        match self.phase {
            Phase::Dialling => self.while_dialling(segment),
            Phase::Calling => self.while_calling(segment, io),
            Phase::Open => self.while_open(segment, io),
            Phase::Lingering => self.while_lingering(segment, io),
        }
    }

    fn while_dialling(&mut self, segment: &Segment<'_>) -> Outcome {
        if segment.has(flags::RST) {
            // Without a SYN-ACK the guest has nothing else to number it with.
            return if segment.sequence == self.rcv_nxt { Outcome::Reset } else { Outcome::Alive };
        }
        let another =
            segment.has(flags::SYN) && !segment.has(flags::ACK) && segment.sequence != self.irs;
        if another { Outcome::Replaced } else { Outcome::Alive }
    }

    /// RFC 9293 section 3.10.7.3, in its order.
    fn while_calling<H: Host<Stream = S>>(
        &mut self,
        segment: &Segment<'_>,
        io: &mut Io<'_, H>,
    ) -> Outcome {
        let acknowledges = segment.has(flags::ACK);
        if acknowledges && segment.acknowledgement != self.snd_nxt {
            // Of an earlier connection of the same five-tuple, which a reset ends if the guest
            // still has it.
            return if segment.has(flags::RST) { Outcome::Alive } else { Outcome::Stray };
        }
        if segment.has(flags::RST) {
            return if acknowledges { Outcome::Reset } else { Outcome::Alive };
        }
        if !segment.has(flags::SYN) {
            io.stats.refuse(DropReason::Window);
            return Outcome::Alive;
        }
        self.adopt_syn(segment, io.params, io.now);
        self.phase = Phase::Open;
        self.active = io.now;
        self.retries = 0;
        if acknowledges {
            self.snd_una = self.snd_nxt;
            self.wl2 = self.snd_una;
            self.resend_at = None;
            self.need_ack = true;
        } else {
            // Both ends have called (section 3.5, figure 8).
            self.send_syn_ack(io);
        }
        Outcome::Alive
    }

    fn while_lingering<H: Host<Stream = S>>(
        &mut self,
        segment: &Segment<'_>,
        io: &mut Io<'_, H>,
    ) -> Outcome {
        if segment.has(flags::RST) {
            return if segment.sequence == self.rcv_nxt { Outcome::Done } else { Outcome::Alive };
        }
        // RFC 6191 section 2: a new incarnation is recognized by its number, or by its clock.
        let newer = match (self.stamps, segment.options.timestamps) {
            (Some(stamps), Some((value, _))) => before(stamps.recent, value),
            _ => false,
        };
        if segment.has(flags::SYN) && (newer || before(self.rcv_nxt, segment.sequence)) {
            return Outcome::Replaced;
        }
        if segment.length() > 0 {
            self.send_ack(io);
        }
        Outcome::Alive
    }

    fn while_open<H: Host<Stream = S>>(
        &mut self,
        segment: &Segment<'_>,
        io: &mut Io<'_, H>,
    ) -> Outcome {
        let window = self.rcv_edge.wrapping_sub(self.rcv_nxt);
        if segment.has(flags::RST) {
            // RFC 5961 section 3.2: exactly the next number, or we ask again.
            if segment.sequence == self.rcv_nxt {
                return Outcome::Reset;
            }
            if segment.sequence.wrapping_sub(self.rcv_nxt) < window.max(1) {
                self.challenge(io);
            } else {
                io.stats.refuse(DropReason::Window);
            }
            return Outcome::Alive;
        }
        if segment.has(flags::SYN) {
            let again = segment.sequence == self.irs && !self.is_established();
            if again && segment.has(flags::ACK) && segment.acknowledgement == self.snd_nxt {
                // Both ends have called, and the guest has heard of it: as good as its
                // acknowledgement.
                self.acknowledge(segment, io);
                self.need_ack = true;
            } else if again && !segment.has(flags::ACK) {
                self.send_syn_ack(io);
            } else {
                // RFC 5961 section 4.2.
                self.challenge(io);
            }
            return Outcome::Alive;
        }
        if !self.check_stamps(segment, io) {
            return Outcome::Alive;
        }
        let end = segment.sequence.wrapping_add(segment.length());
        // A segment at the closed window's edge: its acknowledgement counts, its payload does not
        // (RFC 9293 section 3.10.7.4).
        let acceptable = up_to(segment.sequence, self.rcv_edge)
            && if segment.length() == 0 {
                up_to(self.rcv_nxt, segment.sequence)
            } else {
                before(self.rcv_nxt, end)
            };
        if !acceptable {
            self.say_where(segment, io);
            return Outcome::Alive;
        }
        if !segment.has(flags::ACK) || !self.acknowledge(segment, io) {
            return Outcome::Alive;
        }
        if up_to(segment.sequence, self.rcv_nxt)
            && let (Some(stamps), Some((value, _))) = (&mut self.stamps, segment.options.timestamps)
        {
            // RFC 7323 section 4.3.
            *stamps = Stamps { recent: value, since: io.now, ..*stamps };
        }
        self.active = io.now;
        if segment.length() > 0 && self.take(segment, io).is_err() {
            self.send_reset(io);
            return Outcome::Reset;
        }
        Outcome::Alive
    }

    /// RFC 7323 sections 3.2 and 5.3: whether the segment's timestamp lets it be looked at.
    fn check_stamps<H: Host<Stream = S>>(
        &mut self,
        segment: &Segment<'_>,
        io: &mut Io<'_, H>,
    ) -> bool {
        let Some(stamps) = self.stamps else { return true };
        let sound = match segment.options {
            Options { timestamps: Some((value, _)), .. } => {
                !before(value, stamps.recent)
                    || io.now.saturating_duration_since(stamps.since) > PAWS_IDLE
            }
            Options { timestamps: None, .. } => {
                io.stats.refuse(DropReason::Window);
                return false;
            }
        };
        if !sound {
            self.say_where(segment, io);
        }
        sound
    }

    /// Acknowledges a segment that is not taken. Without payload it may itself be such an
    /// acknowledgement, and two ends that are not at one would go on for ever (the kernel's
    /// `tcp_oow_rate_limited`).
    fn say_where<H: Host<Stream = S>>(&mut self, segment: &Segment<'_>, io: &mut Io<'_, H>) {
        if segment.length() == 0 {
            return self.challenge(io);
        }
        io.stats.refuse(DropReason::Window);
        self.need_ack = true;
    }

    /// Takes note of acknowledgement and window. False if the segment is not to be looked at
    /// further.
    fn acknowledge<H: Host<Stream = S>>(
        &mut self,
        segment: &Segment<'_>,
        io: &mut Io<'_, H>,
    ) -> bool {
        let ack = segment.acknowledgement;
        // RFC 5961 section 5.2: not of what was never sent, nor older than any window can have
        // been.
        let oldest = self.snd_una.wrapping_sub(1 << 30);
        if before(self.snd_max, ack) || before(ack, oldest) {
            self.challenge(io);
            return false;
        }
        let first = !self.is_established();
        if first && ack == self.snd_una {
            // Still without our SYN: nothing that it says counts yet.
            return false;
        }
        if self.probe_at.is_some() {
            // It lives, and will go on being asked.
            self.retries = 0;
        }
        let window = match self.guest_scale {
            Some(scale) if !segment.has(flags::SYN) => u32::from(segment.window) << scale,
            _ => segment.window.into(),
        };
        let fresh = before(self.wl1, segment.sequence)
            || self.wl1 == segment.sequence && up_to(self.wl2, ack)
            || first;
        let same_window = window == self.snd_wnd;
        if fresh {
            (self.snd_wnd, self.wl1, self.wl2) = (window, segment.sequence, ack);
        }
        if before(self.snd_una, ack) {
            self.snd_una = ack;
            self.snd_nxt = later(self.snd_nxt, ack);
            self.dup_acks = 0;
            self.retries = 0;
            if self.recover.is_some_and(|recover| up_to(recover, ack)) {
                self.recover = None;
            }
            self.resend_at = None;
            if self.snd_nxt != ack {
                self.arm_resend(io.now);
            }
        } else if ack == self.snd_una
            && segment.length() == 0
            && same_window
            && self.snd_nxt != self.snd_una
            && self.recover.is_none()
        {
            // RFC 5681 section 2, "duplicate acknowledgment".
            self.dup_acks += 1;
            if self.dup_acks == 3 {
                io.stats.retransmissions.add(1);
                self.go_back();
            }
        }
        true
    }

    /// Begins again with what is not acknowledged.
    pub(super) fn go_back(&mut self) {
        if !self.is_established() {
            return;
        }
        self.dup_acks = 0;
        self.recover = Some(self.snd_max);
        self.snd_nxt = self.snd_una;
        self.resend_at = None;
        self.readable = true;
    }

    /// Whether everything that the guest will ever send has come.
    pub(super) fn guest_is_done(&self) -> bool {
        self.guest_fin.is_some_and(|fin| before(fin, self.rcv_nxt))
    }

    /// All that was to be sent is sent and acknowledged, both ways.
    pub(super) fn finish(&mut self, io_now: Instant) -> Outcome {
        let ours = self.fin.is_some_and(|fin| before(fin, self.snd_una));
        if !(ours && self.host_shut && self.guest_is_done()) {
            return Outcome::Alive;
        }
        if !self.closed_first {
            return Outcome::Done;
        }
        self.stream = None;
        self.phase = Phase::Lingering;
        self.active = io_now;
        (self.resend_at, self.probe_at) = (None, None);
        Outcome::Alive
    }
}
