//! Peers that do not read, and the budget of bytes held for them.

use super::limits::connect_from;
use super::*;
use std::os::fd::AsFd;

const STALLED: u32 = 400;
const SLOW: u32 = 100;

/// The kernel memory of the sockets of the publisher, plus its own memory beyond `own`, in bytes.
fn held(publisher: &Publisher, own: u64) -> u64 {
    let sockets: u64 = sockets_of(publisher).iter().map(memory_of).sum();
    sockets + publisher.process.rss().saturating_sub(own)
}

/// The kernel memory of a socket in both directions (`SO_MEMINFO`, include/uapi/linux/sock_diag.h).
fn memory_of(socket: impl AsFd) -> u64 {
    const SO_MEMINFO: i32 = 55;
    const RECEIVED: usize = 0;
    const QUEUED: usize = 5;
    let mut info = [0_u32; 9];
    let mut length = size_of_val(&info) as libc::socklen_t;
    // SAFETY: `info` has room for `length` bytes.
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            SO_MEMINFO,
            info.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    if result == 0 { u64::from(info[RECEIVED]) + u64::from(info[QUEUED]) } else { 0 }
}

/// Connects with a small window, as for a client that never reads.
fn stall(net: &Topology) -> TcpStream {
    let client = connect(&net.client, host(8080));
    SockRef::from(&client).set_recv_buffer_size(4096).unwrap();
    client
}

/// Reads a little from each client in turns and checks the bytes. Returns the smallest amount.
fn download_slowly(clients: &[TcpStream], patterns: &mut [Pattern], rounds: usize) -> u64 {
    let mut got = vec![0; clients.len()];
    let (mut chunk, mut expected) = ([0; 8192], [0; 8192]);
    for _ in 0..rounds {
        for ((mut client, pattern), got) in clients.iter().zip(&mut *patterns).zip(&mut got) {
            match client.read(&mut chunk) {
                Ok(0) => panic!("a download was truncated"),
                Ok(length) => {
                    pattern.fill(&mut expected[..length]);
                    assert_eq!(chunk[..length], expected[..length]);
                    *got += length as u64;
                }
                Err(error) => panic!("a download was reset: {error}"),
            }
        }
        thread::sleep(Duration::from_millis(20));
    }
    got.into_iter().min().unwrap_or(0)
}

#[test]
fn four_hundred_stalled_readers_stay_within_the_budget_and_reset_no_slow_download() {
    raise_open_files(4096);
    let net = Topology::three();
    route_many_addresses(&net);
    let _source = Source::tcp(&net.container, container(80), 5, 1 << 40);
    let publisher = Publisher::start(&net.host, &format!("8080:80 --to {}", addr::CONTAINER_V4));
    let own = publisher.process.rss();
    let slow: Vec<_> =
        (0..SLOW).map(|number| connect_from(&net.client, address(number), host(8080))).collect();
    let mut patterns: Vec<_> = (0..SLOW).map(|_| Pattern::new(5)).collect();
    download_slowly(&slow, &mut patterns, 5);
    let stalled: Vec<_> = (0..STALLED).map(|_| stall(&net)).collect();
    let least = download_slowly(&slow, &mut patterns, 100);
    assert!(least > 100 * 1000, "{least} bytes");
    let held = held(&publisher, own);
    println!("{} MiB held for {STALLED} stalled readers with {SLOW} slow downloads", held >> 20);
    assert!(held <= 256 << 20, "{held} bytes are held");
    let metrics = publisher.metrics();
    assert_eq!(metrics.port("connections", PORT), u64::from(STALLED + SLOW), "none was reset");
    assert!(
        metrics.value("tidegate_proxy_held_bytes") >= f64::from(STALLED) * f64::from(512 << 10)
    );
    assert!(
        metrics.value("tidegate_proxy_held_bytes")
            <= metrics.value("tidegate_proxy_held_bytes_limit")
    );
    drop(stalled);
    drop(slow);
    publisher.wait_for_metrics(|metrics| metrics.value("tidegate_proxy_held_bytes") == 0.0);
}

#[test]
fn beyond_the_budget_the_longest_stalled_connections_of_the_largest_client_are_reset() {
    raise_open_files(4096);
    const BUDGET: u64 = 16 << 20;
    let net = Topology::three();
    route_many_addresses(&net);
    let _source = Source::tcp(&net.container, container(80), 5, 1 << 40);
    let publisher =
        Publisher::start(&net.host, &format!("8080:80 --to {} --max-held 16M", addr::CONTAINER_V4));
    let own = publisher.process.rss();
    let slow: Vec<_> =
        (0..10).map(|number| connect_from(&net.client, address(number), host(8080))).collect();
    let mut patterns: Vec<_> = slow.iter().map(|_| Pattern::new(5)).collect();
    download_slowly(&slow, &mut patterns, 5);
    let stalled: Vec<_> = (0..200).map(|_| stall(&net)).collect();
    let least = download_slowly(&slow, &mut patterns, 100);
    assert!(least > 100 * 1000, "{least} bytes");
    let metrics = publisher.metrics();
    let cut = metrics.count("tidegate_proxy_evicted_connections_total{reason=\"held_bytes\"}");
    // The budget has room for 32 blocked connections.
    assert!((160..=190).contains(&cut), "{cut} were reset");
    assert!(metrics.value("tidegate_proxy_held_bytes") <= BUDGET as f64);
    let held = held(&publisher, own);
    assert!(held <= BUDGET, "{held} bytes are held");
    wait_for_reset(&stalled[0]);
    assert!(
        !is_ready(&stalled[199], PollFlags::empty(), Duration::ZERO),
        "the last one is still open"
    );
    let warning =
        publisher.process.wait_for_line("limit of bytes held for peers that do not read", TIMEOUT);
    assert!(warning.contains(&format!("largest=\"{}\"", addr::CLIENT_V4)), "{warning}");
    assert_eq!(publisher.process.output().matches("limit of bytes held").count(), 1);
}

#[test]
fn a_fast_stream_gets_large_buffers_and_returns_them_when_it_stalls_or_idles() {
    let setup = Setup::new("");
    let (client, server) = setup.pair_after(4 * MIB);
    let held = |metrics: &support::Metrics| metrics.value("tidegate_proxy_held_bytes");
    // In both directions.
    let wide = f64::from(5 << 20);
    assert_eq!(held(&setup.publisher.metrics()), wide);
    setup.publisher.wait_for_metrics(|metrics| held(metrics) == 0.0);
    carry(&client, &server, 4 * MIB);
    assert_eq!(held(&setup.publisher.metrics()), wide / 2.0);
    // Received data stays buffered until it is read.
    let sent = push_until_blocked(&client, &mut Pattern::new(9));
    thread::sleep(Duration::from_millis(2500));
    let stalled = held(&setup.publisher.metrics());
    assert!(stalled > 0.0 && stalled <= wide / 2.0, "{stalled}");
    let arrived = transfer::receive(&mut (&server).take(sent), 9);
    assert_eq!(arrived, Transfer::complete(sent));
    setup.publisher.wait_for_metrics(|metrics| held(metrics) == 0.0);
}
