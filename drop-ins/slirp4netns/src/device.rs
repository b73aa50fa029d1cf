//! The device: created in the namespace of the container, and passed to this process.

use super::addresses::Addresses;
use super::options::{Options, Target};
use super::process::{ForkedProcess, message_socket_pair};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use tidegate_nat::{Capabilities, Layer2Options, Layer2V6, StartError, Tun, TunOptions};
use tidegate_netns::{Family, Namespace, join_user_namespace};

/// Maximum length of an error that is passed between the processes, in bytes.
const MAX_ERROR: usize = 1024;

/// Why the device was not created.
#[derive(Debug, thiserror::Error)]
pub(super) enum DeviceError {
    /// The error of the forked process.
    #[error("{0}")]
    Forked(String),
    /// The forked process sent no message.
    #[error("the process that creates the device ended without a message")]
    Silent,
    #[error("start the process that creates the device: {0}")]
    Start(#[source] io::Error),
}

/// A device, and whether it has IPv6.
#[derive(Debug)]
pub(super) struct Made {
    pub(super) tun: Tun,
    pub(super) ipv6: bool,
}

/// Creates the device for `options`.
///
/// Must be called while this process has a single thread.
pub(super) fn make(options: &Options, layer2: bool) -> Result<Made, DeviceError> {
    let (ours, theirs) = message_socket_pair().map_err(DeviceError::Start)?;
    let forked = ForkedProcess::start(&[], || send(&theirs, create(options, layer2)))
        .map_err(DeviceError::Start)?;
    drop(theirs);
    let mut bytes = [0; MAX_ERROR];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        let flags = RecvFlags::CMSG_CLOEXEC;
        match recvmsg(&ours, &mut [IoSliceMut::new(&mut bytes)], &mut control, flags) {
            Err(rustix::io::Errno::INTR) => {}
            received => break received.map_err(|error| DeviceError::Start(error.into()))?,
        }
    };
    drop(forked);
    let descriptor = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    match (descriptor, &bytes[..received.bytes]) {
        (Some(descriptor), &[ipv6, peek_offset, tcp_offload, udp_offload, udp_gso]) => {
            let capabilities = Capabilities {
                peek_offset: peek_offset != 0,
                tcp_offload: tcp_offload != 0,
                udp_offload: udp_offload != 0,
                udp_gso: udp_gso != 0,
            };
            let ipv6 = ipv6 != 0;
            let tun = Tun::adopt(descriptor, &tun_options(options, ipv6, layer2), capabilities);
            let tun = tun.map_err(|error| DeviceError::Forked(error.to_string()))?;
            Ok(Made { tun, ipv6 })
        }
        (_, []) => Err(DeviceError::Silent),
        (_, text) => Err(DeviceError::Forked(String::from_utf8_lossy(text).into_owned())),
    }
}

fn send(socket: &OwnedFd, made: Result<Made, String>) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    // A send error needs no handling: this process exits in any case.
    let _ = match made {
        Ok(Made { tun, ipv6 }) => {
            let (descriptor, granted) = tun.into_parts();
            let Capabilities { peek_offset, tcp_offload, udp_offload, udp_gso } = granted;
            let bytes = [ipv6, peek_offset, tcp_offload, udp_offload, udp_gso].map(u8::from);
            let descriptors = [descriptor.as_fd()];
            control.push(SendAncillaryMessage::ScmRights(&descriptors));
            sendmsg(socket, &[IoSlice::new(&bytes)], &mut control, SendFlags::NOSIGNAL)
        }
        Err(text) => {
            let text = &text.as_bytes()[..text.len().min(MAX_ERROR)];
            sendmsg(socket, &[IoSlice::new(text)], &mut control, SendFlags::NOSIGNAL)
        }
    };
}

