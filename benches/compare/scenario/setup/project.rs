//! `tidegate up` with a Compose file whose services adopt namespaces.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;
use std::{fs, io};

use anyhow::{Result, ensure};
use tempfile::TempDir;
use tidegate_testbed::{Namespace, Process, Signal};

use super::{CONTAINER_PORT, FIRST_PORT, Firewall, PATIENCE, Times};
use crate::contender::Contender;
use crate::lab::Lab;

/// In the line that says that everything is up.
const ANNOUNCEMENT: &str = "Ctrl-C takes all of it down";

/// Brings `endpoints` up, spread over `networks`, and takes them down again; `check` is called in
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
    // Its output ends with it, to the microsecond; waiting for a process would look once a
    // millisecond.
    let told = up.process.wait_for_output(PATIENCE);
    let gone = begin.elapsed();
    ensure!(up.process.wait(PATIENCE).success(), "tidegate up failed: {told}");
    Ok(Times { ready, gone })
}

/// A project that is up, for as long as this lives.
pub(crate) struct Up {
    pub(crate) process: Process,
    pub(crate) directory: TempDir,
}

/// Brings `file` up.
pub(crate) fn up(lab: &Lab, contender: &Contender, file: &str, flags: &[&str]) -> Result<Up> {
    let directory = in_memory()?;
    let path = directory.path().join("compose.yaml");
    fs::write(&path, file)?;
    let mut command = contender.command(lab);
    command.arg("up").arg("-f").arg(path).args(flags);
    let process = Process::spawn(command.env("TIDEGATE_RUN_DIR", directory.path().join("run")));
    process.wait_for_line(ANNOUNCEMENT, PATIENCE);
    Ok(Up { process, directory })
}

/// A directory in memory, as `/run` is on hosts: on a disk a thousand small files make a
/// difference.
fn in_memory() -> io::Result<TempDir> {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }
}

/// A service for each of `namespaces`, on one of `networks` in turn, with one published port.
fn compose(networks: u8, namespaces: &[PathBuf]) -> String {
    let mut text = String::from("name: bench\nnetworks:\n");
    for network in 0..networks {
        let subnet = 100 + network;
        // Writing to a string succeeds.
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
    fn services_take_the_networks_in_turn_and_a_port_each() {
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
