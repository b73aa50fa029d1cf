use super::*;

/// Forwards ports up to 9000, and records all requests.
#[derive(Default)]
struct Recorder {
    added: Vec<PortForward>,
    removed: Vec<usize>,
}

impl Forwarder for Recorder {
    type Id = usize;

    fn add(&mut self, port: PortForward) -> Option<usize> {
        self.added.push(port);
        (port.host.port() <= 9000).then_some(self.added.len())
    }

    fn remove(&mut self, id: usize) -> bool {
        self.removed.push(id);
        true
    }
}

fn forwards() -> Forwards<Recorder> {
    Forwards::new(Recorder::default(), "10.0.2.100".parse().unwrap())
}

fn answer(forwards: &mut Forwards<Recorder>, request: &str) -> Value {
    serde_json::from_str(&forwards.answer(request.as_bytes())).unwrap()
}

#[test]
fn ports_are_added_listed_and_removed() {
    let mut forwards = forwards();
    let podman = r#"{"execute":"add_hostfwd","arguments":{"proto":"tcp","host_addr":"0.0.0.0","host_port":8080,"guest_addr":"","guest_port":80}}
"#;
    assert_eq!(answer(&mut forwards, podman), json!({"return": {"id": 1}}));
    let short =
        r#"{"execute":"add_hostfwd","arguments":{"proto":"udp","host_port":53,"guest_port":5353}}"#;
    assert_eq!(answer(&mut forwards, short), json!({"return": {"id": 2}}));
    assert_eq!(forwards.forwarder.added[0].guest, "10.0.2.100:80".parse().unwrap());
    assert_eq!(forwards.forwarder.added[1].host, "0.0.0.0:53".parse().unwrap());
    assert_eq!(
        answer(&mut forwards, r#"{"execute":"list_hostfwd"}"#)["return"]["entries"][0],
        json!({"id": 1, "proto": "tcp", "host_addr": "0.0.0.0", "host_port": 8080, "guest_addr": "10.0.2.100", "guest_port": 80})
    );
    let remove = r#"{"execute":"remove_hostfwd","arguments":{"id":1}}"#;
    assert_eq!(answer(&mut forwards, remove), json!({"return": {}}));
    assert_eq!(forwards.forwarder.removed, [1]);
    assert_eq!(
        answer(&mut forwards, remove)["error"]["desc"],
        "bad request: remove_hostfwd: bad arguments.id"
    );
    let left = answer(&mut forwards, r#"{"execute":"list_hostfwd"}"#);
    assert_eq!(left["return"]["entries"].as_array().unwrap().len(), 1);
}

#[test]
fn errors_have_the_texts_of_slirp4netns() {
    let mut forwards = forwards();
    for (request, text) in [
        ("", "cannot parse JSON"),
        ("{\"execute\":", "cannot parse JSON"),
        ("\u{0}\u{1}", "cannot parse JSON"),
        ("[1]", "json_object() failed"),
        ("{}", "no execute found"),
        (r#"{"execute":7}"#, "no execute found"),
        (r#"{"execute":"add"}"#, "unknown execute"),
        (r#"{"execute":"add_hostfwd"}"#, "add_hostfwd: bad arguments.proto"),
        (
            r#"{"execute":"add_hostfwd","arguments":{"proto":"sctp"}}"#,
            "add_hostfwd: bad arguments.proto",
        ),
        (
            r#"{"execute":"add_hostfwd","arguments":{"proto":"tcp","host_addr":"x"}}"#,
            "add_hostfwd: bad arguments.host_addr",
        ),
        (
            r#"{"execute":"add_hostfwd","arguments":{"proto":"tcp","host_port":65536}}"#,
            "add_hostfwd: bad arguments.host_port",
        ),
        (
            r#"{"execute":"add_hostfwd","arguments":{"proto":"tcp","host_port":80,"guest_addr":"10.0.2"}}"#,
            "add_hostfwd: bad arguments.guest_addr",
        ),
        (
            r#"{"execute":"add_hostfwd","arguments":{"proto":"tcp","host_port":80,"guest_port":-1}}"#,
            "add_hostfwd: bad arguments.guest_port",
        ),
        (
            r#"{"execute":"add_hostfwd","arguments":{"proto":"tcp","host_port":9001,"guest_port":1}}"#,
            "add_hostfwd: slirp_add_hostfwd failed",
        ),
        (
            r#"{"execute":"remove_hostfwd","arguments":{"id":"1"}}"#,
            "remove_hostfwd: bad arguments.id",
        ),
    ] {
        let error = answer(&mut forwards, request);
        assert_eq!(error, json!({"error": {"desc": format!("bad request: {text}")}}), "{request}");
    }
}

#[test]
fn forwarded_ports_are_limited() {
    let mut forwards = forwards();
    let one =
        r#"{"execute":"add_hostfwd","arguments":{"proto":"tcp","host_port":80,"guest_port":80}}"#;
    for _ in 0..MAX_FORWARDS {
        assert!(answer(&mut forwards, one)["return"].is_object());
    }
    assert!(answer(&mut forwards, one)["error"].is_object());
    assert_eq!(forwards.forwarder.added.len(), MAX_FORWARDS);
}

#[test]
fn a_request_is_complete_with_its_last_brace() {
    let request = br#"{"execute":"list_hostfwd"}"#;
    for length in 0..request.len() {
        assert!(!is_complete(&request[..length]));
    }
    assert!(is_complete(request) && is_complete(b"{\"a\":{}}\n"));
    assert!(!is_complete(b"} "));
}
