//! A published port as all loops see it: its options and its figures.

use crate::PortOptions;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use tidegate_model::PublishLabel;

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
        /// The client is not on the port's allow-list, or not of the network whose gateway it used.
        NotAllowed = "not_allowed",
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
        /// The client is not on the port's allow-list, or not of the network whose gateway it used.
        NotAllowed = "not_allowed",
        /// The source address has as many sessions as one may have.
        SourceLimit = "source_limit",
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

/// The figures of one port. Counted with relaxed atomics: they are read by scrapes only.
#[derive(Debug, Default)]
pub(crate) struct PortStats {
    /// TCP connections accepted, UDP sessions begun.
    pub(crate) accepted: AtomicU64,
    /// TCP connections or UDP sessions that are there now.
    pub(crate) live: AtomicUsize,
    pub(crate) bytes: [AtomicU64; Direction::ALL.len()],
    pub(crate) datagrams: [AtomicU64; Direction::ALL.len()],
    pub(crate) refused: [AtomicU64; Refusal::ALL.len()],
    pub(crate) dropped: [AtomicU64; Drop::ALL.len()],
    /// TCP connections that ended in a reset; UDP sessions evicted to make room.
    pub(crate) cut: AtomicU64,
}

impl PortStats {
    pub(crate) fn add_bytes(&self, direction: Direction, bytes: u64) {
        self.bytes[direction as usize].fetch_add(bytes, Ordering::Relaxed);
    }

    pub(crate) fn refuse(&self, refusal: Refusal) {
        self.refused[refusal as usize].fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn drop_datagrams(&self, reason: Drop, count: u64) {
        if count > 0 {
            self.dropped[reason as usize].fetch_add(count, Ordering::Relaxed);
        }
    }
}

/// A published port.
#[derive(Debug)]
pub(crate) struct Port {
    pub(crate) label: PublishLabel,
    pub(crate) container_port: u16,
    pub(crate) options: Arc<PortOptions>,
    pub(crate) stats: PortStats,
}
