use std::time::Instant;

use proptest::prelude::*;

use super::*;

mod parsing {
    use super::*;

    #[test]
    fn a_lone_container_port_gets_an_ephemeral_port_on_every_address() {
        let spec = parsed("80");
        assert_eq!(spec.host_ip(), None);
        assert_eq!(spec.host_ports(), HostPorts::Ephemeral);
        assert_eq!(spec.container_ports(), range(80, 80));
        assert_eq!(spec.protocol(), Protocol::Tcp);
    }

    #[test]
    fn a_host_port_is_fixed() {
        assert_eq!(parsed("8080:80").host_ports(), HostPorts::Fixed(range(8080, 8080)));
    }

    #[test]
    fn an_address_restricts_the_host_side() {
        assert_eq!(parsed("127.0.0.1:8080:80").host_ip(), Some(ip("127.0.0.1")));
        assert_eq!(parsed("[::1]:8082:80").host_ip(), Some(ip("::1")));
        assert_eq!(parsed("0.0.0.0:8080:80").host_ip(), Some(ip("0.0.0.0")));
    }

    #[test]
    fn a_mapped_address_is_converted_to_ipv4() {
        assert_eq!(parsed("[::ffff:192.0.2.1]:8080:80"), parsed("192.0.2.1:8080:80"));
    }

    #[test]
    fn an_empty_or_zero_host_port_is_ephemeral() {
        assert_eq!(parsed("127.0.0.1::80"), parsed("127.0.0.1:0:80"));
        assert_eq!(parsed("[::1]::80").host_ports(), HostPorts::Ephemeral);
        assert_eq!(parsed("0:80"), parsed("80"));
    }

    #[test]
    fn the_protocol_ignores_case() {
        assert_eq!(parsed("53:53/UDP").protocol(), Protocol::Udp);
        assert_eq!(parsed("53:53/Sctp").protocol(), Protocol::Sctp);
        assert_eq!(parsed("53:53/tcp"), parsed("53:53"));
    }

    #[test]
    fn leading_zeros_are_decimal() {
        assert_eq!(parsed("0080:0081"), parsed("80:81"));
    }

    #[test]
    fn a_range_of_one_is_a_single_port() {
        assert_eq!(parsed("9000-9000:80-80"), parsed("9000:80"));
    }

