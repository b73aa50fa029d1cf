//! All errors of a Compose file outside of services, word for word.

use super::super::Path;
use super::super::parse;
use super::{env, parsed};

/// The error for `text`, without the name of the file.
pub(super) fn error(text: &str) -> String {
    let error = parsed(text).expect_err(text);
    assert!(!error.contains('\n'), "{error:?}");
    error.strip_prefix("compose.yaml:").unwrap_or_else(|| panic!("{error}")).to_owned()
}

/// The error for a service `a` with the lines `body`. Columns count from 1.
pub(super) fn error_in_service(body: &str) -> String {
    error(&format!("services:\n  a:\n    {}\n", body.replace('\n', "\n    ")))
}

/// The error for a network `n` with the lines `body` and one service attached to it.
fn error_in_network(body: &str) -> String {
    error(&format!(
        "networks:\n  n:\n    {}\nservices:\n  a: {{command: run, networks: [n]}}\n",
        body.replace('\n', "\n    ")
    ))
}

#[test]
fn errors_in_the_whole_file() {
    for (text, expected) in [
        ("", "1:1: services: no services are defined; add at least one with a command"),
        ("# nothing\n", "1:1: services: no services are defined; add at least one with a command"),
        ("name: x\n", "1:1: services: no services are defined; add at least one with a command"),
        ("services:\n", "1:1: services: no services are defined; add at least one with a command"),
        (
            "name: x\nservices: {}\n",
            "2:1: services: no services are defined; add at least one with a command",
        ),
        ("[]", "1:1: expected a map, found a list"),
        ("hello", "1:1: expected a map, found a string"),
        ("services: [a]", "1:11: services: expected a map, found a list"),
        ("services:\n  a: 1\n", "2:6: services.a: expected a map, found the number 1"),
        ("services:\n  a:\n", "2:3: services.a: expected a map, found nothing"),
        (
            "services:\n  a/b:\n    command: x\n",
            "2:3: services.a/b: a name consists of 1 to 63 letters, digits, dots, underscores and hyphens; choose another",
        ),
        (
            "services:\n  \"a\\nb\": {}\n",
            r#"2:3: services."a\nb": a name consists of 1 to 63 letters, digits, dots, underscores and hyphens; choose another"#,
        ),
        (
            "volumes: {}\nservices: {a: {command: x}}",
            "1:1: volumes: this section is not supported; remove it (supported: name, networks, services, x-*)",
        ),
        (
            "name: My Shop\nservices: {a: {command: x}}",
            "1:7: name: \"My Shop\" is not a valid project name: use 1 to 63 lower-case letters, digits, underscores and \
             hyphens, starting with a letter or digit",
        ),
        (
            "name: 5\nservices: {a: {command: x}}",
            "1:7: name: expected a string, found the number 5; put it in quotes",
        ),
    ] {
        assert_eq!(error(text), expected, "{text}");
    }
    let unnamed =
        parse("services: {a: {command: x}}", Path::new("compose.yaml"), "..", &env).unwrap_err();
    let expected = "compose.yaml:1:1: name: no project name can be derived from the directory; set one, for example name: shop";
    assert_eq!(unnamed.to_string(), expected);
}

#[test]
fn yaml_errors_name_line_and_key() {
    for (text, expected) in [
        (
            "services:\n  a:\n    command: x\n    command: y\n",
            "4:5: services.a.command: duplicate key, first set in line 3; remove one of them",
        ),
        (
            "services:\n  a: x\n a: y\n",
            "3:2: invalid YAML: while parsing a block mapping, did not find expected key",
        ),
        (
            "services:\n  a: {command: [x\n",
            "3:1: services.a.command[1]: invalid YAML: while parsing a flow sequence, expected ',' or ']'",
        ),
        (
            "services:\n\ta: x\n",
            "2:2: services: invalid YAML: tabs disallowed within this context (block indentation)",
        ),
        ("a: 1\n---\nb: 2\n", "2:1: second YAML document; a Compose file contains exactly one"),
        ("services: !reset null", "1:11: services: tag \"!reset\" is not supported; remove it"),
        ("services: !!int 5", "1:11: services: tag \"!!int\" is not supported; remove it"),
        (
            "services: *nobody",
            "1:11: services: invalid YAML: while parsing node, found unknown anchor",
        ),
        ("services: &a [*a]", "1:15: services[0]: the alias refers to a node that contains it"),
        ("services: {<<: x}", "1:16: services.<<: the merge key takes a map or a list of maps"),
        ("? [a]\n: b\n", "1:3: a key must be a string, not a list or a map; put it in quotes"),
        ("services:\n  : b\n", "2:3: services: missing key"),
    ] {
        assert_eq!(error(text), expected, "{text}");
    }
}

