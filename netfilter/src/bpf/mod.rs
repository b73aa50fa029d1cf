//! BPF programs at link ingress and egress: loading, attachment and counters.
//!
//! Programs are attached through tcx (Linux 6.6, `kernel/bpf/tcx.c`) with bpf(2), or on older
//! kernels through a clsact qdisc with a `cls_bpf` classifier over rtnetlink ([`clsact`]). In both
//! cases a program persists after its process exits and is removed with its link.
//!
//! The programs have a few hundred instructions at most and are assembled in this crate. A loader
//! such as aya, with ELF objects, relocations and pinning, is therefore unnecessary.

pub(crate) mod assembly;
pub(crate) mod clsact;
pub(crate) mod extension_headers;
pub(crate) mod foreign;

use clsact::{Attached, Clsact, Code};
use rustix::io::Errno;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;
use tidegate_model::{Feature, LOOPBACK_INDEX};

/// `enum bpf_cmd`.
mod command {
    pub(super) const MAP_CREATE: libc::c_long = 0;
    pub(super) const MAP_LOOKUP: libc::c_long = 1;
    pub(super) const MAP_UPDATE: libc::c_long = 2;
    pub(super) const MAP_DELETE: libc::c_long = 3;
    pub(super) const MAP_NEXT_KEY: libc::c_long = 4;
    pub(super) const LOAD: libc::c_long = 5;
    pub(super) const ATTACH: libc::c_long = 8;
    pub(super) const DETACH: libc::c_long = 9;
    pub(super) const TEST_RUN: libc::c_long = 10;
    pub(super) const NEXT_ID: libc::c_long = 11;
    pub(super) const BY_ID: libc::c_long = 13;
    pub(super) const MAP_BY_ID: libc::c_long = 14;
    pub(super) const INFO: libc::c_long = 15;
    pub(super) const QUERY: libc::c_long = 16;
}

/// `BPF_PROG_TYPE_SCHED_CLS`.
const CLASSIFIER: u32 = 3;
/// `BPF_MAP_TYPE_HASH`.
const HASH: u32 = 1;
/// `BPF_F_NO_PREALLOC`: elements are allocated when they are added.
const NO_PREALLOCATION: u32 = 1;
/// `BPF_MAP_TYPE_LPM_TRIE`.
const TRIE: u32 = 11;
/// `BPF_MAP_TYPE_ARRAY`.
const ARRAY: u32 = 2;
/// `BPF_MAP_TYPE_LRU_HASH`.
const LRU_HASH: u32 = 9;
/// `BPF_F_BEFORE`: attaches ahead of existing programs, so that none of them accepts a packet
/// first.
const BEFORE: u32 = 1 << 3;
/// `BPF_F_AFTER`: attaches behind existing programs.
const AFTER: u32 = 1 << 4;
/// Maximum number of maps of a program of this crate.
const MAPS: usize = 5;
/// Maximum number of programs at one hook (`BPF_MPROG_MAX`).
const PROGRAMS: usize = 64;
/// A traffic direction of a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    /// Received by the link.
    Ingress,
    /// Transmitted through the link.
    Egress,
}

impl Direction {
    /// `BPF_TCX_INGRESS`, `BPF_TCX_EGRESS` (`enum bpf_attach_type`).
    const fn attach_type(self) -> u32 {
        match self {
            Self::Ingress => 46,
            Self::Egress => 47,
        }
    }
}

/// Hash of the instructions of a program (`bpf_prog_calc_tag`).
type Tag = [u8; 8];

/// A loaded program.
#[derive(Debug)]
pub(crate) struct Program {
    descriptor: OwnedFd,
    /// ID of the program.
    pub(crate) id: u32,
    /// Equal for programs with the same instructions.
    tag: Tag,
}

impl Program {
    /// Loads `instructions` under `name` (at most 15 bytes, for bpftool-prog(8)).
    ///
    /// # Errors
    /// `EPERM` without CAP_BPF and CAP_NET_ADMIN in the initial user namespace; `EINVAL` on an old
    /// kernel.
    pub(crate) fn load(name: &str, instructions: &[Instruction]) -> io::Result<Self> {
        let license = c"Apache-2.0";
        let mut attributes = Load {
            kind: CLASSIFIER,
            count: instructions.len() as u32,
            instructions: instructions.as_ptr() as u64,
            license: license.as_ptr() as u64,
            ..Load::default()
        };
        attributes.name[..name.len()].copy_from_slice(name.as_bytes());
        // SAFETY: `Load` is the head of `union bpf_attr` for this command; its pointees outlive the
        // call.
        let descriptor = unsafe { open(command::LOAD, &mut attributes) }?;
        let Loaded { id, tag, .. } = info(&descriptor)?;
        Ok(Self { descriptor, id, tag })
    }

