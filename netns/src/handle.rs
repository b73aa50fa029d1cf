//! Handles to network namespaces, and execution of code inside.

use crate::{system, user};
use rustix::fs::{Mode, OFlags, fstat, open, openat};
use rustix::io::Errno;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use std::cell::RefCell;
use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

/// Path of the calling thread's network namespace.
const CURRENT: &str = "/proc/thread-self/ns/net";

/// Directories of sysctls that each namespace keeps open.
const SYSCTLS: [&str; 2] = ["/proc/sys/net/ipv4/", "/proc/sys/net/ipv6/"];

/// The ID of a network namespace: device and inode of its file in `nsfs`.
///
/// Two handles have the same ID if and only if they refer to the same namespace. An ID is
/// meaningless after the namespace has been deleted, because the kernel reuses inode numbers.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
)]
pub struct NamespaceId {
    /// Device number of `nsfs`.
    pub device: u64,
    /// Inode number, as in `net:[4026531840]`.
    pub inode: u64,
}

/// Prints the format of the links in `/proc/PID/ns`: `net:[4026531840]`.
impl fmt::Display for NamespaceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "net:[{}]", self.inode)
    }
}

/// A failure to open a network namespace.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The path does not exist.
    #[error("no such namespace {}", .0.display())]
    NoNamespace(PathBuf),
    /// The path is not a network namespace; it may be a namespace of another type.
    #[error("{} is not a network namespace", .0.display())]
    NotANetworkNamespace(PathBuf),
    /// The process does not exist, or is a zombie.
    #[error("no process {0}")]
    NoProcess(u32),
    /// No permission to access the process of another user.
    #[error(
        "no permission to open the network namespace of process {0} (needs CAP_SYS_PTRACE over it)"
    )]
    ProcessDenied(u32),
    /// No permission to open the path.
    #[error("no permission to open namespace {}", .0.display())]
    PathDenied(PathBuf),
    /// Any other failure, for example exhausted file descriptors.
    #[error("open namespace {}: {source}", .path.display())]
    Failed {
        /// Path of the namespace.
        path: PathBuf,
        /// Error code of the kernel.
        source: io::Error,
    },
}

/// A network namespace, kept alive by a file descriptor.
///
/// Clones are handles to the same namespace. The namespace exists as long as any handle does,
/// regardless of the processes in it.
#[derive(Clone)]
pub struct Namespace(Arc<Inner>);

struct Inner {
    file: File,
    id: NamespaceId,
    path: Option<PathBuf>,
    /// The directories [`SYSCTLS`] as seen inside. Those of all namespaces are in
    /// the same directory, and thus in the same chain of the dentry cache. A lookup from
    /// `/proc/sys/net` takes time in proportion to the number of namespaces (`proc_sys_compare`,
    /// fs/proc/proc_sysctl.c).
    sysctls: [OnceLock<OwnedFd>; SYSCTLS.len()],
}

/// The known location of a thread.
#[derive(Clone)]
struct Location {
    namespace: Namespace,
    /// The thread may enter this namespace, and thus can return to it.
    enterable: bool,
}

thread_local! {
    /// Location of the calling thread. It is determined once and then updated by [`enter`], the
    /// only function that moves threads. A query to the kernel would take longer than entering and
    /// leaving a namespace.
    static LOCATION: RefCell<Option<Location>> = const { RefCell::new(None) };
}

impl Namespace {
    /// Returns the network namespace of the calling thread. Within [`with`](Self::with), this is
    /// the entered namespace.
    ///
    /// # Errors
    /// `/proc` is not mounted, or the process is out of file descriptors.
    pub fn current() -> io::Result<Self> {
        let id = current_id()?;
        LOCATION.with_borrow_mut(|location| match location {
            Some(location) if location.namespace.id() == id => Ok(location.namespace.clone()),
            _ => {
                let namespace = Self::from_file(File::open(CURRENT)?, None)?;
                Ok(location.insert(Location { namespace, enterable: false }).namespace.clone())
            }
        })
    }

