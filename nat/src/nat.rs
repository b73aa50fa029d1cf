//! A running engine, as its owner holds it.

use crate::engine::{Engine, Secrets};
use crate::error::StartError;
use crate::io::driver::{Driver, Message};
use crate::io::sockets::{Kernel, probe};
use crate::io::tun::Tun;
use crate::metrics::Stats;
use crate::policy::Policy;
use crate::settings::{Capabilities, Settings};
use crate::siphash::HashKey;
use std::io;
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::Instant;
use tidegate_netns::{AddressBook, Namespace};
use tidegate_reactor::{Descriptors, EventLoop, Sender};

/// A NAT engine on a thread of its own. Dropped, it resets its connections and ends, and its device is gone.
#[derive(Debug)]
pub struct Nat {
    stats: Arc<Stats>,
    capabilities: Capabilities,
    sender: Sender<Message>,
    thread: Option<JoinHandle<()>>,
}

impl Nat {
    /// Starts an engine between `tun` and the network of namespace `host`, whose sockets count against `descriptors`.
    ///
    /// The settings' MTU is that of the device, and of the capabilities those are used that device and kernel have.
    ///
    /// # Errors
    /// [`StartError`] says what is missing.
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
        let secrets = secrets().map_err(StartError::Loop)?;
        let addresses = AddressBook::of(host).map_err(StartError::Namespace)?;
        let (event_loop, sender) = EventLoop::new().map_err(StartError::Loop)?;
        let epoll = event_loop.epoll().try_clone().map_err(StartError::Loop)?;
        let (started, has_started) = mpsc::channel();
        let (host, counted) = (host.clone(), Arc::clone(&stats));
        let run = move || {
            // In the host's network for good: a socket then costs no way there and back.
            let entered = if host.is_current() { Ok(()) } else { host.enter() };
            let made = entered.map_err(StartError::Namespace).and_then(|()| {
                let kernel = Kernel::new(tun.descriptor, epoll, addresses, descriptors, &settings);
                let engine = Engine::new(kernel, settings, secrets, counted, Instant::now());
                Driver::new(engine, event_loop.epoll()).map_err(StartError::Loop)
            });
            let (driver, result) = match made {
                Ok(driver) => (Some(driver), Ok(())),
                Err(error) => (None, Err(error)),
            };
            // The one who waits for it is `start`, right here.
            let _ = started.send(result);
            if let Some(mut driver) = driver
                && let Err(error) = event_loop.run(&mut driver)
            {
                tracing::error!(%error, "the NAT engine's loop ended");
            }
        };
        let thread =
            std::thread::Builder::new().name("tidegate-nat".into()).spawn(run).map_err(StartError::Loop)?;
        let result = has_started.recv();
        let panicked = || StartError::Loop(io::Error::other("the NAT engine's thread panicked"));
        result.unwrap_or_else(|_| Err(panicked()))?;
        tracing::info!(?capabilities, "NAT engine started");
        Ok(Self { stats, capabilities, sender, thread: Some(thread) })
    }

    /// What it counts.
    #[must_use]
    pub fn stats(&self) -> &Arc<Stats> {
        &self.stats
    }

    /// What it makes use of.
    #[must_use]
    pub fn capabilities(&self) -> Capabilities {
        self.capabilities
    }

    /// Who may go where from now on. Flows that are there go on.
    pub fn set_policy(&self, policy: Policy) {
        // A loop that has ended has no flows.
        let _ = self.sender.send(Message::Policy(Box::new(policy)));
    }

    /// Ends it; returns when the device is gone.
    pub fn stop(self) {}
}

impl Drop for Nat {
    fn drop(&mut self) {
        let _ = self.sender.send(Message::Stop);
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the NAT engine's thread panicked");
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
