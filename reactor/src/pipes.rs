//! Pool of pipes for `splice(2)`.
//!
//! Splicing from socket to pipe to socket moves payload by reference, without a copy to user space.
//! It requires large pipes: per GB moved, 64 KiB pipes took 1.7 times the CPU of 1 MiB pipes. An
//! unprivileged user may have only 64 MiB of pipes (`fs.pipe-user-pages-soft`); beyond that, new
//! pipes have one or two pages. So a connection borrows a pipe while bytes flow and returns it once
//! drained. If no large pipe is available, the caller copies.

use crate::{Descriptors, Permit};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

/// The requested size in bytes: the default of `fs.pipe-max-size`, the maximum for an unprivileged
/// user.
const PIPE_SIZE: usize = 1 << 20;

/// Minimum useful size in bytes. A smaller pipe is slower than copying through one cached buffer.
const MIN_PIPE_SIZE: usize = 256 << 10;

/// Result of one `splice(2)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Splice {
    /// The number of bytes moved, at least one.
    Moved(usize),
    /// End of stream at the source.
    End,
    /// Nothing to read, or no space to write, at the moment.
    Blocked,
}

/// A pipe and the number of bytes in it.
#[derive(Debug)]
pub struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
    held: usize,
}

impl Pipe {
    fn new() -> io::Result<(Self, usize)> {
        let (read, write) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        let size = match fcntl_setpipe_size(&write, PIPE_SIZE) {
            Ok(size) => size,
            Err(_) => rustix::pipe::fcntl_getpipe_size(&write)?,
        };
        Ok((Self { read, write, held: 0 }, size))
    }

    /// Number of bytes in the pipe.
    pub fn held(&self) -> usize {
        self.held
    }

    /// Moves up to `limit` bytes from `source` into the pipe, which must be empty. With a partly
    /// filled pipe, `Blocked` would not tell whether the source is empty or the pipe is full.
    ///
    /// # Errors
    /// Errors of the source socket, such as a reset.
    pub fn fill(&mut self, source: impl AsFd, limit: usize) -> io::Result<Splice> {
        debug_assert_eq!(self.held, 0, "fill requires an empty pipe");
        let flags = SpliceFlags::MOVE | SpliceFlags::NONBLOCK;
        let source = source.as_fd();
        let result = splice_result(|| splice(source, None, &self.write, None, limit, flags))?;
        if let Splice::Moved(bytes) = result {
            self.held = bytes;
        }
        Ok(result)
    }

    /// Moves bytes from the pipe to `sink`, as many as it accepts.
    ///
    /// # Errors
    /// Errors of the sink, such as a reset.
    pub fn drain(&mut self, sink: impl AsFd) -> io::Result<Splice> {
        let flags = SpliceFlags::MOVE | SpliceFlags::NONBLOCK;
        let sink = sink.as_fd();
        let result = splice_result(|| splice(&self.read, None, sink, None, self.held, flags))?;
        if let Splice::Moved(bytes) = result {
            self.held -= bytes;
        }
        Ok(result)
    }
}

fn splice_result(splice: impl FnMut() -> Result<usize, Errno>) -> io::Result<Splice> {
    match rustix::io::retry_on_intr(splice) {
        Ok(0) => Ok(Splice::End),
        Ok(bytes) => Ok(Splice::Moved(bytes)),
        Err(Errno::AGAIN) => Ok(Splice::Blocked),
        Err(error) => Err(error.into()),
    }
}

/// Number of [`PipePool::obtain`] calls that return `None` without a system call after the kernel
/// provided no large pipe. A retry takes four system calls.
const FAILURES_BEFORE_RETRY: u32 = 256;

/// A bounded pool of reusable pipes.
#[derive(Debug)]
pub struct PipePool {
    idle: Vec<(Pipe, Permit)>,
    lent: usize,
    limit: usize,
    /// Maximum number of idle pipes to keep open.
    keep: usize,
    descriptors: Arc<Descriptors>,
    /// Remaining failures before the next attempt to create a pipe.
    failures_left: u32,
}

/// A pipe borrowed from a [`PipePool`], with the reservation of its descriptors.
#[derive(Debug)]
pub struct Loan {
    pipe: Pipe,
    permit: Permit,
}

impl std::ops::Deref for Loan {
    type Target = Pipe;

