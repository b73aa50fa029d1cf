//! Typed wrapper of epoll(7).

use crate::arena::Key;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::time::Timespec;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

/// Target of an event, a timer or a run-queue entry: an arena [`Key`], and a tag that the handler
/// defines.
///
/// It is encoded in the 64 bits of epoll user data: generation (32), index (28), tag (4).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Token(u64);

impl Token {
    /// The token of the mailbox. Its index is that of the last of
    /// [`Arena::MAX_SLOTS`](crate::Arena) slots, and the arenas of all callers are far smaller.
    pub(crate) const MAILBOX: Self = Self(u64::MAX);

    /// Creates a token for `key`. `tag` (0 to 15) selects the arena of the key, or one of several
    /// descriptors of an entry.
    pub const fn new(tag: u8, key: Key) -> Self {
        assert!(tag < 16, "a token has four bits for its tag");
        Self((key.generation as u64) << 32 | (key.index as u64) << 4 | tag as u64)
    }

    /// The tag.
    pub const fn tag(self) -> u8 {
        (self.0 & 0xf) as u8
    }

    /// The key.
    pub const fn key(self) -> Key {
        Key { index: (self.0 >> 4) as u32 & 0x0fff_ffff, generation: (self.0 >> 32) as u32 }
    }
}

/// Events to watch a descriptor for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interest {
    /// Readable, level-triggered.
    Readable,
    /// Like `Readable`, for several loops that watch the same descriptor: an event wakes only one
    /// of them, the first that sleeps (`EPOLLEXCLUSIVE`).
    ReadableShared,
    /// Readable, half-closed and urgent data, edge-triggered. The handler must read until `EAGAIN`.
    InputEdges,
    /// Like `InputEdges`, and writable. A new socket is writable, so watch for this only while a
    /// write is blocked; otherwise each descriptor causes one more event.
    Edges,
}

impl Interest {
    fn flags(self) -> EventFlags {
        match self {
            Self::Readable => EventFlags::IN,
            Self::ReadableShared => EventFlags::IN | EventFlags::EXCLUSIVE,
            Self::InputEdges => {
                EventFlags::IN | EventFlags::RDHUP | EventFlags::PRI | EventFlags::ET
            }
            Self::Edges => Self::InputEdges.flags() | EventFlags::OUT,
        }
    }
}

/// Readiness of a descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Readiness(EventFlags);

impl Readiness {
    /// Data, end of stream or an error can be read.
    pub fn is_readable(self) -> bool {
        self.0.intersects(EventFlags::IN | EventFlags::RDHUP | EventFlags::HUP | EventFlags::ERR)
    }

    /// A write would succeed or report the error.
    pub fn is_writable(self) -> bool {
        self.0.intersects(EventFlags::OUT | EventFlags::HUP | EventFlags::ERR)
    }

    /// The peer has sent a FIN or a reset. A short read then does not mean that the receive buffer
    /// is empty.
    pub fn is_read_closed(self) -> bool {
        self.0.intersects(EventFlags::RDHUP | EventFlags::HUP | EventFlags::ERR)
    }

    /// The stream contains urgent data. Reads stop at the urgent mark even if more data follows,
    /// and splice(2) does not pass the mark (`tcp_read_sock`, net/ipv4/tcp.c).
    pub fn is_urgent(self) -> bool {
        self.0.contains(EventFlags::PRI)
    }

    /// A socket error is pending: a reset or a failed connect.
    pub fn is_error(self) -> bool {
        self.0.contains(EventFlags::ERR)
    }
}

impl Readiness {
    /// Polls two descriptors and returns what epoll would report for them. One system call is
    /// cheaper than an iteration of the loop.
    pub fn of(sources: [BorrowedFd<'_>; 2]) -> [Self; 2] {
        let events = PollFlags::IN | PollFlags::OUT | PollFlags::RDHUP | PollFlags::PRI;
        let mut polled = sources.map(|source| PollFd::from_borrowed_fd(source, events));
        let _ = poll(&mut polled, Some(&Timespec::default()));
        // The poll and epoll bits are equal (include/uapi/linux/eventpoll.h). If the call fails,
        // none is set.
        polled.map(|one| Self(EventFlags::from_bits_truncate(one.revents().bits().into())))
    }
}

/// An epoll instance.
#[derive(Debug)]
pub struct Epoll(OwnedFd);

impl Epoll {
    /// # Errors
    /// Errors of epoll_create1(2): no descriptor, no memory.
    pub fn new() -> io::Result<Self> {
        Ok(Self(epoll::create(CreateFlags::CLOEXEC)?))
    }

    /// Returns a second handle to the same instance, to register descriptors while the loop runs
    /// and without a [`Context`](crate::Context).
    ///
    /// # Errors
    /// No descriptor is available.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self(self.0.try_clone()?))
    }

