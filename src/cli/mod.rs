//! The command line of `tidegate`.

mod completion;
mod compose_file;
mod daemon;
mod doctor;
mod duration;
mod events;
mod exec;
mod hello;
mod instance_options;
mod mesh;
mod network;
mod object_name;
mod output;
mod project;
mod ps;
mod publish;
mod service;
mod top;
mod up;

use crate::doctor::{TRIAL, trial};
use anyhow::Context;
use clap::{CommandFactory, Parser, Subcommand};
use std::ffi::OsString;
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;
use tidegate_docker_proxy as docker_proxy;
use tidegate_model::without_errno;
use tidegate_process::{EXIT_FAILURE, EXIT_USAGE};
use tidegate_slirp4netns as slirp4netns;
use tidegate_telemetry::logging;
use tidegate_telemetry::metrics_endpoint::MetricsAddress;
use tracing_subscriber::filter::LevelFilter;

/// Container networking in userspace: published ports, isolated networks, DNS and egress.
#[derive(Debug, Parser)]
#[command(name = "tidegate", version, about, max_term_width = 100)]
#[command(
    after_help = "Environment:\n  TIDEGATE_LOG         filter of the log on standard error: a level (info, debug, trace), \
    or target=level,...\n  TIDEGATE_LOG_FORMAT  human or json; --log-format overrides it\n  TIDEGATE_SOCKET      path of the API socket of tidegate up and daemon, and of the\n                       commands that query or change it\n\nExit status: 0 for success, 1 for failure, 2 for an invalid command line."
)]
pub struct Cli {
    /// Format of the log on standard error [default: TIDEGATE_LOG_FORMAT, or human]
    #[arg(long, global = true, value_name = "FORMAT", value_enum)]
    log_format: Option<logging::Format>,

    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Up(Box<up::Up>),
    Down(project::Down),
    Logs(project::Logs),
    Exec(exec::Exec),
    Daemon(Box<daemon::Daemon>),
    Network(network::Networks),
    Mesh(mesh::MeshCommand),
    Service(service::Services),
    Attach(network::Attach),
    Detach(network::Detach),
    Events(events::Events),
    Ps(ps::Ps),
    Ls(ps::Ls),
    Top(top::Top),
    Publish(Box<publish::Publish>),
    Doctor(doctor::Doctor),
    /// Run as Docker's docker-proxy (see the binary of that name)
    #[command(disable_help_flag = true, disable_version_flag = true)]
    DockerProxy {
        /// The flags of docker-proxy
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "FLAGS")]
        flags: Vec<OsString>,
    },
    /// Run as slirp4netns (see the binary of that name)
    #[command(disable_help_flag = true, disable_version_flag = true)]
    Slirp4netns {
        /// The options of slirp4netns
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "OPTIONS")]
        options: Vec<OsString>,
    },
    /// Serve a demo page that shows the address of the client
    Hello(hello::Hello),
    /// Print a completion script for a shell
    Completion(completion::Completion),
    /// Write the manual pages to a directory
    #[command(hide = true)]
    Man(completion::Man),
}

