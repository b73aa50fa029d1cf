//! `tidegate namespace-keeper`: a process that keeps the namespaces of a daemon without root alive.
//! Internal, not for users.
//!
//! The networks of such a daemon are in a network namespace that belongs to a user namespace of its
//! own. Both would end with the daemon. The keeper is a member of both and does nothing else. The
//! next daemon joins them, so the networks continue to exist as those of a daemon with root do.
//!
//! The keeper holds a lock on a file (flock(2)), its standard input, and writes its process ID to
//! it. The kernel releases the lock when the process ends.

use super::process::create_private;
use super::spawn::detached;
use rustix::fs::{FlockOperation, OFlags, flock};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, geteuid, pidfd_open, pidfd_send_signal};
use rustix::thread::{CapabilitySet, LinkNameSpaceType, move_into_link_name_space};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{ExitCode, Stdio};
use std::time::{Duration, Instant};
use tidegate_model::without_errno;
use tidegate_netns::{HostContext, HostContextError, Lock, Namespace, lock_file};
use tidegate_process::confine::drop_privileges;
use tidegate_process::{EXIT_FAILURE, EXIT_USAGE};

/// The subcommand that runs this program as a keeper.
pub const SUBCOMMAND: &str = "namespace-keeper";

/// The locked file in the directory of the daemon.
const LOCK: &str = "namespaces.lock";

/// Maximum time until a keeper that has been started writes its process ID.
const START_TIMEOUT: Duration = Duration::from_secs(5);

/// Pause before a file without a process ID is read again.
const PAUSE: Duration = Duration::from_millis(5);

/// The namespaces of a daemon cannot be created, kept, or joined.
#[derive(Debug, thiserror::Error)]
pub enum KeeperError {
    /// The namespaces cannot be created.
    #[error(transparent)]
    Create(#[from] HostContextError),
    /// The lock file cannot be created or read.
    #[error("{}: {}", .path.display(), without_errno(&.source.to_string()))]
    File {
        /// The file.
        path: PathBuf,
        /// Error of the system call.
        source: io::Error,
    },
    /// The keeper cannot be started.
    #[error("start a process that keeps the namespaces: {}", without_errno(&.0.to_string()))]
    Start(io::Error),
    /// The keeper has ended at once.
    #[error(
        "the process that keeps the namespaces has ended; check that the directory of runtime files has free space"
    )]
    Ended,
    /// The keeper has not written its process ID.
    #[error("{}: has no process ID, but is locked; end the process that holds it (fuser {})", .0.display(), .0.display())]
    NoProcess(PathBuf),
    /// The namespaces of the keeper cannot be joined.
    #[error("join the namespaces of process {pid}, which contain the networks of the daemon: {}; start the daemon in the user namespace of the previous one, or end that process with kill {pid}, which removes the networks", without_errno(&.source.to_string()))]
    Join {
        /// The keeper.
        pid: i32,
        /// Error of the system call.
        source: io::Error,
    },
}

/// A process that keeps the namespaces of a daemon alive.
#[derive(Debug)]
pub struct Keeper {
    lock: PathBuf,
    process: OwnedFd,
    is_new: bool,
}

impl Keeper {
    /// Returns the namespaces for a daemon with the runtime files in `directory`. If this process
    /// can create networks in its own namespace, that is all. Otherwise, it joins the namespaces of
    /// the keeper in `directory`, or creates namespaces and starts a keeper, `program`, for them.
    ///
    /// Must be called while the process is single-threaded.
    ///
    /// # Errors
    /// [`KeeperError`]. Nothing was started.
    pub fn namespaces(
        program: &Path,
        directory: &Path,
    ) -> Result<(HostContext, Option<Self>), KeeperError> {
        if Namespace::current_is_enterable() {
            return Ok((HostContext::here().map_err(HostContextError::Current)?, None));
        }
        let path = directory.join(LOCK);
        let failed = |source| KeeperError::File { path: path.clone(), source };
        let deadline = Instant::now() + START_TIMEOUT;
        loop {
            if let Some(keeper) = find(&path)? {
                return Ok((join(&keeper)?, Some(keeper.handle(path, false))));
            }
            create_private(directory).map_err(failed)?;
            match lock_file(&path).map_err(failed)? {
                Lock::Acquired(file) => {
                    let context = HostContext::for_networks()?;
                    start(program, file, context.networks()).map_err(KeeperError::Start)?;
                    let keeper = find(&path)?.ok_or(KeeperError::Ended)?;
                    return Ok((context, Some(keeper.handle(path, true))));
                }
                // Another daemon has started one concurrently.
                Lock::Held(_) if Instant::now() < deadline => {}
                Lock::Held(_) => return Err(KeeperError::NoProcess(path)),
            }
        }
    }

    /// Returns whether [`namespaces`](Self::namespaces) has started the process.
    #[must_use]
    pub fn is_new(&self) -> bool {
        self.is_new
    }

    /// Ends the process. The namespaces end with the last process that uses them.
    pub fn end(self) {
        // A process that has ended already is not an error.
        let _ = fs::remove_file(&self.lock);
        let _ = pidfd_send_signal(&self.process, Signal::KILL);
    }
}

/// A keeper that runs.
struct Found {
    pid: Pid,
    process: OwnedFd,
    user: File,
    networks: Namespace,
}

impl Found {
    fn handle(self, lock: PathBuf, is_new: bool) -> Keeper {
        Keeper { lock, process: self.process, is_new }
    }
}

