//! The real podman without root.

use super::rootlesskit::{get, scene};
use super::scene::{NOBODY, SOON, Scene};
use std::fs;
use std::os::unix::fs::{chown, symlink};
use std::time::Duration;
use tidegate_testbed::server::PeerServer;
use tidegate_testbed::{Process, addr, eventually, find_program, require_program};

/// podman creates containers slowly with a cold cache.
const TIMEOUT: Duration = Duration::from_secs(90);

/// Runs `script` as nobody in a PID namespace, so that no process of podman outlives it.
#[track_caller]
fn run(scene: &Scene, script: &str) -> Process {
    for program in ["podman", "runc", "conmon", "unshare", "docker-init"] {
        require_program(program);
    }
    let rootfs = scene.path("rootfs");
    for directory in ["bin", "proc", "sys", "dev", "etc", "tmp", "run"] {
        fs::create_dir_all(rootfs.join(directory)).unwrap();
        chown(rootfs.join(directory), Some(NOBODY), Some(NOBODY)).unwrap();
    }
    chown(&rootfs, Some(NOBODY), Some(NOBODY)).unwrap();
    fs::copy(find_program("busybox").unwrap(), rootfs.join("bin/busybox")).unwrap();
    for applet in ["sh", "cat", "ip", "nc", "httpd", "sleep", "echo", "udhcpc"] {
        symlink("busybox", rootfs.join("bin").join(applet)).unwrap();
    }
    fs::write(rootfs.join("page"), "behind podman").unwrap();
    let configuration = format!(
        r#"
[containers]
default_ulimits = []
log_driver = "k8s-file"
[network]
network_backend = "netavark"
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "runc"
helper_binaries_dir = ["{}", "/usr/lib/podman", "/usr/bin"]
network_cmd_path = "{}"
"#,
        scene.path("bin").display(),
        scene.ours()
    );
    fs::write(scene.path("containers.conf"), configuration).unwrap();
    let script = format!(
        "cd; mkdir -p -m 700 \"$XDG_RUNTIME_DIR\"\n\
         podman() {{ command podman --storage-driver vfs --log-level error \"$@\"; }}\n\
         R={}\n{script}",
        rootfs.display()
    );
    let user = NOBODY.to_string();
    let mut command = scene.as_root("unshare");
    command.args(["--pid", "--fork", "--kill-child", "--mount-proc", "docker-init", "--"]);
    command.args([
        "setpriv",
        "--reuid",
        &user,
        "--regid",
        &user,
        "--clear-groups",
        "bash",
        "-ec",
        &script,
    ]);
    let path = std::env::var("PATH").unwrap_or_default();
    command.env("PATH", format!("{path}:/usr/sbin:/sbin")).env("HOME", scene.home(""));
    command.env("XDG_RUNTIME_DIR", scene.home("r"));
    command.env("CONTAINERS_CONF", scene.path("containers.conf"));
    for name in ["DBUS_SESSION_BUS_ADDRESS", "CONTAINER_HOST"] {
        command.env_remove(name);
    }
    Process::spawn(&mut command)
}

#[test]
fn containers_have_egress_and_exit() {
    let scene = scene();
    scene.resolvers("nameserver 203.0.113.9\n");
    let _server = PeerServer::tcp(&scene.net.client, (addr::CLIENT_V4, 7000).into());
    let script = r#"
podman run --rm --network slirp4netns --rootfs "$R" sh -c '
  ip addr show tap0; ip route; cat /etc/resolv.conf; nc 203.0.113.9 7000 </dev/null'
podman run --rm --network slirp4netns:allow_host_loopback=true,cidr=10.9.8.0/24,enable_ipv6=false,mtu=1400,outbound_addr=203.0.113.1 \
  --rootfs "$R" sh -c 'ip addr show tap0; nc 203.0.113.9 7000 </dev/null'
# It ends with the container.
for try in $(seq 100); do
  left=$(cat /proc/[0-9]*/comm 2>/dev/null | grep -c slirp4netns) || true
  [ "$left" = 0 ] && break
  sleep 0.1
done
echo "left: $left"
"#;
    let mut podman = run(&scene, script);
    let status = podman.wait(TIMEOUT);
    let output = podman.wait_for_output(SOON);
    assert!(status.success(), "{output}");
    for words in [
        "inet 10.0.2.100/24",
        "mtu 65520",
        "default via 10.0.2.2 dev tap0",
        "nameserver 10.0.2.3",
        "inet6 fd00::",
        "inet 10.9.8.100/24",
        "mtu 1400",
        "left: 0",
    ] {
        assert!(output.contains(words), "{words}: {output}");
    }
    assert_eq!(output.matches("\n203.0.113.1:").count(), 2, "{output}");
}

#[test]
fn published_ports_reach_containers_by_either_handler() {
    let scene = scene();
    let script = r#"
podman run -d --name one -p 8080:80 --network slirp4netns:port_handler=slirp4netns --rootfs "$R" httpd -f -p 80 -h /
podman run -d --name two -p 8081:80 --network slirp4netns --rootfs "$R" httpd -f -p 80 -h /
echo published
until [ -e "$HOME/enough" ]; do sleep 0.1; done
podman stop -t 0 one two >/dev/null
echo stopped
"#;
    let mut podman = run(&scene, script);
    podman.wait_for_line("published", TIMEOUT);
    for port in [8080, 8081] {
        for (from, to) in
            [(&scene.net.client, addr::HOST_V4), (&scene.net.host, std::net::Ipv4Addr::LOCALHOST)]
        {
            let answered = eventually(SOON, || {
                get(from, (to, port)).is_some_and(|page| page.ends_with("behind podman"))
            });
            assert!(answered, "{to}:{port}: {}", podman.output());
        }
    }
    fs::write(scene.home("enough"), "").unwrap();
    podman.wait_for_line("stopped", TIMEOUT);
    assert!(podman.wait(TIMEOUT).success());
    assert_eq!(get(&scene.net.client, (addr::HOST_V4, 8080)), None, "{}", podman.output());
}
