//! Handles, addresses and routes, tested against the kernel.

use std::io;
use std::net::{IpAddr, TcpListener, TcpStream};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::Command;
use std::sync::Arc;
use std::thread;
use std::time::Duration;
use tidegate_netns::{AddressBook, Family, Namespace};
use tidegate_testbed::{Topology, addr, eventually, require_root};

const SOON: Duration = Duration::from_secs(10);

fn open(namespace: &tidegate_testbed::Namespace) -> Namespace {
    Namespace::from_path(&namespace.path()).unwrap()
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

#[test]
fn socket_belongs_to_the_namespace_of_its_creation() {
    let inside = tidegate_testbed::Namespace::new();
    let namespace = open(&inside);
    let listener = namespace.with(|| TcpListener::bind("127.0.0.1:0")).unwrap().unwrap();
    let address = listener.local_addr().unwrap();
    assert!(inside.run(|| TcpStream::connect(address)).is_ok());
    // The same port outside is free.
    let outside = tidegate_testbed::Namespace::new();
    assert!(outside.run(|| TcpStream::connect(address)).is_err());
}

#[test]
fn nested_calls_return_to_the_previous_namespace() {
    let (a, b) = (tidegate_testbed::Namespace::new(), tidegate_testbed::Namespace::new());
    let (home, a, b) = (Namespace::current().unwrap(), open(&a), open(&b));
    a.with(|| {
        assert!(a.is_current());
        b.with(|| {
            assert!(b.is_current());
            a.with(|| assert_eq!(Namespace::current().unwrap().id(), a.id())).unwrap();
            home.with(|| assert!(home.is_current())).unwrap();
            assert!(b.is_current());
        })
        .unwrap();
        assert!(a.is_current());
    })
    .unwrap();
    assert!(home.is_current());
}

#[test]
fn thread_returns_after_a_panic() {
    let inside = tidegate_testbed::Namespace::new();
    let (home, namespace) = (Namespace::current().unwrap(), open(&inside));
    let result = catch_unwind(AssertUnwindSafe(|| namespace.with(|| panic!("on purpose"))));
    assert!(result.is_err());
    assert!(home.is_current());
    assert!(namespace.with(|| namespace.is_current()).unwrap());
}

#[test]
fn handle_keeps_its_namespace_alive() {
    let inside = tidegate_testbed::Namespace::new();
    let namespace = open(&inside);
    drop(inside);
    assert_eq!(namespace.sysctl("net.ipv4.tcp_congestion_control").unwrap(), "reno");
}

#[test]
fn namespace_is_opened_by_pid() {
    let inside = tidegate_testbed::Namespace::new();
    let child = tidegate_testbed::Process::spawn(inside.command("sleep").arg("60"));
    // spawn returns after the child has entered the namespace and executed `sleep`.
    assert_eq!(Namespace::from_pid(child.pid()).unwrap().id(), open(&inside).id());
}

#[test]
fn sysctls_are_per_namespace() {
    let inside = tidegate_testbed::Namespace::new();
    let namespace = open(&inside);
    let before = Namespace::current().unwrap().sysctl("net.ipv4.ip_forward").unwrap();
    for value in ["1", "0"] {
        namespace.set_sysctl("net.ipv4.ip_forward", value).unwrap();
        assert_eq!(inside.read_sysctl("net.ipv4.ip_forward"), value);
    }
    assert_eq!(Namespace::current().unwrap().sysctl("net.ipv4.ip_forward").unwrap(), before);
    assert!(namespace.set_sysctl("net.ipv4.no_such_thing", "1").is_err());
}

#[test]
fn threads_enter_concurrently() {
    let inside = [tidegate_testbed::Namespace::new(), tidegate_testbed::Namespace::new()];
    let namespaces = inside.each_ref().map(open);
    thread::scope(|scope| {
        for number in 0..8 {
            let namespace = &namespaces[number % 2];
            scope.spawn(move || {
                for _ in 0..200 {
                    namespace.with(|| assert!(namespace.is_current())).unwrap();
                    assert!(!namespace.is_current());
                }
            });
        }
    });
}

#[test]
fn denied_entry_is_an_error_and_runs_nothing() {
    require_root();
    let inside = tidegate_testbed::Namespace::new();
    let namespace = open(&inside);
    // Capabilities are per thread, so the change ends with the thread.
    let result = thread::spawn(move || {
        rustix::thread::set_capabilities(
            None,
            rustix::thread::CapabilitySets {
                effective: rustix::thread::CapabilitySet::empty(),
                permitted: rustix::thread::CapabilitySet::empty(),
                inheritable: rustix::thread::CapabilitySet::empty(),
            },
        )
        .unwrap();
        namespace.with(|| unreachable!("the closure must not run"))
    })
    .join()
    .unwrap();
    assert_eq!(result.unwrap_err().kind(), io::ErrorKind::PermissionDenied);
}

/// Root of a user namespace without its own network namespace owns the namespaces that it creates
/// and may enter them, but not its current one.
#[test]
fn thread_that_could_not_return_delegates_to_a_temporary_thread() {
    // User namespaces are per process, so the test starts another process.
    const OUTSIDE: &str = "TIDEGATE_TEST_IN_USER_NAMESPACE";
    if std::env::var_os(OUTSIDE).is_none() {
        let output = Command::new("unshare")
            .args(["--user", "--map-root-user"])
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", "thread_that_could_not_return_delegates_to_a_temporary_thread"])
            .env(OUTSIDE, "1")
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
        return;
    }
    let inside = tidegate_testbed::Namespace::new();
    let (home, namespace) = (Namespace::current().unwrap(), open(&inside));
    assert!(!Namespace::current_is_enterable());
    let here = thread::current().id();
    let (inside_it, thread) =
        namespace.with(|| (namespace.is_current(), thread::current().id())).unwrap();
    assert!(inside_it && thread != here);
    let socket = namespace.with(|| std::net::UdpSocket::bind("127.0.0.1:0")).unwrap().unwrap();
    assert_eq!(
        inside.bound_ports(tidegate_testbed::Protocol::Udp),
        [socket.local_addr().unwrap().port()].into()
    );
    let panicked = catch_unwind(|| namespace.with(|| panic!("inside")));
    assert_eq!(panicked.unwrap_err().downcast_ref(), Some(&"inside"));
    assert!(home.is_current());
    assert_eq!(home.with(|| 7).unwrap(), 7, "staying needs no privileges");
    // A thread in a namespace owned by that user can enter and return.
    assert!(inside.run(|| namespace.with(|| namespace.is_current())).unwrap());
    // Event loops move inside permanently.
    let other = open(&tidegate_testbed::Namespace::new());
    thread::scope(|scope| {
        let moved = scope.spawn(|| {
            namespace.enter().unwrap();
            let here = thread::current().id();
            assert_eq!(
                other.with(|| thread::current().id()).unwrap(),
                here,
                "no temporary thread is needed"
            );
            assert!(namespace.is_current());
        });
        moved.join().unwrap();
    });
    assert!(home.is_current());
}

#[test]
fn namespace_in_its_own_user_namespace_is_accessible_to_its_creator() {
    require_root();
    let (own, home) = (Namespace::create().unwrap(), Namespace::current().unwrap());
    let [one, other] = [(); 2].map(|()| Namespace::create_in_user_namespace().unwrap());
    assert!(own.belongs_to_own_user_namespace() && !one.belongs_to_own_user_namespace());
    let id = |owner: std::os::fd::OwnedFd| rustix::fs::fstat(owner).unwrap().st_ino;
    let owners = [&own, &one, &other].map(|namespace| id(namespace.owner().unwrap()));
    assert!(owners[0] != owners[1] && owners[1] != owners[2], "{owners:?}");
    one.set_sysctl("net.ipv4.ip_forward", "1").unwrap();
    assert_eq!(one.sysctl("net.ipv4.ip_forward").unwrap(), "1");
    assert!(one.with(|| TcpListener::bind("127.0.0.1:80")).unwrap().is_ok());
    assert!(home.is_current());
    // The child processes that created them have been reaped.
    let children = std::fs::read_to_string("/proc/thread-self/children").unwrap();
    assert_eq!(children, "");
}

/// For a single-threaded process, see tests/up/rootless.rs.
#[test]
fn multithreaded_process_cannot_create_a_user_namespace() {
    let before = std::fs::read_link("/proc/self/ns/user").unwrap();
    let refused = tidegate_netns::become_root_of_a_user_namespace().unwrap_err();
    assert_eq!(refused.kind(), io::ErrorKind::InvalidInput);
    assert_eq!(std::fs::read_link("/proc/self/ns/user").unwrap(), before);
}

#[test]
fn fifo_does_not_block() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("fifo");
    rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, 0o600.into(), 0)
        .unwrap();
    let error = Namespace::from_path(&path).unwrap_err();
    assert_eq!(error.to_string(), format!("{} is not a network namespace", path.display()));
}

