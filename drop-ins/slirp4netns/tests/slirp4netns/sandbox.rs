//! What an attacker can do after taking over the ready process, tried from inside of it.

#![cfg(target_arch = "x86_64")]

use super::scene::{NOBODY, Scene, Slirp};
use std::fs;
use std::os::unix::fs::MetadataExt;
use tidegate_testbed::puppet::{self, Puppet, status};

fn tasks(slirp: &Slirp) -> Vec<String> {
    let tasks = puppet::tasks(slirp.process.pid());
    assert!(tasks.len() >= 2, "the control loop and the engine: {tasks:?}");
    tasks
}

#[test]
fn no_thread_keeps_privileges_files_or_system_calls() {
    let scene = Scene::new();
    let guest = scene.guest();
    let slirp = scene.serve(&guest, &["-c", "-6", "--enable-sandbox", "--enable-seccomp"]);
    for task in tasks(&slirp) {
        let status = status(&task);
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            assert_eq!(u64::from_str_radix(&status[set], 16), Ok(0), "{task} {set}");
        }
        assert_eq!((&*status["NoNewPrivs"], &*status["Seccomp"]), ("1", "2"), "{task}");
        assert!(status["Uid"].starts_with(&NOBODY.to_string()));
        let inode = |path: String| fs::metadata(path).unwrap().ino();
        for namespace in ["mnt", "user"] {
            assert_ne!(
                inode(format!("{task}/ns/{namespace}")),
                inode(format!("/proc/self/ns/{namespace}"))
            );
        }
        assert_eq!(fs::read_dir(format!("{task}/root")).unwrap().count(), 0, "an empty root");
    }
}

#[test]
fn root_keeps_low_ports_and_nothing_else() {
    let scene = Scene::new();
    let guest = scene.guest();
    let mut command = scene.as_root(&scene.ours());
    command.args(["-c", "--enable-sandbox"]);
    let slirp = Slirp::start(command, &guest);
    for task in tasks(&slirp) {
        let status = status(&task);
        for set in ["CapPrm", "CapEff", "CapBnd"] {
            // CAP_NET_BIND_SERVICE is number 10.
            assert_eq!(u64::from_str_radix(&status[set], 16), Ok(1 << 10), "{task} {set}");
        }
        assert_eq!(&*status["NoNewPrivs"], "1");
        assert_eq!(fs::read_dir(format!("{task}/root")).unwrap().count(), 0);
    }
}

#[test]
fn without_the_options_nothing_is_dropped() {
    let scene = Scene::new();
    let guest = scene.guest();
    let slirp = scene.serve(&guest, &["-c"]);
    for task in tasks(&slirp) {
        assert_eq!(&*status(&task)["Seccomp"], "0");
        assert!(fs::read_dir(format!("{task}/root")).unwrap().count() > 0);
    }
}

/// Anonymous private memory.
const PRIVATE: u64 = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;

/// The process that reads resolv.conf, which is confined regardless of the options.
#[test]
fn the_resolver_process_can_only_read_and_report() {
    let scene = Scene::new();
    let guest = scene.guest();
    let slirp = scene.serve(&guest, &["-c"]);
    let children = children_of(slirp.process.pid());
    let [resolver] = children[..] else { panic!("more than one process: {children:?}") };
    for task in puppet::tasks(resolver) {
        puppet::assert_confined(&task, 0);
        let puppet = Puppet::seize(&task);
        let cwd = libc::AT_FDCWD as u64;
        let file = puppet.path("/proc/self/environ");
        let mut calls = puppet.attempts(file);
        let socket = [libc::AF_INET as u64, libc::SOCK_DGRAM as u64, 0, 0, 0, 0];
        let socket =
            puppet.call(libc::SYS_socket, socket).expect("a socket to query interface indexes");
        calls.extend([
            ("connect", libc::SYS_connect, [socket, file, 16, 0, 0, 0]),
            ("sendto", libc::SYS_sendto, [socket, file, 1, 0, file, 16]),
            ("bind", libc::SYS_bind, [socket, file, 16, 0, 0, 0]),
        ]);
        puppet.is_refused(libc::EPERM, &calls);
        puppet.is_refused(
            libc::EACCES,
            &[("openat, elsewhere", libc::SYS_openat, [cwd, file, 0, 0, 0, 0])],
        );
        puppet.call(libc::SYS_close, [socket, 0, 0, 0, 0, 0]).unwrap();
        let own = puppet.path("/etc/resolv.conf");
        let own = puppet.call(libc::SYS_openat, [cwd, own, 0, 0, 0, 0]).expect("its file");
        puppet.call(libc::SYS_close, [own, 0, 0, 0, 0, 0]).unwrap();
    }
}

