//! A comparison with the real slirp4netns: callers must not see a difference.

use super::scene::{Scene, Slirp, ask};
use serde_json::Value;
use std::process::Stdio;
use tidegate_testbed::{find_program, require_program};

/// The path of the original.
fn theirs() -> String {
    require_program("slirp4netns");
    find_program("slirp4netns").unwrap().display().to_string()
}

#[test]
fn addresses_and_routes_are_the_same() {
    let scene = Scene::new();
    let seen = [theirs(), scene.ours()].map(|program| {
        let guest = scene.guest();
        let mut command = scene.as_nobody(&program);
        command.args(["-c", "--mtu=9000", "--cidr=10.77.0.0/16"]);
        let _slirp = Slirp::start(command, &guest);
        let words = |text: &str, names: &[&str]| -> Vec<String> {
            let words: Vec<&str> = text.split_whitespace().collect();
            let named = words.windows(2).filter(|pair| names.contains(&pair[0]));
            named.map(|pair| pair.join(" ")).collect()
        };
        let address = words(&guest.ip(&["-4", "-o", "addr", "show", "dev", "tap0"]), &["inet"]);
        let route = words(&guest.ip(&["-4", "route", "show", "default"]), &["via", "dev"]);
        let mtu = words(&guest.ip(&["-o", "link", "show", "tap0"]), &["mtu"]);
        let loopback = guest.ip(&["-o", "link", "show", "lo"]).contains("LOWER_UP");
        (address, route, mtu, loopback)
    });
    assert_eq!(seen[0], seen[1]);
    assert_eq!(seen[1].0, ["inet 10.77.0.100/16"]);
}

#[test]
fn api_responses_are_the_same() {
    let scene = Scene::new();
    let sockets = [("theirs", theirs()), ("ours", scene.ours())].map(|(name, program)| {
        let guest = scene.guest();
        let socket = scene.home(name);
        let mut command = scene.as_nobody(&program);
        command.args(["-c", "-a", &socket.display().to_string()]);
        (Slirp::start(command, &guest), guest, socket)
    });
    for request in [
        "garbage",
        "",
        "[]",
        "{}",
        r#"{"execute":"nonsense"}"#,
        // Without a protocol, slirp4netns 1.2 crashes.
        r#"{"execute":"add_hostfwd","arguments":{"proto":"sctp","host_port":PORT,"guest_port":80}}"#,
        r#"{"execute":"add_hostfwd","arguments":{"proto":"tcp","host_addr":"nowhere","host_port":PORT,"guest_port":80}}"#,
        r#"{"execute":"add_hostfwd","arguments":{"proto":"tcp","guest_port":80}}"#,
        r#"{"execute":"add_hostfwd","arguments":{"proto":"tcp","host_port":PORT}}"#,
        r#"{"execute":"add_hostfwd","arguments":{"proto":"tcp","host_port":PORT,"guest_addr":"nowhere","guest_port":80}}"#,
        r#"{"execute":"add_hostfwd","arguments":{"proto":"tcp","host_port":80,"guest_port":80}}"#,
        r#"{"execute":"add_hostfwd","arguments":{"proto":"tcp","host_port":PORT,"guest_port":80}}"#,
        r#"{"execute":"add_hostfwd","arguments":{"proto":"tcp","host_port":PORT,"guest_port":81}}"#,
        r#"{"execute":"add_hostfwd","arguments":{"proto":"udp","host_addr":"127.0.0.1","host_port":PORT,"guest_addr":"","guest_port":53}}"#,
        r#"{"execute":"remove_hostfwd","arguments":{}}"#,
        r#"{"execute":"remove_hostfwd","arguments":{"id":77}}"#,
        r#"{"execute":"list_hostfwd"}"#,
        r#"{"execute":"remove_hostfwd","arguments":{"id":1}}"#,
        r#"{"execute":"remove_hostfwd","arguments":{"id":1}}"#,
        r#"{"execute":"list_hostfwd"}"#,
    ] {
        let [theirs, ours] = [0, 1].map(|n| {
            // Both run on one host, so each has its own port.
            let request = request.replace("PORT", &(18_000 + n).to_string());
            let answer = ask(&sockets[n].2, &request).replace(&(18_000 + n).to_string(), "18000");
            serde_json::from_str::<Value>(&answer)
                .unwrap_or_else(|error| panic!("{request}: {answer}: {error}"))
        });
        if let Some(entries) = theirs.get("entries") {
            // 1.2 omits the outer object that its documentation has; our response has both.
            assert_eq!(ours.get("entries"), Some(entries), "{request}");
            assert_eq!(ours["return"]["entries"], *entries, "{request}");
        } else {
            assert_eq!(ours, theirs, "{request}");
        }
    }
}

#[test]
fn errors_have_the_same_exit_code() {
    let scene = Scene::new();
    for arguments in [
        &[][..],
        &["0"],
        &["words"],
        &["4194304"],
        &["--mtu=0", "4194304"],
        &["--mtu=65522", "4194304"],
        &["--cidr=10.0.2.0/26", "4194304"],
        &["--cidr=10.0.2.7/24", "4194304"],
        &["--cidr=fd00::/64", "4194304"],
        &["-r", "-1", "4194304"],
        &["-e", "x", "4194304"],
        &["--netns-type=path", "/no/such/path"],
        &["--netns-type=word", "4194304"],
        &["--target-type=word", "4194304"],
        &["--macaddress=02:00:00:00:00:01", "4194304"],
        &["-c", "--macaddress=02:00", "4194304"],
        &["--no-such-option", "4194304"],
        &["--help"],
        &["--version"],
    ] {
        let [theirs, ours] = [theirs(), scene.ours()].map(|program| {
            let output =
                scene.as_nobody(&program).args(arguments).stdin(Stdio::null()).output().unwrap();
            output.status.code()
        });
        assert_eq!(ours, theirs, "{arguments:?}");
    }
}
