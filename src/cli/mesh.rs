//! `tidegate mesh`: the cluster of the daemon.

use super::object_name::checked;
use super::output::print;
use super::{UsageError, event_loop};
use crate::table::table;
use anyhow::Context;
use clap::{Args, Subcommand};
use std::fmt::Write;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use tidegate_api::client::Client;
use tidegate_api::types::{HostState, Mesh, MeshHost, NewMembership};

/// Join hosts to a cluster, whose overlay networks span them
#[derive(Debug, Args)]
pub(super) struct MeshCommand {
    #[command(subcommand)]
    command: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    Join(Join),
    Leave(Leave),
    /// Show the hosts, their states, and what is wrong
    Status {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

/// Join the cluster of an etcd
///
/// The first host that joins creates the cluster. The daemon remains a member after a restart.
/// Between the hosts, UDP ports 4789 (VXLAN) and 4788 (heartbeats) must be open.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  tidegate mesh join --etcd http://10.0.0.1:2379 --advertise 10.0.0.11\n  tidegate mesh join --etcd https://a:2379,https://b:2379 --advertise 10.0.0.12 --etcd-ca ca.pem --etcd-cert host.pem --etcd-key host.key"
)]
struct Join {
    /// URLs of the etcd servers
    #[arg(long, value_name = "URL", required = true, value_delimiter = ',')]
    etcd: Vec<String>,

    /// The address of this host at which the other hosts reach it
    #[arg(long, value_name = "IP")]
    advertise: IpAddr,

    /// Name of this host in the cluster [default: the host name]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,

    /// User name of etcd
    #[arg(long, value_name = "NAME", requires = "etcd_password_file")]
    etcd_user: Option<String>,

    /// File with the password of that user
    #[arg(long, value_name = "FILE", requires = "etcd_user")]
    etcd_password_file: Option<PathBuf>,

    /// File with the certificates of the authorities of the servers (PEM), for https URLs
    #[arg(long, value_name = "FILE")]
    etcd_ca: Option<PathBuf>,

    /// File with the certificate of this client (PEM)
    #[arg(long, value_name = "FILE", requires = "etcd_key", requires = "etcd_ca")]
    etcd_cert: Option<PathBuf>,

    /// File with the private key of this client (PEM)
    #[arg(long, value_name = "FILE", requires = "etcd_cert")]
    etcd_key: Option<PathBuf>,
}

/// Leave the cluster, or remove a host that no longer exists
#[derive(Debug, Args)]
struct Leave {
    /// Detach the endpoints on overlay networks first, and leave even if etcd does not answer
    #[arg(long)]
    force: bool,

    /// Remove this host instead, which no longer exists
    #[arg(long, value_name = "NAME", conflicts_with = "force")]
    host: Option<String>,
}

impl MeshCommand {
    pub(super) fn run(&self) -> anyhow::Result<()> {
        let client = Client::new()?;
        match &self.command {
            Action::Join(join) => {
                let mesh: Mesh =
                    event_loop()?.block_on(client.post("/v1/mesh", &join.request()?))?;
                print(&report(&mesh))
            }
            Action::Leave(Leave { host: Some(host), .. }) => {
                let target = format!("/v1/mesh/hosts/{}", checked(host)?);
                Ok(event_loop()?.block_on(client.delete(&target))?)
            }
            Action::Leave(Leave { force, .. }) => {
                let target = format!("/v1/mesh?force={force}");
                Ok(event_loop()?.block_on(client.delete(&target))?)
            }
            Action::Status { json } => {
                let mesh: Mesh = event_loop()?.block_on(client.get("/v1/mesh"))?;
                if *json {
                    return print(&format!("{}\n", serde_json::to_string_pretty(&mesh)?));
                }
                print(&report(&mesh))
            }
        }
    }
}

impl Join {
    fn request(&self) -> anyhow::Result<NewMembership> {
        let file = |path: &Option<PathBuf>, option: &str| -> anyhow::Result<Option<String>> {
            let Some(path) = path else { return Ok(None) };
            let path = std::path::absolute(path).with_context(|| option.to_owned())?;
            let text = path.into_os_string().into_string();
            Ok(Some(text.map_err(|_| UsageError(format!("{option}: the path is not UTF-8")))?))
        };
        let host = match &self.name {
            Some(name) => name.clone(),
            None => host_name()?,
        };
        Ok(NewMembership {
            host,
            advertise: self.advertise,
            etcd: self.etcd.clone(),
            user: self.etcd_user.clone(),
            password_file: file(&self.etcd_password_file, "--etcd-password-file")?,
            authorities: file(&self.etcd_ca, "--etcd-ca")?,
            certificate: file(&self.etcd_cert, "--etcd-cert")?,
            key: file(&self.etcd_key, "--etcd-key")?,
        })
    }
}

