//! Limits on clients.

use super::ask::{TIMEOUT, get};
use crate::scene::Scene;
use crate::{SOON, project};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Instant;

/// More clients than are served concurrently.
const MANY: usize = 40;

#[test]
fn silent_clients_time_out_and_do_not_lock_out_others() {
    let scene = Scene::new();
    let up = scene.up(&project());
    up.wait_for_line("Ctrl-C takes", SOON);
    let mut silent: Vec<UnixStream> =
        (0..MANY).map(|_| UnixStream::connect(scene.socket()).unwrap()).collect();
    for (index, client) in silent.iter_mut().enumerate() {
        client.set_read_timeout(Some(TIMEOUT)).unwrap();
        if index % 2 == 0 {
            client.write_all(b"GET /v1/status HTTP/1.1\r\nHost:").unwrap();
        }
    }
    let start = Instant::now();
    assert_eq!(get(&scene.socket(), "/v1/status").0, 200);
    println!("served after {:?}", start.elapsed());
    for client in &mut silent {
        let mut response = String::new();
        client.read_to_string(&mut response).unwrap();
        assert!(response.is_empty() || response.starts_with("HTTP/1.1 4"), "{response}");
    }
}

/// `tidegate top` follows them. At most 16 clients do, so that others are served.
#[test]
fn figures_are_sent_at_each_interval_to_a_limited_number_of_clients() {
    let scene = Scene::new();
    let up = scene.up(&project());
    up.wait_for_line("Ctrl-C takes", SOON);
    let follow = |interval: u32| {
        let mut client = UnixStream::connect(scene.socket()).unwrap();
        client.set_read_timeout(Some(TIMEOUT)).unwrap();
        let request = format!("GET /v1/figures?interval_ms={interval} HTTP/1.1\r\nHost: x\r\n\r\n");
        client.write_all(request.as_bytes()).unwrap();
        BufReader::new(client).lines().map(Result::unwrap)
    };
    let refused: Vec<_> = follow(99).collect();
    assert!(refused[0].contains("400"), "{refused:?}");
    assert!(refused.last().unwrap().contains("use 100 to 3600000 milliseconds"), "{refused:?}");
    let mut clients: Vec<_> = (0..16).map(|_| follow(100)).collect();
    for client in &mut clients {
        let mut times = client.filter_map(|line| {
            let figures: serde_json::Value = serde_json::from_str(&line).ok()?;
            figures["elapsed_ms"].as_u64()
        });
        let [first, second, third] = [(); 3].map(|()| times.next().unwrap());
        assert!(second >= first + 100 && third >= second + 100, "{first} {second} {third}");
    }
    let refused: Vec<_> = follow(100).collect();
    assert!(refused[0].contains("409"), "{refused:?}");
    assert_eq!(get(&scene.socket(), "/v1/status").0, 200);
}
