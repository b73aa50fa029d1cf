//! Rules, routes and sysctls that steer packets into our sockets, as one value that can be taken
//! back.
//!
//! # Theory of operation
//!
//! A socket bound to somebody else's address (`IP_TRANSPARENT`) can send in that one's name. For
//! the answers to reach it, the kernel has to deliver locally what is addressed elsewhere. Two
//! things do that: a route in a table of its own that calls every address local, and rules that say
//! which packets look there.
//!
//! ```text
//!   7400:  from all fwmark 0x74670001 lookup 29700      <- PolicyRoute::steer, one for each selector
//!   table 29700:  local default dev lo                  <- PolicyRoute::install
//! ```
//!
//! Priority and table belong to an owner slot ([`OwnerSlot`]), which belongs to one
//! [`PolicyRoute`]: many processes may have policy routes in one namespace and never meet. Whatever
//! is added carries tidegate's protocol number
//! ([`ROUTE_PROTOCOL`](tidegate_model::registry::ROUTE_PROTOCOL)), and nothing is deleted that does
//! not.
//!
//! A sysctl belongs to the namespace as a whole. The first owner that needs another value writes
//! the original down; the last one to leave puts it back, unless somebody else has set it
//! meanwhile.
//!
//! # When a process is killed
//!
//! Its slots and the sysctls' original values are in a journal. The next [`PolicyRoute::install`]
//! in that namespace, and every [`sweep()`], undoes what owners that have ended left behind. A
//! journal speaks of processes by number: those that share one share a pid namespace.
//!
//! # What stays
//!
//! With the first policy rule ever, the kernel takes the tables `local` and `main` of the namespace
//! apart, which it had looked up as one, and never joins them again: it costs a little time per
//! look-up.

mod error;
mod journal;
mod process;
mod selector;
mod session;
mod slot;
mod sweep;
mod sysctl;

pub use error::PolicyRouteError;
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

/// How many rules one [`PolicyRoute`] can have. The kernel goes through all rules of a namespace
/// for every packet that it has no route for yet.
pub const MAX_SELECTORS: usize = 256;

/// A place in a namespace from which packets can be steered into local sockets.
///
/// Dropped, it reverts everything. Errors are logged then; what could not be reverted stays in
/// the journal.
pub struct PolicyRoute {
    directory: PathBuf,
    installed: Arc<Installed>,
}

/// What is in the namespace.
struct Installed {
    namespace: Namespace,
    slot: OwnerSlot,
    families: Families,
    sysctls: Vec<Sysctl>,
    rules: Mutex<Rules>,
}

/// All of this process, for [`repair_policy_routes`].
static INSTALLED: Mutex<Vec<Weak<Installed>>> = Mutex::new(Vec::new());

struct Rules {
    netlink: Netlink,
    /// By which address steered answers leave, of each family that it was named for.
    sources: BTreeMap<bool, IpAddr>,
    /// Taken back, or being so.
    ended: bool,
    /// How many guards each rule has.
    holders: BTreeMap<Selector, usize>,
}

impl PolicyRoute {
    /// Cleans up after owners that have ended, claims a slot in `namespace`, adds its route for
    /// `families` and sets `sysctls`. No packet is steered yet.
    ///
    /// The journal is in `$TIDEGATE_RUN_DIR/policy` if that is set, else in `/run/tidegate/policy`
    /// or, for whoever may not write to `/run`, in `$XDG_RUNTIME_DIR/tidegate/policy`.
    ///
    /// # Errors
    /// [`PolicyRouteError`] says what was refused. Nothing is left of what was done before it.
    pub fn install(
        namespace: &Namespace,
        families: Families,
        sysctls: &[Sysctl],
    ) -> Result<Self, PolicyRouteError> {
        Self::install_in(&journal::directory()?, namespace, families, sysctls)
    }

