//! A container behind the engine, and a server beyond the host.
//!
//! ```text
//!   container                        host                          server
//!   ┌────────────────┐          ┌───────────────┐          ┌──────────────────────┐
//!   │ tun0           │  engine  │ eth0          │   veth   │ eth0                 │
//!   │ 10.0.2.100     ├──────────┤ 192.0.2.1     ├──────────┤ 192.0.2.2            │
//!   │ fd00::100      │          │ 2001:db8::1   │          │ 2001:db8::2          │
//!   └────────────────┘          └───────────────┘          └──────────────────────┘
//!   default dev tun0             forwards nothing           knows no route to the container
//! ```

#![allow(dead_code, unreachable_pub)]

use std::io::{Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpStream, UdpSocket};
use std::sync::Arc;
use std::thread;
use std::time::Duration;
use tidegate_nat::{Capabilities, Nat, Policy, Settings, Tun, TunOptions};
use tidegate_netns::Family;
use tidegate_reactor::Descriptors;
use tidegate_testbed::{Namespace, eventually};

pub const SERVER: [&str; 2] = ["192.0.2.2", "2001:db8::2"];
pub const HOST: [&str; 2] = ["192.0.2.1", "2001:db8::1"];
pub const GATEWAY: [&str; 2] = ["10.0.2.2", "fd00::2"];
pub const CONTAINER: [&str; 2] = ["10.0.2.100", "fd00::100"];

/// Whether the tests run within `old_kernel.rs`, with all optional features forced off.
pub const OLD_KERNEL: bool = matches!(module_path!().as_bytes(), [b'o', b'l', b'd', ..]);

pub struct Net {
    pub container: Namespace,
    pub host: Namespace,
    pub server: Namespace,
    pub nat: Nat,
}

pub struct Options {
    pub mtu: u16,
    pub queue_length: u32,
    pub capabilities: Capabilities,
    pub policy: Policy,
    /// Source port range of the host, if not the default.
    pub ports: Option<&'static str>,
}

impl Default for Options {
    fn default() -> Self {
        let policy = Policy {
            gateways: GATEWAY.map(|ip| ip.parse().unwrap()).to_vec(),
            ..Policy::default()
        };
        Self { mtu: 1500, queue_length: 4096, capabilities: Capabilities::ALL, policy, ports: None }
    }
}

/// Converts a namespace of the test bed to that of the engine.
pub fn netns(namespace: &Namespace) -> tidegate_netns::Namespace {
    if OLD_KERNEL {
        tidegate_model::feature::force_all_off();
    }
    tidegate_netns::Namespace::from_path(&namespace.path()).unwrap()
}

/// The host and the server, without a container.
pub struct Outside {
    pub host: Namespace,
    pub server: Namespace,
}

/// Creates and connects a host and a server.
pub fn outside() -> Outside {
    let [host, server] = [(); 2].map(|()| Namespace::new());
    for namespace in [&host, &server] {
        namespace.sysctl("net.ipv6.conf.default.accept_dad", "0");
        namespace.sysctl("net.ipv6.conf.default.accept_ra", "0");
    }
    // A new namespace permits no ping sockets, whereas most hosts permit them to all users.
    host.sysctl("net.ipv4.ping_group_range", "0 2147483647");
    host.ip_all(&format!(
        "link add eth0 type veth peer name eth0 netns {}
         addr add 192.0.2.1/24 dev eth0
         addr add 2001:db8::1/64 dev eth0 nodad
         link set eth0 up",
        server.path().display()
    ));
    server.ip_all(
        "addr add 192.0.2.2/24 dev eth0
         addr add 2001:db8::2/64 dev eth0 nodad
         link set eth0 up",
    );
    for namespace in [&host, &server] {
        let up = || namespace.ip(&["-o", "link", "show", "dev", "eth0"]).contains("state UP");
        assert!(eventually(Duration::from_secs(10), up));
    }
    Outside { host, server }
}

