//! The one registry of what tidegate claims on a host.
//!
//! Marks, routing tables, rule priorities, protocol numbers and names are shared with every other
//! network program of the host, and nobody hands them out. Every value tidegate uses is therefore
//! here and nowhere else, with the reason for it and the neighbours it was chosen to avoid. Nothing
//! here touches the host.
//!
//! Sources: <https://github.com/fwmark/registry> for marks; `include/uapi/linux/rtnetlink.h` and
//! iproute2's `rt_protos` for route protocols; the constants in the sources of moby (`libnetwork`),
//! Cilium (`linux_defaults`) and Tailscale (`linuxfw`, `wgengine`).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;

/// The packet mark on the sockets and in the rules that are tidegate's own.
///
/// The upper half is `tg` in ASCII. It is one whole value, compared under the full [`MARK_MASK`],
/// and it is set with `SO_MARK` on sockets tidegate made itself, never on packets of others. Of the
/// neighbours,
///
/// - kube-proxy tests bits 14 and 15 (0x4000, 0x8000), CNI portmap and netavark bit 13 (0x2000):
///   clear here;
/// - Tailscale compares bits 16 to 23 with 0x04 and 0x08: they are 0x67 here;
/// - Docker Swarm counts whole marks upwards from 256, Istio has 0x1337, AWS App Mesh 0x1e7700ce;
/// - Cilium keeps its magic in bits 8 to 11: clear here, though with tunnels or IPsec it also
///   stores identities in the upper half of packets it handles;
/// - Weave Net, no longer maintained, tests bit 17 (0x20000), which is set here: the two do not
///   mix;
/// - Calico takes bits 16 to 31 for itself (`iptablesMarkMask`, default 0xffff0000) and may change
///   any of them on the way. On such a host its mask has to be moved to bits that are clear here,
///   such as 0x8b980f00.
pub const MARK: u32 = 0x7467_0001;

/// The bits of a packet mark that are compared with [`MARK`]: all of them. A mark that shares bits
/// with ours is somebody else's.
pub const MARK_MASK: u32 = 0xffff_ffff;

/// The packet mark by which our firewall rules tell our policy rules that a packet may be forwarded
/// into a network.
///
/// Packets carry it from the end of the `prerouting` hook until they are on their way through a
/// bridge. The upper half is that of [`MARK`]; the lower half is left as others have set it, and
/// not compared.
pub const FORWARD_MARK: u32 = 0x7467_0000;

/// The bits of a packet mark that are set to and compared with [`FORWARD_MARK`].
pub const FORWARD_MARK_MASK: u32 = 0xffff_0000;

/// The bits of a packet mark that say by which uplink the answer of a container leaves: the number
/// of a [reply path](UPLINK_TABLES), from 1 on.
///
/// Only on hosts with several default routes, and only on answers of ports that the kernel
/// translates: set at the last hook before the route is looked up, and taken off at the first one
/// behind that. Of the neighbours, kube-proxy, CNI portmap, netavark (bits 13 to 15), mwan3 (8
/// to 13), Tailscale (16 to
/// 23) and the small numbers of scripts are elsewhere; Calico and Cilium may use these bits.
pub const UPLINK_MARK_MASK: u32 = 0x0f00_0000;

/// Source ports of what containers send, behind masquerade: Linux's own range of ephemeral ports
/// (`ip_local_port_range`). Ephemeral published ports are above it.
///
/// Masquerade by default keeps the source port. A container could then choose the port of a service
/// of the host, and what a client sends to that service from the address and port that the
/// container has sent to would be its answer (port shadowing, CVE-2021-3773): conntrack is asked
/// before destination NAT and before sockets. Services are not at ephemeral ports, or sockets of
/// the host could take those.
pub const MASQUERADE_PORTS: RangeInclusive<u16> = 32_768..=60_999;

/// Reply paths that [`UPLINK_MARK_MASK`] has numbers for.
pub const UPLINKS: u8 = 15;

/// The mark of the reply path `number`, in [`UPLINK_MARK_MASK`].
#[must_use]
pub const fn uplink_mark(number: u8) -> u32 {
    (number as u32) << UPLINK_MARK_MASK.trailing_zeros() & UPLINK_MARK_MASK
}

/// The priority of the rules that lead an answer by the `main` table if that has more than a
/// default route for it: to who is on a link, or behind a VPN.
pub const UPLINK_MAIN_PRIORITY: u32 = 7_660;

/// The priority of the rules behind those that lead it to the default route of its uplink.
pub const UPLINK_PRIORITY: u32 = 7_661;

