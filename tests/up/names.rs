//! DNS and `/etc/hosts` of services.

use super::scene::{Scene, TIDEGATE, service_namespace, state};
use std::time::Duration;
use tidegate_testbed::{Namespace, Process, Signal, eventually};

const SOON: Duration = Duration::from_secs(10);

const FILE: &str = r#"
name: demo
networks: { front: { enable_ipv6: true, x-dns-servers: 203.0.113.9 }, back: {}, shut: { internal: true } }
services:
  web:
    command: [ sleep, "60" ]
    hostname: curious
    dns: 203.0.113.9
    dns_search: shop.test
    networks: { front: {}, back: {} }
  db: { command: [ sleep, "60" ], networks: { back: { aliases: [ sql ] } } }
  stranger: { command: [ sleep, "60" ], networks: [ front ] }
  isolated: { command: [ sleep, "60" ], dns: 203.0.113.9, networks: [ shut ] }
"#;

/// An external DNS server with one name that logs its queries.
fn outside(scene: &Scene) -> Process {
    let server = Process::spawn(scene.net.client.command("dnsmasq").args([
        "--no-daemon",
        "--no-resolv",
        "--no-hosts",
        "--conf-file=/dev/null",
        "--log-queries",
        "--listen-address=203.0.113.9",
        "--bind-interfaces",
        "--address=/example.test/192.0.2.77",
        "--local-ttl=60",
        "--pid-file=",
        "--user=root",
    ]));
    server.wait_for_line("started", SOON);
    server
}

