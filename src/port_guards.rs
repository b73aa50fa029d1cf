//! Selection of the mechanism for the port guards of a project.

use std::io;
use std::sync::Arc;
use tidegate_model::Feature;
use tidegate_netfilter::{BridgeGuard, Gate, GatePolicy, Mechanism, PortGuards, SourceGuard};
use tidegate_netns::Namespace;
use tidegate_netsetup::{BridgePrograms, Guards};

/// No mechanism for port guards works; each with its error.
#[derive(Debug, thiserror::Error)]
#[error("{}", .0.iter().map(|(mechanism, error)| format!("{mechanism}: {error}")).collect::<Vec<_>>().join("; "))]
pub(crate) struct NoPortGuards(pub(crate) Vec<(Mechanism, io::Error)>);

impl NoPortGuards {
    /// Returns the remedy, for the log.
    pub(crate) fn remedy(&self) -> &'static str {
        let denied =
            |(_, error): &(Mechanism, io::Error)| error.kind() == io::ErrorKind::PermissionDenied;
        remedy(self.0.iter().map(denied))
    }
}

/// Returns the remedy if no mechanism works. `denied` has one item per mechanism: whether it failed
/// for lack of a privilege.
pub(crate) fn remedy(mut denied: impl ExactSizeIterator<Item = bool>) -> &'static str {
    if denied.len() > 0 && denied.all(|denied| denied) {
        "run as root on the host itself, with CAP_BPF and CAP_NET_ADMIN"
    } else {
        "run a kernel with CONFIG_NF_TABLES_NETDEV, or with CONFIG_NET_CLS_BPF and CONFIG_NET_SCH_INGRESS"
    }
}

/// Creates the port guards of `owner` with the first mechanism that works in a temporary network
/// namespace.
///
/// # Errors
/// [`NoPortGuards`].
pub(crate) fn port_guards(owner: &str) -> Result<Arc<PortGuards>, NoPortGuards> {
    let candidates = candidates();
    let tried = Namespace::create()
        .and_then(|scratch| scratch.with(|| PortGuards::probe(&candidates, owner)));
    match tried {
        Ok(probed) => probed.map(Arc::new).map_err(NoPortGuards),
        // Without a namespace for the trials, every mechanism gets this error.
        Err(error) => {
            let code = error.raw_os_error();
            let error =
                || code.map_or_else(|| io::ErrorKind::Other.into(), io::Error::from_raw_os_error);
            Err(NoPortGuards(
                candidates.into_iter().map(|mechanism| (mechanism, error())).collect(),
            ))
        }
    }
}

/// Creates the source guard of `owner`, for links in `host`. `None` where the kernel has none.
pub(crate) fn source_guard(owner: &str, host: &Namespace) -> Option<Arc<SourceGuard>> {
    let guard = host.with(|| SourceGuard::new(owner, host.id().inode)).flatten();
    let guard = guard.inspect_err(|error| tracing::debug!(%error, "no source guards"));
    guard.ok().map(Arc::new)
}

/// Returns the mechanisms to try, in order.
pub(crate) fn candidates() -> Vec<Mechanism> {
    Mechanism::ALL.into_iter().filter(|mechanism| !is_forced_off(*mechanism)).collect()
}

fn is_forced_off(mechanism: Mechanism) -> bool {
    let features: &[Feature] = match mechanism {
        Mechanism::Tcx => &[Feature::Tcx, Feature::BpfGuards],
        Mechanism::Clsact => &[Feature::Clsact, Feature::BpfGuards],
        Mechanism::Nftables => &[Feature::NetdevGuards],
        Mechanism::Classic => &[Feature::ClassicGuards],
    };
    features.iter().any(|feature| feature.is_forced_off())
}

/// Returns where the setup attaches `guards` of `owner`.
pub(crate) fn attachment(guards: Option<&PortGuards>, owner: &str) -> Guards {
    match guards.map(PortGuards::mechanism) {
        None => Guards::None,
        Some(Mechanism::Nftables) => Guards::InTable(owner.to_owned()),
        Some(Mechanism::Tcx | Mechanism::Clsact | Mechanism::Classic) => Guards::AtLinks,
    }
}

/// Returns which BPF programs can be attached to bridges when no firewall is used.
pub(crate) fn bridge_programs() -> BridgePrograms {
    if Feature::Gates.is_forced_off() {
        return BridgePrograms::default();
    }
    let gates = Gate::new(&GatePolicy::From(Vec::new())).is_ok();
    BridgePrograms { gates, bridge_guards: has_bridge_guards() }
}

/// Returns whether guards of internal networks can be attached. Disabling gates
/// ([`Feature::Gates`]) disables all programs at bridges.
pub(crate) fn has_bridge_guards() -> bool {
    if Feature::Gates.is_forced_off() {
        return false;
    }
    Namespace::create()
        .and_then(|scratch| scratch.with(BridgeGuard::probe).flatten())
        .inspect_err(|error| tracing::debug!(%error, "guards of internal networks unavailable"))
        .is_ok()
}
