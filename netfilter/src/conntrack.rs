//! The connection tracking table: usage, entries, deletion of entries.
//!
//! NAT is decided for the first packet of a flow; later packets follow the conntrack entry. A UDP
//! flow without pauses keeps its old destination indefinitely. After a port is published, relocated
//! or closed, its conntrack entries must therefore be deleted.

use crate::connection::TableFamily;
use crate::table::Transport;
use crate::wire::open_socket;
use crate::wire::{Attributes, CONNTRACK, Message, attribute};
use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, SystemTime};
use tidegate_netlink::NetlinkSocket;

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

/// The sysctl that makes conntrack record when flows begin.
pub const TIMESTAMPS: &str = "net.netfilter.nf_conntrack_timestamp";

/// The conntrack table of one network namespace.
pub struct Conntrack(NetlinkSocket);

impl fmt::Debug for Conntrack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Conntrack").field(&self.0.port()).finish()
    }
}

/// `CTA_*`.
mod field {
    pub(super) const ORIGINAL: u16 = 1;
    pub(super) const REPLY: u16 = 2;
    pub(super) const STATUS: u16 = 3;
    pub(super) const TIMEOUT: u16 = 7;
    pub(super) const ZONE: u16 = 18;
    pub(super) const TIMESTAMP: u16 = 20;
}

/// `IPS_ASSURED` (include/uapi/linux/netfilter/nf_conntrack_common.h).
const ASSURED: u32 = 1 << 2;

/// An entry of the table during a dump.
#[derive(Debug)]
pub struct Entry<'a> {
    /// Source address of the first packet.
    pub client: IpAddr,
    /// Destination address of the first packet, before destination NAT.
    pub destination: IpAddr,
    /// Source address of replies: the server, after destination NAT.
    pub server: IpAddr,
    /// The flow with its ports, for TCP and UDP.
    pub flow: Option<Flow>,
    family: u8,
    attributes: &'a [u8],
}

/// Identifies an entry for its deletion.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EntryKey {
    family: u8,
    original: Vec<u8>,
    zone: Option<Vec<u8>>,
}

impl Entry<'_> {
    /// Returns whether one of the addresses of the flow satisfies `is`.
    pub fn has_address(&self, is: impl Fn(&IpAddr) -> bool) -> bool {
        [self.client, self.destination, self.server].iter().any(is)
    }

    /// Returns whether the entry is assured. When the table is full, the kernel evicts only entries
    /// that are not (`early_drop`, net/netfilter/nf_conntrack_core.c).
    #[must_use]
    pub fn is_assured(&self) -> bool {
        self.number(field::STATUS).is_some_and(|status| status & ASSURED != 0)
    }

    /// Returns when the flow began. `None` unless the sysctl [`TIMESTAMPS`] was set at that time.
    #[must_use]
    pub fn began(&self) -> Option<SystemTime> {
        // CTA_TIMESTAMP_START, in nanoseconds
        let start = attribute(attribute(self.attributes, field::TIMESTAMP)?, 1)?;
        let start = u64::from_be_bytes(start.try_into().ok()?);
        Some(SystemTime::UNIX_EPOCH + Duration::from_nanos(start))
    }

    /// Returns the time in seconds until the entry expires without further packets. Among entries
    /// of one protocol and state, the entry idle for longest has the least time left.
    #[must_use]
    pub fn remaining(&self) -> u32 {
        self.number(field::TIMEOUT).unwrap_or(0)
    }

    /// Returns the key that identifies the entry for its deletion.
    #[must_use]
    pub fn key(&self) -> EntryKey {
        let of = |kind| attribute(self.attributes, kind).map(<[u8]>::to_vec);
        EntryKey {
            family: self.family,
            original: of(field::ORIGINAL).unwrap_or_default(),
            zone: of(field::ZONE),
        }
    }

    fn number(&self, kind: u16) -> Option<u32> {
        Some(u32::from_be_bytes(attribute(self.attributes, kind)?.try_into().ok()?))
    }
}

