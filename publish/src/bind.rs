//! Binds published ports, and formats them for output, for `publish` and `up`.

use crate::port_error;
use rustix::io::Errno;
use std::io;
use std::iter;
use std::net::SocketAddr;
use tidegate_model::{HostPort, PortMapping, PublishLabel, bracketed, host_addresses, registry};
use tidegate_proxy::{BindError, Listener};

/// Maximum number of attempts with a port chosen by the kernel, which may be free on only one of
/// 0.0.0.0 and [::].
const EPHEMERAL_ATTEMPTS: usize = 16;

/// Number of ports above the range of masqueraded flows that are tried first.
const HIGH_ATTEMPTS: usize = 64;

/// Why a port cannot be opened: one line with the port, the cause and the remedy. The line names
/// the process that holds the port if it is known.
#[derive(Debug, thiserror::Error)]
#[error("{line}")]
pub struct PortError {
    line: String,
    kind: io::ErrorKind,
}

impl PortError {
    /// The kind of the error; `AddrInUse` if another socket is bound to the port.
    pub fn kind(&self) -> io::ErrorKind {
        self.kind
    }
}

impl From<BindError> for PortError {
    fn from(error: BindError) -> Self {
        Self { line: port_error::explain(&error), kind: error.source.kind() }
    }
}

/// Opens the sockets of one mapping. Clients may connect from now on; their connections are queued
/// until they are accepted.
///
/// # Errors
/// [`PortError`]; no socket is open then.
pub fn bind(mapping: &PortMapping) -> Result<Vec<Listener>, PortError> {
    let reserved = reserve(mapping)?;
    reserved.iter().try_for_each(Listener::open)?;
    Ok(reserved)
}

/// Binds the sockets of one mapping without listening. Clients are refused until
/// [`Listener::open`].
///
/// # Errors
/// [`PortError`]; no address is bound then.
pub fn reserve(mapping: &PortMapping) -> Result<Vec<Listener>, PortError> {
    let taken = |line: String| PortError { line, kind: io::ErrorKind::AddrInUse };
    let open = |port: u16| bind_addresses(mapping, port);
    match mapping.host_port {
        HostPort::Fixed(port) => Ok(open(port)?),
        HostPort::AnyOf(range) => {
            let free = range.iter().find_map(|port| match open(port) {
                Err(error) if error.source.kind() == io::ErrorKind::AddrInUse => None,
                result => Some(result),
            });
            match free {
                Some(result) => Ok(result?),
                None => Err(taken(format!("no port of {range} is free for {}", mapping.protocol))),
            }
        }
        HostPort::Ephemeral => {
            let mut last = None;
            // The kernel would choose a port from the range of masqueraded flows and so take it
            // from them.
            let chosen_by_kernel = iter::repeat_n(0, EPHEMERAL_ATTEMPTS);
            for port in high_ports().take(HIGH_ATTEMPTS).chain(chosen_by_kernel) {
                match open(port) {
                    Ok(listeners) => return Ok(listeners),
                    Err(error) if error.source.kind() == io::ErrorKind::AddrInUse => {
                        last = Some(error);
                    }
                    Err(error) => return Err(error.into()),
                }
            }
            Err(last.map_or_else(|| taken("no free port".to_owned()), PortError::from))
        }
    }
}

/// The ports above the range of masqueraded flows, in ascending order from a random one, with
/// wraparound.
fn high_ports() -> impl Iterator<Item = u16> {
    let first = registry::MASQUERADE_PORTS.end() + 1;
    let count = u16::MAX - first + 1;
    let mut random = [0; 2];
    // Without random bytes, the search starts at the first port.
    let _ = rustix::rand::getrandom(&mut random[..], rustix::rand::GetRandomFlags::empty());
    let begin = u16::from_ne_bytes(random) % count;
    (0..count).map(move |step| first + (begin + step) % count)
}

/// Binds `port` on every address of the mapping. With 0, the kernel chooses the port of the first
/// address, and the others use the same port.
fn bind_addresses(mapping: &PortMapping, mut port: u16) -> Result<Vec<Listener>, BindError> {
    let mut listeners: Vec<Listener> = Vec::new();
    for ip in host_addresses(mapping.host_ip) {
        match Listener::reserve(SocketAddr::new(ip, port), mapping.protocol) {
            Ok(listener) => {
                port = listener.label().address().port();
                listeners.push(listener);
            }
            // On a kernel without IPv6, "all addresses" means 0.0.0.0 only.
            Err(error)
                if mapping.host_ip.is_none()
                    && ip.is_ipv6()
                    && Errno::from_io_error(&error.source) == Some(Errno::AFNOSUPPORT) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(listeners)
}

/// Joins consecutive ports into ranges. Each element is the range of published ports, as
/// `0.0.0.0:9000-9001/tcp`, and the range of container ports.
pub fn runs(published: &[(PublishLabel, u16)]) -> Vec<(String, String)> {
    let mut runs: Vec<((PublishLabel, u16), u16)> = Vec::new();
    for (label, container_port) in published {
        let next = runs.iter_mut().find(|((first, first_port), length)| {
            let (address, wanted) = (label.address(), first.address().port().checked_add(*length));
            first.protocol() == label.protocol()
                && first.address().ip() == address.ip()
                && wanted == Some(address.port())
                && first_port.checked_add(*length) == Some(*container_port)
        });
        match next {
            Some((_, length)) => *length += 1,
            None => runs.push(((*label, *container_port), 1)),
        }
    }
    let range = |first: u16, length: u16| match length {
        1 => first.to_string(),
        _ => format!("{first}-{}", first + (length - 1)),
    };
    runs.into_iter()
        .map(|((label, container_port), length)| {
            let ip = label.address().ip();
            let host = bracketed(ip);
            let ports = range(label.address().port(), length);
            (format!("{host}:{ports}/{}", label.protocol()), range(container_port, length))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ephemeral_ports_are_above_those_of_masqueraded_flows() {
        let mut ports: Vec<u16> = high_ports().collect();
        ports.sort_unstable();
        assert_eq!(ports, (61_000..=u16::MAX).collect::<Vec<_>>());
    }

    #[test]
    fn consecutive_ports_are_joined_into_ranges() {
        let label = |text: &str| text.parse::<PublishLabel>().unwrap();
        let published = [
            (label("0.0.0.0:9000/tcp"), 80),
            (label("[::]:9000/tcp"), 80),
            (label("0.0.0.0:9001/tcp"), 81),
            (label("[::]:9001/tcp"), 81),
            (label("0.0.0.0:5353/udp"), 53),
        ];
        let expected = [
            ("0.0.0.0:9000-9001/tcp", "80-81"),
            ("[::]:9000-9001/tcp", "80-81"),
            ("0.0.0.0:5353/udp", "53"),
        ];
        assert_eq!(runs(&published), expected.map(|(a, b)| (a.to_owned(), b.to_owned())));
    }
}
