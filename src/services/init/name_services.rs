//! Keeps a service from the name services of the host.
//!
//! glibc asks nscd's socket before any other source, and the modules of nsswitch.conf ask sockets
//! of systemd-resolved, sssd, avahi and others. Such sockets are paths, so that a network namespace
//! does not separate them, and their daemons answer from the host's point of view: names of
//! neighbours are unknown there, and the daemon hears what the service asks for. (Abstract sockets
//! do belong to the network namespace.)
//!
//! The directories with these sockets are covered with an empty read-only tmpfs. A daemon that is
//! started later makes its directory then, and one that is restarted may remove and make it again,
//! which takes a cover away (`detach_mounts` of `fs/namespace.c`). So the directories above are
//! watched for as long as the service runs, and what appears is covered.
//!
//! This is not a boundary for a service that wants to get past it: it has the host's files, and
//! root may remove a mount. In a user namespace of its own it may not, but it can open what appears
//! later before that is covered.

use super::super::files::SHOWN;
use super::reason;
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount, mount_bind, mount_remount};
use std::collections::BTreeSet;
use std::ffi::CStr;
use std::fs::{self, DirBuilder, File};
use std::io::{self, Read};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

/// What is covered. Where `/var/run` is a link to `/run`, as nearly everywhere, both names are one.
///
/// Not covered: `/run/dbus/system_bus_socket`, for services need the bus for other things and
/// nothing asks it for names by itself (nss-resolve before systemd 246 did, but a service's
/// nsswitch.conf does not have it); `/run/systemd/userdb`, for it has users and no names;
/// `/var/lib/sss/mc`, for the maps there are of users and groups, and go on to work.
const HIDDEN: [&str; 13] = [
    // The sockets of nscd, unscd and nsncd, and nscd's own files: what the host has asked for.
    "/run/nscd",
    "/var/run/nscd",
    "/var/cache/nscd",
    "/var/db/nscd",
    // systemd-resolved (nss-resolve) and systemd-machined (nss-mymachines), over varlink.
    "/run/systemd/resolve",
    "/run/systemd/machine",
    // avahi (nss-mdns).
    "/run/avahi-daemon",
    "/var/run/avahi-daemon",
    // sssd, nslcd (nss-ldapd) and winbind (nss_wins) have users and host names behind the same
    // socket.
    "/var/lib/sss/pipes",
    "/run/nslcd",
    "/var/run/nslcd",
    "/run/samba/winbindd",
    "/var/run/samba/winbindd",
];

const EMPTY: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV).union(MountFlags::NOEXEC);
/// For one file and the directories that lead to it.
const OPTIONS: &CStr = c"mode=0755,size=64k,nr_inodes=16";

/// The covers of one service.
pub(super) struct NameServices {
    /// The directory of the service's own files.
    files: PathBuf,
    /// Those of them that the host has in a covered directory behind a link, as systemd-resolved's
    /// `resolv.conf` is: the service's own must be there.
    shown: Vec<(&'static str, PathBuf)>,
    /// The device numbers of our mounts.
    devices: BTreeSet<u64>,
    events: Option<File>,
}

impl NameServices {
    /// Covers what there is. What could not be covered is told in `notes`.
    pub(super) fn hide(files: &Path, notes: &mut Vec<String>) -> Self {
        let shown =
            SHOWN.iter().filter_map(|(name, shown)| Some((*name, fs::canonicalize(shown).ok()?)));
        let events = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC);
        let mut this = Self {
            files: files.to_owned(),
            shown: shown.collect(),
            devices: BTreeSet::new(),
            events: None,
        };
        match events {
            Ok(events) => this.events = Some(File::from(events)),
            Err(error) => notes.push(format!(
                "sees name services of this host that are started later: {}",
                reason("watch for them", error)
            )),
        }
        notes.extend(this.cover(false));
        this
    }

    /// Can be read when something may have to be covered.
    pub(super) fn events(&self) -> Option<&File> {
        self.events.as_ref()
    }

    /// Covers what has appeared. What could not be covered is returned.
    pub(super) fn refresh(&mut self) -> Vec<String> {
        let mut buffer = [0; 4096];
        // What has happened does not matter; that something has does.
        while self
            .events
            .as_ref()
            .is_some_and(|mut events| matches!(events.read(&mut buffer), Ok(1..)))
        {}
        self.cover(true)
    }

    /// Covers every directory that is there and not covered. With `again` set, the service's own
    /// files in there are shown as well.
    fn cover(&mut self, again: bool) -> Vec<String> {
        self.watch();
        let mut notes = Vec::new();
        for path in HIDDEN {
            let Ok(found) = fs::metadata(path) else { continue };
            if !found.is_dir() || self.devices.contains(&found.dev()) {
                continue;
            }
            match self.cover_one(path, again) {
                Ok(device) => drop(self.devices.insert(device)),
                // It has gone again.
                Err(Errno::NOENT) => {}
                Err(error) => notes.push(format!(
                    "sees a name service of this host: {}",
                    reason(&format!("cover {path}"), error)
                )),
            }
        }
        notes
    }

    fn cover_one(&self, path: &str, again: bool) -> Result<u64, Errno> {
        let real = fs::canonicalize(path).map_err(|error| errno(&error))?;
        mount("tmpfs", path, "tmpfs", EMPTY, OPTIONS)?;
        let inside = || self.shown.iter().filter(|(_, target)| target.starts_with(&real));
        for (_, target) in inside() {
            let made = target.parent().map_or(Ok(()), |parent| {
                DirBuilder::new().recursive(true).mode(0o755).create(parent)
            });
            made.and_then(|()| File::create(target)).map_err(|error| errno(&error))?;
        }
        mount_remount(path, MountFlags::BIND | MountFlags::RDONLY | EMPTY, c"")?;
        for (name, target) in inside().filter(|_| again) {
            mount_bind(self.files.join(name), target)?;
        }
        fs::metadata(path).map(|covered| covered.dev()).map_err(|error| errno(&error))
    }

    /// Watches all directories that lead to a hidden one, those that have appeared as well.
    fn watch(&self) {
        let Some(events) = &self.events else { return };
        let flags = WatchFlags::CREATE | WatchFlags::MOVED_TO | WatchFlags::ONLYDIR;
        let above: BTreeSet<&Path> =
            HIDDEN.iter().flat_map(|path| Path::new(path).ancestors().skip(1)).collect();
        for directory in above.into_iter().filter(|directory| directory.parent().is_some()) {
            // What is not there is seen when it appears in the directory above.
            let _ = inotify::add_watch(events, directory, flags);
        }
    }
}

fn errno(error: &io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}
