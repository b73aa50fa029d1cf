//! Registry of the identifiers that tidegate claims on a host.
//!
//! Packet marks, routing tables, rule priorities, protocol numbers and names are shared by all
//! network software on a host, and no authority assigns them. This module is therefore the only
//! place that defines those of tidegate, each with the reason for the value and the ranges of other
//! software that it avoids. It does not access the host.
//!
//! Sources: <https://github.com/fwmark/registry> for marks; `include/uapi/linux/rtnetlink.h` and
//! iproute2's `rt_protos` for route protocols; the constants in the sources of moby (`libnetwork`),
//! Cilium (`linux_defaults`) and Tailscale (`linuxfw`, `wgengine`).

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use crate::MacAddress;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;

/// The packet mark of sockets and policy rules of tidegate.
///
/// The upper half is `tg` in ASCII. The mark is a single value, compared under the full
/// [`MARK_MASK`]. It is set with `SO_MARK` on sockets that tidegate created, never on packets of
/// other software. Other software uses these bits:
///
/// - kube-proxy tests bits 14 and 15 (0x4000, 0x8000), CNI portmap and netavark bit 13 (0x2000):
///   clear here;
/// - Tailscale compares bits 16 to 23 with 0x04 and 0x08: they are 0x67 here;
/// - Docker Swarm assigns whole marks upwards from 256, Istio uses 0x1337, AWS App Mesh 0x1e7700ce;
/// - Cilium keeps its magic number in bits 8 to 11: clear here. With tunnels or IPsec, Cilium also
///   stores identities in the upper half of the packets it handles;
/// - Weave Net (unmaintained) tests bit 17 (0x20000), which is set here: tidegate and Weave Net are
///   incompatible;
/// - Calico claims bits 16 to 31 (`iptablesMarkMask`, default 0xffff0000) and may change any of
///   them in transit. On such a host, its mask must be limited to bits that are clear here, such as
///   0x8b980f00.
pub const MARK: u32 = 0x7467_0001;

/// The mask for comparisons with [`MARK`]: all bits. A mark that shares only some bits with it
/// belongs to other software.
pub const MARK_MASK: u32 = 0xffff_ffff;

/// The packet mark that the firewall rules of tidegate set on packets that may be forwarded into a
/// network, and that its policy rules match.
///
/// Packets carry the mark from the end of the `prerouting` hook until the egress of a bridge. The
/// upper half equals that of [`MARK`]. The lower half keeps the value set by other software and is
/// not compared.
pub const FORWARD_MARK: u32 = 0x7467_0000;

/// The mask for setting and comparing [`FORWARD_MARK`].
pub const FORWARD_MARK_MASK: u32 = 0xffff_0000;

/// The bits of a packet mark that select the uplink for a reply of a container: the number of a
/// [reply path](UPLINK_TABLES), starting at 1.
///
/// Used only on hosts with several default routes, and only for replies of ports that the kernel
/// translates. The mark is set at the last hook before the routing decision and cleared at the
/// first hook after it. kube-proxy, CNI portmap and netavark (bits 13 to 15), mwan3 (8 to 13),
/// Tailscale (16 to 23) and the small numbers of scripts use other bits. Calico and Cilium may use
/// these bits.
pub const UPLINK_MARK_MASK: u32 = 0x0f00_0000;

/// Source ports of masqueraded connections: the default range of ephemeral ports of Linux
/// (`ip_local_port_range`). Ephemeral published ports are above it.
///
/// By default, masquerade preserves the source port. A container could then use the port of a host
/// service as its source port and contact a client of that service. Conntrack would classify the
/// later packets of that client to the service as replies to the container, because it runs before
/// destination NAT and the socket lookup (port shadowing, CVE-2021-3773). Services do not use
/// ephemeral ports, since any socket of the host could take those.
pub const MASQUERADE_PORTS: RangeInclusive<u16> = 32_768..=60_999;

/// Number of reply paths that [`UPLINK_MARK_MASK`] can encode.
pub const UPLINKS: u8 = 15;

/// The mark of reply path `number`, within [`UPLINK_MARK_MASK`].
#[must_use]
pub const fn uplink_mark(number: u8) -> u32 {
    (number as u32) << UPLINK_MARK_MASK.trailing_zeros() & UPLINK_MARK_MASK
}

/// The priority of the rules that route a reply through the `main` table if that table has a route
/// more specific than the default route, such as for a host on-link or behind a VPN.
pub const UPLINK_MAIN_PRIORITY: u32 = 7_660;

/// The priority of the subsequent rules, which route a reply through the default route of its
/// uplink.
pub const UPLINK_PRIORITY: u32 = 7_661;