impl Net {
    pub fn new() -> Self {
        Self::with(&Options::default(), |_| {})
    }

    pub fn with(options: &Options, change: impl FnOnce(&mut Settings)) -> Self {
        let Outside { host, server } = outside();
        if let Some(ports) = options.ports {
            host.sysctl("net.ipv4.ip_local_port_range", ports);
        }
        let container = Namespace::new();
        container.sysctl("net.ipv6.conf.default.accept_dad", "0");
        let tun = TunOptions {
            mtu: options.mtu,
            queue_length: options.queue_length,
            capabilities: options.capabilities,
            addresses: vec!["10.0.2.100/24".parse().unwrap(), "fd00::100/64".parse().unwrap()],
            default_routes: Family::ALL.to_vec(),
            ..TunOptions::new("tun0")
        };
        let tun = Tun::open(&netns(&container), &tun).unwrap();
        let mut settings = Settings::new(options.mtu);
        settings.capabilities = options.capabilities;
        settings.policy = options.policy.clone();
        change(&mut settings);
        let descriptors = Arc::new(Descriptors::of_process(256));
        let nat = Nat::start(settings, tun, &netns(&host), descriptors).unwrap();
        Self { container, host, server, nat }
    }

    /// Counters of the engine and of the kernels, for the diagnosis of a failure.
    pub fn counters(&self) -> String {
        let mut text = String::new();
        tidegate_nat::describe(&[("test", self.nat.figures())], &mut text).unwrap();
        let counted = text.lines().filter(|line| !line.starts_with('#') && !line.ends_with(" 0"));
        let mut text = counted.collect::<Vec<_>>().join("\n");
        for namespace in [&self.container, &self.host, &self.server] {
            text += "\n";
            text +=
                &namespace.run(|| std::fs::read_to_string("/proc/thread-self/net/snmp").unwrap());
            text +=
                &namespace.run(|| std::fs::read_to_string("/proc/thread-self/net/snmp6").unwrap());
            text += &namespace.ip(&["-s", "link"]);
        }
        text
    }
}

/// Address and port of the server, by family.
pub fn server(family: usize, port: u16) -> SocketAddr {
    at(SERVER[family], port)
}

pub fn at(ip: &str, port: u16) -> SocketAddr {
    SocketAddr::new(ip.parse::<IpAddr>().unwrap(), port)
}

/// Sends a GSO batch and receives its datagrams. Returns false if some are missing; the received
/// ones must be complete and in order.
pub fn batch_passes(from: &UdpSocket, to: &UdpSocket, batch: u8) -> bool {
    let mut bytes = Vec::new();
    for index in 0..30u8 {
        bytes.extend([batch; 500]);
        bytes.extend([index; 500]);
    }
    bytes.extend([batch; 7]);
    from.send(&bytes).unwrap();
    let mut buffer = [0; 2000];
    let mut next = 0;
    loop {
        match to.recv(&mut buffer) {
            Ok(7) => return next == 30,
            Ok(1000) => {
                assert_eq!(buffer[0], batch);
                assert!(buffer[999] >= next, "{} after {next}", buffer[999]);
                next = buffer[999] + 1;
            }
            Ok(length) => panic!("{length} bytes of a datagram"),
            Err(_) => return false,
        }
    }
}

/// Sixteen clients in `from` connect to the echo server at `to`, fifty times each in sequence.
pub fn echo_concurrently(from: &Namespace, to: SocketAddr) {
    thread::scope(|scope| {
        for _ in 0..16 {
            scope.spawn(|| {
                from.run(|| {
                    for round in 0..50u32 {
                        let mut stream = TcpStream::connect(to).unwrap();
                        stream.write_all(&round.to_be_bytes()).unwrap();
                        stream.shutdown(Shutdown::Write).unwrap();
                        let mut answer = Vec::new();
                        stream.read_to_end(&mut answer).unwrap();
                        assert_eq!(answer, round.to_be_bytes());
                    }
                });
            });
        }
    });
}
