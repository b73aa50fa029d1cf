//! `tidegate publish` as a command: what it refuses and how it says so, what it prints, and what it tells Prometheus.

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use clap::CommandFactory;
use socket2::SockRef;
use support::{
    Backend, METRICS, PATIENCE, Publisher, ask, connect, http, patient, read_all, tidegate, wait_until,
};
use tidegate_testbed::server::EchoServer;
use tidegate_testbed::{Namespace, Process, Protocol, Signal, Topology, addr, eventually, raise_open_files};

/// How the published port is called where only IPv4 is looked at.
const PORT: &str = "0.0.0.0:8080/tcp";

/// The user id of nobody.
const NOBODY: u32 = 65_534;

// ---- what is refused

#[test]
fn a_command_line_that_makes_no_sense_is_refused_with_its_reason() {
    let host = Namespace::new();
    for (arguments, reason) in [
        ("300.0.0.1:8080:80 --to 172.30.0.2", "300.0.0.1"),
        ("example.org:8080:80 --to 172.30.0.2", "example.org"),
        ("::1:8080:80 --to 172.30.0.2", "brackets"),
        ("8080:0 --to 172.30.0.2", "container port 0 is not between 1 and 65535"),
        ("0 --to 172.30.0.2", "container port 0 is not between 1 and 65535"),
        ("8080:70000 --to 172.30.0.2", "container port 70000 is not between 1 and 65535"),
        ("70000:80 --to 172.30.0.2", "host port 70000 is not between 1 and 65535"),
        ("8080:-1 --to 172.30.0.2", "8080:-1"),
        ("9001-9000:80-81 --to 172.30.0.2", "host port range 9001-9000 ends before it starts"),
        ("9000-9001:81-80 --to 172.30.0.2", "container port range 81-80 ends before it starts"),
        ("9000-9002:80-81 --to 172.30.0.2", "differ in number"),
        ("8080:80/icmp --to 172.30.0.2", "icmp"),
        ("8080: --to 172.30.0.2", "8080:"),
        ("8080:80 8080:81 --to 172.30.0.2", "\"8080:80\" and \"8080:81\" both claim 8080/tcp"),
        ("8080:80 127.0.0.1:8080:80 --to 172.30.0.2", "both claim 8080/tcp on 127.0.0.1"),
        ("9000-9010:9000-9010 [::]:9005:80 --to 172.30.0.2", "both claim 9005/tcp"),
        ("8080:80/udp 8080:80/tcp 8080:81/udp --to 172.30.0.2", "both claim 8080/udp"),
        ("8080:80 --to 172.30.0.2 --allow 10.0.0.0/33", "10.0.0.0/33"),
        ("8080:80 --to 172.30.0.2 --allow 10.0.0.1/8", "10.0.0.0/8 or 10.0.0.1/32"),
        ("8080:80 --to 172.30.0.2 --allow everybody", "everybody"),
        ("8080:80 --to 172.30.0", "172.30.0"),
        ("8080:80 --to 0.0.0.0", "0.0.0.0"),
        ("8080:80 --to ::", "::"),
        ("8080:80", "required"),
        ("--to 172.30.0.2", "required"),
        ("8080:80 --netns /proc/self/ns/net --pid 1", "cannot be used with"),
        ("8080:80 --to 172.30.0.2 --to 172.30.0.3", "--to"),
        ("8080:80 --to 172.30.0.2 --pid -1", "-1"),
        ("8080:80 --to 172.30.0.2 --source gateway", "gateway"),
        ("8080:80 --to 172.30.0.2 --proxy-protocol v3", "v3"),
        ("8080:80 --to 172.30.0.2 --dial-timeout 5", "5"),
        ("8080:80 --to 172.30.0.2 --dial-timeout 0s", "longer than nothing"),
        ("8080:80 --to 172.30.0.2 --udp-idle-timeout 1y", "7 days"),
        ("8080:80 --to 172.30.0.2 --drain-timeout soon", "soon"),
        ("8080:80 --to 172.30.0.2 --max-connections many", "many"),
        ("8080:80 --to 172.30.0.2 --udp-max-sessions 0", "0"),
        ("8080:80 --to 172.30.0.2 --udp-max-source-sessions 0", "0"),
        ("8080:80 --to 172.30.0.2 --workers 0", "0"),
        ("8080:80 --to 172.30.0.2 --metrics 9464", "9464"),
        ("8080:80 --to 172.30.0.2 --metrics localhost:9464", "localhost:9464"),
        ("8080:80 --to 172.30.0.2 --no-such-flag", "--no-such-flag"),
    ] {
        let said = fails(tidegate(&host, &format!("publish {arguments}")), 2);
        let line = said.lines().next().unwrap_or_default();
        let ours = line.starts_with("tidegate: error: ");
        assert!(ours || line.starts_with("error: "), "{arguments}: {said}");
        assert!(!ours || said.lines().count() == 1, "{arguments}: {said}");
        // What was missing stands in the line below.
        assert!(line.contains(reason), "{arguments}: {said}");
    }
    assert_nothing_is_bound(&host);
}

