//! The client of a supervisor process.

use super::protocol::Inbox;
use super::spawn::spawn;
use super::wire::{ACKNOWLEDGED, Failure, LOCK, Launch, ReceiveError, Reply, Request, SOCKET};
use super::wire::{receive_message, send_message};
use super::{LogLine, RemoteSpec, Status};
use rustix::fs::{FlockOperation, flock};
use rustix::process::{Pid, PidfdFlags, WaitId, WaitIdOptions, geteuid, pidfd_open, waitid};
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tidegate_model::without_errno;
use tidegate_netns::is_own_user_namespace;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncWriteExt, Interest};
use tokio::net::UnixStream;
use tokio::time::{Instant, sleep, timeout};

/// Maximum time for an answer that requires no work of the supervisor process, and for its socket
/// while its lock is held.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// Maximum time for the creation of the namespaces. A namespace takes a few milliseconds, and much
/// longer while the kernel deletes others.
const LAUNCH_TIMEOUT: Duration = Duration::from_secs(60);

/// Pause between attempts to connect.
const RETRY_PAUSE: Duration = Duration::from_millis(20);

/// A request to a supervisor process has failed.
#[derive(Debug, thiserror::Error)]
pub enum RemoteError {
    /// The program of the process cannot be executed.
    #[error("start {} as a supervisor process: {}", .program.display(), without_errno(&.source.to_string()))]
    Spawn {
        /// The program.
        program: PathBuf,
        /// Error of the system call.
        source: io::Error,
    },
    /// The process has ended before it could serve.
    #[error("supervisor process of {} ended during its start ({status}); see its errors above, and check that {} is a tidegate", .directory.display(), .program.display())]
    EndedEarly {
        /// The directory.
        directory: PathBuf,
        /// The program.
        program: PathBuf,
        /// How it has ended.
        status: String,
    },
    /// A supervisor process of this directory exists.
    #[error("a supervisor process runs at {} already{}; stop its services first", .directory.display(), process(*.pid))]
    Running {
        /// The directory.
        directory: PathBuf,
        /// Its process ID, if known.
        pid: Option<u32>,
    },
    /// The process has ended.
    #[error("supervisor process {pid} of {} has ended; start the services again", .directory.display())]
    Ended {
        /// The directory.
        directory: PathBuf,
        /// Its process ID.
        pid: u32,
    },
    /// The socket cannot be connected, or the lock file cannot be read.
    #[error("{}: {}", .path.display(), without_errno(&.source.to_string()))]
    Connect {
        /// The socket or lock file.
        path: PathBuf,
        /// Error of the system call.
        source: io::Error,
    },
    /// The process does not answer.
    #[error("supervisor process of {} does not answer{}; if it is not suspended, end it with kill -9, which ends its services too", .directory.display(), process(*.pid))]
    NoAnswer {
        /// The directory.
        directory: PathBuf,
        /// Its process ID, if known.
        pid: Option<u32>,
    },
    /// The socket is not one of a supervisor process of this user.
    #[error("{}: {reason}; remove it", .socket.display())]
    Foreign {
        /// The socket.
        socket: PathBuf,
        /// Who listens there.
        reason: String,
    },
    /// The process is another version of tidegate.
    #[error("supervisor process {pid} of {} is of another version of tidegate; stop its services with the version that started them, or with kill {pid}", .directory.display())]
    Version {
        /// The directory.
        directory: PathBuf,
        /// Its process ID.
        pid: u32,
    },
    /// The process serves the maximum number of connections or readers of logs.
    #[error("supervisor process of {} has too many {what}; end some of them, and try again", .directory.display())]
    Busy {
        /// The directory.
        directory: PathBuf,
        /// `connections` or `readers of logs`.
        what: &'static str,
    },
    /// Another client is starting the services.
    #[error("the services of {} are being started already; wait until they run", .directory.display())]
    Starting {
        /// The directory.
        directory: PathBuf,
    },
    /// The services were started before.
    #[error("the services of {} were started already; stop them first", .directory.display())]
    AlreadyStarted {
        /// The directory.
        directory: PathBuf,
    },
    /// The services are being stopped.
    #[error("the services of {} are being stopped; start them again afterwards", .directory.display())]
    Stopping {
        /// The directory.
        directory: PathBuf,
    },
    /// The process was not launched with this service.
    #[error("supervisor process of {} has no service {service:?}; correct the name, or stop its services and start them again", .directory.display())]
    UnknownService {
        /// The directory.
        directory: PathBuf,
        /// The service.
        service: String,
    },
    /// The process cannot be set up, or the services cannot be started: the message of
    /// [`ServiceError`](super::ServiceError).
    #[error("{0}")]
    Failed(String),
    /// The process has sent something else than an answer.
    #[error("supervisor process of {} sent an invalid answer ({reason}); this is a bug", .directory.display())]
    Invalid {
        /// The directory.
        directory: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
}

fn process(pid: Option<u32>) -> String {
    pid.map(|pid| format!(" (process {pid})")).unwrap_or_default()
}

/// A supervisor process: runs the services of a project and outlives the daemon.
///
/// A handle; the process does not depend on it. Each call is one connection. All methods require a
/// tokio runtime with I/O and time. One thread is sufficient. A call that is cancelled may have
/// been carried out.
#[derive(Clone, Debug)]
pub struct RemoteSupervisor {
    directory: Arc<Path>,
    pid: u32,
    namespaces: Arc<BTreeMap<String, PathBuf>>,
}

impl RemoteSupervisor {
    /// Starts `program`, a tidegate such as `/proc/self/exe`, as the supervisor process of
    /// `directory`, with a new network namespace for each of `services`. The process is a child of
    /// this one, and is reaped by a task while the runtime exists. It has the environment of this
    /// process.
    ///
    /// `directory` belongs to the supervisor process. It is created if it is missing, and its mode
    /// is set to 0700. It can hold files of the daemon, which are kept.
    ///
    /// If the call fails or is cancelled, the process ends and removes what it created.
    ///
    /// # Errors
    /// [`RemoteError::Running`] if there is a process, [`RemoteError::Spawn`],
    /// [`RemoteError::EndedEarly`], [`RemoteError::NoAnswer`] after 60 s, or
    /// [`RemoteError::Failed`] if the directory or the namespaces cannot be created.
    pub async fn launch(
        program: &Path,
        directory: &Path,
        services: &[String],
    ) -> Result<Self, RemoteError> {
        let directory: Arc<Path> = absolute(directory)?.into();
        let failed = |source| RemoteError::Spawn { program: program.to_owned(), source };
        let (handshake, theirs) = StdUnixStream::pair().map_err(failed)?;
        handshake.set_nonblocking(true).map_err(failed)?;
        let mut handshake = UnixStream::from_std(handshake).map_err(failed)?;
        let mut child = spawn(program, &directory, theirs.into()).map_err(failed)?;
        let pid = child.id().unwrap_or_default();
        // Reaps it.
        let exit = tokio::spawn(async move { child.wait().await });

        let no_answer = || RemoteError::NoAnswer { directory: directory.to_path_buf(), pid: None };
        let answer = async {
            let request = Launch { services: services.to_vec() };
            // An error means that the process has ended, or that it has answered without reading.
            let _ = send_message(&mut handshake, &request).await;
            receive_message::<Reply>(&mut Inbox::default(), &mut handshake).await
        };
        match timeout(LAUNCH_TIMEOUT, answer).await.map_err(|_| no_answer())? {
            Ok(Reply::Done) => {}
            Ok(Reply::Failed(failure)) => return Err(error_of(failure, &directory, pid)),
            Ok(reply) => return Err(unexpected(&directory, &reply)),
            Err(ReceiveError::Closed) => {
                drop(handshake);
                let exit = timeout(ANSWER_TIMEOUT, exit).await.map_err(|_| no_answer())?;
                let status = match exit {
                    Ok(Ok(status)) => status.to_string(),
                    Ok(Err(error)) => without_errno(&error.to_string()),
                    Err(error) => error.to_string(),
                };
                let (directory, program) = (directory.to_path_buf(), program.to_owned());
                return Err(RemoteError::EndedEarly { directory, program, status });
            }
            Err(ReceiveError::Version) => {
                return Err(RemoteError::Version { directory: directory.to_path_buf(), pid });
            }
            Err(ReceiveError::Invalid(reason)) => {
                return Err(RemoteError::Invalid { directory: directory.to_path_buf(), reason });
            }
        }
        let launched = Self::find(&directory).await?.ok_or_else(no_answer)?.0;
        handshake.write_all(&[ACKNOWLEDGED]).await.map_err(|_| launched.ended())?;
        Ok(launched)
    }

