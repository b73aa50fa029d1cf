//! Messages between a daemon and a supervisor process, over the Unix socket `supervisor.sock`.
//!
//! A message is JSON, preceded by its length in bytes (u32, little-endian), as between the
//! supervisor and an init ([`protocol`](super::protocol)). Each message is an object with the
//! protocol `version` and the `message`. A connection carries one request.
//!
//! | request | replies |
//! |---|---|
//! | `Describe` | `Description` |
//! | `Start` | `Done` once all services run |
//! | `IsStarted` | `Started`, after a start in progress has ended |
//! | `Statuses` | `Done`, `Statuses` now and after each change, `End` |
//! | `Logs` | `Done`, `Line` for each line, then `End`, or `Dropped` if the reader is too slow |
//! | `Stop` | `Done` immediately; the services end, and then the process |
//!
//! Each request can be answered by `Failed` instead. A [`Launch`] request is sent over the socket
//! that is the standard input of the process. It is answered by `Done` and acknowledged by the
//! client with [`ACKNOWLEDGED`].

use super::log::LogLine;
use super::protocol::{Inbox, encode};
use super::{RemoteSpec, Status};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io;
use std::os::fd::RawFd;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};

/// Version of the protocol.
pub(super) const VERSION: u32 = 1;

/// Name of the socket in the directory of the process.
pub(super) const SOCKET: &str = "supervisor.sock";

/// Name of the lock file in the directory of the process. It contains the process ID.
pub(super) const LOCK: &str = "supervisor.lock";

/// Maximum length of a message in bytes, as for [`encode`].
const MAX_MESSAGE: usize = super::protocol::MAX_MESSAGE;

/// Sent by the client of a [`Launch`] request after it has connected to the process. Without it,
/// the process ends: nobody would know of it.
pub(super) const ACKNOWLEDGED: u8 = 1;

/// Request for the creation of network namespaces and the socket.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Launch {
    /// Names of the services, each of which gets a network namespace.
    pub(super) services: Vec<String>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Request {
    Describe,
    Start { specs: Vec<RemoteSpec>, grace_ms: u64 },
    IsStarted,
    Statuses,
    Logs { service: Option<String>, tail: usize, follow: bool },
    Stop,
}

/// `L` is [`LogLine`], or a reference to it for the sender.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Reply<L = LogLine> {
    Done,
    Failed(Failure),
    /// Descriptor of the network namespace of each service.
    Description(BTreeMap<String, RawFd>),
    Started(bool),
    Statuses(Vec<Status>),
    Line(L),
    End,
    Dropped,
}

/// Why a request failed. The client adds the directory and the remedy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Failure {
    /// The version of the request is unknown.
    Version,
    /// The maximum number of connections is reached.
    TooManyConnections,
    /// The maximum number or size of logs in transfer is reached.
    TooManyLogReaders,
    /// A supervisor process holds the lock. Its ID is that in the lock file, if any.
    Running(Option<u32>),
    /// Another client is starting the services.
    Starting,
    AlreadyStarted,
    Stopping,
    /// No network namespace was created for this service.
    UnknownService(String),
    /// A complete message.
    Other(String),
}

#[derive(Serialize)]
struct Sent<'a, T> {
    version: u32,
    message: &'a T,
}

#[derive(Deserialize)]
struct Received<T> {
    message: T,
}

/// The part of a message that is the same in all versions.
#[derive(Deserialize)]
struct AnyVersion {
    version: u32,
}

/// A message was not received.
#[derive(Debug)]
pub(super) enum ReceiveError {
    /// End of file before a complete message, or an error of the socket.
    Closed,
    /// The version of the peer is not [`VERSION`].
    Version,
    /// Not a message of this protocol.
    Invalid(String),
}

impl ReceiveError {
    /// What to answer to an invalid request. `None` if the peer has closed the socket.
    pub(super) fn into_failure(self) -> Option<Failure> {
        match self {
            Self::Closed => None,
            Self::Version => Some(Failure::Version),
            Self::Invalid(reason) => Some(Failure::Other(format!("invalid request: {reason}"))),
        }
    }
}

/// Returns `message` with its version and length.
///
/// # Errors
/// It is longer than 8 MiB.
pub(super) fn encode_message(message: &impl Serialize) -> io::Result<Vec<u8>> {
    encode(&Sent { version: VERSION, message })
}

/// Sends a message.
///
/// # Errors
/// It is longer than 8 MiB, or the peer has closed the socket.
pub(super) async fn send_message(
    socket: &mut (impl AsyncWrite + Unpin),
    message: &impl Serialize,
) -> io::Result<()> {
    socket.write_all(&encode_message(message)?).await
}

/// Receives the next message. Cancel safe.
pub(super) async fn receive_message<T: DeserializeOwned>(
    inbox: &mut Inbox,
    socket: &mut (impl AsyncRead + Unpin),
) -> Result<T, ReceiveError> {
    let invalid = |error: &dyn std::error::Error| ReceiveError::Invalid(error.to_string());
    let message = match inbox.next_message(socket, MAX_MESSAGE).await {
        Ok(Some(message)) => message,
        Err(error) if error.kind() == io::ErrorKind::InvalidData => return Err(invalid(&error)),
        Ok(None) | Err(_) => return Err(ReceiveError::Closed),
    };
    let AnyVersion { version } = serde_json::from_slice(&message).map_err(|e| invalid(&e))?;
    if version != VERSION {
        return Err(ReceiveError::Version);
    }
    let received: Received<T> = serde_json::from_slice(&message).map_err(|e| invalid(&e))?;
    Ok(received.message)
}

/// [`Restart`](tidegate_model::Restart) of the crate `model`, which does not serialize.
#[derive(Serialize, Deserialize)]
#[serde(remote = "tidegate_model::Restart")]
pub(super) enum Restart {
    No,
    OnFailure { max: Option<u32> },
    Always,
    UnlessStopped,
}
