//! Forked processes: copies of this process that perform one task.
//!
//! A process cannot leave a user namespace, and cannot read files after it gave up the file system.
//! Forked processes perform such tasks and send their results over a socket.

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::process::{
    Pid, Signal, WaitOptions, getpid, getppid, kill_process, set_parent_process_death_signal,
    waitpid,
};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

/// Maximum time that the drop waits for the process to exit. Callers may not reap orphans, so no
/// zombie should be left.
const MAX_WAIT: Duration = Duration::from_millis(500);

/// A forked copy of this process, killed and reaped on drop.
#[derive(Debug)]
pub(super) struct ForkedProcess {
    pid: Pid,
}

impl ForkedProcess {
    /// Runs `work` in a forked process, which ends after it or with this process. The forked
    /// process closes the descriptors `closed`, because the caller of this program waits for their
    /// last copy to be closed.
    ///
    /// Must be called while this process has a single thread. Another thread might hold a lock,
    /// which would stay locked in the forked process.
    pub(super) fn start(closed: &[BorrowedFd<'_>], work: impl FnOnce()) -> io::Result<Self> {
        let parent = getpid();
        // SAFETY: there is a single thread (see above), so the state of the copy is consistent.
        match unsafe { libc::fork() } {
            -1 => Err(io::Error::last_os_error()),
            0 => {
                let has_parent = set_parent_process_death_signal(Some(Signal::KILL)).is_ok()
                    // A parent that died before the call sends no signal.
                    && getppid() == Some(parent);
                for descriptor in closed {
                    // SAFETY: the owner of the descriptor also exists in the forked process, but is
                    // neither used nor dropped there.
                    unsafe { libc::close(descriptor.as_raw_fd()) };
                }
                if has_parent {
                    work();
                }
                // Skips exit handlers, which belong to the parent.
                // SAFETY: ends the process.
                unsafe { libc::_exit(0) }
            }
            pid => Ok(Self { pid: Pid::from_raw(pid).expect("fork(2) returns a process") }),
        }
    }
}

impl Drop for ForkedProcess {
    fn drop(&mut self) {
        // The pid stays valid until waitpid(2). In a sandbox, kill(2) fails. The process then ends
        // when its socket or pipe is closed, or with this process.
        let _ = kill_process(self.pid, Signal::KILL);
        for _ in 0..MAX_WAIT.as_millis() {
            match waitpid(Some(self.pid), WaitOptions::NOHANG) {
                Ok(None) | Err(rustix::io::Errno::INTR) => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                Ok(Some(_)) | Err(_) => return,
            }
        }
    }
}

/// A pair of connected sockets for messages.
pub(super) fn message_socket_pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?)
}
