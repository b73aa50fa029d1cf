//! Services in real namespaces: mounts and environment, output, start, stop and restart, and
//! cleanup after any end of the supervisor.

#[path = "services/init.rs"]
mod init;
#[path = "services/killed.rs"]
mod killed;
#[path = "services/name_services.rs"]
mod name_services;
#[path = "services/restarting.rs"]
mod restarting;
#[path = "services/rootless.rs"]
mod rootless;
#[path = "services/sees.rs"]
mod sees;
#[path = "services/starting.rs"]
mod starting;
#[path = "services/stopping.rs"]
mod stopping;

use std::fs;
use std::future::Future;
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use tidegate_model::Restart;
use tidegate_services::{
    Exit, Output, ServiceError, ServiceSpec, StandardOutput, State, Status, Supervisor, sweep,
};
use tidegate_testbed::{Namespace, Process, Signal, eventually, procfs, require_root};

/// Timeout of operations that usually complete immediately.
const TIMEOUT: Duration = Duration::from_secs(30);

/// A grace period that no test reaches.
const FOREVER: Duration = Duration::from_secs(600);

/// Variable with the run directory of [`killed::supervisor_in_a_separate_process`]. Without it,
/// that test does nothing.
const RUN_DIR: &str = "TIDEGATE_TEST_RUN_DIR";

/// The same for [`rootless::supervisor_in_a_user_namespace`].
const ROOTLESS_RUN_DIR: &str = "TIDEGATE_TEST_ROOTLESS_RUN_DIR";

/// The lines written so far.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<String>>>);

impl Output for Lines {
    fn write_line(&mut self, line: &str) -> io::Result<()> {
        self.0.lock().unwrap().push(line.to_owned());
        Ok(())
    }
}

impl Lines {
    fn all(&self) -> Vec<String> {
        self.0.lock().unwrap().clone()
    }

    fn has(&self, line: &str) -> bool {
        self.all().iter().any(|one| one == line)
    }

    async fn wait_for(&self, line: &str) {
        wait_until(|| self.has(line), || format!("no line {line:?} among {:#?}", self.all())).await;
    }
}

async fn wait_until(mut ready: impl FnMut() -> bool, what: impl Fn() -> String) {
    let deadline = Instant::now() + TIMEOUT;
    while !ready() {
        assert!(Instant::now() < deadline, "{}", what());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// A supervisor with its output and its run directory, which is removed on drop.
struct Bed {
    supervisor: Supervisor,
    lines: Lines,
    run_dir: TempDir,
    namespace: Namespace,
}

impl Bed {
    fn new(grace: Duration) -> Self {
        require_root();
        let (lines, run_dir) = (Lines::default(), tempfile::tempdir().unwrap());
        let supervisor = supervisor(run_dir.path(), lines.clone(), grace);
        Self { supervisor, lines, run_dir, namespace: Namespace::new() }
    }

    /// A service that runs `script` in a shell.
    fn shell(&self, name: &str, script: &str) -> ServiceSpec {
        shell(&self.namespace, name, script)
    }

    fn status(&self, name: &str) -> Status {
        self.supervisor.statuses().into_iter().find(|status| status.name == name).unwrap()
    }

    /// Asserts that the run directory contains no files of services.
    #[track_caller]
    fn assert_clean(&self) {
        assert_eq!(services_in(self.run_dir.path()), Vec::<String>::new());
    }
}

fn supervisor(run_dir: &Path, output: impl Output, grace: Duration) -> Supervisor {
    Supervisor::new(run_dir, output, grace).with_init(env!("CARGO_BIN_EXE_tidegate"))
}

fn shell(namespace: &Namespace, name: &str, script: &str) -> ServiceSpec {
    shell_in(tidegate_netns::Namespace::from_path(&namespace.path()).unwrap(), name, script)
}

fn shell_in(namespace: tidegate_netns::Namespace, name: &str, script: &str) -> ServiceSpec {
    ServiceSpec {
        name: name.to_owned(),
        command: ["sh", "-c", script].map(str::to_owned).to_vec(),
        environment: [].into(),
        hostname: format!("{name}-host"),
        working_dir: PathBuf::from("/"),
        namespace,
        hosts: format!("127.0.0.1 localhost\n10.9.8.7 {name}-friend\n"),
        resolv_conf: "nameserver 127.0.0.11\n".to_owned(),
        restart: Restart::No,
        depends_on: vec![],
    }
}

/// The network namespace for a service, as `tidegate up` creates it: for root the current one, for
/// an ordinary user one in a new user namespace.
fn namespace_for_service() -> tidegate_netns::Namespace {
    let here = tidegate_netns::Namespace::current().unwrap();
    if here.belongs_to_own_user_namespace() {
        return here;
    }
    tidegate_netns::Namespace::create_in_user_namespace().unwrap()
}

fn after(mut spec: ServiceSpec, dependencies: &[&str]) -> ServiceSpec {
    spec.depends_on = dependencies.iter().map(|name| (*name).to_owned()).collect();
    spec
}

fn restarting(mut spec: ServiceSpec, policy: Restart) -> ServiceSpec {
    spec.restart = policy;
    spec
}

fn services_in(run_dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(run_dir.join("services")).into_iter().flatten();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

fn run<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        tokio::time::timeout(2 * TIMEOUT, future).await.expect("the test hangs")
    })
}

/// The processes that have `marker` among their arguments. Zombies have no arguments.
fn marked(marker: &str) -> Vec<u32> {
    let pids = fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    let has_marker = |pid: &u32| {
        fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|arguments| {
            arguments.split(|&byte| byte == 0).any(|argument| argument == marker.as_bytes())
        })
    };
    pids.filter(has_marker).collect()
}

/// A sleep duration in seconds that no other process uses.
fn marker(number: u32) -> String {
    format!("{}.{number}", 100_000 + std::process::id())
}
