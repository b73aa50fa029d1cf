//! What is left of the process when it is ready: tried from inside of it.

use super::scene::{NOBODY, Scene, Slirp};
use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};

/// `/proc/PID/task/TID/status`.
fn status(task: &str) -> BTreeMap<String, String> {
    let text = fs::read_to_string(format!("{task}/status")).unwrap();
    let pairs = text.lines().filter_map(|line| line.split_once(':'));
    pairs.map(|(name, value)| (name.to_owned(), value.trim().to_owned())).collect()
}

fn tasks(slirp: &Slirp) -> Vec<String> {
    let directory = format!("/proc/{}/task", slirp.process.pid());
    let tasks = fs::read_dir(directory).unwrap();
    let tasks: Vec<String> = tasks.map(|task| task.unwrap().path().display().to_string()).collect();
    assert!(tasks.len() >= 2, "the control loop and the engine: {tasks:?}");
    tasks
}

#[test]
fn no_thread_has_privileges_files_or_system_calls_left() {
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
            assert_ne!(inode(format!("{task}/ns/{namespace}")), inode(format!("/proc/self/ns/{namespace}")));
        }
        assert_eq!(fs::read_dir(format!("{task}/root")).unwrap().count(), 0, "an empty root");
    }
}

#[test]
fn root_keeps_lower_ports_and_nothing_else() {
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
fn without_the_options_nothing_is_given_up() {
    let scene = Scene::new();
    let guest = scene.guest();
    let slirp = scene.serve(&guest, &["-c"]);
    for task in tasks(&slirp) {
        assert_eq!(&*status(&task)["Seccomp"], "0");
        assert!(fs::read_dir(format!("{task}/root")).unwrap().count() > 0);
    }
}

/// A thread of another process, stopped, which makes system calls for us.
#[cfg(target_arch = "x86_64")]
struct Puppet {
    thread: libc::pid_t,
    as_it_was: libc::user_regs_struct,
    memory: fs::File,
}

#[cfg(target_arch = "x86_64")]
impl Puppet {
    /// Stops thread `task`, which waits in a system call.
    fn seize(task: &str) -> Self {
        let thread: libc::pid_t = task.rsplit('/').next().unwrap().parse().unwrap();
        // SAFETY: these requests concern the other process; its registers are written to a live variable.
        let as_it_was = unsafe {
            checked(libc::ptrace(libc::PTRACE_ATTACH, thread, 0, 0)).unwrap();
            assert_eq!(libc::waitpid(thread, std::ptr::null_mut(), libc::__WALL), thread);
            registers(thread)
        };
        let memory = OpenOptions::new().read(true).write(true).open(format!("{task}/mem")).unwrap();
        let mut instruction = [0; 2];
        memory.read_exact_at(&mut instruction, as_it_was.rip - 2).unwrap();
        assert_eq!(instruction, [0x0f, 0x05], "it waits behind an instruction `syscall`");
        Self { thread, as_it_was, memory }
    }

    /// Has it make a call, and returns what the kernel says.
    fn call(&self, number: libc::c_long, arguments: [u64; 6]) -> io::Result<u64> {
        let mut registers = self.as_it_was;
        registers.rip -= 2;
        registers.rax = number as u64;
        // No call is to be taken up again instead.
        registers.orig_rax = u64::MAX;
        let [a, b, c, d, e, f] = arguments;
        (registers.rdi, registers.rsi, registers.rdx) = (a, b, c);
        (registers.r10, registers.r8, registers.r9) = (d, e, f);
        // SAFETY: as in `seize`.
        let answer = unsafe {
            checked(libc::ptrace(libc::PTRACE_SETREGS, self.thread, 0, &raw const registers)).unwrap();
            // To where it enters the kernel, and to where it leaves it.
            for _ in 0..2 {
                checked(libc::ptrace(libc::PTRACE_SYSCALL, self.thread, 0, 0)).unwrap();
                let mut status = 0;
                assert_eq!(libc::waitpid(self.thread, &raw mut status, libc::__WALL), self.thread);
                assert!(libc::WIFSTOPPED(status), "it has ended: {status:x}");
            }
            self::registers(self.thread).rax.cast_signed()
        };
        if answer < 0 {
            Err(io::Error::from_raw_os_error(-answer as i32))
        } else {
            Ok(answer.cast_unsigned())
        }
    }

    /// Puts a path where the thread can point at it.
    fn path(&self, path: &str) -> u64 {
        let place = self.as_it_was.rsp - 4096;
        self.memory.write_all_at(&[path.as_bytes(), b"\0"].concat(), place).unwrap();
        place
    }
}

#[cfg(target_arch = "x86_64")]
impl Drop for Puppet {
    fn drop(&mut self) {
        // SAFETY: as in `seize`. It goes on where it was.
        unsafe {
            libc::ptrace(libc::PTRACE_SETREGS, self.thread, 0, &raw const self.as_it_was);
            libc::ptrace(libc::PTRACE_DETACH, self.thread, 0, 0);
        }
    }
}

#[cfg(target_arch = "x86_64")]
fn checked(result: libc::c_long) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// # Safety
/// The thread must be stopped, and ours.
#[cfg(target_arch = "x86_64")]
unsafe fn registers(thread: libc::pid_t) -> libc::user_regs_struct {
    // SAFETY: all-zero is a valid value, and is overwritten.
    unsafe {
        let mut registers: libc::user_regs_struct = std::mem::zeroed();
        checked(libc::ptrace(libc::PTRACE_GETREGS, thread, 0, &raw mut registers)).unwrap();
        registers
    }
}

#[cfg(target_arch = "x86_64")]
#[test]
fn what_is_tried_from_inside_is_refused() {
    let scene = Scene::new();
    let guest = scene.guest();
    let slirp = scene.serve(&guest, &["-c", "-6", "--enable-sandbox", "--enable-seccomp"]);
    let cwd = libc::AT_FDCWD as u64;
    for task in tasks(&slirp) {
        let puppet = Puppet::seize(&task);
        let file = puppet.path("/etc/passwd");
        let user = libc::CLONE_NEWUSER as u64;
        let network = libc::CLONE_NEWNET as u64;
        let executable = (libc::PROT_READ | libc::PROT_EXEC) as u64;
        let private = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;
        for (name, number, arguments) in [
            ("openat", libc::SYS_openat, [cwd, file, 0, 0, 0, 0]),
            ("open", libc::SYS_open, [file, 0, 0, 0, 0, 0]),
            ("openat2", libc::SYS_openat2, [cwd, file, file, 24, 0, 0]),
            ("readlinkat", libc::SYS_readlinkat, [cwd, file, file, 16, 0, 0]),
            ("unshare, user", libc::SYS_unshare, [user, 0, 0, 0, 0, 0]),
            ("unshare, network", libc::SYS_unshare, [network, 0, 0, 0, 0, 0]),
            ("setns", libc::SYS_setns, [4, 0, 0, 0, 0, 0]),
            ("clone, user", libc::SYS_clone, [user, 0, 0, 0, 0, 0]),
            ("clone3", libc::SYS_clone3, [file, 88, 0, 0, 0, 0]),
            ("fork", libc::SYS_fork, [0; 6]),
            ("execve", libc::SYS_execve, [file, 0, 0, 0, 0, 0]),
            ("execveat", libc::SYS_execveat, [cwd, file, 0, 0, 0, 0]),
            ("ptrace", libc::SYS_ptrace, [libc::PTRACE_TRACEME as u64, 0, 0, 0, 0, 0]),
            ("kill", libc::SYS_kill, [u64::from(slirp.process.pid()), 0, 0, 0, 0, 0]),
            ("mount", libc::SYS_mount, [file, file, file, 0, 0, 0]),
            ("pivot_root", libc::SYS_pivot_root, [file, file, 0, 0, 0, 0]),
            ("chroot", libc::SYS_chroot, [file, 0, 0, 0, 0, 0]),
            ("bpf", libc::SYS_bpf, [0; 6]),
            ("io_uring_setup", libc::SYS_io_uring_setup, [1, file, 0, 0, 0, 0]),
            ("ioctl", libc::SYS_ioctl, [6, 0x8004_54d2, file, 0, 0, 0]),
            ("prctl", libc::SYS_prctl, [libc::PR_SET_DUMPABLE as u64, 1, 0, 0, 0, 0]),
            (
                "a local socket",
                libc::SYS_socket,
                [libc::AF_UNIX as u64, libc::SOCK_STREAM as u64, 0, 0, 0, 0],
            ),
            ("netlink", libc::SYS_socket, [libc::AF_NETLINK as u64, libc::SOCK_RAW as u64, 0, 0, 0, 0]),
            ("executable memory", libc::SYS_mmap, [0, 4096, executable, private, u64::MAX, 0]),
        ] {
            let error = puppet.call(number, arguments).expect_err(name);
            assert_eq!(error.raw_os_error(), Some(libc::EPERM), "{name}: {error}");
        }
        // What it lives on is allowed.
        let socket = [libc::AF_INET as u64, libc::SOCK_DGRAM as u64, 0, 0, 0, 0];
        let socket = puppet.call(libc::SYS_socket, socket).expect("a socket to the network");
        puppet.call(libc::SYS_close, [socket, 0, 0, 0, 0, 0]).unwrap();
        let memory = puppet.call(libc::SYS_mmap, [0, 4096, libc::PROT_READ as u64, private, u64::MAX, 0]);
        puppet.call(libc::SYS_munmap, [memory.unwrap(), 4096, 0, 0, 0, 0]).unwrap();
    }
    // It goes on as if nothing had been.
    let ping =
        guest.namespace.command("ping").args(["-n", "-c", "1", "-W", "5", "10.0.2.2"]).output().unwrap();
    assert!(ping.status.success(), "{}", slirp.process.output());
}

/// The sandbox alone, with no filter to help it.
#[cfg(target_arch = "x86_64")]
#[test]
fn there_is_no_file_to_be_opened() {
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
        let error = puppet.call(libc::SYS_mkdirat, [cwd, puppet.path("/new"), 0o700, 0, 0, 0]).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EROFS));
        let error =
            puppet.call(libc::SYS_mount, [0, puppet.path("/"), 0, libc::MS_REMOUNT, 0, 0]).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EPERM));
        // The host's network, which the descriptor is of that came with it.
        let error = puppet.call(libc::SYS_unshare, [libc::CLONE_NEWNET as u64, 0, 0, 0, 0, 0]).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EPERM));
    }
}
