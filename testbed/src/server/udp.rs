//! The receive loop of the UDP servers.

use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::Namespace;

/// A buffer for any UDP payload: 65,507 bytes over IPv4, 65,527 over IPv6.
const MAX_DATAGRAM: usize = 65_536;

/// Interval at which the receiving thread checks whether to stop. (A shutdown would wake it, but
/// std cannot handle the received message without a source address.)
const STOP_POLL: Duration = Duration::from_millis(50);

/// A bound socket with a thread that handles its datagrams.
pub(super) struct UdpServer {
    addr: SocketAddr,
    received: Arc<AtomicU64>,
    stopped: Arc<AtomicBool>,
    receiving: Option<JoinHandle<()>>,
}

impl UdpServer {
    /// Binds `addr` in `namespace` and runs `serve` for each datagram.
    #[track_caller]
    pub(super) fn start(
        namespace: &Namespace,
        addr: SocketAddr,
        mut serve: impl FnMut(&UdpSocket, &[u8], SocketAddr) + Send + 'static,
    ) -> Self {
        let socket = namespace.run(|| UdpSocket::bind(addr));
        let socket = socket.unwrap_or_else(|error| panic!("bind {addr} for UDP: {error}"));
        socket.set_read_timeout(Some(STOP_POLL)).expect("the timeout is not 0");
        let addr = socket.local_addr().expect("a bound socket has an address");
        let received = Arc::new(AtomicU64::new(0));
        let stopped = Arc::new(AtomicBool::new(false));
        let receiving = {
            let (received, stopped) = (Arc::clone(&received), Arc::clone(&stopped));
            thread::spawn(move || {
                let mut buffer = vec![0; MAX_DATAGRAM];
                while !stopped.load(Ordering::Acquire) {
                    // Errors are ICMP errors about sent datagrams (ECONNREFUSED, EHOSTUNREACH), or
                    // the timeout.
                    if let Ok((length, peer)) = socket.recv_from(&mut buffer) {
                        received.fetch_add(1, Ordering::Relaxed);
                        serve(&socket, &buffer[..length], peer);
                    }
                }
            })
        };
        Self { addr, received, stopped, receiving: Some(receiving) }
    }

    pub(super) fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Returns the number of received datagrams.
    pub(super) fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }
}

impl Drop for UdpServer {
    fn drop(&mut self) {
        self.stopped.store(true, Ordering::Release);
        if let Some(receiving) = self.receiving.take() {
            let _ = receiving.join();
        }
    }
}
