//! `tidegate service-supervisor DIRECTORY`: the process that owns the services of a project.
//! Internal, not for users.
//!
//! It is started by [`RemoteSupervisor::launch`](super::RemoteSupervisor::launch) and outlives its
//! parent. Its directory, with mode 0700, contains:
//!
//! | name | purpose |
//! |---|---|
//! | `supervisor.lock` | locked (flock(2)) while the process exists; contains its ID |
//! | `supervisor.sock` | requests of the daemon; mode 0600 |
//! | `services/NAME/` | files of each service |
//!
//! It removes them when it ends, but not if it is killed. The next process there replaces them.
//!
//! The network namespaces of the services exist as long as the process does. A daemon opens them by
//! `/proc/PID/fd/N`.

use super::files::{is_at, sweep};
use super::protocol::Inbox;
use super::server::{REQUEST_TIMEOUT, Server};
use super::supervisor::check_name;
use super::wire::{ACKNOWLEDGED, Failure, LOCK, Launch, Reply, SOCKET};
use super::wire::{receive_message, send_message};
use rustix::process::geteuid;
use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File, Permissions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener as StdUnixListener, UnixStream as StdUnixStream};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use tidegate_model::without_errno;
use tidegate_netns::{HostContext, Lock, Namespace, is_privileged, lock_file};
use tidegate_process::{EXIT_FAILURE, EXIT_USAGE, raise_descriptor_limit, without_lost_signals};
use tokio::io::AsyncReadExt;
use tokio::net::{UnixListener, UnixStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::timeout;

/// The subcommand that runs this program as a supervisor process.
pub const SUBCOMMAND: &str = "service-supervisor";

/// Attempts to create and lock the directory. An attempt fails if an ending process removes it in
/// between.
const ATTEMPTS: usize = 3;

/// Runs the supervisor process of `directory` until a client or SIGTERM stops it. Both stop the
/// services first. SIGHUP and SIGINT have no effect.
///
/// Standard input must be the socket of [`RemoteSupervisor::launch`]. The result of the start is
/// reported over it. Must be called on the main thread of a process with one thread, before it
/// opens any descriptor: all descriptors above 2 are closed. The main thread is the parent of the
/// inits, which `PR_SET_PDEATHSIG` refers to.
///
/// Nothing is written to standard error, except by a `tracing` subscriber of the caller. Such a
/// subscriber must neither block nor panic if the reader of standard error is gone.
///
/// [`RemoteSupervisor::launch`]: super::RemoteSupervisor::launch
#[must_use]
pub fn run(directory: &Path) -> ExitCode {
    // SAFETY: according to the contract, this process owns only the descriptors 0 to 2.
    unsafe { libc::close_range(3, libc::c_uint::MAX, 0) };
    let Some(handshake) = take_standard_input() else {
        let _ = writeln!(
            io::stderr(),
            "tidegate: error: {SUBCOMMAND} is internal to tidegate; use tidegate up -d"
        );
        return ExitCode::from(EXIT_USAGE);
    };
    raise_descriptor_limit();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let result = runtime.and_then(|runtime| runtime.block_on(supervise(directory, handshake)));
    match result {
        Ok(true) => ExitCode::SUCCESS,
        // The client has the reason.
        Ok(false) => ExitCode::from(EXIT_FAILURE),
        Err(error) => {
            let directory = directory.display();
            let _ = writeln!(
                io::stderr(),
                "tidegate: error: supervisor process of {directory}: {error}"
            );
            ExitCode::from(EXIT_FAILURE)
        }
    }
}

/// Returns the socket at descriptor 0, and replaces it there by `/dev/null`, so that no other file
/// gets this number. `None` if it is not a socket.
fn take_standard_input() -> Option<StdUnixStream> {
    let stdin = io::stdin();
    let is_socket = |file: File| file.metadata().is_ok_and(|there| there.file_type().is_socket());
    let socket = stdin.as_fd().try_clone_to_owned().ok()?;
    is_socket(File::from(socket.try_clone().ok()?)).then_some(())?;
    let null = File::open("/dev/null").ok()?;
    // SAFETY: both descriptors are open, and nothing owns descriptor 0.
    if unsafe { libc::dup2(null.as_raw_fd(), 0) } < 0 {
        return None;
    }
    Some(StdUnixStream::from(socket))
}

/// Sets the process up as requested over `handshake`, and serves until it is stopped. Returns
/// whether it was set up.
async fn supervise(directory: &Path, handshake: StdUnixStream) -> io::Result<bool> {
    // Handlers rather than SIG_IGN, which the services would inherit.
    let kinds = [SignalKind::terminate(), SignalKind::hangup(), SignalKind::interrupt()];
    let [terminate, hangup, interrupt] = without_lost_signals(|| kinds.map(signal));
    let (mut terminate, _hangup, _interrupt) = (terminate?, hangup?, interrupt?);
    handshake.set_nonblocking(true)?;
    let mut handshake = UnixStream::from_std(handshake)?;
    let mut inbox = Inbox::default();
    let request = timeout(REQUEST_TIMEOUT, receive_message(&mut inbox, &mut handshake)).await;
    let failure = |failure| Reply::<()>::Failed(failure);
    let services = match request {
        Ok(Ok(Launch { services })) => services,
        // The client has ended.
        Err(_) => return Ok(false),
        Ok(Err(error)) => {
            if let Some(reason) = error.into_failure() {
                let _ = send_message(&mut handshake, &failure(reason)).await;
            }
            return Ok(false);
        }
    };
    let set_up = || {
        let directory = Directory::claim(directory)?;
        let namespaces = create_namespaces(&services)?;
        let listener = directory.listen()?;
        Ok((directory, namespaces, listener))
    };
    let (directory, namespaces, listener) = match set_up() {
        Ok(ready) => ready,
        Err(reason) => {
            let _ = send_message(&mut handshake, &failure(reason)).await;
            return Ok(false);
        }
    };
    if send_message(&mut handshake, &Reply::<()>::Done).await.is_err() {
        return Ok(false);
    }
    let abandoned = async {
        if !matches!(handshake.read_u8().await, Ok(ACKNOWLEDGED)) {
            return;
        }
        drop(handshake);
        std::future::pending::<()>().await;
    };
    let stop = async {
        tokio::select! {
            _ = terminate.recv() => {}
            () = abandoned => {}
        }
    };
    let server = Server::new(directory.path.clone(), namespaces);
    Arc::new(server).serve(listener, stop).await;
    Ok(true)
}

/// Creates a network namespace for each of `services`. It has only a loopback interface, which is
/// down until the daemon sets the network up.
fn create_namespaces(services: &[String]) -> Result<BTreeMap<String, Namespace>, Failure> {
    let mut namespaces = BTreeMap::new();
    if services.is_empty() {
        return Ok(namespaces);
    }
    if !is_privileged() {
        let reason = "create network namespaces: needs CAP_SYS_ADMIN; run as root".to_owned();
        return Err(Failure::Other(reason));
    }
    let other = |error: &dyn std::error::Error| Failure::Other(without_errno(&error.to_string()));
    for service in services {
        check_name(service).map_err(|error| other(&error))?;
        let namespace = HostContext::create_for_service().map_err(|error| {
            Failure::Other(format!("service {service:?}: {}", without_errno(&error.to_string())))
        })?;
        if namespaces.insert(service.clone(), namespace).is_some() {
            return Err(other(&super::ServiceError::Duplicate(service.clone())));
        }
    }
    Ok(namespaces)
}

/// The locked directory of a supervisor process. Removes on drop what the process created in it.
#[derive(Debug)]
pub(super) struct Directory {
    path: PathBuf,
    /// Whether this process created it.
    created: bool,
    lock: File,
}

impl Directory {
    /// Creates and locks the directory at `path`, and removes files of services that a killed
    /// process left.
    pub(super) fn claim(path: &Path) -> Result<Self, Failure> {
        let failed = |error: io::Error| {
            Failure::Other(format!("{}: {}", path.display(), without_errno(&error.to_string())))
        };
        for _ in 0..ATTEMPTS {
            let created = create_private(path).map_err(failed)?;
            let lock = match lock_file(&path.join(LOCK)) {
                Ok(Lock::Acquired(file)) => file,
                Ok(Lock::Held(mut file)) => {
                    let mut holder = String::new();
                    let _ = Read::by_ref(&mut file).take(16).read_to_string(&mut holder);
                    return Err(Failure::Running(holder.trim().parse().ok()));
                }
                // The previous process removed the directory concurrently.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(failed(error)),
            };
            let mut directory = Self { path: path.to_owned(), created, lock };
            let written = directory.lock.set_len(0);
            let written = written.and_then(|()| writeln!(directory.lock, "{}", std::process::id()));
            written.map_err(failed)?;
            sweep(path).map_err(failed)?;
            return Ok(directory);
        }
        Err(Failure::Other(format!("{}: removed by another process", path.display())))
    }

    /// Creates the socket. Replaces that of a killed process.
    pub(super) fn listen(&self) -> Result<UnixListener, Failure> {
        let path = self.path.join(SOCKET);
        let failed = |error: io::Error| {
            let remedy = match error.kind() {
                io::ErrorKind::InvalidInput => "; set TIDEGATE_RUN_DIR to a shorter path",
                _ => "",
            };
            let error = without_errno(&error.to_string());
            Failure::Other(format!("{}: {error}{remedy}", path.display()))
        };
        remove(fs::remove_file(&path)).map_err(failed)?;
        let listener = StdUnixListener::bind(&path).map_err(failed)?;
        // Until then, the mode of the directory prevents access.
        fs::set_permissions(&path, Permissions::from_mode(0o600)).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        UnixListener::from_std(listener).map_err(failed)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let lock = self.path.join(LOCK);
        // If the directory was replaced, its files belong to another process.
        if !is_at(&self.lock, &lock) {
            return;
        }
        let _ = fs::remove_file(self.path.join(SOCKET));
        // Fails if a service's files could not be removed.
        let _ = fs::remove_dir(self.path.join(super::files::SERVICES));
        let _ = fs::remove_file(lock);
        if self.created {
            // Fails if it contains files of the daemon.
            let _ = fs::remove_dir(&self.path);
        }
    }
}

/// Creates the directory at `path` with mode 0700, or takes the permissions of others to an
/// existing one. Returns whether it was created.
pub(super) fn create_private(path: &Path) -> io::Result<bool> {
    if let Some(parent) = path.parent() {
        DirBuilder::new().recursive(true).mode(0o755).create(parent)?;
    }
    let created = match DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => false,
        result => result.map(|()| true)?,
    };
    let there = fs::symlink_metadata(path)?;
    if !there.is_dir() || there.uid() != geteuid().as_raw() {
        let reason = "not a directory of this user; remove it";
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, reason));
    }
    if there.mode() & 0o777 != 0o700 {
        fs::set_permissions(path, Permissions::from_mode(0o700))?;
    }
    Ok(created)
}

/// Ignores that a file does not exist.
fn remove(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}
