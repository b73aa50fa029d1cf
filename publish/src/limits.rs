//! Limits of published ports. `tidegate publish` and `tidegate up` take them as flags. docker-proxy
//! has the command line of Docker's program and reads them from the environment ([`VARIABLE`]).

use clap::Args;
use std::fmt;
use std::num::NonZeroUsize;
use std::str::FromStr;
use tidegate_proxy::{PortOptions, Settings};

/// The environment variable with the limits of docker-proxy, as `NAME=VALUE,NAME=VALUE`. A name is
/// that of a flag without the leading dashes.
pub const VARIABLE: &str = "TIDEGATE_PROXY_LIMITS";

/// The limits. One client gets at most two thirds of a limit, so that others are served.
#[derive(Args, Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProxyLimits {
    /// Maximum number of TCP connections of all ports; one client gets at most two thirds
    #[arg(long, value_name = "N", default_value_t = Self::default().max_connections)]
    pub max_connections: NonZeroUsize,

    /// Maximum number of TCP connections of one port; one client gets at most two thirds
    #[arg(long, value_name = "N", default_value_t = Self::default().max_port_connections)]
    pub max_port_connections: NonZeroUsize,

    /// Maximum number of TCP connections of one client, which is an IPv4 address or an IPv6 /64
    /// [default: its share of the other limits]
    #[arg(long, value_name = "N")]
    pub max_client_connections: Option<NonZeroUsize>,

    /// Maximum number of UDP sessions of one port; at the limit, the client with the most sessions
    /// loses its longest idle one
    #[arg(long, value_name = "N", default_value_t = Self::default().udp_max_sessions)]
    pub udp_max_sessions: NonZeroUsize,

    /// Maximum number of UDP sessions of one client, which is an IPv4 address or an IPv6 /64, at
    /// one port; at the limit, it loses its longest idle one
    #[arg(long, value_name = "N", default_value_t = Self::default().udp_max_source_sessions)]
    pub udp_max_source_sessions: NonZeroUsize,

    /// Maximum memory for data of TCP connections whose peers do not read, in bytes or with the
    /// suffix K, M or G
    #[arg(long, value_name = "SIZE", default_value_t = Self::default().max_held)]
    pub max_held: HeldBytes,
}

/// A size of memory: a whole number of bytes, KiB (K), MiB (M) or GiB (G). It is at least what one
/// connection may hold ([`Settings::LEAST_HELD_BYTES`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeldBytes(usize);

impl HeldBytes {
    /// The size in bytes.
    #[must_use]
    pub fn bytes(self) -> usize {
        self.0
    }
}

impl Default for HeldBytes {
    fn default() -> Self {
        Self(256 << 20)
    }
}

impl fmt::Display for HeldBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = [(30, "G"), (20, "M"), (10, "K"), (0, "")];
        let fits = |(shift, _): &&(u32, &str)| self.0.trailing_zeros() >= *shift;
        let (shift, unit) = units.iter().find(fits).unwrap_or(&(0, ""));
        write!(f, "{}{unit}", self.0 >> shift)
    }
}

impl FromStr for HeldBytes {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let least = Settings::LEAST_HELD_BYTES;
        let shifts = [('K', 10), ('M', 20), ('G', 30)];
        let (digits, shift) = shifts
            .iter()
            .find_map(|(unit, shift)| Some((text.strip_suffix(*unit)?, *shift)))
            .unwrap_or((text, 0));
        let bytes = digits.parse::<usize>().ok().and_then(|number| number.checked_mul(1 << shift));
        match bytes {
            Some(bytes) if bytes >= least => Ok(Self(bytes)),
            Some(_) => {
                Err(format!("must be at least {}K, which one connection may hold", least >> 10))
            }
            None => Err("not a whole number of bytes, with an optional suffix K, M or G".into()),
        }
    }
}

impl Default for ProxyLimits {
    fn default() -> Self {
        let n = |n| NonZeroUsize::new(n).unwrap_or(NonZeroUsize::MIN);
        Self {
            max_connections: n(100_000),
            max_port_connections: n(100_000),
            max_client_connections: None,
            udp_max_sessions: n(16_384),
            udp_max_source_sessions: n(8192),
            max_held: HeldBytes::default(),
        }
    }
}

impl ProxyLimits {
    /// Sets the limits that all ports share.
    pub fn limit_engine(&self, settings: &mut Settings) {
        settings.max_connections = self.max_connections.get();
        settings.max_client_connections = self.max_client_connections.map(NonZeroUsize::get);
        settings.held_bytes = self.max_held.bytes();
    }

    /// Sets the limits of one port.
    pub fn limit_port(&self, options: &mut PortOptions) {
        options.max_connections = self.max_port_connections.get();
        options.sessions.sessions = self.udp_max_sessions.get();
        options.sessions.per_source = self.udp_max_source_sessions.get();
    }

