use std::os::unix::ffi::OsStringExt as _;

use super::*;

#[test]
fn the_command_line_of_dockerd_is_parsed() {
    let options = run(
        "-proto tcp -host-ip 0.0.0.0 -host-port 8080 -container-ip 172.17.0.2 -container-port 80",
    );
    assert_eq!(
        options,
        Options {
            protocol: Protocol::Tcp,
            listen: Listen::Bind(socket("0.0.0.0:8080")),
            container: socket("172.17.0.2:80"),
        }
    );
}

#[test]
fn an_ipv6_address_has_no_brackets() {
    let options =
        run("-proto udp -host-ip :: -host-port 53 -container-ip fd88::2 -container-port 5353");
    assert_eq!(options.listen, Listen::Bind(socket("[::]:53")));
    assert_eq!(options.container, socket("[fd88::2]:5353"));
    assert_eq!(
        error("-host-ip [::] -host-port 1"),
        r#"invalid value "[::]" for flag -host-ip: not an IP address"#
    );
}

#[test]
fn an_ipv4_mapped_address_becomes_ipv4() {
    assert_eq!(
        run_with("-host-ip ::ffff:192.0.2.1").listen,
        Listen::Bind(socket("192.0.2.1:8080"))
    );
}

#[test]
fn protocol_and_addresses_have_defaults() {
    let options = run("-host-port 8080 -container-port 80");
    assert_eq!(options.protocol, Protocol::Tcp);
    assert_eq!(options.listen, Listen::Bind(socket("0.0.0.0:8080")));
    assert_eq!(options.container, socket("0.0.0.0:80"));
}

#[test]
fn only_known_protocols_are_accepted() {
    for protocol in Protocol::ALL {
        assert_eq!(run_with(&format!("-proto {protocol}")).protocol, protocol);
    }
    for word in ["TCP", "tcp4", "icmp", ""] {
        assert_eq!(
            error(&format!("-host-port 1 -container-port 1 -proto={word}")),
            format!("invalid value {word:?} for flag -proto: not tcp, udp or sctp")
        );
    }
}

mod grammar {
    use super::*;

    #[test]
    fn one_or_two_dashes_and_separate_or_attached_values_are_accepted() {
        for args in ["-host-port 9000", "--host-port 9000", "-host-port=9000", "--host-port=9000"] {
            assert_eq!(run_with(args).listen, Listen::Bind(socket("0.0.0.0:9000")), "{args}");
        }
    }

    #[test]
    fn the_last_of_several_wins() {
        let options = run_with("-host-port 1 -host-ip nonsense -host-port=2 -host-ip ::1");
        assert_eq!(options.listen, Listen::Bind(socket("[::1]:2")));
        assert_eq!(
            run_with("-use-listen-fd -use-listen-fd=false").listen,
            Listen::Bind(socket("0.0.0.0:8080"))
        );
    }

    #[test]
    fn a_value_can_look_like_a_flag() {
        assert_eq!(
            error("-container-port 1 -host-port -1"),
            r#"invalid value "-1" for flag -host-port: not a port between 1 and 65535"#
        );
        assert_eq!(
            error("-host-port -v"),
            r#"invalid value "-v" for flag -host-port: parse error"#
        );
        assert_eq!(
            error("-host-port --"),
            r#"invalid value "--" for flag -host-port: parse error"#
        );
    }

