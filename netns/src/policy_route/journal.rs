//! The journal for crash recovery: owners of slots and original values of sysctls.
//!
//! The journal is a directory with one JSON file per namespace. Only its owner may have write
//! access, because later processes act on the contents with the owner's privileges. flock(2) on the
//! directory serialises access; the kernel releases the lock when its holder exits. Files are
//! replaced atomically by rename. They are not synced to disk, because the described state does not
//! survive a reboot.

use super::PolicyRouteError;
use super::process::Process;
use super::sysctl::Saved;
use crate::NamespaceId;
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use rustix::process::geteuid;
use serde::{Deserialize, Serialize};
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};
use tidegate_model::registry::OwnerSlot;

/// Timeout for the lock. Holders need milliseconds unless they are stopped.
const LOCK_TIMEOUT: Duration = Duration::from_secs(10);

/// The record of one namespace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) identity: Identity,
    pub(super) owners: Vec<Owner>,
    /// In the order of the changes.
    pub(super) sysctls: Vec<Saved>,
}

/// The identity of a namespace.
///
/// Device and inode are insufficient: the kernel assigns the lowest free inode number to a new
/// namespace, so a restarted container often has the number of its predecessor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Identity {
    pub(super) boot: String,
    pub(super) id: NamespaceId,
    /// Unique within one boot; Linux 5.14.
    pub(super) cookie: Option<u64>,
}

impl Identity {
    /// Returns whether both identify the same namespace. Returns `None` if this depends on the
    /// cookie and the kernel does not support cookies.
    pub(super) fn same(&self, other: &Self) -> Option<bool> {
        if self.boot != other.boot || self.id != other.id {
            return Some(false);
        }
        Some(self.cookie? == other.cookie?)
    }
}

/// The owner of a slot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Owner {
    pub(super) slot: u8,
    pub(super) process: Process,
    /// Path at which the owner opened the namespace, and others can open it.
    pub(super) path: Option<PathBuf>,
}

impl Record {
    /// Creates a record without owners.
    pub(super) const fn new(identity: Identity) -> Self {
        Self { identity, owners: Vec::new(), sysctls: Vec::new() }
    }

    /// Records original values of sysctls. A sysctl that is already recorded has been changed
    /// externally since, and its new value becomes the original value.
    pub(super) fn save<'a>(&mut self, sysctls: impl IntoIterator<Item = &'a Saved>) {
        for sysctl in sysctls {
            match self.sysctls.iter_mut().find(|saved| saved.name == sysctl.name) {
                Some(outdated) => outdated.clone_from(sysctl),
                None => self.sysctls.push(sysctl.clone()),
            }
        }
    }

    /// Returns the slots whose owners have exited.
    pub(super) fn orphans(&self) -> Vec<OwnerSlot> {
        let dead = self.owners.iter().filter(|owner| !owner.process.is_alive());
        dead.map(|owner| OwnerSlot(owner.slot)).collect()
    }

    /// Returns whether `slot` is the only owned slot.
    pub(super) fn is_last(&self, slot: OwnerSlot) -> bool {
        self.owners.iter().all(|owner| owner.slot == slot.0)
    }

    pub(super) fn owns(&self, slot: OwnerSlot) -> bool {
        self.owners.iter().any(|owner| owner.slot == slot.0)
    }

    pub(super) fn remove(&mut self, slot: OwnerSlot) {
        self.owners.retain(|owner| owner.slot != slot.0);
    }
}

/// The locked journal directory.
pub(super) struct Journal {
    directory: PathBuf,
    _lock: File,
}

