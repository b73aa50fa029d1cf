//! The thread of DNS and the API, with its own runtime.
//!
//! Network changes are blocking system calls. rtnetlink requests wait for a lock that all
//! namespaces share (`rtnl_mutex`). Root in a container can hold it for long, for example by
//! setting a link with 100,000 addresses up and down. Network changes therefore run on another
//! thread, and DNS and the API do not wait for them.

use std::io;
use std::thread::{self, JoinHandle};
use tokio::runtime::{Builder, Handle};
use tokio::sync::oneshot;

/// The runtime of DNS and the API. Dropping it ends the runtime with all its tasks.
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
    /// The limit of threads or file descriptors is reached.
    pub(super) fn start() -> io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let handle = runtime.handle().clone();
        let (stop, stopped) = oneshot::channel::<()>();
        let run = move || {
            // Returns when the sender is dropped.
            let _ = runtime.block_on(stopped);
            runtime.shutdown_background();
        };
        let thread = thread::Builder::new().name("tidegate-answer".into()).spawn(run)?;
        Ok(Self { runtime: handle, stop: Some(stop), thread: Some(thread) })
    }

    /// Returns the runtime. Sockets of DNS and the API must be created while it is entered.
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
