//! The Unix socket of the API, for one instance and one user.
//!
//! A killed instance leaves its socket behind. A lock file beside the socket records the owner: the
//! owner holds a lock on it (flock(2)) and writes its pid into it. A process that gets the lock may
//! take over the socket.
//!
//! A socket inherited from a service manager belongs to that manager: there is no lock file, and
//! the path stays when this process ends.

use rustix::fs::{Mode, fchmod};
use rustix::io::Errno;
use rustix::net::sockopt::{socket_acceptconn, socket_domain, socket_type};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with,
};
use std::fs::{self, DirBuilder, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener as StdUnixListener, UnixStream as StdUnixStream};
use std::path::{Path, PathBuf};
use tidegate_netns::{Lock, lock_file, run_directory};
use tokio::net::UnixListener;

/// The environment variable with the path of the socket.
pub const VARIABLE: &str = "TIDEGATE_SOCKET";

/// The backlog of the socket.
const BACKLOG: i32 = 64;

/// Why there is no socket. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// There is no run directory.
    #[error("no directory for the API socket: set XDG_RUNTIME_DIR or {VARIABLE}")]
    NoPlace,
    /// Another instance serves the socket.
    #[error(
        "tidegate is up already (process {pid}, socket {}); stop that one, or set {VARIABLE} to another path",
        .path.display()
    )]
    InUse {
        /// The path of the socket.
        path: PathBuf,
        /// The process of that instance.
        pid: u32,
    },
    /// Several instances are running, and none is the daemon.
    #[error(
        "several projects are up ({}); set {VARIABLE} to the socket of one, such as {}",
        .projects.join(", "), .path.display()
    )]
    Several {
        /// The names of the projects.
        projects: Vec<String>,
        /// The path of the first socket.
        path: PathBuf,
    },
    /// The path is taken by another file.
    #[error("{} exists and is not a socket of tidegate; set {VARIABLE} to another path", .0.display())]
    Foreign(PathBuf),
    /// Another process listens at the path, without the lock file of an instance.
    #[error(
        "another process listens on {}; if that is tidegate.socket of systemd, run systemctl start tidegate; otherwise set {VARIABLE} to another path",
        .0.display()
    )]
    Listening(PathBuf),
    /// An inherited descriptor is not a listening Unix stream socket.
    #[error(
        "inherited descriptor {descriptor} is {found} instead of a listening Unix stream socket; use ListenStream=PATH and Accept=no in the socket unit"
    )]
    Unsuitable {
        /// The number of the descriptor.
        descriptor: RawFd,
        /// What it is.
        found: String,
    },
    /// The path exceeds the 107 bytes of `sun_path`.
    #[error("socket path {} is longer than 107 bytes; set {VARIABLE} to a shorter one", .0.display())]
    TooLong(PathBuf),
    /// A system call failed.
    #[error("socket {}: {source}", .path.display())]
    Failed {
        /// The path of the socket.
        path: PathBuf,
        /// The error of the system call.
        source: io::Error,
    },
}

/// The file name of a socket.
const NAME: &str = "api.sock";

/// The directory of projects, below the run directory.
const PROJECTS: &str = "projects";

/// Returns the path of the socket of a project in the foreground, or of the daemon:
/// `$TIDEGATE_SOCKET`, or `projects/NAME/api.sock` or `api.sock` in the run directory.
///
/// # Errors
/// [`SocketError::NoPlace`].
pub fn path(project: Option<&str>) -> Result<PathBuf, SocketError> {
    if let Some(path) = given() {
        return Ok(path);
    }
    let run = run_directory().ok_or(SocketError::NoPlace)?;
    Ok(match project {
        Some(project) => run.join(PROJECTS).join(project).join(NAME),
        None => run.join(NAME),
    })
}

