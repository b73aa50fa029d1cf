//! The command line: everything that Go's `flag` package accepts is accepted, and everything else
//! is rejected.

use tidegate_testbed::server::EchoServer;
use tidegate_testbed::{Namespace, Process, Protocol, Signal};

use crate::driver::{LOOPBACK, LOOPBACK_UDP, Launch, SOON, back, command, connect, echo, front};

#[test]
fn every_form_that_go_accepts_opens_the_port() {
    let host = Namespace::new();
    let server = EchoServer::tcp(&host, back());
    let forms = [
        LOOPBACK,
        // Two dashes, the value after an equals sign, or both, in any order.
        "--proto tcp --host-ip 127.0.0.1 --host-port 8080 --container-ip 127.0.0.1 --container-port 9000",
        "-container-port=9000 -container-ip=127.0.0.1 -host-port=8080 -host-ip=127.0.0.1 -proto=tcp",
        "--container-port=9000 -container-ip 127.0.0.1 --host-port 8080 -host-ip=127.0.0.1",
        // Defaults: tcp and all addresses.
        "-host-port 8080 -container-ip 127.0.0.1 -container-port 9000",
        // A container address of 0.0.0.0 is the host itself.
        "-host-port 8080 -container-port 9000",
        // Numbers in every base.
        "-host-port 0x1f90 -container-ip 127.0.0.1 -container-port 0X2328",
        "-host-port 0o17620 -container-ip 127.0.0.1 -container-port 021450",
        "-host-port 0b1_1111_1001_0000 -container-ip 127.0.0.1 -container-port +9_000",
        // The last of several values wins, whatever the others are.
        "-host-port 1 -host-ip nonsense -container-port 2 -host-port 8080 -host-ip 127.0.0.1 -container-port 9000",
        // Switches that are off.
        "-v=false --version=F -use-listen-fd=0 -host-port 8080 -container-ip 127.0.0.1 -container-port 9000",
        // Two dashes alone end the flags.
        "-host-port 8080 -container-ip 127.0.0.1 -container-port 9000 --",
        // IPv4-mapped IPv6 addresses.
        "-host-ip ::ffff:127.0.0.1 -host-port 8080 -container-ip ::ffff:127.0.0.1 -container-port 9000",
    ];
    for form in forms {
        let mut proxy = Launch::new(&host, form).start().ready();
        echo(&mut connect(&host, front()), form.as_bytes());
        assert_eq!(proxy.stop(Signal::INT, SOON).code(), Some(0), "{form}");
    }
    assert_eq!(server.served(), forms.len() as u64);
}

#[test]
fn flags_select_udp_and_ipv6() {
    let host = Namespace::new();
    let _udp = Launch::new(&host, LOOPBACK_UDP).start().ready();
    let _v6 =
        Launch::new(&host, "-host-ip ::1 -host-port 8081 -container-ip ::1 -container-port 9000")
            .start()
            .ready();
    assert_eq!(host.bound_ports(Protocol::Udp), [8080].into());
    assert_eq!(host.bound_ports(Protocol::Tcp), [8081].into());
    assert!(
        host.run(|| std::net::TcpStream::connect("127.0.0.1:8081")).is_err(),
        "it listens only on ::1"
    );
}

