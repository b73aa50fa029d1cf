//! Access to port 53, and complete removal of sockets and rules.

use crate::support::client::{SERVER, send};
use crate::support::{TestBed, at, handle};
use hickory_server::proto::rr::RecordType;
use std::net::{TcpListener, UdpSocket};
use std::time::Duration;
use tidegate_dns::{Listen, ServeOptions};
use tidegate_testbed::{Namespace, Protocol, eventually};

fn options(listen: Listen) -> ServeOptions {
    ServeOptions { listen, ..ServeOptions::default() }
}

fn scene() -> TestBed {
    let bed = TestBed::new(Namespace::new(), "");
    bed.network("un1");
    bed.endpoint("un1", "web", &[], &["172.30.1.2"]);
    bed
}

#[test]
fn a_container_may_have_a_dns_server_of_its_own() {
    let bed = scene();
    let container = bed.serve("web");
    let serving = container.serving.as_ref().unwrap();
    assert!(serving.is_redirected());
    let own = || (UdpSocket::bind("0.0.0.0:53").unwrap(), TcpListener::bind("0.0.0.0:53").unwrap());
    let (udp, _tcp) = container.namespace.run(own);
    assert_eq!(container.resolve("web", RecordType::A), "172.30.1.2");
    let mut stream = container.connect();
    crate::support::client::write(
        &mut stream,
        &crate::support::client::query(1, "web", RecordType::A),
    );
    assert!(crate::support::client::read(&mut stream).is_ok());
    // The server of the container is reachable at all other addresses.
    let asked = std::thread::scope(|scope| {
        scope.spawn(|| {
            send(&container.namespace, at("127.0.0.1:53"), b"own", Duration::from_millis(10))
        });
        let mut buffer = [0; 10];
        let length = udp.recv(&mut buffer).unwrap();
        buffer[..length].to_vec()
    });
    assert_eq!(asked, b"own");
}

#[test]
fn sockets_and_rules_are_removed_with_the_server() {
    let bed = scene();
    let mut container = bed.serve("web");
    let tables = || container.namespace.exec("nft", &["list", "ruleset"]);
    assert!(tables().contains("ip daddr 127.0.0.11 udp dport 53 udp dport set "), "{}", tables());
    assert!(tables().contains("ip saddr 127.0.0.11 tcp sport "), "{}", tables());
    drop(container.serving.take());
    assert_eq!(container.namespace.exec("nft", &["list", "ruleset"]), "");
    let gone = || {
        container.namespace.bound_ports(Protocol::Udp).is_empty()
            && container.namespace.bound_ports(Protocol::Tcp).is_empty()
    };
    assert!(eventually(Duration::from_secs(2), gone));
}

#[test]
fn a_server_replaces_the_table_of_a_killed_one() {
    let bed = scene();
    let mut container = bed.serve("web");
    // The state after a crash: the sockets are closed, the table remains.
    std::mem::forget(container.serving.take());
    let _guard = bed.runtime.enter();
    let serving =
        bed.resolver.serve(&handle(&container.namespace), "web", &ServeOptions::default()).unwrap();
    assert_eq!(container.resolve("web", RecordType::A), "172.30.1.2");
    assert_eq!(container.namespace.exec("nft", &["list", "tables"]), "table inet tidegate_dns\n");
    drop(serving);
    assert_eq!(container.namespace.exec("nft", &["list", "tables"]), "");
}

#[test]
fn direct_mode_binds_port_53() {
    let bed = scene();
    let container = bed.serve_with("web", &options(Listen::Direct));
    assert!(!container.serving.as_ref().unwrap().is_redirected());
    assert_eq!(container.namespace.exec("nft", &["list", "ruleset"]), "");
    assert!(
        container.namespace.is_bound(Protocol::Udp, 53)
            && container.namespace.is_bound(Protocol::Tcp, 53)
    );
    assert_eq!(container.resolve("web", RecordType::A), "172.30.1.2");
}

