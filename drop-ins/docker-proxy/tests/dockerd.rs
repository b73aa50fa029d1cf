//! A published port end to end: a real dockerd with our docker-proxy as its userland proxy.
//!
//! Every test has its own machine (see `dockerd/machine.rs`), and takes it down and checks for
//! leftovers at the end. With `--iptables=false`, all traffic to a published port passes the proxy,
//! so most tests use it. The container then sees the address of the bridge as its client, which
//! proves the path.

#[path = "dockerd/beside.rs"]
mod beside;
#[path = "dockerd/container_server.rs"]
#[allow(dead_code, reason = "a program of its own, which the tests compile; here for the lints")]
mod container_server;
#[path = "dockerd/daemon.rs"]
mod daemon;
#[path = "dockerd/machine.rs"]
mod machine;
#[path = "dockerd/place.rs"]
mod place;

use std::io::Read;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::{Duration, Instant};

use tidegate_testbed::Protocol::{Tcp, Udp};
use tidegate_testbed::{Signal, addr};

use daemon::{Container, Daemon, GATEWAY, OTHER_GATEWAY};
use machine::Machine;
use place::Place;

/// All traffic uses the proxy.
const NO_IPTABLES: &[&str] = &["--iptables=false"];

#[test]
fn without_iptables_every_path_to_a_published_port_uses_the_proxy() {
    let machine = Machine::new();
    // The proxy does not need forwarding either.
    machine.net.host.sysctl("net.ipv4.ip_forward", "0");
    machine.net.host.sysctl("net.ipv6.conf.all.forwarding", "0");
    let daemon = Daemon::start(&machine, &["--iptables=false", "--ip-forward=false"]);
    let server =
        daemon.run("server", &["-p", "8080:80", "-p", "8080:53/udp"], &["tcp:80", "udp:53"]);
    let neighbour = daemon.run("neighbour", &[], &["tcp:1"]);
    let other_network = daemon.run_on_other_network();
    let (host, outside) = (host(&machine), outside(&machine));
    let paths: [(&Place, IpAddr); 13] = [
        (&host, Ipv4Addr::LOCALHOST.into()),
        (&host, Ipv6Addr::LOCALHOST.into()),
        (&host, addr::HOST_V4.into()),
        (&host, addr::HOST_V6.into()),
        (&outside, addr::HOST_V4.into()),
        (&outside, addr::HOST_V6.into()),
        // The container connects to itself, by its gateway and by the outside address of the host.
        (&server.place, GATEWAY.into()),
        (&server.place, addr::HOST_V4.into()),
        (&neighbour.place, GATEWAY.into()),
        (&neighbour.place, addr::HOST_V4.into()),
        // So does a container on another network, also by its own gateway.
        (&other_network.place, OTHER_GATEWAY.into()),
        (&other_network.place, addr::HOST_V4.into()),
        (&server.place, OTHER_GATEWAY.into()),
    ];
    for (from, to) in paths {
        for protocol in [Tcp, Udp] {
            assert_eq!(from.asks(protocol, (to, 8080)), GATEWAY, "{from} to {to} ({protocol:?})");
        }
    }
    assert_eq!(machine.net.host.read_sysctl("net.ipv4.ip_forward"), "0");
    daemon.remove_with_network(other_network);
    daemon.end(Signal::TERM);
    machine.teardown();
}

