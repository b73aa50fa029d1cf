//! All services of a project: starts them in dependency order and stops them in reverse order.

use super::files::ServiceFiles;
use super::order::levels;
use super::output::{Output, Printer, SharedLog};
use super::service::{Service, StatusSender, Target};
use super::{Ended, ServiceError, ServiceSpec, State, Status};
use std::future::{Future, poll_fn};
use std::path::PathBuf;
use std::task::Poll;
use std::time::{Duration, SystemTime};
use tokio::sync::{oneshot, watch};

/// Default time between SIGTERM and SIGKILL, as in `docker stop`.
pub const DEFAULT_GRACE: Duration = Duration::from_secs(10);

/// Maximum length of a service name in bytes. It is also the default host name, which Linux limits
/// to 64 bytes (`__NEW_UTS_LEN`).
const MAX_NAME: usize = 64;

/// Runs services. Kills them on drop. [`stop`](Self::stop) lets them shut down.
///
/// Requires a tokio runtime with I/O and time. One thread is sufficient. All methods are cancel
/// safe and can be called again. Starting a service blocks its thread for about 1 ms (fork and
/// exec).
#[derive(Debug)]
pub struct Supervisor {
    run_dir: PathBuf,
    init: PathBuf,
    printer: Printer,
    grace: Duration,
    started: bool,
    /// In start order.
    services: Vec<Handle>,
    /// Statuses of `services`.
    statuses: watch::Sender<Vec<Status>>,
}

/// The supervisor's end of the channels to a service's task.
#[derive(Debug)]
struct Handle {
    level: usize,
    target: watch::Sender<Target>,
    status: watch::Receiver<Status>,
}

impl Supervisor {
    /// Creates a supervisor without services. The files of services are in `run_dir/services`, and
    /// their output goes to `output`. `grace` is the time between SIGTERM and SIGKILL
    /// ([`DEFAULT_GRACE`]).
    #[must_use]
    pub fn new(run_dir: impl Into<PathBuf>, output: impl Output, grace: Duration) -> Self {
        Self::with_printer(run_dir.into(), Printer::new(output), watch::Sender::default(), grace)
    }

    /// Creates a supervisor like [`new`](Self::new), with its output in `log`. `statuses` has the
    /// statuses of the services whose start has begun, in start order. Empties `statuses`.
    pub(super) fn with_log(
        run_dir: impl Into<PathBuf>,
        log: SharedLog,
        statuses: watch::Sender<Vec<Status>>,
        grace: Duration,
    ) -> Self {
        statuses.send_modify(Vec::clear);
        Self::with_printer(run_dir.into(), Printer::Log(log), statuses, grace)
    }

    fn with_printer(
        run_dir: PathBuf,
        printer: Printer,
        statuses: watch::Sender<Vec<Status>>,
        grace: Duration,
    ) -> Self {
        let init = PathBuf::from("/proc/self/exe");
        Self { run_dir, init, printer, grace, started: false, services: Vec::new(), statuses }
    }

    /// Sets the program that runs as the init of services. It must be a `tidegate`. Default: this
    /// program.
    #[must_use]
    pub fn with_init(mut self, program: impl Into<PathBuf>) -> Self {
        self.init = program.into();
        self
    }

    /// Starts the services, each after its dependencies run.
    ///
    /// # Errors
    /// [`ServiceError`]. Services that were started before the error are stopped.
    pub async fn start(&mut self, specs: Vec<ServiceSpec>) -> Result<(), ServiceError> {
        if self.started {
            return Err(ServiceError::AlreadyStarted);
        }
        let levels = check(&specs)?;
        self.started = true;
        let width = specs.iter().map(|spec| spec.name.chars().count()).max().unwrap_or(0);
        let mut specs: Vec<(usize, usize, ServiceSpec)> = levels
            .into_iter()
            .zip(specs)
            .enumerate()
            .map(|(index, (level, spec))| (level, index, spec))
            .collect();
        // The sort is stable: services of a level keep their order.
        specs.sort_by_key(|(level, ..)| *level);
        for (level, index, spec) in specs {
            if let Err(error) = self.start_one(level, index, width, spec).await {
                self.stop().await;
                return Err(error);
            }
        }
        Ok(())
    }

