//! Lists of upstream servers. Each list has a number, which is part of the cache key. Pure.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use std::net::SocketAddr;
use std::sync::Arc;

/// Upstream servers that replace those of the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ServerList {
    /// Equal lists have equal numbers. 0 is the list of the host.
    pub(crate) number: u32,
    pub(crate) servers: Arc<[SocketAddr]>,
}

/// The number of the list of the host.
pub(crate) const HOST: u32 = 0;

/// Maximum number of servers of a list that are queried. Docker uses 3, as does glibc (`MAXNS`).
pub(crate) const MOST_SERVERS: usize = 8;

/// All lists in use.
#[derive(Debug)]
pub(crate) struct ServerLists {
    lists: Vec<ServerList>,
    last: u32,
    limit: usize,
}

/// The limit of different lists is reached.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct TooManyLists;

impl ServerLists {
    pub(crate) fn new(limit: usize) -> Self {
        Self { lists: Vec::new(), last: HOST, limit }
    }

    /// Returns the list of `servers`; `None` if it is empty.
    pub(crate) fn get(
        &mut self,
        servers: &[SocketAddr],
    ) -> Result<Option<ServerList>, TooManyLists> {
        let servers = &servers[..servers.len().min(MOST_SERVERS)];
        if servers.is_empty() {
            return Ok(None);
        }
        if let Some(known) = self.lists.iter().find(|list| *list.servers == *servers) {
            return Ok(Some(known.clone()));
        }
        // Removes lists that only this table references.
        self.lists.retain(|list| Arc::strong_count(&list.servers) > 1);
        if self.lists.len() >= self.limit {
            return Err(TooManyLists);
        }
        // Numbers are not reused, because responses of a removed list may still be cached.
        self.last += 1;
        let list = ServerList { number: self.last, servers: servers.into() };
        self.lists.push(list.clone());
        Ok(Some(list))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_lists_are_shared_and_unused_ones_are_removed() {
        let mut lists = ServerLists::new(1);
        let one: [SocketAddr; 1] = ["10.0.0.1:53".parse().unwrap()];
        let two: [SocketAddr; 1] = ["10.0.0.2:53".parse().unwrap()];
        assert_eq!(lists.get(&[]), Ok(None));
        let held = lists.get(&one).unwrap().unwrap();
        assert_eq!(lists.get(&one).unwrap().unwrap().number, held.number);
        assert_eq!(lists.get(&two), Err(TooManyLists));
        let number = held.number;
        drop(held);
        assert_ne!(lists.get(&two).unwrap().unwrap().number, number);
    }
}
