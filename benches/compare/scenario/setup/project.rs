//! `tidegate up` with a Compose file that adopts namespaces.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;
use std::{fs, io};

use anyhow::{Result, ensure};
use tempfile::TempDir;
use tidegate_testbed::{Namespace, Process, Signal};

use super::{CONTAINER_PORT, FIRST_PORT, Firewall, TIMEOUT, Times};
use crate::contender::Contender;
use crate::lab::Lab;

/// Part of the line that tidegate prints when it is ready.
const ANNOUNCEMENT: &str = "Ctrl-C takes all of it down";

/// Brings up `endpoints`, distributed over `networks`, and takes them down; `check` is called in
/// between.
pub(super) fn time(
    lab: &Lab,
    contender: &Contender,
    networks: u8,
    endpoints: &[Namespace],
    firewall: Firewall,
    check: impl FnOnce() -> Result<()>,
) -> Result<Times> {
    let paths: Vec<PathBuf> = endpoints.iter().map(Namespace::path).collect();
    let begin = Instant::now();
    let mut up = up(lab, contender, &compose(networks, &paths), &[&firewall.flag()])?;
    let ready = begin.elapsed();
    check()?;
    let begin = Instant::now();
    up.process.signal(Signal::TERM);
    // The end of its output marks the exit to the microsecond; polling the process would be
    // accurate only to a millisecond.
    let output = up.process.wait_for_output(TIMEOUT);
    let gone = begin.elapsed();
    ensure!(up.process.wait(TIMEOUT).success(), "tidegate up failed: {output}");
    Ok(Times { ready, gone })
}

/// A running project, taken down on drop.
pub(crate) struct Up {
    pub(crate) process: Process,
    pub(crate) directory: TempDir,
}

/// Brings up the project in `file`.
pub(crate) fn up(lab: &Lab, contender: &Contender, file: &str, flags: &[&str]) -> Result<Up> {
    let directory = in_memory()?;
    let path = directory.path().join("compose.yaml");
    fs::write(&path, file)?;
    let mut command = contender.command(lab);
    command.arg("up").arg("-f").arg(path).args(flags);
    let run = directory.path().join("run");
    command.env("TIDEGATE_RUN_DIR", &run).env("TIDEGATE_SOCKET", run.join("api.sock"));
    fs::create_dir_all(&run)?;
    let process = Process::spawn(&mut command);
    process.wait_for_line(ANNOUNCEMENT, TIMEOUT);
    Ok(Up { process, directory })
}

/// A directory on a tmpfs, like `/run` on hosts: on a disk, a thousand small files would affect the
/// result.
pub(crate) fn in_memory() -> io::Result<TempDir> {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }
}

/// A service for each of `namespaces`, on `networks` in turn, with one published port each.
fn compose(networks: u8, namespaces: &[PathBuf]) -> String {
    let mut text = String::from("name: bench\nnetworks:\n");
    for network in 0..networks {
        let subnet = 100 + network;
        // Writing to a String cannot fail.
        let _ = writeln!(
            text,
            "  n{network}: {{ ipam: {{ config: [ {{ subnet: 10.{subnet}.0.0/16 }} ] }} }}"
        );
    }
    text += "services:\n";
    for ((number, path), port) in namespaces.iter().enumerate().zip(FIRST_PORT..) {
        let network = number % usize::from(networks);
        let _ = writeln!(
            text,
            "  s{number}: {{ x-netns: {}, networks: [ n{network} ], ports: [ \"{port}:{CONTAINER_PORT}\" ] }}",
            path.display()
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn services_use_the_networks_in_turn_with_one_port_each() {
        let namespaces = ["/a", "/b", "/c"].map(PathBuf::from);
        let expected = "\
name: bench
networks:
  n0: { ipam: { config: [ { subnet: 10.100.0.0/16 } ] } }
  n1: { ipam: { config: [ { subnet: 10.101.0.0/16 } ] } }
services:
  s0: { x-netns: /a, networks: [ n0 ], ports: [ \"20000:80\" ] }
  s1: { x-netns: /b, networks: [ n1 ], ports: [ \"20001:80\" ] }
  s2: { x-netns: /c, networks: [ n0 ], ports: [ \"20002:80\" ] }
";
        assert_eq!(compose(2, &namespaces), expected);
    }
}
