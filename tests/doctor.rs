//! `tidegate doctor` on a real kernel: as root, as an ordinary user, and with hidden resources.

use serde_json::Value;
use std::fs;
use std::net::{TcpListener, UdpSocket};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;
use tempfile::TempDir;
use tidegate_testbed::{Mounts, Namespace, Process, Protocol, require_program};

/// Arguments for setpriv(1).
const AS_NOBODY: [&str; 3] = ["--reuid=65534", "--regid=65534", "--clear-groups"];

/// A separate host, and the program where all users can run it.
struct Scene {
    host: Namespace,
    directory: TempDir,
}

/// The output of the doctor.
struct Report {
    code: Option<i32>,
    text: String,
}

impl Scene {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let open = |path: PathBuf, mode| {
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        };
        open(directory.path().into(), 0o755);
        fs::copy(env!("CARGO_BIN_EXE_tidegate"), directory.path().join("tidegate")).unwrap();
        fs::create_dir(directory.path().join("run")).unwrap();
        open(directory.path().join("run"), 0o777);
        Self { host: Namespace::new(), directory }
    }

    fn run(&self, mut command: Command, arguments: &[&str]) -> Report {
        command.env("TIDEGATE_RUN_DIR", self.directory.path().join("run"));
        let output = command.args(arguments).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
        Report { code: output.status.code(), text }
    }

    fn as_root(&self, host: &Namespace, arguments: &[&str]) -> Report {
        self.run(host.command(self.directory.path().join("tidegate").to_str().unwrap()), arguments)
    }

    fn as_nobody(&self, host: &Namespace, arguments: &[&str]) -> Report {
        require_program("setpriv");
        let mut command = host.command("setpriv");
        command.args(AS_NOBODY).arg(self.directory.path().join("tidegate"));
        self.run(command, arguments)
    }

    /// The network state of the host.
    fn state(&self) -> String {
        let commands: [&[&str]; 4] =
            [&["-o", "addr"], &["route", "show", "table", "all"], &["rule"], &["-6", "rule"]];
        commands.iter().map(|args| self.host.ip(args)).collect()
    }
}

/// The checks in the output of `--json`.
#[track_caller]
fn checks(report: &Report) -> Vec<Value> {
    let json: Value = serde_json::from_str(&report.text)
        .unwrap_or_else(|error| panic!("{error}: {}", report.text));
    json["checks"].as_array().unwrap().clone()
}

#[track_caller]
fn check(report: &Report, name: &str) -> Value {
    checks(report)
        .into_iter()
        .find(|row| row["check"] == name)
        .unwrap_or_else(|| panic!("no {name}: {}", report.text))
}

#[track_caller]
fn verdict(report: &Report, name: &str) -> String {
    check(report, name)["verdict"].as_str().unwrap().to_owned()
}

const JSON: [&str; 2] = ["doctor", "--json"];

#[test]
fn root_on_this_machine_has_everything_required_and_no_state_is_left() {
    let scene = Scene::new();
    let before = scene.state();
    let report = scene.as_root(&scene.host, &JSON);
    assert_eq!(report.code, Some(0), "{}", report.text);
    for name in ["kernel", "network-namespaces", "networks", "tun", "low-ports", "run-directory"] {
        assert_eq!(verdict(&report, name), "ok", "{}", report.text);
    }
    assert_eq!(scene.state(), before);
    let made = fs::read_dir(scene.directory.path().join("run")).unwrap().count();
    assert_eq!(made, 0, "no directory is created");
}

#[test]
fn the_table_has_the_same_rows_as_the_json() {
    let scene = Scene::new();
    let table = scene.as_root(&scene.host, &["doctor"]);
    let json = scene.as_root(&scene.host, &JSON);
    assert_eq!(table.code, json.code);
    let (head, counts) = table.text.split_once("\n\n").unwrap();
    let rows: Vec<(String, String)> = head
        .lines()
        .skip(1)
        .filter(|line| !line.starts_with(' '))
        .map(|line| {
            let mut words = line.split_whitespace().map(str::to_owned);
            (words.next().unwrap(), words.next().unwrap())
        })
        .collect();
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let expected: Vec<_> =
        checks(&json).iter().map(|row| (text(&row["check"]), text(&row["verdict"]))).collect();
    assert_eq!(rows, expected);
    assert!(counts.contains(" ok, "), "{counts}");
}

