//! What is asked over the API socket, and what is answered: the words of slirp4netns. Pure.
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
//! Callers compare error texts, so they are those of slirp4netns (`api.c`), and come in its order.
//! Why a port cannot be had is said in the log. Beyond slirp4netns, addresses of the host may be of
//! IPv6.

use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use tidegate_model::Protocol;

/// The most bytes that a request may have; at this many it is refused.
pub(super) const LONGEST_REQUEST: usize = 4096;

/// How many ports may be forwarded. slirp4netns has no bound, and rootless hosts have some 1,000
/// descriptors.
const MOST_FORWARDS: usize = 4096;

/// A port to be forwarded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Wanted {
    pub(super) protocol: Protocol,
    pub(super) host: SocketAddr,
    pub(super) guest: SocketAddr,
}

/// Who forwards.
pub(super) trait Forwarder {
    /// What is to be remembered of a port.
    type Id;

    /// Begins to forward. Why it fails was logged.
    fn add(&mut self, wanted: Wanted) -> Option<Self::Id>;

    /// Ends it. Whether it was there.
    fn remove(&mut self, id: Self::Id) -> bool;
}

/// The forwarded ports, under the numbers that callers know them by.
#[derive(Debug)]
pub(super) struct Forwards<F: Forwarder> {
    forwarder: F,
    entries: BTreeMap<u64, (Wanted, F::Id)>,
    next: u64,
    guest: Ipv4Addr,
}

impl<F: Forwarder> Forwards<F> {
    /// None yet. Where no guest is named, it is `guest`.
    pub(super) fn new(forwarder: F, guest: Ipv4Addr) -> Self {
        Self { forwarder, entries: BTreeMap::new(), next: 1, guest }
    }

    /// Does what `request` asks for, and returns the answer.
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
        let wanted =
            Wanted { protocol, host: (host, host_port).into(), guest: (guest, guest_port).into() };
        if self.entries.len() >= MOST_FORWARDS {
            tracing::warn!(most = MOST_FORWARDS, "no more ports are forwarded");
            return Err("add_hostfwd: slirp_add_hostfwd failed");
        }
        let forward = self.forwarder.add(wanted).ok_or("add_hostfwd: slirp_add_hostfwd failed")?;
        let id = self.next;
        self.next += 1;
        self.entries.insert(id, (wanted, forward));
        Ok(json!({"return": {"id": id}}))
    }

    fn list(&self) -> Value {
        let entry = |(id, (wanted, _)): (&u64, &(Wanted, F::Id))| {
            json!({
                "id": id,
                "proto": wanted.protocol.as_str(),
                "host_addr": wanted.host.ip().to_string(),
                "host_port": wanted.host.port(),
                "guest_addr": wanted.guest.ip().to_string(),
                "guest_port": wanted.guest.port(),
            })
        };
        let entries: Vec<Value> = self.entries.iter().map(entry).collect();
        // slirp4netns documents the one and sends the other (1.2).
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

/// The answer to what is longer than [`LONGEST_REQUEST`].
pub(super) fn too_large() -> String {
    json!({"error": {"desc": "bad request: too large message"}}).to_string()
}

/// Whether a request is there as a whole, although its sender has not ended its half.
pub(super) fn is_whole(bytes: &[u8]) -> bool {
    bytes.trim_ascii_end().ends_with(b"}")
        && serde_json::from_slice::<serde::de::IgnoredAny>(bytes).is_ok()
}

#[cfg(test)]
mod tests;
