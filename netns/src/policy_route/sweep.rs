//! Cleanup after killed processes, in every namespace recorded in the journal.

use super::journal::{self, Journal, Record};
use super::session::Session;
use super::{PolicyRouteError, connect};
use crate::{Namespace, NamespaceId};
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Reverts the policy routes of exited processes in every namespace that can still be found and
/// entered, by its recorded path or through a process inside. If a namespace cannot be found, its
/// record is deleted once all owners have exited. Returns the number of owners cleaned up. Failures
/// are logged.
///
/// Intended for program start. Takes a few milliseconds if the processes must be searched for a
/// namespace, and well under one millisecond otherwise.
///
/// # Errors
/// The journal cannot be read.
pub fn sweep() -> Result<usize, PolicyRouteError> {
    sweep_in(&journal::directory()?)
}

/// [`sweep`] with the journal in `directory`.
///
/// # Errors
/// Same as [`sweep`].
pub fn sweep_in(directory: &Path) -> Result<usize, PolicyRouteError> {
    if !directory.exists() {
        return Ok(0);
    }
    let failed = |source| PolicyRouteError::Journal { path: directory.to_owned(), source };
    let namespaces =
        Journal::lock(directory).and_then(|journal| journal.namespaces()).map_err(failed)?;
    let mut finder = Finder::default();
    let mut swept = 0;
    for id in namespaces {
        // Lock the journal per namespace, so that other processes do not wait for the whole sweep.
        let record =
            Journal::lock(directory).and_then(|journal| journal.load(id)).map_err(failed)?;
        let Some(record) = record.filter(|record| !record.orphans().is_empty()) else { continue };
        match finder.find(&record) {
            Some(namespace) => {
                let cleaned = connect(&namespace).and_then(|mut netlink| {
                    Ok(Session::begin(directory, &namespace, &mut netlink)?.prune())
                });
                match cleaned {
                    Ok(count) => swept += count,
                    Err(error) => {
                        tracing::warn!(%error, "policy routes of exited processes not reverted");
                    }
                }
            }
            None => delete_record(directory, id).map_err(failed)?,
        }
    }
    Ok(swept)
}

/// Deletes the record of a namespace that cannot be found, if all its owners have exited.
fn delete_record(directory: &Path, id: NamespaceId) -> std::io::Result<()> {
    let journal = Journal::lock(directory)?;
    match journal.load(id)? {
        Some(record) if record.orphans().len() == record.owners.len() => {
            journal.store(&Record::new(record.identity))
        }
        _ => Ok(()),
    }
}

/// Finds namespaces by ID.
#[derive(Default)]
struct Finder {
    /// Network namespaces of all processes, with the link of one process each. Computed on first
    /// use.
    processes: Option<BTreeMap<NamespaceId, PathBuf>>,
}

impl Finder {
    fn find(&mut self, record: &Record) -> Option<Namespace> {
        let id = record.identity.id;
        let matching = |namespace: &Namespace| namespace.id() == id;
        if let Some(current) = Namespace::current().ok().filter(matching) {
            return Some(current);
        }
        let mut paths = record.owners.iter().filter_map(|owner| owner.path.as_deref());
        let recorded = paths.find_map(|path| Namespace::from_path(path).ok().filter(matching));
        recorded.or_else(|| {
            let path = self.processes.get_or_insert_with(namespaces_of_processes).get(&id)?;
            Namespace::from_path(path).ok().filter(matching)
        })
    }
}

fn namespaces_of_processes() -> BTreeMap<NamespaceId, PathBuf> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let links = entries
        .filter(|entry| {
            entry.file_name().as_encoded_bytes().first().is_some_and(u8::is_ascii_digit)
        })
        .map(|entry| entry.path().join("ns/net"));
    // Skip processes that exit during the scan, and processes that may not be inspected.
    links
        .filter_map(|link| {
            let metadata = fs::metadata(&link).ok()?;
            Some((NamespaceId { device: metadata.dev(), inode: metadata.ino() }, link))
        })
        .collect()
}