#[test]
fn every_form_of_publishing_starts_the_expected_proxies() {
    let machine = Machine::new();
    let daemon = Daemon::start(&machine, NO_IPTABLES);
    let (host, outside) = (host(&machine), outside(&machine));
    let publish = |name: &str, options: &[&str], services: &[&str], expected: &[&str]| {
        let container = daemon.run(name, options, services);
        let expected: Vec<String> =
            expected.iter().map(|proxy| command_line(proxy, container.address)).collect();
        assert_eq!(machine.proxies(), expected, "{options:?}");
        container
    };

    let container = publish(
        "both-families",
        &["-p", "8080:80"],
        &["tcp:80"],
        &["tcp 0.0.0.0 8080 80", "tcp :: 8080 80"],
    );
    let everywhere =
        |port| [(Ipv4Addr::UNSPECIFIED, port).into(), (Ipv6Addr::UNSPECIFIED, port).into()];
    assert_eq!(port_addresses(&daemon, &container, "80/tcp"), everywhere(8080));
    outside.asks(Tcp, (addr::HOST_V4, 8080));
    outside.asks(Tcp, (addr::HOST_V6, 8080));
    daemon.remove(container);

    let container = publish(
        "udp",
        &["-p", "5353:53/udp"],
        &["udp:53"],
        &["udp 0.0.0.0 5353 53", "udp :: 5353 53"],
    );
    outside.asks(Udp, (addr::HOST_V4, 5353));
    outside.asks(Udp, (addr::HOST_V6, 5353));
    daemon.remove(container);

    let container = publish(
        "loopback-v4",
        &["-p", "127.0.0.1:8081:80", "-p", "127.0.0.1:8081:80/udp"],
        &["tcp:80", "udp:80"],
        &["tcp 127.0.0.1 8081 80", "udp 127.0.0.1 8081 80"],
    );
    for protocol in [Tcp, Udp] {
        host.asks(protocol, (Ipv4Addr::LOCALHOST, 8081));
        host.is_refused(protocol, (Ipv6Addr::LOCALHOST, 8081));
        outside.is_refused(protocol, (addr::HOST_V4, 8081));
        container.place.is_refused(protocol, (GATEWAY, 8081));
    }
    daemon.remove(container);

    let container = publish(
        "loopback-v6",
        &["-p", "[::1]:8082:80", "-p", "[::1]:8082:80/udp"],
        &["tcp:80", "udp:80"],
        &["tcp ::1 8082 80", "udp ::1 8082 80"],
    );
    for protocol in [Tcp, Udp] {
        host.asks(protocol, (Ipv6Addr::LOCALHOST, 8082));
        host.is_refused(protocol, (Ipv4Addr::LOCALHOST, 8082));
        outside.is_refused(protocol, (addr::HOST_V6, 8082));
    }
    daemon.remove(container);

    let container = publish(
        "range",
        &["-p", "9000-9002:80-82"],
        &["tcp:80", "tcp:81", "tcp:82"],
        &[
            "tcp 0.0.0.0 9002 82",
            "tcp :: 9002 82",
            "tcp 0.0.0.0 9001 81",
            "tcp :: 9001 81",
            "tcp 0.0.0.0 9000 80",
            "tcp :: 9000 80",
        ],
    );
    for port in 9000..=9002 {
        outside.asks(Tcp, (addr::HOST_V4, port));
        outside.asks(Tcp, (addr::HOST_V6, port));
    }
    outside.is_refused(Tcp, (addr::HOST_V4, 9003));
    daemon.remove(container);

    publish(
        "both-protocols",
        &["-p", "9200:80", "-p", "9200:53/udp"],
        &["tcp:80", "udp:53"],
        &["tcp 0.0.0.0 9200 80", "tcp :: 9200 80", "udp 0.0.0.0 9200 53", "udp :: 9200 53"],
    );
    outside.asks(Tcp, (addr::HOST_V4, 9200));
    outside.asks(Udp, (addr::HOST_V4, 9200));
    daemon.end(Signal::TERM);
    machine.teardown();
}

#[test]
fn an_ephemeral_port_is_shown_by_docker_port_and_served() {
    let machine = Machine::new();
    let daemon = Daemon::start(&machine, NO_IPTABLES);
    let container = daemon.run("ephemeral", &["-p", "80", "-p", "53/udp"], &["tcp:80", "udp:53"]);
    assert_eq!(machine.proxies().len(), 4);
    let (host, outside) = (host(&machine), outside(&machine));
    for (port, protocol) in [("80/tcp", Tcp), ("53/udp", Udp)] {
        let addresses = port_addresses(&daemon, &container, port);
        assert_eq!(addresses.len(), 2, "{port}: {addresses:?}");
        for address in addresses {
            assert!(address.ip().is_unspecified() && address.port() >= 1024, "{address}");
            let [outer, loopback]: [IpAddr; 2] = if address.is_ipv4() {
                [addr::HOST_V4.into(), Ipv4Addr::LOCALHOST.into()]
            } else {
                [addr::HOST_V6.into(), Ipv6Addr::LOCALHOST.into()]
            };
            assert_eq!(outside.asks(protocol, (outer, address.port())), GATEWAY, "{address}");
            assert_eq!(host.asks(protocol, (loopback, address.port())), GATEWAY, "{address}");
        }
    }
    daemon.end(Signal::TERM);
    machine.teardown();
}

