//! Restarts.

use super::*;

#[test]
fn a_failing_service_is_restarted_up_to_the_maximum_in_the_same_namespace() {
    let mut bed = Bed::new(FOREVER);
    run(async {
        let script = "readlink /proc/self/ns/net; exit 4";
        let spec = restarting(bed.shell("web", script), Restart::OnFailure { max: Some(2) });
        bed.supervisor.start(vec![spec]).await.unwrap();
        assert_eq!(bed.supervisor.wait().await.0, [("web".to_owned(), Exit::Code(4))]);
        assert_eq!(bed.status("web").restarts, 2);
    });
    let network = tidegate_netns::Namespace::from_path(&bed.namespace.path()).unwrap().id();
    let seen = format!("web | {network}");
    let exited = "web exited with code 4";
    let expected = [
        &seen,
        exited,
        "web restarts in 100ms",
        &seen,
        exited,
        "web restarts in 200ms",
        &seen,
        exited,
    ];
    assert_eq!(bed.lines.all(), expected);
    bed.assert_clean();
}

#[test]
fn a_service_is_restarted_until_it_is_stopped() {
    let mut bed = Bed::new(FOREVER);
    run(async {
        let failing = restarting(bed.shell("good", "exit 0"), Restart::OnFailure { max: None });
        let always = restarting(bed.shell("always", "exit 0"), Restart::Always);
        bed.supervisor.start(vec![failing, always]).await.unwrap();
        bed.lines.wait_for("always restarts in 400ms").await;
        assert!(matches!(
            bed.status("always").state,
            State::Restarting(Exit::Code(0)) | State::Running
        ));
        assert_eq!(bed.status("good").state, State::Ended(Exit::Code(0)));
        bed.supervisor.stop().await;
        assert!(matches!(bed.status("always").state, State::Ended(Exit::Code(0))));
    });
    bed.assert_clean();
}
