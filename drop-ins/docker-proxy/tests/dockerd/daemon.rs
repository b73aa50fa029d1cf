//! A dockerd on a [`Machine`], with its command-line client and its containers.

use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::process::Output;

use serde_json::Value;
use tidegate_testbed::{Signal, eventually};

use crate::machine::{Inside, Machine, SOON};
use crate::place::Place;

/// The address of the bridge: the gateway of containers, which they see instead of clients.
pub(crate) const GATEWAY: Ipv4Addr = Ipv4Addr::new(172, 17, 0, 1);

/// The gateway of the network of [`Daemon::run_on_other_network`].
pub(crate) const OTHER_GATEWAY: Ipv4Addr = Ipv4Addr::new(172, 18, 0, 1);

/// The name of the image.
const IMAGE: &str = "server";

/// A running dockerd. Its drop kills only dockerd, not the processes that it has started.
pub(crate) struct Daemon<'a> {
    pub(crate) machine: &'a Machine,
    inside: Inside,
}

/// A running container.
pub(crate) struct Container {
    pub(crate) name: String,
    /// The pid of its first process on the machine.
    pub(crate) pid: u32,
    pub(crate) address: IpAddr,
    /// Its namespace, for clients.
    pub(crate) place: Place,
}

impl<'a> Daemon<'a> {
    /// Starts dockerd with `options` and the options that confine it to the machine, and waits
    /// until it responds.
    #[track_caller]
    pub(crate) fn start(machine: &'a Machine, options: &[&str]) -> Self {
        Self::start_with(machine, options, &[])
    }

    /// Like [`Self::start`], with additional environment variables.
    #[track_caller]
    pub(crate) fn start_with(
        machine: &'a Machine,
        options: &[&str],
        environment: &[(&str, &str)],
    ) -> Self {
        let path = |name: &str| machine.path(name).display().to_string();
        fs::write(machine.path("daemon.json"), "{}").expect("write the configuration");
        let socket = format!("unix://{}", path("docker.sock"));
        let (data, configuration) = (path("data"), path("daemon.json"));
        let bridge = format!("{GATEWAY}/16");
        let mut arguments = vec![
            "--config-file",
            &configuration,
            "--data-root",
            &data,
            "--storage-driver",
            "vfs",
            "--host",
            &socket,
            "--bip",
            &bridge,
            "--cgroup-parent",
            machine.cgroup_parent(),
            "--userland-proxy-path",
            env!("CARGO_BIN_EXE_docker-proxy"),
        ];
        arguments.extend(options);
        let inside = machine.spawn("dockerd", &arguments, environment);
        inside.process().wait_for_line("API listen on", SOON);
        let daemon = Self { machine, inside };
        if !daemon.docker(&["image", "ls", "--quiet"]).contains(char::is_alphanumeric) {
            let image = path("image.tar");
            let entry = r#"ENTRYPOINT ["/server"]"#;
            daemon.docker(&["import", "--change", entry, &image, IMAGE]);
        }
        daemon
    }

    /// Runs `docker ARGUMENTS`, which must succeed, and returns its standard output.
    #[track_caller]
    pub(crate) fn docker(&self, arguments: &[&str]) -> String {
        let output = self.client(arguments);
        assert!(
            output.status.success(),
            "docker {}: {}: {}\ndockerd log:\n{}",
            arguments.join(" "),
            output.status,
            text(&output.stderr),
            self.log()
        );
        text(&output.stdout)
    }

    /// `docker run OPTIONS` of the server with `services`, waiting until all of them are bound.
    #[track_caller]
    pub(crate) fn run(&self, name: &str, options: &[&str], services: &[&str]) -> Container {
        self.docker(&run(name, options, services));
        self.container(name)
    }

    /// `docker run OPTIONS` that must fail; returns its standard error.
    #[track_caller]
    pub(crate) fn run_fails(&self, name: &str, options: &[&str]) -> String {
        let output = self.client(&run(name, options, &["tcp:80"]));
        // The exit code of docker for an error of the daemon.
        assert_eq!(output.status.code(), Some(125), "docker run {}", options.join(" "));
        text(&output.stderr)
    }