#[test]
fn an_ordinary_user_gets_the_checks_that_require_root() {
    let scene = Scene::new();
    let report = scene.as_nobody(&scene.host, &JSON);
    assert_eq!(report.code, Some(0), "{}", report.text);
    let namespaces = check(&report, "network-namespaces");
    assert_eq!(namespaces["verdict"], "limited");
    assert!(namespaces["fix"].as_str().unwrap().contains("run as root"), "{namespaces}");
    assert_eq!(verdict(&report, "user-namespaces"), "ok");
    assert_eq!(verdict(&report, "networks"), "ok", "within a user namespace: {}", report.text);
    assert_eq!(verdict(&report, "low-ports"), "limited");
}

#[test]
fn a_user_without_any_namespace_has_missing_checks() {
    let scene = Scene::new();
    require_program("unshare");
    // In a user namespace that permits no nested ones, and without capabilities.
    let mut command = scene.host.command("unshare");
    command.args(["--user", "--map-root-user", "sh", "-c"]);
    command.arg(
        "echo 0 > /proc/sys/user/max_user_namespaces && exec setpriv --bounding-set=-all --inh-caps=-all \"$0\" \"$@\"",
    );
    command.arg(scene.directory.path().join("tidegate"));
    let report = scene.run(command, &JSON);
    assert_eq!(report.code, Some(1), "{}", report.text);
    assert_eq!(verdict(&report, "network-namespaces"), "missing");
    assert_eq!(
        check(&report, "user-namespaces")["fix"],
        "sysctl -w user.max_user_namespaces=10000"
    );
}

#[test]
fn root_in_a_user_namespace_on_the_host_network_is_not_treated_as_root() {
    let scene = Scene::new();
    let mut command = scene.host.command("unshare");
    command.args(["--user", "--map-root-user"]).arg(scene.directory.path().join("tidegate"));
    let report = scene.run(command, &JSON);
    assert_eq!(verdict(&report, "network-namespaces"), "limited", "{}", report.text);
    assert_eq!(report.code, Some(0), "{}", report.text);
}

#[test]
fn services_on_all_addresses_are_listed_with_their_processes() {
    let scene = Scene::new();
    let report = scene.as_root(&scene.host, &JSON);
    assert_eq!(verdict(&report, "host-services"), "ok");
    let _sockets = scene.host.run(|| {
        let tcp = ["0.0.0.0:7001", "[::]:7002", "127.0.0.1:7003"]
            .map(|at| TcpListener::bind(at).unwrap());
        let udp = UdpSocket::bind("0.0.0.0:7004").unwrap();
        let connected = UdpSocket::bind("0.0.0.0:7005").unwrap();
        connected.connect("127.0.0.1:9").unwrap();
        (tcp, udp, connected)
    });
    let me = format!("(pid {})", std::process::id());
    let row = check(&scene.as_root(&scene.host, &JSON), "host-services");
    assert_eq!(row["verdict"], "note");
    let details: Vec<&str> =
        row["details"].as_array().unwrap().iter().map(|one| one.as_str().unwrap()).collect();
    let ports: Vec<&str> = details.iter().map(|line| line.split(':').next().unwrap()).collect();
    assert_eq!(ports, ["7001/tcp", "7002/tcp", "7004/udp"]);
    assert!(details.iter().all(|line| line.ends_with(&me)), "{details:?}");
    // An ordinary user sees the ports, but not the processes.
    let row = check(&scene.as_nobody(&scene.host, &JSON), "host-services");
    assert_eq!(row["details"][0], "7001/tcp: process not visible to this user");
}

