//! A stopped thread of another process that makes system calls for a test: what an attacker can do
//! after taking over the process.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::time::Duration;

/// The instruction `syscall`.
const SYSCALL: [u8; 2] = [0x0f, 0x05];

/// Returns the paths `/proc/PID/task/TID` of all threads of process `pid`.
///
/// # Panics
/// If the process does not exist.
#[track_caller]
pub fn tasks(pid: u32) -> Vec<String> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).expect("the process lives");
    tasks.map(|task| task.expect("a thread").path().display().to_string()).collect()
}

/// Returns the fields of the `status` file of a thread.
///
/// # Panics
/// If the thread has ended.
#[track_caller]
pub fn status(task: &str) -> BTreeMap<String, String> {
    let text = fs::read_to_string(format!("{task}/status")).expect("the thread lives");
    let pairs = text.lines().filter_map(|line| line.split_once(':'));
    pairs.map(|(name, value)| (name.to_owned(), value.trim().to_owned())).collect()
}

/// Asserts that a thread has no capabilities except those in `kept` (a bit mask by number), cannot
/// gain any, and has a seccomp filter.
///
/// # Panics
/// If it has more capabilities, or no filter.
#[track_caller]
pub fn assert_confined(task: &str, kept: u64) {
    let status = status(task);
    for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
        let has = u64::from_str_radix(&status[set], 16).expect("a set of capabilities");
        assert_eq!(has & !kept, 0, "{task} {set}: {has:x}");
    }
    assert_eq!((&*status["NoNewPrivs"], &*status["Seccomp"]), ("1", "2"), "{task}");
}

