//! `tidegate service`: the services of the cluster.

use super::duration::timeout;
use super::object_name::checked;
use super::output::print;
use super::{UsageError, event_loop};
use crate::table::table;
use clap::{Args, Subcommand, ValueEnum};
use std::fmt::Write;
use std::time::Duration;
use tidegate_api::client::Client;
use tidegate_api::types::{
    Balance, HealthCheck, MeshService, NewMeshService, Probe, Scale, ServiceSource, TaskState,
};

/// Publish ports on all hosts of the cluster, which lead to tasks on any of them
///
/// `tidegate attach --service` adds tasks.
#[derive(Debug, Args)]
pub(super) struct Services {
    #[command(subcommand)]
    command: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    Create(Create),
    /// List the services, their tasks, and what is wrong
    Ls {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Set how many tasks get connections; the others stand by, and replace those that fail
    Scale {
        /// Name of the service
        name: String,
        /// Number of tasks, or all
        #[arg(value_name = "NUMBER|all", value_parser = replicas)]
        replicas: Replicas,
    },
    /// Remove a service; its tasks stay attached
    Rm {
        /// Name of the service
        name: String,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Replicas {
    All,
    AtMost(u32),
}

fn replicas(text: &str) -> Result<Replicas, String> {
    match text {
        "all" => Ok(Replicas::All),
        number => {
            number.parse().map(Replicas::AtMost).map_err(|_| "use a number, or all".to_owned())
        }
    }
}

/// Create a service
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  tidegate service create shop --network front -p 80:8080\n  tidegate service create dns --network front -p 53:5353/udp --balance source\n  tidegate service create api --network front -p 443:8443 --health-http 8080/ready --balance least-conn"
)]
struct Create {
    /// Name of the service, also in DNS
    name: String,

    /// The overlay network of its tasks
    #[arg(long, value_name = "NETWORK")]
    network: String,

    /// Publish ports on all hosts: PORT[-END]:PORT[-END][/tcp|udp]
    #[arg(short, long, value_name = "SPEC", required = true)]
    publish: Vec<String>,

    /// Which task gets the next connection
    #[arg(long, value_enum, default_value_t)]
    balance: BalanceOption,

    /// Prefer tasks on the host that has accepted the connection
    #[arg(long)]
    prefer_local: bool,

    /// What the tasks see of a client
    #[arg(long, value_enum, default_value_t)]
    source: SourceOption,

    /// A task is healthy while it accepts TCP connections at this port
    #[arg(long, value_name = "PORT", group = "health")]
    health_tcp: Option<u16>,

    /// A task is healthy while a GET request succeeds: the port, then the path
    #[arg(long, value_name = "PORT/PATH", group = "health")]
    health_http: Option<String>,

    /// Time between two health checks
    #[arg(long, value_name = "TIME", default_value = "2s", value_parser = timeout, requires = "health")]
    health_interval: Duration,

    /// Time for one health check
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = timeout, requires = "health")]
    health_timeout: Duration,

    /// Failed checks in succession after which a task gets no more connections
    #[arg(long, value_name = "NUMBER", default_value_t = 3, requires = "health")]
    health_retries: u32,

    /// Time for open connections when a task is detached
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = super::duration::optional_timeout)]
    drain: Duration,

    /// How many tasks get connections; the others stand by [default: all]
    #[arg(long, value_name = "NUMBER")]
    replicas: Option<u32>,

    /// Print the service as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum BalanceOption {
    /// In turn, by weight
    #[default]
    RoundRobin,
    /// The task with the fewest open connections for its weight
    LeastConn,
    /// By the address of the client: a client stays with its task
    Source,
}

#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum SourceOption {
    /// Its address
    #[default]
    Client,
    /// An address of the network
    Proxy,
    /// The same, and the address of the client in a header of the PROXY protocol, version 2 (TCP)
    ProxyProtocol,
    /// The same with version 1
    ProxyProtocolV1,
}