#[test]
fn a_port_that_cannot_be_opened_fails_docker_run_with_our_error() {
    let machine = Machine::new();
    let daemon = Daemon::start(&machine, NO_IPTABLES);
    let mut holder = machine.spawn(&machine.server(), &["tcp:8080", "udp:8080"], &[]);
    holder.process().wait_for_line("ready", machine::SOON);
    for (protocol, publish) in [("tcp", "8080:80"), ("udp", "8080:80/udp")] {
        let name = format!("busy-{protocol}");
        let error = daemon.run_fails(&name, &["-p", publish]);
        let ours = format!(
            "Error starting userland proxy: port 8080/{protocol} on 0.0.0.0 is in use by server (pid {})",
            holder.inner_pid()
        );
        assert!(error.contains(&format!("external connectivity on endpoint {name} (")), "{error}");
        assert!(error.contains(&ours), "{error}");
        assert_eq!(daemon.inspect(&name)["State"]["Status"], "created");
        machine.assert_no_proxies();
    }
    holder.stop(Signal::KILL);
    // The refused container starts once the port is free.
    daemon.docker(&["start", "busy-tcp"]);
    let container = daemon.container("busy-tcp");
    outside(&machine).asks(Tcp, (addr::HOST_V4, 8080));
    daemon.remove(container);

    // Only the IPv6 port is in use: the IPv4 proxy, which started first, must not remain.
    let binary = env!("CARGO_BIN_EXE_docker-proxy");
    let arguments = [
        "-host-ip",
        "::",
        "-host-port",
        "8080",
        "-container-ip",
        "127.0.0.1",
        "-container-port",
        "1",
    ];
    let mut half = machine.spawn(binary, &arguments, &[]);
    machine.net.host.wait_until_bound(Tcp, 8080, machine::SOON);
    let error = daemon.run_fails("half", &["-p", "8080:80"]);
    let ours =
        format!("port 8080/tcp on [::] is in use by docker-proxy (pid {})", half.inner_pid());
    assert!(error.contains(&ours), "{error}");
    assert_eq!(machine.proxies(), [arguments.join(" ")]);
    half.stop(Signal::INT);

    let error = daemon.run_fails("sctp", &["-p", "9100:80/sctp"]);
    let ours = "Error starting userland proxy: port 9100/sctp on 0.0.0.0: protocol not supported";
    assert!(error.contains(ours), "{error}");
    let error = daemon.run_fails("elsewhere", &["-p", "192.0.2.77:80:80"]);
    let ours = "port 80/tcp on 192.0.2.77: this host has no address 192.0.2.77";
    assert!(error.contains(ours), "{error}");
    machine.assert_no_proxies();
    assert!(machine.net.host.bound_ports(Tcp).is_empty());
    daemon.end(Signal::TERM);
    machine.teardown();
}

