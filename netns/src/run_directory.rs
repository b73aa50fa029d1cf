//! The directory for runtime files, which must not survive a reboot.

use std::env;
use std::path::PathBuf;

/// Returns the directory of this user's journals, sockets and service files: `$TIDEGATE_RUN_DIR` if
/// set, otherwise `/run/tidegate` if `/run` is writable, otherwise `$XDG_RUNTIME_DIR/tidegate`. A
/// reboot empties all of them. The directory may not exist yet.
#[must_use]
pub fn run_directory() -> Option<PathBuf> {
    if let Some(run) = non_empty_variable("TIDEGATE_RUN_DIR") {
        return Some(run);
    }
    // Not by user ID: root of a user namespace is unprivileged on the host.
    let base = if rustix::fs::access("/run", rustix::fs::Access::WRITE_OK).is_ok() {
        Some(PathBuf::from("/run"))
    } else {
        non_empty_variable("XDG_RUNTIME_DIR")
    };
    base.map(|base| base.join("tidegate"))
}

fn non_empty_variable(variable: &str) -> Option<PathBuf> {
    env::var_os(variable).filter(|value| !value.is_empty()).map(PathBuf::from)
}
