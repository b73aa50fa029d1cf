//! Commands on the networks of a running instance.
//!
//! ```text
//! command ─► control::apply ─► changes ─► executed one by one ─► committed to the store ─► answered
//!                 │ refused                    │ failed                  │ failed
//!                 ▼                            ▼                         ▼
//!               error                   executed changes are reverted: error
//! ```
//!
//! A command that is answered is in force and durable. One that only removes is committed before it
//! is executed. After a crash in between, the next process removes what the journal lists beyond
//! the stored state.

use super::endpoint_work::Progress;
use super::initial::{host_id, random_bytes, targets_of};
use super::stored::{addresses_of, endpoint_dns, is_of_a_process, network_dns};
use super::{ENDPOINT_DESCRIPTORS, Instance, bridge_indexes, egress};
use crate::api::{Problem, Reserved, blocking, label_of, reserve_port};
use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tidegate_control::{
    self as control, Change, Command, Endpoint, Name, Network, PublishedPort, Quarantine, Refusal,
    State, Store, Surroundings,
};
use tidegate_netns::{Namespace, drop_in_background};
use tidegate_netsetup::{Observed, SetupError};
use tidegate_proxy::{GatewayAcl, Listener};
use tidegate_publish::firewall::{link_local_members, zones};
use tidegate_publish::publisher::{OpenPort, PublishTarget};
use tokio::sync::watch;
use tokio::time::timeout;

/// Maximum time that the answer to a command waits for the DNS server of a new endpoint. Root in
/// the endpoint can delay it, and it starts later then.
const DNS_WAIT: Duration = Duration::from_secs(1);

/// Time between a command and the check of the host.
const VERIFY_DELAY: Duration = Duration::from_millis(300);

/// The state of the networks, and where it is kept.
pub(super) struct Owner {
    state: watch::Sender<Arc<State>>,
    /// `None` for a project in the foreground, whose networks end with the process.
    store: Option<Store>,
    quarantine: Quarantine,
    /// Endpoints of the state whose namespace does not exist.
    pub(super) absent: BTreeSet<Name>,
}

impl Owner {
    /// `state` has a sender, because readers subscribe before the owner exists.
    pub(super) fn new(
        state: watch::Sender<Arc<State>>,
        store: Option<Store>,
        absent: BTreeSet<Name>,
    ) -> Self {
        Self { state, store, quarantine: Quarantine::new(), absent }
    }

    pub(super) fn state(&self) -> Arc<State> {
        Arc::clone(&self.state.borrow())
    }

    fn set_state(&self, state: State) {
        self.state.send_replace(Arc::new(state));
    }

    /// Returns the state after `command`, without any effect.
    pub(super) fn try_out(&self, command: &Command, observed: &Observed) -> Result<State, Problem> {
        let mut surroundings = Surroundings {
            observed,
            host_id: host_id(),
            random: &mut random_bytes,
            now: Instant::now(),
            quarantine: &mut self.quarantine.clone(),
        };
        let decided = control::apply(&self.state(), command, &mut surroundings);
        decided.map_err(|refusal| refused(&refusal))
    }

    /// Returns whether `command` would be refused.
    pub(super) fn check(&self, command: &Command) -> Result<(), Problem> {
        self.try_out(command, &Observed::default()).map(drop)
    }

    /// Returns the state after `command` on a host like `observed`.
    pub(super) fn decide(
        &mut self,
        command: &Command,
        observed: &Observed,
    ) -> Result<State, Problem> {
        let state = self.state();
        let mut surroundings = Surroundings {
            observed,
            host_id: host_id(),
            random: &mut random_bytes,
            now: Instant::now(),
            quarantine: &mut self.quarantine,
        };
        control::apply(&state, command, &mut surroundings).map_err(|refusal| refused(&refusal))
    }

    /// Records the change from `old` to `new` durably, if there is a store.
    fn commit(&mut self, old: &State, new: &State) -> Result<(), Problem> {
        let Some(store) = &mut self.store else { return Ok(()) };
        store.commit(old, new).map_err(|error| Problem::failed(&error))
    }
}

/// Why an endpoint was not attached to an overlay network.
pub(super) enum Refused {
    /// Another host has claimed a chosen address meanwhile.
    AddressTaken(Problem),
    Other(Problem),
}

