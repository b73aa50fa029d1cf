//! Servers: one for each container, and for each gateway that is to be one.

mod clients;
mod redirect;
mod send_batch;
mod sockets;
mod tcp;
mod udp;

use crate::error::ServeError;
use crate::handler::Site;
use crate::message::PAYLOAD;
use crate::resolv_conf::{PORT, SERVER};
use crate::resolver::Shared;
use crate::servers::ServerList;
use crate::zone::Asker;
use redirect::Redirect;
use sockets::Pair;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use tidegate_model::Feature;
use tidegate_netns::Namespace;
use tokio::task::AbortHandle;

/// The most bytes of a datagram that stays on a loopback interface.
const ON_LOOPBACK: u16 = 4096;

/// How a server gets to be at port 53 of 127.0.0.11.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Listen {
    /// Redirected where the namespace has nftables, else directly.
    #[default]
    Auto,
    /// At ports of its own, to which a rule of nftables leads: the container may have a DNS server
    /// on 0.0.0.0:53.
    Redirected,
    /// At the port itself: nobody else in the container may have it, on 0.0.0.0 neither.
    Direct,
}

/// A server of one container, or of one gateway. It ends when this is dropped, and what it has set
/// up in the container's namespace goes with it.
///
/// To repair and to drop one takes as long as root in the container makes nftables take there: no
/// matter for a thread that serves others.
#[derive(Debug)]
pub struct Serving {
    tasks: [AbortHandle; 2],
    redirect: Option<Redirect>,
    address: SocketAddr,
    shared: Arc<Shared>,
    /// It serves in a namespace that questions go out from.
    outside: bool,
}

impl Serving {
    /// Where it is asked.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Restores the table of nftables that leads there, if other software has removed or changed
    /// it. Whether it had.
    ///
    /// # Errors
    /// The kernel's.
    pub fn repair(&mut self) -> Result<bool, tidegate_netfilter::Error> {
        match &mut self.redirect {
            Some(redirect) => redirect.repair(),
            None => Ok(false),
        }
    }

    /// Whether a rule of nftables leads there.
    #[must_use]
    pub fn is_redirected(&self) -> bool {
        self.redirect.is_some()
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
        if self.outside {
            self.shared.no_longer_ourselves(self.address);
        }
        self.shared.metrics.containers.decrement(1.0);
    }
}

/// Serves `container` in its namespace.
pub(crate) fn in_container(
    shared: &Arc<Shared>,
    namespace: &Namespace,
    container: &str,
    listen: Listen,
    servers: Option<ServerList>,
) -> Result<Serving, ServeError> {
    let address = SocketAddr::from((SERVER, PORT));
    let failed =
        |source| ServeError::Socket { of: format!("container {container:?}"), address, source };
    let redirected = || {
        let pair = Pair::open(namespace, SocketAddr::from((SERVER, 0)), None).map_err(failed)?;
        let ports = pair.ports().map_err(failed)?;
        let redirect = Redirect::set_up(namespace, ports)
            .map_err(|source| ServeError::Redirect { container: container.to_owned(), source })?;
        Ok::<_, ServeError>((pair, Some(redirect)))
    };
    let direct = || match Pair::open(namespace, address, None) {
        Ok(pair) => Ok((pair, None)),
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            Err(ServeError::InUse { container: container.to_owned(), address })
        }
        Err(error) => Err(failed(error)),
    };
    let (pair, redirect) = match listen {
        Listen::Redirected => redirected()?,
        Listen::Direct => direct()?,
        Listen::Auto if Feature::DnsRedirect.is_forced_off() => direct()?,
        Listen::Auto => match redirected() {
            Ok(made) => made,
            Err(error) => {
                tracing::debug!(endpoint = container, %error, "DNS is served at port 53 itself");
                direct()?
            }
        },
    };
    let site = Site {
        shared: Arc::clone(shared),
        asker: Asker::Container(container.into()),
        servers,
        datagram: ON_LOOPBACK,
        turn: AtomicU32::new(0),
    };
    start(pair, redirect, address, namespace, site).map_err(failed)
}

/// Serves `network` at its gateway's address, to who comes in by `device`.
pub(crate) fn at_gateway(
    shared: &Arc<Shared>,
    namespace: &Namespace,
    network: &str,
    gateway: IpAddr,
    device: &str,
) -> Result<Serving, ServeError> {
    let address = SocketAddr::from((gateway, PORT));
    let failed =
        |source| ServeError::Socket { of: format!("network {network:?}"), address, source };
    let pair = match Pair::open(namespace, address, Some(device)) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            return Err(ServeError::GatewayInUse { network: network.to_owned(), address });
        }
        opened => opened.map_err(failed)?,
    };
    let site = Site {
        shared: Arc::clone(shared),
        asker: Asker::Network(network.into()),
        servers: None,
        datagram: PAYLOAD,
        turn: AtomicU32::new(0),
    };
    start(pair, None, address, namespace, site).map_err(failed)
}

fn start(
    pair: Pair,
    redirect: Option<Redirect>,
    address: SocketAddr,
    namespace: &Namespace,
    site: Site,
) -> io::Result<Serving> {
    let shared = Arc::clone(&site.shared);
    let ((socket, of_udp), (listener, of_tcp)) = pair.register()?;
    let site = Arc::new(site);
    let udp = tokio::spawn(udp::serve(Arc::new(socket), of_udp, Arc::clone(&site))).abort_handle();
    let tcp = tokio::spawn(tcp::serve(listener, of_tcp, site)).abort_handle();
    let outside =
        [&shared.ways.outside, &shared.ways.networks].iter().any(|way| way.id() == namespace.id());
    if outside {
        shared.ourselves(address);
    }
    shared.metrics.containers.increment(1.0);
    Ok(Serving { tasks: [udp, tcp], redirect, address, shared, outside })
}
