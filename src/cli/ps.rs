//! `tidegate ps`: lists services, endpoints and networks of the running instance.

use super::event_loop;
use super::object_name::checked;
use super::output::print;
use crate::table::table;
use clap::Args;
use serde::Serialize;
use tidegate_api::client::{Client, ClientError, DAEMON};
use tidegate_api::types::{Endpoint, Network, Project, Service, State, Status};
use tidegate_model::PublishLabel;
use tidegate_publish::bind::runs;

/// List services, endpoints and networks with their addresses and published ports
///
/// Shows the daemon and all projects in the foreground of this user, or the instance on the socket
/// TIDEGATE_SOCKET. Exits with 1 if no instance is running.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  tidegate ps\n  tidegate ps shop --json | jq '.[].endpoints[].ports[].publish'"
)]
pub(super) struct Ps {
    /// Only this project; "daemon" for the daemon with all projects in the background
    #[arg(value_name = "PROJECT")]
    project: Option<String>,

    /// Print JSON: an array with an object for each instance, which has status, networks and
    /// endpoints, each in the format of the API
    #[arg(long)]
    json: bool,
}

/// What an instance tells about itself.
#[derive(Serialize)]
struct Instance {
    status: Status,
    networks: Vec<Network>,
    endpoints: Vec<Endpoint>,
}

impl Instance {
    async fn fetch(client: &Client) -> Result<Self, ClientError> {
        Ok(Self {
            status: client.get("/v1/status").await?,
            networks: client.get("/v1/networks").await?,
            endpoints: client.get("/v1/endpoints").await?,
        })
    }

    /// Removes what does not belong to `project`, which runs in the background.
    fn restrict_to(&mut self, project: &str) {
        let prefix = format!("{project}/");
        self.status.services.retain(|one| one.name.starts_with(&prefix));
        self.networks.retain(|one| one.name.starts_with(&prefix));
        self.endpoints.retain(|one| one.name.starts_with(&prefix));
    }

    fn tables(&self) -> String {
        let services = services_table(&self.status.services, &self.endpoints);
        format!("{services}\n{}{}", networks_table(&self.networks), not_served(&self.status))
    }
}

impl Ps {
    pub(super) fn run(&self) -> anyhow::Result<()> {
        let event_loop = event_loop()?;
        let mut background = None;
        let clients = match &self.project {
            Some(project) => {
                let own = Client::of(checked(project)?)?;
                background = event_loop.block_on(background_project(&own, project))?;
                vec![if background.is_some() { Client::of(DAEMON)? } else { own }]
            }
            None => Client::all()?,
        };
        let fetch = |client: &Client| event_loop.block_on(Instance::fetch(client));
        let mut instances = clients.iter().map(fetch).collect::<Result<Vec<Instance>, _>>()?;
        if let (Some(project), [daemon]) = (&background, &mut instances[..]) {
            daemon.restrict_to(&project.name);
        }
        let text = match &instances[..] {
            _ if self.json => format!("{}\n", serde_json::to_string_pretty(&instances)?),
            [one] => one.tables(),
            several => {
                let texts = several.iter().map(|one| {
                    let Status { project, pid, .. } = &one.status;
                    format!("{project} (process {pid})\n{}", one.tables())
                });
                texts.collect::<Vec<_>>().join("\n")
            }
        };
        print(&text)
    }
}

/// Returns `project` if it runs in the background. `own` is the client of an instance of that name.
async fn background_project(own: &Client, project: &str) -> anyhow::Result<Option<Project>> {
    let daemon = Client::of(DAEMON)?;
    if project == DAEMON || own.is_running() || !daemon.is_running() {
        return Ok(None);
    }
    let projects: Vec<Project> = daemon.get("/v1/projects").await?;
    Ok(projects.into_iter().find(|one| one.name == project))
}

/// List the running instances: the daemon, and projects in the foreground and in the background
///
/// Shows those of this user, or the instance on the socket TIDEGATE_SOCKET.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  tidegate ls\n  tidegate ls --json | jq -r '.[] | .status.project, .socket'"
)]
pub(super) struct Ls {
    /// Print JSON: an array with an object for each instance, which has status and projects (those
    /// in the background) in the format of the API, and the path of its socket
    #[arg(long)]
    json: bool,
}

