//! All services of one `tidegate up`: start in order, wait, stop in reverse order.

use super::files::ServiceFiles;
use super::order::levels;
use super::output::{Output, Printer};
use super::service::{Service, Want};
use super::{Ended, ServiceError, ServiceSpec, State, Status};
use std::path::PathBuf;
use std::time::{Duration, SystemTime};
use tokio::sync::{oneshot, watch};

/// How long a service may take to end after `SIGTERM`, unless told otherwise: as `docker stop`.
pub const DEFAULT_GRACE: Duration = Duration::from_secs(10);

/// The longest name of a service: that of a host name's label, which it becomes.
const LONGEST_NAME: usize = 64;

/// Runs services. Dropped, it kills them; to have them end well, [`stop`](Self::stop).
///
/// Needs a tokio runtime with I/O and time; one thread will do. Every method may be cancelled (in
/// `select!`) and called again. Starting a service holds its thread for the millisecond that fork
/// and exec take.
#[derive(Debug)]
pub struct Supervisor {
    run_dir: PathBuf,
    init: PathBuf,
    printer: Printer,
    grace: Duration,
    started: bool,
    /// In the order of their start.
    services: Vec<Handle>,
}

/// What the supervisor keeps of a service, whose task has the rest.
#[derive(Debug)]
struct Handle {
    level: usize,
    want: watch::Sender<Want>,
    status: watch::Receiver<Status>,
}

impl Supervisor {
    /// A supervisor whose services have their files in `run_dir/services`, write to `output`, and
    /// get `grace` to end (see [`DEFAULT_GRACE`]).
    #[must_use]
    pub fn new(run_dir: impl Into<PathBuf>, output: impl Output, grace: Duration) -> Self {
        let init = PathBuf::from("/proc/self/exe");
        let printer = Printer::new(output);
        Self { run_dir: run_dir.into(), init, printer, grace, started: false, services: Vec::new() }
    }

    /// The same with another program than this one as the services' init: a `tidegate`.
    #[must_use]
    pub fn with_init(mut self, program: impl Into<PathBuf>) -> Self {
        self.init = program.into();
        self
    }

    /// Starts the services, each once all that it depends on run.
    ///
    /// # Errors
    /// [`ServiceError`] names the service and what it lacks. What had been started is stopped
    /// again.
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
        // Stable: within a level as they were given.
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
        let (status, seen) = watch::channel(first);
        let (want, wanted) = watch::channel(Want::Run);
        let (started, has_started) = oneshot::channel();
        let service = Service {
            voice: self.printer.voice(&name, index, width),
            spec,
            files,
            init: self.init.clone(),
            status,
            want: wanted,
            grace: self.grace,
            started: Some(started),
        };
        tokio::spawn(service.run());
        self.services.push(Handle { level, want, status: seen });
        has_started.await.unwrap_or_else(|_| {
            Err(ServiceError::SetUp {
                service: name,
                reason: "ended while it was set up".to_owned(),
            })
        })
    }

    /// Waits until all services have ended for good.
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

    /// Asks all services to end, those first on which no other depends, and waits until nothing is
    /// left of them. Who takes longer than the grace period is killed; services that do not depend
    /// on each other have it together.
    pub async fn stop(&mut self) {
        let highest = self.services.iter().map(|service| service.level).max();
        for level in (0..=highest.unwrap_or(0)).rev() {
            for service in self.services.iter().filter(|service| service.level == level) {
                service.wants(Want::Stop);
            }
            for service in self.services.iter_mut().filter(|service| service.level == level) {
                service.ended().await;
            }
        }
        self.printer.flush().await;
    }

    /// Kills all services at once. [`wait`](Self::wait) then waits until they are gone.
    pub fn kill(&mut self) {
        for service in &self.services {
            service.wants(Want::Kill);
        }
    }

    /// How the services are, in the order of their start; those not yet begun with are missing.
    #[must_use]
    pub fn statuses(&self) -> Vec<Status> {
        self.observer().statuses()
    }

    /// What tells how the services that have been begun with are, wherever the supervisor is.
    #[must_use]
    pub fn observer(&self) -> Observer {
        Observer(self.services.iter().map(|service| service.status.clone()).collect())
    }
}

/// Looks how services are.
#[derive(Clone, Debug)]
pub struct Observer(Vec<watch::Receiver<Status>>);

impl Observer {
    /// How they are now, in the order of their start.
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
    /// Never takes back what was wanted before.
    fn wants(&self, want: Want) {
        self.want.send_if_modified(|wanted| {
            let more = want > *wanted;
            if more {
                *wanted = want;
            }
            more
        });
    }

    /// How the service has ended, once it has; `None` if its task is gone with the runtime.
    async fn ended(&mut self) -> Option<(String, super::Exit)> {
        let status =
            self.status.wait_for(|status| matches!(status.state, State::Ended(_))).await.ok()?;
        match status.state {
            State::Ended(exit) => Some((status.name.clone(), exit)),
            _ => None,
        }
    }
}

/// What can be found out before anything is started.
fn check(specs: &[ServiceSpec]) -> Result<Vec<usize>, ServiceError> {
    for spec in specs {
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        let begins = spec.name.starts_with(|c: char| c.is_ascii_alphanumeric());
        if !begins || spec.name.len() > LONGEST_NAME || !spec.name.chars().all(allowed) {
            return Err(ServiceError::Name(spec.name.clone()));
        }
        if spec.command.is_empty() {
            return Err(ServiceError::NoCommand(spec.name.clone()));
        }
    }
    let needs: Vec<(&str, &[String])> =
        specs.iter().map(|spec| (spec.name.as_str(), spec.depends_on.as_slice())).collect();
    levels(&needs)
}
