//! Stop of services.

use super::*;

#[test]
fn a_service_that_ignores_sigterm_is_killed_after_the_grace_period() {
    let grace = Duration::from_millis(300);
    let mut bed = Bed::new(grace);
    run(async {
        let script = "trap '' TERM; echo up; while :; do sleep 0.02; done";
        bed.supervisor.start(vec![bed.shell("web", script)]).await.unwrap();
        bed.lines.wait_for("web | up").await;
        let began = Instant::now();
        bed.supervisor.stop().await;
        assert!(began.elapsed() >= grace, "{:?}", began.elapsed());
        assert_eq!(bed.status("web").state, State::Ended(Exit::Signal(9)));
    });
    assert!(bed.lines.has("web was killed by SIGKILL"));
    bed.assert_clean();
}

#[test]
fn the_whole_process_group_has_the_grace_period_to_end() {
    let mut bed = Bed::new(FOREVER);
    run(async {
        // The signal kills the leader immediately, and its child takes longer.
        let script = "(trap 'sleep 0.3; echo put away; exit 0' TERM; echo up; while :; do sleep 0.02; done) & wait";
        bed.supervisor.start(vec![bed.shell("web", script)]).await.unwrap();
        bed.lines.wait_for("web | up").await;
        bed.supervisor.stop().await;
        assert_eq!(bed.status("web").state, State::Ended(Exit::Signal(15)));
    });
    let lines = bed.lines.all();
    assert_eq!(
        lines[lines.len() - 2..],
        ["web | put away", "web was killed by SIGTERM"],
        "{lines:?}"
    );
}

#[test]
fn a_kill_during_a_stop_takes_effect_at_once() {
    let mut bed = Bed::new(FOREVER);
    run(async {
        let script = "trap '' TERM; echo up; while :; do sleep 0.02; done";
        bed.supervisor.start(vec![bed.shell("a", script), bed.shell("b", script)]).await.unwrap();
        bed.lines.wait_for("a | up").await;
        bed.lines.wait_for("b | up").await;
        let stopped = tokio::time::timeout(Duration::from_millis(200), bed.supervisor.stop()).await;
        assert!(stopped.is_err());
        bed.supervisor.kill();
        let ended = bed.supervisor.wait().await;
        assert_eq!(ended.0.iter().map(|(_, exit)| *exit).collect::<Vec<_>>(), [Exit::Signal(9); 2]);
        bed.supervisor.stop().await;
    });
    bed.assert_clean();
}

#[test]
fn descendants_of_a_service_end_with_it() {
    let mut bed = Bed::new(FOREVER);
    let (daemon, killed) = (marker(2), marker(3));
    run(async {
        let daemonise = |mark: &str, then: &str| {
            format!("setsid -f sleep {mark} </dev/null >/dev/null 2>&1; {then}")
        };
        // The first service ends by itself, the second one is stopped.
        let short = bed.shell("short", &daemonise(&daemon, "echo up; sleep 0.3"));
        let long = bed.shell("long", &daemonise(&killed, "echo up; exec sleep 600"));
        bed.supervisor.start(vec![short, long]).await.unwrap();
        bed.lines.wait_for("long  | up").await;
        assert_eq!(marked(&killed).len(), 1);
        wait_until(
            || bed.lines.has("short exited with code 0"),
            || format!("{:?}", bed.lines.all()),
        )
        .await;
        assert!(marked(&daemon).is_empty());
        bed.supervisor.stop().await;
    });
    assert!(marked(&killed).is_empty());
    // No zombies among the descendants of this process. Other tests have no processes of this name.
    let zombies = procfs::tree(std::process::id()).into_iter().filter(|&pid| {
        procfs::state(pid) == Some('Z')
            && fs::read_to_string(format!("/proc/{pid}/comm"))
                .is_ok_and(|name| name.trim() == "sleep")
    });
    assert_eq!(zombies.count(), 0);
    bed.assert_clean();
}

#[test]
fn orphans_of_a_service_are_reaped_while_it_runs() {
    let mut bed = Bed::new(FOREVER);
    run(async {
        let script = "for i in 1 2 3 4 5; do (sleep 0.01 &) ; done; sleep 0.3; \
                      echo zombies $(cat /proc/[0-9]*/stat 2>/dev/null | grep -c ') Z '); exec sleep 600";
        bed.supervisor.start(vec![bed.shell("web", script)]).await.unwrap();
        bed.lines.wait_for("web | zombies 0").await;
        bed.supervisor.stop().await;
    });
}

#[test]
fn a_dropped_supervisor_kills_its_services() {
    let mut bed = Bed::new(FOREVER);
    let mark = marker(4);
    run(async {
        bed.supervisor.start(vec![bed.shell("web", &format!("exec sleep {mark}"))]).await.unwrap();
        // Before execve(2) the process is still the shell.
        wait_until(|| marked(&mark).len() == 1, || "no sleep".to_owned()).await;
        let pid = bed.status("web").pid.unwrap();
        assert_eq!(marked(&mark), [pid]);
        let Bed { supervisor, run_dir, .. } = bed;
        drop(supervisor);
        wait_until(
            || marked(&mark).is_empty() && services_in(run_dir.path()).is_empty(),
            || "left".to_owned(),
        )
        .await;
    });
}
