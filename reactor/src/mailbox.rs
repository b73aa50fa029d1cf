//! Messages from other threads to a loop: a queue, and an eventfd(2) that wakes the loop.

use rustix::event::{EventfdFlags, eventfd};
use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

/// The receiving loop has ended. Returns the message.
#[derive(Debug, PartialEq, Eq)]
pub struct Closed<M>(pub M);

struct Shared<M> {
    /// `None` once the loop has ended.
    queue: Mutex<Option<Vec<M>>>,
    wake_fd: OwnedFd,
}

impl<M> Shared<M> {
    fn queue(&self) -> std::sync::MutexGuard<'_, Option<Vec<M>>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Sends messages to a loop. Cloning is cheap.
pub struct Sender<M>(Arc<Shared<M>>);

impl<M> Clone for Sender<M> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<M> fmt::Debug for Sender<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Sender")
    }
}

impl<M> Sender<M> {
    /// Queues `message`, and wakes the loop if it may be asleep.
    ///
    /// The queue is unbounded. It carries control messages and accepted connections, which already
    /// count against their limits.
    ///
    /// # Errors
    /// [`Closed`] if the loop has ended.
    pub fn send(&self, message: M) -> Result<(), Closed<M>> {
        let mut queue = self.0.queue();
        let Some(messages) = queue.as_mut() else { return Err(Closed(message)) };
        let asleep = messages.is_empty();
        messages.push(message);
        drop(queue);
        if asleep {
            // The write fails only if the counter is at its maximum, and then the loop is awake.
            let _ = rustix::io::write(&self.0.wake_fd, &1u64.to_ne_bytes());
        }
        Ok(())
    }
}

/// The receiving side.
pub(crate) struct Mailbox<M>(Arc<Shared<M>>);

impl<M> Mailbox<M> {
    pub(crate) fn new() -> io::Result<(Self, Sender<M>)> {
        let wake_fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let shared = Arc::new(Shared { queue: Mutex::new(Some(Vec::new())), wake_fd });
        Ok((Self(Arc::clone(&shared)), Sender(shared)))
    }

    /// Takes all queued messages. Clears the eventfd first, so that later messages signal it again.
    pub(crate) fn take(&self) -> Vec<M> {
        let _ = rustix::io::read(&self.0.wake_fd, &mut [0u8; 8]);
        self.0.queue().as_mut().map(std::mem::take).unwrap_or_default()
    }
}

impl<M> Drop for Mailbox<M> {
    fn drop(&mut self) {
        *self.0.queue() = None;
    }
}

impl<M> AsFd for Mailbox<M> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.wake_fd.as_fd()
    }
}
