//! The command line of docker-proxy, parsed as the original does.
//!
//! dockerd starts one proxy per protocol, host address and host port, always with these flags in
//! this order:
//!
//! ```text
//! docker-proxy -proto tcp -host-ip 0.0.0.0 -host-port 8080 -container-ip 172.17.0.2 -container-port 80
//! ```
//!
//! Newer daemons add `-use-listen-fd`. Tests and people type the same flags by hand, so this parser
//! accepts everything that Go's `flag` package accepts: one dash or two, `-flag value` or
//! `-flag=value`, and integers in any base of Go. The last of several values wins. A general parser
//! would differ in most of this.
//!
//! Parsing has two steps. `Raw::parse` implements the grammar of Go, without knowledge of ports and
//! addresses. `Raw::check` converts the values to [`Options`]. Nothing is ignored: docker-proxy
//! drops arguments after the flags, but here they are an error, because they show that the command
//! was misunderstood.
//!
//! Sources: Go's `flag/flag.go` and `strconv` (1.22), `cmd/docker-proxy/main_linux.go` of moby.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

#[cfg(test)]
mod tests;

use std::ffi::OsString;
use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};

use tidegate_model::{Protocol, canonical};

/// The action that a command line requests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Invocation {
    /// Forward a port.
    Run(Options),
    /// `-v`, `-version`: print `docker-proxy (commit X) version Y` and exit 0.
    Version,
    /// `-h`, `-help`: print [`usage`] to standard error and exit 0, as Go does.
    Help,
}

/// The port to forward.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// `-proto`, default tcp.
    pub protocol: Protocol,
    /// `-host-ip` and `-host-port`, or `-use-listen-fd`.
    pub listen: Listen,
    /// `-container-ip` and `-container-port`. The default address is 0.0.0.0 as in docker-proxy,
    /// which connects to the host itself; dockerd always sets it.
    pub container: SocketAddr,
}

/// The listening socket. Addresses are canonical: an IPv4-mapped address is converted to IPv4.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Listen {
    /// Bind this address. Its port is not 0.
    Bind(SocketAddr),
    /// Adopt the socket that the daemon has bound (descriptor 4). `-host-ip` and `-host-port` are
    /// then only used for logs and labels; `None` without a valid port.
    Inherited(Option<SocketAddr>),
}