#[test]
fn what_cannot_be_done_is_told_in_one_line() {
    let net = Topology::three();
    let host = &net.host;
    let directory = tempfile::tempdir().unwrap();
    let (there, not_there) = (directory.path().display(), directory.path().join("nosuch"));
    for (arguments, reason) in [
        ("8080:80/sctp --to 172.30.0.2".to_owned(), "protocol not supported".to_owned()),
        ("8080:80 8081:80/sctp --to 172.30.0.2".to_owned(), "protocol not supported".to_owned()),
        ("192.0.2.77:8080:80 --to 172.30.0.2".to_owned(), "192.0.2.77".to_owned()),
        ("[2001:db8::77]:8080:80/udp --to 172.30.0.2".to_owned(), "[2001:db8::77]".to_owned()),
        ("8080:80 192.0.2.77:8081:80 --to 172.30.0.2".to_owned(), "port 8081/tcp on 192.0.2.77".to_owned()),
        (
            format!("8080:80 --netns {}", not_there.display()),
            format!("no such namespace {}", not_there.display()),
        ),
        ("8080:80 --netns /etc/passwd".to_owned(), "/etc/passwd is not a network namespace".to_owned()),
        (format!("8080:80 --netns {there}"), format!("{there} is not a network namespace")),
        (
            "8080:80 --netns /proc/self/ns/mnt".to_owned(),
            "/proc/self/ns/mnt is not a network namespace".to_owned(),
        ),
        // Beyond the largest pid there may be (PID_MAX_LIMIT of include/linux/threads.h).
        ("8080:80 --pid 4194305".to_owned(), "no process 4194305".to_owned()),
        ("8080 8081:8081 --to 127.0.0.1".to_owned(), "port 0.0.0.0:8081/tcp would lead to itself".to_owned()),
        ("8080:8080/udp --to ::1".to_owned(), "port [::]:8080/udp would lead to itself".to_owned()),
        (
            "203.0.113.1:8080:8080 --to 203.0.113.1".to_owned(),
            "port 203.0.113.1:8080/tcp would lead to itself, at 203.0.113.1:8080".to_owned(),
        ),
        (
            "8080:80 --to 172.30.0.2 --metrics 192.0.2.77:9464".to_owned(),
            "metrics address 192.0.2.77:9464".to_owned(),
        ),
    ] {
        let said = fails(tidegate(host, &format!("publish {arguments}")), 1);
        assert_one_line(&said);
        assert!(said.contains(&reason), "{arguments}: {said}");
    }
    assert_nothing_is_bound(host);
}

#[test]
fn a_process_that_has_just_ended_is_no_process() {
    let host = Namespace::new();
    let mut child = Command::new("true").spawn().unwrap();
    let pid = child.id();
    child.wait().unwrap();
    let said = fails(tidegate(&host, &format!("publish 8080:80 --pid {pid}")), 1);
    assert_eq!(said, format!("tidegate: error: no process {pid}\n"));
}

#[test]
fn a_busy_port_is_told_with_its_holder() {
    let net = Topology::three();
    let holder = Publisher::start(&net.host, "8080:80 5353:53/udp --to 172.30.0.2");
    let holder_is = format!("is in use by tidegate (pid {})", holder.process.pid());
    for (arguments, port) in [
        ("8080:80", "port 8080/tcp on 0.0.0.0"),
        ("127.0.0.1:8080:80", "port 8080/tcp on 127.0.0.1"),
        ("[::1]:8080:80", "port 8080/tcp on [::1]"),
        ("5353:53/udp", "port 5353/udp on 0.0.0.0"),
        ("8075-8085:75-85", "port 8080/tcp on 0.0.0.0"),
    ] {
        let said = fails(tidegate(&net.host, &format!("publish {arguments} --to 172.30.0.2")), 1);
        assert_one_line(&said);
        assert!(said.contains(&format!("{port} {holder_is}")), "{arguments}: {said}");
    }
    // Another program, and one that holds the port on one address only.
    let loopback = net.host.run(|| TcpListener::bind((Ipv6Addr::LOCALHOST, 8090))).unwrap();
    let said = fails(tidegate(&net.host, "publish 8090:80 --to 172.30.0.2"), 1);
    assert!(said.contains("port 8090/tcp on [::] is in use by "), "{said}");
    assert!(said.contains(&format!("(pid {})", std::process::id())), "{said}");
    drop(loopback);
    // A child that another test is just starting may hold a copy of the socket for a moment.
    wait_until("it is closed", || net.host.bound_ports(Protocol::Tcp) == BTreeSet::from([8080, 9464]));
    assert_eq!(net.host.bound_ports(Protocol::Udp), BTreeSet::from([5353]));
    // The port of another namespace is nobody's here.
    let mut elsewhere = Process::spawn(&mut tidegate(&net.client, "publish 8080:80 --to 172.30.0.2"));
    elsewhere.wait_for_line("0.0.0.0:8080/tcp", PATIENCE);
    assert!(elsewhere.is_running());
}

