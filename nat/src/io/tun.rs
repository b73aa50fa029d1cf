//! TUN device: created inside a namespace, and removed with its descriptor.

use super::netlink;
use super::tun_options::{MIN_MTU, TunOptions};
use crate::error::StartError;
use crate::layer2::Layer2;
use crate::settings::Capabilities;
use crate::wire::ethernet::ETHERNET_MAX_MTU;
use rustix::fs::{Mode, OFlags, open};
use rustix::io::Errno;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd};
use tidegate_model::Feature;
use tidegate_model::MacAddress;
use tidegate_netns::Namespace;

/// Flags of `TUNSETOFFLOAD` (include/uapi/linux/if_tun.h): checksums; TCP over IPv4 and IPv6, with
/// ECN; UDP.
const CSUM: libc::c_ulong = 0x01;
const TSO4: libc::c_ulong = 0x02;
const TSO6: libc::c_ulong = 0x04;
const TSO_ECN: libc::c_ulong = 0x08;
const USO4: libc::c_ulong = 0x20;
const USO6: libc::c_ulong = 0x40;

/// ioctl numbers (include/uapi/linux/if_tun.h).
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const TUNSETPERSIST: libc::c_ulong = 0x4004_54cb;
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;
const TUNSETIFINDEX: libc::c_ulong = 0x4004_54da;

/// A configured device that is up. Its addresses and routes are removed with it.
#[derive(Debug)]
pub struct Tun {
    pub(crate) descriptor: OwnedFd,
    name: String,
    mtu: u16,
    pub(crate) capabilities: Capabilities,
    pub(crate) layer2: Option<Layer2>,
}

impl Tun {
    /// Creates and configures a device inside `namespace`.
    ///
    /// # Errors
    /// [`StartError`].
    pub fn open(namespace: &Namespace, options: &TunOptions) -> Result<Self, StartError> {
        if options.mtu < MIN_MTU || options.layer2.is_some() && options.mtu > ETHERNET_MAX_MTU {
            return Err(StartError::Mtu(options.mtu));
        }
        let bytes = options.name.as_bytes();
        let sound = !bytes.is_empty()
            && bytes.len() < libc::IFNAMSIZ
            && bytes
                .iter()
                .all(|byte| byte.is_ascii_graphic() && !matches!(byte, b'/' | b':' | b'%'));
        if !sound {
            return Err(StartError::Name(options.name.clone()));
        }
        namespace.with(|| Self::open_here(options)).map_err(StartError::Namespace)?
    }

    /// Adopts a device that another process created with the same options.
    ///
    /// # Errors
    /// [`StartError::Interface`] if it is not such a device.
    pub fn adopt(
        descriptor: OwnedFd,
        options: &TunOptions,
        capabilities: Capabilities,
    ) -> Result<Self, StartError> {
        let layer2 = options.layer2.clone().map(|layer2| {
            let station = hardware_address(&descriptor)
                .map_err(|source| StartError::Interface { name: options.name.clone(), source })?;
            Ok(Layer2::new(layer2, station, options.mtu))
        });
        let layer2 = layer2.transpose()?;
        Ok(Self { descriptor, name: options.name.clone(), mtu: options.mtu, capabilities, layer2 })
    }

    /// Returns the arguments for [`adopt`](Self::adopt).
    #[must_use]
    pub fn into_parts(self) -> (OwnedFd, Capabilities) {
        (self.descriptor, self.capabilities)
    }

    /// The name of the interface.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The MTU.
    #[must_use]
    pub fn mtu(&self) -> u16 {
        self.mtu
    }

    /// The offloads that the kernel granted.
    #[must_use]
    pub fn capabilities(&self) -> Capabilities {
        self.capabilities
    }

    fn open_here(options: &TunOptions) -> Result<Self, StartError> {
        let descriptor = open_driver().map_err(StartError::Device)?;
        let interface = |source| StartError::Interface { name: options.name.clone(), source };
        if options.replace
            && options.layer2.is_none()
            && netlink::has(&options.name).map_err(interface)?
        {
            delete_tap(&options.name).map_err(StartError::Device)?;
        }
        let descriptor = create(descriptor, options).map_err(interface)?;
        let capabilities = offload(&descriptor, options.capabilities).map_err(interface)?;
        netlink::configure(options).map_err(interface)?;
        Self::adopt(descriptor, options, capabilities)
    }
}

/// An empty `ifreq` with a name, whose length was checked to leave space for the NUL.
fn request(name: &str) -> libc::ifreq {
    // SAFETY: all-zero is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request
}

fn checked(result: libc::c_int) -> io::Result<()> {
    if result >= 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Opens a descriptor that is not attached to a device. Until it is, reads and writes fail
/// (`EBADFD`).
pub(crate) fn open_driver() -> io::Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
    Ok(open("/dev/net/tun", flags, Mode::empty())?)
}

