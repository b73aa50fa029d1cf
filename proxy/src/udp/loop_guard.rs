//! Detection of datagrams with a published port as their source.
//!
//! A reply to such a datagram goes to a published port, and its service replies in turn. Two ports
//! of services that reply to everything keep a core busy with a single datagram (CERT advisory
//! CA-1996-01, "UDP port denial-of-service attack"). The kernel drops such a source as a martian
//! (`fib_validate_source`) if it is IPv4 and comes from outside, but it accepts it over IPv6.

use crate::gateway_acl::GatewayAcl;
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketFlags, SocketType, connect, connect_unspec, getsockname, socket_with,
};
use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::{Mutex, OnceLock, PoisonError, RwLock};

/// The published UDP ports, and sockets to determine which addresses are local.
#[derive(Debug, Default)]
pub(crate) struct LoopGuard {
    published: RwLock<BTreeSet<SocketAddr>>,
    /// One socket per family in the namespace where ports are published, regardless of the
    /// namespace of the calling thread.
    probes: OnceLock<[Option<Mutex<OwnedFd>>; 2]>,
}

impl LoopGuard {
    /// Adds the published address `address`. Must be called in the namespace of the ports.
    pub(crate) fn add(&self, address: SocketAddr) {
        self.probes.get_or_init(|| [AddressFamily::INET, AddressFamily::INET6].map(probe));
        self.published.write().unwrap_or_else(PoisonError::into_inner).insert(address);
    }

    pub(crate) fn remove(&self, address: SocketAddr) {
        self.published.write().unwrap_or_else(PoisonError::into_inner).remove(&address);
    }

    /// Whether a reply to `client` would go to a published port.
    pub(crate) fn is_reflected(&self, client: SocketAddr, acl: &GatewayAcl) -> bool {
        let (on_it, on_all) = {
            let published = self.published.read().unwrap_or_else(PoisonError::into_inner);
            let any: IpAddr = if client.is_ipv4() {
                Ipv4Addr::UNSPECIFIED.into()
            } else {
                Ipv6Addr::UNSPECIFIED.into()
            };
            let has = |ip| published.contains(&SocketAddr::new(ip, client.port()));
            (has(client.ip()), has(any))
        };
        on_it || on_all && (acl.has_gateway(client.ip()) || self.is_local(client))
    }

    /// Whether the address of `client` is local. For a local destination, the kernel selects the
    /// same address as the source. Returns false without a probe socket.
    fn is_local(&self, client: SocketAddr) -> bool {
        if client.ip().is_loopback() {
            return true;
        }
        let probe =
            self.probes.get().and_then(|probes| probes[usize::from(client.is_ipv6())].as_ref());
        let Some(probe) = probe else { return false };
        let probe = probe.lock().unwrap_or_else(PoisonError::into_inner);
        // connect(2) of a datagram socket only looks up a route; nothing is sent.
        let own = connect(&*probe, &client).and_then(|()| getsockname(&*probe));
        let _ = connect_unspec(&*probe);
        own.ok()
            .and_then(|own| SocketAddr::try_from(own).ok())
            .is_some_and(|own| own.ip() == client.ip())
    }
}

fn probe(family: AddressFamily) -> Option<Mutex<OwnedFd>> {
    let made: Result<OwnedFd, Errno> =
        socket_with(family, SocketType::DGRAM, SocketFlags::CLOEXEC, None);
    made.ok().map(Mutex::new)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_of_this_host_with_a_published_port_is_reflected() {
        let guard = LoopGuard::default();
        let acl = GatewayAcl::default();
        let at = |text: &str| text.parse::<SocketAddr>().unwrap();
        guard.add(at("0.0.0.0:7000"));
        guard.add(at("192.0.2.1:7001"));
        for (client, published) in [
            ("127.0.0.1:7000", true),
            ("127.0.0.9:7000", true),
            ("127.0.0.1:7002", false),
            ("192.0.2.1:7001", true),
            ("127.0.0.1:7001", false),
            ("192.0.2.1:7000", false),
            ("[::1]:7000", false),
        ] {
            assert_eq!(guard.is_reflected(at(client), &acl), published, "{client}");
        }
        guard.remove(at("0.0.0.0:7000"));
        assert!(!guard.is_reflected(at("127.0.0.1:7000"), &acl));
    }
}