#[test]
fn handles_do_not_leak_descriptors() {
    let inside = tidegate_testbed::Namespace::new();
    let before = descriptors_to(&inside);
    for _ in 0..10 {
        let namespace = open(&inside);
        let book = AddressBook::open(&namespace).unwrap();
        drop((namespace, book));
    }
    assert_eq!(descriptors_to(&inside), before);
}

/// Counts the file descriptors of this process that refer to the namespace.
fn descriptors_to(namespace: &tidegate_testbed::Namespace) -> usize {
    let id = open(namespace).id().to_string();
    let descriptors = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
    descriptors
        .filter(|fd| std::fs::read_link(fd.path()).is_ok_and(|link| link.as_os_str() == &*id))
        .count()
}

#[test]
fn address_book_follows_every_change() {
    let net = Topology::three();
    let book = AddressBook::open(&open(&net.container)).unwrap();
    assert!(book.is_local(addr::CONTAINER_V4.into()) && book.is_local(addr::CONTAINER_V6.into()));
    assert!(book.is_on_link(addr::GATEWAY_V4.into()) && !book.is_on_link(addr::CLIENT_V4.into()));
    assert!(book.on_link_with(addr::CONTAINER_V6.into(), addr::NEIGHBOUR_V6.into()));
    assert!(!book.is_on_link(ip("127.0.0.1")));

    for (address, prefix) in [("10.99.0.5", 24), ("fd99::5", 64)] {
        let (own, block) = (ip(address), format!("{address}/{prefix}"));
        assert!(!book.is_local(own));
        net.container.ip(&["addr", "add", &block, "dev", "eth0", "nodad"]);
        // IPv4 addresses are announced before `ip` returns, IPv6 addresses asynchronously.
        assert!(own.is_ipv6() || book.is_local(own));
        assert!(eventually(SOON, || book.is_local(own) && book.is_on_link(own)));
        net.container.ip(&["addr", "del", &block, "dev", "eth0"]);
        assert!(!book.is_local(own) && !book.is_on_link(own));
    }
}

