//! Published ports and their output.

use super::*;

#[test]
fn a_free_port_is_the_same_for_both_families_and_is_printed() {
    let net = Topology::three();
    let _echo = EchoServer::tcp(&net.container, (addr::CONTAINER_V4, 80).into());
    let mut command =
        tidegate(&net.host, "publish 80 80/udp 127.0.0.1::80 0:80 --to 172.30.0.2 --json");
    let process = Process::spawn(&mut command);
    let published = published(&process);
    let ports = |protocol: &str, ip: &str| -> Vec<u16> {
        let wanted = |entry: &&Entry| entry.protocol == protocol && entry.ip == ip;
        published.iter().filter(wanted).map(|entry| entry.host_port).collect()
    };
    assert_eq!(ports("tcp", "0.0.0.0").len(), 2);
    assert_eq!(ports("tcp", "0.0.0.0"), ports("tcp", "::"));
    assert_eq!(ports("tcp", "127.0.0.1").len(), 1);
    assert_eq!(ports("udp", "0.0.0.0").len(), 1);
    assert_eq!(ports("udp", "0.0.0.0"), ports("udp", "::"));
    assert!(published.iter().all(|entry| entry.host_port > 0 && entry.container_port == 80));
    for port in ports("tcp", "::") {
        for to in [SocketAddr::from((addr::HOST_V4, port)), (addr::HOST_V6, port).into()] {
            assert_eq!(ask(&connect(&net.client, to), b"found"), b"found", "{to}");
        }
    }

    let process = Process::spawn(&mut tidegate(&net.host, "publish 81 --to 172.30.0.2"));
    let printed = |line: String| {
        line.split("/tcp").next().and_then(|at| at.rsplit(':').next()?.parse::<u16>().ok())
    };
    let v4 = printed(process.wait_for_line("0.0.0.0:", TIMEOUT)).unwrap();
    let v6 = printed(process.wait_for_line("[::]:", TIMEOUT)).unwrap();
    assert_eq!(v4, v6);
    assert!(net.host.is_bound(Protocol::Tcp, v4));
}

#[test]
fn the_ports_of_a_range_map_to_container_ports_in_order() {
    let net = Topology::three();
    let backends: Vec<Backend> = (80..85)
        .map(|port| Backend::tcp(&net.container, (addr::CONTAINER_V4, port).into()))
        .collect();
    let process =
        Process::spawn(&mut tidegate(&net.host, "publish 9000-9004:80-84 --to 172.30.0.2"));
    process.wait_for_line("0.0.0.0:9000-9004/tcp  ->  172.30.0.2 port 80-84", TIMEOUT);
    process.wait_for_line("[::]:9000-9004/tcp", TIMEOUT);
    for (port, backend) in (9000..).zip(&backends) {
        let mut client = connect(&net.client, (addr::HOST_V4, port).into());
        client.write_all(&port.to_be_bytes()).unwrap();
        let mut seen = [0; 2];
        backend.accept().read_exact(&mut seen).unwrap();
        assert_eq!(seen, port.to_be_bytes());
    }
}

#[test]
fn the_first_free_port_of_a_range_is_used_for_a_single_port() {
    let net = Topology::three();
    let _busy = net.host.run(|| TcpListener::bind((Ipv4Addr::LOCALHOST, 9000))).unwrap();
    let _busy_v6 = net.host.run(|| TcpListener::bind((Ipv6Addr::LOCALHOST, 9001))).unwrap();
    let process = Process::spawn(&mut tidegate(&net.host, "publish 9000-9002:80 --to 172.30.0.2"));
    process.wait_for_line("0.0.0.0:9002/tcp", TIMEOUT);
    process.wait_for_line("[::]:9002/tcp", TIMEOUT);
    let stderr = fails(tidegate(&net.host, "publish 9000-9002:81 --to 172.30.0.2"), 1);
    assert_one_line(&stderr);
    assert!(stderr.contains("9000-9002"), "{stderr}");
    assert_eq!(net.host.bound_ports(Protocol::Tcp), BTreeSet::from([9000, 9001, 9002]));
}

