//! A namespace as a factory: enter it, make something, leave it again.

use crate::{system, user};
use rustix::fs::fstat;
use rustix::io::Errno;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use std::cell::RefCell;
use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Where a thread finds the namespace it is in.
const OWN: &str = "/proc/thread-self/ns/net";

/// Which namespace it is: device and inode of its file in `nsfs`.
///
/// Two handles have the same id exactly if they are to the same namespace. An id says nothing once
/// the namespace is gone: the kernel gives its inode number to one of the next.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
)]
pub struct NamespaceId {
    /// The device number of `nsfs`.
    pub device: u64,
    /// The inode number, the one in `net:[4026531840]`.
    pub inode: u64,
}

/// As the links under `/proc/PID/ns` read: `net:[4026531840]`.
impl fmt::Display for NamespaceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "net:[{}]", self.inode)
    }
}

/// A network namespace that could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Nothing is at that path.
    #[error("no such namespace {}", .0.display())]
    NoNamespace(PathBuf),
    /// Something else is at that path, a namespace of another kind perhaps.
    #[error("{} is not a network namespace", .0.display())]
    NotANetworkNamespace(PathBuf),
    /// There is no such process, or it has ended and waits to be reaped.
    #[error("no process {0}")]
    NoProcess(u32),
    /// The process belongs to someone else.
    #[error(
        "no permission to open the network namespace of process {0} (needs CAP_SYS_PTRACE over it)"
    )]
    ProcessDenied(u32),
    /// The path is closed to us.
    #[error("no permission to open namespace {}", .0.display())]
    PathDenied(PathBuf),
    /// Anything else: no descriptors left, for instance.
    #[error("open namespace {}: {source}", .path.display())]
    Failed {
        /// What was opened.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

/// A network namespace, kept alive by a descriptor.
///
/// Clones are handles to the same namespace; it lives as long as one of them does, whatever becomes
/// of the processes in it.
#[derive(Clone)]
pub struct Namespace(Arc<Inner>);

struct Inner {
    file: File,
    id: NamespaceId,
    path: Option<PathBuf>,
}

/// Where a thread is.
#[derive(Clone)]
struct Here {
    namespace: Namespace,
    /// The thread may enter it, and so may come back.
    enterable: bool,
}

thread_local! {
    /// Where the calling thread is, as far as this crate knows: it is found out once, and then kept
    /// up to date by whoever moves the thread, which is [`enter`] alone. Asking the kernel takes
    /// longer than the whole round trip into another namespace and back.
    static HERE: RefCell<Option<Here>> = const { RefCell::new(None) };
}

impl Namespace {
    /// The namespace that the calling thread is in; within [`with`](Self::with), the one it
    /// entered.
    ///
    /// # Errors
    /// `/proc` is not mounted, or no descriptor is left.
    pub fn current() -> io::Result<Self> {
        let id = current_id()?;
        HERE.with_borrow_mut(|here| match here {
            Some(here) if here.namespace.id() == id => Ok(here.namespace.clone()),
            _ => {
                let namespace = Self::adopt(File::open(OWN)?, None)?;
                Ok(here.insert(Here { namespace, enterable: false }).namespace.clone())
            }
        })
    }

    /// A new namespace, which has nothing but a loopback interface that is down. It is gone when
    /// its last handle, process and socket is.
    ///
    /// # Errors
    /// `EPERM` without `CAP_SYS_ADMIN`, `ENOSPC` at `user.max_net_namespaces`.
    pub fn create() -> io::Result<Self> {
        let made = std::thread::Builder::new().name("tidegate-netns".into()).spawn(|| {
            // SAFETY: of what threads share, this one takes nothing out: its network namespace
            // alone becomes another, and it ends right after.
            unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }?;
            File::open(OWN)
        })?;
        let file = made
            .join()
            .map_err(|_| io::Error::other("the thread that makes a namespace panicked"))??;
        Self::adopt(file, None)
    }

    /// The same in a user namespace of its own, a child of the caller's that maps every ID to
    /// itself. A process that joins [its owner](Self::owner) has every capability over the
    /// namespace, and none over those of the caller.
    ///
    /// # Errors
    /// `EPERM` without `CAP_SETUID`, `CAP_SETGID` and `CAP_SETFCAP`, or where user namespaces are
    /// not allowed; `ENOSPC` at `user.max_user_namespaces` or `user.max_net_namespaces`.
    pub fn create_in_user_namespace() -> io::Result<Self> {
        Self::adopt(user::network_of_a_child()?, None)
    }

    /// The namespace at `path`: a bind mount such as `ip netns` makes (`/run/netns/blue`), or
    /// `/proc/PID/ns/net`.
    ///
    /// That it can be opened does not say that it can be entered, which takes `CAP_SYS_ADMIN` in
    /// the user namespace that owns it; [`with`](Self::with) finds out.
    ///
    /// # Errors
    /// [`OpenError`] says what is there instead, or what is missing.
    pub fn from_path(path: &Path) -> Result<Self, OpenError> {
        let path = std::path::absolute(path)
            .map_err(|source| OpenError::Failed { path: path.to_owned(), source })?;
        let failed = |source: io::Error| match source.kind() {
            io::ErrorKind::NotFound => OpenError::NoNamespace(path.clone()),
            io::ErrorKind::PermissionDenied => OpenError::PathDenied(path.clone()),
            _ => OpenError::Failed { path: path.clone(), source },
        };
        // The path is a user's. Opening a FIFO would wait, opening a terminal could adopt it.
        let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
        let file = OpenOptions::new().read(true).custom_flags(flags).open(&path).map_err(failed)?;
        if !system::is_network_namespace(&file) {
            return Err(OpenError::NotANetworkNamespace(path));
        }
        Self::adopt(file, Some(path.clone())).map_err(failed)
    }

    /// The namespace that process `pid` is in, as far as its main thread goes.
    ///
    /// # Errors
    /// [`OpenError::NoProcess`] and [`OpenError::ProcessDenied`] above all.
    pub fn from_pid(pid: u32) -> Result<Self, OpenError> {
        Self::from_path(Path::new(&format!("/proc/{pid}/ns/net"))).map_err(|error| match error {
            OpenError::NoNamespace(_) => OpenError::NoProcess(pid),
            OpenError::PathDenied(_) => OpenError::ProcessDenied(pid),
            error => error,
        })
    }

    fn adopt(file: File, path: Option<PathBuf>) -> io::Result<Self> {
        let stat = fstat(&file)?;
        let id = NamespaceId { device: stat.st_dev, inode: stat.st_ino };
        Ok(Self(Arc::new(Inner { file, id, path })))
    }

    /// Which one it is.
    #[must_use]
    pub fn id(&self) -> NamespaceId {
        self.0.id
    }

    /// The path that it was opened by, made absolute.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        self.0.path.as_deref()
    }

    /// The user namespace that it belongs to: in there, privileges count in it.
    ///
    /// # Errors
    /// `EPERM` if that is neither the caller's user namespace nor one inside of it.
    pub fn owner(&self) -> io::Result<OwnedFd> {
        system::owner(&self.0.file)
    }

    /// Whether privileges of the calling process count in it: to bind its lower ports, for
    /// instance.
    #[must_use]
    pub fn belongs_to_own_user_namespace(&self) -> bool {
        let id = |stat: rustix::fs::Stat| (stat.st_dev, stat.st_ino);
        let own = rustix::fs::stat("/proc/self/ns/user").map(id);
        let owner = self.owner().ok().and_then(|owner| fstat(owner).ok()).map(id);
        own.is_ok_and(|own| owner == Some(own))
    }

    /// Whether the calling thread is in it. Asks the kernel; false if that fails.
    #[must_use]
    pub fn is_current(&self) -> bool {
        current_id().is_ok_and(|id| id == self.id())
    }

    /// Enters the namespace on the calling thread, runs `f`, and returns to where the thread was.
    /// If it is in there already, just runs `f`.
    ///
    /// A thread that could not return, because the namespace it is in belongs to a user namespace
    /// above its own, stays where it is: another one, made for it, enters in its place and ends
    /// there. That costs some 30 µs instead of 5.
    ///
    /// Meant for short calls: make a socket, open a file below `/proc/sys/net`. What `f` makes
    /// belongs to the namespace for life and may be handed out; a thread or process that `f` starts
    /// stays inside. Calls nest.
    ///
    /// The thread comes back when `f` panics, too. Should the kernel refuse to let it back although
    /// that was tried before, the process is aborted: code that believes itself on the host must
    /// not run in a container.
    ///
    /// A thread that something else than this crate moves between namespaces, by `setns(2)` or
    /// `unshare(2)`, must not have called this before: it would be returned to where it was then.
    /// Debug builds check.
    ///
    /// # Errors
    /// `EPERM`: entering takes `CAP_SYS_ADMIN`, here and in the user namespace that owns this
    /// namespace. `f` has not run then.
    pub fn with<T: Send>(&self, f: impl FnOnce() -> T + Send) -> io::Result<T> {
        let home = here()?;
        if home.namespace.id() == self.id() {
            return Ok(f());
        }
        if !home.enterable {
            match enter(&home.namespace) {
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                    return self.send_a_thread(f);
                }
                entered => entered?,
            }
        }
        enter(self)?;
        let _way_back = WayBack(home.namespace);
        Ok(f())
    }

    fn send_a_thread<T: Send>(&self, f: impl FnOnce() -> T + Send) -> io::Result<T> {
        std::thread::scope(|scope| {
            let inside = || enter(self).map(|()| f());
            let sent = std::thread::Builder::new()
                .name("tidegate-netns".into())
                .spawn_scoped(scope, inside)?;
            sent.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Moves the calling thread into the namespace, for good: a thread that will enter others from
    /// here, often, and has no business where it came from.
    ///
    /// # Errors
    /// As of [`with`](Self::with).
    pub fn enter(&self) -> io::Result<()> {
        enter(self)
    }

    /// Whether the calling thread could enter the namespace that it is in, were it in another: what
    /// [`with`](Self::with) needs to return to it.
    #[must_use]
    pub fn current_is_enterable() -> bool {
        here().is_ok_and(|here| here.enterable || enter(&here.namespace).is_ok())
    }

    /// Reads a sysctl, named as sysctl(8) does (`net.ipv4.ip_forward`; a dot in the name of an
    /// interface is written `/`), without the newline at its end.
    ///
    /// # Errors
    /// `ENOENT` for one that this kernel lacks, `EINVAL` for one that no namespace has of its own.
    pub fn sysctl(&self, name: &str) -> io::Result<String> {
        let path = sysctl_path(name)?;
        let text = self.with(|| fs::read_to_string(path))??;
        Ok(text.trim_end().to_owned())
    }

    /// Sets a sysctl.
    ///
    /// # Errors
    /// As for [`sysctl`](Self::sysctl); `EPERM` or `EACCES` without `CAP_NET_ADMIN` in there,
    /// `EROFS` where `/proc/sys` is mounted read-only, as it is in most containers.
    pub fn set_sysctl(&self, name: &str, value: &str) -> io::Result<()> {
        let path = sysctl_path(name)?;
        // Not fs::write: it would create, and truncate, which these files do not take.
        self.with(|| {
            OpenOptions::new()
                .write(true)
                .open(path)
                .and_then(|mut file| io::Write::write_all(&mut file, value.as_bytes()))
        })?
    }

    /// Opens a sysctl to read it and then perhaps to set it: in a thousand namespaces that have the
    /// same files, the kernel takes longest to find the one that is meant.
    pub(crate) fn open_sysctl(&self, name: &str) -> io::Result<File> {
        let path = sysctl_path(name)?;
        self.with(|| OpenOptions::new().read(true).write(true).open(path))?
    }
}

impl AsFd for Namespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.file.as_fd()
    }
}

