//! The `clsact` qdisc and the `cls_bpf` classifier (net/sched/cls_bpf.c), over rtnetlink.
//!
//! A classifier runs a loaded eBPF program, given as a file descriptor, or a *classic* BPF program,
//! given as instructions. Classic BPF needs only CAP_NET_ADMIN over the network namespace, not
//! CAP_BPF, so it also works in a user namespace.

use super::Direction;
use crate::wire::{Attributes, attribute, text};
use netlink_sys::protocols::NETLINK_ROUTE;
use std::io;
use tidegate_netlink::{NetlinkSocket, Request, write_message};

/// `RTM_NEWQDISC`, `RTM_DELQDISC`, `RTM_NEWTFILTER`, `RTM_DELTFILTER`, `RTM_GETTFILTER`.
const NEW_QDISC: u16 = 36;
const DELETE_QDISC: u16 = 37;
const NEW_FILTER: u16 = 44;
const DELETE_FILTER: u16 = 45;
const GET_FILTER: u16 = 46;

/// `NLM_F_REPLACE`, `NLM_F_EXCL`, `NLM_F_CREATE`.
const REPLACE: u16 = 0x100;
const EXCLUSIVE: u16 = 0x200;
const CREATE: u16 = 0x400;

/// `TC_H_CLSACT`: parent of the qdisc. The handle of the qdisc is `ffff:`.
const PARENT: u32 = 0xffff_fff1;
const HANDLE: u32 = 0xffff_0000;

/// Priority of a classifier of tidegate: its place in the order in which the classifiers of a hook
/// run. Each one continues with the next ([`verdict`](super::verdict)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Priority {
    /// Guards and gates.
    First = 1,
    /// Programs for frames that a guard has passed.
    Second = 2,
}

/// Handle of the classifier within its priority.
const FILTER_HANDLE: u32 = 1;

/// `TCA_KIND`, `TCA_OPTIONS`.
const KIND: u16 = 1;
const OPTIONS: u16 = 2;

/// `TCA_BPF_*`.
mod option {
    pub(super) const COUNT: u16 = 4;
    pub(super) const INSTRUCTIONS: u16 = 5;
    pub(super) const DESCRIPTOR: u16 = 6;
    pub(super) const NAME: u16 = 7;
    pub(super) const FLAGS: u16 = 8;
    pub(super) const ID: u16 = 11;
    /// `TCA_BPF_FLAG_ACT_DIRECT`: the return value of the program is the verdict.
    pub(super) const DIRECT: u32 = 1;
}

/// The program of a classifier.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Code<'a> {
    /// File descriptor of a loaded eBPF program.
    Descriptor(u32),
    /// Classic BPF instructions (`struct sock_filter`).
    Classic(&'a [Classic]),
}

/// A classic BPF instruction (`struct sock_filter`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Classic {
    pub(crate) code: u16,
    /// Number of instructions to skip if the condition is true, and if it is false.
    pub(crate) jumps: [u8; 2],
    pub(crate) k: u32,
}

/// The program of an attached classifier.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Attached {
    /// ID of a loaded eBPF program.
    Program(u32),
    /// Classic BPF instructions, as encoded by the kernel.
    Classic(Vec<u8>),
}

/// An rtnetlink connection in one network namespace.
pub(crate) struct Clsact(NetlinkSocket);

impl Clsact {
    /// Opens a connection in the calling thread's network namespace.
    ///
    /// # Errors
    /// The process is out of file descriptors.
    pub(crate) fn open() -> io::Result<Self> {
        NetlinkSocket::open(NETLINK_ROUTE).map(Self)
    }

    /// Attaches `code` as `name` to the link with interface index `index`, replacing tidegate's
    /// previous classifier of [`Priority::First`].
    ///
    /// # Errors
    /// `ENODEV` if the link does not exist; `EPERM` without CAP_NET_ADMIN; `ENOENT` or `EOPNOTSUPP`
    /// if the kernel lacks `clsact` or `cls_bpf`.
    pub(crate) fn attach(
        &mut self,
        index: u32,
        direction: Direction,
        name: &str,
        code: Code<'_>,
    ) -> io::Result<()> {
        self.attach_at(Priority::First, index, direction, name, code)
    }