    /// Attaches the program through tcx to the link with interface index `index` in the calling
    /// thread's network namespace, ahead of existing programs. Does nothing if it is already
    /// attached.
    ///
    /// # Errors
    /// `ENODEV` if the link does not exist; `EINVAL` before Linux 6.6.
    pub(crate) fn attach_tcx(&self, index: u32, direction: Direction) -> io::Result<()> {
        self.attach_tcx_at(index, direction, BEFORE)
    }

    /// Same as [`attach_tcx`](Self::attach_tcx), but behind existing programs.
    ///
    /// # Errors
    /// `ENODEV` if the link does not exist; `EINVAL` before Linux 6.6.
    pub(crate) fn attach_tcx_last(&self, index: u32, direction: Direction) -> io::Result<()> {
        self.attach_tcx_at(index, direction, AFTER)
    }

    fn attach_tcx_at(&self, index: u32, direction: Direction, flags: u32) -> io::Result<()> {
        let mut attributes = Attach {
            link: index,
            program: self.descriptor.as_raw_fd() as u32,
            kind: direction.attach_type(),
            flags,
            ..Attach::default()
        };
        // SAFETY: `Attach` is the head of `union bpf_attr` for this command.
        match unsafe { bpf(command::ATTACH, &mut attributes) } {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            result => result.map(drop),
        }
    }

    /// Returns the file descriptor, for `cls_bpf`.
    pub(crate) fn descriptor(&self) -> u32 {
        self.descriptor.as_raw_fd() as u32
    }

    /// Runs the program `times` times on `frame`. Returns its verdict and the mean time of a run.
    pub(crate) fn test_run(&self, frame: &[u8], times: u32) -> io::Result<(i32, Duration)> {
        let mut attributes = TestRun {
            program: self.descriptor.as_raw_fd() as u32,
            length: frame.len() as u32,
            frame: frame.as_ptr() as u64,
            repeat: times,
            ..TestRun::default()
        };
        // SAFETY: `TestRun` is the head of `union bpf_attr` for this command, and `frame` outlives
        // the call.
        unsafe { bpf(command::TEST_RUN, &mut attributes) }?;
        Ok((attributes.verdict.cast_signed(), Duration::from_nanos(attributes.duration.into())))
    }

    /// Runs the program on `frame`. Returns the frame as the program leaves it.
    #[cfg(test)]
    pub(crate) fn output(&self, frame: &[u8]) -> Vec<u8> {
        let mut output = vec![0_u8; frame.len()];
        let mut attributes = TestRun {
            program: self.descriptor.as_raw_fd() as u32,
            length: frame.len() as u32,
            length_out: output.len() as u32,
            frame: frame.as_ptr() as u64,
            frame_out: output.as_mut_ptr() as u64,
            repeat: 1,
            ..TestRun::default()
        };
        // SAFETY: `TestRun` is the head of `union bpf_attr` for this command, and both buffers
        // outlive the call.
        unsafe { bpf(command::TEST_RUN, &mut attributes) }.unwrap();
        assert_eq!(attributes.verdict.cast_signed(), verdict::NEXT);
        output
    }
}

/// Lists the IDs of the tcx programs at the link with interface index `index` in the calling
/// thread's network namespace, in execution order.
///
/// # Errors
/// `ENODEV` if the link does not exist; `EINVAL` before Linux 6.6.
pub(crate) fn tcx_programs(index: u32, direction: Direction) -> io::Result<Vec<u32>> {
    let mut ids = [0_u32; PROGRAMS];
    let mut attributes = Query {
        link: index,
        kind: direction.attach_type(),
        ids: ids.as_mut_ptr() as u64,
        count: PROGRAMS as u32,
        ..Query::default()
    };
    // SAFETY: `Query` is the head of `union bpf_attr` for this command, and `ids` has room for
    // `count`.
    unsafe { bpf(command::QUERY, &mut attributes) }?;
    Ok(ids.into_iter().take(attributes.count as usize).collect())
}

