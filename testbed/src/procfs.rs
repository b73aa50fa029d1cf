//! Resource usage of a process from `/proc`: CPU time, memory, descriptors, children.
//!
//! Every function returns `None` if the process has ended or a file is not readable; the caller
//! decides whether that is an error.

use std::fs;

/// User and system time of all threads of the process, in seconds.
///
/// This includes reaped children but not running ones. The resolution is the clock tick of the
/// kernel, usually 10 ms.
pub fn cpu_seconds(pid: u32) -> Option<f64> {
    let ticks = cpu_ticks(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)?;
    Some(ticks as f64 / rustix::param::clock_ticks_per_second() as f64)
}

/// Resident set size in bytes.
pub fn rss(pid: u32) -> Option<u64> {
    rollup(pid, "Rss:")
}

/// Proportional set size in bytes: a page shared by n processes counts 1/n for each.
pub fn pss(pid: u32) -> Option<u64> {
    rollup(pid, "Pss:")
}

/// Returns the number of open file descriptors.
pub fn open_fds(pid: u32) -> Option<usize> {
    Some(fs::read_dir(format!("/proc/{pid}/fd")).ok()?.count())
}

/// Returns the process and all its living descendants, parents before children; empty if the
/// process has ended.
///
/// For servers that fork, sum up a figure over the result.
pub fn tree(pid: u32) -> Vec<u32> {
    let mut found = Vec::new();
    let mut open = vec![pid];
    while let Some(pid) = open.pop() {
        let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else { continue };
        found.push(pid);
        for thread in threads.flatten() {
            let children = fs::read_to_string(thread.path().join("children")).unwrap_or_default();
            open.extend(
                children.split_ascii_whitespace().filter_map(|pid| pid.parse::<u32>().ok()),
            );
        }
    }
    found
}

/// Returns the state letter of the process (`R`, `S`, `Z`, ...), as in proc(5).
///
/// A child that has ended stays `Z` until it is reaped, and signal 0 still reaches it. The state
/// shows whether it is alive.
pub fn state(pid: u32) -> Option<char> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    after_name(&stat)?.chars().next()
}

/// Returns the field `name` of `/proc/PID/smaps_rollup`, in bytes.
fn rollup(pid: u32, name: &str) -> Option<u64> {
    rollup_bytes(&fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?, name)
}

fn rollup_bytes(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find(|line| line.starts_with(name))?;
    let kilobytes: u64 = line.split_ascii_whitespace().nth(1)?.parse().ok()?;
    Some(kilobytes * 1024)
}

/// Returns the part of `/proc/PID/stat` after the program name, which may contain blanks and
/// parentheses.
fn after_name(stat: &str) -> Option<&str> {
    Some(stat.rsplit_once(')')?.1.trim_start())
}

/// Sum of utime, stime, cutime and cstime: fields 14 to 17 of proc(5), where the state is field 3.
fn cpu_ticks(stat: &str) -> Option<u64> {
    let mut ticks = after_name(stat)?.split_ascii_whitespace().skip(14 - 3);
    (0..4).map(|_| ticks.next()?.parse::<u64>().ok()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_time_is_parsed_after_a_hostile_name() {
        let stat = "42 (a) b (c) S 1 42 42 0 -1 4194560 90 80 0 0 5 7 11 13 20 0 1 0 100 0 0";
        assert_eq!(cpu_ticks(stat), Some(5 + 7 + 11 + 13));
        assert_eq!(cpu_ticks("42 (cut off) S 1"), None);
    }

    #[test]
    fn rollup_figures_are_in_bytes() {
        let text = "00400000-7fff [rollup]\nRss:    1552 kB\nPss:     309 kB\nPss_Anon:   100 kB\n";
        assert_eq!(rollup_bytes(text, "Rss:"), Some(1552 * 1024));
        assert_eq!(rollup_bytes(text, "Pss:"), Some(309 * 1024));
        assert_eq!(rollup_bytes(text, "Swap:"), None);
    }

    #[test]
    fn this_process_has_usage_figures() {
        let me = std::process::id();
        assert!(cpu_seconds(me).is_some());
        assert!(rss(me).unwrap() >= pss(me).unwrap());
        assert!(open_fds(me).unwrap() >= 3);
        assert!(tree(me).contains(&me));
        assert_eq!(tree(0), []);
    }
}
