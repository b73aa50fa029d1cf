//! Projects in the background (`tidegate up -d`): their services outlive the daemon, and the next
//! one adopts them.

#[path = "up/scene.rs"]
mod scene;

mod api {
    pub(crate) mod ask;
}

use api::ask::{ask, get};
use scene::{Scene, TIDEGATE, state};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::net::TcpStream;
use std::path::Path;
use std::time::Duration;
use tidegate_testbed::{Namespace, Process, Signal, eventually};

const SOON: Duration = Duration::from_secs(10);

/// Two services, one of them on an internal network only.
const SHOP: &str = "
name: shop
networks:
  front: { ipam: { config: [ { subnet: 10.77.1.0/24 } ] } }
  back: { internal: true, ipam: { config: [ { subnet: 10.77.2.0/24 } ] } }
services:
  web:
    command: TIDEGATE hello --listen 0.0.0.0:80
    environment: { COLOUR: green }
    networks: [ front, back ]
    ports: [ '8080:80' ]
    depends_on: [ db ]
  db:
    command: sh -c 'trap \"echo stopped; exit 0\" TERM; echo ready; echo oops >&2; while :; do sleep 0.05; done'
    networks: { back: { aliases: [ sql ], ipv4_address: 10.77.2.9 } }
";

/// A scene that ends the supervisor processes of its projects. They outlive their daemon, and would
/// outlive a test that panics.
struct Background(Scene);

impl std::ops::Deref for Background {
    type Target = Scene;

    fn deref(&self) -> &Scene {
        &self.0
    }
}

impl Background {
    fn new() -> Self {
        Self(Scene::new())
    }

    /// Supervisor processes with a directory of this scene.
    fn supervisors(&self) -> Vec<i32> {
        let ours = self.run.path().to_str().unwrap();
        let is_ours = |pid: &i32| {
            let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let mut words = command.split(|byte| *byte == 0).map(String::from_utf8_lossy);
            words.any(|word| word == "service-supervisor")
                && words.next().is_some_and(|directory| directory.starts_with(ours))
        };
        let pids = fs::read_dir("/proc").unwrap().flatten();
        pids.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).filter(is_ours).collect()
    }

    /// Writes `file` and brings it up in the background.
    #[track_caller]
    fn up(&self, file: &str) -> String {
        self.succeeds(&["up", "-d", "-f", &self.file(file)])
    }

    fn file(&self, file: &str) -> String {
        let path = self.directory.path().join("compose.yaml");
        fs::write(&path, file.replace("TIDEGATE", TIDEGATE)).unwrap();
        path.to_str().unwrap().to_owned()
    }

    /// The process ID of the command of each service that runs.
    fn processes(&self) -> BTreeMap<String, u64> {
        let (_, status) = get(&self.socket(), "/v1/status");
        let services = status["services"].as_array().unwrap();
        let running = services.iter().filter(|one| one["state"] == "running");
        running
            .map(|one| (one["name"].as_str().unwrap().to_owned(), one["pid"].as_u64().unwrap()))
            .collect()
    }

    /// Whether a client outside is served at the published port.
    fn answers(&self) -> bool {
        self.net.client.run(|| {
            let address = "203.0.113.1:8080".parse().unwrap();
            let Ok(mut stream) = TcpStream::connect_timeout(&address, Duration::from_secs(1))
            else {
                return false;
            };
            stream.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
            let request = b"GET / HTTP/1.0\r\n\r\n";
            let mut answer = String::new();
            std::io::Write::write_all(&mut stream, request).is_ok()
                && stream.read_to_string(&mut answer).is_ok()
                && answer.contains("203.0.113.9")
        })
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        for pid in self.supervisors() {
            if let Some(pid) = rustix::process::Pid::from_raw(pid) {
                let _ = rustix::process::kill_process(pid, Signal::KILL);
            }
        }
    }
}

fn exists(pid: u64) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