    /// Returns the process that runs at `directory`, `None` if there is none. Waits up to 5 s for a
    /// process that starts or ends.
    ///
    /// If the process is a child of this one, because the program that called
    /// [`launch`](Self::launch) was replaced by execve(2), a task reaps it. Clone the result rather
    /// than connect again: each call starts a task and holds a descriptor then.
    ///
    /// # Errors
    /// [`RemoteError::NoAnswer`], [`RemoteError::Foreign`], [`RemoteError::Version`],
    /// [`RemoteError::Busy`] and [`RemoteError::Connect`].
    pub async fn connect(directory: &Path) -> Result<Option<Self>, RemoteError> {
        let directory: Arc<Path> = absolute(directory)?.into();
        let Some((found, process)) = Self::find(&directory).await? else { return Ok(None) };
        if let Some(process) = process.filter(is_child) {
            tokio::spawn(async move {
                // If this fails, the process stays a zombie until this one ends.
                if let Ok(process) = wait_for_exit(process).await {
                    let _ = waitid(WaitId::PidFd(process.as_fd()), WaitIdOptions::EXITED);
                }
            });
        }
        Ok(Some(found))
    }

    /// Returns the process that runs at `directory`, and its descriptor if it can be opened.
    async fn find(directory: &Arc<Path>) -> Result<Option<(Self, Option<OwnedFd>)>, RemoteError> {
        let directory = Arc::clone(directory);
        let Some((stream, pid)) = open(&directory).await? else { return Ok(None) };
        // Opened before the answer, which proves that the ID has not been reused.
        let process = open_process(pid).ok();
        let mut connection = Connection::new(stream, Arc::clone(&directory), pid);
        let no_answer =
            || RemoteError::NoAnswer { directory: directory.to_path_buf(), pid: Some(pid) };
        let reply = connection.ask(&Request::Describe);
        let numbers = match timeout(ANSWER_TIMEOUT, reply).await.map_err(|_| no_answer())? {
            Ok(Reply::Description(numbers)) => numbers,
            Ok(reply) => return Err(unexpected(&directory, &reply)),
            // It has ended after it accepted the connection.
            Err(RemoteError::Ended { .. }) if !is_locked(&directory)? => return Ok(None),
            Err(error) => return Err(error),
        };
        let path = |number: RawFd| PathBuf::from(format!("/proc/{pid}/fd/{number}"));
        let namespaces = numbers.into_iter().map(|(name, number)| (name, path(number))).collect();
        Ok(Some((Self { directory, pid, namespaces: Arc::new(namespaces) }, process)))
    }

