//! Transport protocols of published ports.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use std::fmt;
use std::str::FromStr;

/// A transport protocol with ports.
///
/// Every parser accepts SCTP. Kernel support is detected when the socket is created.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    /// RFC 9293.
    Tcp,
    /// RFC 768.
    Udp,
    /// RFC 9260.
    Sctp,
}

impl Protocol {
    /// Every protocol, in the order of [`Ord`].
    pub const ALL: [Self; 3] = [Self::Tcp, Self::Udp, Self::Sctp];

    /// The lower-case name used by users, Docker and metrics labels.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Sctp => "sctp",
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// Accepts exactly `tcp`, `udp` and `sctp`, as does `-proto` of docker-proxy. A case-insensitive
/// grammar (`-p` of Docker) converts to lower case first.
impl FromStr for Protocol {
    type Err = UnknownProtocol;

    fn from_str(word: &str) -> Result<Self, Self::Err> {
        Self::ALL
            .into_iter()
            .find(|protocol| protocol.as_str() == word)
            .ok_or_else(|| UnknownProtocol(word.to_owned()))
    }
}

/// A word that is not the name of a [`Protocol`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("protocol {0:?} is not tcp, udp or sctp")]
pub struct UnknownProtocol(pub String);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_protocol_prints_and_parses_back() {
        for protocol in Protocol::ALL {
            assert_eq!(protocol.to_string().parse(), Ok(protocol));
        }
    }

    #[test]
    fn upper_case_is_an_error() {
        assert_eq!("TCP".parse::<Protocol>(), Err(UnknownProtocol("TCP".to_owned())));
    }

    #[test]
    fn the_error_names_the_word() {
        let error = "icmp".parse::<Protocol>().unwrap_err();
        assert_eq!(error.to_string(), r#"protocol "icmp" is not tcp, udp or sctp"#);
    }
}