    fn deref(&self) -> &Pipe {
        &self.pipe
    }
}

impl std::ops::DerefMut for Loan {
    fn deref_mut(&mut self) -> &mut Pipe {
        &mut self.pipe
    }
}

impl PipePool {
    /// Creates a pool of at most `limit` pipes within the budget of `descriptors`. At most `keep`
    /// idle pipes stay open. Creates no pipe yet.
    pub fn new(limit: usize, keep: usize, descriptors: Arc<Descriptors>) -> Self {
        Self { idle: Vec::new(), lent: 0, limit, keep, descriptors, failures_left: 0 }
    }

    /// Returns an empty pipe; `None` at a limit, or if the kernel provides no large pipe. The
    /// caller then copies.
    pub fn obtain(&mut self) -> Option<Loan> {
        let (pipe, permit) = match self.idle.pop() {
            Some(idle) => idle,
            None if self.lent < self.limit => self.make()?,
            None => return None,
        };
        self.lent += 1;
        Some(Loan { pipe, permit })
    }

    fn make(&mut self) -> Option<(Pipe, Permit)> {
        if self.failures_left > 0 {
            self.failures_left -= 1;
            return None;
        }
        let permit = self.descriptors.take(2)?;
        match Pipe::new() {
            Ok((pipe, size)) if size >= MIN_PIPE_SIZE => Some((pipe, permit)),
            _ => {
                self.failures_left = FAILURES_BEFORE_RETRY;
                None
            }
        }
    }

    /// Returns a pipe to the pool. A pipe that still contains bytes, because its connection was
    /// closed, is closed and not reused.
    pub fn release(&mut self, loan: Loan) {
        self.lent -= 1;
        if loan.pipe.held == 0 && self.idle.len() < self.keep {
            self.idle.push((loan.pipe, loan.permit));
        }
    }

    /// Closes the idle pipes to free their descriptors.
    pub fn shrink(&mut self) {
        self.idle.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    fn pool(descriptors: usize) -> (PipePool, Arc<Descriptors>) {
        let descriptors = Arc::new(Descriptors::new(descriptors));
        (PipePool::new(2, 1, Arc::clone(&descriptors)), descriptors)
    }

    #[test]
    fn bytes_pass_through_and_the_end_of_stream_is_reported() {
        let (mut near, source) = UnixStream::pair().unwrap();
        let (sink, mut far) = UnixStream::pair().unwrap();
        source.set_nonblocking(true).unwrap();
        let mut pipe = pool(2).0.obtain().unwrap();

        assert_eq!(pipe.fill(&source, 1 << 16).unwrap(), Splice::Blocked);
        near.write_all(b"over the tide").unwrap();
        assert_eq!(pipe.fill(&source, 1 << 16).unwrap(), Splice::Moved(13));
        assert_eq!(pipe.held(), 13);
        assert_eq!(pipe.drain(&sink).unwrap(), Splice::Moved(13));
        let mut arrived = [0; 13];
        far.read_exact(&mut arrived).unwrap();
        assert_eq!(&arrived, b"over the tide");
        drop(near);
        assert_eq!(pipe.fill(&source, 1 << 16).unwrap(), Splice::End);
    }

    #[test]
    fn a_pipe_with_bytes_in_it_is_not_reused() {
        let (mut near, source) = UnixStream::pair().unwrap();
        let (mut pool, descriptors) = pool(9);
        let mut pipe = pool.obtain().unwrap();
        near.write_all(b"left behind").unwrap();
        pipe.fill(&source, 1 << 16).unwrap();
        pool.release(pipe);
        assert_eq!(descriptors.taken(), 0, "the pipe was closed");

        let clean = pool.obtain().unwrap();
        pool.release(clean);
        assert_eq!(descriptors.taken(), 2, "the idle pipe stays open");
        pool.shrink();
        assert_eq!(descriptors.taken(), 0);
    }

    #[test]
    fn the_number_of_pipes_is_limited() {
        let (mut few, _) = pool(3);
        let loan = few.obtain().unwrap();
        assert!(few.obtain().is_none(), "a pipe needs two descriptors, one is available");
        few.release(loan);
        let (mut many, _) = pool(100);
        let _loans = [many.obtain().unwrap(), many.obtain().unwrap()];
        assert!(many.obtain().is_none(), "the limit of the pool is two pipes");
    }
}
