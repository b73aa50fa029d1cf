//! What an attacker can do after taking over the process, tried from inside of it.

#![cfg(target_arch = "x86_64")]

use super::*;
use tidegate_testbed::puppet::{self, assert_confined_to_forwarding};

#[test]
fn a_proxy_to_an_address_can_only_forward() {
    let net = Topology::three();
    let _tcp = EchoServer::tcp(&net.container, (addr::CONTAINER_V4, 80).into());
    let _udp = EchoServer::udp(&net.container, (addr::CONTAINER_V4, 80).into());
    let proxy = Publisher::start(&net.host, "8080:80 8080:80/udp --to 172.30.0.2 --workers 2");
    let to = SocketAddr::from((addr::HOST_V4, 8080));
    let before = connect(&net.client, to);
    assert_confined_to_forwarding(proxy.process.pid(), 80);
    // The process continues to work, including threads, pipes and the metrics page.
    assert_eq!(ask(&before, b"from before"), b"from before");
    let payload = vec![7; 4 << 20];
    let clients: Vec<TcpStream> = (0..20).map(|_| connect(&net.client, to)).collect();
    std::thread::scope(|scope| {
        for client in &clients {
            scope.spawn(|| assert_eq!(ask(client, &payload), payload));
        }
    });
    let metrics = proxy.metrics();
    for figure in [
        "process_open_fds",
        "process_cpu_seconds_total",
        "process_start_time_seconds",
        "process_threads",
    ] {
        assert!(metrics.0.lines().any(|line| line.starts_with(&format!("{figure} "))), "{figure}");
    }
}

#[test]
fn a_proxy_that_shows_clients_keeps_the_capabilities_for_it() {
    /// `CAP_NET_BIND_SERVICE`, `CAP_NET_ADMIN`, `CAP_NET_RAW`, `CAP_SYS_ADMIN`, `CAP_SYS_RESOURCE`.
    const KEPT: u64 = 1 << 10 | 1 << 12 | 1 << 13 | 1 << 21 | 1 << 24;
    let net = Topology::three();
    let proxy = Publisher::start(&net.host, "8080:80 --to 172.30.0.2 --source client");
    for task in puppet::tasks(proxy.process.pid()) {
        let status = puppet::status(&task);
        let has = u64::from_str_radix(&status["CapPrm"], 16).unwrap();
        assert_eq!((has & !KEPT, has & 1 << 12), (0, 1 << 12), "{task}: {has:x}");
        assert_eq!(&*status["NoNewPrivs"], "1");
    }
}
