//! Hides the name services of the host from a service.
//!
//! glibc queries the socket of nscd before any other source, and the modules of nsswitch.conf query
//! sockets of systemd-resolved, sssd, avahi and others. These sockets have file system paths, so a
//! network namespace does not isolate them. (Abstract sockets do belong to the network namespace.)
//! The daemons resolve names for the host: they cannot resolve the names of other services, and the
//! queries of the service leak to them.
//!
//! An empty read-only tmpfs hides each directory with such sockets. A daemon can create its
//! directory later, or remove and recreate it on a restart, which removes the mount
//! (`detach_mounts`, fs/namespace.c). The parent directories are therefore watched while the
//! service runs, and new directories are hidden.
//!
//! The same holds for the files of the service that are mounted over those below `/etc`: a program
//! of the host that replaces `/etc/resolv.conf` by rename(2) removes the mount. It is mounted
//! again.
//!
//! This is no security boundary: a service has access to the host's files, and root can unmount. In
//! its own user namespace root cannot unmount, but it can open a new socket before it is hidden.

use super::super::files::{FILES, mounted};
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

/// Hidden directories. `/var/run` usually is a symbolic link to `/run`, so both names are the same.
///
/// Not hidden:
/// - `/run/dbus/system_bus_socket`: services need the bus for other purposes. Only nss-resolve
///   before systemd 246 queries it for names, and a service's nsswitch.conf does not contain it.
/// - `/run/systemd/userdb`: users, no host names.
/// - `/var/lib/sss/mc`: users and groups, no host names.
const HIDDEN: [&str; 13] = [
    // The sockets of nscd, unscd and nsncd, and the caches of nscd.
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
    // sssd, nslcd (nss-ldapd) and winbind (nss_wins) serve users and host names at the same socket.
    "/var/lib/sss/pipes",
    "/run/nslcd",
    "/var/run/nslcd",
    "/run/samba/winbindd",
    "/var/run/samba/winbindd",
];

const FLAGS: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV).union(MountFlags::NOEXEC);

/// Options of the tmpfs. It holds one file and its parent directories.
const OPTIONS: &CStr = c"mode=0755,size=64k,nr_inodes=16";

/// The hidden directories of one service.
pub(super) struct NameServices {
    /// Directory of the service's files.
    files: PathBuf,
    /// Files of the service with the targets of the host's symbolic links. A target in a hidden
    /// directory, such as the `resolv.conf` of systemd-resolved, has to exist there as well.
    targets: Vec<(&'static str, PathBuf)>,
    /// Device numbers of the tmpfs mounts.
    devices: BTreeSet<u64>,
    events: Option<File>,
}

impl NameServices {
    /// Hides all existing directories. Adds a note to `notes` for each one that cannot be hidden.
    pub(super) fn hide(files: &Path, notes: &mut Vec<String>) -> Self {
        let targets =
            FILES.iter().filter_map(|(name, target)| Some((*name, fs::canonicalize(target).ok()?)));
        let events = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC);
        let mut this = Self {
            files: files.to_owned(),
            targets: targets.collect(),
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
        notes.extend(this.hide_new(false));
        this
    }

    /// Returns the inotify descriptor. Readable when [`Self::refresh`] has to be called.
    pub(super) fn events(&self) -> Option<&File> {
        self.events.as_ref()
    }

    /// Hides new directories. Returns a note for each one that cannot be hidden.
    pub(super) fn refresh(&mut self) -> Vec<String> {
        let mut buffer = [0; 4096];
        // The contents of the events are irrelevant, since all directories are checked.
        while self
            .events
            .as_ref()
            .is_some_and(|mut events| matches!(events.read(&mut buffer), Ok(1..)))
        {}
        let mut notes = self.hide_new(true);
        notes.extend(self.bind_replaced());
        notes
    }

    /// Mounts the files of the service over those that the host has replaced or created. Returns a
    /// note for each one that cannot be mounted.
    fn bind_replaced(&self) -> Vec<String> {
        let id = |path: &Path| fs::metadata(path).map(|file| (file.dev(), file.ino()));
        let mut notes = Vec::new();
        for (name, target) in mounted() {
            let own = self.files.join(name);
            // Without an nsswitch.conf of its own, or a file to mount over.
            let (Ok(ours), Ok(there)) = (id(&own), id(Path::new(target))) else { continue };
            if ours == there {
                continue;
            }
            match mount_bind(&own, target) {
                // It was replaced concurrently, which is the next event.
                Ok(()) | Err(Errno::NOENT) => {}
                Err(error) => notes.push(format!(
                    "has the {target} of this host, which has replaced it: {}",
                    reason(&format!("mount over {target}"), error)
                )),
            }
        }
        notes
    }

    /// Hides every existing directory that is not hidden. With `bind_files`, also mounts the
    /// service's files in them. The first time, [`mounts`](super::mounts) does that.
    fn hide_new(&mut self, bind_files: bool) -> Vec<String> {
        self.watch();
        let mut notes = Vec::new();
        for path in HIDDEN {
            let Ok(found) = fs::metadata(path) else { continue };
            if !found.is_dir() || self.devices.contains(&found.dev()) {
                continue;
            }
            match self.hide_one(path, bind_files) {
                Ok(device) => drop(self.devices.insert(device)),
                // The directory was removed concurrently.
                Err(Errno::NOENT) => {}
                Err(error) => notes.push(format!(
                    "sees a name service of this host: {}",
                    reason(&format!("mount over {path}"), error)
                )),
            }
        }
        notes
    }

    fn hide_one(&self, path: &str, bind_files: bool) -> Result<u64, Errno> {
        let real = fs::canonicalize(path).map_err(|error| errno(&error))?;
        mount("tmpfs", path, "tmpfs", FLAGS, OPTIONS)?;
        let inside = || self.targets.iter().filter(|(_, target)| target.starts_with(&real));
        for (_, target) in inside() {
            let created = target.parent().map_or(Ok(()), |parent| {
                DirBuilder::new().recursive(true).mode(0o755).create(parent)
            });
            created.and_then(|()| File::create(target)).map_err(|error| errno(&error))?;
        }
        mount_remount(path, MountFlags::BIND | MountFlags::RDONLY | FLAGS, c"")?;
        for (name, target) in inside().filter(|_| bind_files) {
            mount_bind(self.files.join(name), target)?;
        }
        fs::metadata(path).map(|mounted| mounted.dev()).map_err(|error| errno(&error))
    }

    /// Watches all existing ancestors of hidden directories, and the directories of files that are
    /// mounted over.
    fn watch(&self) {
        let Some(events) = &self.events else { return };
        let flags = WatchFlags::CREATE | WatchFlags::MOVED_TO | WatchFlags::ONLYDIR;
        let ancestors: BTreeSet<&Path> =
            HIDDEN.iter().flat_map(|path| Path::new(path).ancestors().skip(1)).collect();
        for directory in ancestors.into_iter().filter(|directory| directory.parent().is_some()) {
            // Fails for a missing directory. Its creation is reported by the watch of its parent.
            let _ = inotify::add_watch(events, directory, flags);
        }
        for (_, target) in mounted() {
            let real = fs::canonicalize(target).ok();
            let directories = [Path::new(target).parent(), real.as_deref().and_then(Path::parent)];
            for directory in directories.into_iter().flatten() {
                let _ = inotify::add_watch(events, directory, flags);
            }
        }
    }
}

fn errno(error: &io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}
