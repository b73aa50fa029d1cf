//! Projects in the background: their services run in supervisor processes
//! ([`RemoteSupervisor`]), which outlive the daemon.
//!
//! ```text
//! POST /v1/projects ─► launch the supervisor ─► ApplyProject ─► start the services ─► answered
//!                      (creates namespaces)     (durable)
//! ```
//!
//! The state has the project and the paths of its namespaces. A daemon that starts connects to the
//! supervisor of each project, and launches one where there is none: after a restart of the host,
//! or if the previous daemon was killed between two steps. A supervisor without a project is
//! stopped. If a supervisor is killed, the kernel kills its services, and a new one starts them
//! again.

use super::stored::addresses_of;
use super::{PROGRAM, names};
use crate::api::{Order, Problem, ProjectOrder, Reserved, Supervised};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tidegate_control::{Command, Endpoint, Name, Project, ProjectSpec, Refusal, Service, State};
use tidegate_dns::{ResolvConf, SERVER};
use tidegate_services::{LogStream, RemoteError, RemoteSpec, RemoteSupervisor, Status};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::sleep;

/// Time before services are started again whose supervisor was killed. Doubled with each attempt,
/// up to [`LONGEST_BACKOFF`].
const BACKOFF: Duration = Duration::from_secs(1);
const LONGEST_BACKOFF: Duration = Duration::from_secs(30);

/// Pause before the statuses are read again, if the connection ended but not the process.
const RECONNECT: Duration = Duration::from_millis(100);

/// Runs the projects of a daemon.
#[derive(Clone)]
pub(super) struct Projects(Arc<Shared>);

struct Shared {
    /// Has a directory for each project.
    directory: PathBuf,
    /// The channel to the task that changes networks.
    orders: mpsc::Sender<Order>,
    state: watch::Receiver<Arc<State>>,
    supervised: watch::Sender<Arc<BTreeMap<Name, Supervised>>>,
    /// Supervisors of projects that are up.
    running: Mutex<BTreeMap<Name, RemoteSupervisor>>,
    /// Projects that are being changed.
    changing: Mutex<BTreeSet<Name>>,
    /// This process has restrictions that services would inherit.
    restricted: bool,
}

/// The permission to change a project. Released on drop.
struct Changing<'a> {
    changing: &'a Mutex<BTreeSet<Name>>,
    project: Name,
}

impl Drop for Changing<'_> {
    fn drop(&mut self) {
        lock(self.changing).remove(&self.project);
    }
}

impl Projects {
    /// Projects with their runtime files in `directory`, and the state `state`.
    pub(super) fn new(
        directory: PathBuf,
        orders: mpsc::Sender<Order>,
        state: watch::Receiver<Arc<State>>,
    ) -> Self {
        Self(Arc::new(Shared {
            directory,
            orders,
            state,
            supervised: watch::Sender::default(),
            running: Mutex::default(),
            changing: Mutex::default(),
            restricted: tidegate_process::is_restricted(),
        }))
    }

    /// The running services of each project.
    pub(super) fn supervised(&self) -> watch::Receiver<Arc<BTreeMap<Name, Supervised>>> {
        self.0.supervised.subscribe()
    }

    /// Adopts or restarts the services of the projects in the state, then executes `orders`. Ends
    /// with their sender.
    pub(super) async fn serve(self, mut orders: mpsc::Receiver<ProjectOrder>) {
        self.restore().await;
        while let Some(order) = orders.recv().await {
            let projects = self.clone();
            // In a task of its own: it is completed even if the client disconnects.
            tokio::spawn(async move { projects.execute(order).await });
        }
    }

    /// Executes `order`. The receiver of the result is gone if the client has disconnected.
    async fn execute(&self, order: ProjectOrder) {
        match order {
            ProjectOrder::Up { spec, reserved, done } => {
                let _ = done.send(self.up(spec, reserved).await);
            }
            ProjectOrder::Down { project, done } => {
                let _ = done.send(self.down(&project).await);
            }
            ProjectOrder::Logs { project, service, tail, follow, done } => {
                let _ = done.send(self.logs(&project, service, tail, follow).await);
            }
        }
    }