/// Returns the paths of the sockets of all instances of this user, with the names of their
/// projects: first that of the daemon, which has no project, then by name. A killed instance leaves
/// its socket behind. If `TIDEGATE_SOCKET` is set, only that one.
///
/// # Errors
/// [`SocketError::NoPlace`].
pub fn all() -> Result<Vec<(Option<String>, PathBuf)>, SocketError> {
    let daemon = path(None)?;
    if given().is_some() {
        return Ok(vec![(None, daemon)]);
    }
    let run = run_directory().ok_or(SocketError::NoPlace)?;
    let mut projects: Vec<String> = fs::read_dir(run.join(PROJECTS))
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .collect();
    projects.sort_unstable();
    let all = std::iter::once(None).chain(projects.into_iter().map(Some));
    let all = all.map(|project| Ok((project.clone(), path(project.as_deref())?)));
    let there = |one: &Result<(_, PathBuf), _>| one.as_ref().is_ok_and(|(_, path)| path.exists());
    all.filter(there).collect()
}

/// Whether `TIDEGATE_SOCKET` sets the path.
#[must_use]
pub fn is_given() -> bool {
    given().is_some()
}

/// The path in `TIDEGATE_SOCKET`.
fn given() -> Option<PathBuf> {
    std::env::var_os(VARIABLE).filter(|value| !value.is_empty()).map(PathBuf::from)
}

/// Whether an instance listens at `path`. An error other than that of a socket without a listener
/// counts as a listener, so that it is reported when it is used.
#[must_use]
pub fn has_listener(path: &Path) -> bool {
    match StdUnixStream::connect(path) {
        Ok(_) => true,
        Err(error) => {
            !matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused)
        }
    }
}

/// The socket of this instance, with connections waiting in its backlog.
#[derive(Debug)]
pub struct Socket {
    /// Accepts clients.
    pub listener: UnixListener,
    /// The path of the socket. `None` for an inherited socket, whose path belongs to the service
    /// manager.
    pub place: Option<SocketPath>,
}

/// A path owned by this instance. The drop removes the socket and the lock file.
#[derive(Debug)]
pub struct SocketPath {
    path: PathBuf,
    socket: Inode,
    _owner: LockFile,
}

/// The lock file that records the owner of the socket.
#[derive(Debug)]
struct LockFile {
    path: PathBuf,
    file: File,
}

type Inode = (u64, u64);

impl Socket {
    /// Creates the socket at `path` with access for this user only, and takes over the socket of a
    /// killed instance. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// [`SocketError`].
    pub fn open(path: PathBuf) -> Result<Self, SocketError> {
        let failed = |source: io::Error| SocketError::Failed { path: path.clone(), source };
        let address = SocketAddrUnix::new(&path).map_err(|_| SocketError::TooLong(path.clone()))?;
        if let Some(directory) = path.parent().filter(|_| std::env::var_os(VARIABLE).is_none()) {
            DirBuilder::new().recursive(true).mode(0o755).create(directory).map_err(failed)?;
        }
        let owner = LockFile::lock(&path)?;
        match fs::symlink_metadata(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Ok(there) if there.file_type().is_socket() => match StdUnixStream::connect(&path) {
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                    fs::remove_file(&path).map_err(failed)?;
                }
                Ok(_) => return Err(SocketError::Listening(path)),
                Err(_) => return Err(SocketError::Foreign(path)),
            },
            _ => return Err(SocketError::Foreign(path)),
        }
        let listener = listen_at(&address).map_err(failed)?;
        let socket = inode(&path).map_err(failed)?;
        Ok(Self { listener, place: Some(SocketPath { path, socket, _owner: owner }) })
    }

    /// Uses `descriptor`, a listening socket that a service manager has passed to this process.
    /// Must be called within a tokio runtime.
    ///
    /// # Errors
    /// [`SocketError::Unsuitable`].
    pub fn inherited(descriptor: OwnedFd) -> Result<Self, SocketError> {
        let number = descriptor.as_raw_fd();
        let unsuitable = |found| SocketError::Unsuitable { descriptor: number, found };
        let failed =
            |error: io::Error| unsuitable(format!("a socket that cannot be used ({error})"));
        if let Some(found) = deviation(&descriptor) {
            return Err(unsuitable(found.to_owned()));
        }
        let listener = StdUnixListener::from(descriptor);
        listener.set_nonblocking(true).map_err(failed)?;
        Ok(Self { listener: UnixListener::from_std(listener).map_err(failed)?, place: None })
    }
}