/// In the forked process: enters the namespaces of the container and creates the device.
fn create(options: &Options, layer2: bool) -> Result<Made, String> {
    let (name, opened) = match &options.target {
        Target::Process(pid) => (format!("of process {pid}"), Namespace::from_pid(*pid)),
        Target::Path(path) => (path.display().to_string(), Namespace::from_path(path)),
    };
    let namespace = opened.map_err(|error| error.to_string())?;
    join(options, &namespace)?;
    let open = |ipv6| {
        Tun::open(&namespace, &tun_options(options, ipv6, layer2)).map(|tun| Made { tun, ipv6 })
    };
    let made = match open(options.ipv6) {
        // If IPv6 is disabled on the host, the device cannot have an IPv6 address; callers request
        // one nevertheless.
        Err(StartError::Interface { .. }) if options.ipv6 => open(false),
        made => made,
    };
    made.map_err(|error| explain(&error, &name, options))
}

/// Joins the user namespace that owns the network namespace. A process that is already in it, such
/// as a child of podman, or is root, stays in its own.
fn join(options: &Options, namespace: &Namespace) -> Result<(), String> {
    let named = match (&options.user_namespace, &options.target) {
        (Some(path), _) => Some(path.clone()),
        (None, Target::Process(pid)) => Some(PathBuf::from(format!("/proc/{pid}/ns/user"))),
        (None, Target::Path(_)) => None,
    };
    let joined = match &named {
        Some(path) => File::open(path).and_then(join_user_namespace),
        // Without a path, the owner of the network namespace is joined if that is permitted.
        None => namespace.owner().and_then(join_user_namespace),
    };
    match joined {
        Err(error)
            if options.user_namespace.is_some() && error.raw_os_error() != Some(libc::EINVAL) =>
        {
            let path = named.as_deref().unwrap_or(Path::new("")).display().to_string();
            Err(format!("--userns-path {path:?}: {error}"))
        }
        // Entering the network namespace shows whether the permission suffices.
        _ => Ok(()),
    }
}

fn tun_options(options: &Options, ipv6: bool, layer2: bool) -> TunOptions {
    let addresses = Addresses::of(options.network);
    let mut tun = TunOptions {
        mtu: options.mtu,
        replace: true,
        loopback: options.configure,
        ..TunOptions::new(options.device.clone())
    };
    if layer2 {
        let name_server = !options.disable_dns;
        let v6 = Layer2V6 {
            prefix: Addresses::GUEST_V6.network(),
            gateway: Addresses::GATEWAY_V6,
            name_server: name_server.then_some(Addresses::NAME_SERVER_V6),
        };
        tun.layer2 = Some(Layer2Options {
            network: options.network,
            gateway: addresses.gateway,
            name_server: name_server.then_some(addresses.name_server),
            v6: ipv6.then_some(v6),
            mac: options.mac,
        });
    }
    if options.configure {
        tun.addresses.push(addresses.guest().into());
        tun.default_routes.push(Family::V4);
        tun.gateways.push(addresses.gateway.into());
    }
    // On a layer 3 device, no router is advertised, so IPv6 is configured here.
    if ipv6 && !layer2 {
        tun.addresses.push(Addresses::GUEST_V6.into());
        tun.default_routes.push(Family::V6);
        tun.gateways.push(Addresses::GATEWAY_V6.into());
    }
    tun
}

/// One line with the remedy.
fn explain(error: &StartError, namespace: &str, options: &Options) -> String {
    let number = |source: &io::Error| source.raw_os_error();
    match error {
        StartError::Interface { name, source }
            if matches!(number(source), Some(libc::EBUSY | libc::EINVAL)) =>
        {
            format!(
                "device {name:?}: an interface of this name already exists in the namespace; delete it, or set another name after {}",
                match options.target {
                    Target::Process(_) => "PID",
                    Target::Path(_) => "PATH",
                }
            )
        }
        StartError::Namespace(source) if number(source) == Some(libc::EPERM) => format!(
            "enter the network namespace {namespace}: {source}: it belongs to another user, or to a user namespace that must be set with --userns-path"
        ),
        error => error.to_string(),
    }
}
