//! `tidegate service-init`: PID 1 of a service's PID namespace. Internal, not for users.
//!
//! It has one thread and no async runtime. All signals are blocked before execve(2) and read from a
//! signalfd, so none is lost. They are unblocked for the command. Standard input is the socket to
//! the supervisor. Standard output and error are those of the service.
//!
//! For an ordinary user, the network namespace belongs to a child of the supervisor's user
//! namespace. The init joins that child before it starts the command. The PID namespace and its
//! `/proc` belong to the supervisor's user namespace: the supervisor creates them, and it cannot
//! enter another user namespace first, because it has several threads.

mod mounts;
mod name_services;

use super::Exit;
use super::protocol::{Report, StartRequest, receive, send};
use name_services::NameServices;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::process::{
    Pid, Signal, WaitOptions, getpid, kill_process_group, test_kill_process_group, wait,
};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe};
use std::fs::File;
use std::io::{self, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode, Stdio};
use tidegate_model::without_errno;
use tidegate_netns::{Namespace, join_user_namespace};
use tidegate_process::{EXIT_FAILURE, EXIT_USAGE};

/// The subcommand that runs this program as a service's init.
pub const SUBCOMMAND: &str = "service-init";

/// Signals that are forwarded to the command's process group.
const FORWARDED: [i32; 8] = [
    libc::SIGHUP,
    libc::SIGINT,
    libc::SIGQUIT,
    libc::SIGUSR1,
    libc::SIGUSR2,
    libc::SIGTERM,
    libc::SIGWINCH,
    libc::SIGCONT,
];

/// Runs the init. Returns when the command has ended. The kernel then kills all remaining processes
/// of the PID namespace.
pub fn main() -> ExitCode {
    if !getpid().is_init() {
        let _ = writeln!(
            io::stderr(),
            "tidegate: error: {SUBCOMMAND} is internal to tidegate; use tidegate up"
        );
        return ExitCode::from(EXIT_USAGE);
    }
    // SAFETY: descriptor 0 is open, and nothing else in this process uses it.
    let socket = UnixStream::from(unsafe { OwnedFd::from_raw_fd(0) });
    // Without a request, the supervisor has ended.
    let Ok(request) = receive::<StartRequest>(&socket) else {
        return ExitCode::from(EXIT_FAILURE);
    };
    match run(&socket, &request) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            let _ = send(&socket, &failure);
            ExitCode::from(EXIT_FAILURE)
        }
    }
}

fn run(socket: &UnixStream, request: &StartRequest) -> Result<(), Report> {
    // Only after the request was received, see `launch`. If the supervisor has exited before this
    // call, the socket reports end of file below.
    let set = rustix::process::set_parent_process_death_signal(Some(Signal::KILL));
    step("set the parent death signal", set)?;
    step("create a session", rustix::process::setsid())?;
    // SAFETY: the supervisor left this descriptor open for the init, and nothing else here owns it.
    let namespace = unsafe { OwnedFd::from_raw_fd(request.namespace) };
    let entered = move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network));
    step("enter the network namespace", entered)?;
    drop(namespace);
    // Closes descriptors that tidegate inherited from its parent. Root in the service could take
    // them from this process (pidfd_getfd(2)). Has no effect before Linux 5.9.
    // SAFETY: this process owns only the descriptors 0 to 2 here.
    unsafe { libc::close_range(3, libc::c_uint::MAX, 0) };
    let user_namespace = step("find the owner of the network namespace", network_owner())?;
    unshare(UnshareFlags::NEWNS, "create a mount namespace")?;
    let (mut name_services, notes) = mounts::set_up(&request.files)?;
    for note in notes {
        let _ = send(socket, &Report::Note(note));
    }
    if let Some(namespace) = user_namespace {
        // After the mounts: mounting /proc requires CAP_SYS_ADMIN over the PID namespace.
        step("join the user namespace", io_errno(join_user_namespace(namespace)))?;
        // The command can mount here. It cannot remove the mounts made so far: the kernel locks
        // them in the copy for a less privileged user namespace (mount_namespaces(7)).
        unshare(UnshareFlags::NEWNS, "create a mount namespace in the user namespace")?;
        // A change of credentials can clear the death signal (`commit_creds`, kernel/cred.c).
        let set = rustix::process::set_parent_process_death_signal(Some(Signal::KILL));
        step("set the parent death signal", set)?;
    }
    unshare(UnshareFlags::NEWUTS, "create a UTS namespace")?;
    step(
        &format!("set host name {:?}", request.hostname),
        rustix::system::sethostname(request.hostname.as_bytes()),
    )?;
    let signals = step("create a signalfd", signals())?;
    let command = start(request)?;
    let _ = send(socket, &Report::Running);
    let exit = supervise(socket, &signals, command, &mut name_services);
    if let Some(exit) = exit {
        let _ = send(socket, &Report::Ended(exit));
    }
    Ok(())
}

/// Returns the user namespace that owns the network namespace of this process. `None` if this
/// process is in it.
fn network_owner() -> Result<Option<OwnedFd>, Errno> {
    let network = io_errno(Namespace::current())?;
    if network.belongs_to_own_user_namespace() {
        return Ok(None);
    }
    io_errno(network.owner()).map(Some)
}

fn unshare(flags: UnshareFlags, what: &str) -> Result<(), Report> {
    // SAFETY: this process has one thread, so no other thread of it depends on shared namespaces.
    step(what, unsafe { unshare_unsafe(flags) })
}

fn io_errno<T>(result: io::Result<T>) -> Result<T, Errno> {
    result.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))
}

