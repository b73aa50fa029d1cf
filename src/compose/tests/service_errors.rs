//! Every error in the services of a Compose file, word for word.

use super::errors::{error, error_in_service};

#[test]
fn errors_in_services_are_told() {
    for (body, expected) in [
        (
            "image: nginx",
            "3:5: services.a.image: tidegate runs services as processes of this host, not images; remove the key and give \
             a command",
        ),
        (
            "command: x\nvolumes: [/a:/b]",
            "4:5: services.a.volumes: services see the files of this host, there is nothing to mount; remove the key",
        ),
        (
            "entrypoint: /bin/sh",
            "3:5: services.a.entrypoint: there is no image whose entry point to replace; put the whole of it into command",
        ),
        (
            "comand: x",
            "3:5: services.a.comand: this key is not supported; remove it (a service takes command, depends_on, dns, \
             dns_opt, dns_search, environment, hostname, networks, ports, restart and x-netns)",
        ),
        (
            "dns: 192.0.2.1",
            "2:3: services.a: there is nothing to run; give a command, or x-netns to adopt a namespace",
        ),
        (
            "command: x\nx-netns: /n",
            "4:5: services.a.x-netns: a service has a command or adopts a namespace, not both; remove one of them",
        ),
        (
            "x-netns: /n\nrestart: always",
            "4:5: services.a.restart: nothing is run where x-netns adopts a namespace; remove the key",
        ),
        (
            "x-netns: ''",
            "3:14: services.a.x-netns: there is no path; give that of a network namespace, as /run/netns/NAME is one",
        ),
        (
            "command:",
            "3:5: services.a.command: expected a string or a list of strings, found nothing",
        ),
        (
            "command: {}",
            "3:14: services.a.command: expected a string or a list of strings, found a map",
        ),
        ("command: ''", "3:14: services.a.command: there is no program in the command; name one"),
        ("command: []", "3:14: services.a.command: there is no program in the command; name one"),
        (
            "command: ['', x]",
            "3:14: services.a.command: there is no program in the command; name one",
        ),
        (
            "command: it's",
            "3:14: services.a.command: a quote is not closed, or nothing follows a final backslash",
        ),
        (
            "command: [sleep, 10]",
            "3:22: services.a.command[1]: expected a string, found the number 10; put it in quotes",
        ),
        ("command:\n  - x\n  - [y]", "5:9: services.a.command[1]: expected a string, found a list"),
        (
            "command: [x, $NUL]",
            "3:18: services.a.command[1]: this holds a NUL character, which no process can be given",
        ),
        (
            "command: echo $",
            "3:14: services.a.command: \"$\" is no variable; write $$ for a dollar sign",
        ),
        (
            "command: [run, '${DATA:?say where}']",
            "3:20: services.a.command[1]: variable DATA is missing: say where",
        ),
        (
            "command: x\nenvironment: A",
            "4:18: services.a.environment: expected a map, found a string",
        ),
        (
            "command: x\nenvironment: [A=1, =2]",
            "4:24: services.a.environment[1]: \"\" cannot be the name of a variable",
        ),
        (
            "command: x\nenvironment: [A=1, A=2]",
            "4:24: services.a.environment[1]: variable A is given twice; remove one of them",
        ),
        (
            "command: x\nenvironment: {A=: 1}",
            "4:19: services.a.environment.\"A=\": \"A=\" cannot be the name of a variable",
        ),
        (
            "command: x\nenvironment: {A: []}",
            "4:22: services.a.environment.A: expected a string or a number, found a list",
        ),
        (
            "command: x\nhostname: a_b",
            "4:15: services.a.hostname: \"a_b\" cannot be a host name: letters, digits, hyphens and dots, 64 characters at \
             most",
        ),
        (
            "command: x\ndns: [192.0.2.1, one]",
            "4:22: services.a.dns[1]: \"one\" is not an IP address",
        ),
        ("command: x\ndns_opt: [a b]", "4:15: services.a.dns_opt[0]: \"a b\" is not one word"),
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
fn errors_in_the_networks_of_services_are_told() {
    for (body, expected) in [
        ("networks: one", "4:15: services.a.networks: expected a map, found a string"),
        (
            "networks: [one]",
            "4:16: services.a.networks[0]: there is no network \"one\"; define it under networks",
        ),
        (
            "networks: {one: }",
            "4:16: services.a.networks.one: there is no network \"one\"; define it under networks",
        ),
        (
            "networks: [default, default]",
            "4:25: services.a.networks[1]: \"default\" stands in line 4 already; remove one of them",
        ),
        (
            "networks: {default: {priority: 5}}",
            "4:26: services.a.networks.default.priority: this key is not supported; remove it (a network of a service takes \
             aliases, ipv4_address and ipv6_address)",
        ),
        (
            "networks: {default: {aliases: x}}",
            "4:35: services.a.networks.default.aliases: expected a list, found a string",
        ),
        (
            "networks: {default: {aliases: [a..b]}}",
            "4:36: services.a.networks.default.aliases[0]: \"a..b\" cannot be a name in DNS: letters, digits, hyphens, \
             underscores, and dots between them",
        ),
        (
            "networks: {default: {ipv4_address: 'fd00::1'}}",
            "4:40: services.a.networks.default.ipv4_address: \"fd00::1\" is not an IPv4 address",
        ),
        (
            "networks: {default: {ipv4_address: 10.0.0.5}}",
            "4:40: services.a.networks.default.ipv4_address: networks.default has no subnet of IPv4 to choose 10.0.0.5 from; \
             give it one under ipam.config",
        ),
    ] {
        assert_eq!(error_in_service(&format!("command: x\n{body}")), expected, "{body}");
    }
}

#[test]
fn fixed_addresses_must_fit() {
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
            "ipv4_address: 10.0.1.5 cannot be on networks.n: it is not in 10.0.0.0/24",
        ),
        (
            "ipv4_address: 10.0.0.0",
            "ipv4_address: 10.0.0.0 cannot be on networks.n: it is the address of 10.0.0.0/24 itself",
        ),
        (
            "ipv4_address: 10.0.0.255",
            "ipv4_address: 10.0.0.255 cannot be on networks.n: it is the broadcast address of 10.0.0.0/24",
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
            "ipv6_address: fd01::9 cannot be on networks.n: it is not in fd00::/64",
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
        "4:48: services.b.networks.n.ipv4_address: 10.0.0.7 is the address of services.a already; choose another"
    );
}

#[test]
fn errors_in_ports_are_told() {
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
            "4:13: services.a.ports[0]: there is no target; say which port the service listens on",
        ),
        (
            "ports: [{target: 80-81}]",
            "4:22: services.a.ports[0].target: \"80-81\" is not a port from 1 to 65535",
        ),
        (
            "ports: [{target: 80, published: '80/udp'}]",
            "4:37: services.a.ports[0].published: \"80/udp\" is not a port or a range of ports, as 8080-8090 is one",
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
            "4:32: services.a.ports[0].mode: \"vip\" is not host or ingress, which mean the same here",
        ),
        (
            "ports: [{target: 80, sticky: true}]",
            "4:26: services.a.ports[0].sticky: this key is not supported; remove it (a port takes target, published, host_ip, \
             protocol, mode, name and app_protocol)",
        ),
        (
            "ports: ['80:80', '127.0.0.1:80:81']",
            "4:22: services.a.ports[1]: port 80/tcp on 127.0.0.1 is published by services.a already (line 4, \"80:80\"); choose \
             another host port",
        ),
        (
            "ports: ['1-65535:1-65535', '1-65535:1-65535/udp', '1-65535', '1-65535/udp', '80/sctp']",
            "4:81: services.a.ports[4]: more than 262140 ports are published in all; publish fewer",
        ),
    ] {
        assert_eq!(error_in_service(&format!("command: x\n{body}")), expected, "{body}");
    }
    assert_eq!(
        error(
            "services:\n  a: {command: x, ports: ['[::1]:53:53/udp']}\n  b: {command: x, ports: ['53:5353', '53:5353/udp']}\n"
        ),
        "3:38: services.b.ports[1]: port 53/udp on [::1] is published by services.a already (line 2, \"[::1]:53:53/udp\"); \
         choose another host port"
    );
}