#[test]
fn address_book_survives_a_queue_overflow() {
    let inside = tidegate_testbed::Namespace::new();
    let book = AddressBook::open(&open(&inside)).unwrap();
    let mut batch = String::from("link add eth0 type veth peer name other\n");
    for _ in 0..10 {
        for host in 1..250 {
            batch += &format!("addr add 10.99.0.{host}/32 dev eth0\n");
        }
        batch += "addr flush dev eth0\n";
    }
    batch += "addr add 10.99.1.1/32 dev eth0\n";
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("batch");
    std::fs::write(&file, batch).unwrap();
    inside.ip(&["-batch", file.to_str().unwrap()]);
    assert!(book.is_local(ip("10.99.1.1")) && !book.is_local(ip("10.99.0.1")));
}

#[test]
fn container_addresses_are_global_and_ordered() {
    let net = Topology::three();
    net.container.ip_all(
        "link add first type veth peer name other
         addr add 10.1.0.2/24 dev first
         addr add fd01::2/64 dev first nodad
         link set first up
         addr add 127.0.0.53/32 dev lo
         addr add 192.0.2.9/32 dev lo",
    );
    let expected: [IpAddr; 4] =
        [addr::CONTAINER_V4.into(), ip("10.1.0.2"), addr::CONTAINER_V6.into(), ip("fd01::2")];
    let book = AddressBook::open(&open(&net.container)).unwrap();
    assert_eq!(book.container_addresses(), expected);
}

#[test]
fn users_of_one_namespace_share_a_book() {
    let [one, other] = [Namespace::create().unwrap(), Namespace::create().unwrap()];
    let book = AddressBook::of(&one).unwrap();
    assert!(Arc::ptr_eq(&book, &AddressBook::of(&one).unwrap()));
    assert!(!Arc::ptr_eq(&book, &AddressBook::of(&other).unwrap()));
    let gone = Arc::downgrade(&book);
    drop(book);
    assert!(gone.upgrade().is_none(), "the book is closed with its last user");
    assert!(AddressBook::of(&one).is_ok(), "a new book is opened");
}

