//! The command line of slirp4netns, parsed as by `getopt_long(3)`.
//!
//! ```text
//! slirp4netns --mtu 65520 -r 3 --disable-host-loopback 4242 tap0                            (rootlesskit)
//! slirp4netns --mtu=65520 --enable-sandbox -c -e 3 -r 4 --netns-type=path /run/.../netns tap0  (podman)
//! ```
//!
//! Callers use both spellings of options, before or after the arguments. They may abbreviate long
//! options and bundle short ones. Descriptor numbers are taken as given, because callers differ in
//! their order.
//!
//! Source: `main.c` and the manual page of slirp4netns 1.2, and the behaviour of the program.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

#[cfg(test)]
mod tests;

use ipnet::Ipv4Net;
use std::ffi::{OsStr, OsString};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::RawFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;
use tidegate_model::MacAddress;
use tidegate_nat::ETHERNET_MAX_MTU;

/// Maximum length of a socket path in bytes: `sun_path` less the terminating NUL (unix(7)).
const MAX_SOCKET_PATH: usize = 107;

/// The action that a command line requests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Invocation {
    /// Serve a namespace.
    Run(Box<Options>),
    /// `-v`, `--version`: the first line is `slirp4netns version X`.
    Version,
    /// `-h`, `--help`: print [`usage`] and exit 0.
    Help,
}

/// The configuration of the process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// The network namespace to serve.
    pub target: Target,
    /// The name of the device in the namespace.
    pub device: String,
    /// `-c`: configure addresses and routes of the device.
    pub configure: bool,
    /// `-e`: exit when the other end of this descriptor is closed.
    pub exit_fd: Option<RawFd>,
    /// `-r`: write `1` to this descriptor when ready.
    pub ready_fd: Option<RawFd>,
    /// `-m`: the MTU in bytes, 1280 to 65521.
    pub mtu: u16,
    /// `--cidr`: the network, at least a /25.
    pub network: Ipv4Net,
    /// `-6`: enable IPv6.
    pub ipv6: bool,
    /// The gateway address does not give access to the loopback of the host.
    pub disable_host_loopback: bool,
    /// No DNS server.
    pub disable_dns: bool,
    /// Drop the file system and capabilities.
    pub sandbox: bool,
    /// Restrict system calls.
    pub seccomp: bool,
    /// `-a`: the path of the API socket.
    pub api_socket: Option<PathBuf>,
    /// The source address of outbound IPv4 flows.
    pub outbound: Option<Outbound<Ipv4Addr>>,
    /// The source address of outbound IPv6 flows.
    pub outbound6: Option<Outbound<Ipv6Addr>>,
    /// `--macaddress`: the MAC address of the device, which makes it a layer 2 device.
    pub mac: Option<MacAddress>,
    /// `--userns-path`: the user namespace to join before the network namespace.
    pub user_namespace: Option<PathBuf>,
}

/// The network namespace to serve.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// The network namespace of a process.
    Process(u32),
    /// The network namespace at a path.
    Path(PathBuf),
}

/// The source address of outbound flows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outbound<A> {
    /// An address.
    Address(A),
    /// The first address of an interface.
    Interface(String),
}