#[test]
fn errors_in_dependencies_are_told() {
    for (body, expected) in [
        ("depends_on: b", "4:17: services.a.depends_on: expected a map, found a string"),
        (
            "depends_on: [b]",
            "4:18: services.a.depends_on[0]: there is no service \"b\" to depend on",
        ),
        (
            "depends_on: [b, b]",
            "4:21: services.a.depends_on[1]: \"b\" stands in line 4 already; remove one of them",
        ),
        ("depends_on: {b: }", "4:18: services.a.depends_on.b: expected a map, found nothing"),
        (
            "depends_on: {b: {}}",
            "4:18: services.a.depends_on.b: there is no condition; say condition: service_started",
        ),
        (
            "depends_on: {b: {condition: service_healthy}}",
            "4:33: services.a.depends_on.b.condition: \"service_healthy\" is not supported: services are not checked for \
             health; say service_started",
        ),
        (
            "depends_on: {b: {condition: service_completed_successfully}}",
            "4:33: services.a.depends_on.b.condition: \"service_completed_successfully\" is not supported: services are \
             started in order, not waited for to end; say service_started",
        ),
        (
            "depends_on: {b: {condition: service_happy}}",
            "4:33: services.a.depends_on.b.condition: \"service_happy\" is not supported: Compose has no such condition; say \
             service_started",
        ),
        (
            "depends_on: {b: {required: false}}",
            "4:22: services.a.depends_on.b.required: this key is not supported; remove it (a dependency takes condition)",
        ),
        (
            "depends_on: [a]",
            "4:18: services.a.depends_on[0]: services depend on each other in a circle: a -> a; remove one",
        ),
    ] {
        assert_eq!(error_in_service(&format!("command: x\n{body}")), expected, "{body}");
    }
    assert_eq!(
        error(
            "services:\n  out: {command: x, depends_on: [a]}\n  a: {command: x, depends_on: [z, b]}\n  \
             b: {command: x, depends_on: [c]}\n  c: {command: x, depends_on: [z, a]}\n  z: {command: x}\n"
        ),
        "5:35: services.c.depends_on[1]: services depend on each other in a circle: a -> b -> c -> a; remove one"
    );
}

#[test]
fn an_error_in_what_an_alias_stands_for_is_told_with_both_places() {
    let text = "x-a: &a\n  ports: [x]\nservices:\n  a: {command: x, <<: *a}\n";
    assert_eq!(error(text), "2:11: services.a.ports[0]: container port \"x\" is not a number");
}
