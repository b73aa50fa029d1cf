//! The exit, which leaves nothing behind.

use super::scene::{SOON, Scene};
use std::fs;
use tidegate_testbed::{Process, Signal, eventually, procfs};

/// The forked process of `process` that reads the resolvers.
#[track_caller]
fn resolver_process(process: &Process) -> u32 {
    let tree = procfs::tree(process.pid());
    assert_eq!(tree.len(), 2, "the process and its reader");
    tree[1]
}

fn is_gone(pid: u32) -> bool {
    // The new parent of an orphan may not have reaped it yet.
    eventually(SOON, || procfs::state(pid).is_none_or(|state| state == 'Z'))
}

#[test]
fn it_ends_with_its_caller_or_on_a_signal() {
    let scene = Scene::new();
    for options in [&["-c"][..], &["-c", "--enable-sandbox", "--enable-seccomp", "--enable-ipv6"]] {
        for signal in [None, Some(Signal::TERM), Some(Signal::INT)] {
            let guest = scene.guest();
            let mut slirp = scene.serve(&guest, options);
            let reader = resolver_process(&slirp.process);
            assert!(guest.ip(&["-o", "link"]).contains("tap0"));
            match signal {
                None => drop(slirp.exit.take()),
                Some(signal) => slirp.process.signal(signal),
            }
            assert_eq!(slirp.process.wait(SOON).code(), Some(0), "{}", slirp.process.output());
            // It was reaped, not left as an orphan.
            assert_eq!(procfs::state(reader), None);
            assert!(!guest.ip(&["-o", "link"]).contains("tap0"), "the device is removed");
        }
    }
}

#[test]
fn a_killed_process_leaves_nothing() {
    let scene = Scene::new();
    let guest = scene.guest();
    for _ in 0..3 {
        let mut slirp = scene.serve(&guest, &["-c", "--enable-sandbox", "--enable-seccomp"]);
        let reader = resolver_process(&slirp.process);
        slirp.process.stop(Signal::KILL, SOON);
        assert!(is_gone(reader));
        assert!(!guest.ip(&["-o", "link"]).contains("tap0"));
    }
    // The exit descriptor also ends it after the container is gone.
    let mut slirp = scene.serve(&guest, &["-c"]);
    drop(guest);
    drop(slirp.exit.take());
    assert_eq!(slirp.process.wait(SOON).code(), Some(0));
}

#[test]
fn only_a_stale_socket_is_replaced() {
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
    let error = scene.refused(&["-c", &option, &guest.pid()]);
    assert!(error.contains("Address already in use"), "{error}");
    assert_eq!(fs::read_to_string(&socket).unwrap(), "precious");
}