/// The first label of the host name.
fn host_name() -> anyhow::Result<String> {
    let path = Path::new("/proc/sys/kernel/hostname");
    let name = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    Ok(name.trim().split('.').next().unwrap_or_default().to_owned())
}

/// The report for people: the cluster in one line, the hosts, what is wrong.
fn report(mesh: &Mesh) -> String {
    let mut text = String::new();
    let etcd = mesh.etcd.join(", ");
    let (answers, since) = match mesh.connected {
        true => ("answers", String::new()),
        false => ("DOES NOT ANSWER", format!(" since {}", mesh.connected_since)),
    };
    let plural = |count: usize, what: &str| match count {
        1 => format!("1 {what}"),
        count => format!("{count} {what}s"),
    };
    // Writing to a string does not fail.
    let _ = writeln!(
        text,
        "{}, {}; etcd {answers}{since} ({etcd})",
        plural(mesh.hosts.len(), "host"),
        plural(mesh.networks, "overlay network"),
    );
    let heading = ["HOST", "ADDRESS", "STATE", "LATENCY", "ENDPOINTS"].map(str::to_owned);
    let mut rows = vec![heading];
    for host in &mesh.hosts {
        let address = host.address.map_or_else(|| "-".to_owned(), |address| address.to_string());
        let latency = host.latency_us.map_or_else(
            || "-".to_owned(),
            |us| format!("{}.{:02} ms", us / 1_000, us % 1_000 / 10),
        );
        rows.push([host.name.clone(), address, state(host), latency, host.endpoints.to_string()]);
    }
    text.push_str(&table(&rows));
    if !mesh.services.is_empty() {
        text.push('\n');
        text.push_str(&super::service::report(&mesh.services));
    }
    for problem in &mesh.problems {
        let _ = writeln!(text, "since {}: {}", problem.since, problem.problem);
    }
    text
}

fn state(host: &MeshHost) -> String {
    let since = |text: &str| match &host.silent_since {
        Some(since) => format!("{text} since {since}"),
        None => text.to_owned(),
    };
    match host.state {
        HostState::Own => "this host".to_owned(),
        HostState::Up => "up".to_owned(),
        HostState::Unrecorded => "up, not in etcd".to_owned(),
        HostState::Silent => since("silent"),
        HostState::Down => since("down"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_report_shows_hosts_and_problems() {
        let host = |name: &str, state, latency_us| MeshHost {
            name: name.to_owned(),
            address: Some([192, 0, 2, 1].into()),
            state,
            silent_since: matches!(state, HostState::Silent)
                .then(|| "2026-01-31T12:00:00Z".to_owned()),
            latency_us,
            endpoints: 2,
        };
        let mesh = Mesh {
            host: "a".into(),
            etcd: vec!["http://192.0.2.9:2379".into()],
            connected: false,
            connected_since: "2026-01-31T12:00:01Z".into(),
            hosts: vec![
                host("a", HostState::Own, None),
                host("b", HostState::Up, Some(1_234)),
                host("c", HostState::Silent, None),
            ],
            networks: 1,
            services: Vec::new(),
            problems: vec![tidegate_api::types::MeshProblem {
                problem: "cluster store: no server answers".into(),
                since: "2026-01-31T12:00:01Z".into(),
            }],
        };
        assert_eq!(
            report(&mesh),
            "3 hosts, 1 overlay network; etcd DOES NOT ANSWER since 2026-01-31T12:00:01Z (http://192.0.2.9:2379)
HOST  ADDRESS    STATE                              LATENCY  ENDPOINTS
a     192.0.2.1  this host                          -        2
b     192.0.2.1  up                                 1.23 ms  2
c     192.0.2.1  silent since 2026-01-31T12:00:00Z  -        2
since 2026-01-31T12:00:01Z: cluster store: no server answers
"
        );
    }
}