impl Services {
    pub(super) fn run(&self) -> anyhow::Result<()> {
        let client = Client::new()?;
        let event_loop = event_loop()?;
        match &self.command {
            Action::Create(create) => {
                let service: MeshService =
                    event_loop.block_on(client.post("/v1/services", &create.request()?))?;
                if create.json {
                    return print(&format!("{}\n", serde_json::to_string_pretty(&service)?));
                }
                print(&report(std::slice::from_ref(&service)))
            }
            Action::Ls { json } => {
                let services: Vec<MeshService> = event_loop.block_on(client.get("/v1/services"))?;
                if *json {
                    return print(&format!("{}\n", serde_json::to_string_pretty(&services)?));
                }
                print(&report(&services))
            }
            Action::Scale { name, replicas } => {
                let replicas = match replicas {
                    Replicas::All => None,
                    Replicas::AtMost(number) => Some(*number),
                };
                let target = format!("/v1/services/{}", checked(name)?);
                let service: MeshService =
                    event_loop.block_on(client.patch(&target, &Scale { replicas }))?;
                print(&report(std::slice::from_ref(&service)))
            }
            Action::Rm { name } => {
                let target = format!("/v1/services/{}", checked(name)?);
                Ok(event_loop.block_on(client.delete(&target))?)
            }
        }
    }
}

impl Create {
    fn request(&self) -> Result<NewMeshService, UsageError> {
        let probe = match (&self.health_tcp, &self.health_http) {
            (Some(port), _) => Some(Probe::Tcp(*port)),
            (None, Some(text)) => Some(http_probe(text)?),
            (None, None) => None,
        };
        let ms = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let health = probe.map(|probe| HealthCheck {
            probe,
            interval_ms: ms(self.health_interval),
            timeout_ms: ms(self.health_timeout),
            retries: self.health_retries,
        });
        let drain_s = self.drain.as_millis().div_ceil(1_000);
        Ok(NewMeshService {
            name: self.name.clone(),
            network: self.network.clone(),
            ports: self.publish.clone(),
            balance: match self.balance {
                BalanceOption::RoundRobin => Balance::RoundRobin,
                BalanceOption::LeastConn => Balance::LeastConn,
                BalanceOption::Source => Balance::Source,
            },
            prefer_local: self.prefer_local,
            source: match self.source {
                SourceOption::Client => ServiceSource::Client,
                SourceOption::Proxy => ServiceSource::Proxy,
                SourceOption::ProxyProtocol => ServiceSource::ProxyProtocol,
                SourceOption::ProxyProtocolV1 => ServiceSource::ProxyProtocolV1,
            },
            health,
            drain_s: u32::try_from(drain_s).unwrap_or(u32::MAX),
            replicas: self.replicas,
        })
    }
}

fn http_probe(text: &str) -> Result<Probe, UsageError> {
    let (port, path) = text.split_once('/').unwrap_or((text, ""));
    let port = port.parse().map_err(|_| {
        UsageError(format!("--health-http {text}: use PORT/PATH, such as 8080/ready"))
    })?;
    Ok(Probe::Http { port, path: format!("/{path}") })
}

/// The report for people: the services, their tasks, and what is wrong.
pub(super) fn report(services: &[MeshService]) -> String {
    let mut rows =
        vec![["SERVICE", "NETWORK", "PORTS", "BALANCE", "READY", "HOSTS"].map(str::to_owned)];
    for service in services {
        let ready = service.tasks.iter().filter(|task| task.state == TaskState::Ready).count();
        let wanted = match service.replicas {
            Some(replicas) => format!("{ready}/{} of {}", service.tasks.len(), replicas),
            None => format!("{ready}/{}", service.tasks.len()),
        };
        let serving =
            service.hosts.iter().filter(|host| host.ports.len() == service.ports.len()).count();
        rows.push([
            service.name.clone(),
            service.network.clone(),
            ports(service),
            balance(service.balance).to_owned(),
            wanted,
            format!("{serving}/{}", service.hosts.len()),
        ]);
    }
    let mut text = table(&rows);
    let mut rows = vec![
        ["TASK", "SERVICE", "HOST", "ADDRESS", "STATE", "WEIGHT", "OPEN", "FAILED"]
            .map(str::to_owned),
    ];
    for service in services {
        rows.extend(service.tasks.iter().map(|task| {
            let addresses: Vec<String> = task.addresses.iter().map(ToString::to_string).collect();
            [
                task.name.clone(),
                service.name.clone(),
                task.host.clone(),
                addresses.join(", "),
                state(task.state).to_owned(),
                task.weight.to_string(),
                task.open.to_string(),
                task.failures.to_string(),
            ]
        }));
    }
    if rows.len() > 1 {
        text.push('\n');
        text.push_str(&table(&rows));
    }
    for service in services {
        for host in &service.hosts {
            // Writing to a string does not fail.
            if let Some(problem) = &host.problem {
                let _ = writeln!(text, "{} on {}: {problem}", service.name, host.host);
            }
        }
    }
    text
}

