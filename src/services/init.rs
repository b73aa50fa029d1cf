//! `tidegate service-init`: the first process of a service's PID namespace. Not for people.
//!
//! One thread, no runtime. All signals are blocked from before it is executed and read from a
//! descriptor, so none is lost; the command gets them unblocked. Standard input is the socket to
//! the supervisor, standard output and error are the service's.
//!
//! Where the network namespace belongs to a child of the supervisor's user namespace, as it does
//! for an ordinary user, the init joins that child before it starts the command. The PID namespace
//! and its `/proc` belong to the supervisor's user namespace. The supervisor makes them, and cannot
//! enter another user namespace first, because it has several threads.

mod mounts;
mod name_services;

use super::Exit;
use super::protocol::{Order, Report, receive, send};
use crate::port_error::without_numbers;
use crate::{EXIT_FAILURE, EXIT_USAGE};
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
use tidegate_netns::{Namespace, join_user_namespace};

/// What this program is called with to be a service's init.
pub const SUBCOMMAND: &str = "service-init";

/// The signals that are passed on to the command's process group.
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

/// The whole of it. Ends when the command has, and the kernel then kills what the command has left
/// behind.
pub fn main() -> ExitCode {
    if !getpid().is_init() {
        let _ = writeln!(
            io::stderr(),
            "tidegate: error: {SUBCOMMAND} is what tidegate starts by itself; use tidegate up"
        );
        return ExitCode::from(EXIT_USAGE);
    }
    // SAFETY: standard input is ours, nothing else in this process reads it, and it stays open to
    // the end.
    let socket = UnixStream::from(unsafe { OwnedFd::from_raw_fd(0) });
    // Without an order there is nobody to tell.
    let Ok(order) = receive::<Order>(&socket) else { return ExitCode::from(EXIT_FAILURE) };
    match run(&socket, &order) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            let _ = send(&socket, &failure);
            ExitCode::from(EXIT_FAILURE)
        }
    }
}

fn run(socket: &UnixStream, order: &Order) -> Result<(), Report> {
    // Not before the order has come, see `launch`. Had the supervisor died by now, the socket would
    // say so below.
    let asked = rustix::process::set_parent_process_death_signal(Some(Signal::KILL));
    step("ask to die with tidegate", asked)?;
    step("make a session", rustix::process::setsid())?;
    // SAFETY: the number is that of a descriptor which the supervisor left open for us and nothing
    // else here owns.
    let namespace = unsafe { OwnedFd::from_raw_fd(order.namespace) };
    let entered = move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network));
    step("enter the network namespace", entered)?;
    drop(namespace);
    let user_namespace = step("find the owner of the network namespace", network_owner())?;
    // Whatever tidegate was given open by its own parent. Before Linux 5.11 the flag is unknown,
    // and it stays. SAFETY: a system call that marks descriptors of this process; it closes none.
    unsafe { libc::close_range(3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC.cast_signed()) };
    unshare(UnshareFlags::NEWNS, "make a mount namespace")?;
    let (mut name_services, notes) = mounts::set_up(&order.files)?;
    for note in notes {
        let _ = send(socket, &Report::Note(note));
    }
    if let Some(namespace) = user_namespace {
        // After the mounts: mounting /proc takes CAP_SYS_ADMIN over the PID namespace.
        step("join the user namespace", io_errno(join_user_namespace(namespace)))?;
        // The command can mount here. It cannot remove the mounts made so far, which the kernel
        // locks in the copy for a less privileged user namespace (mount_namespaces(7)).
        unshare(UnshareFlags::NEWNS, "make a mount namespace in the user namespace")?;
        // New credentials can clear the request above (`commit_creds` of `kernel/cred.c`).
        let asked = rustix::process::set_parent_process_death_signal(Some(Signal::KILL));
        step("ask to die with tidegate", asked)?;
    }
    unshare(UnshareFlags::NEWUTS, "make a UTS namespace")?;
    step(
        &format!("set host name {:?}", order.hostname),
        rustix::system::sethostname(order.hostname.as_bytes()),
    )?;
    let signals = step("read signals", signals())?;
    let command = start(order)?;
    let _ = send(socket, &Report::Running);
    let exit = attend(socket, &signals, command, &mut name_services);
    if let Some(exit) = exit {
        let _ = send(socket, &Report::Ended(exit));
    }
    Ok(())
}

