//! Errors of the command line and of the start.

use super::*;

#[test]
fn invalid_command_lines_are_rejected_with_the_reason() {
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
        ("8080:80 --to 172.30.0.2 --max-connections 0", "number would be zero"),
        ("8080:80 --to 172.30.0.2 --max-client-connections 0", "number would be zero"),
        ("8080:80 --to 172.30.0.2 --udp-max-source-sessions 0", "number would be zero"),
        (
            "8080:80 --to 172.30.0.2 --max-held 1023K",
            "must be at least 1024K, which one connection may hold",
        ),
        (
            "8080:80 --to 172.30.0.2 --max-held much",
            "not a whole number of bytes, with an optional suffix K, M or G",
        ),
        ("8080:80 --to 172.30.0.2 --dial-timeout 5", "5"),
        ("8080:80 --to 172.30.0.2 --dial-timeout 0s", "longer than 0"),
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
        let stderr = fails(tidegate(&host, &format!("publish {arguments}")), 2);
        let line = stderr.lines().next().unwrap_or_default();
        let ours = line.starts_with("tidegate: error: ");
        assert!(ours || line.starts_with("error: "), "{arguments}: {stderr}");
        assert!(!ours || stderr.lines().count() == 1, "{arguments}: {stderr}");
        // clap lists missing arguments in the next line.
        assert!(line.contains(reason), "{arguments}: {stderr}");
    }
    assert_nothing_is_bound(&host);
}

#[test]
fn a_failed_start_is_reported_in_one_line() {
    let net = Topology::three();
    let host = &net.host;
    let directory = tempfile::tempdir().unwrap();
    let (there, not_there) = (directory.path().display(), directory.path().join("nosuch"));
    for (arguments, reason) in [
        ("8080:80/sctp --to 172.30.0.2".to_owned(), "protocol not supported".to_owned()),
        ("8080:80 8081:80/sctp --to 172.30.0.2".to_owned(), "protocol not supported".to_owned()),
        ("192.0.2.77:8080:80 --to 172.30.0.2".to_owned(), "192.0.2.77".to_owned()),
        ("[2001:db8::77]:8080:80/udp --to 172.30.0.2".to_owned(), "[2001:db8::77]".to_owned()),
        (
            "8080:80 192.0.2.77:8081:80 --to 172.30.0.2".to_owned(),
            "port 8081/tcp on 192.0.2.77".to_owned(),
        ),
        (
            format!("8080:80 --netns {}", not_there.display()),
            format!("no such namespace {}", not_there.display()),
        ),
        (
            "8080:80 --netns /etc/passwd".to_owned(),
            "/etc/passwd is not a network namespace".to_owned(),
        ),
        (format!("8080:80 --netns {there}"), format!("{there} is not a network namespace")),
        (
            "8080:80 --netns /proc/self/ns/mnt".to_owned(),
            "/proc/self/ns/mnt is not a network namespace".to_owned(),
        ),
        // Beyond the largest pid (PID_MAX_LIMIT in include/linux/threads.h).
        ("8080:80 --pid 4194305".to_owned(), "no process 4194305".to_owned()),
        (
            "8080 8081:8081 --to 127.0.0.1".to_owned(),
            "port 0.0.0.0:8081/tcp would forward to itself".to_owned(),
        ),
        (
            "8080:8080/udp --to ::1".to_owned(),
            "port [::]:8080/udp would forward to itself".to_owned(),
        ),
        (
            "203.0.113.1:8080:8080 --to 203.0.113.1".to_owned(),
            "port 203.0.113.1:8080/tcp would forward to itself at 203.0.113.1:8080".to_owned(),
        ),
        (
            "8080:80 --to 172.30.0.2 --metrics 192.0.2.77:9464".to_owned(),
            "metrics address 192.0.2.77:9464".to_owned(),
        ),
    ] {
        let stderr = fails(tidegate(host, &format!("publish {arguments}")), 1);
        assert_one_line(&stderr);
        assert!(stderr.contains(&reason), "{arguments}: {stderr}");
    }
    assert_nothing_is_bound(host);
}

#[test]
fn a_process_that_has_ended_is_an_error() {
    let host = Namespace::new();
    let mut child = Command::new("true").spawn().unwrap();
    let pid = child.id();
    child.wait().unwrap();
    let stderr = fails(tidegate(&host, &format!("publish 8080:80 --pid {pid}")), 1);
    assert_eq!(stderr, format!("tidegate: error: no process {pid}\n"));
}