    /// [`install`](Self::install) with the journal in `directory`. All owners in a namespace should
    /// use the same: those that do not cannot undo one another's remains, nor know whether they are
    /// the last.
    ///
    /// # Errors
    /// As for [`install`](Self::install).
    pub fn install_in(
        directory: &Path,
        namespace: &Namespace,
        families: Families,
        sysctls: &[Sysctl],
    ) -> Result<Self, PolicyRouteError> {
        let mut netlink = connect(namespace)?;
        let mut session = Session::begin(directory, namespace, &mut netlink)?;
        session.prune();
        let changes = session.changes(sysctls)?;
        let slot = session.claim(families, &changes)?;
        if let Err(error) = session.make(&changes) {
            session.give_up(slot);
            return Err(error);
        }
        drop(session);
        tracing::debug!(namespace = %namespace.id(), slot = slot.0, "policy route installed");
        let rules =
            Rules { netlink, sources: BTreeMap::new(), ended: false, holders: BTreeMap::new() };
        let installed = Arc::new(Installed {
            namespace: namespace.clone(),
            slot,
            families,
            sysctls: sysctls.to_vec(),
            rules: Mutex::new(rules),
        });
        let mut all = INSTALLED.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|one| one.strong_count() > 0);
        all.push(Arc::downgrade(&installed));
        drop(all);
        Ok(Self { directory: directory.to_owned(), installed })
    }

    /// Delivers packets that match `selector` to local sockets, until the last guard for this
    /// selector is dropped.
    ///
    /// Takes two system calls, and two more when the rule is deleted; none for a selector that is
    /// there. They wait for the kernel's lock on network configuration, which someone who sets up
    /// many interfaces keeps busy.
    ///
    /// # Errors
    /// [`PolicyRouteError`]: the kernel refused the rule, there are [`MAX_SELECTORS`], or the selector makes
    /// no sense.
    pub fn steer(self: &Arc<Self>, selector: Selector) -> Result<Steered, PolicyRouteError> {
        let there = &self.installed;
        let flaw = selector.flaw().or_else(|| {
            let installed = there.families.contains(selector.family);
            (!installed).then_some("the policy route was not installed for this family")
        });
        if let Some(flaw) = flaw {
            let selector = Box::new(selector);
            return Err(PolicyRouteError::Selector {
                namespace: there.namespace.id(),
                selector,
                flaw,
            });
        }
        let mut rules = there.rules();
        let rules = &mut *rules;
        if let Some(holders) = rules.holders.get_mut(&selector) {
            *holders += 1;
        } else if rules.holders.len() == MAX_SELECTORS {
            return Err(PolicyRouteError::TooManySelectors(there.namespace.id()));
        } else {
            match slot::add_rule(&mut rules.netlink, there.slot, &selector) {
                // Left from when it could not be deleted.
                Err(error) if Errno::from_io_error(&error) == Some(Errno::EXIST) => {}
                added => added.map_err(|source| there.rule_error(&selector, source))?,
            }
            rules.holders.insert(selector.clone(), 1);
        }
        Ok(Steered { route: Arc::clone(self), selector })
    }

    /// Names the address of the namespace that steered answers leave from when their socket has not
    /// chosen one.
    ///
    /// An IPv4 server that is bound to no address answers a datagram from the one that the route
    /// says, and a local route without a preferred source says the *destination*: such an answer
    /// seems to come from the client itself and finds nobody (`ip_route_output_key_hash_rcu`,
    /// net/ipv4/route.c). IPv6 picks an address of the namespace by itself.
    ///
    /// # Errors
    /// [`PolicyRouteError`]: the kernel refuses an address that is not the namespace's.
    pub fn answer_from(&self, address: IpAddr) -> Result<(), PolicyRouteError> {
        let there = &self.installed;
        let mut rules = there.rules();
        rules.sources.insert(address.is_ipv6(), address);
        slot::set_source(&mut rules.netlink, there.slot, address).map_err(|source| {
            let route =
                format!("local default dev lo table {} src {address}", table_id(there.slot));
            kernel_error(&there.namespace, route, source)
        })
    }

    /// How many rules there are, at most [`MAX_SELECTORS`].
    #[must_use]
    pub fn selectors(&self) -> usize {
        self.installed.rules().holders.len()
    }

    /// The slot it has in its namespace.
    #[must_use]
    pub fn slot(&self) -> OwnerSlot {
        self.installed.slot
    }
}