#[test]
fn published_ports_are_printed_as_json() {
    let host = Namespace::new();
    let arguments =
        "publish 127.0.0.1:8080:80 [::1]:5353:53/udp --to 172.30.0.2 --json --metrics 127.0.0.1:0";
    let process = Process::spawn(&mut tidegate(&host, arguments));
    let line = process.wait_for_line("{", TIMEOUT);
    let printed: serde_json::Value = serde_json::from_str(&line).unwrap();
    let metrics = printed["metrics"].as_str().unwrap().strip_prefix("http://").unwrap();
    let (head, _) =
        http(&host, metrics.strip_suffix("/metrics").unwrap(), "GET /metrics HTTP/1.0\r\n\r\n");
    assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
    let mut published = published(&process);
    published.sort();
    let entry = |publish: &str, ip: &str, host_port, protocol: &str, container_port| Entry {
        publish: publish.to_owned(),
        ip: ip.to_owned(),
        host_port,
        protocol: protocol.to_owned(),
        container_port,
    };
    let expected = [
        entry("127.0.0.1:8080/tcp", "127.0.0.1", 8080, "tcp", 80),
        entry("[::1]:5353/udp", "::1", 5353, "udp", 53),
    ];
    assert_eq!(published, expected);

    let without = Process::spawn(&mut tidegate(&host, "publish 8081:80 --to 172.30.0.2 --json"));
    let printed: serde_json::Value =
        serde_json::from_str(&without.wait_for_line("{", TIMEOUT)).unwrap();
    assert!(printed["metrics"].is_null());
}

#[test]
fn a_closed_standard_output_does_not_end_it() {
    let net = Topology::three();
    let _echo = EchoServer::tcp(&net.container, (addr::CONTAINER_V4, 80).into());
    let (reader, writer) = io::pipe().unwrap();
    drop(reader);
    // The most verbose output, with a line for each connection.
    let mut command =
        tidegate(&net.host, "publish 8080:80 8081:81 5353:53/udp --to 172.30.0.2 --workers 1");
    command.env("TIDEGATE_LOG", "trace").stdin(Stdio::null());
    command.stdout(writer.try_clone().unwrap()).stderr(writer);
    let mut process = Killed(command.spawn().unwrap());
    drop(command);
    net.host.wait_until_bound(Protocol::Tcp, 8081, TIMEOUT);
    net.host.wait_until_bound(Protocol::Udp, 5353, TIMEOUT);
    for _ in 0..3 {
        // Ports 81 and 53 of the container are closed, which is logged.
        let refused = net.client.run(|| TcpStream::connect((addr::HOST_V4, 8081)));
        assert!(refused.is_err() || read_all(&with_timeouts(refused.unwrap())).1.is_some());
        let socket = net.client.run(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))).unwrap();
        socket.send_to(b"?", (addr::HOST_V4, 5353)).unwrap();
        let served = connect(&net.client, (addr::HOST_V4, 8080).into());
        assert_eq!(ask(&served, b"still served"), b"still served");
    }
    assert!(process.0.try_wait().unwrap().is_none(), "the process has ended");
    rustix::process::kill_process(rustix::process::Pid::from_child(&process.0), Signal::TERM)
        .unwrap();
    wait_until("the process has ended", || process.0.try_wait().unwrap().is_some());
    assert_eq!(process.0.try_wait().unwrap().unwrap().code(), Some(0));
}

#[test]
fn an_error_that_cannot_be_printed_keeps_its_exit_status() {
    let host = Namespace::new();
    let (reader, writer) = io::pipe().unwrap();
    drop(reader);
    for (arguments, code) in [
        ("publish 8080:80/sctp --to 172.30.0.2", 1),
        ("publish 8080:80 8080:80 --to 172.30.0.2", 2),
        ("publish 0", 2),
    ] {
        let mut command = tidegate(&host, arguments);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(writer.try_clone().unwrap());
        let mut process = Killed(command.spawn().unwrap());
        wait_until("the process has ended", || process.0.try_wait().unwrap().is_some());
        assert_eq!(process.0.try_wait().unwrap().unwrap().code(), Some(code), "{arguments}");
    }
}