/// How many priorities the rules of networks take that have to precede those of others, from
/// [`GUARD_EXEMPTION_PRIORITY`] on. They are moved ahead, where there are as many behind that of
/// the `local` table, 0.
pub const PRECEDING_PRIORITIES: u32 = NO_EGRESS_PRIORITY - GUARD_EXEMPTION_PRIORITY + 1;

/// The first of the [`UPLINK_TABLES`] routing tables, behind those of NAT engines. One is used for
/// a default route that the `main` table has beside its best one.
pub const FIRST_UPLINK_TABLE: u32 = FIRST_EGRESS_TABLE + EGRESS_TABLES;

/// How many of them there are: sixteen for each of a thousand projects, found by name.
pub const UPLINK_TABLES: u32 = 16_000;

/// The table of the reply path `number` of `owner`.
#[must_use]
pub fn uplink_table(owner: &str, number: u8) -> u32 {
    let place = fnv1a(owner.as_bytes()) % u64::from(UPLINK_TABLES / 16);
    FIRST_UPLINK_TABLE + place as u32 * 16 + u32::from(number & 15)
}

/// The routing protocol (`rtm_protocol`, `FRA_PROTOCOL`) of every route and policy rule that
/// tidegate adds: `t` in ASCII. What carries it is ours to delete after a crash; what does not is
/// never touched.
///
/// Free in the kernel's registry and in iproute2's `rt_protos`: assigned are 0 to 18, 42 (babel),
/// 99 (Open/R) and 186 to 192 (BGP, IS-IS, OSPF, RIP, EIGRP; FRRouting goes on upwards from there).
///
/// systemd-networkd from version 248 removes routes and rules it did not make, whatever their
/// protocol but `kernel`, whenever it restarts (`ManageForeignRoutes=`,
/// `ManageForeignRoutingPolicyRules=`, both default yes). Cilium hides behind `kernel` for that
/// reason; tidegate does not, because it could then no longer tell its own from the kernel's. What
/// networkd removed has to be noticed and put back.
pub const ROUTE_PROTOCOL: u8 = b't';

/// How many owners there can be at once; see [`OwnerSlot`].
pub const OWNER_SLOTS: u32 = 256;

/// The rule priority of slot 0; the slots take 7400 to 7655.
const FIRST_RULE_PRIORITY: u32 = 7_400;

/// The routing table of slot 0; the slots take 29700 to 29955.
const FIRST_TABLE: u32 = 29_700;

/// One of the [`OWNER_SLOTS`] places on a host for an owner of policy routes: a bridge, or a
/// published port's return path. Each slot has one rule priority and one routing table, so that an
/// owner can be taken down, or found again after a crash, without looking at another's.
///
/// Who holds which slot is decided and remembered elsewhere; every `u8` is a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct OwnerSlot(pub u8);

impl OwnerSlot {
    /// Every slot, lowest first.
    pub fn all() -> impl ExactSizeIterator<Item = Self> {
        (0..=u8::MAX).map(Self)
    }

    /// The slot whose rules have this priority; `None` outside 7400..=7655.
    #[must_use]
    pub fn of_rule_priority(priority: u32) -> Option<Self> {
        offset(priority, FIRST_RULE_PRIORITY)
    }

    /// The slot whose routes are in this table; `None` outside 29700..=29955.
    #[must_use]
    pub fn of_table_id(table: u32) -> Option<Self> {
        offset(table, FIRST_TABLE)
    }
}

/// The priority of a slot's policy rules, 7400..=7655.
///
/// Behind the `local` table (0), Cilium (1 to 112) and Tailscale (5210 to 5270, on some systems
/// 1310 to 1370), whose rules therefore keep their effect; before Talos KubeSpan (32500 and 32501),
/// the rules that the kernel numbers by itself, wg-quick's among them (32765 downwards), and the
/// `main` table (32766), which ours have to precede.
#[must_use]
pub const fn rule_priority(slot: OwnerSlot) -> u32 {
    FIRST_RULE_PRIORITY + slot.0 as u32
}

/// The routing table of a slot, 29700..=29955.
///
/// Above the kernel's own (253 to 255), the single-byte ids that administrators and Calico use,
/// Tailscale (52) and Cilium (200 to 202, 2004 and 2005, and from 10 and 300 one per cloud
/// interface); below wg-quick, which counts upwards from 51820.
#[must_use]
pub const fn table_id(slot: OwnerSlot) -> u32 {
    FIRST_TABLE + slot.0 as u32
}

/// The priority of the rules that let the host itself reach its networks past [`GUARD_PRIORITY`].
///
/// Behind the [`OwnerSlot`]s, which lead a network's egress; before `main`.
pub const GUARD_EXEMPTION_PRIORITY: u32 = 7_656;

