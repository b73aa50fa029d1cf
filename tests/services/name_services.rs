//! Name services of the host, from which a service is kept.

use super::*;
use rustix::mount::{MountFlags, mount};
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;

/// Where the supervisor of [`supervisor_beside_name_services`] keeps its files; unset, it is not
/// one.
const BESIDE_RUN_DIR: &str = "TIDEGATE_TEST_BESIDE_RUN_DIR";

/// Not a test of itself: a supervisor on a host of its own, with name services, for the next ones.
#[test]
fn supervisor_beside_name_services() {
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
        covered() { while [ -n "$(find $1 -type s)" ]; do sleep 0.01; done; echo "covered $1"; }
        until [ -d /run/nslcd ]; do sleep 0.01; done; covered /run/nslcd
        until [ -e /run/again ]; do sleep 0.01; done; covered /run/nscd; covered /run/systemd/resolve
        cat /etc/resolv.conf
        echo last"#;
    let lines = Lines::default();
    run(async {
        let mut supervisor = supervisor(Path::new(&run_dir), lines.clone(), FOREVER);
        let web = shell_in(namespace_for_service(), "web", script);
        supervisor.start(vec![web]).await.unwrap();
        lines.wait_for("web | first").await;
        // A daemon that is started later.
        let _later = listen("/run/made/socket");
        fs::rename("/run/made", "/run/nslcd").unwrap();
        lines.wait_for("web | covered /run/nslcd").await;
        // Those that are started again, and make their directories anew.
        for directory in ["/run/nscd", "/run/systemd/resolve"] {
            fs::remove_dir_all(directory).unwrap();
        }
        let _again = ["/run/nscd/socket", "/run/systemd/resolve/io.systemd.Resolve"].map(listen);
        fs::write("/run/systemd/resolve/stub-resolv.conf", "nameserver 127.0.0.53\n").unwrap();
        fs::write("/run/again", "").unwrap();
        lines.wait_for("web | covered /run/nscd").await;
        wait_until(|| lines.has("web exited with code 0"), || format!("{:#?}", lines.all())).await;
    });
    lines.all().iter().for_each(|line| println!("{line}"));
    println!("all is well");
}

#[track_caller]
fn are_hidden(unshare: &[&str]) {
    require_root();
    let run_dir = tempfile::tempdir().unwrap();
    let mut process = Process::spawn(
        Command::new("unshare")
            .args(unshare)
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", "name_services::supervisor_beside_name_services"])
            .args(["--nocapture", "--test-threads=1"])
            .env(BESIDE_RUN_DIR, run_dir.path()),
    );
    assert!(process.wait(PATIENCE).success(), "{}", process.output());
    let told = process.wait_for_output(PATIENCE);
    let of_service: Vec<_> =
        told.lines().filter_map(|line| line.split_once("web | ").map(|two| two.1)).collect();
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
        "covered /run/nslcd",
        "covered /run/nscd",
        "covered /run/systemd/resolve",
        "nameserver 127.0.0.11",
        "last",
    ];
    assert_eq!(of_service, expected, "{told}");
}

#[test]
fn name_services_of_the_host_are_hidden_from_a_service_whenever_they_start() {
    are_hidden(&["--mount"]);
}

#[test]
fn so_they_are_without_root() {
    are_hidden(&["--user", "--map-root-user", "--mount"]);
}