#[test]
fn a_port_in_use_is_reported_with_its_holder() {
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
        let stderr = fails(tidegate(&net.host, &format!("publish {arguments} --to 172.30.0.2")), 1);
        assert_one_line(&stderr);
        assert!(stderr.contains(&format!("{port} {holder_is}")), "{arguments}: {stderr}");
    }
    // A port of another program on a single address.
    let loopback = net.host.run(|| TcpListener::bind((Ipv6Addr::LOCALHOST, 8090))).unwrap();
    let stderr = fails(tidegate(&net.host, "publish 8090:80 --to 172.30.0.2"), 1);
    assert!(stderr.contains("port 8090/tcp on [::] is in use by "), "{stderr}");
    assert!(stderr.contains(&format!("(pid {})", std::process::id())), "{stderr}");
    drop(loopback);
    // A child process that another test starts may hold a copy of the socket for a moment.
    wait_until("it is closed", || {
        net.host.bound_ports(Protocol::Tcp) == BTreeSet::from([8080, 9464])
    });
    assert_eq!(net.host.bound_ports(Protocol::Udp), BTreeSet::from([5353]));
    // A port in another namespace is not in use here.
    let mut elsewhere =
        Process::spawn(&mut tidegate(&net.client, "publish 8080:80 --to 172.30.0.2"));
    elsewhere.wait_for_line("0.0.0.0:8080/tcp", TIMEOUT);
    assert!(elsewhere.is_running());
}

#[test]
fn a_metrics_port_in_use_is_reported_and_does_not_block_ports() {
    let net = Topology::three();
    let _echo = EchoServer::tcp(&net.container, (addr::CONTAINER_V4, 80).into());
    let holder = Publisher::start(&net.host, "8080:80 --to 172.30.0.2");
    let arguments = format!("publish 8081:80 --to 172.30.0.2 --json --metrics {METRICS}");
    let process = Process::spawn(&mut tidegate(&net.host, &arguments));
    let holder_is = format!("in use by tidegate (pid {})", holder.process.pid());
    let warning = process.wait_for_line("metrics are not served", TIMEOUT);
    assert!(
        warning.contains("port 9464/tcp on 127.0.0.1") && warning.contains(&holder_is),
        "{warning}"
    );
    assert!(warning.contains("127.0.0.1:9464-9474"), "the remedy: {warning}");
    process.wait_for_line("\"metrics\":null", TIMEOUT);
    assert_eq!(ask(&connect(&net.client, (addr::HOST_V4, 8081).into()), b"open"), b"open");
    drop(holder);
    process.wait_for_line("metrics are served now", TIMEOUT);
    let (head, page) = http(&net.host, METRICS, "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
    assert!(head.starts_with("HTTP/1.1 200 ") && page.contains("0.0.0.0:8081/tcp"), "{head}");
}

#[test]
fn a_low_port_without_permission_is_reported_with_remedies_that_work() {
    let net = Topology::three();
    let _echo = EchoServer::tcp(&net.container, (addr::CONTAINER_V4, 80).into());
    let program = Unprivileged::new();
    for port in ["80:80", "127.0.0.1:80:80", "80:80/udp"] {
        let stderr =
            fails(program.command(&net.host, &format!("publish {port} --to 172.30.0.2")), 1);
        assert_one_line(&stderr);
        assert!(stderr.contains("port 80/") && stderr.contains("permission denied"), "{stderr}");
        assert!(stderr.contains("net.ipv4.ip_unprivileged_port_start"), "{stderr}");
        assert!(stderr.contains("CAP_NET_BIND_SERVICE"), "{stderr}");
    }
    assert_nothing_is_bound(&net.host);
    net.host.sysctl("net.ipv4.ip_unprivileged_port_start", "80");
    let process = Process::spawn(&mut program.command(&net.host, "publish 80:80 --to 172.30.0.2"));
    process.wait_for_line("[::]:80/tcp", TIMEOUT);
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
    process.wait_for_line("metrics at", TIMEOUT);
    let mut status = String::new();
    std::fs::File::open(format!("/proc/{}/status", process.pid()))
        .unwrap()
        .read_to_string(&mut status)
        .unwrap();
    assert!(status.contains(&format!("Uid:\t{NOBODY}\t{NOBODY}\t{NOBODY}")), "{status}");
    // More than the proxy copies before it starts splicing.
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
    client.set_read_timeout(Some(TIMEOUT)).unwrap();
    client.send_to(b"datagram", (addr::HOST_V4, 5353)).unwrap();
    let mut answer = [0; 64];
    assert_eq!(client.recv(&mut answer).unwrap(), 8);
    assert_eq!(process.stop(Signal::TERM, TIMEOUT).code(), Some(0));
}

#[test]
fn an_ordinary_user_gets_the_privilege_for_a_namespace_or_a_client_address() {
    let net = Topology::three();
    let program = Unprivileged::new();
    for arguments in [
        format!("8080:80 --netns {}", net.container.path().display()),
        "8080:80 --to 172.30.0.2 --source client".to_owned(),
    ] {
        let stderr = fails(program.command(&net.host, &format!("publish {arguments}")), 1);
        assert_one_line(&stderr);
        assert!(stderr.contains("CAP_") || stderr.contains("permission"), "{arguments}: {stderr}");
    }
    assert_nothing_is_bound(&net.host);
}
