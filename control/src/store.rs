//! The store: the state on disk, in a redb database.
//!
//! # Theory of operation
//!
//! The tables `networks`, `endpoints`, `projects` and `mesh` have a record per object; `meta` has
//! the number of the format. A commit is one durable transaction with the records that differ. redb
//! writes it to unused pages, then switches the header, and syncs. After a crash it uses the last
//! header whose pages have correct checksums, so the file has either the old or the new state.
//!
//! A failed sync leaves open which of the two states the disk has. The page cache cannot tell:
//! Linux reports a failed write once, and then treats the pages as clean. After a failure, the
//! store therefore reopens the database and writes all records of the old state to new pages. If
//! this fails as well, the next commit repeats it with its new state.
//!
//! The file is locked with flock(2) for the lifetime of the store, also while the database is
//! closed after a failure. The kernel releases the lock when the process ends for any reason.

use crate::changes::difference;
use crate::record::{FORMAT, Record, RecordError, dangling, read_into};
use crate::{Endpoint, Membership, Name, Network, Project, State};
use redb::backends::FileBackend;
use redb::{
    Builder, CommitError, Database, DatabaseError, ReadableDatabase, ReadableTable, StorageBackend,
    StorageError, TableDefinition, TableError, TransactionError, WriteTransaction,
};
use rustix::fs::{FlockOperation, OFlags, flock};
use rustix::io::Errno;
use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File, Metadata, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tidegate_model::without_errno;

/// Size of redb's cache, in bytes. The state is in memory, so pages are read once.
const CACHE: usize = 1 << 20;

/// Number of attempts to open a file that is replaced concurrently.
const ATTEMPTS: u32 = 10;

const META: TableDefinition<'_, &str, u32> = TableDefinition::new("meta");
const NETWORKS: Records = TableDefinition::new("networks");
const ENDPOINTS: Records = TableDefinition::new("endpoints");
/// Since format 2.
const PROJECTS: Records = TableDefinition::new("projects");

/// Since format 3.
const MESH: Records = TableDefinition::new("mesh");

/// The key of [`META`] with the number of the format.
const FORMAT_KEY: &str = "format";

type Records = TableDefinition<'static, &'static str, &'static [u8]>;

/// The state on disk, locked by this process.
#[derive(Debug)]
pub struct Store {
    path: PathBuf,
    /// Device and inode number of the file.
    file: Option<(u64, u64)>,
    storage: Storage,
    /// `None` after a failure, until a transaction has written all records again.
    database: Option<Database>,
}

/// A failure of the store.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Another process has the file open.
    #[error("state file {} is in use by another process; stop that process first", .0.display())]
    InUse(PathBuf),
    /// The path is not a regular file.
    #[error("state file {} is not a regular file; use another path", .0.display())]
    NotAFile(PathBuf),
    /// A newer version of tidegate wrote the file.
    #[error(
        "state file {} has format {found}, and this version supports format {FORMAT}; use the newer \
         version of tidegate that wrote it", .path.display()
    )]
    Newer {
        /// The path.
        path: PathBuf,
        /// The format of the file.
        found: u32,
    },
    /// The file or a record of it is corrupt.
    #[error(
        "state file {} is corrupt: {what}: {cause}; move the file away and create the networks \
         again (running networks are not changed by this)", .path.display()
    )]
    Corrupt {
        /// The path.
        path: PathBuf,
        /// The record, as `networks/NAME`, or the part of the file.
        what: String,
        /// The cause.
        cause: String,
    },
    /// The file was moved, deleted or replaced while the store was open.
    #[error(
        "state file {} was moved or deleted while in use; move it back and retry, or restart \
         tidegate", .0.display()
    )]
    Moved(PathBuf),
    /// A system call failed.
    #[error(
        "state file {}: {}{}", .path.display(), without_errno(&.source.to_string()), remedy(.source)
    )]
    Io {
        /// The path.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
}

fn remedy(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "; free space on its file system and retry"
        }
        io::ErrorKind::FileTooLarge => "; raise the limit on file sizes (ulimit -f) and retry",
        io::ErrorKind::ReadOnlyFilesystem => "; use a path on a writable file system",
        io::ErrorKind::PermissionDenied => "; use a path that this user can write",
        io::ErrorKind::NotADirectory => "; use a path below a directory",
        _ => "; check the file system and retry",
    }
}

