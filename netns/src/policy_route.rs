//! Policy rules, routes and sysctls that steer packets to local sockets. One value owns them and
//! reverts them when it is dropped.
//!
//! # Theory of operation
//!
//! A socket with `IP_TRANSPARENT` can bind to a foreign address and send from it. To receive the
//! replies, the kernel must deliver packets for foreign addresses locally. A separate routing table
//! contains a local default route for this purpose, and policy rules select the packets that use
//! the table.
//!
//! ```text
//!   7400:  from all fwmark 0x74670001 lookup 29700      <- PolicyRoute::steer, one per selector
//!   table 29700:  local default dev lo                  <- PolicyRoute::install
//! ```
//!
//! If the socket is in another namespace, the table has a route to that one instead
//! ([`PolicyRoute::install_via`]).
//!
//! An owner slot ([`OwnerSlot`]) determines the priority and the table. Each [`PolicyRoute`] has
//! its own slot, so the policy routes of several processes in one namespace do not conflict. All
//! rules and routes carry tidegate's protocol number
//! ([`ROUTE_PROTOCOL`](tidegate_model::registry::ROUTE_PROTOCOL)), and only objects with this
//! number are deleted.
//!
//! A sysctl is shared by all owners in the namespace. The first owner that changes it records the
//! original value. The last owner restores that value, unless the sysctl has been changed
//! externally.
//!
//! # Crash recovery
//!
//! A journal records the slots of each process and the original values of sysctls. The next
//! [`PolicyRoute::install`] in the namespace, and every [`sweep()`], reverts the changes of owners
//! that have exited. The journal identifies processes by PID, so all its users must share a PID
//! namespace.
//!
//! # Permanent effect
//!
//! The first policy rule makes the kernel split the tables `local` and `main` of the namespace,
//! which it otherwise looks up as one. It never merges them again, which makes each lookup slightly
//! slower.

mod error;
mod journal;
mod process;
mod route;
mod selector;
mod session;
mod slot;
mod sweep;
mod sysctl;

pub use error::PolicyRouteError;
pub use route::Route;
pub use selector::Selector;
pub use sweep::{sweep, sweep_in};
pub use sysctl::Sysctl;

use crate::netlink::Netlink;
use crate::{Families, Family, Namespace, NamespaceId};
use rustix::io::Errno;
use session::{Session, kernel_error};
use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use tidegate_model::registry::{OwnerSlot, table_id};

/// Maximum number of rules per [`PolicyRoute`]. The kernel evaluates the rules of a namespace
/// linearly for every packet without a cached route.
pub const MAX_SELECTORS: usize = 256;

/// A routing table and an owner slot in a namespace, for rules that steer packets to local sockets.
///
/// Dropping it reverts all changes. Errors are logged, and changes that could not be reverted stay
/// in the journal.
pub struct PolicyRoute {
    directory: PathBuf,
    installed: Arc<Installed>,
}

/// The state of a policy route in its namespace.
struct Installed {
    namespace: Namespace,
    slot: OwnerSlot,
    routes: Vec<Route>,
    sysctls: Vec<Sysctl>,
    rules: Mutex<Rules>,
}

/// All policy routes of this process, for [`repair_policy_routes`].
static INSTALLED: Mutex<Vec<Weak<Installed>>> = Mutex::new(Vec::new());

struct Rules {
    netlink: Netlink,
    /// Preferred source addresses. Key: whether the family is IPv6.
    sources: BTreeMap<bool, IpAddr>,
    /// Reverted, or being reverted.
    ended: bool,
    /// Number of guards per rule.
    holders: BTreeMap<Selector, usize>,
}

impl PolicyRoute {
    /// Cleans up after owners that have exited, claims a slot in `namespace`, adds its route for
    /// `families` and sets `sysctls`. Does not steer packets yet.
    ///
    /// The journal is in `$TIDEGATE_RUN_DIR/policy` if the variable is set, otherwise in
    /// `/run/tidegate/policy` if `/run` is writable, otherwise in
    /// `$XDG_RUNTIME_DIR/tidegate/policy`.
    ///
    /// # Errors
    /// [`PolicyRouteError`]. Earlier steps are reverted.
    pub fn install(
        namespace: &Namespace,
        families: Families,
        sysctls: &[Sysctl],
    ) -> Result<Self, PolicyRouteError> {
        Self::install_in(&journal::directory()?, namespace, families, sysctls)
    }

