//! One instance per socket, and stale sockets.

use super::ask::get;
use crate::scene::{Scene, TIDEGATE, refused, state};
use crate::{SOON, project};
use serde_json::Value;
use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use tidegate_testbed::{Process, Signal};

/// The user id of nobody.
const NOBODY: u32 = 65_534;

/// Runs a command that must exit with 1, one line on standard error and an empty standard output.
#[track_caller]
fn says(command: &mut Command) -> String {
    let output = command.stdin(Stdio::null()).output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(
        (output.status.code(), output.stdout.len(), stderr.lines().count()),
        (Some(1), 0, 1),
        "{stderr}"
    );
    stderr
}

#[test]
fn a_second_project_on_the_same_socket_is_refused_and_on_another_one_starts() {
    let scene = Scene::new();
    let up = scene.up(&project());
    up.wait_for_line("Ctrl-C takes", SOON);
    let before = state(&scene.net.host);
    let other =
        "name: other\nservices: { web: { command: [ sleep, '60' ], ports: [ '9090:80' ] } }\n";
    let error = scene.refused(other);
    assert_eq!(
        error,
        format!(
            "tidegate: error: tidegate is up already (process {}, socket {}); stop that one, or set TIDEGATE_SOCKET to another path\n",
            up.pid(),
            scene.socket().display()
        )
    );
    assert_eq!(state(&scene.net.host), before);
    assert!(!scene.run.path().join("projects/other").exists());

    let second = scene.run.path().join("second.sock");
    let beside = Process::spawn(scene.command(other).env("TIDEGATE_SOCKET", &second));
    beside.wait_for_line("Ctrl-C takes", SOON);
    assert_eq!(get(&scene.socket(), "/v1/status").1["project"], "demo");
    let output =
        scene.tidegate().args(["ps", "--json"]).env("TIDEGATE_SOCKET", &second).output().unwrap();
    assert!(String::from_utf8(output.stdout).unwrap().contains("\"project\": \"other\""));
}

