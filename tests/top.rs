//! `tidegate top`, in a real terminal and without one.

#[path = "up/scene.rs"]
mod scene;

mod top {
    pub(crate) mod terminal;
}

use scene::{Scene, TIDEGATE};
use serde_json::Value;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tidegate_testbed::{Namespace, Process, Signal, addr, eventually, require_program};
use top::terminal::Terminal;

const SOON: Duration = Duration::from_secs(20);

const PROJECT: &str = r#"
name: shop
networks:
  front: { ipam: { config: [ { subnet: 10.83.1.0/24 } ] } }
  back: { internal: true, ipam: { config: [ { subnet: 10.83.2.0/24 } ] } }
services:
  web:
    command: TIDEGATE hello --listen [::]:80
    networks: [ front, back ]
    ports: [ "203.0.113.1:8080:80" ]
  box:
    command: [ sleep, "600" ]
    networks: [ back ]
    ports: [ "203.0.113.1:9090:9", "203.0.113.1:5353:53/udp" ]
"#;

fn up(scene: &Scene) -> Process {
    let up = scene.up_with(&PROJECT.replace("TIDEGATE", TIDEGATE), &["--firewall=none"]);
    up.wait_for_line("Ctrl-C takes", SOON);
    up
}

/// Clients of `web` that send requests until the drop.
struct Clients {
    over: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Clients {
    fn of(client: &Namespace) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&over);
        let thread = client.spawn_thread(move || {
            while !seen.load(Ordering::Relaxed) {
                // Errors are expected while the instance is killed.
                let _ = request();
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        Self { over, thread: Some(thread) }
    }
}

impl Drop for Clients {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        let _ = self.thread.take().map(std::thread::JoinHandle::join);
    }
}

fn request() -> std::io::Result<usize> {
    let mut stream = TcpStream::connect_timeout(&(addr::HOST_V4, 8080).into(), SOON)?;
    stream.set_read_timeout(Some(SOON))?;
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
    stream.shutdown(Shutdown::Write)?;
    stream.read_to_end(&mut Vec::new())
}

#[test]
fn a_terminal_shows_live_rates_and_handles_keys() {
    require_program("tmux");
    let scene = Scene::new();
    let mut instance = up(&scene);
    let clients = Clients::of(&scene.net.client);
    let terminal = Terminal::new(scene.directory.path(), 80, 24);
    terminal.run(&format!(
        "TIDEGATE_SOCKET={} {TIDEGATE} top --interval 200ms",
        scene.socket().display()
    ));

    // Eighty columns and twenty-four lines show everything, with changing rates.
    let screen = terminal.wait_for("the rates of web", |screen| {
        screen
            .lines()
            .any(|line| line.starts_with("203.0.113.1:8080/tcp  web") && line.contains(" kB"))
    });
    let lines: Vec<&str> = screen.lines().collect();
    assert!(
        lines[0].starts_with("tidegate top: shop  up ") && lines[0].contains("every 200ms"),
        "{screen}"
    );
    assert!(lines[2].starts_with("NAT   flows 0/"), "{screen}");
    assert_eq!(lines[4], "[Ports 3]  Endpoints 2   Networks 2   Names 0");
    assert!(lines[6].starts_with("203.0.113.1:8080/tcp "), "the busiest is first: {screen}");
    assert!(lines[23].starts_with("q quit"), "{screen}");

    terminal.keys(&["2"]);
    terminal.wait_for("endpoints", |screen| screen.contains("web       back front"));
    terminal.keys(&["1", "/", "u", "d", "p"]);
    terminal.wait_for("the filter being edited", |screen| {
        screen.contains("filter: udp_") && !screen.contains("8080/tcp")
    });
    terminal.keys(&["Enter"]);
    terminal.wait_for("the filter after Enter", |screen| {
        screen.contains("filter: udp") && screen.contains("q quit")
    });
    terminal.keys(&["/", "Escape"]);
    terminal.wait_for("all ports without a filter", |screen| {
        screen.contains("8080/tcp") && !screen.contains("filter:")
    });
    terminal.keys(&["r"]);
    terminal.wait_for("the reversed order", |screen| {
        screen.lines().nth(8).is_some_and(|line| line.contains("8080/tcp"))
    });

    terminal.resize(60, 20);
    terminal.wait_for("the error for a small terminal", |screen| {
        screen.contains("tidegate top needs 80 columns and 12 lines")
    });
    terminal.resize(100, 30);
    terminal.wait_for("the view", |screen| screen.contains("q quit"));

    // The instance is killed and replaced.
    instance.stop(Signal::KILL, SOON);
    terminal.wait_for("the lost connection", |screen| {
        screen.starts_with("connection lost, retrying: ") && screen.contains("8080/tcp")
    });
    drop(instance);
    let mut instance = up(&scene);
    terminal.wait_for("the new instance", |screen| {
        screen.starts_with("tidegate top: shop  up ")
            && screen.lines().any(|line| line.contains("8080/tcp") && line.contains(" kB"))
    });

    terminal.keys(&["q"]);
    terminal.wait_for("the exit with a restored terminal", |screen| {
        screen.contains("ENDED 0 echo icanon") && !screen.contains("PUBLISHED")
    });
    drop(clients);
    instance.stop(Signal::INT, SOON);
}

#[test]
fn signals_end_it_with_a_restored_terminal() {
    require_program("tmux");
    let scene = Scene::new();
    let mut instance = up(&scene);
    for (index, signal) in [Signal::TERM, Signal::INT, Signal::HUP].into_iter().enumerate() {
        let directory = scene.directory.path().join(index.to_string());
        std::fs::create_dir(&directory).unwrap();
        let terminal = Terminal::new(&directory, 80, 24);
        terminal.run(&format!("TIDEGATE_SOCKET={} {TIDEGATE} top", scene.socket().display()));
        terminal.wait_for("the view", |screen| screen.contains("q quit"));
        terminal.signal("top", signal);
        terminal.wait_for("the exit", |screen| screen.contains("ENDED 0 echo icanon"));
    }
    let terminal = Terminal::new(scene.directory.path(), 80, 24);
    terminal.run(&format!("TIDEGATE_SOCKET={} {TIDEGATE} top", scene.socket().display()));
    terminal.wait_for("the view", |screen| screen.contains("q quit"));
    terminal.keys(&["C-c"]);
    terminal.wait_for("the exit", |screen| screen.contains("ENDED 0 echo icanon"));
    instance.stop(Signal::INT, SOON);
}

/// This includes a terminal whose shell does not pass on SIGHUP.
#[test]
fn it_ends_with_its_terminal() {
    require_program("tmux");
    let scene = Scene::new();
    let mut instance = up(&scene);
    for trap in ["", "trap : HUP; "] {
        let terminal = Terminal::new(scene.directory.path(), 80, 24);
        let socket = scene.socket();
        terminal.shell(&format!("{trap}TIDEGATE_SOCKET={} {TIDEGATE} top; true", socket.display()));
        terminal.wait_for("the view", |screen| screen.contains("q quit"));
        let pid = terminal.pid("top").as_raw_nonzero();
        drop(terminal);
        std::fs::remove_file(scene.directory.path().join("tmux.sock")).unwrap();
        let process = format!("/proc/{pid}");
        assert!(
            eventually(SOON, || !Path::new(&process).exists()),
            "with {trap:?} it keeps running"
        );
    }
    instance.stop(Signal::INT, SOON);
}

#[test]
fn once_prints_a_frame_as_text_or_json() {
    let scene = Scene::new();
    let mut instance = up(&scene);
    let clients = Clients::of(&scene.net.client);
    let output = scene.tidegate().args(["top", "--once", "--interval", "500ms"]).output().unwrap();
    let (text, stderr) =
        (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
    assert!(output.status.success() && stderr.is_empty(), "{stderr}");
    assert!(!text.contains('\u{1b}'), "plain text");
    assert!(text.lines().all(|line| line.chars().count() <= 100), "{text}");
    for needed in [
        "tidegate top: shop",
        "PUBLISHED",
        "203.0.113.1:5353/udp  box",
        "NETWORKS",
        "ENDPOINTS",
        "back front",
    ] {
        assert!(text.contains(needed), "{needed}: {text}");
    }
    let output =
        scene.tidegate().args(["top", "--once", "--json", "--interval", "1s"]).output().unwrap();
    assert!(output.status.success());
    let all: Value = serde_json::from_slice(&output.stdout).unwrap();
    let web = port(&all, "203.0.113.1:8080/tcp");
    assert_eq!(web["endpoint"], "web");
    for rate in ["begun_rate", "bytes_in_rate", "bytes_out_rate"] {
        assert!(web[rate].as_f64().unwrap() > 0.0, "{rate}: {all}");
    }
    let over = all["over_seconds"].as_f64().unwrap();
    assert!((0.9..20.0).contains(&over), "{over}");
    assert_eq!(all["networks"].as_array().unwrap().len(), 2);
    // Its bytes are at least those that a client has counted.
    let (_, before) = figures(&scene);
    let length = scene.net.client.run(request).unwrap() as u64;
    assert!(length > 0);
    let (_, after) = figures(&scene);
    let out =
        |figures: &Value| port(figures, "203.0.113.1:8080/tcp")["bytes_out"].as_u64().unwrap();
    assert!(out(&after) >= out(&before) + length);
    drop(clients);
    instance.stop(Signal::INT, SOON);
}

/// The object of the port `publish`.
#[track_caller]
fn port<'a>(all: &'a Value, publish: &str) -> &'a Value {
    let ports = all["ports"].as_array().unwrap();
    ports
        .iter()
        .find(|port| port["publish"] == publish)
        .unwrap_or_else(|| panic!("no {publish}: {all}"))
}

