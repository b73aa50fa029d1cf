//! TCP through the engine, with a real kernel at both ends.

mod common;

use common::{Net, Options, server};
use std::net::{Shutdown, TcpStream};
use std::time::Duration;
use tidegate_nat::Capabilities;
use tidegate_testbed::server::{Sink, Source};
use tidegate_testbed::transfer::{self, Transfer};

const MUCH: u64 = 200 << 20;
const PATIENCE: Duration = Duration::from_secs(60);

/// Carries `bytes` up and down, over both families, and checks each of them.
fn carries(net: &Net, bytes: u64) {
    for family in [0, 1] {
        let sink = Sink::tcp(&net.server, server(family, 7001), 3);
        let sent = net.container.run(|| {
            let mut stream = TcpStream::connect(sink.addr()).unwrap();
            transfer::send(&mut stream, 3, bytes).unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
            transfer::receive(&mut stream, 0)
        });
        assert_eq!(sent, Transfer::complete(0), "the server closes in its turn");
        assert_eq!(sink.wait(1, PATIENCE), [Transfer::complete(bytes)]);

        let source = Source::tcp(&net.server, server(family, 7002), 4, bytes);
        let received = net.container.run(|| {
            let mut stream = TcpStream::connect(source.addr()).unwrap();
            transfer::receive(&mut stream, 4)
        });
        assert_eq!(received, Transfer::complete(bytes));
    }
}

#[test]
fn two_hundred_megabytes_go_up_and_down() {
    carries(&Net::new(), MUCH);
}

#[test]
fn without_any_new_feature_of_the_kernel_too() {
    let options = Options { capabilities: Capabilities::NONE, ..Options::default() };
    carries(&Net::with(&options, |_| {}), MUCH);
}

#[test]
fn without_so_peek_off_too() {
    let capabilities = Capabilities { peek_offset: false, ..Capabilities::ALL };
    carries(&Net::with(&Options { capabilities, ..Options::default() }, |_| {}), MUCH);
}