impl From<Problem> for Refused {
    fn from(problem: Problem) -> Self {
        Self::Other(problem)
    }
}

impl Instance {
    /// Executes `command` on this host. `reserved` are the sockets of the ports that it publishes.
    ///
    /// # Errors
    /// The command was refused or failed, and changed nothing.
    pub(super) async fn local_command(
        &mut self,
        command: &Command,
        mut reserved: Reserved,
    ) -> Result<(), Problem> {
        if self.owner.store.is_none() {
            return Err(Problem::conflict(&format!(
                "project {:?} runs in the foreground and is changed by its Compose file only; networks and endpoints \
                 are added at run time to a daemon (tidegate daemon)",
                self.project
            )));
        }
        let observed = match command {
            Command::CreateNetwork(_) | Command::ApplyProject(_) => {
                self.setup.surroundings().await.map_err(|error| Problem::failed(&error))?
            }
            _ => Observed::default(),
        };
        let old = self.owner.state();
        let new = self.owner.decide(command, &observed)?;
        self.execute(&old, new, &mut reserved).await
    }

    /// Changes the networks from `old`, the current state, to `new`.
    ///
    /// # Errors
    /// The change failed and was reverted.
    pub(super) async fn execute(
        &mut self,
        old: &State,
        new: State,
        reserved: &mut Reserved,
    ) -> Result<(), Problem> {
        let changes = control::changes(old, &new);
        // After a crash, the next daemon removes from the host what the store lacks, but it cannot
        // attach an endpoint again whose process may have been replaced. So the store never
        // contains an object that is being removed.
        let removes = changes.iter().all(is_removal);
        if removes {
            self.owner.commit(old, &new)?;
        }
        let mut executed = Vec::new();
        let mut result = Ok(());
        for change in changes {
            result = self.execute_change(&change, reserved).await;
            if result.is_err() {
                break;
            }
            executed.push(change);
        }
        if result.is_ok() && !removes {
            result = self.owner.commit(old, &new);
        }
        if result.is_err() {
            for change in executed.iter().rev().map(inverse) {
                if let Err(problem) = self.execute_change(&change, &mut Reserved::new()).await {
                    tracing::error!("a failed command could not be reverted: {problem}");
                }
            }
            if removes && let Err(problem) = self.owner.commit(&new, old) {
                tracing::error!("a failed command could not be reverted: {problem}");
            }
            self.show();
            return result;
        }
        self.owner.set_state(new);
        self.show();
        // The check of the host verifies the changes. It follows a burst of commands, because its
        // cost depends on the number of all objects.
        if !self.schedule.awaits_host() {
            self.schedule.host_changed(tokio::time::Instant::now() + VERIFY_DELAY);
        }
        Ok(())
    }

    /// Records that the namespace of `endpoint` is at `path` now.
    ///
    /// # Errors
    /// It could not be recorded durably.
    pub(super) fn record_path(&mut self, endpoint: &str, path: &Path) -> Result<(), Problem> {
        let old = self.owner.state();
        let known = old.endpoints().iter().find(|(_, known)| known.setup.name == endpoint);
        let Some((name, _)) = known.filter(|(_, known)| known.namespace != path) else {
            return Ok(());
        };
        let command = Command::Relocate { endpoint: name.clone(), namespace: path.to_owned() };
        let new = self.owner.decide(&command, &Observed::default())?;
        self.owner.commit(&old, &new).map_err(|error| {
            Problem::failed(&format!(
                "endpoint {endpoint} is attached, but its path was not stored: {error}"
            ))
        })?;
        self.owner.set_state(new);
        Ok(())
    }

    /// Publishes the current networks for the API and the metrics.
    fn show(&self) {
        self.up.shown.send_replace(Arc::new(self.up.layout.desired.clone()));
    }

    async fn execute_change(
        &mut self,
        change: &Change,
        reserved: &mut Reserved,
    ) -> Result<(), Problem> {
        match change {
            Change::AddNetwork(network) => self.add_network(network).await,
            Change::RemoveNetwork(network) => self.remove_network(&network.setup.name).await,
            Change::AddEndpoint(endpoint) => self.add_endpoint(endpoint).await,
            Change::RemoveEndpoint(endpoint) => self.remove_endpoint(endpoint).await,
            Change::OpenPort { endpoint, port } => {
                let listener = reserved.remove(port);
                self.open_port(endpoint, *port, listener).await
            }
            Change::ClosePort { port, .. } => {
                self.close_port(*port).await;
                Ok(())
            }
            // Only its path is recorded: the endpoint has been moved before.
            Change::MoveEndpoint { new, .. } => {
                let name = new.setup.name.as_str();
                self.up.adopted.set(name, new.namespace.clone(), false);
                Ok(())
            }
        }
    }

