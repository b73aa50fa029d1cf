//! Which system calls are left (`--enable-seccomp`): an allow-list, for all threads, for good.
//!
//! What is not on it fails with `EPERM`. To end the process instead would tell more of an attack, but turn a call of some future libc, which can do
//! without it, into the end of a container's network. The list was made by reading what the engine, the control loop and the Rust and C libraries below them
//! call, not by watching a run.
//!
//! The filter is built by `seccompiler`, Firecracker's: it checks the architecture, and comparing arguments is where filters written by hand go wrong.

use rustix::process::getpid;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    apply_filter_all_threads,
};
use std::collections::BTreeMap;

/// Why there is no filter.
#[derive(Debug, thiserror::Error)]
pub(super) enum SeccompError {
    /// Of no architecture that the crate knows, for instance.
    #[error("--enable-seccomp: {0}")]
    Filter(#[from] seccompiler::BackendError),
    /// The kernel refuses it.
    #[error("--enable-seccomp: {0}")]
    Apply(#[from] seccompiler::Error),
}

/// Calls that are allowed whatever their arguments.
const ALLOWED: &[libc::c_long] = &[
    // Sockets that are there.
    libc::SYS_accept4,
    libc::SYS_bind,
    libc::SYS_connect,
    libc::SYS_getpeername,
    libc::SYS_getsockname,
    libc::SYS_getsockopt,
    libc::SYS_listen,
    libc::SYS_recvfrom,
    libc::SYS_recvmmsg,
    libc::SYS_recvmsg,
    libc::SYS_sendmmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
    // Descriptors that are there.
    libc::SYS_close,
    libc::SYS_dup,
    libc::SYS_fcntl,
    libc::SYS_fstat,
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_write,
    libc::SYS_writev,
    // Events and time.
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_epoll_wait,
    libc::SYS_futex,
    libc::SYS_nanosleep,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_restart_syscall,
    libc::SYS_sched_yield,
    // Memory; what can be executed is below.
    libc::SYS_brk,
    libc::SYS_getrandom,
    libc::SYS_madvise,
    libc::SYS_mremap,
    libc::SYS_munmap,
    // Threads that end, and the end.
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_wait4,
];

/// Leaves all threads of this process no more than that, and its children too.
pub(super) fn confine() -> Result<(), SeccompError> {
    let architecture = std::env::consts::ARCH.try_into()?;
    let refused = SeccompAction::Errno(libc::EPERM.unsigned_abs());
    let filter = SeccompFilter::new(rules()?, refused, SeccompAction::Allow, architecture)?;
    let program: BpfProgram = filter.try_into()?;
    Ok(apply_filter_all_threads(&program)?)
}

fn rules() -> Result<BTreeMap<i64, Vec<SeccompRule>>, seccompiler::BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = ALLOWED.iter().map(|call| (*call, Vec::new())).collect();
    // No memory becomes program.
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        let executable = libc::PROT_EXEC.unsigned_abs().into();
        rules.insert(call, vec![rule(2, SeccompCmpOp::MaskedEq(executable), 0)?]);
    }
    // Sockets to the network, and to nobody else.
    let families = [libc::AF_INET, libc::AF_INET6].map(|family| rule(0, SeccompCmpOp::Eq, family));
    rules.insert(libc::SYS_socket, families.into_iter().collect::<Result<_, _>>()?);
    // A panic ends this process (raise(3)), and no other one is signalled; the process that reads the resolvers ends by itself.
    rules.insert(libc::SYS_tgkill, vec![rule(0, SeccompCmpOp::Eq, getpid().as_raw_pid())?]);
    Ok(rules)
}

fn rule(argument: u8, how: SeccompCmpOp, with: i32) -> Result<SeccompRule, seccompiler::BackendError> {
    let with = with.unsigned_abs().into();
    SeccompRule::new(vec![SeccompCondition::new(argument, SeccompCmpArgLen::Dword, how, with)?])
}