impl Journal {
    /// Creates the directory if it is missing, and waits for its lock.
    pub(super) fn lock(directory: &Path) -> io::Result<Self> {
        DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
        let lock = File::open(directory)?;
        let metadata = lock.metadata()?;
        if metadata.uid() != geteuid().as_raw() || metadata.mode() & 0o022 != 0 {
            return Err(io::Error::new(
                io::ErrorKind::PermissionDenied,
                "owned by another user, or writable by group or others",
            ));
        }
        let deadline = Instant::now() + LOCK_TIMEOUT;
        loop {
            match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(Self { directory: directory.to_owned(), _lock: lock }),
                Err(Errno::WOULDBLOCK | Errno::INTR) if Instant::now() < deadline => {
                    thread::sleep(Duration::from_millis(1));
                }
                Err(Errno::WOULDBLOCK) => {
                    return Err(io::Error::new(
                        io::ErrorKind::TimedOut,
                        "locked by another process for more than 10 s",
                    ));
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    pub(super) fn directory(&self) -> &Path {
        &self.directory
    }

    /// Loads the record of the namespace `id`. An invalid file is ignored.
    pub(super) fn load(&self, id: NamespaceId) -> io::Result<Option<Record>> {
        let path = self.file(id);
        let text = match fs::read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            text => text?,
        };
        let record = serde_json::from_slice(&text);
        if let Err(error) = &record {
            tracing::warn!(path = %path.display(), %error, "invalid policy journal ignored");
        }
        Ok(record.ok())
    }

    /// Stores the record, or deletes its file if it has no owners.
    pub(super) fn store(&self, record: &Record) -> io::Result<()> {
        let path = self.file(record.identity.id);
        if record.owners.is_empty() {
            return match fs::remove_file(path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
                removed => removed,
            };
        }
        let next = path.with_extension("next");
        fs::write(&next, serde_json::to_vec_pretty(record)?)?;
        fs::rename(next, path)
    }

    /// Lists the namespaces that have a record.
    pub(super) fn namespaces(&self) -> io::Result<Vec<NamespaceId>> {
        let mut namespaces = Vec::new();
        for entry in fs::read_dir(&self.directory)? {
            namespaces.extend(parse_name(&entry?.file_name().to_string_lossy()));
        }
        namespaces.sort_unstable();
        Ok(namespaces)
    }

    fn file(&self, id: NamespaceId) -> PathBuf {
        self.directory.join(format!("net-{}-{}.json", id.device, id.inode))
    }
}

fn parse_name(name: &str) -> Option<NamespaceId> {
    let (device, inode) = name.strip_prefix("net-")?.strip_suffix(".json")?.split_once('-')?;
    Some(NamespaceId { device: device.parse().ok()?, inode: inode.parse().ok()? })
}

/// Returns the journal directory of this user, below the [`run_directory`](crate::run_directory).
///
/// # Errors
/// [`PolicyRouteError::NoRunDirectory`].
pub(super) fn directory() -> Result<PathBuf, PolicyRouteError> {
    let run = crate::run_directory().ok_or(PolicyRouteError::NoRunDirectory)?;
    Ok(run.join("policy"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn identity(cookie: Option<u64>) -> Identity {
        Identity { boot: "b1".into(), id: NamespaceId { device: 4, inode: 4_026_532_000 }, cookie }
    }

    fn record() -> Record {
        let process = Process::current().unwrap();
        Record {
            owners: vec![Owner { slot: 7, process, path: Some("/run/netns/blue".into()) }],
            sysctls: vec![Saved {
                name: "net.ipv4.fwmark_reflect".into(),
                original: "0".into(),
                ours: "1".into(),
            }],
            ..Record::new(identity(Some(12)))
        }
    }

    #[test]
    fn record_is_kept_until_its_last_owner_is_removed() {
        let temporary = tempfile::tempdir().unwrap();
        let journal = Journal::lock(&temporary.path().join("tidegate/policy")).unwrap();
        let mut record = record();
        let id = record.identity.id;
        assert_eq!(journal.load(id).unwrap(), None);
        journal.store(&record).unwrap();
        assert_eq!(journal.load(id).unwrap().as_ref(), Some(&record));
        assert_eq!(journal.namespaces().unwrap(), [id]);

        record.remove(OwnerSlot(7));
        journal.store(&record).unwrap();
        assert_eq!(journal.load(id).unwrap(), None);
        assert!(journal.namespaces().unwrap().is_empty());
    }

    #[test]
    fn invalid_file_is_ignored() {
        let temporary = tempfile::tempdir().unwrap();
        let journal = Journal::lock(&temporary.path().join("policy")).unwrap();
        let id = identity(None).id;
        fs::write(journal.file(id), "{\"owners\": 3").unwrap();
        assert_eq!(journal.load(id).unwrap(), None);
    }

    #[test]
    fn directory_writable_by_others_is_rejected() {
        let temporary = tempfile::tempdir().unwrap();
        fs::set_permissions(temporary.path(), fs::Permissions::from_mode(0o777)).unwrap();
        let error = Journal::lock(temporary.path()).err().unwrap();
        assert_eq!(error.to_string(), "owned by another user, or writable by group or others");
    }

    #[test]
    fn lock_is_exclusive_and_released_on_drop() {
        let temporary = tempfile::tempdir().unwrap();
        let path = temporary.path().join("policy");
        let held = Journal::lock(&path).unwrap();
        let waiting = thread::spawn({
            let path = path.clone();
            move || Journal::lock(&path).map(drop)
        });
        let again = flock(File::open(&path).unwrap(), FlockOperation::NonBlockingLockExclusive);
        assert_eq!(again, Err(Errno::WOULDBLOCK));
        drop(held);
        waiting.join().unwrap().unwrap();
    }

    #[test]
    fn namespace_is_identified_by_cookie_and_undecided_without() {
        assert_eq!(identity(Some(1)).same(&identity(Some(1))), Some(true));
        assert_eq!(identity(Some(1)).same(&identity(Some(2))), Some(false));
        assert_eq!(identity(None).same(&identity(None)), None);
        let rebooted = Identity { boot: "b2".into(), ..identity(None) };
        assert_eq!(identity(None).same(&rebooted), Some(false));
    }

    #[test]
    fn owners_that_exited_are_orphans() {
        let mut record = record();
        let dead =
            serde_json::from_str(r#"{"pid": 1, "start_time": 18446744073709551615}"#).unwrap();
        record.owners.push(Owner { slot: 9, process: dead, path: None });
        assert_eq!(record.orphans(), [OwnerSlot(9)]);
        assert!(!record.is_last(OwnerSlot(7)));
        record.remove(OwnerSlot(9));
        assert!(record.is_last(OwnerSlot(7)) && record.owns(OwnerSlot(7)));
    }
}
