//! Which files can be read, and which TCP ports connected to: a landlock domain (landlock(7),
//! Linux 5.13).
//!
//! As much of it as the kernel has: ports since 6.7, local sockets and signals since 6.12. It holds
//! for the calling thread and those that it starts from then on.

use landlock::{
    ABI, Access, AccessFs, AccessNet, NetPort, Ruleset, RulesetAttr, RulesetCreatedAttr, Scope,
    path_beneath_rules,
};
use std::path::Path;

/// What the domain has.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Domain<'a> {
    /// Files, and directories with all that is in them, that can be read. What is not there is left
    /// out.
    pub(crate) readable: &'a [&'a Path],
    /// TCP ports that can be connected to, of whatever address.
    pub(crate) connected: &'a [u16],
}

/// Confines the calling thread, and those that it starts, to `domain`.
///
/// # Errors
/// A kernel without landlock is none; a domain that makes no sense to it is one.
pub(crate) fn restrict(domain: Domain<'_>) -> Result<(), landlock::RulesetError> {
    let ports = domain.connected.iter().map(|port| NetPort::new(*port, AccessNet::ConnectTcp));
    let reading = AccessFs::ReadFile | AccessFs::ReadDir;
    Ruleset::default()
        .handle_access(AccessFs::from_all(ABI::V5))?
        .handle_access(AccessNet::ConnectTcp)?
        .scope(Scope::AbstractUnixSocket | Scope::Signal)?
        .create()?
        .add_rules(path_beneath_rules(domain.readable, reading))?
        .add_rules(ports.map(Ok::<_, landlock::RulesetError>))?
        .restrict_self()?;
    Ok(())
}
