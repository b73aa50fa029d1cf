//! The host's firewall: which one is used, and what is opened in it.

use crate::ground::Ground;
use anyhow::{Context, bail};
use clap::ValueEnum;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use tidegate_model::PublishLabel;
use tidegate_netsetup::{Endpoint, Firewall, FirewallKind, Network, Opening, Zone};

/// What closes networks, and leads containers out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum FirewallChoice {
    /// nftables, else iptables, else none; iptables first where its FORWARD chain drops what it does not know
    #[default]
    Auto,
    /// Tables of tidegate's own in nftables
    Nftables,
    /// Chains of tidegate's own in iptables and ip6tables
    Iptables,
    /// No firewall: policy rules alone. Containers do not reach the outside
    None,
}

/// What carries connections to published ports.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum PublishBy {
    /// Sockets of this process
    #[default]
    Proxy,
    /// Destination NAT of the kernel; sockets where that does not reach: loopback, a container's own port, IPv6 to IPv4
    Kernel,
}

/// A firewall that was chosen, and why.
#[derive(Debug)]
pub(crate) struct Chosen {
    /// `None` for none.
    pub(crate) firewall: Option<Arc<Firewall>>,
    /// For those who wonder: a clause.
    pub(crate) why: String,
}

/// Chooses the firewall for the networks of `ground`, with the rules of `owner`.
///
/// # Errors
/// What was asked for cannot be had: one line that says why.
pub(crate) fn choose(choice: FirewallChoice, ground: &Ground, owner: &str) -> anyhow::Result<Chosen> {
    let none = |why: &str| Chosen { firewall: None, why: why.to_owned() };
    let open = |kind| Firewall::new(kind, ground.networks(), owner).map(Arc::new);
    let wanted = match choice {
        FirewallChoice::None => return Ok(none("asked for")),
        FirewallChoice::Auto if ground.is_rootless() => {
            return Ok(none("the networks are apart from the host"));
        }
        FirewallChoice::Auto => None,
        FirewallChoice::Nftables => Some(FirewallKind::Nftables),
        FirewallChoice::Iptables => Some(FirewallKind::Iptables),
    };
    if let Some(kind) = wanted {
        if ground.is_rootless() {
            bail!("--firewall={kind} needs root: without it the networks are apart from the host's firewall");
        }
        let firewall = open(kind).with_context(|| format!("--firewall={kind}"))?;
        return Ok(Chosen { firewall: Some(firewall), why: "asked for".to_owned() });
    }
    let mut missing = Vec::new();
    for kind in [FirewallKind::Nftables, FirewallKind::Iptables] {
        match open(kind) {
            Ok(firewall) => {
                let why = if missing.is_empty() { "it is there".to_owned() } else { missing.join("; ") };
                return Ok(Chosen { firewall: Some(firewall), why });
            }
            Err(error) => missing.push(format!("no {kind}: {error}")),
        }
    }
    Ok(none(&missing.join("; ")))
}

/// What a firewall has to know of `networks`.
pub(crate) fn zones(networks: &[Network]) -> Vec<Zone> {
    let zone = |network: &Network| Zone {
        bridge: network.bridge.name.clone(),
        subnets: network.subnets.iter().map(|subnet| subnet.subnet).collect(),
        internal: network.internal,
    };
    networks.iter().map(zone).collect()
}

/// The addresses that the kernel may translate published ports of `endpoint` to: those by whose network its answers leave.
pub(crate) fn targets(endpoint: &Endpoint) -> Vec<IpAddr> {
    let ways_out = endpoint.attachments.iter().filter(|attachment| attachment.default_route);
    ways_out.flat_map(|attachment| &attachment.addresses).map(ipnet::IpNet::addr).collect()
}

/// What a firewall has to know of the published port `label`, which leads to `container_port`. `targets` are the addresses that the kernel may translate to: none where
/// our sockets carry everything.
pub(crate) fn opening(label: PublishLabel, container_port: u16, targets: &[IpAddr]) -> Opening {
    let at = label.address();
    // What is asked for on the host itself is never forwarded.
    let target = targets.iter().find(|ip| ip.is_ipv4() == at.is_ipv4() && !at.ip().is_loopback());
    Opening {
        protocol: label.protocol(),
        address: at.ip(),
        port: at.port(),
        to: target.map(|ip| SocketAddr::new(*ip, container_port)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tidegate_model::Protocol;

    #[test]
    fn the_kernel_translates_to_an_address_of_the_same_family_and_never_from_loopback() {
        let targets: Vec<IpAddr> = ["10.9.0.2", "fd09::2"].map(|ip| ip.parse().unwrap()).to_vec();
        for (at, targets, to) in [
            ("0.0.0.0:8080", &targets[..], Some("10.9.0.2:80")),
            ("203.0.113.1:8080", &targets, Some("10.9.0.2:80")),
            ("[::]:8080", &targets, Some("[fd09::2]:80")),
            ("[::]:8080", &targets[..1], None),
            ("127.0.0.1:8080", &targets, None),
            ("[::1]:8080", &targets, None),
            ("0.0.0.0:8080", &[], None),
        ] {
            let label = PublishLabel::new(at.parse().unwrap(), Protocol::Tcp);
            let opened = opening(label, 80, targets);
            assert_eq!(opened.to, to.map(|to| to.parse().unwrap()), "{at}");
            assert_eq!((opened.address, opened.port), (label.address().ip(), 8080));
        }
    }
}
