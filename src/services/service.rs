//! The life of one service, on a task of its own: start, follow, restart, stop.

use super::backoff::Restarts;
use super::files::ServiceFiles;
use super::launch::{Launched, launch, order};
use super::output::Voice;
use super::protocol::{Inbox, Report, encode};
use super::{Exit, ServiceError, ServiceSpec, State, Status};
use crate::port_error::without_numbers;
use rustix::process::{Pid, Signal, kill_process};
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::time::{Duration, SystemTime};
use tokio::io::AsyncWriteExt;
use tokio::sync::{oneshot, watch};
use tokio::time::{Instant, sleep, sleep_until, timeout};

/// How long what a service has written last may take to be told once it is gone.
const DRAIN: Duration = Duration::from_secs(2);

/// How long the init's last words may take to be read once it is gone: they are in the socket
/// already.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// What is wanted of a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd)]
pub(super) enum Want {
    Run,
    /// End, with time to do so.
    Stop,
    /// End now.
    Kill,
}

/// Told once: that the command runs, or why it does not.
pub(super) type Started = oneshot::Sender<Result<(), ServiceError>>;

/// One service.
pub(super) struct Service {
    pub(super) spec: ServiceSpec,
    pub(super) files: ServiceFiles,
    /// The program to be the init.
    pub(super) init: PathBuf,
    pub(super) voice: Voice,
    pub(super) status: watch::Sender<Status>,
    pub(super) want: watch::Receiver<Want>,
    pub(super) grace: Duration,
    pub(super) started: Option<Started>,
}

impl Service {
    /// Runs the service until it has ended for good. Its files are gone then.
    pub(super) async fn run(mut self) {
        let exit = self.live().await;
        let Self { files, status, started, .. } = self;
        drop(files);
        status.send_modify(|status| settle(status, State::Ended(exit)));
        drop(started);
    }

    async fn live(&mut self) -> Exit {
        let mut restarts = Restarts::new(self.spec.restart);
        loop {
            let began = Instant::now();
            let exit = match self.run_once().await {
                Ok(exit) => {
                    self.voice.says(&exit.to_string()).await;
                    exit
                }
                Err(error) => {
                    // As shells do.
                    let exit = Exit::Code(127);
                    match self.started.take() {
                        Some(started) => {
                            let _ = started.send(Err(error));
                            return exit;
                        }
                        None => self.voice.says(&format!("cannot be started again: {error}")).await,
                    }
                    exit
                }
            };
            if self.wanted() != Want::Run {
                return exit;
            }
            let Some(pause) = restarts.next(exit, began.elapsed()) else { return exit };
            self.status.send_modify(|status| settle(status, State::Restarting(exit)));
            self.voice.says(&format!("restarts in {}", humantime::format_duration(pause))).await;
            tokio::select! {
                () = sleep(pause) => {}
                _ = self.want.wait_for(|want| *want != Want::Run) => return exit,
            }
            self.status.send_modify(|status| {
                settle(status, State::Starting);
                status.restarts = restarts.count();
            });
        }
    }

    /// What is wanted now. A supervisor that is gone wants an end.
    fn wanted(&mut self) -> Want {
        if self.want.has_changed().is_err() { Want::Kill } else { *self.want.borrow_and_update() }
    }

    /// Starts the command once and attends it until nothing of it is left.
    async fn run_once(&mut self) -> Result<Exit, ServiceError> {
        let launched = launch(&self.init, &self.spec).map_err(|error| self.not_launched(&error))?;
        let Launched { mut init, socket, stdout, stderr } = launched;
        let (mut reports, mut orders) = socket.into_split();
        let mut told = tokio::task::JoinSet::new();
        if let Some(stream) = stdout {
            told.spawn(self.voice.clone().follow(stream));
        }
        if let Some(stream) = stderr {
            told.spawn(self.voice.clone().follow(stream));
        }
        let order = order(&self.spec, self.files.path()).and_then(|order| encode(&order));
        let order = order.map_err(|error| self.set_up_failed(&error.to_string()))?;

        let pid = init.id();
        let mut sent = 0;
        let mut inbox = Inbox::default();
        let mut listening = true;
        let mut end = Ends::default();
        let mut obeyed = Want::Run;
        let mut kill_at = None;
        let status = loop {
            let wanted = self.wanted();
            if wanted > obeyed {
                obeyed = wanted;
                match wanted {
                    Want::Stop => {
                        signal(init.id(), Signal::TERM);
                        kill_at = Some(Instant::now() + self.grace);
                    }
                    _ => signal(init.id(), Signal::KILL),
                }
            }
            tokio::select! {
                // The init reads at once, unless it has died: then its status comes.
                written = orders.write(&order[sent..]), if sent < order.len() => {
                    sent = written.map_or(order.len(), |written| sent + written);
                }
                report = inbox.next(&mut reports), if listening && sent == order.len() => match report {
                    Some(report) => self.heard(report, pid, &mut end).await,
                    None => listening = false,
                },
                status = init.wait() => break status,
                () = sleep_until(kill_at.unwrap_or_else(Instant::now)), if kill_at.is_some() => {
                    kill_at = None;
                    signal(init.id(), Signal::KILL);
                }
                _ = self.want.changed(), if obeyed != Want::Kill => {}
            }
        };
        // All that the service was has ended with its init. What it said is still under way.
        while let Ok(Some(report)) = timeout(LAST_WORDS, inbox.next(&mut reports)).await {
            self.heard(report, pid, &mut end).await;
        }
        let _ = timeout(DRAIN, async { while told.join_next().await.is_some() {} }).await;
        match end {
            Ends { failure: Some(failure), .. } => Err(failure),
            Ends { exit: Some(exit), .. } => Ok(exit),
            Ends { .. } => {
                status.map(exit_of).map_err(|error| self.set_up_failed(&error.to_string()))
            }
        }
    }

    async fn heard(&mut self, report: Report, init: Option<u32>, end: &mut Ends) {
        match report {
            Report::SetUpFailed(reason) => end.failure = Some(self.set_up_failed(&reason)),
            Report::CannotRun(reason) => {
                let program = self.spec.command.first().cloned().unwrap_or_default();
                end.failure = Some(ServiceError::CannotRun {
                    service: self.spec.name.clone(),
                    program,
                    reason,
                });
            }
            Report::Note(note) => self.voice.says(&note).await,
            Report::Running => {
                self.status.send_modify(|status| {
                    settle(status, State::Running);
                    status.pid = init.map(|init| child_of(init).unwrap_or(init));
                });
                if let Some(started) = self.started.take() {
                    let _ = started.send(Ok(()));
                }
            }
            Report::Ended(exit) => end.exit = Some(exit),
        }
    }

    fn set_up_failed(&self, reason: &str) -> ServiceError {
        ServiceError::SetUp { service: self.spec.name.clone(), reason: without_numbers(reason) }
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

/// How a run of a service ended, as far as its init said.
#[derive(Default)]
struct Ends {
    exit: Option<Exit>,
    failure: Option<ServiceError>,
}

fn settle(status: &mut Status, state: State) {
    status.state = state;
    status.pid = None;
    status.since = SystemTime::now();
}

/// Signals the init, which tokio has not reaped as long as it gives its pid.
fn signal(init: Option<u32>, signal: Signal) {
    let pid = init.and_then(|pid| i32::try_from(pid).ok()).and_then(Pid::from_raw);
    if let Some(pid) = pid {
        // It may have ended by now, and then it is as wanted.
        let _ = kill_process(pid, signal);
    }
}

/// The command's pid as it is called out here: the init's first child.
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