    async fn add_network(&mut self, network: &Network) -> Result<(), Problem> {
        let setup = &network.setup;
        self.up.layout.desired.networks.push(setup.clone());
        let added = self.add_network_parts(network).await;
        if added.is_err() {
            self.remove_network(&setup.name).await?;
        } else {
            tracing::info!(network = setup.name, bridge = setup.bridge.name, "network is up");
        }
        added
    }

    async fn add_network_parts(&mut self, network: &Network) -> Result<(), Problem> {
        self.extend(&[]).await?;
        let verified = self.up.layout.desired.verifies_sources(&network.setup.name);
        self.refresh_networks().await?;
        let dns = network_dns(network);
        let added = self.up.names.add_network(&network.setup, &dns, verified);
        added.map_err(|error| Problem::failed(&format!("{error:#}")))
    }

    async fn remove_network(&mut self, name: &str) -> Result<(), Problem> {
        self.up.names.remove_network(name);
        let before = self.up.layout.desired.clone();
        self.up.layout.desired.networks.retain(|network| network.name != name);
        let retracted = self.setup.retract(&before, &self.up.layout.desired).await;
        let extended = self.extend(&[]).await;
        self.refresh_networks().await?;
        retracted.map_err(setup_problem)?;
        extended?;
        tracing::info!(network = name, "network removed");
        Ok(())
    }

    /// Creates what the networks and the endpoints in `names` lack, after the rules of the firewall
    /// were adapted to the networks.
    async fn extend(&mut self, names: &[&str]) -> Result<(), Problem> {
        let desired = &self.up.layout.desired;
        if let Some(firewall) = &self.chosen.firewall {
            firewall.set_zones(zones(desired));
            firewall.set_link_local_members(link_local_members(desired));
        }
        let names = names.iter().map(|name| (*name).to_owned()).collect();
        self.setup.extend(desired, &names).await.map(drop).map_err(setup_problem)
    }

    /// Adapts access checks, gateways of published ports and the engine to the networks.
    async fn refresh_networks(&mut self) -> Result<(), Problem> {
        let layout = &self.up.layout;
        let indexes = bridge_indexes(layout, &self.host);
        let indexes = indexes.map_err(|error| Problem::failed(&error))?;
        self.up.names.resolver().set_bridges(indexes.values().copied());
        self.up.gateway_networks.set_networks(layout.gateway_networks(&indexes));
        if let Some(egress) = &mut self.up.egress {
            let observed = self.setup.surroundings().await;
            egress.update_policy(layout, &observed.map_err(|error| Problem::failed(&error))?);
        }
        let subnets = layout.desired.networks.iter().flat_map(|network| &network.subnets);
        let gateways = subnets.map(|subnet| subnet.gateway).collect();
        let publisher = Arc::clone(&self.up.publisher);
        blocking(move || publisher.set_gateways(gateways)).await?.map_err(Problem::from)
    }

    async fn add_endpoint(&mut self, endpoint: &Endpoint) -> Result<(), Problem> {
        let namespace = match endpoint.name.is_sandbox() {
            true => Namespace::create().map_err(|error| Problem::failed(&error))?,
            false => Namespace::from_path(&endpoint.namespace)
                .map_err(|error| Problem::bad_request(&error))?,
        };
        let taken = |one: &tidegate_netsetup::Endpoint| {
            let other = self.up.publisher.namespace(&one.name);
            other.is_some_and(|other| other.id() == namespace.id())
        };
        if let Some(other) = self.up.layout.desired.endpoints.iter().find(|one| taken(one)) {
            return Err(Problem::conflict(&format!(
                "endpoint {}: its network namespace is attached as {} already; detach that first",
                endpoint.name, other.name
            )));
        }
        let name = endpoint.setup.name.clone();
        self.up.publisher.reserve_for_endpoint(&name, ENDPOINT_DESCRIPTORS)?;
        self.setup.kernel().add_endpoint(&name, namespace.clone());
        self.up.layout.desired.endpoints.push(endpoint.setup.clone());
        self.up.layout.addresses.insert(name.clone(), addresses_of(endpoint));
        let added = self.add_endpoint_parts(endpoint, &namespace).await;
        if added.is_err() {
            self.remove_endpoint(endpoint).await?;
            return added;
        }
        for attachment in &endpoint.setup.attachments {
            tracing::info!(endpoint = name, network = attachment.network, "attached");
        }
        Ok(())
    }