/// Why a command line was rejected: one line with option and value.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OptionError {
    /// The option does not exist.
    #[error("unrecognized option '{0}'")]
    Unknown(String),
    /// The abbreviation matches several options.
    #[error("option '{0}' is ambiguous")]
    Ambiguous(String),
    /// The value is missing at the end of the command line.
    #[error("option '{0}' requires an argument")]
    NeedsArgument(String),
    /// The option takes no value.
    #[error("option '--{0}' doesn't allow an argument")]
    TakesNone(&'static str),
    /// The value is not valid for its option.
    #[error("--{option} {value:?}: {reason}")]
    Value {
        /// The long name of the option.
        option: &'static str,
        /// The given value.
        value: String,
        /// The expectation.
        reason: String,
    },
    /// The target is missing.
    #[error("PID or PATH is missing; see --help")]
    NoTarget,
    /// The target is not a process id.
    #[error("PID must be a positive integer, not {0:?} (a path needs --netns-type=path)")]
    Pid(String),
    /// There are more arguments than target and device.
    #[error("unexpected argument {0:?}")]
    TooMany(String),
    /// Two options are mutually exclusive, or one requires another.
    #[error("{0}")]
    Contradiction(&'static str),
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Name {
    Configure,
    ExitFd,
    ReadyFd,
    Mtu,
    EnableIpv6,
    ApiSocket,
    Cidr,
    DisableHostLoopback,
    NetnsType,
    UsernsPath,
    EnableSandbox,
    EnableSeccomp,
    OutboundAddr,
    OutboundAddr6,
    DisableDns,
    MacAddress,
    TargetType,
    Help,
    Version,
}

struct OptionDefinition {
    name: Name,
    short: Option<u8>,
    long: &'static str,
    /// The name of its value in the help text, if it takes one.
    value: Option<&'static str>,
    help: &'static str,
}

const fn option(
    name: Name,
    short: Option<u8>,
    long: &'static str,
    value: Option<&'static str>,
    help: &'static str,
) -> OptionDefinition {
    OptionDefinition { name, short, long, value, help }
}

/// In the order of the help text.
const OPTIONS: [OptionDefinition; 19] = [
    option(
        Name::Configure,
        Some(b'c'),
        "configure",
        None,
        "configure the device with its addresses and default routes, and bring it up",
    ),
    option(
        Name::ExitFd,
        Some(b'e'),
        "exit-fd",
        Some("FD"),
        "exit when the other end of descriptor FD is closed",
    ),
    option(
        Name::ReadyFd,
        Some(b'r'),
        "ready-fd",
        Some("FD"),
        "write 1 to descriptor FD when ready",
    ),
    option(
        Name::Mtu,
        Some(b'm'),
        "mtu",
        Some("MTU"),
        "MTU of the device (default=1500, max=65521)",
    ),
    option(Name::EnableIpv6, Some(b'6'), "enable-ipv6", None, "enable IPv6, on fd00::/64"),
    option(
        Name::ApiSocket,
        Some(b'a'),
        "api-socket",
        Some("PATH"),
        "serve the API for port forwarding on a socket at PATH",
    ),
    option(Name::Cidr, None, "cidr", Some("CIDR"), "IPv4 network (default=10.0.2.0/24)"),
    option(
        Name::DisableHostLoopback,
        None,
        "disable-host-loopback",
        None,
        "deny access to the loopback of the host at the gateway address",
    ),
    option(
        Name::NetnsType,
        None,
        "netns-type",
        Some("TYPE"),
        "type of the network namespace argument ([path|pid], default=pid)",
    ),
    option(
        Name::UsernsPath,
        None,
        "userns-path",
        Some("PATH"),
        "user namespace to join before the network namespace",
    ),
    option(
        Name::EnableSandbox,
        None,
        "enable-sandbox",
        None,
        "drop the file system, and all capabilities except CAP_NET_BIND_SERVICE",
    ),
    option(
        Name::EnableSeccomp,
        None,
        "enable-seccomp",
        None,
        "restrict system calls to those in use",
    ),
    option(
        Name::OutboundAddr,
        None,
        "outbound-addr",
        Some("IPv4"),
        "source address of outbound flows, or interface that has it",
    ),
    option(
        Name::OutboundAddr6,
        None,
        "outbound-addr6",
        Some("IPv6"),
        "source address of outbound flows, or interface that has it",
    ),
    option(
        Name::DisableDns,
        None,
        "disable-dns",
        None,
        "disable DNS on 10.0.2.3 (or its equivalent with --cidr)",
    ),
    option(
        Name::MacAddress,
        None,
        "macaddress",
        Some("MAC"),
        "create a TAP device with this address (only valid with -c)",
    ),
    option(
        Name::TargetType,
        None,
        "target-type",
        Some("TYPE"),
        "type of the target ([netns|bess], default=netns; bess is not supported)",
    ),
    option(Name::Help, Some(b'h'), "help", None, "show this help and exit"),
    option(Name::Version, Some(b'v'), "version", None, "show the version and exit"),
];

/// Returns the help text. It ends with a newline.
#[must_use]
pub fn usage() -> String {
    let mut text = String::from(
        "Usage: slirp4netns [OPTION]... PID|PATH [TAPNAME]\n\
         Userspace networking for unprivileged network namespaces, by tidegate.\n\n",
    );
    for OptionDefinition { short, long, value, help, .. } in &OPTIONS {
        let short = short.map(|short| format!("-{}, ", char::from(short))).unwrap_or_default();
        let value = value.map(|value| format!("={value}")).unwrap_or_default();
        text.push_str(&format!("{:<25}{help}\n", format!("{short}--{long}{value} ")));
    }
    text.push_str(
        "\nEnvironment:\n  TIDEGATE_SLIRP_DEVICE  tun (default), or tap for layer 2: MAC addresses, DHCP, router advertisements\
         \n  TIDEGATE_SLIRP_SOURCE  gateway (default), or client: source address that a container sees at a forwarded port\
         \n  TIDEGATE_LOG           filter of the log on standard error: a level (info, debug), or target=level,...\n",
    );
    text
}

/// Parses a command line, without the name of the program.
///
/// # Errors
/// The first error.
pub fn parse(
    args: impl IntoIterator<Item = impl Into<OsString>>,
) -> Result<Invocation, OptionError> {
    let mut raw = Raw::default();
    let mut args = args.into_iter().map(Into::into);
    while let Some(arg) = args.next() {
        let bytes = arg.as_bytes();
        if bytes == b"--" {
            raw.rest.extend(args);
            break;
        }
        if let Some(long) = bytes.strip_prefix(b"--") {
            let (name, value) = match long.iter().position(|byte| *byte == b'=') {
                Some(at) => (&long[..at], Some(OsStr::from_bytes(&long[at + 1..]).to_owned())),
                None => (long, None),
            };
            let option = long_option(name)?;
            let value = match (option.value, value) {
                (None, Some(_)) => return Err(OptionError::TakesNone(option.long)),
                (None, None) => OsString::new(),
                (Some(_), Some(value)) => value,
                (Some(_), None) => args
                    .next()
                    .ok_or_else(|| OptionError::NeedsArgument(format!("--{}", option.long)))?,
            };
            raw.set(option, value);
        } else if bytes.len() > 1 && bytes[0] == b'-' {
            raw.short_options(&bytes[1..], &mut args)?;
        } else {
            raw.rest.push(arg);
        }
        if raw.requested.is_some() {
            break;
        }
    }
    match raw.requested.take() {
        Some(requested) => Ok(requested),
        None => raw.check().map(|options| Invocation::Run(Box::new(options))),
    }
}

/// Finds an option by its name or by an unambiguous abbreviation.
fn long_option(name: &[u8]) -> Result<&'static OptionDefinition, OptionError> {
    let text = || format!("--{}", String::from_utf8_lossy(name));
    if let Some(exact) = OPTIONS.iter().find(|option| option.long.as_bytes() == name) {
        return Ok(exact);
    }
    let mut candidates = OPTIONS.iter().filter(|option| option.long.as_bytes().starts_with(name));
    match (candidates.next(), candidates.next()) {
        (Some(option), None) => Ok(option),
        (Some(_), Some(_)) => Err(OptionError::Ambiguous(text())),
        _ => Err(OptionError::Unknown(text())),
    }
}

/// The arguments before validation.
#[derive(Default)]
struct Raw {
    /// All options in order; the last value of an option wins.
    values: Vec<(Name, OsString)>,
    rest: Vec<OsString>,
    requested: Option<Invocation>,
}

impl Raw {
    fn short_options(
        &mut self,
        letters: &[u8],
        args: &mut impl Iterator<Item = OsString>,
    ) -> Result<(), OptionError> {
        let mut letters = letters;
        while let Some((&letter, behind)) = letters.split_first() {
            let name = || format!("-{}", char::from(letter));
            let option = OPTIONS.iter().find(|option| option.short == Some(letter));
            let option = option.ok_or_else(|| OptionError::Unknown(name()))?;
            if option.value.is_some() {
                let value = if behind.is_empty() {
                    args.next().ok_or_else(|| OptionError::NeedsArgument(name()))?
                } else {
                    OsString::from_vec(behind.to_vec())
                };
                self.set(option, value);
                return Ok(());
            }
            self.set(option, OsString::new());
            letters = behind;
        }
        Ok(())
    }

    fn set(&mut self, option: &OptionDefinition, value: OsString) {
        match option.name {
            Name::Help => _ = self.requested.get_or_insert(Invocation::Help),
            Name::Version => _ = self.requested.get_or_insert(Invocation::Version),
            name => self.values.push((name, value)),
        }
    }

    /// Returns the last value of an option.
    fn value(&self, name: Name) -> Option<&OsStr> {
        self.values
            .iter()
            .rev()
            .find(|(given, _)| *given == name)
            .map(|(_, value)| value.as_os_str())
    }

    fn has(&self, name: Name) -> bool {
        self.value(name).is_some()
    }

    /// Returns the value of an option, parsed by `read`.
    fn read<T>(
        &self,
        name: Name,
        read: impl Fn(&str) -> Result<T, String>,
    ) -> Result<Option<T>, OptionError> {
        let Some(value) = self.value(name) else { return Ok(None) };
        let value = value.to_string_lossy().into_owned();
        let option =
            OPTIONS.iter().find(|option| option.name == name).map_or("", |option| option.long);
        read(&value).map(Some).map_err(|reason| OptionError::Value { option, value, reason })
    }

    /// Validates the values.
    fn check(self) -> Result<Options, OptionError> {
        let configure = self.has(Name::Configure);
        let exit_fd = self.read(Name::ExitFd, descriptor)?;
        let ready_fd = self.read(Name::ReadyFd, descriptor)?;
        if exit_fd.is_some() && exit_fd == ready_fd {
            return Err(OptionError::Contradiction(
                "--exit-fd and --ready-fd are the same descriptor",
            ));
        }
        let mtu = self.read(Name::Mtu, mtu)?.unwrap_or(1500);
        let network = self.read(Name::Cidr, network)?.unwrap_or(DEFAULT_NETWORK);
        let outbound = self.read(Name::OutboundAddr, source_address::<Ipv4Addr>)?;
        let outbound6 = self.read(Name::OutboundAddr6, source_address::<Ipv6Addr>)?;
        let mac = self.read(Name::MacAddress, |value| {
            let address = value.parse().ok().filter(|address: &MacAddress| address.is_unicast());
            address.ok_or_else(|| "not a unicast MAC address".to_owned())
        })?;
        if mac.is_some() && !configure {
            return Err(OptionError::Contradiction(
                "--macaddress cannot be specified when --configure or -c is not specified",
            ));
        }
        let by_path = self.read(Name::NetnsType, |value| match value {
            "path" => Ok(true),
            "pid" => Ok(false),
            _ => Err("must be either \"path\" or \"pid\"".to_owned()),
        })?;
        self.read(Name::TargetType, |value| match value {
            "netns" => Ok(()),
            "bess" => {
                Err("BESS and User Mode Linux are not supported; use slirp4netns for them"
                    .to_owned())
            }
            _ => Err("must be either \"netns\" or \"bess\"".to_owned()),
        })?;
        let api_socket = self.value(Name::ApiSocket).map(PathBuf::from);
        if let Some(path) = &api_socket
            && (path.as_os_str().is_empty() || path.as_os_str().len() > MAX_SOCKET_PATH)
        {
            return Err(OptionError::Value {
                option: "api-socket",
                value: path.display().to_string(),
                reason: format!("a socket path has 1 to {MAX_SOCKET_PATH} bytes"),
            });
        }
        let flags = |name| self.has(name);
        let (ipv6, disable_host_loopback) =
            (flags(Name::EnableIpv6), flags(Name::DisableHostLoopback));
        let (disable_dns, sandbox) = (flags(Name::DisableDns), flags(Name::EnableSandbox));
        let seccomp = flags(Name::EnableSeccomp);
        let user_namespace = self.value(Name::UsernsPath).map(PathBuf::from);
        let mut rest = self.rest.into_iter();
        let target = rest.next().ok_or(OptionError::NoTarget)?;
        let target = if by_path == Some(true) {
            Target::Path(target.into())
        } else {
            let pid =
                target.to_str().and_then(|text| text.parse::<i32>().ok()).filter(|pid| *pid > 0);
            Target::Process(
                pid.ok_or_else(|| OptionError::Pid(target.display().to_string()))?.unsigned_abs(),
            )
        };
        let device = rest
            .next()
            .map_or_else(|| "tap0".to_owned(), |name| name.to_string_lossy().into_owned());
        if let Some(more) = rest.next() {
            return Err(OptionError::TooMany(more.display().to_string()));
        }
        Ok(Options {
            target,
            device,
            configure,
            exit_fd,
            ready_fd,
            mtu,
            network,
            ipv6,
            disable_host_loopback,
            disable_dns,
            sandbox,
            seccomp,
            api_socket,
            outbound,
            outbound6,
            mac,
            user_namespace,
        })
    }
}

const DEFAULT_NETWORK: Ipv4Net = match Ipv4Net::new(Ipv4Addr::new(10, 0, 2, 0), 24) {
    Ok(network) => network,
    Err(_) => unreachable!(),
};

fn descriptor(value: &str) -> Result<RawFd, String> {
    let number = value.parse::<RawFd>().ok().filter(|number| *number >= 0);
    number.ok_or_else(|| "must be a non-negative integer".to_owned())
}

fn mtu(value: &str) -> Result<u16, String> {
    let range = tidegate_nat::MIN_MTU..=ETHERNET_MAX_MTU;
    value.parse().ok().filter(|mtu| range.contains(mtu)).ok_or_else(|| {
        format!(
            "the MTU must be {} (the minimum of IPv6) to {ETHERNET_MAX_MTU}",
            tidegate_nat::MIN_MTU
        )
    })
}

fn network(value: &str) -> Result<Ipv4Net, String> {
    let network: Ipv4Net =
        value.parse().map_err(|_| "not a network such as 10.0.2.0/24".to_owned())?;
    if !(1..=25).contains(&network.prefix_len()) {
        return Err(
            "the prefix length must be 1 to 25: the guest has address number 100".to_owned()
        );
    }
    if network.addr() != network.trunc().addr() {
        return Err(format!("host bits are set; use {}", network.trunc()));
    }
    // The engine would reject packets from other addresses.
    let address = network.addr();
    if address.is_loopback()
        || address.is_multicast()
        || address.octets()[0] == 0
        || address.octets()[0] >= 240
    {
        return Err("the network has no host addresses".to_owned());
    }
    Ok(network)
}

fn source_address<A: std::str::FromStr>(value: &str) -> Result<Outbound<A>, String> {
    if let Ok(address) = value.parse() {
        return Ok(Outbound::Address(address));
    }
    let could_be_a_name = (1..libc::IFNAMSIZ).contains(&value.len())
        && value.parse::<std::net::IpAddr>().is_err()
        && !value.contains(['/', ' ']);
    if could_be_a_name {
        Ok(Outbound::Interface(value.to_owned()))
    } else {
        Err("neither an address of this family nor the name of an interface".to_owned())
    }
}
