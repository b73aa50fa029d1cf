//! Accepts clients, with bounds on their number and time.

use super::long_running::{LongRunning, MAX_LONG_RUNNING};
use super::routes::router;
use super::view::View;
use hyper::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use std::sync::Arc;
use std::time::Duration;
use tidegate_api::socket::{Socket, SocketPath};
use tokio::net::UnixListener;
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

/// Maximum number of concurrent clients; more wait in the backlog of the socket. Clients are
/// commands and scripts of one user.
pub(crate) const MAX_CLIENTS: usize = 32;

// Short requests are served beside those without a limit of time.
const _: () = assert!(MAX_LONG_RUNNING <= MAX_CLIENTS / 2);

/// The time for a client to send the head of its request.
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);

/// The total time of a connection, for its one request and its response. An operation that a
/// request started is completed in any case.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Maximum size of a request head, in bytes.
const MAX_HEAD: usize = 16 << 10;

/// Maximum number of headers of a request.
const MAX_HEADERS: usize = 64;

/// Serves clients until it is dropped.
#[derive(Debug)]
pub(crate) struct Server {
    /// `None` for the socket of a service manager, which outlives this process.
    place: Option<SocketPath>,
    task: JoinHandle<()>,
}

impl Server {
    /// Serves `view` on `socket`. Must be called within a tokio runtime.
    pub(crate) fn start(socket: Socket, view: Arc<View>) -> Self {
        let Socket { listener, place } = socket;
        Self { task: tokio::spawn(serve(listener, view)), place }
    }

    /// Disconnects all clients and stops accepting. The socket path stays reserved until the drop.
    pub(crate) fn close(&self) {
        if let Some(place) = &self.place {
            place.close();
        }
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
    // One request per connection bounds the total time of a connection.
    http.keep_alive(false)
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(MAX_HEAD)
        .max_headers(MAX_HEADERS);
    let router = TowerToHyperService::new(router(view));
    let places = Arc::new(Semaphore::new(MAX_CLIENTS));
    let long_running = Arc::new(Semaphore::new(MAX_LONG_RUNNING));
    let mut clients = tokio::task::JoinSet::new();
    while let Ok(place) = Arc::clone(&places).acquire_owned().await {
        let (client, _) = match listener.accept().await {
            Ok(client) => client,
            Err(error) => {
                // Out of descriptors: the client waits in the backlog.
                tracing::debug!(%error, "API client not accepted; retrying");
                sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        while clients.try_join_next().is_some() {}
        let limit = LongRunning::of(&long_running);
        let (router, of_request) = (router.clone(), limit.clone());
        let service = service_fn(move |mut request: Request<Incoming>| {
            request.extensions_mut().insert(of_request.clone());
            router.call(request)
        });
        let mut connection = http.serve_connection(TokioIo::new(client), service);
        clients.spawn(async move {
            // An error or a timeout concerns this client only.
            if timeout(TIMEOUT, &mut connection).await.is_err() && limit.is_lifted() {
                let _ = connection.await;
            }
            drop(place);
        });
    }
}