    /// Watches `source`; its events carry `token`.
    ///
    /// # Errors
    /// Errors of epoll_ctl(2): `ENOSPC` at `fs.epoll.max_user_watches`, `ENOMEM`.
    pub fn add(&self, source: impl AsFd, token: Token, interest: Interest) -> io::Result<()> {
        Ok(epoll::add(&self.0, source, EventData::new_u64(token.0), interest.flags())?)
    }

    /// Changes the interest of the watched `source`. Events that are pending at this moment are
    /// reported again.
    ///
    /// # Errors
    /// Errors of epoll_ctl(2): `ENOENT` if `source` is not watched.
    pub fn modify(&self, source: impl AsFd, token: Token, interest: Interest) -> io::Result<()> {
        Ok(epoll::modify(&self.0, source, EventData::new_u64(token.0), interest.flags())?)
    }

    /// Stops watching `source`. Closing the last copy of a descriptor has the same effect.
    ///
    /// # Errors
    /// Errors of epoll_ctl(2): `ENOENT` if `source` is not watched.
    pub fn remove(&self, source: impl AsFd) -> io::Result<()> {
        Ok(epoll::delete(&self.0, source)?)
    }

    /// Waits for events for at most `timeout` (`None`: without limit), and replaces `events` with
    /// them, up to its capacity. A signal ends the wait early without events.
    pub(crate) fn wait(
        &self,
        events: &mut Vec<Event>,
        timeout: Option<Duration>,
    ) -> io::Result<()> {
        events.clear();
        let timeout = timeout.map(round_up_to_milliseconds);
        match epoll::wait(&self.0, rustix::buffer::spare_capacity(events), timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

impl AsFd for Epoll {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The resolution of epoll_wait(2) is milliseconds. The timeout is rounded up, because the loop
/// would otherwise spin during the last fraction.
fn round_up_to_milliseconds(timeout: Duration) -> Timespec {
    let ms = timeout.as_nanos().div_ceil(1_000_000).min(i32::MAX as u128) as i64;
    Timespec { tv_sec: ms / 1000, tv_nsec: ms % 1000 * 1_000_000 }
}

pub(crate) fn split(event: Event) -> (Token, Readiness) {
    (Token(event.data.u64()), Readiness(event.flags))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::Write;
    use std::net::Shutdown;
    use std::os::unix::net::UnixStream;

    proptest! {
        #[test]
        fn a_token_returns_its_tag_and_key(tag in 0u8..16, index in 0u32..1 << 28, generation: u32) {
            let key = Key { index, generation };
            let token = Token::new(tag, key);
            prop_assert_eq!((token.tag(), token.key()), (tag, key));
        }
    }

    #[test]
    fn polled_readiness_matches_epoll() {
        let (one, mut other) = UnixStream::pair().unwrap();
        let of_both =
            |one: &UnixStream, other: &UnixStream| Readiness::of([one.as_fd(), other.as_fd()]);
        let [fresh, _] = of_both(&one, &other);
        assert!(fresh.is_writable() && !fresh.is_readable() && !fresh.is_error());
        other.write_all(b"x").unwrap();
        let [receiver, sender] = of_both(&one, &other);
        assert!(receiver.is_readable() && !receiver.is_read_closed() && !sender.is_readable());
        other.shutdown(Shutdown::Write).unwrap();
        assert!(of_both(&one, &other)[0].is_read_closed());
    }

    #[test]
    fn writability_is_reported_only_if_watched_for() {
        let (stream, _other) = UnixStream::pair().unwrap();
        let (epoll, token) =
            (Epoll::new().unwrap(), Token::new(1, Key { index: 7, generation: 9 }));
        let mut events = Vec::with_capacity(4);
        let mut reported = |epoll: &Epoll| {
            epoll.wait(&mut events, Some(Duration::ZERO)).unwrap();
            events
                .iter()
                .map(|event| split(*event))
                .any(|(reported_token, ready)| reported_token == token && ready.is_writable())
        };
        epoll.add(&stream, token, Interest::InputEdges).unwrap();
        assert!(!reported(&epoll));
        epoll.modify(&stream, token, Interest::Edges).unwrap();
        assert!(reported(&epoll), "writability from before the change is reported");
        assert!(!reported(&epoll), "edge-triggered");
    }

    #[test]
    fn a_timeout_is_never_rounded_down() {
        assert_eq!(
            round_up_to_milliseconds(Duration::from_nanos(1)),
            Timespec { tv_sec: 0, tv_nsec: 1_000_000 }
        );
        assert_eq!(round_up_to_milliseconds(Duration::ZERO), Timespec { tv_sec: 0, tv_nsec: 0 });
        assert_eq!(
            round_up_to_milliseconds(Duration::from_millis(1500)),
            Timespec { tv_sec: 1, tv_nsec: 500_000_000 }
        );
    }
}
