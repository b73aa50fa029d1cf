//! The device, made where the container is, and handed out of there.

use super::addresses::Addresses;
use super::options::{Options, Target};
use super::process::{Copy, line};
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

/// The longest error that is passed on, in bytes.
const LONGEST_ERROR: usize = 1024;

/// Why there is no device.
#[derive(Debug, thiserror::Error)]
pub(super) enum DeviceError {
    /// What the one inside says.
    #[error("{0}")]
    Inside(String),
    /// It says nothing.
    #[error("the process that makes the device ended without a word")]
    Silent,
    #[error("start the process that makes the device: {0}")]
    Start(#[source] io::Error),
}

/// A device, and whether it has IPv6.
#[derive(Debug)]
pub(super) struct Made {
    pub(super) tun: Tun,
    pub(super) ipv6: bool,
}

/// Makes the device that `options` ask for.
///
/// To be called while this process has but one thread.
pub(super) fn make(options: &Options, layer2: bool) -> Result<Made, DeviceError> {
    let (ours, theirs) = line().map_err(DeviceError::Start)?;
    let copy =
        Copy::start(&[], || tell(&theirs, inside(options, layer2))).map_err(DeviceError::Start)?;
    drop(theirs);
    let mut bytes = [0; LONGEST_ERROR];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        let flags = RecvFlags::CMSG_CLOEXEC;
        match recvmsg(&ours, &mut [IoSliceMut::new(&mut bytes)], &mut control, flags) {
            Err(rustix::io::Errno::INTR) => {}
            received => break received.map_err(|error| DeviceError::Start(error.into()))?,
        }
    };
    drop(copy);
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
            let tun = tun.map_err(|error| DeviceError::Inside(error.to_string()))?;
            Ok(Made { tun, ipv6 })
        }
        (_, []) => Err(DeviceError::Silent),
        (_, text) => Err(DeviceError::Inside(String::from_utf8_lossy(text).into_owned())),
    }
}

fn tell(line: &OwnedFd, made: Result<Made, String>) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    // That nobody listens any more changes nothing: this process ends.
    let _ = match made {
        Ok(Made { tun, ipv6 }) => {
            let (descriptor, granted) = tun.into_parts();
            let Capabilities { peek_offset, tcp_offload, udp_offload, udp_gso } = granted;
            let bytes = [ipv6, peek_offset, tcp_offload, udp_offload, udp_gso].map(u8::from);
            let descriptors = [descriptor.as_fd()];
            control.push(SendAncillaryMessage::ScmRights(&descriptors));
            sendmsg(line, &[IoSlice::new(&bytes)], &mut control, SendFlags::NOSIGNAL)
        }
        Err(text) => {
            let text = &text.as_bytes()[..text.len().min(LONGEST_ERROR)];
            sendmsg(line, &[IoSlice::new(text)], &mut control, SendFlags::NOSIGNAL)
        }
    };
}

/// In the copy: goes where the container is, and makes the device there.
fn inside(options: &Options, layer2: bool) -> Result<Made, String> {
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
        // Where the host has IPv6 switched off, the device can have no address of it; callers ask
        // for it all the same.
        Err(StartError::Interface { .. }) if options.ipv6 => open(false),
        made => made,
    };
    made.map_err(|error| explain(&error, &name, options))
}

/// Joins the user namespace whose network it is. A process that is in it already, as podman's
/// children are, or is root, stays where it is.
fn join(options: &Options, namespace: &Namespace) -> Result<(), String> {
    let named = match (&options.user_namespace, &options.target) {
        (Some(path), _) => Some(path.clone()),
        (None, Target::Process(pid)) => Some(PathBuf::from(format!("/proc/{pid}/ns/user"))),
        (None, Target::Path(_)) => None,
    };
    let joined = match &named {
        Some(path) => File::open(path).and_then(join_user_namespace),
        // With a path alone, the namespace's owner is joined where that is permitted.
        None => namespace.owner().and_then(join_user_namespace),
    };
    match joined {
        Err(error)
            if options.user_namespace.is_some() && error.raw_os_error() != Some(libc::EINVAL) =>
        {
            let path = named.as_deref().unwrap_or(Path::new("")).display().to_string();
            Err(format!("--userns-path {path:?}: {error}"))
        }
        // Whether the network can be entered all the same is seen when it is.
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
    // On a device of layer 3 nobody advertises a router: whoever wants IPv6 is given it.
    if ipv6 && !layer2 {
        tun.addresses.push(Addresses::GUEST_V6.into());
        tun.default_routes.push(Family::V6);
        tun.gateways.push(Addresses::GATEWAY_V6.into());
    }
    tun
}

/// One line that says what to do.
fn explain(error: &StartError, namespace: &str, options: &Options) -> String {
    let number = |source: &io::Error| source.raw_os_error();
    match error {
        StartError::Interface { name, source }
            if matches!(number(source), Some(libc::EBUSY | libc::EINVAL)) =>
        {
            format!(
                "device {name:?}: there is an interface of this name in the namespace already; delete it, or name another one behind {}",
                match options.target {
                    Target::Process(_) => "PID",
                    Target::Path(_) => "PATH",
                }
            )
        }
        StartError::Namespace(source) if number(source) == Some(libc::EPERM) => format!(
            "enter the network namespace {namespace}: {source}: it belongs to another user, or to a user namespace that --userns-path has to name"
        ),
        error => error.to_string(),
    }
}