fn ports(service: &MeshService) -> String {
    let port = |port: &tidegate_api::types::ServicePort| {
        let protocol = format!("{:?}", port.protocol).to_lowercase();
        format!("{}:{}/{protocol}", port.published, port.target)
    };
    service.ports.iter().map(port).collect::<Vec<_>>().join(", ")
}

fn balance(balance: Balance) -> &'static str {
    match balance {
        Balance::RoundRobin => "round-robin",
        Balance::LeastConn => "least-conn",
        Balance::Source => "source",
    }
}

fn state(state: TaskState) -> &'static str {
    match state {
        TaskState::Ready => "ready",
        TaskState::Starting => "starting",
        TaskState::Draining => "draining",
        TaskState::Silent => "silent",
        TaskState::Standby => "standby",
        TaskState::Ejected => "ejected",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tidegate_api::types::{ServiceHost, ServicePort, ServiceTask, Transport};

    #[test]
    fn the_report_shows_tasks_and_problems() {
        let task = |name: &str, host: &str, state| ServiceTask {
            name: name.into(),
            host: host.into(),
            addresses: vec![[10, 9, 0, 2].into()],
            weight: 1,
            state,
            open: 3,
            connections: 10,
            failures: 0,
            ejections: 0,
        };
        let host = |host: &str, ports: &[&str], problem: Option<&str>| ServiceHost {
            host: host.into(),
            ports: ports.iter().map(|port| (*port).to_owned()).collect(),
            problem: problem.map(str::to_owned),
        };
        let shop = MeshService {
            name: "shop".into(),
            network: "front".into(),
            ports: vec![ServicePort { protocol: Transport::Tcp, published: 80, target: 8080 }],
            balance: Balance::RoundRobin,
            prefer_local: false,
            source: ServiceSource::Client,
            health: None,
            drain_s: 10,
            replicas: Some(1),
            tasks: vec![task("a", "one", TaskState::Ready), task("b", "two", TaskState::Standby)],
            hosts: vec![host("one", &["80/tcp"], None), host("two", &[], Some("in use"))],
        };
        assert_eq!(
            report(&[shop]),
            "SERVICE  NETWORK  PORTS        BALANCE      READY     HOSTS
shop     front    80:8080/tcp  round-robin  1/2 of 1  1/2

TASK  SERVICE  HOST  ADDRESS   STATE    WEIGHT  OPEN  FAILED
a     shop     one   10.9.0.2  ready    1       3     0
b     shop     two   10.9.0.2  standby  1       3     0
shop on two: in use
"
        );
    }

    #[test]
    fn health_checks_are_parsed() {
        assert_eq!(
            http_probe("8080/ready?full=1").unwrap(),
            Probe::Http { port: 8080, path: "/ready?full=1".into() }
        );
        assert_eq!(http_probe("80").unwrap(), Probe::Http { port: 80, path: "/".into() });
        assert!(http_probe("/ready").is_err());
        assert_eq!(replicas("all"), Ok(Replicas::All));
        assert_eq!(replicas("0"), Ok(Replicas::AtMost(0)));
        assert!(replicas("-1").is_err());
    }
}
