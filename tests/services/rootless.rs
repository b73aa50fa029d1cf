//! Without root.

use super::*;

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
            .args([
                "--exact",
                "rootless::supervisor_in_a_user_namespace",
                "--nocapture",
                "--test-threads=1",
            ])
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
        .args([
            "--exact",
            "rootless::supervisor_in_a_user_namespace",
            "--nocapture",
            "--test-threads=1",
        ])
        .env(ROOTLESS_RUN_DIR, run_dir.path())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains("needs CAP_SYS_ADMIN"), "{said}");
    assert_eq!(services_in(run_dir.path()), Vec::<String>::new());
}
