//! The supervisor is killed.

use super::*;

/// Not a test of itself: the supervisor that the next test kills.
#[test]
fn supervisor_in_a_process_of_its_own() {
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
fn a_killed_supervisor_leaves_nothing_but_files_that_are_swept() {
    require_root();
    let run_dir = tempfile::tempdir().unwrap();
    let mounts = || fs::read_to_string("/proc/self/mountinfo").unwrap();
    let before = mounts();
    let mut process = Process::spawn(
        Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "killed::supervisor_in_a_process_of_its_own",
                "--nocapture",
                "--test-threads=1",
            ])
            .env(RUN_DIR, run_dir.path()),
    );
    let up = process.wait_for_line("web | up ", PATIENCE);
    process.wait_for_line("db  | up ", PATIENCE);
    let mark = up.split(' ').next_back().unwrap().to_owned();
    assert!(eventually(PATIENCE, || marked(&mark).len() >= 8), "{:?}", marked(&mark));
    let inits: Vec<u32> =
        procfs::tree(process.pid()).into_iter().filter(|&pid| pid != process.pid()).collect();
    assert!(inits.len() >= 10, "{inits:?}");
    // The supervisor alone: no process group is told.
    assert_eq!(process.stop(Signal::KILL, PATIENCE).signal(), Some(9));
    let living = || -> Vec<u32> {
        let lives = |pid: &&u32| !matches!(procfs::state(**pid), None | Some('Z'));
        inits.iter().filter(lives).copied().chain(marked(&mark)).collect()
    };
    assert!(eventually(PATIENCE, || living().is_empty()), "{:?}", living());
    assert_eq!(mounts(), before);
    assert_eq!(services_in(run_dir.path()).len(), 2);
    assert_eq!(sweep(run_dir.path()).unwrap(), 2);
    assert_eq!(services_in(run_dir.path()), Vec::<String>::new());
}
