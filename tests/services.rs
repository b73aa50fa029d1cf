//! Services in real namespaces: what they see, what they say, how they start, end and begin again, and that nothing of
//! them is left, whatever happens to their supervisor.

use std::fs;
use std::future::Future;
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use tidegate::compose::Restart;
use tidegate::services::{
    Exit, Output, ServiceError, ServiceSpec, StandardOutput, State, Status, Supervisor, sweep,
};
use tidegate_testbed::{Namespace, Process, Signal, eventually, procfs, require_root};

/// How long anything may take that ought to take no time.
const PATIENCE: Duration = Duration::from_secs(30);

/// Long enough never to come.
const FOREVER: Duration = Duration::from_secs(600);

/// Where the supervisor of [`supervisor_in_a_process_of_its_own`] keeps its files; unset, it is not one.
const RUN_DIR: &str = "TIDEGATE_TEST_RUN_DIR";

/// The same for [`supervisor_in_a_user_namespace`].
const ROOTLESS_RUN_DIR: &str = "TIDEGATE_TEST_ROOTLESS_RUN_DIR";

/// The lines told so far.
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
        self.all().iter().any(|told| told == line)
    }

    async fn wait_for(&self, line: &str) {
        wait_until(|| self.has(line), || format!("no line {line:?} among {:#?}", self.all())).await;
    }
}

async fn wait_until(mut ready: impl FnMut() -> bool, what: impl Fn() -> String) {
    let deadline = Instant::now() + PATIENCE;
    while !ready() {
        assert!(Instant::now() < deadline, "{}", what());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// A supervisor with its lines and its run directory, which is removed at the end.
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

    /// Asserts that the run directory holds nothing of a service.
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
    runtime.block_on(async { tokio::time::timeout(2 * PATIENCE, future).await.expect("the test hangs") })
}

/// The processes that have `marker` among their arguments. A zombie has none.
fn marked(marker: &str) -> Vec<u32> {
    let numbers =
        fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    let has_marker = |pid: &u32| {
        fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|arguments| {
            arguments.split(|&byte| byte == 0).any(|argument| argument == marker.as_bytes())
        })
    };
    numbers.filter(has_marker).collect()
}

/// A number of seconds that no other process sleeps for.
fn marker(number: u32) -> String {
    format!("{}.{number}", 100_000 + std::process::id())
}

// ---- what a service sees

#[test]
fn a_service_has_its_own_names_and_network_and_the_host_keeps_its_own() {
    let mut bed = Bed::new(FOREVER);
    bed.namespace.ip(&["link", "add", "tgmark", "type", "veth", "peer", "name", "tgpeer"]);
    let host_files = || ["/etc/hosts", "/etc/resolv.conf", "/etc/hostname"].map(|path| fs::read(path).ok());
    let mounts = || fs::read_to_string("/proc/self/mountinfo").unwrap();
    let hostname = || fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
    let before = (host_files(), mounts(), hostname());
    run(async {
        let script = "hostname; cat /etc/hostname /etc/hosts /etc/resolv.conf; readlink /proc/self/ns/net; \
                      ls -d /sys/class/net/tgmark; cat; echo pids $(ls /proc | grep -c '^[0-9]'); echo ready; \
                      exec sleep 600";
        bed.supervisor.start(vec![bed.shell("web", script)]).await.unwrap();
        bed.lines.wait_for("web | ready").await;
        let network = tidegate_netns::Namespace::from_path(&bed.namespace.path()).unwrap().id().to_string();
        let told = bed.lines.all();
        for expected in [
            "web-host",
            "10.9.8.7 web-friend",
            "nameserver 127.0.0.11",
            network.as_str(),
            "/sys/class/net/tgmark",
        ] {
            assert!(told.contains(&format!("web | {expected}")), "{expected} is missing: {told:#?}");
        }
        assert_eq!(told.iter().filter(|line| *line == "web | web-host").count(), 2, "{told:#?}");
        // Itself, its init, and the pipeline that counts.
        let pids = told.iter().find_map(|line| line.strip_prefix("web | pids ")).unwrap();
        assert!(pids.parse::<u32>().unwrap() <= 6, "{pids}");
        assert_eq!((host_files(), mounts(), hostname()), before);
        bed.supervisor.stop().await;
    });
    assert_eq!((host_files(), mounts(), hostname()), before);
    bed.assert_clean();
}

