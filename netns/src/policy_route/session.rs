//! A transaction on one namespace under the journal lock.
//!
//! # Theory of operation
//!
//! An owner performs these steps, and reverts them in reverse order:
//!
//! | step | install | revert |
//! |---|---|---|
//! | 1 | the slot and the original values of sysctls are recorded | the entry is deleted, with the last owner the whole record |
//! | 2 | the routes are added to the slot's table | they are deleted |
//! | 3 | the sysctls are changed | the last owner restores them |
//! | 4 | rules are added, at any time and without a journal entry | all rules of the slot are deleted |
//!
//! Every step is recorded before it is performed. Wherever a process is killed, the record
//! therefore covers at least the existing objects, and reverting a missing object is a no-op. The
//! next process reverts the steps of owners that have exited in the same way. If a revert fails,
//! the owner stays in the record, and a later process retries once the owner has exited.

use super::journal::{Identity, Journal, Owner, Record};
use super::process::{Process, boot_id};
use super::slot::{self, Table};
use super::sysctl::{Change, Saved, Sysctl};
use super::{PolicyRouteError, Route};
use crate::Namespace;
use crate::netlink::Netlink;
use rustix::io::Errno;
use std::fmt;
use std::io;
use std::path::Path;
use tidegate_model::registry::{OwnerSlot, rule_priority, table_id};

/// A namespace, its record and its netlink connection, while the journal is locked.
pub(super) struct Session<'a> {
    namespace: &'a Namespace,
    netlink: &'a mut Netlink,
    journal: Journal,
    record: Record,
}

impl<'a> Session<'a> {
    /// Locks the journal in `directory` and loads the record of `namespace`.
    pub(super) fn begin(
        directory: &Path,
        namespace: &'a Namespace,
        netlink: &'a mut Netlink,
    ) -> Result<Self, PolicyRouteError> {
        let failed = |source| PolicyRouteError::Journal { path: directory.to_owned(), source };
        let journal = Journal::lock(directory).map_err(failed)?;
        let boot = boot_id().map_err(failed)?;
        let identity = Identity { boot, id: namespace.id(), cookie: netlink.cookie() };
        let record = match journal.load(identity.id).map_err(failed)? {
            Some(record) if describes(&record, &identity, netlink) => record,
            None => Record::new(identity),
            // The record belongs to a deleted namespace, so there is nothing to revert.
            Some(_) => {
                let fresh = Record::new(identity);
                journal.store(&fresh).map_err(failed)?;
                fresh
            }
        };
        Ok(Self { namespace, netlink, journal, record })
    }

    /// Reverts the changes of owners that have exited and returns their number. Failures are logged
    /// and stay in the record.
    pub(super) fn prune(&mut self) -> usize {
        let orphans = self.record.orphans();
        for slot in &orphans {
            for error in self.revert(*slot) {
                tracing::warn!(%error, "policy route of exited process not reverted");
            }
        }
        orphans.iter().filter(|slot| !self.record.owns(**slot)).count()
    }

    /// Determines which of `sysctls` must be changed.
    pub(super) fn changes(&self, sysctls: &[Sysctl]) -> Result<Vec<Change>, PolicyRouteError> {
        let mut changes = Vec::new();
        for sysctl in sysctls {
            let change = Change::needed(self.namespace, sysctl)
                .map_err(|source| self.rejected(format_args!("sysctl {sysctl}"), source))?;
            let Some(change) = change else { continue };
            let now = &change.saved.original;
            let held = self.record.sysctls.iter().find(|saved| saved.name == sysctl.name);
            if held.is_some_and(|held| held.ours == *now) {
                return Err(PolicyRouteError::SysctlTaken {
                    namespace: self.namespace.id(),
                    name: sysctl.name.clone(),
                    value: now.clone(),
                    pid: self.record.owners.first().map_or(0, |owner| owner.process.pid),
                });
            }
            changes.push(change);
        }
        Ok(changes)
    }