/// A program for one hook of links. Uses tcx if the kernel supports it, otherwise the `clsact`
/// qdisc.
#[derive(Debug)]
pub(crate) struct LinkProgram {
    program: Program,
    direction: Direction,
    /// Name of the program and of its classifier.
    name: &'static str,
    tcx: bool,
}

impl LinkProgram {
    /// Loads the program and probes for tcx in the calling thread's network namespace.
    ///
    /// # Errors
    /// Same as [`Program::load`].
    pub(crate) fn load(
        name: &'static str,
        direction: Direction,
        instructions: &[Instruction],
    ) -> io::Result<Self> {
        let program = Program::load(name, instructions)?;
        let tcx = !Feature::Tcx.is_forced_off() && tcx_programs(LOOPBACK_INDEX, direction).is_ok();
        Ok(Self { program, direction, name, tcx })
    }

    /// Returns whether a program with the same instructions is attached to the link with interface
    /// index `index` in the calling thread's network namespace.
    ///
    /// # Errors
    /// `ENODEV` if the link does not exist.
    pub(crate) fn is_attached(&self, index: u32) -> io::Result<bool> {
        // Reading the tag takes CAP_SYS_ADMIN. A program whose tag cannot be read counts as a
        // foreign program.
        Ok(self
            .attached(index)?
            .into_iter()
            .any(|id| tag_of(id).is_ok_and(|tag| tag == self.program.tag)))
    }

    /// Returns the IDs of the programs at the hook.
    fn attached(&self, index: u32) -> io::Result<Vec<u32>> {
        if self.tcx {
            return tcx_programs(index, self.direction);
        }
        Ok(match Clsact::open()?.attached(index, self.direction, self.name)? {
            Some(Attached::Program(id)) => vec![id],
            _ => Vec::new(),
        })
    }

    /// Returns whether this very program is attached to the link with interface index `index` in
    /// the calling thread's network namespace.
    ///
    /// # Errors
    /// `ENODEV` if the link does not exist.
    pub(crate) fn is_own_attached(&self, index: u32) -> io::Result<bool> {
        Ok(self.attached(index)?.contains(&self.program.id))
    }

    /// Runs the program once on `frame`. Returns its verdict.
    pub(crate) fn test_run(&self, frame: &[u8]) -> io::Result<i32> {
        self.program.test_run(frame, 1).map(|(verdict, _)| verdict)
    }

    /// Attaches the program to the link with interface index `index` in the calling thread's
    /// network namespace, ahead of existing programs. Does nothing if it is already attached.
    ///
    /// # Errors
    /// `ENODEV` if the link does not exist.
    pub(crate) fn attach(&self, index: u32) -> io::Result<()> {
        if self.tcx {
            self.program.attach_tcx(index, self.direction)?;
            return detach_stale(index, self.direction, self.name, self.program.id);
        }
        let code = Code::Descriptor(self.program.descriptor());
        Clsact::open()?.attach(index, self.direction, self.name, code)
    }
}

/// Detaches the program with ID `id` from the link with interface index `index` in the calling
/// thread's network namespace.
///
/// # Errors
/// `ENODEV` if the link does not exist, `ENOENT` if the program does not exist.
pub(crate) fn detach_tcx(index: u32, direction: Direction, id: u32) -> io::Result<()> {
    let mut attributes = ById { id, ..ById::default() };
    // SAFETY: `ById` is the head of `union bpf_attr` for this command.
    let program = unsafe { open(command::BY_ID, &mut attributes) }?;
    let mut attributes = Attach {
        link: index,
        program: program.as_raw_fd() as u32,
        kind: direction.attach_type(),
        ..Attach::default()
    };
    // SAFETY: `Attach` is the head of `union bpf_attr` for this command.
    unsafe { bpf(command::DETACH, &mut attributes) }.map(drop)
}

/// Detaches the programs other than `current` whose names start with `prefix` from the link with
/// interface index `index`: programs of a process that was killed, or with an earlier policy. All
/// programs at a hook run, so the strictest one would prevail.
///
/// # Errors
/// Errors of the kernel, except for a program that is removed concurrently.
pub(crate) fn detach_stale(
    index: u32,
    direction: Direction,
    prefix: &str,
    current: u32,
) -> io::Result<()> {
    for id in tcx_programs(index, direction)? {
        let is_stale = |loaded: Loaded| loaded.name().starts_with(prefix.as_bytes());
        if id != current && info_of(id).is_ok_and(is_stale) {
            match detach_tcx(index, direction, id) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                detached => detached?,
            }
        }
    }
    Ok(())
}

