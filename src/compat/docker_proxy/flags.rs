//! docker-proxy's command line, read as Docker's own does.
//!
//! dockerd starts one proxy per protocol, host address and host port, always with these flags in
//! this order:
//!
//! ```text
//! docker-proxy -proto tcp -host-ip 0.0.0.0 -host-port 8080 -container-ip 172.17.0.2 -container-port 80
//! ```
//!
//! Newer daemons add `-use-listen-fd`. Tests and people type the same flags by hand, so everything
//! that Go's `flag` package allows is allowed here: one dash or two, `-flag value` or
//! `-flag=value`, integers in any base Go knows, the last of several wins. A general parser would
//! read most of that differently.
//!
//! It works in two steps. `Raw::parse` is Go's grammar and knows nothing of ports and addresses;
//! `Raw::check` turns what was given into [`Options`]. Nothing is ignored: where docker-proxy drops
//! arguments behind the flags, they are an error here, because they mean that the command was not
//! understood.
//!
//! Sources: Go's `flag/flag.go` and `strconv` (1.22), `cmd/docker-proxy/main_linux.go` of moby.

#[cfg(test)]
mod tests;

use std::ffi::OsString;
use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};

use tidegate_model::{Protocol, canonical};

/// What a command line asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Invocation {
    /// Forward a port.
    Run(Options),
    /// `-v`, `-version`: print `docker-proxy (commit X) version Y` and exit 0.
    Version,
    /// `-h`, `-help`: print [`usage`] to standard error and exit 0, as Go does.
    Help,
}

/// One port to forward.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// `-proto`, default tcp.
    pub protocol: Protocol,
    /// `-host-ip` and `-host-port`, or `-use-listen-fd`.
    pub listen: Listen,
    /// `-container-ip` and `-container-port`. The default address is 0.0.0.0, as it is for
    /// docker-proxy, and connecting to that means the host itself; dockerd never leaves it out.
    pub container: SocketAddr,
}

/// Where the clients come from. Addresses are canonical: an IPv4-mapped one has become IPv4.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Listen {
    /// Bind this address, whose port is not 0.
    Bind(SocketAddr),
    /// Take the socket that the daemon has bound already (file descriptor 4). What `-host-ip` and
    /// `-host-port` say is then for logs and labels only; `None` if there was no valid port.
    Inherited(Option<SocketAddr>),
}

/// Why a command line was refused. The texts are those of Go's `flag` package wherever it has one;
/// the caller prints the error and [`usage`] to standard error and exits 2.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FlagError {
    /// Three dashes, or no name before the `=`.
    #[error("bad flag syntax: {0}")]
    Syntax(String),
    /// No such flag.
    #[error("flag provided but not defined: -{0}")]
    Unknown(String),
    /// The command line ends where a value should be.
    #[error("flag needs an argument: -{0}")]
    NeedsArgument(&'static str),
    /// A switch was given something other than Go's words for true and false.
    #[error("invalid boolean value {value:?} for -{flag}: parse error")]
    InvalidBoolean {
        /// The name without dashes.
        flag: &'static str,
        /// What stands behind the `=`.
        value: String,
    },
    /// A value means nothing for its flag.
    #[error("invalid value {value:?} for flag -{flag}: {reason}")]
    InvalidValue {
        /// The name without dashes.
        flag: &'static str,
        /// The value as given; a number in decimal.
        value: String,
        /// What would have been right, or Go's `parse error` and `value out of range`.
        reason: &'static str,
    },
    /// A port that cannot be done without was not given.
    #[error("flag -{0} is required: a port between 1 and 65535")]
    PortMissing(&'static str),
    /// Something that is no flag.
    #[error("unexpected argument {0:?}: docker-proxy takes only flags")]
    Positional(String),
}

/// Reads a command line, without the program's own name. Arguments that are not UTF-8 are never
/// valid.
///
/// # Errors
///
/// The first thing that Go's `flag` package would refuse, else the first missing or meaningless
/// value.
pub fn parse(args: impl IntoIterator<Item = impl Into<OsString>>) -> Result<Invocation, FlagError> {
    match Raw::parse(args.into_iter().map(Into::into))? {
        None => Ok(Invocation::Help),
        Some(raw) if raw.version => Ok(Invocation::Version),
        Some(raw) => raw.check().map(Invocation::Run),
    }
}

/// The help text, laid out as Go's `PrintDefaults` does it. It ends with a newline.
pub fn usage() -> String {
    let mut text = String::from("Usage of docker-proxy:\n");
    for Flag { name, kind, help, default, .. } in &FLAGS {
        let word = match kind {
            Kind::Text => " string",
            Kind::Integer => " int",
            Kind::Switch => "",
        };
        // Go puts the help behind a switch of one letter, and on a line of its own otherwise.
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
    /// What happens without the flag, where the usage text says so.
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
    /// Takes a value only behind a `=`.
    Switch,
}

/// In the order of the usage text. `-h` and `-help` are no flags to Go, but what it does when there
/// are none of that name.
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

/// The flags' values, well formed and not yet checked for sense.
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
    /// The grammar. `None` means that help was asked for, which Go answers where it stands: before
    /// what is wrong behind it, after what is wrong before it.
    fn parse(mut args: impl Iterator<Item = OsString>) -> Result<Option<Self>, FlagError> {
        let mut raw = Self::default();
        // A byte that is not UTF-8 becomes U+FFFD, which no name and no value contains.
        let mut next = || args.next().map(|arg| arg.to_string_lossy().into_owned());
        while let Some(arg) = next() {
            let Some(body) = arg.strip_prefix('-').filter(|body| !body.is_empty()) else {
                return Err(FlagError::Positional(arg));
            };
            let body = body.strip_prefix('-').unwrap_or(body);
            if body.is_empty() {
                // `--` ends the flags, and behind them there is nothing to say.
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
                // Whatever it looks like: `-host-port -1` is a value.
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

    /// The sense of it.
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
/// `0` octal or `0b` binary digits, in either case, with single underscores between digits and
/// behind the prefix.
fn parse_int(text: &str) -> Result<i64, &'static str> {
    let (negative, unsigned) = match text.strip_prefix(['-', '+']) {
        Some(rest) => (text.starts_with('-'), rest),
        None => (false, text),
    };
    let (base, digits) = split_base(unsigned);
    // A lone zero is octal without digits behind its prefix.
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

/// The base that the prefix names, and what is behind the prefix.
fn split_base(unsigned: &str) -> (u32, &str) {
    let Some(octal) = unsigned.strip_prefix('0') else { return (10, unsigned) };
    let base = match octal.chars().next() {
        Some('x' | 'X') => 16,
        Some('o' | 'O') => 8,
        Some('b' | 'B') => 2,
        _ => return (8, octal),
    };
    // Without digits behind it, the letter is no prefix but a wrong digit.
    if octal.len() > 1 { (base, &octal[1..]) } else { (8, octal) }
}

/// No underscore begins or ends the number or stands beside another. The prefix counts as a digit,
/// so one right behind it is fine.
fn underscores_separate_digits(unsigned: &str, digits: &str) -> bool {
    let begins = unsigned.len() == digits.len() && digits.starts_with('_');
    !begins && !digits.ends_with('_') && !digits.contains("__")
}
