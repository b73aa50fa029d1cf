//! Identity and liveness of processes.

use serde::{Deserialize, Serialize};
use std::fs;
use std::io;

/// A process, identified by PID and start time. The start time distinguishes it from later
/// processes with the same PID.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Process {
    pub(super) pid: u32,
    /// Clock ticks since boot: field 22 of `/proc/PID/stat` (proc_pid_stat(5)).
    start_time: u64,
}

impl Process {
    /// Returns the calling process.
    pub(super) fn current() -> io::Result<Self> {
        let pid = std::process::id();
        let stat = fs::read_to_string("/proc/self/stat")?;
        let (_, start_time) = parse(&stat)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "/proc/self/stat"))?;
        Ok(Self { pid, start_time })
    }

    /// Returns whether the process is still running. Returns `true` in case of doubt, because a
    /// running process must not lose its objects.
    pub(super) fn is_alive(&self) -> bool {
        match fs::read_to_string(format!("/proc/{}/stat", self.pid)) {
            Ok(stat) => parse(&stat).is_none_or(|(state, start_time)| {
                // A zombie has exited, even if its parent has not reaped it yet.
                !matches!(state, "Z" | "X") && start_time == self.start_time
            }),
            Err(error) => {
                error.kind() != io::ErrorKind::NotFound && error.raw_os_error() != Some(libc::ESRCH)
            }
        }
    }
}

/// Parses state and start time.
fn parse(stat: &str) -> Option<(&str, u64)> {
    // The second field is the command name in parentheses. The name may contain blanks and
    // parentheses.
    let (_, fields) = stat.rsplit_once(") ")?;
    let mut fields = fields.split_ascii_whitespace();
    let state = fields.next()?;
    Some((state, fields.nth(18)?.parse().ok()?))
}

/// Returns the boot ID of the kernel. Start times and cookies are only comparable within one boot.
pub(super) fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim_end().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_alive() {
        assert!(Process::current().unwrap().is_alive());
    }

    #[test]
    fn process_with_the_same_pid_and_another_start_time_differs() {
        let current = Process::current().unwrap();
        assert!(!Process { start_time: current.start_time + 1, ..current }.is_alive());
    }

    #[test]
    fn zombie_is_not_alive() {
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let stat = fs::read_to_string(format!("/proc/{}/stat", child.id())).unwrap();
        let process = Process { pid: child.id(), start_time: parse(&stat).unwrap().1 };
        while process.is_alive() {
            std::thread::yield_now();
        }
        child.wait().unwrap();
        assert!(!process.is_alive());
    }

    #[test]
    fn command_name_may_contain_blanks_and_parentheses() {
        let stat = "7 (a) b (c) S 1 7 7 0 -1 4194304 1 0 0 0 0 0 0 0 20 0 1 0 4711 2 3";
        assert_eq!(parse(stat), Some(("S", 4711)));
        assert_eq!(parse("7 (a"), None);
    }
}
