//! Reply steering: the replies of an endpoint return to the ingress sandbox that has sent the
//! request, although the endpoint routes them to its gateway.
//!
//! An ingress sandbox is a network namespace at the bridge of a network. A proxy in it connects to
//! endpoints with the addresses of its clients, so that these see who connects. The endpoint
//! addresses its replies to the client and sends them to its gateway, on whichever host it is. Two
//! eBPF programs at the bridge port of the endpoint prevent this:
//!
//! ```text
//!  sandbox ─► bridge ─► egress of the port: remember ─────────────────► endpoint
//!                        │ TCP and UDP from the MAC address of a sandbox:
//!                        ▼ flow ─► MAC address
//!                       flows
//!                        │ reply of a flow:
//!                        ▼ destination := MAC address
//!  sandbox ◄─ bridge ◄─ ingress of the port: steer ◄─ port guard ◄───── endpoint
//! ```
//!
//! | frame of the endpoint | destination |
//! |---|---|
//! | TCP or UDP of a flow | the sandbox |
//! | ICMP error (types 3, 11, 12; ICMPv6: 1 to 4) that quotes a packet of a flow | the sandbox |
//! | another fragment of a datagram whose first fragment was steered | the sandbox |
//! | anything else, such as ARP, neighbour discovery, VLAN tags, group destinations | unchanged |
//!
//! Flows, not addresses, decide. The endpoint can connect to the address of a client on its own,
//! ping it, and send it fragments, all through its gateway.
//!
//! The source MAC address identifies a sandbox, because the guards of the other bridge ports
//! ([`PortGuards`](crate::PortGuards)) and of the VXLAN device ([`FrameGuard`](crate::FrameGuard))
//! drop frames with a forged one. A MAC address that is not in [`Sandboxes`] any longer has no
//! effect: both programs look it up for each frame.
//!
//! # Order
//!
//! A frame is steered only after the port guard has passed it. All programs of this crate continue
//! with the next one. The kernel runs those of tcx first, then those of the `clsact` qdisc by
//! priority, then nftables (`__netif_receive_skb_core`, net/core/dev.c). The programs are in the
//! qdisc, with a priority behind the port guard, and so also run behind a guard of tcx. On hosts
//! without the qdisc they are the last ones of tcx. A guard of nftables runs later: it then drops
//! frames that were already steered. It is for processes that cannot load BPF programs, which
//! cannot steer either.
//!
//! # Limits
//!
//! A flow ends when it is evicted, not with its connection. Until then, the replies of a connection
//! between the same addresses and ports that does not go through a sandbox are steered, too. A
//! proxy must therefore not use the address of a client that also reaches the endpoint directly,
//! such as another member of the network.
//!
//! # Memory
//!
//! The kernel allocates the maps of an endpoint at once, see [`FLOWS`]. A neighbour cannot evict
//! its flows.

mod program;

use crate::bpf::clsact::{Attached, Clsact, Code, Priority};
use crate::bpf::{Counters, Direction, HashSet, LruMap, Program, detach_stale, tcx_programs};
use crate::guard::Mechanism;
use program::{KEY, Maps, Role, STATION, program};
use std::io;
use std::time::Duration;
use tidegate_model::{Feature, MacAddress};

/// Names of the programs in bpftool(8), and of their classifiers; at most 15 bytes.
pub(crate) const REMEMBER: &str = "tg_remember";
pub(crate) const STEER: &str = "tg_steer";

/// Maximum number of flows of an endpoint. The kernel allocates 96 bytes for each and 16 bytes for
/// its hash bucket (`htab_map_alloc`): 897 KiB (918,400 bytes) for each endpoint, used or not.
///
/// New flows evict the least recently used ones. The replies of those go to the gateway until the
/// next packet of their client, which adds its flow again. Sockets of proxies therefore need TCP
/// keep-alive. Each processor reserves up to 128 entries (`LOCAL_FREE_TARGET`,
/// kernel/bpf/bpf_lru_list.c), so hosts with dozens of processors keep fewer flows.
pub const FLOWS: u32 = 8_192;

/// Maximum number of fragmented datagrams whose fragments are on their way: 113 KiB. The fragments
/// of a datagram follow each other within microseconds.
const DATAGRAMS: u32 = 1_024;

/// Maximum number of sandboxes of a network.
const STATIONS: u32 = 4_096;

/// The ID of no program.
const NO_PROGRAM: u32 = 0;

/// The MAC addresses of the ingress sandboxes of all hosts. The bridge ports of a network share
/// them.
#[derive(Debug)]
pub struct Sandboxes(HashSet);

impl Sandboxes {
    /// Creates an empty set.
    ///
    /// # Errors
    /// `EPERM` without CAP_BPF in the initial user namespace.
    pub fn new() -> io::Result<Self> {
        HashSet::new("tg_sandboxes", STATION as u32, STATIONS).map(Self)
    }

    /// Adds the sandbox with this MAC address.
    ///
    /// # Errors
    /// `E2BIG` if the set is full.
    pub fn insert(&self, mac: MacAddress) -> io::Result<()> {
        self.0.insert(&station(mac))
    }

    /// Removes the sandbox with this MAC address, if it is in the set. Its flows have no effect any
    /// longer.
    ///
    /// # Errors
    /// Errors of the kernel.
    pub fn remove(&self, mac: MacAddress) -> io::Result<()> {
        self.0.remove(&station(mac))
    }
}

fn station(mac: MacAddress) -> [u8; STATION] {
    let [a, b, c, d, e, f] = mac.0;
    [a, b, c, d, e, f, 0, 0]
}

/// Reply steering for one endpoint. Methods must be called in the network namespace of the bridge.
#[derive(Debug)]
pub struct ReplySteering {
    hooks: [Hook; 2],
    /// The preferred mechanism.
    mechanism: Mechanism,
    steered: Counters,
}

