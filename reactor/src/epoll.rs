//! epoll(7) in the words of this house.

use crate::arena::Key;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::time::Timespec;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

/// What an event, a timer or a run queue refers to: an arena's [`Key`] and a tag of the handler's
/// own.
///
/// It is the 64 bits that epoll carries for us: generation (32), index (28), tag (4).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Token(u64);

impl Token {
    /// The mailbox's own token; no arena hands out its index.
    pub(crate) const MAILBOX: Self = Self(u64::MAX);

    /// A token for `key`. `tag` (0 to 15) says which arena the key belongs to, or which of an
    /// entry's descriptors is meant.
    pub const fn new(tag: u8, key: Key) -> Self {
        assert!(tag < 16, "a token has four bits for its tag");
        Self((key.generation as u64) << 32 | (key.index as u64) << 4 | tag as u64)
    }

    /// The tag it was made with.
    pub const fn tag(self) -> u8 {
        (self.0 & 0xf) as u8
    }

    /// The key it was made with.
    pub const fn key(self) -> Key {
        Key { index: (self.0 >> 4) as u32 & 0x0fff_ffff, generation: (self.0 >> 32) as u32 }
    }
}

/// What a descriptor is watched for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interest {
    /// Readable, reported for as long as it is (level-triggered).
    Readable,
    /// As `Readable`, with several loops watching the same descriptor: one event wakes one of them,
    /// the first that sleeps (`EPOLLEXCLUSIVE`).
    ReadableShared,
    /// Readable, half-closed, urgent data: each change reported once (edge-triggered). The handler
    /// reads until the kernel says `EAGAIN`.
    InputEdges,
    /// As `InputEdges`, and writable. Room is there from the start, so it is worth watching only
    /// for one who is waiting for it: watched earlier, it is an event more for every descriptor.
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

/// What the kernel reported about a descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Readiness(EventFlags);

impl Readiness {
    /// Data, an end of stream or an error waits to be read.
    pub fn is_readable(self) -> bool {
        self.0.intersects(EventFlags::IN | EventFlags::RDHUP | EventFlags::HUP | EventFlags::ERR)
    }

    /// There is room to write, or a write will tell the error.
    pub fn is_writable(self) -> bool {
        self.0.intersects(EventFlags::OUT | EventFlags::HUP | EventFlags::ERR)
    }

    /// The peer has sent its FIN (or worse): a short read does not mean that nothing is left.
    pub fn is_read_closed(self) -> bool {
        self.0.intersects(EventFlags::RDHUP | EventFlags::HUP | EventFlags::ERR)
    }

    /// There is urgent data in the stream: reads stop short at its mark although more waits behind
    /// it, and splice(2) does not pass it at all (`tcp_read_sock`, net/ipv4/tcp.c).
    pub fn is_urgent(self) -> bool {
        self.0.contains(EventFlags::PRI)
    }

    /// An error is pending on the socket: a reset, or a failed connect.
    pub fn is_error(self) -> bool {
        self.0.contains(EventFlags::ERR)
    }
}

impl Readiness {
    /// What a watched descriptor would report, asked for right now: what two sockets are ready for
    /// costs one system call, and less than a round through the loop.
    pub fn of(sources: [BorrowedFd<'_>; 2]) -> [Self; 2] {
        let asked = PollFlags::IN | PollFlags::OUT | PollFlags::RDHUP | PollFlags::PRI;
        let mut polled = sources.map(|source| PollFd::from_borrowed_fd(source, asked));
        let _ = poll(&mut polled, Some(&Timespec::default()));
        // The bits are the same ones (include/uapi/linux/eventpoll.h). Where the call fails, none
        // is set.
        polled.map(|one| Self(EventFlags::from_bits_truncate(one.revents().bits().into())))
    }
}

/// An epoll instance.
#[derive(Debug)]
pub struct Epoll(OwnedFd);

impl Epoll {
    /// # Errors
    /// What epoll_create1(2) says: no descriptor, no memory.
    pub fn new() -> io::Result<Self> {
        Ok(Self(epoll::create(CreateFlags::CLOEXEC)?))
    }

    /// A second handle to the same instance, for who registers descriptors while the loop runs and
    /// has no [`Context`](crate::Context) at hand.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self(self.0.try_clone()?))
    }