    /// Steps 1 and 2: claims an unused slot, with `routes` in its table. `changes` are recorded but
    /// not applied.
    pub(super) fn claim(
        &mut self,
        routes: &[Route],
        changes: &[Change],
    ) -> Result<OwnerSlot, PolicyRouteError> {
        let before = self.record.clone();
        let process = Process::current().map_err(|source| self.rejected("process", source))?;
        let used_priorities = slot::used_priorities(self.netlink)
            .map_err(|source| self.rejected("list of rules", source))?;
        for slot in OwnerSlot::all() {
            if self.record.owns(slot) || used_priorities.contains(&slot) {
                continue;
            }
            let table = format!("table {}", table_id(slot));
            match slot::table(self.netlink, slot).map_err(|source| self.rejected(&table, source))? {
                Table::Empty => {}
                Table::Ours | Table::Foreign => continue,
            }
            let path = self.namespace.path().map(Path::to_owned);
            self.record.owners.push(Owner { slot: slot.0, process, path });
            self.record.save(changes.iter().map(|change| &change.saved));
            self.store()?;
            match self.add_routes(slot, routes) {
                Ok(()) => return Ok(slot),
                Err((route, source)) => {
                    // No route was added, so the slot has nothing to revert.
                    self.record.clone_from(&before);
                    self.store()?;
                    // EEXIST: a process with another journal has claimed the slot concurrently.
                    if Errno::from_io_error(&source) != Some(Errno::EXIST) {
                        let family = route.family();
                        let route = format!("{family} route {route} table {}", table_id(slot));
                        return Err(self.rejected(route, source));
                    }
                }
            }
        }
        Err(PolicyRouteError::NoSlot(self.namespace.id()))
    }

    /// Adds `routes` to the slot's table. On failure, adds none and returns the rejected one.
    fn add_routes<'r>(
        &mut self,
        slot: OwnerSlot,
        routes: &'r [Route],
    ) -> Result<(), (&'r Route, io::Error)> {
        for (number, route) in routes.iter().enumerate() {
            if let Err(error) = slot::add_route(self.netlink, slot, route) {
                for added in routes.iter().take(number) {
                    // A failure here recurs in the next cleanup, which reports it.
                    let _ = slot::delete_route(self.netlink, slot, added);
                }
                return Err((route, error));
            }
        }
        Ok(())
    }

    /// Step 3: applies `changes`.
    pub(super) fn apply(&self, changes: &[Change]) -> Result<(), PolicyRouteError> {
        changes.iter().try_for_each(|change| {
            let Saved { name, ours, .. } = &change.saved;
            change
                .apply()
                .map_err(|source| self.rejected(format_args!("sysctl {name} = {ours}"), source))
        })
    }

    /// Reverts all steps of the owner of `slot`. Continues after failures and returns them.
    pub(super) fn revert(&mut self, slot: OwnerSlot) -> Vec<PolicyRouteError> {
        if !self.record.owns(slot) {
            tracing::warn!(slot = slot.0, "slot missing from journal; sysctls not restored");
        }
        let mut errors = Vec::new();
        let rules = format!("rules of priority {}", rule_priority(slot));
        errors.extend(
            slot::delete_rules(self.netlink, slot).err().map(|source| self.rejected(rules, source)),
        );
        if self.record.is_last(slot) {
            errors.extend(self.restore_sysctls());
        }
        let routes = format!("routes of table {}", table_id(slot));
        errors.extend(
            slot::delete_routes(self.netlink, slot)
                .err()
                .map(|source| self.rejected(routes, source)),
        );
        if errors.is_empty() {
            self.record.remove(slot);
            errors.extend(self.store().err());
        }
        errors
    }

    /// Reverts a partial installation after a failure. Further errors are only logged, because the
    /// caller already has one to report.
    pub(super) fn abort(&mut self, slot: OwnerSlot) {
        for error in self.revert(slot) {
            tracing::warn!(%error, "rollback incomplete");
        }
    }

    fn restore_sysctls(&mut self) -> Vec<PolicyRouteError> {
        let namespace = self.namespace;
        let restored = self.record.sysctls.iter().rev().map(|saved| {
            let sysctl = format!("sysctl {} = {}", saved.name, saved.original);
            saved.restore(namespace).map_err(|source| kernel_error(namespace, sysctl, source))
        });
        restored.filter_map(Result::err).collect()
    }

    fn store(&self) -> Result<(), PolicyRouteError> {
        self.journal.store(&self.record).map_err(|source| PolicyRouteError::Journal {
            path: self.journal.directory().to_owned(),
            source,
        })
    }

    fn rejected(&self, object: impl fmt::Display, source: io::Error) -> PolicyRouteError {
        kernel_error(self.namespace, object, source)
    }
}

pub(super) fn kernel_error(
    namespace: &Namespace,
    object: impl fmt::Display,
    source: io::Error,
) -> PolicyRouteError {
    PolicyRouteError::Kernel { namespace: namespace.id(), object: object.to_string(), source }
}

/// Returns whether `record` describes this namespace, not an earlier one with the same inode
/// number.
///
/// On a kernel without cookies, the routes of owners identify the namespace: they are added before
/// the sysctls change and deleted after these are restored (steps 2 and 3 above), and they exist
/// only in that namespace.
fn describes(record: &Record, identity: &Identity, netlink: &mut Netlink) -> bool {
    record.identity.same(identity).unwrap_or_else(|| {
        let mut slots = record.owners.iter().map(|owner| OwnerSlot(owner.slot));
        slots.any(|slot| matches!(slot::table(netlink, slot), Ok(Table::Ours)))
    })
}