/// Why a command line was rejected. The texts are those of Go's `flag` package where it has one.
/// The caller prints the error and [`usage`] to standard error and exits with 2.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FlagError {
    /// Three dashes, or an empty name.
    #[error("bad flag syntax: {0}")]
    Syntax(String),
    /// The flag does not exist.
    #[error("flag provided but not defined: -{0}")]
    Unknown(String),
    /// The value is missing at the end of the command line.
    #[error("flag needs an argument: -{0}")]
    NeedsArgument(&'static str),
    /// The value of a switch is not a boolean of Go.
    #[error("invalid boolean value {value:?} for -{flag}: parse error")]
    InvalidBoolean {
        /// The name without dashes.
        flag: &'static str,
        /// The text after the `=`.
        value: String,
    },
    /// The value is not valid for its flag.
    #[error("invalid value {value:?} for flag -{flag}: {reason}")]
    InvalidValue {
        /// The name without dashes.
        flag: &'static str,
        /// The value as given; a number in decimal.
        value: String,
        /// The expectation, or Go's `parse error` or `value out of range`.
        reason: &'static str,
    },
    /// A required port is missing.
    #[error("flag -{0} is required: a port between 1 and 65535")]
    PortMissing(&'static str),
    /// An argument is not a flag.
    #[error("unexpected argument {0:?}: docker-proxy takes only flags")]
    Positional(String),
}

/// Parses a command line, without the name of the program. Arguments that are not UTF-8 are
/// invalid.
///
/// # Errors
///
/// The first error that Go's `flag` package would report, otherwise the first missing or invalid
/// value.
pub fn parse(args: impl IntoIterator<Item = impl Into<OsString>>) -> Result<Invocation, FlagError> {
    match Raw::parse(args.into_iter().map(Into::into))? {
        None => Ok(Invocation::Help),
        Some(raw) if raw.version => Ok(Invocation::Version),
        Some(raw) => raw.check().map(Invocation::Run),
    }
}

/// Returns the help text, in the layout of Go's `PrintDefaults`, with a final newline.
pub fn usage() -> String {
    let mut text = String::from("Usage of docker-proxy:\n");
    for Flag { name, kind, help, default, .. } in &FLAGS {
        let word = match kind {
            Kind::Text => " string",
            Kind::Integer => " int",
            Kind::Switch => "",
        };
        // Go puts the help of a one-letter switch on the same line, and other help on its own line.
        let gap = if name.len() == 1 && word.is_empty() { "\t" } else { "\n    \t" };
        let _ = write!(text, "  -{name}{word}{gap}{help}");
        if let Some(default) = default {
            let _ = write!(text, " (default {default})");
        }
        text.push('\n');
    }
    text
}

struct Flag {
    name: &'static str,
    field: Field,
    kind: Kind,
    help: &'static str,
    /// The default in the usage text.
    default: Option<&'static str>,
}

#[derive(Clone, Copy)]
enum Field {
    ContainerIp,
    ContainerPort,
    HostIp,
    HostPort,
    Proto,
    UseListenFd,
    Version,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Text,
    Integer,
    /// Takes a value only after `=`.
    Switch,
}

/// In the order of the usage text. In Go, `-h` and `-help` are not flags but the behaviour if no
/// flag has that name.
const FLAGS: [Flag; 8] = [
    Flag {
        name: "container-ip",
        field: Field::ContainerIp,
        kind: Kind::Text,
        help: "container address to forward to",
        default: Some("0.0.0.0"),
    },
    Flag {
        name: "container-port",
        field: Field::ContainerPort,
        kind: Kind::Integer,
        help: "container port to forward to",
        default: Some("-1"),
    },
    Flag {
        name: "host-ip",
        field: Field::HostIp,
        kind: Kind::Text,
        help: "host address to listen on",
        default: Some("0.0.0.0"),
    },
    Flag {
        name: "host-port",
        field: Field::HostPort,
        kind: Kind::Integer,
        help: "host port to listen on",
        default: Some("-1"),
    },
    Flag {
        name: "proto",
        field: Field::Proto,
        kind: Kind::Text,
        help: "protocol to forward: tcp, udp or sctp",
        default: Some("\"tcp\""),
    },
    Flag {
        name: "use-listen-fd",
        field: Field::UseListenFd,
        kind: Kind::Switch,
        help: "listen on the socket passed as file descriptor 4",
        default: None,
    },
    Flag {
        name: "v",
        field: Field::Version,
        kind: Kind::Switch,
        help: "print the version and exit",
        default: None,
    },
    Flag {
        name: "version",
        field: Field::Version,
        kind: Kind::Switch,
        help: "print the version and exit",
        default: None,
    },
];

/// The values of the flags before validation.
#[derive(Default)]
struct Raw {
    proto: Option<String>,
    host_ip: Option<String>,
    host_port: Option<i64>,
    container_ip: Option<String>,
    container_port: Option<i64>,
    use_listen_fd: bool,
    version: bool,
}

impl Raw {
    /// Parses the grammar. `None` requests help. Like Go, this stops at the help flag: errors
    /// before it are reported, errors after it are not.
    fn parse(mut args: impl Iterator<Item = OsString>) -> Result<Option<Self>, FlagError> {
        let mut raw = Self::default();
        // A byte that is not UTF-8 becomes U+FFFD, which no valid name or value contains.
        let mut next = || args.next().map(|arg| arg.to_string_lossy().into_owned());
        while let Some(arg) = next() {
            let Some(body) = arg.strip_prefix('-').filter(|body| !body.is_empty()) else {
                return Err(FlagError::Positional(arg));
            };
            let body = body.strip_prefix('-').unwrap_or(body);
            if body.is_empty() {
                // `--` ends the flags; no argument may follow.
                return next().map_or(Ok(Some(raw)), |rest| Err(FlagError::Positional(rest)));
            }
            if body.starts_with(['-', '=']) {
                return Err(FlagError::Syntax(arg));
            }
            let (name, value) = match body.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (body, None),
            };
            let Some(flag) = FLAGS.iter().find(|flag| flag.name == name) else {
                if matches!(name, "h" | "help") {
                    return Ok(None);
                }
                return Err(FlagError::Unknown(name.to_owned()));
            };
            let value = match (value, flag.kind) {
                (Some(value), _) => value,
                (None, Kind::Switch) => "true".to_owned(),
                // The next argument is the value even if it looks like a flag, as in `-host-port
                // -1`.
                (None, _) => next().ok_or(FlagError::NeedsArgument(flag.name))?,
            };
            raw.set(flag, value)?;
        }
        Ok(Some(raw))
    }

    fn set(&mut self, flag: &Flag, value: String) -> Result<(), FlagError> {
        let flag_name = flag.name;
        match flag.field {
            Field::Proto => self.proto = Some(value),
            Field::HostIp => self.host_ip = Some(value),
            Field::ContainerIp => self.container_ip = Some(value),
            Field::HostPort => self.host_port = Some(integer(flag_name, value)?),
            Field::ContainerPort => self.container_port = Some(integer(flag_name, value)?),
            Field::UseListenFd => self.use_listen_fd = boolean(flag_name, value)?,
            Field::Version => self.version = boolean(flag_name, value)?,
        }
        Ok(())
    }

    /// Validates the values.
    fn check(self) -> Result<Options, FlagError> {
        let protocol = match self.proto {
            None => Protocol::Tcp,
            Some(word) => word.parse().map_err(|_| FlagError::InvalidValue {
                flag: "proto",
                value: word,
                reason: "not tcp, udp or sctp",
            })?,
        };
        let host_ip = address("host-ip", self.host_ip)?;
        let listen = match port("host-port", self.host_port) {
            Ok(port) if self.use_listen_fd => {
                Listen::Inherited(Some(canonical((host_ip, port).into())))
            }
            Err(_) if self.use_listen_fd => Listen::Inherited(None),
            port => Listen::Bind(canonical((host_ip, port?).into())),
        };
        let container_ip = address("container-ip", self.container_ip)?;
        let container_port = port("container-port", self.container_port)?;
        Ok(Options {
            protocol,
            listen,
            container: canonical((container_ip, container_port).into()),
        })
    }
}

