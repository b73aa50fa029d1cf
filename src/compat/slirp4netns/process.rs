//! Processes of one's own: a copy of this one that does one thing and ends.
//!
//! What enters a user namespace cannot come back, and what gives up its files cannot read them any
//! more. So both are done by copies, which have their results sent over a socket.

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::process::{
    Pid, Signal, WaitOptions, getpid, getppid, kill_process, set_parent_process_death_signal,
    waitpid,
};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

/// How long the end of one is waited for, so that whoever does not reap orphans has none to reap.
const LONGEST_END: Duration = Duration::from_millis(500);

/// A copy of this process, killed and reaped when dropped.
#[derive(Debug)]
pub(super) struct Copy {
    pid: Pid,
}

impl Copy {
    /// Starts `work` in a copy of this process, which ends with it, or with this process. `callers`
    /// are descriptors at whose closing somebody waits: the copy has them no more.
    ///
    /// To be called while this process has but one thread: another one might hold a lock that
    /// nobody in the copy would ever release.
    pub(super) fn start(callers: &[BorrowedFd<'_>], work: impl FnOnce()) -> io::Result<Self> {
        let parent = getpid();
        // SAFETY: there is one thread (see above), so the copy is whole.
        match unsafe { libc::fork() } {
            -1 => Err(io::Error::last_os_error()),
            0 => {
                let lives = set_parent_process_death_signal(Some(Signal::KILL)).is_ok()
                    // Gone before the request was in place, it would send no signal.
                    && getppid() == Some(parent);
                for descriptor in callers {
                    // SAFETY: what owns it is in the copy too, and is never looked at or dropped
                    // there.
                    unsafe { libc::close(descriptor.as_raw_fd()) };
                }
                if lives {
                    work();
                }
                // Nothing of what the parent has set up for its own end is to be run here.
                // SAFETY: ends the process.
                unsafe { libc::_exit(0) }
            }
            pid => Ok(Self { pid: Pid::from_raw(pid).expect("fork(2) returns a process") }),
        }
    }
}

impl Drop for Copy {
    fn drop(&mut self) {
        // It is ours until it is waited for, whatever has become of it. In a sandbox nobody may be
        // killed: it ends by itself when what it talks into is closed, or else with this process.
        let _ = kill_process(self.pid, Signal::KILL);
        for _ in 0..LONGEST_END.as_millis() {
            match waitpid(Some(self.pid), WaitOptions::NOHANG) {
                Ok(None) | Err(rustix::io::Errno::INTR) => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                Ok(Some(_)) | Err(_) => return,
            }
        }
    }
}

/// Two ends of a line for messages.
pub(super) fn line() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?)
}
