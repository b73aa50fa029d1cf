//! One service on its own task: start, output, restart and stop.

use super::backoff::Restarts;
use super::files::ServiceFiles;
use super::launch::{Launched, launch, start_request};
use super::log::OutputStream;
use super::output::ServiceOutput;
use super::protocol::{Inbox, Report, encode};
use super::{Exit, ServiceError, ServiceSpec, State, Status};
use rustix::process::{Pid, Signal, kill_process};
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::time::{Duration, SystemTime};
use tidegate_model::without_errno;
use tokio::io::AsyncWriteExt;
use tokio::sync::{oneshot, watch};
use tokio::time::{Instant, sleep, sleep_until, timeout};

/// Maximum time to write the remaining output of a service that has exited.
const DRAIN: Duration = Duration::from_secs(2);

/// Maximum time to read each remaining report of an init that has exited. The reports are in the
/// socket buffer already.
const REPORT_TIMEOUT: Duration = Duration::from_secs(1);

/// Target state of a service. It only increases.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd)]
pub(super) enum Target {
    Run,
    /// End within the grace period.
    Stop,
    /// End immediately.
    Kill,
}

/// Receives the result of the first start.
pub(super) type Started = oneshot::Sender<Result<(), ServiceError>>;

/// Publishes the status of a service: to its handle, and to the list of all statuses.
pub(super) struct StatusSender {
    pub(super) own: watch::Sender<Status>,
    pub(super) all: watch::Sender<Vec<Status>>,
    /// Position in `all`.
    pub(super) index: usize,
}

impl StatusSender {
    fn send_modify(&self, modify: impl FnOnce(&mut Status)) {
        // In this order: after the end of the service, nothing changes its status.
        let mut status = self.own.borrow().clone();
        modify(&mut status);
        self.all.send_modify(|all| {
            if let Some(listed) = all.get_mut(self.index) {
                listed.clone_from(&status);
            }
        });
        self.own.send_replace(status);
    }
}

/// One service.
pub(super) struct Service {
    pub(super) spec: ServiceSpec,
    pub(super) files: ServiceFiles,
    /// The program that runs as the init.
    pub(super) init: PathBuf,
    pub(super) output: ServiceOutput,
    pub(super) status: StatusSender,
    pub(super) target: watch::Receiver<Target>,
    /// Time between SIGTERM and SIGKILL.
    pub(super) grace: Duration,
    pub(super) started: Option<Started>,
}

impl Service {
    /// Runs the service until [`State::Ended`]. Removes its files before it sets that state.
    pub(super) async fn run(mut self) {
        let exit = self.run_with_restarts().await;
        let Self { files, status, started, .. } = self;
        drop(files);
        status.send_modify(|status| set_state(status, State::Ended(exit)));
        drop(started);
    }

    async fn run_with_restarts(&mut self) -> Exit {
        let mut restarts = Restarts::new(self.spec.restart);
        loop {
            let began = Instant::now();
            let exit = match self.run_once().await {
                Ok(exit) => {
                    self.output.notice(&exit.to_string()).await;
                    exit
                }
                Err(error) => {
                    // Same exit code as that of shells.
                    let exit = Exit::Code(127);
                    match self.started.take() {
                        Some(started) => {
                            let _ = started.send(Err(error));
                            return exit;
                        }
                        None => self.output.notice(&format!("restart failed: {error}")).await,
                    }
                    exit
                }
            };
            if self.current_target() != Target::Run {
                return exit;
            }
            let Some(pause) = restarts.next(exit, began.elapsed()) else { return exit };
            self.status.send_modify(|status| set_state(status, State::Restarting(exit)));
            self.output.notice(&format!("restarts in {}", humantime::format_duration(pause))).await;
            tokio::select! {
                () = sleep(pause) => {}
                _ = self.target.wait_for(|target| *target != Target::Run) => return exit,
            }
            self.status.send_modify(|status| {
                set_state(status, State::Starting);
                status.restarts = restarts.count();
            });
        }
    }

    /// Returns the current target: [`Target::Kill`] if the supervisor was dropped.
    fn current_target(&mut self) -> Target {
        if self.target.has_changed().is_err() {
            Target::Kill
        } else {
            *self.target.borrow_and_update()
        }
    }