fn figures(scene: &Scene) -> (u16, Value) {
    ask::get(&scene.socket(), "/v1/figures")
}

#[path = "api/ask.rs"]
mod ask;

#[test]
fn errors_are_printed_in_one_line() {
    let scene = Scene::new();
    let run = |arguments: &[&str], socket: &Path| {
        let mut command = scene.tidegate();
        let output =
            command.arg("top").args(arguments).env("TIDEGATE_SOCKET", socket).output().unwrap();
        assert!(output.stdout.is_empty(), "{arguments:?}");
        (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
    };
    let nowhere = scene.directory.path().join("nowhere.sock");
    for arguments in [&["--once"][..], &["--once", "--json"]] {
        let (code, stderr) = run(arguments, &nowhere);
        assert_eq!((code, stderr.lines().count()), (1, 1), "{stderr}");
        assert!(
            stderr.starts_with("tidegate: error: ") && stderr.contains("nowhere.sock"),
            "{stderr}"
        );
    }
    // Standard output is not a terminal.
    let (code, stderr) = run(&[], &nowhere);
    assert_eq!(code, 2);
    assert_eq!(
        stderr,
        "tidegate: error: standard output is not a terminal; use --once to print one frame as text\n"
    );
    for (arguments, needed) in [
        (&["--once", "--sort", "beauty"][..], "publish, endpoint, port"),
        (&["--once", "--interval", "0"], "longer than 0"),
        (&["--once", "--interval", "1ms"], "between 100ms and 1h"),
        (&["--json"], "--once"),
        (&["--view", "moon"], "ports"),
    ] {
        let (code, stderr) = run(arguments, &nowhere);
        assert_eq!(code, 2, "{arguments:?}: {stderr}");
        assert!(stderr.contains(needed), "{arguments:?}: {stderr}");
    }
}

#[test]
fn a_missing_instance_is_an_error_in_a_terminal_as_well() {
    require_program("tmux");
    let scene = Scene::new();
    let terminal = Terminal::new(scene.directory.path(), 80, 24);
    terminal.run(&format!("TIDEGATE_SOCKET=/nowhere.sock {TIDEGATE} top"));
    terminal.wait_for("an error", |screen| {
        screen.contains("tidegate: error: ")
            && screen.contains("/nowhere.sock")
            && screen.contains("ENDED 1 echo icanon")
    });
}
