//! seccomp filters: an irrevocable allow-list of system calls for all threads.
//!
//! Other calls fail with `EPERM`. Killing the process instead would make an attack more visible,
//! but a future libc may try a new call for which it has a fallback, and a container would then
//! lose its network. The lists were derived from the source of the programs and of the Rust and C
//! libraries that they use, and compared with traces of runs.
//!
//! Filters are built by `seccompiler`, the library of Firecracker. It checks the architecture and
//! compares arguments, the most error-prone part of handwritten filters. For calls that are allowed
//! with any arguments, the kernel consults a bitmap and does not run the filter
//! (`seccomp_cache_check_allow`, kernel/seccomp.c, Linux 5.11).

use rustix::process::getpid;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, apply_filter_all_threads,
};
use std::collections::BTreeMap;

/// A filter was not installed.
#[derive(Debug, thiserror::Error)]
pub enum CallsError {
    /// The filter cannot be built, for example because `seccompiler` does not support the
    /// architecture.
    #[error("system call filter: {0}")]
    Filter(#[from] seccompiler::BackendError),
    /// The kernel rejects the filter.
    #[error("system call filter: {0}")]
    Apply(#[from] seccompiler::Error),
}

/// The purpose of a process, which determines its system calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Work {
    /// The NAT engine: IP sockets and an open device. No new threads.
    Engine,
    /// Published ports and the metrics endpoint: IP sockets, pipes, new threads, reading files.
    Ports,
    /// Watching resolv.conf: reading files, an open pipe.
    Resolvers,
}

/// Calls of every process: memory, time, signals and exit.
const ALWAYS: &[libc::c_long] = &[
    libc::SYS_brk,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_close,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_fcntl,
    libc::SYS_fstat,
    libc::SYS_futex,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_madvise,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_nanosleep,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_read,
    libc::SYS_restart_syscall,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_yield,
    libc::SYS_sigaltstack,
    libc::SYS_write,
    libc::SYS_writev,
];

/// Event loops and sockets.
const SOCKETS: &[libc::c_long] = &[
    libc::SYS_accept4,
    libc::SYS_bind,
    libc::SYS_connect,
    libc::SYS_dup,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_epoll_wait,
    libc::SYS_getpeername,
    libc::SYS_getsockname,
    libc::SYS_getsockopt,
    libc::SYS_listen,
    libc::SYS_readv,
    libc::SYS_recvfrom,
    libc::SYS_recvmmsg,
    libc::SYS_recvmsg,
    libc::SYS_sendmmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_shutdown,
    libc::SYS_wait4,
];

/// Zero-copy forwarding, and the calls of a new thread. Event loops are started on demand, and each
/// scrape has a thread.
const PIPES_AND_THREADS: &[libc::c_long] = &[
    // Fails with `ENOSYS` (see `restrict`), so that the C library falls back to clone(2): the flags
    // of clone3(2) are in memory, which a filter cannot read.
    libc::SYS_clone3,
    libc::SYS_epoll_create1,
    libc::SYS_eventfd2,
    libc::SYS_getpriority,
    libc::SYS_pipe2,
    libc::SYS_rseq,
    libc::SYS_sched_getaffinity,
    libc::SYS_set_robust_list,
    libc::SYS_setpriority,
    libc::SYS_splice,
];

/// Reading files. [`files`](super::files) restricts which ones.
const FILES: &[libc::c_long] = &[
    libc::SYS_getdents64,
    libc::SYS_lseek,
    libc::SYS_newfstatat,
    libc::SYS_readlinkat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_readlink,
    libc::SYS_statx,
];

/// Notifications of file changes.
const CHANGES: &[libc::c_long] = &[libc::SYS_inotify_add_watch, libc::SYS_inotify_init1];

/// Restricts all threads of this process, and its children, to the system calls of `work`. Sets
/// no_new_privs.
///
/// # Errors
/// The kernel does not support filters (`CONFIG_SECCOMP_FILTER`), or another thread has a different
/// filter.
pub(crate) fn restrict(work: Work) -> Result<(), CallsError> {
    if work == Work::Ports {
        apply(
            vec![(libc::SYS_clone3, Vec::new())],
            SeccompAction::Allow,
            SeccompAction::Errno(ENOSYS),
        )?;
    }
    apply(rules(work)?, SeccompAction::Errno(EPERM), SeccompAction::Allow)
}

const EPERM: u32 = libc::EPERM.unsigned_abs();
const ENOSYS: u32 = libc::ENOSYS.unsigned_abs();

fn apply(
    rules: Vec<(i64, Vec<SeccompRule>)>,
    otherwise: SeccompAction,
    action: SeccompAction,
) -> Result<(), CallsError> {
    let rules: BTreeMap<i64, Vec<SeccompRule>> = rules.into_iter().collect();
    let architecture = std::env::consts::ARCH.try_into()?;
    let program: BpfProgram =
        SeccompFilter::new(rules, otherwise, action, architecture)?.try_into()?;
    Ok(apply_filter_all_threads(&program)?)
}

fn rules(work: Work) -> Result<Vec<(i64, Vec<SeccompRule>)>, seccompiler::BackendError> {
    let lists: &[&[libc::c_long]] = match work {
        Work::Engine => &[ALWAYS, SOCKETS],
        Work::Ports => &[ALWAYS, SOCKETS, PIPES_AND_THREADS, FILES],
        Work::Resolvers => &[ALWAYS, FILES, CHANGES],
    };
    let mut rules: Vec<_> =
        lists.iter().copied().flatten().map(|call| (*call, Vec::new())).collect();
    // No executable memory.
    let executable = libc::PROT_EXEC.unsigned_abs();
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        rules.push((call, vec![without(2, executable)?]));
    }
    // abort(3) signals its own process. No other process can be signalled.
    rules.push((libc::SYS_tgkill, vec![equal(0, getpid().as_raw_pid())?]));
    // IP sockets only.
    let families = [libc::AF_INET, libc::AF_INET6].map(|family| equal(0, family));
    rules.push((libc::SYS_socket, families.into_iter().collect::<Result<_, _>>()?));
    if work == Work::Resolvers {
        // Only interface indexes, for the scopes of link-local servers.
        let request = i32::try_from(libc::SIOCGIFINDEX).unwrap_or_default();
        rules.push((libc::SYS_ioctl, vec![equal(1, request)?]));
    }
    if work == Work::Engine {
        rules.push((libc::SYS_setsockopt, Vec::new()));
    }
    if work != Work::Engine {
        // Files are opened for reading only. `O_TMPFILE` contains `O_DIRECTORY` and cannot be
        // excluded, but it fails without write access (open(2)).
        let writing =
            libc::O_WRONLY | libc::O_RDWR | libc::O_CREAT | libc::O_TRUNC | libc::O_APPEND;
        rules.push((libc::SYS_openat, vec![without(2, writing.unsigned_abs())?]));
    }
    if work == Work::Ports {
        // Threads only, no processes.
        let thread = libc::CLONE_THREAD.unsigned_abs();
        let is_thread = masked(0, thread, thread)?;
        rules.push((libc::SYS_clone, vec![is_thread]));
        rules.push((libc::SYS_prctl, vec![equal(0, libc::PR_SET_NAME)?]));
        // Non-blocking mode, close-on-exec and the number of unread bytes.
        let requests = [libc::FIONBIO, libc::FIOCLEX, libc::FIONREAD]
            .map(|request| equal(1, i32::try_from(request).unwrap_or_default()));
        rules.push((libc::SYS_ioctl, requests.into_iter().collect::<Result<_, _>>()?));
        // `CAP_NET_ADMIN` is kept for buffer sizes only. Marks, which firewalls match, and
        // transparent sockets are denied. The filter does not compare the level: the process sets
        // no option with these numbers at other levels, where one of them is TCP_REPAIR.
        let denied = [libc::SO_MARK, libc::IP_TRANSPARENT, libc::IPV6_TRANSPARENT];
        let others = denied.map(|option| condition(2, SeccompCmpOp::Ne, option));
        let others = SeccompRule::new(others.into_iter().collect::<Result<_, _>>()?)?;
        rules.push((libc::SYS_setsockopt, vec![others]));
        // Reading limits only: the pointer to new limits is null.
        let null = SeccompCondition::new(2, SeccompCmpArgLen::Qword, SeccompCmpOp::Eq, 0)?;
        rules.push((libc::SYS_prlimit64, vec![SeccompRule::new(vec![null])?]));
    }
    Ok(rules)
}

/// Matches if the argument equals `number`.
fn equal(argument: u8, number: i32) -> Result<SeccompRule, seccompiler::BackendError> {
    SeccompRule::new(vec![condition(argument, SeccompCmpOp::Eq, number)?])
}

fn condition(
    argument: u8,
    how: SeccompCmpOp,
    number: i32,
) -> Result<SeccompCondition, seccompiler::BackendError> {
    SeccompCondition::new(argument, SeccompCmpArgLen::Dword, how, number.unsigned_abs().into())
}

/// Matches if none of `bits` is set in the argument.
fn without(argument: u8, bits: u32) -> Result<SeccompRule, seccompiler::BackendError> {
    masked(argument, bits, 0)
}

/// Matches if the bits of the argument within `mask` equal `bits`.
fn masked(argument: u8, mask: u32, bits: u32) -> Result<SeccompRule, seccompiler::BackendError> {
    let how = SeccompCmpOp::MaskedEq(mask.into());
    SeccompRule::new(vec![SeccompCondition::new(
        argument,
        SeccompCmpArgLen::Dword,
        how,
        bits.into(),
    )?])
}