#[test]
fn a_service_has_the_environment_and_directory_it_was_given_and_no_descriptor_more() {
    let mut bed = Bed::new(FOREVER);
    let directory = tempfile::tempdir().unwrap();
    run(async {
        let mut spec = bed.shell(
            "web",
            "pwd; echo $COLOUR; env | grep -c CARGO; ls /proc/$$/fd | wc -l; readlink /proc/$$/fd/0",
        );
        spec.environment.insert("COLOUR".to_owned(), "teal".to_owned());
        spec.working_dir = directory.path().to_owned();
        bed.supervisor.start(vec![spec]).await.unwrap();
        assert!(bed.supervisor.wait().await.success());
    });
    let expected = [directory.path().to_str().unwrap(), "teal", "0", "3", "/dev/null"];
    let mut expected: Vec<String> = expected.iter().map(|line| format!("web | {line}")).collect();
    expected.push("web exited with code 0".to_owned());
    // Some shells keep a descriptor of their own, none of them below 10.
    assert_eq!(bed.lines.all(), expected);
}

#[test]
fn output_of_both_streams_is_told_line_by_line_behind_padded_names() {
    let mut bed = Bed::new(FOREVER);
    run(async {
        let web = bed.shell("web", "printf 'one\\ntwo\\033[2J\\nrest'; exit 3");
        let database = after(bed.shell("database", "echo to stderr >&2"), &["web"]);
        bed.supervisor.start(vec![web, database]).await.unwrap();
        let ended = bed.supervisor.wait().await;
        assert_eq!(ended.0, [("web".to_owned(), Exit::Code(3)), ("database".to_owned(), Exit::Code(0))]);
    });
    let told = bed.lines.all();
    let of = |start: &str| told.iter().filter(|line| line.starts_with(start)).cloned().collect::<Vec<_>>();
    assert_eq!(of("web"), ["web      | one", "web      | two", "web      | rest", "web exited with code 3"]);
    assert_eq!(of("database"), ["database | to stderr", "database exited with code 0"]);
    bed.assert_clean();
}

// ---- starting

#[test]
fn services_start_after_and_stop_before_what_they_depend_on() {
    let mut bed = Bed::new(FOREVER);
    let script = "trap 'echo bye; exit 0' TERM; echo up; while :; do sleep 0.02; done";
    run(async {
        let specs = vec![
            after(bed.shell("c", script), &["b"]),
            bed.shell("a", script),
            after(bed.shell("b", script), &["a"]),
        ];
        bed.supervisor.start(specs).await.unwrap();
        let statuses = bed.supervisor.statuses();
        let names: Vec<&str> = statuses.iter().map(|status| status.name.as_str()).collect();
        assert_eq!(names, ["a", "b", "c"]);
        assert!(statuses.iter().all(|status| status.state == State::Running), "{statuses:?}");
        for name in names {
            bed.lines.wait_for(&format!("{name} | up")).await;
        }
        bed.supervisor.stop().await;
    });
    let told = bed.lines.all();
    let ends: Vec<&String> = told.iter().filter(|line| line.ends_with("exited with code 0")).collect();
    assert_eq!(ends, ["c exited with code 0", "b exited with code 0", "a exited with code 0"]);
    bed.assert_clean();
}

