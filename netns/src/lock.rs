//! A file that is somebody's, for as long as that process lives.

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::Duration;

/// How often to try for the lock, and how long to wait in between, before another process is said
/// to have it: a child of a dead owner holds on to it until it executes its program, and an owner
/// that ends may delete the file meanwhile.
const ATTEMPTS: usize = 10;
const PAUSE: Duration = Duration::from_millis(20);

/// What came of trying for a lock.
#[derive(Debug)]
pub enum Lock {
    /// It is ours until the file is closed.
    Had(File),
    /// Another process has it; what it wrote into the file can be read.
    Held(File),
}

/// Opens and locks (flock(2)) the file that is at `path` by the time the lock is had, and makes it
/// if need be, for this user alone. The lock goes with the process, however that ends.
///
/// # Errors
/// What open(2) and flock(2) say; `PermissionDenied` for what is not a file, or not this user's,
/// and a link is not followed.
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
        // What another could have put there is not written into.
        let there = file.metadata()?;
        if !there.is_file() || there.uid() != rustix::process::geteuid().as_raw() {
            let reason = format!("{} is not a file of this user's", path.display());
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
        // Its last owner may have deleted it meanwhile.
        let same = fs::metadata(path).and_then(|there| Ok(there.ino() == file.metadata()?.ino()));
        if same.unwrap_or(false) {
            return Ok(Lock::Had(file));
        }
    }
    // Without one: it was deleted each time, so there are others, and busy ones.
    held.map(Lock::Held).ok_or_else(|| io::ErrorKind::WouldBlock.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_had_once_at_a_time_and_again_after_the_file_was_deleted() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("lock");
        let Lock::Had(first) = lock_file(&path).unwrap() else { panic!("nobody else has it") };
        assert_eq!(first.metadata().unwrap().mode() & 0o777, 0o600);
        assert!(matches!(lock_file(&path).unwrap(), Lock::Held(_)));
        fs::remove_file(&path).unwrap();
        assert!(matches!(lock_file(&path).unwrap(), Lock::Had(_)), "another file");
        drop(first);
        assert!(matches!(lock_file(&path).unwrap(), Lock::Had(_)));
    }

    #[test]
    fn what_is_no_file_of_ours_is_not_taken() {
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
