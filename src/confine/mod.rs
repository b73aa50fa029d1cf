//! What a process gives up once it holds everything that its work takes.
//!
//! | | privileges | files | system calls |
//! |---|---|---|---|
//! | `publish --to`, `docker-proxy` | for the sizes of pipes and buffers | read: its own figures in `/proc` | [`Work::Ports`] |
//! | the same, showing clients' addresses; `publish --netns` | those that sockets and routes take | | |
//! | `slirp4netns` | by `--enable-sandbox` | none, by `--enable-sandbox` | [`Work::Engine`], by `--enable-seccomp` |
//! | its process that follows resolv.conf | none | read: `/etc`, `/run`, and where the file leads | [`Work::Resolvers`] |
//!
//! Privileges and files are a thread's, and those that it starts inherit them: they go before there
//! are other threads. System calls are filtered when all is set up, for all threads.

mod calls;
mod files;

pub(crate) use calls::CallsError;
use calls::Work;
use files::Domain;
use rustix::io::Errno;
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_no_new_privs,
};
use std::path::Path;

/// A step that the kernel has refused.
#[derive(Debug, thiserror::Error)]
#[error("{step}: {source}")]
pub(crate) struct PrivilegeError {
    pub(crate) step: &'static str,
    pub(crate) source: Errno,
}

/// Takes all privileges but `kept` from the calling thread, and from those that it starts.
///
/// # Errors
/// The kernel refuses.
pub(crate) fn drop_privileges(kept: CapabilitySet) -> Result<(), PrivilegeError> {
    let failed = |step| move |source| PrivilegeError { step, source };
    set_no_new_privs(true).map_err(failed("no new privileges"))?;
    // As long as one may: without new privileges the set means nothing any more, so that is not
    // worth failing for.
    for capability in CapabilitySet::all().difference(kept).iter() {
        let _ = remove_capability_from_bounding_set(capability);
    }
    clear_ambient_capability_set().map_err(failed("clear the ambient capabilities"))?;
    let permitted = capabilities(None).map_err(failed("read the capabilities"))?.permitted;
    let kept = permitted.intersection(kept);
    let sets =
        CapabilitySets { effective: kept, permitted: kept, inheritable: CapabilitySet::empty() };
    set_capabilities(None, sets).map_err(failed("drop the capabilities"))
}

/// Leaves all threads of this process the system calls that the NAT engine takes.
///
/// # Errors
/// The kernel has no filters, for instance.
pub(crate) fn engine_is_ready() -> Result<(), CallsError> {
    calls::restrict(Work::Engine)
}

/// What a proxy reads: what the page of metrics tells of this process (`procfs`), and how large
/// buffers may be.
const OWN_FIGURES: [&str; 5] = [
    "/proc/self",
    "/proc/stat",
    "/proc/sys/kernel/osrelease",
    "/proc/sys/net/core/rmem_max",
    "/proc/sys/net/ipv4/ip_local_port_range",
];

/// What libraries ask the kernel once, when they first need it: they could not any more
/// (`/proc/self/auxv`, prctl(2)).
fn ask_beforehand() {
    let _ = rustix::param::page_size();
}

/// Confines a process that carries connections and datagrams from sockets that are bound to TCP
/// ports `connected`, and to UDP ports: to be called before it has other threads.
/// [`proxy_is_ready`] is the second step.
pub(crate) fn proxy_begins(connected: &[u16]) {
    ask_beforehand();
    // Without the first, pipes are small where a user has many (pipe(7), pipe-user-pages-soft), and
    // without the second receive buffers (socket(7), SO_RCVBUFFORCE); the filter of system calls
    // takes away what else they are good for.
    warn(drop_privileges(CapabilitySet::SYS_RESOURCE | CapabilitySet::NET_ADMIN));
    warn(files::restrict(Domain { readable: &OWN_FIGURES.map(Path::new), connected }));
}

/// The same for one that makes sockets with clients' addresses, and in containers' namespaces: it
/// keeps what that takes.
pub(crate) fn privileged_proxy_begins() {
    let kept = CapabilitySet::SYS_RESOURCE
        | CapabilitySet::NET_ADMIN
        | CapabilitySet::NET_RAW
        | CapabilitySet::NET_BIND_SERVICE
        | CapabilitySet::SYS_ADMIN;
    warn(drop_privileges(kept));
}

/// Takes the system calls away that a proxy has no use for.
pub(crate) fn proxy_is_ready() {
    warn(calls::restrict(Work::Ports));
}

/// A kernel that does not know how to confine is no reason to publish nothing.
fn warn<E: std::fmt::Display>(result: Result<(), E>) {
    if let Err(error) = result {
        tracing::warn!(%error, "this process keeps more privileges than it needs");
    }
}

/// Confines a process that does nothing but follow `path` (resolv.conf) and tell of it.
pub(crate) fn follower(path: &Path) {
    ask_beforehand();
    let target = std::fs::canonicalize(path).ok();
    let places = [Path::new("/etc"), Path::new("/run")];
    let places: Vec<&Path> =
        places.into_iter().chain(target.as_deref().and_then(Path::parent)).collect();
    warn(drop_privileges(CapabilitySet::empty()));
    warn(files::restrict(Domain { readable: &places, connected: &[] }));
    warn(calls::restrict(Work::Resolvers));
}