#[test]
fn a_stopped_container_closes_its_ports_at_once() {
    let machine = Machine::new();
    let daemon = Daemon::start(&machine, NO_IPTABLES);
    let (host, outside) = (host(&machine), outside(&machine));
    let other = daemon.run("other", &["-p", "9000:80"], &["tcp:80"]);
    let publish = ["-p", "8080:80", "-p", "8080:80/udp"];
    let stop_commands: [&[&str]; 4] = [
        &["stop", "server"],
        &["kill", "server"],
        &["restart", "server"],
        &["rm", "--force", "server"],
    ];
    daemon.run("server", &publish, &["tcp:80", "udp:80"]);
    let mut kept = host.connects((Ipv4Addr::LOCALHOST, 9000));
    for command in stop_commands {
        let mut live: Vec<_> = (0..50).map(|_| outside.connects((addr::HOST_V4, 8080))).collect();
        outside.asks(Udp, (addr::HOST_V4, 8080));
        let begun = Instant::now();
        daemon.docker(command);
        let took = begun.elapsed();
        println!("docker {}: {took:?}", command.join(" "));
        assert!(took < Duration::from_secs(5), "docker {} took {took:?}", command.join(" "));
        for stream in &mut live {
            // An end or a reset, depending on whether the server or the proxy closes first.
            let _ = stream.read(&mut [0]).map(|read| assert_eq!(read, 0));
        }
        if command[0] == "restart" {
            daemon.container("server");
            outside.asks(Tcp, (addr::HOST_V4, 8080));
            outside.asks(Udp, (addr::HOST_V6, 8080));
            continue;
        }
        for protocol in [Tcp, Udp] {
            outside.is_refused(protocol, (addr::HOST_V4, 8080));
            outside.is_refused(protocol, (addr::HOST_V6, 8080));
            host.is_refused(protocol, (Ipv4Addr::LOCALHOST, 8080));
        }
        assert_eq!(machine.net.host.bound_ports(Tcp), [9000].into());
        assert!(machine.net.host.bound_ports(Udp).is_empty());
        assert_eq!(machine.proxies().len(), 2, "the proxies of the other container");
        if command[0] != "rm" {
            daemon.docker(&["start", "server"]);
            daemon.container("server");
        }
    }
    // The connection of the other container is not affected.
    place::echo(&mut kept, b"undisturbed");
    daemon.remove(other);
    machine.assert_no_proxies();
    daemon.end(Signal::TERM);
    machine.teardown();
}

#[test]
fn a_stopped_daemon_stops_containers_and_proxies() {
    let machine = Machine::new();
    let daemon = Daemon::start(&machine, NO_IPTABLES);
    let container = daemon.run(
        "server",
        &["-p", "8080-8089:80-89", "-p", "8080:53/udp"],
        &["tcp:80", "udp:53"],
    );
    assert_eq!(machine.proxies().len(), 22);
    let live = outside(&machine).connects((addr::HOST_V4, 8080));
    let begun = Instant::now();
    daemon.end(Signal::TERM);
    println!("dockerd ended 22 proxies and itself in {:?}", begun.elapsed());
    assert!(!machine.is_alive(container.pid));
    machine.assert_no_proxies();
    drop(live);
    assert!(machine.net.host.bound_ports(Tcp).is_empty());
    assert!(machine.net.host.bound_ports(Udp).is_empty());
    machine.teardown();
}

#[test]
fn with_live_restore_proxies_follow_the_daemon_and_containers_stay() {
    let machine = Machine::new();
    let options = ["--iptables=false", "--live-restore"];
    let mut daemon = Daemon::start(&machine, &options);
    let publish = ["-p", "8080:80", "-p", "127.0.0.1:5353:53/udp"];
    let container = daemon.run("server", &publish, &["tcp:80", "udp:53"]);
    let before = sorted(machine.proxies());
    assert_eq!(before.len(), 3);
    let (host, outside) = (host(&machine), outside(&machine));
    for signal in [Signal::TERM, Signal::KILL] {
        let mut live = outside.connects((addr::HOST_V4, 8080));
        daemon.end(signal);
        machine.assert_no_proxies();
        live.read(&mut [0]).expect_err("an interrupted connection must not look complete");
        outside.is_refused(Tcp, (addr::HOST_V4, 8080));
        host.is_refused(Udp, (Ipv4Addr::LOCALHOST, 5353));
        assert!(machine.is_alive(container.pid), "the container keeps running");
        assert_eq!(host.asks(Tcp, (container.address, 80)), GATEWAY);

        daemon = Daemon::start(&machine, &options);
        assert_eq!(sorted(machine.proxies()), before);
        assert_eq!(daemon.container("server").pid, container.pid);
        assert_eq!(outside.asks(Tcp, (addr::HOST_V4, 8080)), GATEWAY);
        assert_eq!(outside.asks(Tcp, (addr::HOST_V6, 8080)), GATEWAY);
        assert_eq!(host.asks(Udp, (Ipv4Addr::LOCALHOST, 5353)), GATEWAY);
    }
    daemon.remove(container);
    machine.assert_no_proxies();
    daemon.end(Signal::TERM);
    machine.teardown();
}

