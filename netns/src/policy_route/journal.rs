//! What has to be known after a crash: who owns which slot, and what every sysctl was before.
//!
//! One JSON file per namespace, in a directory that only its owner may write: what stands there is
//! carried out with that owner's rights, by whoever reads it next. The directory itself is the
//! lock, by flock(2), which the kernel gives back however its holder ends. A file is replaced as a
//! whole, so a reader finds the old one or the new one. Nothing is synced to the disk: what is
//! described does not outlive the kernel either.

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

/// How long to wait for another process to finish with the journal. It takes milliseconds unless
/// the process is stopped.
const PATIENCE: Duration = Duration::from_secs(10);

/// What is written about one namespace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) identity: Identity,
    pub(super) owners: Vec<Owner>,
    /// In the order in which they were changed.
    pub(super) sysctls: Vec<Saved>,
}

/// Which namespace is meant.
///
/// Device and inode do not suffice: the kernel gives the lowest free inode number to the next
/// namespace, so a restarted container is likely to have that of the one before.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Identity {
    pub(super) boot: String,
    pub(super) id: NamespaceId,
    /// Unique within one boot; Linux 5.14.
    pub(super) cookie: Option<u64>,
}

impl Identity {
    /// Whether both are the same namespace; `None` if they may be and the kernel cannot tell.
    pub(super) fn same(&self, other: &Self) -> Option<bool> {
        if self.boot != other.boot || self.id != other.id {
            return Some(false);
        }
        Some(self.cookie? == other.cookie?)
    }
}

/// Who has a slot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Owner {
    pub(super) slot: u8,
    pub(super) process: Process,
    /// By which the owner opened the namespace, and others may.
    pub(super) path: Option<PathBuf>,
}

impl Record {
    /// Nobody owns anything.
    pub(super) const fn new(identity: Identity) -> Self {
        Self { identity, owners: Vec::new(), sysctls: Vec::new() }
    }

    /// Notes what sysctls were. One that is known has been set by someone else since: that is now
    /// what it goes back to.
    pub(super) fn save<'a>(&mut self, sysctls: impl IntoIterator<Item = &'a Saved>) {
        for sysctl in sysctls {
            match self.sysctls.iter_mut().find(|saved| saved.name == sysctl.name) {
                Some(overtaken) => overtaken.clone_from(sysctl),
                None => self.sysctls.push(sysctl.clone()),
            }
        }
    }

    /// The slots whose owners have ended.
    pub(super) fn orphans(&self) -> Vec<OwnerSlot> {
        let dead = self.owners.iter().filter(|owner| !owner.process.is_alive());
        dead.map(|owner| OwnerSlot(owner.slot)).collect()
    }

    /// Whether nobody but `slot` owns anything.
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

/// The directory, locked for as long as the value lives.
pub(super) struct Journal {
    directory: PathBuf,
    _lock: File,
}

impl Journal {
    /// Makes the directory if need be and waits for its lock.
    pub(super) fn lock(directory: &Path) -> io::Result<Self> {
        DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
        let lock = File::open(directory)?;
        let metadata = lock.metadata()?;
        if metadata.uid() != geteuid().as_raw() || metadata.mode() & 0o022 != 0 {
            return Err(io::Error::new(
                io::ErrorKind::PermissionDenied,
                "it belongs to someone else, or others may write to it",
            ));
        }
        let deadline = Instant::now() + PATIENCE;
        loop {
            match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(Self { directory: directory.to_owned(), _lock: lock }),
                Err(Errno::WOULDBLOCK | Errno::INTR) if Instant::now() < deadline => {
                    thread::sleep(Duration::from_millis(1));
                }
                Err(Errno::WOULDBLOCK) => {
                    return Err(io::Error::new(
                        io::ErrorKind::TimedOut,
                        "another process keeps it locked",
                    ));
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    pub(super) fn directory(&self) -> &Path {
        &self.directory
    }

    /// What is written about the namespace with this id. A file that makes no sense counts as none.
    pub(super) fn load(&self, id: NamespaceId) -> io::Result<Option<Record>> {
        let path = self.file(id);
        let text = match fs::read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            text => text?,
        };
        let record = serde_json::from_slice(&text);
        if let Err(error) = &record {
            tracing::warn!(path = %path.display(), %error, "ignoring a policy journal that makes no sense");
        }
        Ok(record.ok())
    }

    /// Writes it down; one without owners is deleted.
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

    /// The namespaces of which something is written.
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

/// Where this user's journals are: below the [`run_directory`](crate::run_directory).
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
    fn what_is_stored_is_found_until_nobody_owns_anything() {
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
    fn a_file_that_makes_no_sense_counts_as_none() {
        let temporary = tempfile::tempdir().unwrap();
        let journal = Journal::lock(&temporary.path().join("policy")).unwrap();
        let id = identity(None).id;
        fs::write(journal.file(id), "{\"owners\": 3").unwrap();
        assert_eq!(journal.load(id).unwrap(), None);
    }

    #[test]
    fn a_directory_that_others_may_write_to_is_refused() {
        let temporary = tempfile::tempdir().unwrap();
        fs::set_permissions(temporary.path(), fs::Permissions::from_mode(0o777)).unwrap();
        let error = Journal::lock(temporary.path()).err().unwrap();
        assert_eq!(error.to_string(), "it belongs to someone else, or others may write to it");
    }

    #[test]
    fn the_lock_is_for_one_at_a_time_and_ends_with_its_holder() {
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
    fn a_namespace_is_known_by_its_cookie_and_suspected_without() {
        assert_eq!(identity(Some(1)).same(&identity(Some(1))), Some(true));
        assert_eq!(identity(Some(1)).same(&identity(Some(2))), Some(false));
        assert_eq!(identity(None).same(&identity(None)), None);
        let rebooted = Identity { boot: "b2".into(), ..identity(None) };
        assert_eq!(identity(None).same(&rebooted), Some(false));
    }

    #[test]
    fn the_dead_are_told_from_the_living() {
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
