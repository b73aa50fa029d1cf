//! The host's resolvers, told by a process of its own.
//!
//! The engine opens no file when it is sandboxed, and `/etc/resolv.conf` changes with every network
//! that a laptop sees. So a copy of this process stays outside, reads the file whenever it has
//! changed, and sends what it says over a pipe; nothing goes the other way. It ends with this
//! process.

use super::process::Copy;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::pipe::{PipeFlags, pipe_with};
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use tidegate_dns::{REST, Watch, servers};
use tidegate_netns::Namespace;

/// Where the host says whom to ask.
const RESOLV_CONF: &str = "/etc/resolv.conf";

/// How many servers are told: glibc asks three.
const MOST_SERVERS: usize = 8;

/// More than they take.
const LONGEST: usize = 1024;

/// How long the first word is waited for, in seconds; the file may be on a slow disk.
const PATIENCE: i64 = 5;

/// Word of the host's resolvers.
#[derive(Debug)]
pub(super) struct Resolvers {
    words: OwnedFd,
    _reader: Copy,
}

impl Resolvers {
    /// Begins to follow them, and returns those of now. `callers` is of [`Copy::start`].
    ///
    /// To be called while this process has but one thread.
    pub(super) fn follow(callers: &[BorrowedFd<'_>]) -> io::Result<(Self, Vec<SocketAddr>)> {
        // A packet for each word, never a part of one (pipe(7)).
        let (words, teller) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::DIRECT)?;
        // It has to see when nobody listens any more, itself included.
        let callers: Vec<BorrowedFd<'_>> = callers.iter().copied().chain([words.as_fd()]).collect();
        let reader = Copy::start(&callers, || tell(&teller))?;
        drop(callers);
        drop(teller);
        let mut polled = [PollFd::new(&words, PollFlags::IN)];
        let patience = Timespec { tv_sec: PATIENCE, tv_nsec: 0 };
        while poll(&mut polled, Some(&patience)) == Err(rustix::io::Errno::INTR) {}
        if polled[0].revents().is_empty() {
            return Err(io::Error::new(
                io::ErrorKind::TimedOut,
                format!("{RESOLV_CONF} cannot be read for {PATIENCE} s"),
            ));
        }
        let resolvers = Self { words, _reader: reader };
        let now = resolvers.next()?.unwrap_or_default();
        Ok((resolvers, now))
    }

    /// What they are now, when the descriptor can be read. `None`: there will be no more word.
    pub(super) fn next(&self) -> io::Result<Option<Vec<SocketAddr>>> {
        let mut bytes = [0; LONGEST];
        let length = rustix::io::read(&self.words, &mut bytes)?;
        Ok((length > 0).then(|| parse(&bytes[..length])))
    }
}

impl AsFd for Resolvers {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.words.as_fd()
    }
}

/// In the copy: reads and tells, until nobody listens.
fn tell(teller: &OwnedFd) {
    let path = Path::new(RESOLV_CONF);
    let Ok(here) = Namespace::current() else { return };
    crate::confine::follower(path);
    let mut told = None;
    loop {
        // Before it is read, so that no change falls in between.
        let watch = Watch::new(path).ok();
        let now = servers(path, &here).map(|servers| text(&servers));
        if let Some(now) = now.filter(|now| told.as_ref() != Some(now)) {
            if rustix::io::write(teller, now.as_bytes()).is_err() {
                return;
            }
            told = Some(now);
        } else if told.is_none() {
            // Unreadable from the start: that there are none is word too.
            let _ = rustix::io::write(teller, b"\n");
            told = Some(String::new());
        }
        crate::compat::start_up_pages::give_back();
        if !wait(watch.as_ref(), teller) {
            return;
        }
        std::thread::sleep(REST);
    }
}

/// Waits for a change; without a watch, for a while. False when nobody listens any more.
fn wait(watch: Option<&Watch>, teller: &OwnedFd) -> bool {
    loop {
        let mut polled = vec![PollFd::new(teller, PollFlags::empty())];
        polled.extend(watch.map(|watch| PollFd::new(watch, PollFlags::IN)));
        let a_while = Timespec { tv_sec: 30, tv_nsec: 0 };
        let over = poll(&mut polled, watch.is_none().then_some(&a_while));
        if !polled[0].revents().is_empty() {
            return false;
        }
        match (over, watch) {
            (Err(rustix::io::Errno::INTR), _) => {}
            (Err(_), _) | (Ok(_), None) => return over.is_ok(),
            (Ok(_), Some(watch)) => match watch.has_changed() {
                Ok(true) => return true,
                Ok(false) => {}
                Err(_) => return false,
            },
        }
    }
}

fn text(servers: &[SocketAddr]) -> String {
    let words: Vec<String> = servers.iter().take(MOST_SERVERS).map(ToString::to_string).collect();
    words.join(" ") + "\n"
}

fn parse(bytes: &[u8]) -> Vec<SocketAddr> {
    let text = String::from_utf8_lossy(bytes);
    text.split_ascii_whitespace().filter_map(|word| word.parse().ok()).take(MOST_SERVERS).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_told_is_what_is_heard() {
        let servers = ["192.0.2.53:53", "[2001:db8::53]:53", "[fe80::53%2]:53"];
        let servers: Vec<SocketAddr> =
            servers.iter().map(|server| server.parse().unwrap()).collect();
        assert_eq!(parse(text(&servers).as_bytes()), servers);
        let many: Vec<SocketAddr> = std::iter::repeat_n(servers[2], 100).collect();
        assert_eq!(parse(text(&many).as_bytes()).len(), MOST_SERVERS);
        assert!(text(&many).len() <= LONGEST);
        assert_eq!(parse(b"nonsense 1.2.3.4 \xff\n"), []);
    }
}
