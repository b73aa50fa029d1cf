//! Tests on real files, and on a simulated disk that fails or loses power at any operation.

use super::*;
use crate::testing::{Environment, command, name, port, states};
use crate::{AttachSpec, Command, NetworkAttachment, NetworkSpec};
use proptest::prelude::*;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::process;
use std::sync::Mutex;

/// The effects of operations after the failure.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Failing {
    /// They fail as well.
    Always,
    /// They succeed.
    Once,
}

/// A disk with a cache that is written back by a sync only.
#[derive(Debug, Default)]
struct Disk {
    /// Content as read by the process.
    cached: Vec<u8>,
    /// Content after the last successful sync.
    synced: Vec<u8>,
    /// Writes since then.
    pending: Vec<(usize, Vec<u8>)>,
    /// Number of operations so far: writes, changes of the length, and syncs.
    operations: u64,
    /// The operation that fails.
    fails_at: Option<(u64, Failing)>,
    /// A failed sync drops the pending writes from the disk, but not from the cache, as Linux does.
    drops: bool,
}

#[derive(Clone, Debug)]
struct SimulatedDisk(Arc<Mutex<Disk>>);

impl SimulatedDisk {
    fn with(content: Vec<u8>) -> Self {
        let disk = Disk { cached: content.clone(), synced: content, ..Disk::default() };
        Self(Arc::new(Mutex::new(disk)))
    }

    fn disk(&self) -> std::sync::MutexGuard<'_, Disk> {
        self.0.lock().unwrap()
    }

    fn storage(&self) -> Storage {
        Storage(Arc::new(self.clone()))
    }

    fn load(&self) -> Result<(Store, State), StoreError> {
        Store::load(Path::new("disk"), self.storage())
    }

    /// Creates a disk with an empty store.
    fn new() -> Self {
        let disk = Self::with(Vec::new());
        initialize(&disk.storage()).unwrap();
        disk
    }
}

impl Disk {
    /// Counts an operation, and returns whether it fails.
    fn operate(&mut self) -> bool {
        self.operations += 1;
        self.fails_at.is_some_and(|(at, failing)| match failing {
            Failing::Always => self.operations >= at,
            Failing::Once => self.operations == at,
        })
    }

    fn write(&mut self, offset: usize, data: &[u8]) {
        put(&mut self.cached, offset, data);
        self.pending.push((offset, data.to_vec()));
    }
}

fn put(content: &mut Vec<u8>, offset: usize, data: &[u8]) {
    let end = offset + data.len();
    if content.len() < end {
        content.resize(end, 0);
    }
    content[offset..end].copy_from_slice(data);
}

fn full() -> io::Error {
    io::Error::from_raw_os_error(Errno::NOSPC.raw_os_error())
}

