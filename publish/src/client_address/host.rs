//! Connects to a container from the namespace of this process, with the source address that the
//! route selects.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use tidegate_model::Protocol;
use tidegate_netns::AddressBook;
use tidegate_proxy::{Direct, Flow, Opened, Upstream, socket};
use tidegate_reactor::{begin_connect, set_number};

/// An upstream to a container from the namespace of this process. A UDP session accepts datagrams
/// from the interface to the container only: a host on another link of this host could forge the
/// address of the container, and datagrams need no handshake.
pub struct HostUpstream {
    plain: Direct,
    host: Arc<AddressBook>,
}

impl HostUpstream {
    /// An upstream to `container`. `host` are the addresses and routes of this namespace.
    pub fn new(container: IpAddr, host: Arc<AddressBook>) -> Self {
        Self { plain: Direct::new(container), host }
    }

    /// The address of the container.
    pub(super) fn container(&self) -> IpAddr {
        self.plain.container()
    }
}

impl Upstream for HostUpstream {
    fn open(&self, flow: &Flow) -> io::Result<Opened> {
        if flow.protocol != Protocol::Udp {
            return self.plain.open(flow);
        }
        let container = self.container();
        let socket = socket(flow.protocol, container)?;
        // Queried for each session, because the container may move to another bridge. A container
        // behind a router has no interface of its own.
        if let Some(index) = self.host.connected_index(container)? {
            set_number(&socket, libc::SOL_SOCKET, libc::SO_BINDTOIFINDEX, index.cast_signed())?;
        }
        begin_connect(&socket, SocketAddr::new(container, flow.container_port))?;
        Ok(socket.into())
    }

    fn is_stale(&self, socket: BorrowedFd<'_>) -> bool {
        self.plain.is_stale(socket)
    }
}
