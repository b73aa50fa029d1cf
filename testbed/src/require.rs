//! What a test needs from the machine: demanded, never skipped.

use std::env;
use std::path::PathBuf;
use std::process::Command;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Panics unless the process is root, which making namespaces takes.
#[track_caller]
pub fn require_root() {
    assert!(
        rustix::process::geteuid().is_root(),
        "this test makes network namespaces and must run as root (a skipped test is a failing one)"
    );
}

/// Panics unless `program` is installed; the message says how to install it.
#[track_caller]
pub fn require_program(program: &str) {
    assert!(
        find_program(program).is_some(),
        "this test runs {program:?}, which is not installed: apt-get install {} (a skipped test is a failing one)",
        debian_package(program)
    );
}

/// Searches `PATH` for `program`, then `/usr/sbin` and `/sbin`, which an ordinary user's `PATH`
/// leaves out, and `/usr/lib/podman`, where Debian keeps what podman alone calls.
pub fn find_program(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin", "/usr/lib/podman"].map(PathBuf::from))
        .map(|directory| directory.join(program))
        .find(|path| path.is_file())
}

/// The Debian package of a program the tests and benchmarks run; its own name where that is the
/// package.
pub fn debian_package(program: &str) -> &str {
    match program {
        "dockerd" | "docker" | "docker-proxy" => "docker.io",
        "ip" | "ss" | "bridge" => "iproute2",
        "nft" => "nftables",
        "dig" => "bind9-dnsutils",
        "ping" => "iputils-ping",
        "etcd" => "etcd-server",
        "pasta" => "passt",
        "newuidmap" | "newgidmap" => "uidmap",
        "unshare" | "nsenter" | "setpriv" => "util-linux",
        "docker-init" => "docker.io",
        "promtool" => "prometheus",
        "busybox" => "busybox-static",
        other => other,
    }
}

/// Raises this process's limit of open files towards `wanted` and returns the limit then in force.
///
/// Children inherit it. Without `CAP_SYS_RESOURCE`, which root inside a sandbox may lack, the hard
/// limit is as far as it goes: a caller that cannot do with less has to check.
pub fn raise_open_files(wanted: u64) -> u64 {
    let limit = getrlimit(Resource::Nofile);
    // `None` is no limit.
    let current = limit.current.unwrap_or(u64::MAX);
    let hard = limit.maximum.unwrap_or(u64::MAX);
    if current >= wanted {
        return current;
    }
    let raised = Rlimit { current: Some(wanted), maximum: Some(hard.max(wanted)) };
    if setrlimit(Resource::Nofile, raised).is_ok() {
        return wanted;
    }
    let most = Rlimit { current: limit.maximum, maximum: limit.maximum };
    if setrlimit(Resource::Nofile, most).is_ok() { hard } else { current }
}

/// The first line that `program args...` prints, on either stream: for naming versions in reports.
///
/// `None` if it cannot be run.
pub fn version_line(program: &str, args: &[&str]) -> Option<String> {
    let output = Command::new(program).args(args).output().ok()?;
    let text = if output.stdout.is_empty() { output.stderr } else { output.stdout };
    String::from_utf8_lossy(&text)
        .lines()
        .map(str::trim)
        .find(|line| !line.is_empty())
        .map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packages_are_named_as_debian_does() {
        assert_eq!(debian_package("docker-proxy"), "docker.io");
        assert_eq!(debian_package("haproxy"), "haproxy");
    }

    #[test]
    fn a_program_that_is_there_is_found() {
        require_program("sh");
    }

    #[test]
    #[should_panic(expected = "apt-get install no-such-program")]
    fn a_program_that_is_not_there_panics() {
        require_program("no-such-program");
    }
}
