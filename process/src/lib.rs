//! Setup of the own process: confinement, resident memory and limits.
//!
//! | module | purpose |
//! |---|---|
//! | [`confine`] | drops privileges, file access and system calls |
//! | [`startup_pages`] | releases pages that only startup used |

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::sync::OnceLock;

pub mod confine;
pub mod startup_pages;

/// The exit status of a failed command.
pub const EXIT_FAILURE: u8 = 1;

/// The exit status of an invalid command line.
pub const EXIT_USAGE: u8 = 2;

/// Returns whether the calling thread has a system call filter and cannot gain privileges, as with
/// the hardening of a service unit. Child processes inherit both.
#[must_use]
pub fn is_restricted() -> bool {
    use rustix::thread::{SecureComputingMode, no_new_privs, secure_computing_mode};
    no_new_privs().unwrap_or(false)
        && matches!(secure_computing_mode(), Ok(SecureComputingMode::Filter))
}

/// Runs `register`, which installs handlers of signals, while the calling thread blocks all
/// signals. Those that arrive in between are handled afterwards.
///
/// signal-hook, which tokio uses as well, installs the handler of the kernel before the action that
/// it runs. A signal between the two steps would have no effect at all: it neither kills the
/// process nor is it read later.
pub fn without_lost_signals<T>(register: impl FnOnce() -> T) -> T {
    // SAFETY: the sets are local and valid for the calls, and an all-zero `sigset_t` is valid.
    let previous = unsafe {
        let (mut all, mut previous) = (std::mem::zeroed(), std::mem::zeroed());
        libc::sigfillset(&raw mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut previous);
        previous
    };
    let result = register();
    // SAFETY: as above.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const previous, std::ptr::null_mut()) };
    result
}

/// The limit of file descriptors before [`raise_descriptor_limit`].
static INHERITED_DESCRIPTOR_LIMIT: OnceLock<Rlimit> = OnceLock::new();

/// Raises the limit of file descriptors: each connection needs two, and each endpoint several. The
/// new limit is that of the kernel for a process (`fs.nr_open`) with `CAP_SYS_RESOURCE`, otherwise
/// the hard limit.
pub fn raise_descriptor_limit() {
    let limit = getrlimit(Resource::Nofile);
    INHERITED_DESCRIPTOR_LIMIT.get_or_init(|| limit);
    let highest = std::fs::read_to_string("/proc/sys/fs/nr_open");
    let highest = highest.ok().and_then(|text| text.trim().parse().ok());
    let highest = highest.filter(|highest| limit.maximum.is_some_and(|hard| hard < *highest));
    let set = |value| setrlimit(Resource::Nofile, Rlimit { current: value, maximum: value });
    // On error, the limit is unchanged.
    if highest.is_none() || set(highest).is_err() {
        let _ = set(limit.maximum);
    }
}

/// Undoes [`raise_descriptor_limit`], for a child process before execve(2). Programs that use
/// select(2), or close all possible descriptors, expect a low soft limit. Async-signal-safe.
pub fn restore_descriptor_limit() {
    if let Some(limit) = INHERITED_DESCRIPTOR_LIMIT.get() {
        // On error, the limit is unchanged.
        let _ = setrlimit(Resource::Nofile, *limit);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};

    #[test]
    fn a_signal_during_the_registration_is_handled_afterwards() {
        static HANDLED: AtomicBool = AtomicBool::new(false);
        extern "C" fn handle(_: libc::c_int) {
            HANDLED.store(true, Ordering::SeqCst);
        }
        // The default action of the signal is to be ignored, so it would have no effect.
        without_lost_signals(|| {
            // SAFETY: the handler only stores a flag.
            unsafe {
                libc::raise(libc::SIGWINCH);
                libc::signal(libc::SIGWINCH, handle as *const () as libc::sighandler_t);
            }
            assert!(!HANDLED.load(Ordering::SeqCst));
        });
        assert!(HANDLED.load(Ordering::SeqCst));
    }
}
