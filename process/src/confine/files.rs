//! Landlock domains, which restrict reading files and connecting to TCP ports (landlock(7),
//! Linux 5.13).
//!
//! Best effort: the kernel restricts TCP ports since 6.7, and abstract Unix sockets and signals
//! since 6.12. A domain applies to the calling thread and the threads that it creates afterwards.

use landlock::{
    ABI, Access, AccessFs, AccessNet, NetPort, Ruleset, RulesetAttr, RulesetCreatedAttr, Scope,
    path_beneath_rules,
};
use std::path::Path;

/// Permitted accesses.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Domain<'a> {
    /// Readable files, and directories including their contents. Missing paths are ignored.
    pub(crate) readable: &'a [&'a Path],
    /// TCP ports for connect(2), at any address.
    pub(crate) connected: &'a [u16],
}

/// Confines the calling thread, and the threads that it creates, to `domain`. Does nothing on a
/// kernel without landlock.
///
/// # Errors
/// The kernel rejects the domain.
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
