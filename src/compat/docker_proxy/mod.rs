//! A stand-in for Docker's `docker-proxy`, for `dockerd --userland-proxy-path`.
//!
//! dockerd starts one process for each published port and address, hands it the write end of a pipe
//! as descriptor 3 (and, since 28, the bound socket as descriptor 4), waits for it to say that it
//! is ready, and stops it with SIGINT, without limit: a proxy that does not end hangs
//! `docker stop`. So the signals are the main thread's only occupation, and ending is immediate:
//! connections are not drained, as with the original.
//!
//! What the original does not do is steered by the environment, which is dockerd's own:
//! [`SOURCE`], [`PROXY_PROTOCOL`], [`METRICS`], [`limits::VARIABLE`].

pub mod flags;
mod ready;

use crate::bind::raise_descriptor_limit;
use crate::client_address::{Source, SourceError, sweep_stale_owners};
use crate::confine;
use crate::limits::{self, ProxyLimits};
use crate::metrics_endpoint::{MetricsAddress, Recorder};
use crate::{EXIT_FAILURE, EXIT_USAGE, logging, port_error, version};
use flags::{Invocation, Listen, Options};
use ready::ReadyPipe;
use rustix::io::{FdFlags, fcntl_getfd};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::ffi::OsString;
use std::io::{self, Write};
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd};
use std::process::ExitCode;
use std::sync::Arc;
use tidegate_proxy::{AdoptError, Engine, Listener, PortOptions, ProxyProtocol, Settings};
use tracing_subscriber::filter::LevelFilter;

/// `proxy` (default), `client` or `proxy-protocol`: what the container sees as the client's
/// address.
pub const SOURCE: &str = "TIDEGATE_PROXY_SOURCE";

/// `v1` or `v2`: tell the backend the client's address by the PROXY protocol.
pub const PROXY_PROTOCOL: &str = "TIDEGATE_PROXY_PROTOCOL";

/// Where to serve metrics: `ADDRESS:PORT`, or `ADDRESS:PORT-PORT` for the first free one. Off
/// without it.
pub const METRICS: &str = "TIDEGATE_PROXY_METRICS";

/// The descriptor that newer daemons hand the bound socket down as.
const LISTEN_FD: i32 = 4;

