//! Options of a TUN device.

use crate::layer2::Layer2Options;
use crate::settings::Capabilities;
use ipnet::IpNet;
use std::net::IpAddr;
use tidegate_netns::Family;

/// The main routing table (`RT_TABLE_MAIN`).
const MAIN: u32 = 254;

/// Minimum MTU of a device: that of IPv6 (RFC 8200 section 5).
pub const MIN_MTU: u16 = 1280;

/// Options of a device.
#[derive(Clone, Debug)]
pub struct TunOptions {
    /// Name of the interface.
    pub name: String,
    /// Interface index, which must be free; chosen by the kernel if `None`.
    pub index: Option<u32>,
    /// MTU in bytes, 1280 to 65535. 1500 is as fast as larger values, and the usual MTU of
    /// networks.
    pub mtu: u16,
    /// Queue length in packets. With the default of the kernel, 500, eight fast connections lose
    /// thousands of packets.
    pub queue_length: u32,
    /// Offloads to request.
    pub capabilities: Capabilities,
    /// Addresses with prefix lengths. A device that only forwards for bridges needs none.
    pub addresses: Vec<IpNet>,
    /// Families with a default route through the device.
    pub default_routes: Vec<Family>,
    /// Next hops of these routes, at most one per family. A layer 3 device needs none, but
    /// administrators and programs expect one.
    pub gateways: Vec<IpAddr>,
    /// Routing table of these routes: 254 is `main`; other tables need policy rules.
    pub table: u32,
    /// Replaces a persistent TAP device of this name that no process has open (as created by `ip
    /// tuntap add`). Any other interface of this name is an error.
    pub replace: bool,
    /// Also brings up loopback of the namespace.
    pub loopback: bool,
    /// Creates a TAP instead of a TUN device, with Ethernet emulation. A persistent device of this
    /// name that no process has open is taken over.
    pub layer2: Option<Layer2Options>,
}

impl TunOptions {
    /// Default options for a device `name`.
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
