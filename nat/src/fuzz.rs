//! Checks of the fuzz targets as plain functions, so that an ordinary test can replay a corpus. Not
//! part of the public interface.

use crate::engine::{Engine, Secrets};
use crate::forward::{Forward, ForwardId, ForwardSource};
use crate::host::{
    Arrival, Batch, DatagramKind, Destination, Host, Port, Ready, ReceiveBuffer, SendOutcome,
    SocketError,
};
use crate::layer2::{self, Layer2, Layer2Options, Layer2V6};
use crate::metrics::Stats;
use crate::settings::Settings;
use crate::siphash::HashKey;
use crate::wire::ethernet;
use crate::wire::icmp::IcmpError;
use crate::wire::ip::Packet;
use crate::wire::virtio::VirtioHeader;
use std::io::{self, IoSlice};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tidegate_model::MacAddress;
use tidegate_model::Protocol;
use tidegate_reactor::{Key, StreamIngress};

/// A host with results that the fuzzer determines.
#[derive(Default)]
struct Fuzzed {
    keys: Vec<Key>,
    ports: Vec<Key>,
    /// Bytes that determine the results of the next calls.
    results: Vec<u8>,
    /// Bytes in the receive queue of each stream.
    waiting: Vec<usize>,
}

impl Fuzzed {
    fn next_result(&mut self) -> u8 {
        self.results.pop().unwrap_or(0)
    }

    fn watch(&mut self, key: Key) {
        if self.keys.len() < 64 {
            self.keys.push(key);
        }
    }
}

#[derive(Default)]
struct Answers(Vec<Vec<u8>>);

impl Batch for Answers {
    fn len(&self) -> usize {
        self.0.len()
    }

    fn get(&self, index: usize) -> (&[u8], usize) {
        (&self.0[index], self.0[index].len().clamp(1, 1200))
    }

    fn source(&self, index: usize) -> Option<SocketAddr> {
        Some(SocketAddr::from(([192, 0, 2, index as u8], 5000)))
    }

    fn arrival(&self, index: usize) -> Arrival {
        let local = Some(IpAddr::from([198, 51, 100, index as u8 / 2]));
        Arrival { local, destination: local, to_group: false, interface: 1 }
    }
}

impl Host for Fuzzed {
    type Stream = usize;
    type Datagrams = ();
    type Listener = ();
    type Batch = Answers;

