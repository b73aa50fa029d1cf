//! The accept loop of the TCP servers.

use std::collections::BTreeMap;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};

use socket2::SockRef;

use crate::Namespace;

/// A listener with its thread, and one thread per connection.
pub(super) struct TcpServer {
    listener: Arc<TcpListener>,
    addr: SocketAddr,
    accepting: Option<JoinHandle<()>>,
    connections: Arc<Mutex<Connections>>,
}

/// The open connections, which the drop shuts down.
#[derive(Default)]
struct Connections {
    open: BTreeMap<u64, (TcpStream, JoinHandle<()>)>,
    accepted: u64,
    stopped: bool,
}

impl TcpServer {
    /// Listens on `addr` in `namespace` and runs `serve` for each connection.
    ///
    /// The connection is closed when `serve` returns. When the server stops, its stream is shut
    /// down: reads end and writes fail.
    #[track_caller]
    pub(super) fn start(
        namespace: &Namespace,
        addr: SocketAddr,
        serve: impl Fn(TcpStream, SocketAddr) + Send + Sync + 'static,
    ) -> Self {
        let listener = namespace.run(|| TcpListener::bind(addr));
        let listener =
            Arc::new(listener.unwrap_or_else(|error| panic!("listen on {addr}: {error}")));
        let addr = listener.local_addr().expect("a listener has an address");
        let connections = Arc::new(Mutex::new(Connections::default()));
        let accepting = {
            let (listener, connections) = (Arc::clone(&listener), Arc::clone(&connections));
            let serve = Arc::new(serve);
            thread::spawn(move || {
                // Ends when the listener is shut down.
                while let Ok((stream, peer)) = listener.accept() {
                    Connections::start(&connections, stream, peer, &serve);
                }
            })
        };
        Self { listener, addr, accepting: Some(accepting), connections }
    }

    pub(super) fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Returns the number of accepted connections.
    pub(super) fn accepted(&self) -> u64 {
        lock(&self.connections).accepted
    }

    /// Returns the number of open connections.
    pub(super) fn open(&self) -> usize {
        lock(&self.connections).open.len()
    }
}

impl Drop for TcpServer {
    fn drop(&mut self) {
        // Shutting down a listening socket wakes `accept` with an error.
        let _ = SockRef::from(&*self.listener).shutdown(Shutdown::Both);
        if let Some(accepting) = self.accepting.take() {
            let _ = accepting.join();
        }
        let open = {
            let mut connections = lock(&self.connections);
            connections.stopped = true;
            std::mem::take(&mut connections.open)
        };
        for (stream, serving) in open.into_values() {
            let _ = stream.shutdown(Shutdown::Both);
            let _ = serving.join();
        }
    }
}

impl Connections {
    fn start<F>(this: &Arc<Mutex<Self>>, stream: TcpStream, peer: SocketAddr, serve: &Arc<F>)
    where
        F: Fn(TcpStream, SocketAddr) + Send + Sync + 'static,
    {
        let Ok(handle) = stream.try_clone() else { return };
        let mut connections = lock(this);
        let number = connections.accepted;
        connections.accepted += 1;
        let (serve, table) = (Arc::clone(serve), Arc::clone(this));
        // The lock is held until the entry exists, so that the thread can remove it.
        let serving = thread::spawn(move || {
            serve(stream, peer);
            let mut connections = lock(&table);
            if !connections.stopped {
                connections.open.remove(&number);
            }
        });
        connections.open.insert(number, (handle, serving));
    }
}

fn lock(connections: &Mutex<Connections>) -> MutexGuard<'_, Connections> {
    // A panicking handler holds no lock.
    connections.lock().expect("nothing panics under this lock")
}