impl Store {
    /// Opens the store at `path`, and returns it with its state. Creates the file (mode 0600) and
    /// its directories (mode 0700) if they are missing.
    ///
    /// # Errors
    /// [`StoreError`]. The state is not changed.
    pub fn open(path: &Path) -> Result<(Self, State), StoreError> {
        let failed = |source| StoreError::Io { path: path.to_owned(), source };
        match fs::symlink_metadata(path) {
            Ok(found) if !found.is_file() => return Err(StoreError::NotAFile(path.to_owned())),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => create(path)?,
            Err(error) => return Err(failed(error)),
        }
        let file = open_locked(path, false)?;
        if file.metadata().map_err(failed)?.len() == 0 {
            // redb would create a database in it. The file is never empty, see `create`.
            return Err(Failure::Corrupt("content", "the file is empty".to_owned()).at(path));
        }
        let identity = identity(&file.metadata().map_err(failed)?);
        let storage = storage(file).map_err(|failure| failure.at(path))?;
        let (store, state) = Self::load(path, storage)?;
        Ok((Self { file: Some(identity), ..store }, state))
    }

    /// Makes `new` durable. `old` is the last committed state.
    ///
    /// # Errors
    /// [`StoreError`]. `old` remains the state of the store, and the next commit can succeed.
    /// Exception: if the device fails while the file is synced and also fails the attempt to
    /// restore `old`, the disk may have `new` until the next successful commit.
    pub fn commit(&mut self, old: &State, new: &State) -> Result<(), StoreError> {
        if let Some(file) = self.file
            && !fs::symlink_metadata(&self.path).is_ok_and(|there| identity(&there) == file)
        {
            return Err(StoreError::Moved(self.path.clone()));
        }
        let result = match &self.database {
            Some(database) => write_difference(database, old, new),
            None => self.rewrite(new),
        };
        result.map_err(|failure| {
            // redb refuses all operations after an I/O error.
            self.database = None;
            if let Err(second) = self.rewrite(old) {
                let error = second.at(&self.path);
                tracing::warn!(%error, "restore of the state file failed; next commit will retry");
            }
            failure.at(&self.path)
        })
    }

    fn load(path: &Path, storage: Storage) -> Result<(Self, State), StoreError> {
        let load = || {
            let database = open_database(&storage)?;
            let state = read(&database)?;
            Ok((database, state))
        };
        let (database, state) = load().map_err(|failure: Failure| failure.at(path))?;
        Ok((Self { path: path.to_owned(), file: None, storage, database: Some(database) }, state))
    }

    /// Reopens the database, and writes all records of `state`.
    fn rewrite(&mut self, state: &State) -> Result<(), Failure> {
        self.database = None;
        let database = open_database(&self.storage)?;
        write_all(&database, state)?;
        self.database = Some(database);
        Ok(())
    }
}

/// Creates a store without objects at `path`. Built under another name, so that a crash leaves no
/// incomplete file at `path`.
fn create(path: &Path) -> Result<(), StoreError> {
    let failed = |source| StoreError::Io { path: path.to_owned(), source };
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    let parent = parent.unwrap_or(Path::new("."));
    // Directories to sync: those that get a new entry.
    let mut changed: Vec<&Path> = Vec::new();
    for directory in parent.ancestors() {
        changed.push(directory);
        if directory.exists() {
            break;
        }
    }
    DirBuilder::new().recursive(true).mode(0o700).create(parent).map_err(failed)?;
    let mut new = path.as_os_str().to_owned();
    new.push(".new");
    let new = PathBuf::from(new);
    let file = match open_locked(&new, true) {
        Ok(file) => file,
        Err(StoreError::InUse(_)) => return Err(StoreError::InUse(path.to_owned())),
        Err(error) => return Err(error),
    };
    file.set_len(0).map_err(failed)?;
    let create = || {
        let storage = storage(file.try_clone()?)?;
        initialize(&storage)?;
        file.sync_all()?;
        fs::rename(&new, path)?;
        for directory in changed.iter().filter(|one| !one.as_os_str().is_empty()) {
            File::open(directory)?.sync_all()?;
        }
        Ok(())
    };
    create().map_err(|failure: Failure| {
        let _ = fs::remove_file(&new);
        failure.at(path)
    })
}