impl StorageBackend for SimulatedDisk {
    fn len(&self) -> io::Result<u64> {
        Ok(self.disk().cached.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let disk = self.disk();
        let from = disk.cached.get(offset as usize..offset as usize + out.len());
        out.copy_from_slice(from.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut disk = self.disk();
        if disk.operate() {
            return Err(full());
        }
        // A change of the length is durable at once, as if a journal of the file system had it.
        disk.cached.resize(len as usize, 0);
        disk.synced.resize(len as usize, 0);
        disk.pending.retain(|(offset, data)| offset + data.len() <= len as usize);
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut disk = self.disk();
        if disk.operate() {
            if disk.drops {
                disk.pending.clear();
            }
            return Err(io::Error::from_raw_os_error(Errno::IO.raw_os_error()));
        }
        let Disk { synced, pending, .. } = &mut *disk;
        for (offset, data) in pending.drain(..) {
            put(synced, offset, &data);
        }
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut disk = self.disk();
        if disk.operate() {
            disk.write(offset as usize, &data[..data.len() / 2]);
            return Err(full());
        }
        disk.write(offset as usize, data);
        Ok(())
    }
}

/// A simple source of random numbers (xorshift64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

/// Contents that the disk may have after a power loss: without and with all pending writes, and
/// with random sectors of them.
fn after_power_loss(disk: &Disk, random: &mut Random) -> Vec<Vec<u8>> {
    let mut contents = vec![disk.synced.clone(), disk.synced.clone()];
    for (offset, data) in &disk.pending {
        put(&mut contents[1], *offset, data);
    }
    for _ in 0..2 {
        let mut content = disk.synced.clone();
        for (offset, data) in &disk.pending {
            for (number, sector) in data.chunks(512).enumerate() {
                if random.next().is_multiple_of(2) {
                    put(&mut content, offset + number * 512, sector);
                }
            }
        }
        contents.push(content);
    }
    contents
}

/// States of a network and a growing number of endpoints, some of which are detached again.
fn history() -> Vec<State> {
    let mut environment = Environment::without_collisions();
    let mut states = vec![State::default()];
    let mut commands = vec![Command::CreateNetwork(NetworkSpec::new(name("a")))];
    for number in 0..12 {
        commands.push(Command::Attach(AttachSpec {
            name: name(&format!("p/{number}")),
            namespace: format!("/run/netns/{number}").into(),
            networks: vec![NetworkAttachment::new(name("a"))],
            hostname: None,
            dns: vec![],
            task: None,
            ports: (0..20 * number)
                .map(|port_number| port("::", 1_000 * number + port_number + 1, 80))
                .collect(),
        }));
        if number % 3 == 2 {
            commands.push(Command::Detach(name(&format!("p/{}", number - 1))));
        }
    }
    for command in commands {
        states.push(environment.apply(&states[states.len() - 1], &command).unwrap());
    }
    states
}

/// Commits the history. Returns the number of the last successful commit, and whether all were.
fn commit_all(store: &mut Store, states: &[State]) -> (usize, bool) {
    for number in 1..states.len() {
        if store.commit(&states[number - 1], &states[number]).is_err() {
            return (number - 1, false);
        }
    }
    (states.len() - 1, true)
}

fn stored(content: Vec<u8>) -> State {
    SimulatedDisk::with(content).load().unwrap().1
}

#[test]
fn after_a_power_loss_the_store_has_the_old_or_the_new_state() {
    let states = history();
    let start = SimulatedDisk::new().disk().synced.clone();
    let mut random = Random(0x1234_5678_9abc_def0);
    let mut operation = 1;
    loop {
        let disk = SimulatedDisk::with(start.clone());
        let (mut store, state) = disk.load().unwrap();
        assert_eq!(state, states[0]);
        let before = disk.disk().operations;
        disk.disk().fails_at = Some((before + operation, Failing::Always));
        let (last, complete) = commit_all(&mut store, &states);
        // The power is lost while the store is open.
        for content in after_power_loss(&disk.disk(), &mut random) {
            let state = stored(content);
            let new = states.get(last + 1);
            assert!(state == states[last] || Some(&state) == new, "operation {operation}");
        }
        if complete {
            break;
        }
        operation += 1;
    }
    assert!(operation > 50, "{operation} operations");
}

#[test]
fn after_a_failed_commit_the_store_has_the_old_state_and_a_retry_succeeds() {
    let states = history();
    let start = SimulatedDisk::new().disk().synced.clone();
    for drops in [false, true] {
        let mut operation = 1;
        loop {
            let disk = SimulatedDisk::with(start.clone());
            let (mut store, _) = disk.load().unwrap();
            let before = disk.disk().operations;
            disk.disk().drops = drops;
            disk.disk().fails_at = Some((before + operation, Failing::Once));
            let (last, complete) = commit_all(&mut store, &states);
            if complete {
                break;
            }
            let cached = disk.disk().cached.clone();
            let synced = disk.disk().synced.clone();
            assert_eq!(stored(cached), states[last], "operation {operation}");
            assert_eq!(stored(synced), states[last], "operation {operation}, drops {drops}");
            for number in last + 1..states.len() {
                store.commit(&states[number - 1], &states[number]).unwrap();
            }
            let synced = disk.disk().synced.clone();
            assert_eq!(stored(synced), states[states.len() - 1], "operation {operation}");
            operation += 1;
        }
    }
}

#[test]
fn a_store_without_space_accepts_commits_again_after_space_was_freed() {
    let states = history();
    let disk = SimulatedDisk::new();
    let (mut store, _) = disk.load().unwrap();
    store.commit(&states[0], &states[1]).unwrap();
    disk.disk().fails_at = Some((0, Failing::Always));
    for _ in 0..3 {
        let error = store.commit(&states[1], &states[2]).unwrap_err();
        assert!(matches!(error, StoreError::Io { .. }), "{error}");
    }
    disk.disk().fails_at = None;
    store.commit(&states[1], &states[3]).unwrap();
    drop(store);
    assert_eq!(disk.load().unwrap().1, states[3]);
}

/// A corrupt page is found by its checksum, also in a database that was closed cleanly.
#[test]
fn corrupt_content_is_an_error_and_never_a_panic_or_another_state() {
    let states = history();
    let disk = SimulatedDisk::new();
    let (mut store, _) = disk.load().unwrap();
    commit_all(&mut store, &states);
    drop(store);
    let content = disk.disk().synced.clone();
    let used: Vec<usize> = (0..content.len() / 512)
        .filter(|sector| content[sector * 512..][..512] != [0; 512])
        .collect();
    let mut random = Random(0x0fed_cba9_8765_4321);
    let mut errors = 0;
    for round in 0..400 {
        let mut damaged = content.clone();
        let sector = used[random.next() as usize % used.len()];
        let offset = sector * 512 + random.next() as usize % 512;
        if round % 4 == 3 {
            damaged.truncate(offset);
        } else {
            let length = 1 + random.next() as usize % 64;
            for byte in damaged.iter_mut().skip(offset).take(length) {
                *byte ^= random.next() as u8;
            }
        }
        let opened = std::panic::catch_unwind(|| SimulatedDisk::with(damaged).load());
        match opened.unwrap_or_else(|_| panic!("round {round}, offset {offset}")) {
            Ok((_, state)) => assert_eq!(state, states[states.len() - 1]),
            Err(StoreError::Corrupt { .. }) => errors += 1,
            Err(error) => panic!("{error}"),
        }
    }
    assert!(errors > 100);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(50))]