#[test]
fn a_project_is_brought_up_listed_and_taken_down() {
    for firewall in ["--firewall=nftables", "--firewall=iptables", "--firewall=none"] {
        let scene = Background::new();
        let mut daemon = scene.daemon(&[firewall]);
        let before = state(&scene.net.host);
        let printed = scene.up(SHOP);
        assert!(printed.contains("shop/web") && printed.contains("0.0.0.0:8080/tcp"), "{printed}");
        assert!(eventually(SOON, || scene.answers()), "{firewall}");
        assert_eq!(scene.processes().len(), 2, "{firewall}");

        // Names of the project, and its isolation.
        let resolved = scene.succeeds(&["exec", "web", "getent", "ahostsv4", "sql"]);
        assert!(resolved.starts_with("10.77.2.9 "), "{resolved}");
        let dig = |name: &str| {
            scene.succeeds(&["exec", "web", "dig", "+short", "+timeout=5", "@127.0.0.11", name])
        };
        assert_eq!(dig("db.back"), "10.77.2.9\n", "{firewall}");
        assert_eq!(dig("db.front"), "", "{firewall}");
        let from = ["exec", "web", "dig", "+short", "@127.0.0.11", "-x", "10.77.2.9"];
        assert_eq!(scene.succeeds(&from), "db.back.\n", "{firewall}");
        let ping = ["exec", "shop/web", "ping", "-c", "1", "-W", "5", "db"];
        assert!(scene.succeeds(&ping).contains("10.77.2.9"));

        let list = scene.succeeds(&["ls"]);
        let row = list.lines().find(|line| line.starts_with("shop ")).unwrap();
        assert!(row.contains(" 2/2 ") && row.ends_with("compose.yaml"), "{list}");
        let services = scene.succeeds(&["ps", "shop"]);
        assert!(services.contains("shop/db") && services.contains("running"), "{services}");

        assert_eq!(scene.succeeds(&["down", "shop"]), "shop is down\n");
        assert_eq!(state(&scene.net.host), before, "{firewall}");
        assert_eq!(scene.supervisors(), [0; 0]);
        assert!(!scene.run.path().join("daemon/projects/shop").exists());
        daemon.stop(Signal::INT, SOON);
    }
}

#[test]
fn services_outlive_a_killed_daemon_and_the_next_one_adopts_them() {
    for firewall in ["--firewall=nftables", "--firewall=none"] {
        let scene = Background::new();
        let mut daemon = scene.daemon(&[firewall]);
        scene.up(SHOP);
        assert!(eventually(SOON, || scene.answers()));
        let before = scene.processes();
        for end in [Signal::KILL, Signal::INT] {
            daemon.stop(end, SOON);
            assert!(before.values().all(|pid| exists(*pid)), "{firewall}, {end:?}");
            if end == Signal::INT {
                let printed = daemon.output();
                let told = printed.contains("services continue to run; tidegate down shop");
                assert!(told || !printed.contains("INFO"), "{printed}");
            }
            daemon = scene.daemon(&[firewall]);
            assert!(eventually(SOON, || scene.answers()), "{firewall}, {end:?}");
            assert!(eventually(SOON, || scene.processes() == before), "the same processes");
        }
        assert!(scene.succeeds(&["logs", "-p", "shop", "db"]).contains("ready"));
        scene.succeeds(&["down", "shop"]);
        assert!(before.values().all(|pid| !exists(*pid)));
    }
}

