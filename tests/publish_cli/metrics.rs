//! Metrics.

use super::*;

#[test]
fn metrics_match_the_payload_exactly() {
    let net = Topology::three();
    let backend = Backend::tcp(&net.container, (addr::CONTAINER_V4, 80).into());
    let publisher = Publisher::start(&net.host, "8080:80 8081:81 --to 172.30.0.2");
    let zero = publisher.metrics();
    assert_eq!(zero.port("connections_total", PORT), 0);
    // Over both families, small, and large enough to be spliced.
    let v4 = SocketAddr::from((addr::HOST_V4, 8080));
    let v6 = SocketAddr::from((addr::HOST_V6, 8080));
    for (to, up, down) in [(v4, 1, 0), (v4, 1000, 700_001), (v4, 300_000, 17), (v6, 5, 6)] {
        let client = connect(&net.client, to);
        let server = backend.accept();
        assert_eq!(publisher.metrics().port("connections", publish(to)), 1);
        std::thread::scope(|scope| {
            for (stream, length) in [(&client, up), (&server, down)] {
                scope.spawn(move || {
                    { stream }.write_all(&vec![b'x'; length]).unwrap();
                    stream.shutdown(Shutdown::Write).unwrap();
                });
            }
            let at_server = scope.spawn(|| read_all(&server));
            assert_eq!(read_all(&client).0.len(), down);
            assert_eq!(at_server.join().unwrap().0.len(), up);
        });
        publisher.wait_for_metrics(|metrics| metrics.port("connections", publish(to)) == 0);
    }
    let refused = connect_and_see(&net.client, (addr::HOST_V4, 8081).into());
    assert_eq!(refused, Err(io::ErrorKind::ConnectionReset));
    let metrics = publisher.wait_for_metrics(|metrics| {
        let live = metrics.port("connections", "0.0.0.0:8081/tcp");
        (metrics.refused("0.0.0.0:8081/tcp", "backend_refused"), live) == (1, 0)
    });
    let bytes =
        |publish, direction| metrics.labelled("bytes_total", publish, "direction", direction);
    assert_eq!(metrics.port("connections_total", publish(v4)), 3);
    assert_eq!((bytes(publish(v4), "in"), bytes(publish(v4), "out")), (301_001, 700_018));
    assert_eq!(metrics.port("connections_total", publish(v6)), 1);
    assert_eq!((bytes(publish(v6), "in"), bytes(publish(v6), "out")), (5, 6));
    assert_eq!(metrics.port("connection_resets_total", publish(v4)), 0);
    assert_eq!(metrics.port("connections_total", "0.0.0.0:8081/tcp"), 1);
    assert_eq!(metrics.port("dial_seconds_count", publish(v4)), 3);
    assert_eq!(metrics.port("dial_seconds_count", publish(v6)), 1);
    assert_eq!(metrics.port("dial_seconds_count", "0.0.0.0:8081/tcp"), 0);
    assert_eq!(metrics.port("connection_seconds_count", publish(v4)), 3);
    assert!(metrics.value(&format!("tidegate_proxy_dial_seconds_sum{{publish=\"{PORT}\"}}")) > 0.0);

    // A reset is counted with the payload before it.
    let (client, server) = (connect(&net.client, v4), backend.accept());
    (&client).write_all(b"0123456789").unwrap();
    (&server).read_exact(&mut [0; 10]).unwrap();
    support::reset(client);
    let metrics = publisher.wait_for_metrics(|metrics| metrics.port("connections", PORT) == 0);
    assert_eq!(metrics.port("connection_resets_total", PORT), 1);
    assert_eq!(metrics.labelled("bytes_total", PORT, "direction", "in"), 301_011);
}

