//! The TUN device: made inside a namespace, gone with its descriptor.

use super::netlink;
use crate::error::StartError;
use crate::layer2::{Layer2, Layer2Options};
use crate::settings::Capabilities;
use crate::wire::ethernet::{ETHERNET_MAX_MTU, MacAddress};
use ipnet::IpNet;
use rustix::fs::{Mode, OFlags, open};
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, OwnedFd};
use tidegate_model::Feature;
use tidegate_netns::{Family, Namespace};

/// Flags of `TUNSETOFFLOAD` (include/uapi/linux/if_tun.h): checksums; TCP over IPv4 and IPv6, with
/// ECN; UDP.
const CSUM: libc::c_ulong = 0x01;
const TSO4: libc::c_ulong = 0x02;
const TSO6: libc::c_ulong = 0x04;
const TSO_ECN: libc::c_ulong = 0x08;
const USO4: libc::c_ulong = 0x20;
const USO6: libc::c_ulong = 0x40;

/// ioctl numbers of the same file.
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const TUNSETPERSIST: libc::c_ulong = 0x4004_54cb;
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;
const TUNSETIFINDEX: libc::c_ulong = 0x4004_54da;

/// The table that every packet's route is looked up in (`RT_TABLE_MAIN`).
const MAIN: u32 = 254;

/// The smallest MTU that a device can have: IPv6's (RFC 8200 section 5).
pub const MIN_MTU: u16 = 1280;

/// What a device is to be.
#[derive(Clone, Debug)]
pub struct TunOptions {
    /// Its name.
    pub name: String,
    /// Its interface index, which must be free; the kernel selects one if this is none.
    pub index: Option<u32>,
    /// Bytes that fit into one packet, 1280 to 65535. 1500 is as fast as any, and what the world
    /// has.
    pub mtu: u16,
    /// Packets that the kernel keeps for us. 500, the kernel's own, loses thousands with 8 fast
    /// connections.
    pub queue_length: u32,
    /// Which offloads are asked for.
    pub capabilities: Capabilities,
    /// Its addresses, each with its prefix length. A device that only forwards for bridges needs
    /// none.
    pub addresses: Vec<IpNet>,
    /// Of which families everything goes here that has no other way.
    pub default_routes: Vec<Family>,
    /// What those routes name as the next router, of each family one at most. A device of layer 3
    /// needs none; people and programs look for one.
    pub gateways: Vec<IpAddr>,
    /// In which table those routes are: 254 is `main`, another one is asked by policy rules only.
    pub table: u32,
    /// A TAP device of this name that is persistent, and that nobody has open, gives way
    /// (`ip tuntap add` makes such). Any other interface of the name is in the way.
    pub replace: bool,
    /// The namespace's loopback is brought up as well.
    pub loopback: bool,
    /// A TAP instead of a TUN: a device on an Ethernet. One of the name that is persistent, and
    /// that nobody has open, is taken over.
    pub layer2: Option<Layer2Options>,
}

impl TunOptions {
    /// The defaults, under a name.
    #[must_use]
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            index: None,
            mtu: 1500,
            queue_length: 4096,
            capabilities: Capabilities::ALL,
            addresses: Vec::new(),
            default_routes: Vec::new(),
            gateways: Vec::new(),
            table: MAIN,
            replace: false,
            loopback: false,
            layer2: None,
        }
    }
}

/// A device that is up. Its addresses and routes go with it.
#[derive(Debug)]
pub struct Tun {
    pub(crate) descriptor: OwnedFd,
    name: String,
    mtu: u16,
    pub(crate) capabilities: Capabilities,
    pub(crate) layer2: Option<Layer2>,
}

impl Tun {
    /// Makes a device inside `namespace` and sets it up.
    ///
    /// # Errors
    /// [`StartError`] says what is missing.
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

    /// One that another process has made, with the same options, and handed over.
    ///
    /// # Errors
    /// [`StartError::Interface`] if it is no such device.
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