/// Finds the program named `name` at the link with interface index `index`, and its counters: that
/// of a process that was killed.
///
/// # Errors
/// Errors of the kernel.
pub(crate) fn find_named(
    index: u32,
    direction: Direction,
    name: &str,
) -> io::Result<Option<(u32, Counters)>> {
    for id in tcx_programs(index, direction)? {
        if let Some(counters) = counters_of(id, name)? {
            return Ok(Some((id, counters)));
        }
    }
    Ok(None)
}

/// Returns the counters of the program with ID `id`, if its name is `name`. `None` if it does not
/// exist any longer.
///
/// # Errors
/// Errors of the kernel.
pub(crate) fn counters_of(id: u32, name: &str) -> io::Result<Option<Counters>> {
    let Ok(loaded) = info_of(id) else { return Ok(None) };
    let Some(&id) = loaded.maps.first().filter(|_| loaded.name() == name.as_bytes()) else {
        return Ok(None);
    };
    let mut attributes = ById { id, ..ById::default() };
    // SAFETY: `ById` is the head of `union bpf_attr` for this command.
    let map = unsafe { open(command::MAP_BY_ID, &mut attributes) }?;
    Ok(Some(Counters(map)))
}

/// Empties the last map of each program named `name` whose ID is not `current`, wherever it is
/// attached.
///
/// # Errors
/// Errors of the kernel. Programs and maps that are removed concurrently are not an error.
pub(crate) fn empty_last_map(name: &str, current: u32) -> io::Result<()> {
    let mut attributes = ById::default();
    loop {
        // SAFETY: `ById` is the head of `union bpf_attr` for this command.
        match unsafe { bpf(command::NEXT_ID, &mut attributes) } {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            found => found?,
        };
        let id = attributes.next;
        attributes = ById { id, ..ById::default() };
        let Ok(loaded) = info_of(id) else { continue };
        if id == current || loaded.name() != name.as_bytes() {
            continue;
        }
        if let Some(last) = loaded.maps.last()
            && let Ok(set) = HashSet::of_id(*last)
        {
            set.clear()?;
        }
    }
}

/// Returns the tag of the program with ID `id`. Needs CAP_SYS_ADMIN.
fn tag_of(id: u32) -> io::Result<Tag> {
    info_of(id).map(|loaded| loaded.tag)
}

fn info_of(id: u32) -> io::Result<Loaded> {
    let mut attributes = ById { id, ..ById::default() };
    // SAFETY: `ById` is the head of `union bpf_attr` for this command.
    let program = unsafe { open(command::BY_ID, &mut attributes) }?;
    info(&program)
}

/// An array map of counters that a program increments.
#[derive(Debug)]
pub(crate) struct Counters(OwnedFd);

impl Counters {
    /// Creates `count` counters with value 0. `name` has at most 15 bytes.
    ///
    /// # Errors
    /// Same as [`Program::load`].
    pub(crate) fn new(name: &str, count: u32) -> io::Result<Self> {
        let mut attributes =
            MapCreate { kind: ARRAY, key: 4, value: 8, entries: count, ..MapCreate::default() };
        attributes.name[..name.len()].copy_from_slice(name.as_bytes());
        // SAFETY: `MapCreate` is the head of `union bpf_attr` for this command.
        unsafe { open(command::MAP_CREATE, &mut attributes) }.map(Self)
    }

    /// Returns the file descriptor, for instructions.
    pub(crate) fn descriptor(&self) -> i32 {
        self.0.as_raw_fd()
    }

    /// Returns the value of counter `index`.
    ///
    /// # Errors
    /// `index` is out of range.
    pub(crate) fn read(&self, index: u32) -> io::Result<u64> {
        let mut value = 0_u64;
        let mut attributes = Lookup {
            map: self.0.as_raw_fd() as u32,
            _padding: 0,
            key: (&raw const index) as u64,
            value: (&raw mut value) as u64,
            flags: 0,
        };
        // SAFETY: `Lookup` is the head of `union bpf_attr` for this command; key and value have the
        // map's sizes.
        unsafe { bpf(command::MAP_LOOKUP, &mut attributes) }?;
        Ok(value)
    }

