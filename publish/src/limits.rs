//! Limits of published ports: flags of `tidegate publish` and `tidegate up`, and for docker-proxy,
//! whose command line is Docker's, the variable [`VARIABLE`].

use clap::Args;
use std::fmt;
use std::num::NonZeroUsize;
use std::str::FromStr;
use tidegate_proxy::{PortOptions, Settings};

/// The variable: the flags by their names, without dashes in front, as `NAME=VALUE,NAME=VALUE`.
pub const VARIABLE: &str = "TIDEGATE_PROXY_LIMITS";

/// The limits. Whatever they are, one client gets two thirds of a limit, so that others are served.
#[derive(Args, Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProxyLimits {
    /// TCP connections over all ports at most; one client gets two thirds
    #[arg(long, value_name = "N", default_value_t = Self::default().max_connections)]
    pub max_connections: NonZeroUsize,

    /// TCP connections of one port at most; one client gets two thirds
    #[arg(long, value_name = "N", default_value_t = Self::default().max_port_connections)]
    pub max_port_connections: NonZeroUsize,

    /// TCP connections of one client, an IPv4 address or an IPv6 /64, at most [default: its share
    /// of the others]
    #[arg(long, value_name = "N")]
    pub max_client_connections: Option<NonZeroUsize>,

    /// UDP sessions of one port at most; of the client that has most, the longest silent one makes
    /// room
    #[arg(long, value_name = "N", default_value_t = Self::default().udp_max_sessions)]
    pub udp_max_sessions: NonZeroUsize,

    /// UDP sessions of one client, an IPv4 address or an IPv6 /64, at one port at most; its own
    /// longest silent one makes room
    #[arg(long, value_name = "N", default_value_t = Self::default().udp_max_source_sessions)]
    pub udp_max_source_sessions: NonZeroUsize,

    /// Memory that TCP connections may hold for peers that do not read, in bytes or with K, M or G
    /// behind it
    #[arg(long, value_name = "SIZE", default_value_t = Self::default().max_held)]
    pub max_held: HeldBytes,
}

/// A size of memory that is enough for one connection: a whole number of bytes, KiB (K), MiB (M) or
/// GiB (G).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeldBytes(usize);

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
            Some(_) => Err(format!(
                "one connection may hold {}K; it has to be as much at least",
                least >> 10
            )),
            None => {
                Err("a size is a whole number of bytes, or one with K, M or G behind it".into())
            }
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
            max_held: HeldBytes(256 << 20),
        }
    }
}

impl ProxyLimits {
    /// Limits all ports together.
    pub fn limit_engine(&self, settings: &mut Settings) {
        settings.max_connections = self.max_connections.get();
        settings.max_client_connections = self.max_client_connections.map(NonZeroUsize::get);
        settings.held_bytes = self.max_held.0;
    }

    /// Limits a port.
    pub fn limit_port(&self, options: &mut PortOptions) {
        options.max_connections = self.max_port_connections.get();
        options.sessions.sessions = self.udp_max_sessions.get();
        options.sessions.per_source = self.udp_max_source_sessions.get();
    }

    /// Sets the limit that a flag of this name sets.
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

/// What [`VARIABLE`] has that is no limit.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum LimitError {
    /// Not of the form `NAME=VALUE`.
    #[error("\"{0}\" is not of the form NAME=VALUE")]
    Form(String),
    /// No number, or none that can be a limit.
    #[error("{name}={value}: a limit is a whole number, 1 at least")]
    Number {
        /// The limit.
        name: String,
        /// What is said of it.
        value: String,
    },
    /// No size, or too small a one.
    #[error("max-held={value}: {reason}")]
    Size {
        /// What is said of it.
        value: String,
        /// What is wrong with that.
        reason: String,
    },
    /// There is no such limit.
    #[error(
        "there is no limit \"{0}\": say max-connections, max-port-connections, max-client-connections, max-held, \
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
    fn the_variable_sets_what_the_flags_set_by_the_same_names() {
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
    fn the_defaults_are_those_of_the_engine() {
        let upstream = tidegate_proxy::Direct::new(std::net::Ipv4Addr::LOCALHOST.into());
        let mut options = PortOptions::new(std::sync::Arc::new(upstream));
        let (mine, engines) = (ProxyLimits::default(), options.sessions);
        mine.limit_port(&mut options);
        assert_eq!(options.sessions.sessions, engines.sessions);
        assert_eq!(options.sessions.per_source, engines.per_source);
        let mut settings = Settings::default();
        mine.limit_engine(&mut settings);
        assert_eq!(settings.max_connections, Settings::default().max_connections);
        assert_eq!(settings.max_client_connections, Settings::default().max_client_connections);
        assert_eq!(settings.held_bytes, Settings::default().held_bytes);
        assert_eq!(mine.max_held.to_string(), "256M");
    }

    #[test]
    fn what_is_no_limit_is_refused_in_a_line_that_names_it() {
        for (text, reason) in [
            ("max-connections", "\"max-connections\" is not of the form NAME=VALUE"),
            ("max-connections=0", "max-connections=0: a limit is a whole number, 1 at least"),
            ("udp-max-sessions=-1", "udp-max-sessions=-1: a limit is a whole number, 1 at least"),
            (
                "max-held=1023K",
                "max-held=1023K: one connection may hold 1024K; it has to be as much at least",
            ),
            (
                "max-held=1T",
                "max-held=1T: a size is a whole number of bytes, or one with K, M or G behind it",
            ),
            ("max=1", "there is no limit \"max\": say "),
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