    async fn start_one(
        &mut self,
        level: usize,
        index: usize,
        width: usize,
        spec: ServiceSpec,
    ) -> Result<(), ServiceError> {
        let files = ServiceFiles::create(&self.run_dir, &spec)?;
        let name = spec.name.clone();
        let first = Status {
            name: name.clone(),
            pid: None,
            state: State::Starting,
            restarts: 0,
            since: SystemTime::now(),
        };
        let (status, seen) = watch::channel(first.clone());
        self.statuses.send_modify(|statuses| statuses.push(first));
        let status =
            StatusSender { own: status, all: self.statuses.clone(), index: self.services.len() };
        let (target, target_of_service) = watch::channel(Target::Run);
        let (started, has_started) = oneshot::channel();
        let service = Service {
            output: self.printer.service_output(&name, index, width),
            spec,
            files,
            init: self.init.clone(),
            status,
            target: target_of_service,
            grace: self.grace,
            started: Some(started),
        };
        tokio::spawn(service.run());
        self.services.push(Handle { level, target, status: seen });
        has_started.await.unwrap_or_else(|_| {
            Err(ServiceError::SetUp { service: name, reason: "ended during setup".to_owned() })
        })
    }

    /// Waits until all services are in state [`State::Ended`].
    pub async fn wait(&mut self) -> Ended {
        let mut ended = Vec::with_capacity(self.services.len());
        for service in &mut self.services {
            if let Some(exit) = service.ended().await {
                ended.push(exit);
            }
        }
        self.printer.flush().await;
        Ended(ended)
    }

    /// Stops all services and waits until their processes have ended. Sends SIGTERM to dependent
    /// services first. Kills services after the grace period, which is the same for all services of
    /// a level.
    pub async fn stop(&mut self) {
        let highest = self.services.iter().map(|service| service.level).max();
        for level in (0..=highest.unwrap_or(0)).rev() {
            for service in self.services.iter().filter(|service| service.level == level) {
                service.raise_target(Target::Stop);
            }
            for service in self.services.iter_mut().filter(|service| service.level == level) {
                service.ended().await;
            }
        }
        self.printer.flush().await;
    }

    /// Kills all services without waiting. [`wait`](Self::wait) waits until they have ended.
    pub fn kill(&mut self) {
        for service in &self.services {
            service.raise_target(Target::Kill);
        }
    }

    /// Returns the status of each service, in start order. Services whose start has not begun are
    /// missing.
    #[must_use]
    pub fn statuses(&self) -> Vec<Status> {
        self.observer().statuses()
    }

    /// A handle for reading statuses. It covers the services whose start has begun.
    #[must_use]
    pub fn observer(&self) -> Observer {
        Observer(self.services.iter().map(|service| service.status.clone()).collect())
    }
}

/// Reads the statuses of services. Independent of the supervisor.
#[derive(Clone, Debug)]
pub struct Observer(Vec<watch::Receiver<Status>>);

impl Observer {
    /// Waits until a status changes. Never returns if no service can change any more. Cancel safe.
    pub async fn changed(&mut self) {
        let mut waits: Vec<_> =
            self.0.iter_mut().map(|status| Box::pin(status.changed())).collect();
        poll_fn(|context| {
            let mut is_changed = false;
            // The task of a service has ended if there is an error.
            waits.retain_mut(|wait| match wait.as_mut().poll(context) {
                Poll::Ready(Ok(())) => {
                    is_changed = true;
                    false
                }
                Poll::Ready(Err(_)) => false,
                Poll::Pending => true,
            });
            if is_changed { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }

    /// Returns the current statuses, in start order.
    #[must_use]
    pub fn statuses(&self) -> Vec<Status> {
        self.0.iter().map(|status| status.borrow().clone()).collect()
    }
}

impl Drop for Supervisor {
    fn drop(&mut self) {
        self.kill();
    }
}

impl Handle {
    /// Sets the target unless the current one is higher.
    fn raise_target(&self, target: Target) {
        self.target.send_if_modified(|current| {
            let is_higher = target > *current;
            if is_higher {
                *current = target;
            }
            is_higher
        });
    }

    /// Waits until the service has ended. `None` if its task ended with the runtime.
    async fn ended(&mut self) -> Option<(String, super::Exit)> {
        let status =
            self.status.wait_for(|status| matches!(status.state, State::Ended(_))).await.ok()?;
        match status.state {
            State::Ended(exit) => Some((status.name.clone(), exit)),
            _ => None,
        }
    }
}

/// Validates `specs` and returns the level of each service.
fn check(specs: &[ServiceSpec]) -> Result<Vec<usize>, ServiceError> {
    for spec in specs {
        check_name(&spec.name)?;
        if spec.command.is_empty() {
            return Err(ServiceError::NoCommand(spec.name.clone()));
        }
    }
    let needs: Vec<(&str, &[String])> =
        specs.iter().map(|spec| (spec.name.as_str(), spec.depends_on.as_slice())).collect();
    levels(&needs)
}

/// Returns an error unless `name` is a valid name of a service.
pub(super) fn check_name(name: &str) -> Result<(), ServiceError> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    let begins_valid = name.starts_with(|c: char| c.is_ascii_alphanumeric());
    if !begins_valid || name.len() > MAX_NAME || !name.chars().all(allowed) {
        return Err(ServiceError::Name(name.to_owned()));
    }
    Ok(())
}
