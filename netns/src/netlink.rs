//! rtnetlink client of one network namespace.

use crate::Namespace;
use crate::system::namespace_cookie;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE, ParseableParametrized};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::protocols::NETLINK_ROUTE;
use std::io;
use tidegate_netlink::{NetlinkSocket, RouteRequest};

/// The operation on the object in a request.
#[derive(Clone, Copy)]
pub(crate) enum Operation {
    /// Create it; `EEXIST` if it exists.
    Create,
    /// Create it even if an equal object exists. In an ordered list, it is appended.
    CreateDuplicate,
    /// Create it, replacing an existing object.
    Replace,
    /// Delete it; `ENOENT` or `ESRCH` if it does not exist.
    Delete,
}

/// An rtnetlink connection in one network namespace.
pub(crate) struct Netlink(NetlinkSocket);

impl Netlink {
    /// Connects to `namespace`. Later requests do not need the privilege to enter it.
    pub(crate) fn open(namespace: &Namespace) -> io::Result<Self> {
        let socket = namespace.with(|| NetlinkSocket::open(NETLINK_ROUTE))??;
        socket.filter_dumps()?;
        Ok(Self(socket))
    }

    /// Returns the cookie of the namespace, if the kernel supports cookies.
    pub(crate) fn cookie(&self) -> Option<u64> {
        namespace_cookie(&self.0).ok()
    }

    /// Performs `operation` on the object in `message`.
    pub(crate) fn execute(
        &mut self,
        message: RouteNetlinkMessage,
        operation: Operation,
    ) -> io::Result<()> {
        let flags = match operation {
            Operation::Create => NLM_F_CREATE | NLM_F_EXCL,
            Operation::CreateDuplicate => NLM_F_CREATE,
            Operation::Replace => NLM_F_CREATE | NLM_F_REPLACE,
            Operation::Delete => 0,
        };
        self.0.execute(&RouteRequest { message, flags })
    }

    /// Requests one object.
    pub(crate) fn get(
        &mut self,
        message: RouteNetlinkMessage,
    ) -> io::Result<Option<RouteNetlinkMessage>> {
        let answer = self.0.get(&RouteRequest { message, flags: 0 })?;
        Ok(answer.and_then(|(kind, payload)| parse(kind, &payload)))
    }

    /// Dumps all objects that match `message`. Skips replies that cannot be parsed.
    pub(crate) fn dump(
        &mut self,
        message: &RouteNetlinkMessage,
    ) -> io::Result<Vec<RouteNetlinkMessage>> {
        let mut listed = Vec::new();
        let request = RouteRequest { message: message.clone(), flags: 0 };
        self.0.dump(&request, |kind, payload| listed.extend(parse(kind, payload)))?;
        Ok(listed)
    }

    /// Returns the name of the interface with index `index`.
    pub(crate) fn interface_name(&self, index: u32) -> io::Result<String> {
        Ok(rustix::net::netdevice::index_to_name(&self.0, index)?)
    }

    /// Returns the index of the interface `name`.
    pub(crate) fn interface_index(&self, name: &str) -> io::Result<u32> {
        Ok(rustix::net::netdevice::name_to_index(&self.0, name)?)
    }
}

/// Parses a reply. A message that is newer than the parser does not describe an object of tidegate.
fn parse(kind: u16, payload: &[u8]) -> Option<RouteNetlinkMessage> {
    RouteNetlinkMessage::parse_with_param(payload, kind)
        .inspect_err(|error| tracing::debug!(kind, %error, "netlink message not parsed"))
        .ok()
}
