//! The qdisc `clsact` and its classifier `cls_bpf` (net/sched/cls_bpf.c), over rtnetlink.
//!
//! A classifier takes a loaded program by its descriptor, or a program of *classic* BPF by its
//! instructions. The latter needs no CAP_BPF: CAP_NET_ADMIN over the network namespace will do, so
//! it serves in a user namespace too.

use super::Direction;
use crate::socket::NetfilterSocket;
use crate::wire::{self, Attributes, Request, attribute, text};
use netlink_sys::protocols::NETLINK_ROUTE;
use std::io;

/// `RTM_NEWQDISC`, `RTM_NEWTFILTER`, `RTM_GETTFILTER`.
const NEW_QDISC: u16 = 36;
const NEW_FILTER: u16 = 44;
const GET_FILTER: u16 = 46;

/// `NLM_F_REPLACE`, `NLM_F_EXCL`, `NLM_F_CREATE`.
const REPLACE: u16 = 0x100;
const EXCLUSIVE: u16 = 0x200;
const CREATE: u16 = 0x400;

/// `TC_H_CLSACT`: the parent of the qdisc, whose handle is `ffff:`.
const PARENT: u32 = 0xffff_fff1;
const HANDLE: u32 = 0xffff_0000;

/// The preference of our classifiers: the first to be asked, since lower ones come first.
const PREFERENCE: u32 = 1;
/// The number of a classifier within its preference.
const NUMBER: u32 = 1;

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
    /// `TCA_BPF_FLAG_ACT_DIRECT`: what the program returns is the verdict.
    pub(super) const DIRECT: u32 = 1;
}

/// What a classifier runs.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Code<'a> {
    /// A loaded program's descriptor.
    Descriptor(u32),
    /// Instructions of classic BPF (`struct sock_filter`).
    Classic(&'a [Classic]),
}

/// An instruction of classic BPF (`struct sock_filter`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Classic {
    pub(crate) code: u16,
    /// How many instructions are skipped if the condition holds, and if it does not.
    pub(crate) jumps: [u8; 2],
    pub(crate) k: u32,
}

/// A classifier that is attached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Attached {
    /// A loaded program, by its number.
    Program(u32),
    /// A program of classic BPF: its instructions as the kernel has them.
    Classic(Vec<u8>),
}

/// A connection to rtnetlink in one namespace.
pub(crate) struct Clsact(NetfilterSocket);

impl Clsact {
    /// In the calling thread's namespace.
    ///
    /// # Errors
    /// No descriptor is left.
    pub(crate) fn open() -> io::Result<Self> {
        NetfilterSocket::speaking(NETLINK_ROUTE).map(Self)
    }

    /// Attaches `code` under `name` to the link numbered `index`, in the place of what we have
    /// there.
    ///
    /// # Errors
    /// `ENODEV` without such a link; `EPERM` without CAP_NET_ADMIN; `ENOENT` or `EOPNOTSUPP` where
    /// the kernel has no `clsact` or no `cls_bpf`.
    pub(crate) fn attach(
        &mut self,
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
        match self.0.order(&qdisc) {
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
        self.0.order(&TrafficControl {
            kind: NEW_FILTER,
            flags: CREATE | REPLACE,
            head: filter(index, direction),
            attributes: Attributes::default().text(KIND, "bpf").nest(OPTIONS, &options),
        })
    }

    /// What is attached under `name` to the link numbered `index`.
    ///
    /// # Errors
    /// The kernel's. Without the qdisc, nothing is attached.
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
        let listed = self.0.dump(&asked, |attributes| {
            let options = attribute(attributes, OPTIONS).unwrap_or_default();
            // The kernel keeps names of loaded programs alone (`cls_bpf_prog_from_efd`).
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
            // No qdisc there.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(None),
            result => result.map(|()| found),
        }
    }
}

/// Instructions as the kernel takes and gives them.
pub(crate) fn bytes_of(instructions: &[Classic]) -> Vec<u8> {
    let bytes = |one: &Classic| {
        let mut bytes = one.code.to_ne_bytes().to_vec();
        bytes.extend(one.jumps);
        bytes.extend(one.k.to_ne_bytes());
        bytes
    };
    instructions.iter().flat_map(bytes).collect()
}

/// A message about qdiscs and classifiers. Its head is `struct tcmsg`: family, link, handle,
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
        wire::write(self.kind, self.flags | more_flags, sequence, &head, &self.attributes, buffer);
    }
}

/// `TC_H_MAKE(TC_H_CLSACT, TC_H_MIN_INGRESS)`, `TC_H_MIN_EGRESS`.
fn parent(direction: Direction) -> u32 {
    match direction {
        Direction::Ingress => 0xffff_fff2,
        Direction::Egress => 0xffff_fff3,
    }
}

/// The head of a message about our classifier: preference in the upper half of the last field,
/// `ETH_P_ALL` in network order in the lower one.
fn filter(index: u32, direction: Direction) -> [u32; 5] {
    const ALL: u16 = 3;
    [0, index, NUMBER, parent(direction), PREFERENCE << 16 | u32::from(ALL.to_be())]
}