    fn emit(&mut self, head: &[u8], payload: &[IoSlice<'_>]) -> bool {
        let payload: Vec<u8> = payload.iter().flat_map(|piece| piece.iter().copied()).collect();
        let frame = [head, &payload].concat();
        let (_, packet) = VirtioHeader::parse(&frame).expect("written frames have a virtio header");
        let parsed = Packet::parse(packet).expect("written frames contain a packet");
        assert_eq!(parsed.header.len() + parsed.payload.len(), packet.len());
        true
    }

    fn is_local(&self, ip: IpAddr) -> bool {
        ip.is_loopback()
    }

    fn connect(&mut self, _to: SocketAddr) -> io::Result<usize> {
        match self.next_result() % 8 {
            7 => Err(io::Error::from_raw_os_error(libc::ENETUNREACH)),
            6 => Err(io::Error::from_raw_os_error(libc::EMFILE)),
            _ => {
                self.waiting.push(0);
                Ok(self.waiting.len() - 1)
            }
        }
    }

    fn watch_stream(&mut self, _stream: &mut usize, key: Key) -> io::Result<Ready> {
        self.watch(key);
        Ok(Ready { writable: self.next_result().is_multiple_of(2), ..Ready::default() })
    }

    fn watch_port(&mut self, _port: &Port<(), ()>, key: Key) -> io::Result<()> {
        if !self.ports.contains(&key) {
            self.ports.push(key);
        }
        Ok(())
    }

    fn ignore_port(&mut self, _port: &Port<(), ()>) {}

    fn accept(&mut self, _listener: &mut ()) -> io::Result<(usize, SocketAddr)> {
        let choice = self.next_result();
        match choice % 8 {
            0 => Err(io::ErrorKind::WouldBlock.into()),
            6 => Err(io::Error::from_raw_os_error(libc::EMFILE)),
            7 => Err(io::ErrorKind::ConnectionAborted.into()),
            _ => {
                self.waiting.push(usize::from(choice) * 10);
                Ok((self.waiting.len() - 1, SocketAddr::from(([192, 0, 2, choice / 64], 5000))))
            }
        }
    }

    fn ingress(&self, _stream: &usize) -> Option<StreamIngress> {
        None
    }

    fn connect_result(&mut self, _stream: &usize) -> io::Result<()> {
        if self.next_result() % 4 == 3 {
            Err(io::ErrorKind::ConnectionRefused.into())
        } else {
            Ok(())
        }
    }

    fn send(&mut self, _stream: &mut usize, bytes: &[u8]) -> io::Result<usize> {
        match self.next_result() % 8 {
            7 => Err(io::ErrorKind::ConnectionReset.into()),
            6 => Err(io::ErrorKind::WouldBlock.into()),
            5 => Ok(bytes.len().div_ceil(2)),
            _ => Ok(bytes.len()),
        }
    }

    fn set_receive_buffer(&mut self, _stream: &mut usize, _size: ReceiveBuffer) {}

    fn peek(&mut self, stream: &mut usize, offset: usize, into: &mut [u8]) -> io::Result<usize> {
        let choice = self.next_result();
        let waiting = &mut self.waiting[*stream];
        assert!(offset <= *waiting, "peek beyond the end of the queue");
        if choice % 8 == 7 {
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        if offset == *waiting {
            match choice % 4 {
                3 => return Ok(0),
                2 => *waiting += usize::from(choice) * 100,
                _ => return Err(io::ErrorKind::WouldBlock.into()),
            }
        }
        let seen = (*waiting - offset).min(into.len());
        if seen == 0 { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(seen) }
    }

    fn discard(&mut self, stream: &mut usize, length: usize) -> io::Result<()> {
        assert!(length <= self.waiting[*stream], "discard beyond the end of the queue");
        self.waiting[*stream] -= length;
        Ok(())
    }

    fn shutdown(&mut self, _stream: &mut usize) {}

    fn abort(&mut self, _stream: usize) {}

    fn open(&mut self, _kind: DatagramKind, _to: SocketAddr) -> io::Result<()> {
        if self.next_result() % 8 == 7 {
            Err(io::Error::from_raw_os_error(libc::EMFILE))
        } else {
            Ok(())
        }
    }

    fn watch_datagrams(&mut self, _socket: &(), key: Key) -> io::Result<()> {
        self.watch(key);
        Ok(())
    }

    fn send_gso_batch(
        &mut self,
        _: &mut (),
        _: Option<Destination>,
        _: &[u8],
        _: usize,
        _: bool,
        _: Option<u8>,
    ) -> SendOutcome {
        match self.next_result() % 8 {
            7 => SendOutcome::TooBig(1280),
            6 => SendOutcome::Unreachable(IcmpError::HostUnreachable),
            5 => SendOutcome::NoRoom,
            _ => SendOutcome::Sent,
        }
    }

    fn receive(&mut self, _socket: &mut (), batch: &mut Answers) -> io::Result<usize> {
        let choice = usize::from(self.next_result());
        if choice % 3 == 0 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        batch.0 = vec![vec![0; choice * 17]; choice % 5 + 1];
        Ok(batch.0.len())
    }

    fn next_socket_error(&mut self, _socket: &mut ()) -> Option<SocketError> {
        let payload = vec![0; 20];
        (self.next_result() % 4 == 3).then_some(SocketError {
            icmp_error: IcmpError::PortUnreachable,
            offender: None,
            destination: Some(SocketAddr::from(([192, 0, 2, 1], 5000))),
            payload,
        })
    }
}

/// Frames, socket events and time in any order: the engine does not panic, writes only valid
/// packets, and exceeds no limit.
///
/// The input is a sequence of steps: a byte that selects the action, and its arguments. A frame is
/// preceded by its length in two bytes.
pub fn check_engine(mut data: &[u8]) {
    let start = Instant::now();
    let mut settings = Settings::new(1500);
    settings.limits.flows = 16;
    settings.limits.sources = 8;
    settings.limits.held_bytes = 1 << 20;
    settings.policy.gateways = vec![IpAddr::from([10, 0, 2, 2])];
    let secrets = Secrets { table: HashKey([1, 2]), sequence: HashKey([3, 4]) };
    let mut engine =
        Engine::new(Fuzzed::default(), settings, secrets, Arc::new(Stats::default()), start);
    let mut now = start;
    let guest = SocketAddr::from(([10, 0, 2, 100], 80));
    let listen = SocketAddr::from(([0, 0, 0, 0], 80));
    for (id, protocol, source, port) in [
        (1, Protocol::Tcp, ForwardSource::Client, Port::Tcp(())),
        (2, Protocol::Tcp, ForwardSource::Gateway, Port::Tcp(())),
        (3, Protocol::Udp, ForwardSource::Client, Port::Udp(())),
    ] {
        let forward = Forward { protocol, listen, guest, source };
        let published = engine.publish(ForwardId(id), forward, port, None, Arc::default());
        published.expect("watching cannot fail here");
    }
    while let [step, rest @ ..] = data {
        data = rest;
        match step % 8 {
            4 | 5 => {
                let Some(([which, choice], rest)) = data.split_first_chunk::<2>() else { break };
                data = rest;
                engine.host_mut().results = vec![
                    *choice,
                    choice.rotate_left(3),
                    choice.rotate_left(5),
                    choice.rotate_left(1),
                ];
                let ports = &engine.host_mut().ports;
                let port = ports[usize::from(*which) % ports.len()];
                let error = *which >= 128;
                engine.port_ready(port, Ready { readable: true, error, ..Ready::default() }, now);
            }
            0 | 1 => {
                let Some((length, rest)) = data.split_first_chunk::<2>() else { break };
                let length = usize::from(u16::from_be_bytes(*length)).min(rest.len());
                let (frame, rest) = rest.split_at(length);
                data = rest;
                engine.frame(frame, now);
            }
            2 | 6 => {
                let Some(([which, how, choice], rest)) = data.split_first_chunk::<3>() else {
                    break;
                };
                data = rest;
                engine.host_mut().results =
                    vec![*choice, choice.rotate_left(3), *choice, choice.rotate_left(6)];
                let keys = &engine.host_mut().keys;
                let key = keys.get(usize::from(*which) % keys.len().max(1)).copied();
                let [readable, writable, error, more] = [1, 2, 4, 8].map(|bit| how & bit != 0);
                if let Some(key) = key {
                    engine.ready(key, Ready { readable, writable, error, more }, now);
                }
            }
            _ => {
                let Some(([time], rest)) = data.split_first_chunk::<1>() else { break };
                data = rest;
                now += Duration::from_millis(1 << (time % 24));
                engine.handle_timeout(now);
            }
        }
        engine.flush(now);
        for _ in 0..64 {
            if !engine.turn(now) {
                break;
            }
        }
        assert!(engine.flows() <= 16);
    }
    engine.shutdown();
    assert_eq!(engine.flows(), 0);
}

/// Ethernet frames of a hostile guest, each preceded by its length in two bytes. Every reply is a
/// complete frame, and a packet that is passed on loses only its Ethernet header.
pub fn check_layer2(data: &[u8]) {
    let options = Layer2Options {
        network: ipnet::Ipv4Net::new_assert(Ipv4Addr::new(10, 0, 2, 0), 24),
        gateway: Ipv4Addr::new(10, 0, 2, 2),
        name_server: Some(Ipv4Addr::new(10, 0, 2, 3)),
        v6: Some(Layer2V6 {
            prefix: Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 0),
            gateway: Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 2),
            name_server: None,
        }),
        mac: None,
    };
    let mut layer2 = Layer2::new(options, MacAddress([2, 0, 0, 0, 0, 1]), 1500);
    let mut rest = data;
    while let Some((length, behind)) = rest.split_first_chunk::<2>() {
        let length = usize::from(u16::from_be_bytes(*length)).min(behind.len());
        let (frame, behind) = behind.split_at(length);
        rest = behind;
        let mut frame = frame.to_vec();
        let mut answers = 0;
        let passed = layer2.receive(&mut frame, |answer| {
            answers += 1;
            assert!(answer.len() > layer2::HEAD, "a reply without content");
        });
        if let Some(packet) = passed {
            assert_eq!((answers, packet.len()), (0, length - ethernet::LENGTH));
            let _ = layer2.header(&packet[crate::wire::virtio::LENGTH..]);
        }
        assert!(answers <= 1);
    }
}
