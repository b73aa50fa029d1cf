//! Clients that are in nobody's way.

use super::ask::{TIMEOUT, get};
use crate::scene::Scene;
use crate::{SOON, project};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Instant;

/// More than are let in at a time.
const MANY: usize = 40;

#[test]
fn clients_that_say_nothing_are_sent_away_and_do_not_keep_others_out() {
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
    println!("let in after {:?}", start.elapsed());
    for client in &mut silent {
        let mut said = String::new();
        client.read_to_string(&mut said).unwrap();
        assert!(said.is_empty() || said.starts_with("HTTP/1.1 4"), "{said}");
    }
}
