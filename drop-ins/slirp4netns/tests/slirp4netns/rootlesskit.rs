//! The real rootlesskit with each of its port drivers for slirp4netns.

use super::scene::{SOON, Scene};
use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;
use tidegate_testbed::server::PeerServer;
use tidegate_testbed::{Namespace, Process, Signal, addr, eventually, require_program};

/// A scene with subordinate uids and gids for its user.
pub(crate) fn scene() -> Scene {
    for program in ["newuidmap", "newgidmap", "busybox", "socat"] {
        require_program(program);
    }
    Scene::with(|mounts, directory| {
        let ranges = directory.join("ranges");
        fs::write(&ranges, "nobody:100000:65536\n").unwrap();
        mounts.bind(&ranges, "/etc/subuid").bind(&ranges, "/etc/subgid")
    })
}

/// The response of a web server.
pub(crate) fn get(from: &Namespace, to: impl Into<SocketAddr>) -> Option<String> {
    let to = to.into();
    from.run(|| {
        let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(2)).ok()?;
        stream.set_read_timeout(Some(SOON)).ok()?;
        stream.write_all(b"GET /page HTTP/1.0\r\n\r\n").ok()?;
        let mut text = String::new();
        stream.read_to_string(&mut text).ok()?;
        Some(text)
    })
}

fn works_with(driver: &str) {
    require_program("rootlesskit");
    let scene = scene();
    scene.resolvers("nameserver 203.0.113.9\n");
    fs::write(scene.path("page"), "behind rootlesskit").unwrap();
    let _server = PeerServer::tcp(&scene.net.client, (addr::CLIENT_V4, 7000).into());
    let script = format!(
        "cat /etc/resolv.conf; ip -o addr show dev tap0; ip route; \
         socat -u TCP4:{}:7000 -; ping -n -c 1 -W 5 {}; exec busybox httpd -f -p 80 -h {}",
        addr::CLIENT_V4,
        addr::CLIENT_V4,
        scene.path("").display(),
    );
    let mut command = scene.as_nobody("rootlesskit");
    command.args(["--net=slirp4netns", "--slirp4netns-binary", &scene.ours()]);
    command.args(["--slirp4netns-sandbox=true", "--slirp4netns-seccomp=true", "--mtu=65520"]);
    command.args(["--disable-host-loopback", "--copy-up=/etc", "--port-driver", driver]);
    command.args(["--publish", "0.0.0.0:18080:80/tcp", "sh", "-ec", &script]);
    let mut rootlesskit = Process::spawn(&mut command);
    rootlesskit.wait_for_line("203.0.113.1:", SOON);
    rootlesskit.wait_for_line("1 received", SOON);
    let output = rootlesskit.output();
    for words in ["nameserver 10.0.2.3", "inet 10.0.2.100/24", "default via 10.0.2.2 dev tap0"] {
        assert!(output.contains(words), "{words}: {output}");
    }
    for (from, to) in
        [(&scene.net.client, addr::HOST_V4), (&scene.net.host, std::net::Ipv4Addr::LOCALHOST)]
    {
        let answered = eventually(SOON, || {
            get(from, (to, 18080)).is_some_and(|page| page.ends_with("behind rootlesskit"))
        });
        assert!(answered, "{driver}: {to}: {}", rootlesskit.output());
    }
    // On its exit, rootlesskit kills its slirp4netns with SIGKILL.
    rootlesskit.stop(Signal::TERM, SOON);
    assert!(!rootlesskit.output().contains("panicked"), "{}", rootlesskit.output());
}

#[test]
fn it_works_with_the_builtin_port_driver() {
    works_with("builtin");
}

#[test]
fn it_works_with_the_port_driver_of_slirp4netns() {
    works_with("slirp4netns");
}
