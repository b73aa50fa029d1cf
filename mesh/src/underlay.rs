//! The network that carries the packets between hosts.

use futures_util::TryStreamExt;
use ipnet::IpNet;
use rtnetlink::packet_route::address::AddressAttribute;
use rtnetlink::packet_route::link::LinkAttribute;
use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use tidegate_model::registry;
use tidegate_netns::Namespace;
use tokio::runtime::Handle as Runtime;
use tokio::task::JoinHandle;

/// The underlay of a host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Underlay {
    /// MTU of the link with the address of the host, in bytes.
    pub mtu: u32,
    /// Networks of the host's links, without those of tidegate.
    pub networks: Vec<IpNet>,
}

/// Why an address cannot be that of a host.
#[derive(Debug, thiserror::Error)]
pub enum UnderlayError {
    /// The address is not one of the host.
    #[error("{address} is not an address of this host; its addresses are {}", .own.join(", "))]
    NotOwn {
        /// The address.
        address: IpAddr,
        /// The addresses of the host.
        own: Vec<String>,
    },
    /// The kernel cannot be asked.
    #[error("addresses of this host: {0}")]
    Io(#[from] io::Error),
}

/// Opens an rtnetlink socket in `namespace`, on the current runtime. The task ends it when it is
/// aborted.
pub(crate) fn connect(namespace: &Namespace) -> io::Result<(rtnetlink::Handle, JoinHandle<()>)> {
    let (task, handle, _) = spawn(namespace, rtnetlink::new_connection)?;
    Ok((handle, task))
}

/// Opens an rtnetlink socket in `namespace` by `open`, on the current runtime. Returns its task,
/// and what `open` has returned beside it.
pub(crate) fn spawn<C: Future<Output = ()> + Send + 'static, H: Send, M: Send>(
    namespace: &Namespace,
    open: impl FnOnce() -> io::Result<(C, H, M)> + Send,
) -> io::Result<(JoinHandle<()>, H, M)> {
    // The socket is registered with the runtime, possibly from another thread.
    let runtime = Runtime::current();
    let open = || {
        let _runtime = runtime.enter();
        open()
    };
    let (connection, handle, messages) = namespace.with(open)??;
    Ok((tokio::spawn(connection), handle, messages))
}

/// Reads the underlay of the host with `address` in `namespace`.
///
/// # Errors
/// [`UnderlayError`].
pub async fn underlay(namespace: &Namespace, address: IpAddr) -> Result<Underlay, UnderlayError> {
    let (handle, task) = connect(namespace)?;
    let read = async {
        let mut links: BTreeMap<u32, (String, u32)> = BTreeMap::new();
        let mut found = handle.link().get().execute();
        while let Some(message) = found.try_next().await.map_err(io::Error::other)? {
            let (mut name, mut mtu) = (String::new(), 0);
            for attribute in &message.attributes {
                match attribute {
                    LinkAttribute::IfName(text) => name.clone_from(text),
                    LinkAttribute::Mtu(bytes) => mtu = *bytes,
                    _ => {}
                }
            }
            links.insert(message.header.index, (name, mtu));
        }
        let (mut networks, mut own, mut at) = (Vec::new(), Vec::new(), None);
        let mut found = handle.address().get().execute();
        while let Some(message) = found.try_next().await.map_err(io::Error::other)? {
            let local = message.attributes.iter().find_map(|attribute| match attribute {
                AddressAttribute::Local(ip) => Some(*ip),
                _ => None,
            });
            let other = message.attributes.iter().find_map(|attribute| match attribute {
                AddressAttribute::Address(ip) => Some(*ip),
                _ => None,
            });
            let Some(ip) = local.or(other) else { continue };
            let Some((link, mtu)) = links.get(&message.header.index) else { continue };
            if link.starts_with(registry::INTERFACE_PREFIX) || ip.is_loopback() {
                continue;
            }
            if ip == address {
                at = Some(*mtu);
            }
            let is_link_local = matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local());
            if let (false, Ok(net)) = (is_link_local, IpNet::new(ip, message.header.prefix_len)) {
                networks.push(net.trunc());
                own.push(ip.to_string());
            }
        }
        match at {
            Some(mtu) => Ok(Underlay { mtu, networks }),
            None => Err(UnderlayError::NotOwn { address, own }),
        }
    };
    let result = read.await;
    task.abort();
    result
}
