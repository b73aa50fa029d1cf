//! What can go wrong with a policy route.

use super::{MAX_SELECTORS, Selector};
use crate::NamespaceId;
use rustix::io::Errno;
use std::io;
use std::path::PathBuf;
use tidegate_model::registry::OWNER_SLOTS;

/// A policy route that could not be made, changed or reverted.
#[derive(Debug, thiserror::Error)]
pub enum PolicyRouteError {
    /// The namespace could not be entered or spoken to.
    #[error("policy route in namespace {namespace}: cannot enter it: {}", because(.source, "CAP_SYS_ADMIN"))]
    Enter {
        /// Which one.
        namespace: NamespaceId,
        /// What the kernel said.
        source: io::Error,
    },
    /// The kernel refused a rule, a route or a sysctl.
    #[error("policy route in namespace {namespace}: {object}: {}", because(.source, "CAP_NET_ADMIN"))]
    Kernel {
        /// Where.
        namespace: NamespaceId,
        /// The rule, route or sysctl, in the words of ip(8) and sysctl(8).
        object: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// Another owner needs the sysctl to have another value.
    #[error(
        "policy route in namespace {namespace}: sysctl {name} is kept at {value} by process {pid}"
    )]
    SysctlTaken {
        /// Where.
        namespace: NamespaceId,
        /// Which sysctl.
        name: String,
        /// What it is kept at.
        value: String,
        /// One of the processes that have policy routes there.
        pid: u32,
    },
    /// Every slot has an owner, or a rule or route of some other program in it.
    #[error("policy route in namespace {0}: all {OWNER_SLOTS} places for owners are taken")]
    NoSlot(NamespaceId),
    /// The owner has as many rules as it may have.
    #[error("policy route in namespace {0}: {MAX_SELECTORS} rules are the limit")]
    TooManySelectors(NamespaceId),
    /// The selector makes no sense, or not here.
    #[error("policy route in namespace {namespace}: {} rule {selector}: {flaw}", .selector.family)]
    Selector {
        /// Where.
        namespace: NamespaceId,
        /// Which.
        selector: Box<Selector>,
        /// What is wrong with it.
        flaw: &'static str,
    },
    /// There is nowhere to keep the journal.
    #[error("no place for the policy journal: set XDG_RUNTIME_DIR or TIDEGATE_RUN_DIR")]
    NoRunDirectory,
    /// The journal could not be read or written. Nothing is changed without it.
    #[error("policy journal {}: {}", .path.display(), because(.source, "the right to write there"))]
    Journal {
        /// Its directory.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

/// The system's words, and what to do about them where that is known.
fn because(error: &io::Error, privilege: &str) -> String {
    let text = error.to_string();
    let text = text.split(" (os error ").next().unwrap_or_default();
    let remedy = match Errno::from_io_error(error) {
        Some(Errno::PERM | Errno::ACCESS) => format!("needs {privilege} there"),
        Some(Errno::ROFS) => "/proc/sys is mounted read-only".to_owned(),
        Some(Errno::NETDOWN) => "is lo up there?".to_owned(),
        _ => return text.to_owned(),
    };
    format!("{text} ({remedy})")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_one_line_with_object_reason_and_remedy() {
        let error = PolicyRouteError::Kernel {
            namespace: NamespaceId { device: 4, inode: 4_026_532_000 },
            object: "rule fwmark 0x74670001 lookup 29700".to_owned(),
            source: Errno::PERM.into(),
        };
        assert_eq!(
            error.to_string(),
            "policy route in namespace net:[4026532000]: rule fwmark 0x74670001 lookup 29700: \
             Operation not permitted (needs CAP_NET_ADMIN there)"
        );
    }
}