impl SocketPath {
    /// Removes the socket. The lock still keeps other instances from creating one.
    pub fn close(&self) {
        // Another process may have replaced the socket at this path.
        if inode(&self.path).is_ok_and(|there| there == self.socket) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

impl Drop for SocketPath {
    fn drop(&mut self) {
        self.close();
    }
}

impl LockFile {
    fn lock(socket: &Path) -> Result<Self, SocketError> {
        let failed = |source| SocketError::Failed { path: socket.to_owned(), source };
        let mut path = socket.as_os_str().to_owned();
        path.push(".lock");
        let path = PathBuf::from(path);
        match lock_file(&path).map_err(failed)? {
            Lock::Acquired(mut file) => {
                let mut left = String::new();
                let readable = (&file).take(64).read_to_string(&mut left).is_ok();
                if !readable || !(left.trim().is_empty() || left.trim().parse::<u32>().is_ok()) {
                    return Err(SocketError::Foreign(path));
                }
                file.set_len(0)
                    .and_then(|()| writeln!(file, "{}", std::process::id()))
                    .map_err(failed)?;
                Ok(Self { path, file })
            }
            Lock::Held(file) => {
                let mut pid = String::new();
                let _ = file.take(20).read_to_string(&mut pid);
                Err(SocketError::InUse {
                    path: socket.to_owned(),
                    pid: pid.trim().parse().unwrap_or(0),
                })
            }
        }
    }
}

impl Drop for LockFile {
    fn drop(&mut self) {
        // Remove the file before the lock is released with it: a waiting instance creates a new
        // one.
        let ours = self.file.metadata().map(|file| (file.dev(), file.ino()));
        if ours.is_ok_and(|ours| inode(&self.path).is_ok_and(|there| there == ours)) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Binds and listens with mode 0600. The kernel gives the file the mode of the socket's descriptor
/// when it creates the file (`unix_bind`, net/unix/af_unix.c), so there is no interval in which
/// another user can connect.
fn listen_at(address: &SocketAddrUnix) -> io::Result<UnixListener> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    bind(&socket, address)?;
    listen(&socket, BACKLOG)?;
    UnixListener::from_std(socket.into())
}

/// Returns what `descriptor` is if it is not a listening Unix stream socket.
fn deviation(descriptor: impl AsFd) -> Option<&'static str> {
    match socket_domain(&descriptor) {
        Err(_) => return Some("not a socket"),
        Ok(AddressFamily::UNIX) => {}
        Ok(AddressFamily::INET | AddressFamily::INET6) => return Some("an internet socket"),
        Ok(_) => return Some("a socket of another address family"),
    }
    match socket_type(&descriptor) {
        Ok(SocketType::STREAM) => {}
        Ok(SocketType::DGRAM) => return Some("a Unix datagram socket"),
        _ => return Some("a Unix socket of another type"),
    }
    match socket_acceptconn(&descriptor) {
        Ok(true) => None,
        _ => Some("a Unix socket that does not listen"),
    }
}

fn inode(path: &Path) -> io::Result<Inode> {
    let metadata = fs::symlink_metadata(path)?;
    Ok((metadata.dev(), metadata.ino()))
}

/// One line about a failed connect, with the remedy.
pub fn explain_connect(path_given: &Path, error: &io::Error) -> String {
    let path = path_given.display();
    match Errno::from_io_error(error) {
        Some(Errno::NOENT | Errno::NOTDIR) => format!(
            "tidegate is not running: socket {path} does not exist (start tidegate up or tidegate daemon, or set {VARIABLE})"
        ),
        Some(Errno::CONNREFUSED) => format!(
            "tidegate is not running: no listener on socket {path} (the next tidegate up or daemon takes it over)"
        ),
        Some(Errno::ACCESS | Errno::PERM) => {
            format!(
                "permission denied for socket {path}; only the user who started tidegate and root may connect"
            )
        }
        // The standard library rejects a path that is too long before any system call.
        None if error.kind() == io::ErrorKind::InvalidInput => {
            SocketError::TooLong(path_given.to_owned()).to_string()
        }
        _ => format!("socket {path}: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixDatagram;

    fn socket_path() -> (tempfile::TempDir, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("api.sock");
        (directory, path)
    }

    #[tokio::test]
    async fn the_socket_is_private_and_removed_on_drop() {
        let (directory, path) = socket_path();
        let socket = Socket::open(path.clone()).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        StdUnixStream::connect(&path).unwrap();
        let error = Socket::open(path.clone()).unwrap_err().to_string();
        assert!(
            error.starts_with(&format!("tidegate is up already (process {}, ", std::process::id()))
        );
        drop(socket);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn a_dead_socket_is_taken_over_and_other_files_are_left_alone() {
        let (_directory, path) = socket_path();
        drop(StdUnixListener::bind(&path).unwrap());
        drop(Socket::open(path.clone()).unwrap());
        let other = StdUnixListener::bind(&path).unwrap();
        assert!(matches!(Socket::open(path.clone()), Err(SocketError::Listening(_))));
        drop(other);
        fs::remove_file(&path).unwrap();
        fs::write(&path, "precious").unwrap();
        assert!(matches!(Socket::open(path.clone()), Err(SocketError::Foreign(_))));
        assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
    }

    #[tokio::test]
    async fn an_inherited_socket_is_served_and_stays() {
        let (directory, path) = socket_path();
        let socket = Socket::inherited(StdUnixListener::bind(&path).unwrap().into()).unwrap();
        let _client = StdUnixStream::connect(&path).unwrap();
        socket.listener.accept().await.unwrap();
        drop(socket);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[tokio::test]
    async fn other_descriptors_are_not_inherited() {
        let (_directory, path) = socket_path();
        let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let (connected, _peer) = StdUnixStream::pair().unwrap();
        for (descriptor, expected) in [
            (OwnedFd::from(File::open("/dev/null").unwrap()), "not a socket"),
            (tcp.into(), "an internet socket"),
            (UnixDatagram::bind(&path).unwrap().into(), "a Unix datagram socket"),
            (connected.into(), "a Unix socket that does not listen"),
        ] {
            let number = descriptor.as_raw_fd();
            let error = Socket::inherited(descriptor).unwrap_err().to_string();
            let start = format!("inherited descriptor {number} is {expected} instead of ");
            assert!(error.starts_with(&start), "{error}");
        }
    }

    #[tokio::test]
    async fn a_path_that_is_too_long_is_an_error() {
        let error = Socket::open(PathBuf::from(format!("/tmp/{}", "x".repeat(108)))).unwrap_err();
        assert!(matches!(error, SocketError::TooLong(_)), "{error}");
    }

    #[test]
    fn failed_connects_are_explained() {
        let (directory, path) = socket_path();
        let why = |path: &Path| explain_connect(path, &StdUnixStream::connect(path).unwrap_err());
        assert!(why(&path).starts_with("tidegate is not running: socket "));
        drop(StdUnixListener::bind(&path).unwrap());
        assert!(why(&path).starts_with("tidegate is not running: no listener on "));
        let denied = explain_connect(directory.path(), &io::Error::from_raw_os_error(13));
        assert!(denied.starts_with("permission denied for socket "));
    }
}
