//! The service manager that started this process: notifications to it (sd_notify(3)), and a socket
//! that it passes (sd_listen_fds(3)).
//!
//! Implemented here because the crate `sd-notify` (0.5) takes the name of an abstract socket for
//! the path of a file, and the rest is a few lines.

use rustix::io::{FdFlags, fcntl_getfd, fcntl_setfd};
use std::env;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

/// The number of the first descriptor that is passed (`SD_LISTEN_FDS_START`).
const FIRST: RawFd = 3;

/// Maximum time for a notification. The send blocks while the queue of the service manager is full.
const TIMEOUT: Duration = Duration::from_secs(1);

const NOTIFY_SOCKET: &str = "NOTIFY_SOCKET";
const LISTEN_FDS: &str = "LISTEN_FDS";
const LISTEN_PID: &str = "LISTEN_PID";
const LISTEN_FDNAMES: &str = "LISTEN_FDNAMES";

/// What the service manager gave to this process; nothing by default.
#[derive(Debug, Default)]
pub(crate) struct ServiceManager {
    /// The value of `NOTIFY_SOCKET`.
    notify: Option<OsString>,
    /// The inherited socket.
    socket: Option<OwnedFd>,
}

/// Why sockets of the service manager cannot be used.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ListenError {
    #[error(
        "{LISTEN_FDS}={0:?}: expected 1, the API socket as descriptor {FIRST}; use a single ListenStream= in the socket unit, or unset {LISTEN_FDS}"
    )]
    Count(OsString),
    #[error(
        "{LISTEN_PID}={0:?}: expected the ID of the process that {LISTEN_FDS} is for; unset both, or start the daemon by a socket unit"
    )]
    Process(OsString),
    #[error(
        "inherited descriptor {FIRST} ({LISTEN_FDS}=1) is not open; start the daemon by a socket unit, or unset {LISTEN_FDS}"
    )]
    Closed,
}

impl ServiceManager {
    /// Takes the notification socket and the inherited socket from the environment, so that child
    /// processes have neither.
    ///
    /// # Errors
    /// [`ListenError`]. `LISTEN_FDS` for another process (`LISTEN_PID`) is no error.
    ///
    /// # Safety
    /// There must be no other thread, because the environment changes, and nothing else may own
    /// descriptor 3 if `LISTEN_FDS` is set.
    pub(crate) unsafe fn from_environment() -> Result<Self, ListenError> {
        let take = |name| {
            let value = env::var_os(name);
            // SAFETY: the caller guarantees that there is no other thread.
            unsafe { env::remove_var(name) };
            value.filter(|value| !value.is_empty())
        };
        let [notify, count, process, _] =
            [NOTIFY_SOCKET, LISTEN_FDS, LISTEN_PID, LISTEN_FDNAMES].map(take);
        let socket = if is_passed(count, process, std::process::id())? {
            // SAFETY: the caller guarantees that nothing else owns it.
            Some(unsafe { inherit(FIRST) }.map_err(|_| ListenError::Closed)?)
        } else {
            None
        };
        Ok(Self { notify, socket })
    }

    /// Returns the inherited socket, the first time.
    pub(crate) fn take_socket(&mut self) -> Option<OwnedFd> {
        self.socket.take()
    }

    /// Reports that the API answers.
    pub(crate) fn notify_ready(&self) {
        self.notify("READY=1\nSTATUS=Networks are up, and the API is served");
    }

    /// Reports the start of a reload, which [`Self::notify_ready`] ends.
    pub(crate) fn notify_reloading(&self) {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
        let now = now.tv_sec * 1_000_000 + now.tv_nsec / 1_000;
        self.notify(&format!("RELOADING=1\nMONOTONIC_USEC={now}"));
    }

    /// Sends `state`: lines of `NAME=VALUE` (sd_notify(3)). A failure is logged, and does not stop
    /// the daemon.
    pub(crate) fn notify(&self, state: &str) {
        if let Some(socket) = &self.notify
            && let Err(error) = send(socket, state)
        {
            let socket = socket.to_string_lossy().into_owned();
            tracing::warn!(socket, %error, "service manager not notified");
        }
    }
}

