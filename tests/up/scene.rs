//! A host with an outside, to bring projects up on.

use std::fs;
use std::os::unix::fs::chown;
use std::path::Path;
use std::process::Command;
use std::time::Duration;
use tidegate_testbed::{Namespace, Process, Topology};

/// The binary under test.
pub(crate) const TIDEGATE: &str = env!("CARGO_BIN_EXE_tidegate");

/// The user `nobody` of Debian and most others.
const NOBODY: u32 = 65_534;

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

    /// Begins to bring `file` up.
    pub(crate) fn up(&self, file: &str) -> Process {
        self.spawn(self.net.host.command(TIDEGATE), file)
    }

    /// The same, as a user who has no privilege.
    pub(crate) fn up_as_nobody(&self, file: &str) -> Process {
        for directory in [&self.run, &self.directory] {
            chown(directory.path(), Some(NOBODY), Some(NOBODY)).unwrap();
        }
        let mut command = self.net.host.command("setpriv");
        command.args([&format!("--reuid={NOBODY}"), &format!("--regid={NOBODY}"), "--clear-groups"]);
        // The wish to go with the test is lost with the privileges.
        command.args(["--pdeathsig", "KILL", TIDEGATE]);
        self.spawn(command, file)
    }

    fn spawn(&self, mut command: Command, file: &str) -> Process {
        let path = self.directory.path().join("compose.yaml");
        fs::write(&path, file).unwrap();
        command.arg("up").arg("-f").arg(path).args(["--metrics", "none"]);
        command.env("TIDEGATE_RUN_DIR", self.run.path()).env("TIDEGATE_LOG", "warn");
        Process::spawn(&mut command)
    }

    /// What is told of `file`, which cannot be brought up.
    #[track_caller]
    pub(crate) fn refused(&self, file: &str) -> String {
        let mut up = self.up(file);
        let code = up.wait(Duration::from_secs(10)).code();
        let told = up.wait_for_output(Duration::from_secs(10));
        assert_eq!(code, Some(1), "{told}");
        told
    }
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

/// The network namespace of a service, by the process that is its init.
pub(crate) fn service_namespace(up: &Process, service: &str) -> Namespace {
    let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", up.pid())).unwrap();
    let init = children.split_whitespace().find(|pid| {
        let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        command.ends_with(format!("service-init\0{service}\0").as_bytes())
    });
    let init = init.unwrap_or_else(|| panic!("no init of {service} among {children}"));
    Namespace::at(Path::new(&format!("/proc/{init}/ns/net")))
}
