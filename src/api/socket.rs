//! Where the API is served: a Unix socket for one instance and one user.
//!
//! The socket of an instance that was killed is still there. So a file beside it says whose it is:
//! it is locked for as long as its owner lives (flock(2)), and holds its pid. Whoever has the lock
//! may take the socket over.

use rustix::fs::{Mode, fchmod};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with,
};
use std::fs::{self, DirBuilder, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::{Path, PathBuf};
use tidegate_netns::{Lock, lock_file, run_directory};
use tokio::net::UnixListener;

/// The variable that says where the socket is.
pub(crate) const VARIABLE: &str = "TIDEGATE_SOCKET";

/// Clients that may wait to be let in.
const BACKLOG: i32 = 64;

/// Why the socket is not to be had. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SocketError {
    /// There is no run directory to put it into.
    #[error("no place for the API's socket: set XDG_RUNTIME_DIR or {VARIABLE}")]
    NoPlace,
    /// Another instance serves it.
    #[error(
        "tidegate is up already (process {pid}, socket {}); stop that one, or set {VARIABLE} to another path",
        .path.display()
    )]
    InUse {
        /// Which socket.
        path: PathBuf,
        /// Whose it is.
        pid: u32,
    },
    /// Something else is there.
    #[error("{} is there and not a socket of tidegate's; set {VARIABLE} to another path", .0.display())]
    Foreign(PathBuf),
    /// The kernel takes 107 bytes.
    #[error("socket path {} is longer than 107 bytes; set {VARIABLE} to a shorter one", .0.display())]
    TooLong(PathBuf),
    /// Anything else.
    #[error("socket {}: {source}", .path.display())]
    Failed {
        /// Which socket.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// The socket's path: `$TIDEGATE_SOCKET`, else `api.sock` in the run directory.
///
/// # Errors
/// [`SocketError::NoPlace`].
pub(crate) fn path() -> Result<PathBuf, SocketError> {
    match std::env::var_os(VARIABLE).filter(|value| !value.is_empty()) {
        Some(path) => Ok(path.into()),
        None => run_directory().map(|run| run.join("api.sock")).ok_or(SocketError::NoPlace),
    }
}

/// A socket that is this instance's, with clients that wait to be let in.
#[derive(Debug)]
pub(crate) struct Socket {
    /// Lets clients in.
    pub(super) listener: UnixListener,
    /// Where it is.
    pub(super) place: Place,
}

/// A path that is this instance's. Dropped, the socket and the file beside it are gone.
#[derive(Debug)]
pub(crate) struct Place {
    path: PathBuf,
    socket: Inode,
    _owner: OwnersFile,
}

/// The file that says whose the socket is.
#[derive(Debug)]
struct OwnersFile {
    path: PathBuf,
    file: File,
}

type Inode = (u64, u64);

impl Socket {
    /// Makes the socket at `path`, for this user alone, and takes over one that a killed instance
    /// left. To be called within a tokio runtime.
    ///
    /// # Errors
    /// [`SocketError`].
    pub(crate) fn open(path: PathBuf) -> Result<Self, SocketError> {
        let failed = |source: io::Error| SocketError::Failed { path: path.clone(), source };
        let address = SocketAddrUnix::new(&path).map_err(|_| SocketError::TooLong(path.clone()))?;
        if let Some(directory) = path.parent().filter(|_| std::env::var_os(VARIABLE).is_none()) {
            DirBuilder::new().recursive(true).mode(0o755).create(directory).map_err(failed)?;
        }
        let owner = OwnersFile::lock(&path)?;
        match fs::symlink_metadata(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Ok(there) if there.file_type().is_socket() => match StdUnixStream::connect(&path) {
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                    fs::remove_file(&path).map_err(failed)?;
                }
                _ => return Err(SocketError::Foreign(path)),
            },
            _ => return Err(SocketError::Foreign(path)),
        }
        let listener = listen_at(&address).map_err(failed)?;
        let socket = inode(&path).map_err(failed)?;
        Ok(Self { listener, place: Place { path, socket, _owner: owner } })
    }
}

