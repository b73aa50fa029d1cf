//! Sender of the PROXY protocol, versions 1 and 2. Pure functions.
//!
//! A header before the first byte of a connection contains the addresses of the client and of the
//! socket that it connected to. Source: HAProxy, "The PROXY protocol", versions 1 & 2
//! (proxy-protocol.txt, revision of 2020/03/05), sections 2.1 and 2.2. Only the command PROXY over
//! TCP is implemented, without TLVs.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

/// Version of the header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProxyProtocol {
    /// Text header, one line.
    V1,
    /// Binary header.
    V2,
}

/// Signature of 12 bytes that no other protocol starts with (section 2.2).
const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";
/// Version 2, command PROXY.
const VERSION_AND_COMMAND: u8 = 0x21;
const TCP_OVER_IPV4: u8 = 0x11;
const TCP_OVER_IPV6: u8 = 0x21;

impl ProxyProtocol {
    /// Returns the header for a connection from `client` to `local`, an address of this host.
    ///
    /// Both ends of a connection have the same family. If they do not, the header is for IPv6 and
    /// contains the IPv4 address in mapped form, which every receiver supports.
    pub fn header(self, client: SocketAddr, local: SocketAddr) -> Vec<u8> {
        let (source, destination) = match (client.ip(), local.ip()) {
            (IpAddr::V4(_), IpAddr::V4(_)) | (IpAddr::V6(_), IpAddr::V6(_)) => {
                (client.ip(), local.ip())
            }
            (source, destination) => (mapped(source), mapped(destination)),
        };
        match self {
            Self::V1 => {
                let family = if source.is_ipv4() { "TCP4" } else { "TCP6" };
                format!(
                    "PROXY {family} {source} {destination} {} {}\r\n",
                    client.port(),
                    local.port()
                )
                .into_bytes()
            }
            Self::V2 => {
                let mut header = Vec::with_capacity(16 + 36);
                header.extend(SIGNATURE);
                header.push(VERSION_AND_COMMAND);
                header.push(if source.is_ipv4() { TCP_OVER_IPV4 } else { TCP_OVER_IPV6 });
                let addresses = [octets(source), octets(destination)].concat();
                header.extend((addresses.len() as u16 + 4).to_be_bytes());
                header.extend(addresses);
                header.extend(client.port().to_be_bytes());
                header.extend(local.port().to_be_bytes());
                header
            }
        }
    }
}

fn mapped(ip: IpAddr) -> IpAddr {
    match ip {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().into(),
        IpAddr::V6(_) => ip,
    }
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

impl fmt::Display for ProxyProtocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V1 => "v1",
            Self::V2 => "v2",
        })
    }
}

/// An unknown version of the PROXY protocol.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("PROXY protocol version {0:?} is not known: say v1 or v2")]
pub struct UnknownVersion(String);

impl FromStr for ProxyProtocol {
    type Err = UnknownVersion;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "v1" | "1" => Ok(Self::V1),
            "v2" | "2" => Ok(Self::V2),
            other => Err(UnknownVersion(other.to_owned())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    #[test]
    fn version_1_is_the_line_of_section_2_1() {
        let header =
            ProxyProtocol::V1.header(address("192.168.0.1:56324"), address("192.168.0.11:443"));
        assert_eq!(header, b"PROXY TCP4 192.168.0.1 192.168.0.11 56324 443\r\n");
        let header =
            ProxyProtocol::V1.header(address("[2001:db8::1]:1"), address("[2001:db8::2]:65535"));
        assert_eq!(header, b"PROXY TCP6 2001:db8::1 2001:db8::2 1 65535\r\n");
    }

    #[test]
    fn version_1_never_exceeds_the_107_characters_of_section_2_1() {
        let longest = address("[ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff]:65535");
        assert!(ProxyProtocol::V1.header(longest, longest).len() <= 107);
    }

    #[test]
    fn version_2_is_the_binary_header_of_section_2_2() {
        let header = ProxyProtocol::V2.header(address("192.0.2.1:258"), address("192.0.2.2:772"));
        let expected =
            b"\r\n\r\n\0\r\nQUIT\n\x21\x11\x00\x0c\xc0\x00\x02\x01\xc0\x00\x02\x02\x01\x02\x03\x04";
        assert_eq!(header, expected);
        let header =
            ProxyProtocol::V2.header(address("[2001:db8::1]:258"), address("[2001:db8::2]:772"));
        assert_eq!((header[13], &header[14..16], header.len()), (0x21, &[0, 36][..], 16 + 36));
    }

    #[test]
    fn addresses_of_different_families_are_sent_as_ipv6() {
        let header = ProxyProtocol::V1.header(address("192.0.2.1:1"), address("[2001:db8::2]:2"));
        assert_eq!(header, b"PROXY TCP6 ::ffff:192.0.2.1 2001:db8::2 1 2\r\n");
    }
}