#[test]
fn published_ports_of_a_project_are_not_listed() {
    let scene = Scene::new();
    let container = Namespace::new();
    let file = scene.directory.path().join("compose.yaml");
    let project =
        "name: demo\nservices: { box: { x-netns: PATH, ports: [ '8080:80', '8080:80/udp' ] } }\n";
    fs::write(&file, project.replace("PATH", &container.path().display().to_string())).unwrap();
    let mut command = scene.host.command(scene.directory.path().join("tidegate").to_str().unwrap());
    command.env("TIDEGATE_RUN_DIR", scene.directory.path().join("run"));
    command.args(["up", "--metrics", "none", "-f"]).arg(&file);
    let up = Process::spawn(&mut command);
    up.wait_for_line("Ctrl-C takes", Duration::from_secs(10));
    assert!(scene.host.is_bound(Protocol::Tcp, 8080));
    let row = check(&scene.as_root(&scene.host, &JSON), "host-services");
    assert_eq!(row["verdict"], "ok", "{row}");
}

#[test]
fn forwarding_and_overlapping_routes_are_reported() {
    let scene = Scene::new();
    scene.host.sysctl("net.ipv4.ip_forward", "0");
    scene.host.sysctl("net.ipv6.conf.all.forwarding", "0");
    let report = scene.as_root(&scene.host, &JSON);
    assert_eq!(
        (verdict(&report, "ip-forward"), verdict(&report, "address-pools")),
        ("ok".into(), "ok".into())
    );
    scene.host.sysctl("net.ipv4.ip_forward", "1");
    scene.host.ip_all(
        "link add far type bridge
         link set far up
         route add 172.28.0.0/24 dev far",
    );
    let report = scene.as_root(&scene.host, &JSON);
    assert_eq!(verdict(&report, "ip-forward"), "note");
    assert!(
        check(&report, "ip-forward")["found"].as_str().unwrap().starts_with("on (IPv4)"),
        "{}",
        report.text
    );
    assert_eq!(check(&report, "address-pools")["details"][0], "172.28.0.0/24 via far");
    assert_eq!(report.code, Some(0), "neither is required");
}

#[test]
fn hidden_devices_are_reported() {
    let scene = Scene::new();
    let without =
        |path: &str| scene.host.with_mounts(Mounts::builder().tmpfs(path).build(&scene.host));
    let report = scene.as_root(&without("/dev/net"), &JSON);
    assert_eq!(verdict(&report, "tun"), "limited", "{}", report.text);
    assert!(
        check(&report, "tun")["found"].as_str().unwrap().starts_with("/dev/net/tun: No such file")
    );
    assert_eq!(report.code, Some(0));
}

#[test]
fn without_proc_undetermined_checks_say_so() {
    let scene = Scene::new();
    require_program("unshare");
    let all = ["ip-forward", "network-namespaces", "address-pools", "host-services"];
    for (path, hidden) in [("/proc", &all[..]), ("/proc/sys", &all[..1])] {
        let mut command = scene.host.command("unshare");
        command.args(["--mount", "sh", "-c", "mount -t tmpfs none \"$0\" && exec \"$@\"", path]);
        command.arg(scene.directory.path().join("tidegate"));
        let report = scene.run(command, &JSON);
        for name in all {
            let found = check(&report, name)["found"].as_str().unwrap().to_owned();
            assert_eq!(
                found.starts_with("cannot tell: "),
                hidden.contains(&name),
                "{path}: {name}: {found}"
            );
            assert!(!found.contains("os error"), "{found}");
        }
        assert_eq!(verdict(&report, "kernel"), "ok");
    }
}

#[test]
fn an_unwritable_run_directory_is_missing() {
    let scene = Scene::new();
    let run = scene.directory.path().join("run");
    fs::set_permissions(&run, fs::Permissions::from_mode(0o555)).unwrap();
    let report = scene.as_nobody(&scene.host, &JSON);
    assert_eq!(verdict(&report, "run-directory"), "missing");
    assert_eq!(report.code, Some(1));
}
