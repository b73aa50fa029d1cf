//! Health of the tasks on this host: which of them get connections.
//!
//! | state | connections |
//! |---|---|
//! | starting | none: its replies are not steered yet, or its health check has not succeeded yet, or has failed [`retries`] times in succession |
//! | ready | yes |
//! | draining | none: it is being detached, once its connections have ended or after the drain time of the service |
//!
//! The host of a task checks it, from its sandbox; the other hosts see the result in the cluster.
//! Tasks of a daemon that restarts count as healthy until a check fails, so that they keep their
//! connections.
//!
//! [`retries`]: tidegate_mesh::record::HealthCheck::retries

use anyhow::{Context, bail};
use http_body_util::Empty;
use hyper::Request;
use hyper::body::Bytes;
use hyper::client::conn::http1::handshake;
use hyper_util::rt::TokioIo;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::process::Stdio;
use std::time::{Duration, SystemTime};
use tidegate_mesh::record::{HealthCheck, Probe};
use tidegate_netns::{Namespace, NamespaceId};
use tokio::net::{TcpSocket, TcpStream};
use tokio::process::Command;
use tokio::sync::mpsc;
use tokio::task::AbortHandle;
use tokio::time::{sleep, timeout};

/// The check of a task with a command, if its service has none.
const DEFAULT: (Duration, Duration, u32) = (Duration::from_secs(2), Duration::from_secs(1), 3);

/// States in `/proc/net/tcp` of sockets without a connection: `TCP_TIME_WAIT`, `TCP_CLOSE`,
/// `TCP_LISTEN` (include/net/tcp_states.h).
const IDLE: [&str; 3] = ["06", "07", "0A"];

/// What decides whether a task is healthy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Check {
    /// The check of the service.
    pub(super) check: Option<HealthCheck>,
    /// The command of the task.
    pub(super) command: Option<Vec<String>>,
    /// An address of the task on the network of the service.
    pub(super) address: IpAddr,
    /// Its namespace, in which the command runs.
    pub(super) namespace: NamespaceId,
    /// Where the connection of the check begins.
    pub(super) sandbox: NamespaceId,
}

/// A result, with the name of the endpoint. `Err` is the reason.
pub(super) type Checked = (String, Result<(), String>);

/// The running checks.
pub(super) struct Health {
    running: BTreeMap<String, (Check, AbortHandle)>,
    results: mpsc::UnboundedSender<Checked>,
    received: mpsc::UnboundedReceiver<Checked>,
    /// Tasks that are not healthy, with the reason, and since when.
    unhealthy: BTreeMap<String, (String, SystemTime)>,
    /// Tasks that are being detached.
    draining: BTreeSet<String>,
}

impl Default for Health {
    fn default() -> Self {
        let (results, received) = mpsc::unbounded_channel();
        let (running, unhealthy, draining) = Default::default();
        Self { running, results, received, unhealthy, draining }
    }
}

impl Drop for Health {
    fn drop(&mut self) {
        self.set(BTreeMap::new(), &BTreeSet::new());
    }
}

impl Health {
    /// Begins with `endpoint` as not healthy.
    pub(super) fn starts(&mut self, endpoint: &str) {
        let unhealthy = ("not ready yet".to_owned(), SystemTime::now());
        self.unhealthy.insert(endpoint.to_owned(), unhealthy);
    }

    /// Records that `endpoint` is being detached, or no longer is.
    pub(super) fn drain(&mut self, endpoint: &str, drains: bool) {
        if drains {
            self.draining.insert(endpoint.to_owned());
        } else {
            self.draining.remove(endpoint);
        }
    }

    pub(super) fn is_draining(&self, endpoint: &str) -> bool {
        self.draining.contains(endpoint)
    }

    pub(super) fn is_healthy(&self, endpoint: &str) -> bool {
        !self.unhealthy.contains_key(endpoint)
    }

    /// The tasks that are not healthy, with the reasons, and since when.
    pub(super) fn problems(&self) -> impl Iterator<Item = (String, SystemTime)> {
        self.unhealthy.iter().map(|(endpoint, (reason, since))| {
            (format!("endpoint {endpoint} is not healthy: {reason}"), *since)
        })
    }

    /// Runs `wanted` checks, by endpoint, and no others. `mute` are the tasks whose replies do not
    /// arrive. Others without a check are healthy.
    pub(super) fn set(
        &mut self,
        wanted: BTreeMap<String, (Check, Namespace, Namespace)>,
        mute: &BTreeSet<String>,
    ) {
        self.running.retain(|name, (check, task)| {
            let stays = wanted.get(name).is_some_and(|(wanted, ..)| wanted == check);
            if !stays {
                task.abort();
            }
            stays
        });
        self.unhealthy.retain(|name, _| wanted.contains_key(name) || mute.contains(name));
        for name in mute {
            if self.is_healthy(name) {
                self.starts(name);
            }
        }
        for (name, (check, namespace, sandbox)) in wanted {
            if self.running.contains_key(&name) {
                continue;
            }
            let run = run(name.clone(), check.clone(), namespace, sandbox, self.results.clone());
            self.running.insert(name, (check, tokio::spawn(run).abort_handle()));
        }
    }

