//! Upstream queries over TCP: for truncated responses (RFC 7766 section 5), and when responses over
//! UDP may be forged. A blind attacker cannot forge a response over TCP.

use crate::answer::{Response, SentQuery};
use crate::cache::Key;
use crate::message::{Bits, encode_query, mix_case};
use crate::upstream::Form;
use rustix::net::sockopt;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;
use tidegate_netns::Namespace;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpSocket;

/// Queries `server` over a new connection. Returns the response, and whether it repeats the case of
/// the name.
pub(super) async fn fetch(
    namespace: &Namespace,
    server: SocketAddr,
    key: &Key,
    form: Form,
) -> io::Result<(Response, bool)> {
    let socket = namespace.with(|| match server {
        SocketAddr::V4(_) => TcpSocket::new_v4(),
        SocketAddr::V6(_) => TcpSocket::new_v6(),
    })??;
    // The connection is reset when it is dropped, because it would otherwise occupy its source port
    // in TIME_WAIT for a minute. With thousands of such ports to one server, connect(2) searches
    // for a free one for milliseconds, on the thread that answers all queries.
    sockopt::set_socket_linger(&socket, Some(Duration::ZERO))?;
    let mut random = [0; 34];
    rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())?;
    let [first, second, case @ ..] = random;
    let id = u16::from_ne_bytes([first, second]);
    let mut name = key.name.clone();
    mix_case(&mut name, &case);
    let mut stream = socket.connect(server).await?;
    let mut message = vec![0; 2];
    encode_query(id, &name, key.kind, Bits { edns: form.edns, ..key.bits }, &mut message);
    let length = (message.len() - 2) as u16;
    message[..2].copy_from_slice(&length.to_be_bytes());
    stream.write_all(&message).await?;
    let mut answer = vec![0; usize::from(stream.read_u16().await?)];
    stream.read_exact(&mut answer).await?;
    let query = SentQuery { id, name, kind: key.kind, exact: false };
    Ok((query.read(&answer), query.has_same_case(&answer)))
}
