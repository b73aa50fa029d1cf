//! The pairs of client address and container port that have a socket.
//!
//! Two UDP sockets bound to the same client address and connected to the same container port would
//! receive each other's replies. With `SO_REUSEADDR`, the kernel permits both sockets, because one
//! client port may talk to two container ports. For TCP, connect(2) detects the conflict.

use std::collections::BTreeSet;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The address of a client and the container port that it talks to.
type Pair = (SocketAddr, SocketAddr);

/// The pairs with a socket.
#[derive(Debug, Default)]
pub(super) struct Claims(Mutex<BTreeSet<Pair>>);

/// A claimed pair, released on drop.
#[derive(Debug)]
pub(super) struct Claim {
    claims: Arc<Claims>,
    pair: Pair,
}

impl Claims {
    /// Claims the pair of `client` and `to`.
    ///
    /// # Errors
    /// `AddrInUse` if the pair is already claimed.
    pub(super) fn claim(self: &Arc<Self>, client: SocketAddr, to: SocketAddr) -> io::Result<Claim> {
        let pair = (client, to);
        if self.pairs().insert(pair) {
            Ok(Claim { claims: Arc::clone(self), pair })
        } else {
            Err(io::ErrorKind::AddrInUse.into())
        }
    }

    fn pairs(&self) -> MutexGuard<'_, BTreeSet<Pair>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.claims.pairs().remove(&self.pair);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pair_is_claimed_once_until_it_is_released() {
        let claims = Arc::new(Claims::default());
        let client = SocketAddr::from(([203, 0, 113, 9], 4000));
        let [web, dns] = [80, 53].map(|port| SocketAddr::from(([172, 30, 0, 2], port)));
        let held = claims.claim(client, web).unwrap();
        assert_eq!(claims.claim(client, web).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        assert!(claims.claim(client, dns).is_ok());
        drop(held);
        assert!(claims.claim(client, web).is_ok());
    }
}
