//! The server behind the published port: sends 64 bytes for every 64 received bytes, on any number
//! of connections.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::buffer::spare_capacity;
use rustix::event::{EventfdFlags, epoll, eventfd};
use socket2::{Domain, Socket, Type};
use tidegate_testbed::{Namespace, eventually};

use super::{EVENTS, MESSAGE};

/// The tokens of the listener and the stop descriptor. The token of a connection is its descriptor
/// number.
const LISTENER: u64 = u64::MAX;
const STOP: u64 = u64::MAX - 1;

/// A running server, stopped on drop.
pub(crate) struct RequestServer {
    open: Arc<AtomicUsize>,
    stop: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl RequestServer {
    /// Starts a server that listens on `addr` in `namespace` on return.
    pub(crate) fn start(namespace: &Namespace, addr: SocketAddr) -> Result<Self> {
        let listener =
            namespace.run(|| listen(addr)).with_context(|| format!("listen on {addr}"))?;
        let open = Arc::new(AtomicUsize::new(0));
        let stop = Arc::new(eventfd(0, EventfdFlags::CLOEXEC)?);
        let mut service = Service::new(listener, &stop, Arc::clone(&open))?;
        let thread = std::thread::spawn(move || service.run().expect("serve requests"));
        Ok(Self { open, stop, thread: Some(thread) })
    }

    /// Waits until `count` connections are open.
    pub(crate) fn wait_until_open(&self, count: usize, timeout: Duration) -> Result<()> {
        eventually(timeout, || self.open.load(Ordering::Relaxed) == count);
        let open = self.open.load(Ordering::Relaxed);
        ensure!(open == count, "{open} of {count} connections reached the container");
        Ok(())
    }
}

impl Drop for RequestServer {
    fn drop(&mut self) {
        // A write of eight bytes to a new eventfd succeeds.
        let _ = rustix::io::write(&self.stop, &1u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn listen(addr: SocketAddr) -> io::Result<TcpListener> {
    let socket =
        Socket::new(Domain::for_address(addr), Type::STREAM.nonblocking().cloexec(), None)?;
    socket.set_reuse_address(true)?;
    socket.bind(&addr.into())?;
    // The kernel limits this to net.core.somaxconn.
    socket.listen(65_535)?;
    Ok(socket.into())
}

/// The state of the server thread.
struct Service {
    epoll: OwnedFd,
    listener: TcpListener,
    /// Indexed by descriptor number.
    connections: Vec<Option<Connection>>,
    open: Arc<AtomicUsize>,
}

struct Connection {
    stream: TcpStream,
    /// The received bytes of an incomplete request.
    received: usize,
}

impl Service {
    fn new(listener: TcpListener, stop: &OwnedFd, open: Arc<AtomicUsize>) -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        epoll::add(&epoll, &listener, epoll::EventData::new_u64(LISTENER), epoll::EventFlags::IN)?;
        epoll::add(&epoll, stop, epoll::EventData::new_u64(STOP), epoll::EventFlags::IN)?;
        Ok(Self { epoll, listener, connections: Vec::new(), open })
    }

    fn run(&mut self) -> io::Result<()> {
        let mut events = Vec::with_capacity(EVENTS);
        loop {
            events.clear();
            match epoll::wait(&self.epoll, spare_capacity(&mut events), None) {
                Err(rustix::io::Errno::INTR) => continue,
                other => other?,
            };
            for event in &events {
                match event.data.u64() {
                    STOP => return Ok(()),
                    LISTENER => self.accept()?,
                    descriptor => self.serve(descriptor as usize),
                }
            }
        }
    }

    fn accept(&mut self) -> io::Result<()> {
        loop {
            let stream = match self.listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == ErrorKind::ConnectionAborted => continue,
                Err(error) => return Err(error),
            };
            stream.set_nonblocking(true)?;
            stream.set_nodelay(true)?;
            let number = stream.as_raw_fd() as usize;
            let token = epoll::EventData::new_u64(number as u64);
            epoll::add(&self.epoll, &stream, token, epoll::EventFlags::IN)?;
            if self.connections.len() <= number {
                self.connections.resize_with(number + 1, || None);
            }
            self.connections[number] = Some(Connection { stream, received: 0 });
            self.open.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn serve(&mut self, number: usize) {
        let Some(connection) = self.connections[number].as_mut() else { return };
        if !connection.answer() {
            self.connections[number] = None;
            self.open.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

impl Connection {
    /// Reads once and responds to every complete request. Returns false when the connection is
    /// over.
    ///
    /// The client waits for each small response, so a full send buffer is a protocol error.
    fn answer(&mut self) -> bool {
        let mut buffer = [0; 4096];
        match self.stream.read(&mut buffer) {
            Ok(0) => return false,
            Ok(length) => self.received += length,
            Err(error) => {
                return matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted);
            }
        }
        while self.received >= MESSAGE {
            self.received -= MESSAGE;
            if self.stream.write_all(&buffer[..MESSAGE]).is_err() {
                return false;
            }
        }
        true
    }
}