    /// Returns the directory of the process, an absolute path.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Returns the process ID, in the PID namespace of this process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Returns whether the process is in the user namespace of this one. The namespaces of its
    /// services can be entered only then.
    #[must_use]
    pub fn shares_user_namespace(&self) -> bool {
        let theirs = File::open(format!("/proc/{}/ns/user", self.pid));
        theirs.and_then(is_own_user_namespace).unwrap_or(false)
    }

    /// Returns the path of the network namespace of each service, `/proc/PID/fd/N`. Valid until the
    /// process ends, also while the service does not run.
    #[must_use]
    pub fn namespaces(&self) -> &BTreeMap<String, PathBuf> {
        &self.namespaces
    }

    /// Starts the services, each after its dependencies run. The namespace of each is the one
    /// created by [`launch`](Self::launch). `grace` is the time between SIGTERM and SIGKILL.
    ///
    /// The start continues if this process ends. A start that has failed can be repeated.
    ///
    /// # Errors
    /// [`RemoteError::Failed`] with the message of the [`ServiceError`](super::ServiceError) as of
    /// [`Supervisor::start`](super::Supervisor::start). Services that were started before the error
    /// are stopped. [`RemoteError::UnknownService`], [`RemoteError::AlreadyStarted`],
    /// [`RemoteError::Starting`], [`RemoteError::Stopping`], [`RemoteError::Ended`], and the errors
    /// of [`connect`](Self::connect).
    pub async fn start(&self, specs: Vec<RemoteSpec>, grace: Duration) -> Result<(), RemoteError> {
        let grace_ms = u64::try_from(grace.as_millis()).unwrap_or(u64::MAX);
        let mut connection = self.open().await?;
        match connection.ask(&Request::Start { specs, grace_ms }).await? {
            Reply::Done => Ok(()),
            reply => Err(unexpected(&self.directory, &reply)),
        }
    }