    /// Starts the command once and waits until all its processes have ended.
    async fn run_once(&mut self) -> Result<Exit, ServiceError> {
        let launched = launch(&self.init, &self.spec).map_err(|error| self.not_launched(&error))?;
        let Launched { mut init, socket, stdout, stderr } = launched;
        let (mut reports, mut requests) = socket.into_split();
        let mut streams = tokio::task::JoinSet::new();
        if let Some(stream) = stdout {
            streams.spawn(self.output.clone().copy(stream, OutputStream::Stdout));
        }
        if let Some(stream) = stderr {
            streams.spawn(self.output.clone().copy(stream, OutputStream::Stderr));
        }
        let request =
            start_request(&self.spec, self.files.path()).and_then(|request| encode(&request));
        let request = request.map_err(|error| self.set_up_failed(&error.to_string()))?;

        let pid = init.id();
        let mut sent = 0;
        let mut inbox = Inbox::default();
        let mut listening = true;
        let mut result = RunResult::default();
        let mut applied = Target::Run;
        let mut kill_at = None;
        let status = loop {
            let target = self.current_target();
            if target > applied {
                applied = target;
                match target {
                    Target::Stop => {
                        signal(init.id(), Signal::TERM);
                        kill_at = Some(Instant::now() + self.grace);
                    }
                    _ => signal(init.id(), Signal::KILL),
                }
            }
            tokio::select! {
                // An error means that the init has died. `init.wait()` then returns.
                written = requests.write(&request[sent..]), if sent < request.len() => {
                    sent = written.map_or(request.len(), |written| sent + written);
                }
                report = inbox.next(&mut reports), if listening && sent == request.len() => match report {
                    Some(report) => self.handle_report(report, pid, &mut result).await,
                    None => listening = false,
                },
                status = init.wait() => break status,
                () = sleep_until(kill_at.unwrap_or_else(Instant::now)), if kill_at.is_some() => {
                    kill_at = None;
                    signal(init.id(), Signal::KILL);
                }
                _ = self.target.changed(), if applied != Target::Kill => {}
            }
        };
        // All processes have ended with the init. Its reports and the output are still buffered.
        while let Ok(Some(report)) = timeout(REPORT_TIMEOUT, inbox.next(&mut reports)).await {
            self.handle_report(report, pid, &mut result).await;
        }
        let _ = timeout(DRAIN, async { while streams.join_next().await.is_some() {} }).await;
        match result {
            RunResult { failure: Some(failure), .. } => Err(failure),
            RunResult { exit: Some(exit), .. } => Ok(exit),
            RunResult { .. } => {
                status.map(exit_of).map_err(|error| self.set_up_failed(&error.to_string()))
            }
        }
    }

    async fn handle_report(&mut self, report: Report, init: Option<u32>, result: &mut RunResult) {
        match report {
            Report::SetUpFailed(reason) => result.failure = Some(self.set_up_failed(&reason)),
            Report::CannotRun(reason) => {
                let program = self.spec.command.first().cloned().unwrap_or_default();
                result.failure = Some(ServiceError::CannotRun {
                    service: self.spec.name.clone(),
                    program,
                    reason,
                });
            }
            Report::Note(note) => self.output.notice(&note).await,
            Report::Running => {
                self.status.send_modify(|status| {
                    set_state(status, State::Running);
                    status.pid = init.map(|init| child_of(init).unwrap_or(init));
                });
                if let Some(started) = self.started.take() {
                    let _ = started.send(Ok(()));
                }
            }
            Report::Ended(exit) => result.exit = Some(exit),
        }
    }

    fn set_up_failed(&self, reason: &str) -> ServiceError {
        ServiceError::SetUp { service: self.spec.name.clone(), reason: without_errno(reason) }
    }

    fn not_launched(&self, error: &io::Error) -> ServiceError {
        let hint = match error.kind() {
            io::ErrorKind::PermissionDenied => {
                "; needs CAP_SYS_ADMIN: run as root, or in a user namespace that has it"
            }
            io::ErrorKind::StorageFull => "; raise user.max_pid_namespaces",
            _ => "",
        };
        self.set_up_failed(&format!(
            "start {} in a new PID namespace: {error}{hint}",
            self.init.display()
        ))
    }
}

/// Result of a run, from the reports of the init. Empty if the init was killed.
#[derive(Default)]
struct RunResult {
    exit: Option<Exit>,
    failure: Option<ServiceError>,
}

fn set_state(status: &mut Status, state: State) {
    status.state = state;
    status.pid = None;
    status.since = SystemTime::now();
}

/// Sends `signal` to the init. Its PID cannot be reused: tokio returns it only until it has reaped
/// the process.
fn signal(init: Option<u32>, signal: Signal) {
    let pid = init.and_then(|pid| i32::try_from(pid).ok()).and_then(Pid::from_raw);
    if let Some(pid) = pid {
        // Fails if the init has ended.
        let _ = kill_process(pid, signal);
    }
}

/// Returns the PID of the command in the PID namespace of this process: the init's first child.
fn child_of(init: u32) -> Option<u32> {
    let children = std::fs::read_to_string(format!("/proc/{init}/task/{init}/children")).ok()?;
    children.split_ascii_whitespace().next()?.parse().ok()
}

fn exit_of(status: ExitStatus) -> Exit {
    match (status.code(), status.signal()) {
        (Some(code), _) => Exit::Code(code),
        (None, signal) => Exit::Signal(signal.unwrap_or(libc::SIGKILL)),
    }
}
