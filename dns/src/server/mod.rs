//! Servers of containers and gateways.

mod clients;
mod redirect;
mod send_batch;
mod sockets;
mod tcp;
mod udp;

use crate::client_id::ClientId;
use crate::error::ServeError;
use crate::handler::ServerContext;
use crate::message::PAYLOAD;
use crate::resolv_conf::{PORT, SERVER};
use crate::servers::ServerList;
use crate::shared::Shared;
use redirect::Redirect;
use sockets::SocketPair;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use tidegate_model::Feature;
use tidegate_netns::Namespace;
use tokio::task::AbortHandle;

/// Maximum size of a UDP response on the loopback interface, in bytes.
const LOOPBACK_PAYLOAD: u16 = 4096;

/// How a server gets queries to port 53 of 127.0.0.11.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Listen {
    /// `Redirected` if nftables is available in the namespace, `Direct` otherwise.
    #[default]
    Auto,
    /// On ports chosen by the kernel, to which nftables rules redirect. The container may have a
    /// DNS server on 0.0.0.0:53.
    Redirected,
    /// On port 53 itself. No other socket of the container may use the port, not even on 0.0.0.0.
    Direct,
}

/// A running server of a container or a gateway. It stops on drop, and its nftables table is
/// removed.
///
/// Root in the container can delay [`Self::repair`] and drop for any length of time (nftables
/// transactions), so neither belongs on a thread that serves others.
#[derive(Debug)]
pub struct Serving {
    tasks: [AbortHandle; 2],
    redirect: Option<Redirect>,
    address: SocketAddr,
    shared: Arc<Shared>,
    /// Whether upstream queries are sent from the namespace of this server.
    is_upstream_namespace: bool,
}

impl Serving {
    /// The address at which clients query it.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Restores the nftables table of the redirect if other software has removed or changed it.
    /// Returns whether it was restored.
    ///
    /// # Errors
    /// Errors of nftables.
    pub fn repair(&mut self) -> Result<bool, tidegate_netfilter::Error> {
        match &mut self.redirect {
            Some(redirect) => redirect.repair(),
            None => Ok(false),
        }
    }

    /// Whether port 53 is redirected by nftables.
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
        if self.is_upstream_namespace {
            self.shared.remove_own_address(self.address);
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
        let pair =
            SocketPair::open(namespace, SocketAddr::from((SERVER, 0)), None).map_err(failed)?;
        let ports = pair.ports().map_err(failed)?;
        let redirect = Redirect::set_up(namespace, ports)
            .map_err(|source| ServeError::Redirect { container: container.to_owned(), source })?;
        Ok::<_, ServeError>((pair, Some(redirect)))
    };
    let direct = || match SocketPair::open(namespace, address, None) {
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
                tracing::debug!(endpoint = container, %error, "DNS redirect unavailable; serving on port 53");
                direct()?
            }
        },
    };
    let context = ServerContext {
        shared: Arc::clone(shared),
        client_id: ClientId::Container(container.into()),
        servers,
        datagram: LOOPBACK_PAYLOAD,
        rotation: AtomicU32::new(0),
    };
    start(pair, redirect, address, namespace, context).map_err(failed)
}

/// Serves `network` at the address of its gateway, on interface `device` only.
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
    let pair = match SocketPair::open(namespace, address, Some(device)) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            return Err(ServeError::GatewayInUse { network: network.to_owned(), address });
        }
        opened => opened.map_err(failed)?,
    };
    let context = ServerContext {
        shared: Arc::clone(shared),
        client_id: ClientId::Network(network.into()),
        servers: None,
        datagram: PAYLOAD,
        rotation: AtomicU32::new(0),
    };
    start(pair, None, address, namespace, context).map_err(failed)
}

fn start(
    pair: SocketPair,
    redirect: Option<Redirect>,
    address: SocketAddr,
    namespace: &Namespace,
    context: ServerContext,
) -> io::Result<Serving> {
    let shared = Arc::clone(&context.shared);
    let ((socket, udp_binding), (listener, tcp_binding)) = pair.register()?;
    let context = Arc::new(context);
    let udp = tokio::spawn(udp::serve(Arc::new(socket), udp_binding, Arc::clone(&context)))
        .abort_handle();
    let tcp = tokio::spawn(tcp::serve(listener, tcp_binding, context)).abort_handle();
    let is_upstream_namespace = [&shared.namespaces.host, &shared.namespaces.networks]
        .iter()
        .any(|one| one.id() == namespace.id());
    if is_upstream_namespace {
        shared.add_own_address(address);
    }
    shared.metrics.containers.increment(1.0);
    Ok(Serving { tasks: [udp, tcp], redirect, address, shared, is_upstream_namespace })
}
