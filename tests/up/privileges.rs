//! Privileges of root in a rootless service: all of them in the service's own network namespace,
//! none in the namespace of the bridges.

use super::scene::{Scene, rootless_namespace};
use rustix::mount::{MountFlags, mount};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recv, recvmsg, send, sendmsg,
    socket_with,
};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, Permissions};
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::TcpListener;
use std::ops::RangeInclusive;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

const SOON: Duration = Duration::from_secs(10);

/// Variable with the socket at which [`attacker`] receives the network namespace of the bridges.
/// Without it, that test does nothing.
const HANDOVER: &str = "TIDEGATE_TEST_HANDOVER";

/// The test that the service runs as its command.
const ATTACKER: &str = "up::privileges::attacker";

/// Prefix of the lines that [`attacker`] prints.
const ATTEMPT: &str = "attempt: ";

// Missing in libc, from `linux/net_namespace.h` and `linux/rtnetlink.h`.
const NETNSA_NSID: u16 = 1;
const NETNSA_FD: u16 = 3;
const RTM_NEWNSID: u16 = 88;

/// The namespace ID that the attacker assigns to the namespace of the bridges.
const CHOSEN_ID: i32 = 99;

/// Interface indexes that include those of the bridges.
const INDICES: RangeInclusive<i32> = 1..=32;

#[test]
fn root_in_a_service_has_no_capability_over_the_networks_of_its_project() {
    let scene = Scene::new();
    let handover = scene.directory.path().join("handover");
    let listener = UnixListener::bind(&handover).unwrap();
    fs::set_permissions(&handover, Permissions::from_mode(0o777)).unwrap();
    let program = std::env::current_exe().unwrap();
    let file = format!(
        r#"
name: demo
networks: {{ front: {{}}, back: {{ internal: true }} }}
services:
  web:
    command: {} --exact {ATTACKER} --nocapture --test-threads=1
    environment: {{ {HANDOVER}: {} }}
    networks: [ front ]
  stranger: {{ command: sleep 60, networks: [ back ] }}
"#,
        program.display(),
        handover.display(),
    );
    let up = scene.up_as_nobody(&file);
    up.wait_for_line("Ctrl-C takes all of it down again.", SOON);
    let (attacker, _) = listener.accept().unwrap();
    let bridges = rootless_namespace(&up, &scene.net.host);
    bridges.ip(&["link", "add", "announced", "type", "bridge"]);
    hand_over(&attacker, &File::open(bridges.path()).unwrap());
    up.wait_for_line(&format!("{ATTEMPT}end"), SOON);
    let output = up.output();
    let results = output.lines().filter_map(|line| line.split_once(ATTEMPT)?.1.split_once(": "));
    let (own, others): (BTreeMap<_, _>, BTreeMap<_, _>) =
        results.partition(|(attempt, _)| attempt.starts_with("own "));
    assert_eq!(own.len(), 8, "{output}");
    assert!(own.values().all(|result| *result == "succeeds"), "{own:#?}");
    assert_eq!(others.len(), 12, "{output}");
    let denied = ["EPERM", "EACCES", "nothing"];
    assert!(others.values().all(|result| denied.contains(result)), "{others:#?}");
}

#[test]
fn a_service_is_root_in_its_own_user_namespace() {
    let scene = Scene::new();
    let file = scene.directory.path().join("written");
    let script = format!(
        "echo user $$(id -u) group $$(id -g); readlink /proc/self/ns/user
         echo written > {}; ping -c 1 -W 5 db > /dev/null && echo reached; sleep 60",
        file.display()
    );
    let compose = serde_json::json!({ "name": "demo", "services": {
        "web": { "command": ["sh", "-c", script], "depends_on": ["db"] },
        "db": { "command": ["sh", "-c", "readlink /proc/self/ns/user; sleep 60"] },
    }});
    let up = scene.up_as_nobody(&compose.to_string());
    for line in ["web | user 0 group 0", "web | reached"] {
        up.wait_for_line(line, SOON);
    }
    let line = |service: &str| up.wait_for_line(&format!("{service:3} | user:["), SOON);
    let inside = |service| line(service).rsplit_once(' ').unwrap().1.to_owned();
    let own = fs::read_link(format!("/proc/{}/ns/user", up.pid())).unwrap();
    let namespaces = BTreeSet::from([inside("web"), inside("db"), own.display().to_string()]);
    assert_eq!(namespaces.len(), 3, "{namespaces:?}");
    let metadata = fs::metadata(file).unwrap();
    let caller = fs::metadata(scene.directory.path()).unwrap();
    assert_eq!((metadata.uid(), metadata.gid()), (caller.uid(), caller.gid()));
}