#[test]
fn a_busy_metrics_address_is_told() {
    let net = Topology::three();
    let _holder = Publisher::start(&net.host, "8080:80 --to 172.30.0.2");
    let said = fails(tidegate(&net.host, &format!("publish 8081:80 --to 172.30.0.2 --metrics {METRICS}")), 1);
    assert_one_line(&said);
    assert!(said.contains(METRICS) && said.contains("in use"), "{said}");
    assert!(!net.host.is_bound(Protocol::Tcp, 8081));
}

#[test]
fn a_low_port_without_the_permission_is_told_with_both_remedies_and_the_remedy_works() {
    let net = Topology::three();
    let _echo = EchoServer::tcp(&net.container, (addr::CONTAINER_V4, 80).into());
    let program = Unprivileged::new();
    for port in ["80:80", "127.0.0.1:80:80", "80:80/udp"] {
        let said = fails(program.command(&net.host, &format!("publish {port} --to 172.30.0.2")), 1);
        assert_one_line(&said);
        assert!(said.contains("port 80/") && said.contains("permission denied"), "{said}");
        assert!(said.contains("net.ipv4.ip_unprivileged_port_start"), "{said}");
        assert!(said.contains("CAP_NET_BIND_SERVICE"), "{said}");
    }
    assert_nothing_is_bound(&net.host);
    net.host.sysctl("net.ipv4.ip_unprivileged_port_start", "80");
    let process = Process::spawn(&mut program.command(&net.host, "publish 80:80 --to 172.30.0.2"));
    process.wait_for_line("[::]:80/tcp", PATIENCE);
    assert_eq!(ask(&connect(&net.client, (addr::HOST_V4, 80).into()), b"remedied"), b"remedied");
}

#[test]
fn an_ordinary_user_publishes_high_ports() {
    let net = Topology::three();
    let _tcp = EchoServer::tcp(&net.container, (addr::CONTAINER_V4, 80).into());
    let _udp = EchoServer::udp(&net.container, (addr::CONTAINER_V4, 53).into());
    let program = Unprivileged::new();
    let arguments = format!("publish 8080:80 5353:53/udp --to 172.30.0.2 --metrics {METRICS}");
    let mut process = Process::spawn(&mut program.command(&net.host, &arguments));
    process.wait_for_line("metrics at", PATIENCE);
    let mut status = String::new();
    std::fs::File::open(format!("/proc/{}/status", process.pid()))
        .unwrap()
        .read_to_string(&mut status)
        .unwrap();
    assert!(status.contains(&format!("Uid:\t{NOBODY}\t{NOBODY}\t{NOBODY}")), "{status}");
    // More than is copied before splicing begins.
    let request = vec![b'x'; 300_000];
    for to in [SocketAddr::from((addr::HOST_V4, 8080)), (addr::HOST_V6, 8080).into()] {
        let stream = connect(&net.client, to);
        let answer = std::thread::scope(|scope| {
            scope.spawn(|| {
                (&stream).write_all(&request).unwrap();
                stream.shutdown(Shutdown::Write).unwrap();
            });
            read_all(&stream)
        });
        assert_eq!((answer.0 == request, answer.1), (true, None), "{to}");
    }
    let client = net.client.run(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))).unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    client.send_to(b"datagram", (addr::HOST_V4, 5353)).unwrap();
    let mut answer = [0; 64];
    assert_eq!(client.recv(&mut answer).unwrap(), 8);
    assert_eq!(process.stop(Signal::TERM, PATIENCE).code(), Some(0));
}

#[test]
fn an_ordinary_user_is_told_what_a_namespace_and_a_clients_address_take() {
    let net = Topology::three();
    let program = Unprivileged::new();
    for arguments in [
        format!("8080:80 --netns {}", net.container.path().display()),
        "8080:80 --to 172.30.0.2 --source client".to_owned(),
    ] {
        let said = fails(program.command(&net.host, &format!("publish {arguments}")), 1);
        assert_one_line(&said);
        assert!(said.contains("CAP_") || said.contains("permission"), "{arguments}: {said}");
    }
    assert_nothing_is_bound(&net.host);
}

// ---- what is published