/// The networks of an ordinary user continue to exist as well, in namespaces that a process keeps.
#[test]
fn a_project_of_an_ordinary_user_outlives_its_daemon() {
    let scene = Background(Scene::new().with_open_tun());
    let as_user = |args: &[&str]| {
        let output = scene.tidegate_as_nobody().args(args).output().unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{args:?}: {error}");
        String::from_utf8(output.stdout).unwrap()
    };
    let mut daemon = scene.daemon_as_nobody(&[]);
    as_user(&["up", "-d", "-f", &scene.file(SHOP)]);
    assert!(eventually(SOON, || scene.answers()));
    let resolved = as_user(&["exec", "web", "getent", "ahostsv4", "sql"]);
    assert!(resolved.starts_with("10.77.2.9 "), "{resolved}");

    let (before, keeper) = (scene.processes(), scene.keeper().expect("a keeper"));
    let (bridges, web) = (scene.kept_namespace(), before["shop/web"]);
    let links = || bridges.exec("ip", &["-o", "link"]).replace("NO-CARRIER", "");
    let web = Namespace::at(Path::new(&format!("/proc/{web}/ns/net")));
    let ours = |links: String| -> Vec<String> {
        links.lines().filter(|line| line.contains(": tg-")).map(str::to_owned).collect()
    };
    for end in [Signal::KILL, Signal::INT] {
        let links_before = ours(links());
        assert_eq!(links_before.len(), 2, "bridges");
        daemon.stop(end, SOON);
        assert!(before.values().all(|pid| exists(*pid)), "{end:?}");
        // Members of a network reach each other while no daemon runs.
        web.exec("ping", &["-c", "1", "-W", "5", "10.77.2.9"]);
        daemon = scene.daemon_as_nobody(&[]);
        assert_eq!(ours(links()), links_before, "{end:?}: adopted");
        assert_eq!(scene.keeper(), Some(keeper), "{end:?}");
        assert!(eventually(SOON, || scene.answers()), "{end:?}");
        assert!(eventually(SOON, || scene.processes() == before), "the same processes");
    }
    as_user(&["down", "shop"]);
    assert!(before.values().all(|pid| !exists(*pid)));
    daemon.stop(Signal::INT, SOON);
    assert_eq!(scene.keeper(), None);
    let ended = || !exists(keeper.unsigned_abs().into());
    assert!(eventually(SOON, ended), "the keeper ends with the last network");
}

/// Without the process that keeps the namespaces, they end with the daemon, and the next one
/// creates networks and services again.
#[test]
fn a_project_of_an_ordinary_user_is_started_again_after_its_namespaces_were_removed() {
    let scene = Background(Scene::new().with_open_tun());
    let mut daemon = scene.daemon_as_nobody(&[]);
    scene.up(SHOP);
    let (before, keeper) = (scene.processes(), scene.keeper().expect("a keeper"));
    let pid = rustix::process::Pid::from_raw(keeper).unwrap();
    rustix::process::kill_process(pid, Signal::KILL).unwrap();
    assert!(eventually(SOON, || scene.answers()), "the daemon continues");
    daemon.stop(Signal::KILL, SOON);

    // A file that names a process without a lock is ignored.
    let lock = scene.run.path().join("daemon/namespaces.lock");
    fs::write(lock, format!("{}\n", std::process::id())).unwrap();
    let mut daemon = scene.daemon_as_nobody(&[]);
    assert!(eventually(SOON, || scene.answers()));
    let after = scene.processes();
    assert_eq!(after.len(), 2);
    assert!(before.iter().all(|(name, pid)| after[name] != *pid), "{before:?}, {after:?}");
    assert!(before.values().all(|pid| !exists(*pid)));
    assert_ne!(scene.keeper(), Some(keeper));
    scene.succeeds(&["down", "shop"]);
    daemon.stop(Signal::INT, SOON);
    assert_eq!(scene.keeper(), None);
}

/// tidegate raises its own limit of open files only.
#[test]
fn services_have_the_limit_of_open_files_that_tidegate_was_started_with() {
    let file = "
name: limits
services:
  one: { command: [ sh, -c, 'echo limits $$(ulimit -Sn) $$(ulimit -Hn); sleep 60' ] }
";
    let limited = ["prlimit", "--nofile=1900:2900"];
    let scene = Background::new();
    let daemon = scene.start_daemon(scene.tidegate_through(&limited), &["--firewall=none"]);
    scene.up(file);
    let logged = || scene.succeeds(&["logs", "-p", "limits"]).contains("limits 1900 2900\n");
    assert!(eventually(SOON, logged), "{}", scene.succeeds(&["logs", "-p", "limits"]));
    let own = fs::read_to_string(format!("/proc/{}/limits", daemon.pid())).unwrap();
    let own = own.lines().find(|line| line.starts_with("Max open files")).unwrap();
    assert!(!own.contains(" 1900 "), "{own}");
    scene.succeeds(&["down", "limits"]);

    let mut up = scene.tidegate_through(&limited);
    up.args(["up", "--metrics=none", "--firewall=none", "-f", &scene.file(file)]);
    let up = Process::spawn(up.env("TIDEGATE_SOCKET", scene.run.path().join("other.sock")));
    up.wait_for_line("limits 1900 2900", SOON);
}