/// Not a test by itself: the command of a service in the first test.
#[test]
fn attacker() {
    let Some(handover) = std::env::var_os(HANDOVER) else { return };
    let rtnetlink = Rtnetlink::open();
    let id = rtnetlink.id_of_peer();
    report("own link", rtnetlink.new_link(&[kind("veth"), name("own")]));
    let rule = [libc::AF_INET as u8, 0, 0, 0, 254, 0, 0, 1, 0, 0, 0, 0];
    report("own rule", rtnetlink.request(libc::RTM_NEWRULE, libc::NLM_F_CREATE, &rule).map(drop));
    report("own sysctl", fs::write("/proc/sys/net/ipv4/ip_forward", "1"));
    report("own low port", TcpListener::bind("0.0.0.0:80").map(drop));
    let packets = socket_with(AddressFamily::PACKET, SocketType::RAW, SocketFlags::CLOEXEC, None);
    report("own raw socket", packets.map(drop).map_err(Into::into));
    report("own host name", rustix::system::sethostname(b"renamed").map_err(Into::into));
    let mounted = mount("tmpfs", "/mnt", "tmpfs", MountFlags::empty(), None);
    report("own mount", mounted.map_err(Into::into));
    let nested = Command::new("unshare").args(["--pid", "--fork", "--mount-proc", "true"]).status();
    report(
        "own PID namespace",
        nested.and_then(|status| {
            if status.success() { Ok(()) } else { Err(io::Error::other(status.to_string())) }
        }),
    );

    let network = fs::read_link("/proc/self/ns/net").unwrap();
    let is_elsewhere = |process: &Path| {
        fs::read_link(process.join("ns/net")).is_ok_and(|elsewhere| elsewhere != network)
    };
    let processes = fs::read_dir("/proc").unwrap().map(|entry| entry.unwrap().path());
    report_count("processes elsewhere", processes.filter(|process| is_elsewhere(process)).count());
    let announcements = Rtnetlink::of_all_namespaces();
    let bridges = receive_namespace(&UnixStream::connect(handover).unwrap());
    report_count("announcements", announcements.waiting());

    let target = attribute(libc::IFLA_TARGET_NETNSID, &id.to_ne_bytes());
    report("read links", rtnetlink.link_of(id));
    report("macvlan", rtnetlink.new_macvlan(id, "macvlan1"));
    report("make a link", rtnetlink.new_link(&[kind("bridge"), name("link1"), target.clone()]));
    report("move a link", rtnetlink.move_link("own", &target));

    let descriptor = bridges.as_raw_fd();
    let target = attribute(libc::IFLA_NET_NS_FD, &descriptor.to_ne_bytes());
    report(
        "make a link, by descriptor",
        rtnetlink.new_link(&[kind("bridge"), name("link2"), target.clone()]),
    );
    report("move a link, by descriptor", rtnetlink.move_link("own", &target));
    // In a namespace in which that of the bridges has no ID yet, root can assign one. The ID alone
    // grants no access.
    // SAFETY: affects only the network namespace of this thread.
    checked(unsafe { libc::unshare(libc::CLONE_NEWNET) }).unwrap();
    let rtnetlink = Rtnetlink::open();
    rtnetlink.new_id(CHOSEN_ID, &bridges).unwrap();
    report("read links, by a chosen ID", rtnetlink.link_of(CHOSEN_ID));
    report("macvlan, by a chosen ID", rtnetlink.new_macvlan(CHOSEN_ID, "macvlan2"));
    // SAFETY: NS_GET_USERNS takes no argument and returns a descriptor (ioctl_ns(2)).
    report("owner", checked(unsafe { libc::ioctl(descriptor, libc::NS_GET_USERNS) }));
    // SAFETY: affects only the namespace of this thread, which ends right after.
    report("setns", checked(unsafe { libc::setns(descriptor, libc::CLONE_NEWNET) }));
    println!("{ATTEMPT}end");
}