    #[test]
    fn random_states_are_stored_and_read_back(
        commands in prop::collection::vec(command(), 1..60),
        step in 1_usize..8,
    ) {
        let disk = SimulatedDisk::new();
        let states = states(&commands);
        let (mut store, mut last) = disk.load().unwrap();
        for next in states.iter().step_by(step) {
            store.commit(&last, next).unwrap();
            prop_assert_eq!(&disk.clone_of_synced().load().unwrap().1, next);
            last = next.clone();
        }
        drop(store);
        prop_assert_eq!(disk.load().unwrap().1, last);
    }
}

impl SimulatedDisk {
    fn clone_of_synced(&self) -> Self {
        Self::with(self.disk().synced.clone())
    }
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

#[test]
fn file_and_directories_are_private_and_the_state_persists() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a/b/state.redb");
    let states = history();
    let (mut store, state) = Store::open(&path).unwrap();
    assert_eq!(state, State::default());
    assert_eq!([mode(&path), mode(path.parent().unwrap())], [0o600, 0o700]);
    assert_eq!(mode(&directory.path().join("a")), 0o700);
    commit_all(&mut store, &states);
    drop(store);
    assert_eq!(Store::open(&path).unwrap().1, states[states.len() - 1]);
    let files: Vec<_> = fs::read_dir(path.parent().unwrap()).unwrap().collect();
    assert_eq!(files.len(), 1, "no other file remains");
}

#[test]
fn an_open_store_is_locked_also_after_a_failure() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("state.redb");
    let (mut store, _) = Store::open(&path).unwrap();
    let check = || {
        let error = Store::open(&path).unwrap_err();
        assert!(matches!(error, StoreError::InUse(_)), "{error}");
        let expected = format!(
            "state file {} is in use by another process; stop that process first",
            path.display()
        );
        assert_eq!(error.to_string(), expected);
    };
    check();
    store.database = None;
    check();
    drop(store);
    Store::open(&path).unwrap();
}

#[test]
fn a_store_of_a_newer_version_is_not_read() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("state.redb");
    let (store, _) = Store::open(&path).unwrap();
    let transaction = store.database.as_ref().unwrap().begin_write().unwrap();
    transaction.open_table(META).unwrap().insert(FORMAT_KEY, 7).unwrap();
    transaction.commit().unwrap();
    drop(store);
    let error = Store::open(&path).unwrap_err();
    assert!(matches!(error, StoreError::Newer { found: 7, .. }));
    assert!(error.to_string().contains("has format 7, and this version supports format 4"));
}

#[test]
fn the_error_names_the_corrupt_record() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("state.redb");
    let missing = r#"{"namespace":"/x","hostname":null,"ports":[],"attachments":[{"network":"p/gone",
        "aliases":[],"host_end":{"name":"tgv1","mac":"02:00:00:00:00:01"},"inside":{"name":"eth0",
        "mac":"02:00:00:00:00:02"},"addresses":[],"default_route":true,"any_source":false}]}"#;
    for (table, key, record, expected) in [
        (NETWORKS, "p/web", "{}", "networks/p/web: missing field"),
        (NETWORKS, "p web", "{}", "networks/p web: invalid name"),
        (ENDPOINTS, "p/db", "nonsense", "endpoints/p/db: expected"),
        (ENDPOINTS, "p/db", missing, "endpoints/p/db: network p/gone does not exist"),
    ] {
        let (store, _) = Store::open(&path).unwrap();
        let transaction = store.database.as_ref().unwrap().begin_write().unwrap();
        transaction.open_table(table).unwrap().insert(key, record.as_bytes()).unwrap();
        transaction.commit().unwrap();
        drop(store);
        let error = Store::open(&path).unwrap_err();
        assert!(matches!(error, StoreError::Corrupt { .. }));
        let text = error.to_string();
        assert!(text.contains(expected) && text.contains("; move the file away"), "{text}");
        assert!(!text.contains('\n'));
        fs::remove_file(&path).unwrap();
    }
}

