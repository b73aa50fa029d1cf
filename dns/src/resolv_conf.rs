//! `resolv.conf`(5): parses that of the host and renders those of containers. Pure.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use std::fmt::Write;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV6};

/// Address of the DNS server in every container.
pub const SERVER: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 11);
/// Port of DNS servers.
pub const PORT: u16 = 53;

/// Maximum size of a `resolv.conf` in bytes.
pub(crate) const MAX_FILE_SIZE: u64 = 64 << 10;

/// A parsed `resolv.conf`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ResolvConf {
    /// The servers in order, without duplicates.
    pub servers: Vec<SocketAddr>,
    /// The domains of the last `search` or `domain` line, which overrides previous ones.
    pub search: Vec<String>,
    /// The options. Of options with the same name, the last one applies.
    pub options: Vec<String>,
}

impl ResolvConf {
    /// Parses a file. Lines that glibc ignores are ignored. `scope` returns the index of an
    /// interface, for scoped addresses such as `fe80::1%eth0`.
    #[must_use]
    pub fn parse(text: &str, scope: &dyn Fn(&str) -> Option<u32>) -> Self {
        let mut parsed = Self::default();
        for line in text.lines() {
            // Comments are whole lines.
            if line.starts_with(['#', ';']) {
                continue;
            }
            let mut words = line.split_ascii_whitespace();
            match words.next() {
                Some("nameserver") => {
                    let server = words.next().and_then(|word| server(word, scope));
                    parsed.servers.extend(server.filter(|server| !parsed.servers.contains(server)));
                }
                Some("search" | "domain") => parsed.search = words.map(str::to_owned).collect(),
                Some("options") => words.for_each(|word| parsed.set(word)),
                _ => {}
            }
        }
        // resolv.conf(5): the default is the server on the local machine.
        if parsed.servers.is_empty() {
            parsed.servers.push((Ipv4Addr::LOCALHOST, PORT).into());
        }
        parsed
    }

    fn set(&mut self, option: &str) {
        self.options.retain(|other| name_of(other) != name_of(option));
        self.options.push(option.to_owned());
    }

    /// Renders the file of a container on a host with this file. Non-empty `search` and `options`
    /// override those of the host.
    ///
    /// As with Docker, the search domains are those of the host, and `ndots:0` makes resolvers
    /// query container names as they are before they append search domains. A search domain `.`
    /// means none.
    #[must_use]
    pub fn for_container(&self, server: IpAddr, search: &[String], options: &[String]) -> String {
        let mut own = Self { options: vec!["ndots:0".to_owned()], ..Self::default() };
        own.search = if search.is_empty() { self.search.clone() } else { search.to_vec() };
        own.search.retain(|domain| domain != ".");
        let given = if options.is_empty() { &self.options } else { options };
        for option in
            given.iter().filter(|option| !options.is_empty() || name_of(option) != "ndots")
        {
            own.set(option);
        }
        let mut text = String::from("# written by tidegate\n");
        // Writing to a `String` is infallible.
        let _ = writeln!(text, "nameserver {server}");
        if !own.search.is_empty() {
            let _ = writeln!(text, "search {}", own.search.join(" "));
        }
        let _ = writeln!(text, "options {}", own.options.join(" "));
        text
    }
}

/// The name of an option: `ndots` of `ndots:2`.
fn name_of(option: &str) -> &str {
    option.split(':').next().unwrap_or(option)
}

fn server(word: &str, scope: &dyn Fn(&str) -> Option<u32>) -> Option<SocketAddr> {
    if let Ok(ip) = word.parse::<IpAddr>() {
        return Some((ip, PORT).into());
    }
    let (ip, interface) = word.split_once('%')?;
    let index = interface.parse().ok().or_else(|| scope(interface))?;
    Some(SocketAddrV6::new(ip.parse().ok()?, PORT, 0, index).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> ResolvConf {
        ResolvConf::parse(text, &|name| (name == "eth0").then_some(7))
    }

    fn servers(text: &str) -> Vec<String> {
        parse(text).servers.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn servers_are_parsed_in_order_without_duplicates() {
        let text = "# nameserver 9.9.9.9\nnameserver 127.0.0.53\n nameserver 10.0.0.1 # first\nnameserver\t127.0.0.53\nnameserver nonsense\nnameserver\n";
        assert_eq!(servers(text), ["127.0.0.53:53", "10.0.0.1:53"]);
        assert_eq!(
            servers("nameserver fe80::1%eth0\nnameserver fe80::2%3\nnameserver fe80::3%eth9"),
            ["[fe80::1%7]:53", "[fe80::2%3]:53"]
        );
    }

    /// resolv.conf(5): "If no nameserver entries are present, the default is to use the name server
    /// on the local machine."
    #[test]
    fn the_default_server_is_the_local_machine() {
        assert_eq!(servers("search a\n"), ["127.0.0.1:53"]);
    }

    /// resolv.conf(5): "If multiple search or domain directives are present, the last instance is
    /// used."
    #[test]
    fn the_last_search_line_applies() {
        let parsed = parse("domain a\nsearch b c\noptions ndots:2 edns0\noptions ndots:3");
        assert_eq!(
            (parsed.search, parsed.options),
            (vec!["b".into(), "c".into()], vec!["edns0".into(), "ndots:3".into()])
        );
    }

    #[test]
    fn a_container_inherits_search_domains_and_has_ndots_0() {
        let host = parse("search example.test\nnameserver 10.0.0.1\noptions ndots:2 edns0");
        let text = |search: &[&str], options: &[&str]| {
            let owned = |list: &[&str]| list.iter().map(ToString::to_string).collect::<Vec<_>>();
            let text = host.for_container(SERVER.into(), &owned(search), &owned(options));
            text.lines().skip(1).collect::<Vec<_>>().join("|")
        };
        assert_eq!(
            text(&[], &[]),
            "nameserver 127.0.0.11|search example.test|options ndots:0 edns0"
        );
        assert_eq!(
            text(&["own.test"], &["timeout:1"]),
            "nameserver 127.0.0.11|search own.test|options ndots:0 timeout:1"
        );
        assert_eq!(text(&["."], &["ndots:1"]), "nameserver 127.0.0.11|options ndots:1");
    }
}