    async fn add_endpoint_parts(
        &mut self,
        endpoint: &Endpoint,
        namespace: &Namespace,
    ) -> Result<(), Problem> {
        let name = &endpoint.setup.name;
        // Flows of previous owners of its addresses have ended. Where sources are not verified,
        // others may have used the addresses since.
        let networks = endpoint.setup.attachments.iter().map(|one| &one.network);
        let desired = &self.up.layout.desired;
        if !networks.into_iter().all(|network| desired.verifies_sources(network)) {
            self.end_flows_of(&endpoint.setup).await?;
        }
        self.extend(&[name]).await?;
        self.verify_sources(endpoint);
        let added = self.up.names.add_endpoint(&endpoint.setup, &endpoint_dns(endpoint));
        added.map_err(|error| Problem::failed(&format!("{error:#}")))?;
        let networks: Vec<String> = self.up.layout.networks_of(name).collect();
        let acl = GatewayAcl::new(Arc::clone(&self.up.gateway_networks), networks);
        let target = PublishTarget::new(namespace.clone(), &addresses_of(endpoint), acl)
            .translated_to(targets_of(&self.up.layout, name));
        let behind_engine = egress::addresses_behind_engine(&self.up.layout, name);
        self.up.publisher.add_endpoint(name, target.behind_engine(behind_engine));
        if !endpoint.name.is_sandbox() {
            self.up.adopted.set(name, endpoint.namespace.clone(), false);
        }
        if let Some(egress) = &self.up.egress {
            egress.update_ports(&self.up.layout);
        }
        super::control::watch(&mut self.watch, name, namespace);
        if let Some(server) = self.up.names.new_server(name, namespace) {
            self.start_work(name, || super::control::Outcome::Served(server.start()));
            let _ = timeout(DNS_WAIT, self.await_work(name)).await;
        }
        Ok(())
    }

    /// Handles results of work until none is running for `endpoint`.
    async fn await_work(&mut self, endpoint: &str) {
        while self.work.is_busy(endpoint) {
            let progress: Progress<_> = self.work.next().await;
            self.note_progress(progress);
        }
    }

    async fn remove_endpoint(&mut self, endpoint: &Endpoint) -> Result<(), Problem> {
        let name = &endpoint.setup.name;
        self.watch.unwatch(name);
        self.work.abandon(name);
        self.attaching.remove(name);
        self.up.adopted.remove(name);
        let (publisher, of) = (Arc::clone(&self.up.publisher), name.clone());
        // Removes state from the namespace of the endpoint.
        blocking(move || publisher.remove_endpoint(&of)).await?;
        if let Some(serving) = self.up.names.remove_endpoint(&endpoint.setup) {
            drop_in_background(serving);
        }
        let is_attached = self.up.layout.desired.endpoints.iter().any(|one| one.name == *name);
        self.up.layout.desired.endpoints.retain(|one| one.name != *name);
        self.up.layout.addresses.remove(name);
        self.owner.absent.remove(&endpoint.name);
        if !is_attached {
            return self.end_flows_of(&endpoint.setup).await;
        }
        self.verify_sources(endpoint);
        let removed = self.setup.remove_endpoint(name).await;
        if endpoint.setup.attachments.iter().any(|attachment| attachment.any_address) {
            self.extend(&[]).await?;
        }
        removed.map_err(setup_problem)?;
        self.end_flows_of(&endpoint.setup).await?;
        tracing::info!(endpoint = name, "detached");
        Ok(())
    }