#[test]
fn other_files_and_paths_are_errors_and_not_changed() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("file");
    for content in ["", "a", &"something else\n".repeat(1_000)] {
        File::create(&file).unwrap().write_all(content.as_bytes()).unwrap();
        let error = Store::open(&file).unwrap_err();
        assert!(matches!(error, StoreError::Corrupt { .. }), "{error}");
        assert_eq!(fs::read_to_string(&file).unwrap(), content);
    }
    let error = Store::open(directory.path()).unwrap_err();
    assert!(error.to_string().ends_with("is not a regular file; use another path"), "{error}");
    let link = directory.path().join("link");
    std::os::unix::fs::symlink(directory.path().join("missing"), &link).unwrap();
    assert!(matches!(Store::open(&link).unwrap_err(), StoreError::NotAFile(_)));
    let error = Store::open(&file.join("state.redb")).unwrap_err();
    assert!(error.to_string().ends_with("; use a path below a directory"), "{error}");
}

#[test]
fn a_moved_file_is_an_error_until_it_is_back() {
    let directory = tempfile::tempdir().unwrap();
    let [path, other] = ["state.redb", "other"].map(|name| directory.path().join(name));
    let states = history();
    let (mut store, _) = Store::open(&path).unwrap();
    fs::rename(&path, &other).unwrap();
    let error = store.commit(&states[0], &states[1]).unwrap_err();
    assert!(error.to_string().contains("was moved or deleted while in use; move it back"));
    fs::rename(&other, &path).unwrap();
    store.commit(&states[0], &states[1]).unwrap();
    drop(store);
    assert_eq!(Store::open(&path).unwrap().1, states[1]);
}

/// A crash during the creation leaves a file under the other name only.
#[test]
fn a_store_is_created_despite_the_remains_of_an_earlier_attempt() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("state.redb");
    fs::write(directory.path().join("state.redb.new"), "incomplete").unwrap();
    let (store, _) = Store::open(&path).unwrap();
    drop(store);
    assert_eq!(Store::open(&path).unwrap().1, State::default());
}

/// The child process of [`a_full_disk_is_reported_and_the_old_state_remains`], whose files have a
/// limited size. Without the variable, it does nothing.
#[test]
fn child_on_a_full_disk() {
    let Some(path) = std::env::var_os("TIDEGATE_TEST_STORE") else { return };
    let path = Path::new(&path);
    let states = history();
    let (mut store, state) = Store::open(path).unwrap();
    assert_eq!(state, states[1]);
    let mut environment = Environment::without_collisions();
    let mut last = states[1].clone();
    for number in 0..10_000 {
        let next = environment
            .apply(
                &last,
                &Command::Attach(AttachSpec {
                    name: name(&format!("n{number}")),
                    namespace: format!("/run/netns/{number}").into(),
                    networks: vec![NetworkAttachment {
                        aliases: vec![["a"; 100].join("."); 60],
                        ..NetworkAttachment::new(name("a"))
                    }],
                    hostname: None,
                    dns: vec![],
                    ports: vec![],
                    task: None,
                }),
            )
            .or_else(|_| {
                environment.apply(
                    &last,
                    &Command::CreateNetwork(NetworkSpec::new(name(&format!("b{number}")))),
                )
            })
            .unwrap();
        if let Err(error) = store.commit(&last, &next) {
            let text = error.to_string();
            assert!(
                text.ends_with("; raise the limit on file sizes (ulimit -f) and retry"),
                "{text}"
            );
            // A smaller state still fits.
            store.commit(&last, &states[1]).unwrap();
            store.commit(&states[1], &states[2]).unwrap();
            drop(store);
            assert_eq!(Store::open(path).unwrap().1, states[2]);
            println!("failed after {number} commits");
            return;
        }
        last = next;
    }
    panic!("the limit is not effective");
}

#[test]
fn a_full_disk_is_reported_and_the_old_state_remains() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("state.redb");
    let states = history();
    let (mut store, _) = Store::open(&path).unwrap();
    store.commit(&states[0], &states[1]).unwrap();
    drop(store);
    // dash counts blocks of 512 bytes.
    let output = process::Command::new("sh")
        .args(["-c", "trap '' XFSZ; ulimit -f 8192; exec \"$0\" \"$@\""])
        .arg(std::env::current_exe().unwrap())
        .args(["store::tests::child_on_a_full_disk", "--exact", "--nocapture"])
        .env("TIDEGATE_TEST_STORE", &path)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success() && text.contains("failed after"), "{output:?}");
    assert_eq!(Store::open(&path).unwrap().1, states[2]);
}