/// A system call: a name for messages, its number, and its arguments.
pub type Call = (&'static str, libc::c_long, [u64; 6]);

/// A stopped thread. On drop it continues in its original state.
#[derive(Debug)]
pub struct Puppet {
    thread: libc::pid_t,
    saved: libc::user_regs_struct,
    memory: File,
}

impl Puppet {
    /// Stops thread `task`, one of [`tasks`], while it waits in a system call.
    ///
    /// # Panics
    /// If it cannot be stopped, or is not in a system call.
    #[must_use]
    #[track_caller]
    pub fn seize(task: &str) -> Self {
        let thread: libc::pid_t =
            task.rsplit('/').next().unwrap_or_default().parse().expect("a thread id");
        let memory = OpenOptions::new()
            .read(true)
            .write(true)
            .open(format!("{task}/mem"))
            .expect("open its memory");
        // A thread that has just become ready may still run.
        for _ in 0..100 {
            // SAFETY: these requests affect only the other process; its registers are written to a
            // live variable.
            let saved = unsafe {
                checked(libc::ptrace(libc::PTRACE_ATTACH, thread, 0, 0)).expect("ptrace");
                assert_eq!(libc::waitpid(thread, std::ptr::null_mut(), libc::__WALL), thread);
                registers(thread)
            };
            let mut instruction = [0; 2];
            memory.read_exact_at(&mut instruction, saved.rip - 2).expect("read its code");
            if instruction == SYSCALL {
                return Self { thread, saved, memory };
            }
            // SAFETY: as above.
            unsafe { checked(libc::ptrace(libc::PTRACE_DETACH, thread, 0, 0)).expect("ptrace") };
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("{task} does not stop after a `syscall` instruction");
    }

    /// Makes a system call in the thread and returns its result.
    ///
    /// # Errors
    /// The error of the call.
    ///
    /// # Panics
    /// If the call ends the process.
    #[track_caller]
    pub fn call(&self, number: libc::c_long, arguments: [u64; 6]) -> io::Result<u64> {
        let mut registers = self.saved;
        registers.rip -= 2;
        registers.rax = number as u64;
        // Prevents the restart of the interrupted call.
        registers.orig_rax = u64::MAX;
        let [a, b, c, d, e, f] = arguments;
        (registers.rdi, registers.rsi, registers.rdx) = (a, b, c);
        (registers.r10, registers.r8, registers.r9) = (d, e, f);
        // SAFETY: as in `seize`.
        let answer = unsafe {
            checked(libc::ptrace(libc::PTRACE_SETREGS, self.thread, 0, &raw const registers))
                .expect("ptrace");
            // Runs to the entry and then to the exit of the call.
            for _ in 0..2 {
                checked(libc::ptrace(libc::PTRACE_SYSCALL, self.thread, 0, 0)).expect("ptrace");
                let mut status = 0;
                assert_eq!(libc::waitpid(self.thread, &raw mut status, libc::__WALL), self.thread);
                assert!(libc::WIFSTOPPED(status), "the process has ended: {status:x}");
            }
            self::registers(self.thread).rax.cast_signed()
        };
        if answer < 0 {
            Err(io::Error::from_raw_os_error(-answer as i32))
        } else {
            Ok(answer.cast_unsigned())
        }
    }

    /// Writes a path into the memory of the thread, over the previous one, and returns its address.
    ///
    /// # Panics
    /// If the memory cannot be written.
    #[track_caller]
    pub fn path(&self, path: &str) -> u64 {
        self.bytes(&[path.as_bytes(), b"\0"].concat())
    }

    /// Writes up to 4 KiB of bytes into the memory of the thread and returns their address.
    ///
    /// # Panics
    /// If the memory cannot be written.
    #[track_caller]
    pub fn bytes(&self, bytes: &[u8]) -> u64 {
        let address = self.saved.rsp - 4096;
        self.memory.write_all_at(bytes, address).expect("write its memory");
        address
    }

    /// Asserts that each of `calls` fails with the error `errno`.
    ///
    /// # Panics
    /// If a call succeeds or fails with another error.
    #[track_caller]
    pub fn is_refused(&self, errno: i32, calls: &[Call]) {
        for (name, number, arguments) in calls {
            match self.call(*number, *arguments) {
                Ok(result) => panic!("{name} succeeded: {result}"),
                Err(error) => assert_eq!(error.raw_os_error(), Some(errno), "{name}: {error}"),
            }
        }
    }

    /// System calls that a process that forwards packets does not need: files, processes,
    /// namespaces, privileges, devices, other sockets. `file` is the address of the path of a
    /// readable file, from [`Self::path`].
    #[must_use]
    pub fn attempts(&self, file: u64) -> Vec<Call> {
        let cwd = libc::AT_FDCWD as u64;
        let (user, network) = (libc::CLONE_NEWUSER as u64, libc::CLONE_NEWNET as u64);
        let (write, create) = (libc::O_RDWR as u64, (libc::O_WRONLY | libc::O_CREAT) as u64);
        let executable = (libc::PROT_READ | libc::PROT_EXEC) as u64;
        let private = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;
        let socket = |family: i32, kind: i32| [family as u64, kind as u64, 0, 0, 0, 0];
        vec![
            ("open", libc::SYS_open, [file, 0, 0, 0, 0, 0]),
            ("openat, to write", libc::SYS_openat, [cwd, file, write, 0, 0, 0]),
            ("openat, to create", libc::SYS_openat, [cwd, file, create, 0o600, 0, 0]),
            ("openat2", libc::SYS_openat2, [cwd, file, file, 24, 0, 0]),
            ("unlinkat", libc::SYS_unlinkat, [cwd, file, 0, 0, 0, 0]),
            ("renameat2", libc::SYS_renameat2, [cwd, file, cwd, file, 0, 0]),
            ("unshare, user", libc::SYS_unshare, [user, 0, 0, 0, 0, 0]),
            ("unshare, network", libc::SYS_unshare, [network, 0, 0, 0, 0, 0]),
            ("setns", libc::SYS_setns, [4, 0, 0, 0, 0, 0]),
            ("clone, user", libc::SYS_clone, [user, 0, 0, 0, 0, 0]),
            ("clone, a process", libc::SYS_clone, [libc::SIGCHLD as u64, 0, 0, 0, 0, 0]),
            ("fork", libc::SYS_fork, [0; 6]),
            ("execve", libc::SYS_execve, [file, 0, 0, 0, 0, 0]),
            ("execveat", libc::SYS_execveat, [cwd, file, 0, 0, 0, 0]),
            ("ptrace", libc::SYS_ptrace, [libc::PTRACE_TRACEME as u64, 0, 0, 0, 0, 0]),
            ("kill", libc::SYS_kill, [1, 0, 0, 0, 0, 0]),
            ("mount", libc::SYS_mount, [file, file, file, 0, 0, 0]),
            ("pivot_root", libc::SYS_pivot_root, [file, file, 0, 0, 0, 0]),
            ("chroot", libc::SYS_chroot, [file, 0, 0, 0, 0, 0]),
            ("bpf", libc::SYS_bpf, [0; 6]),
            ("io_uring_setup", libc::SYS_io_uring_setup, [1, file, 0, 0, 0, 0]),
            ("ioctl", libc::SYS_ioctl, [6, 0x8004_54d2, file, 0, 0, 0]),
            ("setuid", libc::SYS_setuid, [0; 6]),
            ("prctl", libc::SYS_prctl, [libc::PR_SET_DUMPABLE as u64, 1, 0, 0, 0, 0]),
            ("socket, unix", libc::SYS_socket, socket(libc::AF_UNIX, libc::SOCK_STREAM)),
            ("socket, netlink", libc::SYS_socket, socket(libc::AF_NETLINK, libc::SOCK_RAW)),
            ("socket, packet", libc::SYS_socket, socket(libc::AF_PACKET, libc::SOCK_RAW)),
            ("executable memory", libc::SYS_mmap, [0, 4096, executable, private, u64::MAX, 0]),
        ]
    }
}

/// Asserts that all threads of process `pid` can only forward connections to TCP port `port`.
///
/// # Panics
/// If a thread can do more, or less.
#[track_caller]
pub fn assert_confined_to_forwarding(pid: u32, port: u16) {
    /// `CAP_NET_ADMIN` and `CAP_SYS_RESOURCE`, for buffer and pipe sizes.
    const SIZES: u64 = 1 << 12 | 1 << 24;
    for task in tasks(pid) {
        assert_confined(&task, SIZES);
        let puppet = Puppet::seize(&task);
        let cwd = libc::AT_FDCWD as u64;
        let file = puppet.path("/etc/passwd");
        puppet.is_refused(libc::EPERM, &puppet.attempts(file));
        puppet.is_refused(libc::ENOSYS, &[("clone3", libc::SYS_clone3, [file, 88, 0, 0, 0, 0])]);
        for path in ["/etc/passwd", "/proc/1/environ", "/root", "/run"] {
            let path_at = puppet.path(path);
            puppet
                .is_refused(libc::EACCES, &[(path, libc::SYS_openat, [cwd, path_at, 0, 0, 0, 0])]);
        }
        let own = puppet.path("/proc/self/limits");
        let own =
            puppet.call(libc::SYS_openat, [cwd, own, 0, 0, 0, 0]).expect("open its own limits");
        puppet.call(libc::SYS_close, [own, 0, 0, 0, 0, 0]).expect("close");
        let socket = [libc::AF_INET as u64, libc::SOCK_STREAM as u64, 0, 0, 0, 0];
        let socket = puppet.call(libc::SYS_socket, socket).expect("create an IP socket");
        let one = puppet.bytes(&1_u32.to_ne_bytes());
        let option = |name, level: i32, option: i32| {
            (name, libc::SYS_setsockopt, [socket, level as u64, option as u64, one, 4, 0])
        };
        let options = [
            option("mark", libc::SOL_SOCKET, libc::SO_MARK),
            option("IPv4 transparent", libc::SOL_IP, libc::IP_TRANSPARENT),
            option("IPv6 transparent", libc::SOL_IPV6, libc::IPV6_TRANSPARENT),
        ];
        puppet.is_refused(libc::EPERM, &options);
        let [high, low] = (port + 1).to_be_bytes();
        let elsewhere = puppet.bytes(&[2, 0, high, low, 127, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0]);
        let connect = ("connect, other port", libc::SYS_connect, [socket, elsewhere, 16, 0, 0, 0]);
        puppet.is_refused(libc::EACCES, &[connect]);
        puppet.call(libc::SYS_close, [socket, 0, 0, 0, 0, 0]).expect("close");
    }
}

impl Drop for Puppet {
    fn drop(&mut self) {
        // SAFETY: as in `seize`. The thread continues in its original state.
        unsafe {
            libc::ptrace(libc::PTRACE_SETREGS, self.thread, 0, &raw const self.saved);
            libc::ptrace(libc::PTRACE_DETACH, self.thread, 0, 0);
        }
    }
}

fn checked(result: libc::c_long) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// # Safety
/// The thread must be stopped and traced by this one.
unsafe fn registers(thread: libc::pid_t) -> libc::user_regs_struct {
    // SAFETY: all-zero is a valid value, and is overwritten.
    unsafe {
        let mut registers: libc::user_regs_struct = std::mem::zeroed();
        checked(libc::ptrace(libc::PTRACE_GETREGS, thread, 0, &raw mut registers)).expect("ptrace");
        registers
    }
}
