//! How other threads speak to a loop: a queue and an eventfd(2) that ends the loop's sleep.

use rustix::event::{EventfdFlags, eventfd};
use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

/// The receiving loop has ended; the message comes back.
#[derive(Debug, PartialEq, Eq)]
pub struct Closed<M>(pub M);

struct Shared<M> {
    /// `None` once the loop has ended.
    queue: Mutex<Option<Vec<M>>>,
    bell: OwnedFd,
}

impl<M> Shared<M> {
    fn queue(&self) -> std::sync::MutexGuard<'_, Option<Vec<M>>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Sends messages to a loop; cheap to clone.
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
    /// Queues `message` and wakes the loop if it may be asleep.
    ///
    /// The queue has no limit of its own: what is sent is control messages and accepted
    /// connections, which have been counted against their limits before.
    ///
    /// # Errors
    /// [`Closed`] when the loop has ended.
    pub fn send(&self, message: M) -> Result<(), Closed<M>> {
        let mut queue = self.0.queue();
        let Some(messages) = queue.as_mut() else { return Err(Closed(message)) };
        let asleep = messages.is_empty();
        messages.push(message);
        drop(queue);
        if asleep {
            // It fails only when the counter is full, and then the loop is awake.
            let _ = rustix::io::write(&self.0.bell, &1u64.to_ne_bytes());
        }
        Ok(())
    }
}

/// The loop's end.
pub(crate) struct Mailbox<M>(Arc<Shared<M>>);

impl<M> Mailbox<M> {
    pub(crate) fn new() -> io::Result<(Self, Sender<M>)> {
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let shared = Arc::new(Shared { queue: Mutex::new(Some(Vec::new())), bell });
        Ok((Self(Arc::clone(&shared)), Sender(shared)))
    }

    /// Everything sent so far. The bell is silenced first: what is sent after that rings again.
    pub(crate) fn take(&self) -> Vec<M> {
        let _ = rustix::io::read(&self.0.bell, &mut [0u8; 8]);
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
        self.0.bell.as_fd()
    }
}
