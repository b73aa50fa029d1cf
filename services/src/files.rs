//! The directory `RUN_DIR/services/NAME/` with the `hosts`, `resolv.conf`, `hostname` and
//! `nsswitch.conf` of a service.
//!
//! The supervisor locks the directory (flock(2)) while the service exists. A directory without a
//! lock belongs to a killed supervisor, and [`sweep`] removes it. The bind mounts of the files are
//! in the service's mount namespace and end with it.

use super::{ServiceError, ServiceSpec, nsswitch};
use rustix::fs::{FlockOperation, flock};
use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// Subdirectory of the run directory.
pub(super) const SERVICES: &str = "services";

/// Attempts to create and lock a directory. An attempt fails if a sweep removes the directory in
/// between.
const ATTEMPTS: usize = 8;

/// File names in the directory, each with its mount point in the service.
pub(super) const FILES: [(&str, &str); 3] =
    [("hosts", "/etc/hosts"), ("resolv.conf", "/etc/resolv.conf"), ("hostname", "/etc/hostname")];

/// As in [`FILES`]. It exists only if the host has `/etc/nsswitch.conf`, which only glibc uses.
pub(super) const NSSWITCH: (&str, &str) = ("nsswitch.conf", "/etc/nsswitch.conf");

/// All of them.
pub(super) fn mounted() -> impl Iterator<Item = (&'static str, &'static str)> {
    FILES.into_iter().chain([NSSWITCH])
}

/// The directory of one service. Removed on drop.
#[derive(Debug)]
pub(super) struct ServiceFiles {
    path: PathBuf,
    _lock: File,
}

impl ServiceFiles {
    /// Creates the directory and its files. Their modes are 0755 and 0644 regardless of the umask,
    /// because a service may run as another user than root.
    ///
    /// # Errors
    /// [`ServiceError::Files`] or [`ServiceError::Busy`].
    pub(super) fn create(run_dir: &Path, spec: &ServiceSpec) -> Result<Self, ServiceError> {
        let services = run_dir.join(SERVICES);
        let path = services.join(&spec.name);
        let failed = |path: &Path| {
            let (service, path) = (spec.name.clone(), path.to_owned());
            |source| ServiceError::Files { service, path, source }
        };
        DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(&services)
            .map_err(failed(&services))?;
        let lock = claim(&path).map_err(failed(&path))?;
        let lock = lock
            .ok_or_else(|| ServiceError::Busy { service: spec.name.clone(), path: path.clone() })?;
        let files = Self { path, _lock: lock };
        fs::set_permissions(&files.path, Permissions::from_mode(0o755))
            .map_err(failed(&files.path))?;
        let hostname = format!("{}\n", spec.hostname);
        for ((name, _), text) in FILES.into_iter().zip([&spec.hosts, &spec.resolv_conf, &hostname])
        {
            let path = files.path.join(name);
            write(&path, text).map_err(failed(&path))?;
        }
        if let Ok(host) = fs::read(NSSWITCH.1) {
            let path = files.path.join(NSSWITCH.0);
            let text = nsswitch::with_names_from_dns(&String::from_utf8_lossy(&host));
            write(&path, &text).map_err(failed(&path))?;
        }
        Ok(files)
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for ServiceFiles {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "files of a service not removed");
        }
    }
}

/// Creates the directory, or reuses one without a lock, and locks it. `None` if another process
/// holds the lock.
fn claim(path: &Path) -> io::Result<Option<File>> {
    for _ in 0..ATTEMPTS {
        match DirBuilder::new().mode(0o755).create(path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        match lock(path) {
            Ok(Some(lock)) if is_at(&lock, path) => return Ok(Some(lock)),
            Ok(None) => return Ok(None),
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            // A sweep removed the directory concurrently.
            _ => {}
        }
    }
    Ok(None)
}

fn lock(path: &Path) -> io::Result<Option<File>> {
    let directory = File::open(path)?;
    match flock(&directory, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(directory)),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Returns whether `path` still refers to the open `directory`.
pub(super) fn is_at(directory: &File, path: &Path) -> bool {
    let id = |metadata: &fs::Metadata| (metadata.dev(), metadata.ino());
    matches!((&directory.metadata(), &fs::metadata(path)), (Ok(open), Ok(current)) if id(open) == id(current))
}

/// Replaces the file rather than its contents: a stale file can still be bind-mounted in a service
/// of a killed supervisor that is about to end.
fn write(path: &Path, text: &str) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).open(path)?;
    file.write_all(text.as_bytes())?;
    file.set_permissions(Permissions::from_mode(0o644))
}

