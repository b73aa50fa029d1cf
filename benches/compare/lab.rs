//! The network of one cell: three new namespaces.
//!
//! A lab lasts for one cell of one contender. Ports in TIME_WAIT, cached TCP metrics, tracked
//! connections and rules therefore never affect the next cell.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use tidegate_testbed::{Protocol, Topology, addr};

/// The address that contenders publish ports on.
pub(crate) const HOST: Ipv4Addr = addr::HOST_V4;

/// The address that published ports forward to.
pub(crate) const CONTAINER: Ipv4Addr = addr::CONTAINER_V4;

/// The network of one cell.
pub(crate) struct Lab {
    /// Client, host and container.
    pub(crate) net: Topology,
}

/// A range of ports to publish, each to the same port of the container.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Service {
    pub(crate) protocol: Protocol,
    pub(crate) first_port: u16,
    pub(crate) ports: u16,
}

impl Lab {
    /// Creates the namespaces.
    pub(crate) fn new(congestion_control: &str) -> Self {
        let net = Topology::builder().congestion_control(congestion_control).build();
        for namespace in [&net.client, &net.host, &net.container] {
            // A connection per request uses up ports, because each stays in TIME_WAIT for a minute.
            namespace.sysctl("net.ipv4.ip_local_port_range", "1024 65535");
        }
        Self { net }
    }
}

impl Service {
    /// One TCP port, the default of iperf3.
    pub(crate) const TCP: Self = Self { protocol: Protocol::Tcp, first_port: 5201, ports: 1 };
    /// One UDP port.
    pub(crate) const UDP: Self = Self { protocol: Protocol::Udp, first_port: 5201, ports: 1 };

    /// `count` TCP ports.
    pub(crate) fn many(count: u16) -> Self {
        Self { protocol: Protocol::Tcp, first_port: 20_000, ports: count }
    }

    /// A service for each of its ports.
    pub(crate) fn each(self) -> impl Iterator<Item = Self> {
        (self.first_port..=self.last_port()).map(move |first_port| Self {
            first_port,
            ports: 1,
            ..self
        })
    }

    /// The last port, inclusive.
    pub(crate) fn last_port(&self) -> u16 {
        self.first_port + (self.ports - 1)
    }

    /// The published address.
    pub(crate) fn published(&self) -> SocketAddr {
        SocketAddr::new(IpAddr::V4(HOST), self.first_port)
    }

    /// The address of the server in the container.
    pub(crate) fn backend(&self) -> SocketAddr {
        SocketAddr::new(IpAddr::V4(CONTAINER), self.first_port)
    }

    /// `tcp` or `udp`.
    pub(crate) fn protocol_name(&self) -> &'static str {
        match self.protocol {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
        }
    }
}
