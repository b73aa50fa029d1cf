//! Supervisor processes with services in real namespaces: detachment from their parent, start,
//! logs, stop, and every end of either process. Requires root.
//!
//! This program has no test harness. With the arguments of an internal subcommand, it is a
//! supervisor process or an init, like tidegate, and with [`DAEMON`], a process that launches one.

use std::any::Any;
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::future::Future;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::IntoRawFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, geteuid, kill_process};
use tempfile::TempDir;
use tidegate_model::Restart;
use tidegate_netns::Namespace;
use tidegate_services::{
    Exit, LogLine, LogStream, OutputStream, RemoteError, RemoteSpec, RemoteSupervisor, State, init,
    process,
};

/// Timeout of operations that usually complete immediately.
const TIMEOUT: Duration = Duration::from_secs(30);

/// A grace period that no test reaches.
const FOREVER: Duration = Duration::from_secs(600);

/// The subcommand that launches a supervisor process at the directory of the next argument, starts
/// the script of the argument after it as service `web`, if any, and never ends.
const DAEMON: &str = "test-daemon";

/// The subcommand that launches a supervisor process at the directory of the next argument, and
/// continues as [`UPGRADED`] with execve(2).
const UPGRADING: &str = "test-upgrading-daemon";

/// The subcommand that stops the supervisor process at the directory of the next argument.
const UPGRADED: &str = "test-upgraded-daemon";

/// A service whose init sets nothing up.
const HANGS: &str = "hangs";

const TESTS: [(&str, fn()); 12] = [
    ("services_run_in_their_namespaces", services_run_in_their_namespaces),
    ("the_process_is_detached", the_process_is_detached),
    ("a_killed_daemon_takes_nothing_down", a_killed_daemon_takes_nothing_down),
    ("an_upgraded_daemon_leaves_no_zombie", an_upgraded_daemon_leaves_no_zombie),
    ("services_can_be_started_by_the_next_daemon", services_can_be_started_by_the_next_daemon),
    ("a_directory_has_one_process", a_directory_has_one_process),
    ("a_cancelled_launch_leaves_nothing", a_cancelled_launch_leaves_nothing),
    ("a_killed_process_takes_its_services_down", a_killed_process_takes_its_services_down),
    ("signals_stop_or_do_nothing", signals_stop_or_do_nothing),
    ("a_flood_of_output_blocks_nothing", a_flood_of_output_blocks_nothing),
    ("a_stop_interrupts_a_start", a_stop_interrupts_a_start),
    ("errors_of_a_launch_name_their_cause", errors_of_a_launch_name_their_cause),
];

fn main() -> ExitCode {
    let args: Vec<OsString> = std::env::args_os().collect();
    match args.get(1).and_then(|argument| argument.to_str()) {
        Some(init::SUBCOMMAND) if args[2] == HANGS => std::thread::sleep(FOREVER),
        Some(init::SUBCOMMAND) => return init::main(),
        Some(process::SUBCOMMAND) => return process::run(Path::new(&args[2])),
        Some(DAEMON) => daemon(Path::new(&args[2]), args.get(3)),
        Some(UPGRADING) => upgrading_daemon(Path::new(&args[2])),
        Some(UPGRADED) => upgraded_daemon(Path::new(&args[2])),
        Some("--list") => {
            TESTS.iter().for_each(|(name, _)| println!("{name}: test"));
            return ExitCode::SUCCESS;
        }
        _ => {}
    }
    assert!(geteuid().is_root(), "this test creates network namespaces and must run as root");
    let filter =
        args.iter().skip(1).filter_map(|one| one.to_str()).find(|one| !one.starts_with('-'));
    let mut failed = 0;
    for (name, test) in TESTS.iter().filter(|(name, _)| name.contains(filter.unwrap_or_default())) {
        let result: Result<(), Box<dyn Any + Send>> = std::panic::catch_unwind(test);
        failed += usize::from(result.is_err());
        println!("test {name} ... {}", if result.is_ok() { "ok" } else { "FAILED" });
    }
    ExitCode::from(u8::from(failed > 0))
}

fn run(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(test);
}

async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(TIMEOUT, future).await.expect("no result in time")
}

