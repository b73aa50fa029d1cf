//! Pipes for `splice(2)`, pooled.
//!
//! Payload that is spliced from socket to pipe to socket is moved by reference: the pages never
//! enter this process. What it costs is pipes: a large one is what makes it fast (per GB moved, 64
//! KiB pipes took 1.7 times the CPU of 1 MiB ones), and an unprivileged user may have only 64 MiB
//! of them in all (`fs.pipe-user-pages-soft`), after which the kernel hands out pipes of one or two
//! pages. So a connection borrows a pipe while bytes flow and gives it back when it is drained;
//! where no good one is to be had, the caller copies.

use crate::{Descriptors, Permit};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

/// The size asked for, in bytes: the most that `fs.pipe-max-size` allows an ordinary user by
/// default.
const WANTED: usize = 1 << 20;

/// Below this many bytes a pipe is slower than a copy through one warm buffer.
const WORTHWHILE: usize = 256 << 10;

/// What became of one `splice(2)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Splice {
    /// So many bytes moved (more than zero).
    Moved(usize),
    /// The source has ended.
    End,
    /// Nothing to read, or no room to write, for now.
    Blocked,
}

/// A pipe and how many bytes are in it.
#[derive(Debug)]
pub struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
    held: usize,
}

impl Pipe {
    fn new() -> io::Result<(Self, usize)> {
        let (read, write) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        let size = match fcntl_setpipe_size(&write, WANTED) {
            Ok(size) => size,
            Err(_) => rustix::pipe::fcntl_getpipe_size(&write)?,
        };
        Ok((Self { read, write, held: 0 }, size))
    }

    /// How many bytes wait in the pipe.
    pub fn held(&self) -> usize {
        self.held
    }

    /// Moves up to `limit` bytes from `source` into the pipe, which must be empty: a half-full pipe
    /// could refuse for its own sake, and `Blocked` would not say whose turn it is.
    ///
    /// # Errors
    /// What the source socket says, a reset for instance.
    pub fn fill(&mut self, source: impl AsFd, limit: usize) -> io::Result<Splice> {
        debug_assert_eq!(self.held, 0, "a pipe is filled when it is empty");
        let flags = SpliceFlags::MOVE | SpliceFlags::NONBLOCK;
        let source = source.as_fd();
        let outcome = outcome(|| splice(source, None, &self.write, None, limit, flags))?;
        if let Splice::Moved(bytes) = outcome {
            self.held = bytes;
        }
        Ok(outcome)
    }

    /// Moves what the pipe holds into `sink`, as far as there is room.
    ///
    /// # Errors
    /// What the sink says, a reset for instance.
    pub fn drain(&mut self, sink: impl AsFd) -> io::Result<Splice> {
        let flags = SpliceFlags::MOVE | SpliceFlags::NONBLOCK;
        let sink = sink.as_fd();
        let outcome = outcome(|| splice(&self.read, None, sink, None, self.held, flags))?;
        if let Splice::Moved(bytes) = outcome {
            self.held -= bytes;
        }
        Ok(outcome)
    }
}

fn outcome(splice: impl FnMut() -> Result<usize, Errno>) -> io::Result<Splice> {
    match rustix::io::retry_on_intr(splice) {
        Ok(0) => Ok(Splice::End),
        Ok(bytes) => Ok(Splice::Moved(bytes)),
        Err(Errno::AGAIN) => Ok(Splice::Blocked),
        Err(error) => Err(error.into()),
    }
}

/// How many times a caller is told to copy before the system is asked for a pipe again, after it
/// had none that is worth having: asking costs four system calls.
const REFUSALS_BEFORE_ASKING_AGAIN: u32 = 256;

/// A bounded number of pipes, kept for use again.
#[derive(Debug)]
pub struct PipePool {
    idle: Vec<(Pipe, Permit)>,
    lent: usize,
    limit: usize,
    /// How many pipes to keep while nobody uses them.
    keep: usize,
    descriptors: Arc<Descriptors>,
    /// Counts down to the next attempt after the system refused one.
    refusals_left: u32,
}

/// A pipe on loan from a [`PipePool`], with the permit for its descriptors.
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
    /// A pool of at most `limit` pipes, of which `keep` stay open when idle, within the allowance
    /// of `descriptors`. Makes none yet.
    pub fn new(limit: usize, keep: usize, descriptors: Arc<Descriptors>) -> Self {
        Self { idle: Vec::new(), lent: 0, limit, keep, descriptors, refusals_left: 0 }
    }

    /// An empty pipe; `None` at a limit, or when the system gives none that is worth having: copy
    /// then.
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
        if self.refusals_left > 0 {
            self.refusals_left -= 1;
            return None;
        }
        let permit = self.descriptors.take(2)?;
        match Pipe::new() {
            Ok((pipe, size)) if size >= WORTHWHILE => Some((pipe, permit)),
            _ => {
                self.refusals_left = REFUSALS_BEFORE_ASKING_AGAIN;
                None
            }
        }
    }

    /// Takes a pipe back. One with bytes left in it (its connection was cut) is closed, never lent
    /// again.
    pub fn release(&mut self, loan: Loan) {
        self.lent -= 1;
        if loan.pipe.held == 0 && self.idle.len() < self.keep {
            self.idle.push((loan.pipe, loan.permit));
        }
    }

    /// Closes the idle pipes, for their descriptors are needed elsewhere.
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
    fn bytes_pass_through_and_the_end_of_the_source_is_told() {
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
    fn a_pipe_with_bytes_in_it_is_not_lent_again() {
        let (mut near, source) = UnixStream::pair().unwrap();
        let (mut pool, descriptors) = pool(9);
        let mut pipe = pool.obtain().unwrap();
        near.write_all(b"left behind").unwrap();
        pipe.fill(&source, 1 << 16).unwrap();
        pool.release(pipe);
        assert_eq!(descriptors.taken(), 0, "closed, with its bytes");

        let clean = pool.obtain().unwrap();
        pool.release(clean);
        assert_eq!(descriptors.taken(), 2, "kept");
        pool.shrink();
        assert_eq!(descriptors.taken(), 0);
    }

    #[test]
    fn there_are_no_more_pipes_than_the_limits_allow() {
        let (mut few, _) = pool(3);
        let loan = few.obtain().unwrap();
        assert!(few.obtain().is_none(), "one descriptor is left, a pipe has two");
        few.release(loan);
        let (mut many, _) = pool(100);
        let _loans = [many.obtain().unwrap(), many.obtain().unwrap()];
        assert!(many.obtain().is_none(), "two pipes are the pool's limit");
    }
}
