//! Why a port cannot be opened, said so that one knows what to do.

use crate::port_holders;
use rustix::io::Errno;
use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use tidegate_model::Protocol;
use tidegate_proxy::BindError;

/// A server that forks shares its socket with every child; more than so many are counted, not told.
const HOLDERS_TOLD: usize = 3;

/// One line that names the port, the reason, and the remedy where there is one.
pub fn explain(error: &BindError) -> String {
    let address = error.label.address();
    let port = port_at(address, error.label.protocol());
    match Errno::from_io_error(&error.source) {
        Some(Errno::ADDRINUSE) => in_use(address, error.label.protocol()),
        Some(Errno::ACCESS) => format!(
            "{port}: permission denied; set net.ipv4.ip_unprivileged_port_start to {} or lower, \
             or run with CAP_NET_BIND_SERVICE",
            address.port()
        ),
        Some(Errno::ADDRNOTAVAIL) => {
            format!("{port}: this host has no address {}", bracketed(address.ip()))
        }
        Some(Errno::PROTONOSUPPORT) => format!("{port}: protocol not supported"),
        Some(Errno::AFNOSUPPORT) => format!("{port}: this kernel has no IPv6"),
        Some(Errno::MFILE) => format!("{port}: too many open files; raise the limit (ulimit -n)"),
        _ => format!("{port}: {}", without_numbers(&error.source.to_string())),
    }
}

/// That the port of `protocol` at `address` is in use, and by whom, as far as this process may
/// look.
pub fn in_use(address: SocketAddr, protocol: Protocol) -> String {
    let port = port_at(address, protocol);
    match holders(address, protocol).as_slice() {
        [] => format!("{port} is in use"),
        holders if holders.len() <= HOLDERS_TOLD => {
            format!("{port} is in use by {}", holders.join(", "))
        }
        [first, others @ ..] => format!("{port} is in use by {first} and {} more", others.len()),
    }
}

/// The port as errors name it: `port 80/tcp on [::]`.
fn port_at(address: SocketAddr, protocol: Protocol) -> String {
    format!("port {}/{protocol} on {}", address.port(), bracketed(address.ip()))
}

/// `text` without the `(os error N)` that Rust puts behind what the system says.
pub fn without_numbers(text: &str) -> String {
    let mut pieces = text.split(" (os error ");
    let first = pieces.next().unwrap_or_default().to_owned();
    pieces.fold(first, |said, rest| match rest.split_once(')') {
        Some((number, behind)) if number.bytes().all(|byte| byte.is_ascii_digit()) => said + behind,
        _ => said + " (os error " + rest,
    })
}

fn bracketed(ip: IpAddr) -> String {
    match ip {
        IpAddr::V4(v4) => v4.to_string(),
        IpAddr::V6(v6) => format!("[{v6}]"),
    }
}

/// The processes that hold the port, as `nginx (pid 812)`, as far as this one may look.
fn holders(wanted: SocketAddr, protocol: Protocol) -> Vec<String> {
    let clashes = |local: SocketAddr| {
        let overlaps = local.ip() == wanted.ip()
            || local.ip().is_unspecified()
            || wanted.ip().is_unspecified();
        local.port() == wanted.port() && overlaps
    };
    let bound = port_holders::bound(protocol).unwrap_or_default();
    let inodes =
        bound.iter().filter(|socket| clashes(socket.local)).map(|socket| socket.inode).collect();
    let holders: BTreeSet<String> =
        port_holders::holders(&inodes).iter().map(ToString::to_string).collect();
    holders.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{Ipv4Addr, TcpListener, UdpSocket};
    use tidegate_proxy::Listener;

    fn explained(address: SocketAddr, protocol: Protocol) -> String {
        explain(&Listener::bind(address, protocol).unwrap_err())
    }

    #[test]
    fn a_busy_port_is_told_with_its_holder() {
        let me = format!("(pid {})", std::process::id());
        let tcp = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap();
        let holder = TcpListener::bind(tcp).unwrap();
        let text = explained(tcp, Protocol::Tcp);
        assert!(
            text.starts_with(&format!("port {}/tcp on 127.0.0.1 is in use by ", tcp.port())),
            "{text}"
        );
        assert!(text.ends_with(&me), "{text}");
        drop(holder);

        let udp = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, udp.local_addr().unwrap().port()));
        let text = explained(address, Protocol::Udp);
        assert!(text.ends_with(&me), "{text}");
    }

    #[test]
    fn only_the_systems_numbers_are_left_out() {
        let text = "a: Invalid argument (os error 22): b (os error x) c (os error 1)";
        assert_eq!(without_numbers(text), "a: Invalid argument: b (os error x) c");
    }

    #[test]
    fn an_address_that_is_not_here_is_named() {
        let text = explained("192.0.2.77:80".parse().unwrap(), Protocol::Tcp);
        assert_eq!(text, "port 80/tcp on 192.0.2.77: this host has no address 192.0.2.77");
    }
}