    /// Creates a namespace whose only interface is a loopback interface that is down. The kernel
    /// deletes it with its last handle, process and socket.
    ///
    /// # Errors
    /// `EPERM` without `CAP_SYS_ADMIN`, `ENOSPC` at the limit `user.max_net_namespaces`.
    pub fn create() -> io::Result<Self> {
        let made = std::thread::Builder::new().name("tidegate-netns".into()).spawn(|| {
            // SAFETY: no state shared between threads is unshared. Only the network namespace of
            // this thread changes, and the thread exits afterwards.
            unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }?;
            File::open(CURRENT)
        })?;
        let file = made.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        Self::from_file(file, None)
    }

    /// Creates a namespace like [`create`](Self::create), owned by a new user namespace. The user
    /// namespace is a child of the caller's and maps every ID to itself. A process that joins [the
    /// owner](Self::owner) has all capabilities over the network namespace and none over the
    /// caller's namespaces.
    ///
    /// # Errors
    /// `EPERM` without `CAP_SETUID`, `CAP_SETGID` and `CAP_SETFCAP`, or if the host restricts user
    /// namespaces; `ENOSPC` at the limit `user.max_user_namespaces` or `user.max_net_namespaces`.
    pub fn create_in_user_namespace() -> io::Result<Self> {
        Self::from_file(user::create_owned_network()?, None)
    }

    /// Opens the namespace at `path`: a bind mount as created by `ip netns` (`/run/netns/blue`), or
    /// `/proc/PID/ns/net`.
    ///
    /// Success does not imply permission to enter, which requires `CAP_SYS_ADMIN` in the owning
    /// user namespace and is checked by [`with`](Self::with).
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn from_path(path: &Path) -> Result<Self, OpenError> {
        let path = std::path::absolute(path)
            .map_err(|source| OpenError::Failed { path: path.to_owned(), source })?;
        let failed = |source: io::Error| match source.kind() {
            io::ErrorKind::NotFound => OpenError::NoNamespace(path.clone()),
            io::ErrorKind::PermissionDenied => OpenError::PathDenied(path.clone()),
            _ => OpenError::Failed { path: path.clone(), source },
        };
        // The path is user input. Opening a FIFO would block, and a terminal could become the
        // controlling terminal.
        let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
        let file = OpenOptions::new().read(true).custom_flags(flags).open(&path).map_err(failed)?;
        if !system::is_network_namespace(&file) {
            return Err(OpenError::NotANetworkNamespace(path));
        }
        Self::from_file(file, Some(path.clone())).map_err(failed)
    }

    /// Opens the network namespace of the main thread of process `pid`.
    ///
    /// # Errors
    /// Mainly [`OpenError::NoProcess`] and [`OpenError::ProcessDenied`].
    pub fn from_pid(pid: u32) -> Result<Self, OpenError> {
        Self::from_path(Path::new(&format!("/proc/{pid}/ns/net"))).map_err(|error| match error {
            OpenError::NoNamespace(_) => OpenError::NoProcess(pid),
            OpenError::PathDenied(_) => OpenError::ProcessDenied(pid),
            error => error,
        })
    }

    fn from_file(file: File, path: Option<PathBuf>) -> io::Result<Self> {
        let stat = fstat(&file)?;
        let id = NamespaceId { device: stat.st_dev, inode: stat.st_ino };
        Ok(Self(Arc::new(Inner { file, id, path, sysctls: Default::default() })))
    }

    /// Returns the ID of the namespace.
    #[must_use]
    pub fn id(&self) -> NamespaceId {
        self.0.id
    }

    /// Returns the absolute path at which the namespace was opened, if any.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        self.0.path.as_deref()
    }

    /// Returns the user namespace that owns this namespace. Capabilities in that user namespace
    /// apply to this namespace.
    ///
    /// # Errors
    /// `EPERM` if it is neither the caller's user namespace nor a descendant.
    pub fn owner(&self) -> io::Result<OwnedFd> {
        system::owner(&self.0.file)
    }

    /// Returns whether capabilities of the calling process apply to this namespace, for example to
    /// bind privileged ports.
    #[must_use]
    pub fn belongs_to_own_user_namespace(&self) -> bool {
        self.owner().and_then(user::is_own_user_namespace).unwrap_or(false)
    }

    /// Returns whether the calling thread is in this namespace. Queries the kernel and returns
    /// `false` on failure.
    #[must_use]
    pub fn is_current(&self) -> bool {
        current_id().is_ok_and(|id| id == self.id())
    }

    /// Enters the namespace on the calling thread, runs `f` and returns to the previous namespace.
    /// If the thread is already inside, just runs `f`.
    ///
    /// If the thread could not return, because its current namespace is owned by an ancestor user
    /// namespace, it does not move. A temporary thread enters and runs `f` instead, which costs
    /// about 30 µs instead of 5 µs.
    ///
    /// Intended for short calls, such as creating a socket or opening a file in `/proc/sys/net`.
    /// Objects created by `f` belong to the namespace permanently and can be returned. Threads and
    /// processes started by `f` stay inside. Calls can be nested.
    ///
    /// The thread also returns if `f` panics. If the kernel unexpectedly refuses the return, the
    /// process aborts, because code meant for the host must not run in a container.
    ///
    /// Threads that are moved between namespaces by other code (`setns(2)`, `unshare(2)`) must not
    /// have called this method before. They would return to the outdated location. Debug builds
    /// check this.
    ///
    /// # Errors
    /// `EPERM` without `CAP_SYS_ADMIN` in the thread's own user namespace and in the user namespace
    /// that owns this namespace. `f` has not run in that case.
    pub fn with<T: Send>(&self, f: impl FnOnce() -> T + Send) -> io::Result<T> {
        let previous = current_location()?;
        if previous.namespace.id() == self.id() {
            return Ok(f());
        }
        if !previous.enterable {
            match enter(&previous.namespace) {
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                    return self.run_on_temporary_thread(f);
                }
                entered => entered?,
            }
        }
        enter(self)?;
        let _guard = ReturnGuard(previous.namespace);
        Ok(f())
    }

    fn run_on_temporary_thread<T: Send>(&self, f: impl FnOnce() -> T + Send) -> io::Result<T> {
        std::thread::scope(|scope| {
            let inside = || enter(self).map(|()| f());
            let thread = std::thread::Builder::new()
                .name("tidegate-netns".into())
                .spawn_scoped(scope, inside)?;
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Moves the calling thread into the namespace permanently. For threads that often enter other
    /// namespaces and do not need the original one.
    ///
    /// # Errors
    /// Same as [`with`](Self::with).
    pub fn enter(&self) -> io::Result<()> {
        enter(self)
    }

    /// Returns whether the calling thread may enter its current namespace, which
    /// [`with`](Self::with) requires to return to it.
    #[must_use]
    pub fn current_is_enterable() -> bool {
        current_location()
            .is_ok_and(|location| location.enterable || enter(&location.namespace).is_ok())
    }

    /// Reads a sysctl and trims the trailing newline. `name` has the syntax of sysctl(8):
    /// `net.ipv4.ip_forward`, with `/` for a dot in an interface name.
    ///
    /// # Errors
    /// `ENOENT` if the kernel lacks the sysctl, `EINVAL` if it is not per-namespace.
    pub fn sysctl(&self, name: &str) -> io::Result<String> {
        let text = io::read_to_string(self.open_sysctl(name, OFlags::RDONLY)?)?;
        Ok(text.trim_end().to_owned())
    }

    /// Sets a sysctl.
    ///
    /// # Errors
    /// Same as [`sysctl`](Self::sysctl); `EPERM` or `EACCES` without `CAP_NET_ADMIN` in the
    /// namespace, `EROFS` if `/proc/sys` is mounted read-only, as in most containers.
    pub fn set_sysctl(&self, name: &str, value: &str) -> io::Result<()> {
        let mut file = self.open_sysctl(name, OFlags::WRONLY)?;
        io::Write::write_all(&mut file, value.as_bytes())
    }

    /// Opens a sysctl with the access mode `mode`. The file can then be used from any namespace.
    pub(crate) fn open_sysctl(&self, name: &str, mode: OFlags) -> io::Result<File> {
        let path = sysctl_path(name)?;
        let mode = mode | OFlags::CLOEXEC;
        self.with(|| {
            for (family, known) in SYSCTLS.into_iter().zip(&self.0.sysctls) {
                if let Some(rest) = path.strip_prefix(family) {
                    let directory = directory(family, known)?;
                    return Ok(openat(directory, rest, mode, Mode::empty())?.into());
                }
            }
            Ok(open(&*path, mode, Mode::empty())?.into())
        })?
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

/// Returns the thread to a namespace when dropped, also during unwinding.
struct ReturnGuard(Namespace);

impl Drop for ReturnGuard {
    fn drop(&mut self) {
        if let Err(error) = enter(&self.0) {
            tracing::error!(namespace = %self.0.id(), %error, "thread cannot return to its namespace; aborting");
            std::process::abort();
        }
    }
}

fn enter(namespace: &Namespace) -> io::Result<()> {
    move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
    LOCATION.set(Some(Location { namespace: namespace.clone(), enterable: true }));
    Ok(())
}

fn current_location() -> io::Result<Location> {
    let location = match LOCATION.with_borrow(Clone::clone) {
        Some(location) => location,
        None => Location { namespace: Namespace::current()?, enterable: false },
    };
    debug_assert!(
        location.namespace.is_current(),
        "thread moved out of {:?} by other code",
        location.namespace
    );
    Ok(location)
}

fn current_id() -> io::Result<NamespaceId> {
    let metadata = fs::metadata(CURRENT)?;
    Ok(NamespaceId { device: metadata.dev(), inode: metadata.ino() })
}

/// Returns the directory at `path`, opened by the first caller.
fn directory<'a>(path: &str, known: &'a OnceLock<OwnedFd>) -> io::Result<&'a OwnedFd> {
    if let Some(directory) = known.get() {
        return Ok(directory);
    }
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = open(path, flags, Mode::empty())?;
    Ok(known.get_or_init(|| directory))
}

/// Restricts names to per-namespace sysctls, which are all below `net`. Others would change the
/// whole host.
fn sysctl_path(name: &str) -> io::Result<String> {
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
    Ok(format!("/proc/sys/{path}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reason(path: &str) -> String {
        Namespace::from_path(Path::new(path)).unwrap_err().to_string()
    }

    #[test]
    fn paths_that_are_not_network_namespaces_are_rejected() {
        assert_eq!(reason("/run/netns/no-such"), "no such namespace /run/netns/no-such");
        assert_eq!(reason("/etc/passwd"), "/etc/passwd is not a network namespace");
        assert_eq!(reason("/tmp"), "/tmp is not a network namespace");
        assert_eq!(reason("/proc/self/ns/uts"), "/proc/self/ns/uts is not a network namespace");
    }

    #[test]
    fn error_names_a_missing_process() {
        // Above every possible pid (PID_MAX_LIMIT is 2^22).
        assert_eq!(Namespace::from_pid(4_194_305).unwrap_err().to_string(), "no process 4194305");
        assert_eq!(Namespace::from_pid(0).unwrap_err().to_string(), "no process 0");
    }

    #[test]
    fn current_namespace_has_one_id() {
        let current = Namespace::current().unwrap();
        assert!(current.is_current());
        assert_eq!(Namespace::from_pid(std::process::id()).unwrap().id(), current.id());
        let link = fs::read_link("/proc/thread-self/ns/net").unwrap();
        assert_eq!(link.to_str().unwrap(), current.id().to_string());
    }

    #[test]
    fn sysctl_names_have_the_syntax_of_sysctl_8() {
        let path = sysctl_path("net.ipv4.conf.eth0/7.rp_filter").unwrap();
        assert_eq!(path, "/proc/sys/net/ipv4/conf/eth0.7/rp_filter");
    }

    #[test]
    fn sysctl_names_outside_the_namespace_are_rejected() {
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