    /// [`install`](Self::install) with other routes, for packets to sockets in another namespace.
    ///
    /// # Errors
    /// Same as [`install`](Self::install).
    pub fn install_via(
        namespace: &Namespace,
        routes: Vec<Route>,
    ) -> Result<Self, PolicyRouteError> {
        Self::install_routes(&journal::directory()?, namespace, routes, &[])
    }

    /// [`install`](Self::install) with the journal in `directory`. All owners in a namespace should
    /// use the same journal. Otherwise they can neither clean up after each other nor detect the
    /// last owner.
    ///
    /// # Errors
    /// Same as [`install`](Self::install).
    pub fn install_in(
        directory: &Path,
        namespace: &Namespace,
        families: Families,
        sysctls: &[Sysctl],
    ) -> Result<Self, PolicyRouteError> {
        let routes = families.iter().map(Route::Local).collect();
        Self::install_routes(directory, namespace, routes, sysctls)
    }

    fn install_routes(
        directory: &Path,
        namespace: &Namespace,
        routes: Vec<Route>,
        sysctls: &[Sysctl],
    ) -> Result<Self, PolicyRouteError> {
        let mut netlink = connect(namespace)?;
        let mut session = Session::begin(directory, namespace, &mut netlink)?;
        session.prune();
        let changes = session.changes(sysctls)?;
        let slot = session.claim(&routes, &changes)?;
        if let Err(error) = session.apply(&changes) {
            session.abort(slot);
            return Err(error);
        }
        drop(session);
        tracing::debug!(namespace = %namespace.id(), slot = slot.0, "policy route installed");
        let rules =
            Rules { netlink, sources: BTreeMap::new(), ended: false, holders: BTreeMap::new() };
        let installed = Arc::new(Installed {
            namespace: namespace.clone(),
            slot,
            routes,
            sysctls: sysctls.to_vec(),
            rules: Mutex::new(rules),
        });
        let mut all = INSTALLED.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|one| one.strong_count() > 0);
        all.push(Arc::downgrade(&installed));
        drop(all);
        Ok(Self { directory: directory.to_owned(), installed })
    }

    /// Delivers packets that match `selector` to local sockets until the last guard of this
    /// selector is dropped.
    ///
    /// Takes two system calls, and two more to delete the rule; none for an existing selector. The
    /// calls wait for the RTNL lock, which is contended while other processes configure many
    /// interfaces.
    ///
    /// # Errors
    /// [`PolicyRouteError`]: the kernel rejected the rule, the limit [`MAX_SELECTORS`] is reached,
    /// or the selector is invalid.
    pub fn steer(self: &Arc<Self>, selector: Selector) -> Result<Steered, PolicyRouteError> {
        let inner = &self.installed;
        let flaw = selector.flaw().or_else(|| {
            let installed = inner.routes.iter().any(|route| route.family() == selector.family);
            (!installed).then_some("the policy route was not installed for this family")
        });
        if let Some(flaw) = flaw {
            let selector = Box::new(selector);
            return Err(PolicyRouteError::Selector {
                namespace: inner.namespace.id(),
                selector,
                flaw,
            });
        }
        let mut rules = inner.rules();
        let rules = &mut *rules;
        if let Some(holders) = rules.holders.get_mut(&selector) {
            *holders += 1;
        } else if rules.holders.len() == MAX_SELECTORS {
            return Err(PolicyRouteError::TooManySelectors(inner.namespace.id()));
        } else {
            match slot::add_rule(&mut rules.netlink, inner.slot, &selector) {
                // Left over from a failed deletion.
                Err(error) if Errno::from_io_error(&error) == Some(Errno::EXIST) => {}
                added => added.map_err(|source| inner.rule_error(&selector, source))?,
            }
            rules.holders.insert(selector.clone(), 1);
        }
        Ok(Steered { route: Arc::clone(self), selector })
    }

    /// Sets the preferred source address of steered replies from sockets that are not bound to an
    /// address.
    ///
    /// For replies of an unbound IPv4 socket, the kernel takes the source address from the route. A
    /// local route without a preferred source yields the *destination* address: the reply would
    /// claim to come from the client itself and be lost (`ip_route_output_key_hash_rcu`,
    /// net/ipv4/route.c). For IPv6, the kernel selects an address of the namespace.
    ///
    /// # Errors
    /// [`PolicyRouteError`]: the kernel rejects addresses that do not belong to the namespace.
    pub fn set_source(&self, address: IpAddr) -> Result<(), PolicyRouteError> {
        let inner = &self.installed;
        let mut rules = inner.rules();
        rules.sources.insert(address.is_ipv6(), address);
        slot::set_source(&mut rules.netlink, inner.slot, address).map_err(|source| {
            let route =
                format!("local default dev lo table {} src {address}", table_id(inner.slot));
            kernel_error(&inner.namespace, route, source)
        })
    }

    /// Returns the number of rules, at most [`MAX_SELECTORS`].
    #[must_use]
    pub fn selectors(&self) -> usize {
        self.installed.rules().holders.len()
    }

    /// Returns the owner slot.
    #[must_use]
    pub fn slot(&self) -> OwnerSlot {
        self.installed.slot
    }
}

