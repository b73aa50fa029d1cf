//! Third-party clients: dig, the resolver of glibc, and queries as sent by musl.

use crate::support::client::query;
use crate::support::upstream::Upstream;
use crate::support::{Container, TestBed};
use hickory_server::proto::op::Message;
use hickory_server::proto::rr::RecordType;
use std::collections::BTreeMap;
use std::fs;
use std::net::UdpSocket;
use std::process::Stdio;
use std::time::Duration;
use tidegate_dns::{ResolvConf, SERVER};
use tidegate_testbed::{Mounts, require_program};

fn scene() -> (TestBed, Upstream, Container) {
    let (bed, upstream) = TestBed::with_upstream();
    bed.network("un1");
    bed.endpoint("un1", "web", &["site"], &["172.30.1.2"]);
    bed.endpoint("un1", "six", &[], &["172.30.1.3", "fd88::3"]);
    let container = bed.serve("web");
    // glibc omits address families without an address on an interface other than loopback.
    container.namespace.ip_all(
        "link add eth0 type bridge
         addr add 172.30.1.2/24 dev eth0
         link set eth0 up",
    );
    (bed, upstream, container)
}

fn dig(container: &Container, args: &[&str]) -> String {
    require_program("dig");
    let all = [&["@127.0.0.11", "+tries=1", "+time=3"], args].concat();
    container.namespace.exec("dig", &all)
}

#[test]
fn dig_gets_valid_responses() {
    let (_bed, _upstream, client) = scene();
    assert_eq!(dig(&client, &["+short", "web"]), "172.30.1.2\n");
    assert_eq!(dig(&client, &["+short", "-x", "172.30.1.2"]), "web.un1.\n");
    assert_eq!(dig(&client, &["+short", "six", "AAAA"]), "fd88::3\n");
    assert_eq!(dig(&client, &["+short", "+tcp", "site.un1"]), "172.30.1.2\n");
    assert_eq!(
        dig(&client, &["+short", "+tcp", "+keepopen", "web", "A", "six", "A"]),
        "172.30.1.2\n172.30.1.3\n"
    );
    let empty = dig(&client, &["web", "AAAA"]);
    assert!(
        empty.contains("status: NOERROR") && empty.contains("ANSWER: 0, AUTHORITY: 1"),
        "{empty}"
    );
    assert!(
        !empty.contains("WARNING") && !empty.contains("Malformed") && !empty.contains("malformed"),
        "{empty}"
    );
    assert!(dig(&client, &["+edns=1", "+noednsneg", "web"]).contains("status: BADVERS"));
    assert!(dig(&client, &["+opcode=status", "web"]).contains("status: NOTIMP"));
    assert!(dig(&client, &["version.bind", "TXT", "CH"]).contains("status: REFUSED"));
    let forwarded = dig(&client, &["example.com"]);
    assert!(
        forwarded.contains("192.0.2.1") && forwarded.contains("flags: qr rd ra;"),
        "{forwarded}"
    );
    let cookie = dig(&client, &["+cookie=0123456789abcdef", "web"]);
    assert!(cookie.contains("172.30.1.2"), "{cookie}");
}

/// Runs getent with the `resolv.conf` of the container.
fn getent(
    client: &Container,
    bed: &TestBed,
    host: &str,
    options: &[String],
    args: &[&str],
) -> (bool, String) {
    require_program("getent");
    let text = ResolvConf::parse(host, &|_| None).for_container(SERVER.into(), &[], options);
    let path = bed.directory.path().join("inside.conf");
    fs::write(&path, text).unwrap();
    // Mounted over the target of /etc/resolv.conf, which may be a symbolic link.
    let target = fs::canonicalize("/etc/resolv.conf").unwrap();
    let mounts = Mounts::builder().bind(&path, target).build(&client.namespace);
    let inside = client.namespace.with_mounts(mounts);
    let output = inside.command("getent").args(args).stdin(Stdio::null()).output().unwrap();
    (
        output.status.success(),
        String::from_utf8(output.stdout).unwrap().split_whitespace().collect::<Vec<_>>().join(" "),
    )
}

#[test]
fn glibc_resolves_names() {
    let (bed, upstream, client) = scene();
    let host = "search example.test\nnameserver 127.0.0.53\n";
    let get = |args: &[&str]| getent(&client, &bed, host, &[], args);
    assert_eq!(get(&["ahostsv4", "web"]).1.split(' ').next(), Some("172.30.1.2"));
    assert_eq!(get(&["hosts", "six"]).1, "fd88::3 six");
    assert_eq!(get(&["hosts", "172.30.1.3"]).1, "172.30.1.3 six.un1");
    assert!(upstream.names().iter().all(|name| !name.contains("web") && !name.contains("six")));
    assert!(get(&["ahostsv4", "www.example.com"]).1.starts_with("192.0.2.1 "));
    // An unknown name is queried in the search domain only.
    upstream.seen();
    assert!(get(&["ahostsv4", "printer"]).1.starts_with("192.0.2.1 "));
    let names = upstream.names();
    assert!(
        !names.is_empty() && names.iter().all(|name| name == "printer.example.test."),
        "{names:?}"
    );
    assert!(!get(&["ahostsv4", "nx.example.com"]).0);
}

#[test]
fn ndots_of_the_container_applies() {
    let (bed, upstream, client) = scene();
    let host = "search example.test\nnameserver 127.0.0.53\n";
    let options = ["ndots:2".to_owned()];
    let get = |args: &[&str]| getent(&client, &bed, host, &options, args);
    assert!(get(&["ahostsv4", "www.example"]).1.starts_with("192.0.2.1 "));
    assert_eq!(upstream.names().first().map(String::as_str), Some("www.example.example.test."));
    assert!(!get(&["ahostsv4", "nx.web"]).0);
}

/// musl sends queries for both families from one socket, and accepts responses in any order.
#[test]
fn both_families_at_once_from_one_socket_are_answered() {
    let (_bed, _upstream, client) = scene();
    let socket = client.namespace.run(|| UdpSocket::bind("0.0.0.0:0").unwrap());
    socket.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
    for (name, v4, v6) in [("web", 1, 0), ("six", 1, 1), ("example.com", 1, 0), ("nosuch", 0, 0)] {
        for (id, kind) in [(1, RecordType::A), (2, RecordType::AAAA)] {
            socket.send_to(&query(id, name, kind).to_vec().unwrap(), "127.0.0.11:53").unwrap();
        }
        let mut counts = BTreeMap::new();
        for _ in 0..2 {
            let mut buffer = [0; 512];
            let (length, from) = socket.recv_from(&mut buffer).unwrap();
            assert_eq!(from.to_string(), "127.0.0.11:53", "musl requires this source address");
            let answer = Message::from_vec(&buffer[..length]).unwrap();
            counts.insert(answer.metadata.id, answer.answers.len());
        }
        assert_eq!(counts, BTreeMap::from([(1, v4), (2, v6)]), "{name}");
    }
}