    /// Returns whether [`start`](Self::start) has succeeded before. Waits for a start in progress.
    ///
    /// # Errors
    /// [`RemoteError::Ended`], and the errors of [`connect`](Self::connect).
    pub async fn is_started(&self) -> Result<bool, RemoteError> {
        match self.open().await?.ask(&Request::IsStarted).await? {
            Reply::Started(started) => Ok(started),
            reply => Err(unexpected(&self.directory, &reply)),
        }
    }

    /// Returns the statuses of all services whose start has begun, in start order, now and after
    /// each change.
    ///
    /// # Errors
    /// [`RemoteError::Ended`], and the errors of [`connect`](Self::connect).
    pub async fn statuses(&self) -> Result<StatusStream, RemoteError> {
        Ok(StatusStream(self.stream(&Request::Statuses).await?))
    }

    /// Returns the last `tail` lines of `service`, or of all services. With `follow`, returns new
    /// lines afterwards until the process ends.
    ///
    /// # Errors
    /// [`RemoteError::UnknownService`], [`RemoteError::Busy`], [`RemoteError::Ended`], and the errors
    /// of [`connect`](Self::connect).
    pub async fn logs(
        &self,
        service: Option<&str>,
        tail: usize,
        follow: bool,
    ) -> Result<LogStream, RemoteError> {
        let request = Request::Logs { service: service.map(ToOwned::to_owned), tail, follow };
        Ok(LogStream { stream: self.stream(&request).await?, complete: false })
    }

    /// Stops all services and returns when the process has exited. Sends SIGTERM to dependent
    /// services first, and SIGKILL after the grace period. The process continues to do so if the
    /// call is cancelled.
    ///
    /// Succeeds if the process has exited already.
    ///
    /// # Errors
    /// The errors of [`connect`](Self::connect).
    pub async fn stop(&self) -> Result<(), RemoteError> {
        let mut connection = match self.open().await {
            Err(RemoteError::Ended { .. }) => return Ok(()),
            connection => connection?,
        };
        // Opened before the answer, which proves that the ID has not been reused.
        let process = open_process(self.pid);
        match connection.ask(&Request::Stop).await {
            Ok(Reply::Done) => {}
            Ok(reply) => return Err(unexpected(&self.directory, &reply)),
            // It has released its lock before it has closed the connection.
            Err(RemoteError::Ended { .. }) if !is_locked(&self.directory)? => return Ok(()),
            Err(error) => return Err(error),
        }
        let failed = |source| RemoteError::Connect {
            path: PathBuf::from(format!("/proc/{}", self.pid)),
            source,
        };
        match process {
            Ok(process) => wait_for_exit(process).await.map(drop).map_err(failed),
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
            Err(error) => Err(failed(error)),
        }
    }

    /// Opens a connection for a request to this process.
    async fn open(&self) -> Result<Connection, RemoteError> {
        match open(&self.directory).await? {
            Some((stream, pid)) if pid == self.pid => {
                Ok(Connection::new(stream, Arc::clone(&self.directory), pid))
            }
            _ => Err(self.ended()),
        }
    }