/// Runs the program with its arguments, the name of the program first. Under the name
/// `docker-proxy` or `slirp4netns` (a link to this binary), it runs as that program.
pub fn main(args: impl Iterator<Item = OsString>) -> ExitCode {
    let args: Vec<OsString> = args.collect();
    let name = args.first().and_then(|name| Path::new(name).file_name().map(OsString::from));
    // These must run before anything is opened: they identify inherited descriptors by number.
    for (as_one, skipped) in [(name.as_ref(), 1), (args.get(1), 2)] {
        match as_one.and_then(|name| name.to_str()) {
            Some("docker-proxy") => return docker_proxy::main(args.iter().skip(skipped).cloned()),
            Some("slirp4netns") => return slirp4netns::main(args.iter().skip(skipped).cloned()),
            _ => {}
        }
    }
    // Internal subcommands, hidden from help and completion.
    if args.get(1).is_some_and(|command| command == tidegate_services::init::SUBCOMMAND) {
        return tidegate_services::init::main();
    }
    if args.get(1).is_some_and(|command| command == exec::ENTER) {
        return exec::enter(args.into_iter().skip(2));
    }
    if args.get(1).is_some_and(|command| command == tidegate_services::keeper::SUBCOMMAND) {
        return tidegate_services::keeper::run();
    }
    if let Some(directory) = supervisor_directory(&args) {
        return tidegate_services::process::run(Path::new(directory));
    }
    if args.get(1).is_some_and(|command| command == TRIAL) {
        return trial(args.into_iter().skip(2));
    }
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(error) => {
            // clap reports help and version as errors; they exit with 0.
            let code = if error.use_stderr() { EXIT_USAGE } else { 0 };
            let _ = error.print();
            return ExitCode::from(code);
        }
    };
    let format = logging::format(cli.log_format);
    let last_word = format.as_ref().copied().unwrap_or_default();
    let result =
        format.and_then(|format| logging::init(LevelFilter::INFO, format)).map_err(Into::into);
    let result = result.and_then(|()| cli.command.run());
    logging::flush();
    match result {
        // Services have already logged their failures.
        Ok(well) => {
            if well {
                ExitCode::SUCCESS
            } else {
                ExitCode::from(EXIT_FAILURE)
            }
        }
        Err(error) => {
            // A write error does not change the exit status.
            let _ =
                write!(std::io::stderr(), "{}", logging::last_word(last_word, &one_line(&error)));
            ExitCode::from(if error.is::<UsageError>() { EXIT_USAGE } else { EXIT_FAILURE })
        }
    }
}

impl Command {
    /// Runs the command. False if it failed and has already reported why.
    fn run(self) -> anyhow::Result<bool> {
        let done = |()| true;
        match self {
            Self::Up(up) => up.run(),
            Self::Down(down) => down.run().map(done),
            Self::Logs(logs) => logs.run().map(done),
            Self::Exec(exec) => exec.run().map(done),
            Self::Daemon(daemon) => daemon.run(),
            Self::Network(network) => network.run().map(done),
            Self::Mesh(mesh) => mesh.run().map(done),
            Self::Service(service) => service.run().map(done),
            Self::Attach(attach) => attach.run().map(done),
            Self::Detach(detach) => detach.run().map(done),
            Self::Events(events) => events.run().map(done),
            Self::Ps(ps) => ps.run().map(done),
            Self::Ls(ls) => ls.run().map(done),
            Self::Top(top) => top.run().map(done),
            Self::Publish(publish) => publish.run().map(done),
            Self::Doctor(doctor) => doctor.run(),
            Self::DockerProxy { .. } | Self::Slirp4netns { .. } => {
                unreachable!("dispatched before parsing")
            }
            Self::Hello(hello) => hello.run().map(done),
            Self::Completion(completion) => completion.run(&mut Cli::command()).map(done),
            Self::Man(man) => man.run(Cli::command()).map(done),
        }
    }
}

/// The directory of a supervisor process, if the arguments start one.
fn supervisor_directory(args: &[OsString]) -> Option<&OsString> {
    args.get(2).filter(|_| args[1] == tidegate_services::process::SUBCOMMAND)
}

/// Creates an event loop on this thread, for requests to a running instance.
fn event_loop() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().context("event loop")
}

/// Returns the error and its causes. A cause that its error already contains is not repeated.
fn one_line(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in error.chain().map(|cause| without_errno(&cause.to_string())) {
        if !line.contains(&cause) {
            let separator = if line.is_empty() { "" } else { ": " };
            line.push_str(separator);
            line.push_str(&cause);
        }
    }
    line
}

/// Parses the value of `--metrics`; `none` disables metrics.
fn metrics_address(text: &str) -> Result<Option<MetricsAddress>, UsageError> {
    match text {
        "none" => Ok(None),
        text => text.parse().map(Some).map_err(|error| UsageError(format!("--metrics: {error}"))),
    }
}

/// An error in a command line that is syntactically valid.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct UsageError(pub String);