impl Installed {
    fn rules(&self) -> MutexGuard<'_, Rules> {
        self.rules.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds what is missing, and says what that was.
    ///
    /// The kernel is asked to add everything exclusively: what is there it refuses.
    fn repair(&self) -> Result<Vec<Restored>, PolicyRouteError> {
        let mut restored = Vec::new();
        let mut rules = self.rules();
        let rules = &mut *rules;
        if rules.ended {
            return Ok(restored);
        }
        let table = table_id(self.slot);
        for family in self.families.iter() {
            let route = format!("{family} route to local sockets in table {table}");
            let added = was_missing(slot::add_route(&mut rules.netlink, self.slot, family))
                .map_err(|source| kernel_error(&self.namespace, &route, source))?;
            if !added {
                continue;
            }
            if let Some(source) = rules.sources.get(&(family == Family::V6)) {
                slot::set_source(&mut rules.netlink, self.slot, *source)
                    .map_err(|source| kernel_error(&self.namespace, &route, source))?;
            }
            restored.push(Restored::Route(route));
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
                change.make().map_err(failed)?;
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
            // Someone has cleared the rules of the namespace: networkd does, when it restarts.
            Err(error) if slot::is_absence(&error) => {
                tracing::debug!(%selector, "the rule was gone already");
            }
            Err(source) => {
                tracing::warn!(error = %self.rule_error(selector, source), "cannot delete a rule");
            }
        }
    }

    fn rule_error(&self, selector: &Selector, source: io::Error) -> PolicyRouteError {
        let rule = format!("rule {selector} lookup {}", table_id(self.slot));
        kernel_error(&self.namespace, rule, source)
    }
}

/// An object of a [`PolicyRoute`] that other software had removed or changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Restored {
    /// The route of its table.
    Route(String),
    /// A rule.
    Rule(String),
    /// A sysctl.
    Sysctl(String),
}

/// Restores what is missing of all policy routes that this process has in `namespace`, and says
/// what that was.
///
/// # Errors
/// [`PolicyRouteError`]: the kernel refused something.
pub fn repair_policy_routes(namespace: NamespaceId) -> Result<Vec<Restored>, PolicyRouteError> {
    let mut restored = Vec::new();
    for installed in installed_in(namespace) {
        restored.extend(installed.repair()?);
    }
    Ok(restored)
}

/// Whether the sysctls of all policy routes that this process has in `namespace` are as they were
/// set, as far as they can be read. Nothing announces that one is changed.
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

/// Whether something was added, which is not the case if it was there.
fn was_missing(added: io::Result<()>) -> io::Result<bool> {
    match added {
        Ok(()) => Ok(true),
        Err(error) if Errno::from_io_error(&error) == Some(Errno::EXIST) => Ok(false),
        Err(error) => Err(error),
    }
}

impl Rules {
    /// Deletes the rule of `selector` and no other.
    ///
    /// The kernel deletes the first rule that meets the request, and one that `selector` covers may
    /// come first. So those are all added again, behind the one to delete; then as many deletions
    /// as there are rules before them hit that one and the old copies. There is no moment in which
    /// one is missing.
    fn delete(&mut self, slot: OwnerSlot, selector: &Selector) -> io::Result<()> {
        let covered: Vec<&Selector> =
            self.holders.keys().filter(|other| selector.covers(other)).collect();
        for other in &covered {
            slot::add_rule_again(&mut self.netlink, slot, other)?;
        }
        (0..=covered.len()).try_for_each(|_| slot::delete_rule(&mut self.netlink, slot, selector))
    }
}

impl Drop for PolicyRoute {
    fn drop(&mut self) {
        let there = &self.installed;
        let mut rules = there.rules();
        rules.ended = true;
        let netlink = &mut rules.netlink;
        let left = Session::begin(&self.directory, &there.namespace, netlink)
            .map(|mut session| session.leave(there.slot));
        let errors = left.unwrap_or_else(|error| {
            // Without the journal nobody knows whether the sysctls may go back; what is the slot's
            // alone may.
            let rest = slot::delete_rules(netlink, there.slot)
                .and_then(|()| slot::delete_routes(netlink, there.slot));
            let rest =
                rest.map_err(|source| kernel_error(&there.namespace, "rules and routes", source));
            [Err(error), rest].into_iter().filter_map(Result::err).collect()
        });
        for error in errors {
            tracing::warn!(%error, "cannot take back a policy route");
        }
    }
}

impl fmt::Debug for PolicyRoute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PolicyRoute")
            .field("namespace", &self.installed.namespace)
            .field("slot", &self.installed.slot)
            .field("families", &self.installed.families)
            .finish_non_exhaustive()
    }
}

/// Keeps a rule in place; dropped, it lets go of it.
#[derive(Debug)]
#[must_use = "the rule goes with the guard"]
pub struct Steered {
    route: Arc<PolicyRoute>,
    selector: Selector,
}

impl Steered {
    /// Which packets it is about.
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
