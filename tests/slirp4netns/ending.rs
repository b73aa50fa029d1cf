//! How it ends, and what it leaves behind, which is nothing.

use super::scene::{SOON, Scene};
use std::fs;
use tidegate_testbed::{Process, Signal, eventually, procfs};

/// The copy of `process` that reads the resolvers.
#[track_caller]
fn reader_of(process: &Process) -> u32 {
    let tree = procfs::tree(process.pid());
    assert_eq!(tree.len(), 2, "it, and the one that reads");
    tree[1]
}

fn is_gone(pid: u32) -> bool {
    // Whoever inherits orphans may take some time to reap them.
    eventually(SOON, || procfs::state(pid).is_none_or(|state| state == 'Z'))
}

#[test]
fn it_ends_with_its_caller_or_by_a_signal() {
    let scene = Scene::new();
    for options in [&["-c"][..], &["-c", "--enable-sandbox", "--enable-seccomp", "--enable-ipv6"]] {
        for signal in [None, Some(Signal::TERM), Some(Signal::INT)] {
            let guest = scene.guest();
            let mut slirp = scene.serve(&guest, options);
            let reader = reader_of(&slirp.process);
            assert!(guest.ip(&["-o", "link"]).contains("tap0"));
            match signal {
                None => drop(slirp.exit.take()),
                Some(signal) => slirp.process.signal(signal),
            }
            assert_eq!(slirp.process.wait(SOON).code(), Some(0), "{}", slirp.process.output());
            // Reaped, not left to others.
            assert_eq!(procfs::state(reader), None);
            assert!(!guest.ip(&["-o", "link"]).contains("tap0"), "the device goes with it");
        }
    }
}

#[test]
fn killed_it_leaves_nothing() {
    let scene = Scene::new();
    let guest = scene.guest();
    for _ in 0..3 {
        let mut slirp = scene.serve(&guest, &["-c", "--enable-sandbox", "--enable-seccomp"]);
        let reader = reader_of(&slirp.process);
        slirp.process.stop(Signal::KILL, SOON);
        assert!(is_gone(reader));
        assert!(!guest.ip(&["-o", "link"]).contains("tap0"));
    }
    // Its caller has closed its end, and its container is gone: it ends all the same.
    let mut slirp = scene.serve(&guest, &["-c"]);
    drop(guest);
    drop(slirp.exit.take());
    assert_eq!(slirp.process.wait(SOON).code(), Some(0));
}

#[test]
fn a_socket_left_by_one_that_was_killed_is_put_away_and_nothing_else() {
    let scene = Scene::new();
    let guest = scene.guest();
    let socket = scene.home("api.sock");
    let option = format!("--api-socket={}", socket.display());
    for _ in 0..2 {
        let mut slirp = scene.serve(&guest, &["-c", &option]);
        assert!(super::scene::ask(&socket, r#"{"execute":"list_hostfwd"}"#).contains("entries"));
        slirp.process.stop(Signal::KILL, SOON);
        assert!(socket.exists());
    }
    fs::remove_file(&socket).unwrap();
    fs::write(&socket, "precious").unwrap();
    let told = scene.refused(&["-c", &option, &guest.pid()]);
    assert!(told.contains("Address already in use"), "{told}");
    assert_eq!(fs::read_to_string(&socket).unwrap(), "precious");
}