/// Deletes the persistent TAP device `name`: attaches to it and clears persistence, so that it is
/// removed with the descriptor. The kernel refuses this for other devices and for devices in use,
/// and the creation of the new device then fails.
fn delete_tap(name: &str) -> io::Result<()> {
    let descriptor = open_driver()?;
    let mut request = request(name);
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI) as libc::c_short;
    // SAFETY: the first ioctl takes an ifreq, the second a number.
    let _ = unsafe {
        checked(libc::ioctl(descriptor.as_raw_fd(), TUNSETIFF as _, &raw mut request))
            .and_then(|()| checked(libc::ioctl(descriptor.as_raw_fd(), TUNSETPERSIST as _, 0)))
    };
    Ok(())
}

/// Returns the MAC address of the interface of the device, even if it is in another namespace.
fn hardware_address(descriptor: &OwnedFd) -> io::Result<MacAddress> {
    let mut request = request("");
    // SAFETY: the ioctl takes an ifreq, and fills in the address.
    let address = unsafe {
        checked(libc::ioctl(descriptor.as_raw_fd(), libc::SIOCGIFHWADDR as _, &raw mut request))?;
        request.ifr_ifru.ifru_hwaddr.sa_data
    };
    let mut station = MacAddress::BROADCAST;
    for (to, from) in station.0.iter_mut().zip(address) {
        *to = from as u8;
    }
    Ok(station)
}

/// Creates the device, with the interface index of `options` on `unattached`.
fn create(unattached: OwnedFd, options: &TunOptions) -> io::Result<OwnedFd> {
    let descriptor = match options.index {
        Some(index) => create_with_index(unattached, index, options)?,
        None => create_new(options)?,
    };
    let length = crate::wire::virtio::LENGTH as libc::c_int;
    // SAFETY: the ioctl takes a pointer to an int.
    checked(unsafe {
        libc::ioctl(descriptor.as_raw_fd(), TUNSETVNETHDRSZ as _, &raw const length)
    })?;
    Ok(descriptor)
}

/// Creates a device with an index chosen by the kernel.
fn create_new(options: &TunOptions) -> io::Result<OwnedFd> {
    let mut configuration = tun::Configuration::default();
    let layer = if options.layer2.is_some() { tun::Layer::L2 } else { tun::Layer::L3 };
    configuration.tun_name(&options.name).layer(layer).platform_config(|platform| {
        // The crate would otherwise configure the device by ioctls that require privileges in the
        // initial user namespace.
        platform.ensure_root_privileges(false);
        platform.vnet_hdr(true);
    });
    // The crate attaches to a persistent device of this name, which is intended only for a TAP.
    if options.layer2.is_none() && netlink::has(&options.name)? {
        return Err(Errno::BUSY.into());
    }
    let device = tun::create(&configuration).map_err(io::Error::from)?;
    device.set_nonblock()?;
    // SAFETY: the crate hands over a descriptor that it owned.
    Ok(unsafe { OwnedFd::from_raw_fd(device.into_raw_fd()) })
}

/// Creates a device with the interface index of a previous one. The index has to be set between
/// opening and attaching the descriptor, which `tun` does in one step.
fn create_with_index(descriptor: OwnedFd, index: u32, options: &TunOptions) -> io::Result<OwnedFd> {
    let mut request = request(&options.name);
    // IFF_TUN_EXCL prevents taking over a persistent device of this name.
    let kind =
        if options.layer2.is_some() { libc::IFF_TAP } else { libc::IFF_TUN | libc::IFF_TUN_EXCL };
    let flags = kind | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: each ioctl gets its argument type: a pointer to an int, or an ifreq.
    unsafe {
        checked(libc::ioctl(descriptor.as_raw_fd(), TUNSETIFINDEX as _, &raw const index))?;
        checked(libc::ioctl(descriptor.as_raw_fd(), TUNSETIFF as _, &raw mut request))?;
    }
    Ok(descriptor)
}

/// Requests offloads, and returns the granted ones.
fn offload(descriptor: &OwnedFd, wanted: Capabilities) -> io::Result<Capabilities> {
    let wanted = Capabilities {
        tcp_offload: wanted.tcp_offload && !Feature::TunOffload.is_forced_off(),
        udp_offload: wanted.udp_offload && !Feature::Uso.is_forced_off(),
        ..wanted
    };
    let tcp = if wanted.tcp_offload { CSUM | TSO4 | TSO6 | TSO_ECN } else { 0 };
    // UDP segmentation also requires checksum offload (tun_net_fix_features).
    let udp = if wanted.udp_offload { CSUM | USO4 | USO6 } else { 0 };
    let granted = |tcp_offload, udp_offload| Capabilities { tcp_offload, udp_offload, ..wanted };
    let attempts = [
        (tcp | udp, granted(wanted.tcp_offload, wanted.udp_offload)),
        (tcp & !TSO_ECN, granted(wanted.tcp_offload, false)),
        (0, granted(false, false)),
    ];
    let mut refused = Ok(());
    for (flags, granted) in attempts {
        // SAFETY: the ioctl takes a number.
        refused =
            checked(unsafe { libc::ioctl(descriptor.as_raw_fd(), TUNSETOFFLOAD as _, flags) });
        if refused.is_ok() {
            return Ok(granted);
        }
    }
    refused.map(|()| granted(false, false))
}
