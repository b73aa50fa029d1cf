//! Messages between the supervisor and a service's init, over a Unix socket that is the init's
//! standard input.
//!
//! The supervisor sends one [`StartRequest`], and the init sends [`Report`]s. A message is JSON,
//! preceded by its length in bytes (u32, little-endian). The socket stays open while the service
//! exists. End of file on it tells the init that the supervisor has exited.

use super::Exit;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::os::fd::RawFd;
use std::path::PathBuf;
use tokio::io::{AsyncRead, AsyncReadExt};

/// Maximum length of a message in bytes. Linux passes at most 6 MiB of arguments and environment to
/// a program (`bprm_stack_limits`, fs/exec.c).
pub(super) const MAX_MESSAGE: usize = 8 * 1024 * 1024;

/// Maximum length of a report in bytes. Bounded, because a service of the same user can send
/// reports through the init with ptrace(2).
const MAX_REPORT: usize = 64 * 1024;

/// The command for the init to run, and its environment.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct StartRequest {
    /// Inherited file descriptor of the network namespace.
    pub(super) namespace: RawFd,
    pub(super) hostname: String,
    /// Directory of the service's `hosts`, `resolv.conf`, `hostname` and `nsswitch.conf`.
    pub(super) files: PathBuf,
    pub(super) command: Vec<String>,
    pub(super) environment: BTreeMap<String, String>,
    pub(super) working_dir: PathBuf,
}

/// An event of the init.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Report {
    /// A setup step failed. The command was not started.
    SetUpFailed(String),
    /// The command cannot be executed.
    CannotRun(String),
    /// A problem that does not prevent the command from running.
    Note(String),
    /// The command runs.
    Running,
    /// The command has ended. The init ends too.
    Ended(Exit),
}

/// Encodes a message.
///
/// # Errors
/// It is longer than [`MAX_MESSAGE`].
pub(super) fn encode(message: &impl Serialize) -> io::Result<Vec<u8>> {
    let json = serde_json::to_vec(message)?;
    if json.len() > MAX_MESSAGE {
        return Err(io::Error::new(
            io::ErrorKind::ArgumentListTooLong,
            "command and environment are too long",
        ));
    }
    // `MAX_MESSAGE` fits.
    let length = json.len() as u32;
    Ok([&length.to_le_bytes()[..], &json].concat())
}

/// Sends a message. Blocks until the socket has accepted it.
pub(super) fn send(mut socket: impl Write, message: &impl Serialize) -> io::Result<()> {
    socket.write_all(&encode(message)?)
}

/// Waits for a message.
///
/// # Errors
/// The socket is closed, or the message is invalid or longer than [`MAX_MESSAGE`].
pub(super) fn receive<T: DeserializeOwned>(mut socket: impl Read) -> io::Result<T> {
    let mut length = [0; 4];
    socket.read_exact(&mut length)?;
    let length = u32::from_le_bytes(length) as usize;
    if length > MAX_MESSAGE {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut json = vec![0; length];
    socket.read_exact(&mut json)?;
    Ok(serde_json::from_slice(&json)?)
}

/// Buffer of received messages, the last one possibly incomplete.
#[derive(Debug, Default)]
pub(super) struct Inbox(Vec<u8>);

impl Inbox {
    /// Returns the next report. `None` at the end of file, and for an invalid report. Cancel safe.
    pub(super) async fn next(&mut self, socket: &mut (impl AsyncRead + Unpin)) -> Option<Report> {
        let json = self.next_message(socket, MAX_REPORT).await.ok()??;
        serde_json::from_slice(&json).ok()
    }

    /// Returns the JSON of the next message. `None` at the end of file. Cancel safe.
    ///
    /// # Errors
    /// The message is longer than `max` bytes ([`io::ErrorKind::InvalidData`]), or the socket
    /// cannot be read.
    pub(super) async fn next_message(
        &mut self,
        socket: &mut (impl AsyncRead + Unpin),
        max: usize,
    ) -> io::Result<Option<Vec<u8>>> {
        loop {
            if let Some(length) = self.0.first_chunk::<4>() {
                let length = u32::from_le_bytes(*length) as usize;
                if length > max {
                    let reason = format!("message of {length} bytes; the maximum is {max}");
                    return Err(io::Error::new(io::ErrorKind::InvalidData, reason));
                }
                if let Some(json) = self.0.get(4..4 + length) {
                    let json = json.to_vec();
                    self.0.drain(..4 + length);
                    return Ok(Some(json));
                }
            }
            if socket.read_buf(&mut self.0).await? == 0 {
                return Ok(None);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::UnixStream;

    #[test]
    fn reports_are_reassembled_from_any_fragments() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let (mut up, mut down) = UnixStream::pair().unwrap();
            let reports =
                [Report::Note("n".into()), Report::Running, Report::Ended(Exit::Signal(9))];
            let bytes: Vec<u8> =
                reports.iter().flat_map(|report| encode(report).unwrap()).collect();
            let writer = tokio::spawn(async move {
                for byte in bytes {
                    tokio::io::AsyncWriteExt::write_all(&mut down, &[byte]).await.unwrap();
                    tokio::task::yield_now().await;
                }
            });
            let mut inbox = Inbox::default();
            for report in reports {
                assert_eq!(inbox.next(&mut up).await, Some(report));
            }
            assert_eq!(inbox.next(&mut up).await, None);
            writer.await.unwrap();
        });
    }

    #[test]
    fn a_message_above_the_maximum_length_is_rejected() {
        let length = u32::MAX.to_le_bytes();
        assert_eq!(
            receive::<StartRequest>(&length[..]).unwrap_err().kind(),
            io::ErrorKind::InvalidData
        );
    }
}
