//! Rules, routes and sysctls that steer packets into our sockets, as one value that can be taken back.
//!
//! # Theory of operation
//!
//! A socket bound to somebody else's address (`IP_TRANSPARENT`) can send in that one's name. For the answers
//! to reach it, the kernel has to deliver locally what is addressed elsewhere. Two things do that: a route in
//! a table of its own that calls every address local, and rules that say which packets look there.
//!
//! ```text
//!   7400:  from all fwmark 0x74670001 lookup 29700      <- PolicyRoute::steer, one for each selector
//!   table 29700:  local default dev lo                  <- PolicyRoute::install
//! ```
//!
//! Priority and table belong to an owner slot ([`OwnerSlot`]), which belongs to one [`PolicyRoute`]: many
//! processes may have policy routes in one namespace and never meet. Whatever is added carries tidegate's
//! protocol number ([`ROUTE_PROTOCOL`](tidegate_model::registry::ROUTE_PROTOCOL)), and nothing is deleted
//! that does not.
//!
//! A sysctl belongs to the namespace as a whole. The first owner that needs another value writes the original
//! down; the last one to leave puts it back, unless somebody else has set it meanwhile.
//!
//! # When a process is killed
//!
//! Its slots and the sysctls' original values are in a journal. The next [`PolicyRoute::install`] in that
//! namespace, and every [`sweep()`], undoes what owners that have ended left behind. A journal speaks of
//! processes by number: those that share one share a pid namespace.
//!
//! # What stays
//!
//! With the first policy rule ever, the kernel takes the tables `local` and `main` of the namespace apart,
//! which it had looked up as one, and never joins them again: it costs a little time per look-up.

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
use crate::{Families, Namespace};
use rustix::io::Errno;
use session::{Session, kernel_error};
use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use tidegate_model::registry::{OwnerSlot, table_id};

/// How many rules one [`PolicyRoute`] can have. The kernel goes through all rules of a namespace for every
/// packet that it has no route for yet.
pub const MAX_SELECTORS: usize = 256;

/// A place in a namespace from which packets can be steered into local sockets.
///
/// Dropped, it takes everything back. Errors are logged then; what could not be taken back stays in the
/// journal.
pub struct PolicyRoute {
    namespace: Namespace,
    directory: PathBuf,
    slot: OwnerSlot,
    families: Families,
    rules: Mutex<Rules>,
}

struct Rules {
    netlink: Netlink,
    /// How many guards each rule has.
    holders: BTreeMap<Selector, usize>,
}

impl PolicyRoute {
    /// Cleans up after owners that have ended, claims a slot in `namespace`, adds its route for `families`
    /// and sets `sysctls`. No packet is steered yet.
    ///
    /// The journal is in `$TIDEGATE_RUN_DIR/policy` if that is set, else in `/run/tidegate/policy` or, for
    /// whoever may not write to `/run`, in `$XDG_RUNTIME_DIR/tidegate/policy`.
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