/// Number of consecutive priorities, starting at [`GUARD_EXEMPTION_PRIORITY`], whose rules must
/// precede those of other software. If other software uses lower numbers, the rules are moved to
/// the priorities after 0 (the `local` table), provided that this many are free.
pub const PRECEDING_PRIORITIES: u32 = NO_EGRESS_PRIORITY - GUARD_EXEMPTION_PRIORITY + 1;

/// The first of the [`UPLINK_TABLES`] routing tables, after those of NAT engines. One table is used
/// for each default route of the `main` table other than the preferred one.
pub const FIRST_UPLINK_TABLE: u32 = FIRST_EGRESS_TABLE + EGRESS_TABLES;

/// Number of these tables: sixteen for each of a thousand projects, selected by a hash of the
/// project name.
pub const UPLINK_TABLES: u32 = 16_000;

/// The table of reply path `number` of `owner`.
#[must_use]
pub fn uplink_table(owner: &str, number: u8) -> u32 {
    let place = fnv1a(owner.as_bytes()) % u64::from(UPLINK_TABLES / 16);
    FIRST_UPLINK_TABLE + place as u32 * 16 + u32::from(number & 15)
}

/// The routing protocol (`rtm_protocol`, `FRA_PROTOCOL`) of every route and policy rule that
/// tidegate adds: `t` in ASCII. After a crash, tidegate deletes routes and rules with this
/// protocol, and never touches others.
///
/// It is unassigned in the kernel and in `rt_protos` of iproute2. Assigned are 0 to 18, 42 (babel),
/// 99 (Open/R) and 186 to 192 (BGP, IS-IS, OSPF, RIP, EIGRP; FRRouting continues upwards).
///
/// On restart, systemd-networkd from version 248 removes foreign routes and rules of every protocol
/// except `kernel` (`ManageForeignRoutes=`, `ManageForeignRoutingPolicyRules=`, both default yes).
/// Cilium uses `kernel` for that reason. tidegate does not, because it could then not tell its own
/// objects from those of the kernel. It must therefore detect and restore what networkd removes.
pub const ROUTE_PROTOCOL: u8 = b't';

/// Maximum number of concurrent owners; see [`OwnerSlot`].
pub const OWNER_SLOTS: u32 = 256;

/// The rule priority of slot 0; the slots take 7400 to 7655.
const FIRST_RULE_PRIORITY: u32 = 7_400;

/// The routing table of slot 0; the slots take 29700 to 29955.
const FIRST_TABLE: u32 = 29_700;

/// One of the [`OWNER_SLOTS`] slots of a host for an owner of policy routes: a bridge, or the
/// return path of a published port. Each slot has its own rule priority and routing table, so the
/// objects of an owner can be removed, or found after a crash, independently of other owners.
///
/// Another module assigns and persists slots. Every `u8` is a valid slot.
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
/// They come after the `local` table (0), Cilium (1 to 112) and Tailscale (5210 to 5270, on some
/// systems 1310 to 1370), whose rules stay effective. They precede Talos KubeSpan (32500 and
/// 32501), rules with a priority assigned by the kernel, including those of wg-quick (32765
/// downwards), and the `main` table (32766).
#[must_use]
pub const fn rule_priority(slot: OwnerSlot) -> u32 {
    FIRST_RULE_PRIORITY + slot.0 as u32
}

/// The routing table of a slot, 29700..=29955.
///
/// They are above the tables of the kernel (253 to 255), the single-byte ids used by administrators
/// and Calico, Tailscale (52) and Cilium (200 to 202, 2004 and 2005, and from 10 and 300 one per
/// cloud interface). They are below wg-quick, which counts upwards from 51820.
#[must_use]
pub const fn table_id(slot: OwnerSlot) -> u32 {
    FIRST_TABLE + slot.0 as u32
}

/// The priority of the rules that exempt the host itself from [`GUARD_PRIORITY`].
///
/// It follows the priorities of the [`OwnerSlot`]s, which route the egress of a network, and
/// precedes `main`.
pub const GUARD_EXEMPTION_PRIORITY: u32 = 7_656;

/// The priority of the rules that make a network unreachable for forwarded packets, in both
/// directions.
pub const GUARD_PRIORITY: u32 = 7_657;

/// The priority of the rules that route packets from a network to the NAT engine. They follow the
/// guards, so the engine receives only packets to destinations outside all networks of tidegate.
pub const EGRESS_PRIORITY: u32 = 7_658;

/// The priority of the rules that drop all forwarded packets from a network while the engine is not
/// running. They follow those of [`EGRESS_PRIORITY`].
pub const NO_EGRESS_PRIORITY: u32 = 7_659;

