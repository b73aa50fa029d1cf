//! Errors of policy routes.

use super::{MAX_SELECTORS, Selector};
use crate::NamespaceId;
use rustix::io::Errno;
use std::io;
use std::path::PathBuf;
use tidegate_model::registry::OWNER_SLOTS;

/// A failure to install, change or revert a policy route.
#[derive(Debug, thiserror::Error)]
pub enum PolicyRouteError {
    /// The namespace could not be entered, or its netlink socket not be opened.
    #[error("policy route in namespace {namespace}: cannot enter it: {}", with_remedy(.source, "CAP_SYS_ADMIN"))]
    Enter {
        /// The namespace.
        namespace: NamespaceId,
        /// Error code of the kernel.
        source: io::Error,
    },
    /// The kernel rejected a rule, a route or a sysctl.
    #[error("policy route in namespace {namespace}: {object}: {}", with_remedy(.source, "CAP_NET_ADMIN"))]
    Kernel {
        /// The namespace.
        namespace: NamespaceId,
        /// The rule, route or sysctl, in the syntax of ip(8) and sysctl(8).
        object: String,
        /// Error code of the kernel.
        source: io::Error,
    },
    /// Another owner requires a different value of the sysctl.
    #[error(
        "policy route in namespace {namespace}: sysctl {name} is held at {value} by process {pid}"
    )]
    SysctlTaken {
        /// The namespace.
        namespace: NamespaceId,
        /// Name of the sysctl.
        name: String,
        /// Value required by the other owner.
        value: String,
        /// PID of an owner in the namespace.
        pid: u32,
    },
    /// Every slot is owned or contains a rule or route of another program.
    #[error("policy route in namespace {0}: all {OWNER_SLOTS} owner slots are in use")]
    NoSlot(NamespaceId),
    /// The owner has reached its maximum number of rules.
    #[error("policy route in namespace {0}: limit of {MAX_SELECTORS} rules reached")]
    TooManySelectors(NamespaceId),
    /// The selector is invalid in general or for this policy route.
    #[error("policy route in namespace {namespace}: {} rule {selector}: {flaw}", .selector.family)]
    Selector {
        /// The namespace.
        namespace: NamespaceId,
        /// The selector.
        selector: Box<Selector>,
        /// Reason why it is invalid.
        flaw: &'static str,
    },
    /// No directory for the journal is available.
    #[error("no directory for the policy journal; set XDG_RUNTIME_DIR or TIDEGATE_RUN_DIR")]
    NoRunDirectory,
    /// The journal could not be read or written. Without it, nothing is changed.
    #[error("policy journal {}: {}", .path.display(), with_remedy(.source, "write permission"))]
    Journal {
        /// Directory of the journal.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
}

/// Returns the error text, with a remedy if one is known.
fn with_remedy(error: &io::Error, privilege: &str) -> String {
    let text = error.to_string();
    let text = text.split(" (os error ").next().unwrap_or_default();
    let remedy = match Errno::from_io_error(error) {
        Some(Errno::PERM | Errno::ACCESS) => format!("needs {privilege}"),
        Some(Errno::ROFS) => "/proc/sys is mounted read-only".to_owned(),
        Some(Errno::NETDOWN) => "is lo up?".to_owned(),
        _ => return text.to_owned(),
    };
    format!("{text} ({remedy})")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn error_is_one_line_with_object_cause_and_remedy() {
        let error = PolicyRouteError::Kernel {
            namespace: NamespaceId { device: 4, inode: 4_026_532_000 },
            object: "rule fwmark 0x74670001 lookup 29700".to_owned(),
            source: Errno::PERM.into(),
        };
        assert_eq!(
            error.to_string(),
            "policy route in namespace net:[4026532000]: rule fwmark 0x74670001 lookup 29700: \
             Operation not permitted (needs CAP_NET_ADMIN)"
        );
    }
}