impl Ls {
    pub(super) fn run(&self) -> anyhow::Result<()> {
        let clients = Client::running()?;
        let event_loop = event_loop()?;
        let fetch = |client: &Client| -> Result<(Status, Vec<Project>), ClientError> {
            event_loop.block_on(async {
                Ok((client.get("/v1/status").await?, client.get("/v1/projects").await?))
            })
        };
        let statuses = clients.iter().map(fetch).collect::<Result<Vec<_>, _>>()?;
        let all = statuses.iter().zip(&clients);
        if self.json {
            let all = all.map(|((status, projects), client)| {
                let socket = client.path();
                serde_json::json!({ "status": status, "projects": projects, "socket": socket })
            });
            return print(&format!(
                "{}\n",
                serde_json::to_string_pretty(&all.collect::<Vec<_>>())?
            ));
        }
        let mut rows = vec![["PROJECT", "SERVICES", "PID", "STARTED", "FILE"].map(str::to_owned)];
        let up = |services: &[Service]| {
            let is_up = |one: &&Service| matches!(one.state, State::Running | State::Adopted);
            format!("{}/{}", services.iter().filter(is_up).count(), services.len())
        };
        for (status, projects) in &statuses {
            let file = status.compose_file.as_ref().or(status.state_file.as_ref());
            rows.push([
                status.project.clone(),
                up(&status.services),
                status.pid.to_string(),
                status.started.clone(),
                file.cloned().unwrap_or_default(),
            ]);
            // The process of a project in the background is its supervisor.
            for project in projects {
                let began = project.services.iter().filter_map(|one| one.since.clone()).min();
                rows.push([
                    project.name.clone(),
                    up(&project.services),
                    project.supervisor.map(|pid| pid.to_string()).unwrap_or_default(),
                    began.unwrap_or_default(),
                    project.compose_file.clone().unwrap_or_default(),
                ]);
            }
        }
        print(&table(&rows))
    }
}

/// A line that says that the metrics endpoint is enabled but not served.
fn not_served(status: &Status) -> String {
    match &status.metrics {
        Some(metrics) if metrics.served.is_none() => {
            format!(
                "\nmetrics are not served: {} is in use by another program; retrying\n",
                metrics.address
            )
        }
        _ => String::new(),
    }
}

/// One row per network of each service. The first row also has the columns of the service itself.
pub(super) fn services_table(services: &[Service], endpoints: &[Endpoint]) -> String {
    let mut rows = vec![["SERVICE", "STATE", "NETWORK", "ADDRESS", "PUBLISHED"].map(str::to_owned)];
    for endpoint in endpoints {
        let state = services.iter().find(|service| service.name == endpoint.name).map(state);
        let mut own = [endpoint.name.clone(), state.unwrap_or_default(), published(endpoint)];
        for attachment in &endpoint.attachments {
            let [name, state, ports] = std::mem::take(&mut own);
            let addresses: Vec<_> =
                attachment.addresses.iter().map(|net| net.addr().to_string()).collect();
            rows.push([name, state, attachment.network.clone(), addresses.join(", "), ports]);
        }
    }
    table(&rows)
}

pub(super) fn networks_table(networks: &[Network]) -> String {
    let mut rows = vec![["NETWORK", "SUBNET", "GATEWAY", "INTERNAL", "BRIDGE"].map(str::to_owned)];
    for network in networks {
        let list = |of: fn(&tidegate_api::types::Subnet) -> String| {
            network.subnets.iter().map(of).collect::<Vec<_>>().join(", ")
        };
        rows.push([
            network.name.clone(),
            list(|one| one.subnet.to_string()),
            list(|one| one.gateway.to_string()),
            if network.internal { "yes" } else { "no" }.to_owned(),
            network.bridge.clone(),
        ]);
    }
    table(&rows)
}

/// `running`, `ended (1)`, `restarting (signal 9, 3 times)`.
pub(super) fn state(service: &Service) -> String {
    let word = match service.state {
        State::Starting => "starting",
        State::Running => "running",
        State::Restarting => "restarting",
        State::Ended => "ended",
        State::Adopted => "adopted",
        State::Gone => "gone",
    };
    let mut remarks = Vec::new();
    if let Some(exit) = service.exit {
        remarks.extend(exit.code.map(|code| code.to_string()));
        remarks.extend(exit.signal.map(|signal| format!("signal {signal}")));
    }
    match service.restarts {
        0 => {}
        1 => remarks.push("restarted once".to_owned()),
        times => remarks.push(format!("restarted {times} times")),
    }
    if remarks.is_empty() { word.to_owned() } else { format!("{word} ({})", remarks.join(", ")) }
}

fn published(endpoint: &Endpoint) -> String {
    let label = |port: &tidegate_api::types::Port| {
        Some((port.publish.parse::<PublishLabel>().ok()?, port.container_port))
    };
    let ports: Vec<_> = endpoint.ports.iter().filter_map(label).collect();
    let runs = runs(&ports).into_iter().map(|(from, to)| format!("{from}->{to}"));
    runs.collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use tidegate_api::types::Exit;

    #[test]
    fn a_state_shows_the_last_exit_and_the_restarts() {
        let mut service = Service {
            name: "web".into(),
            state: State::Running,
            pid: Some(1),
            restarts: 0,
            exit: None,
            since: None,
        };
        assert_eq!(state(&service), "running");
        service.restarts = 3;
        assert_eq!(state(&service), "running (restarted 3 times)");
        service.state = State::Ended;
        service.restarts = 1;
        service.exit = Some(Exit { code: Some(2), signal: None });
        assert_eq!(state(&service), "ended (2, restarted once)");
        service.exit = Some(Exit { code: None, signal: Some(9) });
        service.restarts = 0;
        assert_eq!(state(&service), "ended (signal 9)");
    }
}
