//! Connection state and processing of segments from the guest (RFC 9293 section 3.10.7).

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use super::memory::Memory;
use super::queue::{OutOfOrder, Pending};
use super::seq::{before, later, up_to};
use super::{Io, MAX_SCALE, Params};
use crate::host::{Host, Ready, ReceiveBuffer};
use crate::metrics::{DropReason, ForwardStats};
use crate::wire::tcp::{Segment, TcpOptions, flags};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tidegate_reactor::Key;

/// Maximum age of a timestamp for PAWS (RFC 7323 section 5.5).
const PAWS_IDLE: Duration = Duration::from_secs(24 * 24 * 3600);

/// Delay of the final handshake ACK towards the server on a busy engine, so that the first payload
/// of the guest carries it. Most clients send immediately. This saves a segment and one of two
/// wake-ups of the server.
const HANDSHAKE_ACK_DELAY: Duration = Duration::from_millis(1);

/// Default MSS without the option, for IPv4 and IPv6 (RFC 9293 section 3.7.1).
const DEFAULT_MSS: [u16; 2] = [536, 1220];

/// Minimum MSS, whatever the guest announces (`TCP_MIN_MSS` of the kernel).
const MIN_MSS: u16 = 88;

/// State of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// The host socket is connecting.
    Connecting,
    /// A client is connected, and a SYN was sent to the guest.
    SynSent,
    /// Both sides are connected, or the handshake with the guest is in progress.
    Open,
    /// Both directions are closed. The FIN of the guest may be retransmitted.
    Lingering,
}

/// Result of an operation on a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The connection continues.
    Alive,
    /// The connection has ended normally on both sides.
    Done,
    /// The connection was reset on the guest side; the host side is to be reset.
    Reset,
    /// The guest opens a new connection with the same five-tuple.
    Replaced,
    /// The connection continues. The segment does not belong to it, and must be answered like a
    /// segment without a connection.
    Stray,
}

/// Initial parameters of a connection.
#[derive(Clone, Copy, Debug)]
pub struct Opening {
    /// Address and port of the guest.
    pub inside: SocketAddr,
    /// Address and port of the remote side, as the guest addresses it.
    pub outside: SocketAddr,
    /// Initial sequence number of the engine.
    pub iss: u32,
    /// Offset of the timestamps of the engine.
    pub clock_offset: u32,
}

/// Timestamp state of the guest.
#[derive(Clone, Copy, Debug)]
pub(super) struct Timestamps {
    /// The timestamp to echo (`TS.Recent`).
    pub(super) recent: u32,
    pub(super) since: Instant,
    pub(super) offset: u32,
}

/// A TCP connection with the guest, continued with host socket `S`.
#[derive(Debug)]
pub struct Connection<S> {
    pub(super) opening: Opening,
    pub(super) phase: Phase,
    pub(super) stream: Option<S>,

    // Guest to host.
    pub(super) irs: u32,
    pub(super) rcv_nxt: u32,
    /// Right edge of the advertised window.
    pub(super) rcv_edge: u32,
    pub(super) pending: Pending,
    pub(super) out_of_order: OutOfOrder,
    /// Sequence number of the FIN of the guest, once known.
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
    pub(super) timestamps: Option<Timestamps>,
    pub(super) dup_acks: u8,
    /// Recovery point: until it is acknowledged, duplicate acknowledgements are ignored.
    pub(super) recover: Option<u32>,
    /// Sequence number of the FIN to the guest, once the remote side has closed.
    pub(super) fin: Option<u32>,
    /// The FIN of the guest arrived after the FIN of the engine.
    pub(super) closed_first: bool,

    pub(super) memory: Memory,
    /// The window of the guest is used up, and more data is available.
    pub(super) window_limited: bool,

    pub(super) readable: bool,
    /// A short peek does not mean that the queue is empty.
    pub(super) short_peeks: bool,
    pub(super) writable: bool,
    pub(super) need_ack: bool,
    /// The last acknowledgement number sent to the guest.
    pub(super) acknowledged: u32,
    /// Time since which an acknowledgement is delayed.
    pub(super) ack_delayed_since: Option<Instant>,
    /// Whether the connection is in the work queue of the engine.
    pub queued: bool,

    /// Consecutive timeouts without progress.
    pub(super) retries: u8,
    /// Zero-window probes sent.
    pub(super) probes: u8,
    pub(super) resend_at: Option<Instant>,
    pub(super) probe_at: Option<Instant>,
    /// Time to send the delayed handshake ACK, if the guest has sent no data by then.
    pub(super) handshake_ack_at: Option<Instant>,
    pub(super) active: Instant,
    /// Deadline of the armed timer; maintained by the engine.
    pub timer: Option<Instant>,
    /// Key in the flow table, once inserted.
    pub(crate) key: Option<Key>,
    pub(super) challenge_sent_at: Option<Instant>,
    /// Set for a connection through a published port.
    pub(crate) inbound: Option<Inbound>,
}

