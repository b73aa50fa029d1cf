//! `tidegate exec`: runs a command in the namespaces of a service.
//!
//! `setns(2)` accepts a user namespace only from a process with one thread. This program therefore
//! executes itself as a hidden subcommand, which joins the namespaces first and then starts the
//! command: a PID namespace applies to children only.

use super::{UsageError, event_loop};
use anyhow::{Context, bail};
use clap::Args;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::Timespec;
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use tidegate_api::client::Client;
use tidegate_api::types::Status;
use tidegate_model::without_errno;
use tidegate_process::{EXIT_FAILURE, EXIT_USAGE};

/// Name of the hidden subcommand.
pub(super) const ENTER: &str = "enter-service";

/// Run a command in the namespaces of a running service
///
/// The command has the network, file systems, processes and host name of the service, and its
/// environment. Standard input, output and error are those of tidegate exec. Exits with the exit
/// code of the command, or with 128 and the number of the signal that killed it.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  tidegate exec web sh\n  tidegate exec shop/web ip address")]
pub(super) struct Exec {
    /// The service, as SERVICE or PROJECT/SERVICE
    #[arg(value_name = "SERVICE")]
    service: String,

    /// The command and its arguments
    #[arg(
        value_name = "COMMAND",
        required = true,
        trailing_var_arg = true,
        allow_hyphen_values = true
    )]
    command: Vec<OsString>,
}

impl Exec {
    /// Replaces this process. Returns only if that failed.
    pub(super) fn run(&self) -> anyhow::Result<()> {
        let pid = self.pid()?;
        let service = || format!("service {}", self.service);
        let process = pidfd_open(pid, PidfdFlags::empty()).with_context(service)?;
        let proc = PathBuf::from(format!("/proc/{}", pid.as_raw_nonzero()));
        let environment = environment(&proc).with_context(service)?;
        let directory = fs::read_link(proc.join("cwd")).unwrap_or_else(|_| "/".into());
        let user = |of: PathBuf| fs::read_link(of.join("ns/user"));
        let other_user = user(proc).with_context(service)? != user("/proc/self".into())?;
        // A PID can be reused: the service still has it, so all of the above belongs to it.
        if self.pid()? != pid || has_ended(&process)? {
            bail!("{} has been restarted; try again", service());
        }
        fcntl_setfd(&process, FdFlags::empty()).context("pidfd")?;
        let mut command = Command::new("/proc/self/exe");
        command.arg0("tidegate").arg(ENTER).arg(process.as_raw_fd().to_string());
        command.arg(if other_user { "other-user" } else { "same-user" }).arg(directory);
        Err(command.args(&self.command).env_clear().envs(environment).exec()).with_context(service)
    }

    /// Returns the PID of the command of the service.
    fn pid(&self) -> anyhow::Result<Pid> {
        let event_loop = event_loop()?;
        let mut found = Vec::new();
        for client in Client::all()? {
            let status: Status = event_loop.block_on(client.get("/v1/status"))?;
            // A project in the foreground names its services without the project.
            let is_daemon = status.state_file.is_some();
            for service in &status.services {
                let name = match is_daemon {
                    true => service.name.clone(),
                    false => format!("{}/{}", status.project, service.name),
                };
                let short = name.rsplit_once('/').map(|(_, service)| service);
                if name == self.service || short == Some(self.service.as_str()) {
                    found.push((name, service.pid));
                }
            }
        }
        let pid = match &found[..] {
            [(_, Some(pid))] => *pid,
            [(name, None)] => {
                bail!("service {name} has no running command; tidegate ps shows its state")
            }
            [] => bail!("there is no service {:?}; tidegate ps lists the services", self.service),
            several => {
                let names: Vec<&str> = several.iter().map(|(name, _)| name.as_str()).collect();
                let line = format!("name one of the services {}", names.join(", "));
                return Err(UsageError(line).into());
            }
        };
        let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
        pid.with_context(|| format!("service {}: no valid process ID", self.service))
    }
}

fn has_ended(process: &OwnedFd) -> io::Result<bool> {
    let mut ended = [PollFd::new(process, PollFlags::IN)];
    Ok(poll(&mut ended, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }))? > 0)
}

/// Returns the initial environment of the process at `proc`.
fn environment(proc: &std::path::Path) -> io::Result<BTreeMap<OsString, OsString>> {
    let bytes = fs::read(proc.join("environ"))?;
    let variables = bytes.split(|byte| *byte == 0).filter_map(|variable| {
        let at = variable.iter().position(|byte| *byte == b'=')?;
        let (name, value) = (&variable[..at], &variable[at + 1..]);
        Some((OsStr::from_bytes(name).to_owned(), OsString::from_vec(value.to_vec())))
    });
    Ok(variables.collect())
}

/// The hidden subcommand: the arguments after its name are the number of the pidfd, `other-user` or
/// `same-user`, the working directory, and the command. Must run before any thread is started.
pub(super) fn enter(mut arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let process = arguments.next().and_then(|text| text.to_str()?.parse::<RawFd>().ok());
    let (Some(process), Some(user), Some(directory), Some(program)) =
        (process.filter(|fd| *fd > 2), arguments.next(), arguments.next(), arguments.next())
    else {
        return ExitCode::from(EXIT_USAGE);
    };
    // SAFETY: `Exec::run` left this descriptor open for this process, and nothing else owns it.
    let process = unsafe { OwnedFd::from_raw_fd(process) };
    let entered = enter_namespaces(&process, user == "other-user");
    drop(process);
    // Descriptors that the caller has left open are not for the service.
    // SAFETY: this process owns only the descriptors 0 to 2 here.
    unsafe { libc::close_range(3, libc::c_uint::MAX, 0) };
    let status = entered.and_then(|()| {
        // It may not exist in the mount namespace.
        if std::env::set_current_dir(&directory).is_err() {
            std::env::set_current_dir("/")?;
        }
        let mut child = Command::new(&program).args(arguments).spawn()?;
        // Ctrl-C is for the command, which is in the same process group.
        // SAFETY: ignoring a signal runs no code of this process.
        unsafe {
            libc::signal(libc::SIGINT, libc::SIG_IGN);
            libc::signal(libc::SIGQUIT, libc::SIG_IGN);
        }
        child.wait()
    });
    match status {
        Ok(status) => {
            let code = status.code().or_else(|| Some(128 + status.signal()?));
            ExitCode::from(code.and_then(|code| u8::try_from(code).ok()).unwrap_or(EXIT_FAILURE))
        }
        Err(error) => {
            let text = without_errno(&error.to_string());
            eprintln!("tidegate: error: {}: {text}", program.display());
            // As sh(1) and docker exec.
            ExitCode::from(if error.kind() == io::ErrorKind::NotFound { 127 } else { 126 })
        }
    }
}

/// Joins the namespaces of `process` that a service has for itself.
fn enter_namespaces(process: &OwnedFd, other_user: bool) -> io::Result<()> {
    let mut kinds =
        libc::CLONE_NEWNET | libc::CLONE_NEWNS | libc::CLONE_NEWPID | libc::CLONE_NEWUTS;
    if other_user {
        kinds |= libc::CLONE_NEWUSER;
    }
    // SAFETY: setns(2) does not access memory of this process.
    match unsafe { libc::setns(process.as_raw_fd(), kinds) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
