//! Cleaning up after processes that were killed, in every namespace that a journal tells of.

use super::journal::{self, Journal, Record};
use super::session::Session;
use super::{PolicyRouteError, connect};
use crate::{Namespace, NamespaceId};
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Undoes what policy routes of processes that have ended left behind, in every namespace that can
/// still be found and entered: by the path it was opened by, or through a process that is in it.
/// The journal of one that cannot is deleted when all its owners have ended. Counts the owners
/// cleaned up after; what fails is logged.
///
/// For the start of a program. Takes some milliseconds if there is a namespace that has to be
/// looked for among the processes, and well under one otherwise.
///
/// # Errors
/// The journal cannot be read.
pub fn sweep() -> Result<usize, PolicyRouteError> {
    sweep_in(&journal::directory()?)
}

/// [`sweep`] with the journal in `directory`.
///
/// # Errors
/// As for [`sweep`].
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
        // Locked anew for each: others need not wait for all of them.
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
                        tracing::warn!(%error, "cannot clean up after processes that have ended");
                    }
                }
            }
            None => forget(directory, id).map_err(failed)?,
        }
    }
    Ok(swept)
}

/// Deletes what is written about a namespace that nobody can be found in, if none of its owners is
/// left to use it.
fn forget(directory: &Path, id: NamespaceId) -> std::io::Result<()> {
    let journal = Journal::lock(directory)?;
    match journal.load(id)? {
        Some(record) if record.orphans().len() == record.owners.len() => {
            journal.store(&Record::new(record.identity))
        }
        _ => Ok(()),
    }
}

/// Finds namespaces by their ids.
#[derive(Default)]
struct Finder {
    /// The namespaces that processes are in, and one such process's link for each; looked for once,
    /// if at all.
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
    // Processes end while we look, and others are none of ours to look at.
    links
        .filter_map(|link| {
            let metadata = fs::metadata(&link).ok()?;
            Some((NamespaceId { device: metadata.dev(), inode: metadata.ino() }, link))
        })
        .collect()
}