#[test]
fn a_free_port_is_the_same_for_both_families_and_is_printed() {
    let net = Topology::three();
    let _echo = EchoServer::tcp(&net.container, (addr::CONTAINER_V4, 80).into());
    let mut command = tidegate(&net.host, "publish 80 80/udp 127.0.0.1::80 0:80 --to 172.30.0.2 --json");
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
    let printed =
        |line: String| line.split("/tcp").next().and_then(|at| at.rsplit(':').next()?.parse::<u16>().ok());
    let v4 = printed(process.wait_for_line("0.0.0.0:", PATIENCE)).unwrap();
    let v6 = printed(process.wait_for_line("[::]:", PATIENCE)).unwrap();
    assert_eq!(v4, v6);
    assert!(net.host.is_bound(Protocol::Tcp, v4));
}

#[test]
fn the_ports_of_a_range_lead_to_the_containers_ports_in_order() {
    let net = Topology::three();
    let backends: Vec<Backend> =
        (80..85).map(|port| Backend::tcp(&net.container, (addr::CONTAINER_V4, port).into())).collect();
    let process = Process::spawn(&mut tidegate(&net.host, "publish 9000-9004:80-84 --to 172.30.0.2"));
    process.wait_for_line("0.0.0.0:9000-9004/tcp  ->  172.30.0.2 port 80-84", PATIENCE);
    process.wait_for_line("[::]:9000-9004/tcp", PATIENCE);
    for (port, backend) in (9000..).zip(&backends) {
        let mut client = connect(&net.client, (addr::HOST_V4, port).into());
        client.write_all(&port.to_be_bytes()).unwrap();
        let mut seen = [0; 2];
        backend.accept().read_exact(&mut seen).unwrap();
        assert_eq!(seen, port.to_be_bytes());
    }
}

#[test]
fn of_a_range_for_one_port_the_first_free_one_is_taken() {
    let net = Topology::three();
    let _busy = net.host.run(|| TcpListener::bind((Ipv4Addr::LOCALHOST, 9000))).unwrap();
    let _busy_v6 = net.host.run(|| TcpListener::bind((Ipv6Addr::LOCALHOST, 9001))).unwrap();
    let process = Process::spawn(&mut tidegate(&net.host, "publish 9000-9002:80 --to 172.30.0.2"));
    process.wait_for_line("0.0.0.0:9002/tcp", PATIENCE);
    process.wait_for_line("[::]:9002/tcp", PATIENCE);
    let said = fails(tidegate(&net.host, "publish 9000-9002:81 --to 172.30.0.2"), 1);
    assert_one_line(&said);
    assert!(said.contains("9000-9002"), "{said}");
    assert_eq!(net.host.bound_ports(Protocol::Tcp), BTreeSet::from([9000, 9001, 9002]));
}

#[test]
fn what_was_published_is_told_as_json() {
    let host = Namespace::new();
    let arguments =
        "publish 127.0.0.1:8080:80 [::1]:5353:53/udp --to 172.30.0.2 --json --metrics 127.0.0.1:0";
    let process = Process::spawn(&mut tidegate(&host, arguments));
    let line = process.wait_for_line("{", PATIENCE);
    let told: serde_json::Value = serde_json::from_str(&line).unwrap();
    let metrics = told["metrics"].as_str().unwrap().strip_prefix("http://").unwrap();
    let (head, _) = http(&host, metrics.strip_suffix("/metrics").unwrap(), "GET /metrics HTTP/1.0\r\n\r\n");
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
    let told: serde_json::Value = serde_json::from_str(&without.wait_for_line("{", PATIENCE)).unwrap();
    assert!(told["metrics"].is_null());
}

#[test]
fn a_reader_that_goes_away_does_not_end_it() {
    let net = Topology::three();
    let _echo = EchoServer::tcp(&net.container, (addr::CONTAINER_V4, 80).into());
    let (reader, writer) = io::pipe().unwrap();
    drop(reader);
    // Everything it might want to say: a line for each connection as well.
    let mut command = tidegate(&net.host, "publish 8080:80 8081:81 5353:53/udp --to 172.30.0.2 --workers 1");
    command.env("TIDEGATE_LOG", "trace").stdin(Stdio::null());
    command.stdout(writer.try_clone().unwrap()).stderr(writer);
    let mut process = Killed(command.spawn().unwrap());
    drop(command);
    net.host.wait_until_bound(Protocol::Tcp, 8081, PATIENCE);
    net.host.wait_until_bound(Protocol::Udp, 5353, PATIENCE);
    for _ in 0..3 {
        // Nothing listens at port 81 and 53 of the container, which is worth a line.
        let refused = net.client.run(|| TcpStream::connect((addr::HOST_V4, 8081)));
        assert!(refused.is_err() || read_all(&patient(refused.unwrap())).1.is_some());
        let socket = net.client.run(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))).unwrap();
        socket.send_to(b"?", (addr::HOST_V4, 5353)).unwrap();
        let served = connect(&net.client, (addr::HOST_V4, 8080).into());
        assert_eq!(ask(&served, b"still here"), b"still here");
    }
    assert!(process.0.try_wait().unwrap().is_none(), "it has ended");
    rustix::process::kill_process(rustix::process::Pid::from_child(&process.0), Signal::TERM).unwrap();
    wait_until("it has ended", || process.0.try_wait().unwrap().is_some());
    assert_eq!(process.0.try_wait().unwrap().unwrap().code(), Some(0));
}