#[test]
fn what_cannot_be_run_is_named_and_what_had_started_is_stopped() {
    for (program, reason) in [
        (
            "no-such-program",
            "service \"web\": cannot run \"no-such-program\": No such file or directory in PATH; install it",
        ),
        ("/etc/hosts/x", "service \"web\": cannot run \"/etc/hosts/x\": Not a directory"),
        (
            "/proc/self/mounts",
            "service \"web\": cannot run \"/proc/self/mounts\": Permission denied; is it an",
        ),
    ] {
        let mut bed = Bed::new(FOREVER);
        let mark = marker(1);
        run(async {
            let db = bed.shell("db", &format!("exec sleep {mark}"));
            let mut web = after(bed.shell("web", ""), &["db"]);
            web.command = vec![program.to_owned()];
            let error = bed.supervisor.start(vec![web, db]).await.unwrap_err();
            assert!(matches!(error, ServiceError::CannotRun { .. }), "{error}");
            assert!(error.to_string().starts_with(reason), "{error}");
        });
        assert!(marked(&mark).is_empty());
        bed.assert_clean();
    }
}

#[test]
fn a_working_directory_or_host_name_that_cannot_be_is_named() {
    run(async {
        let mut bed = Bed::new(FOREVER);
        let mut spec = bed.shell("web", "true");
        spec.working_dir = "/no/such".into();
        let error = bed.supervisor.start(vec![spec]).await.unwrap_err().to_string();
        assert_eq!(error, "service \"web\": working directory /no/such: No such file or directory");
        let mut bed = Bed::new(FOREVER);
        let mut spec = bed.shell("web", "true");
        spec.hostname = "x".repeat(65);
        let error = bed.supervisor.start(vec![spec]).await.unwrap_err().to_string();
        assert!(error.starts_with("service \"web\": set host name \"xxx"), "{error}");
        let mut bed = Bed::new(FOREVER);
        let mut spec = bed.shell("web", "true");
        spec.name = "../web".to_owned();
        assert!(matches!(bed.supervisor.start(vec![spec]).await, Err(ServiceError::Name(_))));
    });
}

#[test]
fn a_name_that_another_supervisor_uses_is_refused() {
    let mut bed = Bed::new(FOREVER);
    run(async {
        bed.supervisor.start(vec![bed.shell("web", "exec sleep 600")]).await.unwrap();
        let mut other = supervisor(bed.run_dir.path(), Lines::default(), FOREVER);
        let error = other.start(vec![bed.shell("web", "true")]).await.unwrap_err();
        assert!(matches!(error, ServiceError::Busy { .. }), "{error}");
        assert_eq!(sweep(bed.run_dir.path()).unwrap(), 0);
        bed.supervisor.stop().await;
    });
    bed.assert_clean();
}

// ---- restarting

#[test]
fn a_service_that_fails_is_restarted_as_often_as_allowed_in_the_same_namespace() {
    let mut bed = Bed::new(FOREVER);
    run(async {
        let script = "readlink /proc/self/ns/net; exit 4";
        let spec = restarting(bed.shell("web", script), Restart::OnFailure { max: Some(2) });
        bed.supervisor.start(vec![spec]).await.unwrap();
        assert_eq!(bed.supervisor.wait().await.0, [("web".to_owned(), Exit::Code(4))]);
        assert_eq!(bed.status("web").restarts, 2);
    });
    let network = tidegate_netns::Namespace::from_path(&bed.namespace.path()).unwrap().id();
    let seen = format!("web | {network}");
    let exited = "web exited with code 4";
    let told =
        [&seen, exited, "web restarts in 100ms", &seen, exited, "web restarts in 200ms", &seen, exited];
    assert_eq!(bed.lines.all(), told);
    bed.assert_clean();
}

#[test]
fn a_service_is_restarted_until_it_is_stopped() {
    let mut bed = Bed::new(FOREVER);
    run(async {
        let failing = restarting(bed.shell("good", "exit 0"), Restart::OnFailure { max: None });
        let always = restarting(bed.shell("always", "exit 0"), Restart::Always);
        bed.supervisor.start(vec![failing, always]).await.unwrap();
        bed.lines.wait_for("always restarts in 400ms").await;
        assert!(matches!(bed.status("always").state, State::Restarting(Exit::Code(0)) | State::Running));
        assert_eq!(bed.status("good").state, State::Ended(Exit::Code(0)));
        bed.supervisor.stop().await;
        assert!(matches!(bed.status("always").state, State::Ended(Exit::Code(0))));
    });
    bed.assert_clean();
}

