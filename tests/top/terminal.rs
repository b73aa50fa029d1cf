//! A terminal in tmux, whose server is a child process of the test.

use rustix::process::Pid;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use tidegate_testbed::{Process, Signal, eventually};

const SOON: Duration = Duration::from_secs(20);

/// A window in its own tmux server, which ends with it.
pub(crate) struct Terminal {
    socket: PathBuf,
    /// Runs in the foreground, so that it ends when the test is killed.
    _server: Process,
}

impl Terminal {
    /// A terminal of the given size, with the tmux socket in `directory`.
    #[track_caller]
    pub(crate) fn new(directory: &Path, columns: u16, lines: u16) -> Self {
        let socket = directory.join("tmux.sock");
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "tmux", "-D", "-f", "/dev/null", "-S"]).arg(&socket);
        // The tests ignore colours and attributes.
        command.env("TERM", "xterm").env("LC_ALL", "C.UTF-8").env_remove("TMUX");
        let server = Process::spawn(&mut command);
        assert!(eventually(SOON, || socket.exists()), "tmux: {}", server.output());
        let terminal = Self { socket, _server: server };
        let (columns, lines) = (columns.to_string(), lines.to_string());
        terminal.tmux(&["new-session", "-d", "-x", &columns, "-y", &lines, "sleep 600"]);
        terminal.tmux(&["set-option", "-g", "status", "off"]);
        terminal.tmux(&["set-option", "-g", "window-size", "manual"]);
        terminal.tmux(&["set-option", "-g", "remain-on-exit", "on"]);
        terminal.tmux(&["set-option", "-s", "escape-time", "0"]);
        terminal.tmux(&["resize-window", "-x", &columns, "-y", &lines]);
        terminal
    }

    /// Runs `command`, then prints its exit code and the modes of the terminal.
    #[track_caller]
    pub(crate) fn run(&self, command: &str) {
        let modes = "stty -a | grep -ow -e '-*icanon' -e '-*echo' | sort | tr '\\n' ' '";
        self.shell(&format!("{command}; code=$?; echo ENDED $code $({modes}); sleep 600"));
    }

    /// Runs `script` in the shell of the window.
    #[track_caller]
    pub(crate) fn shell(&self, script: &str) {
        self.tmux(&["respawn-window", "-k", script]);
    }

    /// The text on the screen.
    #[track_caller]
    pub(crate) fn screen(&self) -> String {
        self.tmux(&["capture-pane", "-p"])
    }

    /// Waits until `wanted` holds for the screen.
    #[track_caller]
    pub(crate) fn wait_for(&self, condition: &str, wanted: impl Fn(&str) -> bool) -> String {
        let mut screen = String::new();
        let held = eventually(SOON, || {
            std::thread::sleep(Duration::from_millis(20));
            screen = self.screen();
            wanted(&screen)
        });
        assert!(held, "not within {SOON:?}: {condition}\n{screen}");
        screen
    }

    /// Presses keys, with their tmux names.
    #[track_caller]
    pub(crate) fn keys(&self, keys: &[&str]) {
        for key in keys {
            self.tmux(&["send-keys", key]);
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    #[track_caller]
    pub(crate) fn resize(&self, columns: u16, lines: u16) {
        self.tmux(&["resize-window", "-x", &columns.to_string(), "-y", &lines.to_string()]);
    }

    /// Sends `signal` to the command of [`run`](Self::run) that has the argument `word`.
    #[track_caller]
    pub(crate) fn signal(&self, word: &str, signal: Signal) {
        rustix::process::kill_process(self.pid(word), signal).unwrap();
    }

    /// The process with the argument `word`.
    #[track_caller]
    pub(crate) fn pid(&self, word: &str) -> Pid {
        let shell = self.tmux(&["display-message", "-p", "#{pane_pid}"]);
        let shell = shell.trim();
        let children = fs::read_to_string(format!("/proc/{shell}/task/{shell}/children")).unwrap();
        let has_word = |pid: &&str| {
            let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            command.split(|byte| *byte == 0).any(|argument| argument == word.as_bytes())
        };
        let pid =
            children.split_whitespace().find(has_word).unwrap_or_else(|| panic!("{children}"));
        Pid::from_raw(pid.parse().unwrap()).unwrap()
    }

    #[track_caller]
    fn tmux(&self, arguments: &[&str]) -> String {
        let mut command = Command::new("tmux");
        let output = command
            .arg("-S")
            .arg(&self.socket)
            .args(arguments)
            .env_remove("TMUX")
            .output()
            .unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "tmux {arguments:?}: {stderr}");
        String::from_utf8(output.stdout).unwrap()
    }
}
