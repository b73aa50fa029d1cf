//! A UDP server that records datagrams. A datagram that arrives can do harm even if its answer does
//! not reach the sender.

use std::collections::BTreeSet;
use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;
use tidegate_testbed::Namespace;

/// Interval at which the threads check whether they have to end.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// UDP servers that record and answer every datagram.
#[derive(Default)]
pub(crate) struct Witness {
    seen: Arc<Mutex<BTreeSet<String>>>,
    ended: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Witness {
    /// Listens at `addresses` in `namespace`.
    pub(crate) fn new(namespace: &Namespace, addresses: &[SocketAddr]) -> Self {
        let mut witness = Self::default();
        for address in addresses {
            let socket = namespace.run(|| UdpSocket::bind(address)).unwrap();
            socket.set_read_timeout(Some(POLL_INTERVAL)).unwrap();
            let (seen, ended) = (Arc::clone(&witness.seen), Arc::clone(&witness.ended));
            witness.threads.push(std::thread::spawn(move || listen(&socket, &seen, &ended)));
        }
        witness
    }

    /// Whether a datagram with the payload `text` has arrived.
    pub(crate) fn has_seen(&self, text: &str) -> bool {
        self.seen.lock().unwrap().contains(text)
    }
}

fn listen(socket: &UdpSocket, seen: &Mutex<BTreeSet<String>>, ended: &AtomicBool) {
    let mut buffer = [0; 200];
    while !ended.load(Ordering::Acquire) {
        // Errors are timeouts, or ICMP errors for previous answers.
        if let Ok((length, peer)) = socket.recv_from(&mut buffer) {
            seen.lock().unwrap().insert(String::from_utf8_lossy(&buffer[..length]).into_owned());
            let _ = socket.send_to(b"!", peer);
        }
    }
}

impl Drop for Witness {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Release);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}