/// Converts the error of the step `what` into a report.
fn step<T>(what: &str, result: Result<T, Errno>) -> Result<T, Report> {
    result.map_err(|error| Report::SetUpFailed(reason(what, error)))
}

fn reason(what: &str, error: Errno) -> String {
    let message = without_errno(&error.to_string());
    match error {
        Errno::PERM => {
            format!(
                "{what}: {message}; needs CAP_SYS_ADMIN: run as root, or in a user namespace that has it"
            )
        }
        _ => format!("{what}: {message}"),
    }
}

/// Starts the command as the leader of a process group in this session.
fn start(request: &StartRequest) -> Result<Pid, Report> {
    let directory = request.working_dir.display();
    std::env::set_current_dir(&request.working_dir).map_err(|error| {
        Report::SetUpFailed(format!(
            "working directory {directory}: {}",
            without_errno(&error.to_string())
        ))
    })?;
    let (program, arguments) =
        request.command.split_first().ok_or_else(|| Report::CannotRun("no command".to_owned()))?;
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env_clear()
        .envs(&request.environment)
        .stdin(Stdio::null())
        .process_group(0);
    // SAFETY: the closure makes one system call and neither allocates nor locks.
    unsafe {
        command.pre_exec(|| {
            unblock_signals();
            Ok(())
        });
    }
    let child = command.spawn().map_err(|error| {
        let message = without_errno(&error.to_string());
        Report::CannotRun(match error.kind() {
            io::ErrorKind::NotFound if program.contains('/') => {
                format!("{message}; correct the path")
            }
            io::ErrorKind::NotFound => {
                format!("{message} in PATH; install it, or give its path")
            }
            io::ErrorKind::PermissionDenied => format!("{message}; is it an executable file?"),
            _ => message,
        })
    })?;
    Ok(Pid::from_child(&child))
}

/// Unblocks all signals for the calling thread and the program that it executes.
/// Async-signal-safe.
pub(super) fn unblock_signals() {
    let mut none = MaybeUninit::uninit();
    // SAFETY: `sigemptyset` initialises the set that the second call reads; neither can fail on
    // valid pointers.
    unsafe {
        libc::sigemptyset(none.as_mut_ptr());
        libc::pthread_sigmask(libc::SIG_SETMASK, none.as_ptr(), std::ptr::null_mut());
    }
}

/// A signalfd of [`FORWARDED`] and SIGCHLD.
fn signals() -> Result<File, Errno> {
    let mut set = MaybeUninit::uninit();
    // SAFETY: `sigemptyset` initialises the set that the others read; the numbers are those of
    // signals.
    let fd = unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        for signal in FORWARDED.into_iter().chain([libc::SIGCHLD]) {
            libc::sigaddset(set.as_mut_ptr(), signal);
        }
        libc::signalfd(-1, set.as_ptr(), libc::SFD_CLOEXEC | libc::SFD_NONBLOCK)
    };
    if fd < 0 {
        let error = io::Error::last_os_error();
        return Err(Errno::from_io_error(&error).unwrap_or(Errno::IO));
    }
    // SAFETY: the descriptor is new and has no other owner.
    Ok(unsafe { File::from_raw_fd(fd) })
}

/// Forwards signals, reaps processes and hides new name services of the host until the command has
/// ended. After SIGTERM or SIGINT it waits for the whole process group, so that all its members can
/// shut down. Returns `None` if the supervisor has ended.
fn supervise(
    socket: &UnixStream,
    signals: &File,
    command: Pid,
    name_services: &mut NameServices,
) -> Option<Exit> {
    let mut exit = None;
    let mut stopping = false;
    loop {
        if exit.is_some() && !(stopping && test_kill_process_group(command).is_ok()) {
            return exit;
        }
        let mut ready =
            vec![PollFd::new(signals, PollFlags::IN), PollFd::new(socket, PollFlags::IN)];
        ready.extend(name_services.events().map(|events| PollFd::new(events, PollFlags::IN)));
        match poll(&mut ready, None) {
            Err(Errno::INTR) => continue,
            Err(_) => return None,
            Ok(_) => {}
        }
        // The supervisor sends nothing after the request, so an event is the end of file.
        if !ready[1].revents().is_empty() {
            return None;
        }
        if ready.get(2).is_some_and(|events| !events.revents().is_empty()) {
            for note in name_services.refresh() {
                let _ = send(socket, &Report::Note(note));
            }
        }
        while let Some(number) = next_signal(signals) {
            if number == libc::SIGCHLD {
                exit = reap(command).or(exit);
            } else if let Some(signal) = Signal::from_named_raw(number) {
                stopping |= matches!(signal, Signal::TERM | Signal::INT);
                // Fails if the last process of the group has ended.
                let _ = kill_process_group(command, signal);
            }
        }
    }
}

/// Returns the number of the next pending signal.
fn next_signal(mut signals: &File) -> Option<i32> {
    let mut info = [0; size_of::<libc::signalfd_siginfo>()];
    signals.read_exact(&mut info).ok()?;
    // The first field, `ssi_signo`, is 32 bits wide (signalfd(2)).
    info.first_chunk::<4>().and_then(|number| i32::try_from(u32::from_ne_bytes(*number)).ok())
}

/// Reaps all ended processes. Returns the exit of the command if it is among them.
fn reap(command: Pid) -> Option<Exit> {
    let mut exit = None;
    while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
        if pid == command {
            let code = status.exit_status().map(Exit::Code);
            exit = code.or_else(|| status.terminating_signal().map(Exit::Signal));
        }
    }
    exit
}
