//! Bulk transfers in which every byte is checked against a [`Pattern`].
//!
//! Either end can be a socket of a test, or one of the servers [`Sink`](crate::server::Sink) and
//! [`Source`](crate::server::Source).

use std::io::{self, Read, Write};

use crate::Pattern;

/// Bytes per read or write.
const CHUNK: usize = 128 * 1024;

/// The result of receiving a pattern.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Transfer {
    /// The number of bytes received.
    pub bytes: u64,
    /// The position of the first byte that differs from the pattern.
    pub wrong_at: Option<u64>,
    /// The error that ended the stream; `None` for an orderly end.
    pub error: Option<io::ErrorKind>,
}

impl Transfer {
    /// `bytes` bytes of the pattern followed by an orderly end.
    pub fn complete(bytes: u64) -> Self {
        Self { bytes, wrong_at: None, error: None }
    }
}

/// Writes the first `length` bytes of the pattern of `seed`.
///
/// # Errors
///
/// Errors of `stream`.
pub fn send(stream: &mut impl Write, seed: u64, length: u64) -> io::Result<()> {
    let mut pattern = Pattern::new(seed);
    let mut buffer = vec![0; CHUNK];
    while pattern.position() < length {
        let size = (length - pattern.position()).min(CHUNK as u64) as usize;
        pattern.fill(&mut buffer[..size]);
        stream.write_all(&buffer[..size])?;
    }
    Ok(())
}

/// Reads `stream` to its end and compares it with the pattern of `seed`.
pub fn receive(stream: &mut impl Read, seed: u64) -> Transfer {
    let mut pattern = Pattern::new(seed);
    let mut transfer = Transfer::complete(0);
    let mut buffer = vec![0; CHUNK];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return transfer,
            Ok(length) => {
                transfer.bytes += length as u64;
                if transfer.wrong_at.is_none() {
                    transfer.wrong_at = pattern.check(&buffer[..length]).err();
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => {
                transfer.error = Some(error.kind());
                return transfer;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sent_pattern_is_received() {
        let mut sent = Vec::new();
        send(&mut sent, 3, 300_000).unwrap();
        assert_eq!(receive(&mut &sent[..], 3), Transfer::complete(300_000));
    }

    #[test]
    fn a_missing_block_is_located() {
        let mut sent = Vec::new();
        send(&mut sent, 3, 300_000).unwrap();
        sent.drain(150_000..150_100);
        let got = receive(&mut &sent[..], 3);
        assert_eq!(got, Transfer { bytes: 299_900, wrong_at: Some(150_000), error: None });
    }
}
