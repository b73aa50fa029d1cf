//! The example in the documentation, the meaning of each syntax, bounds, and arbitrary input.
//! Submodules test the errors.

mod errors;
mod service_errors;

use super::check::MAX_PORTS;
use super::tree::{MAX_DEPTH, MAX_VALUES};
use super::*;
use proptest::prelude::*;
use std::net::{IpAddr, Ipv4Addr};
use tidegate_model::Restart;

const DOCUMENT: &str = include_str!("../../docs/compose.md");

/// The example in the documentation.
fn example() -> &'static str {
    DOCUMENT.split("```yaml\n").nth(1).unwrap().split("```").next().unwrap()
}

fn env(name: &str) -> Option<String> {
    match name {
        "LANG" => Some("C.UTF-8".to_owned()),
        "NUL" => Some("a\0b".to_owned()),
        "PORT" => Some("8080".to_owned()),
        "YES" => Some("true".to_owned()),
        _ => None,
    }
}

fn parsed(text: &str) -> Result<Project, String> {
    parse(text, Path::new("compose.yaml"), "Test_Dir", &env).map_err(|error| error.to_string())
}

fn service(body: &str) -> Service {
    let text = format!("services:\n  a:\n    {}\n", body.replace('\n', "\n    "));
    parsed(&text).unwrap().services.remove(0)
}

fn words(words: &[&str]) -> Run {
    Run::Command(words.iter().map(ToString::to_string).collect())
}

#[test]
fn a_service_can_request_any_source_address() {
    let text = "services: { r: { command: x, networks: { a: { x-any-source: true }, b: {} } } }\nnetworks: { a: {}, b: {} }";
    let project = parsed(text).unwrap();
    let sources: Vec<bool> =
        project.services[0].networks.iter().map(|attachment| attachment.any_source).collect();
    assert_eq!(sources, [true, false]);
    let wrong = parsed(&text.replace("true", "perhaps")).unwrap_err();
    assert!(wrong.contains("x-any-source"), "{wrong}");
}

#[test]
fn the_documented_example_parses_to_the_documented_values() {
    let project = parsed(example()).unwrap();
    assert_eq!(project.name, "shop");
    assert_eq!(project.warnings, Vec::<String>::new());
    assert_eq!(project.networks.keys().collect::<Vec<_>>(), ["back", "default", "front"]);
    assert_eq!(
        project.networks["front"],
        NetworkConfig {
            enable_ipv6: true,
            subnets: vec![
                SubnetConfig {
                    subnet: "10.9.0.0/24".parse().unwrap(),
                    gateway: Some("10.9.0.254".parse().unwrap())
                },
                SubnetConfig { subnet: "fd09::/64".parse().unwrap(), gateway: None },
            ],
            ..NetworkConfig::plain("front", Position { line: 4, column: 3 })
        }
    );
    assert_eq!(
        project.networks["back"],
        NetworkConfig {
            internal: true,
            mtu: Some(1400),
            bridge: Some("br-back".to_owned()),
            ..NetworkConfig::plain("back", Position { line: 11, column: 3 })
        }
    );
    assert!(project.networks["default"].enable_ipv6);

    let [web, db, legacy] = project.services.try_into().unwrap();
    assert_eq!(web.name, "web");
    assert_eq!(web.run, words(&["python3", "-m", "http.server", "80"]));
    let variables = [("GREETING", "costs 5$"), ("LANG", "C.UTF-8"), ("WORKERS", "2")];
    assert_eq!(
        web.environment,
        variables.map(|(name, value)| (name.to_owned(), value.to_owned())).into()
    );
    assert_eq!(web.hostname.as_deref(), Some("web"));
    assert_eq!(
        web.networks,
        [
            ServiceNetwork {
                network: "front".to_owned(),
                aliases: vec!["www".to_owned(), "shop.example".to_owned()],
                ipv4_address: Some(Ipv4Addr::new(10, 9, 0, 10)),
                ipv6_address: Some("fd09::10".parse().unwrap()),
                any_source: false,
            },
            ServiceNetwork::plain("back"),
        ]
    );
    let ports: Vec<String> = web.ports.iter().map(ToString::to_string).collect();
    assert_eq!(ports, ["127.0.0.1:8080:80", "9000", "[::1]:5353:53/udp"]);
    assert_eq!(web.dns, ["192.0.2.53", "2001:db8::53"].map(|dns| dns.parse::<IpAddr>().unwrap()));
    assert_eq!(web.depends_on, ["db"]);
    assert_eq!(web.restart, Restart::OnFailure { max: Some(3) });
    assert_eq!(web.working_dir, Path::new("."));
    assert_eq!(web.place, Position { line: 26, column: 3 });

    assert_eq!(db.run, words(&["/usr/lib/postgresql/bin/postgres", "-D", "./data"]));
    assert_eq!(db.environment["PGPORT"], "5432");
    assert_eq!(db.restart, Restart::Always);
    assert_eq!(db.dns, web.dns);

    assert_eq!(legacy.run, Run::Adopt("/run/netns/legacy".into()));
    assert_eq!(legacy.networks, [ServiceNetwork::plain("default")]);
    assert_eq!(legacy.depends_on, ["db"]);
    assert_eq!(legacy.restart, Restart::No);
}

