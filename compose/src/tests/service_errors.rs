//! All errors in the services of a Compose file, word for word.

use super::errors::{error, error_in_service};

#[test]
fn errors_in_services() {
    for (body, expected) in [
        (
            "image: nginx",
            "3:5: services.a.image: tidegate runs services as processes of this host, not images; remove the key and give \
             a command",
        ),
        (
            "command: x\nvolumes: [/a:/b]",
            "4:5: services.a.volumes: services use the file system of this host, so there is nothing to mount; remove the \
             key",
        ),
        (
            "entrypoint: /bin/sh",
            "3:5: services.a.entrypoint: there is no image entry point to override; put the complete command line into \
             command",
        ),
        (
            "comand: x",
            "3:5: services.a.comand: this key is not supported; remove it (supported: command, depends_on, dns, dns_opt, \
             dns_search, environment, hostname, networks, ports, restart, x-netns)",
        ),
        (
            "dns: 192.0.2.1",
            "2:3: services.a: the service has no command; add command, or x-netns to adopt a namespace",
        ),
        (
            "command: x\nx-netns: /n",
            "4:5: services.a.x-netns: command and x-netns are mutually exclusive; remove one of them",
        ),
        (
            "x-netns: /n\nrestart: always",
            "4:5: services.a.restart: x-netns adopts a namespace and runs no command; remove the key",
        ),
        (
            "x-netns: ''",
            "3:14: services.a.x-netns: the path is empty; set the path of a network namespace, for example /run/netns/NAME",
        ),
        (
            "command:",
            "3:5: services.a.command: expected a string or a list of strings, found nothing",
        ),
        (
            "command: {}",
            "3:14: services.a.command: expected a string or a list of strings, found a map",
        ),
        ("command: ''", "3:14: services.a.command: the command names no program; add one"),
        ("command: []", "3:14: services.a.command: the command names no program; add one"),
        ("command: ['', x]", "3:14: services.a.command: the command names no program; add one"),
        ("command: it's", "3:14: services.a.command: unterminated quote, or a trailing backslash"),
        (
            "command: [sleep, 10]",
            "3:22: services.a.command[1]: expected a string, found the number 10; put it in quotes",
        ),
        ("command:\n  - x\n  - [y]", "5:9: services.a.command[1]: expected a string, found a list"),
        (
            "command: [x, $NUL]",
            "3:18: services.a.command[1]: the value contains a NUL character; remove it",
        ),
        (
            "command: echo $",
            "3:14: services.a.command: \"$\" is not a valid variable; write $$ for a literal dollar sign",
        ),
        (
            "command: [run, '${DATA:?say where}']",
            "3:20: services.a.command[1]: required variable DATA has no value: say where",
        ),
        (
            "command: x\nenvironment: A",
            "4:18: services.a.environment: expected a map, found a string",
        ),
        (
            "command: x\nenvironment: [A=1, =2]",
            "4:24: services.a.environment[1]: \"\" is not a valid variable name",
        ),
        (
            "command: x\nenvironment: [A=1, A=2]",
            "4:24: services.a.environment[1]: variable A is set twice; remove one of them",
        ),
        (
            "command: x\nenvironment: {A=: 1}",
            "4:19: services.a.environment.\"A=\": \"A=\" is not a valid variable name",
        ),
        (
            "command: x\nenvironment: {A: []}",
            "4:22: services.a.environment.A: expected a string or a number, found a list",
        ),
        (
            "command: x\nhostname: a_b",
            "4:15: services.a.hostname: \"a_b\" is not a valid host name: use at most 64 letters, digits, hyphens and dots",
        ),
        (
            "command: x\ndns: [192.0.2.1, one]",
            "4:22: services.a.dns[1]: \"one\" is not an IP address",
        ),
        ("command: x\ndns_opt: [a b]", "4:15: services.a.dns_opt[0]: \"a b\" is not a single word"),
        ("command: x\ndns:", "4:5: services.a.dns: expected a string, found nothing"),
        (
            "command: x\nrestart: on-failure:-1",
            "4:14: services.a.restart: \"on-failure:-1\" is not no, always, unless-stopped, on-failure or on-failure:TIMES",
        ),
        (
            "command: x\nrestart: true",
            "4:14: services.a.restart: expected a string, found the boolean true; put it in quotes",
        ),
    ] {
        assert_eq!(error_in_service(body), expected, "{body}");
    }
}

