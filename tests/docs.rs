//! Consistency of the documentation: metrics, flags, files and tests that it names exist.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::Command;
use std::time::Duration;
use tidegate_model::registry;
use tidegate_testbed::server::EchoServer;
use tidegate_testbed::{Namespace, Process, Topology, addr, require_root};

const TIMEOUT: Duration = Duration::from_secs(10);

#[test]
fn the_metrics_page_names_exactly_the_families_of_a_scrape() {
    require_root();
    let net = Topology::three();
    let directory = tempfile::tempdir().unwrap();
    let tidegate = || {
        let mut command = net.host.command(env!("CARGO_BIN_EXE_tidegate"));
        command.env("TIDEGATE_RUN_DIR", directory.path()).env_remove("TIDEGATE_SOCKET");
        command
    };
    let _server = EchoServer::tcp(&net.container, SocketAddr::new(addr::CONTAINER_V4.into(), 80));
    let publish = Process::spawn(
        tidegate()
            .args(["publish", "8080:80", "8080:80/udp", "--metrics", "127.0.0.1:9464", "--netns"])
            .arg(net.container.path()),
    );
    publish.wait_for_line("metrics at", TIMEOUT);
    net.host.run(|| {
        let mut client = TcpStream::connect("127.0.0.1:8080").unwrap();
        client.set_read_timeout(Some(TIMEOUT)).unwrap();
        client.write_all(b"echo").unwrap();
        client.read_exact(&mut [0; 4]).unwrap();
    });
    let mut shown = families(&net.host, "127.0.0.1:9464");

    let file = directory.path().join("compose.yaml");
    std::fs::write(&file, "services: { web: { command: [ sleep, '60' ], ports: [ '8081:80' ] } }")
        .unwrap();
    let up =
        Process::spawn(tidegate().args(["up", "--metrics", "127.0.0.1:9465", "-f"]).arg(&file));
    up.wait_for_line("Ctrl-C takes", TIMEOUT);
    shown.extend(families(&net.host, "127.0.0.1:9465"));
    assert_eq!(words(&read("docs/metrics.md"), "tidegate_"), shown);
}

/// The families of tidegate in a scrape at `address`.
fn families(host: &Namespace, address: &str) -> BTreeSet<String> {
    let page = host.run(|| {
        let mut scraper = TcpStream::connect(address).unwrap();
        scraper.set_read_timeout(Some(TIMEOUT)).unwrap();
        scraper.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
        let mut page = String::new();
        scraper.read_to_string(&mut page).unwrap();
        page
    });
    let families = page.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next());
    families.filter(|name| name.starts_with("tidegate_")).map(str::to_owned).collect()
}

/// The firewall page is its source with the golden rulesets of the demo inserted. `UPDATE_GOLDEN=1`
/// writes it.
#[test]
fn the_firewall_page_shows_the_actual_rules() {
    let golden = read("netsetup/golden/demo.txt");
    let part = |name: &str| {
        let (_, rest) = golden.split_once(&format!("# {name}\n")).unwrap();
        rest.split("\n# ").next().unwrap().trim_end().replace('\t', "    ")
    };
    let mut page = read("docs/src/firewall.md");
    for name in ["nftables", "iptables"] {
        let gap = format!("{{{{{name}}}}}");
        assert_eq!(page.matches(&gap).count(), 1, "{gap}");
        page = page.replace(&gap, &part(name));
    }
    assert!(!page.contains("{{"));
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(root("docs/firewall.md"), &page).unwrap();
    }
    assert!(
        page == read("docs/firewall.md"),
        "docs/firewall.md is outdated; run this test with UPDATE_GOLDEN=1"
    );
}

#[test]
fn documents_name_only_documented_metrics() {
    let known = words(&read("docs/metrics.md"), "tidegate_");
    for document in documents() {
        // Crates and an nftables table have names like metrics.
        let unknown: Vec<_> = words(&read(&document), "tidegate_")
            .into_iter()
            .filter(|word| word != registry::NFTABLES_USER_TABLE && !known.contains(word))
            .filter(|word| !Path::new(&root(&word["tidegate_".len()..])).is_dir())
            .collect();
        assert!(unknown.is_empty(), "{document}: {unknown:?}");
    }
}

/// The dashboards also cover all metrics.
#[test]
fn dashboards_and_rules_name_exactly_the_documented_metrics() {
    let page = read("docs/metrics.md");
    let families = words(&page, "tidegate_");
    let mut known = families.clone();
    for line in page.lines().filter(|line| line.contains("| histogram |")) {
        for histogram in words(line, "tidegate_") {
            known.extend(["bucket", "sum", "count"].map(|part| format!("{histogram}_{part}")));
        }
    }
    let mut shown = BTreeSet::new();
    for directory in ["grafana", "grafana/dashboards", "grafana/rules", "grafana/rules/tests"] {
        for entry in std::fs::read_dir(root(directory)).unwrap() {
            let entry = entry.unwrap();
            if !entry.file_type().unwrap().is_file() {
                continue;
            }
            let file = format!("{directory}/{}", entry.file_name().to_string_lossy());
            let named = words(&read(&file), "tidegate_");
            let unknown: Vec<_> = named.difference(&known).collect();
            assert!(unknown.is_empty(), "{file}: {unknown:?}");
            if directory == "grafana/dashboards" {
                shown.extend(named);
            }
        }
    }
    let is_shown =
        |family: &&String| shown.contains(*family) || shown.contains(&format!("{family}_bucket"));
    let left_out: Vec<_> = families.iter().filter(|family| !is_shown(family)).collect();
    assert!(left_out.is_empty(), "{left_out:?}");
}

