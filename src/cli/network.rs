//! `tidegate network`, `attach` and `detach`: changes of a running daemon.

use super::object_name::checked;
use super::output::print;
use super::ps::networks_table;
use super::{UsageError, event_loop};
use anyhow::Context;
use clap::{Args, Subcommand};
use ipnet::IpNet;
use std::future::Future;
use std::net::IpAddr;
use std::path::PathBuf;
use tidegate_api::client::{Client, ClientError};
use tidegate_api::types::{
    Driver, Endpoint, Network, NewAttachment, NewEndpoint, NewNetwork, NewSubnet, NewTask,
};

/// Create, list and remove networks of the daemon
#[derive(Debug, Args)]
pub(super) struct Networks {
    #[command(subcommand)]
    command: NetworkCommand,
}

#[derive(Debug, Subcommand)]
enum NetworkCommand {
    Create(Create),
    /// List all networks
    Ls {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Print one network as JSON
    Inspect {
        /// The name of the network
        name: String,
    },
    /// Remove a network without endpoints
    Rm {
        /// The name of the network
        name: String,
    },
}

/// Create a network
#[derive(Debug, Args)]
struct Create {
    /// The name of the network
    name: String,

    /// A subnet, at most one per address family [default: chosen]
    #[arg(long, value_name = "SUBNET")]
    subnet: Vec<IpNet>,

    /// The gateway address of a subnet [default: its first address]
    #[arg(long, value_name = "ADDRESS")]
    gateway: Vec<IpAddr>,

    /// Choose an IPv6 subnet
    #[arg(long)]
    ipv6: bool,

    /// No egress, and no access from outside except to published ports
    #[arg(long)]
    internal: bool,

    /// Members of the network cannot connect to each other
    #[arg(long)]
    isolated: bool,

    /// MTU in bytes [default: that of the default route; overlay: what fits between the hosts]
    #[arg(long, value_name = "BYTES")]
    mtu: Option<u32>,

    /// Name of the bridge [default: derived from the name of the network]
    #[arg(long, value_name = "NAME")]
    bridge: Option<String>,

    /// An upstream DNS server [default: those of the host]
    #[arg(long, value_name = "ADDRESS")]
    dns: Vec<IpAddr>,

    /// bridge: a network of this host; overlay: a network of all hosts of the cluster
    #[arg(short, long, value_name = "DRIVER", default_value = "bridge", value_parser = ["bridge", "overlay"])]
    driver: String,

    /// An option of the driver. None is supported: `encrypted` is rejected, see docs/mesh.md
    #[arg(short, long, value_name = "KEY[=VALUE]")]
    opt: Vec<String>,
}

/// Attach a network namespace to networks of the daemon
///
/// The endpoint gets an interface and addresses on each network, and names: its own and its
/// aliases. It is attached again when its path refers to a new namespace, after its container was
/// restarted.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  tidegate attach front --netns /run/netns/web --name web -p 8080:80\n  tidegate attach front back --pid 4711 --name db --ip 10.9.0.5 --alias database"
)]
pub(super) struct Attach {
    /// The networks, in the order of the interfaces; the first one that is not internal provides
    /// the default route
    #[arg(required = true, value_name = "NETWORK")]
    networks: Vec<String>,

    /// Path of the network namespace
    #[arg(long, value_name = "PATH", required_unless_present = "pid", conflicts_with = "pid")]
    netns: Option<PathBuf>,

    /// A process in the network namespace
    #[arg(long, value_name = "PID")]
    pid: Option<u32>,

    /// Name of the endpoint
    #[arg(long, value_name = "NAME")]
    name: String,

    /// An additional DNS name on all networks
    #[arg(long, value_name = "NAME")]
    alias: Vec<String>,

    /// A fixed address on the first network, at most one per address family [default: chosen]
    #[arg(long, value_name = "ADDRESS")]
    ip: Vec<IpAddr>,

    /// Publish ports: [HOST_IP:][HOST_PORT[-END]:]PORT[-END][/tcp|udp]
    #[arg(short, long, value_name = "SPEC")]
    publish: Vec<String>,

    /// The endpoint may also send from other addresses (routers, VRRP)
    #[arg(long)]
    any_source: bool,

    /// The service of the cluster that it belongs to
    #[arg(long, value_name = "SERVICE")]
    service: Option<String>,

    /// Its share of the connections of the service, in relation to the other tasks, 1 to 256
    #[arg(long, value_name = "NUMBER", default_value_t = 1, requires = "service")]
    weight: u16,

    /// A command that succeeds while the task is healthy, run by a shell in its network namespace;
    /// in addition to the health check of the service
    #[arg(long, value_name = "COMMAND", requires = "service")]
    health_cmd: Option<String>,

