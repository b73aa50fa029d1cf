//! netavark, called like podman does.

use std::fs::{self, File};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use tidegate_testbed::Namespace;

use super::{CONTAINER_PORT, FIRST_PORT, Times};
use crate::contender::Contender;
use crate::lab::Lab;

/// Sets up a network and takes it down; `check` is called in between.
pub(super) fn time(
    lab: &Lab,
    contender: &Contender,
    endpoint: &Namespace,
    check: impl FnOnce() -> Result<()>,
) -> Result<Times> {
    let directory = tempfile::tempdir()?;
    let call = |action| call(lab, contender, endpoint, directory.path(), action);
    fs::write(directory.path().join(INPUT), input())?;
    let ready = call("setup")?;
    check()?;
    Ok(Times { ready, gone: call("teardown")? })
}

/// The name of the file with the standard input from podman.
const INPUT: &str = "input.json";

fn call(
    lab: &Lab,
    contender: &Contender,
    endpoint: &Namespace,
    directory: &Path,
    action: &str,
) -> Result<Duration> {
    let mut command = contender.command(lab);
    command.arg("--config").arg(directory).args(["--rootless=false", "--aardvark-binary=", action]);
    command.arg(endpoint.path()).stdin(File::open(directory.join(INPUT))?);
    let begin = Instant::now();
    let output = command.output()?;
    let elapsed = begin.elapsed();
    let output_text = String::from_utf8_lossy(&output.stdout);
    ensure!(
        output.status.success(),
        "netavark {action}: {}: {}",
        output.status,
        output_text.trim()
    );
    Ok(elapsed)
}

/// A container on one network with one published port and without DNS. podman chooses the
/// addresses, not netavark.
fn input() -> String {
    let id = "0123456789abcdef".repeat(4);
    serde_json::json!({
        "container_id": id,
        "container_name": "bench",
        "port_mappings": [{
            "host_ip": "", "host_port": FIRST_PORT, "container_port": CONTAINER_PORT, "range": 1, "protocol": "tcp",
        }],
        "networks": { "bench": { "static_ips": ["10.100.0.2"], "interface_name": "eth0" } },
        "network_info": { "bench": {
            "name": "bench",
            "id": id,
            "driver": "bridge",
            "network_interface": "podman1",
            "created": "2026-01-01T00:00:00.0Z",
            "subnets": [{ "subnet": "10.100.0.0/16", "gateway": "10.100.0.1" }],
            "ipv6_enabled": false,
            "internal": false,
            "dns_enabled": false,
            "ipam_options": { "driver": "host-local" },
        } },
    })
    .to_string()
}
