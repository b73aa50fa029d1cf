//! `tidegate up -d`, `down` and `logs`: projects in the background, which a daemon runs.

use super::compose_file::compose_file;
use super::object_name::checked;
use super::output::{is_broken_pipe, print};
use super::ps::services_table;
use super::{UsageError, event_loop};
use anyhow::{Context, bail};
use clap::Args;
use std::io::Write;
use std::path::Path;
use std::time::Duration;
use tidegate_api::client::{Client, ClientError, DAEMON};
use tidegate_api::types::{
    Driver, Endpoint, LogLine, NewAttachment, NewNetwork, NewProject, NewService, NewSubnet,
    OutputStream, Project, RestartPolicy,
};
use tidegate_compose::{self as compose, Names, Run};
use tidegate_model::Restart;

/// Stop the services of a project in the background, and remove its networks
///
/// Services get SIGTERM, and SIGKILL after the time that was given to tidegate up -d. Services that
/// depend on others are stopped first.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  tidegate down\n  tidegate down shop")]
pub(super) struct Down {
    /// The project [default: that of the Compose file in this directory, or the only one]
    #[arg(value_name = "PROJECT")]
    project: Option<String>,
}

impl Down {
    pub(super) fn run(&self) -> anyhow::Result<()> {
        let client = Client::of(DAEMON)?;
        let event_loop = event_loop()?;
        event_loop.block_on(async {
            let project = project(&client, self.project.as_deref()).await?;
            let down = client.delete_and_wait(&format!("/v1/projects/{project}")).await;
            down.map_err(|error| explain(error, &project))?;
            print(&format!("{project} is down\n"))
        })
    }
}

/// Print the output of the services of a project in the background
///
/// Each service keeps its last lines: up to 1 MiB of text, and 8 MiB for all services of a project.
/// What a service writes to standard error is printed on standard error.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  tidegate logs -f\n  tidegate logs -p shop --tail 20 web\n  tidegate logs --json | jq -r 'select(.stream == \"stderr\").text'"
)]
pub(super) struct Logs {
    /// Only this service
    #[arg(value_name = "SERVICE")]
    service: Option<String>,

    /// The project [default: that of the Compose file in this directory, or the only one]
    #[arg(short, long, value_name = "NAME")]
    project_name: Option<String>,

    /// Print new lines until the project ends
    #[arg(short, long)]
    follow: bool,

    /// Number of lines that were written before
    #[arg(short = 'n', long, value_name = "N", default_value_t = 1_000)]
    tail: usize,

    /// Print the time of each line
    #[arg(short, long)]
    timestamps: bool,

    /// Print JSON: an object per line, in the format of the API
    #[arg(long)]
    json: bool,
}

impl Logs {
    pub(super) fn run(&self) -> anyhow::Result<()> {
        let client = Client::of(DAEMON)?;
        let service = self.service.as_deref().map(checked).transpose()?;
        event_loop()?.block_on(async {
            let name = project(&client, self.project_name.as_deref()).await?;
            let known: Project = client
                .get(&format!("/v1/projects/{name}"))
                .await
                .map_err(|error| explain(error, &name))?;
            let prefix = format!("{name}/");
            let names = known.services.iter().filter_map(|one| one.name.strip_prefix(&prefix));
            let width = match service {
                Some(service) => service.chars().count(),
                None => names.map(|one| one.chars().count()).max().unwrap_or_default(),
            };
            let only = service.map(|service| format!("&service={service}")).unwrap_or_default();
            let target =
                format!("/v1/projects/{name}/logs?tail={}&follow={}{only}", self.tail, self.follow);
            let result = client.lines(&target, |line: LogLine| self.print(&line, width)).await;
            match result {
                // The reader has seen enough, as in `tidegate logs | head`.
                Err(error) if is_broken_pipe(&error) => Ok(()),
                result => result,
            }
        })
    }

    fn print(&self, line: &LogLine, width: usize) -> anyhow::Result<()> {
        let text = if self.json {
            format!("{}\n", serde_json::to_string(line)?)
        } else {
            let time = if self.timestamps { format!("{} ", line.time) } else { String::new() };
            format!("{:width$} | {time}{}\n", line.service, line.text)
        };
        let written = match line.stream {
            OutputStream::Stderr if !self.json => std::io::stderr().write_all(text.as_bytes()),
            _ => std::io::stdout().write_all(text.as_bytes()),
        };
        Ok(written?)
    }
}

/// Brings `project` of `file` up in the background.
pub(super) fn up(file: &Path, project: compose::Project, grace: Duration) -> anyhow::Result<()> {
    for warning in &project.warnings {
        tracing::warn!("{warning}");
    }
    let new = new_project(file, project, grace)?;
    let client = Client::of(DAEMON)?;
    event_loop()?.block_on(async {
        let up: Project = client
            .post_and_wait("/v1/projects", &new)
            .await
            .map_err(|error| explain(error, &new.name))?;
        let endpoints: Vec<Endpoint> = client.get("/v1/endpoints").await?;
        let prefix = format!("{}/", up.name);
        let own: Vec<Endpoint> =
            endpoints.into_iter().filter(|one| one.name.starts_with(&prefix)).collect();
        let table = services_table(&up.services, &own);
        print(&format!(
            "{table}tidegate logs -f -p {0} follows the output; tidegate down {0} ends it.\n",
            up.name
        ))
    })
}