#[test]
fn the_documented_error_matches() {
    let text = "\n".repeat(10) + "services: {web:\n    {\n    image: nginx}}";
    let shown = DOCUMENT.split("```text\n").nth(1).unwrap().lines().next().unwrap();
    assert_eq!(parsed(&text).unwrap_err().replacen(":13:", ":12:", 1), shown);
}

#[test]
fn the_documented_bounds_match() {
    for bound in [
        format!("a file of {} MiB", MAX_FILE >> 20),
        format!("values nested {MAX_DEPTH} deep"),
        format!("{MAX_VALUES} values"),
        format!("{} MiB of text", tree::MAX_TEXT >> 20),
        format!("variables nested {} deep", interpolate::MAX_NESTING),
        format!("{MAX_PORTS} published ports"),
    ] {
        assert!(DOCUMENT.replace('\n', " ").contains(&bound), "{bound}");
    }
}

#[test]
fn commands_are_split_like_shell_words() {
    for (text, expected) in [
        ("run", vec!["run"]),
        ("run 'two words' \"$$HOME\" a\\ b", vec!["run", "two words", "$HOME", "a b"]),
        ("run | sort", vec!["run", "|", "sort"]),
        (">-\n  run\n  --fast", vec!["run", "--fast"]),
        ("run --port ${PORT}", vec!["run", "--port", "8080"]),
        ("[sh, -c, 'echo $$1 > x']", vec!["sh", "-c", "echo $1 > x"]),
        ("[run, '']", vec!["run", ""]),
    ] {
        assert_eq!(service(&format!("command: {text}")).run, words(&expected), "{text}");
    }
}

#[test]
fn a_relative_namespace_path_is_joined_to_the_directory_of_the_file() {
    let text = "services: {a: {x-netns: ns/one}}";
    let project = parse(text, Path::new("/srv/shop/compose.yaml"), "shop", &env).unwrap();
    let [service] = project.services.try_into().unwrap();
    assert_eq!(service.run, Run::Adopt("/srv/shop/ns/one".into()));
    assert_eq!(service.working_dir, Path::new("/srv/shop"));
}

#[test]
fn variables_without_a_value_are_passed_through_if_set() {
    for body in
        ["environment: [LANG, ABSENT, EMPTY=]", "environment: {LANG: , ABSENT: null, EMPTY: ''}"]
    {
        let environment = service(&format!("command: x\n{body}")).environment;
        let expected =
            [("EMPTY", ""), ("LANG", "C.UTF-8")].map(|(k, v)| (k.to_owned(), v.to_owned()));
        assert_eq!(environment, expected.into(), "{body}");
    }
}

#[test]
fn numbers_in_the_environment_keep_their_spelling() {
    let environment =
        service("command: x\nenvironment: {A: 1.10, B: 0755, C: 0x1F, D: true}").environment;
    assert_eq!(environment.into_values().collect::<Vec<_>>(), ["1.10", "0755", "0x1F", "true"]);
}

#[test]
fn every_restart_policy_is_parsed() {
    for (text, restart) in [
        ("no", Restart::No),
        ("'no'", Restart::No),
        ("always", Restart::Always),
        ("unless-stopped", Restart::UnlessStopped),
        ("on-failure", Restart::OnFailure { max: None }),
        ("on-failure:0", Restart::OnFailure { max: None }),
        ("on-failure:5", Restart::OnFailure { max: Some(5) }),
    ] {
        assert_eq!(service(&format!("command: x\nrestart: {text}")).restart, restart, "{text}");
    }
}

