//! Messages for ports that cannot be opened, with the cause and the remedy.

use rustix::io::Errno;
use tidegate_model::{bracketed, without_errno};
use tidegate_netns::port_holders::{in_use, port_at};
use tidegate_proxy::BindError;

/// One line with the port, the cause, and the remedy if there is one.
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
        _ => format!("{port}: {}", without_errno(&error.source.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
    use tidegate_model::Protocol;
    use tidegate_proxy::Listener;

    fn explained(address: SocketAddr, protocol: Protocol) -> String {
        explain(&Listener::bind(address, protocol).unwrap_err())
    }

    #[test]
    fn the_message_of_a_port_in_use_names_its_holder() {
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
    fn an_address_that_the_host_does_not_have_is_named() {
        let text = explained("192.0.2.77:80".parse().unwrap(), Protocol::Tcp);
        assert_eq!(text, "port 80/tcp on 192.0.2.77: this host has no address 192.0.2.77");
    }
}
