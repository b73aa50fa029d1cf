use super::*;

fn run(line: &str) -> Options {
    match parse(line.split_whitespace()) {
        Ok(Invocation::Run(options)) => *options,
        other => panic!("{line}: {other:?}"),
    }
}

fn refused(line: &str) -> String {
    parse(line.split_whitespace()).expect_err(line).to_string()
}

#[test]
fn the_command_line_of_rootlesskit_is_parsed() {
    let options = run(
        "--mtu 65520 -r 3 --disable-host-loopback --cidr 10.7.0.0/24 --api-socket /s --enable-sandbox --enable-seccomp --enable-ipv6 4242 tap0",
    );
    assert_eq!(options.target, Target::Process(4242));
    assert_eq!((options.mtu, options.ready_fd, options.exit_fd), (65520, Some(3), None));
    assert_eq!(options.network.to_string(), "10.7.0.0/24");
    assert!(options.disable_host_loopback && options.sandbox && options.seccomp && options.ipv6);
    assert!(!options.configure && !options.disable_dns);
    assert_eq!(options.api_socket, Some("/s".into()));
    let detached = run("--userns-path=/proc/7/ns/user --netns-type=path /state/netns tap0");
    assert_eq!(detached.target, Target::Path("/state/netns".into()));
    assert_eq!(detached.user_namespace, Some("/proc/7/ns/user".into()));
}

#[test]
fn the_command_line_of_podman_is_parsed_in_any_order_of_descriptors() {
    let old = "--disable-host-loopback --mtu=65520 --enable-sandbox --enable-seccomp --enable-ipv6 -c -e 3 -r 4 --netns-type=path /n tap0";
    let new = "--netns-type=path -c -r3 --exit-fd=4 /n tap0 --mtu=1400 --outbound-addr=192.0.2.1 --outbound-addr6=eth0";
    assert_eq!((run(old).exit_fd, run(old).ready_fd), (Some(3), Some(4)));
    let new = run(new);
    assert_eq!((new.exit_fd, new.ready_fd, new.mtu), (Some(4), Some(3), 1400));
    assert_eq!(new.outbound, Some(Outbound::Address(Ipv4Addr::new(192, 0, 2, 1))));
    assert_eq!(new.outbound6, Some(Outbound::Interface("eth0".into())));
}

#[test]
fn options_are_parsed_like_getopt_long() {
    let bundled = run("-c6r5 9");
    assert!(bundled.configure && bundled.ipv6);
    assert_eq!(bundled.ready_fd, Some(5));
    assert!(run("--conf 9").configure);
    assert_eq!(run("-m 1500 --mtu=9000 9").mtu, 9000);
    assert_eq!(run("9").device, "tap0");
    assert_eq!(run("--netns-type=path -- -c").target, Target::Path("-c".into()));
    assert_eq!(refused("--disable-d=1 9"), "option '--disable-dns' doesn't allow an argument");
    assert_eq!(refused("--enable-s 9"), "option '--enable-s' is ambiguous");
    assert_eq!(refused("--nonsense 9"), "unrecognized option '--nonsense'");
    assert_eq!(refused("-x 9"), "unrecognized option '-x'");
    assert_eq!(refused("9 --mtu"), "option '--mtu' requires an argument");
    assert_eq!(refused("9 -r"), "option '-r' requires an argument");
}

#[test]
fn help_and_version_take_precedence() {
    assert_eq!(parse(["--help"]), Ok(Invocation::Help));
    assert_eq!(parse(["-cv"]), Ok(Invocation::Version));
    assert_eq!(parse(["-h", "--nonsense"]), Ok(Invocation::Help));
    // The options that rootlesskit and podman search the help for.
    for word in [
        "--netns-type",
        "--enable-ipv6",
        "--cidr",
        "--disable-host-loopback",
        "--api-socket",
        "--enable-sandbox",
        "--enable-seccomp",
        "--userns-path",
        "--outbound-addr",
        "--disable-dns",
        "--macaddress",
        "--target-type",
    ] {
        assert!(usage().contains(word), "{word}");
    }
}

#[test]
fn invalid_values_are_named() {
    for (line, word) in [
        ("", "PID or PATH is missing"),
        ("0", "PID must be a positive integer"),
        ("-- -5", "PID must be a positive integer"),
        ("/run/netns/blue", "--netns-type=path"),
        ("99999999999 tap0", "PID must be a positive integer"),
        ("9 tap0 more", "unexpected argument \"more\""),
        ("--mtu=0 9", "--mtu \"0\": the MTU must be 1280"),
        ("--mtu=65522 9", "65521"),
        ("--mtu=1279 9", "1280"),
        ("--mtu=big 9", "--mtu \"big\""),
        ("--cidr=10.0.2.0 9", "such as 10.0.2.0/24"),
        ("--cidr=10.0.2.0/26 9", "1 to 25"),
        ("--cidr=10.0.2.0/0 9", "1 to 25"),
        ("--cidr=10.0.2.5/24 9", "use 10.0.2.0/24"),
        ("--cidr=fd00::/64 9", "such as 10.0.2.0/24"),
        ("--cidr=127.0.0.0/8 9", "no host addresses"),
        ("-r -1 9", "--ready-fd \"-1\": must be a non-negative integer"),
        ("-e x 9", "--exit-fd"),
        ("-e 3 -r 3 9", "the same descriptor"),
        ("--outbound-addr=fd00::1 9", "--outbound-addr \"fd00::1\""),
        ("--outbound-addr6=10.0.0.1 9", "--outbound-addr6"),
        ("--macaddress=02:00:00:00:00:01 9", "--configure"),
        ("-c --macaddress=01:00:00:00:00:01 9", "not a unicast MAC address"),
        ("-c --macaddress=02:00:00:00:00 9", "not a unicast MAC address"),
        ("--netns-type=foo 9", "\"path\" or \"pid\""),
        ("--target-type=foo 9", "\"netns\" or \"bess\""),
        ("--target-type=bess /run/bess", "are not supported"),
    ] {
        let error = refused(line);
        assert!(error.contains(word) && !error.contains('\n'), "{line}: {error}");
    }
    let long = format!("--api-socket=/{} 9", "x".repeat(107));
    assert!(refused(&long).contains("107 bytes"));
}

#[test]
fn arguments_that_are_not_utf8_are_rejected() {
    use std::os::unix::ffi::OsStringExt;
    let strange = OsString::from_vec(vec![b'-', b'-', 0xff, b'=', 0xfe]);
    assert!(parse([strange]).is_err());
    let strange = OsString::from_vec(vec![b'-', 0xff]);
    assert!(parse([strange]).is_err());
    assert!(parse(["-", "--"]).is_err());
}
