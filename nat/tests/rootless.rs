//! Rootless operation: a user namespace, the device in a network namespace inside it, and the
//! sockets on the host.
//!
//! The test runs without the test harness, because creating a user namespace requires a
//! single-threaded process. As root, the test creates the host and the server, and runs itself in
//! the namespace of the host as the user nobody.

#[path = "common/mod.rs"]
mod common;

use std::net::{Shutdown, TcpStream, UdpSocket};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;
use tidegate_nat::{Nat, Policy, Settings, Tun, TunOptions};
use tidegate_netns::{Family, Namespace, become_root_of_a_user_namespace};
use tidegate_reactor::Descriptors;
use tidegate_testbed::server::{EchoServer, Sink, Source};
use tidegate_testbed::transfer::{self, Transfer};

const NOBODY: u32 = 65_534;
const BULK_BYTES: u64 = 200 << 20;
const AS_USER: &str = "--as-an-ordinary-user";

fn main() {
    if std::env::args().any(|argument| argument == AS_USER) {
        return as_an_ordinary_user();
    }
    if std::env::args().any(|argument| argument == "--list") {
        return;
    }
    let net = common::outside();
    let sink = Sink::tcp(&net.server, common::server(0, 7001), 3);
    let _source = Source::tcp(&net.server, common::server(1, 7002), 4, BULK_BYTES);
    let _echo = EchoServer::udp(&net.server, common::server(0, 7003));
    // The binary must be in a place that the user nobody can read.
    let program =
        std::env::temp_dir().join(format!("tidegate-nat-rootless-{}", std::process::id()));
    std::fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    let user = NOBODY.to_string();
    let mut command = net.host.command("setpriv");
    command.args(["--reuid", &user, "--regid", &user, "--clear-groups"]).arg(&program).arg(AS_USER);
    let output = command.stdin(Stdio::null()).stderr(Stdio::inherit()).output();
    std::fs::remove_file(&program).unwrap();
    let output = output.unwrap();
    assert!(
        output.status.success(),
        "{}: {}",
        output.status,
        String::from_utf8_lossy(&output.stdout)
    );
    assert_eq!(sink.wait(1, Duration::from_secs(5)), [Transfer::complete(BULK_BYTES)]);
    println!("rootless egress: ok");
}

fn as_an_ordinary_user() {
    assert!(!rustix::process::geteuid().is_root());
    become_root_of_a_user_namespace().expect("a user namespace");
    let host = Namespace::current().unwrap();
    let container = Namespace::create().unwrap();
    let tun = TunOptions {
        addresses: vec!["10.0.2.100/24".parse().unwrap(), "fd00::100/64".parse().unwrap()],
        default_routes: Family::ALL.to_vec(),
        ..TunOptions::new("tun0")
    };
    let tun = Tun::open(&container, &tun).unwrap();
    let mut settings = Settings::new(1500);
    settings.policy = Policy {
        gateways: common::GATEWAY.map(|ip| ip.parse().unwrap()).to_vec(),
        ..Policy::default()
    };
    let nat = Nat::start(settings, tun, &host, Arc::new(Descriptors::of_process(64))).unwrap();
    container
        .with(|| {
            let mut stream = TcpStream::connect(common::server(0, 7001)).unwrap();
            transfer::send(&mut stream, 3, BULK_BYTES).unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
            let mut stream = TcpStream::connect(common::server(1, 7002)).unwrap();
            assert_eq!(transfer::receive(&mut stream, 4), Transfer::complete(BULK_BYTES));
            let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
            socket.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
            socket.connect(common::server(0, 7003)).unwrap();
            socket.send(&[7; 9000]).unwrap();
            assert_eq!(socket.recv(&mut [0; 10_000]).unwrap(), 9000);
            let ping =
                Command::new("ping").args(["-n", "-c", "1", "-W", "3", common::SERVER[0]]).output();
            let ping = ping.unwrap();
            assert!(ping.status.success(), "{}", String::from_utf8_lossy(&ping.stdout));
        })
        .unwrap();
    nat.stop();
}
