//! Scrapes: a storm of them, and more ports than have their own series.

#[path = "api/ask.rs"]
mod ask;
#[path = "up/scene.rs"]
mod scene;
mod support;

use scene::Scene;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use support::{METRICS, Metrics, Publisher};
use tidegate_testbed::server::EchoServer;
use tidegate_testbed::{Namespace, Process, Signal, Topology, addr};

const SOON: Duration = Duration::from_secs(30);

/// Concurrent scrapers, and requests to the proxy meanwhile.
const SCRAPERS: usize = 100;
const REQUESTS: usize = 300;

/// A request that takes longer was blocked, not just delayed. `cargo bench --bench metrics_cost`
/// measures the delay; this machine also runs other tests.
const BLOCKED: Duration = Duration::from_secs(5);

#[test]
fn a_storm_of_scrapes_fails_no_request_and_no_accepted_scrape() {
    let net = Topology::three();
    let echo = EchoServer::tcp(&net.container, (addr::CONTAINER_V4, 80).into());
    let publisher = Publisher::start(&net.host, "8080:80 9000-9399:9000-9399 --to 172.30.0.2");
    let (stop, pages, refused) = (
        Arc::new(AtomicBool::new(false)),
        Arc::new(AtomicUsize::new(0)),
        Arc::new(AtomicUsize::new(0)),
    );
    let scrapers: Vec<_> = (0..SCRAPERS)
        .map(|_| {
            let (stop, pages, refused) =
                (Arc::clone(&stop), Arc::clone(&pages), Arc::clone(&refused));
            net.host.spawn_thread(move || {
                while !stop.load(Ordering::Relaxed) {
                    match scrape() {
                        Some(page) => {
                            assert!(page.contains(
                                "tidegate_proxy_connections_total{publish=\"0.0.0.0:9399/tcp\"} 0\n"
                            ));
                            pages.fetch_add(1, Ordering::Relaxed);
                        }
                        None => {
                            refused.fetch_add(1, Ordering::Relaxed);
                            std::thread::sleep(Duration::from_millis(20));
                        }
                    }
                }
            })
        })
        .collect();
    let times = net.client.run(|| {
        (0..REQUESTS)
            .map(|_| {
                let begun = Instant::now();
                request((addr::HOST_V4, 8080).into());
                begun.elapsed()
            })
            .collect::<Vec<_>>()
    });
    stop.store(true, Ordering::Relaxed);
    scrapers.into_iter().for_each(|scraper| scraper.join().unwrap());
    let slowest = times.iter().max().unwrap();
    let pages = pages.load(Ordering::Relaxed);
    println!(
        "{pages} pages, {} refused, slowest request {slowest:?}",
        refused.load(Ordering::Relaxed)
    );
    assert!(pages > 0);
    assert!(*slowest < BLOCKED, "{slowest:?}");
    assert_eq!(echo.served(), REQUESTS as u64);
    let metrics = publisher.metrics();
    assert_eq!(metrics.port("connections_total", "0.0.0.0:8080/tcp"), REQUESTS as u64);
    assert_eq!(metrics.refused("0.0.0.0:8080/tcp", "exhausted"), 0);
}

/// A complete page; `None` if there are too many scrapes.
#[track_caller]
fn scrape() -> Option<String> {
    let mut stream = TcpStream::connect_timeout(&METRICS.parse().unwrap(), SOON).unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    // A client may be refused before it has sent the request.
    let _ = stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
    let mut answer = String::new();
    if let Err(error) = stream.read_to_string(&mut answer) {
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
        return None;
    }
    let (head, body) = answer.split_once("\r\n\r\n")?;
    if head.starts_with("HTTP/1.1 503 ") {
        return None;
    }
    assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
    assert!(
        head.contains(&format!("Content-Length: {}", body.len())),
        "truncated: {head}, {} bytes",
        body.len()
    );
    Some(body.to_owned())
}

#[track_caller]
fn request(to: SocketAddr) {
    let mut stream = TcpStream::connect_timeout(&to, SOON).unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    stream.write_all(b"echo").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    assert_eq!(answer, b"echo");
}

/// The scrape times of a user with few scrapes, in ascending order.
fn scrapes(count: usize) -> Vec<Duration> {
    let mut times: Vec<_> = (0..count)
        .map(|_| {
            let begun = Instant::now();
            scrape().expect("the scrape of a user with few scrapes is served");
            let took = begun.elapsed();
            std::thread::sleep(Duration::from_millis(20));
            took
        })
        .collect();
    times.sort_unstable();
    times
}

