//! Conversion of socket addresses and control messages to and from the kernel layout (ip(7),
//! ipv6(7), udp(7)).

use std::mem::MaybeUninit;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};

/// Buffer for all control messages of one message: packet info and segment size. Aligned as
/// `cmsghdr` requires.
#[derive(Clone, Copy)]
#[repr(C, align(8))]
pub(super) struct Control(pub(super) [u8; 128]);

impl Control {
    pub(super) const EMPTY: Self = Self([0; 128]);
}

/// Parsed control messages of one received message.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Ancillary {
    /// The local address for replies.
    pub(super) destination: Option<IpAddr>,
    /// The destination address of the datagram; it may be a broadcast or multicast address.
    pub(super) sent_to: Option<IpAddr>,
    /// Index of the ingress interface; 0 if not reported.
    pub(super) interface: u32,
    /// Segment size of a GSO batch, in bytes.
    pub(super) segment: Option<usize>,
}

/// Parses the control messages of `header`.
///
/// # Safety
/// `msg_control` and `msg_controllen` must be as set by recvmmsg(2).
pub(super) unsafe fn decode(header: &libc::msghdr) -> Ancillary {
    let mut ancillary = Ancillary::default();
    // SAFETY: the CMSG macros stay within the buffer, by the contract of this function. Each
    // payload is read unaligned, with the type that its level and type imply.
    unsafe {
        let mut cursor = libc::CMSG_FIRSTHDR(header);
        while let Some(message) = cursor.as_ref() {
            let data = libc::CMSG_DATA(message);
            match (message.cmsg_level, message.cmsg_type) {
                (libc::IPPROTO_IP, libc::IP_PKTINFO) => {
                    let info = data.cast::<libc::in_pktinfo>().read_unaligned();
                    // `ipi_spec_dst` instead of `ipi_addr`: for a broadcast it is the local address
                    // for replies.
                    ancillary.destination =
                        Some(Ipv4Addr::from(info.ipi_spec_dst.s_addr.to_ne_bytes()).into());
                    ancillary.sent_to =
                        Some(Ipv4Addr::from(info.ipi_addr.s_addr.to_ne_bytes()).into());
                    ancillary.interface = info.ipi_ifindex as u32;
                }
                (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO) => {
                    let info = data.cast::<libc::in6_pktinfo>().read_unaligned();
                    ancillary.destination = Some(Ipv6Addr::from(info.ipi6_addr.s6_addr).into());
                    ancillary.sent_to = ancillary.destination;
                    ancillary.interface = info.ipi6_ifindex;
                }
                (libc::SOL_UDP, libc::UDP_GRO) => {
                    let segment = data.cast::<libc::c_int>().read_unaligned();
                    ancillary.segment =
                        usize::try_from(segment).ok().filter(|segment| *segment > 0);
                }
                _ => {}
            }
            cursor = libc::CMSG_NXTHDR(header, message);
        }
    }
    ancillary
}

/// Writes the control messages for the source address and the segment size to `control`. Returns
/// the value for `msg_controllen`.
pub(super) fn encode(
    control: &mut Control,
    from: Option<(IpAddr, u32)>,
    segment: Option<u16>,
) -> usize {
    let mut used = 0;
    match from {
        Some((IpAddr::V4(address), interface)) => {
            let info = libc::in_pktinfo {
                ipi_ifindex: interface as i32,
                ipi_spec_dst: libc::in_addr { s_addr: u32::from_ne_bytes(address.octets()) },
                ipi_addr: libc::in_addr { s_addr: 0 },
            };
            used = push(control, used, libc::IPPROTO_IP, libc::IP_PKTINFO, info);
        }
        Some((IpAddr::V6(address), interface)) => {
            let info = libc::in6_pktinfo {
                ipi6_addr: libc::in6_addr { s6_addr: address.octets() },
                ipi6_ifindex: interface,
            };
            used = push(control, used, libc::IPPROTO_IPV6, libc::IPV6_PKTINFO, info);
        }
        None => {}
    }
    if let Some(segment) = segment {
        used = push(control, used, libc::SOL_UDP, libc::UDP_SEGMENT, segment);
    }
    used
}