/// Converts a Compose file to the request that brings it up.
fn new_project(
    file: &Path,
    project: compose::Project,
    grace: Duration,
) -> anyhow::Result<NewProject> {
    let file = std::path::absolute(file).context("path of the Compose file")?;
    let network = |network: compose::NetworkConfig| NewNetwork {
        name: network.name,
        driver: Driver::Bridge,
        encrypted: false,
        subnets: network
            .subnets
            .iter()
            .map(|one| NewSubnet { subnet: one.subnet, gateway: one.gateway })
            .collect(),
        ipv6: network.enable_ipv6,
        internal: network.internal,
        isolated: !network.inter_container,
        mtu: network.mtu,
        bridge: network.bridge,
        dns: network.dns,
        dns_at_gateway: network.names == Names::AtGateway,
    };
    Ok(NewProject {
        name: project.name,
        compose_file: file.to_str().map(str::to_owned),
        grace_ms: u64::try_from(grace.as_millis()).unwrap_or(u64::MAX),
        networks: project.networks.into_values().map(network).collect(),
        services: project.services.into_iter().map(new_service).collect::<Result<_, _>>()?,
    })
}

fn new_service(service: compose::Service) -> anyhow::Result<NewService> {
    let (command, netns) = match service.run {
        Run::Command(command) => (command, None),
        Run::Adopt(path) => (Vec::new(), Some(std::path::absolute(path)?)),
    };
    let text = |path: std::path::PathBuf| {
        path.into_os_string().into_string().map_err(|path| {
            UsageError(format!("service {:?}: path {path:?} is not UTF-8", service.name))
        })
    };
    let attachment = |one: &compose::ServiceNetwork| NewAttachment {
        network: one.network.clone(),
        addresses: [one.ipv4_address.map(Into::into), one.ipv6_address.map(Into::into)]
            .into_iter()
            .flatten()
            .collect(),
        aliases: one.aliases.clone(),
        any_source: one.any_source,
    };
    let (restart, max_restarts) = match service.restart {
        Restart::No => (RestartPolicy::No, None),
        Restart::OnFailure { max } => (RestartPolicy::OnFailure, max),
        Restart::Always => (RestartPolicy::Always, None),
        Restart::UnlessStopped => (RestartPolicy::UnlessStopped, None),
    };
    Ok(NewService {
        networks: service.networks.iter().map(attachment).collect(),
        ports: service.ports.iter().map(ToString::to_string).collect(),
        netns: netns.map(text).transpose()?,
        working_dir: text(service.working_dir.clone())?,
        command,
        environment: service.environment,
        hostname: service.hostname,
        dns: service.dns,
        dns_search: service.dns_search,
        dns_options: service.dns_options,
        restart,
        max_restarts,
        depends_on: service.depends_on,
        name: service.name,
    })
}

/// The project that the user means: `given`, or that of the Compose file in this directory, or the
/// only one in the background.
async fn project(client: &Client, given: Option<&str>) -> anyhow::Result<String> {
    if let Some(given) = given {
        return Ok(checked(given)?.to_owned());
    }
    if let Ok(file) = compose_file(None) {
        return Ok(compose::load(&file)?.name);
    }
    let projects: Vec<Project> =
        client.get("/v1/projects").await.map_err(|error| explain(error, "PROJECT"))?;
    match &projects[..] {
        [only] => Ok(only.name.clone()),
        [] => bail!("no project is up in the background; tidegate up -d starts one"),
        several => {
            let names: Vec<&str> = several.iter().map(|one| one.name.as_str()).collect();
            Err(UsageError(format!("name one of the projects {}", names.join(", "))).into())
        }
    }
}

/// Adds to an error that only a daemon runs projects in the background.
fn explain(error: ClientError, project: &str) -> anyhow::Error {
    match error {
        error @ ClientError::Connect { .. } => anyhow::anyhow!(
            "{error}; projects in the background belong to a daemon: start tidegate daemon first, or run {project} in \
             the foreground with tidegate up"
        ),
        error => error.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_compose_file_is_converted_completely() {
        let text = "
name: shop
networks:
  front: { enable_ipv6: true }
  back: { internal: true, x-dns: gateway, ipam: { config: [ { subnet: 10.77.0.0/24, gateway: 10.77.0.9 } ] } }
services:
  web:
    command: httpd -f
    environment: { MODE: fast }
    hostname: shop.example
    networks: { front: {}, back: { aliases: [ www ], ipv4_address: 10.77.0.2 } }
    ports: [ '8080:80', '127.0.0.1:5353:53/udp' ]
    restart: on-failure:3
    dns: 192.0.2.53
    depends_on: [ db ]
  db: { x-netns: /run/netns/db, networks: [ back ] }
";
        let file = Path::new("/srv/shop/compose.yaml");
        let project = compose::parse(text, file, "other", &|_| None).unwrap();
        let new = new_project(file, project, Duration::from_secs(3)).unwrap();
        assert_eq!((new.name.as_str(), new.grace_ms), ("shop", 3_000));
        let back = new.networks.iter().find(|one| one.name == "back").unwrap();
        assert!(back.internal && back.dns_at_gateway);
        assert_eq!(back.subnets[0].gateway, Some("10.77.0.9".parse().unwrap()));
        let web = &new.services[0];
        assert_eq!(web.command, ["httpd", "-f"]);
        assert_eq!(web.ports, ["8080:80", "127.0.0.1:5353:53/udp"]);
        assert_eq!((web.restart, web.max_restarts), (RestartPolicy::OnFailure, Some(3)));
        assert_eq!(web.networks[1].addresses, ["10.77.0.2".parse::<std::net::IpAddr>().unwrap()]);
        assert_eq!((web.working_dir.as_str(), web.depends_on.len()), ("/srv/shop", 1));
        assert_eq!(new.services[1].netns.as_deref(), Some("/run/netns/db"));
        assert!(new.services[1].command.is_empty());
    }
}