    /// Sets the value of counter `index`.
    ///
    /// # Errors
    /// `index` is out of range.
    pub(crate) fn write(&self, index: u32, value: u64) -> io::Result<()> {
        let mut attributes = Lookup {
            map: self.0.as_raw_fd() as u32,
            _padding: 0,
            key: (&raw const index) as u64,
            value: (&raw const value) as u64,
            flags: 0,
        };
        // SAFETY: `Lookup` is the head of `union bpf_attr` for this command too; key and value have
        // the map's sizes.
        unsafe { bpf(command::MAP_UPDATE, &mut attributes) }.map(drop)
    }
}

/// A hash map of keys without values that a program looks up.
#[derive(Debug)]
pub(crate) struct HashSet {
    map: OwnedFd,
    key: usize,
}

impl HashSet {
    /// Creates a set of at most `capacity` keys of `key` bytes. `name` has at most 15 bytes.
    ///
    /// # Errors
    /// Same as [`Program::load`].
    pub(crate) fn new(name: &str, key: u32, capacity: u32) -> io::Result<Self> {
        Self::of_kind(HASH, name, key, capacity)
    }

    fn of_kind(kind: u32, name: &str, key: u32, capacity: u32) -> io::Result<Self> {
        let mut attributes = MapCreate {
            kind,
            key,
            value: 1,
            entries: capacity,
            flags: NO_PREALLOCATION,
            ..MapCreate::default()
        };
        attributes.name[..name.len()].copy_from_slice(name.as_bytes());
        // SAFETY: `MapCreate` is the head of `union bpf_attr` for this command.
        let map = unsafe { open(command::MAP_CREATE, &mut attributes) }?;
        Ok(Self { map, key: key as usize })
    }

    /// Opens the set with this map ID. Its keys have 4 bytes.
    fn of_id(id: u32) -> io::Result<Self> {
        let mut attributes = ById { id, ..ById::default() };
        // SAFETY: `ById` is the head of `union bpf_attr` for this command.
        let map = unsafe { open(command::MAP_BY_ID, &mut attributes) }?;
        Ok(Self { map, key: 4 })
    }

    /// Removes all keys.
    fn clear(&self) -> io::Result<()> {
        let mut key = vec![0; self.key];
        loop {
            let mut attributes = Lookup {
                map: self.map.as_raw_fd() as u32,
                _padding: 0,
                // No key: the first one is returned.
                key: 0,
                value: key.as_mut_ptr() as u64,
                flags: 0,
            };
            // SAFETY: `Lookup` is the head of `union bpf_attr` for this command too; `key` has the
            // size of the map's keys.
            match unsafe { bpf(command::MAP_NEXT_KEY, &mut attributes) } {
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
                found => found?,
            };
            self.remove(&key)?;
        }
    }

    /// Returns the file descriptor, for instructions.
    pub(crate) fn descriptor(&self) -> i32 {
        self.map.as_raw_fd()
    }

    /// Adds `key`.
    ///
    /// # Errors
    /// `E2BIG` if the set is full.
    pub(crate) fn insert(&self, key: &[u8]) -> io::Result<()> {
        assert_eq!(key.len(), self.key);
        let value = 1_u8;
        let mut attributes = self.lookup(key, Some(&value));
        // SAFETY: `Lookup` is the head of `union bpf_attr` for this command too; key and value have
        // the map's sizes.
        unsafe { bpf(command::MAP_UPDATE, &mut attributes) }.map(drop)
    }

    /// Removes `key`, if it is in the set.
    ///
    /// # Errors
    /// Errors of the kernel.
    pub(crate) fn remove(&self, key: &[u8]) -> io::Result<()> {
        assert_eq!(key.len(), self.key);
        let mut attributes = self.lookup(key, None);
        // SAFETY: `Lookup` is the head of `union bpf_attr` for this command too; the key has the
        // map's size.
        match unsafe { bpf(command::MAP_DELETE, &mut attributes) } {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            removed => removed.map(drop),
        }
    }

    fn lookup(&self, key: &[u8], value: Option<&u8>) -> Lookup {
        Lookup {
            map: self.map.as_raw_fd() as u32,
            _padding: 0,
            key: key.as_ptr() as u64,
            value: value.map_or(0, |value| std::ptr::from_ref(value) as u64),
            flags: 0,
        }
    }
}

/// A hash map that only programs access. It evicts the least recently used entry when it is full.
#[derive(Debug)]
pub(crate) struct LruMap(OwnedFd);