    /// What [`adopt`](Self::adopt) takes.
    #[must_use]
    pub fn into_parts(self) -> (OwnedFd, Capabilities) {
        (self.descriptor, self.capabilities)
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Bytes that fit into one packet.
    #[must_use]
    pub fn mtu(&self) -> u16 {
        self.mtu
    }

    /// The offloads that the kernel has granted.
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
            take_away(&options.name).map_err(StartError::Device)?;
        }
        make(&descriptor, options).map_err(interface)?;
        let capabilities = offload(&descriptor, options.capabilities).map_err(interface)?;
        netlink::configure(options).map_err(interface)?;
        Self::adopt(descriptor, options, capabilities)
    }
}

/// An empty `ifreq` with a name. The name was checked: it fits, with a zero behind it.
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

/// A descriptor that is attached to no device yet. Until it is, reading and writing fail
/// (`EBADFD`).
pub(crate) fn open_driver() -> io::Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
    Ok(open("/dev/net/tun", flags, Mode::empty())?)
}

/// Ends the TAP device `name`: attached to and no longer persistent, it goes with its last
/// descriptor. What is no such device, or has somebody attached, is refused by the kernel and
/// stays; that the name is taken is told by who makes the new one.
fn take_away(name: &str) -> io::Result<()> {
    let descriptor = open_driver()?;
    let mut request = request(name);
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI) as libc::c_short;
    // SAFETY: the first request is given an ifreq, the second takes a number.
    let _ = unsafe {
        checked(libc::ioctl(descriptor.as_raw_fd(), TUNSETIFF as _, &raw mut request))
            .and_then(|()| checked(libc::ioctl(descriptor.as_raw_fd(), TUNSETPERSIST as _, 0)))
    };
    Ok(())
}

/// The address of the device's interface. It may be in another namespace, and the kernel looks
/// there.
fn hardware_address(descriptor: &OwnedFd) -> io::Result<MacAddress> {
    let mut request = request("");
    // SAFETY: the request is given an ifreq, and fills the address in.
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

fn make(descriptor: &OwnedFd, options: &TunOptions) -> io::Result<()> {
    let mut request = request(&options.name);
    // Exclusively: without it, a persistent device of this name would be taken over.
    let kind =
        if options.layer2.is_some() { libc::IFF_TAP } else { libc::IFF_TUN | libc::IFF_TUN_EXCL };
    let flags = kind | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    let length = crate::wire::virtio::LENGTH as libc::c_int;
    // SAFETY: each request is given what it wants: an ifreq, and a pointer to an int.
    unsafe {
        if let Some(index) = &options.index {
            checked(libc::ioctl(descriptor.as_raw_fd(), TUNSETIFINDEX as _, &raw const *index))?;
        }
        checked(libc::ioctl(descriptor.as_raw_fd(), TUNSETIFF as _, &raw mut request))?;
        checked(libc::ioctl(descriptor.as_raw_fd(), TUNSETVNETHDRSZ as _, &raw const length))
    }
}

/// Asks for offloads, as many as are wanted and granted.
fn offload(descriptor: &OwnedFd, wanted: Capabilities) -> io::Result<Capabilities> {
    let wanted = Capabilities {
        tcp_offload: wanted.tcp_offload && !Feature::TunOffload.is_forced_off(),
        udp_offload: wanted.udp_offload && !Feature::Uso.is_forced_off(),
        ..wanted
    };
    let tcp = if wanted.tcp_offload { CSUM | TSO4 | TSO6 | TSO_ECN } else { 0 };
    // UDP's needs checksums too (tun_net_fix_features).
    let udp = if wanted.udp_offload { CSUM | USO4 | USO6 } else { 0 };
    let granted = |tcp_offload, udp_offload| Capabilities { tcp_offload, udp_offload, ..wanted };
    let attempts = [
        (tcp | udp, granted(wanted.tcp_offload, wanted.udp_offload)),
        (tcp & !TSO_ECN, granted(wanted.tcp_offload, false)),
        (0, granted(false, false)),
    ];
    let mut refused = Ok(());
    for (flags, granted) in attempts {
        // SAFETY: the request takes a number.
        refused =
            checked(unsafe { libc::ioctl(descriptor.as_raw_fd(), TUNSETOFFLOAD as _, flags) });
        if refused.is_ok() {
            return Ok(granted);
        }
    }
    refused.map(|()| granted(false, false))
}