/// The priority of the rules that make a network unreachable for packets to be forwarded, in either
/// direction.
pub const GUARD_PRIORITY: u32 = 7_657;

/// The priority of the rules that lead what comes from a network to the NAT engine: behind the
/// guards, so that it is out only what goes to no network of ours.
pub const EGRESS_PRIORITY: u32 = 7_658;

/// The priority of the rules behind [`EGRESS_PRIORITY`]: where the engine has gone, nothing that
/// comes from a network is forwarded.
pub const NO_EGRESS_PRIORITY: u32 = 7_659;

/// The first of the [`EGRESS_TABLES`] routing tables in which the NAT engines of projects have
/// their routes, behind the [`OwnerSlot`]s'.
pub const FIRST_EGRESS_TABLE: u32 = 29_956;

/// How many of them there are. A project's is chosen by its name.
pub const EGRESS_TABLES: u32 = 1_000;

/// The group of links (`IFLA_GROUP`) that the bridges of `owner` are in, by which nftables knows
/// them at a glance: between 0x4000_0000 and 0x5fff_ffff, by the owner's name. iproute2's groups
/// are small numbers.
#[must_use]
pub fn bridge_group(owner: &str) -> u32 {
    let hash = fnv1a(owner.as_bytes());
    FIRST_BRIDGE_GROUP | (hash ^ hash >> 32) as u32 & (FIRST_BRIDGE_GROUP / 2 - 1)
}

/// The lowest [`bridge_group`].
const FIRST_BRIDGE_GROUP: u32 = 0x4000_0000;

/// The addresses that the NAT engine of `tidegate up` has of its own, of IPv4 and of IPv6: what
/// containers know the host by. No host has them, and each engine answers at them to its own
/// containers alone, so they are the same for all.
///
/// The first is of the block for links (RFC 3927), where clouds have their services and container
/// engines their hosts: free of those of EC2 and its kin (169.254.169.254, 169.254.170.2), Podman
/// (169.254.1.1, 169.254.1.2) and Kubernetes (169.254.20.10). Its last bytes are `tg`. The second
/// is of a prefix of our own (RFC 4193), `tidegat`.
pub const ENGINE_ADDRESSES: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(169, 254, b't', b'g')),
    IpAddr::V6(Ipv6Addr::new(0xfd74, 0x6964, 0x6567, 0x6174, 0, 0, 0, 1)),
];

/// The first group of links that tidegate puts those into that it is about to delete; the next free
/// one above is taken. `tg` in the upper half, as in [`MARK`]. iproute2's groups are small numbers.
pub const DELETION_GROUP: u32 = 0x7467_0000;

/// The alias (ip-link(8), `alias`) of the bridge of an internal network, by which other projects on
/// the host know that its members reach none of their ports.
pub const INTERNAL_ALIAS: &str = "tidegate internal network";

/// The alias of the bridge of any other network: whatever its name, other projects' engines lead
/// nobody there.
pub const NETWORK_ALIAS: &str = "tidegate network";

/// What every network interface that tidegate makes on the host begins with. A name has at most 15
/// bytes (`IFNAMSIZ` less the NUL), which leaves 13 behind the prefix.
pub const INTERFACE_PREFIX: &str = "tg";

/// What the names of bridges begin with; no other link of tidegate has a hyphen there.
pub const BRIDGE_PREFIX: &str = "tg-";

/// Bridges that containers and machines of others are on: of Docker, Podman, CNI, libvirt, LXC, LXD
/// and Incus. `+` at the end stands for anything, as in iptables(8).
pub const BRIDGES_OF_OTHERS: [&str; 9] = [
    "docker0",
    "docker_gwbridge",
    "br-+",
    "podman+",
    "cni+",
    "virbr+",
    "lxcbr+",
    "lxdbr+",
    "incusbr+",
];

/// What the nftables tables, of family `inet`, begin with that hold the rules of one owner each;
/// the owner's name follows. They are replaced as a whole, and deleting one is all of its teardown.
pub const NFTABLES_PREFIX: &str = "tidegate-";

/// The nftables table, of family `inet`, that holds the user's chain ([`USER_CHAIN`]) and what
/// leads to it. One for all owners; what the user has put into that chain stays when they are gone.
pub const NFTABLES_USER_TABLE: &str = "tidegate_user";

/// The nftables table, of family `inet`, that leads 127.0.0.11:53 to the DNS server of a container,
/// in the container's own namespace.
pub const NFTABLES_DNS_TABLE: &str = "tidegate_dns";

/// The user's own chain, in nftables and iptables. What is dropped there reaches no container.
pub const USER_CHAIN: &str = "TIDEGATE-USER";