/// Removes the directories of services whose supervisor was killed. Returns their number.
///
/// Processes, namespaces and mounts of a service need no sweep, since they end with its supervisor.
///
/// # Errors
/// A directory cannot be read or removed. The remaining ones are removed nevertheless.
pub fn sweep(run_dir: &Path) -> io::Result<usize> {
    let entries = match fs::read_dir(run_dir.join(SERVICES)) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        Err(error) => return Err(error),
    };
    let mut swept = 0;
    let mut first_error = None;
    for entry in entries {
        let removed = entry.and_then(|entry| {
            let path = entry.path();
            // tidegate creates only directories here.
            if !entry.file_type()?.is_dir() {
                return Ok(false);
            }
            match lock(&path)? {
                Some(_lock) => fs::remove_dir_all(&path).map(|()| true),
                None => Ok(false),
            }
        });
        match removed {
            Ok(removed) => swept += usize::from(removed),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => first_error = first_error.or(Some(error)),
        }
    }
    first_error.map_or(Ok(swept), Err)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tidegate_model::Restart;

    fn spec(name: &str) -> ServiceSpec {
        ServiceSpec {
            name: name.to_owned(),
            command: vec!["true".to_owned()],
            environment: [].into(),
            hostname: format!("{name}-host"),
            working_dir: "/".into(),
            namespace: tidegate_netns::Namespace::current().unwrap(),
            hosts: "127.0.0.1 localhost\n".to_owned(),
            resolv_conf: "nameserver 127.0.0.11\n".to_owned(),
            restart: Restart::No,
            depends_on: vec![],
        }
    }

    #[test]
    fn files_are_world_readable_and_removed_on_drop() {
        let run_dir = tempfile::tempdir().unwrap();
        let files = ServiceFiles::create(run_dir.path(), &spec("web")).unwrap();
        let path = run_dir.path().join("services/web");
        assert_eq!(files.path(), path);
        assert_eq!(fs::read_to_string(path.join("hostname")).unwrap(), "web-host\n");
        assert_eq!(
            fs::read_to_string(path.join("resolv.conf")).unwrap(),
            "nameserver 127.0.0.11\n"
        );
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&path), mode(&path.join("hosts"))), (0o755, 0o644));
        drop(files);
        assert!(!path.exists());
    }

    #[test]
    fn a_sweep_removes_directories_without_a_lock() {
        let run_dir = tempfile::tempdir().unwrap();
        assert_eq!(sweep(run_dir.path()).unwrap(), 0);
        let _held = ServiceFiles::create(run_dir.path(), &spec("held")).unwrap();
        let left = run_dir.path().join("services/left");
        fs::create_dir(&left).unwrap();
        fs::write(left.join("hosts"), "old").unwrap();
        assert_eq!(sweep(run_dir.path()).unwrap(), 1);
        assert!(!left.exists());
        assert!(run_dir.path().join("services/held/hosts").exists());
    }

    #[test]
    fn a_locked_directory_is_rejected_and_a_stale_one_reused() {
        let run_dir = tempfile::tempdir().unwrap();
        let left = run_dir.path().join("services/web");
        fs::create_dir_all(&left).unwrap();
        fs::write(left.join("hosts"), "old").unwrap();
        let files = ServiceFiles::create(run_dir.path(), &spec("web")).unwrap();
        assert_eq!(fs::read_to_string(left.join("hosts")).unwrap(), "127.0.0.1 localhost\n");
        let refused = ServiceFiles::create(run_dir.path(), &spec("web")).unwrap_err().to_string();
        assert!(refused.contains("in use by another tidegate"), "{refused}");
        drop(files);
    }
}
