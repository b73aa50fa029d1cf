//! The log: text and JSON, uniform field names, no addresses of peers, and rate limiting.

#[path = "api/ask.rs"]
mod ask;
#[path = "up/scene.rs"]
mod scene;
mod support;

use scene::Scene;
use serde_json::Value;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::process::Command;
use std::time::Duration;
use support::{Publisher, limit_open_files, tidegate};
use tidegate_testbed::server::EchoServer;
use tidegate_testbed::{
    Process, Signal, Topology, addr, eventually, require_program, require_root,
};

const SOON: Duration = Duration::from_secs(20);

/// Wrong names of fields.
const MISNAMED: [&str; 6] = ["service", "container", "port", "asker", "net", "ep"];

/// Names of fields that would identify a peer.
const PEERS: [&str; 6] = ["client", "peer", "from", "remote", "source_address", "address"];

#[test]
fn the_log_contains_neither_clients_nor_looked_up_names() {
    require_program("dig");
    let net = Topology::three();
    let v4 = SocketAddr::from((addr::HOST_V4, 8080));
    let _echo = EchoServer::tcp(&net.container, (addr::CONTAINER_V4, 80).into());
    let _udp = EchoServer::udp(&net.container, (addr::CONTAINER_V4, 80).into());
    let arguments =
        "8080:80 8080:80/udp 8081:81 --to 172.30.0.2 --max-connections 2 --udp-max-sessions 1";
    for level in ["info", "debug"] {
        let mut publisher = Publisher::start_with(&net.host, arguments, |command| {
            limit_open_files(command, 64);
            command.env("TIDEGATE_LOG", level);
        });
        let mut ports = Vec::new();
        net.client.run(|| {
            let mut held = Vec::new();
            // An exchange, clients beyond the limit, a closed port, and a reset.
            for to in [v4, (addr::HOST_V6, 8080).into(), v4, v4, (addr::HOST_V4, 8081).into()] {
                // The reset may come before connect(2) returns.
                let Ok(mut stream) = TcpStream::connect_timeout(&to, SOON) else { continue };
                stream.set_read_timeout(Some(SOON)).unwrap();
                ports.push(stream.local_addr().unwrap().port());
                let _ = stream.write_all(b"echo").and_then(|()| stream.read_exact(&mut [0; 4]));
                held.push(stream);
            }
            held.drain(..).for_each(support::reset);
            // Sessions, each of which evicts the previous one.
            for _ in 0..3 {
                let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
                socket.set_read_timeout(Some(SOON)).unwrap();
                ports.push(socket.local_addr().unwrap().port());
                socket.send_to(b"echo", v4).unwrap();
                socket.recv(&mut [0; 4]).unwrap();
            }
        });
        publisher.wait_for_metrics(|metrics| metrics.port("connections", "0.0.0.0:8080/tcp") == 0);
        assert!(publisher.metrics().refused("0.0.0.0:8080/tcp", "total_limit") > 0);
        publisher.process.stop(Signal::TERM, SOON);
        let log = publisher.process.wait_for_output(SOON);
        // The check is meaningful: DEBUG logs much about these connections.
        assert_eq!(log.contains("connection refused"), level == "debug", "{log}");
        let named = names_a_peer(&log, &ports);
        assert!(named.is_none(), "{level}: {named:?} in {log}");
    }

    let scene = Scene::new();
    let mut command = scene.command("services: { box: { command: [ sleep, '60' ] } }");
    let up = Process::spawn(command.arg("--firewall=none").env("TIDEGATE_LOG", "info"));
    up.wait_for_line("Ctrl-C takes", SOON);
    let inside = scene::service_namespace(&up, "box");
    // There is no upstream server: both responses are errors.
    let _ = inside
        .command("dig")
        .args(["@127.0.0.11", "+tries=1", "+time=2", "whom-we-ask-for.example.test"])
        .output();
    inside.exec("dig", &["@127.0.0.11", "+tries=1", "+time=2", "whom-we-ask-for"]);
    let log = up.output();
    assert!(log.contains("network=") && log.contains("NAT engine started"), "{log}");
    assert!(!log.contains("whom-we-ask-for"), "{log}");
}

/// An address or a port of the client in `log`.
fn names_a_peer(log: &str, ports: &[u16]) -> Option<String> {
    let addresses = [addr::CLIENT_V4.to_string(), addr::CLIENT_V6.to_string()];
    let ports = ports.iter().map(|port| format!(":{port}"));
    addresses.into_iter().chain(ports).find(|needle| log.contains(needle))
}