/// Opens and locks the file at `path`.
fn open_locked(path: &Path, create: bool) -> Result<File, StoreError> {
    let failed = |source| StoreError::Io { path: path.to_owned(), source };
    for _ in 0..ATTEMPTS {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(create)
            .mode(0o600)
            .custom_flags((OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed())
            .open(path)
            .map_err(failed)?;
        let opened = file.metadata().map_err(failed)?;
        if !opened.is_file() {
            return Err(StoreError::NotAFile(path.to_owned()));
        }
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => return Err(StoreError::InUse(path.to_owned())),
            Err(errno) => return Err(failed(errno.into())),
        }
        // The file may have been renamed before it was locked.
        if fs::metadata(path).is_ok_and(|there| identity(&there) == identity(&opened)) {
            return Ok(file);
        }
    }
    Err(StoreError::InUse(path.to_owned()))
}

/// Returns the device and inode number.
fn identity(file: &Metadata) -> (u64, u64) {
    (file.dev(), file.ino())
}

/// A storage that can be opened again after a failure, unlike redb's file backend, which closes the
/// file and its lock. Without locks of its own: the store locks the file.
#[derive(Clone, Debug)]
struct Storage(Arc<dyn StorageBackend>);

fn storage(file: File) -> Result<Storage, Failure> {
    Ok(Storage(Arc::new(FileBackend::new(file)?)))
}

impl StorageBackend for Storage {
    fn len(&self) -> io::Result<u64> {
        self.0.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.0.read(offset, out)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.0.sync_data()
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.0.write(offset, data)
    }
}

