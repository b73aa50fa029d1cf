//! Services without root.

use super::*;

/// Not a test by itself: a supervisor as root of a user namespace, for the tests below.
#[test]
fn supervisor_in_a_user_namespace() {
    let Some(run_dir) = std::env::var_os(ROOTLESS_RUN_DIR) else { return };
    run(async {
        let script = "hostname; head -1 /etc/resolv.conf; echo I am $$; \
                      umount /etc/hosts 2>/dev/null || echo locked; \
                      setsid -f sleep 600 </dev/null >/dev/null 2>&1";
        let waits = Path::new(&run_dir).join("waits");
        let stops = format!(
            "trap 'echo stops; exit 0' TERM; touch {}; while :; do sleep 0.05; done",
            waits.display()
        );
        let in_new = |name, script| shell_in(namespace_for_service(), name, script);
        let mut supervisor = supervisor(Path::new(&run_dir), StandardOutput, FOREVER);
        let again = restarting(in_new("again", "exit 4"), Restart::OnFailure { max: Some(1) });
        let services = vec![in_new("web", script), again, in_new("stops", &stops)];
        supervisor.start(services).await.unwrap();
        let ended = |status: &Status| matches!(status.state, State::Ended(_));
        let others_end =
            || supervisor.statuses().iter().filter(|status| ended(status)).count() == 2;
        wait_until(|| others_end() && waits.exists(), || "they do not end".to_owned()).await;
        supervisor.stop().await;
        let exits = supervisor.wait().await.0.into_iter().map(|(_, exit)| exit);
        assert!(exits.eq([Exit::Code(0), Exit::Code(4), Exit::Code(0)]));
        println!("success");
    });
}

#[test]
fn root_of_a_user_namespace_is_enough() {
    require_root();
    let run_dir = tempfile::tempdir().unwrap();
    let mut process = Process::spawn(
        Command::new("unshare")
            .args(["--user", "--map-root-user"])
            .arg(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "rootless::supervisor_in_a_user_namespace",
                "--nocapture",
                "--test-threads=1",
            ])
            .env(ROOTLESS_RUN_DIR, run_dir.path()),
    );
    assert!(process.wait(TIMEOUT).success(), "{}", process.output());
    let printed = process.wait_for_output(TIMEOUT);
    for line in [
        "web   | web-host",
        "web   | nameserver 127.0.0.11",
        "web   | I am 2",
        "web   | locked",
        "web exited with code 0",
        "again restarts in 100ms",
        "stops | stops",
        "success",
    ] {
        assert!(printed.lines().any(|one| one.ends_with(line)), "{line} is missing:\n{printed}");
    }
    assert_eq!(services_in(run_dir.path()), Vec::<String>::new());
}

#[test]
fn the_error_names_a_missing_capability() {
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
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && error.contains("needs CAP_SYS_ADMIN"), "{error}");
    assert_eq!(services_in(run_dir.path()), Vec::<String>::new());
}
