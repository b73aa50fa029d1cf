//! A published port as shared by all loops: its options and counters.

use crate::PortOptions;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tidegate_model::{Direction, PerDirection};
use tidegate_model::{Histogram, PublishLabel};

/// Bucket bounds of the dial time in seconds: a connect on this host, a full accept queue, and the
/// first and the second retransmission of a SYN (RFC 6298: after 1 s, and 2 s later). The dial
/// timeout bounds the last bucket.
pub(crate) const DIAL_BOUNDS: [f64; 8] = [0.000_1, 0.000_5, 0.002_5, 0.01, 0.05, 0.25, 1.0, 3.0];

/// Bucket bounds of the lifetime of connections and sessions in seconds: from one request to an
/// hour.
pub(crate) const LIFE_BOUNDS: [f64; 8] = [0.001, 0.01, 0.1, 1.0, 10.0, 60.0, 600.0, 3600.0];

/// Declares an enum of label values, with all variants as an array.
macro_rules! reasons {
    ($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident = $label:literal,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum $name { $($(#[$variant_doc])* $variant,)* }

        impl $name {
            /// All variants, in array index order.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            /// The label value in metrics.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $label,)* }
            }
        }
    };
}

reasons! {
    /// Why a TCP connection was refused.
    Refusal {
        /// The client is not on the allow-list of the port, or denied by the
        /// [`GatewayAcl`](crate::GatewayAcl).
        NotAllowed = "not_allowed",
        /// The client has reached its share of the connections of the port or in total.
        ClientLimit = "client_limit",
        /// The port has reached its maximum number of connections.
        PortLimit = "port_limit",
        /// All ports together have reached the maximum number of connections.
        TotalLimit = "total_limit",
        /// The process or the system is out of descriptors or memory.
        Exhausted = "exhausted",
        /// The port of the backend is closed.
        BackendRefused = "backend_refused",
        /// The backend is unreachable.
        BackendUnreachable = "backend_unreachable",
        /// The backend did not accept in time.
        DialTimeout = "dial_timeout",
        /// The client reset the connection during the dial.
        ClientGone = "client_gone",
    }
}

reasons! {
    /// Why a datagram was dropped.
    DropReason {
        /// The client is not on the allow-list of the port, or denied by the
        /// [`GatewayAcl`](crate::GatewayAcl).
        NotAllowed = "not_allowed",
        /// The source is a published port or the backend itself, so a reply would cause an endless
        /// loop.
        Reflected = "reflected",
        /// No descriptor or memory for a session.
        Exhausted = "exhausted",
        /// The backend is unreachable.
        BackendUnreachable = "backend_unreachable",
        /// The port of the backend is closed, as reported by ICMP.
        BackendRefused = "backend_refused",
        /// The send buffer was full.
        NoRoom = "no_room",
        /// Larger than the path MTU, where fragmentation is not permitted.
        TooLong = "too_long",
    }
}

/// A counter: an atomic integer, or [`Uncounted`] to measure the cost of counting.
pub trait Tally: fmt::Debug + Default + Send + Sync {
    /// Adds `more`.
    fn add(&self, more: u64);
}

impl Tally for AtomicU64 {
    fn add(&self, more: u64) {
        self.fetch_add(more, Ordering::Relaxed);
    }
}

/// A counter that does nothing.
#[derive(Debug, Default)]
pub struct Uncounted;

impl Tally for Uncounted {
    fn add(&self, _: u64) {}
}

/// Counters of one port. Relaxed atomics suffice, because only scrapes and the API read them.
#[derive(Debug, Default)]
pub(crate) struct PortStats<T = AtomicU64> {
    /// TCP connections accepted, or UDP sessions started.
    pub(crate) accepted: T,
    /// Current TCP connections or UDP sessions.
    pub(crate) live: AtomicUsize,
    pub(crate) bytes: PerDirection<T>,
    pub(crate) datagrams: PerDirection<T>,
    pub(crate) refused: [T; Refusal::ALL.len()],
    pub(crate) dropped: [T; DropReason::ALL.len()],
    /// TCP connections that ended in a reset, or UDP sessions evicted.
    pub(crate) cut: T,
    /// Allocated with the first connection, because most published ports are idle.
    times: OnceLock<Box<PortTimes>>,
}

/// Histograms of one port.
#[derive(Debug)]
pub(crate) struct PortTimes {
    /// From accept to the connect of the backend (TCP).
    pub(crate) dial: Histogram<{ DIAL_BOUNDS.len() }>,
    /// TCP: from the connect of the backend to the end of the connection. UDP: from the first
    /// datagram of the session to the last.
    pub(crate) life: Histogram<{ LIFE_BOUNDS.len() }>,
}

impl<T: Tally> PortStats<T> {
    pub(crate) fn add_bytes(&self, direction: Direction, bytes: u64) {
        self.bytes[direction].add(bytes);
    }

    pub(crate) fn refuse(&self, refusal: Refusal) {
        self.refused[refusal as usize].add(1);
    }

    pub(crate) fn drop_datagrams(&self, reason: DropReason, count: u64) {
        if count > 0 {
            self.dropped[reason as usize].add(count);
        }
    }

    /// Records that a backend was connected after `time`.
    pub(crate) fn record_dial(&self, time: Duration) {
        self.times_or_init().dial.record(time);
    }

    /// Records that a connection or session ended after `time`.
    pub(crate) fn record_lifetime(&self, time: Duration) {
        self.times_or_init().life.record(time);
    }

    /// The histograms; `None` before the first connection.
    pub(crate) fn times(&self) -> Option<&PortTimes> {
        self.times.get().map(|times| &**times)
    }

    fn times_or_init(&self) -> &PortTimes {
        let new =
            || PortTimes { dial: Histogram::new(&DIAL_BOUNDS), life: Histogram::new(&LIFE_BOUNDS) };
        self.times.get_or_init(|| Box::new(new()))
    }
}

#[derive(Debug)]
pub(crate) struct Port<T = AtomicU64> {
    /// Unique in the engine and never reused.
    pub(crate) id: u64,
    pub(crate) label: PublishLabel,
    pub(crate) container_port: u16,
    pub(crate) options: Arc<PortOptions>,
    pub(crate) stats: PortStats<T>,
    /// Set on close. A connection that is passed between loops may arrive after the message that
    /// closes its port.
    pub(crate) closed: AtomicBool,
    /// Whether the port has its own series. Constant, because a change would make counters
    /// decrease.
    pub(crate) has_series: bool,
}
