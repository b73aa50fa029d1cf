//! A demo server to publish: one page with the addresses of both ends of the connection.

use anyhow::Context;
use clap::Args;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// Maximum number of concurrent requests. Further connections are closed.
const MAX_CLIENTS: usize = 64;

/// The time for a client to send its request.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Serve a demo page that shows the address of the client
#[derive(Debug, Args)]
pub(super) struct Hello {
    /// The address to listen on
    #[arg(long, default_value = "127.0.0.1:8000", value_name = "ADDRESS:PORT")]
    listen: SocketAddr,
}

impl Hello {
    pub(super) fn run(&self) -> anyhow::Result<()> {
        let listener =
            TcpListener::bind(self.listen).with_context(|| format!("listen on {}", self.listen))?;
        println!("hello: serving on http://{}", listener.local_addr()?);
        let clients = Arc::new(AtomicUsize::new(0));
        for client in listener.incoming() {
            let Ok(client) = client else {
                std::thread::sleep(Duration::from_millis(100));
                continue;
            };
            if clients.fetch_add(1, Ordering::Relaxed) >= MAX_CLIENTS {
                clients.fetch_sub(1, Ordering::Relaxed);
                continue;
            }
            let active = Arc::clone(&clients);
            std::thread::spawn(move || {
                // An error of a client concerns this client only.
                let _ = greet(&client);
                active.fetch_sub(1, Ordering::Relaxed);
            });
        }
        Ok(())
    }
}

fn greet(mut client: &TcpStream) -> io::Result<()> {
    client.set_read_timeout(Some(TIMEOUT))?;
    // Every path returns the same page, so only the end of the request head matters.
    let mut request = Vec::new();
    let mut chunk = [0; 1024];
    while !request.windows(4).any(|window| window == b"\r\n\r\n") && request.len() < 8192 {
        let read = client.read(&mut chunk)?;
        if read == 0 {
            break;
        }
        request.extend_from_slice(&chunk[..read]);
    }
    let body = format!(
        "<!doctype html>\n<title>tidegate</title>\n<h1>Hello from behind the tide gate</h1>\n\
         <p>You reached the container at {} and look like {} to it.</p>\n",
        client.local_addr()?,
        client.peer_addr()?
    );
    write!(
        client,
        "HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    )
}