    /// A container on a separate network.
    #[track_caller]
    pub(crate) fn run_on_other_network(&self) -> Container {
        let [a, b, ..] = OTHER_GATEWAY.octets();
        let (subnet, gateway) = (format!("{a}.{b}.0.0/16"), OTHER_GATEWAY.to_string());
        self.docker(&[
            "network",
            "create",
            "--subnet",
            &subnet,
            "--gateway",
            &gateway,
            "elsewhere",
        ]);
        self.run("stranger", &["--network", "elsewhere"], &["tcp:1"])
    }

    /// Removes a container of [`run_on_other_network`](Self::run_on_other_network) and its network.
    #[track_caller]
    pub(crate) fn remove_with_network(&self, other_network: Container) {
        self.remove(other_network);
        self.docker(&["network", "rm", "elsewhere"]);
    }

    /// `docker rm --force`.
    #[track_caller]
    #[allow(clippy::needless_pass_by_value, reason = "the container is removed")]
    pub(crate) fn remove(&self, container: Container) {
        self.docker(&["rm", "--force", &container.name]);
    }

    /// A running container, once its server is ready.
    #[track_caller]
    pub(crate) fn container(&self, name: &str) -> Container {
        let ready = eventually(SOON, || self.docker(&["logs", name]).contains("ready"));
        assert!(ready, "the server in {name} is not ready: {}", self.docker(&["logs", name]));
        let inspected = self.inspect(name);
        let pid = inspected["State"]["Pid"].as_u64().expect("a pid") as u32;
        let networks = inspected["NetworkSettings"]["Networks"].as_object().expect("networks");
        let address = networks.values().find_map(|network| network["IPAddress"].as_str());
        Container {
            name: name.to_owned(),
            pid,
            address: address.expect("a network").parse().expect("an address"),
            place: Place::open(name, self.machine.namespace_of(pid)),
        }
    }

    /// The output of `docker inspect` for a container.
    #[track_caller]
    pub(crate) fn inspect(&self, name: &str) -> Value {
        let text = self.docker(&["inspect", "--type", "container", name]);
        let mut all: Value = serde_json::from_str(&text).expect("inspect gives JSON");
        all[0].take()
    }

    /// Ends dockerd and waits for its exit.
    #[track_caller]
    pub(crate) fn end(mut self, signal: Signal) {
        let status = self.inside.stop(signal);
        if signal == Signal::TERM {
            assert_eq!(status.code(), Some(0), "dockerd log:\n{}", self.log());
        }
    }

    /// The warnings and errors of dockerd and containerd.
    fn log(&self) -> String {
        let all = self.inside.process().output();
        let lines: Vec<&str> = all.lines().filter(|line| !line.contains("level=info")).collect();
        lines.join("\n")
    }

    #[track_caller]
    fn client(&self, arguments: &[&str]) -> Output {
        let mut command = self.machine.net.host.command("timeout");
        // docker has no timeout of its own.
        command.args(["--kill-after=1", &SOON.as_secs().to_string(), "docker", "--host"]);
        command.arg(format!("unix://{}", self.machine.path("docker.sock").display()));
        command.args(arguments);
        command
            .env("DOCKER_CONFIG", self.machine.path("client"))
            .env("HOME", self.machine.path("client"));
        for variable in ["DOCKER_HOST", "DOCKER_CONTEXT", "DOCKER_API_VERSION", "DOCKER_TLS_VERIFY"]
        {
            command.env_remove(variable);
        }
        command.output().expect("start docker")
    }
}

/// The arguments of a `docker run` of the server with `services`.
fn run<'a>(name: &'a str, options: &[&'a str], services: &[&'a str]) -> Vec<&'a str> {
    // As the first process of its PID namespace, it ignores other signals.
    let mut arguments = vec!["run", "--detach", "--name", name, "--stop-signal", "KILL"];
    arguments.extend(options);
    arguments.push(IMAGE);
    arguments.extend(services);
    arguments
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
