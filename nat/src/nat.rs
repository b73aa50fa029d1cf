//! Handle of a running engine.

use crate::engine::classify::QUANTUM;
use crate::engine::inbound::can_be_a_guest;
use crate::engine::{Engine, Secrets};
use crate::error::StartError;
use crate::fair_queue::QueueLimits;
use crate::forward::{Forward, ForwardId, ForwardSource, Guard, MAX_FORWARDS, PublishError};
use crate::io::driver::{Driver, Message, Publish};
use crate::io::sockets::{Kernel, bound_to, probe, reserve_port};
use crate::io::tun::{Tun, open_driver};
use crate::metrics::{Figures, ForwardStats, Stats};
use crate::policy::Policy;
use crate::settings::{Capabilities, Settings};
use crate::siphash::HashKey;
use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::Instant;
use tidegate_model::Protocol;
use tidegate_netns::{AddressBook, Namespace};
use tidegate_reactor::{Descriptors, EventLoop, Sender};

/// A NAT engine on its own thread. Dropping it resets all connections and removes the device.
#[derive(Debug)]
pub struct Nat {
    figures: Figures,
    capabilities: Capabilities,
    sender: Sender<Message>,
    thread: Option<JoinHandle<()>>,
    host: Namespace,
    forwards: Mutex<Forwards>,
}

/// Published ports.
#[derive(Debug, Default)]
struct Forwards {
    last: u32,
    open: BTreeMap<ForwardId, (Forward, Arc<ForwardStats>)>,
    /// The addresses of the engine, from the policy.
    gateways: Vec<IpAddr>,
}

impl Nat {
    /// Starts an engine between `tun` and the network namespace `host`. Its sockets count against
    /// `descriptors`.
    ///
    /// The MTU of the settings is replaced by that of the device. Only capabilities that both
    /// device and kernel support are used.
    ///
    /// # Errors
    /// [`StartError`].
    pub fn start(
        mut settings: Settings,
        tun: Tun,
        host: &Namespace,
        descriptors: Arc<Descriptors>,
    ) -> Result<Self, StartError> {
        settings.mtu = tun.mtu();
        settings.capabilities = settings.capabilities.and(tun.capabilities()).and(probe());
        let capabilities = settings.capabilities;
        let stats = Arc::new(Stats::default());
        let (limits, network) = (settings.limits, Arc::clone(&settings.network));
        let queue = QueueLimits {
            items: limits.queued_packets,
            bytes: limits.queued_bytes,
            quantum: QUANTUM,
        };
        let figures = Figures {
            stats: Arc::clone(&stats),
            flows_limit: limits.flows as u64,
            share_limit: limits.flows_per_source as u64,
            unanswered_limit: limits.unanswered_per_source as u64,
            queued_bytes_limit: limits.queued_bytes as u64,
            held_bytes_limit: limits.held_bytes as u64,
            sources_limit: limits.sources as u64,
            descriptors: Arc::clone(&descriptors),
        };
        let secrets = secrets().map_err(StartError::Loop)?;
        let addresses = AddressBook::of(host).map_err(StartError::Namespace)?;
        let (event_loop, sender) = EventLoop::new().map_err(StartError::Loop)?;
        let epoll = event_loop.epoll().try_clone().map_err(StartError::Loop)?;
        let (started, has_started) = mpsc::channel();
        let gateways = settings.policy.gateways.clone();
        let forwards = Mutex::new(Forwards { gateways, ..Forwards::default() });
        let host = host.clone();
        let inside = host.clone();
        let run = move || {
            // Entering the namespace of the host permanently avoids two setns(2) calls per socket.
            let entered = if inside.is_current() { Ok(()) } else { inside.enter() };
            let made = entered.map_err(StartError::Namespace).and_then(|()| {
                let kernel = Kernel::new(tun, epoll, addresses, descriptors, &settings);
                let engine = Engine::new(kernel, settings, secrets, stats, Instant::now());
                Driver::new(engine, queue, event_loop.epoll()).map_err(StartError::Loop)
            });
            let (driver, result) = match made {
                Ok(driver) => (Some(driver), Ok(())),
                Err(error) => (None, Err(error)),
            };
            // `start` waits for this below.
            let _ = started.send(result);
            if let Some(mut driver) = driver
                && let Err(error) = event_loop.run(&mut driver)
            {
                tracing::error!(%error, "NAT engine loop ended");
            }
        };
        let thread = std::thread::Builder::new()
            .name("tidegate-nat".into())
            .spawn(run)
            .map_err(StartError::Loop)?;
        let result = has_started.recv();
        result.unwrap_or(Err(StartError::Ended))?;
        tracing::info!(network = &*network, ?capabilities, "NAT engine started");
        Ok(Self { figures, capabilities, sender, thread: Some(thread), host, forwards })
    }

