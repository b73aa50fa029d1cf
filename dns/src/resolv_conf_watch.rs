//! The host's `resolv.conf`, watched for changes by the resolver's task; [`Watch`] is for callers
//! that wait themselves.

use crate::resolv_conf::{LONGEST, ResolvConf};
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

/// How long a change has to be at rest: files are often written in pieces.
pub const REST: Duration = Duration::from_millis(30);
/// The most links that are followed (`MAXSYMLINKS` of the kernel).
const LINKS: usize = 40;

/// What a path leads to, watched for changes.
///
/// `resolv.conf` is often a symbolic link into `/run`, replaced by renaming, or bind-mounted. So
/// all directories that the links lead through are watched, and the file itself. After a change a
/// new watch is to be made, for links may lead elsewhere then.
///
/// Its descriptor can be read when something has happened; [`Self::has_changed`] tells whether that
/// is a change.
#[derive(Debug)]
pub struct Watch {
    events: OwnedFd,
    /// The names that matter in watched directories.
    names: BTreeSet<OsString>,
}

impl Watch {
    /// Begins to watch what `path` leads to.
    ///
    /// # Errors
    /// `EMFILE` at `fs.inotify.max_user_instances`, `ENOSPC` at `max_user_watches`.
    pub fn new(path: &Path) -> io::Result<Self> {
        let events = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)?;
        let mut names = BTreeSet::new();
        let mut path = std::path::absolute(path)?;
        for _ in 0..LINKS {
            if let (Some(directory), Some(name)) = (path.parent(), path.file_name()) {
                let flags = WatchFlags::CREATE | WatchFlags::MOVED_TO | WatchFlags::MOVED_FROM;
                let flags = flags | WatchFlags::CLOSE_WRITE | WatchFlags::DELETE;
                ignore_absent(inotify::add_watch(&events, directory, flags))?;
                names.insert(name.to_owned());
            }
            let Ok(target) = path.read_link() else { break };
            path = path.parent().unwrap_or(Path::new("/")).join(target);
        }
        // Mounted here from elsewhere, it is written there.
        let itself = WatchFlags::CLOSE_WRITE | WatchFlags::DELETE_SELF | WatchFlags::MOVE_SELF;
        ignore_absent(inotify::add_watch(&events, &path, itself))?;
        Ok(Self { events, names })
    }

    /// Reads what has happened, without waiting. Whether it matters.
    ///
    /// # Errors
    /// The descriptor cannot be read.
    pub fn has_changed(&self) -> io::Result<bool> {
        let mut buffer = [MaybeUninit::<u8>::uninit(); 4096];
        let mut reader = Reader::new(&self.events, &mut buffer);
        loop {
            match reader.next() {
                // Without a name it is about the file itself, or word that events were lost.
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

/// As a task waits for it.
pub(crate) fn register(watch: Watch) -> io::Result<AsyncFd<Watch>> {
    // SAFETY: the descriptor is open for as long as what owns it is in there.
    Ok(unsafe { AsyncFd::register(watch) }?)
}

/// What is not there yet is seen in its directory when it comes.
fn ignore_absent(watched: rustix::io::Result<i32>) -> io::Result<()> {
    match watched {
        Ok(_) | Err(Errno::NOENT | Errno::NOTDIR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// The servers of the `resolv.conf` at `path`, those of links (`fe80::1%eth0`) as seen from
/// `outside`; `None` if it cannot be read, or is longer than any list of servers.
#[must_use]
pub fn servers(path: &Path, outside: &Namespace) -> Option<Arc<[SocketAddr]>> {
    let mut text = String::new();
    match File::open(path) {
        Ok(file) => {
            let length = file.take(LONGEST + 1).read_to_string(&mut text);
            length.ok().filter(|length| *length as u64 <= LONGEST)?;
        }
        // resolv.conf(5): "If this file does not exist, only the name server on the local machine
        // will be queried".
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(_) => return None,
    }
    let scope = |name: &str| outside.with(|| interface_index(name)).flatten().ok();
    Some(ResolvConf::parse(&text, &scope).servers.into())
}

/// Tells `each` of the servers, now and whenever they may have changed, for as long as the task
/// lives.
pub(crate) async fn follow(
    path: PathBuf,
    outside: Namespace,
    mut watch: AsyncFd<Watch>,
    each: impl Fn(Arc<[SocketAddr]>),
) {
    loop {
        match servers(&path, &outside) {
            Some(servers) => each(servers),
            None => {
                tracing::warn!(path = %path.display(), "unreadable; DNS servers stay as they were");
            }
        }
        if let Err(error) = changed(&watch).await {
            tracing::error!(path = %path.display(), %error, "changes of DNS servers are no longer seen");
            return;
        }
        tokio::time::sleep(REST).await;
        // Links may lead elsewhere now. What changes from here on is seen, and read again.
        match Watch::new(&path).and_then(register) {
            Ok(again) => watch = again,
            Err(error) => tracing::warn!(path = %path.display(), %error, "watch again"),
        }
    }
}
