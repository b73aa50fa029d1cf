//! Where tidegate keeps what must not outlive the boot.

use std::env;
use std::path::PathBuf;

/// The directory of this user's journals, sockets and services' files: `$TIDEGATE_RUN_DIR` if set,
/// else `/run/tidegate` for who may write to `/run`, else `$XDG_RUNTIME_DIR/tidegate`. All of them
/// are emptied by a reboot. It need not be there yet.
#[must_use]
pub fn run_directory() -> Option<PathBuf> {
    if let Some(run) = set("TIDEGATE_RUN_DIR") {
        return Some(run);
    }
    // Not by user id: root of a user namespace is no root out here.
    let base = if rustix::fs::access("/run", rustix::fs::Access::WRITE_OK).is_ok() {
        Some(PathBuf::from("/run"))
    } else {
        set("XDG_RUNTIME_DIR")
    };
    base.map(|base| base.join("tidegate"))
}

fn set(variable: &str) -> Option<PathBuf> {
    env::var_os(variable).filter(|value| !value.is_empty()).map(PathBuf::from)
}
