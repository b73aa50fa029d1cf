//! What an attacker can do after taking over the proxy, tried from inside of it.

#![cfg(target_arch = "x86_64")]

use crate::driver::{LOOPBACK, LOOPBACK_UDP, Launch, back, connect, echo, front};
use tidegate_testbed::Namespace;
use tidegate_testbed::puppet::assert_confined_to_forwarding;
use tidegate_testbed::server::EchoServer;

#[test]
fn the_proxy_can_only_forward() {
    let host = Namespace::new();
    let _server = EchoServer::tcp(&host, back());
    let proxy = Launch::new(&host, LOOPBACK).start().ready();
    assert_confined_to_forwarding(proxy.pid(), 9000);
    echo(&mut connect(&host, front()), b"still there");
    drop(proxy);
    let proxy = Launch::new(&host, LOOPBACK_UDP)
        .env("TIDEGATE_PROXY_METRICS", "127.0.0.1:9464")
        .start()
        .ready();
    assert_confined_to_forwarding(proxy.pid(), 9000);
}
