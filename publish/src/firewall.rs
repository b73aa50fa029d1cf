//! Selection of the host's firewall, and conversion of networks and published ports to its types.

use clap::ValueEnum;
use ipnet::IpNet;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use tidegate_model::{Feature, PublishLabel};
use tidegate_netns::HostContext;
use tidegate_netns::Namespace;
use tidegate_netsetup::{
    Desired, DockerUser, Endpoint, Firewall, FirewallKind, IptablesState, Network, Opening, Subnet,
    Zone,
};

/// The firewall that isolates networks and masquerades the egress of containers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum FirewallChoice {
    /// nftables, else iptables, else none; iptables first if the policy of its FORWARD chain is
    /// DROP or DOCKER-USER has rules
    #[default]
    Auto,
    /// Separate tables in nftables
    Nftables,
    /// Separate chains in iptables and ip6tables
    Iptables,
    /// No firewall: guards and policy rules isolate networks, and the NAT engine provides egress
    None,
}

/// How connections to published ports are forwarded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum PublishBy {
    /// By sockets of this process
    #[default]
    Proxy,
    /// By destination NAT of the kernel, and by sockets where it does not apply: connections from
    /// the host itself, from containers, and from IPv6 clients to containers without IPv6
    Kernel,
}

/// Why the requested combination of firewall and publishing is not possible.
#[derive(Debug, thiserror::Error)]
pub enum ChoiceError {
    /// iptables is in use, and its rules cannot be read.
    #[error(
        "iptables is in use, and its rules, which may apply to containers, cannot be read: {0}"
    )]
    Rules(#[source] io::Error),
    /// The requested firewall cannot be used.
    #[error("--firewall={kind}: {source}")]
    Unavailable {
        /// The requested firewall.
        kind: FirewallKind,
        /// The error of the kernel or of iptables.
        source: io::Error,
    },
    /// A firewall was requested without root.
    #[error(
        "--firewall={0} needs root; networks of an ordinary user are separate from the firewall of the host"
    )]
    Rootless(FirewallKind),
    /// The kernel cannot publish ports without a firewall.
    #[error("--publish=kernel needs a firewall, and none is used: {why}")]
    PublishWithoutFirewall {
        /// Why no firewall is used: a clause.
        why: String,
    },
    /// Ports served by sockets would bypass a rule of DOCKER-USER, and no firewall is used.
    #[error(
        "--firewall=none: DOCKER-USER has the rule {rule:?}, which published ports would bypass; use --firewall=iptables, or remove the rule"
    )]
    BypassWithoutFirewall {
        /// The rule, as iptables-save prints it.
        rule: String,
    },
    /// Rules of TIDEGATE-USER would not be applied.
    #[error(
        "the chain TIDEGATE-USER of {rules} has rules, which --firewall={} does not apply; {}", .selected.map_or("none", FirewallKind::name), .rules.remedy()
    )]
    UserRules {
        /// The rules.
        rules: UserRules,
        /// The selected firewall.
        selected: Option<FirewallKind>,
    },
    /// Ports served by sockets would bypass a rule of DOCKER-USER.
    #[error(
        "--publish=proxy with {kind}: DOCKER-USER has the rule {rule:?}, which ports served by a socket would bypass; use --publish=kernel, or remove the rule"
    )]
    Bypass {
        /// The selected firewall.
        kind: FirewallKind,
        /// The rule, as iptables-save prints it.
        rule: String,
    },
}

/// A set of rules of the administrator that the selected firewall does not apply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UserRules {
    /// The chain TIDEGATE-USER of nftables.
    Nftables,
    /// The chain TIDEGATE-USER of iptables or ip6tables, in the variant in `PATH`.
    Iptables,
    /// The same in the other variant of iptables, legacy or nf_tables.
    OtherIptables,
}

impl fmt::Display for UserRules {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Nftables => "nftables",
            Self::Iptables => "iptables",
            Self::OtherIptables => "the other variant of iptables (iptables-legacy, iptables-nft)",
        })
    }
}

impl UserRules {
    /// Returns the rules in `host` that `kind` does not apply.
    fn ignored_by(kind: Option<FirewallKind>, host: &Namespace) -> io::Result<Option<Self>> {
        if kind != Some(FirewallKind::Nftables) && Firewall::nftables_has_user_rules(host)? {
            return Ok(Some(Self::Nftables));
        }
        let [ours, other] = IptablesState::has_user_rules(host)?;
        if ours && kind != Some(FirewallKind::Iptables) {
            return Ok(Some(Self::Iptables));
        }
        Ok(other.then_some(Self::OtherIptables))
    }