async fn eventually(mut ready: impl FnMut() -> bool, what: &str) {
    let deadline = Instant::now() + TIMEOUT;
    while !ready() {
        assert!(Instant::now() < deadline, "{what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// A directory for a supervisor process, which is killed on drop.
struct Bed {
    run_dir: TempDir,
}

impl Bed {
    fn new() -> Self {
        Self { run_dir: tempfile::tempdir().unwrap() }
    }

    fn directory(&self) -> PathBuf {
        self.run_dir.path().join("project")
    }

    async fn launch(&self, services: &[&str]) -> Result<RemoteSupervisor, RemoteError> {
        let services: Vec<String> = services.iter().map(ToString::to_string).collect();
        let program = Path::new("/proc/self/exe");
        within(RemoteSupervisor::launch(program, &self.directory(), &services)).await
    }

    /// Starts [`DAEMON`] and waits until it has done its work. Returns the ID of the supervisor
    /// process, too.
    fn daemon(&self, script: Option<&str>) -> (Daemon, u32) {
        let daemon = Command::new("/proc/self/exe")
            .arg(DAEMON)
            .arg(self.directory())
            .args(script)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn();
        let mut daemon = Daemon(daemon.unwrap());
        let mut line = String::new();
        BufReader::new(daemon.0.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let pid = line.trim().parse();
        (daemon, pid.unwrap_or_else(|_| panic!("the daemon wrote {line:?}")))
    }

    async fn connect(&self) -> Option<RemoteSupervisor> {
        within(RemoteSupervisor::connect(&self.directory())).await.unwrap()
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        let lock = self.directory().join("supervisor.lock");
        let pid = fs::read_to_string(lock).ok().and_then(|text| text.trim().parse::<u32>().ok());
        let Some(pid) = pid else { return };
        let command = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        if command.contains(self.directory().to_str().unwrap()) {
            kill(pid, Signal::KILL);
        }
    }
}

/// A process with the subcommand [`DAEMON`]. Killed on drop, which also closes the pipe that is its
/// standard error and that of the supervisor process.
struct Daemon(Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn kill(pid: u32, signal: Signal) {
    let _ = kill_process(Pid::from_raw(i32::try_from(pid).unwrap()).unwrap(), signal);
}

fn exists(pid: u32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

/// A service that runs `script` in a shell.
fn shell(name: &str, script: &str) -> RemoteSpec {
    RemoteSpec {
        name: name.to_owned(),
        command: ["sh", "-c", script].map(ToOwned::to_owned).to_vec(),
        environment: BTreeMap::new(),
        hostname: format!("{name}-host"),
        working_dir: "/".into(),
        hosts: "127.0.0.1 localhost\n".to_owned(),
        resolv_conf: "nameserver 127.0.0.11\n".to_owned(),
        restart: Restart::No,
        depends_on: vec![],
    }
}

/// Waits for the line `text` of `service`.
async fn wait_for_line(log: &mut LogStream, service: &str, text: &str) -> LogLine {
    loop {
        let line = within(log.next()).await.unwrap_or_else(|| panic!("no line {text:?}"));
        if line.service == service && line.text == text {
            return line;
        }
    }
}

async fn wait_for_state(supervisor: &RemoteSupervisor, service: &str, state: State) -> Option<u32> {
    let mut statuses = supervisor.statuses().await.unwrap();
    loop {
        let now = within(statuses.next()).await.expect("the process has ended");
        if let Some(status) = now.iter().find(|one| one.name == service && one.state == state) {
            return status.pid;
        }
    }
}

/// The signals of `field` in the status file of process `pid`, as a mask, without those that the C
/// library reserves (32 and 33). The environment of the tests may ignore these.
fn signals(pid: u32, field: &str) -> u64 {
    u64::from_str_radix(&status_field(pid, field), 16).unwrap() & !(0b11 << 31)
}

/// The value of `field` in the status file of process `pid`.
fn status_field(pid: u32, field: &str) -> String {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(field)).unwrap();
    line.trim_start_matches(':').trim().to_owned()
}

fn daemon(directory: &Path, script: Option<&OsString>) -> ! {
    // Settings that the supervisor process must not inherit.
    // SAFETY: this process has one thread, and these calls have valid arguments.
    unsafe {
        for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGCHLD, libc::SIGUSR1] {
            libc::signal(signal, libc::SIG_IGN);
        }
        libc::signal(libc::SIGCHLD, libc::SIG_DFL);
        let mut blocked = std::mem::zeroed();
        libc::sigemptyset(&raw mut blocked);
        libc::sigaddset(&raw mut blocked, libc::SIGTERM);
        libc::sigaddset(&raw mut blocked, libc::SIGUSR2);
        libc::pthread_sigmask(libc::SIG_BLOCK, &raw const blocked, std::ptr::null_mut());
        let leaked = fs::File::open("/dev/zero").unwrap().into_raw_fd();
        libc::fcntl(leaked, libc::F_SETFD, 0);
    }
    run(async {
        let services = ["web".to_owned()];
        let supervisor =
            RemoteSupervisor::launch(Path::new("/proc/self/exe"), directory, &services).await;
        let supervisor = supervisor.unwrap();
        if let Some(script) = script {
            let spec = shell("web", script.to_str().unwrap());
            supervisor.start(vec![spec], FOREVER).await.unwrap();
        }
        println!("{}", supervisor.pid());
        std::io::stdout().flush().unwrap();
        std::future::pending::<()>().await;
    });
    unreachable!()
}

fn upgrading_daemon(directory: &Path) -> ! {
    run(async {
        let program = Path::new("/proc/self/exe");
        let supervisor = RemoteSupervisor::launch(program, directory, &[]).await.unwrap();
        assert_eq!(status_field(supervisor.pid(), "PPid"), std::process::id().to_string());
        let error = Command::new(program).arg(UPGRADED).arg(directory).exec();
        panic!("{error}");
    });
    unreachable!()
}

fn upgraded_daemon(directory: &Path) -> ! {
    run(async {
        let supervisor = RemoteSupervisor::connect(directory).await.unwrap().unwrap();
        let pid = supervisor.pid();
        assert_eq!(status_field(pid, "PPid"), std::process::id().to_string());
        within(supervisor.stop()).await.unwrap();
        eventually(|| !exists(pid), "the process is not reaped").await;
    });
    std::process::exit(0)
}

fn an_upgraded_daemon_leaves_no_zombie() {
    let bed = Bed::new();
    let mut daemon = Command::new("/proc/self/exe");
    assert!(daemon.arg(UPGRADING).arg(bed.directory()).status().unwrap().success());
    assert!(!bed.directory().exists());
}

fn services_run_in_their_namespaces() {
    run(async {
        let bed = Bed::new();
        let supervisor = bed.launch(&["web", "db"]).await.unwrap();
        assert!(!supervisor.is_started().await.unwrap());
        let own = Namespace::current().unwrap().id();
        let ids = ["web", "db"]
            .map(|name| Namespace::from_path(&supervisor.namespaces()[name]).unwrap().id());
        assert!(ids[0] != ids[1] && !ids.contains(&own));

        let mut all = supervisor.logs(None, 0, true).await.unwrap();
        let mut log = supervisor.logs(Some("web"), 0, true).await.unwrap();
        let script = "readlink /proc/self/ns/net; hostname; cat /etc/resolv.conf; ls /proc/self/fd; \
                      echo error >&2; exec sleep 600";
        let db = "trap 'echo stopped; exit 0' TERM; echo ready; while :; do sleep 0.05; done";
        let web = RemoteSpec { depends_on: vec!["db".to_owned()], ..shell("web", script) };
        supervisor.start(vec![web, shell("db", db)], FOREVER).await.unwrap();
        assert!(supervisor.is_started().await.unwrap());
        let again = supervisor.start(vec![], FOREVER).await.unwrap_err();
        assert!(matches!(again, RemoteError::AlreadyStarted { .. }), "{again}");
        wait_for_line(&mut log, "web", &ids[0].to_string()).await;
        wait_for_line(&mut log, "web", "web-host").await;
        wait_for_line(&mut log, "web", "nameserver 127.0.0.11").await;
        // 3 is the directory that ls reads.
        for descriptor in ["0", "1", "2", "3"] {
            let line = within(log.next()).await.unwrap();
            assert_eq!((&*line.text, line.stream), (descriptor, OutputStream::Stdout));
        }
        let error = wait_for_line(&mut log, "web", "error").await;
        assert_eq!(error.stream, OutputStream::Stderr);

        let statuses = supervisor.statuses().await.unwrap().next().await.unwrap();
        let names: Vec<&str> = statuses.iter().map(|status| status.name.as_str()).collect();
        assert_eq!(names, ["db", "web"], "in start order");
        let pid = statuses[1].pid.unwrap();
        assert_eq!(Namespace::from_pid(pid).unwrap().id(), ids[0]);
        assert_eq!(signals(pid, "SigIgn"), 0);

        wait_for_line(&mut all, "db", "ready").await;
        let mut statuses = supervisor.statuses().await.unwrap();
        within(supervisor.stop()).await.unwrap();
        let mut last = Vec::new();
        while let Some(now) = within(statuses.next()).await {
            last = now;
        }
        assert_eq!(last[0].state, State::Ended(Exit::Code(0)));
        assert_eq!(last[1].state, State::Ended(Exit::Signal(libc::SIGTERM)));
        let mut lines = Vec::new();
        while let Some(line) = within(all.next()).await {
            // The shell may report that its child was killed.
            if line.stream != OutputStream::Stderr {
                lines.push((line.stream, format!("{} {}", line.service, line.text)));
            }
        }
        assert!(all.is_complete());
        let expected = [
            (OutputStream::Notice, "web was killed by SIGTERM".to_owned()),
            (OutputStream::Stdout, "db stopped".to_owned()),
            (OutputStream::Notice, "db exited with code 0".to_owned()),
        ];
        assert_eq!(lines[lines.len() - 3..], expected, "dependent services end first: {lines:?}");
        assert!(!exists(pid) && !bed.directory().exists());
        eventually(|| !exists(supervisor.pid()), "the process is not reaped").await;
        within(supervisor.stop()).await.expect("has ended already");
    });
}

fn the_process_is_detached() {
    run(async {
        let bed = Bed::new();
        let (daemon, pid) = bed.daemon(None);
        let link = |name: &str| fs::read_link(format!("/proc/{pid}/{name}")).unwrap();
        assert_eq!(link("cwd"), Path::new("/"));
        for descriptor in ["fd/0", "fd/1"] {
            eventually(|| link(descriptor) == Path::new("/dev/null"), "not detached").await;
        }
        let open = fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
        let leaked = |entry: std::io::Result<fs::DirEntry>| {
            fs::read_link(entry.unwrap().path()).is_ok_and(|to| to == Path::new("/dev/zero"))
        };
        assert!(!open.into_iter().any(leaked));
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        let fields: Vec<&str> = stat.rsplit(") ").next().unwrap().split(' ').collect();
        let (group, session) = (fields[2], fields[3]);
        assert_eq!((group, session), (&*pid.to_string(), &*pid.to_string()));
        assert_eq!(signals(pid, "SigBlk"), 0);
        // By the runtime of Rust.
        assert_eq!(signals(pid, "SigIgn"), 1 << (libc::SIGPIPE - 1));
        assert_eq!(status_field(pid, "Threads"), "1");
        let command = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap();
        assert!(command.starts_with("tidegate\0service-supervisor\0"), "{command:?}");
        drop(daemon);
        within(bed.connect().await.unwrap().stop()).await.unwrap();
    });
}

fn a_killed_daemon_takes_nothing_down() {
    run(async {
        let bed = Bed::new();
        let script = "while :; do echo tick; echo tock >&2; sleep 0.02; done";
        let (daemon, pid) = bed.daemon(Some(script));
        drop(daemon);
        let supervisor = bed.connect().await.unwrap();
        assert_eq!(supervisor.pid(), pid);
        assert!(supervisor.is_started().await.unwrap());
        let service = wait_for_state(&supervisor, "web", State::Running).await.unwrap();
        let mut log = supervisor.logs(Some("web"), 0, true).await.unwrap();
        for _ in 0..5 {
            wait_for_line(&mut log, "web", "tick").await;
        }
        assert!(exists(service));
        within(supervisor.stop()).await.unwrap();
        assert!(!exists(service) && bed.connect().await.is_none());
    });
}

fn services_can_be_started_by_the_next_daemon() {
    run(async {
        let bed = Bed::new();
        let (daemon, _) = bed.daemon(None);
        drop(daemon);
        let supervisor = bed.connect().await.unwrap();
        assert!(!supervisor.is_started().await.unwrap());
        let namespace = Namespace::from_path(&supervisor.namespaces()["web"]).unwrap();

        let missing = RemoteSpec { command: vec!["/no/such".to_owned()], ..shell("web", "") };
        let failed = supervisor.start(vec![missing], FOREVER).await.unwrap_err().to_string();
        assert!(failed.starts_with("service \"web\": cannot run \"/no/such\""), "{failed}");
        assert!(!supervisor.is_started().await.unwrap());

        supervisor.start(vec![shell("web", "exit 3")], FOREVER).await.unwrap();
        wait_for_state(&supervisor, "web", State::Ended(Exit::Code(3))).await;
        assert!(supervisor.is_started().await.unwrap(), "also after the end of all services");
        let same = Namespace::from_path(&supervisor.namespaces()["web"]).unwrap();
        assert_eq!(same.id(), namespace.id());
        within(supervisor.stop()).await.unwrap();
    });
}

fn a_directory_has_one_process() {
    run(async {
        let bed = Bed::new();
        let supervisor = bed.launch(&[]).await.unwrap();
        let refused = bed.launch(&["web"]).await.unwrap_err();
        assert!(
            matches!(refused, RemoteError::Running { pid: Some(pid), .. } if pid == supervisor.pid()),
            "{refused}"
        );
        assert_eq!(bed.connect().await.unwrap().pid(), supervisor.pid());
        within(supervisor.stop()).await.unwrap();
        let next = bed.launch(&[]).await.expect("the directory is free when stop returns");
        let ended = supervisor.is_started().await.unwrap_err();
        assert!(matches!(ended, RemoteError::Ended { .. }), "{ended}");
        within(supervisor.stop()).await.expect("ends only its own process");
        assert!(!next.is_started().await.unwrap());
        within(next.stop()).await.unwrap();
    });
}

fn a_cancelled_launch_leaves_nothing() {
    run(async {
        let bed = Bed::new();
        let services: Vec<String> = (0..20).map(|number| format!("service-{number}")).collect();
        let mut cancelled = 0;
        for milliseconds in [0, 1, 2, 3, 5, 8, 13, 20, 30] {
            let directory = bed.directory();
            let launching =
                RemoteSupervisor::launch(Path::new("/proc/self/exe"), &directory, &services);
            match tokio::time::timeout(Duration::from_millis(milliseconds), launching).await {
                Err(_) => cancelled += 1,
                Ok(launched) => within(launched.unwrap().stop()).await.unwrap(),
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
            eventually(|| !directory.exists(), "the directory is not removed").await;
        }
        assert!(cancelled > 0);
    });
}

fn a_killed_process_takes_its_services_down() {
    run(async {
        let bed = Bed::new();
        let supervisor = bed.launch(&["web"]).await.unwrap();
        supervisor.start(vec![shell("web", "exec sleep 600")], FOREVER).await.unwrap();
        let service = wait_for_state(&supervisor, "web", State::Running).await.unwrap();
        let mut statuses = supervisor.statuses().await.unwrap();
        let mut log = supervisor.logs(None, 0, true).await.unwrap();
        kill(supervisor.pid(), Signal::KILL);
        while within(statuses.next()).await.is_some() {}
        assert!(within(log.next()).await.is_none() && !log.is_complete());
        eventually(|| !exists(service), "the service runs").await;
        assert!(bed.connect().await.is_none());
        within(supervisor.stop()).await.unwrap();
        assert!(bed.directory().join("supervisor.sock").exists());
        let next = bed.launch(&["web"]).await.expect("stale files are replaced");
        next.start(vec![shell("web", "exec sleep 600")], FOREVER).await.unwrap();
        within(next.stop()).await.unwrap();
        let left: Vec<_> = fs::read_dir(bed.directory()).unwrap().collect();
        assert!(left.is_empty(), "{left:?}");
    });
}

fn signals_stop_or_do_nothing() {
    run(async {
        let bed = Bed::new();
        let supervisor = bed.launch(&["web"]).await.unwrap();
        let stubborn = "trap '' TERM; echo ready; while :; do sleep 0.05; done";
        supervisor.start(vec![shell("web", stubborn)], Duration::from_millis(300)).await.unwrap();
        let mut log = supervisor.logs(None, usize::MAX, true).await.unwrap();
        wait_for_line(&mut log, "web", "ready").await;
        for signal in [Signal::HUP, Signal::INT, Signal::PIPE] {
            kill(supervisor.pid(), signal);
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert!(supervisor.is_started().await.unwrap());
        let began = Instant::now();
        kill(supervisor.pid(), Signal::TERM);
        wait_for_line(&mut log, "web", "was killed by SIGKILL").await;
        assert!(began.elapsed() >= Duration::from_millis(300));
        eventually(|| !bed.directory().exists(), "the directory is not removed").await;
        within(supervisor.stop()).await.unwrap();
    });
}

fn a_flood_of_output_blocks_nothing() {
    run(async {
        let bed = Bed::new();
        let supervisor = bed.launch(&["quiet", "flood"]).await.unwrap();
        let quiet = shell("quiet", "echo first; exec sleep 600");
        supervisor.start(vec![quiet, shell("flood", "exec yes")], FOREVER).await.unwrap();
        // Does not read.
        let _idle = supervisor.logs(None, usize::MAX, true).await.unwrap();
        let mut slowest = Duration::ZERO;
        for _ in 0..50 {
            let began = Instant::now();
            assert!(within(supervisor.is_started()).await.unwrap());
            slowest = slowest.max(began.elapsed());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert!(slowest < Duration::from_secs(2), "{slowest:?}");
        let mut quiet = supervisor.logs(Some("quiet"), usize::MAX, false).await.unwrap();
        assert_eq!(within(quiet.next()).await.unwrap().text, "first", "kept");
        let mut flood = supervisor.logs(Some("flood"), usize::MAX, false).await.unwrap();
        let mut lines = 0;
        while within(flood.next()).await.is_some() {
            lines += 1;
        }
        assert!(flood.is_complete() && lines > 1000, "{lines}");
        let memory = status_field(supervisor.pid(), "VmHWM");
        let kibibytes: usize = memory.trim_end_matches(" kB").trim().parse().unwrap();
        assert!(kibibytes < 64 * 1024, "{memory}");
        within(supervisor.stop()).await.unwrap();
    });
}

fn a_stop_interrupts_a_start() {
    run(async {
        let bed = Bed::new();
        let supervisor = bed.launch(&["db", HANGS]).await.unwrap();
        let starting = tokio::spawn({
            let supervisor = supervisor.clone();
            let specs = vec![shell("db", "exec sleep 600"), shell(HANGS, "")];
            async move { supervisor.start(specs, Duration::from_millis(200)).await }
        });
        let db = wait_for_state(&supervisor, "db", State::Running).await.unwrap();
        let waits = tokio::time::timeout(Duration::from_millis(200), supervisor.is_started());
        assert!(waits.await.is_err());
        let second = supervisor.start(vec![], FOREVER).await.unwrap_err();
        assert!(matches!(second, RemoteError::Starting { .. }), "{second}");
        within(supervisor.stop()).await.unwrap();
        let first = starting.await.unwrap().unwrap_err();
        assert!(matches!(first, RemoteError::Stopping { .. }), "{first}");
        assert!(!exists(db) && !bed.directory().exists());
    });
}

fn errors_of_a_launch_name_their_cause() {
    run(async {
        let bed = Bed::new();
        for (program, services, expected) in [
            (
                "/no/such/tidegate",
                vec![],
                "start /no/such/tidegate as a supervisor process: No such",
            ),
            ("/bin/false", vec![], "ended during its start (exit status: 1)"),
            ("/proc/self/exe", vec!["a/b"], "invalid service name \"a/b\""),
            ("/proc/self/exe", vec!["a", "a"], "two services \"a\""),
        ] {
            let services: Vec<String> = services.into_iter().map(ToOwned::to_owned).collect();
            let directory = bed.directory();
            let launched =
                within(RemoteSupervisor::launch(Path::new(program), &directory, &services));
            let failed = launched.await.unwrap_err().to_string();
            assert!(failed.contains(expected) && failed.lines().count() == 1, "{failed}");
            eventually(|| !bed.directory().exists(), "the directory is not removed").await;
        }
        // By hand, without the socket.
        let by_hand = Command::new("/proc/self/exe")
            .args([process::SUBCOMMAND, "/nonexistent"])
            .stdin(Stdio::null())
            .output()
            .unwrap();
        assert_eq!(by_hand.status.code(), Some(2));
        let error = String::from_utf8(by_hand.stderr).unwrap();
        assert!(error.contains("is internal to tidegate") && error.lines().count() == 1, "{error}");
    });
}
