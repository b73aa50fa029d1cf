//! Starts a service's init as the first process of a new PID namespace.
//!
//! `unshare(CLONE_NEWPID)` concerns the *children* that the calling thread makes from then on, and
//! undoing it takes privileges that a rootless caller lacks. So a thread of its own does it, starts
//! the init, and ends. The init asks for `PR_SET_PDEATHSIG` only when its order has come, which is
//! after the kernel has released that thread ([`in_ended_thread`]): by then its parent is the
//! process's main thread (`find_alive_thread` of `kernel/exit.c`: the first in the list that
//! lives), whichever thread called here.

use super::protocol::Order;
use crate::services::ServiceSpec;
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::thread::{UnshareFlags, gettid, unshare_unsafe};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};
use tokio::net::UnixStream;
use tokio::process::{Child, ChildStderr, ChildStdout, Command};
use tokio::runtime::Handle;

/// What is inherited from this process's environment.
const INHERITED: [&str; 5] = ["PATH", "HOME", "LANG", "TERM", "USER"];

/// What stands for a `PATH` that is not set.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// How long the kernel may take to release a thread that has returned. Microseconds, as a rule.
const THREAD_ENDS: Duration = Duration::from_secs(10);

/// A service's init, waiting for its [`Order`]. Killed when dropped.
pub(super) struct Launched {
    pub(super) init: Child,
    pub(super) socket: UnixStream,
    pub(super) stdout: Option<ChildStdout>,
    pub(super) stderr: Option<ChildStderr>,
}

/// Starts `program` (this one, as a rule) as the init of `spec`. On a tokio runtime only.
pub(super) fn launch(program: &Path, spec: &ServiceSpec) -> io::Result<Launched> {
    let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
    ours.set_nonblocking(true)?;
    let socket = UnixStream::from_std(ours)?;
    let mut command = Command::new(program);
    command
        .args([super::init::SUBCOMMAND, &spec.name])
        // Its own environment means nothing to it; the command's comes with the order.
        .env_clear()
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    let namespace = spec.namespace.clone();
    // SAFETY: the closure makes two system calls and neither allocates nor locks.
    unsafe {
        command.pre_exec(move || {
            // PID 1 ignores what it does not handle; what is blocked waits until it does.
            block_signals();
            Ok(fcntl_setfd(namespace.as_fd(), FdFlags::empty())?)
        });
    }
    let runtime = Handle::current();
    let mut init = in_ended_thread(|| {
        let _runtime = runtime.enter();
        // SAFETY: nothing that this thread shares with others changes, only where its children are
        // born.
        unsafe { unshare_unsafe(UnshareFlags::NEWPID) }?;
        command.spawn()
    })??;
    let (stdout, stderr) = (init.stdout.take(), init.stderr.take());
    Ok(Launched { init, socket, stdout, stderr })
}

/// Calls `call` in a thread of its own, and returns when the kernel has released that thread and
/// handed on its children.
///
/// Joining is not enough: the kernel wakes who joins (`mm_release`) before it looks which children
/// want a signal at the thread's end (`exit_notify`). A child that asks for one in between is
/// killed.
fn in_ended_thread<T: Send>(call: impl FnOnce() -> T + Send) -> io::Result<T> {
    let (tid, result) = std::thread::scope(|scope| scope.spawn(|| (gettid(), call())).join())
        .map_err(|_| io::Error::other("the starting thread panicked"))?;
    let task = PathBuf::from(format!("/proc/self/task/{}", tid.as_raw_nonzero()));
    let deadline = Instant::now() + THREAD_ENDS;
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

/// Blocks every signal for the calling thread and what it executes. Async-signal-safe.
fn block_signals() {
    let mut all = MaybeUninit::uninit();
    // SAFETY: `sigfillset` initialises the set that the second call reads; neither can fail on
    // valid pointers.
    unsafe {
        libc::sigfillset(all.as_mut_ptr());
        libc::pthread_sigmask(libc::SIG_BLOCK, all.as_ptr(), std::ptr::null_mut());
    }
}

/// The order for `spec`, whose files are in `files`.
pub(super) fn order(spec: &ServiceSpec, files: &Path) -> io::Result<Order> {
    let mut environment = spec.environment.clone();
    for name in INHERITED {
        if let Some(value) = std::env::var(name).ok().filter(|_| !environment.contains_key(name)) {
            environment.insert(name.to_owned(), value);
        }
    }
    environment.entry("PATH".to_owned()).or_insert_with(|| DEFAULT_PATH.to_owned());
    Ok(Order {
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

    /// One in a hundred of threads that are only joined is still there afterwards.
    #[test]
    fn the_thread_is_gone_when_the_call_returns() {
        for _ in 0..5000 {
            let tid = in_ended_thread(gettid).unwrap();
            assert!(!Path::new(&format!("/proc/self/task/{}", tid.as_raw_nonzero())).exists());
        }
    }
}
