//! A published port as all loops see it: its options and its figures.

use crate::PortOptions;
use crate::metrics::{DIAL_BOUNDS, LIFE_BOUNDS};
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tidegate_model::{Histogram, PublishLabel};

/// Which way payload goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the client to the container.
    In,
    /// From the container to the client.
    Out,
}

impl Direction {
    /// Both, in the order in which they index arrays.
    pub const ALL: [Self; 2] = [Self::In, Self::Out];

    /// The label's value in metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::In => "in",
            Self::Out => "out",
        }
    }
}

/// Declares an enum whose values are a label's values, and their table.
macro_rules! reasons {
    ($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident = $label:literal,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum $name { $($(#[$variant_doc])* $variant,)* }

        impl $name {
            /// All of them, in the order in which they index arrays.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            /// The label's value in metrics.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $label,)* }
            }
        }
    };
}

reasons! {
    /// Why a TCP connection was not made.
    Refusal {
        /// The client is not on the port's allow-list, or the [`GatewayAcl`](crate::GatewayAcl)
        /// denies it.
        NotAllowed = "not_allowed",
        /// The client has its share of the connections, of the port's or of all.
        ClientLimit = "client_limit",
        /// The port has as many connections as it may have.
        PortLimit = "port_limit",
        /// All ports together have.
        TotalLimit = "total_limit",
        /// The process or the system has no descriptors or memory left.
        Exhausted = "exhausted",
        /// The backend's port is closed.
        BackendRefused = "backend_refused",
        /// There is no way to the backend.
        BackendUnreachable = "backend_unreachable",
        /// The backend did not answer in time.
        DialTimeout = "dial_timeout",
        /// The client gave up while the backend was being dialled.
        ClientGone = "client_gone",
    }
}

reasons! {
    /// Why a datagram was dropped.
    Drop {
        /// The client is not on the port's allow-list, or the [`GatewayAcl`](crate::GatewayAcl)
        /// denies it.
        NotAllowed = "not_allowed",
        /// It claims to come from a published port of ours, which answering would ask.
        Reflected = "reflected",
        /// No descriptors or memory for another session.
        Exhausted = "exhausted",
        /// There is no way to the backend.
        BackendUnreachable = "backend_unreachable",
        /// The backend's port is closed, so it told.
        BackendRefused = "backend_refused",
        /// The send buffer was full.
        NoRoom = "no_room",
        /// Longer than the path takes.
        TooLong = "too_long",
    }
}

/// Something that counts: an atomic number, or, to measure what counting costs, [`Uncounted`].
pub trait Tally: fmt::Debug + Default + Send + Sync {
    /// Counts `more`.
    fn add(&self, more: u64);
}

impl Tally for AtomicU64 {
    fn add(&self, more: u64) {
        self.fetch_add(more, Ordering::Relaxed);
    }
}

/// Counts nothing.
#[derive(Debug, Default)]
pub struct Uncounted;

impl Tally for Uncounted {
    fn add(&self, _: u64) {}
}

/// The figures of one port. Counted with relaxed atomics: they are read by scrapes and by the API
/// only.
#[derive(Debug, Default)]
pub(crate) struct PortStats<T = AtomicU64> {
    /// TCP connections accepted, UDP sessions begun.
    pub(crate) accepted: T,
    /// TCP connections or UDP sessions that are there now. Not only a figure: limits are judged by
    /// it.
    pub(crate) live: AtomicUsize,
    pub(crate) bytes: [T; Direction::ALL.len()],
    pub(crate) datagrams: [T; Direction::ALL.len()],
    pub(crate) refused: [T; Refusal::ALL.len()],
    pub(crate) dropped: [T; Drop::ALL.len()],
    /// TCP connections that ended in a reset; UDP sessions evicted to make room.
    pub(crate) cut: T,
    /// Made with the first connection: most published ports are idle.
    times: OnceLock<Box<PortTimes>>,
}

/// How long things took at a port.
#[derive(Debug)]
pub(crate) struct PortTimes {
    /// From accepting a client to reaching its backend (TCP).
    pub(crate) dial: Histogram<{ DIAL_BOUNDS.len() }>,
    /// TCP connections from then on to their end; UDP sessions from their first datagram to their
    /// last.
    pub(crate) life: Histogram<{ LIFE_BOUNDS.len() }>,
}

impl<T: Tally> PortStats<T> {
    pub(crate) fn add_bytes(&self, direction: Direction, bytes: u64) {
        self.bytes[direction as usize].add(bytes);
    }

    pub(crate) fn refuse(&self, refusal: Refusal) {
        self.refused[refusal as usize].add(1);
    }

    pub(crate) fn drop_datagrams(&self, reason: Drop, count: u64) {
        if count > 0 {
            self.dropped[reason as usize].add(count);
        }
    }

    /// A backend was reached after `time`.
    pub(crate) fn record_dial(&self, time: Duration) {
        self.times_or_init().dial.record(time);
    }

    /// A connection or session has ended that went on for `time`.
    pub(crate) fn record_lifetime(&self, time: Duration) {
        self.times_or_init().life.record(time);
    }

    /// How long things took, if there has been anything.
    pub(crate) fn times(&self) -> Option<&PortTimes> {
        self.times.get().map(|times| &**times)
    }

    fn times_or_init(&self) -> &PortTimes {
        let new =
            || PortTimes { dial: Histogram::new(&DIAL_BOUNDS), life: Histogram::new(&LIFE_BOUNDS) };
        self.times.get_or_init(|| Box::new(new()))
    }
}

/// A published port.
#[derive(Debug)]
pub(crate) struct Port<T = AtomicU64> {
    /// No other port of the engine has or had it.
    pub(crate) id: u64,
    pub(crate) label: PublishLabel,
    pub(crate) container_port: u16,
    pub(crate) options: Arc<PortOptions>,
    pub(crate) stats: PortStats<T>,
    /// It is being closed, which a connection that is handed from loop to loop may outrun.
    pub(crate) closed: AtomicBool,
    /// Whether it has series of its own, for life: were it to change, counters would run backwards.
    pub(crate) has_series: bool,
}
