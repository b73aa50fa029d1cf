//! Polices SYN floods at the bridge port of the flooding endpoint.
//!
//! The NAT engine refuses flows beyond an endpoint's budget when it reads their first packet. By
//! then the packet has crossed the bridge, the host's routing and the TUN device, on cores that
//! other endpoints share. While the engine refuses SYNs of an endpoint, the port guard of the
//! endpoint therefore polices them. The rate per second equals the endpoint's limit of unanswered
//! flows, which is twice what the engine admits during a flood. The engine's budget, not the
//! policer, thus selects the admitted flows. The policer is removed once it drops at most
//! [`CALM_FRAMES`] frames per [`CHECK_INTERVAL`].

use ipnet::IpNet;
use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::num::NonZeroU32;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tidegate_nat::FloodListener;
use tidegate_netfilter::{Mechanism, PortGuards};
use tidegate_netns::HostContext;
use tidegate_netsetup::Desired;

/// Interval between two checks of a policer.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// Frames dropped per [`CHECK_INTERVAL`] up to which an endpoint does not flood.
const CALM_FRAMES: u64 = 64;

/// Capacity of the report queue. Reports beyond it are dropped, because the engine repeats them.
const REPORT_QUEUE: usize = 16;

/// Passes the engine's reports to the policing thread without blocking.
#[derive(Debug)]
struct Reports(SyncSender<IpAddr>);

impl FloodListener for Reports {
    fn flooding(&self, source: IpAddr) {
        let _ = self.0.try_send(source);
    }
}

/// The policing thread.
pub(super) struct FloodControl {
    listener: Arc<Reports>,
    ports: Arc<Mutex<Vec<BridgePort>>>,
}

impl FloodControl {
    /// Returns what the engine reports floods to. The thread ends when all references are gone.
    pub(super) fn listener(&self) -> Arc<dyn FloodListener> {
        Arc::clone(&self.listener) as _
    }

    /// Sets the bridge ports to those of `desired`.
    pub(super) fn set_ports(&self, desired: &Desired) {
        *lock(&self.ports) = bridge_ports(desired);
    }
}

fn lock(ports: &Mutex<Vec<BridgePort>>) -> MutexGuard<'_, Vec<BridgePort>> {
    ports.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A bridge port.
#[derive(Clone, Debug)]
struct BridgePort {
    endpoint: String,
    /// The name of its interface.
    link: String,
    addresses: Vec<IpAddr>,
    /// The subnets of its network, if it may send from any source address.
    any_of: Vec<IpNet>,
}

/// Starts the policing thread. `rate` is in SYNs per second and bridge port. Returns `None` if the
/// mechanism of `guards` has no policer.
///
/// # Errors
/// The thread cannot be created.
pub(super) fn start(
    desired: &Desired,
    guards: &Arc<PortGuards>,
    host_context: &HostContext,
    rate: NonZeroU32,
) -> io::Result<Option<FloodControl>> {
    if guards.mechanism() == Mechanism::Classic {
        return Ok(None);
    }
    let (sender, reports) = sync_channel(REPORT_QUEUE);
    let (guards, host) = (Arc::clone(guards), host_context.networks().clone());
    let ports = Arc::new(Mutex::new(bridge_ports(desired)));
    let of_policer = Arc::clone(&ports);
    std::thread::Builder::new().name("tidegate-flood".into()).spawn(move || {
        let entered = if host.is_current() { Ok(()) } else { host.enter() };
        match entered {
            Ok(()) => {
                Policer { guards, rate, ports: of_policer, policed: BTreeMap::new() }.run(&reports);
            }
            Err(error) => tracing::warn!(%error, "floods not policed at bridge ports"),
        }
    })?;
    Ok(Some(FloodControl { listener: Arc::new(Reports(sender)), ports }))
}

fn bridge_ports(desired: &Desired) -> Vec<BridgePort> {
    let subnets = |network: &str| {
        let network = desired.networks.iter().find(|one| one.name == network);
        network
            .into_iter()
            .flat_map(|network| &network.subnets)
            .map(|one| one.subnet.trunc())
            .collect()
    };
    let of_endpoint = |endpoint: &tidegate_netsetup::Endpoint| {
        let name = endpoint.name.clone();
        let port = move |attachment: &tidegate_netsetup::Attachment| BridgePort {
            endpoint: name.clone(),
            link: attachment.host_end.name.clone(),
            addresses: attachment.addresses.iter().map(IpNet::addr).collect(),
            any_of: if attachment.any_address { subnets(&attachment.network) } else { Vec::new() },
        };
        endpoint.attachments.iter().map(port).collect::<Vec<_>>()
    };
    desired.endpoints.iter().flat_map(of_endpoint).collect()
}

