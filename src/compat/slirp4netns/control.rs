//! The loop that waits for everything but packets: the caller's end, signals, requests for ports,
//! word of resolvers.

use super::api::{Forwarder, Wanted};
use super::api_socket::Server;
use super::resolvers::Resolvers;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use socket2::{Domain, Socket, Type};
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tidegate_model::{Protocol, PublishLabel};
use tidegate_nat::{Forward, ForwardId, ForwardSource, Nat, Policy};

/// What is waited for.
pub(super) struct Control {
    pub(super) nat: Arc<Nat>,
    pub(super) policy: Policy,
    /// Somebody else holds its other end: when that closes, it is over.
    pub(super) exit: Option<OwnedFd>,
    /// Where signals come to.
    pub(super) signals: UnixStream,
    pub(super) resolvers: Option<Resolvers>,
    pub(super) api: Option<Server<Ports>>,
}

/// Which of those that are polled.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Source {
    Exit,
    Signals,
    Resolvers,
    Api,
}

impl Control {
    /// Returns when it is over.
    pub(super) fn run(mut self) -> io::Result<()> {
        loop {
            let (sources, ready) = self.wait()?;
            let is_ready =
                |source| sources.iter().zip(&ready).any(|(one, ready)| *one == source && *ready);
            if is_ready(Source::Exit) || is_ready(Source::Signals) {
                return Ok(());
            }
            if is_ready(Source::Resolvers) {
                self.hear();
            }
            if let Some(api) = &mut self.api {
                let first =
                    sources.iter().position(|source| *source == Source::Api).unwrap_or(ready.len());
                api.turn(&ready[first..], Instant::now());
            }
        }
    }

    /// Waits until something is ready, or the patience with a client of the API is at its end.
    fn wait(&self) -> io::Result<(Vec<Source>, Vec<bool>)> {
        let input = |source, fd| (source, (fd, PollFlags::IN));
        // The end is told without being asked for.
        let exit =
            self.exit.as_ref().map(|exit| (Source::Exit, (exit.as_fd(), PollFlags::empty())));
        let resolvers =
            self.resolvers.as_ref().map(|words| input(Source::Resolvers, words.as_fd()));
        let api = self.api.iter().flat_map(|api| api.polled().map(|polled| (Source::Api, polled)));
        let all = exit.into_iter().chain([input(Source::Signals, self.signals.as_fd())]);
        let (sources, polled): (Vec<Source>, Vec<(BorrowedFd<'_>, PollFlags)>) =
            all.chain(resolvers).chain(api).unzip();
        let mut polled: Vec<PollFd<'_>> =
            polled.into_iter().map(|(fd, flags)| PollFd::from_borrowed_fd(fd, flags)).collect();
        let deadline = self.api.as_ref().and_then(Server::deadline);
        let left = deadline.map(|deadline| {
            // A little late rather than a little early, and once more for nothing.
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

    fn hear(&mut self) {
        let Some(words) = &self.resolvers else { return };
        match words.next() {
            Ok(Some(resolvers)) => {
                tracing::info!(?resolvers, "the host's resolvers have changed");
                self.policy.resolvers = resolvers;
                self.nat.set_policy(self.policy.clone());
            }
            ended => {
                tracing::error!(?ended, "changes of the host's resolvers are no longer seen");
                self.resolvers = None;
            }
        }
    }
}

/// The engine's side of the API.
pub(super) struct Ports {
    pub(super) nat: Arc<Nat>,
    /// Whom the container sees.
    pub(super) source: ForwardSource,
}

impl Forwarder for Ports {
    type Id = ForwardId;

    fn add(&mut self, wanted: Wanted) -> Option<Self::Id> {
        let Wanted { protocol, host: listen, guest } = wanted;
        let forward = Forward { protocol, listen, guest, source: self.source };
        let publish = PublishLabel::new(listen, protocol);
        let socket = match bind(protocol, listen) {
            Ok(socket) => socket,
            Err(error) => {
                tracing::warn!(%publish, %error, "this port is not forwarded");
                return None;
            }
        };
        let published = self.nat.publish_on(socket, forward, None);
        published
            .map_err(|error| tracing::warn!(%publish, %error, "this port is not forwarded"))
            .ok()
    }

    fn remove(&mut self, id: Self::Id) -> bool {
        self.nat.unpublish(id)
    }
}

/// Takes a port where this process is. The engine would first look where that is, for which a
/// sandbox has no `/proc`.
fn bind(protocol: Protocol, listen: SocketAddr) -> io::Result<OwnedFd> {
    let kind = if protocol == Protocol::Udp { Type::DGRAM } else { Type::STREAM };
    let socket = Socket::new(Domain::for_address(listen), kind.nonblocking().cloexec(), None)?;
    if listen.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    if protocol == Protocol::Tcp {
        // Past connections in TIME_WAIT do not hold the port.
        socket.set_reuse_address(true)?;
    }
    socket.bind(&listen.into())?;
    Ok(socket.into())
}