/// A failure of an operation, without the path.
#[derive(Debug)]
enum Failure {
    Io(io::Error),
    Newer(u32),
    Corrupt(&'static str, String),
    Record(&'static str, String, RecordError),
}

impl Failure {
    fn at(self, path: &Path) -> StoreError {
        let path = path.to_owned();
        match self {
            Self::Io(source) => StoreError::Io { path, source },
            Self::Newer(found) => StoreError::Newer { path, found },
            Self::Corrupt(what, cause) => StoreError::Corrupt { path, what: what.into(), cause },
            Self::Record(table, key, cause) => {
                let what = format!("{table}/{key}");
                StoreError::Corrupt { path, what, cause: cause.to_string() }
            }
        }
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<StorageError> for Failure {
    fn from(error: StorageError) -> Self {
        match error {
            // redb reports a wrong magic number as `InvalidData`, and a truncated file as
            // `UnexpectedEof`.
            StorageError::Io(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof
                ) =>
            {
                Self::Corrupt("content", without_errno(&error.to_string()))
            }
            StorageError::Io(error) => Self::Io(error),
            StorageError::Corrupted(cause) => Self::Corrupt("content", cause),
            error => Self::Io(io::Error::other(error.to_string())),
        }
    }
}

impl From<DatabaseError> for Failure {
    fn from(error: DatabaseError) -> Self {
        match error {
            DatabaseError::Storage(error) => error.into(),
            error => Self::Corrupt("content", error.to_string()),
        }
    }
}

impl From<TransactionError> for Failure {
    fn from(error: TransactionError) -> Self {
        match error {
            TransactionError::Storage(error) => error.into(),
            error => Self::Io(io::Error::other(error.to_string())),
        }
    }
}

impl From<TableError> for Failure {
    fn from(error: TableError) -> Self {
        match error {
            TableError::Storage(error) => error.into(),
            error => Self::Corrupt("content", error.to_string()),
        }
    }
}

impl From<CommitError> for Failure {
    fn from(error: CommitError) -> Self {
        match error {
            CommitError::Storage(error) => error.into(),
            error => Self::Io(io::Error::other(error.to_string())),
        }
    }
}

fn open_database(storage: &Storage) -> Result<Database, Failure> {
    // A database that was closed cleanly is not checked by default, and a corrupt one could panic.
    let mut builder = Builder::new();
    builder.set_cache_size(CACHE).set_check_integrity_on_open(true);
    Ok(builder.create_with_backend(storage.clone())?)
}

/// Creates a database without objects.
fn initialize(storage: &Storage) -> Result<(), Failure> {
    write_all(&open_database(storage)?, &State::default())
}

fn read(database: &Database) -> Result<State, Failure> {
    let transaction = database.begin_read()?;
    let format = match transaction.open_table(META) {
        Ok(table) => table.get(FORMAT_KEY)?.map(|format| format.value()),
        Err(TableError::TableDoesNotExist(_)) => None,
        Err(error) => return Err(error.into()),
    };
    match format {
        Some(1..=FORMAT) => {}
        Some(newer) if newer > FORMAT => return Err(Failure::Newer(newer)),
        Some(_) | None => {
            return Err(Failure::Corrupt("meta/format", "no valid number".to_owned()));
        }
    }
    let mut state = State::default();
    read_table(&transaction.open_table(NETWORKS)?, "networks", &mut state.networks)?;
    read_table(&transaction.open_table(ENDPOINTS)?, "endpoints", &mut state.endpoints)?;
    if format >= Some(2) {
        read_table(&transaction.open_table(PROJECTS)?, "projects", &mut state.projects)?;
    }
    if format >= Some(3) {
        read_table(&transaction.open_table(MESH)?, "mesh", &mut state.mesh)?;
    }
    match dangling(&state) {
        Some((name, error)) => Err(Failure::Record("endpoints", name.to_string(), error)),
        None => Ok(state),
    }
}

fn read_table<T: Record>(
    table: &impl ReadableTable<&'static str, &'static [u8]>,
    name: &'static str,
    values: &mut BTreeMap<Name, Arc<T>>,
) -> Result<(), Failure> {
    for entry in table.iter()? {
        let (key, record) = entry?;
        let key = key.value();
        read_into(values, key, record.value())
            .map_err(|error| Failure::Record(name, key.to_owned(), error))?;
    }
    Ok(())
}

/// Writes the records that differ. `old` is the state of the database.
fn write_difference(database: &Database, old: &State, new: &State) -> Result<(), Failure> {
    let networks = difference(&old.networks, &new.networks);
    let endpoints = difference(&old.endpoints, &new.endpoints);
    let projects = difference(&old.projects, &new.projects);
    let mesh = difference(&old.mesh, &new.mesh);
    let lengths = [
        [networks.0.len(), networks.1.len()],
        [endpoints.0.len(), endpoints.1.len()],
        [projects.0.len(), projects.1.len()],
        [mesh.0.len(), mesh.1.len()],
    ];
    if lengths == [[0; 2]; 4] {
        return Ok(());
    }
    let transaction = database.begin_write()?;
    write_format(&transaction)?;
    write_table(&transaction, PROJECTS, "projects", &projects.0, &projects.1)?;
    write_table(&transaction, MESH, "mesh", &mesh.0, &mesh.1)?;
    write_table(&transaction, NETWORKS, "networks", &networks.0, &networks.1)?;
    write_table(&transaction, ENDPOINTS, "endpoints", &endpoints.0, &endpoints.1)?;
    Ok(transaction.commit()?)
}

/// Writes the number of the format if it differs. A page that is not changed needs no space.
fn write_format(transaction: &WriteTransaction) -> Result<(), Failure> {
    let mut meta = transaction.open_table(META)?;
    let found = meta.get(FORMAT_KEY)?.map(|format| format.value());
    if found != Some(FORMAT) {
        meta.insert(FORMAT_KEY, FORMAT)?;
    }
    Ok(())
}

/// Replaces all records with those of `state`.
fn write_all(database: &Database, state: &State) -> Result<(), Failure> {
    let transaction = database.begin_write()?;
    transaction.delete_table(META)?;
    transaction.delete_table(NETWORKS)?;
    transaction.delete_table(ENDPOINTS)?;
    transaction.delete_table(PROJECTS)?;
    transaction.delete_table(MESH)?;
    transaction.open_table(META)?.insert(FORMAT_KEY, FORMAT)?;
    let networks: Vec<&Arc<Network>> = state.networks.values().collect();
    let endpoints: Vec<&Arc<Endpoint>> = state.endpoints.values().collect();
    write_table(&transaction, NETWORKS, "networks", &[], &networks)?;
    write_table(&transaction, ENDPOINTS, "endpoints", &[], &endpoints)?;
    let projects: Vec<&Arc<Project>> = state.projects.values().collect();
    write_table(&transaction, PROJECTS, "projects", &[], &projects)?;
    let mesh: Vec<&Arc<Membership>> = state.mesh.values().collect();
    write_table(&transaction, MESH, "mesh", &[], &mesh)?;
    Ok(transaction.commit()?)
}

fn write_table<T: Record>(
    transaction: &WriteTransaction,
    table: Records,
    name: &'static str,
    removed: &[&Arc<T>],
    added: &[&Arc<T>],
) -> Result<(), Failure> {
    let mut table = transaction.open_table(table)?;
    for value in removed {
        table.remove(value.name().to_string().as_str())?;
    }
    for value in added {
        let key = value.name().to_string();
        let record = value.write().map_err(|error| Failure::Record(name, key.clone(), error))?;
        table.insert(key.as_str(), record.as_slice())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