/// The kernel kills the services of a killed supervisor process.
#[test]
fn services_of_a_killed_supervisor_are_started_again() {
    let scene = Background::new();
    let mut daemon = scene.daemon(&["--firewall=nftables"]);
    scene.up(SHOP);
    assert!(eventually(SOON, || scene.answers()));
    let before = scene.processes();
    let kill = || {
        let [pid] = scene.supervisors()[..] else { panic!("one supervisor") };
        let pid = rustix::process::Pid::from_raw(pid).unwrap();
        rustix::process::kill_process(pid, Signal::KILL).unwrap();
    };
    kill();
    let again = || {
        let now = scene.processes();
        now.len() == 2 && now.iter().all(|(name, pid)| before[name] != *pid)
    };
    assert!(eventually(2 * SOON, again), "{:?}", scene.processes());
    assert!(eventually(SOON, || scene.answers()));

    // As after a restart of the host: neither a daemon nor a supervisor.
    daemon.stop(Signal::KILL, SOON);
    kill();
    let _daemon = scene.daemon(&["--firewall=nftables"]);
    assert!(eventually(2 * SOON, || scene.processes().len() == 2 && scene.answers()));
    scene.succeeds(&["down", "shop"]);
}

#[test]
fn logs_are_printed_and_followed() {
    let scene = Background::new();
    let _daemon = scene.daemon(&["--firewall=none"]);
    let file = "
name: shop
services:
  chatty:
    command: sh -c 'for n in 1 2 3; do echo line $$n; done; echo oops >&2; while [ ! -e GO ]; do sleep 0.05; done; echo later; sleep 60'
  quiet: { command: sleep 60 }
";
    let go = scene.directory.path().join("go");
    scene.up(&file.replace("GO", go.to_str().unwrap()));
    let printed = || scene.succeeds(&["logs", "-p", "shop", "chatty"]);
    assert!(eventually(SOON, || printed() == "chatty | line 1\nchatty | line 2\nchatty | line 3\n"));
    let error = scene.tidegate().args(["logs", "chatty"]).output().unwrap().stderr;
    assert_eq!(String::from_utf8_lossy(&error), "chatty | oops\n", "to standard error");
    let json = scene.succeeds(&["logs", "--json", "-n", "1"]);
    let line: Value = serde_json::from_str(&json).unwrap();
    assert_eq!((&line["service"], &line["stream"]), (&"chatty".into(), &"stderr".into()));

    let mut command = scene.tidegate();
    let follower = Process::spawn(command.args(["logs", "-f", "--tail", "0"]));
    // Not only what was written before.
    std::thread::sleep(Duration::from_millis(300));
    fs::write(&go, "").unwrap();
    follower.wait_for_line("chatty | later", SOON);
    scene.succeeds(&["down"]);
    let mut follower = follower;
    assert!(follower.wait(SOON).success(), "it ends with the project");
}

/// The objects of a project are added before its services run, and removed afterwards.
#[test]
fn events_report_the_objects_and_services_of_a_project() {
    let scene = Background::new();
    let _daemon = scene.daemon(&["--firewall=none"]);
    let mut command = scene.tidegate();
    let mut listener = Process::spawn(command.args(["events", "--json"]));
    std::thread::sleep(Duration::from_millis(300));
    scene.up(SHOP);
    // Changes that follow each other at once are combined.
    listener.wait_for_line("\"name\":\"shop/web\",\"state\":\"running\"", SOON);
    scene.succeeds(&["down", "shop"]);
    // The last event: objects are removed in the reverse order of their kinds.
    listener.wait_for_line("\"removed\",\"kind\":\"network\",\"name\":\"shop/back\"", SOON);
    let printed = listener.output();
    let events: Vec<Value> =
        printed.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let position = |change: &str, kind: &str, name: &str| {
        let is =
            |one: &Value| one["change"] == change && one["kind"] == kind && one["name"] == name;
        events.iter().position(is).unwrap_or_else(|| panic!("{change} {kind} {name}: {printed}"))
    };
    let running = |one: &Value| one["name"] == "shop/web" && one["service"]["state"] == "running";
    let running = events.iter().position(running).unwrap();
    for (kind, name) in [
        ("network", "shop/front"),
        ("endpoint", "shop/web"),
        ("port", "0.0.0.0:8080/tcp"),
        ("project", "shop"),
        ("service", "shop/web"),
    ] {
        let (added, removed) = (position("added", kind, name), position("removed", kind, name));
        // The first event of a service may be that it runs.
        assert!(added <= running && running < removed, "{kind} {name}: {printed}");
    }
    listener.stop(Signal::TERM, SOON);
}