    /// Opens a connection for a request with several replies.
    async fn stream(&self, request: &Request) -> Result<Connection, RemoteError> {
        let mut connection = self.open().await?;
        match connection.ask(request).await? {
            Reply::Done => Ok(connection),
            reply => Err(unexpected(&self.directory, &reply)),
        }
    }

    fn ended(&self) -> RemoteError {
        RemoteError::Ended { directory: self.directory.to_path_buf(), pid: self.pid }
    }
}

/// Statuses of the services of a supervisor process.
#[derive(Debug)]
pub struct StatusStream(Connection);

impl StatusStream {
    /// Waits for the next statuses: the current ones of all services. Several changes may be
    /// returned as one. `None` when the process has ended. Cancel safe.
    pub async fn next(&mut self) -> Option<Vec<Status>> {
        match self.0.receive().await {
            Ok(Reply::Statuses(statuses)) => Some(statuses),
            _ => None,
        }
    }
}

/// Lines of the log of a supervisor process, in the order in which it read them.
#[derive(Debug)]
pub struct LogStream {
    stream: Connection,
    complete: bool,
}

impl LogStream {
    /// Waits for the next line. `None` when all requested lines have been returned, when the
    /// process has ended, or when lines were dropped because this reader was too slow
    /// ([`is_complete`](Self::is_complete)). Cancel safe.
    pub async fn next(&mut self) -> Option<LogLine> {
        match self.stream.receive().await {
            Ok(Reply::Line(line)) => Some(line),
            Ok(Reply::End) => {
                self.complete = true;
                None
            }
            _ => None,
        }
    }

    /// Returns whether all lines were returned: `false` before the end, if the reader was too slow,
    /// and if the process was killed.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.complete
    }
}

/// A connection for one request.
#[derive(Debug)]
struct Connection {
    stream: UnixStream,
    inbox: Inbox,
    directory: Arc<Path>,
    pid: u32,
}

impl Connection {
    fn new(stream: UnixStream, directory: Arc<Path>, pid: u32) -> Self {
        Self { stream, inbox: Inbox::default(), directory, pid }
    }

    /// Sends `request` and receives the first reply. [`RemoteError::Ended`] if the process closes
    /// the connection.
    async fn ask(&mut self, request: &Request) -> Result<Reply, RemoteError> {
        match send_message(&mut self.stream, request).await {
            Err(error) if error.kind() == io::ErrorKind::ArgumentListTooLong => {
                return Err(RemoteError::Failed(format!(
                    "services of {}: {error}; the maximum is 8 MiB",
                    self.directory.display()
                )));
            }
            // The process has refused the connection, and its reply has the reason.
            Ok(()) | Err(_) => {}
        }
        let directory = || self.directory.to_path_buf();
        match receive_message(&mut self.inbox, &mut self.stream).await {
            Ok(Reply::Failed(failure)) => Err(error_of(failure, &self.directory, self.pid)),
            Ok(reply) => Ok(reply),
            Err(ReceiveError::Closed) => {
                Err(RemoteError::Ended { directory: directory(), pid: self.pid })
            }
            Err(ReceiveError::Version) => {
                Err(RemoteError::Version { directory: directory(), pid: self.pid })
            }
            Err(ReceiveError::Invalid(reason)) => {
                Err(RemoteError::Invalid { directory: directory(), reason })
            }
        }
    }

    /// Receives a further reply. Cancel safe.
    async fn receive(&mut self) -> Result<Reply, ReceiveError> {
        receive_message(&mut self.inbox, &mut self.stream).await
    }
}

