//! Limits on clients.

use super::ask::{TIMEOUT, get};
use crate::scene::Scene;
use crate::{SOON, project};
use std::io::{Read, Write};
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
