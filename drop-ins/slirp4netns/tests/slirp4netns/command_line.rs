//! Output and errors of the command line.

use super::scene::{OURS, Scene, one_line};
use rustix::pipe::{PipeFlags, pipe_with};
use std::process::{Command, Stdio};
use tidegate_testbed::pass_fd;

#[test]
fn help_and_version_contain_what_callers_search_for() {
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
    // As a subcommand of tidegate.
    let output = Command::new(tidegate_testbed::workspace_program("tidegate"))
        .args(["slirp4netns", "-v"])
        .output()
        .unwrap();
    assert_eq!(String::from_utf8(output.stdout).unwrap(), version);
}

#[test]
fn invalid_options_and_targets_are_rejected_in_one_line() {
    let scene = Scene::new();
    let guest = scene.guest();
    let pid = guest.pid();
    for (arguments, words) in [
        (vec![], "PID or PATH is missing"),
        (vec!["4194304", "tap0"], "no process 4194304"),
        (vec!["--netns-type=path", "/run/no-such"], "no such namespace /run/no-such"),
        (vec!["--netns-type=path", "/etc/passwd"], "/etc/passwd is not a network namespace"),
        // A process of root.
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
        (vec!["-c", &pid, "a name"], "is not a valid interface name"),
        (vec!["-c", &pid, "averyveryverylong"], "is not a valid interface name"),
    ] {
        let error = scene.refused(&arguments);
        assert!(error.contains(words), "{arguments:?}: {error}");
    }
    // The name is taken by an interface that is not an idle TAP.
    guest.ip(&["link", "add", "tap0", "type", "veth", "peer", "name", "other"]);
    let error = scene.refused(&["-c", &pid, "tap0"]);
    assert!(error.contains("device \"tap0\": an interface of this name already exists"), "{error}");
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
fn a_closed_ready_descriptor_is_an_error() {
    let scene = Scene::new();
    let guest = scene.guest();
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).unwrap();
    drop(reader);
    let mut command = scene.as_nobody(&scene.ours());
    command.args(["-c", "-r", "9", &guest.pid()]).stdin(Stdio::null());
    pass_fd(&mut command, writer, 9);
    let error = one_line(&command.output().unwrap());
    assert!(error.contains("--ready-fd 9: Broken pipe"), "{error}");
}

#[test]
fn without_tun_devices_the_error_contains_the_remedy() {
    let scene = Scene::with(|mounts, _| mounts.tmpfs("/dev/net"));
    let guest = scene.guest();
    let error = scene.refused(&["-c", &guest.pid()]);
    assert!(
        error.contains("open /dev/net/tun: No such file or directory")
            && error.contains("module tun"),
        "{error}"
    );
}

#[test]
fn without_user_namespaces_the_sandbox_is_an_error() {
    let scene = Scene::new();
    // In a user namespace that permits no nested ones, and without capabilities.
    let script = "unshare --user --map-root-user --net sleep 60 & \
                  while [ \"$(cat /proc/$!/comm)\" != sleep ]; do sleep 0.01; done; \
                  echo 0 >/proc/sys/user/max_user_namespaces; \
                  setpriv --bounding-set=-all --inh-caps=-all \"$0\" -c --enable-sandbox $!; code=$?; kill $!; exit $code";
    let mut command = scene.as_nobody("unshare");
    command
        .args(["--user", "--map-root-user", "sh", "-c", script, &scene.ours()])
        .stdin(Stdio::null());
    let error = one_line(&command.output().unwrap());
    assert!(error.contains("--enable-sandbox: create a user namespace: "), "{error}");
    assert!(error.contains("user.max_user_namespaces"), "{error}");
}