/// Returns whether `LISTEN_FDS` and `LISTEN_PID` pass a socket to the process with the ID `own`.
fn is_passed(
    count: Option<OsString>,
    process: Option<OsString>,
    own: u32,
) -> Result<bool, ListenError> {
    let (Some(count), Some(process)) = (count, process) else { return Ok(false) };
    match number(&process) {
        Some(process) if process == own => {}
        Some(_) => return Ok(false),
        None => return Err(ListenError::Process(process)),
    }
    match number(&count) {
        Some(0) => Ok(false),
        Some(1) => Ok(true),
        _ => Err(ListenError::Count(count)),
    }
}

fn number(text: &OsStr) -> Option<u32> {
    text.to_str()?.parse().ok()
}

/// Takes the inherited descriptor `number`, and closes it on execve(2).
///
/// # Safety
/// Nothing else may own `number`.
unsafe fn inherit(number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: the descriptor is only queried; a number that is not open is an error.
    let flags = fcntl_getfd(unsafe { BorrowedFd::borrow_raw(number) })?;
    // SAFETY: it is open, and the caller guarantees that nothing else owns it.
    let descriptor = unsafe { OwnedFd::from_raw_fd(number) };
    fcntl_setfd(&descriptor, flags | FdFlags::CLOEXEC)?;
    Ok(descriptor)
}

/// Sends `state` to `socket`: an absolute path, or `@` and the name of an abstract socket.
fn send(socket: &OsStr, state: &str) -> io::Result<()> {
    let address = match socket.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        [b'/', ..] => SocketAddr::from_pathname(socket)?,
        _ => {
            let reason = format!("{NOTIFY_SOCKET} is neither an absolute path nor @NAME");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, reason));
        }
    };
    let sender = UnixDatagram::unbound()?;
    sender.set_write_timeout(Some(TIMEOUT))?;
    // A datagram is sent completely or not at all.
    sender.send_to_addr(state.as_bytes(), &address).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notifications_reach_a_path_and_an_abstract_name() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("notify");
        let name = format!("tidegate-notify-{}", std::process::id());
        let by_name = SocketAddr::from_abstract_name(&name).unwrap();
        for (receiver, address) in [
            (UnixDatagram::bind(&path).unwrap(), path.clone().into_os_string()),
            (UnixDatagram::bind_addr(&by_name).unwrap(), format!("@{name}").into()),
        ] {
            receiver.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
            send(&address, "READY=1").unwrap();
            let mut received = [0; 64];
            let length = receiver.recv(&mut received).unwrap();
            assert_eq!(&received[..length], b"READY=1");
        }
        for unknown in ["vsock:2:1234", "relative"] {
            assert!(send(unknown.as_ref(), "READY=1").is_err());
        }
    }

    /// The queue of a datagram socket is bounded by `net.unix.max_dgram_qlen`.
    #[test]
    fn a_service_manager_that_does_not_read_does_not_block_the_daemon() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("notify");
        let _receiver = UnixDatagram::bind(&path).unwrap();
        let sent = (0..100_000).map(|_| send(path.as_os_str(), "STATUS=x")).find_map(Result::err);
        assert_eq!(sent.map(|error| error.kind()), Some(io::ErrorKind::WouldBlock));
    }

    #[test]
    fn a_socket_is_passed_to_one_process() {
        let passed =
            |count: &str, process: &str| is_passed(Some(count.into()), Some(process.into()), 4711);
        assert_eq!(passed("1", "4711"), Ok(true));
        assert_eq!(passed("0", "4711"), Ok(false));
        assert_eq!(passed("2", "4712"), Ok(false), "for another process");
        assert_eq!(passed("2", "4711"), Err(ListenError::Count("2".into())));
        assert_eq!(passed("-1", "4711"), Err(ListenError::Count("-1".into())));
        assert_eq!(passed("1", "self"), Err(ListenError::Process("self".into())));
        assert_eq!(is_passed(Some("1".into()), None, 4711), Ok(false));
        assert_eq!(is_passed(None, Some("4711".into()), 4711), Ok(false));
    }
}
