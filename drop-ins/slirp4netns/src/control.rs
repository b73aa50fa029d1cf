//! The event loop for everything except packets: the exit descriptor, signals, API requests, and
//! updates of the resolvers.

use super::api::{Forwarder, PortForward};
use super::api_socket::Server;
use super::resolvers::Resolvers;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tidegate_model::PublishLabel;
use tidegate_nat::{Forward, ForwardId, ForwardSource, Nat, Policy, reserve_port};

/// The event sources and their state.
pub(super) struct Control {
    pub(super) nat: Arc<Nat>,
    pub(super) policy: Policy,
    /// The caller holds the other end. When it closes, the program exits.
    pub(super) exit: Option<OwnedFd>,
    /// Receives signals.
    pub(super) signals: UnixStream,
    pub(super) resolvers: Option<Resolvers>,
    pub(super) api: Option<Server<Ports>>,
}

/// An event source.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Source {
    Exit,
    Signals,
    Resolvers,
    Api,
}

impl Control {
    /// Runs until the exit descriptor closes or a signal arrives.
    pub(super) fn run(mut self) -> io::Result<()> {
        loop {
            let (sources, ready) = self.wait()?;
            let is_ready =
                |source| sources.iter().zip(&ready).any(|(one, ready)| *one == source && *ready);
            if is_ready(Source::Exit) || is_ready(Source::Signals) {
                return Ok(());
            }
            if is_ready(Source::Resolvers) {
                self.update_resolvers();
            }
            if let Some(api) = &mut self.api {
                let first =
                    sources.iter().position(|source| *source == Source::Api).unwrap_or(ready.len());
                api.handle(&ready[first..], Instant::now());
            }
        }
    }

    /// Waits until a source is ready, or a client of the API times out.
    fn wait(&self) -> io::Result<(Vec<Source>, Vec<bool>)> {
        let input = |source, fd| (source, (fd, PollFlags::IN));
        // POLLHUP is reported without being requested.
        let exit =
            self.exit.as_ref().map(|exit| (Source::Exit, (exit.as_fd(), PollFlags::empty())));
        let resolvers =
            self.resolvers.as_ref().map(|resolvers| input(Source::Resolvers, resolvers.as_fd()));
        let api = self.api.iter().flat_map(|api| api.polled().map(|polled| (Source::Api, polled)));
        let all = exit.into_iter().chain([input(Source::Signals, self.signals.as_fd())]);
        let (sources, polled): (Vec<Source>, Vec<(BorrowedFd<'_>, PollFlags)>) =
            all.chain(resolvers).chain(api).unzip();
        let mut polled: Vec<PollFd<'_>> =
            polled.into_iter().map(|(fd, flags)| PollFd::from_borrowed_fd(fd, flags)).collect();
        let deadline = self.api.as_ref().and_then(Server::deadline);
        let left = deadline.map(|deadline| {
            // Rounded up: waking too early would cause a useless iteration.
            let left =
                deadline.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
            Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() }
        });
        match poll(&mut polled, left.as_ref()) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => polled.iter_mut().for_each(PollFd::clear_revents),
            Err(error) => return Err(error.into()),
        }
        let ready = polled.iter().map(|polled| !polled.revents().is_empty()).collect();
        Ok((sources, ready))
    }

    fn update_resolvers(&mut self) {
        let Some(resolvers) = &self.resolvers else { return };
        match resolvers.next() {
            Ok(Some(resolvers)) => {
                tracing::info!(?resolvers, "resolvers of the host changed");
                self.policy.resolvers = resolvers;
                self.nat.set_policy(self.policy.clone());
            }
            ended => {
                tracing::error!(?ended, "resolver updates of the host lost");
                self.resolvers = None;
            }
        }
    }
}

/// Forwards ports of the API through the NAT engine.
pub(super) struct Ports {
    pub(super) nat: Arc<Nat>,
    /// The source address that the container sees.
    pub(super) source: ForwardSource,
}

impl Forwarder for Ports {
    type Id = ForwardId;

    fn add(&mut self, port: PortForward) -> Option<Self::Id> {
        let PortForward { protocol, host: listen, guest } = port;
        let forward = Forward { protocol, listen, guest, source: self.source };
        let publish = PublishLabel::new(listen, protocol);
        // The engine itself would first read its namespace from `/proc`, which a sandbox does not
        // have.
        let socket = match reserve_port(protocol, listen) {
            Ok(socket) => socket,
            Err(error) => {
                tracing::warn!(%publish, %error, "port not forwarded");
                return None;
            }
        };
        let published = self.nat.publish_on(socket, forward, None);
        published.map_err(|error| tracing::warn!(%publish, %error, "port not forwarded")).ok()
    }

    fn remove(&mut self, id: Self::Id) -> bool {
        self.nat.unpublish(id)
    }
}
