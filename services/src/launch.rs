//! Starts a service's init as PID 1 of a new PID namespace.
//!
//! `unshare(CLONE_NEWPID)` affects the future *children* of the calling thread. Reverting it takes
//! privileges that a rootless caller lacks, so a temporary thread calls it and starts the init.
//! `PR_SET_PDEATHSIG` refers to the parent thread. The init therefore sets it only after it has
//! received its request. By then the kernel has released the temporary thread
//! ([`in_ended_thread`]) and reparented the init to the first living thread of the process, which
//! is the main thread (`find_alive_thread`, kernel/exit.c).

use super::protocol::StartRequest;
use crate::ServiceSpec;
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::thread::{UnshareFlags, gettid, unshare_unsafe};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};
use tidegate_process::restore_descriptor_limit;
use tokio::net::UnixStream;
use tokio::process::{Child, ChildStderr, ChildStdout, Command};
use tokio::runtime::Handle;

/// Variables that a service inherits from this process.
const INHERITED: [&str; 5] = ["PATH", "HOME", "LANG", "TERM", "USER"];

/// `PATH` of a service if it is not set.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Maximum time for the kernel to release a thread that has returned. It usually takes a few µs.
const THREAD_RELEASE_TIMEOUT: Duration = Duration::from_secs(10);

/// A service's init that waits for its [`StartRequest`]. Killed on drop.
pub(super) struct Launched {
    pub(super) init: Child,
    pub(super) socket: UnixStream,
    pub(super) stdout: Option<ChildStdout>,
    pub(super) stderr: Option<ChildStderr>,
}

/// Starts `program`, usually this one, as the init of `spec`. Requires a tokio runtime.
pub(super) fn launch(program: &Path, spec: &ServiceSpec) -> io::Result<Launched> {
    let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
    ours.set_nonblocking(true)?;
    let socket = UnixStream::from_std(ours)?;
    let mut command = Command::new(program);
    command
        .args([super::init::SUBCOMMAND, &spec.name])
        // The init needs no environment. That of the command is part of the request.
        .env_clear()
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    let namespace = spec.namespace.clone();
    // SAFETY: the closure makes three system calls and neither allocates nor locks.
    unsafe {
        command.pre_exec(move || {
            // PID 1 ignores signals without a handler, but blocked ones stay pending until it reads
            // them.
            block_signals();
            restore_descriptor_limit();
            Ok(fcntl_setfd(namespace.as_fd(), FdFlags::empty())?)
        });
    }
    let runtime = Handle::current();
    let mut init = in_ended_thread(|| {
        let _runtime = runtime.enter();
        // SAFETY: affects only the PID namespace of children, and nothing that threads share.
        unsafe { unshare_unsafe(UnshareFlags::NEWPID) }?;
        command.spawn()
    })??;
    let (stdout, stderr) = (init.stdout.take(), init.stderr.take());
    Ok(Launched { init, socket, stdout, stderr })
}

/// Calls `call` in a temporary thread. Returns after the kernel has released that thread and
/// reparented its children.
///
/// Joining is not sufficient: the kernel wakes the joining thread (`mm_release`) before it sends
/// death signals to children (`exit_notify`). A child that sets `PR_SET_PDEATHSIG` between the two
/// is killed.
fn in_ended_thread<T: Send>(call: impl FnOnce() -> T + Send) -> io::Result<T> {
    let (tid, result) = std::thread::scope(|scope| scope.spawn(|| (gettid(), call())).join())
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    let task = PathBuf::from(format!("/proc/self/task/{}", tid.as_raw_nonzero()));
    let deadline = Instant::now() + THREAD_RELEASE_TIMEOUT;
    while task.try_exists()? {
        if Instant::now() > deadline {
            return Err(io::Error::new(
                io::ErrorKind::TimedOut,
                "the starting thread does not end",
            ));
        }
        std::thread::yield_now();
    }
    Ok(result)
}

/// Blocks all signals for the calling thread and the program that it executes. Async-signal-safe.
fn block_signals() {
    let mut all = MaybeUninit::uninit();
    // SAFETY: `sigfillset` initialises the set that the second call reads; neither can fail on
    // valid pointers.
    unsafe {
        libc::sigfillset(all.as_mut_ptr());
        libc::pthread_sigmask(libc::SIG_BLOCK, all.as_ptr(), std::ptr::null_mut());
    }
}

/// Returns the request for `spec`, whose files are in the directory `files`.
pub(super) fn start_request(spec: &ServiceSpec, files: &Path) -> io::Result<StartRequest> {
    let mut environment = spec.environment.clone();
    for name in INHERITED {
        if let Some(value) = std::env::var(name).ok().filter(|_| !environment.contains_key(name)) {
            environment.insert(name.to_owned(), value);
        }
    }
    environment.entry("PATH".to_owned()).or_insert_with(|| DEFAULT_PATH.to_owned());
    Ok(StartRequest {
        namespace: spec.namespace.as_fd().as_raw_fd(),
        hostname: spec.hostname.clone(),
        files: std::path::absolute(files)?,
        command: spec.command.clone(),
        environment,
        working_dir: spec.working_dir.clone(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// About one in a hundred threads that are only joined still exists afterwards.
    #[test]
    fn the_thread_is_released_when_the_call_returns() {
        for _ in 0..5000 {
            let tid = in_ended_thread(gettid).unwrap();
            assert!(!Path::new(&format!("/proc/self/task/{}", tid.as_raw_nonzero())).exists());
        }
    }
}