impl fmt::Debug for Namespace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Namespace({})", self.id())
    }
}

/// Leaves a namespace again when dropped, also while a panic unwinds.
struct WayBack(Namespace);

impl Drop for WayBack {
    fn drop(&mut self) {
        if let Err(error) = enter(&self.0) {
            tracing::error!(namespace = %self.0.id(), %error, "a thread cannot return to its namespace");
            std::process::abort();
        }
    }
}

fn enter(namespace: &Namespace) -> io::Result<()> {
    move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
    HERE.set(Some(Here { namespace: namespace.clone(), enterable: true }));
    Ok(())
}

fn here() -> io::Result<Here> {
    let here = match HERE.with_borrow(Clone::clone) {
        Some(here) => here,
        None => Here { namespace: Namespace::current()?, enterable: false },
    };
    debug_assert!(
        here.namespace.is_current(),
        "something else has moved this thread out of {:?}",
        here.namespace
    );
    Ok(here)
}

fn current_id() -> io::Result<NamespaceId> {
    let metadata = fs::metadata(OWN)?;
    Ok(NamespaceId { device: metadata.dev(), inode: metadata.ino() })
}

/// Only what a namespace has of its own, which is all below `net`; anything else would change the
/// machine.
fn sysctl_path(name: &str) -> io::Result<PathBuf> {
    let swapped = name.chars().map(|c| match c {
        '.' => '/',
        '/' => '.',
        c => c,
    });
    let path: String = swapped.collect();
    let sound = path.split('/').all(|part| !matches!(part, "" | "." | ".."));
    if !sound || !path.starts_with("net/") {
        return Err(Errno::INVAL.into());
    }
    Ok(Path::new("/proc/sys").join(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reason(path: &str) -> String {
        Namespace::from_path(Path::new(path)).unwrap_err().to_string()
    }

    #[test]
    fn what_is_no_network_namespace_is_told_apart() {
        assert_eq!(reason("/run/netns/no-such"), "no such namespace /run/netns/no-such");
        assert_eq!(reason("/etc/passwd"), "/etc/passwd is not a network namespace");
        assert_eq!(reason("/tmp"), "/tmp is not a network namespace");
        assert_eq!(reason("/proc/self/ns/uts"), "/proc/self/ns/uts is not a network namespace");
    }

    #[test]
    fn a_process_that_does_not_exist_is_named() {
        // Above every possible pid (PID_MAX_LIMIT is 2^22).
        assert_eq!(Namespace::from_pid(4_194_305).unwrap_err().to_string(), "no process 4194305");
        assert_eq!(Namespace::from_pid(0).unwrap_err().to_string(), "no process 0");
    }

    #[test]
    fn the_own_namespace_is_the_same_by_every_way() {
        let current = Namespace::current().unwrap();
        assert!(current.is_current());
        assert_eq!(Namespace::from_pid(std::process::id()).unwrap().id(), current.id());
        let link = fs::read_link("/proc/thread-self/ns/net").unwrap();
        assert_eq!(link.to_str().unwrap(), current.id().to_string());
    }

    #[test]
    fn sysctls_have_the_names_that_sysctl_8_gives_them() {
        let path = sysctl_path("net.ipv4.conf.eth0/7.rp_filter").unwrap();
        assert_eq!(path, Path::new("/proc/sys/net/ipv4/conf/eth0.7/rp_filter"));
    }

    #[test]
    fn no_name_leads_out_of_the_sysctls_of_a_namespace() {
        for name in [
            "kernel.hostname",
            "net",
            "net.",
            "",
            "net.//.kernel.hostname",
            "network.x",
            ".net.ipv4",
        ] {
            assert!(sysctl_path(name).is_err(), "{name}");
        }
    }
}