// ---- stopping

#[test]
fn who_ignores_the_request_to_end_is_killed_after_the_grace_period() {
    let grace = Duration::from_millis(300);
    let mut bed = Bed::new(grace);
    run(async {
        let script = "trap '' TERM; echo up; while :; do sleep 0.02; done";
        bed.supervisor.start(vec![bed.shell("web", script)]).await.unwrap();
        bed.lines.wait_for("web | up").await;
        let began = Instant::now();
        bed.supervisor.stop().await;
        assert!(began.elapsed() >= grace, "{:?}", began.elapsed());
        assert_eq!(bed.status("web").state, State::Ended(Exit::Signal(9)));
    });
    assert!(bed.lines.has("web was killed by SIGKILL"));
    bed.assert_clean();
}

#[test]
fn a_whole_process_group_is_asked_to_end_and_has_time_for_it() {
    let mut bed = Bed::new(FOREVER);
    run(async {
        // The leader dies of the signal at once; its child needs longer.
        let script =
            "(trap 'sleep 0.3; echo put away; exit 0' TERM; echo up; while :; do sleep 0.02; done) & wait";
        bed.supervisor.start(vec![bed.shell("web", script)]).await.unwrap();
        bed.lines.wait_for("web | up").await;
        bed.supervisor.stop().await;
        assert_eq!(bed.status("web").state, State::Ended(Exit::Signal(15)));
    });
    let told = bed.lines.all();
    assert_eq!(told[told.len() - 2..], ["web | put away", "web was killed by SIGTERM"], "{told:?}");
}

#[test]
fn a_second_request_kills_at_once() {
    let mut bed = Bed::new(FOREVER);
    run(async {
        let script = "trap '' TERM; echo up; while :; do sleep 0.02; done";
        bed.supervisor.start(vec![bed.shell("a", script), bed.shell("b", script)]).await.unwrap();
        bed.lines.wait_for("a | up").await;
        bed.lines.wait_for("b | up").await;
        let stopped = tokio::time::timeout(Duration::from_millis(200), bed.supervisor.stop()).await;
        assert!(stopped.is_err());
        bed.supervisor.kill();
        let ended = bed.supervisor.wait().await;
        assert_eq!(ended.0.iter().map(|(_, exit)| *exit).collect::<Vec<_>>(), [Exit::Signal(9); 2]);
        bed.supervisor.stop().await;
    });
    bed.assert_clean();
}

#[test]
fn nothing_that_a_service_has_forked_outlives_it() {
    let mut bed = Bed::new(FOREVER);
    let (daemon, killed) = (marker(2), marker(3));
    run(async {
        let daemonise =
            |mark: &str, then: &str| format!("setsid -f sleep {mark} </dev/null >/dev/null 2>&1; {then}");
        // One ends by itself, the other is stopped.
        let short = bed.shell("short", &daemonise(&daemon, "echo up; sleep 0.3"));
        let long = bed.shell("long", &daemonise(&killed, "echo up; exec sleep 600"));
        bed.supervisor.start(vec![short, long]).await.unwrap();
        bed.lines.wait_for("long  | up").await;
        assert_eq!(marked(&killed).len(), 1);
        wait_until(|| bed.lines.has("short exited with code 0"), || format!("{:?}", bed.lines.all())).await;
        assert!(marked(&daemon).is_empty());
        bed.supervisor.stop().await;
    });
    assert!(marked(&killed).is_empty());
    // No zombie of ours either: all that is below this process has gone, and no other test's is named so.
    let zombies = procfs::tree(std::process::id()).into_iter().filter(|&pid| {
        procfs::state(pid) == Some('Z')
            && fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim() == "sleep")
    });
    assert_eq!(zombies.count(), 0);
    bed.assert_clean();
}

