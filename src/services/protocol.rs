//! What the supervisor and a service's init say to each other, over a Unix socket that is the
//! init's standard input.
//!
//! One [`Order`] goes down, [`Report`]s come up. Each is JSON behind its length, four bytes,
//! little-endian. The socket stays open for the service's life: its end tells the init that the
//! supervisor is gone, whatever took it.

use super::Exit;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::os::fd::RawFd;
use std::path::PathBuf;
use tokio::io::{AsyncRead, AsyncReadExt};

/// The longest message. Linux passes at most 6 MiB of arguments and environment to a program
/// (`bprm_stack_limits` of `fs/exec.c`).
const LONGEST: usize = 8 * 1024 * 1024;

/// The longest report: a service of the same user might write to the socket with ptrace.
const LONGEST_REPORT: usize = 64 * 1024;

/// What the init is to run, and in what.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Order {
    /// The number under which it has inherited the network namespace.
    pub(super) namespace: RawFd,
    pub(super) hostname: String,
    /// The directory of the service's own `hosts`, `resolv.conf` and `hostname`.
    pub(super) files: PathBuf,
    pub(super) command: Vec<String>,
    pub(super) environment: BTreeMap<String, String>,
    pub(super) working_dir: PathBuf,
}

/// What became of it.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Report {
    /// A step before the command failed; nothing runs.
    SetUpFailed(String),
    /// The command cannot be executed; nothing runs.
    CannotRun(String),
    /// Something is not as it should be, and the command runs all the same.
    Note(String),
    /// The command runs.
    Running,
    /// The command has ended; nothing of the service is left in a moment.
    Ended(Exit),
}

/// A message as it is sent.
pub(super) fn encode(message: &impl Serialize) -> io::Result<Vec<u8>> {
    let json = serde_json::to_vec(message)?;
    if json.len() > LONGEST {
        return Err(io::Error::new(
            io::ErrorKind::ArgumentListTooLong,
            "command and environment are too long",
        ));
    }
    let length = u32::try_from(json.len()).map_err(io::Error::other)?;
    Ok([&length.to_le_bytes()[..], &json].concat())
}

/// Sends a message, waiting for it to be taken.
pub(super) fn send(mut socket: impl Write, message: &impl Serialize) -> io::Result<()> {
    socket.write_all(&encode(message)?)
}

/// Waits for a message.
pub(super) fn receive<T: DeserializeOwned>(mut socket: impl Read) -> io::Result<T> {
    let mut length = [0; 4];
    socket.read_exact(&mut length)?;
    let length = u32::from_le_bytes(length) as usize;
    if length > LONGEST {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut json = vec![0; length];
    socket.read_exact(&mut json)?;
    Ok(serde_json::from_slice(&json)?)
}

/// The reports that have come, as far as they have.
#[derive(Debug, Default)]
pub(super) struct Inbox(Vec<u8>);

impl Inbox {
    /// The next report; `None` once there will be no more. Loses nothing when it is cancelled.
    pub(super) async fn next(&mut self, socket: &mut (impl AsyncRead + Unpin)) -> Option<Report> {
        loop {
            if let Some(length) = self.0.first_chunk::<4>() {
                let length = u32::from_le_bytes(*length) as usize;
                if length > LONGEST_REPORT {
                    return None;
                }
                if let Some(json) = self.0.get(4..4 + length) {
                    let report = serde_json::from_slice(json).ok();
                    self.0.drain(..4 + length);
                    return report;
                }
            }
            if !matches!(socket.read_buf(&mut self.0).await, Ok(1..)) {
                return None;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::UnixStream;

    #[test]
    fn reports_arrive_whole_however_they_are_cut() {
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
    fn a_message_that_claims_too_much_is_refused() {
        let claim = u32::MAX.to_le_bytes();
        assert_eq!(receive::<Order>(&claim[..]).unwrap_err().kind(), io::ErrorKind::InvalidData);
    }
}
