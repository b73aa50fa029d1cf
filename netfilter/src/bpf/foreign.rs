//! Programs at links of other software, which may leave for another namespace with them.
//!
//! A link that moves keeps its programs. A program therefore acts only at the links in a set, which
//! it looks up last, and from which [`ForeignLinks::retain`] removes those that have left.
//!
//! Programs need tcx (Linux 6.6), because a `clsact` qdisc on a link of other software could not be
//! removed safely.

use super::{
    Direction, HashSet, Instruction, Program, detach_stale, detach_tcx, empty_last_map,
    tcx_programs,
};
use std::collections::BTreeSet;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};
use tidegate_model::{Feature, LOOPBACK_INDEX, registry};

/// Maximum number of links.
const LINKS: u32 = 65_536;

/// The ID of no program.
const NONE: u32 = 0;

/// The name of a program, of at most 15 bytes.
fn name(prefix: &str, owner: &str, namespace: u64) -> String {
    let hash = registry::folded_hash(format!("{owner} {namespace}").as_bytes()) as u32;
    format!("{prefix}{hash:08x}")
}

/// The programs of one owner at links of other software.
#[derive(Debug)]
pub(crate) struct ForeignLinks {
    programs: Vec<Placed>,
    /// Interface indexes of the links at which the programs act. The last map of each program.
    set: HashSet,
    state: Mutex<State>,
}

#[derive(Debug)]
struct Placed {
    name: String,
    program: Program,
    direction: Direction,
}

#[derive(Debug, Default)]
struct State {
    /// The content of the set.
    attached: BTreeSet<u32>,
    /// Programs of previous processes act nowhere any longer.
    replaced: bool,
}

impl ForeignLinks {
    /// Creates the set of links, which `load` puts into its programs as the last map, and loads
    /// these. `load` returns for each the start of its name (at most seven bytes, before the hash
    /// of its owner), its hook and its instructions. Owners of several namespaces, of which
    /// `namespace` is the inode number, can have the same name.
    ///
    /// # Errors
    /// `EPERM` without CAP_BPF and CAP_NET_ADMIN in the initial user namespace; `EINVAL` before
    /// Linux 6.6.
    pub(crate) fn load(
        owner: &str,
        namespace: u64,
        load: impl FnOnce(&HashSet) -> Vec<(&'static str, Direction, Vec<Instruction>)>,
    ) -> io::Result<Self> {
        if Feature::Tcx.is_forced_off() || Feature::BpfGuards.is_forced_off() {
            return Err(io::ErrorKind::Unsupported.into());
        }
        tcx_programs(LOOPBACK_INDEX, Direction::Ingress)?;
        let set = HashSet::new("tg_links", 4, LINKS)?;
        let programs = load(&set).into_iter().map(|(prefix, direction, code)| {
            let name = name(prefix, owner, namespace);
            let program = Program::load(&name, &code)?;
            Ok(Placed { name, program, direction })
        });
        let programs = programs.collect::<io::Result<_>>()?;
        Ok(Self { programs, set, state: Mutex::default() })
    }

    /// Attaches the programs to the link with interface index `index` in the calling thread's
    /// network namespace, instead of those of a previous process.
    ///
    /// # Errors
    /// `ENODEV` if the link does not exist.
    pub(crate) fn attach(&self, index: u32) -> io::Result<()> {
        self.set.insert(&index.to_ne_bytes())?;
        self.state().attached.insert(index);
        for Placed { name, program, direction } in &self.programs {
            program.attach_tcx(index, *direction)?;
            detach_stale(index, *direction, name, program.id)?;
        }
        Ok(())
    }

    /// Returns whether the programs are attached to the link with interface index `index` in the
    /// calling thread's network namespace.
    ///
    /// # Errors
    /// `ENODEV` if the link does not exist.
    pub(crate) fn is_attached(&self, index: u32) -> io::Result<bool> {
        if !self.state().attached.contains(&index) {
            return Ok(false);
        }
        for Placed { program, direction, .. } in &self.programs {
            if !tcx_programs(index, *direction)?.contains(&program.id) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Makes the programs act nowhere but at links in `present`, the interface indexes of the links
    /// of the host. Once there are programs of this process, this includes those of previous
    /// processes.
    ///
    /// # Errors
    /// Errors of the kernel.
    pub(crate) fn retain(&self, present: &BTreeSet<u32>) -> io::Result<()> {
        let mut state = self.state();
        for index in state.attached.difference(present) {
            self.set.remove(&index.to_ne_bytes())?;
        }
        state.attached.retain(|index| present.contains(index));
        if !state.replaced && !state.attached.is_empty() {
            for Placed { name, program, .. } in &self.programs {
                empty_last_map(name, program.id)?;
            }
            state.replaced = true;
        }
        Ok(())
    }

    /// Detaches the programs, and those of a previous process.
    ///
    /// # Errors
    /// `ENODEV` if the link does not exist.
    pub(crate) fn detach(&self, index: u32) -> io::Result<()> {
        self.set.remove(&index.to_ne_bytes())?;
        self.state().attached.remove(&index);
        for Placed { name, program, direction } in &self.programs {
            detach_stale(index, *direction, name, program.id)?;
            match detach_tcx(index, *direction, program.id) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                detached => detached?,
            }
        }
        Ok(())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Detaches the program of `owner` with a name that starts with `prefix` from the link with
    /// interface index `index` in the calling thread's network namespace. Succeeds before Linux
    /// 6.6, where there are none.
    ///
    /// # Errors
    /// `ENODEV` if the link does not exist.
    pub(crate) fn detach_stale(
        owner: &str,
        namespace: u64,
        index: u32,
        (prefix, direction): (&str, Direction),
    ) -> io::Result<()> {
        match detach_stale(index, direction, &name(prefix, owner, namespace), NONE) {
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => Ok(()),
            detached => detached,
        }
    }

    /// The set, for tests.
    #[cfg(test)]
    pub(crate) fn set(&self) -> &HashSet {
        &self.set
    }

    /// Runs program `number` on `frame`. Returns its verdict.
    #[cfg(test)]
    pub(crate) fn test_run(&self, number: usize, frame: &[u8]) -> i32 {
        self.programs[number].program.test_run(frame, 1).unwrap().0
    }

    /// Adds a link without attaching anything.
    #[cfg(test)]
    pub(crate) fn pretend(&self, index: u32) {
        self.state().attached.insert(index);
    }
}