/// What every iptables chain of tidegate begins with. A chain's name has at most 28 bytes
/// (`XT_EXTENSION_MAXNAMELEN` less the NUL), which leaves 19 behind the prefix.
pub const IPTABLES_CHAIN_PREFIX: &str = "TIDEGATE-";

/// The FNV-1a hash, by which names that have to be short are told apart; whoever takes less of it
/// folds it. Not for secrets.
#[must_use]
pub fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

fn offset(value: u32, first: u32) -> Option<OwnerSlot> {
    value.checked_sub(first).and_then(|index| u8::try_from(index).ok()).map(OwnerSlot)
}

/// The counter of objects of ours that were restored, with the label `kind`. Each crate counts what
/// it restores itself.
pub const REPAIRS_METRIC: &str = "tidegate_network_repairs_total";

/// What it counts.
pub const REPAIRS_HELP: &str =
    "Objects that other software removed or changed, and that were restored, by kind.";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mark_spells_tg_and_misses_the_bits_of_its_neighbours() {
        assert_eq!(MARK >> 16, u32::from(u16::from_be_bytes(*b"tg")));
        for (mask, value, owner) in [
            (0x4000, 0x4000, "kube-proxy masquerade"),
            (0x8000, 0x8000, "kube-proxy drop"),
            (0x2000, 0x2000, "CNI portmap"),
            (0x00ff_0000, 0x0004_0000, "Tailscale subnet route"),
            (0x00ff_0000, 0x0008_0000, "Tailscale bypass"),
            (0x0f00, 0x0a00, "Cilium ingress proxy"),
            (0x0f00, 0x0c00, "Cilium host"),
        ] {
            assert_ne!(MARK & mask, value, "{owner}");
        }
        assert_eq!(MARK & 0x8b98_0f00, 0, "Calico, where its mask is moved as MARK's comment says");
    }

    /// Those of the algorithm's authors.
    #[test]
    fn hashes_are_as_they_are_everywhere() {
        assert_eq!(fnv1a(b""), 0xcbf2_9ce4_8422_2325);
        assert_eq!(fnv1a(b"a"), 0xaf63_dc4c_8601_ec8c);
        assert_eq!(fnv1a(b"foobar"), 0x8594_4171_f739_67e8);
    }

    #[test]
    fn every_slot_has_its_own_table_and_priority() {
        assert_eq!(OwnerSlot::all().len(), OWNER_SLOTS as usize);
        for slot in OwnerSlot::all() {
            assert_eq!(OwnerSlot::of_rule_priority(rule_priority(slot)), Some(slot));
            assert_eq!(OwnerSlot::of_table_id(table_id(slot)), Some(slot));
        }
    }

    #[test]
    fn numbers_of_others_are_no_slot() {
        for priority in [0, 5_270, 7_399, 7_656, 32_766, u32::MAX] {
            assert_eq!(OwnerSlot::of_rule_priority(priority), None);
        }
        for table in [0, 52, 255, 29_699, 29_956, 51_820, u32::MAX] {
            assert_eq!(OwnerSlot::of_table_id(table), None);
        }
    }

    #[test]
    fn marks_and_tables_of_uplinks_are_apart_from_all_others() {
        let marks: Vec<u32> = (1..=UPLINKS).map(uplink_mark).collect();
        assert!(marks.iter().all(|mark| *mark != 0 && mark & !UPLINK_MARK_MASK == 0), "{marks:x?}");
        assert_eq!(marks.iter().collect::<std::collections::BTreeSet<_>>().len(), marks.len());
        // wg-quick counts upwards from 51820.
        let tables = FIRST_UPLINK_TABLE..51_820;
        assert!(
            ["", "demo", "x"].iter().all(|owner| tables.contains(&uplink_table(owner, UPLINKS)))
        );
        const { assert!(FIRST_UPLINK_TABLE + UPLINK_TABLES <= 51_820) };
        assert_eq!(OwnerSlot::of_rule_priority(UPLINK_PRIORITY), None);
    }

    #[test]
    fn groups_of_bridges_are_apart_from_one_another_and_from_those_to_be_deleted() {
        let groups: Vec<u32> = ["", "demo", "demo-2"].map(bridge_group).to_vec();
        assert!(
            groups.iter().all(|group| (0x4000_0000..0x6000_0000).contains(group)),
            "{groups:x?}"
        );
        assert!(groups.iter().all(|group| *group < DELETION_GROUP), "{groups:x?}");
        assert_ne!(groups[1], groups[2]);
    }

    #[test]
    fn the_route_protocol_is_not_assigned() {
        let assigned = (0..=18).chain([42, 99]).chain(186..=200);
        assert!(assigned.into_iter().all(|number: u8| number != ROUTE_PROTOCOL));
    }
}
