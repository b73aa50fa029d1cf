//! Descriptor 3: how the proxy says that its port is open, or why it is not.

use std::fs::{self, File};
use std::io::{Seek, SeekFrom, Write};
use std::net::UdpSocket;

use tidegate_testbed::server::EchoServer;
use tidegate_testbed::{Namespace, Process, Protocol, Signal, pass_fd};

use crate::driver::{
    FRONT, LOOPBACK, LOOPBACK_UDP, Launch, SOON, back, command, connect, echo, front,
};

#[test]
fn readiness_is_one_write_and_then_the_pipe_is_closed() {
    let host = Namespace::new();
    // `ready` asserts both.
    let mut proxy = Launch::new(&host, LOOPBACK).start().ready();
    assert!(proxy.is_running());
}

#[test]
fn the_port_is_open_when_readiness_is_told() {
    let host = Namespace::new();
    let server = EchoServer::tcp(&host, back());
    for _ in 0..10 {
        let mut proxy = Launch::new(&host, LOOPBACK).start().ready();
        echo(&mut connect(&host, front()), b"at once");
        assert_eq!(proxy.stop(Signal::INT, SOON).code(), Some(0));
    }
    assert_eq!(server.served(), 10);
}

#[test]
fn a_busy_tcp_port_is_refused_with_the_name_of_its_holder() {
    let host = Namespace::new();
    let holder = Launch::new(&host, LOOPBACK).start().ready();
    let refusal = Launch::new(&host, LOOPBACK).start().refused();
    let expected =
        format!("port 8080/tcp on 127.0.0.1 is in use by docker-proxy (pid {})", holder.pid());
    assert_eq!(refusal.reason, expected);
    assert_eq!(refusal.stderr, format!("docker-proxy: error: {expected}\n"));
    assert_eq!(refusal.exit_code, Some(1));
}

#[test]
fn a_busy_udp_port_is_refused_with_the_name_of_its_holder() {
    let host = Namespace::new();
    // On another address, which overlaps all the same.
    let everywhere = LOOPBACK_UDP.replace("-host-ip 127.0.0.1", "-host-ip 0.0.0.0");
    let holder = Launch::new(&host, &everywhere).start().ready();
    let refusal = Launch::new(&host, LOOPBACK_UDP).start().refused();
    let expected =
        format!("port 8080/udp on 127.0.0.1 is in use by docker-proxy (pid {})", holder.pid());
    assert_eq!(refusal.reason, expected);
    assert_eq!(refusal.exit_code, Some(1));
}

#[test]
fn the_ipv4_and_the_ipv6_proxy_of_a_port_stand_side_by_side() {
    let host = Namespace::new();
    for protocol in ["tcp", "udp"] {
        let arguments = |ip| {
            format!(
                "-proto {protocol} -host-ip {ip} -host-port 8080 -container-ip 127.0.0.1 -container-port 9000"
            )
        };
        let _v4 = Launch::new(&host, &arguments("0.0.0.0")).start().ready();
        let _v6 = Launch::new(&host, &arguments("::")).start().ready();
    }
}

#[test]
fn an_address_that_the_host_does_not_have_is_named() {
    let host = Namespace::new();
    let elsewhere = LOOPBACK.replace("-host-ip 127.0.0.1", "-host-ip 192.0.2.77");
    let refusal = Launch::new(&host, &elsewhere).start().refused();
    assert_eq!(refusal.reason, "port 8080/tcp on 192.0.2.77: this host has no address 192.0.2.77");
    assert_eq!(refusal.exit_code, Some(1));
}

#[test]
fn sctp_is_refused_as_a_protocol_that_is_not_supported() {
    let host = Namespace::new();
    let refusal = Launch::new(&host, &LOOPBACK.replace("tcp", "sctp")).start().refused();
    assert_eq!(refusal.reason, "port 8080/sctp on 127.0.0.1: protocol not supported");
    assert_eq!(refusal.exit_code, Some(1));
}

#[test]
fn a_refused_start_leaves_the_port_free() {
    let host = Namespace::new();
    // The port is bound before the metrics address turns out to be somebody else's.
    let refusal = Launch::new(&host, LOOPBACK)
        .env("TIDEGATE_PROXY_METRICS", "192.0.2.1:9464")
        .start()
        .refused();
    assert!(refusal.reason.starts_with("metrics address 192.0.2.1:9464: "), "{}", refusal.reason);
    assert!(!host.is_bound(Protocol::Tcp, 8080));
}

#[test]
fn by_hand_it_runs_without_a_pipe() {
    let host = Namespace::new();
    let server = EchoServer::tcp(&host, back());
    let mut proxy = Process::spawn(&mut command(&host, LOOPBACK));
    host.wait_until_bound(Protocol::Tcp, 8080, SOON);
    echo(&mut connect(&host, front()), b"by hand");
    assert_eq!(proxy.stop(Signal::INT, SOON).code(), Some(0));
    assert_eq!(server.served(), 1);

    let _holder = host.run(|| UdpSocket::bind(FRONT)).unwrap();
    let mut proxy = Process::spawn(&mut command(&host, LOOPBACK_UDP));
    assert_eq!(proxy.wait(SOON).code(), Some(1));
    let text = proxy.wait_for_output(SOON);
    assert!(
        text.starts_with("docker-proxy: error: port 8080/udp on 127.0.0.1 is in use by "),
        "{text}"
    );
}

#[test]
fn a_daemon_that_has_gone_away_is_no_reason_to_fail() {
    let host = Namespace::new();
    let (mut proxy, status) = Launch::new(&host, LOOPBACK).start().unread();
    drop(status);
    host.wait_until_bound(Protocol::Tcp, 8080, SOON);
    assert!(proxy.is_running());
    assert_eq!(proxy.stop(Signal::TERM, SOON).code(), Some(0));
}

#[test]
fn a_regular_file_as_descriptor_3_is_left_alone() {
    let host = Namespace::new();
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(b"precious").unwrap();
    file.seek(SeekFrom::Start(0)).unwrap();
    let mut command = command(&host, LOOPBACK);
    pass_fd(&mut command, file.try_clone().unwrap().into(), 3);
    let mut proxy = Process::spawn(&mut command);
    host.wait_until_bound(Protocol::Tcp, 8080, SOON);
    assert_eq!(proxy.stop(Signal::TERM, SOON).code(), Some(0));
    let again = reopened(&file);
    assert_eq!(again, "precious");
}

#[test]
fn a_refusal_is_told_though_standard_error_cannot_be_written() {
    let host = Namespace::new();
    let shell = |arguments: &str| {
        let mut command = host.command("sh");
        let binary = env!("CARGO_BIN_EXE_docker-proxy");
        command.args(["-c", &format!("exec {binary} {arguments} 2>/dev/full")]);
        Launch::of(command)
    };
    let refusal = shell(&LOOPBACK.replace("tcp", "sctp")).start().refused();
    assert_eq!(refusal.reason, "port 8080/sctp on 127.0.0.1: protocol not supported");
    assert_eq!(refusal.exit_code, Some(1));
    let refusal = shell("-nonsense").start().refused();
    assert_eq!(refusal.reason, "flag provided but not defined: -nonsense");
    assert_eq!(refusal.exit_code, Some(2));
}

/// What the file holds, wherever its offset is.
fn reopened(file: &File) -> String {
    use std::os::fd::AsRawFd;
    fs::read_to_string(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap()
}