impl LruMap {
    /// Creates a map of `capacity` entries with keys of `key` bytes and values of `value` bytes.
    /// The kernel allocates all entries at once. `name` has at most 15 bytes.
    ///
    /// # Errors
    /// Same as [`Program::load`].
    pub(crate) fn new(name: &str, key: u32, value: u32, capacity: u32) -> io::Result<Self> {
        let mut attributes =
            MapCreate { kind: LRU_HASH, key, value, entries: capacity, ..MapCreate::default() };
        attributes.name[..name.len()].copy_from_slice(name.as_bytes());
        // SAFETY: `MapCreate` is the head of `union bpf_attr` for this command.
        unsafe { open(command::MAP_CREATE, &mut attributes) }.map(Self)
    }

    /// Returns the file descriptor, for instructions.
    pub(crate) fn descriptor(&self) -> i32 {
        self.0.as_raw_fd()
    }
}

/// A set of address prefixes, in which a program looks up addresses (`struct bpf_lpm_trie_key`).
#[derive(Debug)]
pub(crate) struct PrefixSet(HashSet);

impl PrefixSet {
    /// Creates a set of at most `capacity` prefixes of addresses of `length` bytes. `name` has at
    /// most 15 bytes.
    ///
    /// # Errors
    /// Same as [`Program::load`].
    pub(crate) fn new(name: &str, length: u32, capacity: u32) -> io::Result<Self> {
        HashSet::of_kind(TRIE, name, 4 + length, capacity).map(Self)
    }

    /// Returns the file descriptor, for instructions.
    pub(crate) fn descriptor(&self) -> i32 {
        self.0.descriptor()
    }

    /// Adds the prefix of `length` bits.
    ///
    /// # Errors
    /// `ENOSPC` if the set is full.
    pub(crate) fn insert(&self, address: &[u8], length: u8) -> io::Result<()> {
        self.0.insert(&Self::key(address, length))
    }

    /// Removes the prefix, if it is in the set.
    ///
    /// # Errors
    /// Errors of the kernel.
    pub(crate) fn remove(&self, address: &[u8], length: u8) -> io::Result<()> {
        self.0.remove(&Self::key(address, length))
    }

    fn key(address: &[u8], length: u8) -> Vec<u8> {
        let mut key = u32::from(length).to_ne_bytes().to_vec();
        key.extend(address);
        key
    }
}

fn info(program: &OwnedFd) -> io::Result<Loaded> {
    let mut maps = [0_u32; MAPS];
    let mut loaded = ProgramInfo {
        maps: MAPS as u32,
        map_ids: maps.as_mut_ptr() as u64,
        ..ProgramInfo::default()
    };
    let mut attributes = Info {
        program: program.as_raw_fd() as u32,
        length: size_of::<ProgramInfo>() as u32,
        info: (&raw mut loaded) as u64,
    };
    // SAFETY: `Info` is the head of `union bpf_attr` for this command, `loaded` has the length it
    // states, and `maps` has room for the IDs.
    unsafe { bpf(command::INFO, &mut attributes) }?;
    let ProgramInfo { id, tag, name, maps: count, .. } = loaded;
    Ok(Loaded { id, tag, name, maps: maps.into_iter().take(count as usize).collect() })
}

/// An instruction (`struct bpf_insn`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct Instruction {
    code: u8,
    /// Source register in the upper 4 bits, destination register in the lower 4 bits.
    registers: u8,
    offset: i16,
    immediate: i32,
}

impl Instruction {
    /// The bytes of the instruction.
    pub(crate) fn bytes(&self) -> [u8; 8] {
        let ([a, b], [c, d, e, f]) = (self.offset.to_le_bytes(), self.immediate.to_le_bytes());
        [self.code, self.registers, a, b, c, d, e, f]
    }

    /// Builds an instruction. `code` is `BPF_CLASS | BPF_OP | BPF_SRC`.
    pub(crate) const fn new(
        code: u8,
        destination: u8,
        source: u8,
        offset: i16,
        immediate: i32,
    ) -> Self {
        Self { code, registers: source << 4 | destination, offset, immediate }
    }

    /// Returns the instruction with the map `counters`, if it loads a map (`BPF_LD | BPF_IMM |
    /// BPF_DW` with `BPF_PSEUDO_MAP_FD`).
    pub(crate) fn with_map(self, counters: &Counters) -> Self {
        const SOURCE: u8 = 0xf0;
        if self.code == 0x18 && self.registers & SOURCE == 1 << 4 {
            return Self { immediate: counters.0.as_raw_fd(), ..self };
        }
        self
    }

