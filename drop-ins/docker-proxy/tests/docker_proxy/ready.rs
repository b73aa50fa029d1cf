//! Descriptor 3: the report of readiness or failure.

use std::fs::{self, File};
use std::io::{Seek, SeekFrom, Write};
use std::net::UdpSocket;

use tidegate_testbed::server::EchoServer;
use tidegate_testbed::{Namespace, Process, Protocol, Signal, pass_fd};

use crate::driver::{
    FRONT, LOOPBACK, LOOPBACK_UDP, Launch, SOON, back, command, connect, echo, front,
};

#[test]
fn readiness_is_one_write_followed_by_the_close_of_the_pipe() {
    let host = Namespace::new();
    // `ready` asserts both.
    let mut proxy = Launch::new(&host, LOOPBACK).start().ready();
    assert!(proxy.is_running());
}

#[test]
fn the_port_is_open_when_readiness_is_reported() {
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
fn a_tcp_port_in_use_is_rejected_with_the_name_of_its_holder() {
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
fn a_udp_port_in_use_is_rejected_with_the_name_of_its_holder() {
    let host = Namespace::new();
    // The port is in use on an overlapping address.
    let everywhere = LOOPBACK_UDP.replace("-host-ip 127.0.0.1", "-host-ip 0.0.0.0");
    let holder = Launch::new(&host, &everywhere).start().ready();
    let refusal = Launch::new(&host, LOOPBACK_UDP).start().refused();
    let expected =
        format!("port 8080/udp on 127.0.0.1 is in use by docker-proxy (pid {})", holder.pid());
    assert_eq!(refusal.reason, expected);
    assert_eq!(refusal.exit_code, Some(1));
}

#[test]
fn the_ipv4_and_the_ipv6_proxy_of_a_port_coexist() {
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
fn a_foreign_address_is_named() {
    let host = Namespace::new();
    let elsewhere = LOOPBACK.replace("-host-ip 127.0.0.1", "-host-ip 192.0.2.77");
    let refusal = Launch::new(&host, &elsewhere).start().refused();
    assert_eq!(refusal.reason, "port 8080/tcp on 192.0.2.77: this host has no address 192.0.2.77");
    assert_eq!(refusal.exit_code, Some(1));
}

#[test]
fn sctp_is_rejected_as_unsupported() {
    let host = Namespace::new();
    let refusal = Launch::new(&host, &LOOPBACK.replace("tcp", "sctp")).start().refused();
    assert_eq!(refusal.reason, "port 8080/sctp on 127.0.0.1: protocol not supported");
    assert_eq!(refusal.exit_code, Some(1));
}

#[test]
fn a_failed_start_releases_the_port() {
    let host = Namespace::new();
    // The port is bound before the metrics address is found to be foreign.
    let refusal = Launch::new(&host, LOOPBACK)
        .env("TIDEGATE_PROXY_METRICS", "192.0.2.1:9464")
        .start()
        .refused();
    assert!(refusal.reason.starts_with("metrics address 192.0.2.1:9464: "), "{}", refusal.reason);
    assert!(!host.is_bound(Protocol::Tcp, 8080));
}

#[test]
fn without_a_pipe_it_runs() {
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
fn a_closed_pipe_is_not_an_error() {
    let host = Namespace::new();
    let (mut proxy, status) = Launch::new(&host, LOOPBACK).start().unread();
    drop(status);
    host.wait_until_bound(Protocol::Tcp, 8080, SOON);
    assert!(proxy.is_running());
    assert_eq!(proxy.stop(Signal::TERM, SOON).code(), Some(0));
}

#[test]
fn a_regular_file_as_descriptor_3_is_ignored() {
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
fn a_failure_is_reported_even_if_standard_error_cannot_be_written() {
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

/// The content of the file from its beginning.
fn reopened(file: &File) -> String {
    use std::os::fd::AsRawFd;
    fs::read_to_string(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap()
}