fn address(flag: &'static str, value: Option<String>) -> Result<IpAddr, FlagError> {
    let Some(value) = value else { return Ok(IpAddr::from([0, 0, 0, 0])) };
    value.parse().map_err(|_| FlagError::InvalidValue { flag, value, reason: "not an IP address" })
}

fn port(flag: &'static str, value: Option<i64>) -> Result<u16, FlagError> {
    let value = value.ok_or(FlagError::PortMissing(flag))?;
    u16::try_from(value).ok().filter(|&port| port != 0).ok_or_else(|| FlagError::InvalidValue {
        flag,
        value: value.to_string(),
        reason: "not a port between 1 and 65535",
    })
}

/// Go's `strconv.ParseBool`.
fn boolean(flag: &'static str, value: String) -> Result<bool, FlagError> {
    match value.as_str() {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
        _ => Err(FlagError::InvalidBoolean { flag, value }),
    }
}

fn integer(flag: &'static str, value: String) -> Result<i64, FlagError> {
    parse_int(&value).map_err(|reason| FlagError::InvalidValue { flag, value, reason })
}

const PARSE_ERROR: &str = "parse error";
const OUT_OF_RANGE: &str = "value out of range";

/// Go's `strconv.ParseInt(text, 0, 64)`: an optional sign, then decimal, `0x` hexadecimal, `0o` or
/// `0` octal or `0b` binary digits. Letters may have either case. Single underscores may stand
/// between digits and after the prefix.
fn parse_int(text: &str) -> Result<i64, &'static str> {
    let (negative, unsigned) = match text.strip_prefix(['-', '+']) {
        Some(rest) => (text.starts_with('-'), rest),
        None => (false, text),
    };
    let (base, digits) = split_base(unsigned);
    // A lone zero is octal without further digits.
    if digits.is_empty() && unsigned != "0" {
        return Err(PARSE_ERROR);
    }
    let mut value: u64 = 0;
    for character in digits.chars().filter(|&character| character != '_') {
        let digit = character.to_digit(base).ok_or(PARSE_ERROR)?;
        value = value
            .checked_mul(base.into())
            .and_then(|value| value.checked_add(digit.into()))
            .ok_or(OUT_OF_RANGE)?;
    }
    if !underscores_separate_digits(unsigned, digits) {
        return Err(PARSE_ERROR);
    }
    let value = i128::from(value) * if negative { -1 } else { 1 };
    value.try_into().map_err(|_| OUT_OF_RANGE)
}

/// Returns the base of the prefix, and the digits after the prefix.
fn split_base(unsigned: &str) -> (u32, &str) {
    let Some(octal) = unsigned.strip_prefix('0') else { return (10, unsigned) };
    let base = match octal.chars().next() {
        Some('x' | 'X') => 16,
        Some('o' | 'O') => 8,
        Some('b' | 'B') => 2,
        _ => return (8, octal),
    };
    // Without digits after it, the letter is an invalid digit and not a prefix.
    if octal.len() > 1 { (base, &octal[1..]) } else { (8, octal) }
}

/// Returns whether every underscore stands between two digits. The prefix counts as a digit.
fn underscores_separate_digits(unsigned: &str, digits: &str) -> bool {
    let begins = unsigned.len() == digits.len() && digits.starts_with('_');
    !begins && !digits.ends_with('_') && !digits.contains("__")
}