    /// Returns the instruction with the given jump offset.
    pub(crate) const fn with_offset(self, offset: i16) -> Self {
        Self { offset, ..self }
    }
}

/// Offsets in `struct __sk_buff`, in bytes.
pub(crate) mod field {
    pub(crate) const LENGTH: i16 = 0;
    /// `PACKET_*` (include/uapi/linux/if_packet.h).
    pub(crate) const PACKET_TYPE: i16 = 4;
    pub(crate) const MARK: i16 = 8;
    /// Ethertype, in network byte order.
    pub(crate) const PROTOCOL: i16 = 16;
    /// Non-zero if the frame had a VLAN tag, which the kernel moves out of the frame.
    pub(crate) const VLAN_PRESENT: i16 = 20;
    /// That tag: priority and VLAN ID.
    pub(crate) const VLAN_TAG: i16 = 24;
    /// Interface index of the link at which the program runs.
    pub(crate) const INTERFACE: i16 = 40;
    /// Start and end of the linear part of the frame.
    pub(crate) const DATA: i16 = 76;
    pub(crate) const DATA_END: i16 = 80;
    /// Interface index of the ingress link. 0 for packets sent by the host, and for the fragments
    /// of forwarded IPv6 packets (`ip6_frag_next` does not copy it).
    pub(crate) const INGRESS_INTERFACE: i16 = 36;
    /// The socket that has sent the packet, or 0; 8 bytes.
    pub(crate) const SOCKET: i16 = 168;
}

/// Verdicts of tcx and of `cls_bpf` in direct-action mode: continue with the next program
/// (`TCX_NEXT`, `TC_ACT_UNSPEC`) or drop the packet (`TCX_DROP`, `TC_ACT_SHOT`).
pub(crate) mod verdict {
    pub(crate) const NEXT: i32 = -1;
    pub(crate) const DROP: i32 = 2;
}

/// Invokes bpf(2).
///
/// # Safety
/// `attributes` must have the layout of `union bpf_attr` for `command`, and its pointers must be
/// valid for the accesses of the kernel.
unsafe fn bpf<T>(command: libc::c_long, attributes: &mut T) -> io::Result<i32> {
    // SAFETY: the caller's promise.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_mut(attributes),
            size_of::<T>() as libc::c_long,
        )
    };
    match i32::try_from(result) {
        Ok(result) if result >= 0 => Ok(result),
        Ok(_) => Err(io::Error::last_os_error()),
        Err(_) => Err(Errno::OVERFLOW.into()),
    }
}

/// Invokes bpf(2) with a command that returns a new file descriptor.
///
/// # Safety
/// Same as [`bpf`].
unsafe fn open<T>(command: libc::c_long, attributes: &mut T) -> io::Result<OwnedFd> {
    // SAFETY: the caller's promise.
    let descriptor = unsafe { bpf(command, attributes) }?;
    // SAFETY: the kernel has just created the descriptor, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
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
struct MapCreate {
    kind: u32,
    key: u32,
    value: u32,
    entries: u32,
    flags: u32,
    inner: u32,
    node: u32,
    name: [u8; 16],
}

#[repr(C)]
struct Lookup {
    map: u32,
    _padding: u32,
    key: u64,
    value: u64,
    flags: u64,
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
struct TestRun {
    program: u32,
    verdict: u32,
    length: u32,
    length_out: u32,
    frame: u64,
    frame_out: u64,
    repeat: u32,
    duration: u32,
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
    info: u64,
}

/// Properties of a loaded program.
struct Loaded {
    id: u32,
    tag: Tag,
    name: [u8; 16],
    /// IDs of its maps, in the order in which the instructions refer to them.
    maps: Vec<u32>,
}

impl Loaded {
    fn name(&self) -> &[u8] {
        let end = self.name.iter().position(|byte| *byte == 0).unwrap_or(self.name.len());
        &self.name[..end]
    }
}

/// The head of `struct bpf_prog_info`.
#[derive(Default)]
#[repr(C)]
struct ProgramInfo {
    kind: u32,
    id: u32,
    tag: Tag,
    /// Lengths and buffers for instructions, and the load time. Not requested.
    _unused: [u64; 4],
    _owner: u32,
    maps: u32,
    map_ids: u64,
    name: [u8; 16],
}