fn report(attempt: &str, result: io::Result<()>) {
    let result = match result.map_err(|error| (error.raw_os_error(), error)) {
        Ok(()) => "succeeds".to_owned(),
        Err((Some(libc::EPERM), _)) => "EPERM".to_owned(),
        Err((Some(libc::EACCES), _)) => "EACCES".to_owned(),
        Err((_, other)) => other.to_string(),
    };
    println!("{ATTEMPT}{attempt}: {result}");
}

fn report_count(attempt: &str, count: usize) {
    let result = if count == 0 { "nothing" } else { "something" };
    println!("{ATTEMPT}{attempt}: {result}");
}

fn checked(result: i32) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn hand_over(to: &UnixStream, namespace: &File) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let descriptors = [namespace.as_fd()];
    assert!(control.push(SendAncillaryMessage::ScmRights(&descriptors)));
    sendmsg(to, &[IoSlice::new(b"!")], &mut control, SendFlags::empty()).unwrap();
}

fn receive_namespace(from: &UnixStream) -> OwnedFd {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    recvmsg(from, &mut [IoSliceMut::new(&mut byte)], &mut control, RecvFlags::empty()).unwrap();
    let descriptor = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    descriptor.expect("a descriptor comes with the byte")
}

/// rtnetlink requests with attributes that `ip` and the netlink crates do not support.
struct Rtnetlink(OwnedFd);

