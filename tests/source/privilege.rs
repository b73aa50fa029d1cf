//! Without the required privilege, one line with the cause is printed and nothing is changed.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};

use tidegate_testbed::{Process, Protocol, require_program};

use crate::scene::{SOON, Scene};

/// The user id of nobody.
const NOBODY: u32 = 65_534;

#[test]
fn an_ordinary_user_cannot_show_clients_to_an_address() {
    let scene = Scene::new();
    let text = refused(&scene, &AS_NOBODY, &["--to", "172.30.0.2", "--source", "client"]);
    assert!(text.contains("CAP_NET_ADMIN"), "{text}");
}

#[test]
fn an_ordinary_user_cannot_enter_the_namespace_of_its_own_process() {
    let scene = Scene::new();
    let mut resident = scene.net.container.command("setpriv");
    resident.args(AS_NOBODY).args(["sh", "-c", "echo in; exec sleep 600"]);
    let resident = Process::spawn(&mut resident);
    resident.wait_for_line("in", SOON);
    let pid = resident.pid().to_string();
    for source in [&["--source", "client"][..], &[]] {
        let text = refused(&scene, &AS_NOBODY, &[&["--pid", &pid], source].concat());
        assert!(text.contains("CAP_SYS_ADMIN") || text.contains("CAP_NET_ADMIN"), "{text}");
    }
}

#[test]
fn an_ordinary_user_cannot_open_the_namespace_of_another() {
    let scene = Scene::new();
    let path = scene.net.container.path().display().to_string();
    let text = refused(&scene, &AS_NOBODY, &["--netns", &path, "--source", "client"]);
    assert!(text.contains("no permission to open namespace"), "{text}");
}

#[test]
fn root_without_the_capability_gets_an_error_that_names_it() {
    let scene = Scene::new();
    let path = scene.net.container.path().display().to_string();
    let targets = [
        &["--netns", path.as_str()][..],
        &["--netns", path.as_str(), "--source", "client"],
        &["--netns", path.as_str(), "--source", "proxy"],
        &["--to", "172.30.0.2", "--source", "client"],
        &["--to", "fd30::2", "--source", "client"],
    ];
    for target in targets {
        let text = refused(&scene, &["--bounding-set=-net_admin"], target);
        assert!(text.contains("CAP_NET_ADMIN"), "{target:?}: {text}");
    }
}

/// Arguments for setpriv(1).
const AS_NOBODY: [&str; 3] = ["--reuid=65534", "--regid=65534", "--clear-groups"];

/// Publishes with the privileges that setpriv(1) leaves. Expects a failure without traces, and
/// returns its line.
#[track_caller]
fn refused(scene: &Scene, privileges: &[&str], target: &[&str]) -> String {
    require_program("setpriv");
    // A directory that all users can access.
    let directory = tempfile::tempdir().expect("make a directory");
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let program = directory.path().join("tidegate");
    fs::copy(env!("CARGO_BIN_EXE_tidegate"), &program).expect("copy the binary");
    let run = directory.path().join("run");
    fs::create_dir(&run).unwrap();
    fs::set_permissions(&run, fs::Permissions::from_mode(0o755)).unwrap();
    if privileges == AS_NOBODY {
        chown(&run, Some(NOBODY), Some(NOBODY)).unwrap();
    }
    let before = scene.state();

    let mut command = scene.command("setpriv");
    command.args(privileges).arg(&program).args(["publish", "8080:80", "8080:80/udp"]).args(target);
    command.env("TIDEGATE_RUN_DIR", &run);
    let mut process = Process::spawn(&mut command);
    let status = process.wait(SOON);
    let text = process.wait_for_output(SOON);
    assert_eq!(status.code(), Some(1), "{target:?}: {text}");
    assert_eq!(text.lines().count(), 1, "{target:?}: {text}");
    assert!(text.starts_with("tidegate: error: "), "{target:?}: {text}");
    assert!(
        text.matches("Operation not permitted").count() <= 1,
        "{target:?}: it repeats itself: {text}"
    );

    scene.assert_untouched(&before, &format!("{target:?}"));
    let journals = fs::read_dir(run.join("policy")).map_or(0, Iterator::count);
    assert_eq!(journals, 0, "{target:?}");
    assert!(!scene.net.host.is_bound(Protocol::Tcp, 8080));
    text
}
