//! A host with an outside, to bring projects up on.

#![allow(dead_code, reason = "every test crate uses a part of it")]

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;
use tidegate_testbed::{Namespace, Process, Topology};

/// The binary under test.
pub(crate) const TIDEGATE: &str = env!("CARGO_BIN_EXE_tidegate");

/// A host, its outside, and a place of its own for what would be below `/run`.
pub(crate) struct Scene {
    pub(crate) net: Topology,
    pub(crate) run: tempfile::TempDir,
    pub(crate) directory: tempfile::TempDir,
}

impl Scene {
    pub(crate) fn new() -> Self {
        let directory = || tempfile::tempdir().unwrap();
        Self { net: Topology::three(), run: directory(), directory: directory() }
    }

    /// `tidegate` on the host, with the scene's place for what would be below `/run`.
    pub(crate) fn tidegate(&self) -> Command {
        let mut command = self.net.host.command(TIDEGATE);
        command.env("TIDEGATE_RUN_DIR", self.run.path()).env("TIDEGATE_LOG", "warn");
        command.env_remove("TIDEGATE_SOCKET");
        command
    }

    /// What brings `file` up.
    pub(crate) fn command(&self, file: &str) -> Command {
        let path = self.directory.path().join("compose.yaml");
        fs::write(&path, file).unwrap();
        let mut command = self.tidegate();
        command.arg("up").arg("-f").arg(path).args(["--metrics", "none"]);
        command
    }

    /// Begins to bring `file` up.
    pub(crate) fn up(&self, file: &str) -> Process {
        Process::spawn(&mut self.command(file))
    }

    /// What is told of `file`, which cannot be brought up.
    #[track_caller]
    pub(crate) fn refused(&self, file: &str) -> String {
        refused(&mut self.command(file))
    }

    /// Where the API is.
    pub(crate) fn socket(&self) -> PathBuf {
        self.run.path().join("api.sock")
    }
}

/// What is told by `command`, which fails.
#[track_caller]
pub(crate) fn refused(command: &mut Command) -> String {
    let mut process = Process::spawn(command);
    let code = process.wait(Duration::from_secs(10)).code();
    let told = process.wait_for_output(Duration::from_secs(10));
    assert_eq!(code, Some(1), "{told}");
    told
}

/// All that can be seen of a namespace: links, addresses, routes, rules.
pub(crate) fn state(namespace: &Namespace) -> String {
    let ip = |args: &[&str]| namespace.exec("ip", args);
    let all = [
        ip(&["-o", "addr"]),
        ip(&["route", "show", "table", "all"]),
        ip(&["-6", "route", "show", "table", "all"]),
        ip(&["rule"]),
        ip(&["-6", "rule"]),
    ];
    let lines = all.iter().flat_map(|text| text.lines());
    lines
        .filter(|line| !line.contains("fe80:") && !line.contains("expires"))
        .map(|line| format!("{line}\n"))
        .collect()
}
