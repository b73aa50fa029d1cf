//! Adding and removing ports for a long time increases neither the number of series nor memory use.
//! This is a separate test crate because it measures the memory of its process.

mod support;

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::sync::Arc;
use std::time::Duration;
use support::Metrics;
use tidegate_model::Protocol;
use tidegate_proxy::{Direct, Engine, Listener, PortOptions, Settings, describe};
use tidegate_testbed::server::EchoServer;
use tidegate_testbed::{Namespace, procfs, require_root};

/// The total number of ports, and the number of TCP and of UDP ports in each batch.
const PORTS: usize = 100_000;
const BATCH: usize = 250;

/// The number of ports with their own series: a part of each batch.
const WITH_SERIES: usize = 300;

/// The limit of memory growth after the first tenth. Twenty bytes per port would be 1.8 MB.
const GROWTH: u64 = 1 << 20;

const LOCALHOST: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const TIMEOUT: Duration = Duration::from_secs(20);

#[test]
fn a_hundred_thousand_added_and_removed_ports_leave_series_and_memory_flat() {
    require_root();
    let host = Namespace::new();
    let tcp = EchoServer::tcp(&host, SocketAddr::new(LOCALHOST, 7));
    let udp = EchoServer::udp(&host, SocketAddr::new(LOCALHOST, 7));
    assert_eq!((tcp.addr().port(), udp.addr().port()), (7, 7));
    host.run(|| {
        let engine =
            Engine::new(Settings { ports_with_series: WITH_SERIES, ..Settings::default() });
        let options = Arc::new(PortOptions::new(Arc::new(Direct::new(LOCALHOST))));
        let idle = series(&engine);
        let (mut after_each, mut resident) = (Vec::new(), Vec::new());
        let mut carried = 0;
        for batch in 1..=PORTS / (2 * BATCH) {
            let mut listeners = Vec::with_capacity(2 * BATCH);
            for _ in 0..BATCH {
                for protocol in [Protocol::Tcp, Protocol::Udp] {
                    listeners.push((
                        Listener::bind(SocketAddr::new(LOCALHOST, 0), protocol).unwrap(),
                        7,
                    ));
                }
            }
            let labels: Vec<_> = listeners.iter().map(|(listener, _)| listener.label()).collect();
            let published = engine.publish(listeners, &options).unwrap();
            // The first ports of each protocol have their own series, the last are summed up.
            exchange_tcp(labels[0].address());
            exchange_udp(labels[1].address());
            exchange_tcp(labels[2 * BATCH - 2].address());
            exchange_udp(labels[2 * BATCH - 1].address());
            carried += 1;
            let page = page(&engine);
            assert_eq!(page.count("tidegate_proxy_ports{series=\"own\"}"), WITH_SERIES as u64);
            assert_eq!(
                page.count("tidegate_proxy_ports{series=\"other\"}"),
                (2 * BATCH - WITH_SERIES) as u64
            );
            for (family, others) in [
                ("connections_total", "other/tcp"),
                ("sessions_total", "other/udp"),
                ("dial_seconds_count", "other/tcp"),
            ] {
                assert_eq!(
                    page.count(&format!("tidegate_proxy_{family}{{publish=\"{others}\"}}")),
                    carried
                );
                let all = page.sum(&format!("tidegate_proxy_{family}{{"));
                assert_eq!(all, carried + 1, "{family}: with the count of a port with series");
            }
            for port in published {
                assert!(engine.unpublish(port));
                assert!(!engine.unpublish(port));
            }
            let left = series(&engine);
            let known = |name: &String| idle.contains_key(name) || name.contains("other/");
            assert!(left.keys().all(known), "{left:?}");
            after_each.push(left.len());
            resident.push(procfs::rss(std::process::id()).unwrap());
            assert_eq!(engine.usage().ports, [0, 0], "batch {batch}");
        }
        // The counts of the sum stay, and its sessions have ended.
        let page = page(&engine);
        assert_eq!(page.count("tidegate_proxy_sessions_total{publish=\"other/udp\"}"), carried);
        assert_eq!(page.count("tidegate_proxy_sessions{publish=\"other/udp\"}"), 0);
        assert_eq!(page.count("tidegate_proxy_port_sessions_limit{publish=\"other/udp\"}"), 0);
        assert_eq!(
            page.count("tidegate_proxy_session_seconds_count{publish=\"other/udp\"}"),
            carried
        );
        // Only the series of the sums remain, 37 for TCP and 26 for UDP.
        assert_eq!(after_each, vec![idle.len() + 37 + 26; after_each.len()]);
        let (early, late) = (resident[resident.len() / 10], *resident.last().unwrap());
        println!("{} series, {early} bytes after a tenth and {late} in the end", after_each[0]);
        assert!(
            late < early + GROWTH,
            "{early} bytes after a tenth, {late} in the end: {resident:?}"
        );
    });
}

fn page(engine: &Engine) -> Metrics {
    let mut page = String::new();
    describe(&engine.snapshot(), &mut page).unwrap();
    engine.usage().describe(&mut page).unwrap();
    Metrics(page)
}

/// The series by name.
fn series(engine: &Engine) -> BTreeMap<String, String> {
    let page = page(engine);
    let lines = page.0.lines().filter(|line| !line.starts_with('#'));
    lines
        .map(|line| line.rsplit_once(' ').unwrap())
        .map(|(name, value)| (name.into(), value.into()))
        .collect()
}

#[track_caller]
fn exchange_tcp(to: SocketAddr) {
    let mut stream = TcpStream::connect_timeout(&to, TIMEOUT).unwrap();
    stream.set_read_timeout(Some(TIMEOUT)).unwrap();
    stream.write_all(b"echo").unwrap();
    let mut answer = [0; 4];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"echo");
}

#[track_caller]
fn exchange_udp(to: SocketAddr) {
    let socket = UdpSocket::bind((LOCALHOST, 0)).unwrap();
    socket.set_read_timeout(Some(TIMEOUT)).unwrap();
    socket.connect(to).unwrap();
    socket.send(b"echo").unwrap();
    assert_eq!(socket.recv(&mut [0; 8]).unwrap(), 4);
}