/// The children of process `pid`.
fn children_of(pid: u32) -> Vec<u32> {
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    children.split_ascii_whitespace().map(|child| child.parse().unwrap()).collect()
}

#[test]
fn attacks_from_inside_are_refused() {
    let scene = Scene::new();
    let guest = scene.guest();
    let slirp = scene.serve(&guest, &["-c", "-6", "--enable-sandbox", "--enable-seccomp"]);
    let cwd = libc::AT_FDCWD as u64;
    for task in tasks(&slirp) {
        let puppet = Puppet::seize(&task);
        let file = puppet.path("/etc/passwd");
        let mut calls = puppet.attempts(file);
        calls.extend([
            ("openat", libc::SYS_openat, [cwd, file, 0, 0, 0, 0]),
            ("readlinkat", libc::SYS_readlinkat, [cwd, file, file, 16, 0, 0]),
            ("clone3", libc::SYS_clone3, [file, 88, 0, 0, 0, 0]),
            ("pipe2", libc::SYS_pipe2, [file, 0, 0, 0, 0, 0]),
        ]);
        puppet.is_refused(libc::EPERM, &calls);
        // System calls that the engine needs are permitted.
        let socket = [libc::AF_INET as u64, libc::SOCK_DGRAM as u64, 0, 0, 0, 0];
        let socket = puppet.call(libc::SYS_socket, socket).expect("create an IP socket");
        puppet.call(libc::SYS_close, [socket, 0, 0, 0, 0, 0]).unwrap();
        let memory =
            puppet.call(libc::SYS_mmap, [0, 4096, libc::PROT_READ as u64, PRIVATE, u64::MAX, 0]);
        puppet.call(libc::SYS_munmap, [memory.unwrap(), 4096, 0, 0, 0, 0]).unwrap();
    }
    // The process continues to work.
    let ping = guest
        .namespace
        .command("ping")
        .args(["-n", "-c", "1", "-W", "5", "10.0.2.2"])
        .output()
        .unwrap();
    assert!(ping.status.success(), "{}", slirp.process.output());
}

/// The sandbox without the seccomp filter.
#[test]
fn no_file_can_be_opened() {
    let scene = Scene::new();
    let guest = scene.guest();
    let slirp = scene.serve(&guest, &["-c", "--enable-sandbox"]);
    let cwd = libc::AT_FDCWD as u64;
    for task in tasks(&slirp) {
        let puppet = Puppet::seize(&task);
        for path in ["/etc/passwd", "/proc/self/status", "/dev/null", "../etc/passwd", "/run"] {
            let path_at = puppet.path(path);
            let error = puppet.call(libc::SYS_openat, [cwd, path_at, 0, 0, 0, 0]).expect_err(path);
            assert_eq!(error.raw_os_error(), Some(libc::ENOENT), "{path}: {error}");
        }
        let error =
            puppet.call(libc::SYS_mkdirat, [cwd, puppet.path("/new"), 0o700, 0, 0, 0]).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EROFS));
        let error = puppet
            .call(libc::SYS_mount, [0, puppet.path("/"), 0, libc::MS_REMOUNT, 0, 0])
            .unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EPERM));
        // An inherited descriptor of the network namespace of the host.
        let error =
            puppet.call(libc::SYS_unshare, [libc::CLONE_NEWNET as u64, 0, 0, 0, 0, 0]).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EPERM));
    }
}
