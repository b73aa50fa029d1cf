//! `tidegate up` with a real kernel: reachability, and cleanup after any kind of end.

mod up {
    pub(crate) mod attacks;
    pub(crate) mod egress;
    pub(crate) mod firewall;
    pub(crate) mod floods;
    pub(crate) mod ingress;
    pub(crate) mod knocking;
    pub(crate) mod matrix;
    pub(crate) mod names;
    pub(crate) mod nat_publish;
    pub(crate) mod ownerless;
    pub(crate) mod planted;
    pub(crate) mod privileges;
    pub(crate) mod repairs;
    pub(crate) mod rootless;
    pub(crate) mod scene;
    pub(crate) mod spoofing;
    pub(crate) mod uplink;
    pub(crate) mod vpn;
    pub(crate) mod witness;
}

use std::fs;
use std::time::Duration;
use tidegate_testbed::{Namespace, Signal, eventually};
use up::scene::{Scene, TIDEGATE, refused, service_namespace, state};

const SOON: Duration = Duration::from_secs(10);

/// Two services on two networks, one of them internal, one port published.
const HELLO: &str = r#"
name: demo
networks:
  front: { enable_ipv6: true }
  back: { internal: true }
services:
  web:
    command: TIDEGATE hello --listen [::]:80
    networks: [ front, back ]
    ports: [ "8080:80" ]
    depends_on: [ db ]
  db:
    command: TIDEGATE hello --listen 0.0.0.0:80
    networks: { back: { aliases: [ sql ] } }
"#;

#[test]
fn a_project_serves_its_port_and_leaves_no_state_behind() {
    let scene = Scene::new();
    let before = state(&scene.net.host);
    let mut up = scene.up(&HELLO.replace("TIDEGATE", TIDEGATE));
    up.wait_for_line("Ctrl-C takes all of it down again.", SOON);
    let printed = up.output();
    assert!(printed.contains("0.0.0.0:8080/tcp->80, [::]:8080/tcp->80"), "{printed}");
    for url in ["http://203.0.113.1:8080/", "http://[2001:db8:1::1]:8080/"] {
        let answer = scene.net.client.exec("curl", &["-sS", "--max-time", "5", url]);
        assert!(
            answer.contains("203.0.113.9") || answer.contains("2001:db8:1::9"),
            "the client's address: {answer}"
        );
    }
    up.stop(Signal::INT, SOON);
    assert_eq!(state(&scene.net.host), before);
    assert!(!scene.run.path().join("projects/demo").exists());
    assert!(!scene.socket().exists() && !scene.socket().with_extension("sock.lock").exists());
}

#[test]
fn hangup_quit_and_terminate_signals_take_the_project_down() {
    let scene = Scene::new();
    let before = state(&scene.net.host);
    for signal in [Signal::HUP, Signal::QUIT, Signal::TERM] {
        let mut up = scene.up(&HELLO.replace("TIDEGATE", TIDEGATE));
        up.wait_for_line("Ctrl-C takes all of it down again.", SOON);
        assert!(up.stop(signal, SOON).success(), "{signal:?}");
        assert_eq!(state(&scene.net.host), before, "{signal:?}");
    }
}

/// The signal arrives while a hundred services are started.
#[test]
fn a_signal_during_the_start_ends_it_and_leaves_no_state_behind() {
    let scene = Scene::new();
    let before = state(&scene.net.host);
    let services: String =
        (0..100).map(|number| format!("  s{number}: {{ command: [ sleep, '60' ] }}\n")).collect();
    let mut up = scene.up(&format!("name: demo\nservices:\n{services}"));
    assert!(eventually(SOON, || state(&scene.net.host) != before));
    assert!(up.stop(Signal::INT, SOON).success());
    assert_eq!(state(&scene.net.host), before);
    assert!(!scene.run.path().join("projects/demo").exists());
}

/// Standard output is a full pipe without a reader.
#[test]
fn a_blocked_standard_output_blocks_neither_service_nor_shutdown() {
    let scene = Scene::new();
    let before = state(&scene.net.host);
    let (read, write) = rustix::pipe::pipe().unwrap();
    rustix::io::ioctl_fionbio(&write, true).unwrap();
    while rustix::io::write(&write, &[b'x'; 4096]).is_ok() {}
    rustix::io::ioctl_fionbio(&write, false).unwrap();
    let mut command = scene.command(&HELLO.replace("TIDEGATE", TIDEGATE));
    let mut up = command.stdout(write).stderr(std::process::Stdio::null()).spawn().unwrap();
    drop(command);
    let answers = || {
        let mut curl = scene.net.client.command("curl");
        curl.args(["-sS", "--max-time", "1", "http://203.0.113.1:8080/"])
            .output()
            .unwrap()
            .status
            .success()
    };
    assert!(eventually(SOON, answers));
    assert!(eventually(SOON, || scene.tidegate().arg("ps").output().unwrap().status.success()));
    let pid = rustix::process::Pid::from_child(&up);
    rustix::process::kill_process(pid, Signal::INT).unwrap();
    let ended = || up.try_wait().unwrap().is_some();
    assert!(eventually(SOON, ended));
    drop(read);
    assert_eq!(state(&scene.net.host), before);
}