#[test]
fn documented_flags_exist() {
    let help = |command: &str| {
        let output = Command::new(env!("CARGO_BIN_EXE_tidegate"))
            .args([command, "--help"])
            .output()
            .unwrap();
        assert!(output.status.success());
        words(&String::from_utf8(output.stdout).unwrap(), "--")
    };
    let mut publish = help("publish");
    publish.extend(help("hello"));
    for (command, known) in [("tidegate publish", publish), ("tidegate top", help("top"))] {
        for document in documents() {
            for line in read(&document).lines().filter(|line| line.contains(command)) {
                let unknown: Vec<_> =
                    words(line, "--").into_iter().filter(|flag| !known.contains(flag)).collect();
                assert!(unknown.is_empty(), "{document}: {unknown:?} in {line:?}");
            }
        }
    }
}

#[test]
fn links_between_documents_resolve() {
    for document in documents() {
        let text = read(&document);
        let directory = Path::new(&document).parent().unwrap_or(Path::new(""));
        for target in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let path = target.split('#').next().unwrap_or_default();
            if !path.is_empty() && !path.contains("://") {
                assert!(
                    Path::new(&root(&directory.join(path).to_string_lossy())).exists(),
                    "{document}: {target}"
                );
            }
        }
    }
}

fn root(path: &str) -> String {
    format!("{}/{path}", env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &str) -> String {
    std::fs::read_to_string(root(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// The documents, as paths relative to the root.
fn documents() -> Vec<String> {
    let mut documents: Vec<String> =
        ["README.md", "ARCHITECTURE.md", "CHANGELOG.md"].iter().map(ToString::to_string).collect();
    for entry in std::fs::read_dir(root("docs")).unwrap() {
        let name = entry.unwrap().file_name().to_string_lossy().into_owned();
        if name.ends_with(".md") {
            documents.push(format!("docs/{name}"));
        }
    }
    documents
}

/// The words of `text` with `prefix`.
fn words(text: &str, prefix: &str) -> BTreeSet<String> {
    text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_' && c != '-')
        .filter(|word| word.len() > prefix.len() && word.starts_with(prefix))
        .map(|word| word.trim_end_matches(['_', '-']).to_owned())
        .collect()
}

/// Each row of the security page names tests of the weakness, and these tests exist.
#[test]
fn the_security_page_names_tests_that_exist() {
    let mut sources = String::new();
    let mut directories = vec![std::path::PathBuf::from(root(""))];
    while let Some(directory) = directories.pop() {
        for entry in std::fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            if path.is_dir() && !matches!(name, "target" | ".git") {
                directories.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                sources += &std::fs::read_to_string(path).unwrap();
            }
        }
    }
    let lines: Vec<&str> = sources.lines().map(str::trim).collect();
    let is_test = |name: &str| {
        let head = format!("fn {name}(");
        lines.iter().enumerate().filter(|(_, line)| line.starts_with(&head)).any(|(at, _)| {
            let attributes = lines[..at].iter().rev().take_while(|line| line.starts_with("#["));
            attributes
                .into_iter()
                .any(|line| *line == "#[test]" || line.starts_with("#[tokio::test"))
        })
    };
    let page = read("docs/security.md");
    let rows: Vec<&str> = page
        .lines()
        .filter(|line| line.starts_with("| CVE-") || line.starts_with("| GHSA-"))
        .collect();
    let is_listed =
        |id: &str| rows.iter().any(|row| row.split('|').nth(1).is_some_and(|ids| ids.contains(id)));
    for id in [
        "CVE-2025-54388",
        "CVE-2025-54410",
        "CVE-2024-29018",
        "CVE-2024-32473",
        "CVE-2020-13401",
        "CVE-2021-20199",
        "CVE-2024-8418",
        "CVE-2026-35406",
        "CVE-2017-15133",
        "CVE-2019-6778",
        "CVE-2019-14378",
        "CVE-2019-15890",
        "CVE-2020-1983",
        "CVE-2020-7039",
        "CVE-2020-29129",
        "CVE-2020-29130",
        "CVE-2021-3592",
        "CVE-2021-3593",
        "CVE-2021-3594",
        "CVE-2021-3595",
        "CVE-2026-9539",
        "CVE-2026-95508",
        "CVE-2026-115449",
        "CVE-2026-120830",
        "CVE-2026-120831",
        "GHSA-jv3w-x3r3-g6rm",
    ] {
        assert!(is_listed(id), "{id}");
    }
    for row in rows {
        let cell = row.split('|').nth(4).unwrap_or_default();
        let names: Vec<&str> = cell.split('`').skip(1).step_by(2).collect();
        assert!(!names.is_empty(), "{row}");
        for name in names {
            assert!(is_test(name), "{name}, of {row}");
        }
    }
}
