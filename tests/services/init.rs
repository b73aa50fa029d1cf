//! The init process of a service.

use super::*;

#[test]
fn the_init_rejects_a_call_by_a_user() {
    let output = Command::new(env!("CARGO_BIN_EXE_tidegate"))
        .arg("service-init")
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
    let printed = String::from_utf8(output.stderr).unwrap();
    assert!(
        printed.starts_with("tidegate: error: service-init") && printed.lines().count() == 1,
        "{printed}"
    );
}

#[test]
fn a_service_blocks_while_its_output_is_blocked() {
    /// Accepts a line for each message on the channel.
    struct Blocked(std::sync::mpsc::Receiver<()>);
    impl Output for Blocked {
        fn write_line(&mut self, _: &str) -> io::Result<()> {
            self.0.recv().map_err(io::Error::other)
        }
    }
    let bed = Bed::new(FOREVER);
    let (release, blocked) = std::sync::mpsc::channel();
    let count = bed.run_dir.path().join("count");
    run(async {
        let mut supervisor = supervisor(bed.run_dir.path(), Blocked(blocked), FOREVER);
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
            || "it is never blocked".to_owned(),
        )
        .await;
        // 64 KiB in the pipe, 64 lines in the queue, and the current chunk.
        assert!(last.unwrap() < 300, "{last:?}");
        supervisor.kill();
        drop(release);
        supervisor.wait().await;
    });
}
