//! Starts a supervisor process, detached from this one.

use super::init::unblock_signals;
use rustix::process::setsid;
use std::ffi::OsStr;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use tokio::process::{Child, Command};

/// Variables of the service manager that refer to the daemon (sd_listen_fds(3), sd_notify(3)).
const OF_THE_DAEMON: [&str; 6] = [
    "LISTEN_FDS",
    "LISTEN_FDNAMES",
    "LISTEN_PID",
    "NOTIFY_SOCKET",
    "WATCHDOG_PID",
    "WATCHDOG_USEC",
];

/// Starts `program` as the supervisor process of `directory`, with `handshake` as its standard
/// input. It has no parent death signal, as fork(2) clears it. Requires a tokio runtime.
///
/// # Errors
/// `program` cannot be executed, or the process limit is reached.
pub(super) fn spawn(program: &Path, directory: &Path, handshake: OwnedFd) -> io::Result<Child> {
    // The working directory changes before execve(2).
    let program = if program.components().count() > 1 {
        std::path::absolute(program)?
    } else {
        PathBuf::from(program)
    };
    let mut command = Command::new(program);
    command
        .arg0("tidegate")
        .args([OsStr::new(super::process::SUBCOMMAND), directory.as_os_str()])
        .current_dir("/")
        .stdin(Stdio::from(handshake))
        .stdout(Stdio::null())
        .stderr(Stdio::inherit())
        .kill_on_drop(false);
    for name in OF_THE_DAEMON {
        command.env_remove(name);
    }
    // SAFETY: `detach` makes system calls only, and neither allocates nor locks.
    unsafe { command.pre_exec(detach) };
    command.spawn()
}

/// Detaches the calling process from the session, signal settings and descriptors of the daemon.
/// Async-signal-safe.
fn detach() -> io::Result<()> {
    // A signal to the process group or from the terminal of the daemon must not reach it.
    setsid()?;
    // execve(2) keeps ignored and blocked signals. Fails for the numbers of SIGKILL and SIGSTOP,
    // and for those that the C library uses.
    for signal in 1..=libc::SIGRTMAX() {
        // SAFETY: SIG_DFL is a valid disposition of every signal.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    unblock_signals();
    // Only on execve(2): std reports its failure through one of these descriptors. Has no effect
    // before Linux 5.11; `process::run` closes them, too.
    let flags = libc::CLOSE_RANGE_CLOEXEC as libc::c_int;
    // SAFETY: descriptors stay open until execve(2).
    unsafe { libc::close_range(3, libc::c_uint::MAX, flags) };
    Ok(())
}