    /// Brings a project up.
    ///
    /// # Errors
    /// Nothing was changed.
    async fn up(&self, mut spec: ProjectSpec, reserved: Reserved) -> Result<(), Problem> {
        let project = spec.project.clone();
        let _changing = self.begin(&project.name)?;
        if self.state().projects().contains_key(&project.name) {
            return Err(Problem::conflict(&Refusal::ProjectExists(project.name)));
        }
        let supervisor = self.launch(&project).await?;
        for endpoint in &mut spec.endpoints {
            if let Some(path) = supervisor.namespaces().get(endpoint.name.name()) {
                endpoint.namespace.clone_from(path);
            }
        }
        let applied = self.order(Command::ApplyProject(spec), reserved).await;
        let started = match applied {
            Ok(()) => match self.start(&project, &supervisor).await {
                Ok(()) => Ok(()),
                Err(problem) => {
                    let removal = Command::RemoveProject(project.name.clone());
                    if let Err(second) = self.order(removal, Reserved::new()).await {
                        tracing::error!(project = %project.name, "project not removed: {second}");
                    }
                    Err(problem)
                }
            },
            refused => refused,
        };
        if let Err(problem) = started {
            stop(&project.name, &supervisor).await;
            return Err(problem);
        }
        tracing::info!(project = %project.name, supervisor = supervisor.pid(), "project is up");
        self.follow(project.name, supervisor).await;
        Ok(())
    }

    /// Takes a project down.
    ///
    /// # Errors
    /// There is no such project, or a part of it could not be removed, and another attempt may
    /// succeed.
    async fn down(&self, project: &Name) -> Result<(), Problem> {
        let _changing = self.begin(project)?;
        self.known(project)?;
        // Removed first, so that its end is no failure.
        let running = lock(&self.0.running).remove(project);
        let supervisor = match running {
            Some(supervisor) => Some(supervisor),
            None => RemoteSupervisor::connect(&self.directory(project)).await?,
        };
        if let Some(supervisor) = supervisor
            && let Err(error) = supervisor.stop().await
        {
            self.follow(project.clone(), supervisor).await;
            return Err(error.into());
        }
        self.order(Command::RemoveProject(project.clone()), Reserved::new()).await?;
        self.0.supervised.send_modify(|all| drop(Arc::make_mut(all).remove(project)));
        let _ = fs::remove_dir_all(self.directory(project));
        tracing::info!(%project, "project removed");
        Ok(())
    }

    async fn logs(
        &self,
        project: &Name,
        service: Option<String>,
        tail: usize,
        follow: bool,
    ) -> Result<LogStream, Problem> {
        let known = self.known(project)?;
        if let Some(service) = &service
            && !known.services.iter().any(|one| one.name == *service)
        {
            let names: Vec<&str> = known.services.iter().map(|one| one.name.as_str()).collect();
            return Err(Problem::not_found(&format!(
                "project {project} has no service {service:?} with a command; it has {}",
                names.join(", ")
            )));
        }
        let supervisor = lock(&self.0.running).get(project).cloned().ok_or_else(|| {
            Problem::unavailable(&format!("project {project}: its services are being started"))
        })?;
        supervisor.logs(service.as_deref(), tail, follow).await.map_err(Problem::from)
    }

    /// Connects to the supervisors of all projects in the state. Stops others.
    async fn restore(&self) {
        let state = self.state();
        for entry in fs::read_dir(&self.0.directory).into_iter().flatten().flatten() {
            let name = entry.file_name().into_string().ok();
            let name = name.and_then(|name| Name::new(None, &name).ok());
            let Some(name) = name.filter(|name| !state.projects().contains_key(name)) else {
                continue;
            };
            match RemoteSupervisor::connect(&entry.path()).await {
                Ok(supervisor) => {
                    if let Some(supervisor) = supervisor {
                        stop(&name, &supervisor).await;
                    }
                    let _ = fs::remove_dir_all(entry.path());
                }
                Err(error) => tracing::warn!(project = %name, "{error}"),
            }
        }
        for project in state.projects().values() {
            let (projects, project) = (self.clone(), Arc::clone(project));
            tokio::spawn(async move { projects.restore_one(&project).await });
        }
    }

    /// Connects to the supervisor of `project`, or starts its services again, until that succeeds.
    async fn restore_one(&self, project: &Project) {
        let mut backoff = BACKOFF;
        loop {
            // Taking the project down waits for nothing, and ends this.
            let restored = match self.begin(&project.name) {
                Ok(_changing) if !self.state().projects().contains_key(&project.name) => return,
                Ok(_changing) => self.adopt_or_launch(project).await,
                Err(_) => Ok(()),
            };
            match restored {
                Ok(()) if lock(&self.0.running).contains_key(&project.name) => return,
                Ok(()) => {}
                Err(problem) => {
                    tracing::error!(
                        project = %project.name,
                        retry = ?backoff,
                        "services not started: {problem}"
                    );
                }
            }
            sleep(backoff).await;
            backoff = LONGEST_BACKOFF.min(2 * backoff);
        }
    }

