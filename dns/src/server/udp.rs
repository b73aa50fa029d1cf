//! Datagrams: as many questions as there are at once, and all their answers at once.
//!
//! Buffers belong to the thread, not to the server: a thousand servers have one set.

use super::send_batch::SendBatch;
use super::sockets::{Bound, report};
use crate::handler::{Channel, Outcome, Site};
use crate::metrics::Overload;
use std::cell::RefCell;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tidegate_reactor::batch::{RecvBatch, SLOTS};
use tokio::io::Interest;
use tokio::net::UdpSocket;

/// A datagram that is longer is no question.
const LONGEST: usize = 4096;
/// How long a server rests whose socket fails: whatever is wrong may last.
const REST: Duration = Duration::from_millis(100);

/// A socket that is destroyed has an error (`EPOLLERR`) and nothing to read.
const INTEREST: Interest = Interest::READABLE.add(Interest::ERROR);

struct Scratch {
    received: RecvBatch,
    replies: SendBatch,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::new(Scratch { received: RecvBatch::new(), replies: SendBatch::default() });
}

/// Serves `socket` for as long as the task lives.
pub(super) async fn serve(socket: Arc<UdpSocket>, bound: Bound, site: Arc<Site>) {
    let channel = Channel::Datagram(&socket);
    loop {
        let served = async {
            if socket.ready(INTEREST).await?.is_error()
                && let Some(error) = take_error(&socket)
            {
                return Err(error);
            }
            socket.try_io(Interest::READABLE, || {
                SCRATCH.with_borrow_mut(|scratch| scratch.round(&socket, &channel, &site))
            })
        };
        match served.await {
            // There is more. The others have their turn.
            Ok(()) => tokio::task::yield_now().await,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => {
                report(&site, "udp", bound.revive_datagrams(&socket, &error), &error);
                tokio::time::sleep(REST).await;
            }
        }
    }
}

/// The error of `socket`, which is no longer ready because of it.
fn take_error(socket: &UdpSocket) -> Option<io::Error> {
    let mut error = None;
    // What is answered `WouldBlock` is not ready.
    let _ = socket.try_io(Interest::ERROR, || {
        error = socket.take_error().unwrap_or_else(Some);
        Err::<(), _>(io::ErrorKind::WouldBlock.into())
    });
    error
}

impl Scratch {
    /// Answers what waits. `WouldBlock` says that nothing more does.
    fn round(&mut self, socket: &UdpSocket, channel: &Channel<'_>, site: &Site) -> io::Result<()> {
        let count = self.received.receive(socket)?;
        {
            let zones = site.shared.zones();
            for index in 0..count {
                let datagram = self.received.get(index);
                let Some(client) = datagram.source.filter(|_| datagram.payload.len() <= LONGEST)
                else {
                    continue;
                };
                self.replies.push(client, |out| {
                    site.handle(&zones, datagram.payload, client, channel, out) == Outcome::Answered
                });
            }
        }
        for _ in 0..self.replies.send(socket) {
            site.shared.metrics.refused(Overload::Socket, None);
        }
        if count < SLOTS { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(()) }
    }
}