#[test]
fn gateway_is_that_of_the_best_default_route() {
    let net = Topology::three();
    let book = AddressBook::of(&open(&net.container)).unwrap();
    assert_eq!(book.gateway(Family::V4).unwrap(), Some(addr::GATEWAY_V4.into()));
    assert_eq!(book.gateway(Family::V6).unwrap(), Some(addr::GATEWAY_V6.into()));
    assert_eq!(AddressBook::of(&open(&net.host)).unwrap().gateway(Family::V4).unwrap(), None);

    // Other tables and higher metrics are ignored.
    net.container.ip_all(
        "route add default via 172.30.0.77 metric 1000
         route add default via 172.30.0.78 table 99
         -6 route add default via fd30::77 metric 4096",
    );
    assert_eq!(book.gateway(Family::V4).unwrap(), Some(addr::GATEWAY_V4.into()));
    assert_eq!(book.gateway(Family::V6).unwrap(), Some(addr::GATEWAY_V6.into()));

    // Multipath hops are equivalent, so the first one is used.
    net.container.ip_all(
        "route replace default nexthop via 172.30.0.1 dev eth0 nexthop via 172.30.0.3 dev eth0",
    );
    assert_eq!(book.gateway(Family::V4).unwrap(), Some(addr::GATEWAY_V4.into()));
    // An IPv4 route with an IPv6 next hop, and a route without a gateway.
    net.container
        .ip_all("-4 route flush exact default\n-4 route add default via inet6 fd30::1 dev eth0");
    assert_eq!(book.gateway(Family::V4).unwrap(), Some(addr::GATEWAY_V6.into()));
    net.container.ip_all("-4 route flush exact default\n-4 route add default dev eth0");
    assert_eq!(book.gateway(Family::V4).unwrap(), None);
}

#[test]
fn connected_interface_reaches_the_address_without_a_router() {
    let net = Topology::three();
    let book = AddressBook::of(&open(&net.host)).unwrap();
    let found = |address: IpAddr| book.connected_interface(address).unwrap().map(|(_, name)| name);
    assert_eq!(found(addr::CONTAINER_V4.into()).as_deref(), Some("br0"));
    assert_eq!(found(addr::CONTAINER_V6.into()).as_deref(), Some("br0"));
    assert_eq!(found(addr::CLIENT_V4.into()).as_deref(), Some("eth0"));
    assert_eq!(found(addr::HOST_V4.into()), None, "its own");
    assert_eq!(found(ip("198.51.100.1")), None, "no route");
    assert_eq!(found(ip("2001:db8:99::1")), None, "no route");
    net.host.ip_all("route add 198.51.100.0/24 via 203.0.113.9\nroute add unreachable 10.0.0.0/8");
    assert_eq!(found(ip("198.51.100.1")), None, "behind a router");
    assert_eq!(found(ip("10.1.2.3")), None, "unreachable");

    let (index, _) = book.connected_interface(addr::CONTAINER_V4.into()).unwrap().unwrap();
    let listed = net.host.ip(&["-oneline", "link", "show", "br0"]);
    assert!(listed.starts_with(&format!("{index}: br0:")), "{listed}");
}

#[test]
fn handle_outlives_its_path() {
    let inside = tidegate_testbed::Namespace::new();
    let namespace = open(&inside);
    let path = namespace.path().unwrap().to_owned();
    drop(inside);
    // The handle holds its own descriptor, independent of the path.
    assert!(!path.exists() || Namespace::from_path(&path).is_err());
    assert!(namespace.with(|| namespace.is_current()).unwrap());
}

#[test]
fn created_namespace_is_new_and_can_be_entered() {
    require_root();
    let (one, other) = (Namespace::create().unwrap(), Namespace::create().unwrap());
    assert_ne!(one.id(), other.id());
    assert!(!one.is_current());
    let inside =
        one.with(|| (Namespace::current().unwrap().id(), TcpListener::bind("0.0.0.0:1").unwrap()));
    assert_eq!(inside.unwrap().0, one.id());
    assert!(TcpListener::bind("0.0.0.0:1").is_ok(), "its ports are separate");
}
