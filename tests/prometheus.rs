//! The dashboards, rules and alerts of `grafana/`, with a real Prometheus that scrapes a `tidegate
//! up` under traffic.

#[path = "api/ask.rs"]
mod ask;
#[path = "up/scene.rs"]
mod scene;

mod prometheus {
    pub(crate) mod dashboards;
    pub(crate) mod server;
    pub(crate) mod traffic;
}

use prometheus::dashboards::{self, Variable};
use prometheus::server::{Answer, OTHER_TARGET, Prometheus, TARGET};
use prometheus::traffic::{ROUNDS, Traffic};
use scene::{Scene, state};
use std::collections::BTreeSet;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;
use tidegate_testbed::{Process, Signal, eventually, require_program};

const SOON: Duration = Duration::from_secs(10);

/// Panels whose expression has no data in this test, each with the reason. All others must have
/// data.
const WITHOUT_DATA: &[(&str, &str)] = &[
    ("Does etcd answer?", "the host is in no cluster"),
    ("How many hosts are heard, and how many are silent?", "the host is in no cluster"),
    ("What is the latency between hosts?", "the host is in no cluster"),
    ("How many endpoints does each host have on overlay networks?", "the host is in no cluster"),
    ("How many endpoints of other hosts are programmed?", "the host is in no cluster"),
    ("How many frames from other hosts are dropped?", "the host is in no cluster"),
    ("How many tasks of each service get connections?", "the host is in no cluster"),
    ("How many connections to services start?", "the host is in no cluster"),
    ("How many connections to services are open?", "the host is in no cluster"),
    ("How many connections do tasks not accept?", "the host is in no cluster"),
    ("How often are tasks ejected?", "the host is in no cluster"),
    ("What share of the connections to services does each host get?", "the host is in no cluster"),
    ("How many problems are there?", "the host is in no cluster"),
    ("How many objects were restored?", "the host is in no cluster"),
];

/// Alerts that depend on the load of the machine.
const SLOWNESS: [&str; 3] = ["TidegateDialSlow", "TidegateNatRetransmits", "TidegateUpstreamSlow"];

#[test]
fn every_expression_has_data_and_stored_values_match_the_traffic() {
    for program in ["prometheus", "promtool", "dnsmasq", "dig"] {
        require_program(program);
    }
    let scene = Scene::new();
    let before = state(&scene.net.host);
    let file = scene.directory.path().join("compose.yaml");
    std::fs::write(&file, prometheus::traffic::PROJECT).unwrap();
    let mut command = scene.tidegate();
    command.args(["up", "--firewall=none", "--metrics", TARGET, "-f"]).arg(&file);
    let mut up = Process::spawn(&mut command);
    up.wait_for_line("Ctrl-C takes", SOON);
    // One instance has the NAT engine and no firewall, the other has a firewall.
    let other_socket = scene.directory.path().join("other.sock");
    let mut other = Process::spawn(&mut other(&scene, &other_socket));
    other.wait_for_line("Ctrl-C takes", SOON);
    let server = Prometheus::start(&scene.net.host);
    let traffic = Traffic::prepare(&scene.net, &up);

    // Rates need a scrape before and after.
    for round in 0..ROUNDS {
        server.wait_for_scrapes(2);
        traffic.round(round);
        publish_and_close_port(&other_socket);
    }
    let _open = traffic.keep_open();
    server.wait_for_scrapes(2);

    assert_stored_values(&server, &traffic);
    let page = server.scrape();
    assert_eq!(promtool(&["check", "metrics"], &page), "");
    panels_have_data(&server);
    rules_are_evaluated(&server);

    drop(server);
    other.stop(Signal::INT, SOON);
    up.stop(Signal::INT, SOON);
    assert_eq!(state(&scene.net.host), before);
}

/// A project with nftables, next to the one with the traffic.
fn other(scene: &Scene, socket: &Path) -> Command {
    let file = scene.directory.path().join("other.yaml");
    std::fs::write(&file, "name: walled\nservices: { idle: { command: [ sleep, '60' ] } }\n")
        .unwrap();
    let mut command = scene.tidegate();
    command.args(["up", "--firewall=nftables", "--metrics", OTHER_TARGET, "-f"]).arg(&file);
    command.env("TIDEGATE_SOCKET", socket);
    command
}