/// The first of the [`EGRESS_TABLES`] routing tables for the routes of NAT engines, after those of
/// the [`OwnerSlot`]s.
pub const FIRST_EGRESS_TABLE: u32 = 29_956;

/// Number of these tables, selected by a hash of the project name.
pub const EGRESS_TABLES: u32 = 1_000;

/// The link group (`IFLA_GROUP`) of the bridges of `owner`, with which nftables matches all of them
/// in one comparison. Between 0x4000_0000 and 0x5fff_ffff, by a hash of the owner's name. iproute2
/// assigns small numbers.
#[must_use]
pub fn bridge_group(owner: &str) -> u32 {
    let hash = fnv1a(owner.as_bytes());
    FIRST_BRIDGE_GROUP | (hash ^ hash >> 32) as u32 & (FIRST_BRIDGE_GROUP / 2 - 1)
}

/// The lowest [`bridge_group`].
const FIRST_BRIDGE_GROUP: u32 = 0x4000_0000;

/// The IPv4 and IPv6 addresses of the NAT engine of `tidegate up`, which represent the host to
/// containers. No host has these addresses. Each engine uses them only towards its own containers,
/// so they are the same for all engines.
///
/// The IPv4 address is link-local (RFC 3927), as are those of cloud services and of the host in
/// other container engines. It differs from those of EC2 and compatible clouds (169.254.169.254,
/// 169.254.170.2), Podman (169.254.1.1, 169.254.1.2) and Kubernetes (169.254.20.10). Its last bytes
/// are `tg`. The IPv6 address is in a unique local prefix (RFC 4193) that spells `tidegat`.
pub const ENGINE_ADDRESSES: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(169, 254, b't', b'g')),
    IpAddr::V6(Ipv6Addr::new(0xfd74, 0x6964, 0x6567, 0x6174, 0, 0, 0, 1)),
];

/// The first link group for links that tidegate is about to delete; it takes the next free group
/// from there. The upper half is `tg`, as in [`MARK`]. iproute2 assigns small numbers.
pub const DELETION_GROUP: u32 = 0x7467_0000;

/// Aliases of bridges (ip-link(8), `alias`), by which the bridges of all projects are recognized,
/// regardless of their names. Other projects deny the members of an internal network access to
/// their ports, and their engines forward no packets to any of these bridges.
const INTERNAL_ALIAS: &str = "tidegate internal network";
const NETWORK_ALIAS: &str = "tidegate network";

/// The alias of a bridge that tidegate creates with the address `mac`, of an internal network or
/// another one.
#[must_use]
pub fn bridge_alias(internal: bool, mac: MacAddress) -> String {
    format!("{} {mac}", if internal { INTERNAL_ALIAS } else { NETWORK_ALIAS })
}

/// Whether `alias` is that of an internal network, and the address with which its bridge was
/// created. `None` if it is not an alias of [`bridge_alias`].
#[must_use]
pub fn parse_bridge_alias(alias: &str) -> Option<(bool, MacAddress)> {
    let (kind, mac) = alias.rsplit_once(' ')?;
    let internal = kind == INTERNAL_ALIAS;
    (internal || kind == NETWORK_ALIAS).then_some(())?;
    Some((internal, mac.parse().ok()?))
}

/// The prefix of every network interface that tidegate creates on the host. A name has at most 15
/// bytes (`IFNAMSIZ` less the NUL), which leaves 13 after the prefix.
pub const INTERFACE_PREFIX: &str = "tg";

/// The prefix of the names of bridges. No other link of tidegate has a hyphen in the third
/// position.
pub const BRIDGE_PREFIX: &str = "tg-";

/// Bridges of containers and virtual machines of other software: Docker, Podman, CNI, libvirt, LXC,
/// LXD and Incus. A trailing `+` is a wildcard, as in iptables(8).
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

/// The prefix of the nftables tables (family `inet`) with the rules of one owner each; the owner's
/// name follows. A table is replaced as a whole, and deleting it removes all rules of the owner.
pub const NFTABLES_PREFIX: &str = "tidegate-";

/// The nftables table (family `inet`) with the user chain ([`USER_CHAIN`]) and the jumps to it. All
/// owners share it. Rules that the user added to the chain persist after all owners are gone.
pub const NFTABLES_USER_TABLE: &str = "tidegate_user";

/// The nftables table (family `inet`) that redirects 127.0.0.11:53 to the DNS server of a
/// container, in the namespace of the container.
pub const NFTABLES_DNS_TABLE: &str = "tidegate_dns";

/// The nftables table (family `inet`) that guards the VXLAN endpoint of a host.
pub const NFTABLES_MESH_TABLE: &str = "tidegate_mesh";

