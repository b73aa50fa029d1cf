//! Servers for bulk transfers in which every byte is checked.

use std::io;
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use super::tcp::TcpServer;
use crate::Namespace;
use crate::transfer::{self, Transfer};

/// A TCP server that reads each connection to its end and compares it with the
/// [`Pattern`](crate::Pattern) of a seed.
pub struct Sink {
    server: TcpServer,
    finished: Arc<Finished>,
}

#[derive(Default)]
struct Finished {
    transfers: Mutex<Vec<Transfer>>,
    one_more: Condvar,
}

impl Sink {
    /// Starts a sink on `addr` in `namespace` that expects the pattern of `seed` on every
    /// connection.
    #[track_caller]
    pub fn tcp(namespace: &Namespace, addr: SocketAddr, seed: u64) -> Self {
        let finished = Arc::new(Finished::default());
        let results = Arc::clone(&finished);
        let server = TcpServer::start(namespace, addr, move |mut stream, _peer| {
            let transfer = transfer::receive(&mut stream, seed);
            results.transfers.lock().expect("nothing panics under this lock").push(transfer);
            results.one_more.notify_all();
        });
        Self { server, finished }
    }

    /// Returns the listening address.
    pub fn addr(&self) -> SocketAddr {
        self.server.addr()
    }

    /// Waits until `count` connections have ended and returns their results, in the order of their
    /// ends.
    ///
    /// # Panics
    ///
    /// If fewer have ended after `timeout`.
    #[track_caller]
    pub fn wait(&self, count: usize, timeout: Duration) -> Vec<Transfer> {
        let transfers = self.finished.transfers.lock().expect("nothing panics under this lock");
        let waited =
            self.finished.one_more.wait_timeout_while(transfers, timeout, |all| all.len() < count);
        let transfers = waited.expect("nothing panics under this lock").0.clone();
        assert!(
            transfers.len() >= count,
            "{} of {count} transfers ended in {timeout:?}",
            transfers.len()
        );
        transfers
    }
}

/// A TCP server that sends the first bytes of a [`Pattern`](crate::Pattern) to each client and then
/// shuts down its sending side.
pub struct Source(TcpServer);

impl Source {
    /// Starts a source on `addr` in `namespace` that sends `length` bytes of the pattern of `seed`.
    #[track_caller]
    pub fn tcp(namespace: &Namespace, addr: SocketAddr, seed: u64, length: u64) -> Self {
        Self(TcpServer::start(namespace, addr, move |stream, _peer| {
            // An error means that the client closed the connection early.
            let _ = send(&stream, seed, length);
        }))
    }

    /// Returns the listening address.
    pub fn addr(&self) -> SocketAddr {
        self.0.addr()
    }
}

fn send(mut stream: &TcpStream, seed: u64, length: u64) -> io::Result<()> {
    transfer::send(&mut stream, seed, length)?;
    stream.shutdown(Shutdown::Write)?;
    // Closing with unread data would send a reset, which can overtake the last bytes.
    io::copy(&mut stream, &mut io::sink())?;
    Ok(())
}