/// Returns the bridge ports that accept packets from `source`: that of its endpoint, and those of
/// endpoints on its network that may send from any source address.
fn ports_of(ports: &[BridgePort], source: IpAddr) -> Vec<&BridgePort> {
    let may_send = |port: &&BridgePort| {
        port.addresses.contains(&source) || port.any_of.iter().any(|net| net.contains(&source))
    };
    ports.iter().filter(may_send).collect()
}

struct Policer {
    guards: Arc<PortGuards>,
    /// SYNs per second that pass at a policed port.
    rate: NonZeroU32,
    ports: Arc<Mutex<Vec<BridgePort>>>,
    /// Policed links, each with its dropped frames at the last check.
    policed: BTreeMap<String, u64>,
}

impl Policer {
    fn run(mut self, reports: &Receiver<IpAddr>) {
        let mut check = Instant::now();
        loop {
            let report = if self.policed.is_empty() {
                let report = reports.recv().map_err(|_| RecvTimeoutError::Disconnected);
                check = Instant::now() + CHECK_INTERVAL;
                report
            } else {
                reports.recv_timeout(check.saturating_duration_since(Instant::now()))
            };
            match report {
                Ok(source) => self.police(source),
                Err(RecvTimeoutError::Disconnected) => return,
                Err(RecvTimeoutError::Timeout) => {}
            }
            if check <= Instant::now() {
                self.remove_idle();
                check = Instant::now() + CHECK_INTERVAL;
            }
        }
    }

    fn police(&mut self, source: IpAddr) {
        let ports = lock(&self.ports);
        for BridgePort { endpoint, link, .. } in ports_of(&ports, source) {
            if self.policed.contains_key(link) {
                continue;
            }
            match self.guards.police(link, Some(self.rate)) {
                Ok(()) => {
                    let dropped =
                        self.guards.dropped().get(link).map_or(0, |dropped| dropped.policed);
                    self.policed.insert(link.clone(), dropped);
                    tracing::warn!(
                        endpoint,
                        "endpoint floods; new TCP connections policed at its bridge port"
                    );
                }
                Err(error) => tracing::debug!(endpoint, %error, "flood cannot be policed"),
            }
        }
    }

    /// Removes the policers of endpoints that no longer flood.
    fn remove_idle(&mut self) {
        let dropped = self.guards.dropped();
        let guards = &self.guards;
        self.policed.retain(|link, before| {
            let now = dropped.get(link).map_or(0, |dropped| dropped.policed);
            let floods = now.saturating_sub(std::mem::replace(before, now)) > CALM_FRAMES;
            // Not found: the link has no guard any more, and thus no policer.
            floods
                || guards
                    .police(link, None)
                    .is_err_and(|error| error.kind() != io::ErrorKind::NotFound)
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn port(endpoint: &str, address: &str, any_of: &[&str]) -> BridgePort {
        BridgePort {
            endpoint: endpoint.to_owned(),
            link: format!("tg-{endpoint}"),
            addresses: vec![address.parse().unwrap()],
            any_of: any_of.iter().map(|net| net.parse().unwrap()).collect(),
        }
    }

    #[test]
    fn a_source_maps_to_its_endpoint_and_to_those_that_may_spoof_it() {
        let ports = [
            port("web", "10.1.0.2", &[]),
            port("router", "10.1.0.3", &["10.1.0.0/24"]),
            port("other", "10.2.0.2", &[]),
        ];
        let of = |source: &str| {
            let found = ports_of(&ports, source.parse().unwrap());
            found.into_iter().map(|port| port.endpoint.as_str()).collect::<Vec<_>>()
        };
        assert_eq!(of("10.1.0.2"), ["web", "router"], "a router may have spoofed it");
        assert_eq!(of("10.2.0.2"), ["other"]);
        assert_eq!(of("10.1.0.9"), ["router"]);
        assert_eq!(of("10.3.0.1"), [""; 0]);
    }
}