#[test]
fn the_next_instance_rolls_back_a_killed_one() {
    let scene = Scene::new();
    let before = state(&scene.net.host);
    let mut up = scene.up(&HELLO.replace("TIDEGATE", TIDEGATE));
    up.wait_for_line("Ctrl-C takes", SOON);
    up.signal(Signal::KILL);
    up.wait(SOON);
    assert_ne!(state(&scene.net.host), before, "a killed process cannot roll back");
    let mut next = scene.up(&HELLO.replace("TIDEGATE", TIDEGATE));
    next.wait_for_line("Ctrl-C takes", SOON);
    next.stop(Signal::TERM, SOON);
    assert_eq!(state(&scene.net.host), before);
}

#[test]
fn the_error_of_a_second_instance_names_the_first() {
    let scene = Scene::new();
    let up = scene.up(&HELLO.replace("TIDEGATE", TIDEGATE));
    up.wait_for_line("Ctrl-C takes", SOON);
    let pid = up.pid();
    let socket = scene.socket();
    assert_eq!(
        scene.refused(&HELLO.replace("TIDEGATE", TIDEGATE)),
        format!(
            "tidegate: error: tidegate is up already (process {pid}, socket {}); stop that one, or set TIDEGATE_SOCKET to another path\n",
            socket.display()
        )
    );
    let mut again = scene.command(&HELLO.replace("TIDEGATE", TIDEGATE));
    assert_eq!(
        refused(again.env("TIDEGATE_SOCKET", socket.with_extension("other"))),
        format!(
            "tidegate: error: project \"demo\" is up already (process {pid}); stop that one, or choose another name\n"
        )
    );
    assert!(!socket.with_extension("other").exists() && socket.exists());
}

#[test]
fn objects_removed_by_other_software_are_restored() {
    assert_restored("none", "1");
}

#[test]
fn objects_removed_by_other_software_are_restored_with_a_firewall() {
    assert_restored("nftables", "1");
    assert_restored("iptables", "1");
}

/// Flushes policy rules as systemd-networkd does, and sets `ip_forward` as Docker does. `forwards`
/// is the expected forwarding sysctl of the bridge.
#[track_caller]
fn assert_restored(firewall: &str, forwards: &str) {
    let scene = Scene::new();
    let before = state(&scene.net.host);
    let mut up =
        scene.up_with(&HELLO.replace("TIDEGATE", TIDEGATE), &[&format!("--firewall={firewall}")]);
    up.wait_for_line("Ctrl-C takes", SOON);
    let ours = state(&scene.net.host);
    let bridge = ours
        .lines()
        .find_map(|line| Some(line.split_once("tg-front-")?.1.split_once(' ')?.0))
        .unwrap();
    let bridge = format!("tg-front-{bridge}");
    let forwarding = format!("net.ipv4.conf.{bridge}.forwarding");
    let whole =
        || state(&scene.net.host) == ours && scene.net.host.read_sysctl(&forwarding) == forwards;
    assert!(whole());
    for flush in ["rule flush", "-6 rule flush"] {
        scene.net.host.ip_all(flush);
        // The host's own rules, without which it has no network.
        let family = if flush.starts_with("-6") { "-6 " } else { "" };
        scene.net.host.ip_all(&format!("{family}rule add from all lookup main pref 32766"));
        if family.is_empty() {
            scene.net.host.ip_all("rule add from all lookup default pref 32767");
        }
        assert!(
            eventually(SOON, whole),
            "{flush}:\n{}\ninstead of\n{ours}",
            state(&scene.net.host)
        );
    }
    // With a firewall, uplinks are configured differently while the host forwards.
    if firewall == "none" {
        scene.net.host.sysctl("net.ipv4.ip_forward", "1");
        assert!(eventually(SOON, whole), "forwarding");
        scene.net.host.sysctl("net.ipv4.ip_forward", "0");
    }
    scene.net.host.ip_all(&format!("link delete {bridge}"));
    let answers = || {
        let answer = scene
            .net
            .client
            .command("curl")
            .args(["-sS", "--max-time", "1", "http://203.0.113.1:8080/"])
            .output();
        answer.unwrap().status.success()
    };
    let neighbours = || {
        // `ip` fails if the kernel deletes the bridge between two requests.
        let links =
            scene.net.host.command("ip").args(["-o", "link", "show", "master", &bridge]).output();
        String::from_utf8_lossy(&links.unwrap().stdout).lines().count() == 1
    };
    assert!(
        eventually(SOON, || scene.net.host.exec("ip", &["-o", "link"]).contains(&bridge)
            && neighbours()),
        "the bridge"
    );
    assert!(answers());
    // The new bridge has another interface index. Its members still have access at the gateway.
    let gateway = scene.net.host.ip(&["-4", "-o", "addr", "show", "dev", &bridge]);
    let gateway = gateway.split_whitespace().nth(3).and_then(|net| net.split('/').next()).unwrap();
    let web = service_namespace(&up, "web");
    let url = format!("http://{gateway}:8080/");
    let is_served = || {
        let mut curl = web.command("curl");
        curl.args(["-sS", "--max-time", "1", &url]).output().unwrap().status.success()
    };
    assert!(eventually(SOON, is_served), "at the gateway");
    assert!(!up.output().contains("ERROR"), "{}", up.output());
    up.stop(Signal::INT, SOON);
    assert_eq!(state(&scene.net.host), before);
}

