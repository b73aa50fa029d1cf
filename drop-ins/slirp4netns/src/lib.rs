//! A replacement for slirp4netns, for rootlesskit, podman and other callers.
//!
//! # Theory of operation
//! An unprivileged user starts the process and names a network namespace by process or path. The
//! process creates a device in that namespace and serves it from its own namespace. Packets from
//! the container leave through ordinary sockets of this process ([`tidegate_nat`]).
//!
//! ```text
//!  caller's user namespace          this process                                   the container's
//!  ───────────────────────          ────────────                                   ───────────────
//!                                   options, descriptors, API socket
//!                                   fork ──────────── joins ──────────────────────► makes device
//!                                        ◄─────────── its descriptor ─────────────┘
//!                                   fork: reads resolv.conf from now on ─┐
//!                                   own namespaces                       │
//!                                   engine thread, unprivileged          │ updates
//!                                   drop root, privileges, system calls  │
//!  1 ◄───────────────────────────── ready                                │
//!                                   waits for: exit, signals, API ◄──────┘
//! ```
//!
//! All of this is complete before the process reports that it is ready. With the corresponding
//! options, it then has only the file system access, privileges and system calls that it needs.
//!
//! The device is a TUN although callers say TAP: a TUN is faster, and callers do not check.
//! `TIDEGATE_SLIRP_DEVICE=tap` and `--macaddress` select a TAP.

mod addresses;
mod api;
mod api_socket;
mod control;
mod device;
pub mod options;
mod process;
mod resolvers;
mod sandbox;

use addresses::Addresses;
use api::Forwards;
use api_socket::{MAX_CLIENTS, Server};
use control::{Control, Ports};
use options::{Invocation, Options, Outbound};
use resolvers::Resolvers;
use rustix::io::{FdFlags, fcntl_dupfd_cloexec, fcntl_getfd, fcntl_setfd};
use sandbox::Sandbox;
use signal_hook::consts::{SIGINT, SIGTERM};
use std::ffi::OsString;
use std::io::{self, Write};
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::sync::Arc;
use tidegate_nat::{ForwardSource, Nat, Policy, Settings, StartError};
use tidegate_netns::{AddressBook, Namespace};
use tidegate_process::confine::{self, CallsError};
use tidegate_process::{EXIT_FAILURE, raise_descriptor_limit, without_lost_signals};
use tidegate_reactor::Descriptors;
use tidegate_telemetry::{logging, version};
use tracing_subscriber::filter::LevelFilter;

/// `tun` (default) or `tap`.
pub const DEVICE: &str = "TIDEGATE_SLIRP_DEVICE";

/// The source address that a container sees at a forwarded port: `gateway` (default) or `client`.
pub const SOURCE: &str = "TIDEGATE_SLIRP_SOURCE";

/// Descriptors that are not available to flows: those of the process itself, and those of API
/// clients.
const RESERVED: usize = 32 + MAX_CLIENTS;

