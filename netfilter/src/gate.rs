//! A gate at a link's exit: a program of our own in the kernel (BPF, attached by tcx), which outlasts the process that put it there and every flush of firewall
//! rules. It goes with its link.
//!
//! ```text
//!  routed, or sent by the host ─► gate: came in by a link, and has no mark? ─► drop
//!                                            │ no
//!                                            ▼
//!                                          link
//! ```
//!
//! What does the same with policy rules costs every packet of the host more: as soon as there is any, the kernel looks routes and sources up in full, and has no
//! hints from one packet to the next (`fib4_has_custom_rules`, net/ipv4). The program is eight instructions.
//!
//! Needs Linux 6.6 (tcx), CAP_NET_ADMIN and CAP_BPF on the host itself; a user namespace's do not count.

use rustix::io::Errno;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// `BPF_PROG_LOAD`, `BPF_PROG_ATTACH`, `BPF_PROG_GET_FD_BY_ID`, `BPF_OBJ_GET_INFO_BY_FD`, `BPF_PROG_QUERY` (`enum bpf_cmd`).
mod command {
    pub(super) const LOAD: libc::c_long = 5;
    pub(super) const ATTACH: libc::c_long = 8;
    pub(super) const BY_ID: libc::c_long = 13;
    pub(super) const INFO: libc::c_long = 15;
    pub(super) const QUERY: libc::c_long = 16;
}

/// `BPF_PROG_TYPE_SCHED_CLS`.
const CLASSIFIER: u32 = 3;
/// `BPF_TCX_EGRESS` (`enum bpf_attach_type`).
const EGRESS: u32 = 47;
/// `BPF_F_BEFORE`: ahead of all others, so that none of theirs says "let it pass" first.
const BEFORE: u32 = 1 << 3;
/// Programs at one exit that are looked at (`BPF_MPROG_MAX`).
const PROGRAMS: usize = 64;
/// `lo`, in every network namespace.
const LOOPBACK: u32 = 1;
/// What lists of programs (bpftool-prog(8)) call it; at most 15 bytes.
const NAME: &[u8] = b"tg_gate";

/// What the kernel knows a program by: a hash of its instructions.
type Tag = [u8; 8];

/// The program, loaded.
#[derive(Debug)]
pub struct Gate {
    program: OwnedFd,
    tag: Tag,
}

impl Gate {
    /// A gate that lets pass what the host itself sends, and what has `mark` in the bits of `mask` of its packet mark.
    ///
    /// # Errors
    /// The kernel is too old, or does not let us: the gate is to be had nowhere here.
    pub fn new(mark: u32, mask: u32) -> io::Result<Self> {
        let instructions = program(mark, mask);
        let license = c"Apache-2.0";
        let mut name = [0; 16];
        name[..NAME.len()].copy_from_slice(NAME);
        let mut attributes = Load {
            kind: CLASSIFIER,
            count: instructions.len() as u32,
            instructions: instructions.as_ptr() as u64,
            license: license.as_ptr() as u64,
            name,
            ..Load::default()
        };
        // SAFETY: `Load` is the head of `union bpf_attr` for this command; what it points to outlives the call.
        let program = unsafe { bpf(command::LOAD, &mut attributes) }?;
        // SAFETY: the kernel has just made it, and nobody else knows of it.
        let program = unsafe { OwnedFd::from_raw_fd(program) };
        let tag = tag(&program)?;
        let gate = Self { program, tag };
        // Whether exits take programs at all.
        gate.at(LOOPBACK)?;
        Ok(gate)
    }

    /// Whether it is at the exit of the link numbered `index`, of the calling thread's namespace; this one or one like it.
    ///
    /// # Errors
    /// The kernel's: there is no such link.
    pub fn is_at(&self, index: u32) -> io::Result<bool> {
        self.at(index)
    }

    /// Puts it at the exit of the link numbered `index`, of the calling thread's namespace, in front of what is there. One like it that is there already makes no difference.
    ///
    /// # Errors
    /// The kernel's: there is no such link.
    pub fn put(&self, index: u32) -> io::Result<()> {
        let mut attributes = Attach {
            link: index,
            program: self.program.as_raw_fd() as u32,
            kind: EGRESS,
            flags: BEFORE,
            ..Attach::default()
        };
        // SAFETY: `Attach` is the head of `union bpf_attr` for this command.
        match unsafe { bpf(command::ATTACH, &mut attributes) } {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            result => result.map(drop),
        }
    }

    fn at(&self, index: u32) -> io::Result<bool> {
        let mut ids = [0_u32; PROGRAMS];
        let mut attributes = Query {
            link: index,
            kind: EGRESS,
            ids: ids.as_mut_ptr() as u64,
            count: PROGRAMS as u32,
            ..Query::default()
        };
        // SAFETY: `Query` is the head of `union bpf_attr` for this command, and `ids` has room for `count`.
        unsafe { bpf(command::QUERY, &mut attributes) }?;
        let found = ids.iter().take(attributes.count as usize);
        // One that may not be looked at (that takes CAP_SYS_ADMIN) counts as somebody else's.
        Ok(found.copied().any(|id| program_of(id).is_ok_and(|tag| tag == self.tag)))
    }
}

