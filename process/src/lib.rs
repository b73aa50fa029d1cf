//! Setup of the own process: confinement, resident memory and limits.
//!
//! | module | purpose |
//! |---|---|
//! | [`confine`] | drops privileges, file access and system calls |
//! | [`startup_pages`] | releases pages that only startup used |

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

/// Raises the soft limit of file descriptors to the hard limit: each connection needs two.
pub fn raise_descriptor_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    // On error, the limit is unchanged.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
}