/// Why the process did not start, in one line.
#[derive(Debug, thiserror::Error)]
enum RunError {
    #[error("--{option} {number}: this descriptor is not open")]
    Descriptor { option: &'static str, number: RawFd },
    #[error("--ready-fd {0}: {1}")]
    Ready(RawFd, #[source] io::Error),
    #[error("{name}={value:?}: use {} or {}", words[0], words[1])]
    Environment { name: &'static str, value: String, words: [&'static str; 2] },
    #[error("--api-socket {path:?}: {source}")]
    ApiSocket { path: String, source: io::Error },
    #[error("--{option} {interface:?}: {reason}")]
    Outbound { option: &'static str, interface: String, reason: String },
    #[error("resolvers of the host: {0}")]
    Resolvers(#[source] io::Error),
    #[error(transparent)]
    Made(#[from] device::DeviceError),
    #[error(transparent)]
    Sandbox(#[from] sandbox::SandboxError),
    #[error(transparent)]
    Calls(#[from] CallsError),
    #[error(transparent)]
    Engine(#[from] StartError),
    #[error(transparent)]
    Logging(#[from] logging::LogError),
    #[error("{0}")]
    System(#[from] io::Error),
}

/// Runs the program with its arguments, without its name. Must be called first in main, before
/// anything is opened: inherited descriptors are identified by their numbers.
pub fn main(args: impl Iterator<Item = OsString>) -> ExitCode {
    let options = match options::parse(args) {
        Ok(Invocation::Run(options)) => options,
        Ok(Invocation::Version) => {
            let (commit, version) = (version::COMMIT, version::VERSION);
            print(
                io::stdout(),
                &format!("slirp4netns version {version} (tidegate)\ncommit: {commit}\n"),
            );
            return ExitCode::SUCCESS;
        }
        Ok(Invocation::Help) => {
            print(io::stdout(), &options::usage());
            return ExitCode::SUCCESS;
        }
        Err(error) => return fail(&error),
    };
    let result = run(&options);
    logging::flush();
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error),
    }
}

/// Prints the error. Like slirp4netns, this uses one exit code for all errors.
fn fail(error: &dyn std::error::Error) -> ExitCode {
    let line = tidegate_model::without_errno(&error.to_string());
    print(io::stderr(), &format!("slirp4netns: error: {line}\n"));
    ExitCode::from(EXIT_FAILURE)
}

/// Writes `text`. A write error does not end the program.
fn print(mut to: impl Write, text: &str) {
    let _ = to.write_all(text.as_bytes()).and_then(|()| to.flush());
}

fn run(options: &Options) -> Result<(), RunError> {
    let exit = options.exit_fd.map(|number| inherited("exit-fd", number)).transpose()?;
    let ready = options.ready_fd.map(|number| inherited("ready-fd", number)).transpose()?;
    logging::init(LevelFilter::WARN, logging::format(None)?)?;
    let layer2 = options.mac.is_some() || variable(DEVICE, ["tun", "tap"])? == Some("tap");
    let source = match variable(SOURCE, ["gateway", "client"])? {
        Some("client") => ForwardSource::Client,
        _ => ForwardSource::Gateway,
    };
    raise_descriptor_limit();
    let host = Namespace::current()?;
    let outbound = outbound(options, &host)?;
    let listener = options.api_socket.as_deref().map(|path| {
        api_socket::listen(path)
            .map_err(|source| RunError::ApiSocket { path: path.display().to_string(), source })
    });
    let listener = listener.transpose()?;

    // Forks while there is a single thread. The process that stays comes first, so that it does not
    // inherit the device and keep it alive after this process.
    let caller_fds: Vec<BorrowedFd<'_>> = exit
        .iter()
        .chain(&ready)
        .map(AsFd::as_fd)
        .chain(listener.as_ref().map(AsFd::as_fd))
        .collect();
    let following = if options.disable_dns {
        None
    } else {
        Some(Resolvers::follow(&caller_fds).map_err(RunError::Resolvers)?)
    };
    let (resolvers, servers) = following.unzip();
    let device::Made { tun, ipv6 } = device::make(options, layer2)?;
    if options.ipv6 && !ipv6 {
        tracing::warn!("--enable-ipv6: this host has no IPv6; serving only IPv4");
    }

    let addresses = Addresses::of(options.network);
    let policy = Policy {
        sources: addresses.sources(ipv6),
        gateways: addresses.gateways(ipv6),
        name_servers: addresses.name_servers(ipv6),
        resolvers: servers.unwrap_or_default(),
        host_loopback: !options.disable_host_loopback,
        // As in slirp4netns, containers reach what the host reaches.
        ..Policy::default()
    };
    let mut settings = Settings::new(options.mtu);
    settings.one_guest = true;
    settings.policy = policy.clone();
    settings.outbound = outbound;

    let sandbox = if options.sandbox { Some(Sandbox::enter(&host)?) } else { None };
    let start = || {
        if let Some(sandbox) = sandbox {
            sandbox.drop_privileges()?;
        }
        Ok::<_, RunError>(Nat::start(
            settings,
            tun,
            &host,
            Arc::new(Descriptors::of_process(RESERVED)),
        )?)
    };
    // The engine thread inherits the lack of privileges of the thread that starts it.
    let nat = std::thread::scope(|scope| {
        let started = scope.spawn(start).join();
        started.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })?;
    let nat = Arc::new(nat);
    let signals = signals()?;
    let guest = addresses.guest().addr();
    let api = listener.map(|listener| {
        Server::new(listener, Forwards::new(Ports { nat: Arc::clone(&nat), source }, guest))
    });
    if let Some(sandbox) = sandbox {
        sandbox.close()?;
    }
    tidegate_process::startup_pages::release();
    if options.seccomp {
        confine::filter_engine_calls()?;
    }
    if let (Some(ready), Some(number)) = (ready, options.ready_fd) {
        rustix::io::write(&ready, b"1").map_err(|error| RunError::Ready(number, error.into()))?;
    }
    Ok(Control { nat, policy, exit, signals, resolvers, api }.run()?)
}

/// Reads an environment variable with one of two values.
fn variable(
    name: &'static str,
    words: [&'static str; 2],
) -> Result<Option<&'static str>, RunError> {
    let value = std::env::var_os(name).unwrap_or_default();
    let word = words.into_iter().find(|word| value == *word);
    if word.is_none() && !value.is_empty() {
        let value = value.to_string_lossy().into_owned();
        return Err(RunError::Environment { name, value, words });
    }
    Ok(word)
}

/// Takes the inherited descriptor `number`, and moves it if it is a standard stream.
fn inherited(option: &'static str, number: RawFd) -> Result<OwnedFd, RunError> {
    // SAFETY: the descriptor is only queried; a number that is not open is an error.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    let closed = |_| RunError::Descriptor { option, number };
    // Descriptors opened by this process are close-on-exec, inherited ones are not.
    if fcntl_getfd(borrowed).map_err(closed)?.contains(FdFlags::CLOEXEC) {
        return Err(RunError::Descriptor { option, number });
    }
    if number <= libc::STDERR_FILENO {
        return fcntl_dupfd_cloexec(borrowed, libc::STDERR_FILENO + 1).map_err(closed);
    }
    // SAFETY: it is open, was not opened by this process, and no two options share a number.
    let owned = unsafe { OwnedFd::from_raw_fd(number) };
    fcntl_setfd(&owned, FdFlags::CLOEXEC).map_err(closed)?;
    Ok(owned)
}

/// A socket that receives SIGTERM and SIGINT. They must not kill: peers have to see resets, not a
/// truncated transfer that looks complete.
fn signals() -> io::Result<UnixStream> {
    let (receiver, sender) = UnixStream::pair()?;
    without_lost_signals(|| {
        for signal in [SIGTERM, SIGINT] {
            signal_hook::low_level::pipe::register(signal, sender.try_clone()?)?;
        }
        Ok(receiver)
    })
}

/// The source addresses of outbound flows.
fn outbound(options: &Options, host: &Namespace) -> Result<tidegate_nat::Outbound, RunError> {
    let named = |option, interface: &str, is_it: fn(&IpAddr) -> bool| {
        let error =
            |reason: String| RunError::Outbound { option, interface: interface.to_owned(), reason };
        let addresses = AddressBook::of(host).and_then(|book| book.of_interface(interface));
        let addresses = addresses.map_err(|source| error(source.to_string()))?;
        addresses
            .into_iter()
            .find(is_it)
            .ok_or_else(|| error("it has no address of this family".to_owned()))
    };
    let v4 = match &options.outbound {
        None => None,
        Some(Outbound::Address(address)) => Some(*address),
        Some(Outbound::Interface(name)) => match named("outbound-addr", name, IpAddr::is_ipv4)? {
            IpAddr::V4(address) => Some(address),
            IpAddr::V6(_) => None,
        },
    };
    let v6 = match &options.outbound6 {
        None => None,
        Some(Outbound::Address(address)) => Some(*address),
        Some(Outbound::Interface(name)) => match named("outbound-addr6", name, IpAddr::is_ipv6)? {
            IpAddr::V6(address) => Some(address),
            IpAddr::V4(_) => None,
        },
    };
    Ok(tidegate_nat::Outbound { v4, v6 })
}
