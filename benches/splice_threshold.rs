//! The read size from which splicing pays: `cargo bench --bench splice_threshold`, as root, about
//! two minutes.
//!
//! A client in one namespace sends messages of one size through `tidegate publish` to a server in
//! another, which responds to each with a byte. Every read of the proxy thus returns one message or
//! a part of it. Rounds alternate between a proxy that only copies and one that only splices. The
//! result is the CPU time of the proxy per message. `SPLICE_FROM` (proxy/src/tcp/mod.rs) should be
//! the size at which the two columns cross.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use tidegate_testbed::{Process, Protocol, Topology, addr, require_root};

/// Message sizes, in KiB.
const SIZES: [usize; 10] = [1, 4, 8, 16, 24, 32, 48, 64, 128, 256];

/// The variants by the value of the hidden option `--splice-from`: the title of the column, and the
/// published port.
const WAYS: [(&str, &str, u16); 2] = [("copied", "1000000000", 8081), ("spliced", "0", 8082)];

const ROUNDS: usize = 5;
const TIME: Duration = Duration::from_secs(1);
const SOON: Duration = Duration::from_secs(10);

fn main() {
    if !std::env::args().any(|argument| argument == "--bench") {
        println!("no measurement without --bench, which `cargo bench` passes");
        return;
    }
    require_root();
    let net = Topology::three();
    let listener =
        net.container.run(|| TcpListener::bind((addr::CONTAINER_V4, 80))).expect("listen");
    std::thread::spawn(move || {
        listener.incoming().flatten().for_each(|stream| serve(stream).expect("serve"));
    });
    let container = addr::CONTAINER_V4.to_string();
    let proxies = WAYS.map(|(_, from, port)| {
        let mut command = net.host.command(env!("CARGO_BIN_EXE_tidegate"));
        let port_spec = format!("{port}:80");
        command.args([
            "publish",
            &port_spec,
            "--to",
            &container,
            "--workers",
            "1",
            "--splice-from",
            from,
        ]);
        let proxy = Process::spawn(&mut command);
        net.host.wait_until_bound(Protocol::Tcp, port, SOON);
        proxy
    });

    println!(
        "{:>9}  {:>12}  {:>12}   us of CPU per message, median of {ROUNDS}",
        "bytes", WAYS[0].0, WAYS[1].0
    );
    for kib in SIZES {
        let size = kib << 10;
        let mut figures = [const { Vec::new() }; 2];
        for round in 0..ROUNDS {
            for turn in 0..WAYS.len() {
                let way = (round + turn) % WAYS.len();
                let to = SocketAddr::from((addr::HOST_V4, WAYS[way].2));
                let before = proxies[way].cpu_seconds();
                let messages = net.client.run(|| exchange(to, size)).expect("exchange messages");
                let used = proxies[way].cpu_seconds() - before;
                figures[way].push(used * 1e6 / messages as f64);
            }
        }
        let [copied, spliced] = figures.map(|mut figures| {
            figures.sort_by(f64::total_cmp);
            figures[ROUNDS / 2]
        });
        println!("{size:>9}  {copied:>12.1}  {spliced:>12.1}");
    }
}

/// Sends messages of `size` bytes for [`TIME`], each after the response to the previous one.
/// Returns their number.
fn exchange(to: SocketAddr, size: usize) -> io::Result<u64> {
    let mut stream = TcpStream::connect_timeout(&to, SOON)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(SOON))?;
    stream.write_all(&(size as u64).to_be_bytes())?;
    let message = vec![b'.'; size];
    let start = Instant::now();
    let mut messages = 0;
    while start.elapsed() < TIME {
        stream.write_all(&message)?;
        stream.read_exact(&mut [0])?;
        messages += 1;
    }
    Ok(messages)
}

/// Responds to the messages of one connection, which begins with their size.
fn serve(mut stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut size = [0; 8];
    stream.read_exact(&mut size)?;
    let mut message = vec![0; u64::from_be_bytes(size) as usize];
    loop {
        match stream.read_exact(&mut message) {
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(()),
            result => result?,
        }
        stream.write_all(b"!")?;
    }
}
