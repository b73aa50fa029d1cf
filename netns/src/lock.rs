//! Exclusive file locks that end with their process.

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::Duration;

/// Number of attempts and pause between them before the lock counts as held by another process.
/// Retries are necessary because a forked child of an exited owner keeps the lock until it calls
/// execve(2), and because an exiting owner may delete the file concurrently.
const ATTEMPTS: usize = 10;
const PAUSE: Duration = Duration::from_millis(20);

/// The result of an attempt to lock a file.
#[derive(Debug)]
pub enum Lock {
    /// Acquired. The lock is held until the file is closed.
    Acquired(File),
    /// Held by another process. The file can be read.
    Held(File),
}

/// Opens and locks (flock(2)) the file at `path`, and creates it with mode 0600 if it is missing.
/// The locked file is the one at `path` at the time of locking. The kernel releases the lock when
/// the process ends for any reason.
///
/// # Errors
/// Errors of open(2) and flock(2). `PermissionDenied` if the path is not a regular file of this
/// user. Symbolic links are not followed.
pub fn lock_file(path: &Path) -> io::Result<Lock> {
    let mut held = None;
    for _ in 0..ATTEMPTS {
        let file = OpenOptions::new()
            .read(true)
            .append(true)
            .create(true)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
            .open(path)?;
        // Never write to a file that another user may have planted.
        let there = file.metadata()?;
        if !there.is_file() || there.uid() != rustix::process::geteuid().as_raw() {
            let reason = format!("{} is not a regular file owned by this user", path.display());
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, reason));
        }
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => {
                held = Some(file);
                std::thread::sleep(PAUSE);
                continue;
            }
            Err(errno) => return Err(errno.into()),
        }
        // The previous owner may have deleted the file concurrently.
        let same = fs::metadata(path).and_then(|there| Ok(there.ino() == file.metadata()?.ino()));
        if same.unwrap_or(false) {
            return Ok(Lock::Acquired(file));
        }
    }
    // `None`: the file was deleted in every attempt, so other processes compete for the lock.
    held.map(Lock::Held).ok_or_else(|| io::ErrorKind::WouldBlock.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lock_is_exclusive_and_can_be_acquired_after_the_file_was_deleted() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("lock");
        let Lock::Acquired(first) = lock_file(&path).unwrap() else { panic!("the lock is free") };
        assert_eq!(first.metadata().unwrap().mode() & 0o777, 0o600);
        assert!(matches!(lock_file(&path).unwrap(), Lock::Held(_)));
        fs::remove_file(&path).unwrap();
        assert!(matches!(lock_file(&path).unwrap(), Lock::Acquired(_)), "a new file");
        drop(first);
        assert!(matches!(lock_file(&path).unwrap(), Lock::Acquired(_)));
    }

    #[test]
    fn links_fifos_and_directories_are_rejected() {
        let directory = tempfile::tempdir().unwrap();
        let [target, link, fifo] =
            ["target", "link", "fifo"].map(|name| directory.path().join(name));
        fs::write(&target, "important").unwrap();
        std::os::unix::fs::symlink(&target, &link).unwrap();
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, 0o600.into(), 0)
            .unwrap();
        for path in [&link, &fifo, &directory.path().to_owned()] {
            assert!(lock_file(path).is_err(), "{}", path.display());
        }
        assert_eq!(fs::read_to_string(&target).unwrap(), "important");
    }
}
