//! Requirements of tests on the machine. An unmet requirement is a failure, not a skip.

use std::env;
use std::path::PathBuf;
use std::process::Command;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Panics unless the process is root, which creating namespaces requires.
#[track_caller]
pub fn require_root() {
    assert!(
        rustix::process::geteuid().is_root(),
        "this test creates network namespaces and must run as root (a skipped test is a failing one)"
    );
}

/// Panics unless `program` is installed. The message contains the command to install it.
#[track_caller]
pub fn require_program(program: &str) {
    assert!(
        find_program(program).is_some(),
        "this test requires {program:?}, which is not installed: apt-get install {} (a skipped test is a failing one)",
        debian_package(program)
    );
}

/// Searches `PATH` for `program`, then `/usr/sbin` and `/sbin`, which the `PATH` of an ordinary
/// user lacks, and `/usr/lib/podman`, the directory of helpers of podman in Debian.
pub fn find_program(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin", "/usr/lib/podman"].map(PathBuf::from))
        .map(|directory| directory.join(program))
        .find(|path| path.is_file())
}

/// Returns the path of a program that another package of this workspace builds, beside the running
/// test in `target`.
///
/// # Panics
/// If it was not built. `cargo test --workspace` builds all programs.
#[track_caller]
pub fn workspace_program(name: &str) -> PathBuf {
    let test = env::current_exe().expect("path of the test");
    // target/PROFILE/deps/TEST
    let program = test.ancestors().nth(2).map(|profile| profile.join(name));
    program
        .filter(|program| program.exists())
        .unwrap_or_else(|| panic!("{name} is not built; run cargo build --workspace"))
}

/// Returns the Debian package of a program of the tests and benchmarks. Programs not listed have a
/// package of the same name.
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

/// Raises the limit of open files of this process to `wanted` and returns the limit in force.
///
/// Children inherit it. Without `CAP_SYS_RESOURCE`, which root in a sandbox may lack, the hard
/// limit is the maximum. A caller that needs more must check the result.
pub fn raise_open_files(wanted: u64) -> u64 {
    let limit = getrlimit(Resource::Nofile);
    // `None` means no limit.
    let current = limit.current.unwrap_or(u64::MAX);
    let hard = limit.maximum.unwrap_or(u64::MAX);
    if current >= wanted {
        return current;
    }
    let raised = Rlimit { current: Some(wanted), maximum: Some(hard.max(wanted)) };
    if setrlimit(Resource::Nofile, raised).is_ok() {
        return wanted;
    }
    let highest = Rlimit { current: limit.maximum, maximum: limit.maximum };
    if setrlimit(Resource::Nofile, highest).is_ok() { hard } else { current }
}

/// Returns the first line that `program args...` prints on either stream, usually its version;
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
    fn packages_have_their_debian_names() {
        assert_eq!(debian_package("docker-proxy"), "docker.io");
        assert_eq!(debian_package("haproxy"), "haproxy");
    }

    #[test]
    fn an_installed_program_is_found() {
        require_program("sh");
    }

    #[test]
    #[should_panic(expected = "apt-get install no-such-program")]
    fn a_missing_program_panics() {
        require_program("no-such-program");
    }
}
