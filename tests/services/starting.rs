//! Start of services.

use super::*;

#[test]
fn services_start_after_and_stop_before_their_dependencies() {
    let mut bed = Bed::new(FOREVER);
    let script = "trap 'echo bye; exit 0' TERM; echo up; while :; do sleep 0.02; done";
    run(async {
        let specs = vec![
            after(bed.shell("c", script), &["b"]),
            bed.shell("a", script),
            after(bed.shell("b", script), &["a"]),
        ];
        bed.supervisor.start(specs).await.unwrap();
        let statuses = bed.supervisor.statuses();
        let names: Vec<&str> = statuses.iter().map(|status| status.name.as_str()).collect();
        assert_eq!(names, ["a", "b", "c"]);
        assert!(statuses.iter().all(|status| status.state == State::Running), "{statuses:?}");
        for name in names {
            bed.lines.wait_for(&format!("{name} | up")).await;
        }
        bed.supervisor.stop().await;
    });
    let lines = bed.lines.all();
    let ends: Vec<&String> =
        lines.iter().filter(|line| line.ends_with("exited with code 0")).collect();
    assert_eq!(ends, ["c exited with code 0", "b exited with code 0", "a exited with code 0"]);
    bed.assert_clean();
}

#[test]
fn an_error_names_the_program_and_started_services_are_stopped() {
    for (program, reason) in [
        (
            "no-such-program",
            "service \"web\": cannot run \"no-such-program\": No such file or directory in PATH; install it",
        ),
        ("/etc/hosts/x", "service \"web\": cannot run \"/etc/hosts/x\": Not a directory"),
        (
            "/proc/self/mounts",
            "service \"web\": cannot run \"/proc/self/mounts\": Permission denied; is it an",
        ),
    ] {
        let mut bed = Bed::new(FOREVER);
        let mark = marker(1);
        run(async {
            let db = bed.shell("db", &format!("exec sleep {mark}"));
            let mut web = after(bed.shell("web", ""), &["db"]);
            web.command = vec![program.to_owned()];
            let error = bed.supervisor.start(vec![web, db]).await.unwrap_err();
            assert!(matches!(error, ServiceError::CannotRun { .. }), "{error}");
            assert!(error.to_string().starts_with(reason), "{error}");
        });
        assert!(marked(&mark).is_empty());
        bed.assert_clean();
    }
}

#[test]
fn an_error_names_an_invalid_working_directory_or_host_name() {
    run(async {
        let mut bed = Bed::new(FOREVER);
        let mut spec = bed.shell("web", "true");
        spec.working_dir = "/no/such".into();
        let error = bed.supervisor.start(vec![spec]).await.unwrap_err().to_string();
        assert_eq!(error, "service \"web\": working directory /no/such: No such file or directory");
        let mut bed = Bed::new(FOREVER);
        let mut spec = bed.shell("web", "true");
        spec.hostname = "x".repeat(65);
        let error = bed.supervisor.start(vec![spec]).await.unwrap_err().to_string();
        assert!(error.starts_with("service \"web\": set host name \"xxx"), "{error}");
        let mut bed = Bed::new(FOREVER);
        let mut spec = bed.shell("web", "true");
        spec.name = "../web".to_owned();
        assert!(matches!(bed.supervisor.start(vec![spec]).await, Err(ServiceError::Name(_))));
    });
}

#[test]
fn a_name_that_another_supervisor_uses_is_rejected() {
    let mut bed = Bed::new(FOREVER);
    run(async {
        bed.supervisor.start(vec![bed.shell("web", "exec sleep 600")]).await.unwrap();
        let mut other = supervisor(bed.run_dir.path(), Lines::default(), FOREVER);
        let error = other.start(vec![bed.shell("web", "true")]).await.unwrap_err();
        assert!(matches!(error, ServiceError::Busy { .. }), "{error}");
        assert_eq!(sweep(bed.run_dir.path()).unwrap(), 0);
        bed.supervisor.stop().await;
    });
    bed.assert_clean();
}
