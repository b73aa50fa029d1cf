//! Simple DNS clients.

use super::Container;
use hickory_server::proto::op::{Edns, Message, MessageType, OpCode, Query, ResponseCode};
use hickory_server::proto::rr::{Name, RData, RecordType};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::time::Duration;
use tidegate_testbed::Namespace;

pub(crate) const SERVER: &str = "127.0.0.11:53";

/// A query as sent by stub resolvers.
pub(crate) fn query(id: u16, name: &str, kind: RecordType) -> Message {
    let mut message = Message::new(id, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    let mut name = Name::from_ascii(name).unwrap();
    name.set_fqdn(true);
    message.add_query(Query::query(name, kind));
    message
}

pub(crate) fn with_edns(mut message: Message, payload: u16) -> Message {
    let mut edns = Edns::new();
    edns.set_max_payload(payload);
    message.set_edns(edns);
    message
}

impl Container {
    /// Sends a message over UDP and waits for the response.
    pub(crate) fn send(&self, message: &[u8]) -> Option<Vec<u8>> {
        send(&self.namespace, SERVER.parse().unwrap(), message, Duration::from_secs(7))
    }

    pub(crate) fn ask(&self, name: &str, kind: RecordType) -> Message {
        self.ask_message(&query(4321, name, kind))
    }

    pub(crate) fn ask_message(&self, message: &Message) -> Message {
        let answer = self.send(&message.to_vec().unwrap());
        let answer = answer.unwrap_or_else(|| panic!("no answer to {:?}", message.queries));
        let answer = Message::from_vec(&answer).unwrap();
        assert_eq!(
            (answer.metadata.id, answer.metadata.message_type),
            (message.metadata.id, MessageType::Response)
        );
        answer
    }

    /// The records of the response as text, or its response code.
    pub(crate) fn resolve(&self, name: &str, kind: RecordType) -> String {
        summary(&self.ask(name, kind))
    }

    /// Opens a TCP connection to the server.
    pub(crate) fn connect(&self) -> TcpStream {
        let stream = self.namespace.run(|| TcpStream::connect(SERVER)).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(7))).unwrap();
        stream.set_nodelay(true).unwrap();
        stream
    }
}

/// Sends a datagram to `server` from a new port, and waits for the response.
pub(crate) fn send(
    from: &Namespace,
    server: SocketAddr,
    message: &[u8],
    timeout: Duration,
) -> Option<Vec<u8>> {
    let any: SocketAddr =
        if server.is_ipv4() { ([0; 4], 0).into() } else { ([0_u16; 8], 0).into() };
    let socket = from.run(|| UdpSocket::bind(any)).unwrap();
    socket.connect(server).unwrap();
    socket.set_read_timeout(Some(timeout)).unwrap();
    socket.send(message).unwrap();
    let mut buffer = [0; 65_535];
    socket.recv(&mut buffer).ok().map(|length| buffer[..length].to_vec())
}

pub(crate) fn summary(message: &Message) -> String {
    let data = |data: &RData| match data {
        RData::A(ip) => ip.to_string(),
        RData::AAAA(ip) => ip.to_string(),
        other => other.to_string(),
    };
    let records: Vec<_> = message.answers.iter().map(|record| data(&record.data)).collect();
    match (message.metadata.response_code, records.is_empty()) {
        (ResponseCode::NoError, false) => records.join(" "),
        (ResponseCode::NoError, true) => "nothing".to_owned(),
        (code, _) => format!("{code:?}"),
    }
}

/// Writes a message to a connection.
pub(crate) fn write(stream: &mut TcpStream, message: &Message) {
    let bytes = message.to_vec().unwrap();
    stream.write_all(&[&(bytes.len() as u16).to_be_bytes()[..], &bytes].concat()).unwrap();
}

/// Reads a message from a connection.
pub(crate) fn read(stream: &mut TcpStream) -> std::io::Result<Message> {
    let mut length = [0; 2];
    stream.read_exact(&mut length)?;
    let mut bytes = vec![0; usize::from(u16::from_be_bytes(length))];
    stream.read_exact(&mut bytes)?;
    Ok(Message::from_vec(&bytes).unwrap())
}
