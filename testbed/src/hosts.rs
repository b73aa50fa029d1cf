//! Hosts of a cluster, on one switch.

use crate::{Namespace, Process, Signal};
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;
use tempfile::TempDir;

/// Time for a server to start.
const START: Duration = Duration::from_secs(30);

/// Hosts with the addresses 192.0.2.N and 2001:db8::N, N from 1, on the link `eth0`.
#[derive(Debug)]
pub struct Hosts {
    /// The bridge `br0` with the ports `p1`, `p2`, ..., and the addresses 192.0.2.254 and
    /// 2001:db8::fe, by which the hosts reach other networks.
    pub switch: Namespace,
    /// The hosts.
    pub hosts: Vec<Namespace>,
}

impl Hosts {
    /// Creates `count` hosts, at most 200.
    #[must_use]
    #[track_caller]
    pub fn new(count: u8) -> Self {
        let switch = Namespace::new();
        switch.ip_all(
            "link set lo up
             link add br0 type bridge mcast_snooping 0
             addr add 192.0.2.254/24 dev br0
             addr add 2001:db8::fe/64 dev br0 nodad
             link set br0 up",
        );
        let host = |number: u8| {
            let host = Namespace::new();
            let port = format!("p{number}");
            Self::veth(&switch, &port, &host);
            switch.ip_all(&format!(
                "link set {port} master br0
                 link set {port} up"
            ));
            host.ip_all(&format!(
                "link set lo up
                 addr add 192.0.2.{number}/24 dev eth0
                 addr add 2001:db8::{number:x}/64 dev eth0 nodad
                 link set eth0 up
                 route add default via 192.0.2.254
                 -6 route add default via 2001:db8::fe"
            ));
            host
        };
        Self { hosts: (1..=count).map(host).collect(), switch }
    }

    /// Creates a veth pair: `port` in `namespace`, and eth0 in `peer`.
    #[track_caller]
    pub fn veth(namespace: &Namespace, port: &str, peer: &Namespace) {
        let peer = peer.path();
        namespace.ip(&[
            "link",
            "add",
            port,
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "netns",
            &peer.display().to_string(),
        ]);
    }

    /// The IPv4 address of host `index`, from 0.
    #[must_use]
    pub fn address(index: usize) -> IpAddr {
        [192, 0, 2, index as u8 + 1].into()
    }

    /// Connects host `index`, from 0, to the switch, or unplugs it.
    #[track_caller]
    pub fn plug(&self, index: usize, is_plugged: bool) {
        let state = if is_plugged { "up" } else { "down" };
        self.switch.ip(&["link", "set", &format!("p{}", index + 1), state]);
    }
}

/// The members of an etcd cluster.
pub struct Etcd {
    members: Vec<(Namespace, IpAddr)>,
    directory: TempDir,
    scheme: String,
    more: Vec<String>,
    /// The running members.
    pub servers: Vec<Process>,
}

impl Etcd {
    /// Starts a member in each namespace at its address, and waits until they answer.
    #[must_use]
    #[track_caller]
    pub fn start(members: Vec<(Namespace, IpAddr)>) -> Self {
        Self::start_with(members, "http", |_| Vec::new())
    }

    /// Starts members whose clients use `scheme`, with additional flags. `more` returns these for
    /// files in the directory.
    #[must_use]
    #[track_caller]
    pub fn start_with(
        members: Vec<(Namespace, IpAddr)>,
        scheme: &str,
        more: impl Fn(&std::path::Path) -> Vec<String>,
    ) -> Self {
        let directory = tempfile::tempdir().unwrap_or_else(|error| panic!("directory: {error}"));
        let more = more(directory.path());
        let mut etcd =
            Self { members, directory, scheme: scheme.to_owned(), more, servers: Vec::new() };
        etcd.servers = (0..etcd.members.len()).map(|number| etcd.spawn(number)).collect();
        for server in &etcd.servers {
            server.wait_for_line("ready to serve client requests", START);
        }
        etcd
    }

    /// Starts member `number` again, with its data.
    #[track_caller]
    pub fn restart(&mut self, number: usize) {
        self.servers[number].signal(Signal::KILL);
        self.servers[number].wait(START);
        self.servers[number] = self.spawn(number);
    }

    fn spawn(&self, number: usize) -> Process {
        let name = |number| format!("m{number}");
        let peer = |number: usize| format!("http://{}:2380", self.members[number].1);
        let all = (0..self.members.len()).map(|one| format!("{}={}", name(one), peer(one)));
        let all = all.collect::<Vec<_>>().join(",");
        let client = self.url(number);
        let mut command = self.members[number].0.command("etcd");
        command
            .args(["--name", &name(number), "--initial-cluster", &all])
            .args(["--listen-peer-urls", &peer(number)])
            .args(["--initial-advertise-peer-urls", &peer(number)])
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--heartbeat-interval", "50", "--election-timeout", "500"])
            .arg("--data-dir")
            .arg(self.data(number))
            .args(["--log-outputs", "stderr"])
            .args(&self.more);
        Process::spawn(&mut command)
    }

    fn data(&self, number: usize) -> PathBuf {
        self.directory.path().join(format!("m{number}"))
    }

    /// The directory for files of the test.
    #[must_use]
    pub fn directory(&self) -> &std::path::Path {
        self.directory.path()
    }

    /// The URL of member `number`.
    #[must_use]
    pub fn url(&self, number: usize) -> String {
        format!("{}://{}:2379", self.scheme, self.members[number].1)
    }

    /// The URLs of all members, separated by commas.
    #[must_use]
    pub fn urls(&self) -> String {
        let urls = (0..self.members.len()).map(|number| self.url(number));
        urls.collect::<Vec<_>>().join(",")
    }

    /// The member that leads.
    #[must_use]
    #[track_caller]
    pub fn leader(&self) -> usize {
        (0..self.members.len())
            .find(|number| {
                let status = self.ctl_at(*number, &["endpoint", "status"]);
                // ENDPOINT, ID, VERSION, DB SIZE, IS LEADER, ...
                status.split(", ").nth(4) == Some("true")
            })
            .unwrap_or_else(|| panic!("no member leads"))
    }

    /// Runs etcdctl at the first member.
    #[track_caller]
    pub fn ctl(&self, args: &[&str]) -> String {
        self.ctl_at(0, args)
    }

    #[track_caller]
    fn ctl_at(&self, number: usize, args: &[&str]) -> String {
        let mut command = self.members[number].0.command("etcdctl");
        command.env("ETCDCTL_API", "3").args(["--endpoints", &self.url(number)]).args(args);
        let output = command.output().unwrap_or_else(|error| panic!("etcdctl: {error}"));
        assert!(output.status.success(), "etcdctl {args:?}: {output:?}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }
}