/// The output of `dig` with the server of `namespace`.
fn dig(namespace: &Namespace, args: &[&str]) -> String {
    let mut command = namespace.command("dig");
    let output =
        command.args(["@127.0.0.11", "+short", "+time=3", "+tries=1"]).args(args).output().unwrap();
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

#[track_caller]
fn assert_names(scene: &Scene, up: &Process) {
    let server = outside(scene);
    let [web, db, stranger, isolated] =
        ["web", "db", "stranger", "isolated"].map(|service| service_namespace(up, service));
    let v4 = dig(&web, &["sql"]);
    assert!(v4.starts_with("172.28."), "{v4}");
    for name in ["db", "db.back", "DB"] {
        assert_eq!(dig(&web, &[name]), v4, "{name}");
        assert_eq!(dig(&web, &["+tcp", name]), v4, "{name} over TCP");
    }
    assert_eq!(dig(&web, &["-x", &v4]), "db.back.");
    assert!(dig(&stranger, &["AAAA", "web"]).starts_with("fd"));
    assert_eq!(dig(&db, &["curious"]), dig(&db, &["web"]), "by its host name");
    assert_eq!(dig(&stranger, &["db"]), "", "not on a network of its own");
    assert_eq!(dig(&isolated, &["web"]), "");
    // Other names are forwarded to external servers, but not for internal networks.
    assert_eq!(dig(&web, &["www.example.test"]), "192.0.2.77");
    assert_eq!(dig(&stranger, &["www.example.test"]), "192.0.2.77", "by the server of its network");
    assert_eq!(dig(&isolated, &["isolated.example.test"]), "");
    // The resolver randomizes the case of letters (0x20 encoding).
    let asked = server.output().to_lowercase();
    assert!(asked.contains("www.example.test") && !asked.contains("isolated"), "{asked}");
    assert!(!asked.contains("sql") && !asked.contains("curious"), "{asked}");
}

#[test]
fn services_resolve_names_of_their_networks_and_external_names() {
    for firewall in ["none", "nftables"] {
        let scene = Scene::new();
        let up = scene.up_with(FILE, &[&format!("--firewall={firewall}"), "--dns-ttl=7s"]);
        up.wait_for_line("Ctrl-C takes", SOON);
        let printed =
            dig(&service_namespace(&up, "web"), &["+noshort", "+noall", "+answer", "sql"]);
        assert_eq!(printed.split_whitespace().nth(1), Some("7"), "{printed}");
        assert_names(&scene, &up);
    }
}

#[test]
fn services_resolve_names_rootless() {
    let scene = Scene::new();
    let up = scene.up_as_nobody(FILE);
    up.wait_for_line("Ctrl-C takes", SOON);
    assert_names(&scene, &up);
}

#[test]
fn services_resolve_names_on_an_old_kernel() {
    let scene = Scene::lacking("all");
    let up = scene.up_as_nobody(FILE);
    up.wait_for_line("Ctrl-C takes", SOON);
    assert_names(&scene, &up);
}

#[test]
fn queried_names_are_logged_only_at_level_debug() {
    for (level, is_logged) in [("info", false), ("debug", true)] {
        let scene = Scene::new();
        let up = Process::spawn(scene.command(FILE).env("TIDEGATE_LOG", level));
        up.wait_for_line("Ctrl-C takes", SOON);
        let web = service_namespace(&up, "web");
        assert!(!dig(&web, &["sql"]).is_empty());
        dig(&web, &["private.example.test"]);
        let output = up.output();
        assert_eq!(output.contains("private.example.test"), is_logged, "{level}: {output}");
        assert!(is_logged || !up.output().contains("sql"), "{}", up.output());
    }
}

/// The names are looked up with getent(1), which uses the resolver of the C library.
#[test]
fn programs_use_resolv_conf_and_hosts_of_the_service() {
    let scene = Scene::new();
    let file = FILE.replacen(
        r#"[ sleep, "60" ]"#,
        r#"[ sh, -c, "cat /etc/resolv.conf /etc/hosts; hostname; getent hosts sql; getent hosts stranger2 || echo no stranger" ]"#,
        1,
    );
    let up = scene.up(&file);
    up.wait_for_line("no stranger", SOON);
    let printed = up.output();
    for line in ["nameserver 127.0.0.11", "search shop.test", "options ndots:0", "curious"] {
        assert!(
            printed.lines().any(|one| one.ends_with(&format!("| {line}"))),
            "{line}:\n{printed}"
        );
    }
    assert!(
        printed.lines().any(|line| line.contains("172.28.") && line.ends_with("sql")),
        "{printed}"
    );
    assert!(
        printed.lines().any(|line| line.contains("172.28.") && line.ends_with("curious web")),
        "{printed}"
    );
}

/// The service binds port 53 on all addresses, including 127.0.0.11.
#[test]
fn a_service_can_be_a_dns_server() {
    let scene = Scene::new();
    let file = r#"
name: demo
services:
  names: { command: dnsmasq --no-daemon --no-resolv --no-hosts --conf-file=/dev/null --address=/x.test/192.0.2.1 --pid-file= --user=root, restart: "no" }
  web: { command: [ sleep, "60" ] }
"#;
    let up = scene.up(file);
    up.wait_for_line("Ctrl-C takes", SOON);
    up.wait_for_line("started", SOON);
    let web = service_namespace(&up, "web");
    let at = dig(&web, &["names"]);
    let ask = || {
        let output = web
            .command("dig")
            .args([&format!("@{at}"), "+short", "+time=1", "x.test"])
            .output()
            .unwrap();
        String::from_utf8_lossy(&output.stdout).trim() == "192.0.2.1"
    };
    assert!(eventually(SOON, ask));
    assert_eq!(
        dig(&service_namespace(&up, "names"), &["web"]).lines().count(),
        1,
        "it resolves names itself"
    );
}

/// A network cannot observe or delay queries of another network through a shared cache. Both
/// services have the same upstream server.
#[test]
fn the_dns_cache_is_not_shared_between_networks() {
    let scene = Scene::new();
    let file = r#"
name: demo
networks: { front: {}, back: {} }
services:
  web: { command: [ sleep, "60" ], dns: 203.0.113.9, networks: [ front ] }
  db: { command: [ sleep, "60" ], dns: 203.0.113.9, networks: [ back ] }
"#;
    let up = scene.up(file);
    up.wait_for_line("Ctrl-C takes", SOON);
    let server = outside(&scene);
    let asked = || server.output().to_lowercase().matches("query[a] www.example.test").count();
    let [web, db] = ["web", "db"].map(|service| service_namespace(&up, service));
    for (who, count) in [(&web, 1), (&web, 1), (&db, 2), (&db, 2)] {
        assert_eq!(dig(who, &["www.example.test"]), "192.0.2.77");
        assert!(eventually(SOON, || asked() == count), "{} of {count}", asked());
    }
}

/// A container spoofs the address of the upstream server and knows the port, ID and case of the
/// query. The reverse path filter of the host is off.
#[test]
fn a_dns_answer_spoofed_by_a_container_is_rejected() {
    let scene = Scene::new();
    let file = r#"
name: demo
networks: { front: { ipam: { config: [ { subnet: 10.77.1.0/24 } ] } } }
services:
  web: { command: [ sleep, "60" ], dns: 203.0.113.9, networks: [ front ] }
  evil: { command: [ sleep, "60" ], networks: [ front ] }
"#;
    let up = scene.up_with(file, &["--firewall=none"]);
    up.wait_for_line("Ctrl-C takes", SOON);
    scene.sh("for filter in /proc/sys/net/ipv4/conf/*/rp_filter; do echo 0 >$filter; done");
    let silent = scene.net.client.run(|| std::net::UdpSocket::bind("203.0.113.9:53")).unwrap();
    silent.set_read_timeout(Some(SOON)).unwrap();
    let [web, evil] = ["web", "evil"].map(|service| service_namespace(&up, service));
    evil.ip_all("addr add 203.0.113.9/32 dev lo");
    let forger = evil.run(|| std::net::UdpSocket::bind("203.0.113.9:53")).unwrap();
    std::thread::scope(|scope| {
        let asked = scope.spawn(|| dig(&web, &["victim.example.test"]));
        // Answers all queries during the 3 s that dig waits.
        while !asked.is_finished() {
            let mut question = [0; 512];
            let Ok((length, from)) = silent.recv_from(&mut question) else { break };
            // Removes the OPT record at the end. A health check of the server has none.
            let end = length.saturating_sub(11);
            if end <= 20 {
                continue;
            }
            let mut answer = question[..end].to_vec();
            answer[2..12].copy_from_slice(&[0x81, 0x80, 0, 1, 0, 1, 0, 0, 0, 0]);
            answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 14, 16, 0, 4, 6, 6, 6, 6]);
            let _ = forger.send_to(&answer, from);
            silent.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
            while !asked.is_finished() && silent.peek(&mut [0; 1]).is_err() {}
        }
        assert!(!asked.join().unwrap().contains("6.6.6.6"));
    });
    assert!(!dig(&web, &["victim.example.test"]).contains("6.6.6.6"), "not cached either");
}