#[test]
fn orphans_of_a_service_are_reaped_while_it_runs() {
    let mut bed = Bed::new(FOREVER);
    run(async {
        let script = "for i in 1 2 3 4 5; do (sleep 0.01 &) ; done; sleep 0.3; \
                      echo zombies $(cat /proc/[0-9]*/stat 2>/dev/null | grep -c ') Z '); exec sleep 600";
        bed.supervisor.start(vec![bed.shell("web", script)]).await.unwrap();
        bed.lines.wait_for("web | zombies 0").await;
        bed.supervisor.stop().await;
    });
}

#[test]
fn a_dropped_supervisor_takes_its_services_along() {
    let mut bed = Bed::new(FOREVER);
    let mark = marker(4);
    run(async {
        bed.supervisor.start(vec![bed.shell("web", &format!("exec sleep {mark}"))]).await.unwrap();
        // Until it has become what it executes, it is still the shell.
        wait_until(|| marked(&mark).len() == 1, || "no sleep".to_owned()).await;
        let pid = bed.status("web").pid.unwrap();
        assert_eq!(marked(&mark), [pid]);
        let Bed { supervisor, run_dir, .. } = bed;
        drop(supervisor);
        wait_until(
            || marked(&mark).is_empty() && services_in(run_dir.path()).is_empty(),
            || "left".to_owned(),
        )
        .await;
    });
}

// ---- the supervisor is killed

/// Not a test of itself: the supervisor that the next test kills.
#[test]
fn supervisor_in_a_process_of_its_own() {
    let Some(run_dir) = std::env::var_os(RUN_DIR) else { return };
    let namespace = Namespace::new();
    run(async {
        let mark = marker(0);
        let script = format!(
            "setsid -f sleep {mark} </dev/null >/dev/null 2>&1; (setsid -f sh -c 'trap \"\" TERM HUP; sleep {mark}; :'); \
             echo up {mark}; sleep {mark} & exec sleep {mark}"
        );
        let mut supervisor = supervisor(Path::new(&run_dir), StandardOutput, FOREVER);
        let web = shell(&namespace, "web", &script);
        supervisor.start(vec![web, shell(&namespace, "db", &script)]).await.unwrap();
        supervisor.wait().await;
    });
}

#[test]
fn a_killed_supervisor_leaves_nothing_but_files_that_are_swept() {
    require_root();
    let run_dir = tempfile::tempdir().unwrap();
    let mounts = || fs::read_to_string("/proc/self/mountinfo").unwrap();
    let before = mounts();
    let mut process = Process::spawn(
        Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "supervisor_in_a_process_of_its_own", "--nocapture", "--test-threads=1"])
            .env(RUN_DIR, run_dir.path()),
    );
    let up = process.wait_for_line("web | up ", PATIENCE);
    process.wait_for_line("db  | up ", PATIENCE);
    let mark = up.split(' ').next_back().unwrap().to_owned();
    assert!(eventually(PATIENCE, || marked(&mark).len() >= 8), "{:?}", marked(&mark));
    let inits: Vec<u32> =
        procfs::tree(process.pid()).into_iter().filter(|&pid| pid != process.pid()).collect();
    assert!(inits.len() >= 10, "{inits:?}");
    // The supervisor alone: no process group is told.
    assert_eq!(process.stop(Signal::KILL, PATIENCE).signal(), Some(9));
    let living = || -> Vec<u32> {
        let lives = |pid: &&u32| !matches!(procfs::state(**pid), None | Some('Z'));
        inits.iter().filter(lives).copied().chain(marked(&mark)).collect()
    };
    assert!(eventually(PATIENCE, || living().is_empty()), "{:?}", living());
    assert_eq!(mounts(), before);
    assert_eq!(services_in(run_dir.path()).len(), 2);
    assert_eq!(sweep(run_dir.path()).unwrap(), 2);
    assert_eq!(services_in(run_dir.path()), Vec::<String>::new());
}

