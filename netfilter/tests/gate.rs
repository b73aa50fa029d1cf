//! Egress gates on a forwarding host.

use tidegate_netfilter::{Gate, GatePolicy};
use tidegate_testbed::Namespace;
use tidegate_testbed::hosts::Hosts;

const MARK: u32 = 0x7467_0000;
const MASK: u32 = 0xffff_0000;

/// A host that forwards between the links `left` and `right`, with one machine on each.
struct Router {
    host: Namespace,
    left: Namespace,
    right: Namespace,
}

impl Router {
    fn new() -> Self {
        let (host, left, right) = (Namespace::new(), Namespace::new(), Namespace::new());
        for (machine, link, net) in [(&left, "left", 1), (&right, "right", 2)] {
            Hosts::veth(&host, link, machine);
            host.ip_all(&format!(
                "addr add 192.0.2.{}/28 dev {link}\nlink set {link} up",
                16 * net + 1
            ));
            machine.ip_all(&format!(
                "addr add 192.0.2.{}/28 dev eth0\nlink set eth0 up\nroute add default via 192.0.2.{}",
                16 * net + 2,
                16 * net + 1
            ));
        }
        host.sysctl("net.ipv4.ip_forward", "1");
        Self { host, left, right }
    }

    fn index(&self, link: &str) -> u32 {
        let listed = self.host.ip(&["-o", "link", "show", link]);
        listed.split(':').next().unwrap().parse().unwrap()
    }

    fn put(&self, link: &str) {
        let index = self.index(link);
        self.host.run(|| gate(MARK, MASK).attach(index)).unwrap();
    }

    fn has_gate(&self, link: &str) -> bool {
        let index = self.index(link);
        self.host.run(|| gate(MARK, MASK).is_attached(index)).unwrap()
    }
}

fn gate(mark: u32, mask: u32) -> Gate {
    Gate::new(&GatePolicy::Marked { mark, mask }).unwrap()
}

fn reaches(from: &Namespace, address: &str) -> bool {
    from.command("ping").args(["-c", "1", "-W", "1", address]).output().unwrap().status.success()
}

/// Each gate outlives the object that attached it.
#[test]
fn gate_passes_packets_of_the_host_and_marked_packets_only() {
    let router = Router::new();
    let Router { host, left, right } = &router;
    assert!(reaches(left, "192.0.2.34"), "forwarded without a gate");
    assert!(!router.has_gate("right"));
    router.put("right");
    assert!(router.has_gate("right"));
    assert!(!router.has_gate("left"));
    assert!(!reaches(left, "192.0.2.34"), "forwarded without a mark");
    assert!(reaches(host, "192.0.2.34"), "sent by the host");
    assert!(!reaches(right, "192.0.2.18"), "the reply is forwarded too");
    for (mark, passes) in
        [("0x74670000", true), ("0x7467abcd", true), ("0x64670000", false), ("0x1", false)]
    {
        let rules = format!(
            "table ip t {{ chain c {{ type filter hook forward priority 0; meta mark set {mark}; }}; }}"
        );
        host.exec("nft", &["flush", "ruleset"]);
        host.exec("nft", &[&rules]);
        assert_eq!(reaches(left, "192.0.2.34"), passes, "{mark}");
    }
    host.exec("nft", &["flush", "ruleset"]);
    assert!(!reaches(left, "192.0.2.34"), "dropped after the ruleset is flushed");
}

#[test]
fn gate_is_removed_with_its_link_and_attaches_once() {
    let router = Router::new();
    router.put("right");
    let index = router.index("right");
    // The kernel keeps one copy of a program that is attached twice.
    router.host.run(|| {
        let gate = gate(MARK, MASK);
        gate.attach(index).unwrap();
        gate.attach(index).unwrap();
    });
    assert!(!reaches(&router.left, "192.0.2.34"));
    let other = router.host.run(|| gate(0x0100_0000, 0xff00_0000).is_attached(index)).unwrap();
    assert!(!other, "a gate with another mark is a different gate");
    router.host.ip(&["link", "del", "right"]);
    let gone = router.host.run(|| gate(MARK, MASK).is_attached(index)).unwrap_err();
    assert_eq!(gone.raw_os_error(), Some(libc::ENODEV));
}

#[test]
fn gate_for_links_passes_packets_received_on_them() {
    let router = Router::new();
    let (left, right) = (router.index("left"), router.index("right"));
    let attach = |links: &[u32]| {
        let policy = GatePolicy::From(links.to_vec());
        router.host.run(|| Gate::new(&policy).unwrap().attach(right)).unwrap();
    };
    attach(&[left]);
    assert!(reaches(&router.left, "192.0.2.34"));
    attach(&[right]);
    assert!(!reaches(&router.left, "192.0.2.34"), "every gate must pass the packet");
    assert!(reaches(&router.host, "192.0.2.34"), "sent by the host");
}
