//! A killed supervisor.

use super::*;

/// Not a test by itself: the supervisor that the next test kills.
#[test]
fn supervisor_in_a_separate_process() {
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
fn a_killed_supervisor_leaves_only_files_that_a_sweep_removes() {
    require_root();
    let run_dir = tempfile::tempdir().unwrap();
    let mounts = || fs::read_to_string("/proc/self/mountinfo").unwrap();
    let before = mounts();
    let mut process = Process::spawn(
        Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "killed::supervisor_in_a_separate_process",
                "--nocapture",
                "--test-threads=1",
            ])
            .env(RUN_DIR, run_dir.path()),
    );
    let up = process.wait_for_line("web | up ", TIMEOUT);
    process.wait_for_line("db  | up ", TIMEOUT);
    let mark = up.split(' ').next_back().unwrap().to_owned();
    assert!(eventually(TIMEOUT, || marked(&mark).len() >= 8), "{:?}", marked(&mark));
    let inits: Vec<u32> =
        procfs::tree(process.pid()).into_iter().filter(|&pid| pid != process.pid()).collect();
    assert!(inits.len() >= 10, "{inits:?}");
    // Kills only the supervisor, not its process group.
    assert_eq!(process.stop(Signal::KILL, TIMEOUT).signal(), Some(9));
    let alive = || -> Vec<u32> {
        let is_alive = |pid: &&u32| !matches!(procfs::state(**pid), None | Some('Z'));
        inits.iter().filter(is_alive).copied().chain(marked(&mark)).collect()
    };
    assert!(eventually(TIMEOUT, || alive().is_empty()), "{:?}", alive());
    assert_eq!(mounts(), before);
    assert_eq!(services_in(run_dir.path()).len(), 2);
    assert_eq!(sweep(run_dir.path()).unwrap(), 2);
    assert_eq!(services_in(run_dir.path()), Vec::<String>::new());
}