#[test]
fn the_long_port_syntax_equals_the_short_one() {
    for (long, short) in [
        ("target: 80", "80"),
        ("target: '80', published: 8080, mode: host, name: web, app_protocol: http", "8080:80"),
        ("target: 80, published: 8080-8090", "8080-8090:80"),
        ("target: 80, published: 0", "80"),
        ("target: 80, host_ip: 127.0.0.1", "127.0.0.1::80"),
        ("target: 80, host_ip: '::1', published: $PORT", "[::1]:8080:80"),
        ("target: 80, host_ip: '::ffff:127.0.0.1', published: 1", "127.0.0.1:1:80"),
        ("target: 80, protocol: UDP, x-note: y", "80/udp"),
    ] {
        let ports = service(&format!("command: x\nports: [{{{long}}}]")).ports;
        assert_eq!(ports.iter().map(ToString::to_string).collect::<Vec<_>>(), [short], "{long}");
    }
}

#[test]
fn the_default_network_exists_exactly_if_a_service_uses_it() {
    let networks = |text: &str| parsed(text).unwrap().networks.into_keys().collect::<Vec<_>>();
    assert_eq!(networks("services: {a: {command: x}}"), ["default"]);
    assert_eq!(networks("services: {a: {command: x, networks: []}}"), ["default"]);
    assert_eq!(networks("services: {a: {command: x, networks: [default]}}"), ["default"]);
    assert_eq!(
        networks("networks: {n: , default: }\nservices: {a: {command: x, networks: [n]}}"),
        ["n"]
    );
    assert_eq!(networks("networks: {n: }\nservices: {a: {command: x}}"), ["default", "n"]);
}

#[test]
fn a_boolean_can_come_from_a_variable() {
    let text = "networks: {default: {internal: '${YES}'}}\nservices: {a: {command: x}}";
    assert!(parsed(text).unwrap().networks["default"].internal);
}

#[test]
fn an_unset_variable_is_a_warning() {
    let project = parsed("services:\n  a:\n    command: [x, $ABSENT, $ABSENT]\n").unwrap();
    assert_eq!(
        project.warnings,
        [
            "compose.yaml:3:18: services.a.command[1]: variable ABSENT is not set; using an empty string"
        ]
    );
}

#[test]
fn a_project_is_named_after_its_directory_as_in_compose() {
    for (directory, name) in
        [("Shop", "shop"), ("_my.shop-2", "myshop-2"), ("Ünter", "nter"), ("-9", "9")]
    {
        let project =
            parse("services: {a: {command: x}}", Path::new("f"), directory, &env).unwrap();
        assert_eq!(project.name, name, "{directory}");
    }
}

#[test]
fn the_keys_of_a_map_take_precedence_over_merged_keys() {
    let text = "
x-one: &one {restart: always, hostname: one}
x-two: &two {hostname: two, dns: 192.0.2.1}
services:
  a: {<<: [*one, *two], command: x, restart: 'no'}
";
    let [service] = parsed(text).unwrap().services.try_into().unwrap();
    assert_eq!(service.restart, Restart::No);
    assert_eq!(service.hostname.as_deref(), Some("one"));
    assert_eq!(service.dns.len(), 1);
}

#[test]
fn load_names_the_project_after_the_directory_and_rejects_bad_files() {
    let directory = tempfile::tempdir().unwrap();
    let shop = directory.path().join("Shop");
    std::fs::create_dir(&shop).unwrap();
    let file = shop.join("compose.yaml");

    let missing = load(&file).unwrap_err().to_string();
    assert_eq!(missing, format!("{}: No such file or directory", file.display()));

    std::fs::write(&file, "services: {a: {command: x}}").unwrap();
    let project = load(&file).unwrap();
    assert_eq!(project.name, "shop");
    assert_eq!(project.services[0].working_dir, shop);

    std::fs::write(&file, b"services:\n  \xc3\xa9\xff").unwrap();
    let binary = load(&file).unwrap_err().to_string();
    let expected = "2:4: invalid UTF-8; save the file as UTF-8";
    assert_eq!(binary, format!("{}:{expected}", file.display()));

    std::fs::write(&file, "#".repeat(MAX_FILE + 1)).unwrap();
    let large = load(&file).unwrap_err().to_string();
    let expected = "file is larger than 1024 KiB; shorten it";
    assert_eq!(large, format!("{}: {expected}", file.display()));
    assert!(matches!(parsed(&"#".repeat(MAX_FILE + 1)), Err(large) if large.ends_with(expected)));
}