#[test]
fn a_command_runs_in_the_namespaces_of_a_service() {
    let scene = Background::new();
    let _daemon = scene.daemon(&["--firewall=none"]);
    scene.up(SHOP);
    let inside =
        scene.succeeds(&["exec", "shop/web", "sh", "-c", "echo $COLOUR $(hostname) $PPID"]);
    assert_eq!(inside, "green web 0\n", "environment, UTS and PID namespace");
    assert!(scene.succeeds(&["exec", "db", "ip", "address"]).contains("10.77.2.9/24"));
    // Descriptors that the caller has left open are not for the service.
    let file = fs::File::open("/etc/passwd").unwrap();
    rustix::io::fcntl_setfd(&file, rustix::io::FdFlags::empty()).unwrap();
    let open = scene.succeeds(&["exec", "db", "ls", "-l", "/proc/self/fd"]);
    assert!(open.contains(" 0 -> ") && !open.contains("/etc/passwd"), "{open}");
    let code =
        |args: &[&str]| scene.tidegate().arg("exec").args(args).output().unwrap().status.code();
    assert_eq!(code(&["db", "sh", "-c", "exit 7"]), Some(7));
    assert_eq!(code(&["db", "sh", "-c", "kill -TERM $$"]), Some(143));
    assert_eq!(code(&["db", "no-such-program"]), Some(127));
    assert_eq!(
        scene.fails(&["exec", "cart", "true"]),
        "there is no service \"cart\"; tidegate ps lists the services"
    );
    scene.succeeds(&["down", "shop"]);
}

#[test]
fn two_projects_have_the_same_service_names_and_are_isolated() {
    let scene = Background::new();
    let _daemon = scene.daemon(&["--firewall=nftables"]);
    scene.up(SHOP);
    let other = SHOP.replace("shop", "stall").replace("8080", "8081");
    scene.up(&other.replace("10.77.1", "10.78.1").replace("10.77.2", "10.78.2"));
    assert_eq!(scene.processes().len(), 4);
    let ambiguous = scene.tidegate().args(["exec", "web", "true"]).output().unwrap();
    assert_eq!(ambiguous.status.code(), Some(2));
    let line = String::from_utf8_lossy(&ambiguous.stderr).into_owned();
    assert!(line.contains("name one of the services shop/web, stall/web"), "{line}");
    let reaches = |project: &str, address: &str| {
        let mut exec = scene.tidegate();
        exec.args(["exec", &format!("{project}/web"), "ping", "-c", "1", "-W", "1", address]);
        exec.output().unwrap().status.success()
    };
    assert!(reaches("shop", "10.77.2.9") && reaches("stall", "10.78.2.9"));
    assert!(!reaches("shop", "10.78.2.9") && !reaches("stall", "10.77.2.9"));
    scene.succeeds(&["down", "shop"]);
    assert_eq!(scene.processes().len(), 2, "the other one continues");
    scene.succeeds(&["down", "stall"]);
}