/// The tag of the program numbered `id`.
fn program_of(id: u32) -> io::Result<Tag> {
    let mut attributes = ById { id, ..ById::default() };
    // SAFETY: `ById` is the head of `union bpf_attr` for this command.
    let program = unsafe { bpf(command::BY_ID, &mut attributes) }?;
    // SAFETY: the kernel has just made it, and nobody else knows of it.
    tag(&unsafe { OwnedFd::from_raw_fd(program) })
}

fn tag(program: &OwnedFd) -> io::Result<Tag> {
    let mut told = Told::default();
    let mut attributes = Info {
        program: program.as_raw_fd() as u32,
        length: size_of::<Told>() as u32,
        told: (&raw mut told) as u64,
    };
    // SAFETY: `Info` is the head of `union bpf_attr` for this command, and `told` is as long as it says.
    unsafe { bpf(command::INFO, &mut attributes) }?;
    Ok(told.tag)
}

/// An instruction (`struct bpf_insn`).
#[derive(Clone, Copy)]
#[repr(C)]
struct Instruction {
    code: u8,
    /// The source in the upper half, the destination in the lower.
    registers: u8,
    offset: i16,
    immediate: i32,
}

/// What a packet's fields are called in `struct __sk_buff`: offsets in bytes.
mod field {
    pub(super) const MARK: i16 = 8;
    /// The link it came in by; 0 for what the host sends.
    pub(super) const IN_INTERFACE: i16 = 36;
}

/// Verdicts: `TCX_NEXT`, whoever comes behind decides; `TCX_DROP`.
const NEXT: i32 = -1;
const DROP: i32 = 2;

fn program(mark: u32, mask: u32) -> [Instruction; 8] {
    const CONTEXT: u8 = 1;
    const SCRATCH: u8 = 2;
    let of = |code, registers, offset, immediate| Instruction { code, registers, offset, immediate };
    // BPF_LDX | BPF_MEM | BPF_W
    let load = |offset| of(0x61, CONTEXT << 4 | SCRATCH, offset, 0);
    // BPF_ALU64 | BPF_MOV | BPF_K, to the register of results
    let result = |verdict| of(0xb7, 0, 0, verdict);
    [
        result(NEXT),
        load(field::IN_INTERFACE),
        // BPF_JMP32 | BPF_JEQ | BPF_K: to the end
        of(0x16, SCRATCH, 4, 0),
        load(field::MARK),
        // BPF_ALU | BPF_AND | BPF_K
        of(0x54, SCRATCH, 0, mask.cast_signed()),
        of(0x16, SCRATCH, 1, (mark & mask).cast_signed()),
        result(DROP),
        // BPF_JMP | BPF_EXIT
        of(0x95, 0, 0, 0),
    ]
}

/// Calls the kernel. Returns what it returns.
///
/// # Safety
/// `attributes` is laid out as `union bpf_attr` for `command`, and what it points to as the kernel will read and write it.
unsafe fn bpf<T>(command: libc::c_long, attributes: &mut T) -> io::Result<i32> {
    // SAFETY: the caller's promise.
    let result = unsafe {
        libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attributes), size_of::<T>() as libc::c_long)
    };
    match i32::try_from(result) {
        Ok(result) if result >= 0 => Ok(result),
        Ok(_) => Err(io::Error::last_os_error()),
        Err(_) => Err(Errno::OVERFLOW.into()),
    }
}

#[derive(Default)]
#[repr(C)]
struct Load {
    kind: u32,
    count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    version: u32,
    flags: u32,
    name: [u8; 16],
}

#[derive(Default)]
#[repr(C)]
struct Attach {
    link: u32,
    program: u32,
    kind: u32,
    flags: u32,
    relative: u32,
    _padding: u32,
    revision: u64,
}

#[derive(Default)]
#[repr(C)]
struct Query {
    link: u32,
    kind: u32,
    flags: u32,
    attach_flags: u32,
    ids: u64,
    count: u32,
    _padding: u32,
    flags_of_each: u64,
    links: u64,
    flags_of_links: u64,
    revision: u64,
}

#[derive(Default)]
#[repr(C)]
struct ById {
    id: u32,
    next: u32,
    flags: u32,
}

#[repr(C)]
struct Info {
    program: u32,
    length: u32,
    told: u64,
}

/// The head of `struct bpf_prog_info`.
#[derive(Default)]
#[repr(C)]
struct Told {
    kind: u32,
    id: u32,
    tag: Tag,
}
