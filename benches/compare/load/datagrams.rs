//! A UDP sender that floods, and a receiver that counts.
//!
//! Both use the largest batches that the kernel supports: `sendmmsg` or segmentation offload
//! (`UDP_SEGMENT`) to send, `recvmmsg` with `UDP_GRO` to receive. They use libc because rustix has
//! no `recvmmsg`.
use std::io;
use std::mem::{self, size_of};
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};
use socket2::SockRef;
use tidegate_testbed::Namespace;

/// Messages per system call.
const BATCH: usize = 64;

/// Maximum size of a message with UDP_GRO or UDP_SEGMENT, limited by the length field of IPv4.
const MAX_MESSAGE: usize = 65_536;

/// The limits of one call with UDP_SEGMENT: 64 segments in kernels before 6.9, and 65,507 bytes.
const MAX_SEGMENTS: usize = 64;
const MAX_PAYLOAD: usize = 65_507;

/// The requested size of socket buffers, so that the sockets of the generators do not drop.
const SOCKET_BUFFER: usize = 16 << 20;

/// A thread that sends datagrams as fast as it can until the drop.
pub(crate) struct Flood {
    running: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Flood {
    /// Starts to send datagrams of `size` bytes from one socket in `namespace`. With `offload`,
    /// they are sent as GSO segments.
    pub(crate) fn start(
        namespace: &Namespace,
        target: SocketAddr,
        size: usize,
        offload: bool,
    ) -> Result<Self> {
        let socket = namespace.run(|| -> io::Result<UdpSocket> {
            let socket = UdpSocket::bind(("0.0.0.0", 0))?;
            socket.connect(target)?;
            Ok(socket)
        })?;
        let length = if offload {
            set_option(&socket, libc::UDP_SEGMENT, size)?;
            size * MAX_SEGMENTS.min(MAX_PAYLOAD / size)
        } else {
            size
        };
        let running = Arc::new(AtomicBool::new(true));
        let thread = {
            let running = Arc::clone(&running);
            std::thread::spawn(move || {
                let payload = vec![0x5a; length];
                while running.load(Ordering::Relaxed) {
                    // ENOBUFS under pressure, or ECONNREFUSED without a proxy. The count of the
                    // receiver shows the effect.
                    let _ = send_batch(&socket, &payload);
                }
            })
        };
        Ok(Self { running, thread: Some(thread) })
    }
}

impl Drop for Flood {
    fn drop(&mut self) {
        self.running.store(false, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A thread that receives and counts datagrams until the drop.
pub(crate) struct Counter {
    received: Arc<AtomicU64>,
    running: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Counter {
    /// Starts to receive on `addr` in `namespace`.
    pub(crate) fn start(namespace: &Namespace, addr: SocketAddr) -> Result<Self> {
        let socket =
            namespace.run(|| UdpSocket::bind(addr)).with_context(|| format!("bind {addr}"))?;
        set_option(&socket, libc::UDP_GRO, 1)?;
        // The interval of checks of `running`.
        socket.set_read_timeout(Some(Duration::from_millis(20)))?;
        enlarge_receive_buffer(&socket)?;
        let received = Arc::new(AtomicU64::new(0));
        let running = Arc::new(AtomicBool::new(true));
        let thread = {
            let (received, running) = (Arc::clone(&received), Arc::clone(&running));
            std::thread::spawn(move || {
                let mut batch = ReceiveBatch::new();
                while running.load(Ordering::Relaxed) {
                    received.fetch_add(batch.receive(&socket), Ordering::Relaxed);
                }
            })
        };
        Ok(Self { received, running, thread: Some(thread) })
    }

    /// The number of received datagrams.
    pub(crate) fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }
}

impl Drop for Counter {
    fn drop(&mut self) {
        self.running.store(false, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Sends `payload` [`BATCH`] times.
fn send_batch(socket: &UdpSocket, payload: &[u8]) -> io::Result<()> {
    let mut part =
        libc::iovec { iov_base: payload.as_ptr().cast_mut().cast(), iov_len: payload.len() };
    // SAFETY: zero is a valid value for each field of this plain C structure.
    let mut message: libc::mmsghdr = unsafe { mem::zeroed() };
    message.msg_hdr.msg_iov = &raw mut part;
    message.msg_hdr.msg_iovlen = 1;
    let mut messages = [message; BATCH];
    // SAFETY: all headers point to `part`, which points to `payload`. Both outlive the call, which
    // only reads them.
    let sent =
        unsafe { libc::sendmmsg(socket.as_raw_fd(), messages.as_mut_ptr(), BATCH as u32, 0) };
    if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// A buffer for one control message with an `int`, with the alignment of `cmsghdr`.
#[derive(Clone, Copy)]
#[repr(C, align(8))]
struct Control([u8; 24]);

/// Buffers for `recvmmsg`.
struct ReceiveBatch {
    payloads: Vec<u8>,
    controls: [Control; BATCH],
}

impl ReceiveBatch {
    fn new() -> Self {
        Self { payloads: vec![0; BATCH * MAX_MESSAGE], controls: [Control([0; 24]); BATCH] }
    }

    /// Receives a batch, waiting for the first datagram. Returns the number of datagrams.
    fn receive(&mut self, socket: &UdpSocket) -> u64 {
        // SAFETY: zero is a valid value for each field of these plain C structures.
        let mut parts: [libc::iovec; BATCH] = unsafe { mem::zeroed() };
        // SAFETY: as above.
        let mut messages: [libc::mmsghdr; BATCH] = unsafe { mem::zeroed() };
        let buffers = self.payloads.chunks_exact_mut(MAX_MESSAGE).zip(&mut self.controls);
        for ((message, part), (payload, control)) in
            messages.iter_mut().zip(&mut parts).zip(buffers)
        {
            *part = libc::iovec { iov_base: payload.as_mut_ptr().cast(), iov_len: MAX_MESSAGE };
            message.msg_hdr.msg_iov = part;
            message.msg_hdr.msg_iovlen = 1;
            message.msg_hdr.msg_control = control.0.as_mut_ptr().cast();
            message.msg_hdr.msg_controllen = size_of::<Control>();
        }
        // SAFETY: each header points to its own payload and control buffer with the given lengths,
        // which outlive the call.
        let count = unsafe {
            libc::recvmmsg(
                socket.as_raw_fd(),
                messages.as_mut_ptr(),
                BATCH as u32,
                libc::MSG_WAITFORONE,
                ptr::null_mut(),
            )
        };
        // An error is the read timeout.
        messages.iter().take(count.max(0) as usize).map(datagrams).sum()
    }
}

/// The number of datagrams in a message of the kernel.
fn datagrams(message: &libc::mmsghdr) -> u64 {
    let mut segment = 0;
    // SAFETY: the kernel filled in the control buffer and its length. CMSG_FIRSTHDR returns null
    // without a complete header.
    unsafe {
        let header = libc::CMSG_FIRSTHDR(&raw const message.msg_hdr);
        if !header.is_null()
            && (*header).cmsg_level == libc::SOL_UDP
            && (*header).cmsg_type == libc::UDP_GRO
        {
            segment = ptr::read_unaligned(libc::CMSG_DATA(header).cast::<libc::c_int>());
        }
    }
    // A message without a control message, or with an empty payload, is a single datagram.
    if segment > 0 { u64::from(message.msg_len).div_ceil(segment as u64) } else { 1 }
}

/// Sets an integer option of level `SOL_UDP`.
fn set_option(socket: &UdpSocket, option: libc::c_int, value: usize) -> io::Result<()> {
    let value = value as libc::c_int;
    set_int(socket, libc::SOL_UDP, option, value)
}

/// Sets a receive buffer beyond `net.core.rmem_max`, which requires CAP_NET_ADMIN.
fn enlarge_receive_buffer(socket: &UdpSocket) -> io::Result<()> {
    set_int(socket, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, SOCKET_BUFFER as libc::c_int)?;
    debug_assert!(SockRef::from(socket).recv_buffer_size()? >= SOCKET_BUFFER);
    Ok(())
}

fn set_int(
    socket: &UdpSocket,
    level: libc::c_int,
    option: libc::c_int,
    value: libc::c_int,
) -> io::Result<()> {
    // SAFETY: the kernel reads one `int` from `value`.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            (&raw const value).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