#[test]
fn a_network_can_have_its_dns_server_at_the_gateway() {
    let scene = Scene::new();
    let file = r#"
name: demo
networks: { front: { x-dns: gateway, ipam: { config: [ { subnet: 10.77.1.0/24 } ] } } }
services:
  web: { command: [ sh, -c, "cat /etc/resolv.conf; getent hosts db && sleep 60" ], networks: [ front ] }
  db: { command: [ sleep, "60" ], networks: [ front ] }
"#;
    let up = scene.up(file);
    up.wait_for_line("nameserver 10.77.1.1", SOON);
    up.wait_for_line("10.77.1.3", SOON);
    let db = service_namespace(&up, "db");
    assert!(dig(&db, &["web"]).contains("connection refused"), "no server at 127.0.0.11");
    let mut dig_outside = scene.net.client.command("dig");
    let asked = dig_outside.args(["@10.77.1.1", "+short", "+time=1", "+tries=1", "web"]);
    let output = asked.output().unwrap();
    assert!(
        !String::from_utf8_lossy(&output.stdout).contains("10.77.1.2"),
        "other clients get no answer"
    );
}

/// Two adopted namespaces, one after the other at the same path.
#[test]
fn a_restarted_container_is_served_again_and_no_state_is_left_in_it() {
    let scene = Scene::new();
    let path = scene.directory.path().join("box");
    let lead_to = |namespace: &Namespace| {
        let _ = std::fs::remove_file(&path);
        std::os::unix::fs::symlink(namespace.path(), &path).unwrap();
    };
    let (first, second) = (Namespace::new(), Namespace::new());
    let before = [&first, &second].map(state);
    lead_to(&first);
    let file = format!(
        "name: demo\nservices:\n  box: {{ x-netns: {} }}\n  web: {{ command: '{TIDEGATE} hello --listen [::]:80' }}\n",
        path.display()
    );
    let mut up = scene.up(&file);
    up.wait_for_line("Ctrl-C takes", SOON);
    let web = dig(&first, &["web"]);
    assert!(web.starts_with("172.28."), "{web}");
    lead_to(&second);
    assert!(eventually(SOON, || dig(&second, &["web"]) == web));
    up.stop(Signal::INT, SOON);
    let after = [&first, &second].map(state);
    assert_eq!(after, before);
}