    /// [`install`](Self::install) with the journal in `directory`. All owners in a namespace should use the
    /// same: those that do not cannot undo one another's remains, nor know whether they are the last.
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
        Ok(Self {
            namespace: namespace.clone(),
            directory: directory.to_owned(),
            slot,
            families,
            rules: Mutex::new(Rules { netlink, holders: BTreeMap::new() }),
        })
    }

    /// Delivers packets that match `selector` to local sockets, until the last guard for this selector is
    /// dropped.
    ///
    /// Takes two system calls, and two more when the rule is deleted; none for a selector that is there. They
    /// wait for the kernel's lock on network configuration, which someone who sets up many interfaces keeps
    /// busy.
    ///
    /// # Errors
    /// [`PolicyRouteError`]: the kernel refused the rule, there are [`MAX_SELECTORS`], or the selector makes
    /// no sense.
    pub fn steer(self: &Arc<Self>, selector: Selector) -> Result<Steered, PolicyRouteError> {
        let flaw = selector.flaw().or_else(|| {
            let installed = self.families.contains(selector.family);
            (!installed).then_some("the policy route was not installed for this family")
        });
        if let Some(flaw) = flaw {
            let selector = Box::new(selector);
            return Err(PolicyRouteError::Selector { namespace: self.namespace.id(), selector, flaw });
        }
        let mut rules = self.rules.lock().unwrap_or_else(PoisonError::into_inner);
        let rules = &mut *rules;
        if let Some(holders) = rules.holders.get_mut(&selector) {
            *holders += 1;
        } else if rules.holders.len() == MAX_SELECTORS {
            return Err(PolicyRouteError::TooManySelectors(self.namespace.id()));
        } else {
            match slot::add_rule(&mut rules.netlink, self.slot, &selector) {
                // Left from when it could not be deleted.
                Err(error) if Errno::from_io_error(&error) == Some(Errno::EXIST) => {}
                added => added.map_err(|source| self.rule_error(&selector, source))?,
            }
            rules.holders.insert(selector.clone(), 1);
        }
        Ok(Steered { route: Arc::clone(self), selector })
    }

    /// Names the address of the namespace that steered answers leave from when their socket has not chosen one.
    ///
    /// An IPv4 server that is bound to no address answers a datagram from the one that the route says, and a local route
    /// without a preferred source says the *destination*: such an answer seems to come from the client itself and finds
    /// nobody (`ip_route_output_key_hash_rcu`, net/ipv4/route.c). IPv6 picks an address of the namespace by itself.
    ///
    /// # Errors
    /// [`PolicyRouteError`]: the kernel refuses an address that is not the namespace's.
    pub fn answer_from(&self, address: IpAddr) -> Result<(), PolicyRouteError> {
        let mut rules = self.rules.lock().unwrap_or_else(PoisonError::into_inner);
        slot::set_source(&mut rules.netlink, self.slot, address).map_err(|source| {
            let route = format!("local default dev lo table {} src {address}", table_id(self.slot));
            kernel_error(&self.namespace, route, source)
        })
    }

    /// How many rules there are, at most [`MAX_SELECTORS`].
    #[must_use]
    pub fn selectors(&self) -> usize {
        self.rules.lock().unwrap_or_else(PoisonError::into_inner).holders.len()
    }

    /// The slot it has in its namespace.
    #[must_use]
    pub fn slot(&self) -> OwnerSlot {
        self.slot
    }

    fn release(&self, selector: &Selector) {
        let mut rules = self.rules.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(holders) = rules.holders.get_mut(selector) else { return };
        *holders -= 1;
        if *holders > 0 {
            return;
        }
        rules.holders.remove(selector);
        match rules.delete(self.slot, selector) {
            Ok(()) => {}
            // Someone has cleared the rules of the namespace: networkd does, when it restarts.
            Err(error) if slot::is_absence(&error) => tracing::debug!(%selector, "the rule was gone already"),
            Err(source) => tracing::warn!(error = %self.rule_error(selector, source), "cannot delete a rule"),
        }
    }

    fn rule_error(&self, selector: &Selector, source: io::Error) -> PolicyRouteError {
        let rule = format!("rule {selector} lookup {}", table_id(self.slot));
        kernel_error(&self.namespace, rule, source)
    }
}

impl Rules {
    /// Deletes the rule of `selector` and no other.
    ///
    /// The kernel deletes the first rule that meets the request, and one that `selector` covers may come
    /// first. So those are all added again, behind the one to delete; then as many deletions as there are
    /// rules before them hit that one and the old copies. There is no moment in which one is missing.
    fn delete(&mut self, slot: OwnerSlot, selector: &Selector) -> io::Result<()> {
        let covered: Vec<&Selector> = self.holders.keys().filter(|other| selector.covers(other)).collect();
        for other in &covered {
            slot::add_rule_again(&mut self.netlink, slot, other)?;
        }
        (0..=covered.len()).try_for_each(|_| slot::delete_rule(&mut self.netlink, slot, selector))
    }
}

impl Drop for PolicyRoute {
    fn drop(&mut self) {
        let netlink = &mut self.rules.get_mut().unwrap_or_else(PoisonError::into_inner).netlink;
        let left = Session::begin(&self.directory, &self.namespace, netlink)
            .map(|mut session| session.leave(self.slot));
        let errors = left.unwrap_or_else(|error| {
            // Without the journal nobody knows whether the sysctls may go back; what is the slot's alone may.
            let rest =
                slot::delete_rules(netlink, self.slot).and_then(|()| slot::delete_routes(netlink, self.slot));
            let rest = rest.map_err(|source| kernel_error(&self.namespace, "rules and routes", source));
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
            .field("namespace", &self.namespace)
            .field("slot", &self.slot)
            .field("families", &self.families)
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
        self.route.release(&self.selector);
    }
}

fn connect(namespace: &Namespace) -> Result<Netlink, PolicyRouteError> {
    Netlink::open(namespace).map_err(|source| PolicyRouteError::Enter { namespace: namespace.id(), source })
}