#[test]
fn errors_name_the_object_and_leave_nothing_behind() {
    let scene = Background::new();
    let line = scene.fails(&["up", "-d", "-f", &scene.file(SHOP)]);
    assert!(line.contains("start tidegate daemon first"), "{line}");
    let _daemon = scene.daemon(&["--firewall=nftables"]);
    let before = state(&scene.net.host);
    let fails = |file: &str| scene.fails(&["up", "-d", "-f", &scene.file(file)]);
    let unchanged = || {
        assert_eq!(state(&scene.net.host), before);
        assert_eq!(scene.supervisors(), [0; 0]);
        assert_eq!(get(&scene.socket(), "/v1/projects").1, Value::Array(vec![]));
    };

    let missing = SHOP.replace("command: sh -c", "command: /no/such/program -c");
    let line = fails(&missing);
    assert!(line.contains("\"db\"") && line.contains("/no/such/program"), "{line}");
    unchanged();

    let holder = scene.net.host.run(|| std::net::TcpListener::bind("0.0.0.0:8080")).unwrap();
    let line = fails(SHOP);
    assert!(line.contains("8080/tcp on 0.0.0.0 is in use"), "{line}");
    drop(holder);
    unchanged();

    let taken = SHOP.replace("10.77.1.0/24", "203.0.113.0/24");
    let line = fails(&taken);
    assert!(line.contains("network shop/front: subnet 203.0.113.0/24 overlaps"), "{line}");
    unchanged();

    scene.up(SHOP);
    assert_eq!(fails(SHOP), "project shop is up already; take it down first (tidegate down shop)");
    let line = scene.fails(&["logs", "-p", "shop", "cart"]);
    assert_eq!(line, "project shop has no service \"cart\" with a command; it has web, db");
    let line = scene.fails(&["down", "stall"]);
    assert!(line.starts_with("project stall is not up in the background"), "{line}");
    let usage = scene.tidegate().args(["up", "-d", "--firewall=none"]).output().unwrap();
    assert_eq!(usage.status.code(), Some(2), "options of the daemon");
    // A part of a project is changed with its project only.
    let (status, _) = ask(&scene.socket(), "DELETE", "/v1/endpoints/shop%2Fweb", "");
    assert_eq!(status, 400);
    let moved = r#"{ "netns": "/proc/self/ns/net" }"#;
    let target = "/v1/endpoints/shop%2Fweb/namespace";
    let (status, answer) = ask(&scene.socket(), "PUT", target, moved);
    let line = "endpoint shop/web belongs to project shop, and is changed with it only";
    assert_eq!((status, &answer["error"]), (409, &line.into()));
    let port = &get(&scene.socket(), "/v1/ports").1[0]["id"];
    let (status, answer) = ask(&scene.socket(), "DELETE", &format!("/v1/ports/{port}"), "");
    assert_eq!((status, &answer["error"]), (409, &line.into()));
    scene.succeeds(&["down", "shop"]);
    unchanged();
}

/// The daemon is killed while it brings a project up or takes it down. The next one has all of the
/// project or nothing of it.
#[test]
fn a_kill_while_a_project_is_changed_leaves_all_or_nothing_of_it() {
    let scene = Background::new();
    let flags = ["--firewall=nftables"];
    let mut daemon = scene.daemon(&flags);
    let before = state(&scene.net.host);
    let file = scene.file(SHOP);
    let is_up = || {
        let (_, projects) = get(&scene.socket(), "/v1/projects");
        projects.as_array().is_some_and(|all| !all.is_empty())
    };
    let (mut kept, mut lost) = (0, 0);
    for (turn, delay) in [5, 20, 40, 70, 100, 140, 180, 230, 300, 500].into_iter().enumerate() {
        let is_removal = turn % 3 == 2;
        if is_removal != is_up() {
            match is_removal {
                true => drop(scene.up(SHOP)),
                false => drop(scene.succeeds(&["down", "shop"])),
            }
        }
        let mut command = scene.tidegate();
        match is_removal {
            true => command.args(["down", "shop"]),
            false => command.args(["up", "-d", "-f", &file]),
        };
        let mut client = Process::spawn(&mut command);
        std::thread::sleep(Duration::from_millis(delay));
        daemon.stop(Signal::KILL, SOON);
        client.wait(SOON);
        daemon = scene.daemon(&flags);
        if is_up() {
            kept += 1;
            let runs = eventually(2 * SOON, || scene.processes().len() == 2);
            assert!(runs, "{delay} ms: {}", daemon.output());
            let answers = eventually(SOON, || scene.answers());
            assert!(answers, "{delay} ms: {}\n{}", daemon.output(), scene.succeeds(&["ps"]));
            assert_eq!(scene.supervisors().len(), 1, "{delay} ms");
        } else {
            lost += 1;
            assert!(eventually(SOON, || scene.supervisors().is_empty()), "{delay} ms");
            let removed = eventually(SOON, || state(&scene.net.host) == before);
            assert!(removed, "{delay} ms:\n{}instead of\n{before}", state(&scene.net.host));
        }
    }
    assert!(kept > 0 && lost > 0, "{kept} up, {lost} down");
    if is_up() {
        scene.succeeds(&["down", "shop"]);
    }
    assert_eq!(state(&scene.net.host), before);
}
