//! Requests and responses of the API socket, in the format of slirp4netns. Pure.
//!
//! ```text
//! {"execute":"add_hostfwd","arguments":{"proto":"tcp","host_addr":"127.0.0.1","host_port":8080,"guest_addr":"","guest_port":80}}
//!     {"return":{"id":1}}
//! {"execute":"list_hostfwd"}
//!     {"return":{"entries":[{"id":1,"proto":"tcp","host_addr":"127.0.0.1","host_port":8080,"guest_addr":"10.0.2.100","guest_port":80}]}}
//! {"execute":"remove_hostfwd","arguments":{"id":1}}
//!     {"return":{}}
//! ```
//!
//! Callers compare error texts, so the texts and their order are those of slirp4netns (`api.c`).
//! The log has the reason why a port is not available. Unlike slirp4netns, host addresses may be
//! IPv6.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use tidegate_model::Protocol;

/// The size at which a request is rejected, in bytes.
pub(super) const MAX_REQUEST: usize = 4096;

/// Maximum number of forwarded ports. slirp4netns has no limit; rootless hosts have about 1,000
/// descriptors.
const MAX_FORWARDS: usize = 4096;

/// A port forwarding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PortForward {
    pub(super) protocol: Protocol,
    pub(super) host: SocketAddr,
    pub(super) guest: SocketAddr,
}

/// Forwards ports.
pub(super) trait Forwarder {
    /// Identifies a forwarded port.
    type Id;

    /// Starts forwarding a port. On `None`, the reason is in the log.
    fn add(&mut self, port: PortForward) -> Option<Self::Id>;

    /// Stops forwarding a port. Returns whether it was forwarded.
    fn remove(&mut self, id: Self::Id) -> bool;
}

/// The forwarded ports, by the id of the API.
#[derive(Debug)]
pub(super) struct Forwards<F: Forwarder> {
    forwarder: F,
    entries: BTreeMap<u64, (PortForward, F::Id)>,
    next: u64,
    guest: Ipv4Addr,
}

impl<F: Forwarder> Forwards<F> {
    /// Creates an empty list. `guest` is the default guest address.
    pub(super) fn new(forwarder: F, guest: Ipv4Addr) -> Self {
        Self { forwarder, entries: BTreeMap::new(), next: 1, guest }
    }

    /// Executes `request` and returns the response.
    pub(super) fn answer(&mut self, request: &[u8]) -> String {
        let answered = self.execute(request);
        answered
            .unwrap_or_else(|problem| json!({"error": {"desc": format!("bad request: {problem}")}}))
            .to_string()
    }

    fn execute(&mut self, request: &[u8]) -> Result<Value, &'static str> {
        let request: Value = serde_json::from_slice(request).map_err(|_| "cannot parse JSON")?;
        if !request.is_object() {
            return Err("json_object() failed");
        }
        let arguments = &request["arguments"];
        match request["execute"].as_str() {
            None => Err("no execute found"),
            Some("add_hostfwd") => self.add(arguments),
            Some("list_hostfwd") => Ok(self.list()),
            Some("remove_hostfwd") => self.remove(arguments),
            Some(_) => Err("unknown execute"),
        }
    }

    fn add(&mut self, arguments: &Value) -> Result<Value, &'static str> {
        let protocol = match arguments["proto"].as_str() {
            Some("tcp") => Protocol::Tcp,
            Some("udp") => Protocol::Udp,
            _ => return Err("add_hostfwd: bad arguments.proto"),
        };
        let address = |name: &str, instead: Ipv4Addr| match arguments[name].as_str() {
            None | Some("") => Some(IpAddr::V4(instead)),
            Some(text) => text.parse().ok(),
        };
        let port = |name: &str| {
            arguments[name]
                .as_u64()
                .and_then(|port| u16::try_from(port).ok())
                .filter(|port| *port != 0)
        };
        let host = address("host_addr", Ipv4Addr::UNSPECIFIED)
            .ok_or("add_hostfwd: bad arguments.host_addr")?;
        let host_port = port("host_port").ok_or("add_hostfwd: bad arguments.host_port")?;
        let guest =
            address("guest_addr", self.guest).ok_or("add_hostfwd: bad arguments.guest_addr")?;
        let guest = if guest.is_unspecified() { self.guest.into() } else { guest };
        let guest_port = port("guest_port").ok_or("add_hostfwd: bad arguments.guest_port")?;
        let port = PortForward {
            protocol,
            host: (host, host_port).into(),
            guest: (guest, guest_port).into(),
        };
        if self.entries.len() >= MAX_FORWARDS {
            tracing::warn!(limit = MAX_FORWARDS, "limit of forwarded ports reached");
            return Err("add_hostfwd: slirp_add_hostfwd failed");
        }
        let forward = self.forwarder.add(port).ok_or("add_hostfwd: slirp_add_hostfwd failed")?;
        let id = self.next;
        self.next += 1;
        self.entries.insert(id, (port, forward));
        Ok(json!({"return": {"id": id}}))
    }

    fn list(&self) -> Value {
        let entry = |(id, (port, _)): (&u64, &(PortForward, F::Id))| {
            json!({
                "id": id,
                "proto": port.protocol.as_str(),
                "host_addr": port.host.ip().to_string(),
                "host_port": port.host.port(),
                "guest_addr": port.guest.ip().to_string(),
                "guest_port": port.guest.port(),
            })
        };
        let entries: Vec<Value> = self.entries.iter().map(entry).collect();
        // slirp4netns 1.2 documents the first form and sends the second.
        json!({"return": {"entries": entries.clone()}, "entries": entries})
    }

    fn remove(&mut self, arguments: &Value) -> Result<Value, &'static str> {
        let entry = arguments["id"].as_u64().and_then(|id| self.entries.remove(&id));
        let (_, forward) = entry.ok_or("remove_hostfwd: bad arguments.id")?;
        if self.forwarder.remove(forward) {
            Ok(json!({"return": {}}))
        } else {
            Err("remove_hostfwd: slirp_remove_hostfwd failed")
        }
    }
}

/// Returns the response to a request of [`MAX_REQUEST`] bytes or more.
pub(super) fn too_large() -> String {
    json!({"error": {"desc": "bad request: too large message"}}).to_string()
}

/// Returns whether `bytes` is a complete request, even if its sender has not shut down its side.
pub(super) fn is_complete(bytes: &[u8]) -> bool {
    bytes.trim_ascii_end().ends_with(b"}")
        && serde_json::from_slice::<serde::de::IgnoredAny>(bytes).is_ok()
}

#[cfg(test)]
mod tests;