#[test]
fn the_page_is_valid_for_prometheus() {
    let net = Topology::three();
    let publisher = Publisher::start(&net.host, "8080:80 [::1]:5353:53/udp --to 172.30.0.2");
    connect_and_see(&net.client, (addr::HOST_V4, 8080).into()).unwrap_err();
    let (head, body) = http(&net.host, METRICS, "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
    let head = head.to_ascii_lowercase();
    assert!(head.contains("content-type: text/plain; version=0.0.4"), "{head}");
    assert!(head.contains(&format!("content-length: {}", body.len())), "{head}");
    let families = check_exposition(&body);
    for family in [
        "tidegate_build_info",
        "tidegate_proxy_connections_total",
        "tidegate_proxy_dial_seconds",
        "process_open_fds",
        "process_resident_memory_bytes",
        "process_cpu_seconds_total",
    ] {
        assert!(families.contains(family), "{family} is not among {families:?}");
    }
    // The number reported by the process, and by the kernel.
    let reported = publisher.metrics().value("process_open_fds") as usize;
    let known = publisher.process.open_fds();
    // The scrape itself has some descriptors open.
    assert!(reported.abs_diff(known) <= 5, "{reported} reported, {known} known");
}

#[test]
fn invalid_requests_get_an_error_and_the_endpoint_continues() {
    let net = Topology::three();
    let publisher = Publisher::start(&net.host, "8080:80 --to 172.30.0.2");
    for (request, status) in [
        ("GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_owned(), "200"),
        ("GET /metrics?name[]=x HTTP/1.1\r\nHost: x\r\n\r\n".to_owned(), "200"),
        ("GET /nosuch HTTP/1.1\r\nHost: x\r\n\r\n".to_owned(), "404"),
        ("GET /metrics/../../etc/passwd HTTP/1.1\r\n\r\n".to_owned(), "404"),
        ("HEAD /metrics HTTP/1.1\r\nHost: x\r\n\r\n".to_owned(), "200"),
        ("POST /metrics HTTP/1.1\r\nContent-Length: 0\r\n\r\n".to_owned(), "405"),
        ("DELETE /nosuch HTTP/1.1\r\n\r\n".to_owned(), "405"),
        ("\u{16}\u{3}\u{1}\0\u{fffd}\r\n\r\n".to_owned(), "400"),
        ("GET\r\n\r\n".to_owned(), "400"),
        (format!("GET /metrics HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(100_000)), "400"),
        (
            (0..200).fold("GET /metrics HTTP/1.1\r\n".to_owned(), |text, n| {
                format!("{text}X-{n}: y\r\n")
            }) + "\r\n",
            "400",
        ),
    ] {
        let mut stream = connect(&net.host, METRICS.parse().unwrap());
        // The response may come before all of it is sent.
        let _ = stream.write_all(request.as_bytes());
        let answer = read_all(&stream).0;
        let answer = String::from_utf8_lossy(&answer);
        let start: String = request.chars().take(60).collect();
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{start:?}: {answer:?}");
    }
    // Half a request followed by the end.
    let mut stream = connect(&net.host, METRICS.parse().unwrap());
    stream.write_all(b"GET /metr").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    assert!(String::from_utf8_lossy(&read_all(&stream).0).starts_with("HTTP/1.1 400 "));
    publisher.metrics();
}

#[test]
fn slow_scrapers_block_neither_others_nor_connections() {
    let net = Topology::three();
    let _echo = EchoServer::tcp(&net.container, (addr::CONTAINER_V4, 80).into());
    let publisher = Publisher::start(&net.host, "8080:80 --to 172.30.0.2");
    let slow: Vec<TcpStream> = (0..5)
        .map(|_| {
            let mut stream = connect(&net.host, METRICS.parse().unwrap());
            stream.write_all(b"GET /metrics HTTP/1.1\r\n").unwrap();
            stream
        })
        .collect();
    publisher.metrics();
    // More than the limit: the oldest are evicted, without effect on scrapes and ports.
    let more: Vec<TcpStream> =
        (0..100).map(|_| connect(&net.host, METRICS.parse().unwrap())).collect();
    assert_eq!(ask(&connect(&net.client, (addr::HOST_V4, 8080).into()), b"unmoved"), b"unmoved");
    publisher.metrics();
    // All were closed in the end without sending anything.
    for stream in slow.iter().chain(&more) {
        assert!(read_all(stream).0.is_empty());
    }
    let metrics = publisher.metrics();
    let evicted = metrics.count("tidegate_scrape_refused_total{reason=\"silent\"}");
    let late = metrics.count("tidegate_scrape_refused_total{reason=\"timeout\"}");
    assert!(evicted >= 41 && evicted + late == 105, "{evicted} evicted, {late} timed out");
    assert_eq!(metrics.port("connections_total", PORT), 1);
}

#[test]
fn a_scraper_that_does_not_read_is_closed() {
    let net = Topology::three();
    // A page larger than the buffers of a connection.
    let publisher =
        Publisher::start(&net.host, "127.0.0.1:20000-23999:20000-23999 --to 172.30.0.2");
    let idle = publisher.process.open_fds();
    let scraper = net.host.run(|| {
        let socket =
            socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
        socket.set_recv_buffer_size(4096).unwrap();
        socket.connect(&METRICS.parse::<SocketAddr>().unwrap().into()).unwrap();
        TcpStream::from(socket)
    });
    (&scraper).write_all(b"GET /metrics HTTP/1.1\r\n\r\n").unwrap();
    wait_until("it is answered", || {
        SockRef::from(&scraper).peek(&mut [std::mem::MaybeUninit::uninit(); 1]).is_ok()
    });
    wait_until("it is given up", || publisher.process.open_fds() <= idle);
    publisher.metrics();
}
