//! The resolvers of the host, read by a forked process.
//!
//! The sandboxed engine cannot open files, and `/etc/resolv.conf` changes with every network that a
//! laptop joins. So a forked process stays outside of the sandbox, reads the file on each change,
//! and sends the servers over a pipe. Nothing is sent in the other direction. The forked process
//! ends with this process.

use super::process::ForkedProcess;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::pipe::{PipeFlags, pipe_with};
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use tidegate_dns::{REST, Watch, servers};
use tidegate_netns::Namespace;

/// The file with the resolvers of the host.
const RESOLV_CONF: &str = "/etc/resolv.conf";

/// Maximum number of servers in an update; glibc uses three.
const MAX_SERVERS: usize = 8;

/// The size of the buffer for an update in bytes, enough for [`MAX_SERVERS`].
const MAX_UPDATE: usize = 1024;

/// Timeout of the first update in seconds. The file may be on a slow disk.
const TIMEOUT: i64 = 5;

/// Receives updates of the resolvers.
#[derive(Debug)]
pub(super) struct Resolvers {
    updates: OwnedFd,
    _reader: ForkedProcess,
}

impl Resolvers {
    /// Starts the reader, and returns the current resolvers. `caller_fds` are closed in the reader,
    /// see [`ForkedProcess::start`].
    ///
    /// Must be called while this process has a single thread.
    pub(super) fn follow(caller_fds: &[BorrowedFd<'_>]) -> io::Result<(Self, Vec<SocketAddr>)> {
        // Packet mode keeps the boundaries of updates (O_DIRECT, pipe(2)).
        let (updates, sender) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::DIRECT)?;
        // The reader must not keep the receiving end open itself, or it would not notice its close.
        let closed: Vec<BorrowedFd<'_>> =
            caller_fds.iter().copied().chain([updates.as_fd()]).collect();
        let reader = ForkedProcess::start(&closed, || send_updates(&sender))?;
        drop(closed);
        drop(sender);
        let mut polled = [PollFd::new(&updates, PollFlags::IN)];
        let timeout = Timespec { tv_sec: TIMEOUT, tv_nsec: 0 };
        while poll(&mut polled, Some(&timeout)) == Err(rustix::io::Errno::INTR) {}
        if polled[0].revents().is_empty() {
            return Err(io::Error::new(
                io::ErrorKind::TimedOut,
                format!("{RESOLV_CONF} not readable within {TIMEOUT} s"),
            ));
        }
        let resolvers = Self { updates, _reader: reader };
        let now = resolvers.next()?.unwrap_or_default();
        Ok((resolvers, now))
    }

    /// Reads an update when the descriptor is readable. `None`: the reader has ended.
    pub(super) fn next(&self) -> io::Result<Option<Vec<SocketAddr>>> {
        let mut bytes = [0; MAX_UPDATE];
        let length = rustix::io::read(&self.updates, &mut bytes)?;
        Ok((length > 0).then(|| parse(&bytes[..length])))
    }
}

impl AsFd for Resolvers {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.updates.as_fd()
    }
}

/// In the forked process: sends updates until the receiver closes the pipe.
fn send_updates(sender: &OwnedFd) {
    let path = Path::new(RESOLV_CONF);
    let Ok(here) = Namespace::current() else { return };
    tidegate_process::confine::confine_resolv_conf_watch(path);
    let mut sent = None;
    loop {
        // Watched before the file is read, so that no change is missed.
        let watch = Watch::new(path).ok();
        let now = servers(path, &here).map(|servers| text(&servers));
        if let Some(now) = now.filter(|now| sent.as_ref() != Some(now)) {
            if rustix::io::write(sender, now.as_bytes()).is_err() {
                return;
            }
            sent = Some(now);
        } else if sent.is_none() {
            // The file is unreadable at the start; an empty update reports that there are none.
            let _ = rustix::io::write(sender, b"\n");
            sent = Some(String::new());
        }
        tidegate_process::startup_pages::release();
        if !wait(watch.as_ref(), sender) {
            return;
        }
        std::thread::sleep(REST);
    }
}

/// Waits for a change or, without a watch, for 30 s. Returns false when the receiver has closed the
/// pipe.
fn wait(watch: Option<&Watch>, sender: &OwnedFd) -> bool {
    loop {
        let mut polled = vec![PollFd::new(sender, PollFlags::empty())];
        polled.extend(watch.map(|watch| PollFd::new(watch, PollFlags::IN)));
        let interval = Timespec { tv_sec: 30, tv_nsec: 0 };
        let over = poll(&mut polled, watch.is_none().then_some(&interval));
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
    let words: Vec<String> = servers.iter().take(MAX_SERVERS).map(ToString::to_string).collect();
    words.join(" ") + "\n"
}

fn parse(bytes: &[u8]) -> Vec<SocketAddr> {
    let text = String::from_utf8_lossy(bytes);
    text.split_ascii_whitespace().filter_map(|word| word.parse().ok()).take(MAX_SERVERS).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_update_is_parsed_to_the_servers_sent() {
        let servers = ["192.0.2.53:53", "[2001:db8::53]:53", "[fe80::53%2]:53"];
        let servers: Vec<SocketAddr> =
            servers.iter().map(|server| server.parse().unwrap()).collect();
        assert_eq!(parse(text(&servers).as_bytes()), servers);
        let many: Vec<SocketAddr> = std::iter::repeat_n(servers[2], 100).collect();
        assert_eq!(parse(text(&many).as_bytes()).len(), MAX_SERVERS);
        assert!(text(&many).len() <= MAX_UPDATE);
        assert_eq!(parse(b"nonsense 1.2.3.4 \xff\n"), []);
    }
}