impl Rtnetlink {
    fn open() -> Self {
        // The default protocol 0 is NETLINK_ROUTE.
        let socket =
            socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None);
        Self(socket.unwrap())
    }

    /// Receives link notifications of this namespace and of all namespaces that have an ID in it.
    fn of_all_namespaces() -> Self {
        let this = Self::open();
        // The first request binds the socket. An unbound socket receives no notifications.
        this.request(libc::RTM_GETLINK, 0, &link(1, &[])).unwrap();
        for (option, value) in [
            (libc::NETLINK_LISTEN_ALL_NSID, 1_i32),
            (libc::NETLINK_ADD_MEMBERSHIP, libc::RTNLGRP_LINK as i32),
        ] {
            // SAFETY: the pointer is valid for the given length, 4 bytes.
            let set = unsafe {
                let value = (&raw const value).cast();
                libc::setsockopt(this.0.as_raw_fd(), libc::SOL_NETLINK, option, value, 4)
            };
            checked(set).unwrap();
        }
        this
    }

    /// The number of received messages. No link of the service itself changes between two calls.
    fn waiting(&self) -> usize {
        let mut buffer = [0; 65_536];
        let read = || recv(&self.0, &mut buffer[..], RecvFlags::DONTWAIT);
        std::iter::repeat_with(read).take_while(Result::is_ok).count()
    }

    /// Sends a request and returns the messages before the acknowledgement.
    fn request(&self, kind: u16, flags: i32, body: &[u8]) -> io::Result<Vec<Vec<u8>>> {
        let flags = (libc::NLM_F_REQUEST | libc::NLM_F_ACK | flags) as u16;
        let length = u32::try_from(16 + body.len()).unwrap();
        let mut message = length.to_ne_bytes().to_vec();
        message.extend([kind.to_ne_bytes(), flags.to_ne_bytes()].concat());
        message.extend([0; 8]);
        message.extend(body);
        send(&self.0, &message, SendFlags::empty())?;
        let mut replies = Vec::new();
        loop {
            let mut buffer = [0; 65_536];
            let (_, length) = recv(&self.0, &mut buffer[..], RecvFlags::empty())?;
            let mut rest = &buffer[..length];
            while rest.len() >= 16 {
                let end = u32::from_ne_bytes(rest[..4].try_into().unwrap()) as usize;
                let kind = u16::from_ne_bytes(rest[4..6].try_into().unwrap());
                let payload = &rest[16..end];
                if i32::from(kind) == libc::NLMSG_ERROR {
                    let error = i32::from_ne_bytes(payload[..4].try_into().unwrap());
                    return if error == 0 {
                        Ok(replies)
                    } else {
                        Err(io::Error::from_raw_os_error(-error))
                    };
                }
                replies.push(payload.to_vec());
                rest = &rest[end.next_multiple_of(4).min(rest.len())..];
            }
        }
    }

    fn new_link(&self, attributes: &[Vec<u8>]) -> io::Result<()> {
        let flags = libc::NLM_F_CREATE | libc::NLM_F_EXCL;
        self.request(libc::RTM_NEWLINK, flags, &link(0, attributes)).map(drop)
    }

    /// Creates a macvlan in this namespace on a link of the namespace with the ID `id`.
    fn new_macvlan(&self, id: i32, link_name: &str) -> io::Result<()> {
        let on = |index: i32| {
            self.new_link(&[
                kind("macvlan"),
                name(link_name),
                attribute(libc::IFLA_LINK, &index.to_ne_bytes()),
                attribute(libc::IFLA_LINK_NETNSID, &id.to_ne_bytes()),
            ])
        };
        let results: Vec<_> = INDICES.map(on).collect();
        let is_made = results.iter().any(Result::is_ok);
        if is_made { Ok(()) } else { results.into_iter().next_back().unwrap() }
    }

    fn move_link(&self, link_name: &str, target: &[u8]) -> io::Result<()> {
        let body = link(0, &[name(link_name), target.to_vec()]);
        self.request(libc::RTM_SETLINK, 0, &body).map(drop)
    }

    /// Reads the loopback interface of the namespace with the ID `id`.
    fn link_of(&self, id: i32) -> io::Result<()> {
        let body = link(1, &[attribute(libc::IFLA_TARGET_NETNSID, &id.to_ne_bytes())]);
        self.request(libc::RTM_GETLINK, 0, &body).map(drop)
    }

    /// The ID of the namespace of the other veth end, which the kernel has assigned.
    fn id_of_peer(&self) -> i32 {
        let replies = self.request(libc::RTM_GETLINK, 0, &link(0, &[name("eth0")])).unwrap();
        let mut attributes = &replies[0][16..];
        while attributes.len() >= 4 {
            let length = u16::from_ne_bytes(attributes[..2].try_into().unwrap()) as usize;
            if u16::from_ne_bytes(attributes[2..4].try_into().unwrap()) == libc::IFLA_LINK_NETNSID {
                return i32::from_ne_bytes(attributes[4..8].try_into().unwrap());
            }
            attributes = &attributes[length.next_multiple_of(4).min(attributes.len())..];
        }
        panic!("the peer of eth0 is in the same namespace");
    }

    fn new_id(&self, id: i32, namespace: &OwnedFd) -> io::Result<()> {
        let body = [
            vec![0; 4],
            attribute(NETNSA_NSID, &id.to_ne_bytes()),
            attribute(NETNSA_FD, &namespace.as_raw_fd().to_ne_bytes()),
        ];
        self.request(RTM_NEWNSID, 0, &body.concat()).map(drop)
    }
}

/// The body of a message about the link with `index`, or 0 for a link identified by name.
fn link(index: i32, attributes: &[Vec<u8>]) -> Vec<u8> {
    let mut body = vec![0; 4];
    body.extend(index.to_ne_bytes());
    body.extend([0; 8]);
    body.extend(attributes.concat());
    body
}

fn kind(kind: &str) -> Vec<u8> {
    attribute(libc::IFLA_LINKINFO, &attribute(libc::IFLA_INFO_KIND, kind.as_bytes()))
}

fn name(name: &str) -> Vec<u8> {
    attribute(libc::IFLA_IFNAME, &[name.as_bytes(), b"\0"].concat())
}

fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(4 + value.len()).unwrap();
    let mut attribute = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
    attribute.extend(value);
    attribute.resize(attribute.len().next_multiple_of(4), 0);
    attribute
}