#[test]
fn errors_in_networks() {
    for (body, expected) in [
        ("internal: 1", "3:15: networks.n.internal: expected true or false, found the number 1"),
        (
            "x-dns-servers: [192.0.2.1, one]",
            "3:32: networks.n.x-dns-servers[1]: \"one\" is not an IP address",
        ),
        ("internal: yes", "3:15: networks.n.internal: expected true or false, found \"yes\""),
        ("enable_ipv6:", "3:5: networks.n.enable_ipv6: expected true or false, found nothing"),
        (
            "driver: overlay",
            "3:13: networks.n.driver: \"overlay\" is not supported: every network is a bridge on this host; use bridge or \
             remove the key",
        ),
        (
            "external: true",
            "3:5: networks.n.external: tidegate up creates and removes all networks; remove the key",
        ),
        (
            "attachable: true",
            "3:5: networks.n.attachable: this key is not supported; remove it (supported: driver, driver_opts, \
             enable_ipv6, internal, ipam)",
        ),
        (
            "driver_opts:\n  com.docker.network.bridge.host_binding_ipv4: 127.0.0.1",
            "4:7: networks.n.driver_opts.com.docker.network.bridge.host_binding_ipv4: this option is not supported; remove \
             it (supported: com.docker.network.bridge.name, com.docker.network.bridge.enable_icc, \
             com.docker.network.driver.mtu)",
        ),
        (
            "driver_opts:\n  com.docker.network.driver.mtu: 67",
            "4:38: networks.n.driver_opts.com.docker.network.driver.mtu: \"67\" is not a valid MTU: use a number from 68 to \
             65535",
        ),
        (
            "driver_opts:\n  com.docker.network.driver.mtu: 1279\nenable_ipv6: true",
            "4:38: networks.n.driver_opts.com.docker.network.driver.mtu: 1279 is below the IPv6 minimum of 1280; raise it, \
             or remove enable_ipv6",
        ),
        (
            "driver_opts:\n  com.docker.network.bridge.name: a-bridge-too-far",
            "4:39: networks.n.driver_opts.com.docker.network.bridge.name: \"a-bridge-too-far\" is not a valid interface \
             name: use 1 to 15 characters without spaces, slashes or colons, and without a + at the \
             end",
        ),
        (
            "ipam: {driver: host-local}",
            "3:20: networks.n.ipam.driver: \"host-local\" is not supported: tidegate allocates addresses itself; use default \
             or remove the key",
        ),
        (
            "ipam: {options: {}}",
            "3:12: networks.n.ipam.options: this key is not supported; remove it (supported: driver, config)",
        ),
        ("ipam: {config: {}}", "3:20: networks.n.ipam.config: expected a list, found a map"),
        (
            "ipam: {config: [{gateway: 10.0.0.1}]}",
            "3:21: networks.n.ipam.config[0]: no subnet is set; add one, for example subnet: 10.9.0.0/24",
        ),
        (
            "ipam: {config: [{subnet: 10.0.0.0/24, ip_range: 10.0.0.0/25}]}",
            "3:43: networks.n.ipam.config[0].ip_range: this key is not supported; remove it (supported: subnet, gateway)",
        ),
        (
            "ipam: {config: [{subnet: 10.0.0.0}]}",
            "3:30: networks.n.ipam.config[0].subnet: \"10.0.0.0\" is not a subnet such as 10.9.0.0/24 or fd09::/64",
        ),
        (
            "ipam: {config: [{subnet: 10.0.0.1/24}]}",
            "3:30: networks.n.ipam.config[0].subnet: 10.0.0.1/24 is not usable: it has host bits set; use 10.0.0.0/24",
        ),
        (
            "ipam: {config: [{subnet: 10.0.0.0/31}]}",
            "3:30: networks.n.ipam.config[0].subnet: 10.0.0.0/31 is not usable: it is too small for a gateway and an endpoint; use a prefix length of at most 30",
        ),
        (
            "ipam: {config: [{subnet: 127.0.0.0/8}]}",
            "3:30: networks.n.ipam.config[0].subnet: 127.0.0.0/8 is not usable: it has no host addresses; use a private range",
        ),
        (
            "ipam: {config: [{subnet: 126.0.0.0/7}]}",
            "3:30: networks.n.ipam.config[0].subnet: 126.0.0.0/7 is not usable: it has no host addresses; use a private range",
        ),
        (
            "ipam: {config: [{subnet: 'fe80::/64'}]}",
            "3:30: networks.n.ipam.config[0].subnet: fe80::/64 is not usable: it has no host addresses; use a private range",
        ),
        (
            "ipam: {config: [{subnet: 169.254.0.0/16}]}",
            "3:30: networks.n.ipam.config[0].subnet: 169.254.0.0/16 is not usable: it contains 169.254.116.103, the address of the NAT \
             engine; use another subnet",
        ),
        (
            "ipam: {config: [{subnet: 10.0.0.0/24}, {subnet: 10.1.0.0/24}]}",
            "3:53: networks.n.ipam.config[1].subnet: 10.0.0.0/24 is already set; a network has at most one IPv4 subnet",
        ),
        (
            "ipam: {config: [{gateway: 10.1.0.1, subnet: 10.0.0.0/24}]}",
            "3:31: networks.n.ipam.config[0].gateway: 10.1.0.1 is not usable as the gateway: it is outside 10.0.0.0/24",
        ),
        (
            "ipam: {config: [{subnet: 10.0.0.0/24, gateway: 10.0.0.255}]}",
            "3:52: networks.n.ipam.config[0].gateway: 10.0.0.255 is not usable as the gateway: it is the broadcast address \
             of 10.0.0.0/24",
        ),
        (
            "ipam: {config: [{subnet: 10.0.0.0/24, gateway: 'fd00::1'}]}",
            "3:52: networks.n.ipam.config[0].gateway: fd00::1 is not usable as the gateway: it is outside 10.0.0.0/24",
        ),
        (
            "ipam: {config: [{subnet: 'fd00::/64'}]}",
            "3:30: networks.n.ipam.config[0].subnet: fd00::/64 is an IPv6 subnet; set enable_ipv6: true on the network",
        ),
    ] {
        assert_eq!(error_in_network(body), expected, "{body}");
    }
}

#[test]
fn networks_must_not_overlap() {
    let with =
        |networks: &str| error(&format!("networks:\n{networks}services: {{a: {{command: x}}}}\n"));
    assert_eq!(
        with(
            "  z: {ipam: {config: [{subnet: 10.0.0.0/8}]}}\n  b: {ipam: {config: [{subnet: 10.1.0.0/16}]}}\n"
        ),
        "3:32: networks.b.ipam.config[0].subnet: 10.1.0.0/16 overlaps 10.0.0.0/8 (networks.z.ipam.config[0].subnet); \
         choose another subnet"
    );
    assert_eq!(
        with(
            "  z: {driver_opts: {com.docker.network.bridge.name: br0}}\n  \
               b: {driver_opts: {com.docker.network.bridge.name: br0}}\n"
        ),
        "2:53: networks.z.driver_opts.com.docker.network.bridge.name: bridge \"br0\" is already used by networks.b; choose \
         another name"
    );
}
