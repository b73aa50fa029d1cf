//! The report of readiness or failure to dockerd, on descriptor 3.
//!
//! The message is `0` and a newline for success, or `1`, a newline and a text for failure. The
//! daemon reads two bytes once and compares them, so success must be a single write(2). (moby,
//! `cmd/docker-proxy/main_linux.go`; measured with 20.10.)

use rustix::fs::{FileType, fstat};
use rustix::io::write;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd};

/// The descriptor of the pipe to dockerd.
const STATUS_FD: i32 = 3;

/// The pipe to the daemon. There is none if the proxy is started by hand.
#[derive(Debug)]
pub(super) struct ReadyPipe(Option<OwnedFd>);

impl ReadyPipe {
    /// Takes over the pipe. Must be called before this process opens anything: only then is
    /// descriptor 3 open exactly if it was inherited.
    pub(super) fn inherit() -> Self {
        // SAFETY: the descriptor is only queried; a number that is not open is an error.
        let status = fstat(unsafe { BorrowedFd::borrow_raw(STATUS_FD) });
        let is_channel = status.is_ok_and(|status| {
            matches!(FileType::from_raw_mode(status.st_mode), FileType::Fifo | FileType::Socket)
        });
        // SAFETY: it is open, and has no other owner in this process.
        Self(is_channel.then(|| unsafe { OwnedFd::from_raw_fd(STATUS_FD) }))
    }

    /// Reports readiness: the port is bound.
    pub(super) fn succeeded(self) {
        self.send(b"0\n");
    }

    /// Reports a failure. The daemon shows `reason` to its user.
    pub(super) fn failed(self, reason: &str) {
        self.send(format!("1\n{reason}").as_bytes());
    }

    fn send(self, message: &[u8]) {
        if let Some(pipe) = self.0 {
            // An error means that the daemon has exited. Its PR_SET_PDEATHSIG then kills this
            // process as well.
            let _ = write(&pipe, message);
        }
    }
}