fn push<T: Copy>(
    control: &mut Control,
    at: usize,
    level: libc::c_int,
    kind: libc::c_int,
    value: T,
) -> usize {
    // SAFETY: CMSG_SPACE and CMSG_LEN are pure arithmetic.
    let (space, length) =
        unsafe { (libc::CMSG_SPACE(size_of::<T>() as u32), libc::CMSG_LEN(size_of::<T>() as u32)) };
    let end = at + space as usize;
    assert!(end <= control.0.len(), "the control buffer fits all messages");
    // SAFETY: `at` is aligned because CMSG_SPACE rounds up, `end` is within the buffer, and the
    // payload is written unaligned.
    unsafe {
        let header = control.0.as_mut_ptr().add(at).cast::<libc::cmsghdr>();
        let mut filled: libc::cmsghdr = MaybeUninit::zeroed().assume_init();
        filled.cmsg_len = length as _;
        filled.cmsg_level = level;
        filled.cmsg_type = kind;
        header.write(filled);
        libc::CMSG_DATA(header).cast::<T>().write_unaligned(value);
    }
    end
}

/// The address in `storage`, if its family is IPv4 or IPv6.
pub(super) fn address(storage: &libc::sockaddr_storage) -> Option<SocketAddr> {
    let storage = &raw const *storage;
    // SAFETY: sockaddr_storage has sufficient size and alignment for each family, and the family
    // selects the type of the address.
    unsafe {
        match i32::from((*storage).ss_family) {
            libc::AF_INET => {
                let v4 = &*storage.cast::<libc::sockaddr_in>();
                let ip = Ipv4Addr::from(v4.sin_addr.s_addr.to_ne_bytes());
                Some(SocketAddrV4::new(ip, u16::from_be(v4.sin_port)).into())
            }
            libc::AF_INET6 => {
                let v6 = &*storage.cast::<libc::sockaddr_in6>();
                let ip = Ipv6Addr::from(v6.sin6_addr.s6_addr);
                // The flow label is not part of the address.
                Some(SocketAddrV6::new(ip, u16::from_be(v6.sin6_port), 0, v6.sin6_scope_id).into())
            }
            _ => None,
        }
    }
}

/// Writes `address` to `storage` and returns its length.
pub(super) fn store(address: &SocketAddr, storage: &mut libc::sockaddr_storage) -> libc::socklen_t {
    let storage = &raw mut *storage;
    // SAFETY: sockaddr_storage has sufficient size and alignment for each family, and all-zero is a
    // valid value for each.
    unsafe {
        storage.write(MaybeUninit::zeroed().assume_init());
        match address {
            SocketAddr::V4(v4) => {
                let to = &mut *storage.cast::<libc::sockaddr_in>();
                to.sin_family = libc::AF_INET as libc::sa_family_t;
                to.sin_port = v4.port().to_be();
                to.sin_addr.s_addr = u32::from_ne_bytes(v4.ip().octets());
                size_of::<libc::sockaddr_in>() as libc::socklen_t
            }
            SocketAddr::V6(v6) => {
                let to = &mut *storage.cast::<libc::sockaddr_in6>();
                to.sin6_family = libc::AF_INET6 as libc::sa_family_t;
                to.sin6_port = v6.port().to_be();
                to.sin6_addr.s6_addr = v6.ip().octets();
                to.sin6_scope_id = v6.scope_id();
                size_of::<libc::sockaddr_in6>() as libc::socklen_t
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn an_address_survives_conversion(ip: IpAddr, port: u16, scope in 0u32..9) {
            let mut before = SocketAddr::new(ip, port);
            if let SocketAddr::V6(v6) = &mut before {
                v6.set_scope_id(scope);
            }
            // SAFETY: all-zero is a valid sockaddr_storage.
            let mut storage = unsafe { MaybeUninit::zeroed().assume_init() };
            store(&before, &mut storage);
            prop_assert_eq!(address(&storage), Some(before));
        }
    }
}