    /// The counters.
    #[must_use]
    pub fn stats(&self) -> &Arc<Stats> {
        &self.figures.stats
    }

    /// The counters, with the limits of the tables.
    #[must_use]
    pub fn figures(&self) -> &Figures {
        &self.figures
    }

    /// The capabilities in use.
    #[must_use]
    pub fn capabilities(&self) -> Capabilities {
        self.capabilities
    }

    /// Replaces the device, after its link was deleted, renamed or moved. Closes the current
    /// device, then calls `open` for the new one. Flows, counters, published ports and policy are
    /// kept.
    ///
    /// # Errors
    /// Errors of `open`, and [`StartError::Interface`] if the new device is not a TUN device with
    /// the same offloads. The engine then has no device.
    pub fn replace_device(
        &self,
        open: impl FnOnce() -> Result<Tun, StartError>,
    ) -> Result<(), StartError> {
        self.set_device(open_driver().map_err(StartError::Device)?)?;
        let tun = open()?;
        let missing = self.capabilities.and(tun.capabilities()) != self.capabilities;
        if missing || tun.layer2.is_some() {
            let source = io::Error::new(
                io::ErrorKind::Unsupported,
                "offloads differ from those of the previous device",
            );
            return Err(StartError::Interface { name: tun.name().to_owned(), source });
        }
        self.set_device(tun.descriptor)
    }

    fn set_device(&self, tun: OwnedFd) -> Result<(), StartError> {
        let (done, is_done) = mpsc::channel();
        self.sender.send(Message::Device(tun, done)).map_err(|_| StartError::Ended)?;
        is_done.recv().map_err(|_| StartError::Ended)?.map_err(StartError::Loop)
    }

    /// Sets the policy. Flows of containers to destinations that it rejects end; all others
    /// continue.
    pub fn set_policy(&self, policy: Policy) {
        self.published().gateways.clone_from(&policy.gateways);
        // A loop that has ended has no flows.
        let _ = self.sender.send(Message::Policy(Box::new(policy)));
    }

    /// Ends the flows of containers with `addresses`, which may get new owners. They have ended
    /// when it returns.
    pub fn end_flows_of(&self, addresses: Vec<IpAddr>) {
        let (done, is_done) = mpsc::channel();
        if self.sender.send(Message::EndFlows(addresses, done)).is_ok() {
            // A loop that ends concurrently also ends its flows.
            let _ = is_done.recv();
        }
    }

    /// Publishes a port of the host. Clients are served when it returns.
    ///
    /// # Errors
    /// [`PublishError`]; the state is then unchanged.
    pub fn publish(&self, forward: Forward) -> Result<ForwardId, PublishError> {
        self.check(&forward)?;
        let reserve = || reserve_port(forward.protocol, forward.listen);
        let socket =
            if self.host.is_current() { reserve() } else { self.host.with(reserve).flatten() };
        let socket =
            socket.map_err(|source| PublishError::Listen { label: forward.label(), source })?;
        self.publish_on(socket, forward, None)
    }

