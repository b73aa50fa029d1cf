//! Deletion of stale connection tracking entries.
//!
//! NAT is decided for the first packet of a flow; later packets follow the conntrack entry. A UDP
//! flow without pauses keeps its old destination indefinitely. After a port is published, relocated
//! or closed, its conntrack entries must therefore be deleted.

use crate::connection::TableFamily;
use crate::socket::NetfilterSocket;
use crate::table::Transport;
use crate::wire::{Attributes, CONNTRACK, Message, attribute};
use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};

/// A flow: the addresses of its first packet before NAT, and the addresses of its replies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    /// Transport protocol.
    pub protocol: Transport,
    /// Source of the original direction.
    pub client: SocketAddr,
    /// Destination of the original direction, before destination NAT.
    pub destination: SocketAddr,
    /// Source of the reply direction: the server after destination NAT.
    pub server: SocketAddr,
    /// Destination of the reply direction. With source NAT, an address and port of the host.
    pub reply_destination: SocketAddr,
}

/// The conntrack table of one network namespace.
pub struct Conntrack(NetfilterSocket);

impl fmt::Debug for Conntrack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Conntrack").field(&self.0.port()).finish()
    }
}

/// `CTA_*`.
mod field {
    pub(super) const ORIGINAL: u16 = 1;
    pub(super) const REPLY: u16 = 2;
    pub(super) const ZONE: u16 = 18;
}

impl Conntrack {
    /// Opens the table of the calling thread's network namespace.
    ///
    /// # Errors
    /// The process is out of file descriptors, or the kernel lacks netfilter.
    pub fn open() -> io::Result<Self> {
        Ok(Self(NetfilterSocket::open()?))
    }

    /// Deletes the flows of `families` that match `filter` and returns their number. Later packets
    /// create new flows.
    ///
    /// A dump walks the whole hash table once per family, regardless of the number of flows: 10 ms
    /// for 256 Ki buckets.
    ///
    /// # Errors
    /// Errors of the kernel.
    pub fn delete(
        &mut self,
        families: &[TableFamily],
        filter: impl Fn(&Flow) -> bool,
    ) -> io::Result<usize> {
        if is_empty() {
            return Ok(0);
        }
        let mut found = Vec::new();
        for family in families.iter().map(|family| family.number()) {
            self.0.dump(&message(GET, family, Attributes::default()), |entry| {
                if flow(entry).is_some_and(|flow| filter(&flow)) {
                    let of = |kind| attribute(entry, kind).map(<[u8]>::to_vec);
                    found.push((family, of(field::ORIGINAL), of(field::ZONE)));
                }
            })?;
        }
        let mut deleted = 0;
        for (family, original, zone) in found {
            let mut key = Attributes::default()
                .bytes(field::ORIGINAL | NESTED, &original.unwrap_or_default());
            if let Some(zone) = zone {
                key = key.bytes(field::ZONE, &zone);
            }
            match self.0.execute(&message(DELETE, family, key)) {
                // The entry expired after the dump.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                result => {
                    result?;
                    deleted += 1;
                }
            }
        }
        Ok(deleted)
    }
}

/// Returns whether the conntrack table of the calling thread's network namespace is empty. Returns
/// `false` if the count cannot be read.
fn is_empty() -> bool {
    std::fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_count")
        .is_ok_and(|count| count.trim() == "0")
}

/// `IPCTNL_MSG_CT_GET`, `IPCTNL_MSG_CT_DELETE`.
const GET: u16 = 1;
const DELETE: u16 = 2;

/// `NLA_F_NESTED`.
const NESTED: u16 = 0x8000;

fn message(request: u16, family: u8, attributes: Attributes) -> Message {
    Message {
        kind: CONNTRACK << 8 | request,
        flags: 0,
        family,
        resource: 0,
        attributes,
        about: String::new(),
    }
}

/// Decodes an entry. Returns `None` for protocols other than TCP and UDP.
fn flow(entry: &[u8]) -> Option<Flow> {
    let (protocol, client, destination) = direction(attribute(entry, field::ORIGINAL)?)?;
    let (_, server, reply_destination) = direction(attribute(entry, field::REPLY)?)?;
    Some(Flow { protocol, client, destination, server, reply_destination })
}

/// Decodes a tuple into protocol, source and destination.
fn direction(tuple: &[u8]) -> Option<(Transport, SocketAddr, SocketAddr)> {
    // CTA_TUPLE_IP, CTA_TUPLE_PROTO
    let (addresses, ports) = (attribute(tuple, 1)?, attribute(tuple, 2)?);
    let protocol = match attribute(ports, 1)? {
        [6] => Transport::Tcp,
        [17] => Transport::Udp,
        _ => return None,
    };
    let port = |kind| Some(u16::from_be_bytes(attribute(ports, kind)?.try_into().ok()?));
    let address = |v4, v6| {
        let v4 = || Some(IpAddr::from(<[u8; 4]>::try_from(attribute(addresses, v4)?).ok()?));
        let v6 = || Some(IpAddr::from(<[u8; 16]>::try_from(attribute(addresses, v6)?).ok()?));
        v4().or_else(v6)
    };
    Some((
        protocol,
        SocketAddr::new(address(1, 3)?, port(2)?),
        SocketAddr::new(address(2, 4)?, port(3)?),
    ))
}