    #[test]
    fn each_kind_of_mistake_has_its_own_message() {
        for (spec, problem) in [
            ("", "container port is empty"),
            ("/tcp", "container port is empty"),
            ("8080:", "container port is empty"),
            (":80", "host port is empty"),
            ("80-", "container port is empty"),
            ("-80", "container port is empty"),
            ("-90:80", "host port is empty"),
            (":8080:80", "host address is empty"),
            ("::80", "host address is empty"),
            ("[]:8080:80", "host address is empty"),
            ("80/", r#"protocol "" is not tcp, udp or sctp"#),
            ("80/icmp", r#"protocol "icmp" is not tcp, udp or sctp"#),
            ("80/tcp/udp", r#"protocol "tcp/udp" is not tcp, udp or sctp"#),
            ("http", r#"container port "http" is not a number"#),
            ("80/tcp:80", r#"host port "80/tcp" is not a number"#),
            ("+80", r#"container port "+80" is not a number"#),
            (" 80", r#"container port " 80" is not a number"#),
            ("80-82-84", r#"container port "82-84" is not a number"#),
            ("٨٠", r#"container port "٨٠" is not a number"#),
            ("0", "container port 0 is not between 1 and 65535"),
            ("8080:0", "container port 0 is not between 1 and 65535"),
            ("8080:70000", "container port 70000 is not between 1 and 65535"),
            (
                "99999999999999999999:80",
                "host port 99999999999999999999 is not between 1 and 65535",
            ),
            ("0-2:80-82", "host port 0 is not between 1 and 65535"),
            ("0:80-82", "host port 0 is one ephemeral port, container ports 80-82 are 3"),
            ("9002-9000:80", "host port range 9002-9000 ends before it starts"),
            ("82-80", "container port range 82-80 ends before it starts"),
            (
                "9000-9002:80-81",
                "host ports 9000-9002 and container ports 80-81 differ in number (3 and 2)",
            ),
            ("9000:80-81", "host ports 9000 and container ports 80-81 differ in number (1 and 2)"),
            ("localhost:8080:80", r#"host "localhost" is a name; an IP address is needed"#),
            ("300.0.0.1:8080:80", r#"host address "300.0.0.1" is not an IP address"#),
            ("1:2:3:4", r#"host address "1:2" is not an IP address"#),
            (
                "[fe80::1%eth0]:80:80",
                r#"host address "fe80::1%eth0" has a zone; zones cannot be published on"#,
            ),
            ("::1:8082:80", "IPv6 host address ::1 must be in brackets, as [::1]"),
            (
                "2001:db8::1:80",
                "IPv6 host address 2001:db8::1 must be in brackets, as [2001:db8::1]",
            ),
            (
                "127.0.0.1:80",
                "host port is missing behind the address 127.0.0.1; for an ephemeral one write 127.0.0.1::PORT",
            ),
            (
                "[::1]:80",
                "host port is missing behind the address [::1]; for an ephemeral one write [::1]::PORT",
            ),
            ("[::1:80:80", BRACKETS),
            ("[::1]80:80", BRACKETS),
            ("[127.0.0.1]:80:80", BRACKETS),
        ] {
            let error = spec.parse::<PortSpec>().expect_err(spec);
            assert_eq!(error.to_string(), format!("port spec {spec:?}: {problem}"));
        }
    }

    const BRACKETS: &str =
        "brackets must hold an IPv6 host address and be followed by a colon, as in [::1]:8080:80";

    proptest! {
        #[test]
        fn never_panics_on_any_text(text: String) {
            let _ = text.parse::<PortSpec>();
        }

        #[test]
        fn never_panics_on_nearly_valid_text(text in r"[\[\]0-9a-f:./%-]{0,24}(/[a-zA-Z]{0,4})?") {
            crate::fuzz::check_port_spec(text.as_bytes());
        }
    }
}

mod printing {
    use super::*;

    #[test]
    fn the_shortest_text_is_printed() {
        for text in [
            "80",
            "80-82/udp",
            "8080:80",
            "9000-9002:80-82",
            "8000-8100:80/sctp",
            "127.0.0.1::80",
            "[::1]::80-82/udp",
            "[::1]:8082:80",
        ] {
            assert_eq!(parsed(text).to_string(), text);
        }
        assert_eq!(parsed("[0:0::1]:0080:80/TCP").to_string(), "[::1]:80:80");
    }

    proptest! {
        #[test]
        fn printed_text_parses_back(spec in spec()) {
            prop_assert_eq!(spec.to_string().parse(), Ok(spec));
        }
    }
}

mod mappings {
    use super::*;

    #[test]
    fn ranges_are_paired_in_order() {
        let pairs: Vec<_> = parsed("127.0.0.1:9000-9002:80-82/udp")
            .mappings()
            .map(|mapping| (mapping.host_port, mapping.container_port))
            .collect();
        assert_eq!(
            pairs,
            [(HostPort::Fixed(9000), 80), (HostPort::Fixed(9001), 81), (HostPort::Fixed(9002), 82)]
        );
    }

    #[test]
    fn a_host_range_with_one_container_port_is_any_of_the_range() {
        let mappings: Vec<_> = parsed("8000-8100:80").mappings().collect();
        assert_eq!(
            mappings,
            [PortMapping {
                host_ip: None,
                host_port: HostPort::AnyOf(range(8000, 8100)),
                container_port: 80,
                protocol: Protocol::Tcp,
            }]
        );
    }

    #[test]
    fn all_ports_can_be_published() {
        let last = parsed("1-65535:1-65535").mappings().last().unwrap();
        assert_eq!((last.host_port, last.container_port), (HostPort::Fixed(65535), 65535));
    }

    #[test]
    fn a_missing_address_means_both_wildcards() {
        assert!(host_addresses(None).eq([ip("0.0.0.0"), ip("::")]));
        assert!(host_addresses(Some(ip("::1"))).eq([ip("::1")]));
    }

    #[test]
    fn parts_are_validated_like_text() {
        let new = |host_ports, container| PortSpec::new(None, host_ports, container, Protocol::Tcp);
        assert_eq!(new(HostPorts::AnyOf(range(80, 80)), range(80, 80)), Ok(parsed("80:80")));
        assert_eq!(new(HostPorts::Fixed(range(80, 90)), range(80, 80)), Ok(parsed("80-90:80")));
        assert!(new(HostPorts::Fixed(range(80, 90)), range(80, 81)).is_err());
    }

    #[test]
    fn a_range_rejects_zero_and_an_end_before_its_start() {
        assert_eq!(PortRange::new(0, 5), None);
        assert_eq!(PortRange::new(6, 5), None);
        assert_eq!(range(1, 65535).len(), 65535);
        assert!(range(5, 7).iter().eq([5, 6, 7]));
        assert!(range(5, 7).contains(7) && !range(5, 7).contains(8));
    }

    proptest! {
        #[test]
        fn there_is_one_mapping_per_container_port(spec in spec()) {
            let ports: Vec<_> = spec.mappings().map(|mapping| mapping.container_port).collect();
            prop_assert!(spec.container_ports().iter().eq(ports));
            prop_assert_eq!(spec.mappings().len(), usize::from(spec.container_ports().len()));
        }
    }
}

mod overlaps {
    use super::*;

    #[test]
    fn a_wildcard_conflicts_with_every_address_of_its_family() {
        assert_eq!(
            conflict(&["8080:80", "127.0.0.1:8080:81"]),
            r#"port specs "8080:80" and "127.0.0.1:8080:81" both claim 8080/tcp on 127.0.0.1"#
        );
        assert_eq!(
            conflict(&["[::1]:53:53/udp", "53:53/udp"]),
            r#"port specs "[::1]:53:53/udp" and "53:53/udp" both claim 53/udp on ::1"#
        );
    }

    #[test]
    fn a_repeated_spec_conflicts() {
        assert_eq!(
            conflict(&["8080:80", "8080:80"]),
            r#"port specs "8080:80" and "8080:80" both claim 8080/tcp on 0.0.0.0"#
        );
    }

    #[test]
    fn ranges_conflict_on_a_single_port() {
        assert_eq!(
            conflict(&["9000-9010:80-90", "10.0.0.1:9010-9020:80-90"]),
            r#"port specs "9000-9010:80-90" and "10.0.0.1:9010-9020:80-90" both claim 9010/tcp on 10.0.0.1"#
        );
    }

    #[test]
    fn different_addresses_families_protocols_and_ports_do_not_conflict() {
        let specs = [
            "127.0.0.1:53:53",
            "127.0.0.2:53:53",
            "[::]:53:53",
            "53:53/udp",
            "54:53",
            "0.0.0.0:55:53",
            "[::]:55:53",
        ];
        assert_eq!(overlap(&specs.map(parsed)), Ok(()));
    }

    #[test]
    fn ephemeral_ports_and_ranges_are_not_claims() {
        assert_eq!(
            overlap(&["80", "80", "8000-8010:80", "8000-8010:80", "8000:80"].map(parsed)),
            Ok(())
        );
    }

    #[test]
    fn ten_thousand_ports_are_checked_in_under_five_seconds() {
        let specs: Vec<_> = (10_000..20_000)
            .map(|port| {
                PortSpec::new(
                    None,
                    HostPorts::Fixed(range(port, port)),
                    range(80, 80),
                    Protocol::Tcp,
                )
                .unwrap()
            })
            .collect();
        let start = Instant::now();
        assert_eq!(overlap(&specs), Ok(()));
        // An unoptimised build takes about 50 ms. Comparing every pair would take far longer than 5
        // s.
        assert!(start.elapsed().as_secs() < 5, "{:?}", start.elapsed());
    }

    proptest! {
        #[test]
        fn agrees_with_comparing_every_pair(specs in prop::collection::vec(conflicting_spec(), 0..8)) {
            let is_late = |&index: &usize| specs[..index].iter().any(|first| specs_conflict(first, &specs[index]));
            let late = (0..specs.len()).find(is_late);
            match (overlap(&specs), late) {
                (Ok(()), None) => {}
                (Err(error), Some(late)) => {
                    prop_assert_eq!(error.second, specs[late]);
                    prop_assert!(specs[..late].contains(&error.first));
                    let claim = (error.protocol, error.port, error.address);
                    let claimed_by = |spec| claims(spec).into_iter().any(|other| claims_conflict(claim, other));
                    prop_assert!(claimed_by(&error.first) && claimed_by(&error.second));
                }
                (found, expected) => prop_assert!(false, "{:?}, but the oracle says {:?}", found, expected),
            }
        }
    }

    fn specs_conflict(first: &PortSpec, second: &PortSpec) -> bool {
        claims(first)
            .into_iter()
            .any(|one| claims(second).into_iter().any(|other| claims_conflict(one, other)))
    }

    type Claim = (Protocol, u16, IpAddr);

    fn claims(spec: &PortSpec) -> Vec<Claim> {
        let mut claims = Vec::new();
        for mapping in spec.mappings() {
            if let HostPort::Fixed(port) = mapping.host_port {
                claims.extend(
                    host_addresses(mapping.host_ip)
                        .map(|address| (mapping.protocol, port, address)),
                );
            }
        }
        claims
    }

    fn claims_conflict(
        (protocol, port, address): Claim,
        (other_protocol, other_port, other): Claim,
    ) -> bool {
        let same_family = address.is_ipv4() == other.is_ipv4();
        let same_address = address == other || address.is_unspecified() || other.is_unspecified();
        protocol == other_protocol && port == other_port && same_family && same_address
    }

    /// Specs on few ports and addresses, so that they often conflict.
    fn conflicting_spec() -> impl Strategy<Value = PortSpec> {
        let addresses =
            [None, Some("0.0.0.0"), Some("10.0.0.1"), Some("10.0.0.2"), Some("::"), Some("::1")];
        let addresses = addresses.map(|address| address.map(ip));
        (
            prop::sample::select(addresses.to_vec()),
            1..12_u16,
            0..3_u16,
            any::<bool>(),
            any::<bool>(),
        )
            .prop_map(|(host_ip, start, more, udp, ephemeral)| {
                let protocol = if udp { Protocol::Udp } else { Protocol::Tcp };
                let host = if ephemeral && start < 3 {
                    HostPorts::Ephemeral
                } else {
                    HostPorts::Fixed(range(start, start + more))
                };
                PortSpec::new(host_ip, host, range(80, 80 + more), protocol).unwrap()
            })
    }

    fn conflict(specs: &[&str]) -> String {
        let specs: Vec<_> = specs.iter().copied().map(parsed).collect();
        overlap(&specs).unwrap_err().to_string()
    }
}

/// All valid specs, with ranges of any length.
fn spec() -> impl Strategy<Value = PortSpec> {
    let container = (1..=u16::MAX, 0..=u16::MAX)
        .prop_map(|(start, more)| range(start, start.saturating_add(more)));
    (
        any::<Option<IpAddr>>(),
        container,
        0..3,
        1..=u16::MAX,
        prop::sample::select(&Protocol::ALL[..]),
    )
        .prop_map(|(host_ip, container, kind, start, protocol)| {
            let host = match kind {
                0 => HostPorts::Ephemeral,
                1 => {
                    let start = start.min(u16::MAX - (container.len() - 1));
                    HostPorts::Fixed(range(start, start + (container.len() - 1)))
                }
                _ => HostPorts::AnyOf(range(start, start.saturating_add(container.start()))),
            };
            PortSpec::new(host_ip, host, container, protocol)
                .or_else(|_| PortSpec::new(host_ip, host, range(80, 80), protocol))
                .unwrap()
        })
}

fn parsed(text: &str) -> PortSpec {
    text.parse().unwrap()
}

fn range(start: u16, end: u16) -> PortRange {
    PortRange::new(start, end).unwrap()
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}