    /// Same as [`attach`](Self::attach), with another priority.
    ///
    /// # Errors
    /// Same as [`attach`](Self::attach).
    pub(crate) fn attach_at(
        &mut self,
        priority: Priority,
        index: u32,
        direction: Direction,
        name: &str,
        code: Code<'_>,
    ) -> io::Result<()> {
        let qdisc = TrafficControl {
            kind: NEW_QDISC,
            flags: CREATE | EXCLUSIVE,
            head: [0, index, HANDLE, PARENT, 0],
            attributes: Attributes::default().text(KIND, "clsact"),
        };
        match self.0.execute(&qdisc) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            result => result?,
        }
        let options = match code {
            Code::Descriptor(descriptor) => {
                Attributes::default().bytes(option::DESCRIPTOR, &descriptor.to_ne_bytes())
            }
            Code::Classic(instructions) => Attributes::default()
                .bytes(option::COUNT, &(instructions.len() as u16).to_ne_bytes())
                .bytes(option::INSTRUCTIONS, &bytes_of(instructions)),
        };
        let options =
            options.text(option::NAME, name).bytes(option::FLAGS, &option::DIRECT.to_ne_bytes());
        self.0.execute(&TrafficControl {
            kind: NEW_FILTER,
            flags: CREATE | REPLACE,
            head: filter(index, direction, priority),
            attributes: Attributes::default().text(KIND, "bpf").nest(OPTIONS, &options),
        })
    }

    /// Detaches the eBPF program attached as `name` with `priority`. Succeeds if there is none.
    ///
    /// # Errors
    /// Errors of the kernel.
    pub(crate) fn detach(
        &mut self,
        priority: Priority,
        index: u32,
        direction: Direction,
        name: &str,
    ) -> io::Result<()> {
        let Some(Attached::Program(_)) = self.attached(index, direction, name)? else {
            return Ok(());
        };
        let detached = self.0.execute(&TrafficControl {
            kind: DELETE_FILTER,
            flags: 0,
            head: filter(index, direction, priority),
            attributes: Attributes::default().text(KIND, "bpf"),
        });
        match detached {
            // Removed concurrently, alone or with its qdisc.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOENT)) => {
                Ok(())
            }
            detached => detached,
        }
    }

    /// Deletes the `clsact` qdisc of the link with interface index `index`, and with it all
    /// classifiers.
    ///
    /// # Errors
    /// Errors of the kernel. A missing qdisc is not an error.
    pub(crate) fn delete(&mut self, index: u32) -> io::Result<()> {
        let deleted = self.0.execute(&TrafficControl {
            kind: DELETE_QDISC,
            flags: 0,
            head: [0, index, HANDLE, PARENT, 0],
            attributes: Attributes::default().text(KIND, "clsact"),
        });
        match deleted {
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOENT)) => {
                Ok(())
            }
            deleted => deleted,
        }
    }

    /// Returns the program attached as `name` to the link with interface index `index`. Returns
    /// `None` without a `clsact` qdisc.
    ///
    /// # Errors
    /// Errors of the kernel.
    pub(crate) fn attached(
        &mut self,
        index: u32,
        direction: Direction,
        name: &str,
    ) -> io::Result<Option<Attached>> {
        let mut found = None;
        let asked = TrafficControl {
            kind: GET_FILTER,
            flags: 0,
            head: [0, index, 0, parent(direction), 0],
            attributes: Attributes::default(),
        };
        let listed = self.0.dump(&asked, |_, attributes| {
            let options = attribute(attributes, OPTIONS).unwrap_or_default();
            // The kernel keeps the name for eBPF programs only (`cls_bpf_prog_from_efd`).
            let named = attribute(options, option::NAME).map(text).as_deref() == Some(name);
            let id =
                attribute(options, option::ID).filter(|_| named).and_then(|id| id.try_into().ok());
            let classic = attribute(options, option::INSTRUCTIONS);
            found = id
                .map(|id| Attached::Program(u32::from_ne_bytes(id)))
                .or(classic.map(|code| Attached::Classic(code.to_vec())))
                .or(found.take());
        });
        match listed {
            // The link has no qdisc.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(None),
            result => result.map(|()| found),
        }
    }
}

/// Encodes instructions as `struct sock_filter`.
pub(crate) fn bytes_of(instructions: &[Classic]) -> Vec<u8> {
    let bytes = |one: &Classic| {
        let mut bytes = one.code.to_ne_bytes().to_vec();
        bytes.extend(one.jumps);
        bytes.extend(one.k.to_ne_bytes());
        bytes
    };
    instructions.iter().flat_map(bytes).collect()
}

/// A traffic control request. Its header is `struct tcmsg`: family, interface index, handle,
/// parent, info.
struct TrafficControl {
    kind: u16,
    flags: u16,
    head: [u32; 5],
    attributes: Attributes,
}

impl Request for TrafficControl {
    const HEAD: usize = 20;

    fn write(&self, sequence: u32, more_flags: u16, buffer: &mut Vec<u8>) {
        let head: Vec<u8> = self.head.iter().flat_map(|field| field.to_ne_bytes()).collect();
        write_message(
            self.kind,
            self.flags | more_flags,
            sequence,
            &head,
            self.attributes.encoded(),
            buffer,
        );
    }
}

/// `TC_H_MAKE(TC_H_CLSACT, TC_H_MIN_INGRESS)`, `TC_H_MIN_EGRESS`.
fn parent(direction: Direction) -> u32 {
    match direction {
        Direction::Ingress => 0xffff_fff2,
        Direction::Egress => 0xffff_fff3,
    }
}

/// Header of a request for tidegate's classifier of `priority`. The last field holds the priority
/// in its upper half and `ETH_P_ALL` in network byte order in its lower half.
fn filter(index: u32, direction: Direction, priority: Priority) -> [u32; 5] {
    const ALL: u16 = 3;
    [0, index, FILTER_HANDLE, parent(direction), (priority as u32) << 16 | u32::from(ALL.to_be())]
}
