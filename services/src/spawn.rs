//! Starts processes that are detached from this one and outlive it.

use super::init::unblock_signals;
use rustix::process::setsid;
use std::ffi::OsStr;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use tidegate_process::restore_descriptor_limit;
use tokio::process::Child;

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
/// input. Requires a tokio runtime.
///
/// # Errors
/// `program` cannot be executed, or the process limit is reached.
pub(super) fn spawn(program: &Path, directory: &Path, handshake: OwnedFd) -> io::Result<Child> {
    let mut command =
        detached(program, [OsStr::new(super::process::SUBCOMMAND), directory.as_os_str()])?;
    command.stdin(Stdio::from(handshake)).stdout(Stdio::null()).stderr(Stdio::inherit());
    tokio::process::Command::from(command).kill_on_drop(false).spawn()
}

/// Returns a command that runs `program`, a tidegate, with `arguments` and without relations to
/// this process: it has a session, signal dispositions and a working directory of its own, no
/// descriptors above 2, and no parent death signal, as fork(2) clears it.
///
/// # Errors
/// The path of `program` is relative and cannot be resolved.
pub(super) fn detached<const N: usize>(
    program: &Path,
    arguments: [&OsStr; N],
) -> io::Result<Command> {
    // The working directory changes before execve(2).
    let program = if program.components().count() > 1 {
        std::path::absolute(program)?
    } else {
        PathBuf::from(program)
    };
    let mut command = Command::new(program);
    command.arg0("tidegate").args(arguments).current_dir("/");
    for name in OF_THE_DAEMON {
        command.env_remove(name);
    }
    // SAFETY: `detach` makes system calls only, and neither allocates nor locks.
    unsafe { command.pre_exec(detach) };
    Ok(command)
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
    restore_descriptor_limit();
    // Only on execve(2): std reports its failure through one of these descriptors. Has no effect
    // before Linux 5.11; `process::run` closes them, too.
    let flags = libc::CLOSE_RANGE_CLOEXEC as libc::c_int;
    // SAFETY: descriptors stay open until execve(2).
    unsafe { libc::close_range(3, libc::c_uint::MAX, flags) };
    Ok(())
}