impl Installed {
    fn rules(&self) -> MutexGuard<'_, Rules> {
        self.rules.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds missing objects and returns them.
    ///
    /// All objects are added with `NLM_F_EXCL`, so the kernel rejects existing ones.
    fn repair(&self) -> Result<Vec<Restored>, PolicyRouteError> {
        let mut restored = Vec::new();
        let mut rules = self.rules();
        let rules = &mut *rules;
        if rules.ended {
            return Ok(restored);
        }
        let table = table_id(self.slot);
        for route in &self.routes {
            let name = format!("{} route {route} in table {table}", route.family());
            let added = was_missing(slot::add_route(&mut rules.netlink, self.slot, route))
                .map_err(|source| kernel_error(&self.namespace, &name, source))?;
            if !added {
                continue;
            }
            if let Some(source) = rules.sources.get(&(route.family() == Family::V6)) {
                slot::set_source(&mut rules.netlink, self.slot, *source)
                    .map_err(|source| kernel_error(&self.namespace, &name, source))?;
            }
            restored.push(Restored::Route(name));
        }
        for selector in rules.holders.keys() {
            let added = was_missing(slot::add_rule(&mut rules.netlink, self.slot, selector));
            if added.map_err(|source| self.rule_error(selector, source))? {
                restored.push(Restored::Rule(format!("rule {selector} lookup {table}")));
            }
        }
        for sysctl in &self.sysctls {
            let failed =
                |source| kernel_error(&self.namespace, format_args!("sysctl {sysctl}"), source);
            if let Some(change) = sysctl::Change::needed(&self.namespace, sysctl).map_err(failed)? {
                change.apply().map_err(failed)?;
                restored.push(Restored::Sysctl(sysctl.to_string()));
            }
        }
        Ok(restored)
    }

    fn release(&self, selector: &Selector) {
        let mut rules = self.rules();
        let Some(holders) = rules.holders.get_mut(selector) else { return };
        *holders -= 1;
        if *holders > 0 {
            return;
        }
        rules.holders.remove(selector);
        match rules.delete(self.slot, selector) {
            Ok(()) => {}
            // Another program flushed the rules of the namespace; systemd-networkd does so on
            // restart.
            Err(error) if slot::is_absence(&error) => {
                tracing::debug!(%selector, "rule already deleted externally");
            }
            Err(source) => {
                tracing::warn!(error = %self.rule_error(selector, source), "rule not deleted");
            }
        }
    }

    fn rule_error(&self, selector: &Selector, source: io::Error) -> PolicyRouteError {
        let rule = format!("rule {selector} lookup {}", table_id(self.slot));
        kernel_error(&self.namespace, rule, source)
    }
}

/// A restored object of a [`PolicyRoute`] that another program had removed or changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Restored {
    /// The route in the table of the slot.
    Route(String),
    /// A rule.
    Rule(String),
    /// A sysctl.
    Sysctl(String),
}