    fn remedy(self) -> &'static str {
        match self {
            Self::Nftables => "use --firewall=nftables, or remove them",
            Self::Iptables => "use --firewall=iptables, or remove them",
            Self::OtherIptables => "move them to the chain of the programs in PATH, or remove them",
        }
    }
}

/// The selected firewall, with the reason.
#[derive(Debug, Default)]
pub struct Chosen {
    /// `None` to use no firewall.
    pub firewall: Option<Arc<Firewall>>,
    /// How published ports are forwarded.
    pub publish: PublishBy,
    /// The reason, for the log: a clause.
    pub why: String,
}

impl Chosen {
    /// Logs the selection.
    pub fn tell(&self) {
        let why = &self.why;
        match &self.firewall {
            Some(firewall) => {
                tracing::info!(firewall = %firewall.kind(), why, "firewall selected");
            }
            None => tracing::info!(why, "no firewall used"),
        }
    }
}

/// The rules of DOCKER-USER that ports served by a userspace socket would bypass.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BypassedRules {
    /// The first such rule of each family, IPv4 first.
    rules: [Option<String>; 2],
    /// Whether packets that the kernel forwards traverse DOCKER-USER, for each family.
    forward: [bool; 2],
}

impl BypassedRules {
    /// Reads the current rules of `host`, for the firewall `kind`. This may run iptables-save, with
    /// a timeout.
    ///
    /// # Errors
    /// If the rules cannot be read, so that it is unknown whether a port would bypass one.
    pub fn observe(kind: Option<FirewallKind>, host: &Namespace) -> io::Result<Self> {
        Ok(Self::of(kind, &DockerUser::of(host)?.map(Some)))
    }

    /// tidegate's iptables chains jump to DOCKER-USER for all incoming packets, so sockets bypass
    /// only rules that apply to forwarded packets alone.
    fn of(kind: Option<FirewallKind>, docker_user: &[Option<DockerUser>; 2]) -> Self {
        let rules = docker_user.each_ref().map(|docker_user| {
            let docker_user = docker_user.as_ref()?;
            let rule = match kind {
                Some(FirewallKind::Iptables) => docker_user.about_forwarding(),
                Some(FirewallKind::Nftables) | None => docker_user.rules.first(),
            };
            // tidegate's iptables chains do not jump to those of the other variant.
            let rule = rule.or(docker_user.elsewhere.first());
            rule.map(|rule| rule.text.clone())
        });
        let jumps = kind == Some(FirewallKind::Iptables);
        let forward = docker_user.each_ref().map(|docker_user| {
            docker_user.as_ref().map_or(jumps, |chain| chain.applies_to_forwarded(jumps))
        });
        Self { rules, forward }
    }

    /// One of the rules, of any family.
    pub fn any(&self) -> Option<&str> {
        self.rules.iter().flatten().map(String::as_str).next()
    }

    /// The rule that `opening` would bypass. A port that the kernel forwards bypasses none, because
    /// forwarded packets traverse DOCKER-USER. Connections of the host to itself never do.
    pub fn by(&self, opening: &Opening) -> Option<&str> {
        let served_by_a_socket = opening.to.is_none() && !opening.address.is_loopback();
        served_by_a_socket.then(|| self.rules[usize::from(opening.address.is_ipv6())].as_deref())?
    }

    /// Whether the rule that `opening` would bypass applies once the kernel forwards the port.
    pub fn holds_when_forwarded(&self, opening: &Opening) -> bool {
        self.forward[usize::from(opening.address.is_ipv6())]
    }
}

/// Selects the firewall for the networks of `host_context`, and how published ports are forwarded.
/// The rules are installed under the name `owner`.
///
/// # Errors
/// [`ChoiceError`].
pub fn choose(
    choice: FirewallChoice,
    publish: Option<PublishBy>,
    host_context: &HostContext,
    owner: &str,
) -> Result<Chosen, ChoiceError> {
    let iptables = if host_context.is_rootless() {
        [None, None]
    } else {
        IptablesState::of(host_context.networks()).map_err(|source| match choice {
            FirewallChoice::Iptables => {
                ChoiceError::Unavailable { kind: FirewallKind::Iptables, source }
            }
            _ => ChoiceError::Rules(source),
        })?
    };
    let (firewall, mut why) = choose_firewall(choice, host_context, owner, &iptables)?;
    let kind = firewall.as_ref().map(|firewall| firewall.kind());
    if !host_context.is_rootless() {
        let ignored = UserRules::ignored_by(kind, host_context.networks());
        if let Some(rules) = ignored.map_err(ChoiceError::Rules)? {
            return Err(ChoiceError::UserRules { rules, selected: kind });
        }
    }
    let docker_user = iptables.each_ref().map(|state| Some(state.as_ref()?.docker_user.clone()));
    let bypassed = BypassedRules::of(kind, &docker_user);
    let publish = match (kind, publish, bypassed.any()) {
        (None, Some(PublishBy::Kernel), _) => {
            return Err(ChoiceError::PublishWithoutFirewall { why });
        }
        (None, _, Some(rule)) => {
            return Err(ChoiceError::BypassWithoutFirewall { rule: rule.to_owned() });
        }
        (Some(kind), Some(PublishBy::Proxy), Some(rule)) => {
            return Err(ChoiceError::Bypass { kind, rule: rule.to_owned() });
        }
        (Some(_), None, Some(rule)) => {
            why = format!("{why}; ports are published by the kernel, because of the rule {rule:?}");
            PublishBy::Kernel
        }
        (_, publish, _) => publish.unwrap_or_default(),
    };
    Ok(Chosen { firewall, publish, why })
}

