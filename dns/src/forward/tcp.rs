//! Answers that are too long for a datagram (RFC 7766 section 5).

use crate::answer::{Asked, Reading};
use crate::cache::Key;
use crate::message::{Bits, question};
use std::io;
use std::net::SocketAddr;
use tidegate_netns::Namespace;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpSocket;

/// Asks over a connection of its own.
pub(super) async fn fetch(way: &Namespace, server: SocketAddr, key: &Key, bits: Bits) -> io::Result<Reading> {
    let socket = way.with(|| match server {
        SocketAddr::V4(_) => TcpSocket::new_v4(),
        SocketAddr::V6(_) => TcpSocket::new_v6(),
    })??;
    let mut random = [0; 2];
    rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())?;
    let id = u16::from_ne_bytes(random);
    let mut stream = socket.connect(server).await?;
    let mut message = vec![0; 2];
    question(id, &key.name, key.kind, bits, &mut message);
    let length = (message.len() - 2) as u16;
    message[..2].copy_from_slice(&length.to_be_bytes());
    stream.write_all(&message).await?;
    let mut answer = vec![0; usize::from(stream.read_u16().await?)];
    stream.read_exact(&mut answer).await?;
    Ok(Asked { id, name: key.name.clone(), kind: key.kind }.read(&answer))
}