#[test]
fn with_iptables_the_proxy_carries_what_the_rules_do_not_match() {
    let machine = Machine::new();
    let daemon = Daemon::start(&machine, &[]);
    let server =
        daemon.run("server", &["-p", "8080:80", "-p", "8080:53/udp"], &["tcp:80", "udp:53"]);
    let other_network = daemon.run_on_other_network();
    let (host, outside) = (host(&machine), outside(&machine));
    assert_eq!(machine.proxies().len(), 4);
    for protocol in [Tcp, Udp] {
        // For IPv4 clients outside, the kernel translates the destination, so the container sees
        // the client.
        assert_eq!(outside.asks(protocol, (addr::HOST_V4, 8080)), addr::CLIENT_V4);
        let through_the_proxy: [(&Place, IpAddr); 7] = [
            (&outside, addr::HOST_V6.into()),
            (&host, Ipv4Addr::LOCALHOST.into()),
            (&host, Ipv6Addr::LOCALHOST.into()),
            (&host, addr::HOST_V6.into()),
            (&server.place, GATEWAY.into()),
            (&server.place, addr::HOST_V4.into()),
            (&other_network.place, addr::HOST_V4.into()),
        ];
        for (from, to) in through_the_proxy {
            assert_eq!(from.asks(protocol, (to, 8080)), GATEWAY, "{from} to {to} ({protocol:?})");
        }
    }
    daemon.remove(server);
    daemon.remove_with_network(other_network);
    machine.assert_no_proxies();
    for protocol in [Tcp, Udp] {
        outside.is_refused(protocol, (addr::HOST_V4, 8080));
        host.is_refused(protocol, (Ipv4Addr::LOCALHOST, 8080));
    }
    let chain = machine.net.host.exec("iptables", &["-t", "nat", "-S", "DOCKER"]);
    assert!(!chain.contains("DNAT"), "{chain}");
    daemon.end(Signal::TERM);
    machine.teardown();
}

#[test]
fn a_container_with_an_ipv6_address_is_reached_over_ipv6() {
    let machine = Machine::new();
    let daemon =
        Daemon::start(&machine, &["--iptables=false", "--ipv6", "--fixed-cidr-v6=fd17::/64"]);
    let server =
        daemon.run("server", &["-p", "8080:80", "-p", "8080:53/udp"], &["tcp:80", "udp:53"]);
    let inspected = daemon.inspect("server");
    let v6 = inspected["NetworkSettings"]["GlobalIPv6Address"].as_str().expect("an IPv6 address");
    assert!(
        machine
            .proxies()
            .iter()
            .any(|proxy| proxy.contains(&format!("-host-ip :: -host-port 8080 -container-ip {v6}")))
    );
    let outside = outside(&machine);
    for protocol in [Tcp, Udp] {
        assert_eq!(outside.asks(protocol, (addr::HOST_V4, 8080)), GATEWAY);
        let gateway: Ipv6Addr = "fd17::1".parse().expect("an address");
        assert_eq!(outside.asks(protocol, (addr::HOST_V6, 8080)), gateway);
        // Through its own gateway: hairpin over IPv6.
        assert_eq!(server.place.asks(protocol, (gateway, 8080)), gateway);
    }
    daemon.end(Signal::TERM);
    machine.teardown();
}

