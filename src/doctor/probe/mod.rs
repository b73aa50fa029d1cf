//! Queries the kernel. A failed query becomes a fact; no probe aborts the report.

mod device;
mod sockets;
mod trial;

pub use trial::{TRIAL, trial};

use super::host::{
    Capabilities, Forwarding, Found, Host, Limits, RunDirectory, Service, UserNamespaces,
};
use rustix::fs::{Access, access};
use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};
use rustix::thread::CapabilitySet;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;
use std::fs;
use std::io;
use std::path::Path;
use tidegate_model::Protocol;
use tidegate_model::without_errno;
use tidegate_netns::port_holders;
use tidegate_netns::{Namespace, run_directory};
use tidegate_netsetup::{IptablesState, Kernel, Observed};

/// Probes this host.
pub(super) fn host() -> Host {
    let environment = environment();
    Host {
        release: rustix::system::uname().release().to_string_lossy().into_owned(),
        capabilities: capabilities(),
        direct: trial::run(trial::Kind::Direct),
        in_user_namespace: trial::run(trial::Kind::InUserNamespace),
        user_namespaces: UserNamespaces {
            max: setting("user.max_user_namespaces"),
            unprivileged_clone: setting("kernel.unprivileged_userns_clone"),
            apparmor_restricts: setting("kernel.apparmor_restrict_unprivileged_userns"),
        },
        tun_device: device::open().map(drop).map_err(Into::into),
        tun_mode: device::mode(),
        sockets: sockets::probe(),
        forwarding: Forwarding {
            v4: setting("net.ipv4.ip_forward"),
            v6: setting("net.ipv6.conf.all.forwarding"),
            v6_disabled: setting("net.ipv6.conf.all.disable_ipv6"),
            v6_per_interface: setting("net.ipv6.conf.all.force_forwarding"),
        },
        iptables: iptables(),
        iptables_installed: IptablesState::is_installed(),
        mark_setters: mark_setters(),
        routes: environment.clone().map(|observed| observed.routes),
        first_rule: environment.map(|observed| observed.first_rule_of_others),
        services: services(),
        limits: limits(),
        run_directory: run_place(),
    }
}

fn text_of(error: &dyn Display) -> String {
    without_errno(&error.to_string())
}

fn capabilities() -> Capabilities {
    let held =
        rustix::thread::capabilities(None).map_or(CapabilitySet::empty(), |sets| sets.effective);
    Capabilities {
        net_admin: held.contains(CapabilitySet::NET_ADMIN),
        net_bind_service: held.contains(CapabilitySet::NET_BIND_SERVICE),
        many_pipes: held.intersects(CapabilitySet::SYS_RESOURCE | CapabilitySet::SYS_ADMIN),
    }
}

/// A numeric sysctl; `None` if the kernel does not have it.
fn setting(name: &str) -> Found<Option<u64>> {
    let path = format!("/proc/sys/{}", name.replace('.', "/"));
    match fs::read_to_string(&path) {
        Ok(text) => match text.trim().parse() {
            Ok(value) => Ok(Some(value)),
            Err(_) => Err(format!("{name} is {:?}", text.trim())),
        },
        // If this file is missing too, /proc/sys is not mounted, and the kernel may have the
        // sysctl.
        Err(error)
            if error.kind() == io::ErrorKind::NotFound
                && Path::new("/proc/sys/kernel/ostype").exists() =>
        {
            Ok(None)
        }
        Err(error) => Err(format!("{path}: {}", text_of(&error))),
    }
}

fn iptables() -> Found<[Option<IptablesState>; 2]> {
    if !capabilities().net_admin {
        return Err("only root may list rules".to_owned());
    }
    IptablesState::of(&here()?).map_err(|error| text_of(&error))
}

/// Empty if the query is not permitted, or without iptables.
fn mark_setters() -> Vec<String> {
    let setters =
        || Namespace::current().and_then(|here| here.with(IptablesState::mark_setters_behind)?);
    setters().unwrap_or_default()
}

fn environment() -> Found<Observed> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| text_of(&error))?;
    runtime.block_on(async {
        let mut kernel = Kernel::new(here()?);
        kernel.observe(&[]).await.map_err(|error| text_of(&error))
    })
}

/// The network namespace of this process.
fn here() -> Found<Namespace> {
    Namespace::current().map_err(|error| format!("/proc/thread-self/ns/net: {}", text_of(&error)))
}

fn services() -> Found<Vec<Service>> {
    let mut open = Vec::new();
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        let bound = port_holders::bound(protocol).map_err(|error| text_of(&error))?;
        open.extend(
            bound
                .into_iter()
                .filter(port_holders::Bound::is_open_to_all)
                .map(|one| (protocol, one)),
        );
    }
    let inodes: BTreeSet<u64> = open.iter().map(|(_, socket)| socket.inode).collect();
    let mut by_inode = BTreeMap::new();
    for holder in port_holders::holders(&inodes) {
        // Published ports of a project check the source of each connection.
        let is_project =
            holder.name == "tidegate" && holder.command.get(1).is_some_and(|word| word == "up");
        for inode in &holder.inodes {
            // Processes that share the socket are represented by the first, usually the oldest.
            by_inode.entry(*inode).or_insert((is_project, holder.to_string()));
        }
    }
    // An IPv4 and an IPv6 socket of the same process count as one service.
    let services: BTreeSet<Service> = open
        .into_iter()
        .filter_map(|(protocol, socket)| {
            let holder = by_inode.get(&socket.inode);
            let is_project = holder.is_some_and(|(is_project, _)| *is_project);
            let holder = holder.map(|(_, holder)| holder.clone());
            (!is_project).then(|| Service { port: socket.local.port(), protocol, holder })
        })
        .collect();
    Ok(services.into_iter().collect())
}

fn limits() -> Limits {
    let files = getrlimit(Resource::Nofile);
    let page = rustix::param::page_size() as u64;
    Limits {
        open_files: (files.current, files.maximum),
        pipe_bytes: setting("fs.pipe-user-pages-soft")
            .map(|pages| pages.map(|pages| pages.saturating_mul(page))),
        receive_buffer: setting("net.core.rmem_max"),
        first_port: setting("net.ipv4.ip_unprivileged_port_start"),
    }
}

fn run_place() -> RunDirectory {
    let path = run_directory();
    // A missing directory is created in its nearest existing ancestor.
    let nearest = path.as_deref().and_then(|path| path.ancestors().find(|one| one.exists()));
    let writable = match nearest {
        Some(directory) if directory.is_dir() => {
            access(directory, Access::WRITE_OK | Access::EXEC_OK).map_err(Into::into)
        }
        Some(_) => Err(Errno::NOTDIR.into()),
        None => Err(Errno::NOENT.into()),
    };
    RunDirectory { path, writable }
}
