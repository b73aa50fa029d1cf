//! A host on which a test starts a daemon as a service manager does.

use std::fs;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use tidegate_testbed::{Namespace, Process, pass_fd};

/// The binary under test.
pub(crate) const TIDEGATE: &str = env!("CARGO_BIN_EXE_tidegate");

/// The timeout of operations that should be immediate, with a margin for a busy machine.
pub(crate) const SOON: Duration = Duration::from_secs(30);

/// Variables by which a service manager passes sockets.
const VARIABLES: [&str; 4] = ["NOTIFY_SOCKET", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"];

/// A host in its own network namespace, with its own files.
pub(crate) struct Host {
    pub(crate) net: Namespace,
    directory: tempfile::TempDir,
}

impl Host {
    pub(crate) fn new() -> Self {
        let host = Self { net: Namespace::new(), directory: tempfile::tempdir().unwrap() };
        fs::create_dir(host.path("run")).unwrap();
        host
    }

    /// A path below the directory of the host.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Path of the API socket that the daemon creates if it inherits none.
    pub(crate) fn socket(&self) -> PathBuf {
        self.path("api.sock")
    }

    /// `program` on this host, without variables of a service manager.
    pub(crate) fn command(&self, program: &str) -> Command {
        let mut command = self.net.command(program);
        command.env("TIDEGATE_RUN_DIR", self.path("run")).env("TIDEGATE_SOCKET", self.socket());
        command.env("TIDEGATE_LOG", "warn");
        for variable in VARIABLES {
            command.env_remove(variable);
        }
        command
    }

    /// The command line of the daemon, with the state file in the directory `state`.
    pub(crate) fn arguments(&self, state: &str) -> Vec<String> {
        let state = self.path(state).display().to_string();
        ["daemon", "--metrics", "none", "--state", &state].map(str::to_owned).into()
    }

    /// The command that starts the daemon.
    pub(crate) fn daemon(&self) -> Command {
        let mut command = self.command(TIDEGATE);
        command.args(self.arguments("state"));
        command
    }

    /// The command that starts the daemon with `descriptor` as descriptor 3, and
    /// `LISTEN_FDS=count`.
    pub(crate) fn activated(
        &self,
        descriptor: Option<OwnedFd>,
        count: &str,
        state: &str,
    ) -> Command {
        // `exec` keeps the process ID, which is not known before the fork.
        let mut command = self.command("sh");
        command.args(["-c", "LISTEN_PID=$$ exec \"$0\" \"$@\"", TIDEGATE]);
        command.args(self.arguments(state)).env("LISTEN_FDS", count);
        if let Some(descriptor) = descriptor {
            pass_fd(&mut command, descriptor, 3);
        }
        command
    }

    /// Runs a command of `tidegate` on this host, which must succeed.
    #[track_caller]
    pub(crate) fn tidegate(&self, args: &[&str]) {
        let output = self.command(TIDEGATE).args(args).output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{args:?}: {stderr}");
    }
}

/// The one line that `command` prints, which must fail with exit code 1.
#[track_caller]
pub(crate) fn refused(command: &mut Command) -> String {
    let mut process = Process::spawn(command);
    let code = process.wait(SOON).code();
    let printed = process.wait_for_output(SOON);
    assert_eq!((code, printed.lines().count()), (Some(1), 1), "{printed}");
    printed
}

/// A file of the repository.
#[track_caller]
pub(crate) fn read(path: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}