/// Returns the keeper that holds the lock at `path`.
fn find(path: &Path) -> Result<Option<Found>, KeeperError> {
    let failed = |source| KeeperError::File { path: path.to_owned(), source };
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed();
    let mut file = match OpenOptions::new().read(true).custom_flags(flags).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(error)),
    };
    // A file of another user could name any process.
    if !file.metadata().is_ok_and(|there| there.is_file() && there.uid() == geteuid().as_raw()) {
        let reason = "not a regular file of this user; remove it";
        return Err(failed(io::Error::new(io::ErrorKind::PermissionDenied, reason)));
    }
    let deadline = Instant::now() + START_TIMEOUT;
    while is_locked(&file).map_err(failed)? {
        let mut text = String::new();
        io::Seek::rewind(&mut file).map_err(failed)?;
        Read::by_ref(&mut file).take(16).read_to_string(&mut text).map_err(failed)?;
        let pid = text.trim_end().parse().ok().and_then(Pid::from_raw);
        // Until the keeper has written its ID, the file has none, or that of a previous keeper.
        let Some(pid) = pid.filter(|pid| has_as_input(*pid, &file)) else {
            if Instant::now() > deadline {
                return Err(KeeperError::NoProcess(path.to_owned()));
            }
            std::thread::sleep(PAUSE);
            continue;
        };
        let id = pid.as_raw_nonzero();
        let opened = || -> io::Result<Found> {
            let process = pidfd_open(pid, PidfdFlags::empty())?;
            let user = File::open(format!("/proc/{id}/ns/user"))?;
            let networks = Namespace::from_path(Path::new(&format!("/proc/{id}/ns/net")));
            let networks = networks.map_err(io::Error::other)?;
            Ok(Found { pid, process, user, networks })
        };
        // The keeper may have ended, and its ID may have been reused since.
        let found = opened();
        if has_as_input(pid, &file) {
            let id = id.get();
            return found.map(Some).map_err(|source| KeeperError::Join { pid: id, source });
        }
    }
    Ok(None)
}

/// Whether the standard input of process `pid` is `file`.
fn has_as_input(pid: Pid, file: &File) -> bool {
    let there = fs::metadata(format!("/proc/{}/fd/0", pid.as_raw_nonzero()));
    let same = |there: fs::Metadata| -> io::Result<bool> {
        let file = file.metadata()?;
        Ok((there.dev(), there.ino()) == (file.dev(), file.ino()))
    };
    there.and_then(same).unwrap_or(false)
}

fn is_locked(file: &File) -> io::Result<bool> {
    match flock(file, FlockOperation::NonBlockingLockShared) {
        Ok(()) => {
            flock(file, FlockOperation::Unlock)?;
            Ok(false)
        }
        Err(Errno::WOULDBLOCK) => Ok(true),
        Err(errno) => Err(errno.into()),
    }
}

/// Joins the namespaces of `keeper`.
fn join(keeper: &Found) -> Result<HostContext, KeeperError> {
    let pid = keeper.pid.as_raw_nonzero().get();
    HostContext::joining(&keeper.user, keeper.networks.clone())
        .map_err(|source| KeeperError::Join { pid, source })
}

/// Starts `program` as the keeper of `networks`, with the lock `file`.
fn start(program: &Path, file: File, networks: &Namespace) -> io::Result<()> {
    let networks = networks.clone();
    let mut command = detached(program, [SUBCOMMAND.as_ref()])?;
    command.env_clear();
    command.stdin(Stdio::from(file)).stdout(Stdio::null()).stderr(Stdio::null());
    let enter = move || {
        let network = Some(LinkNameSpaceType::Network);
        Ok(move_into_link_name_space(networks.as_fd(), network)?)
    };
    // SAFETY: a system call, which neither allocates nor locks.
    unsafe { command.pre_exec(enter) };
    // The lock is that of the child from here on: `command` is dropped with this copy of the file.
    command.spawn().map(drop)
}

/// Runs the keeper until it is killed. Standard input must be the lock file.
#[must_use]
pub fn run() -> ExitCode {
    let Ok(lock) = io::stdin().as_fd().try_clone_to_owned() else {
        return ExitCode::from(EXIT_USAGE);
    };
    let mut lock = File::from(lock);
    if !lock.metadata().is_ok_and(|there| there.is_file())
        || !matches!(is_held_by_us(&lock), Ok(true))
    {
        let _ = writeln!(
            io::stderr(),
            "tidegate: error: {SUBCOMMAND} is internal to tidegate; use tidegate daemon"
        );
        return ExitCode::from(EXIT_USAGE);
    }
    let line = format!("{}\n", std::process::id());
    let written = lock.set_len(0).and_then(|()| lock.write_all(line.as_bytes()));
    if written.is_err() {
        return ExitCode::from(EXIT_FAILURE);
    }
    // It keeps the namespaces even if the kernel refuses this.
    let _ = drop_privileges(CapabilitySet::empty());
    loop {
        // SAFETY: no arguments.
        unsafe { libc::pause() };
    }
}

/// Whether the open file of `lock` has the lock: another one cannot get it, and this one can.
fn is_held_by_us(lock: &File) -> io::Result<bool> {
    let path = "/proc/self/fd/0";
    let other = File::open(path)?;
    Ok(is_locked(&other)? && flock(lock, FlockOperation::NonBlockingLockExclusive).is_ok())
}