// ---- without root

/// Not a test of itself: a supervisor that is root of a user namespace only, for the next test.
#[test]
fn supervisor_in_a_user_namespace() {
    let Some(run_dir) = std::env::var_os(ROOTLESS_RUN_DIR) else { return };
    run(async {
        let script = "hostname; head -1 /etc/resolv.conf; echo I am $$; setsid -f sleep 600 </dev/null >/dev/null 2>&1";
        let mut supervisor = supervisor(Path::new(&run_dir), StandardOutput, FOREVER);
        let namespace = tidegate_netns::Namespace::current().unwrap();
        supervisor.start(vec![shell_in(namespace, "web", script)]).await.unwrap();
        assert!(supervisor.wait().await.success());
        println!("all is well");
    });
}

#[test]
fn root_of_a_user_namespace_is_enough() {
    require_root();
    let run_dir = tempfile::tempdir().unwrap();
    let mut process = Process::spawn(
        Command::new("unshare")
            .args(["--user", "--map-root-user", "--net"])
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", "supervisor_in_a_user_namespace", "--nocapture", "--test-threads=1"])
            .env(ROOTLESS_RUN_DIR, run_dir.path()),
    );
    assert!(process.wait(PATIENCE).success(), "{}", process.output());
    let told = process.wait_for_output(PATIENCE);
    for line in [
        "web | web-host",
        "web | nameserver 127.0.0.11",
        "web | I am 2",
        "web exited with code 0",
        "all is well",
    ] {
        assert!(told.lines().any(|said| said.ends_with(line)), "{line} is missing:\n{told}");
    }
    assert_eq!(services_in(run_dir.path()), Vec::<String>::new());
}

#[test]
fn a_privilege_that_is_missing_is_named() {
    require_root();
    let run_dir = tempfile::tempdir().unwrap();
    let output = Command::new("setpriv")
        .args(["--bounding-set", "-sys_admin", "--inh-caps", "-sys_admin"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "supervisor_in_a_user_namespace", "--nocapture", "--test-threads=1"])
        .env(ROOTLESS_RUN_DIR, run_dir.path())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains("needs CAP_SYS_ADMIN"), "{said}");
    assert_eq!(services_in(run_dir.path()), Vec::<String>::new());
}

// ---- the init

#[test]
fn the_init_is_not_for_people() {
    let output = Command::new(env!("CARGO_BIN_EXE_tidegate"))
        .arg("service-init")
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.starts_with("tidegate: error: service-init") && said.lines().count() == 1, "{said}");
}

#[test]
fn a_service_that_writes_more_than_is_taken_waits() {
    /// Takes a line only when told to.
    struct Stuck(std::sync::mpsc::Receiver<()>);
    impl Output for Stuck {
        fn write_line(&mut self, _: &str) -> io::Result<()> {
            self.0.recv().map_err(io::Error::other)
        }
    }
    let bed = Bed::new(FOREVER);
    let (release, stuck) = std::sync::mpsc::channel();
    let count = bed.run_dir.path().join("count");
    run(async {
        let mut supervisor = supervisor(bed.run_dir.path(), Stuck(stuck), FOREVER);
        let line = "x".repeat(1000);
        let script = format!("i=0; while :; do i=$((i+1)); echo {line}; echo $i > {}; done", count.display());
        supervisor.start(vec![bed.shell("web", &script)]).await.unwrap();
        let written = || fs::read_to_string(&count).ok().and_then(|text| text.trim().parse::<u32>().ok());
        let mut last = None;
        let mut same = 0;
        wait_until(
            || {
                let now = written();
                same = if now.is_some() && now == last { same + 1 } else { 0 };
                last = now;
                same > 60
            },
            || "it is never slowed down".to_owned(),
        )
        .await;
        // 64 KiB of pipe, 64 lines of queue, and what is in hand.
        assert!(last.unwrap() < 300, "{last:?}");
        supervisor.kill();
        drop(release);
        supervisor.wait().await;
    });
}