fn choose_firewall(
    choice: FirewallChoice,
    host_context: &HostContext,
    owner: &str,
    iptables: &[Option<IptablesState>; 2],
) -> Result<(Option<Arc<Firewall>>, String), ChoiceError> {
    let open = |kind| {
        let firewall = Firewall::new(kind, host_context.networks(), owner)?;
        let firewall =
            if Feature::OwnedTables.is_forced_off() { firewall.shared() } else { firewall };
        io::Result::Ok(Arc::new(if Feature::Gates.is_forced_off() {
            firewall.ungated()
        } else {
            firewall
        }))
    };
    let wanted = match choice {
        FirewallChoice::None => return Ok((None, "requested".to_owned())),
        FirewallChoice::Auto if host_context.is_rootless() => {
            return Ok((
                None,
                "networks of an ordinary user are separate from the host".to_owned(),
            ));
        }
        FirewallChoice::Auto => None,
        FirewallChoice::Nftables => Some(FirewallKind::Nftables),
        FirewallChoice::Iptables => Some(FirewallKind::Iptables),
    };
    if let Some(kind) = wanted {
        if host_context.is_rootless() {
            return Err(ChoiceError::Rootless(kind));
        }
        let firewall = open(kind).map_err(|source| ChoiceError::Unavailable { kind, source })?;
        return Ok((Some(firewall), "requested".to_owned()));
    }
    let (order, because) = preference(iptables);
    let mut missing = Vec::new();
    for kind in order {
        match open(kind) {
            Ok(firewall) => {
                let why = if missing.is_empty() { because.to_owned() } else { missing.join("; ") };
                return Ok((Some(firewall), why));
            }
            Err(error) => missing.push(format!("no {kind}: {error}")),
        }
    }
    Ok((None, missing.join("; ")))
}

/// The order in which firewalls are tried, and the reason. iptables, if in use, may drop packets
/// that nftables accepts.
pub fn preference(iptables: &[Option<IptablesState>; 2]) -> ([FirewallKind; 2], &'static str) {
    let any = |is: fn(&IptablesState) -> bool| iptables.iter().flatten().any(is);
    let because = if any(|state| state.forward_drops) {
        "the chain FORWARD of iptables has the policy DROP"
    } else if any(|state| state.docker_user.has_rules()) {
        "the chain DOCKER-USER has rules"
    } else {
        return ([FirewallKind::Nftables, FirewallKind::Iptables], "it is available");
    };
    ([FirewallKind::Iptables, FirewallKind::Nftables], because)
}

/// The address of the gateway with the prefix length of its subnet.
fn gateway_in(subnet: &Subnet) -> IpNet {
    IpNet::new(subnet.gateway, subnet.subnet.prefix_len()).unwrap_or(subnet.subnet)
}

/// The firewall properties of the networks of `desired`.
pub fn zones(desired: &Desired) -> Vec<Zone> {
    let zone = |network: &Network| Zone {
        bridge: network.bridge.name.clone(),
        subnets: network.subnets.iter().map(gateway_in).collect(),
        internal: network.internal,
        // The programs of an overlay network verify its sandboxes as well.
        verified: network.overlay.is_some() || desired.verifies_sources(&network.name),
        overlay: network.overlay.is_some(),
    };
    desired.networks.iter().map(zone).collect()
}

/// The link-local addresses of the endpoints on each network of `desired`, in the order of
/// [`zones`]. They belong to no subnet.
pub fn link_local_members(desired: &Desired) -> Vec<BTreeSet<Ipv6Addr>> {
    let mut by_network: BTreeMap<&str, BTreeSet<Ipv6Addr>> = BTreeMap::new();
    for attachment in desired.endpoints.iter().flat_map(|endpoint| &endpoint.attachments) {
        let members = by_network.entry(&attachment.network).or_default();
        members.insert(attachment.inside.mac.link_local());
    }
    let members = |network: &Network| by_network.remove(&*network.name).unwrap_or_default();
    desired.networks.iter().map(members).collect()
}

