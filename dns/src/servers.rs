//! Lists of servers, each with a number by which answers of theirs are told apart. Pure.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use std::net::SocketAddr;
use std::sync::Arc;

/// Servers that are asked in place of the host's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ServerList {
    /// Equal lists have equal numbers; 0 is the host's.
    pub(crate) number: u32,
    pub(crate) servers: Arc<[SocketAddr]>,
}

/// The number of the host's servers.
pub(crate) const HOST: u32 = 0;

/// The most servers of a list that are asked. Docker takes 3, as glibc does (`MAXNS`).
pub(crate) const MOST_SERVERS: usize = 8;

/// All lists that are in use.
#[derive(Debug)]
pub(crate) struct ServerLists {
    lists: Vec<ServerList>,
    last: u32,
    limit: usize,
}

/// There are as many different lists as there may be.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct TooManyLists;

impl ServerLists {
    pub(crate) fn new(limit: usize) -> Self {
        Self { lists: Vec::new(), last: HOST, limit }
    }

    /// The list of `servers`; `None` if there are none.
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
        // Those that nobody but this table holds.
        self.lists.retain(|list| Arc::strong_count(&list.servers) > 1);
        if self.lists.len() >= self.limit {
            return Err(TooManyLists);
        }
        // Never one that another list has had: its answers may still be remembered.
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
    fn equal_lists_are_one_and_those_out_of_use_make_room() {
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