    /// Print the endpoint as JSON
    #[arg(long)]
    json: bool,
}

/// Detach an endpoint, and close its published ports
#[derive(Debug, Args)]
pub(super) struct Detach {
    /// The name of the endpoint
    name: String,
}

impl Networks {
    pub(super) fn run(&self) -> anyhow::Result<()> {
        let client = Client::new()?;
        match &self.command {
            NetworkCommand::Create(create) => {
                let network: Network = wait(client.post("/v1/networks", &create.request()?))?;
                print(&networks_table(std::slice::from_ref(&network)))
            }
            NetworkCommand::Ls { json } => {
                let networks: Vec<Network> = wait(client.get("/v1/networks"))?;
                if *json {
                    print(&format!("{}\n", serde_json::to_string_pretty(&networks)?))
                } else {
                    print(&networks_table(&networks))
                }
            }
            NetworkCommand::Inspect { name } => {
                let target = format!("/v1/networks/{}", checked(name)?);
                let network: Network = wait(client.get(&target))?;
                print(&format!("{}\n", serde_json::to_string_pretty(&network)?))
            }
            NetworkCommand::Rm { name } => {
                wait(client.delete(&format!("/v1/networks/{}", checked(name)?)))
            }
        }
    }
}

impl Create {
    fn request(&self) -> Result<NewNetwork, UsageError> {
        let mut gateways = self.gateway.clone();
        let subnets = self.subnet.iter().map(|subnet| {
            let own = gateways.iter().position(|gateway| subnet.contains(gateway));
            NewSubnet { subnet: *subnet, gateway: own.map(|at| gateways.swap_remove(at)) }
        });
        let subnets = subnets.collect();
        if let Some(gateway) = gateways.first() {
            return Err(UsageError(format!("--gateway {gateway} is in no --subnet")));
        }
        let mut encrypted = false;
        for option in &self.opt {
            match option.split_once('=').unwrap_or((option, "true")) {
                ("encrypted", value) => encrypted = value != "false",
                (key, _) => return Err(UsageError(format!("--opt {key}: unknown option"))),
            }
        }
        Ok(NewNetwork {
            name: self.name.clone(),
            driver: if self.driver == "overlay" { Driver::Overlay } else { Driver::Bridge },
            encrypted,
            subnets,
            ipv6: self.ipv6,
            internal: self.internal,
            isolated: self.isolated,
            mtu: self.mtu,
            bridge: self.bridge.clone(),
            dns: self.dns.clone(),
            dns_at_gateway: false,
        })
    }
}

impl Attach {
    pub(super) fn run(&self) -> anyhow::Result<()> {
        let endpoint: Endpoint = wait(Client::new()?.post("/v1/endpoints", &self.request()?))?;
        if self.json {
            return print(&format!("{}\n", serde_json::to_string_pretty(&endpoint)?));
        }
        print(&super::ps::services_table(&[], &[endpoint]))
    }

    fn request(&self) -> anyhow::Result<NewEndpoint> {
        let netns = match (&self.netns, self.pid) {
            (_, Some(pid)) => PathBuf::from(format!("/proc/{pid}/ns/net")),
            (Some(path), None) => std::path::absolute(path).context("--netns")?,
            (None, None) => return Err(UsageError("use --netns or --pid".to_owned()).into()),
        };
        let netns = netns.into_os_string().into_string();
        let netns = netns.map_err(|_| UsageError("--netns: the path is not UTF-8".to_owned()))?;
        let networks = self.networks.iter().enumerate().map(|(number, network)| NewAttachment {
            network: network.clone(),
            addresses: if number == 0 { self.ip.clone() } else { Vec::new() },
            aliases: self.alias.clone(),
            any_source: self.any_source,
        });
        Ok(NewEndpoint {
            name: self.name.clone(),
            netns,
            networks: networks.collect(),
            hostname: None,
            ports: self.publish.clone(),
            task: self.service.clone().map(|service| NewTask {
                service,
                weight: self.weight,
                health_command: self
                    .health_cmd
                    .as_ref()
                    .map(|command| ["/bin/sh", "-c", command].map(str::to_owned).to_vec()),
            }),
        })
    }
}

impl Detach {
    pub(super) fn run(&self) -> anyhow::Result<()> {
        wait(Client::new()?.delete(&format!("/v1/endpoints/{}", checked(&self.name)?)))
    }
}

fn wait<T>(response: impl Future<Output = Result<T, ClientError>>) -> anyhow::Result<T> {
    Ok(event_loop()?.block_on(response)?)
}