/// The addresses to which the kernel may translate published ports of `endpoint`: those on the
/// networks of its default routes, by which its replies leave.
pub fn targets(endpoint: &Endpoint) -> Vec<IpAddr> {
    let attachments = endpoint.attachments.iter().filter(|attachment| attachment.default_route);
    attachments.flat_map(|attachment| &attachment.addresses).map(IpNet::addr).collect()
}

/// The firewall opening of the published port `label`, which is forwarded to `container_port`.
/// `targets` are the addresses to which the kernel may translate; none if sockets serve the port.
pub fn opening(label: PublishLabel, container_port: u16, targets: &[IpAddr]) -> Opening {
    let at = label.address();
    // The kernel does not forward connections from loopback.
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
    use tidegate_netsetup::{DockerUser, UserRule};

    fn with_rules(rules: &[&str]) -> [Option<IptablesState>; 2] {
        let rules =
            rules.iter().map(|rule| UserRule { text: format!("-A DOCKER-USER {rule}") }).collect();
        [
            Some(IptablesState {
                docker_user: DockerUser { rules, forward: true, ..DockerUser::default() },
                ..IptablesState::default()
            }),
            None,
        ]
    }

    #[test]
    fn iptables_is_preferred_if_it_drops_forwarded_packets_or_has_user_rules() {
        let first = |state| preference(&state).0[0];
        assert_eq!(first([None, None]), FirewallKind::Nftables);
        assert_eq!(first(with_rules(&[])), FirewallKind::Nftables);
        assert_eq!(first(with_rules(&["-j DROP"])), FirewallKind::Iptables);
        let drops = IptablesState { forward_drops: true, ..IptablesState::default() };
        assert_eq!(first([None, Some(drops)]), FirewallKind::Iptables);
    }

    #[test]
    fn rules_of_docker_user_are_bypassed_by_packets_that_do_not_traverse_it() {
        let with_rules = |rules: &[&str]| {
            let rule = |rule: &&str| UserRule { text: format!("-A DOCKER-USER {rule}") };
            let rules = rules.iter().map(rule).collect();
            [Some(DockerUser { rules, forward: true, ..DockerUser::default() }), None]
        };
        let (about_clients, about_containers) =
            ("-s 203.0.113.0/24 -j DROP", "-p tcp --dport 80 -j DROP");
        let all = with_rules(&[about_clients, about_containers]);
        let bypassed = |kind| BypassedRules::of(kind, &all).any().map(str::to_owned);
        let iptables = Some(FirewallKind::Iptables);
        assert_eq!(bypassed(iptables), Some(format!("-A DOCKER-USER {about_containers}")));
        assert_eq!(
            bypassed(Some(FirewallKind::Nftables)),
            Some(format!("-A DOCKER-USER {about_clients}"))
        );
        assert_eq!(bypassed(None), bypassed(Some(FirewallKind::Nftables)));
        assert_eq!(BypassedRules::of(iptables, &with_rules(&[about_clients])).any(), None);

        let elsewhere = all.clone().map(|chain| {
            let chain = chain?;
            Some(DockerUser {
                elsewhere: chain.rules,
                forward_elsewhere: true,
                ..DockerUser::default()
            })
        });
        let other = BypassedRules::of(iptables, &elsewhere);
        assert_eq!(other.any(), Some(&*format!("-A DOCKER-USER {about_clients}")));
        assert!(other.forward[0], "the kernel forwards through the chain of the other variant");

        let bypassed = BypassedRules::of(None, &all);
        let at = |at: &str, to: Option<&str>| {
            let at: SocketAddr = at.parse().unwrap();
            let to = to.map(|to| to.parse().unwrap());
            Opening { protocol: Protocol::Tcp, address: at.ip(), port: at.port(), to }
        };
        assert!(bypassed.by(&at("0.0.0.0:80", None)).is_some());
        assert_eq!(bypassed.by(&at("0.0.0.0:80", Some("10.9.0.2:80"))), None, "forwarded");
        assert_eq!(bypassed.by(&at("127.0.0.1:80", None)), None, "the host itself");
        assert_eq!(bypassed.by(&at("[::]:80", None)), None, "no rule of that family");
        assert!(bypassed.holds_when_forwarded(&at("0.0.0.0:80", None)));
        assert!(!bypassed.holds_when_forwarded(&at("[::]:80", None)), "no jump from FORWARD");
    }

    #[test]
    fn the_kernel_translates_to_the_same_family_and_never_from_loopback() {
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