    /// Ends the flows of the addresses of `endpoint`. Otherwise the next owner of an address would
    /// receive their packets.
    pub(super) async fn end_flows_of(
        &mut self,
        endpoint: &tidegate_netsetup::Endpoint,
    ) -> Result<(), Problem> {
        let attachments = endpoint.attachments.iter();
        let addresses: Vec<IpAddr> = attachments
            .flat_map(|one| {
                let own = one.addresses.iter().map(ipnet::IpNet::addr);
                own.chain([IpAddr::from(one.inside.mac.link_local())])
            })
            .collect();
        let firewall = self.chosen.firewall.clone();
        let engine = self.up.egress.as_ref().map(|egress| Arc::clone(egress.nat()));
        let publisher = Arc::clone(&self.up.publisher);
        let ended = blocking(move || {
            publisher.end_clients(&addresses);
            if let Some(engine) = engine {
                engine.end_flows_of(addresses.clone());
            }
            firewall.map_or(Ok(()), |firewall| firewall.end_flows_of(&addresses))
        });
        if let Err(error) = ended.await? {
            let endpoint = &endpoint.name;
            tracing::warn!(endpoint, %error, "tracked flows of previous owners not ended");
        }
        // After the flows: packets of these, already translated, wait at a neighbour entry for the
        // next owner of the address.
        for attachment in &endpoint.attachments {
            let networks = &self.up.layout.desired.networks;
            let network = networks.iter().find(|network| network.name == attachment.network);
            let Some(bridge) = network.map(|network| network.bridge.name.clone()) else { continue };
            let own: Vec<IpAddr> = attachment.addresses.iter().map(ipnet::IpNet::addr).collect();
            self.setup.kernel().forget_neighbours(&bridge, &own).await;
        }
        Ok(())
    }

    /// Records whether source addresses on the networks of `endpoint` identify endpoints.
    fn verify_sources(&self, endpoint: &Endpoint) {
        for attachment in &endpoint.setup.attachments {
            let verified = self.up.layout.desired.verifies_sources(&attachment.network);
            self.up.names.resolver().set_sources_verified(&attachment.network, verified);
        }
    }

    async fn open_port(
        &mut self,
        endpoint: &Endpoint,
        port: PublishedPort,
        listener: Option<Listener>,
    ) -> Result<(), Problem> {
        let listener = match listener {
            Some(listener) => listener,
            None => reserve_port(&port)?,
        };
        let (publisher, name) = (Arc::clone(&self.up.publisher), endpoint.setup.name.clone());
        let listeners = vec![(listener, port.container_port)];
        let opened = blocking(move || publisher.adopt(&name, port.protocol, listeners)).await?;
        opened?;
        let to = port.container_port;
        tracing::info!(publish = %port, endpoint = endpoint.setup.name, to, "published");
        Ok(())
    }

    async fn close_port(&mut self, port: PublishedPort) {
        let label = label_of(&port);
        let open = self.up.publisher.ports().into_iter().find(|open| open.label == label);
        let Some(OpenPort { id, .. }) = open else { return };
        let publisher = Arc::clone(&self.up.publisher);
        if blocking(move || publisher.unpublish(id)).await.is_ok() {
            tracing::info!(publish = %port, "port closed");
        }
    }

    /// Attaches endpoints whose namespace has appeared.
    pub(super) async fn attach_absent(&mut self) {
        for name in self.owner.absent.clone() {
            let Some(endpoint) = self.owner.state().endpoints().get(&name).map(Arc::clone) else {
                self.owner.absent.remove(&name);
                continue;
            };
            if is_of_a_process(&endpoint.namespace)
                || Namespace::from_path(&endpoint.namespace).is_err()
            {
                continue;
            }
            let attached = self.add_endpoint(&endpoint).await;
            let text = name.to_string();
            if let Err(problem) = attached {
                self.note_health(text.clone(), Some(problem.to_string()));
                // `add_endpoint` has removed it from all of these.
                self.up.names.add_waiting_endpoint(&endpoint.setup, &endpoint_dns(&endpoint));
                self.owner.absent.insert(name);
                self.up.adopted.set(&text, endpoint.namespace.clone(), true);
                continue;
            }
            self.owner.absent.remove(&name);
            self.show();
        }
        self.open_missing_ports().await;
    }