/// Local clients have the same address and are distinguished by user: the file system user of the
/// thread that creates the socket.
#[test]
fn a_greedy_user_hardly_delays_the_scrapes_of_another() {
    const COUNT: usize = 50;
    let net = Topology::three();
    let publisher = Publisher::start(&net.host, "8080:80 9000-9019:9000-9019 --to 172.30.0.2");
    let baseline = net.host.run(|| scrapes(COUNT));
    let stop = Arc::new(AtomicBool::new(false));
    let greedy = |work: fn(&AtomicBool)| {
        let stop = Arc::clone(&stop);
        net.host.spawn_thread(move || {
            // SAFETY: setfsuid(2) takes a number and affects only this thread.
            unsafe { libc::setfsuid(65_534) };
            work(&stop);
        })
    };
    // Silent connections and scrapes in endless loops.
    let silent = |stop: &AtomicBool| {
        let mut held = std::collections::VecDeque::new();
        while !stop.load(Ordering::Relaxed) {
            held.extend(TcpStream::connect(METRICS));
            if held.len() > 200 {
                held.pop_front();
            }
            std::thread::sleep(Duration::from_micros(200));
        }
    };
    let scraping = |stop: &AtomicBool| {
        while !stop.load(Ordering::Relaxed) {
            if scrape().is_none() {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    };
    // Connections closed before they are accepted, when their user is no longer known.
    let fleeting = |stop: &AtomicBool| {
        while !stop.load(Ordering::Relaxed) {
            drop(TcpStream::connect(METRICS));
            std::thread::sleep(Duration::from_micros(200));
        }
    };
    let mut threads = vec![greedy(silent), greedy(silent), greedy(fleeting)];
    threads.extend((0..30).map(|_| greedy(scraping)));
    std::thread::sleep(Duration::from_millis(500));
    let loaded = net.host.run(|| scrapes(COUNT));
    stop.store(true, Ordering::Relaxed);
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    let (median, last) = (COUNT / 2, COUNT - 1);
    println!(
        "median {:?} baseline, {:?} under load; slowest {:?}, {:?}",
        baseline[median], loaded[median], baseline[last], loaded[last]
    );
    // A scrape waits for the page in progress and for pieces being sent. 33 threads and the server
    // share two cores.
    assert!(
        loaded[median] < baseline[median] * 10 + Duration::from_millis(100),
        "{:?}",
        loaded[median]
    );
    assert!(loaded[last] < BLOCKED, "{:?}", loaded[last]);
    let metrics = publisher.metrics();
    assert!(metrics.count("tidegate_scrape_refused_total{reason=\"silent\"}") > 0);
    assert!(
        metrics.count("tidegate_scrape_clients") < metrics.count("tidegate_scrape_clients_limit")
    );
    let log = publisher.process.output();
    let limits: Vec<_> =
        log.lines().filter(|line| line.contains("limit of metrics clients")).collect();
    assert!(!limits.is_empty() && limits.len() <= 4, "{limits:?}");
    assert!(limits.iter().all(|line| line.contains("user 65534 of this host")), "{limits:?}");
}

#[test]
fn a_metrics_port_in_use_blocks_no_network_and_is_bound_when_free() {
    let scene = Scene::new();
    let holder = scene.net.host.run(|| std::net::TcpListener::bind(METRICS)).unwrap();
    let file = scene.directory.path().join("compose.yaml");
    std::fs::write(&file, "services: { web: { command: [ sleep, '600' ], ports: [ '8080:80' ] } }")
        .unwrap();
    let mut command = scene.tidegate();
    command.args(["up", "--metrics", METRICS, "-f"]).arg(&file);
    let up = Process::spawn(command.env("TIDEGATE_LOG", "info"));
    up.wait_for_line("Ctrl-C takes", SOON);
    let warning = up.wait_for_line("metrics are not served", SOON);
    assert!(warning.contains("port 9464/tcp on 127.0.0.1 is in use by "), "{warning}");
    assert!(warning.contains(&format!("(pid {})", std::process::id())), "{warning}");
    let ps = || String::from_utf8(scene.tidegate().arg("ps").output().unwrap().stdout).unwrap();
    assert!(ps().contains("metrics are not served: 127.0.0.1:9464 is in use"), "{}", ps());
    let status = || ask::get(&scene.socket(), "/v1/status").1["metrics"].clone();
    assert_eq!(status(), serde_json::json!({ "address": METRICS, "served": null }));
    drop(holder);
    up.wait_for_line("metrics are served now", SOON);
    assert!(!ps().contains("not served"));
    assert_eq!(status()["served"], METRICS);
    let page = scene.net.host.run(scrape).unwrap();
    assert!(page.contains("tidegate_network_endpoint_ports{endpoint=\"web\"} 2\n"), "{page}");
}

#[test]
fn ports_without_their_own_series_are_summed_up_and_sums_stay_correct() {
    let scene = Scene::new();
    let file = scene.directory.path().join("compose.yaml");
    let project =
        "services: { web: { command: [ sleep, '600' ], ports: [ '203.0.113.1:8080:80' ] } }";
    std::fs::write(&file, project).unwrap();
    let mut command = scene.tidegate();
    command
        .args(["up", "--firewall=none", "--metrics", METRICS, "--metrics-max-ports", "3", "-f"])
        .arg(&file);
    let mut up = Process::spawn(&mut command);
    up.wait_for_line("Ctrl-C takes", SOON);
    let inside = scene::service_namespace(&up, "web");
    let _echo = EchoServer::tcp(&inside, "[::]:80".parse().unwrap());

    let socket = scene.socket();
    let mut ids = Vec::new();
    for port in 8081..=8086 {
        let new = format!(r#"{{"endpoint": "web", "spec": "203.0.113.1:{port}:80"}}"#);
        let (code, opened) = ask::ask(&socket, "POST", "/v1/ports", &new);
        assert_eq!(code, 201, "{opened}");
        ids.push(opened[0]["id"].as_u64().unwrap());
    }
    let requests = |port: u16, count: u64| {
        scene.net.client.run(|| (0..count).for_each(|_| request((addr::HOST_V4, port).into())));
    };
    (8080..=8086).for_each(|port| requests(port, 2));
    let page = settled(&scene.net.host, "tidegate_proxy_connections{publish=\"other/tcp\"}", 0);
    let total = |page: &Metrics| page.sum("tidegate_proxy_connections_total{");
    assert_eq!(
        series(&page.0),
        ["203.0.113.1:8080/tcp", "203.0.113.1:8081/tcp", "203.0.113.1:8082/tcp", "other/tcp"]
    );
    assert_eq!(page.count("tidegate_proxy_connections_total{publish=\"other/tcp\"}"), 8);
    assert_eq!(
        page.count("tidegate_proxy_bytes_total{publish=\"other/tcp\",direction=\"in\"}"),
        32
    );
    assert_eq!(page.count("tidegate_proxy_dial_seconds_count{publish=\"other/tcp\"}"), 8);
    assert_eq!(page.count("tidegate_proxy_ports{series=\"other\"}"), 4);
    assert_eq!(total(&page), 14);
    // The API has all of them.
    let (_, figures) = ask::get(&socket, "/v1/figures");
    let begun: Vec<u64> = figures["ports"]
        .as_array()
        .unwrap()
        .iter()
        .map(|port| port["begun"].as_u64().unwrap())
        .collect();
    assert_eq!(begun, [2; 7]);

    // Two ports of the sum and one with its own series are removed. The sum keeps its counts, and
    // the next port has its own series.
    for id in [ids[0], ids[4], ids[5]] {
        assert_eq!(ask::ask(&socket, "DELETE", &format!("/v1/ports/{id}"), "").0, 204);
    }
    let new = r#"{"endpoint": "web", "spec": "203.0.113.1:8090:80"}"#;
    assert_eq!(ask::ask(&socket, "POST", "/v1/ports", new).0, 201);
    requests(8090, 1);
    requests(8083, 1);
    let page = settled(&scene.net.host, "tidegate_proxy_connections{publish=\"other/tcp\"}", 0);
    assert_eq!(
        series(&page.0),
        ["203.0.113.1:8080/tcp", "203.0.113.1:8082/tcp", "203.0.113.1:8090/tcp", "other/tcp"]
    );
    assert_eq!(page.count("tidegate_proxy_connections_total{publish=\"other/tcp\"}"), 9);
    assert_eq!(page.count("tidegate_proxy_ports{series=\"other\"}"), 2);
    assert_eq!(total(&page), 14 - 2 + 2);
    up.stop(Signal::INT, SOON);
}

/// The page, once `series` has the value `wanted`.
#[track_caller]
fn settled(host: &Namespace, series: &str, wanted: u64) -> Metrics {
    let mut page = String::new();
    let held = tidegate_testbed::eventually(SOON, || {
        page = host.run(scrape).unwrap_or_default();
        page.lines().any(|line| line == format!("{series} {wanted}"))
    });
    assert!(held, "{series} never was {wanted}: {page}");
    Metrics(page)
}

/// The values of the label `publish` for connections.
fn series(page: &str) -> Vec<&str> {
    let lines = page
        .lines()
        .filter_map(|line| line.strip_prefix("tidegate_proxy_connections_total{publish=\""));
    lines.map(|rest| rest.split('"').next().unwrap()).collect()
}
