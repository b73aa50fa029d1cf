//! Name services of the host are hidden from services.

use super::*;
use rustix::mount::{MountFlags, mount};
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;

/// Variable with the run directory of [`supervisor_with_name_services`]. Without it, that test does
/// nothing.
const BESIDE_RUN_DIR: &str = "TIDEGATE_TEST_BESIDE_RUN_DIR";

/// Not a test by itself: a supervisor with name services in its own mount namespace, for the tests
/// below.
#[test]
fn supervisor_with_name_services() {
    let Some(run_dir) = std::env::var_os(BESIDE_RUN_DIR) else { return };
    for directory in ["/run", "/etc"] {
        mount("tmpfs", directory, "tmpfs", MountFlags::empty(), c"mode=0755").unwrap();
    }
    let listen = |path: &str| {
        fs::create_dir_all(Path::new(path).parent().unwrap()).unwrap();
        UnixListener::bind(path).unwrap()
    };
    let _sockets =
        ["/run/nscd/socket", "/run/avahi-daemon/socket", "/run/systemd/resolve/io.systemd.Resolve"]
            .map(listen);
    fs::write("/run/systemd/resolve/stub-resolv.conf", "nameserver 127.0.0.53\n").unwrap();
    symlink("/run/systemd/resolve/stub-resolv.conf", "/etc/resolv.conf").unwrap();
    fs::write("/etc/hosts", "").unwrap();
    fs::write("/etc/hostname", "").unwrap();
    fs::write("/etc/nsswitch.conf", "passwd: files\nhosts: resolve [!UNAVAIL=return] sss dns\n")
        .unwrap();
    let script = r#"
        find /run/nscd /run/avahi-daemon /run/systemd/resolve
        cat /etc/resolv.conf /etc/nsswitch.conf
        touch /run/nscd/mine 2>/dev/null || echo closed
        echo first
        hidden() { while [ -n "$(find $1 -type s)" ]; do sleep 0.01; done; echo "hidden $1"; }
        until [ -d /run/nslcd ]; do sleep 0.01; done; hidden /run/nslcd
        until [ -e /run/again ]; do sleep 0.01; done; hidden /run/nscd; hidden /run/systemd/resolve
        cat /etc/resolv.conf
        echo again
        changed() { until grep -q "^nameserver 127.0.0.11" /etc/resolv.conf \
            && grep -q "^hosts: files dns" /etc/nsswitch.conf; do sleep 0.01; done; }
        until [ -e /run/replaced ]; do sleep 0.01; done; changed; echo kept
        echo last"#;
    let lines = Lines::default();
    run(async {
        let mut supervisor = supervisor(Path::new(&run_dir), lines.clone(), FOREVER);
        let web = shell_in(namespace_for_service(), "web", script);
        supervisor.start(vec![web]).await.unwrap();
        lines.wait_for("web | first").await;
        // A daemon that starts later.
        let _later = listen("/run/made/socket");
        fs::rename("/run/made", "/run/nslcd").unwrap();
        lines.wait_for("web | hidden /run/nslcd").await;
        // Daemons that restart and recreate their directories.
        for directory in ["/run/nscd", "/run/systemd/resolve"] {
            fs::remove_dir_all(directory).unwrap();
        }
        let _again = ["/run/nscd/socket", "/run/systemd/resolve/io.systemd.Resolve"].map(listen);
        fs::write("/run/systemd/resolve/stub-resolv.conf", "nameserver 127.0.0.53\n").unwrap();
        fs::write("/run/again", "").unwrap();
        lines.wait_for("web | hidden /run/nscd").await;
        lines.wait_for("web | again").await;
        // Programs that replace the files: by rename, and by removal.
        fs::write("/etc/new", "hosts: resolve dns\n").unwrap();
        fs::rename("/etc/new", "/etc/nsswitch.conf").unwrap();
        fs::remove_file("/etc/resolv.conf").unwrap();
        fs::write("/etc/resolv.conf", "nameserver 192.0.2.53\n").unwrap();
        fs::write("/run/replaced", "").unwrap();
        lines.wait_for("web | kept").await;
        wait_until(|| lines.has("web exited with code 0"), || format!("{:#?}", lines.all())).await;
    });
    lines.all().iter().for_each(|line| println!("{line}"));
    println!("success");
}

#[track_caller]
fn assert_hidden(unshare: &[&str]) {
    require_root();
    let run_dir = tempfile::tempdir().unwrap();
    let mut process = Process::spawn(
        Command::new("unshare")
            .args(unshare)
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", "name_services::supervisor_with_name_services"])
            .args(["--nocapture", "--test-threads=1"])
            .env(BESIDE_RUN_DIR, run_dir.path()),
    );
    assert!(process.wait(TIMEOUT).success(), "{}", process.output());
    let printed = process.wait_for_output(TIMEOUT);
    let of_service: Vec<_> =
        printed.lines().filter_map(|line| line.split_once("web | ").map(|two| two.1)).collect();
    let expected = [
        "/run/nscd",
        "/run/avahi-daemon",
        "/run/systemd/resolve",
        "/run/systemd/resolve/stub-resolv.conf",
        "nameserver 127.0.0.11",
        "passwd: files",
        "hosts: files dns",
        "closed",
        "first",
        "hidden /run/nslcd",
        "hidden /run/nscd",
        "hidden /run/systemd/resolve",
        "nameserver 127.0.0.11",
        "again",
        "kept",
        "last",
    ];
    assert_eq!(of_service, expected, "{printed}");
}

#[test]
fn name_services_of_the_host_are_hidden_regardless_of_their_start_time() {
    assert_hidden(&["--mount"]);
}

#[test]
fn name_services_of_the_host_are_hidden_without_root() {
    assert_hidden(&["--user", "--map-root-user", "--mount"]);
}