/// Two changes of the ruleset.
#[track_caller]
fn publish_and_close_port(socket: &Path) {
    let (code, ports) = ask::ask(
        socket,
        "POST",
        "/v1/ports",
        r#"{"endpoint": "idle", "spec": "127.0.0.1:9999:80"}"#,
    );
    assert_eq!(code, 201, "{ports}");
    let (code, _) = ask::ask(socket, "DELETE", &format!("/v1/ports/{}", ports[0]["id"]), "");
    assert_eq!(code, 204);
}

/// Exact numbers of bytes, connections, datagrams, queries and flows.
#[track_caller]
fn assert_stored_values(server: &Prometheus, traffic: &Traffic) {
    for (expression, expected) in traffic.expected() {
        let mut last = None;
        // Closed connections are counted a moment later, and scraped after that.
        let as_sent = eventually(SOON, || {
            last = server.query(&expression).single();
            last == Some(expected)
        });
        assert!(as_sent, "{expression}: {last:?} instead of {expected}");
    }
}

/// Each panel and each variable, with all values selected and with "All".
fn panels_have_data(server: &Prometheus) {
    let mut failures = Vec::new();
    for dashboard in dashboards::all() {
        let with_all_values: Vec<Variable> =
            dashboard.variables.iter().map(|variable| variable.with_all_values(server)).collect();
        for panel in &dashboard.panels {
            for target in &panel.targets {
                for (how, variables) in
                    [("All", &dashboard.variables), ("with_all_values", &with_all_values)]
                {
                    let expression = dashboards::interpolate(&target.expression, variables);
                    let answer = if target.instant {
                        server.query(&expression)
                    } else {
                        server.query_range(&expression)
                    };
                    let expected = WITHOUT_DATA.iter().any(|(title, _)| *title == panel.title);
                    let result = match &answer {
                        Answer::Error(error) => error.as_str(),
                        Answer::Vector(_) if !target.instant => "a vector, not a matrix",
                        Answer::Matrix(_) if target.instant => "a matrix, not a vector",
                        answer if answer.has_data() == expected => {
                            if expected {
                                "has data, although listed in WITHOUT_DATA"
                            } else {
                                "no data"
                            }
                        }
                        _ => continue,
                    };
                    failures.push(format!(
                        "{}: {} ({how}): {result}\n  {expression}",
                        dashboard.uid, panel.title
                    ));
                }
            }
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

/// Recording rules have data. Alerting rules are evaluated without errors, and the faults of this
/// test are pending.
fn rules_are_evaluated(server: &Prometheus) {
    let rules = server.rules();
    let recorded = rules.iter().filter(|rule| rule.kind == "recording").count();
    assert!(recorded > 0 && recorded < rules.len());
    let mut pending = BTreeSet::new();
    for rule in &rules {
        assert_eq!((rule.health.as_str(), rule.error.as_str()), ("ok", ""), "{}", rule.name);
        match (rule.kind.as_str(), server.query(&rule.expression)) {
            ("recording", Answer::Vector(values)) => {
                assert!(values.iter().any(|value| value.is_finite()), "{}", rule.name);
                assert!(server.query(&rule.name).has_data(), "{} is not stored", rule.name);
            }
            ("alerting", Answer::Vector(values)) => {
                if !values.is_empty() {
                    pending.insert(rule.name.as_str());
                }
            }
            (_, answer) => panic!("{}: {answer:?}", rule.name),
        }
    }
    // The traffic includes a refusing backend and a closed UDP port. A busy machine may be slow as
    // well.
    pending.retain(|name| !SLOWNESS.contains(name));
    assert_eq!(pending, BTreeSet::from(["TidegateBackendUnreached", "TidegateDatagramsDropped"]));
}

#[test]
fn promtool_accepts_configuration_and_rules_and_their_tests_pass() {
    require_program("promtool");
    let grafana = dashboards::root("grafana");
    let path = |name: &str| format!("{grafana}/{name}");
    promtool(&["check", "config", &path("prometheus.yml")], "");
    promtool(
        &[
            "check",
            "rules",
            "--lint-fatal",
            &path("rules/alerts.yml"),
            &path("rules/recording.yml"),
        ],
        "",
    );
    promtool(
        &["test", "rules", &path("rules/tests/alerts.yml"), &path("rules/tests/recording.yml")],
        "",
    );
}

/// Every alert fires in one promtool test and is silent in another, and the documentation has its
/// remedy. Every recording rule is tested both ways.
#[test]
fn every_rule_is_tested_and_every_alert_is_documented() {
    let read = |path: &str| std::fs::read_to_string(dashboards::root(path)).unwrap();
    let values = |text: &str, key: &str| -> Vec<String> {
        text.lines()
            .filter_map(|line| Some(line.trim().strip_prefix(key)?.trim().to_owned()))
            .collect()
    };
    let (alerts, tests, page) = (
        read("grafana/rules/alerts.yml"),
        read("grafana/rules/tests/alerts.yml"),
        read("docs/grafana.md"),
    );
    let names = values(&alerts, "- alert:");
    assert!(!names.is_empty());
    for key in ["summary:", "description:", "runbook:"] {
        assert_eq!(values(&alerts, key).len(), names.len(), "{key}");
    }
    for name in names {
        for (title, expected) in [("fires", "exp_labels:"), ("is quiet", "exp_alerts: []")] {
            let (_, rest) = tests
                .split_once(&format!("- name: {name} {title}\n"))
                .unwrap_or_else(|| panic!("{name} {title}"));
            let test = rest.split("- name:").next().unwrap();
            assert!(
                test.contains(&format!("alertname: {name}\n")) && test.contains(expected),
                "{name} {title}"
            );
        }
        assert!(page.contains(&format!("| `{name}` |")), "docs/grafana.md lacks {name}");
    }
    let tests = read("grafana/rules/tests/recording.yml");
    let (with, without) = tests.split_once("have no shares").unwrap();
    for name in values(&read("grafana/rules/recording.yml"), "- record:") {
        assert!(with.contains(&name) && without.contains(&name), "{name}");
        assert!(page.contains(&format!("| `{name}` |")), "docs/grafana.md lacks {name}");
    }
}

#[test]
fn dashboards_are_valid_for_grafana() {
    let all = dashboards::all();
    let uids: BTreeSet<&str> = all.iter().map(|dashboard| dashboard.uid.as_str()).collect();
    assert_eq!(
        uids,
        BTreeSet::from([
            "tidegate-overview",
            "tidegate-ports",
            "tidegate-nat",
            "tidegate-names",
            "tidegate-mesh"
        ])
    );
    for dashboard in &all {
        dashboard.check(&uids);
    }
}

/// The files that the Compose file mounts exist, and Grafana is configured with their mount points.
#[test]
fn the_compose_file_mounts_existing_files_where_they_are_expected() {
    let read = |path: &str| std::fs::read_to_string(dashboards::root(path)).unwrap();
    let compose = read("grafana/compose.yaml");
    let mounts: Vec<(&str, &str)> = compose
        .lines()
        .filter_map(|line| line.trim().strip_prefix("- ./")?.strip_suffix(":ro")?.split_once(':'))
        .collect();
    assert_eq!(mounts.len(), 4, "{compose}");
    for (path, _) in &mounts {
        assert!(Path::new(&dashboards::root("grafana")).join(path).exists(), "{path}");
    }
    let at = |wanted: &str| mounts.iter().find(|(path, _)| *path == wanted).unwrap().1;
    let provider = read("grafana/provisioning/dashboards/tidegate.yml");
    assert!(provider.contains(&format!("path: {}\n", at("dashboards"))), "{provider}");
    assert!(compose.contains(&format!("--config.file={}\n", at("prometheus.yml"))), "{compose}");
    // The configuration names rules by relative path.
    assert_eq!(Path::new(at("prometheus.yml")).parent(), Path::new(at("rules")).parent());
}

/// The output of `promtool`, which must succeed.
#[track_caller]
fn promtool(args: &[&str], input: &str) -> String {
    let mut command = Command::new("promtool");
    command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success(), "promtool {args:?}:\n{text}");
    text
}