    async fn adopt_or_launch(&self, project: &Project) -> Result<(), Problem> {
        let mut found = RemoteSupervisor::connect(&self.directory(&project.name)).await?;
        if let Some(other) = found.take_if(|one| !one.shares_user_namespace()) {
            tracing::warn!(
                project = %project.name,
                supervisor = other.pid(),
                "services belong to namespaces that were removed; stopping them"
            );
            other.stop().await?;
        }
        let (supervisor, is_new) = match found {
            Some(supervisor) => (supervisor, false),
            None => (self.launch(project).await?, true),
        };
        let attached = async {
            for (service, path) in supervisor.namespaces() {
                let name = Name::new(Some(project.name.name()), service);
                let name = name.map_err(|error| Problem::failed(&error))?;
                let state = self.state();
                let known = state.endpoints().get(&name).map(|one| one.namespace.as_path());
                if known == Some(path) {
                    continue;
                }
                let (done, is_done) = oneshot::channel();
                let (endpoint, netns) = (name.to_string(), path.clone());
                self.send(Order::Reattach { endpoint, netns, done }).await?;
                is_done.await.map_err(|_| closing())??;
            }
            if is_new || !supervisor.is_started().await? {
                self.start(project, &supervisor).await?;
            }
            Ok(())
        };
        if let Err(problem) = attached.await {
            if is_new {
                stop(&project.name, &supervisor).await;
            }
            return Err(problem);
        }
        let text = if is_new { "services started again" } else { "services adopted" };
        tracing::info!(project = %project.name, supervisor = supervisor.pid(), "{text}");
        self.follow(project.name.clone(), supervisor).await;
        Ok(())
    }

    async fn launch(&self, project: &Project) -> Result<RemoteSupervisor, Problem> {
        if self.0.restricted {
            return Err(Problem::conflict(&format!(
                "project {}: its services would inherit the restrictions of the daemon's service unit; remove them \
                 with the drop-in projects.conf (docs/systemd.md, Projects in the background)",
                project.name
            )));
        }
        let services: Vec<String> = project.services.iter().map(|one| one.name.clone()).collect();
        let directory = self.directory(&project.name);
        RemoteSupervisor::launch(Path::new(PROGRAM), &directory, &services)
            .await
            .map_err(Problem::from)
    }

    /// Starts the services of `project`, whose endpoints are in the state.
    async fn start(&self, project: &Project, supervisor: &RemoteSupervisor) -> Result<(), Problem> {
        let state = self.state();
        let host = names::host_resolv_conf();
        let specs = project.services.iter().map(|service| spec(&state, project, service, &host));
        let specs = specs.collect::<Result<Vec<RemoteSpec>, Problem>>()?;
        supervisor.start(specs, project.grace).await.map_err(Problem::from)
    }

    /// Follows the statuses of the services of `project` in a task. The current ones are known on
    /// return.
    async fn follow(&self, project: Name, supervisor: RemoteSupervisor) {
        lock(&self.0.running).insert(project.clone(), supervisor.clone());
        let first = match supervisor.statuses().await {
            Ok(mut statuses) => statuses.next().await,
            // It is reported by the task.
            Err(_) => None,
        };
        self.publish(&project, &supervisor, first.unwrap_or_default());
        tokio::spawn(self.clone().follower(project, supervisor));
    }