/// Without settings, a daemon and two projects have sockets and metrics of their own. The commands
/// find all of them, and killed instances are not among them.
#[test]
fn a_daemon_and_projects_run_side_by_side_and_are_found() {
    let mut scene = Scene::new();
    scene.metrics = "127.0.0.1:9464-9474";
    let run = |arguments: &[&str]| {
        let mut tidegate = scene.tidegate();
        let output = tidegate.env_remove("TIDEGATE_SOCKET").args(arguments).output().unwrap();
        let error = String::from_utf8(output.stderr).unwrap();
        (output.status.code(), String::from_utf8(output.stdout).unwrap(), error)
    };
    let start = |name: &str| {
        let file = format!(
            "name: {name}\nservices: {{ {name}-box: {{ command: [ sleep, '60' ], ports: [ '80' ] }} }}\n"
        );
        let up = Process::spawn(scene.command(&file).env_remove("TIDEGATE_SOCKET"));
        up.wait_for_line("Ctrl-C takes", SOON);
        up
    };
    let table = |text: &str| {
        let rows = text.lines().skip(1).map(|row| row.split_whitespace().next().unwrap());
        rows.map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(table(&run(&["ls"]).1), [""; 0]);
    let mut one = start("one");
    assert_eq!(table(&run(&["ls"]).1), ["one"]);
    assert!(run(&["network", "ls"]).1.contains("default"), "the only instance answers");
    let again = "name: one\nservices: { one-box: { command: [ sleep, '60' ] } }\n";
    assert_eq!(
        refused(scene.command(again).env_remove("TIDEGATE_SOCKET")),
        format!(
            "tidegate: error: project \"one\" is up already (process {}); stop that one, or choose another name\n",
            one.pid()
        )
    );
    let mut two = start("two");
    let several = run(&["top", "--once"]);
    let socket = scene.run.path().join("projects/one/api.sock");
    let expected = format!(
        "tidegate: error: several projects are up (one, two); set TIDEGATE_SOCKET to the socket of one, such as {}\n",
        socket.display()
    );
    assert_eq!(several, (Some(1), String::new(), expected));
    assert!(run(&["top", "two", "--once"]).1.contains("two-box"));
    let mut daemon = scene.tidegate();
    daemon.env_remove("TIDEGATE_SOCKET").args(["daemon", "--metrics", scene.metrics, "--state"]);
    let daemon = Process::spawn(daemon.arg(scene.run.path().join("state")));
    daemon.wait_for_line("tidegate daemon is up", SOON);
    assert_eq!(table(&run(&["ls"]).1), ["daemon", "one", "two"]);
    assert_eq!(run(&["network", "create", "front", "--subnet", "10.61.0.0/24"]).0, Some(0));
    let (_, all, _) = run(&["ps"]);
    for (name, process) in [("daemon", &daemon), ("one", &one), ("two", &two)] {
        assert!(all.contains(&format!("{name} (process {})\n", process.pid())), "{all}");
    }
    assert!(all.contains("one-box") && all.contains("two-box") && all.contains("10.61.0.0/24"));
    let (_, only, _) = run(&["ps", "two"]);
    assert!(only.contains("two-box") && !only.contains("one-box"), "{only}");
    let json: Value = serde_json::from_str(&run(&["ls", "--json"]).1).unwrap();
    let metrics = (0..3).map(|index| json[index]["status"]["metrics"]["served"].clone());
    let metrics: BTreeSet<String> = metrics.map(|one| one.to_string()).collect();
    assert_eq!(metrics.len(), 3, "{metrics:?}");
    assert_eq!(json[1]["socket"], socket.to_str().unwrap());

    two.stop(Signal::KILL, SOON);
    assert_eq!(table(&run(&["ls"]).1), ["daemon", "one"]);
    let killed = run(&["ps", "two"]).2;
    assert!(
        killed.starts_with("tidegate: error: tidegate is not running: no listener on"),
        "{killed}"
    );
    let mut two = start("two");
    two.stop(Signal::INT, SOON);
    one.stop(Signal::INT, SOON);
    assert!(!socket.exists());
    assert_eq!(table(&run(&["ls"]).1), ["daemon"]);
}

#[test]
fn the_socket_of_a_killed_instance_is_taken_over() {
    let scene = Scene::new();
    let mut up = scene.up(&project());
    up.wait_for_line("Ctrl-C takes", SOON);
    up.stop(Signal::KILL, SOON);
    assert!(scene.socket().exists(), "a killed process cannot clean up");
    let stderr = says(scene.tidegate().arg("ps"));
    assert!(
        stderr.starts_with("tidegate: error: tidegate is not running: no listener on socket "),
        "{stderr}"
    );
    let mut next = scene.up(&project());
    next.wait_for_line("Ctrl-C takes", SOON);
    assert_eq!(get(&scene.socket(), "/v1/status").1["pid"], next.pid());
    next.stop(Signal::INT, SOON);
    assert!(!scene.socket().exists());
    let stderr = says(scene.tidegate().arg("ps"));
    assert!(stderr.starts_with("tidegate: error: tidegate is not running: socket "), "{stderr}");
}

#[test]
fn the_socket_is_private_to_its_user() {
    let scene = Scene::new();
    let open = std::fs::Permissions::from_mode(0o755);
    std::fs::set_permissions(scene.run.path(), open).unwrap();
    let up = scene.up(&project());
    up.wait_for_line("Ctrl-C takes", SOON);
    let mode = std::fs::metadata(scene.socket()).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o600);
    let mut nobody = Command::new(TIDEGATE);
    nobody.arg("ps").env("TIDEGATE_SOCKET", scene.socket()).uid(NOBODY).gid(NOBODY);
    let stderr = says(&mut nobody);
    assert!(stderr.starts_with("tidegate: error: permission denied for socket "), "{stderr}");
}

#[test]
fn a_file_that_is_not_a_socket_is_left_alone() {
    let scene = Scene::new();
    let file = scene.directory.path().join("file");
    std::fs::write(&file, "kept").unwrap();
    let error = refused(scene.command(&project()).env("TIDEGATE_SOCKET", &file));
    assert!(error.contains("exists and is not a socket of tidegate"), "{error}");
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "kept");
}
