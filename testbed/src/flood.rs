//! A flooding container, and the response times that its neighbour sees meanwhile.

use std::io::Read;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::Namespace;
use crate::frames::{LinkSocket, Mac, ethernet, ipv4, syn4, udp4};

/// Frames sent between two checks of the clock.
const BATCH: usize = 64;

/// Prepared frames, which are sent in a loop.
const FRAMES: u32 = 20_000;

/// The timeout of a request.
const TIMEOUT: Duration = Duration::from_secs(10);

/// The MAC address of another station.
const OTHER_MAC: Mac = [2, 9, 9, 9, 9, 9];

/// The kind of packets of a flood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FloodKind {
    /// SYNs from the MAC address of another station, which a port guard drops: the baseline.
    ForeignMac,
    /// SYNs from its own address, with consecutive source ports.
    Syn,
    /// SYNs from 200 addresses of its network.
    SynOfManySources,
    /// Datagrams from its own address, with consecutive source ports.
    Udp,
    /// First fragments of datagrams that are never completed.
    Fragments,
}

/// A container that sends a flood.
#[derive(Clone, Copy, Debug)]
pub struct Flooder<'a> {
    /// Its namespace. Its interface is `eth0`.
    pub namespace: &'a Namespace,
    /// Its IPv4 address, in a /24.
    pub address: Ipv4Addr,
    /// The address of its gateway.
    pub gateway: Ipv4Addr,
    /// The destination of the packets.
    pub target: (Ipv4Addr, u16),
}

/// A running flood, which ends on drop.
#[derive(Debug)]
pub struct Flood {
    stop: Arc<AtomicBool>,
    sender: Option<thread::JoinHandle<()>>,
}

impl Flooder<'_> {
    /// Starts to send `rate` frames per second.
    ///
    /// # Panics
    ///
    /// If the gateway does not resolve.
    #[track_caller]
    pub fn start(&self, kind: FloodKind, rate: u32) -> Flood {
        let frames = self.frames(kind);
        let socket = LinkSocket::sender(self.namespace, "eth0");
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let sender = thread::spawn(move || {
            let begin = Instant::now();
            for (number, frame) in frames.iter().cycle().enumerate() {
                socket.send(frame);
                if number % BATCH == 0 {
                    let due = begin + Duration::from_secs(number as u64) / rate;
                    thread::sleep(due.saturating_duration_since(Instant::now()));
                    if stopped.load(Ordering::Relaxed) {
                        return;
                    }
                }
            }
        });
        Flood { stop, sender: Some(sender) }
    }

    fn frames(&self, kind: FloodKind) -> Vec<Vec<u8>> {
        let own = mac(&self.namespace.ip(&["-o", "link", "show", "eth0"]), "link/ether ");
        let gateway = self.gateway_mac();
        let [a, b, c, _] = self.address.octets();
        let frame = |number: u32| {
            let port = 1024 + (number % 60_000) as u16;
            let packet = match kind {
                FloodKind::ForeignMac | FloodKind::Syn => {
                    syn4((self.address, port), self.target, number)
                }
                FloodKind::SynOfManySources => {
                    let spoofed = Ipv4Addr::new(a, b, c, 10 + (number % 200) as u8);
                    syn4((spoofed, port), self.target, number)
                }
                FloodKind::Udp => udp4((self.address, port), self.target, b"flood"),
                FloodKind::Fragments => {
                    let mut packet = ipv4(self.address, self.target.0, 17, &[0; 1024]);
                    packet[4..6].copy_from_slice(&port.to_be_bytes());
                    // More Fragments is set. The checksum is updated incrementally (RFC 1624).
                    packet[6] = 0x20;
                    let before = u16::from_be_bytes([packet[10], packet[11]]);
                    let added = u32::from(before) + 0xffff * 2 - 0x2000 - u32::from(port) + 1;
                    let folded = (added & 0xffff) + (added >> 16);
                    let folded = (folded & 0xffff) + (folded >> 16);
                    packet[10..12].copy_from_slice(&(folded as u16).to_be_bytes());
                    packet
                }
            };
            let source = if kind == FloodKind::ForeignMac { OTHER_MAC } else { own };
            ethernet(gateway, source, 0x0800, &packet)
        };
        (0..FRAMES).map(frame).collect()
    }

    fn gateway_mac(&self) -> Mac {
        let gateway = self.gateway;
        // Sending a datagram makes the kernel resolve the gateway.
        self.namespace.run(|| {
            let socket = std::net::UdpSocket::bind("0.0.0.0:0").expect("a socket in the container");
            socket.send_to(b"x", (gateway, 9)).expect("the container has a route to its gateway");
        });
        let known = || {
            let neighbour = self.namespace.ip(&["neigh", "show", &gateway.to_string()]);
            neighbour.contains("lladdr ").then_some(neighbour)
        };
        let known = (0..100).find_map(|_| {
            thread::sleep(Duration::from_millis(10));
            known()
        });
        mac(&known.expect("the gateway resolves"), "lladdr ")
    }
}

impl Drop for Flood {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(sender) = self.sender.take() {
            let _ = sender.join();
        }
    }
}

/// Measures the times of `count` requests to `target`, each on its own connection and `pause` after
/// the previous one. The server sends and closes.
///
/// Must be called in the namespace of the neighbour ([`Namespace::run`]).
///
/// # Panics
///
/// If a request is not served within 10 s.
#[track_caller]
pub fn request_times(target: SocketAddr, count: usize, pause: Duration) -> Vec<Duration> {
    let request = |_| {
        thread::sleep(pause);
        let begin = Instant::now();
        let mut stream =
            TcpStream::connect_timeout(&target, TIMEOUT).expect("the neighbour connects");
        stream.set_read_timeout(Some(TIMEOUT)).expect("a timeout can be set");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("the request is served");
        begin.elapsed()
    };
    (0..count).map(request).collect()
}

/// Returns the MAC address after `word` in the output of ip(8).
fn mac(line: &str, word: &str) -> Mac {
    let text = line.split(word).nth(1).unwrap_or_else(|| panic!("no {word} in {line}"));
    let mut bytes =
        text.trim().split([':', ' ', '\n']).map(|byte| u8::from_str_radix(byte, 16).unwrap());
    std::array::from_fn(|_| bytes.next().unwrap())
}