#[test]
fn a_port_in_use_is_reported_with_the_container() {
    let bed = scene();
    for taken in [true, false] {
        let namespace = Namespace::new();
        let _udp = taken.then(|| namespace.run(|| UdpSocket::bind("0.0.0.0:53").unwrap()));
        let _tcp = (!taken).then(|| namespace.run(|| TcpListener::bind(SERVER).unwrap()));
        let _guard = bed.runtime.enter();
        let error =
            bed.resolver.serve(&handle(&namespace), "web", &options(Listen::Direct)).unwrap_err();
        assert_eq!(
            error.to_string(),
            "container \"web\": 127.0.0.11:53 is in use by a DNS server in the container, and nftables is not available to redirect queries; stop that server, or bind it to another address"
        );
        assert!(bed.resolver.serve(&handle(&namespace), "web", &options(Listen::Auto)).is_ok());
    }
}

#[test]
fn a_change_applies_to_the_next_query() {
    let bed = scene();
    let container = bed.serve("web");
    for number in 1..=50 {
        let name = format!("new-{number}");
        assert_eq!(container.resolve(&name, RecordType::A), "NXDomain");
        bed.endpoint("un1", &name, &[], &["172.30.1.3"]);
        assert_eq!(container.resolve(&name, RecordType::A), "172.30.1.3");
        bed.resolver.remove_endpoint("un1", &name, &name);
        assert_eq!(container.resolve(&name, RecordType::A), "NXDomain");
    }
}

#[test]
fn a_firewall_in_the_container_sees_port_53_in_both_directions() {
    let bed = scene();
    let container = bed.serve("web");
    let rules = bed.directory.path().join("rules");
    std::fs::write(
        &rules,
        "table inet fw {
            chain input {
                type filter hook input priority 0; policy drop;
                ct state invalid drop
                meta l4proto udp ct original proto-dst 53 accept
                meta l4proto tcp ct original proto-dst 53 accept
            }
            chain output {
                type filter hook output priority 0; policy drop;
                ct state invalid drop
                meta l4proto udp ct original proto-dst 53 accept
                meta l4proto tcp ct original proto-dst 53 accept
            }
        }",
    )
    .unwrap();
    container.namespace.exec("nft", &["-f", rules.to_str().unwrap()]);
    for _ in 0..3 {
        assert_eq!(container.resolve("web", RecordType::A), "172.30.1.2");
        let mut stream = container.connect();
        for id in 0..3 {
            crate::support::client::write(
                &mut stream,
                &crate::support::client::query(id, "web", RecordType::A),
            );
            assert!(crate::support::client::read(&mut stream).is_ok());
        }
    }
}

#[test]
fn the_port_is_closed_when_the_server_stops() {
    let bed = scene();
    let mut container = bed.serve("web");
    drop(container.serving.take());
    let refused = || {
        let connected = container.namespace.run(|| std::net::TcpStream::connect(SERVER));
        matches!(connected, Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused)
    };
    assert!(eventually(Duration::from_secs(2), refused));
}

#[test]
fn without_the_privilege_for_rules_port_53_is_bound() {
    let bed = scene();
    let namespace = Namespace::new();
    let inside = handle(&namespace);
    let serve = |listen| {
        std::thread::scope(|scope| {
            let without_privilege = || {
                let mut has = rustix::thread::capabilities(None).unwrap();
                has.effective.remove(rustix::thread::CapabilitySet::NET_ADMIN);
                rustix::thread::set_capabilities(None, has).unwrap();
                let _guard = bed.runtime.enter();
                bed.resolver.serve(&inside, "web", &options(listen))
            };
            scope.spawn(without_privilege).join().unwrap()
        })
    };
    let error = serve(Listen::Redirected).unwrap_err().to_string();
    assert!(
        error.starts_with("container \"web\": cannot redirect DNS in its namespace: "),
        "{error}"
    );
    let serving = serve(Listen::Auto).unwrap();
    assert!(!serving.is_redirected());
    assert_eq!(serving.address(), at(SERVER));
    let container = crate::support::Container { namespace, serving: Some(serving) };
    assert_eq!(container.resolve("web", RecordType::A), "172.30.1.2");
}