/// The chain for rules of the user, in nftables and iptables. Packets dropped in it reach no
/// container.
pub const USER_CHAIN: &str = "TIDEGATE-USER";

/// The prefix of every iptables chain of tidegate. A chain name has at most 28 bytes
/// (`XT_EXTENSION_MAXNAMELEN` less the NUL), which leaves 19 after the prefix.
pub const IPTABLES_CHAIN_PREFIX: &str = "TIDEGATE-";

/// The FNV-1a hash, used to derive short names. A caller that needs fewer bits folds it. Not
/// cryptographic.
#[must_use]
pub fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

/// [`fnv1a`] for callers that truncate the hash: the upper half is folded into the lower one.
#[must_use]
pub fn folded_hash(bytes: &[u8]) -> u64 {
    let hash = fnv1a(bytes);
    hash ^ (hash >> 32)
}

/// Returns the name of a bridge for packet captures: [`BRIDGE_PREFIX`], up to seven characters of
/// the `readable` name of the network, and four hexadecimal digits of a hash of `full`, which
/// identifies the network on the host. At most 15 bytes, the maximum (`IFNAMSIZ` - 1).
#[must_use]
pub fn bridge_name(readable: &str, full: &str) -> String {
    let readable: String = readable.chars().filter(char::is_ascii_alphanumeric).take(7).collect();
    let id = folded_hash(full.as_bytes()) as u16;
    format!("{BRIDGE_PREFIX}{}-{id:04x}", readable.to_ascii_lowercase())
}

/// Returns the name of the host end of a veth pair: `tgv` and twelve `random` hexadecimal digits,
/// 15 bytes.
#[must_use]
pub fn veth_name(random: [u8; 6]) -> String {
    let [a, b, c, d, e, f] = random;
    format!("{INTERFACE_PREFIX}v{a:02x}{b:02x}{c:02x}{d:02x}{e:02x}{f:02x}")
}

/// Returns the name of the VXLAN device of an overlay network: `tgx` and its VNI in hexadecimal, 9
/// bytes.
#[must_use]
pub fn vxlan_name(vni: u32) -> String {
    format!("{INTERFACE_PREFIX}x{vni:06x}")
}

fn offset(value: u32, first: u32) -> Option<OwnerSlot> {
    value.checked_sub(first).and_then(|index| u8::try_from(index).ok()).map(OwnerSlot)
}

/// The metric that counts restored objects, with the label `kind`. Each crate counts its own
/// repairs.
pub const REPAIRS_METRIC: &str = "tidegate_network_repairs_total";

/// Help text of [`REPAIRS_METRIC`].
pub const REPAIRS_HELP: &str =
    "Objects that other software removed or changed, and that were restored, by kind.";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mark_spells_tg_and_avoids_the_bits_of_other_software() {
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
        assert_eq!(MARK & 0x8b98_0f00, 0, "Calico, with the mask recommended at MARK");
    }

    #[test]
    fn interface_names_have_15_bytes_at_most_and_differ_between_projects() {
        for network in ["a", "default", "a-very-long-name-of-a-network"] {
            let [one, other] = ["demo", "other"]
                .map(|project| bridge_name(network, &format!("{project}/{network}")));
            assert!(one.len() <= 15 && one != other, "{one} {other}");
        }
        assert_eq!(veth_name([1, 2, 3, 4, 5, 0xff]), "tgv0102030405ff");
    }

    /// Test vectors of the authors of the algorithm.
    #[test]
    fn fnv1a_matches_the_published_test_vectors() {
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
    fn numbers_outside_the_range_are_not_slots() {
        for priority in [0, 5_270, 7_399, 7_656, 32_766, u32::MAX] {
            assert_eq!(OwnerSlot::of_rule_priority(priority), None);
        }
        for table in [0, 52, 255, 29_699, 29_956, 51_820, u32::MAX] {
            assert_eq!(OwnerSlot::of_table_id(table), None);
        }
    }

    #[test]
    fn uplink_marks_and_tables_are_distinct_from_all_others() {
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
    fn bridge_groups_differ_by_owner_and_from_the_deletion_group() {
        let groups: Vec<u32> = ["", "demo", "demo-2"].map(bridge_group).to_vec();
        assert!(
            groups.iter().all(|group| (0x4000_0000..0x6000_0000).contains(group)),
            "{groups:x?}"
        );
        assert!(groups.iter().all(|group| *group < DELETION_GROUP), "{groups:x?}");
        assert_ne!(groups[1], groups[2]);
    }

    #[test]
    fn the_route_protocol_is_unassigned() {
        let assigned = (0..=18).chain([42, 99]).chain(186..=200);
        assert!(assigned.into_iter().all(|number: u8| number != ROUTE_PROTOCOL));
    }
}
