//! Handles one client message: writes the response, or registers the client as waiting. No I/O of
//! its own.

use crate::client_id::ClientId;
use crate::forward::{Lookup, ReplyTo, Waiter};
use crate::message::{Bits, Rcode, Reply, Request, relay};
use crate::metrics::NetworkStats;
use crate::name::DisplayName;
use crate::non_query;
use crate::resolve::{Resolution, resolve};
use crate::servers::ServerList;
use crate::shared::Shared;
use crate::zone::Zones;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// The context of one server: its client and its limits.
pub(crate) struct ServerContext {
    pub(crate) shared: Arc<Shared>,
    pub(crate) client_id: ClientId,
    /// The upstream servers of the container, if it has its own.
    pub(crate) servers: Option<ServerList>,
    /// Maximum size of a UDP response in bytes.
    pub(crate) datagram: u16,
    /// Counts queries to rotate the addresses in responses.
    pub(crate) rotation: AtomicU32,
}

/// The result of handling a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// The response was written.
    Answered,
    /// The response will be sent later.
    Waiting,
    /// There is no response.
    Silent,
}

/// The transport on which a message was received.
pub(crate) enum Channel<'a> {
    Datagram(&'a Arc<tokio::net::UdpSocket>),
    Stream(&'a tokio::sync::mpsc::Sender<Vec<u8>>),
}

impl ServerContext {
    /// Handles `message` of `client` and appends an immediate response to `out`.
    pub(crate) fn handle(
        &self,
        zones: &Zones,
        message: &[u8],
        client: SocketAddr,
        channel: &Channel<'_>,
        out: &mut Vec<u8>,
    ) -> Outcome {
        let Some(request) = Request::read(message) else {
            self.shared.metrics.non_queries.increment(1);
            return match non_query::refuse(message, out) {
                Some(rcode) => {
                    count(zones.view(&self.client_id, client.ip()).stats(), 0, rcode);
                    Outcome::Answered
                }
                None => Outcome::Silent,
            };
        };
        let limit = match channel {
            Channel::Datagram(_) => request.limit(self.datagram),
            Channel::Stream(_) => usize::from(u16::MAX),
        };
        let view = zones.view(&self.client_id, client.ip());
        let stats = view.stats();
        let rotation = self.rotation.fetch_add(1, Ordering::Relaxed);
        let resolution = resolve(&view, self.shared.policy, request.name(), request.kind, rotation);
        tracing::debug!(endpoint = self.client_id.endpoint(), network = self.client_id.network(), name = %DisplayName(request.name()), kind = request.kind, ?resolution, "query resolved");
        let rcode = match &resolution {
            Resolution::Forward(list) => {
                let waiter = || Waiter {
                    request: request.store(),
                    to: match channel {
                        Channel::Datagram(socket) => ReplyTo::Datagram(Arc::clone(socket), client),
                        Channel::Stream(stream) => ReplyTo::Stream((*stream).clone()),
                    },
                    limit,
                    stats: stats.cloned(),
                };
                let list = self.servers.as_ref().or(*list);
                let (partition, is_within) = (view.partition(), |ip| view.is_in_any_subnet(ip));
                let client_id = || view.client_id(&self.client_id);
                match self
                    .shared
                    .forwarder
                    .ask(&request, &partition, list, client_id, is_within, waiter)
                {
                    Lookup::Pending => return Outcome::Waiting,
                    Lookup::Cached(answer, age) => {
                        relay(&request, &answer.relayed(age), limit, out);
                        answer.rcode
                    }
                    Lookup::Refused => {
                        Reply::code(Rcode::ServFail).write(&request, limit, out);
                        Rcode::ServFail
                    }
                }
            }
            local => {
                answer(local, self.shared.ttl, &request, limit, out);
                local.rcode()
            }
        };
        count(stats, request.kind, rcode);
        Outcome::Answered
    }
}

/// Appends a local response to `out`.
pub(crate) fn answer(
    resolution: &Resolution<'_>,
    ttl: u32,
    request: &Request<'_>,
    limit: usize,
    out: &mut Vec<u8>,
) {
    let mut reply = Reply { ttl, ..Reply::code(resolution.rcode()) };
    match resolution {
        Resolution::Answer(answers) => reply.answers = answers,
        Resolution::NoData(zone) | Resolution::NxDomain(zone) => reply.zone = Some(*zone),
        Resolution::Refused(refusal) => reply.extended = Some(refusal.extended()),
        Resolution::Forward(_) => {}
    }
    reply.write(request, limit, out);
}

fn count(stats: Option<&Arc<NetworkStats>>, kind: u16, rcode: Rcode) {
    if let Some(stats) = stats {
        stats.count(kind, rcode);
    }
}

/// Checks the response to one message, on a network with a few endpoints, for the fuzz target.
pub(crate) fn check(zones: &Zones, client_id: &ClientId, message: &[u8]) {
    let mut out = Vec::new();
    let Some(request) = Request::read(message) else {
        if non_query::refuse(message, &mut out).is_some() {
            assert_eq!(out[..2], message[..2], "the ID is repeated");
            assert!(out[2] & 0x80 != 0, "QR is set");
        }
        return;
    };
    let view = zones.view(client_id, [10, 9, 0, 2].into());
    let _ = Bits::of(&request);
    for limit in [512, usize::from(u16::MAX)] {
        out.clear();
        let resolution =
            resolve(&view, crate::resolve::Policy::default(), request.name(), request.kind, 1);
        answer(&resolution, 5, &request, limit, &mut out);
        assert!(out.len() <= limit.max(message.len() + 128), "{} bytes", out.len());
        let read = hickory_server::proto::op::Message::from_vec(&out);
        assert!(read.is_ok(), "{:?} of {:?}", read.err(), message);
    }
}
