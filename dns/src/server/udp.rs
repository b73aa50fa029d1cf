//! DNS over UDP: a batch of queries is received, and its responses are sent, with one system call
//! each.
//!
//! Buffers are per thread, not per server: a thousand servers share one set.

use super::send_batch::SendBatch;
use super::sockets::{Binding, report};
use crate::handler::{Channel, Outcome, ServerContext};
use crate::metrics::Overload;
use std::cell::RefCell;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tidegate_reactor::batch::{RecvBatch, SLOTS};
use tokio::io::Interest;
use tokio::net::UdpSocket;

/// Maximum size of a query in bytes. Longer datagrams are dropped.
const MAX_QUERY: usize = 4096;
/// Pause after a socket error, which may persist.
const ERROR_BACKOFF: Duration = Duration::from_millis(100);

/// A destroyed socket reports an error (`EPOLLERR`) and is not readable.
const INTEREST: Interest = Interest::READABLE.add(Interest::ERROR);

struct Scratch {
    received: RecvBatch,
    replies: SendBatch,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::new(Scratch { received: RecvBatch::new(), replies: SendBatch::default() });
}

/// Serves `socket` until the task is aborted.
pub(super) async fn serve(socket: Arc<UdpSocket>, binding: Binding, context: Arc<ServerContext>) {
    let channel = Channel::Datagram(&socket);
    loop {
        let served = async {
            if socket.ready(INTEREST).await?.is_error()
                && let Some(error) = take_error(&socket)
            {
                return Err(error);
            }
            socket.try_io(Interest::READABLE, || {
                SCRATCH.with_borrow_mut(|scratch| scratch.round(&socket, &channel, &context))
            })
        };
        match served.await {
            // More queries are available. Other tasks run first.
            Ok(()) => tokio::task::yield_now().await,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => {
                report(&context, "udp", binding.revive_datagrams(&socket, &error), &error);
                tokio::time::sleep(ERROR_BACKOFF).await;
            }
        }
    }
}

/// Returns the pending error of `socket`, and clears the error readiness.
fn take_error(socket: &UdpSocket) -> Option<io::Error> {
    let mut error = None;
    // `WouldBlock` clears the readiness.
    let _ = socket.try_io(Interest::ERROR, || {
        error = socket.take_error().unwrap_or_else(Some);
        Err::<(), _>(io::ErrorKind::WouldBlock.into())
    });
    error
}

impl Scratch {
    /// Handles one batch. `WouldBlock` if no more queries are available.
    fn round(
        &mut self,
        socket: &UdpSocket,
        channel: &Channel<'_>,
        context: &ServerContext,
    ) -> io::Result<()> {
        let count = self.received.receive(socket)?;
        {
            let zones = context.shared.zones();
            for index in 0..count {
                let datagram = self.received.get(index);
                let Some(client) = datagram.source.filter(|_| datagram.payload.len() <= MAX_QUERY)
                else {
                    continue;
                };
                self.replies.push(client, |out| {
                    context.handle(&zones, datagram.payload, client, channel, out)
                        == Outcome::Answered
                });
            }
        }
        for _ in 0..self.replies.send(socket) {
            context.shared.metrics.refused(Overload::Socket, None);
        }
        if count < SLOTS { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(()) }
    }
}
