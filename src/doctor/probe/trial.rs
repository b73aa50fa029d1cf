//! A trial: tries features in a temporary namespace, in a child process that removes everything
//! with its exit.
//!
//! It needs a child process because unshare(2) of a user namespace requires a single thread, and
//! because a process cannot leave a user namespace.

use super::device;
use crate::doctor::host::{Code, Found, Inside, Trial};
use crate::port_guards;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketType, socket};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe};
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::process::{Command, ExitCode, Stdio};
use tidegate_model::{LACKS, MacAddress, registry};
use tidegate_netfilter::{Connection, Error, Gate, GatePolicy, PortGuards};
use tidegate_netns::Namespace;
use tidegate_netsetup::{
    Attachment, Desired, Endpoint, Interface, Kernel, Network, Op, RuleIsolation, Subnet,
};
use tidegate_process::{EXIT_FAILURE, EXIT_USAGE};

/// The internal subcommand of the child process.
pub const TRIAL: &str = "doctor-trial";

/// The timeout of a trial, in seconds. The kernel creates namespaces one at a time, so a busy
/// kernel delays them.
const TIMEOUT: libc::c_uint = 20;

/// The kind of namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// A network namespace
    Direct,
    /// A network namespace in a new user namespace
    InUserNamespace,
}

impl Kind {
    const ALL: [Self; 2] = [Self::Direct, Self::InUserNamespace];

    fn word(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::InUserNamespace => "user",
        }
    }
}

/// Runs a trial in a child process and returns its report.
pub(super) fn run(kind: Kind) -> Found<Trial> {
    // /proc/self/exe also works if the program was replaced, or is in an inaccessible directory.
    let mut command = Command::new("/proc/self/exe");
    command.args([TRIAL, kind.word()]).env_clear().stdin(Stdio::null()).stderr(Stdio::null());
    command.envs(std::env::vars_os().filter(|(name, _)| name == LACKS));
    let output =
        command.output().map_err(|error| format!("/proc/self/exe: {}", super::text_of(&error)))?;
    serde_json::from_slice(&output.stdout)
        .map_err(|_| format!("the trial process ended early ({})", output.status))
}

/// The child process. The argument is the kind of namespace; the report goes to standard output.
pub fn trial(mut arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let word = arguments.next();
    let Some(kind) =
        Kind::ALL.into_iter().find(|kind| word.as_ref().is_some_and(|word| word == kind.word()))
    else {
        let _ = writeln!(
            io::stderr(),
            "tidegate: error: {TRIAL} is an internal command of tidegate doctor"
        );
        return ExitCode::from(EXIT_USAGE);
    };
    // SAFETY: alarm(2) takes and returns numbers. The signal ends this process.
    unsafe { libc::alarm(TIMEOUT) };
    let report = attempt(kind);
    match serde_json::to_writer(io::stdout(), &report) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::from(EXIT_FAILURE),
    }
}

fn attempt(kind: Kind) -> Trial {
    let old = Namespace::current();
    let flags = match kind {
        Kind::Direct => UnshareFlags::NEWNET,
        Kind::InUserNamespace => UnshareFlags::NEWUSER | UnshareFlags::NEWNET,
    };
    // SAFETY: this process has one thread, so no other thread depends on its namespaces.
    if let Err(errno) = unsafe { unshare_unsafe(flags) } {
        return Trial::NotMade(errno.into());
    }
    // A process cannot leave a user namespace.
    if kind == Kind::Direct
        && let Err(errno) = leave_and_return(old)
    {
        return Trial::NoReturn(errno);
    }
    let nftables = Connection::open().and_then(|mut nftables| {
        nftables.can_own().map_err(|error| match error {
            Error::Refused { source, .. } | Error::Io(source) => source,
            other => io::Error::other(other),
        })
    });
    let marked =
        GatePolicy::Marked { mark: registry::FORWARD_MARK, mask: registry::FORWARD_MARK_MASK };
    let gates = Gate::new(&marked).map(drop).map_err(Into::into);
    let tun = device::make().map_err(Into::into);
    let nftables = nftables.map_err(Into::into);
    Trial::Entered(Inside { network: network(), nftables, gates, port_guards: port_guards(), tun })
}

/// Tries each mechanism of port guards in the current namespace.
fn port_guards() -> Result<String, Vec<(String, Code)>> {
    let probed = PortGuards::probe(&port_guards::candidates(), "trial");
    probed.map(|guards| guards.mechanism().to_string()).map_err(|failures| {
        failures
            .into_iter()
            .map(|(mechanism, error)| (mechanism.to_string(), error.into()))
            .collect()
    })
}

/// Enters the namespace `old`, and returns.
fn leave_and_return(old: io::Result<Namespace>) -> Result<(), Code> {
    let new = File::open("/proc/self/ns/net")?;
    let enter = |namespace: std::os::fd::BorrowedFd<'_>| {
        move_into_link_name_space(namespace, Some(LinkNameSpaceType::Network))
    };
    enter(old?.as_fd())?;
    Ok(enter(new.as_fd())?)
}

/// Creates a network with one endpoint in the current namespace, as `tidegate up` does.
fn network() -> Result<(), (String, Code)> {
    let failed = |step: &str| {
        let step = step.to_owned();
        move |error: io::Error| (step, error.into())
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(failed("event loop"))?;
    runtime.block_on(async {
        let mut kernel = Kernel::new(Namespace::current().map_err(failed("open the namespace"))?);
        kernel.add_endpoint(
            "trial",
            Namespace::create().map_err(failed("create a second namespace"))?,
        );
        let facts = desired().facts(&RuleIsolation::default());
        for fact in &facts {
            let added = kernel.execute(&Op::Add(fact.clone())).await;
            added.map_err(|error| (error.what, error.source.into()))?;
        }
        let observed =
            kernel.observe(&facts).await.map_err(|error| (error.what, Code::from(error.source)))?;
        match facts.iter().find(|fact| !observed.facts.contains(fact)) {
            Some(fact) => Err((format!("{fact} was added but is not present"), Errno::IO.into())),
            None => Ok(()),
        }
    })
}

/// One network with one endpoint. The namespace is empty, so any names and addresses are free.
fn desired() -> Desired {
    let has_ipv6 = socket(AddressFamily::INET6, SocketType::DGRAM, None).is_ok();
    let families = ["192.0.2.1/24", "2001:db8::1/64"].iter().take(if has_ipv6 { 2 } else { 1 });
    let subnets: Vec<Subnet> = families
        .filter_map(|text| text.parse::<ipnet::IpNet>().ok())
        .map(|net| Subnet { subnet: net.trunc(), gateway: net.addr() })
        .collect();
    let interface = |name: &str, last| Interface {
        name: name.to_owned(),
        mac: MacAddress::local([0, 0, 0, 0, 0, last]),
    };
    let network = Network {
        name: "trial".into(),
        bridge: interface("tg-trial", 1),
        subnets,
        internal: false,
        inter_container: true,
        overlay: None,
        mtu: 1500,
    };
    let addresses = ["192.0.2.2/24", "2001:db8::2/64"].iter().take(network.subnets.len());
    let attachment = Attachment {
        network: "trial".into(),
        host_end: interface("tgv-trial", 2),
        inside: interface("eth0", 3),
        addresses: addresses.filter_map(|text| text.parse().ok()).collect(),
        default_route: true,
        any_address: false,
    };
    let endpoint = Endpoint { name: "trial".into(), attachments: vec![attachment] };
    Desired { networks: vec![network], endpoints: vec![endpoint], ..Desired::default() }
}
