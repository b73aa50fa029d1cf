//! The API of `tidegate up`, and its client `tidegate ps`, with real sockets, namespaces and
//! traffic.

#[path = "up/scene.rs"]
mod scene;

mod api {
    mod adopted;
    pub(crate) mod ask;
    mod bounds;
    mod instances;
    mod ports;
}

use api::ask::{ask, get};
use scene::{Scene, TIDEGATE};
use serde_json::{Value, json};
use std::time::Duration;
use tidegate_testbed::eventually;

const SOON: Duration = Duration::from_secs(10);

/// Two services on two networks, one of them internal, with published ports, and a service that
/// exits.
const PROJECT: &str = r#"
name: demo
networks:
  front: { enable_ipv6: true, ipam: { config: [ { subnet: 10.77.1.0/24 }, { subnet: "fd77:1::/64" } ] } }
  back: { internal: true, ipam: { config: [ { subnet: 10.77.2.0/24 } ] } }
services:
  web:
    command: TIDEGATE hello --listen [::]:80
    networks: [ front, back ]
    ports: [ "8080-8081:80-81" ]
  db: { command: [ sleep, "60" ], networks: [ back ] }
  job: { command: [ sh, -c, "echo done; exit 3" ], networks: [ back ] }
"#;

fn project() -> String {
    PROJECT.replace("TIDEGATE", TIDEGATE)
}

/// Waits until the API reports the end, which may be after the line in the output.
#[track_caller]
fn wait_for_end_of_job(scene: &Scene) {
    let has_ended = || {
        let status = get(&scene.socket(), "/v1/status").1;
        let services = status["services"].as_array().unwrap();
        services.iter().any(|one| one["name"] == "job" && one["state"] == "ended")
    };
    assert!(eventually(SOON, has_ended));
}

