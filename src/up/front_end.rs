//! The thread that answers: DNS and the API have a runtime of their own.
//!
//! Changes of networks are system calls that block. rtnetlink requests wait for one lock of all
//! namespaces (`rtnl_mutex`), which root in a container can keep busy: a link that has 100,000
//! addresses and is set up and down is enough. So they are made on another thread, and no answer
//! waits for one.

use std::io;
use std::thread::{self, JoinHandle};
use tokio::runtime::{Builder, Handle};
use tokio::sync::oneshot;

/// The runtime of DNS and the API. Dropped, it ends, and all that it runs with it.
#[derive(Debug)]
pub(super) struct FrontEnd {
    runtime: Handle,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl FrontEnd {
    /// Starts the thread.
    ///
    /// # Errors
    /// No thread, or no descriptor, is left.
    pub(super) fn start() -> io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let handle = runtime.handle().clone();
        let (stop, stopped) = oneshot::channel::<()>();
        let run = move || {
            // It ends when the sender is dropped.
            let _ = runtime.block_on(stopped);
            runtime.shutdown_background();
        };
        let thread = thread::Builder::new().name("tidegate-answer".into()).spawn(run)?;
        Ok(Self { runtime: handle, stop: Some(stop), thread: Some(thread) })
    }

    /// What is to answer belongs to this runtime: it is made while this is entered.
    pub(super) fn runtime(&self) -> &Handle {
        &self.runtime
    }
}

impl Drop for FrontEnd {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