/// The user namespace that owns this process's network namespace, if that is not the one that this
/// process is in.
fn network_owner() -> Result<Option<OwnedFd>, Errno> {
    let network = io_errno(Namespace::current())?;
    if network.belongs_to_own_user_namespace() {
        return Ok(None);
    }
    io_errno(network.owner()).map(Some)
}

fn unshare(flags: UnshareFlags, what: &str) -> Result<(), Report> {
    // SAFETY: this process has one thread, which shares its mounts and host name with nobody in
    // here.
    step(what, unsafe { unshare_unsafe(flags) })
}

fn io_errno<T>(result: io::Result<T>) -> Result<T, Errno> {
    result.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))
}

/// The result of a step, or what to say about it.
fn step<T>(what: &str, result: Result<T, Errno>) -> Result<T, Report> {
    result.map_err(|error| Report::SetUpFailed(reason(what, error)))
}

fn reason(what: &str, error: Errno) -> String {
    let said = without_numbers(&error.to_string());
    match error {
        Errno::PERM => {
            format!(
                "{what}: {said}; needs CAP_SYS_ADMIN: run as root, or in a user namespace that has it"
            )
        }
        _ => format!("{what}: {said}"),
    }
}

/// Starts the command, leader of a process group in this session.
fn start(order: &Order) -> Result<Pid, Report> {
    let directory = order.working_dir.display();
    std::env::set_current_dir(&order.working_dir).map_err(|error| {
        Report::SetUpFailed(format!(
            "working directory {directory}: {}",
            without_numbers(&error.to_string())
        ))
    })?;
    let (program, arguments) =
        order.command.split_first().ok_or_else(|| Report::CannotRun("no command".to_owned()))?;
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env_clear()
        .envs(&order.environment)
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
        let said = without_numbers(&error.to_string());
        Report::CannotRun(match error.kind() {
            io::ErrorKind::NotFound if program.contains('/') => {
                format!("{said}; name a program that exists")
            }
            io::ErrorKind::NotFound => {
                format!("{said} in PATH; install it, or name it by its path")
            }
            io::ErrorKind::PermissionDenied => format!("{said}; is it an executable file?"),
            _ => said,
        })
    })?;
    Ok(Pid::from_child(&child))
}

/// Lets every signal through to the calling thread and what it executes. Async-signal-safe.
fn unblock_signals() {
    let mut none = MaybeUninit::uninit();
    // SAFETY: `sigemptyset` initialises the set that the second call reads; neither can fail on
    // valid pointers.
    unsafe {
        libc::sigemptyset(none.as_mut_ptr());
        libc::pthread_sigmask(libc::SIG_SETMASK, none.as_ptr(), std::ptr::null_mut());
    }
}

/// All signals that matter here, as a descriptor.
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
    // SAFETY: a descriptor that was just made and is nobody else's.
    Ok(unsafe { File::from_raw_fd(fd) })
}

/// Forwards signals and reaps until the command has ended, and covers name services of the host
/// that appear. After a request to end, that is when the whole process group has ended, so that its
/// members may finish what they do. `None` if the supervisor is gone.
fn attend(
    socket: &UnixStream,
    signals: &File,
    command: Pid,
    name_services: &mut NameServices,
) -> Option<Exit> {
    let mut exit = None;
    let mut asked_to_end = false;
    loop {
        if exit.is_some() && !(asked_to_end && test_kill_process_group(command).is_ok()) {
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
        // Nothing more is sent down: whatever comes, it is the end.
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
                asked_to_end |= matches!(signal, Signal::TERM | Signal::INT);
                // The last of the group may just have gone.
                let _ = kill_process_group(command, signal);
            }
        }
    }
}

/// The number of the next signal that has come.
fn next_signal(mut signals: &File) -> Option<i32> {
    let mut info = [0; size_of::<libc::signalfd_siginfo>()];
    signals.read_exact(&mut info).ok()?;
    // The first field, `ssi_signo`, is 32 bits wide (signalfd(2)).
    info.first_chunk::<4>().and_then(|number| i32::try_from(u32::from_ne_bytes(*number)).ok())
}

/// Reaps all that have ended; how the command did, if it is among them.
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