    /// Waits for a task whose health has changed.
    pub(super) async fn changed(&mut self) {
        loop {
            let Some((name, result)) = self.received.recv().await else {
                return std::future::pending().await;
            };
            // Its check may have been aborted meanwhile.
            if !self.running.contains_key(&name) {
                continue;
            }
            match result {
                Ok(()) if self.unhealthy.remove(&name).is_some() => {
                    tracing::info!(endpoint = name, "task is healthy");
                    return;
                }
                Ok(()) => {}
                Err(reason) => {
                    if let Some((known, _)) = self.unhealthy.get_mut(&name) {
                        *known = reason;
                        continue;
                    }
                    tracing::warn!(endpoint = name, reason, "task is not healthy");
                    self.unhealthy.insert(name, (reason, SystemTime::now()));
                    return;
                }
            }
        }
    }
}

/// Checks a task again and again.
async fn run(
    name: String,
    check: Check,
    namespace: Namespace,
    sandbox: Namespace,
    results: mpsc::UnboundedSender<Checked>,
) {
    let (interval, limit, retries) = match &check.check {
        Some(check) => (check.interval(), check.timeout(), check.retries),
        None => DEFAULT,
    };
    let mut failures = 0;
    loop {
        let checked = match timeout(limit, once(&check, &namespace, &sandbox)).await {
            Ok(checked) => checked,
            Err(_) => Err(anyhow::anyhow!("no answer within {limit:?}")),
        };
        let result = match checked {
            Ok(()) => {
                failures = 0;
                Some(Ok(()))
            }
            Err(error) => {
                failures += 1;
                (failures >= retries).then(|| Err(format!("{error:#}")))
            }
        };
        if let Some(result) = result
            && results.send((name.clone(), result)).is_err()
        {
            return;
        }
        sleep(interval).await;
    }
}

async fn once(check: &Check, namespace: &Namespace, sandbox: &Namespace) -> anyhow::Result<()> {
    match check.check.as_ref().map(|check| &check.probe) {
        Some(Probe::Tcp(port)) => {
            drop(connect(sandbox, check.address, *port).await?);
        }
        Some(Probe::Http { port, path }) => get(sandbox, check.address, *port, path).await?,
        None => {}
    }
    match &check.command {
        Some(command) => succeed(namespace, command).await,
        None => Ok(()),
    }
}

async fn connect(sandbox: &Namespace, address: IpAddr, port: u16) -> anyhow::Result<TcpStream> {
    let new = || match address {
        IpAddr::V4(_) => TcpSocket::new_v4(),
        IpAddr::V6(_) => TcpSocket::new_v6(),
    };
    let socket = sandbox.with(new)??;
    let at = SocketAddr::new(address, port);
    socket.connect(at).await.with_context(|| format!("port {port}/tcp"))
}

async fn get(sandbox: &Namespace, address: IpAddr, port: u16, path: &str) -> anyhow::Result<()> {
    let stream = connect(sandbox, address, port).await?;
    let failed = || format!("GET {path} at port {port}");
    let (mut sender, connection) = handshake(TokioIo::new(stream)).await.with_context(failed)?;
    let host = SocketAddr::new(address, port).to_string();
    let request = Request::get(path).header("host", host).header("connection", "close");
    let request = request.body(Empty::<Bytes>::new()).with_context(failed)?;
    let response = async {
        tokio::select! {
            response = sender.send_request(request) => response,
            // It ends after the response only.
            Err(error) = connection => Err(error),
        }
    };
    let status = response.await.with_context(failed)?.status();
    if status.as_u16() >= 400 {
        bail!("{}: status {}", failed(), status.as_u16());
    }
    Ok(())
}

/// Runs `command` in `namespace`.
async fn succeed(namespace: &Namespace, command: &[String]) -> anyhow::Result<()> {
    let Some((program, arguments)) = command.split_first() else { return Ok(()) };
    let mut child = Command::new(program);
    child.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    child.kill_on_drop(true);
    let mut child = namespace.with(|| child.spawn())?.context(program.clone())?;
    let status = child.wait().await.context(program.clone())?;
    if !status.success() {
        bail!("{program}: {status}");
    }
    Ok(())
}

/// The number of connections to one of `ports` in `namespace`, also of those that begin or end.
pub(super) fn connections(namespace: &Namespace, ports: &BTreeSet<u16>) -> usize {
    let of = |file: &str| fs::read_to_string(format!("/proc/thread-self/net/{file}"));
    let tables = namespace.with(|| [of("tcp"), of("tcp6")]).into_iter().flatten().flatten();
    let is_open = |line: &str| {
        let mut fields = line.split_whitespace().skip(1);
        let local = fields.next()?.rsplit_once(':')?.1;
        let port = u16::from_str_radix(local, 16).ok()?;
        Some(ports.contains(&port) && !IDLE.contains(&fields.nth(1)?))
    };
    tables.map(|table| table.lines().filter(|line| is_open(line) == Some(true)).count()).sum()
}
