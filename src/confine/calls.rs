//! Which system calls are left: an allow-list, for all threads, for good.
//!
//! What is not on it fails with `EPERM`. To end the process instead would tell more of an attack,
//! but turn a call of some future libc, which can do without it, into the end of a container's
//! network. The lists were made by reading what the programs and the Rust and C libraries below
//! them call; traces of runs were compared with them afterwards.
//!
//! The filter is built by `seccompiler`, Firecracker's: it checks the architecture, and comparing
//! arguments is where filters written by hand go wrong. The kernel looks calls up that are allowed
//! whatever their arguments in a bitmap (`seccomp_cache_check_allow`, kernel/seccomp.c,
//! Linux 5.11): the filter itself does not run for them.

use rustix::process::getpid;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, apply_filter_all_threads,
};
use std::collections::BTreeMap;

/// Why there is no filter.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CallsError {
    /// Of no architecture that the crate knows, for instance.
    #[error("filter of system calls: {0}")]
    Filter(#[from] seccompiler::BackendError),
    /// The kernel refuses it.
    #[error("filter of system calls: {0}")]
    Apply(#[from] seccompiler::Error),
}

/// What a process does from now on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Work {
    /// The NAT engine: sockets to the network, a device that is there, no new threads.
    Engine,
    /// Published ports and a page of metrics: sockets to the network, pipes, new threads, files to
    /// read.
    Ports,
    /// Following resolv.conf: files to read, a pipe that is there.
    Resolvers,
}

/// Memory, time, and the end, whatever the work.
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

/// An event loop and its sockets.
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

/// What moves payload without copying it, and what a thread calls when it begins: event loops are
/// started as they are needed, and each scrape has a thread.
const PIPES_AND_THREADS: &[libc::c_long] = &[
    // Its flags are in memory, where a filter cannot look: it does not exist here (`ENOSYS`, see
    // `restrict`), and the C library calls clone(2).
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

/// Files that are read; which ones is decided by [`files`](super::files).
const FILES: &[libc::c_long] = &[
    libc::SYS_getdents64,
    libc::SYS_lseek,
    libc::SYS_newfstatat,
    libc::SYS_readlinkat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_readlink,
    libc::SYS_statx,
];

/// Changes of files.
const CHANGES: &[libc::c_long] = &[libc::SYS_inotify_add_watch, libc::SYS_inotify_init1];

/// Leaves all threads of this process what `work` takes, and its children too. The process gets no
/// new privileges.
///
/// # Errors
/// The kernel has no filters (`CONFIG_SECCOMP_FILTER`), or another thread has a filter of its own.
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
    // No memory becomes program.
    let executable = libc::PROT_EXEC.unsigned_abs();
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        rules.push((call, vec![without(2, executable)?]));
    }
    // A panic ends this process (raise(3)), and no other one is signalled.
    rules.push((libc::SYS_tgkill, vec![equal(0, getpid().as_raw_pid())?]));
    // Sockets to the network, and to nobody else.
    let families = [libc::AF_INET, libc::AF_INET6].map(|family| equal(0, family));
    rules.push((libc::SYS_socket, families.into_iter().collect::<Result<_, _>>()?));
    if work == Work::Resolvers {
        // Of a socket, nothing is asked but the number of the link that a link-local server is at.
        let question = i32::try_from(libc::SIOCGIFINDEX).unwrap_or_default();
        rules.push((libc::SYS_ioctl, vec![equal(1, question)?]));
    }
    if work == Work::Engine {
        rules.push((libc::SYS_setsockopt, Vec::new()));
    }
    if work != Work::Engine {
        // Files are read. `O_TMPFILE` contains `O_DIRECTORY`, and means nothing without a way to
        // write.
        let writing =
            libc::O_WRONLY | libc::O_RDWR | libc::O_CREAT | libc::O_TRUNC | libc::O_APPEND;
        rules.push((libc::SYS_openat, vec![without(2, writing.unsigned_abs())?]));
    }
    if work == Work::Ports {
        // Threads, and no processes.
        let thread = libc::CLONE_THREAD.unsigned_abs();
        let is_thread = masked(0, thread, thread)?;
        rules.push((libc::SYS_clone, vec![is_thread]));
        rules.push((libc::SYS_prctl, vec![equal(0, libc::PR_SET_NAME)?]));
        // Sockets wait or do not, and tell how much is unread; they are asked for nothing else.
        let requests = [libc::FIONBIO, libc::FIOCLEX, libc::FIONREAD]
            .map(|request| equal(1, i32::try_from(request).unwrap_or_default()));
        rules.push((libc::SYS_ioctl, requests.into_iter().collect::<Result<_, _>>()?));
        // `CAP_NET_ADMIN` is there for the sizes of buffers, and for nothing else: not for marks,
        // which tell firewalls what may pass, and not for others' addresses. On other levels nobody
        // asks for these numbers (but for TCP_REPAIR).
        let privileged = [libc::SO_MARK, libc::IP_TRANSPARENT, libc::IPV6_TRANSPARENT];
        let others = privileged.map(|option| condition(2, SeccompCmpOp::Ne, option));
        let others = SeccompRule::new(others.into_iter().collect::<Result<_, _>>()?)?;
        rules.push((libc::SYS_setsockopt, vec![others]));
        // Limits are read.
        let nothing = SeccompCondition::new(2, SeccompCmpArgLen::Qword, SeccompCmpOp::Eq, 0)?;
        rules.push((libc::SYS_prlimit64, vec![SeccompRule::new(vec![nothing])?]));
    }
    Ok(rules)
}

/// The argument is that number.
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

/// The argument has none of these bits.
fn without(argument: u8, bits: u32) -> Result<SeccompRule, seccompiler::BackendError> {
    masked(argument, bits, 0)
}

/// Of these bits, the argument has those.
fn masked(argument: u8, mask: u32, bits: u32) -> Result<SeccompRule, seccompiler::BackendError> {
    let how = SeccompCmpOp::MaskedEq(mask.into());
    SeccompRule::new(vec![SeccompCondition::new(
        argument,
        SeccompCmpArgLen::Dword,
        how,
        bits.into(),
    )?])
}
