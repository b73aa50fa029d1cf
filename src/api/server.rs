//! Lets clients in, a few at a time and for a limited time each.

use super::routes::router;
use super::socket::{Place, Socket};
use super::view::View;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::UnixListener;
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

/// Clients served at a time; more wait in the socket's queue. They are people and scripts of one
/// user.
pub(crate) const MAX_CLIENTS: usize = 32;

/// How long a client may take to send the head of its request.
const HEAD_PATIENCE: Duration = Duration::from_secs(5);

/// How long a client may be there in all: for its one request, and for reading the answer. What a
/// request has begun is finished all the same.
const PATIENCE: Duration = Duration::from_secs(30);

/// The most that a request's head may be, in bytes.
const MAX_HEAD: usize = 16 << 10;

/// The most headers that a request may have.
const MAX_HEADERS: usize = 64;

/// Answers clients until it is dropped.
#[derive(Debug)]
pub(crate) struct Server {
    place: Place,
    task: JoinHandle<()>,
}

impl Server {
    /// Answers the clients of `socket` about `view`. To be called within a tokio runtime.
    pub(crate) fn start(socket: Socket, view: Arc<View>) -> Self {
        let Socket { listener, place } = socket;
        Self { task: tokio::spawn(serve(listener, view)), place }
    }

    /// Sends all clients away and lets nobody in any more. The place is kept until it is dropped.
    pub(crate) fn close(&self) {
        self.place.close();
        self.task.abort();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn serve(listener: UnixListener, view: Arc<View>) {
    let mut http = http1::Builder::new();
    // A connection is one request: that is what makes its time easy to bound.
    http.keep_alive(false)
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_PATIENCE)
        .max_buf_size(MAX_HEAD)
        .max_headers(MAX_HEADERS);
    let router = router(view);
    let places = Arc::new(Semaphore::new(MAX_CLIENTS));
    let mut clients = tokio::task::JoinSet::new();
    while let Ok(place) = Arc::clone(&places).acquire_owned().await {
        let (client, _) = match listener.accept().await {
            Ok(client) => client,
            Err(error) => {
                // Out of descriptors: the client waits in the queue meanwhile.
                tracing::debug!(%error, "no client of the API can be let in");
                sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        while clients.try_join_next().is_some() {}
        let connection =
            http.serve_connection(TokioIo::new(client), TowerToHyperService::new(router.clone()));
        clients.spawn(async move {
            // A client that goes away, or dawdles, is its own loss.
            let _ = timeout(PATIENCE, connection).await;
            drop(place);
        });
    }
}