/// A program and where it is attached.
#[derive(Debug)]
struct Hook {
    name: &'static str,
    direction: Direction,
    program: Program,
}

impl ReplySteering {
    /// Loads the programs for an endpoint, without flows.
    ///
    /// # Errors
    /// `EPERM` without CAP_BPF and CAP_NET_ADMIN in the initial user namespace; `ENOMEM`.
    pub fn new(sandboxes: &Sandboxes) -> io::Result<Self> {
        let mechanism = match Feature::Clsact.is_forced_off() {
            true => Mechanism::Tcx,
            false => Mechanism::Clsact,
        };
        Self::with_mechanism(sandboxes, mechanism)
    }

    /// Same as [`new`](Self::new), with the mechanism to try first. For tests.
    ///
    /// # Errors
    /// Same as [`new`](Self::new).
    #[doc(hidden)]
    pub fn with_mechanism(sandboxes: &Sandboxes, mechanism: Mechanism) -> io::Result<Self> {
        let flows = LruMap::new("tg_flows", KEY as u32, STATION as u32, FLOWS)?;
        let datagrams = LruMap::new("tg_datagrams", KEY as u32, STATION as u32, DATAGRAMS)?;
        let steered = Counters::new("tg_steered", 1)?;
        let maps = Maps {
            stations: sandboxes.0.descriptor(),
            flows: flows.descriptor(),
            datagrams: datagrams.descriptor(),
            steered: steered.descriptor(),
        };
        let hook = |name, role, direction| {
            let program = Program::load(name, &program(role, &maps))?;
            Ok::<_, io::Error>(Hook { name, direction, program })
        };
        let hooks = [
            hook(REMEMBER, Role::Remember, Direction::Egress)?,
            hook(STEER, Role::Steer, Direction::Ingress)?,
        ];
        Ok(Self { hooks, mechanism, steered })
    }

    /// Attaches the programs to the link with interface index `link`, the host's end of the
    /// endpoint's veth pair, instead of those of a previous process. Does nothing if they are
    /// already attached. Replies to flows of a previous process follow the next packet of their
    /// clients.
    ///
    /// # Errors
    /// `ENODEV` if the link does not exist; `EPERM` without CAP_NET_ADMIN.
    pub fn attach(&self, link: u32) -> io::Result<()> {
        self.hooks.iter().try_for_each(|hook| hook.attach(link, self.mechanism))
    }

    /// Returns whether both programs are attached to the link with interface index `link`.
    ///
    /// # Errors
    /// From Linux 6.6, `ENODEV` if the link does not exist. Before, they are not attached to it.
    pub fn is_attached(&self, link: u32) -> io::Result<bool> {
        for hook in &self.hooks {
            if !hook.is_attached(link)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Detaches the programs, and those of a previous process, from the link with interface index
    /// `link`. Succeeds if there are none.
    ///
    /// # Errors
    /// From Linux 6.6, `ENODEV` if the link does not exist.
    pub fn detach(&self, link: u32) -> io::Result<()> {
        self.hooks.iter().try_for_each(|hook| {
            Clsact::open()?.detach(Priority::Second, link, hook.direction, hook.name)?;
            hook.detach_tcx(link, NO_PROGRAM)
        })
    }

    /// Returns the number of frames sent to a sandbox instead of the gateway.
    ///
    /// # Errors
    /// Errors of the kernel.
    pub fn steered(&self) -> io::Result<u64> {
        self.steered.read(0)
    }

    /// Runs the programs `times` times on `frame`: at the egress of the port, and at its ingress.
    /// Returns the mean times. For benchmarks.
    ///
    /// # Errors
    /// Errors of the kernel.
    #[doc(hidden)]
    pub fn times(&self, frame: &[u8], times: u32) -> io::Result<[Duration; 2]> {
        let [remember, steer] = &self.hooks;
        Ok([remember.program.test_run(frame, times)?.1, steer.program.test_run(frame, times)?.1])
    }
}

impl Hook {
    fn attach(&self, link: u32, preferred: Mechanism) -> io::Result<()> {
        if self.is_attached(link)? {
            return Ok(());
        }
        if preferred == Mechanism::Clsact {
            let code = Code::Descriptor(self.program.descriptor());
            let attached =
                Clsact::open()?.attach_at(Priority::Second, link, self.direction, self.name, code);
            match attached {
                // The kernel lacks `clsact` or `cls_bpf`.
                Err(error)
                    if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EOPNOTSUPP)) => {}
                attached => {
                    attached?;
                    return self.detach_tcx(link, NO_PROGRAM);
                }
            }
        }
        self.program.attach_tcx_last(link, self.direction)?;
        Clsact::open()?.detach(Priority::Second, link, self.direction, self.name)?;
        self.detach_tcx(link, self.program.id)
    }

    fn is_attached(&self, link: u32) -> io::Result<bool> {
        let attached = Clsact::open()?.attached(link, self.direction, self.name)?;
        if attached == Some(Attached::Program(self.program.id)) {
            return Ok(true);
        }
        match tcx_programs(link, self.direction) {
            Err(error) if lacks_tcx(&error) => Ok(false),
            ids => Ok(ids?.contains(&self.program.id)),
        }
    }

    /// Detaches programs of this name other than `current` that are attached through tcx.
    fn detach_tcx(&self, link: u32, current: u32) -> io::Result<()> {
        match detach_stale(link, self.direction, self.name, current) {
            Err(error) if lacks_tcx(&error) => Ok(()),
            detached => detached,
        }
    }
}

/// Whether the kernel is older than Linux 6.6.
fn lacks_tcx(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::InvalidInput
}

#[cfg(test)]
mod tests;
