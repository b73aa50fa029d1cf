//! How the proxy tells dockerd that it is ready, or why it is not: descriptor 3.
//!
//! `0` and a newline mean success, `1`, a newline and a text mean failure. The daemon reads two
//! bytes once and compares, so success must be one write(2). (moby,
//! `cmd/docker-proxy/main_linux.go`; measured with 20.10.)

use rustix::fs::{FileType, fstat};
use rustix::io::write;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd};

/// The descriptor that dockerd hands the pipe down as.
const STATUS_FD: i32 = 3;

/// The pipe to the daemon, if there is one: by hand the proxy is started without.
#[derive(Debug)]
pub(super) struct ReadyPipe(Option<OwnedFd>);

impl ReadyPipe {
    /// Takes the pipe over. To be called before this process has opened anything: then descriptor 3
    /// is open only if it was handed down.
    pub(super) fn inherit() -> Self {
        // SAFETY: only looked at; a number that is not open is an error.
        let status = fstat(unsafe { BorrowedFd::borrow_raw(STATUS_FD) });
        let is_channel = status.is_ok_and(|status| {
            matches!(FileType::from_raw_mode(status.st_mode), FileType::Fifo | FileType::Socket)
        });
        // SAFETY: it is open, and nothing in this process owns it.
        Self(is_channel.then(|| unsafe { OwnedFd::from_raw_fd(STATUS_FD) }))
    }

    /// Ready: the port is bound.
    pub(super) fn succeeded(self) {
        self.tell(b"0\n");
    }

    /// Not started; the daemon shows `reason` to its user.
    pub(super) fn failed(self, reason: &str) {
        self.tell(format!("1\n{reason}").as_bytes());
    }

    fn tell(self, message: &[u8]) {
        if let Some(pipe) = self.0 {
            // A daemon that has gone away is not told; its death ends us (PR_SET_PDEATHSIG, set by
            // it).
            let _ = write(&pipe, message);
        }
    }
}