    /// Boxed, because it starts the services again, and with them a task of the same kind.
    fn follower(
        self,
        project: Name,
        supervisor: RemoteSupervisor,
    ) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        Box::pin(async move { self.follow_until_end(project, supervisor).await })
    }

    async fn follow_until_end(&self, project: Name, supervisor: RemoteSupervisor) {
        let is_current =
            || lock(&self.0.running).get(&project).is_some_and(|one| one.pid() == supervisor.pid());
        loop {
            match supervisor.statuses().await {
                Ok(mut statuses) => {
                    while let Some(statuses) = statuses.next().await {
                        self.publish(&project, &supervisor, statuses);
                    }
                }
                Err(error) => tracing::debug!(%project, "{error}"),
            }
            if !is_current() {
                return;
            }
            let found = RemoteSupervisor::connect(&self.directory(&project)).await;
            let runs = |one: &RemoteSupervisor| one.pid() == supervisor.pid();
            if !matches!(found, Ok(Some(one)) if runs(&one)) {
                break;
            }
            sleep(RECONNECT).await;
        }
        tracing::warn!(
            %project,
            supervisor = supervisor.pid(),
            "supervisor process was killed, and its services with it; starting them again"
        );
        lock(&self.0.running).remove(&project);
        let known = self.state().projects().get(&project).map(Arc::clone);
        if let Some(known) = known {
            self.restore_one(&known).await;
        }
    }

    fn publish(&self, project: &Name, supervisor: &RemoteSupervisor, statuses: Vec<Status>) {
        let supervised = Supervised { pid: supervisor.pid(), statuses };
        self.0.supervised.send_if_modified(|all| {
            let changed = all.get(project) != Some(&supervised);
            if changed {
                Arc::make_mut(all).insert(project.clone(), supervised);
            }
            changed
        });
    }

    fn begin(&self, project: &Name) -> Result<Changing<'_>, Problem> {
        if !lock(&self.0.changing).insert(project.clone()) {
            return Err(Problem::conflict(&format!(
                "project {project} is being changed; try again when that is done"
            )));
        }
        Ok(Changing { changing: &self.0.changing, project: project.clone() })
    }

    async fn order(&self, command: Command, reserved: Reserved) -> Result<(), Problem> {
        let (done, is_done) = oneshot::channel();
        self.send(Order::Command { command, reserved, done }).await?;
        is_done.await.map_err(|_| closing())?
    }

    async fn send(&self, order: Order) -> Result<(), Problem> {
        self.0.orders.send(order).await.map_err(|_| closing())
    }

    /// Returns a project of the state.
    fn known(&self, project: &Name) -> Result<Arc<Project>, Problem> {
        self.state().projects().get(project).map(Arc::clone).ok_or_else(|| {
            Problem::not_found(&format!(
                "project {project} is not up in the background; tidegate ls lists the projects"
            ))
        })
    }

    fn state(&self) -> Arc<State> {
        Arc::clone(&self.0.state.borrow())
    }

    fn directory(&self, project: &Name) -> PathBuf {
        self.0.directory.join(project.name())
    }
}

/// Stops the services of a project that is not up.
async fn stop(project: &Name, supervisor: &RemoteSupervisor) {
    if let Err(error) = supervisor.stop().await {
        tracing::error!(%project, "services not stopped: {error}");
    }
}

/// What the supervisor has to know about `service`.
fn spec(
    state: &State,
    project: &Project,
    service: &Service,
    host: &ResolvConf,
) -> Result<RemoteSpec, Problem> {
    let endpoint = Name::new(Some(project.name.name()), &service.name).ok();
    let endpoint = endpoint
        .and_then(|name| state.endpoints().get(&name))
        .ok_or_else(|| Problem::failed(&format!("service {:?} has no endpoint", service.name)))?;
    let hostname = endpoint.hostname.clone().unwrap_or_else(|| service.name.clone());
    let server = gateway(state, endpoint).unwrap_or(SERVER.into());
    Ok(RemoteSpec {
        name: service.name.clone(),
        command: service.command.clone(),
        environment: service.environment.clone(),
        hosts: names::hosts_of(&addresses_of(endpoint), &service.name, &hostname),
        hostname,
        working_dir: service.working_dir.clone(),
        resolv_conf: host.for_container(server, &service.dns_search, &service.dns_options),
        restart: service.restart,
        depends_on: service.depends_on.clone(),
    })
}

/// The gateway that `endpoint` queries, if all its networks have DNS servers at their gateways.
fn gateway(state: &State, endpoint: &Endpoint) -> Option<IpAddr> {
    let attachments = endpoint.setup.attachments.iter();
    let networks = attachments.map(|one| state.networks().get(&one.network.parse().ok()?));
    let networks: Vec<_> = networks.collect::<Option<_>>()?;
    let first = networks.first().filter(|_| networks.iter().all(|one| one.names_at_gateway))?;
    first.setup.subnets.first().map(|subnet| subnet.gateway)
}

fn closing() -> Problem {
    Problem::unavailable(&"the daemon is ending")
}

impl From<RemoteError> for Problem {
    fn from(error: RemoteError) -> Self {
        match &error {
            // A service cannot be started.
            RemoteError::Failed(_) => Self::bad_request(&error),
            RemoteError::Running { .. } => Self::conflict(&error),
            RemoteError::Busy { .. } => Self::unavailable(&error),
            _ => Self::failed(&error),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