impl Conntrack {
    /// Opens the table of the calling thread's network namespace.
    ///
    /// # Errors
    /// The process is out of file descriptors, or the kernel lacks netfilter.
    pub fn open() -> io::Result<Self> {
        Ok(Self(open_socket()?))
    }

    /// Calls `each` for the entries of `families`, of all protocols.
    ///
    /// A dump walks the whole hash table once per family, regardless of the number of flows: 10 ms
    /// for 256 Ki buckets.
    ///
    /// # Errors
    /// Errors of the kernel.
    pub fn for_each(
        &mut self,
        families: &[TableFamily],
        mut each: impl FnMut(&Entry<'_>),
    ) -> io::Result<()> {
        for family in families.iter().map(|family| family.number()) {
            self.0.dump(&message(GET, family, Attributes::default()), |_, attributes| {
                let of = |kind| addresses(attribute(attributes, kind)?);
                if let (Some((client, destination)), Some((server, _))) =
                    (of(field::ORIGINAL), of(field::REPLY))
                {
                    let flow = flow(attributes);
                    each(&Entry { client, destination, server, flow, family, attributes });
                }
            })?;
        }
        Ok(())
    }

    /// Deletes the entries of `families` that match `filter`, of all protocols, and returns their
    /// number. Later packets create new entries.
    ///
    /// # Errors
    /// Errors of the kernel.
    pub fn delete(
        &mut self,
        families: &[TableFamily],
        filter: impl Fn(&Entry<'_>) -> bool,
    ) -> io::Result<usize> {
        if is_empty() {
            return Ok(0);
        }
        let mut found = Vec::new();
        self.for_each(families, |entry| {
            if filter(entry) {
                found.push(entry.key());
            }
        })?;
        self.delete_entries(found)
    }

    /// Deletes `entries` and returns the number of those that still existed.
    ///
    /// # Errors
    /// Errors of the kernel.
    pub fn delete_entries(
        &mut self,
        entries: impl IntoIterator<Item = EntryKey>,
    ) -> io::Result<usize> {
        let mut deleted = 0;
        for EntryKey { family, original, zone } in entries {
            let mut key = Attributes::default().bytes(field::ORIGINAL | NESTED, &original);
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

    /// Number of entries in the table of the calling thread's network namespace, and its limit.
    ///
    /// # Errors
    /// `/proc` cannot be read, or the kernel does not track connections.
    pub fn usage() -> io::Result<(usize, usize)> {
        let read = |name: &str| {
            let text = std::fs::read_to_string(format!("/proc/sys/net/netfilter/{name}"))?;
            text.trim().parse::<usize>().map_err(|_| io::Error::from(io::ErrorKind::InvalidData))
        };
        io::Result::Ok((read("nf_conntrack_count")?, read("nf_conntrack_max")?))
    }
}

/// Returns whether the conntrack table of the calling thread's network namespace is empty. Returns
/// `false` if the count cannot be read.
fn is_empty() -> bool {
    Conntrack::usage().is_ok_and(|(entries, _)| entries == 0)
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
    let (source, destination) = addresses(tuple)?;
    // CTA_TUPLE_PROTO
    let ports = attribute(tuple, 2)?;
    let protocol = match attribute(ports, 1)? {
        [6] => Transport::Tcp,
        [17] => Transport::Udp,
        _ => return None,
    };
    let port = |kind| Some(u16::from_be_bytes(attribute(ports, kind)?.try_into().ok()?));
    Some((protocol, SocketAddr::new(source, port(2)?), SocketAddr::new(destination, port(3)?)))
}

/// Decodes source and destination address of a tuple.
fn addresses(tuple: &[u8]) -> Option<(IpAddr, IpAddr)> {
    // CTA_TUPLE_IP
    let addresses = attribute(tuple, 1)?;
    let address = |v4, v6| {
        let v4 = || Some(IpAddr::from(<[u8; 4]>::try_from(attribute(addresses, v4)?).ok()?));
        let v6 = || Some(IpAddr::from(<[u8; 16]>::try_from(attribute(addresses, v6)?).ok()?));
        v4().or_else(v6)
    };
    Some((address(1, 3)?, address(2, 4)?))
}