#[test]
fn values_nest_up_to_the_limit() {
    let nested = |depth: usize| {
        format!(
            "x-deep: {}{}\nservices: {{a: {{command: x}}}}",
            "[".repeat(depth),
            "]".repeat(depth)
        )
    };
    parsed(&nested(MAX_DEPTH - 1)).unwrap();
    assert_eq!(
        parsed(&nested(MAX_DEPTH)),
        Err("compose.yaml:1:72: values are nested more than 64 levels deep".to_owned())
    );
    let blocks: String =
        (0..=MAX_DEPTH).map(|depth| format!("{}a:\n", " ".repeat(depth))).collect();
    assert_eq!(
        parsed(&blocks),
        Err("compose.yaml:65:65: values are nested more than 64 levels deep".to_owned())
    );
    let aliases: String =
        (1..=MAX_DEPTH).map(|n| format!("x-{n}: &a{n} [*a{}]\n", n - 1)).collect();
    let error = parsed(&format!("x-0: &a0 []\n{aliases}")).unwrap_err();
    assert!(error.ends_with("values are nested more than 64 levels deep"), "{error}");
}

#[test]
fn alias_expansion_is_bounded() {
    let tenfold =
        |n: usize| format!("x-{n}: &a{n} [{}]\n", vec![format!("*a{}", n - 1); 10].join(", "));
    let text = format!("x-0: &a0 [x]\n{}", (1..9).map(tenfold).collect::<String>());
    let error = parsed(&text).unwrap_err();
    assert!(
        error.ends_with("the file exceeds 100000 values after alias expansion; shorten it"),
        "{error}"
    );

    let text = format!("x-0: &a {}\nx-1: [{}]\n", "x".repeat(500_000), ["*a"; 10].join(", "));
    let error = parsed(&text).unwrap_err();
    assert!(
        error.ends_with("the file exceeds 4 MiB of text after alias expansion; shorten it"),
        "{error}"
    );
}

#[test]
fn variable_expansion_is_bounded() {
    let long = |_: &str| Some("x".repeat(100_000));
    let text = format!("services: {{a: {{command: [{}]}}}}", ["$X"; 100].join(", "));
    let error = parse(&text, Path::new("f"), "x", &long).unwrap_err().to_string();
    assert_eq!(
        error,
        "f:1:190: services.a.command[41]: values exceed 4 MiB after variable expansion; shorten them"
    );
}

/// Fragments of Compose files, combined to input that is almost valid.
fn piece() -> impl Strategy<Value = String> {
    let pieces = [
        "services:",
        "networks:",
        "  a:",
        "    command: x",
        "    ports:",
        "      - ",
        "80:80",
        "<<: *a",
        "&a ",
        "*a",
        "{",
        "}",
        "[",
        "]",
        ", ",
        ": ",
        "\n",
        "\n  ",
        "\n    ",
        "? ",
        "- ",
        "!!str ",
        "!x ",
        "---",
        "...",
        "%YAML 1.2",
        "%TAG ! x",
        "|",
        ">-",
        "'",
        "\"",
        "\\",
        "#",
        "$",
        "${A:-",
        "${",
        "$$",
        "\t",
        "\r",
        "\u{feff}",
        "\0",
        "é",
        "~",
        "null",
        "10.0.0.0/24",
        "fd00::/64",
        "depends_on: [a]",
        "ipam: {config: [",
        "subnet: ",
        "x-netns: ",
        "environment:",
    ];
    proptest::sample::select(pieces.to_vec()).prop_map(str::to_owned)
}

proptest! {
    #[test]
    fn any_text_is_parsed_or_rejected_in_one_line(text in ".{0,200}") {
        if let Err(error) = parsed(&text) {
            prop_assert!(!error.contains('\n'), "{error:?}");
        }
    }

    #[test]
    fn any_fragments_are_parsed_or_rejected_in_one_line(pieces in prop::collection::vec(piece(), 0..60)) {
        if let Err(error) = parsed(&pieces.concat()) {
            prop_assert!(!error.contains('\n'), "{error:?}");
        }
    }

    #[test]
    fn any_change_of_the_example_is_parsed_or_rejected_in_one_line(
        changes in prop::collection::vec((any::<prop::sample::Index>(), 0_usize..20, piece()), 1..5),
    ) {
        let mut text: Vec<char> = example().chars().collect();
        for (at, removed, inserted) in changes {
            let at = at.index(text.len());
            let end = text.len().min(at + removed);
            text.splice(at..end, inserted.chars());
        }
        if let Err(error) = parsed(&text.iter().collect::<String>()) {
            prop_assert!(!error.contains('\n'), "{error:?}");
        }
    }
}