#[test]
fn an_error_has_one_line_and_leaves_the_host_unchanged() {
    let scene = Scene::new();
    scene.net.host.ip_all("route add 10.66.3.128/25 via 203.0.113.9");
    let _holder = scene.net.host.run(|| std::net::TcpListener::bind("0.0.0.0:8080")).unwrap();
    let adopted = Namespace::new();
    let before = state(&scene.net.host);
    let service =
        |more: &str| format!("name: demo\nservices: {{ web: {{ command: 'true'{more} }} }}\n");
    let subnet = "networks: { default: { ipam: { config: [ { subnet: 10.66.3.0/24 } ] } } }\n";
    for (file, error) in [
        (
            service(", ports: [ '8080:80' ]"),
            "service \"web\": port 8080/tcp on 0.0.0.0 is in use by ",
        ),
        (
            service("") + subnet,
            "network \"default\": subnet 10.66.3.0/24 overlaps 10.66.3.128/25, which the host reaches through \"eth0\"; choose another subnet",
        ),
        (
            service(", x-netns: /nowhere").replace("command: 'true', ", ""),
            "service \"web\": no such namespace /nowhere",
        ),
        (
            service(", x-netns: /proc/self/ns/net").replace("command: 'true', ", ""),
            "endpoint \"web\": its network namespace is the host's own; use the namespace of a container",
        ),
        (
            format!(
                "name: demo\nservices: {{ a: {{ x-netns: {0} }}, b: {{ x-netns: {0} }} }}\n",
                adopted.path().display()
            ),
            "services \"a\" and \"b\" are in the same namespace, net:[",
        ),
        (service("").replace("'true'", "/no/such/program"), "web"),
        (service(", image: nginx"), "compose.yaml:"),
    ] {
        let printed = scene.refused(&file);
        assert!(printed.starts_with("tidegate: error: ") && printed.contains(error), "{printed}");
        assert_eq!(printed.lines().count(), 1, "{printed}");
        assert_eq!(state(&scene.net.host), before, "{printed}");
    }
}

#[test]
fn the_state_of_an_adopted_namespace_is_restored_at_the_end() {
    let scene = Scene::new();
    let (adopted, before) = (Namespace::new(), state(&scene.net.host));
    let inside = state(&adopted);
    let file = format!(
        "name: demo\nservices: {{ box: {{ x-netns: {}, ports: [ '8080:80' ] }} }}\n",
        adopted.path().display()
    );
    let mut up = scene.up(&file);
    up.wait_for_line("Ctrl-C takes", SOON);
    assert!(state(&adopted).contains("eth0"));
    up.stop(Signal::INT, SOON);
    assert!(eventually(SOON, || state(&adopted) == inside));
    assert_eq!(state(&scene.net.host), before);
}

#[test]
fn the_exit_status_reflects_that_of_the_services() {
    let scene = Scene::new();
    let file = |code: u8| {
        format!(
            "name: demo\nservices: {{ job: {{ command: [ sh, -c, 'echo done; exit {code}' ] }} }}\n"
        )
    };
    for code in [0, 3] {
        let mut up = scene.up(&file(code));
        assert_eq!(up.wait(SOON).success(), code == 0);
        assert!(up.wait_for_output(SOON).contains("| done"));
    }
}

#[test]
fn the_example_works() {
    let text = fs::read_to_string("examples/hello/compose.yaml").unwrap();
    let scene = Scene::new();
    let up = scene.up(&text.replace("tidegate hello", &format!("{TIDEGATE} hello")));
    up.wait_for_line("Ctrl-C takes", SOON);
    // The service may not listen yet.
    let answers = || {
        let mut curl = scene.net.client.command("curl");
        let output =
            curl.args(["-sS", "--max-time", "5", "http://203.0.113.1:8080/"]).output().unwrap();
        String::from_utf8_lossy(&output.stdout).contains("203.0.113.9")
    };
    assert!(eventually(SOON, answers), "{}", up.output());
}