#[test]
fn an_error_that_nobody_reads_has_its_exit_status_all_the_same() {
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
        wait_until("it has ended", || process.0.try_wait().unwrap().is_some());
        assert_eq!(process.0.try_wait().unwrap().unwrap().code(), Some(code), "{arguments}");
    }
}

#[test]
fn ten_thousand_ports_are_ready_and_answer_in_one_process() {
    const PORTS: u16 = 10_000;
    let limit = raise_open_files(16_384);
    assert!(limit > 10_500, "this test needs 10,500 open files, the limit is {limit} (ulimit -n -H)");
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
    // Behind the others is nothing: a reset by the proxy, where a port that is not published refuses.
    net.client.run(|| {
        for port in (20_000..=last).filter(|port| !backends.contains_key(port)) {
            let end = TcpStream::connect_timeout(&(addr::HOST_V4, port).into(), PATIENCE)
                .and_then(|stream| patient(stream).read(&mut [0]));
            assert_eq!(end.map_err(|error| error.kind()), Err(io::ErrorKind::ConnectionReset), "port {port}");
        }
    });
    let metrics = publisher.metrics();
    let total =
        |family: &str| metrics.0.lines().filter(|line| line.starts_with(&format!("{family}{{"))).count();
    assert_eq!(total("tidegate_proxy_connections_total"), usize::from(PORTS));
    assert_eq!(metrics.port("connections_total", &format!("0.0.0.0:{last}/tcp")), 1);
}

/// A port that is printed as published and never accepts would be worse than an error.
#[test]
fn with_few_descriptors_either_all_ports_answer_or_it_says_so_and_ends() {
    let net = Topology::three();
    for count in [10, 15, 20, 25, 30] {
        let last = 9000 + count - 1;
        let mut command = tidegate(&net.host, &format!("publish 9000-{last}:9000-{last} --to 172.30.0.2"));
        support::limit_open_files(&mut command, 64);
        let mut process = Process::spawn(&mut command);
        let ready = || process.output().contains("[::]:9000") || process.output().contains("error");
        wait_until("it says something", ready);
        if process.output().contains("error") {
            let said = process.wait_for_output(PATIENCE);
            assert_one_line(&said);
            assert!(said.contains("ulimit -n"), "{said}");
            assert_eq!(process.wait(PATIENCE).code(), Some(1));
            continue;
        }
        let backend = Backend::tcp(&net.container, (addr::CONTAINER_V4, last).into());
        let mut client = connect(&net.client, (addr::HOST_V4, last).into());
        client.write_all(b"?").unwrap();
        let served = eventually(PATIENCE / 3, || backend.has_waiting());
        assert!(served, "of {count} ports none accepts a connection:\n{}", process.output());
    }
}

// ---- what it tells Prometheus

#[test]
fn the_figures_are_exactly_what_was_carried() {
    let net = Topology::three();
    let backend = Backend::tcp(&net.container, (addr::CONTAINER_V4, 80).into());
    let publisher = Publisher::start(&net.host, "8080:80 8081:81 --to 172.30.0.2");
    let zero = publisher.metrics();
    assert_eq!(zero.port("connections_total", PORT), 0);
    // Through both families, small and large enough to be spliced.
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
    let bytes = |publish, direction| metrics.labelled("bytes_total", publish, "direction", direction);
    assert_eq!(metrics.port("connections_total", publish(v4)), 3);
    assert_eq!((bytes(publish(v4), "in"), bytes(publish(v4), "out")), (301_001, 700_018));
    assert_eq!(metrics.port("connections_total", publish(v6)), 1);
    assert_eq!((bytes(publish(v6), "in"), bytes(publish(v6), "out")), (5, 6));
    assert_eq!(metrics.port("connection_resets_total", publish(v4)), 0);
    assert_eq!(metrics.port("connections_total", "0.0.0.0:8081/tcp"), 1);
    assert_eq!(metrics.value("tidegate_proxy_dial_seconds_count"), 4.0);

    // A reset is counted as one, and what was carried before it.
    let (client, server) = (connect(&net.client, v4), backend.accept());
    (&client).write_all(b"0123456789").unwrap();
    (&server).read_exact(&mut [0; 10]).unwrap();
    support::reset(client);
    let metrics = publisher.wait_for_metrics(|metrics| metrics.port("connections", PORT) == 0);
    assert_eq!(metrics.port("connection_resets_total", PORT), 1);
    assert_eq!(metrics.labelled("bytes_total", PORT, "direction", "in"), 301_011);
}