#[test]
fn ps_lists_services_with_their_ports_and_networks() {
    let scene = Scene::new();
    let up = scene.up(&project());
    up.wait_for_line("Ctrl-C takes", SOON);
    wait_for_end_of_job(&scene);
    let output = scene.tidegate().arg("ps").output().unwrap();
    let (stdout, stderr) =
        (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
    assert!(output.status.success() && stderr.is_empty(), "{stderr}");
    let bridge = |network: &str| {
        let all = get(&scene.socket(), "/v1/networks").1;
        let found =
            all.as_array().unwrap().iter().find(|one| one["name"] == network).unwrap().clone();
        found["bridge"].as_str().unwrap().to_owned()
    };
    let lines: Vec<String> =
        stdout.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
    assert_eq!(
        lines,
        [
            "SERVICE STATE NETWORK ADDRESS PUBLISHED".to_owned(),
            "web running front 10.77.1.2, fd77:1::2 0.0.0.0:8080-8081/tcp->80-81, [::]:8080-8081/tcp->80-81"
                .to_owned(),
            "back 10.77.2.2".to_owned(),
            "db running back 10.77.2.3".to_owned(),
            "job ended (3) back 10.77.2.4".to_owned(),
            String::new(),
            "NETWORK SUBNET GATEWAY INTERNAL BRIDGE".to_owned(),
            format!("back 10.77.2.0/24 10.77.2.1 yes {}", bridge("back")),
            format!("front 10.77.1.0/24, fd77:1::/64 10.77.1.1, fd77:1::1 no {}", bridge("front")),
        ]
    );
    let output = scene.tidegate().args(["ps", "--json"]).output().unwrap();
    let all: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(all.as_array().unwrap().len(), 1);
    let all = &all[0];
    assert_eq!(all["status"]["project"], "demo");
    assert_eq!(all["networks"][0]["endpoints"], json!(["web", "db", "job"]));
    assert_eq!(all["endpoints"][0]["ports"].as_array().unwrap().len(), 4);
}

#[test]
fn the_status_matches_the_running_project() {
    let scene = Scene::new();
    let up = scene.up(&project());
    up.wait_for_line("Ctrl-C takes", SOON);
    wait_for_end_of_job(&scene);
    let socket = scene.socket();
    let (code, status) = get(&socket, "/v1/status");
    assert_eq!(code, 200);
    assert_eq!(status["pid"], up.pid());
    assert_eq!(status["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(status["isolation"], "nftables");
    assert_eq!(
        status["compose_file"],
        scene.directory.path().join("compose.yaml").to_str().unwrap()
    );
    let service = |name: &str| {
        let services = status["services"].as_array().unwrap();
        services.iter().find(|one| one["name"] == name).unwrap().clone()
    };
    assert_eq!(
        (&service("web")["state"], &service("job")["state"]),
        (&json!("running"), &json!("ended"))
    );
    assert_eq!(service("job")["exit"], json!({ "code": 3, "signal": null }));
    let pid = service("web")["pid"].as_u64().unwrap();
    let command = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap();
    assert!(command.contains("hello"), "{command}");

    let (_, web) = get(&socket, "/v1/endpoints/web");
    let inside = std::fs::read_link(format!("/proc/{pid}/ns/net")).unwrap();
    assert_eq!(web["namespace"], inside.to_str().unwrap());
    let [front, back] = &web["attachments"].as_array().unwrap()[..] else { panic!("{web}") };
    assert_eq!((&front["default_route"], &back["default_route"]), (&json!(true), &json!(false)));
    assert_eq!(front["addresses"], json!(["10.77.1.2/24", "fd77:1::2/64"]));
    let link = scene
        .net
        .host
        .exec("nsenter", &[&format!("--net=/proc/{pid}/ns/net"), "ip", "link", "show", "eth0"]);
    assert!(link.contains(front["mac"].as_str().unwrap()), "{link}");
    let (_, network) = get(&socket, "/v1/networks/front");
    assert_eq!(network["subnets"][0], json!({ "subnet": "10.77.1.0/24", "gateway": "10.77.1.1" }));
    let links = scene.net.host.ip(&["-o", "link"]);
    assert!(links.contains(network["bridge"].as_str().unwrap()), "{links}");
}

#[test]
fn invalid_requests_are_rejected_in_one_line_without_effect() {
    let scene = Scene::new();
    let _holder = scene.net.host.run(|| std::net::TcpListener::bind("0.0.0.0:9000")).unwrap();
    let me = format!("(pid {})", std::process::id());
    let up = scene.up(&project());
    up.wait_for_line("Ctrl-C takes", SOON);
    let socket = scene.socket();
    let before = get(&socket, "/v1/ports");
    let new =
        |endpoint: &str, spec: &str| json!({ "endpoint": endpoint, "spec": spec }).to_string();
    let netns = |path: &str| json!({ "netns": path }).to_string();
    for (method, target, body, code, error) in [
        ("POST", "/v1/ports", new("web", "9000:80"), 409, "port 9000/tcp on 0.0.0.0 is in use by "),
        ("POST", "/v1/ports", new("web", "9000:80"), 409, me.as_str()),
        ("POST", "/v1/ports", new("web", "8998-9003:80-85"), 409, "port 9000/tcp"),
        (
            "POST",
            "/v1/ports",
            new("web", "8080:80"),
            409,
            "port 8080/tcp on 0.0.0.0 is in use by tidegate (pid ",
        ),
        ("POST", "/v1/ports", new("wbe", "9001:80"), 404, "there is no endpoint \"wbe\""),
        (
            "POST",
            "/v1/ports",
            new("web", "9001:0"),
            400,
            "container port 0 is not between 1 and 65535",
        ),
        ("POST", "/v1/ports", new("web", "9001:80/sctp"), 400, "protocol not supported"),
        (
            "POST",
            "/v1/ports",
            new("web", "192.0.2.7:9001:80"),
            400,
            "this host has no address 192.0.2.7",
        ),
        ("POST", "/v1/ports", "{".to_owned(), 400, "request body: EOF"),
        (
            "POST",
            "/v1/ports",
            r#"{"endpoint":"web","spec":"80","port":1}"#.to_owned(),
            400,
            "unknown field `port`",
        ),
        ("DELETE", "/v1/ports/4711", String::new(), 404, "there is no published port \"4711\""),
        ("DELETE", "/v1/ports/first", String::new(), 404, "there is no published port \"first\""),
        (
            "PUT",
            "/v1/endpoints/wbe/namespace",
            netns("/proc/self/ns/net"),
            404,
            "there is no endpoint \"wbe\"",
        ),
        (
            "PUT",
            "/v1/endpoints/web/namespace",
            netns("/proc/self/ns/net"),
            409,
            "only adopted ones (x-netns)",
        ),
        (
            "PUT",
            "/v1/endpoints/web/namespace",
            netns("here"),
            400,
            "netns: here is not an absolute path",
        ),
        ("GET", "/v1/networks/frnt", String::new(), 404, "there is no network \"frnt\""),
        ("GET", "/v1/endpoints/wbe", String::new(), 404, "there is no endpoint \"wbe\""),
        ("GET", "/v2", String::new(), 404, "path /v2 does not exist"),
        ("GET", "/v1/endpoints/%ff", String::new(), 400, "UTF-8"),
        ("PATCH", "/v1/ports", String::new(), 405, "/v1/ports does not support this method"),
        ("POST", "/v1/ports", "x".repeat(65 << 10), 413, "request body exceeds 65536 bytes"),
    ] {
        let (got, answer) = ask(&socket, method, target, &body);
        let line =
            answer["error"].as_str().unwrap_or_else(|| panic!("{method} {target}: {answer}"));
        assert_eq!(got, code, "{method} {target}: {line}");
        assert!(line.contains(error) && line.lines().count() == 1, "{method} {target}: {line}");
        assert_eq!(get(&socket, "/v1/ports"), before, "{method} {target}");
    }
}

/// After an intended change of the API, update the copy with `RENEW=1 cargo test --test api
/// the_document`.
#[test]
fn the_document_matches_the_served_one() {
    const COPY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/openapi.json");
    let scene = Scene::new();
    let up = scene.up(&project());
    up.wait_for_line("Ctrl-C takes", SOON);
    let (code, served) = get(&scene.socket(), "/v1/openapi.json");
    assert_eq!(code, 200);
    if std::env::var_os("RENEW").is_some() {
        std::fs::write(COPY, format!("{served:#}\n")).unwrap();
    }
    let copy: Value = serde_json::from_str(&std::fs::read_to_string(COPY).unwrap()).unwrap();
    assert_eq!(copy, served, "update it with RENEW=1 cargo test --test api the_document");
}