#[test]
fn ten_thousand_ports_of_one_process_are_ready_and_served() {
    const PORTS: u16 = 10_000;
    let limit = raise_open_files(16_384);
    assert!(
        limit > 10_500,
        "this test needs 10,500 open files, the limit is {limit} (ulimit -n -H)"
    );
    let net = Topology::three();
    let backends: BTreeMap<u16, Backend> = (0..20)
        .map(|number| 20_000 + number * (PORTS / 20) + number)
        .map(|port| (port, Backend::tcp(&net.container, (addr::CONTAINER_V4, port).into())))
        .collect();
    let last = 20_000 + PORTS - 1;
    let begun = Instant::now();
    let publisher = Publisher::start(
        &net.host,
        &format!("0.0.0.0:20000-{last}:20000-{last} --to {}", addr::CONTAINER_V4),
    );
    let (ready, memory) = (begun.elapsed(), publisher.process.rss());
    println!("{PORTS} ports: ready in {ready:?}, {memory} bytes of memory");
    assert!(memory < 64 << 20, "{memory} bytes");

    for (port, backend) in &backends {
        let client = connect(&net.client, (addr::HOST_V4, *port).into());
        let mut server = backend.accept();
        server.write_all(&port.to_be_bytes()).unwrap();
        drop(server);
        assert_eq!(read_all(&client), (port.to_be_bytes().to_vec(), None));
    }
    // The ports have no backend: the proxy resets, while a port that is not published refuses.
    net.client.run(|| {
        for port in (20_000..=last).filter(|port| !backends.contains_key(port)) {
            let end = TcpStream::connect_timeout(&(addr::HOST_V4, port).into(), TIMEOUT)
                .and_then(|stream| with_timeouts(stream).read(&mut [0]));
            assert_eq!(
                end.map_err(|error| error.kind()),
                Err(io::ErrorKind::ConnectionReset),
                "port {port}"
            );
        }
    });
    let metrics = publisher.metrics();
    // The first thousand have their own series, the others are summed up.
    let lines =
        metrics.0.lines().filter(|line| line.starts_with("tidegate_proxy_connections_total{"));
    let values: Vec<u64> =
        lines.map(|line| line.rsplit_once(' ').unwrap().1.parse().expect("a number")).collect();
    assert_eq!((values.len(), values.iter().sum()), (1001, u64::from(PORTS)));
    assert_eq!(metrics.port("connections_total", "0.0.0.0:20999/tcp"), 1);
    assert_eq!(metrics.port("connections_total", "other/tcp"), u64::from(PORTS) - 1000);
}

/// A port that is printed as published must accept connections.
#[test]
fn with_few_descriptors_all_ports_are_served_or_it_fails() {
    let net = Topology::three();
    for count in [10, 15, 20, 25, 30] {
        let last = 9000 + count - 1;
        let mut command =
            tidegate(&net.host, &format!("publish 9000-{last}:9000-{last} --to 172.30.0.2"));
        support::limit_open_files(&mut command, 64);
        let mut process = Process::spawn(&mut command);
        let ready = || process.output().contains("[::]:9000") || process.output().contains("error");
        wait_until("there is output", ready);
        if process.output().contains("error") {
            let stderr = process.wait_for_output(TIMEOUT);
            assert_one_line(&stderr);
            assert!(stderr.contains("ulimit -n"), "{stderr}");
            assert_eq!(process.wait(TIMEOUT).code(), Some(1));
            continue;
        }
        let backend = Backend::tcp(&net.container, (addr::CONTAINER_V4, last).into());
        let mut client = connect(&net.client, (addr::HOST_V4, last).into());
        client.write_all(b"?").unwrap();
        let served = eventually(TIMEOUT / 3, || backend.has_waiting());
        assert!(served, "none of {count} ports accepts a connection:\n{}", process.output());
    }
}

/// Other software has set `route_localnet`, and packets to loopback addresses come in from links.
#[test]
fn a_port_on_a_loopback_address_responds_to_the_host_only() {
    let net = Topology::three();
    for namespace in [&net.host, &net.client] {
        namespace.sysctl("net.ipv4.conf.all.route_localnet", "1");
    }
    net.client.ip_all("addr del 127.0.0.1/8 dev lo\nroute add 127.0.0.0/8 via 203.0.113.1");
    let _echo = EchoServer::tcp(&net.container, (addr::CONTAINER_V4, 80).into());
    let [ours, of_others]: [SocketAddr; 2] =
        ["127.0.0.1:8080", "127.0.0.1:9191"].map(|at| at.parse().unwrap());
    let _others = EchoServer::tcp(&net.host, of_others);
    let arguments = "publish 127.0.0.1:8080:80 --to 172.30.0.2 --metrics 127.0.0.1:9464";
    let process = Process::spawn(&mut tidegate(&net.host, arguments));
    process.wait_for_line("127.0.0.1:8080", TIMEOUT);
    let metrics: SocketAddr = "127.0.0.1:9464".parse().unwrap();
    let reaches = |from: &Namespace, to: SocketAddr| {
        let timeout = std::time::Duration::from_millis(500);
        from.run(|| TcpStream::connect_timeout(&to, timeout)).is_ok()
    };
    assert!(reaches(&net.host, ours));
    assert!(reaches(&net.client, of_others), "such packets arrive");
    assert!(!reaches(&net.client, ours));
    assert!(eventually(TIMEOUT, || reaches(&net.host, metrics)));
    assert!(!reaches(&net.client, metrics));
}