/// Origin of a connection through a published port.
#[derive(Debug)]
pub(crate) struct Inbound {
    /// The counters of the port.
    pub(crate) stats: Arc<ForwardStats>,
    /// The client.
    pub(crate) client: IpAddr,
}

impl Inbound {
    /// The counters of the port, for a connection through a published port.
    pub(super) fn stats_of(inbound: Option<&Self>) -> Option<&ForwardStats> {
        inbound.map(|inbound| &*inbound.stats)
    }
}

impl<S> Connection<S> {
    /// Creates a connection for `syn`, with a socket that is connecting.
    pub fn new(
        opening: Opening,
        syn: &Segment<'_>,
        stream: S,
        params: &Params,
        now: Instant,
    ) -> Self {
        let mut connection = Self::with_phase(opening, Phase::Connecting, stream, now);
        connection.adopt_syn(syn, params, now);
        connection
    }

    /// Creates a connection for an accepted client, and sends a SYN to the guest.
    pub fn to_guest<H: Host<Stream = S>>(opening: Opening, stream: S, io: &mut Io<'_, H>) -> Self {
        let mut connection = Self::with_phase(opening, Phase::SynSent, stream, io.now);
        connection.writable = true;
        connection.send_syn(io);
        connection
    }

    fn with_phase(opening: Opening, phase: Phase, stream: S, now: Instant) -> Self {
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
            out_of_order: OutOfOrder::default(),
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
            timestamps: None,
            dup_acks: 0,
            recover: None,
            fin: None,
            closed_first: false,
            memory: Memory::new(now),
            window_limited: false,
            readable: false,
            short_peeks: false,
            writable: false,
            need_ack: false,
            ack_delayed_since: None,
            queued: false,
            retries: 0,
            probes: 0,
            resend_at: None,
            probe_at: None,
            handshake_ack_at: None,
            active: now,
            timer: None,
            key: None,
            challenge_sent_at: None,
            inbound: None,
        }
    }

    /// Applies the sequence number and options of the SYN of the guest.
    fn adopt_syn(&mut self, syn: &Segment<'_>, params: &Params, now: Instant) {
        let v6 = self.opening.inside.is_ipv6();
        let headers = 20 + if v6 { 40 } else { 20 };
        self.timestamps = syn.options.timestamps.map(|(recent, _)| Timestamps {
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

    /// The state.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// The host socket, until it is closed.
    pub fn stream(&self) -> Option<&S> {
        self.stream.as_ref()
    }

    /// Sets the key of the connection and watches its socket.
    ///
    /// # Errors
    /// The socket cannot be added to epoll.
    pub fn watched_as<H: Host<Stream = S>>(&mut self, key: Key, host: &mut H) -> io::Result<Ready> {
        self.key = Some(key);
        self.stream.as_mut().map_or(Ok(Ready::default()), |stream| host.watch_stream(stream, key))
    }

    /// Takes the socket out of the connection to close it.
    pub fn take_stream(&mut self) -> Option<S> {
        self.stream.take()
    }

    /// Number of bytes that the connection holds or may hold: buffered data, and the memory of its
    /// socket ([`super::memory`]).
    pub fn held(&self) -> usize {
        let of_socket =
            if self.stream.is_some() { self.memory.charge(self.is_blocked()) } else { 0 };
        self.pending.len() + self.out_of_order.len() + of_socket
    }

    /// Whether one side does not take data that the other has sent. Before the guest has completed
    /// the handshake, this is any data for it.
    pub fn is_blocked(&self) -> bool {
        match self.phase {
            Phase::SynSent => self.readable,
            Phase::Open => {
                let to_host = !self.writable || !self.pending.is_empty();
                let early = self.readable && !self.is_established();
                to_host || early || self.window_limited || self.retries > 0
            }
            Phase::Connecting | Phase::Lingering => false,
        }
    }

    /// Sets the size of the receive buffer, if it changes.
    pub(super) fn resize_buffer<H: Host<Stream = S>>(
        &mut self,
        size: Option<ReceiveBuffer>,
        io: &mut Io<'_, H>,
    ) {
        if let (Some(size), Some(stream)) = (size, &mut self.stream) {
            io.host.set_receive_buffer(stream, size);
        }
    }

    /// Whether the guest has acknowledged the SYN of the engine.
    pub fn is_established(&self) -> bool {
        self.phase != Phase::Connecting && self.snd_una != self.opening.iss
    }

    /// The initial sequence number of the guest.
    pub fn initial_sequence(&self) -> u32 {
        self.irs
    }

    /// Records the readiness of the socket.
    pub fn note(&mut self, ready: Ready) {
        self.readable |= ready.readable || ready.error;
        self.short_peeks |= ready.more || ready.error;
        self.writable |= ready.writable || ready.error;
    }

    /// Reduces the MSS: the path to the guest carries packets of at most `mtu` bytes (RFC 1191).
    pub fn reduce_mtu(&mut self, mtu: u32) {
        let headers = if self.opening.inside.is_ipv6() { 60 } else { 40 } + self.options_length();
        let mss = mtu.saturating_sub(headers.into()).min(u32::from(self.mss)) as u16;
        if (MIN_MSS..self.mss).contains(&mss) {
            self.mss = mss;
            self.go_back();
        }
    }

    /// Handles a successful connect: sends a SYN-ACK to the guest.
    pub fn connected<H: Host<Stream = S>>(&mut self, io: &mut Io<'_, H>) {
        self.phase = Phase::Open;
        self.writable = true;
        self.active = io.now;
        let is_delayed =
            self.stream.as_ref().is_some_and(|stream| io.host.is_handshake_ack_delayed(stream));
        self.handshake_ack_at = is_delayed.then(|| io.now + HANDSHAKE_ACK_DELAY);
        self.send_syn_ack(io);
    }

    /// Sends the delayed handshake ACK, in case the server sends first.
    pub(super) fn send_handshake_ack<H: Host<Stream = S>>(&mut self, io: &mut Io<'_, H>) {
        self.handshake_ack_at = None;
        if let Some(stream) = &mut self.stream {
            io.host.send_handshake_ack(stream);
        }
    }

    /// Processes a segment of this connection.
    pub fn segment<H: Host<Stream = S>>(
        &mut self,
        segment: &Segment<'_>,
        io: &mut Io<'_, H>,
    ) -> Outcome {
        match self.phase {
            Phase::Connecting => self.segment_while_connecting(segment),
            Phase::SynSent => self.segment_in_syn_sent(segment, io),
            Phase::Open => self.segment_while_open(segment, io),
            Phase::Lingering => self.segment_while_lingering(segment, io),
        }
    }

    fn segment_while_connecting(&mut self, segment: &Segment<'_>) -> Outcome {
        if segment.has(flags::RST) {
            // Before a SYN-ACK, the guest can only use this sequence number.
            return if segment.sequence == self.rcv_nxt { Outcome::Reset } else { Outcome::Alive };
        }
        let another =
            segment.has(flags::SYN) && !segment.has(flags::ACK) && segment.sequence != self.irs;
        if another { Outcome::Replaced } else { Outcome::Alive }
    }

    /// RFC 9293 section 3.10.7.3, in the same order.
    fn segment_in_syn_sent<H: Host<Stream = S>>(
        &mut self,
        segment: &Segment<'_>,
        io: &mut Io<'_, H>,
    ) -> Outcome {
        let acknowledges = segment.has(flags::ACK);
        if acknowledges && segment.acknowledgement != self.snd_nxt {
            // The segment belongs to an earlier connection with the same five-tuple. A reset ends
            // it, if the guest still has it.
            return if segment.has(flags::RST) { Outcome::Alive } else { Outcome::Stray };
        }
        if segment.has(flags::RST) {
            return if acknowledges { Outcome::Reset } else { Outcome::Alive };
        }
        if !segment.has(flags::SYN) {
            io.stats.count_drop(DropReason::Window);
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
            // Simultaneous open (section 3.5, figure 8).
            self.send_syn_ack(io);
        }
        Outcome::Alive
    }

    fn segment_while_lingering<H: Host<Stream = S>>(
        &mut self,
        segment: &Segment<'_>,
        io: &mut Io<'_, H>,
    ) -> Outcome {
        if segment.has(flags::RST) {
            return if segment.sequence == self.rcv_nxt { Outcome::Done } else { Outcome::Alive };
        }
        // RFC 6191 section 2: a new incarnation is recognized by a higher sequence number or
        // timestamp.
        let newer = match (self.timestamps, segment.options.timestamps) {
            (Some(timestamps), Some((value, _))) => before(timestamps.recent, value),
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

    fn segment_while_open<H: Host<Stream = S>>(
        &mut self,
        segment: &Segment<'_>,
        io: &mut Io<'_, H>,
    ) -> Outcome {
        let window = self.rcv_edge.wrapping_sub(self.rcv_nxt);
        if segment.has(flags::RST) {
            // RFC 5961 section 3.2: a reset is valid only with the exact next sequence number.
            // Otherwise a challenge ACK is sent.
            if segment.sequence == self.rcv_nxt {
                return Outcome::Reset;
            }
            if segment.sequence.wrapping_sub(self.rcv_nxt) < window.max(1) {
                self.send_challenge_ack(io);
            } else {
                io.stats.count_drop(DropReason::Window);
            }
            return Outcome::Alive;
        }
        if segment.has(flags::SYN) {
            let again = segment.sequence == self.irs && !self.is_established();
            if again && segment.has(flags::ACK) && segment.acknowledgement == self.snd_nxt {
                // Simultaneous open: this SYN-ACK also acknowledges the SYN of the engine.
                self.acknowledge(segment, io);
                self.need_ack = true;
            } else if again && !segment.has(flags::ACK) {
                self.send_syn_ack(io);
            } else {
                // RFC 5961 section 4.2.
                self.send_challenge_ack(io);
            }
            return Outcome::Alive;
        }
        if !self.check_timestamps(segment, io) {
            return Outcome::Alive;
        }
        let end = segment.sequence.wrapping_add(segment.length());
        // With a closed window, a segment at its edge is processed for its acknowledgement, but its
        // payload is not accepted (RFC 9293 section 3.10.7.4).
        let acceptable = up_to(segment.sequence, self.rcv_edge)
            && if segment.length() == 0 {
                up_to(self.rcv_nxt, segment.sequence)
            } else {
                before(self.rcv_nxt, end)
            };
        if !acceptable {
            self.reject_segment(segment, io);
            return Outcome::Alive;
        }
        if !segment.has(flags::ACK) || !self.acknowledge(segment, io) {
            return Outcome::Alive;
        }
        if up_to(segment.sequence, self.rcv_nxt)
            && let (Some(timestamps), Some((value, _))) =
                (&mut self.timestamps, segment.options.timestamps)
        {
            // RFC 7323 section 4.3.
            *timestamps = Timestamps { recent: value, since: io.now, ..*timestamps };
        }
        self.active = io.now;
        if segment.length() > 0 && self.receive_payload(segment, io).is_err() {
            self.send_reset(io);
            return Outcome::Reset;
        }
        Outcome::Alive
    }

    /// RFC 7323 sections 3.2 and 5.3: whether the timestamp of the segment is acceptable.
    fn check_timestamps<H: Host<Stream = S>>(
        &mut self,
        segment: &Segment<'_>,
        io: &mut Io<'_, H>,
    ) -> bool {
        let Some(timestamps) = self.timestamps else { return true };
        let sound = match segment.options {
            TcpOptions { timestamps: Some((value, _)), .. } => {
                !before(value, timestamps.recent)
                    || io.now.saturating_duration_since(timestamps.since) > PAWS_IDLE
            }
            TcpOptions { timestamps: None, .. } => {
                io.stats.count_drop(DropReason::Window);
                return false;
            }
        };
        if !sound {
            self.reject_segment(segment, io);
        }
        sound
    }

    /// Replies with the current acknowledgement to a segment that is not acceptable. A segment
    /// without payload may itself be such a reply, so that reply is rate limited to prevent an
    /// endless exchange (`tcp_oow_rate_limited` of the kernel).
    fn reject_segment<H: Host<Stream = S>>(&mut self, segment: &Segment<'_>, io: &mut Io<'_, H>) {
        if segment.length() == 0 {
            return self.send_challenge_ack(io);
        }
        io.stats.count_drop(DropReason::Window);
        self.need_ack = true;
    }

    /// Processes the acknowledgement and window. Returns false if the segment must be ignored.
    fn acknowledge<H: Host<Stream = S>>(
        &mut self,
        segment: &Segment<'_>,
        io: &mut Io<'_, H>,
    ) -> bool {
        let ack = segment.acknowledgement;
        // RFC 5961 section 5.2: an acknowledgement of data not sent yet, or older than the largest
        // window, is invalid.
        let oldest = self.snd_una.wrapping_sub(1 << 30);
        if before(self.snd_max, ack) || before(ack, oldest) {
            self.send_challenge_ack(io);
            return false;
        }
        let first = !self.is_established();
        if first && ack == self.snd_una {
            // It does not acknowledge the SYN of the engine, so the segment is ignored.
            return false;
        }
        if self.probe_at.is_some() {
            // The guest is alive, so probing continues.
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

    /// Restarts transmission at the first unacknowledged byte.
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

    /// Whether the FIN of the guest and all bytes before it have been received.
    pub(super) fn guest_has_finished(&self) -> bool {
        self.guest_fin.is_some_and(|fin| before(fin, self.rcv_nxt))
    }

    /// Ends the connection if all data and both FINs are sent and acknowledged.
    pub(super) fn finish(&mut self, io_now: Instant) -> Outcome {
        let ours = self.fin.is_some_and(|fin| before(fin, self.snd_una));
        if !(ours && self.host_shut && self.guest_has_finished()) {
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
