//! Watches the `resolv.conf` of the host, in a task of the resolver. Callers that wait for
//! descriptors themselves use [`Watch`].

use crate::resolv_conf::{MAX_FILE_SIZE, ResolvConf};
use rustix::fs::inotify::{self, CreateFlags, Reader, WatchFlags};
use rustix::io::Errno;
use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read};
use std::mem::MaybeUninit;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tidegate_netns::{Namespace, interface_index};
use tokio::io::unix::AsyncFd;

/// Delay after a change before the file is read, because files are often written in several steps.
pub const REST: Duration = Duration::from_millis(30);
/// Maximum number of symbolic links that are followed (`MAXSYMLINKS` of the kernel).
const MAX_LINKS: usize = 40;

/// An inotify watch on a path and the symbolic links that it resolves through.
///
/// `resolv.conf` is often a symbolic link into `/run`, replaced by rename(2), or a bind mount. All
/// directories on the path and the file itself are therefore watched. A change can redirect links,
/// so the caller creates a new watch after each change.
///
/// The descriptor becomes readable on any event; [`Self::has_changed`] tells whether the event is
/// relevant.
#[derive(Debug)]
pub struct Watch {
    events: OwnedFd,
    /// The relevant names in the watched directories.
    names: BTreeSet<OsString>,
}

impl Watch {
    /// Watches the file that `path` resolves to, and all directories on the way.
    ///
    /// # Errors
    /// `EMFILE` at the limit `fs.inotify.max_user_instances`, `ENOSPC` at
    /// `fs.inotify.max_user_watches`.
    pub fn new(path: &Path) -> io::Result<Self> {
        let events = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)?;
        let mut names = BTreeSet::new();
        let mut path = std::path::absolute(path)?;
        for _ in 0..MAX_LINKS {
            if let (Some(directory), Some(name)) = (path.parent(), path.file_name()) {
                let flags = WatchFlags::CREATE | WatchFlags::MOVED_TO | WatchFlags::MOVED_FROM;
                let flags = flags | WatchFlags::CLOSE_WRITE | WatchFlags::DELETE;
                ignore_absent(inotify::add_watch(&events, directory, flags))?;
                names.insert(name.to_owned());
            }
            let Ok(target) = path.read_link() else { break };
            path = path.parent().unwrap_or(Path::new("/")).join(target);
        }
        // A bind-mounted file is written in another directory.
        let itself = WatchFlags::CLOSE_WRITE | WatchFlags::DELETE_SELF | WatchFlags::MOVE_SELF;
        ignore_absent(inotify::add_watch(&events, &path, itself))?;
        Ok(Self { events, names })
    }

    /// Reads pending events without blocking. Returns whether one of them is relevant.
    ///
    /// # Errors
    /// Errors of read(2).
    pub fn has_changed(&self) -> io::Result<bool> {
        let mut buffer = [MaybeUninit::<u8>::uninit(); 4096];
        let mut reader = Reader::new(&self.events, &mut buffer);
        loop {
            match reader.next() {
                // An event without a name is about the file itself, or reports that events were
                // lost.
                Ok(event) => {
                    let name = event.file_name().map(|name| name.to_string_lossy().into_owned());
                    if name.is_none_or(|name| self.names.contains(&OsString::from(name))) {
                        return Ok(true);
                    }
                }
                Err(Errno::AGAIN) => return Ok(false),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl AsFd for Watch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.events.as_fd()
    }
}

impl AsRawFd for Watch {
    fn as_raw_fd(&self) -> RawFd {
        self.events.as_raw_fd()
    }
}

/// Waits for a change.
async fn changed(watch: &AsyncFd<Watch>) -> io::Result<()> {
    loop {
        let mut ready = watch.readable().await?;
        if watch.get_ref().has_changed()? {
            return Ok(());
        }
        ready.clear_ready();
    }
}

/// Registers the watch with the runtime.
pub(crate) fn register(watch: Watch) -> io::Result<AsyncFd<Watch>> {
    // SAFETY: the `AsyncFd` owns the watch and thus the descriptor.
    Ok(unsafe { AsyncFd::register(watch) }?)
}

/// A missing file is reported by its directory when it is created.
fn ignore_absent(watched: rustix::io::Result<i32>) -> io::Result<()> {
    match watched {
        Ok(_) | Err(Errno::NOENT | Errno::NOTDIR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Reads the servers of the `resolv.conf` at `path`. Interface names of scoped addresses
/// (`fe80::1%eth0`) are resolved in the namespace `host`. Returns `None` if the file cannot be read
/// or exceeds 64 KiB. If it does not exist, the server is 127.0.0.1.
#[must_use]
pub fn servers(path: &Path, host: &Namespace) -> Option<Arc<[SocketAddr]>> {
    let mut text = String::new();
    match File::open(path) {
        Ok(file) => {
            let length = file.take(MAX_FILE_SIZE + 1).read_to_string(&mut text);
            length.ok().filter(|length| *length as u64 <= MAX_FILE_SIZE)?;
        }
        // resolv.conf(5): "If this file does not exist, only the name server on the local machine
        // will be queried".
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(_) => return None,
    }
    let scope = |name: &str| host.with(|| interface_index(name)).flatten().ok();
    Some(ResolvConf::parse(&text, &scope).servers.into())
}

/// Calls `each` with the servers, now and after every change. Returns only if the file can no
/// longer be watched.
pub(crate) async fn run(
    path: PathBuf,
    host: Namespace,
    mut watch: AsyncFd<Watch>,
    each: impl Fn(Arc<[SocketAddr]>),
) {
    loop {
        match servers(&path, &host) {
            Some(servers) => each(servers),
            None => {
                tracing::warn!(path = %path.display(), "resolv.conf unreadable; DNS servers unchanged");
            }
        }
        if let Err(error) = changed(&watch).await {
            tracing::error!(path = %path.display(), %error, "resolv.conf no longer watched");
            return;
        }
        tokio::time::sleep(REST).await;
        // Links may have changed. A change from here on is reported by the new watch.
        match Watch::new(&path).and_then(register) {
            Ok(again) => watch = again,
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "resolv.conf not watched again");
            }
        }
    }
}
