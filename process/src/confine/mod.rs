//! Confinement: processes drop privileges, file access and system calls that they do not need.
//!
//! | process | capabilities | files | system calls |
//! |---|---|---|---|
//! | `publish --to`, `docker-proxy` | for pipe and buffer sizes | read: own statistics in `/proc` | [`Work::Ports`] |
//! | the same with client source addresses; `publish --netns` | for sockets and routes | not confined | not confined |
//! | `slirp4netns` | with `--enable-sandbox` | none, with `--enable-sandbox` | [`Work::Engine`], with `--enable-seccomp` |
//! | its process that watches resolv.conf | none | read: `/etc`, `/run`, and the directory that the file links to | [`Work::Resolvers`] |
//!
//! Capabilities and landlock domains belong to a thread and are inherited by the threads that it
//! creates, so they are dropped while the process has one thread. The system call filter is
//! installed for all threads after the setup.

mod calls;
mod files;

pub use calls::CallsError;
use calls::Work;
use files::Domain;
use rustix::io::Errno;
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_no_new_privs,
};
use std::path::Path;

/// The kernel rejected a step.
#[derive(Debug, thiserror::Error)]
#[error("{step}: {source}")]
pub struct PrivilegeError {
    /// The step.
    pub step: &'static str,
    /// The error of the kernel.
    pub source: Errno,
}

/// Drops all capabilities except `kept` from the calling thread. Threads that it creates inherit
/// this. Sets no_new_privs.
///
/// # Errors
/// A system call failed.
pub fn drop_privileges(kept: CapabilitySet) -> Result<(), PrivilegeError> {
    let failed = |step| move |source| PrivilegeError { step, source };
    set_no_new_privs(true).map_err(failed("set no_new_privs"))?;
    // Errors are ignored: removing capabilities from the bounding set requires CAP_SETPCAP, and
    // with no_new_privs the bounding set has no effect.
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

/// Restricts all threads of this process to the system calls of the NAT engine.
///
/// # Errors
/// The filter was not installed.
pub fn filter_engine_calls() -> Result<(), CallsError> {
    calls::restrict(Work::Engine)
}

/// Files that a proxy reads: process metrics (`procfs`), and the limits of buffers and ports.
const PROXY_FILES: [&str; 5] = [
    "/proc/self",
    "/proc/stat",
    "/proc/sys/kernel/osrelease",
    "/proc/sys/net/core/rmem_max",
    "/proc/sys/net/ipv4/ip_local_port_range",
];

/// Initializes values that libraries read from the kernel on first use (`/proc/self/auxv`,
/// prctl(2)), which fails after the confinement.
fn initialize_libraries() {
    let _ = rustix::param::page_size();
}

/// Confines a process that forwards published ports. `connected` are the TCP ports that it connects
/// to. UDP ports are not restricted. Must be called while the process has one thread.
/// [`filter_proxy_calls`] is the second step.
pub fn confine_proxy(connected: &[u16]) {
    initialize_libraries();
    // CAP_SYS_RESOURCE: pipes are small without it if the user has many (pipe(7),
    // pipe-user-pages-soft). CAP_NET_ADMIN: large receive buffers (socket(7), SO_RCVBUFFORCE). The
    // system call filter denies the other uses of both.
    warn(drop_privileges(CapabilitySet::SYS_RESOURCE | CapabilitySet::NET_ADMIN));
    warn(files::restrict(Domain { readable: &PROXY_FILES.map(Path::new), connected }));
}

/// Confines a process that forwards published ports with client source addresses, or in the
/// namespaces of containers. It keeps the capabilities for that. Must be called while the process
/// has one thread.
pub fn confine_privileged_proxy() {
    let kept = CapabilitySet::SYS_RESOURCE
        | CapabilitySet::NET_ADMIN
        | CapabilitySet::NET_RAW
        | CapabilitySet::NET_BIND_SERVICE
        | CapabilitySet::SYS_ADMIN;
    warn(drop_privileges(kept));
}

/// Restricts all threads of this process to the system calls of a proxy.
pub fn filter_proxy_calls() {
    warn(calls::restrict(Work::Ports));
}

/// Logs an error. Ports are published even if the kernel does not support a confinement.
fn warn<E: std::fmt::Display>(result: Result<(), E>) {
    if let Err(error) = result {
        tracing::warn!(%error, "confinement incomplete; the process keeps unneeded privileges");
    }
}

/// Confines a process that only watches `path` (resolv.conf).
pub fn confine_resolv_conf_watch(path: &Path) {
    initialize_libraries();
    let target = std::fs::canonicalize(path).ok();
    let directories = [Path::new("/etc"), Path::new("/run")];
    let directories: Vec<&Path> =
        directories.into_iter().chain(target.as_deref().and_then(Path::parent)).collect();
    warn(drop_privileges(CapabilitySet::empty()));
    warn(files::restrict(Domain { readable: &directories, connected: &[] }));
    warn(calls::restrict(Work::Resolvers));
}