    /// Sets the limit of the flag `--name`.
    fn set(&mut self, name: &str, value: &str) -> Result<(), LimitError> {
        let number = || {
            let number = value.parse();
            number
                .map_err(|_| LimitError::Number { name: name.to_owned(), value: value.to_owned() })
        };
        match name {
            "max-connections" => self.max_connections = number()?,
            "max-port-connections" => self.max_port_connections = number()?,
            "max-client-connections" => self.max_client_connections = Some(number()?),
            "udp-max-sessions" => self.udp_max_sessions = number()?,
            "udp-max-source-sessions" => self.udp_max_source_sessions = number()?,
            "max-held" => {
                let size = value.parse();
                self.max_held =
                    size.map_err(|reason| LimitError::Size { value: value.to_owned(), reason })?;
            }
            _ => return Err(LimitError::Name(name.to_owned())),
        }
        Ok(())
    }
}

/// Why the value of [`VARIABLE`] is invalid.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum LimitError {
    /// Not of the form `NAME=VALUE`.
    #[error("\"{0}\" is not of the form NAME=VALUE")]
    Form(String),
    /// The value is not a number, or is 0.
    #[error("{name}={value}: a limit is a whole number of at least 1")]
    Number {
        /// The name of the limit.
        name: String,
        /// The value as given.
        value: String,
    },
    /// The value is not a size, or is too small.
    #[error("max-held={value}: {reason}")]
    Size {
        /// The value as given.
        value: String,
        /// Why it is invalid.
        reason: String,
    },
    /// No limit has this name.
    #[error(
        "unknown limit \"{0}\"; use max-connections, max-port-connections, max-client-connections, max-held, \
         udp-max-sessions or udp-max-source-sessions"
    )]
    Name(String),
}

impl FromStr for ProxyLimits {
    type Err = LimitError;

    fn from_str(text: &str) -> Result<Self, LimitError> {
        let mut limits = Self::default();
        for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
            let (name, value) =
                part.split_once('=').ok_or_else(|| LimitError::Form(part.to_owned()))?;
            limits.set(name.trim(), value.trim())?;
        }
        Ok(limits)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::{CommandFactory, Parser};

    #[derive(Parser)]
    struct Flags {
        #[command(flatten)]
        limits: ProxyLimits,
    }

    #[test]
    fn the_variable_and_the_flags_set_the_same_limits() {
        for argument in Flags::command().get_arguments().filter_map(|argument| argument.get_long())
        {
            if argument == "help" {
                continue;
            }
            let value = if argument == "max-held" { "7M" } else { "7" };
            let by_variable: ProxyLimits = format!("{argument}={value}").parse().unwrap();
            let by_flag = Flags::parse_from(["test", &format!("--{argument}"), value]).limits;
            assert_eq!(by_variable, by_flag, "{argument}");
            assert_ne!(by_flag, ProxyLimits::default(), "{argument}");
        }
    }

    #[test]
    fn the_defaults_equal_those_of_the_engine() {
        let upstream = tidegate_proxy::Direct::new(std::net::Ipv4Addr::LOCALHOST.into());
        let mut options = PortOptions::new(std::sync::Arc::new(upstream));
        let (limits, engine) = (ProxyLimits::default(), options.sessions);
        limits.limit_port(&mut options);
        assert_eq!(options.sessions.sessions, engine.sessions);
        assert_eq!(options.sessions.per_source, engine.per_source);
        let mut settings = Settings::default();
        limits.limit_engine(&mut settings);
        assert_eq!(settings.max_connections, Settings::default().max_connections);
        assert_eq!(settings.max_client_connections, Settings::default().max_client_connections);
        assert_eq!(settings.held_bytes, Settings::default().held_bytes);
        assert_eq!(limits.max_held.to_string(), "256M");
    }

    #[test]
    fn an_invalid_limit_is_an_error_that_names_it() {
        for (text, reason) in [
            ("max-connections", "\"max-connections\" is not of the form NAME=VALUE"),
            ("max-connections=0", "max-connections=0: a limit is a whole number of at least 1"),
            ("udp-max-sessions=-1", "udp-max-sessions=-1: a limit is a whole number of at least 1"),
            (
                "max-held=1023K",
                "max-held=1023K: must be at least 1024K, which one connection may hold",
            ),
            (
                "max-held=1T",
                "max-held=1T: not a whole number of bytes, with an optional suffix K, M or G",
            ),
            ("max=1", "unknown limit \"max\"; use "),
        ] {
            let error = text.parse::<ProxyLimits>().unwrap_err().to_string();
            assert!(error.starts_with(reason), "{error}");
        }
        let both: ProxyLimits = "max-connections=5, max-client-connections=2,".parse().unwrap();
        assert_eq!(
            (both.max_connections.get(), both.max_client_connections),
            (5, NonZeroUsize::new(2))
        );
    }
}
