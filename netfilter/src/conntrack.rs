//! Connection tracking: entries that outlive what they were made for.
//!
//! Where a packet goes is decided for the first one of a flow and remembered for the others. A UDP
//! flow that goes on is sent where its port once led, for as long as it does not pause; so when a
//! port is opened, moved or closed, what is remembered of it has to go.

use crate::connection::TableFamily;
use crate::socket::NetfilterSocket;
use crate::table::Transport;
use crate::wire::{Attributes, CONNTRACK, Message, attribute};
use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};

/// A flow, as its first packet was before any translation, and as answers to it are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    /// The protocol.
    pub protocol: Transport,
    /// The client.
    pub client: SocketAddr,
    /// The destination that it asked.
    pub asked: SocketAddr,
    /// The server.
    pub server: SocketAddr,
    /// Whom the answers are addressed to: behind source NAT an address and a port of the host.
    pub answered: SocketAddr,
}

/// The flows that one namespace keeps track of.
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
    /// Those of the namespace of the calling thread.
    ///
    /// # Errors
    /// No descriptor is left, or the kernel has no netfilter.
    pub fn open() -> io::Result<Self> {
        Ok(Self(NetfilterSocket::open()?))
    }

    /// Forgets the flows of `families` that `which` picks, and returns how many they were. Packets
    /// that still come begin new ones.
    ///
    /// The kernel goes through its whole table for each family, however few flows it has: 10 ms
    /// where it has 256 Ki places.
    ///
    /// # Errors
    /// The kernel's.
    pub fn forget(
        &mut self,
        families: &[TableFamily],
        which: impl Fn(&Flow) -> bool,
    ) -> io::Result<usize> {
        if is_empty() {
            return Ok(0);
        }
        let mut found = Vec::new();
        for family in families.iter().map(|family| family.number()) {
            self.0.dump(&message(GET, family, Attributes::default()), |entry| {
                if flow(entry).is_some_and(|flow| which(&flow)) {
                    let of = |kind| attribute(entry, kind).map(<[u8]>::to_vec);
                    found.push((family, of(field::ORIGINAL), of(field::ZONE)));
                }
            })?;
        }
        let mut forgotten = 0;
        for (family, original, zone) in found {
            let mut key = Attributes::default()
                .bytes(field::ORIGINAL | NESTED, &original.unwrap_or_default());
            if let Some(zone) = zone {
                key = key.bytes(field::ZONE, &zone);
            }
            match self.0.order(&message(DELETE, family, key)) {
                // It ended by itself meanwhile.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                result => {
                    result?;
                    forgotten += 1;
                }
            }
        }
        Ok(forgotten)
    }
}

/// Whether the calling thread's namespace keeps track of nothing. What cannot be told is not taken
/// for it.
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

/// What an entry says; `None` for protocols without ports.
fn flow(entry: &[u8]) -> Option<Flow> {
    let (protocol, client, asked) = direction(attribute(entry, field::ORIGINAL)?)?;
    let (_, server, answered) = direction(attribute(entry, field::REPLY)?)?;
    Some(Flow { protocol, client, asked, server, answered })
}

/// Protocol, source and destination.
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