/// Restores missing objects of all policy routes of this process in `namespace`, and returns them.
///
/// # Errors
/// [`PolicyRouteError`]: the kernel rejected a change.
pub fn repair_policy_routes(namespace: NamespaceId) -> Result<Vec<Restored>, PolicyRouteError> {
    let mut restored = Vec::new();
    for installed in installed_in(namespace) {
        restored.extend(installed.repair()?);
    }
    Ok(restored)
}

/// Returns whether the sysctls of all policy routes of this process in `namespace` still have the
/// configured values. Unreadable sysctls count as unchanged. Callers must poll, because the kernel
/// does not notify about changes of sysctls.
#[must_use]
pub fn policy_route_sysctls_hold(namespace: NamespaceId) -> bool {
    installed_in(namespace).iter().all(|installed| {
        let holds = |sysctl: &Sysctl| {
            installed.namespace.sysctl(&sysctl.name).map_or(true, |value| value == sysctl.value)
        };
        installed.sysctls.iter().all(holds)
    })
}

fn installed_in(namespace: NamespaceId) -> Vec<Arc<Installed>> {
    let all = INSTALLED.lock().unwrap_or_else(PoisonError::into_inner);
    all.iter().filter_map(Weak::upgrade).filter(|one| one.namespace.id() == namespace).collect()
}

/// Returns whether the object was added, or `false` if it already existed.
fn was_missing(added: io::Result<()>) -> io::Result<bool> {
    match added {
        Ok(()) => Ok(true),
        Err(error) if Errno::from_io_error(&error) == Some(Errno::EXIST) => Ok(false),
        Err(error) => Err(error),
    }
}

impl Rules {
    /// Deletes the rule of `selector` and no other rule.
    ///
    /// The kernel deletes the first rule that matches the request, which may be a more specific
    /// rule covered by `selector`. All covered rules are therefore duplicated at the end first. The
    /// same number of deletions plus one then removes the target and the old copies. At no time is
    /// a covered rule missing.
    fn delete(&mut self, slot: OwnerSlot, selector: &Selector) -> io::Result<()> {
        let covered: Vec<&Selector> =
            self.holders.keys().filter(|other| selector.covers(other)).collect();
        for other in &covered {
            slot::add_duplicate_rule(&mut self.netlink, slot, other)?;
        }
        (0..=covered.len()).try_for_each(|_| slot::delete_rule(&mut self.netlink, slot, selector))
    }
}

impl Drop for PolicyRoute {
    fn drop(&mut self) {
        let inner = &self.installed;
        let mut rules = inner.rules();
        rules.ended = true;
        let netlink = &mut rules.netlink;
        let left = Session::begin(&self.directory, &inner.namespace, netlink)
            .map(|mut session| session.revert(inner.slot));
        let errors = left.unwrap_or_else(|error| {
            // Without the journal it is unknown whether the sysctls may be restored. Rules and
            // routes belong to the slot alone and can be deleted.
            let rest = slot::delete_rules(netlink, inner.slot)
                .and_then(|()| slot::delete_routes(netlink, inner.slot));
            let rest =
                rest.map_err(|source| kernel_error(&inner.namespace, "rules and routes", source));
            [Err(error), rest].into_iter().filter_map(Result::err).collect()
        });
        for error in errors {
            tracing::warn!(%error, "policy route not reverted");
        }
    }
}

impl fmt::Debug for PolicyRoute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PolicyRoute")
            .field("namespace", &self.installed.namespace)
            .field("slot", &self.installed.slot)
            .field("routes", &self.installed.routes)
            .finish_non_exhaustive()
    }
}

/// A guard for a rule. The rule is deleted when its last guard is dropped.
#[derive(Debug)]
#[must_use = "the rule is deleted with its last guard"]
pub struct Steered {
    route: Arc<PolicyRoute>,
    selector: Selector,
}

impl Steered {
    /// Returns the selector of the rule.
    pub fn selector(&self) -> &Selector {
        &self.selector
    }
}

impl Drop for Steered {
    fn drop(&mut self) {
        self.route.installed.release(&self.selector);
    }
}

fn connect(namespace: &Namespace) -> Result<Netlink, PolicyRouteError> {
    Netlink::open(namespace)
        .map_err(|source| PolicyRouteError::Enter { namespace: namespace.id(), source })
}
