//! The init.

use super::*;

#[test]
fn the_init_is_not_for_people() {
    let output = Command::new(env!("CARGO_BIN_EXE_tidegate"))
        .arg("service-init")
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(
        said.starts_with("tidegate: error: service-init") && said.lines().count() == 1,
        "{said}"
    );
}

#[test]
fn a_service_that_writes_more_than_is_taken_waits() {
    /// Takes a line only when told to.
    struct Stuck(std::sync::mpsc::Receiver<()>);
    impl Output for Stuck {
        fn write_line(&mut self, _: &str) -> io::Result<()> {
            self.0.recv().map_err(io::Error::other)
        }
    }
    let bed = Bed::new(FOREVER);
    let (release, stuck) = std::sync::mpsc::channel();
    let count = bed.run_dir.path().join("count");
    run(async {
        let mut supervisor = supervisor(bed.run_dir.path(), Stuck(stuck), FOREVER);
        let line = "x".repeat(1000);
        let script = format!(
            "i=0; while :; do i=$((i+1)); echo {line}; echo $i > {}; done",
            count.display()
        );
        supervisor.start(vec![bed.shell("web", &script)]).await.unwrap();
        let written =
            || fs::read_to_string(&count).ok().and_then(|text| text.trim().parse::<u32>().ok());
        let mut last = None;
        let mut same = 0;
        wait_until(
            || {
                let now = written();
                same = if now.is_some() && now == last { same + 1 } else { 0 };
                last = now;
                same > 60
            },
            || "it is never slowed down".to_owned(),
        )
        .await;
        // 64 KiB of pipe, 64 lines of queue, and what is in hand.
        assert!(last.unwrap() < 300, "{last:?}");
        supervisor.kill();
        drop(release);
        supervisor.wait().await;
    });
}
