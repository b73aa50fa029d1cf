//! A replacement for Docker's `docker-proxy`, for `dockerd --userland-proxy-path`.
//!
//! dockerd starts one process for each published port and address. The process inherits the write
//! end of a pipe as descriptor 3 and, since dockerd 28, the bound socket as descriptor 4. dockerd
//! waits for it to report readiness, and stops it with SIGINT and without a timeout: a proxy that
//! does not exit blocks `docker stop`. The main thread therefore only waits for signals, and exits
//! immediately: like the original, it does not drain connections.
//!
//! Features beyond the original are configured by environment variables, which the proxy inherits
//! from dockerd: [`SOURCE`], [`PROXY_PROTOCOL`], [`METRICS`], [`limits::VARIABLE`].

pub mod flags;
mod ready;

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
use tidegate_model::without_errno;
use tidegate_process::confine;
use tidegate_process::{EXIT_FAILURE, EXIT_USAGE, raise_descriptor_limit, without_lost_signals};
use tidegate_proxy::{
    AdoptError, Engine, Listener, PortOptions, ProxyProtocol, Settings, describe_engine,
};
use tidegate_publish::client_address::{Source, SourceError, sweep_stale_owners};
use tidegate_publish::limits::{self, ProxyLimits};
use tidegate_publish::port_error;
use tidegate_telemetry::metrics_endpoint::{MetricsAddress, Recorder};
use tidegate_telemetry::{logging, version};
use tracing_subscriber::filter::LevelFilter;

/// The source address that the container sees: `proxy` (default), `client` or `proxy-protocol`.
pub const SOURCE: &str = "TIDEGATE_PROXY_SOURCE";

/// The version of the PROXY protocol header for the backend: `v1` or `v2`.
pub const PROXY_PROTOCOL: &str = "TIDEGATE_PROXY_PROTOCOL";

/// The metrics address: `ADDRESS:PORT`, or `ADDRESS:PORT-PORT` for the first free port. Without it,
/// metrics are disabled.
pub const METRICS: &str = "TIDEGATE_PROXY_METRICS";

/// The descriptor of the bound socket from newer daemons.
const LISTEN_FD: i32 = 4;

/// Why the proxy did not start.
#[derive(Debug, thiserror::Error)]
enum StartError {
    #[error("{variable}={value:?}: {reason}")]
    Environment { variable: &'static str, value: String, reason: String },
    #[error("{0}")]
    Port(String),
    #[error("listening socket on descriptor {LISTEN_FD}: {0}")]
    Adopt(#[from] AdoptError),
    #[error("listening socket on descriptor {LISTEN_FD}: the descriptor is not open")]
    NoListenFd,
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error(transparent)]
    Logging(#[from] logging::LogError),
    #[error(transparent)]
    Metrics(#[from] tidegate_telemetry::metrics_endpoint::EndpointError),
    #[error("{0}")]
    System(#[from] io::Error),
}

/// Runs the program with its arguments, without its name. Must be called first in main: descriptor
/// 3 is the inherited pipe only while nothing else was opened.
pub fn main(args: impl Iterator<Item = OsString>) -> ExitCode {
    let ready = ReadyPipe::inherit();
    let options = match flags::parse(args) {
        Ok(Invocation::Run(options)) => options,
        Ok(Invocation::Version) => {
            let (commit, version) = (version::COMMIT, version::VERSION);
            print(
                io::stdout(),
                &format!("docker-proxy (commit {commit}) version {version} (tidegate)\n"),
            );
            return ExitCode::SUCCESS;
        }
        Ok(Invocation::Help) => {
            print(io::stderr(), &flags::usage());
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            print(io::stderr(), &format!("{error}\n{}", flags::usage()));
            ready.failed(&error.to_string());
            return ExitCode::from(EXIT_USAGE);
        }
    };
    // From here on, both signals stay pending until they are read, instead of killing.
    let mut signals = match without_lost_signals(|| Signals::new([SIGINT, SIGTERM])) {
        Ok(signals) => signals,
        Err(error) => return fail(ready, &error.into()),
    };
    let engine = match start(&options) {
        Ok(engine) => engine,
        Err(error) => return fail(ready, &error),
    };
    ready.succeeded();
    tidegate_process::startup_pages::release();
    signals.forever().next();
    // Resets connections, so that none looks complete, and removes policy rules from the namespace
    // of the host.
    engine.stop();
    logging::flush();
    ExitCode::SUCCESS
}

fn fail(ready: ReadyPipe, error: &StartError) -> ExitCode {
    let reason = without_errno(&error.to_string());
    print(io::stderr(), &format!("docker-proxy: error: {reason}\n"));
    ready.failed(&reason);
    ExitCode::from(EXIT_FAILURE)
}

/// Writes `text`. A write error does not end the program.
fn print(mut to: impl Write, text: &str) {
    let _ = to.write_all(text.as_bytes()).and_then(|()| to.flush());
}

fn start(options: &Options) -> Result<Arc<Engine>, StartError> {
    // dockerd discards the logs of its proxies, and an unused logger takes a fifth of the memory of
    // this process.
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
    // A client address is used as the source only within its family. All clients of this listener
    // have the family of its address.
    let same_family = listener.label().address().is_ipv4() == container.is_ipv4();
    let source = if same_family { environment.source } else { Source::Proxy };
    let upstream = source.upstream_to(container, options.protocol)?;
    let mut port_options = PortOptions::new(upstream);
    port_options.proxy_protocol = environment.proxy_protocol;
    environment.limits.limit_port(&mut port_options);
    if source == Source::Client {
        confine::confine_privileged_proxy();
    } else {
        confine::confine_proxy(&[options.container.port()]);
    }
    let mut settings = Settings::default();
    environment.limits.limit_engine(&mut settings);
    let engine = Arc::new(Engine::new(settings));
    engine.publish(vec![(listener, options.container.port())], &Arc::new(port_options))?;
    if let Some(recorder) = recorder {
        let view = Arc::clone(&engine);
        let recorder = recorder.with(move |page| {
            // Writing to text cannot fail.
            let _ = describe_engine(&view.snapshot(), &view.usage(), page);
        });
        recorder.serve()?;
    }
    if source != Source::Client {
        confine::filter_proxy_calls();
    }
    Ok(engine)
}

/// The settings from environment variables.
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

/// Takes the inherited descriptor `number`.
fn inherited(number: i32) -> Result<OwnedFd, StartError> {
    // SAFETY: the descriptor is only queried; a number that is not open is an error.
    let open = fcntl_getfd(unsafe { BorrowedFd::borrow_raw(number) });
    // Descriptors opened by this process are close-on-exec, inherited ones are not.
    if open.is_ok_and(|flags| !flags.contains(FdFlags::CLOEXEC)) {
        // SAFETY: it is open, was not opened by this process, and is taken only once.
        Ok(unsafe { OwnedFd::from_raw_fd(number) })
    } else {
        Err(StartError::NoListenFd)
    }
}