#[test]
fn errors_in_the_networks_of_services() {
    for (body, expected) in [
        ("networks: one", "4:15: services.a.networks: expected a map, found a string"),
        (
            "networks: [one]",
            "4:16: services.a.networks[0]: network \"one\" is not defined; add it under networks",
        ),
        (
            "networks: {one: }",
            "4:16: services.a.networks.one: network \"one\" is not defined; add it under networks",
        ),
        (
            "networks: [default, default]",
            "4:25: services.a.networks[1]: \"default\" is already listed in line 4; remove one of them",
        ),
        (
            "networks: {default: {priority: 5}}",
            "4:26: services.a.networks.default.priority: this key is not supported; remove it (supported: aliases, \
             ipv4_address, ipv6_address)",
        ),
        (
            "networks: {default: {aliases: x}}",
            "4:35: services.a.networks.default.aliases: expected a list, found a string",
        ),
        (
            "networks: {default: {aliases: [a..b]}}",
            "4:36: services.a.networks.default.aliases[0]: \"a..b\" is not a valid DNS name: use letters, digits, hyphens \
             and underscores, separated by dots",
        ),
        (
            "networks: {default: {ipv4_address: 'fd00::1'}}",
            "4:40: services.a.networks.default.ipv4_address: \"fd00::1\" is not an IPv4 address",
        ),
        (
            "networks: {default: {ipv4_address: 10.0.0.5}}",
            "4:40: services.a.networks.default.ipv4_address: networks.default has no IPv4 subnet for 10.0.0.5; add one under \
             ipam.config",
        ),
    ] {
        assert_eq!(error_in_service(&format!("command: x\n{body}")), expected, "{body}");
    }
}

#[test]
fn fixed_addresses_must_fit_their_subnet() {
    let fixed = |address: &str, others: &str| {
        let subnets = "[{subnet: 10.0.0.0/24}, {subnet: 'fd00::/64', gateway: 'fd00::9'}]";
        error(&format!(
            "networks: {{n: {{enable_ipv6: true, ipam: {{config: {subnets}}}}}}}\nservices:\n  \
             a: {{command: x, networks: {{n: {{{address}}}}}}}\n{others}"
        ))
    };
    for (address, expected) in [
        (
            "ipv4_address: 10.0.1.5",
            "ipv4_address: 10.0.1.5 is not usable on networks.n: it is outside 10.0.0.0/24",
        ),
        (
            "ipv4_address: 10.0.0.0",
            "ipv4_address: 10.0.0.0 is not usable on networks.n: it is the network address of 10.0.0.0/24",
        ),
        (
            "ipv4_address: 10.0.0.255",
            "ipv4_address: 10.0.0.255 is not usable on networks.n: it is the broadcast address of 10.0.0.0/24",
        ),
        (
            "ipv4_address: 10.0.0.1",
            "ipv4_address: 10.0.0.1 is the gateway of networks.n; choose another",
        ),
        (
            "ipv6_address: 'fd00::9'",
            "ipv6_address: fd00::9 is the gateway of networks.n; choose another",
        ),
        (
            "ipv6_address: 'fd01::9'",
            "ipv6_address: fd01::9 is not usable on networks.n: it is outside fd00::/64",
        ),
    ] {
        assert_eq!(
            fixed(address, ""),
            format!("3:48: services.a.networks.n.{expected}"),
            "{address}"
        );
    }
    assert_eq!(
        fixed(
            "ipv4_address: 10.0.0.7",
            "  b: {command: x, networks: {n: {ipv4_address: 10.0.0.7}}}\n"
        ),
        "4:48: services.b.networks.n.ipv4_address: 10.0.0.7 is already assigned to services.a; choose another"
    );
}

