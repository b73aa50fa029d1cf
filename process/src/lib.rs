//! What a process of tidegate sets for itself.
//!
//! | module | purpose |
//! |---|---|
//! | [`confine`] | gives up privileges, files and system calls |
//! | [`startup_pages`] | releases the memory of the start |

pub mod confine;
pub mod startup_pages;

/// The exit status of a failed command.
pub const EXIT_FAILURE: u8 = 1;

/// The exit status of an invalid command line.
pub const EXIT_USAGE: u8 = 2;

/// Raises the soft limit of file descriptors to the hard limit: each connection needs two.
pub fn raise_descriptor_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    // An error leaves the limit as it was.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
}
