//! What is said, and what is refused.

use super::scene::{OURS, Scene, one_line};
use rustix::pipe::{PipeFlags, pipe_with};
use std::process::{Command, Stdio};
use tidegate_testbed::pass_fd;

#[test]
fn help_and_version_are_what_callers_look_for() {
    let output = Command::new(OURS).arg("--help").output().unwrap();
    assert!(output.status.success() && output.stderr.is_empty());
    let help = String::from_utf8(output.stdout).unwrap();
    for word in [
        "--netns-type",
        "--enable-ipv6",
        "--cidr",
        "--api-socket",
        "--enable-sandbox",
        "--enable-seccomp",
    ] {
        assert!(help.contains(word), "{word}");
    }
    let output = Command::new(OURS).arg("-v").output().unwrap();
    let version = String::from_utf8(output.stdout).unwrap();
    assert!(version.starts_with("slirp4netns version ") && output.status.success(), "{version}");
    // Under its other name.
    let output =
        Command::new(env!("CARGO_BIN_EXE_tidegate")).args(["slirp4netns", "-v"]).output().unwrap();
    assert_eq!(String::from_utf8(output.stdout).unwrap(), version);
}

#[test]
fn what_cannot_be_served_is_refused_in_one_line() {
    let scene = Scene::new();
    let guest = scene.guest();
    let pid = guest.pid();
    for (arguments, words) in [
        (vec![], "PID or PATH is missing"),
        (vec!["4194304", "tap0"], "no process 4194304"),
        (vec!["--netns-type=path", "/run/no-such"], "no such namespace /run/no-such"),
        (vec!["--netns-type=path", "/etc/passwd"], "/etc/passwd is not a network namespace"),
        // Root's.
        (vec!["1"], "process 1"),
        (vec!["-c", "-e", "77", &pid], "--exit-fd 77: this descriptor is not open"),
        (vec!["-c", "-r", "78", &pid], "--ready-fd 78: this descriptor is not open"),
        (vec!["-c", "--mtu=70000", &pid], "--mtu \"70000\""),
        (vec!["-c", "--cidr=10.0.2.0/30", &pid], "--cidr \"10.0.2.0/30\""),
        (
            vec!["-c", "--outbound-addr=nosuch0", &pid],
            "--outbound-addr \"nosuch0\": No such device",
        ),
        (vec!["-c", "--api-socket=/proc/socket", &pid], "--api-socket \"/proc/socket\""),
        (vec!["-c", "--userns-path=/proc/1/ns/user", &pid], "--userns-path"),
        (vec!["-c", &pid, "a name"], "no name for an interface"),
        (vec!["-c", &pid, "averyveryverylong"], "no name for an interface"),
    ] {
        let told = scene.refused(&arguments);
        assert!(told.contains(words), "{arguments:?}: {told}");
    }
    // A taken name, of what is no idle TAP.
    guest.ip(&["link", "add", "tap0", "type", "veth", "peer", "name", "other"]);
    let told = scene.refused(&["-c", &pid, "tap0"]);
    assert!(told.contains("device \"tap0\": an interface of this name already exists"), "{told}");
    assert!(
        guest.ip(&["-o", "link"]).contains("veth") || guest.ip(&["-o", "link"]).contains("other"),
        "it stays"
    );
    let mut command = scene.as_nobody(&scene.ours());
    let output =
        command.args(["-c", &pid]).env("TIDEGATE_SLIRP_DEVICE", "bridge").output().unwrap();
    assert!(one_line(&output).contains("TIDEGATE_SLIRP_DEVICE=\"bridge\": use tun or tap"));
}

#[test]
fn a_ready_descriptor_that_nobody_reads_is_told() {
    let scene = Scene::new();
    let guest = scene.guest();
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).unwrap();
    drop(reader);
    let mut command = scene.as_nobody(&scene.ours());
    command.args(["-c", "-r", "9", &guest.pid()]).stdin(Stdio::null());
    pass_fd(&mut command, writer, 9);
    let told = one_line(&command.output().unwrap());
    assert!(told.contains("--ready-fd 9: Broken pipe"), "{told}");
}

#[test]
fn a_host_without_tun_devices_is_told_what_to_do() {
    let scene = Scene::with(|mounts, _| mounts.tmpfs("/dev/net"));
    let guest = scene.guest();
    let told = scene.refused(&["-c", &guest.pid()]);
    assert!(
        told.contains("open /dev/net/tun: No such file or directory")
            && told.contains("module tun"),
        "{told}"
    );
}

#[test]
fn a_host_without_user_namespaces_has_no_sandbox() {
    let scene = Scene::new();
    // In a user namespace of its own, where there may be no more of them, and no privileges.
    let script = "unshare --user --map-root-user --net sleep 60 & \
                  while [ \"$(cat /proc/$!/comm)\" != sleep ]; do sleep 0.01; done; \
                  echo 0 >/proc/sys/user/max_user_namespaces; \
                  setpriv --bounding-set=-all --inh-caps=-all \"$0\" -c --enable-sandbox $!; code=$?; kill $!; exit $code";
    let mut command = scene.as_nobody("unshare");
    command
        .args(["--user", "--map-root-user", "sh", "-c", script, &scene.ours()])
        .stdin(Stdio::null());
    let told = one_line(&command.output().unwrap());
    assert!(told.contains("--enable-sandbox: create a user namespace: "), "{told}");
    assert!(told.contains("user.max_user_namespaces"), "{told}");
}