/// Why the proxy does not start.
#[derive(Debug, thiserror::Error)]
enum StartError {
    #[error("{variable}={value:?}: {reason}")]
    Environment { variable: &'static str, value: String, reason: String },
    #[error("{0}")]
    Port(String),
    #[error("descriptor {LISTEN_FD} was to be the listening socket: {0}")]
    Adopt(#[from] AdoptError),
    #[error("descriptor {LISTEN_FD} was to be the listening socket, and is not open")]
    NoListenFd,
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error(transparent)]
    Logging(#[from] logging::LogError),
    #[error(transparent)]
    Metrics(#[from] crate::metrics_endpoint::EndpointError),
    #[error("{0}")]
    System(#[from] io::Error),
}

/// The whole program, given its arguments without its own name. Must be the first thing that main
/// does: descriptor 3 is ours only as long as nothing else was opened.
pub fn main(args: impl Iterator<Item = OsString>) -> ExitCode {
    let ready = ReadyPipe::inherit();
    let options = match flags::parse(args) {
        Ok(Invocation::Run(options)) => options,
        Ok(Invocation::Version) => {
            let (commit, version) = (version::COMMIT, version::VERSION);
            say(
                io::stdout(),
                &format!("docker-proxy (commit {commit}) version {version} (tidegate)\n"),
            );
            return ExitCode::SUCCESS;
        }
        Ok(Invocation::Help) => {
            say(io::stderr(), &flags::usage());
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            say(io::stderr(), &format!("{error}\n{}", flags::usage()));
            ready.failed(&error.to_string());
            return ExitCode::from(EXIT_USAGE);
        }
    };
    // From here on neither signal kills: one that comes early waits until we look.
    let mut signals = match Signals::new([SIGINT, SIGTERM]) {
        Ok(signals) => signals,
        Err(error) => return fail(ready, &error.into()),
    };
    let engine = match start(&options) {
        Ok(engine) => engine,
        Err(error) => return fail(ready, &error),
    };
    ready.succeeded();
    crate::compat::start_up_pages::give_back();
    signals.forever().next();
    // Connections are reset, so that none looks complete, and rules in the host's namespace are put
    // away.
    engine.stop();
    logging::flush();
    ExitCode::SUCCESS
}

fn fail(ready: ReadyPipe, error: &StartError) -> ExitCode {
    let reason = port_error::without_numbers(&error.to_string());
    say(io::stderr(), &format!("docker-proxy: error: {reason}\n"));
    ready.failed(&reason);
    ExitCode::from(EXIT_FAILURE)
}

/// Writes `text`; that nobody can read it is no reason not to go on.
fn say(mut to: impl Write, text: &str) {
    let _ = to.write_all(text.as_bytes()).and_then(|()| to.flush());
}

fn start(options: &Options) -> Result<Arc<Engine>, StartError> {
    // dockerd discards what its proxies log, and a logger that nobody reads is a fifth of this
    // process's memory.
    if std::env::var_os(logging::VARIABLE).is_some() {
        logging::init(LevelFilter::WARN, logging::format(None)?)?;
    }
    let environment = Environment::read()?;
    sweep_stale_owners();
    raise_descriptor_limit();
    let listener = match options.listen {
        Listen::Bind(address) => Listener::bind(address, options.protocol)
            .map_err(|error| StartError::Port(port_error::explain(&error)))?,
        Listen::Inherited(_) => Listener::adopt(inherited(LISTEN_FD)?, options.protocol)?,
    };
    let recorder = environment.metrics.map(Recorder::install).transpose()?;
    let container = options.container.ip();
    // Clients of another family than the container's cannot be shown; that is all that come to such
    // a listener.
    let same_family = listener.label().address().is_ipv4() == container.is_ipv4();
    let source = if same_family { environment.source } else { Source::Proxy };
    let upstream = source.upstream_to(container)?;
    let mut port_options = PortOptions::new(upstream);
    port_options.proxy_protocol = environment.proxy_protocol;
    environment.limits.limit_port(&mut port_options);
    if source == Source::Client {
        confine::privileged_proxy_begins();
    } else {
        confine::proxy_begins(&[options.container.port()]);
    }
    let mut settings = Settings::default();
    environment.limits.limit_engine(&mut settings);
    let engine = Arc::new(Engine::new(settings));
    engine.publish(vec![(listener, options.container.port())], &Arc::new(port_options))?;
    if let Some(recorder) = recorder {
        let told = Arc::clone(&engine);
        recorder.serve(move || (told.snapshot(), told.fill()))?;
    }
    if source != Source::Client {
        confine::proxy_is_ready();
    }
    Ok(engine)
}

/// What the environment asks for.
struct Environment {
    source: Source,
    proxy_protocol: Option<ProxyProtocol>,
    metrics: Option<MetricsAddress>,
    limits: ProxyLimits,
}

impl Environment {
    fn read() -> Result<Self, StartError> {
        let mut source = variable::<Source>(SOURCE)?.unwrap_or(Source::Proxy);
        let mut proxy_protocol = variable(PROXY_PROTOCOL)?;
        if source == Source::ProxyProtocol {
            proxy_protocol = proxy_protocol.or(Some(ProxyProtocol::V2));
            source = Source::Proxy;
        }
        let limits = variable(limits::VARIABLE)?.unwrap_or_default();
        Ok(Self { source, proxy_protocol, metrics: variable(METRICS)?, limits })
    }
}

fn variable<T: std::str::FromStr<Err: std::fmt::Display>>(
    name: &'static str,
) -> Result<Option<T>, StartError> {
    let value = match std::env::var_os(name) {
        Some(value) if !value.is_empty() => value.to_string_lossy().into_owned(),
        _ => return Ok(None),
    };
    match value.parse() {
        Ok(parsed) => Ok(Some(parsed)),
        Err(error) => {
            Err(StartError::Environment { variable: name, reason: format!("{error}"), value })
        }
    }
}

/// Descriptor `number`, which our parent has opened for us.
fn inherited(number: i32) -> Result<OwnedFd, StartError> {
    // SAFETY: only looked at; a number that is not open is an error.
    let open = fcntl_getfd(unsafe { BorrowedFd::borrow_raw(number) });
    // Everything that we open ourselves is close-on-exec, what was handed down is not.
    if open.is_ok_and(|flags| !flags.contains(FdFlags::CLOEXEC)) {
        // SAFETY: it is open, was not opened by us, and the flag that names it is honoured once.
        Ok(unsafe { OwnedFd::from_raw_fd(number) })
    } else {
        Err(StartError::NoListenFd)
    }
}
