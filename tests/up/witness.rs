//! A server that remembers what it was asked: what gets in need not be answered to do harm.

use std::collections::BTreeSet;
use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;
use tidegate_testbed::Namespace;

/// How often its threads look whether they are to end.
const LOOK_UP: Duration = Duration::from_millis(50);

/// UDP servers that answer every datagram and keep it.
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
            socket.set_read_timeout(Some(LOOK_UP)).unwrap();
            let (seen, ended) = (Arc::clone(&witness.seen), Arc::clone(&witness.ended));
            witness.threads.push(std::thread::spawn(move || listen(&socket, &seen, &ended)));
        }
        witness
    }

    /// Whether this datagram came.
    pub(crate) fn has_seen(&self, text: &str) -> bool {
        self.seen.lock().unwrap().contains(text)
    }
}

fn listen(socket: &UdpSocket, seen: &Mutex<BTreeSet<String>>, ended: &AtomicBool) {
    let mut buffer = [0; 200];
    while !ended.load(Ordering::Acquire) {
        // Errors are answers to what was sent before, or the time-out.
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