impl Place {
    /// Removes the socket: nobody finds it any more, and nobody else may make one.
    pub(super) fn close(&self) {
        // Another one may be there, if someone has removed ours.
        if inode(&self.path).is_ok_and(|there| there == self.socket) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.close();
    }
}

impl OwnersFile {
    fn lock(socket: &Path) -> Result<Self, SocketError> {
        let failed = |source| SocketError::Failed { path: socket.to_owned(), source };
        let mut path = socket.as_os_str().to_owned();
        path.push(".lock");
        let path = PathBuf::from(path);
        match lock_file(&path).map_err(failed)? {
            Lock::Had(mut file) => {
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

impl Drop for OwnersFile {
    fn drop(&mut self) {
        // Before the lock goes with the file: who waits for it makes another one.
        let ours = self.file.metadata().map(|file| (file.dev(), file.ino()));
        if ours.is_ok_and(|ours| inode(&self.path).is_ok_and(|there| there == ours)) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// A socket has the mode of its descriptor from the moment it is in the directory (`unix_bind` in
/// the kernel's net/unix/af_unix.c): nobody else gets in meanwhile.
fn listen_at(address: &SocketAddrUnix) -> io::Result<UnixListener> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    bind(&socket, address)?;
    listen(&socket, BACKLOG)?;
    UnixListener::from_std(socket.into())
}

fn inode(path: &Path) -> io::Result<Inode> {
    let there = fs::symlink_metadata(path)?;
    Ok((there.dev(), there.ino()))
}

/// Why a client does not get in, as one line.
pub(crate) fn explain_connect(path_given: &Path, error: &io::Error) -> String {
    let path = path_given.display();
    match Errno::from_io_error(error) {
        Some(Errno::NOENT | Errno::NOTDIR) => format!(
            "nothing is up: there is no socket {path} (tidegate up makes it; {VARIABLE} says where another one is)"
        ),
        Some(Errno::CONNREFUSED) => format!(
            "nothing is up: nobody listens on socket {path} any more (the next tidegate up takes it over)"
        ),
        Some(Errno::ACCESS | Errno::PERM) => {
            format!(
                "permission denied for socket {path}; it is for the user who ran tidegate up, and for root"
            )
        }
        // Not one of the kernel's: it was not asked.
        None if error.kind() == io::ErrorKind::InvalidInput => {
            SocketError::TooLong(path_given.to_owned()).to_string()
        }
        _ => format!("socket {path}: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener as StdUnixListener;

    fn bed() -> (tempfile::TempDir, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("api.sock");
        (directory, path)
    }

    #[tokio::test]
    async fn it_is_this_users_alone_and_gone_in_the_end() {
        let (directory, path) = bed();
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
    async fn one_that_nobody_listens_on_is_taken_over_and_anything_else_left_alone() {
        let (_directory, path) = bed();
        drop(StdUnixListener::bind(&path).unwrap());
        drop(Socket::open(path.clone()).unwrap());
        let someone = StdUnixListener::bind(&path).unwrap();
        assert!(matches!(Socket::open(path.clone()), Err(SocketError::Foreign(_))));
        drop(someone);
        fs::remove_file(&path).unwrap();
        fs::write(&path, "precious").unwrap();
        assert!(matches!(Socket::open(path.clone()), Err(SocketError::Foreign(_))));
        assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
    }

    #[tokio::test]
    async fn a_path_that_the_kernel_does_not_take_is_told() {
        let error = Socket::open(PathBuf::from(format!("/tmp/{}", "x".repeat(108)))).unwrap_err();
        assert!(matches!(error, SocketError::TooLong(_)), "{error}");
    }

    #[test]
    fn a_client_is_told_what_is_in_its_way() {
        let (directory, path) = bed();
        let why = |path: &Path| explain_connect(path, &StdUnixStream::connect(path).unwrap_err());
        assert!(why(&path).starts_with("nothing is up: there is no socket "));
        drop(StdUnixListener::bind(&path).unwrap());
        assert!(why(&path).starts_with("nothing is up: nobody listens on "));
        let denied = explain_connect(directory.path(), &io::Error::from_raw_os_error(13));
        assert!(denied.starts_with("permission denied for socket "));
    }
}