#[test]
fn invalid_command_lines_are_rejected_with_the_usage() {
    let host = Namespace::new();
    let ports = "-host-port 8080 -container-port 9000";
    let refusals = [
        (format!("{ports} -frobnicate"), "flag provided but not defined: -frobnicate"),
        (format!("{ports} --Proto=tcp"), "flag provided but not defined: -Proto"),
        (format!("{ports} ---proto tcp"), "bad flag syntax: ---proto"),
        (
            format!("{ports} leftover"),
            r#"unexpected argument "leftover": docker-proxy takes only flags"#,
        ),
        (format!("{ports} -- -v"), r#"unexpected argument "-v": docker-proxy takes only flags"#),
        (
            format!("{ports} -use-listen-fd true"),
            r#"unexpected argument "true": docker-proxy takes only flags"#,
        ),
        (
            format!("{ports} -use-listen-fd=maybe"),
            r#"invalid boolean value "maybe" for -use-listen-fd: parse error"#,
        ),
        (format!("{ports} -proto"), "flag needs an argument: -proto"),
        (
            format!("{ports} -proto icmp"),
            r#"invalid value "icmp" for flag -proto: not tcp, udp or sctp"#,
        ),
        (
            format!("{ports} -host-ip localhost"),
            r#"invalid value "localhost" for flag -host-ip: not an IP address"#,
        ),
        (
            format!("{ports} -host-port 80a"),
            r#"invalid value "80a" for flag -host-port: parse error"#,
        ),
        (
            format!("{ports} -host-port 0"),
            r#"invalid value "0" for flag -host-port: not a port between 1 and 65535"#,
        ),
        (
            format!("{ports} -container-port 70000"),
            r#"invalid value "70000" for flag -container-port: not a port between 1 and 65535"#,
        ),
        (
            "-container-port 80".to_owned(),
            "flag -host-port is required: a port between 1 and 65535",
        ),
        (
            "-host-port 8080".to_owned(),
            "flag -container-port is required: a port between 1 and 65535",
        ),
        (String::new(), "flag -host-port is required: a port between 1 and 65535"),
    ];
    for (arguments, reason) in refusals {
        let refusal = Launch::new(&host, &arguments).start().refused();
        assert_eq!(refusal.reason, reason, "{arguments}");
        assert_eq!(refusal.exit_code, Some(2), "{arguments}");
        let usage = format!("{reason}\nUsage of docker-proxy:\n  -container-ip string\n");
        assert!(refusal.stderr.starts_with(&usage), "{arguments}: {}", refusal.stderr);
    }
    assert!(host.bound_ports(Protocol::Tcp).is_empty());
}

#[test]
fn the_version_has_the_format_of_docker() {
    let host = Namespace::new();
    for arguments in ["-v", "--version", "-version=true", "-host-port 1 -v"] {
        let mut proxy = Process::spawn(&mut command(&host, arguments));
        assert_eq!(proxy.wait(SOON).code(), Some(0), "{arguments}");
        let text = proxy.wait_for_output(SOON);
        let version = format!(" version {} (tidegate)\n", env!("CARGO_PKG_VERSION"));
        assert!(text.starts_with("docker-proxy (commit ") && text.ends_with(&version), "{text}");
    }
}

#[test]
fn a_failed_write_to_standard_output_is_not_a_crash() {
    let host = Namespace::new();
    for arguments in ["-v >/dev/full", "-h 2>/dev/full"] {
        let mut shell = host.command("sh");
        shell.args(["-c", &format!("exec {} {arguments}", env!("CARGO_BIN_EXE_docker-proxy"))]);
        let mut proxy = Process::spawn(&mut shell);
        let code = proxy.wait(SOON).code();
        let text = proxy.wait_for_output(SOON);
        assert!(
            matches!(code, Some(0 | 1)) && !text.contains("panicked"),
            "{arguments}: {code:?}: {text}"
        );
    }
}

#[test]
fn help_exits_successfully() {
    let host = Namespace::new();
    for arguments in ["-h", "--help", "-host-port 1 -help"] {
        let mut proxy = Process::spawn(&mut command(&host, arguments));
        assert_eq!(proxy.wait(SOON).code(), Some(0), "{arguments}");
        let text = proxy.wait_for_output(SOON);
        assert!(text.starts_with("Usage of docker-proxy:\n"), "{text}");
        for flag in [
            "container-ip",
            "container-port",
            "host-ip",
            "host-port",
            "proto",
            "use-listen-fd",
            "v",
            "version",
        ] {
            assert!(text.contains(&format!("\n  -{flag}")), "-{flag} is missing in {text}");
        }
    }
}