#[test]
fn the_page_is_what_prometheus_reads() {
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
    // As told by the process itself and by the kernel.
    let told = publisher.metrics().value("process_open_fds") as usize;
    let known = publisher.process.open_fds();
    // The scrape itself has some open.
    assert!(told.abs_diff(known) <= 5, "{told} told, {known} known");
}

#[test]
fn the_endpoint_answers_nonsense_with_an_error_and_goes_on() {
    let net = Topology::three();
    let publisher = Publisher::start(&net.host, "8080:80 --to 172.30.0.2");
    for (request, status) in [
        ("GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_owned(), "200"),
        ("GET /metrics?name[]=x HTTP/1.1\r\nHost: x\r\n\r\n".to_owned(), "200"),
        ("GET /nosuch HTTP/1.1\r\nHost: x\r\n\r\n".to_owned(), "404"),
        ("GET /metrics/../../etc/passwd HTTP/1.1\r\n\r\n".to_owned(), "404"),
        ("POST /metrics HTTP/1.1\r\nContent-Length: 0\r\n\r\n".to_owned(), "400"),
        ("\u{16}\u{3}\u{1}\0\u{fffd}\r\n\r\n".to_owned(), "400"),
        ("GET\r\n\r\n".to_owned(), "400"),
        (format!("GET /metrics HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(100_000)), "400"),
        (
            (0..200).fold("GET /metrics HTTP/1.1\r\n".to_owned(), |text, n| format!("{text}X-{n}: y\r\n"))
                + "\r\n",
            "400",
        ),
    ] {
        let mut stream = connect(&net.host, METRICS.parse().unwrap());
        // It may have had enough before all of it is sent.
        let _ = stream.write_all(request.as_bytes());
        let answer = read_all(&stream).0;
        let answer = String::from_utf8_lossy(&answer);
        let what: String = request.chars().take(60).collect();
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{what:?}: {answer:?}");
    }
    // Half a request and then the end.
    let mut stream = connect(&net.host, METRICS.parse().unwrap());
    stream.write_all(b"GET /metr").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    assert!(String::from_utf8_lossy(&read_all(&stream).0).starts_with("HTTP/1.1 400 "));
    publisher.metrics();
}

#[test]
fn slow_scrapers_hold_up_neither_others_nor_connections() {
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
    // As many as there may be, and more: some are turned away, and ports do not notice.
    let more: Vec<TcpStream> = (0..100).map(|_| connect(&net.host, METRICS.parse().unwrap())).collect();
    assert_eq!(ask(&connect(&net.client, (addr::HOST_V4, 8080).into()), b"unmoved"), b"unmoved");
    let full =
        more.iter().filter(|stream| String::from_utf8_lossy(&read_all(stream).0).contains(" 503 ")).count();
    assert!(full > 0, "everybody was let in");
    // All were closed in the end, without their having done anything.
    for stream in &slow {
        read_all(stream);
    }
    let metrics = publisher.metrics();
    assert_eq!(metrics.port("connections_total", PORT), 1);
}

#[test]
fn a_scraper_that_does_not_read_is_given_up() {
    let net = Topology::three();
    // A page of more than the buffers of one connection.
    let publisher = Publisher::start(&net.host, "127.0.0.1:20000-23999:20000-23999 --to 172.30.0.2");
    let idle = publisher.process.open_fds();
    let scraper = net.host.run(|| {
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
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

// ---- help

#[test]
fn the_help_names_every_flag_and_says_what_it_does() {
    let host = Namespace::new();
    let help = succeeds(tidegate(&host, "publish --help"));
    let short = succeeds(tidegate(&host, "publish -h"));
    let cli = tidegate::cli::Cli::command();
    let publish = cli.find_subcommand("publish").unwrap();
    let mut seen = 0;
    let told = |argument: &&clap::Arg| !argument.is_positional() && !argument.is_hide_set();
    for argument in publish.get_arguments().filter(told) {
        let long = format!("--{}", argument.get_long().unwrap());
        assert!(help.contains(&long) && short.contains(&long), "{long} is not in the help");
        assert!(
            argument.get_help().is_some_and(|help| help.to_string().len() > 10),
            "{long} is not explained"
        );
        seen += 1;
    }
    assert!(seen >= 15, "{seen} flags");
    for word in ["SPEC", "IPv6", "sctp", "SIGTERM", "Examples:"] {
        // SCTP is no promise yet.
        assert_eq!(help.contains(word), word != "sctp", "{word}");
    }
    assert!(help.lines().all(|line| line.chars().count() <= 100), "a line of the help is too long");
}

#[test]
fn help_version_and_completion_work_for_an_ordinary_user() {
    let host = Namespace::new();
    let program = Unprivileged::new();
    assert!(succeeds(program.command(&host, "--version")).starts_with("tidegate "));
    assert!(succeeds(program.command(&host, "--help")).contains("publish"));
    let script = succeeds(program.command(&host, "completion bash"));
    assert!(script.contains("--udp-idle-timeout"));
    // A script that the shell can read.
    let mut shell = Command::new("bash");
    shell.args(["-n", "-c", &script]);
    succeeds(shell);
    for shell in ["zsh", "fish", "elvish", "powershell"] {
        assert!(!succeeds(program.command(&host, &format!("completion {shell}"))).is_empty());
    }
    fails(program.command(&host, "completion tcsh"), 2);
    fails(program.command(&host, ""), 2);
    fails(program.command(&host, "no-such-command"), 2);
}

#[test]
fn a_log_that_is_not_read_at_a_terminal_has_no_colours() {
    let net = Topology::three();
    let publisher = Publisher::start_with(&net.host, "8080:80 --to 172.30.0.2", |command| {
        command.env("TIDEGATE_LOG", "debug");
    });
    connect_and_see(&net.client, (addr::HOST_V4, 8080).into()).unwrap_err();
    let line = publisher.process.wait_for_line("DEBUG", PATIENCE);
    assert!(!line.contains('\u{1b}'), "{line:?}");
}

#[test]
fn a_log_filter_that_is_not_understood_is_told() {
    let host = Namespace::new();
    let mut command = tidegate(&host, "publish 8080:80 --to 172.30.0.2");
    command.env("TIDEGATE_LOG", "=====");
    let said = fails(command, 1);
    assert_one_line(&said);
    assert!(said.contains("TIDEGATE_LOG"), "{said}");
}

// ---- helpers

/// A port as `--json` tells it.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Entry {
    publish: String,
    ip: String,
    host_port: u16,
    protocol: String,
    container_port: u16,
}

/// What the process says with `--json`.
#[track_caller]
fn published(process: &Process) -> Vec<Entry> {
    let told: serde_json::Value = serde_json::from_str(&process.wait_for_line("{", PATIENCE)).unwrap();
    let text = |entry: &serde_json::Value, key: &str| entry[key].as_str().unwrap().to_owned();
    let number = |entry: &serde_json::Value, key: &str| u16::try_from(entry[key].as_u64().unwrap()).unwrap();
    let entries = told["published"].as_array().unwrap().iter();
    entries
        .map(|entry| Entry {
            publish: text(entry, "publish"),
            ip: text(entry, "host_ip"),
            host_port: number(entry, "host_port"),
            protocol: text(entry, "protocol"),
            container_port: number(entry, "container_port"),
        })
        .collect()
}

/// The label of port 8080 for clients that connect to `to`.
fn publish(to: SocketAddr) -> &'static str {
    if to.is_ipv4() { PORT } else { "[::]:8080/tcp" }
}

/// Runs a command that must end with `code` and returns what it said: nothing on standard output.
#[track_caller]
fn fails(mut command: Command, code: i32) -> String {
    let (status, out, error) = run(&mut command);
    assert_eq!(status, Some(code), "{command:?}: {error}");
    assert_eq!(out, "", "{command:?}");
    error
}

/// Runs a command that must succeed and returns what it printed.
#[track_caller]
fn succeeds(mut command: Command) -> String {
    let (status, out, error) = run(&mut command);
    assert_eq!((status, error.as_str()), (Some(0), ""), "{command:?}: {out}");
    out
}

/// Exit status, standard output and standard error of a command that ends by itself.
#[track_caller]
fn run(command: &mut Command) -> (Option<i32>, String, String) {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut process = Killed(command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}")));
    let drain = |stream: &mut dyn Read| {
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        text
    };
    let (mut out, mut error) = (process.0.stdout.take().unwrap(), process.0.stderr.take().unwrap());
    let out = std::thread::spawn(move || drain(&mut out));
    let error = std::thread::spawn(move || drain(&mut error));
    wait_until("the command has ended", || process.0.try_wait().unwrap().is_some());
    let status = process.0.try_wait().unwrap().unwrap();
    (status.code(), out.join().unwrap(), error.join().unwrap())
}

#[track_caller]
fn assert_one_line(said: &str) {
    assert!(said.starts_with("tidegate: error: ") && said.ends_with('\n'), "{said:?}");
    assert_eq!(said.lines().count(), 1, "{said:?}");
    assert!(!said.contains("os error"), "{said:?} speaks Rust");
}

#[track_caller]
fn assert_nothing_is_bound(namespace: &Namespace) {
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        assert_eq!(namespace.bound_ports(protocol), BTreeSet::new(), "{protocol:?}");
    }
}

/// Connects and reads a byte: how many came, or what went wrong.
fn connect_and_see(from: &Namespace, to: SocketAddr) -> Result<usize, io::ErrorKind> {
    let read = from
        .run(|| TcpStream::connect_timeout(&to, PATIENCE).and_then(|stream| patient(stream).read(&mut [0])));
    read.map_err(|error| error.kind())
}

/// A child that is killed and reaped with its guard.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The program where an ordinary user can execute it, wherever it was built.
struct Unprivileged {
    directory: tempfile::TempDir,
}

impl Unprivileged {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        let program = Self { directory };
        // Not with a descriptor of ours: a child that another test is just starting could hold a copy of it, and a
        // file that is open for writing cannot be executed.
        let mut install = Command::new("install");
        install.args(["-m", "755", env!("CARGO_BIN_EXE_tidegate")]).arg(program.path());
        succeeds(install);
        program
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("tidegate")
    }

    /// `tidegate` with `arguments` in `namespace`, run by nobody, who has no capability at all.
    fn command(&self, namespace: &Namespace, arguments: &str) -> Command {
        let mut command = namespace.command(self.path().to_str().unwrap());
        command.args(arguments.split_ascii_whitespace()).env_remove("TIDEGATE_LOG").current_dir("/");
        // Behind the entering of the namespace, which takes root.
        // SAFETY: the closure makes system calls and nothing else.
        unsafe {
            command.pre_exec(|| {
                let dropped = libc::setgroups(0, std::ptr::null()) == 0
                    && libc::setresgid(NOBODY, NOBODY, NOBODY) == 0
                    && libc::setresuid(NOBODY, NOBODY, NOBODY) == 0
                    // Changing the user has cancelled it.
                    && libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) == 0;
                if dropped { Ok(()) } else { Err(io::Error::last_os_error()) }
            });
        }
        command
    }
}

/// Reads a page in the text format of Prometheus (exposition format 0.0.4) and returns its families. Every line has to
/// be right: each family declared once and before its samples, which stand together, and no series twice.
#[track_caller]
fn check_exposition(page: &str) -> BTreeSet<String> {
    assert!(page.ends_with('\n'), "the last line has no end");
    let name_ok = |name: &str| {
        let head = |c: char| c.is_ascii_alphabetic() || c == '_' || c == ':';
        name.starts_with(head) && name.chars().all(|c| head(c) || c.is_ascii_digit())
    };
    let mut kinds: BTreeMap<String, String> = BTreeMap::new();
    let mut helped = BTreeSet::new();
    let mut series = BTreeSet::new();
    let mut current = String::new();
    for line in page.lines().filter(|line| !line.is_empty()) {
        if let Some(help) = line.strip_prefix("# HELP ") {
            let (name, text) = help.split_once(' ').unwrap_or_else(|| panic!("no help in {line:?}"));
            assert!(name_ok(name) && !text.trim().is_empty(), "{line:?}");
            assert!(helped.insert(name.to_owned()), "a second {line:?}");
        } else if let Some(kind) = line.strip_prefix("# TYPE ") {
            let (name, kind) = kind.split_once(' ').unwrap_or_else(|| panic!("no type in {line:?}"));
            assert!(["counter", "gauge", "histogram", "summary"].contains(&kind), "{line:?}");
            assert!(kinds.insert(name.to_owned(), kind.to_owned()).is_none(), "a second {line:?}");
            name.clone_into(&mut current);
        } else {
            let (left, value) = line.rsplit_once(' ').unwrap_or_else(|| panic!("no value in {line:?}"));
            assert!(value.parse::<f64>().is_ok(), "{line:?}");
            let (name, labels) = match left.split_once('{') {
                Some((name, labels)) => {
                    (name, labels.strip_suffix('}').unwrap_or_else(|| panic!("{line:?}")))
                }
                None => (left, ""),
            };
            let kind = kinds.get(&current).map(String::as_str);
            let of_histogram =
                ["_bucket", "_sum", "_count"].iter().any(|end| name.strip_suffix(end) == Some(&current));
            assert!(
                name == current || (kind == Some("histogram") && of_histogram),
                "{line:?} is not of {current:?}"
            );
            assert!(
                kind != Some("counter") || name.ends_with("_total"),
                "{line:?}: a counter's name ends in _total"
            );
            for label in labels.split("\",").filter(|label| !label.is_empty()) {
                let (key, value) = label.split_once("=\"").unwrap_or_else(|| panic!("{line:?}"));
                assert!(
                    name_ok(key) && !key.contains(':') && !value.trim_end_matches('"').contains('"'),
                    "{line:?}"
                );
            }
            assert!(series.insert(left.to_owned()), "a second {left}");
        }
    }
    let families: BTreeSet<String> = kinds.into_keys().collect();
    assert_eq!(families, helped, "families with a type, and families with a help text");
    families
}