#[test]
fn errors_in_ports() {
    for (body, expected) in [
        ("ports: 80", "4:12: services.a.ports: expected a list, found the number 80"),
        ("ports: [x]", "4:13: services.a.ports[0]: container port \"x\" is not a number"),
        ("ports: [80.5]", "4:13: services.a.ports[0]: container port \"80.5\" is not a number"),
        ("ports: [[80]]", "4:13: services.a.ports[0]: expected a string or a number, found a list"),
        (
            "ports: ['80-82:80-81']",
            "4:13: services.a.ports[0]: host ports 80-82 and container ports 80-81 differ in number (3 and 2)",
        ),
        (
            "ports: [70000]",
            "4:13: services.a.ports[0]: container port 70000 is not between 1 and 65535",
        ),
        (
            "ports: [{published: 80}]",
            "4:13: services.a.ports[0]: no target is set; add the container port, for example target: 80",
        ),
        (
            "ports: [{target: 80-81}]",
            "4:22: services.a.ports[0].target: \"80-81\" is not a port from 1 to 65535",
        ),
        (
            "ports: [{target: 80, published: '80/udp'}]",
            "4:37: services.a.ports[0].published: \"80/udp\" is not a port or a port range such as 8080-8090",
        ),
        (
            "ports: [{target: 80, host_ip: host}]",
            "4:35: services.a.ports[0].host_ip: \"host\" is not an IP address",
        ),
        (
            "ports: [{target: 80, protocol: icmp}]",
            "4:13: services.a.ports[0]: protocol \"icmp\" is not tcp, udp or sctp",
        ),
        (
            "ports: [{target: 80, mode: vip}]",
            "4:32: services.a.ports[0].mode: \"vip\" is not host or ingress (both have the same effect)",
        ),
        (
            "ports: [{target: 80, sticky: true}]",
            "4:26: services.a.ports[0].sticky: this key is not supported; remove it (supported: target, published, host_ip, \
             protocol, mode, name, app_protocol)",
        ),
        (
            "ports: ['80:80', '127.0.0.1:80:81']",
            "4:22: services.a.ports[1]: port 80/tcp on 127.0.0.1 is already published by services.a (line 4, \"80:80\"); choose \
             another host port",
        ),
        (
            "ports: ['1-65535:1-65535', '1-65535:1-65535/udp', '1-65535', '1-65535/udp', '80/sctp']",
            "4:81: services.a.ports[4]: the project publishes more than 262140 ports; publish fewer",
        ),
    ] {
        assert_eq!(error_in_service(&format!("command: x\n{body}")), expected, "{body}");
    }
    assert_eq!(
        error(
            "services:\n  a: {command: x, ports: ['[::1]:53:53/udp']}\n  b: {command: x, ports: ['53:5353', '53:5353/udp']}\n"
        ),
        "3:38: services.b.ports[1]: port 53/udp on [::1] is already published by services.a (line 2, \"[::1]:53:53/udp\"); \
         choose another host port"
    );
}

#[test]
fn errors_in_dependencies() {
    for (body, expected) in [
        ("depends_on: b", "4:17: services.a.depends_on: expected a map, found a string"),
        (
            "depends_on: [b]",
            "4:18: services.a.depends_on[0]: service \"b\" is not defined; add it under services",
        ),
        (
            "depends_on: [b, b]",
            "4:21: services.a.depends_on[1]: \"b\" is already listed in line 4; remove one of them",
        ),
        ("depends_on: {b: }", "4:18: services.a.depends_on.b: expected a map, found nothing"),
        (
            "depends_on: {b: {}}",
            "4:18: services.a.depends_on.b: no condition is set; add condition: service_started",
        ),
        (
            "depends_on: {b: {condition: service_healthy}}",
            "4:33: services.a.depends_on.b.condition: \"service_healthy\" is not supported: tidegate runs no health checks; \
             use service_started",
        ),
        (
            "depends_on: {b: {condition: service_completed_successfully}}",
            "4:33: services.a.depends_on.b.condition: \"service_completed_successfully\" is not supported: tidegate does not \
             wait for a service to exit; use service_started",
        ),
        (
            "depends_on: {b: {condition: service_happy}}",
            "4:33: services.a.depends_on.b.condition: \"service_happy\" is not supported: Compose has no such condition; use \
             service_started",
        ),
        (
            "depends_on: {b: {required: false}}",
            "4:22: services.a.depends_on.b.required: this key is not supported; remove it (supported: condition)",
        ),
        (
            "depends_on: [a]",
            "4:18: services.a.depends_on[0]: dependency cycle: a -> a; remove one dependency",
        ),
    ] {
        assert_eq!(error_in_service(&format!("command: x\n{body}")), expected, "{body}");
    }
    assert_eq!(
        error(
            "services:\n  out: {command: x, depends_on: [a]}\n  a: {command: x, depends_on: [z, b]}\n  \
             b: {command: x, depends_on: [c]}\n  c: {command: x, depends_on: [z, a]}\n  z: {command: x}\n"
        ),
        "5:35: services.c.depends_on[1]: dependency cycle: a -> b -> c -> a; remove one dependency"
    );
}

#[test]
fn an_error_behind_an_alias_names_the_place_and_the_key_path() {
    let text = "x-a: &a\n  ports: [x]\nservices:\n  a: {command: x, <<: *a}\n";
    assert_eq!(error(text), "2:11: services.a.ports[0]: container port \"x\" is not a number");
}