/// Connects to the process of `directory`. `None` if there is none. Returns its ID, which is that
/// of the process that called listen(2).
async fn open(directory: &Path) -> Result<Option<(UnixStream, u32)>, RemoteError> {
    let socket = directory.join(SOCKET);
    let deadline = Instant::now() + ANSWER_TIMEOUT;
    let stream = loop {
        let error = match UnixStream::connect(&socket).await {
            Ok(stream) => break stream,
            Err(error) => error,
        };
        match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
                if !is_locked(directory)? =>
            {
                return Ok(None);
            }
            // It starts or ends, or its queue of connections is full.
            io::ErrorKind::NotFound
            | io::ErrorKind::ConnectionRefused
            | io::ErrorKind::WouldBlock => {
                if Instant::now() > deadline {
                    return Err(RemoteError::NoAnswer {
                        directory: directory.to_owned(),
                        pid: None,
                    });
                }
                sleep(RETRY_PAUSE).await;
            }
            _ => return Err(RemoteError::Connect { path: socket, source: error }),
        }
    };
    let failed = |source| RemoteError::Connect { path: socket.clone(), source };
    let peer = stream.peer_cred().map_err(failed)?;
    let foreign = |reason: String| RemoteError::Foreign { socket: socket.clone(), reason };
    if peer.uid() != geteuid().as_raw() {
        return Err(foreign(format!("the listener belongs to user {}", peer.uid())));
    }
    // 0: in another PID namespace.
    match peer.pid().and_then(|pid| u32::try_from(pid).ok()).filter(|pid| *pid > 0) {
        Some(pid) => Ok(Some((stream, pid))),
        None => Err(foreign("the listener is in another PID namespace".to_owned())),
    }
}

/// Returns whether a process holds the lock of `directory`.
fn is_locked(directory: &Path) -> Result<bool, RemoteError> {
    let path = directory.join(LOCK);
    let open =
        OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(&path);
    let file = match open {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(source) => return Err(RemoteError::Connect { path, source }),
    };
    // Shared: clients do not see each other. A process that starts retries.
    match flock(&file, FlockOperation::NonBlockingLockShared) {
        Ok(()) => Ok(false),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(true),
        Err(error) => Err(RemoteError::Connect { path, source: error.into() }),
    }
}

/// Waits until `process` has exited, and returns it.
async fn wait_for_exit(process: OwnedFd) -> io::Result<OwnedFd> {
    // SAFETY: `OwnedFd` keeps its descriptor open and refers to the same one until it is dropped.
    let process = unsafe { AsyncFd::register_with_interest(process, Interest::READABLE) }?;
    drop(process.readable().await?);
    Ok(process.into_inner())
}

fn open_process(pid: u32) -> io::Result<OwnedFd> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let pid = pid.ok_or_else(|| io::Error::from_raw_os_error(libc::ESRCH))?;
    Ok(pidfd_open(pid, PidfdFlags::empty())?)
}

/// Returns whether `process` is a child of this process. Does not reap it.
fn is_child(process: &OwnedFd) -> bool {
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
    waitid(WaitId::PidFd(process.as_fd()), options).is_ok()
}

fn absolute(directory: &Path) -> Result<PathBuf, RemoteError> {
    std::path::absolute(directory)
        .map_err(|source| RemoteError::Connect { path: directory.to_owned(), source })
}

/// The error for a reply that does not belong to the request.
fn unexpected(directory: &Path, reply: &Reply) -> RemoteError {
    let reason = format!("unexpected {reply:?}");
    RemoteError::Invalid { directory: directory.to_owned(), reason }
}

fn error_of(failure: Failure, directory: &Path, pid: u32) -> RemoteError {
    let directory = directory.to_owned();
    match failure {
        Failure::Version => RemoteError::Version { directory, pid },
        Failure::TooManyConnections => RemoteError::Busy { directory, what: "connections" },
        Failure::TooManyLogReaders => RemoteError::Busy { directory, what: "readers of logs" },
        Failure::Running(pid) => RemoteError::Running { directory, pid },
        Failure::Starting => RemoteError::Starting { directory },
        Failure::AlreadyStarted => RemoteError::AlreadyStarted { directory },
        Failure::Stopping => RemoteError::Stopping { directory },
        Failure::UnknownService(service) => RemoteError::UnknownService { directory, service },
        Failure::Other(message) => RemoteError::Failed(message),
    }
}
