//! Sockets of ports that a command is going to publish.

use super::problem::Problem;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use tidegate_control::PublishedPort;
use tidegate_model::{HostPort, PortMapping, PortSpec, Protocol, PublishLabel};
use tidegate_proxy::Listener;
use tidegate_publish::bind::reserve;
use tidegate_publish::publisher::PublishError;

/// Sockets that are bound and do not accept yet, by the port that they publish.
pub(crate) type Reserved = BTreeMap<PublishedPort, Listener>;

/// Parses a port spec.
///
/// # Errors
/// It is invalid, or for SCTP.
pub(super) fn parse_spec(text: &str) -> Result<PortSpec, Problem> {
    let spec: PortSpec = text.parse().map_err(|error| Problem::bad_request(&error))?;
    if spec.protocol() == Protocol::Sctp {
        let line = format!("port spec \"{spec}\": protocol not supported");
        return Err(Problem::bad_request(&line));
    }
    Ok(spec)
}

/// Binds the sockets of `specs`. Without a host port, a free one is chosen. Finding the holder of a
/// port in use is slow.
///
/// # Errors
/// A spec is invalid, or a port is in use.
pub(crate) fn reserve_specs(specs: &[String]) -> Result<Reserved, Problem> {
    let mut reserved = Reserved::new();
    for text in specs {
        for mapping in parse_spec(text)?.mappings() {
            for listener in bind(&mapping)? {
                let address = listener.label().address();
                let port = PublishedPort {
                    protocol: mapping.protocol,
                    address: address.ip(),
                    host_port: address.port(),
                    container_port: mapping.container_port,
                };
                reserved.insert(port, listener);
            }
        }
    }
    Ok(reserved)
}

/// Binds the socket of `port`.
///
/// # Errors
/// The port is in use.
pub(crate) fn reserve_port(port: &PublishedPort) -> Result<Listener, Problem> {
    let mapping = PortMapping {
        host_ip: Some(port.address),
        host_port: HostPort::Fixed(port.host_port),
        container_port: port.container_port,
        protocol: port.protocol,
    };
    let at = SocketAddr::new(port.address, port.host_port);
    let unbound = || Problem::failed(&format!("port {at}/{}: no socket", port.protocol));
    bind(&mapping)?.pop().ok_or_else(unbound)
}

/// The label of `port`.
pub(crate) fn label_of(port: &PublishedPort) -> PublishLabel {
    PublishLabel::new(SocketAddr::new(port.address, port.host_port), port.protocol)
}

fn bind(mapping: &PortMapping) -> Result<Vec<Listener>, Problem> {
    reserve(mapping).map_err(|error| PublishError::from(error).into())
}