#[test]
fn the_environment_of_dockerd_applies_to_every_proxy() {
    let machine = Machine::new();
    let environment = [("TIDEGATE_PROXY_METRICS", "127.0.0.1:9500-9509")];
    let daemon = Daemon::start_with(&machine, NO_IPTABLES, &environment);
    let server = daemon.run("server", &["-p", "8080:80"], &["tcp:80"]);
    outside(&machine).asks(Tcp, (addr::HOST_V4, 8080));
    let page = |port| place::get(&host(&machine), port, "/metrics");
    assert!(
        page(9500).contains("tidegate_proxy_connections_total{publish=\"0.0.0.0:8080/tcp\"} 1\n")
    );
    assert!(page(9501).contains("tidegate_proxy_connections_total{publish=\"[::]:8080/tcp\"} 0\n"));
    daemon.remove(server);
    assert!(machine.net.host.bound_ports(Tcp).is_empty());
    daemon.end(Signal::TERM);

    let daemon = Daemon::start_with(&machine, NO_IPTABLES, &[("TIDEGATE_PROXY_SOURCE", "nat")]);
    let error = daemon.run_fails("refused", &["-p", "8080:80"]);
    let ours = r#"userland proxy: TIDEGATE_PROXY_SOURCE="nat": "nat" is not proxy, client or proxy-protocol"#;
    assert!(error.contains(ours), "{error}");
    daemon.end(Signal::TERM);
    machine.teardown();
}

#[test]
fn with_clients_shown_the_container_sees_them_and_no_rule_remains() {
    let machine = Machine::new();
    let rules = || machine.net.host.ip(&["rule"]);
    let before = rules();
    let options = ["--iptables=false", "--live-restore"];
    let mut daemon = Daemon::start_with(&machine, &options, &[("TIDEGATE_PROXY_SOURCE", "client")]);
    let server =
        daemon.run("server", &["-p", "8080:80", "-p", "8080:53/udp"], &["tcp:80", "udp:53"]);
    let (host, outside) = (host(&machine), outside(&machine));
    let check = || {
        for protocol in [Tcp, Udp] {
            assert_eq!(outside.asks(protocol, (addr::HOST_V4, 8080)), addr::CLIENT_V4);
            // The container has no IPv6, so the gateway is the source of these clients'
            // connections.
            assert_eq!(outside.asks(protocol, (addr::HOST_V6, 8080)), GATEWAY);
            assert_eq!(host.asks(protocol, (Ipv4Addr::LOCALHOST, 8080)), GATEWAY);
            assert_eq!(server.place.asks(protocol, (GATEWAY, 8080)), GATEWAY);
        }
    };
    check();
    // However the daemon ends, its proxies clean up.
    for signal in [Signal::TERM, Signal::KILL] {
        daemon.end(signal);
        machine.assert_no_proxies();
        assert_eq!(rules(), before);
        daemon = Daemon::start_with(&machine, &options, &[("TIDEGATE_PROXY_SOURCE", "client")]);
        daemon.container("server");
        check();
    }
    daemon.docker(&["stop", "server"]);
    assert_eq!(rules(), before);
    daemon.end(Signal::TERM);
    machine.teardown();
}

/// The command line of dockerd for `PROTOCOL HOST_IP HOST_PORT CONTAINER_PORT`.
fn command_line(proxy: &str, container: IpAddr) -> String {
    let [protocol, ip, port, container_port] =
        proxy.split(' ').collect::<Vec<_>>().try_into().expect("four words");
    format!(
        "-proto {protocol} -host-ip {ip} -host-port {port} -container-ip {container} -container-port {container_port}"
    )
}

/// The addresses that `docker port` shows for a port of the container. Older clients print IPv6
/// addresses without brackets.
#[track_caller]
fn port_addresses(daemon: &Daemon, container: &Container, port: &str) -> Vec<SocketAddr> {
    let output = daemon.docker(&["port", &container.name, port]);
    let address = |line: &str| {
        let (ip, port) = line.rsplit_once(':')?;
        let ip: IpAddr = ip.trim_matches(['[', ']']).parse().ok()?;
        Some(SocketAddr::new(ip, port.parse().ok()?))
    };
    output
        .lines()
        .map(|line| address(line).unwrap_or_else(|| panic!("{line:?} is not an address")))
        .collect()
}

fn sorted(mut all: Vec<String>) -> Vec<String> {
    all.sort();
    all
}

/// The namespace of the outside client.
fn outside(machine: &Machine) -> Place {
    Place::open("outside", machine.net.client.path())
}

/// The namespace of dockerd.
fn host(machine: &Machine) -> Place {
    Place::open("host", machine.net.host.path())
}
