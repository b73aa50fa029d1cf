//! Which process it is, and whether it still runs.

use serde::{Deserialize, Serialize};
use std::fs;
use std::io;

/// A process, told apart from later ones with the same number by the time it was started.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Process {
    pub(super) pid: u32,
    /// In clock ticks since boot: field 22 of `/proc/PID/stat` (proc_pid_stat(5)).
    start_time: u64,
}

impl Process {
    /// The calling one.
    pub(super) fn current() -> io::Result<Self> {
        let pid = std::process::id();
        let stat = fs::read_to_string("/proc/self/stat")?;
        let (_, start_time) =
            parse(&stat).ok_or_else(|| io::Error::other("/proc/self/stat is not understood"))?;
        Ok(Self { pid, start_time })
    }

    /// Whether it has not ended. In doubt it has not: nothing may be taken from it then.
    pub(super) fn is_alive(&self) -> bool {
        match fs::read_to_string(format!("/proc/{}/stat", self.pid)) {
            Ok(stat) => parse(&stat).is_none_or(|(state, start_time)| {
                // A zombie has ended; that its parent has not asked for its status yet is none of
                // our business.
                !matches!(state, "Z" | "X") && start_time == self.start_time
            }),
            Err(error) => {
                error.kind() != io::ErrorKind::NotFound && error.raw_os_error() != Some(libc::ESRCH)
            }
        }
    }
}

/// State and start time.
fn parse(stat: &str) -> Option<(&str, u64)> {
    // The second field is the program's name in parentheses, and may itself contain blanks and
    // parentheses.
    let (_, fields) = stat.rsplit_once(") ")?;
    let mut fields = fields.split_ascii_whitespace();
    let state = fields.next()?;
    Some((state, fields.nth(18)?.parse().ok()?))
}

/// The kernel's id of this boot. Numbers that the kernel counts up say nothing after the next one.
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
    fn another_process_of_the_same_number_is_not_it() {
        let current = Process::current().unwrap();
        assert!(!Process { start_time: current.start_time + 1, ..current }.is_alive());
    }

    #[test]
    fn a_process_that_ended_is_dead_before_its_parent_takes_notice() {
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
    fn a_name_with_blanks_and_parentheses_is_no_obstacle() {
        let stat = "7 (a) b (c) S 1 7 7 0 -1 4194304 1 0 0 0 0 0 0 0 20 0 1 0 4711 2 3";
        assert_eq!(parse(stat), Some(("S", 4711)));
        assert_eq!(parse("7 (a"), None);
    }
}