#[test]
fn the_search_for_peers_finds_them() {
    let line = format!("WARN connection lost client={}:40001", addr::CLIENT_V4);
    assert!(names_a_peer(&line, &[]).is_some());
    assert!(names_a_peer("WARN lost client=[::ffff:1.2.3.4]:40001", &[40_001]).is_some());
}

#[test]
fn json_has_the_same_fields_as_text() {
    let scene = Scene::new();
    for (json, how) in [(true, "--log-format=json"), (true, ""), (false, "--log-format=human")] {
        let mut command = scene.command("services: { web: { command: [ sleep, '60' ] } }");
        command.env("TIDEGATE_LOG", "info").env("TIDEGATE_LOG_FORMAT", "json");
        if !how.is_empty() {
            command.arg(how);
        }
        let mut up = Process::spawn(&mut command);
        up.wait_for_line("Ctrl-C takes", SOON);
        let new = r#"{"endpoint": "web", "spec": "127.0.0.1:8080-8081:80-81"}"#;
        let (code, ports) = ask::ask(&scene.socket(), "POST", "/v1/ports", new);
        assert_eq!(code, 201, "{ports}");
        let target = format!("/v1/ports/{}", ports[1]["id"]);
        assert_eq!(ask::ask(&scene.socket(), "DELETE", &target, "").0, 204);
        up.stop(Signal::INT, SOON);
        let log = up.wait_for_output(SOON);
        let line = |word: &str| {
            let found = log.lines().find(|line| line.contains(word));
            found.unwrap_or_else(|| panic!("no {word}: {log}")).to_owned()
        };
        if json {
            let event = |word: &str| -> Value {
                serde_json::from_str(&line(word)).unwrap_or_else(|_| panic!("{log}"))
            };
            let published = event("\"published\"");
            assert_eq!(published["level"], "INFO");
            assert_eq!(published["message"], "published");
            assert_eq!(published["publish"], "127.0.0.1:8080-8081/tcp");
            assert_eq!(
                (&published["endpoint"], &published["to"]),
                (&"web".into(), &"80-81".into())
            );
            let network = event("network is up");
            assert_eq!(network["network"], "default");
            assert!(network["bridge"].as_str().unwrap().starts_with("tg-"), "{network}");
            let attached = event("\"attached\"");
            assert_eq!(
                (&attached["endpoint"], &attached["network"]),
                (&"web".into(), &"default".into())
            );
            let closed = event("port closed");
            assert_eq!(
                (&closed["publish"], &closed["endpoint"]),
                (&"127.0.0.1:8081/tcp".into(), &"web".into())
            );
            assert!(closed["timestamp"].as_str().unwrap().ends_with('Z'));
            // All log lines.
            for line in log.lines().filter(|line| line.contains("INFO") || line.contains("WARN")) {
                let event: Value =
                    serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
                assert!(event["message"].is_string() && event["target"].is_string(), "{line}");
            }
        } else {
            let published = line(" published ");
            for needed in ["INFO", "publish=\"127.0.0.1:8080-8081/tcp\"", "endpoint=\"web\""] {
                assert!(published.contains(needed), "{needed}: {published}");
            }
        }
    }
}

#[test]
fn the_final_error_has_the_log_format_and_an_unknown_format_is_rejected() {
    require_root();
    let host = tidegate_testbed::Namespace::new();
    let fails = |arguments: &str, format: &str, code: i32| {
        let mut command: Command = tidegate(&host, arguments);
        let output = command.env("TIDEGATE_LOG_FORMAT", format).output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{stderr}");
        stderr
    };
    let stderr = fails("publish 8080:80 --to 192.0.2.1 --metrics 192.0.2.1:9464", "json", 1);
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    let event: Value = serde_json::from_str(&stderr).unwrap();
    assert_eq!(event["level"], "ERROR");
    assert!(
        event["message"].as_str().unwrap().starts_with("metrics address 192.0.2.1:9464: "),
        "{stderr}"
    );
    let stderr = fails("ps", "xml", 1);
    assert_eq!(
        stderr,
        "tidegate: error: TIDEGATE_LOG_FORMAT=\"xml\" is not a log format; use human or json\n"
    );
    let stderr = fails("ps --log-format xml", "", 2);
    assert!(stderr.contains("human") && stderr.contains("json"), "{stderr}");
}