    /// Watches `source`; its events carry `token`.
    ///
    /// # Errors
    /// What epoll_ctl(2) says: `ENOSPC` at `fs.epoll.max_user_watches`, `ENOMEM`.
    pub fn add(&self, source: impl AsFd, token: Token, interest: Interest) -> io::Result<()> {
        Ok(epoll::add(&self.0, source, EventData::new_u64(token.0), interest.flags())?)
    }

    /// Watches `source`, which is watched already, for `interest` from now on. What is ready at
    /// this moment is reported again.
    ///
    /// # Errors
    /// What epoll_ctl(2) says: `ENOENT` if it was not watched.
    pub fn modify(&self, source: impl AsFd, token: Token, interest: Interest) -> io::Result<()> {
        Ok(epoll::modify(&self.0, source, EventData::new_u64(token.0), interest.flags())?)
    }

    /// Watches `source` no longer. Closing the last copy of a descriptor does the same.
    ///
    /// # Errors
    /// What epoll_ctl(2) says: `ENOENT` if it was not watched.
    pub fn remove(&self, source: impl AsFd) -> io::Result<()> {
        Ok(epoll::delete(&self.0, source)?)
    }

    /// Waits until something is ready or `timeout` is over (`None`: without limit) and replaces
    /// `events` by what there is, at most its capacity. A signal ends the wait early, with none.
    pub(crate) fn wait(
        &self,
        events: &mut Vec<Event>,
        timeout: Option<Duration>,
    ) -> io::Result<()> {
        events.clear();
        let timeout = timeout.map(whole_milliseconds);
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

/// epoll_wait(2) counts in milliseconds: rounded up, or a loop would spin through the last of them.
fn whole_milliseconds(timeout: Duration) -> Timespec {
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
        fn a_token_gives_back_what_it_was_made_of(tag in 0u8..16, index in 0u32..1 << 28, generation: u32) {
            let key = Key { index, generation };
            let token = Token::new(tag, key);
            prop_assert_eq!((token.tag(), token.key()), (tag, key));
        }
    }

    #[test]
    fn readiness_asked_for_is_what_epoll_would_report() {
        let (one, mut other) = UnixStream::pair().unwrap();
        let of_both =
            |one: &UnixStream, other: &UnixStream| Readiness::of([one.as_fd(), other.as_fd()]);
        let [fresh, _] = of_both(&one, &other);
        assert!(fresh.is_writable() && !fresh.is_readable() && !fresh.is_error());
        other.write_all(b"x").unwrap();
        let [spoken_to, speaker] = of_both(&one, &other);
        assert!(spoken_to.is_readable() && !spoken_to.is_read_closed() && !speaker.is_readable());
        other.shutdown(Shutdown::Write).unwrap();
        assert!(of_both(&one, &other)[0].is_read_closed());
    }

    #[test]
    fn room_is_reported_to_those_only_who_wait_for_it() {
        let (stream, _other) = UnixStream::pair().unwrap();
        let (epoll, token) =
            (Epoll::new().unwrap(), Token::new(1, Key { index: 7, generation: 9 }));
        let mut events = Vec::with_capacity(4);
        let mut reported = |epoll: &Epoll| {
            epoll.wait(&mut events, Some(Duration::ZERO)).unwrap();
            events
                .iter()
                .map(|event| split(*event))
                .any(|(told, ready)| told == token && ready.is_writable())
        };
        epoll.add(&stream, token, Interest::InputEdges).unwrap();
        assert!(!reported(&epoll));
        epoll.modify(&stream, token, Interest::Edges).unwrap();
        assert!(reported(&epoll), "room that was there before is reported");
        assert!(!reported(&epoll), "once");
    }

    #[test]
    fn a_wait_is_never_rounded_down_to_a_spin() {
        assert_eq!(
            whole_milliseconds(Duration::from_nanos(1)),
            Timespec { tv_sec: 0, tv_nsec: 1_000_000 }
        );
        assert_eq!(whole_milliseconds(Duration::ZERO), Timespec { tv_sec: 0, tv_nsec: 0 });
        assert_eq!(
            whole_milliseconds(Duration::from_millis(1500)),
            Timespec { tv_sec: 1, tv_nsec: 500_000_000 }
        );
    }
}