    /// Opens ports of the state that are not open: those of endpoints that were absent, and those
    /// that another program used.
    async fn open_missing_ports(&mut self) {
        if self.owner.store.is_none() {
            return;
        }
        let open = self.up.publisher.ports();
        if open.len() >= self.owner.state().ports().count() {
            return;
        }
        let open: BTreeSet<_> = open.into_iter().map(|port| port.label).collect();
        let state = self.owner.state();
        let missing = state.ports().filter(|(endpoint, port)| {
            !self.owner.absent.contains(&endpoint.name) && !open.contains(&label_of(port))
        });
        let missing: Vec<_> =
            missing.map(|(endpoint, port)| (Arc::clone(endpoint), *port)).collect();
        for (endpoint, port) in missing {
            if let Err(problem) = self.open_port(&endpoint, port, None).await {
                tracing::debug!(endpoint = %endpoint.name, publish = %port, "not published: {problem}");
            }
        }
    }

    /// Attaches the endpoint `name`, whose namespace did not exist, in the namespace at `path`.
    pub(super) async fn attach_at(
        &mut self,
        name: &str,
        path: &Path,
    ) -> Option<Result<(), Problem>> {
        let name = self.owner.absent.iter().find(|absent| absent.to_string() == name)?.clone();
        let endpoint = self.owner.state().endpoints().get(&name).map(Arc::clone)?;
        let moved = Endpoint { namespace: path.to_owned(), ..(*endpoint).clone() };
        let attached = self.add_endpoint(&moved).await;
        if attached.is_err() {
            self.up.names.add_waiting_endpoint(&endpoint.setup, &endpoint_dns(&endpoint));
            self.owner.absent.insert(name);
            self.up.adopted.set(&moved.setup.name, endpoint.namespace.clone(), true);
            return Some(attached);
        }
        self.owner.absent.remove(&name);
        self.show();
        let recorded = self.record_path(&moved.setup.name, path);
        self.open_missing_ports().await;
        Some(recorded)
    }
}

fn is_removal(change: &Change) -> bool {
    matches!(
        change,
        Change::ClosePort { .. } | Change::RemoveEndpoint(_) | Change::RemoveNetwork(_)
    )
}

/// The change that reverts `change`.
fn inverse(change: &Change) -> Change {
    match change {
        Change::AddNetwork(network) => Change::RemoveNetwork(Arc::clone(network)),
        Change::RemoveNetwork(network) => Change::AddNetwork(Arc::clone(network)),
        Change::AddEndpoint(endpoint) => Change::RemoveEndpoint(Arc::clone(endpoint)),
        Change::RemoveEndpoint(endpoint) => Change::AddEndpoint(Arc::clone(endpoint)),
        Change::OpenPort { endpoint, port } => {
            Change::ClosePort { endpoint: Arc::clone(endpoint), port: *port }
        }
        Change::ClosePort { endpoint, port } => {
            Change::OpenPort { endpoint: Arc::clone(endpoint), port: *port }
        }
        Change::MoveEndpoint { old, new } => {
            Change::MoveEndpoint { old: Arc::clone(new), new: Arc::clone(old) }
        }
    }
}

fn refused(refusal: &Refusal) -> Problem {
    match refusal {
        Refusal::UnknownNetwork(_)
        | Refusal::UnknownEndpoint(_)
        | Refusal::UnknownProject(_)
        | Refusal::NotPublished { .. } => Problem::not_found(refusal),
        Refusal::ProjectExists(_)
        | Refusal::NetworkExists(_)
        | Refusal::EndpointExists(_)
        | Refusal::NetworkInUse { .. }
        | Refusal::TooMany { .. }
        | Refusal::SubnetsOverlap { .. }
        | Refusal::RouteOverlaps { .. }
        | Refusal::NoSubnet { .. }
        | Refusal::BridgeTaken { .. }
        | Refusal::AddressTaken { .. }
        | Refusal::NoAddress { .. }
        | Refusal::NamespaceTaken { .. }
        | Refusal::NoInterfaceName(_)
        | Refusal::PortTaken { .. } => Problem::conflict(refusal),
        _ => Problem::bad_request(refusal),
    }
}

fn setup_problem(error: SetupError) -> Problem {
    match error {
        SetupError::Conflict(_) => Problem::conflict(&error),
        SetupError::Apply(ref failed)
            if failed.source.source.kind() == std::io::ErrorKind::TimedOut =>
        {
            Problem::unavailable(&error)
        }
        error => Problem::failed(&error),
    }
}
