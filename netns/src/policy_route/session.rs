//! One namespace under lock: what is written about it, and what is in it.
//!
//! # Theory of operation
//!
//! An owner does, and afterwards undoes in reverse:
//!
//! | step | done | undone |
//! |---|---|---|
//! | 1 | its slot and the sysctls' values are written down | and struck out, with the last owner the whole record |
//! | 2 | `local default dev lo` is added to the slot's table | deleted |
//! | 3 | the sysctls are changed | put back, by the last owner |
//! | 4 | rules are added, at any time and without a word in the journal | all rules of the slot are deleted |
//!
//! Every step is written down before it is taken, so the record tells of at least what is there,
//! wherever a process was killed; and undoing what is not there does nothing. Whoever comes next
//! undoes what dead owners left, by the same steps. An owner that could not be undone stays in the
//! record, and is tried again when its process has ended.

use super::PolicyRouteError;
use super::journal::{Identity, Journal, Owner, Record};
use super::process::{Process, boot_id};
use super::slot::{self, Table};
use super::sysctl::{Change, Saved, Sysctl};
use crate::netlink::Netlink;
use crate::{Families, Family, Namespace};
use rustix::io::Errno;
use std::fmt;
use std::io;
use std::path::Path;
use tidegate_model::registry::{OwnerSlot, rule_priority, table_id};

/// A namespace, its record and the way to its kernel, for as long as the journal is locked.
pub(super) struct Session<'a> {
    namespace: &'a Namespace,
    netlink: &'a mut Netlink,
    journal: Journal,
    record: Record,
}

impl<'a> Session<'a> {
    /// Locks the journal in `directory` and finds what it knows about `namespace`.
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
            Some(record) if is_about(&record, &identity, netlink) => record,
            None => Record::new(identity),
            // It tells of a namespace that is gone, and there is nothing left to undo.
            Some(_) => {
                let fresh = Record::new(identity);
                journal.store(&fresh).map_err(failed)?;
                fresh
            }
        };
        Ok(Self { namespace, netlink, journal, record })
    }

    /// Undoes what owners that have ended left behind, and counts them. What fails is logged and
    /// stays written down.
    pub(super) fn prune(&mut self) -> usize {
        let orphans = self.record.orphans();
        for slot in &orphans {
            for error in self.leave(*slot) {
                tracing::warn!(%error, "cannot clean up after a process that has ended");
            }
        }
        orphans.iter().filter(|slot| !self.record.owns(**slot)).count()
    }

    /// Looks which of `sysctls` will have to be changed.
    pub(super) fn changes(&self, sysctls: &[Sysctl]) -> Result<Vec<Change>, PolicyRouteError> {
        let mut changes = Vec::new();
        for sysctl in sysctls {
            let change = Change::needed(self.namespace, sysctl)
                .map_err(|source| self.refused(format_args!("sysctl {sysctl}"), source))?;
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

    /// Steps 1 and 2: finds a slot that nobody uses, and takes it. `changes` are written down, not
    /// made.
    pub(super) fn claim(
        &mut self,
        families: Families,
        changes: &[Change],
    ) -> Result<OwnerSlot, PolicyRouteError> {
        let before = self.record.clone();
        let process = Process::current().map_err(|source| self.refused("process", source))?;
        let with_rules = slot::with_rules(self.netlink)
            .map_err(|source| self.refused("list of rules", source))?;
        for slot in OwnerSlot::all() {
            if self.record.owns(slot) || with_rules.contains(&slot) {
                continue;
            }
            let table = format!("table {}", table_id(slot));
            match slot::table(self.netlink, slot).map_err(|source| self.refused(&table, source))? {
                Table::Empty => {}
                Table::Ours | Table::Foreign => continue,
            }
            let path = self.namespace.path().map(Path::to_owned);
            self.record.owners.push(Owner { slot: slot.0, process, path });
            self.record.save(changes.iter().map(|change| &change.saved));
            self.store()?;
            match self.add_routes(slot, families) {
                Ok(()) => return Ok(slot),
                Err((family, source)) => {
                    // None was added, so there is nothing to undo in the slot.
                    self.record.clone_from(&before);
                    self.store()?;
                    // Someone who keeps another journal was quicker, and the slot is theirs.
                    if Errno::from_io_error(&source) != Some(Errno::EXIST) {
                        let route =
                            format!("{family} route local default dev lo table {}", table_id(slot));
                        return Err(self.refused(route, source));
                    }
                }
            }
        }
        Err(PolicyRouteError::NoSlot(self.namespace.id()))
    }

    /// Adds the slot's route for all of `families`, or for none and says which was refused.
    fn add_routes(
        &mut self,
        slot: OwnerSlot,
        families: Families,
    ) -> Result<(), (Family, io::Error)> {
        for family in families.iter() {
            if let Err(error) = slot::add_route(self.netlink, slot, family) {
                for added in families.iter().take_while(|added| *added != family) {
                    // Fails only as the next attempt to clean up will.
                    let _ = slot::delete_route(self.netlink, slot, added);
                }
                return Err((family, error));
            }
        }
        Ok(())
    }

    /// Step 3.
    pub(super) fn make(&self, changes: &[Change]) -> Result<(), PolicyRouteError> {
        changes.iter().try_for_each(|change| {
            let Saved { name, ours, .. } = &change.saved;
            change
                .make()
                .map_err(|source| self.refused(format_args!("sysctl {name} = {ours}"), source))
        })
    }

    /// Undoes all steps of the owner of `slot`, and goes on where one fails.
    pub(super) fn leave(&mut self, slot: OwnerSlot) -> Vec<PolicyRouteError> {
        if !self.record.owns(slot) {
            tracing::warn!(
                slot = slot.0,
                "not in the journal any more; sysctls are left as they are"
            );
        }
        let mut errors = Vec::new();
        let rules = format!("rules of priority {}", rule_priority(slot));
        errors.extend(
            slot::delete_rules(self.netlink, slot).err().map(|source| self.refused(rules, source)),
        );
        if self.record.is_last(slot) {
            errors.extend(self.restore_sysctls());
        }
        let routes = format!("routes of table {}", table_id(slot));
        errors.extend(
            slot::delete_routes(self.netlink, slot)
                .err()
                .map(|source| self.refused(routes, source)),
        );
        if errors.is_empty() {
            self.record.remove(slot);
            errors.extend(self.store().err());
        }
        errors
    }

    /// Undoes what was begun, when going on has failed; the caller already has an error to report.
    pub(super) fn give_up(&mut self, slot: OwnerSlot) {
        for error in self.leave(slot) {
            tracing::warn!(%error, "cannot take back what was begun");
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

    fn refused(&self, object: impl fmt::Display, source: io::Error) -> PolicyRouteError {
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

/// Whether `record` tells of the namespace before us, and not of an earlier one with the same inode
/// number.
///
/// A kernel that gives out no cookies leaves evidence: as long as anything else is changed, an
/// owner's route is there (steps 2 and 3 above), and it is in no other namespace.
fn is_about(record: &Record, identity: &Identity, netlink: &mut Netlink) -> bool {
    record.identity.same(identity).unwrap_or_else(|| {
        let mut slots = record.owners.iter().map(|owner| OwnerSlot(owner.slot));
        slots.any(|slot| matches!(slot::table(netlink, slot), Ok(Table::Ours)))
    })
}