#[test]
fn up_rejects_a_foreign_metrics_address_and_leaves_no_state() {
    let scene = Scene::new();
    let before = scene::state(&scene.net.host);
    let file = scene.directory.path().join("compose.yaml");
    std::fs::write(&file, "services: { web: { command: [ sleep, '60' ] } }").unwrap();
    let error = scene::refused(
        scene.tidegate().args(["up", "--metrics", "192.0.2.1:9464", "-f"]).arg(&file),
    );
    assert!(error.starts_with("tidegate: error: metrics address 192.0.2.1:9464: "), "{error}");
    assert_eq!(error.lines().count(), 1, "{error}");
    assert_eq!(scene::state(&scene.net.host), before);
}

#[test]
fn repeated_warnings_are_logged_once_and_counted() {
    let scene = Scene::new();
    let mut up =
        scene.up_with("services: { web: { command: [ sleep, '60' ] } }", &["--firewall=none"]);
    up.wait_for_line("Ctrl-C takes", SOON);
    const TIMES: usize = 4;
    let ours = || {
        let rules = scene.net.host.ip(&["rule"]);
        let ours: Vec<String> =
            rules.lines().filter(|line| line.contains("iif tg")).map(str::to_owned).collect();
        ours
    };
    let all = ours();
    assert!(!all.is_empty());
    for _ in 0..TIMES {
        let now = ours();
        // The only rule with its priority.
        let priority = now.last().unwrap().split(':').next().unwrap().to_owned();
        scene.net.host.ip(&["rule", "del", "priority", &priority]);
        assert!(eventually(SOON, || ours() == all), "not repaired");
    }
    // A repair is counted after its rule is restored.
    std::thread::sleep(Duration::from_millis(300));
    up.stop(Signal::INT, SOON);
    let log = up.wait_for_output(SOON);
    let lines: Vec<&str> = log
        .lines()
        .filter(|line| line.contains("removed or changed by other software; restored"))
        .collect();
    assert_eq!(lines.len(), 2, "{log}");
    assert!(!lines[0].contains("repeated"), "{log}");
    let times: usize = lines[1]
        .split("repeated ")
        .nth(1)
        .and_then(|rest| rest.split(' ').next()?.parse().ok())
        .unwrap();
    // On a busy machine, two changes may be repaired together.
    assert!((1..TIMES).contains(&times), "{log}");
}

/// Checks the field names in the source of all logged events.
#[test]
fn field_names_are_uniform() {
    let mut seen = 0;
    let mut complaints = Vec::new();
    for path in sources(std::path::Path::new(env!("CARGO_MANIFEST_DIR"))) {
        let text = std::fs::read_to_string(&path).unwrap();
        for level in ["info", "warn", "error"] {
            for call in text.split(&format!("tracing::{level}!(")).skip(1) {
                let call = call.split(");").next().unwrap_or_default();
                // The fields precede the message.
                let fields = call.split('"').next().unwrap_or_default();
                seen += 1;
                for field in fields
                    .split(',')
                    .map(|field| field.split('=').next().unwrap_or_default().trim())
                {
                    let name = field.trim_start_matches(['%', '?']);
                    // A service of a cluster is not an endpoint.
                    let is_of_cluster = path.components().any(|part| part.as_os_str() == "mesh");
                    let is_misnamed =
                        MISNAMED.contains(&name) && !(is_of_cluster && name == "service");
                    if is_misnamed || PEERS.contains(&name) {
                        complaints.push(format!("{}: {level}: {name}", path.display()));
                    }
                }
            }
        }
    }
    assert!(seen > 40, "{seen} events");
    assert!(complaints.is_empty(), "{}", complaints.join("\n"));
}

fn sources(root: &std::path::Path) -> Vec<std::path::PathBuf> {
    let mut found = Vec::new();
    let mut directories: Vec<_> = [
        "src",
        "api/src",
        "compose/src",
        "dns/src",
        "drop-ins",
        "mesh/src",
        "nat/src",
        "netfilter/src",
        "netns/src",
        "netsetup/src",
        "process/src",
        "proxy/src",
        "publish/src",
        "reactor/src",
        "services/src",
        "telemetry/src",
    ]
    .iter()
    .map(|part| root.join(part))
    .collect();
    while let Some(directory) = directories.pop() {
        for entry in std::fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                directories.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(path);
            }
        }
    }
    found
}