    #[test]
    fn a_value_is_everything_after_the_first_equals_sign() {
        assert_eq!(
            error("-host-port=a=b"),
            r#"invalid value "a=b" for flag -host-port: parse error"#
        );
        assert_eq!(error("-host-port="), r#"invalid value "" for flag -host-port: parse error"#);
    }

    #[test]
    fn a_missing_value_names_the_flag() {
        assert_eq!(error("-proto"), "flag needs an argument: -proto");
        assert_eq!(error("-v --container-port"), "flag needs an argument: -container-port");
    }

    #[test]
    fn unknown_flags_are_named_without_their_value() {
        assert_eq!(error("-x"), "flag provided but not defined: -x");
        assert_eq!(error("--host-ports=1"), "flag provided but not defined: -host-ports");
        assert_eq!(error("-Proto tcp"), "flag provided but not defined: -Proto");
    }

    #[test]
    fn malformed_flags_are_quoted_whole() {
        for arg in ["---x", "-=x", "--=x", "---", "-="] {
            assert_eq!(error(arg), format!("bad flag syntax: {arg}"));
        }
    }

    #[test]
    fn positional_arguments_are_rejected() {
        for arg in ["extra", "-"] {
            let expected = format!("unexpected argument {arg:?}: docker-proxy takes only flags");
            assert_eq!(error(&format!("-host-port 1 {arg} -container-port 1")), expected);
            assert_eq!(error(&format!("-host-port 1 -container-port 1 -- {arg}")), expected);
        }
        assert_eq!(
            error("-host-port 1 -- -v"),
            r#"unexpected argument "-v": docker-proxy takes only flags"#
        );
        assert_eq!(parse([""]), Err(FlagError::Positional(String::new())));
        // A switch takes no value from the next argument.
        assert_eq!(
            error("-use-listen-fd true"),
            r#"unexpected argument "true": docker-proxy takes only flags"#
        );
    }

    #[test]
    fn two_dashes_alone_end_the_flags() {
        assert_eq!(run_with("--").listen, Listen::Bind(socket("0.0.0.0:8080")));
    }

    #[test]
    fn switches_accept_the_booleans_of_go() {
        for word in ["1", "t", "T", "true", "TRUE", "True"] {
            assert_eq!(parse([format!("-v={word}")]), Ok(Invocation::Version), "{word}");
        }
        for word in ["0", "f", "F", "false", "FALSE", "False"] {
            assert_eq!(run_with(&format!("-version={word}")).protocol, Protocol::Tcp, "{word}");
        }
        assert_eq!(error("-v=maybe"), r#"invalid boolean value "maybe" for -v: parse error"#);
        assert_eq!(
            error("-use-listen-fd="),
            r#"invalid boolean value "" for -use-listen-fd: parse error"#
        );
    }

    #[test]
    fn bytes_that_are_not_utf8_are_rejected() {
        let bytes = |bytes: &[u8]| OsString::from_vec(bytes.to_vec());
        assert!(matches!(parse([bytes(b"-\xff")]), Err(FlagError::Unknown(_))));
        assert!(matches!(parse([bytes(b"-host-port=\xff")]), Err(FlagError::InvalidValue { .. })));
        assert!(matches!(parse([bytes(b"\xff")]), Err(FlagError::Positional(_))));
    }
}

mod help_and_version {
    use super::*;

    #[test]
    fn the_version_needs_no_other_flag() {
        for args in ["-v", "--v", "-version", "--version", "-host-port 0 -v"] {
            assert_eq!(parse(args.split(' ')), Ok(Invocation::Version), "{args}");
        }
    }

    #[test]
    fn malformed_flags_are_reported_before_the_version() {
        assert_eq!(error("-v -x"), "flag provided but not defined: -x");
    }

    #[test]
    fn help_takes_effect_at_its_position() {
        for args in ["-h", "--h", "-help", "--help", "-h=1", "-v -h", "-h -x"] {
            assert_eq!(parse(args.split(' ')), Ok(Invocation::Help), "{args}");
        }
        assert_eq!(error("-x -h"), "flag provided but not defined: -x");
    }

    #[test]
    fn usage_has_the_layout_of_go() {
        assert_eq!(
            usage(),
            "Usage of docker-proxy:
  -container-ip string
    \tcontainer address to forward to (default 0.0.0.0)
  -container-port int
    \tcontainer port to forward to (default -1)
  -host-ip string
    \thost address to listen on (default 0.0.0.0)
  -host-port int
    \thost port to listen on (default -1)
  -proto string
    \tprotocol to forward: tcp, udp or sctp (default \"tcp\")
  -use-listen-fd
    \tlisten on the socket passed as file descriptor 4
  -v\tprint the version and exit
  -version
    \tprint the version and exit
"
        );
    }
}

mod ports {
    use super::*;

    #[test]
    fn both_are_required_and_named() {
        assert_eq!(
            error("-container-port 80"),
            "flag -host-port is required: a port between 1 and 65535"
        );
        assert_eq!(
            error("-host-port 80"),
            "flag -container-port is required: a port between 1 and 65535"
        );
        assert_eq!(parse([] as [&str; 0]), Err(FlagError::PortMissing("host-port")));
    }

    #[test]
    fn neither_may_be_out_of_range() {
        for value in ["0", "-1", "65536", "9223372036854775807"] {
            for flag in ["host-port", "container-port"] {
                assert_eq!(
                    error(&format!("-host-port 1 -container-port 1 -{flag} {value}")),
                    format!(
                        "invalid value {value:?} for flag -{flag}: not a port between 1 and 65535"
                    )
                );
            }
        }
        assert_eq!(run_with("-host-port 65535").listen, Listen::Bind(socket("0.0.0.0:65535")));
    }

    #[test]
    fn invalid_integers_have_the_errors_of_go() {
        assert_eq!(
            error("-host-port abc"),
            r#"invalid value "abc" for flag -host-port: parse error"#
        );
        assert_eq!(
            error("-host-port 99999999999999999999"),
            r#"invalid value "99999999999999999999" for flag -host-port: value out of range"#
        );
    }

    #[test]
    fn an_inherited_socket_needs_no_host_port() {
        let listen = |args: &str| run(&format!("-use-listen-fd -container-port 80 {args}")).listen;
        assert_eq!(listen(""), Listen::Inherited(None));
        assert_eq!(listen("-host-port 0"), Listen::Inherited(None));
        assert_eq!(listen("-host-port 70000"), Listen::Inherited(None));
        assert_eq!(
            listen("-host-ip ::1 -host-port 8080"),
            Listen::Inherited(Some(socket("[::1]:8080")))
        );
    }

    #[test]
    fn an_inherited_socket_needs_all_other_flags() {
        assert_eq!(
            error("-use-listen-fd"),
            "flag -container-port is required: a port between 1 and 65535"
        );
        assert_eq!(
            error("-use-listen-fd -container-port 80 -host-ip x"),
            r#"invalid value "x" for flag -host-ip: not an IP address"#
        );
    }
}

mod integers {
    use super::*;

    #[test]
    fn all_bases_of_go_are_parsed() {
        for (text, value) in [
            ("8080", 8080),
            ("+8080", 8080),
            ("-8080", -8080),
            ("0", 0),
            ("-0", 0),
            ("00", 0),
            ("0x1F90", 8080),
            ("0X1f90", 8080),
            ("-0x10", -16),
            ("017620", 8080),
            ("0o17620", 8080),
            ("0O17620", 8080),
            ("0b101", 5),
            ("0B101", 5),
            ("1_000", 1000),
            ("0x_1F_90", 8080),
            ("0_17620", 8080),
            ("0b_1", 1),
            ("9223372036854775807", i64::MAX),
            ("-9223372036854775808", i64::MIN),
        ] {
            assert_eq!(parse_int(text), Ok(value), "{text}");
        }
    }

    #[test]
    fn integers_that_go_rejects_are_rejected() {
        for text in [
            "", "+", "-", "+-1", "--1", " 1", "1 ", "08", "0x", "0o", "0b", "0b2", "0o8", "0xg",
            "1f", "_1", "-_1", "1_", "1__0", "_", "0_", "0x_", "0x__1", "0x1_", "1.0", "1e3", "٨",
        ] {
            assert_eq!(parse_int(text), Err(PARSE_ERROR), "{text}");
        }
    }

    #[test]
    fn large_integers_are_out_of_range() {
        for text in [
            "9223372036854775808",
            "-9223372036854775809",
            "18446744073709551616",
            "0xffffffffffffffff",
            "99999999999999999999x",
        ] {
            assert_eq!(parse_int(text), Err(OUT_OF_RANGE), "{text}");
        }
    }
}

/// Parses words separated by spaces into options.
fn run(args: &str) -> Options {
    match parse(args.split_ascii_whitespace()) {
        Ok(Invocation::Run(options)) => options,
        other => panic!("{args}: {other:?}"),
    }
}

/// Like [`run`], with the required flags added.
fn run_with(args: &str) -> Options {
    run(&format!("-host-port 8080 -container-port 80 {args}"))
}

fn error(args: &str) -> String {
    parse(args.split_ascii_whitespace()).expect_err(args).to_string()
}

fn socket(text: &str) -> SocketAddr {
    text.parse().unwrap()
}