    /// Publishes a port on a bound socket, whose address replaces [`Forward::listen`]. A TCP socket
    /// may already listen. `guard` controls access.
    ///
    /// # Errors
    /// [`PublishError`]; the socket is then closed.
    pub fn publish_on(
        &self,
        socket: OwnedFd,
        mut forward: Forward,
        guard: Option<Arc<dyn Guard>>,
    ) -> Result<ForwardId, PublishError> {
        self.check(&forward)?;
        let failed = |source| PublishError::Listen { label: forward.label(), source };
        forward.listen = bound_to(&socket).map_err(failed)?;
        let stats = Arc::new(ForwardStats::default());
        let mut forwards = self.published();
        if forwards.open.len() >= MAX_FORWARDS {
            return Err(PublishError::TooMany);
        }
        forwards.last += 1;
        let id = ForwardId(forwards.last);
        let (done, is_done) = mpsc::channel();
        let publish = Publish { id, forward, socket, guard, stats: Arc::clone(&stats), done };
        self.sender.send(Message::Publish(Box::new(publish))).map_err(|_| PublishError::Ended)?;
        match is_done.recv() {
            Ok(Ok(())) => {}
            Ok(Err(error)) if error.raw_os_error() == Some(libc::EMFILE) => {
                return Err(PublishError::Descriptors(forward.label()));
            }
            Ok(Err(source)) => return Err(PublishError::Listen { label: forward.label(), source }),
            Err(_) => return Err(PublishError::Ended),
        }
        forwards.open.insert(id, (forward, stats));
        tracing::debug!(label = %forward.label(), guest = %forward.guest, "port published");
        Ok(id)
    }

    /// Closes a published port, which is free when this returns. TCP connections continue, UDP
    /// sessions end. Returns false if there is no such port.
    pub fn unpublish(&self, id: ForwardId) -> bool {
        let mut forwards = self.published();
        if forwards.open.remove(&id).is_none() {
            return false;
        }
        let (done, is_done) = mpsc::channel();
        if self.sender.send(Message::Unpublish(id, done)).is_ok() {
            // A loop that ends concurrently also closes the port.
            let _ = is_done.recv();
        }
        true
    }

    /// The published ports, in order of publication.
    #[must_use]
    pub fn forwards(&self) -> Vec<(ForwardId, Forward)> {
        self.published().open.iter().map(|(id, (forward, _))| (*id, *forward)).collect()
    }

    /// The counters of a published port.
    #[must_use]
    pub fn forward_stats(&self, id: ForwardId) -> Option<Arc<ForwardStats>> {
        self.published().open.get(&id).map(|(_, stats)| Arc::clone(stats))
    }

    /// Checks whether `forward` is valid.
    fn check(&self, forward: &Forward) -> Result<(), PublishError> {
        let (label, guest) = (forward.label(), forward.guest);
        if forward.protocol == Protocol::Sctp {
            return Err(PublishError::Protocol(label));
        }
        if !can_be_a_guest(guest) {
            return Err(PublishError::Guest { label, guest });
        }
        let has_gateway =
            self.published().gateways.iter().any(|ip| ip.is_ipv4() == guest.is_ipv4());
        let needs_gateway =
            forward.source == ForwardSource::Gateway || forward.listen.is_ipv4() != guest.is_ipv4();
        if needs_gateway && !has_gateway {
            return Err(PublishError::NoGateway { label, guest });
        }
        Ok(())
    }

    fn published(&self) -> MutexGuard<'_, Forwards> {
        self.forwards.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Stops the engine, and returns when the device is removed.
    pub fn stop(self) {}
}

impl Drop for Nat {
    fn drop(&mut self) {
        let _ = self.sender.send(Message::Stop);
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("NAT engine thread panicked");
        }
    }
}

fn secrets() -> io::Result<Secrets> {
    let mut words = [0u64; 4];
    for word in &mut words {
        let mut bytes = [0; 8];
        rustix::rand::getrandom(&mut bytes[..], rustix::rand::GetRandomFlags::empty())?;
        *word = u64::from_ne_bytes(bytes);
    }
    let [a, b, c, d] = words;
    Ok(Secrets { table: HashKey([a, b]), sequence: HashKey([c, d]) })
}
