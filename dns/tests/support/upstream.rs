//! A simulated upstream server that records the queries that it receives.

use hickory_server::proto::op::{Message, MessageType, ResponseCode};
use hickory_server::proto::rr::rdata::SOA;
use hickory_server::proto::rr::{Name, RData, Record, RecordType};
use std::collections::BinaryHeap;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tidegate_testbed::Namespace;

/// How the server responds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// At once: 192.0.2.1 for every name, except those that begin with `nx` (NXDOMAIN) or `many`
    /// (300 addresses).
    Good,
    /// Like `Good`, after a delay.
    Slow(Duration),
    /// No response.
    Silent,
    /// No response for names that contain this text; like `Good` for others.
    SilentAbout(&'static str),
    /// Responses with a wrong name, ID or type, followed by the right one.
    WrongThenRight,
    /// With this response code only.
    Fails(ResponseCode),
    /// Without EDNS support.
    NoEdns,
    /// With bytes that are not a DNS message.
    Garbage,
    /// With the name in lower case.
    LowerCase,
    /// With the name in lower case over UDP only.
    LowerCaseUdp,
    /// Eight wrong IDs over UDP, the limit of mismatches; like `Good` over TCP.
    WrongIds,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ReceivedQuery {
    /// The name in lower case.
    pub(crate) name: String,
    /// The name as received.
    pub(crate) name_as_sent: String,
    pub(crate) kind: String,
    pub(crate) tcp: bool,
    pub(crate) from: SocketAddr,
    pub(crate) id: u16,
    pub(crate) edns: bool,
}

struct State {
    mode: Mutex<Mode>,
    seen: Mutex<Vec<ReceivedQuery>>,
    ends: AtomicBool,
}

pub(crate) struct Upstream {
    state: Arc<State>,
    threads: Vec<JoinHandle<()>>,
}

/// Interval at which threads check whether to end.
const TICK: Duration = Duration::from_millis(5);

impl Upstream {
    pub(crate) fn start(namespace: &Namespace, address: &str) -> Self {
        let address: SocketAddr = address.parse().unwrap();
        let state = Arc::new(State {
            mode: Mutex::new(Mode::Good),
            seen: Mutex::default(),
            ends: AtomicBool::new(false),
        });
        let (udp, tcp) = namespace
            .run(|| (UdpSocket::bind(address).unwrap(), TcpListener::bind(address).unwrap()));
        // Room for a burst of 5,000 queries.
        socket2::SockRef::from(&udp).set_recv_buffer_size(8 << 20).unwrap();
        let _ = rustix::net::sockopt::set_socket_recv_buffer_size_force(&udp, 8 << 20);
        let (one, two) = (Arc::clone(&state), Arc::clone(&state));
        let threads = vec![
            std::thread::spawn(move || one.datagrams(&udp)),
            std::thread::spawn(move || two.streams(&tcp)),
        ];
        Self { state, threads }
    }

    pub(crate) fn set_mode(&self, mode: Mode) {
        *self.state.mode.lock().unwrap() = mode;
    }

    /// Takes the queries received since the last call, except liveness checks (`.`).
    pub(crate) fn seen(&self) -> Vec<ReceivedQuery> {
        let all = std::mem::take(&mut *self.state.seen.lock().unwrap());
        all.into_iter().filter(|seen| seen.name != ".").collect()
    }

    /// The names of these queries.
    pub(crate) fn names(&self) -> Vec<String> {
        self.seen().into_iter().map(|seen| seen.name).collect()
    }
}

impl Drop for Upstream {
    fn drop(&mut self) {
        self.state.ends.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// A delayed response. The earliest is the greatest.
#[derive(PartialEq, Eq)]
struct Later(Instant, Vec<u8>, SocketAddr);

impl Ord for Later {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        other.0.cmp(&self.0).then_with(|| self.1.cmp(&other.1))
    }
}

impl PartialOrd for Later {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl State {
    fn ends(&self) -> bool {
        self.ends.load(Ordering::Relaxed)
    }

    fn datagrams(&self, socket: &UdpSocket) {
        socket.set_read_timeout(Some(TICK)).unwrap();
        let mut later = BinaryHeap::new();
        let mut buffer = [0; 4096];
        while !self.ends() {
            if let Ok((length, from)) = socket.recv_from(&mut buffer) {
                let mode = *self.mode.lock().unwrap();
                for answer in self.answers(&buffer[..length], from, false, mode) {
                    match mode {
                        Mode::Slow(time) => later.push(Later(Instant::now() + time, answer, from)),
                        _ => drop(socket.send_to(&answer, from)),
                    }
                }
            }
            while later.peek().is_some_and(|one: &Later| one.0 <= Instant::now()) {
                let Later(_, answer, to) = later.pop().unwrap();
                let _ = socket.send_to(&answer, to);
            }
        }
    }

    fn streams(&self, listener: &TcpListener) {
        listener.set_nonblocking(true).unwrap();
        while !self.ends() {
            let Ok((mut stream, from)) = listener.accept() else {
                std::thread::sleep(TICK);
                continue;
            };
            stream.set_nonblocking(false).unwrap();
            stream.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
            let mut length = [0; 2];
            if stream.read_exact(&mut length).is_err() {
                continue;
            }
            let mut message = vec![0; usize::from(u16::from_be_bytes(length))];
            if stream.read_exact(&mut message).is_err() {
                continue;
            }
            let mode = *self.mode.lock().unwrap();
            for answer in self.answers(&message, from, true, mode) {
                let _ =
                    stream.write_all(&[&(answer.len() as u16).to_be_bytes()[..], &answer].concat());
            }
        }
    }

    fn answers(&self, message: &[u8], from: SocketAddr, tcp: bool, mode: Mode) -> Vec<Vec<u8>> {
        let asked = Message::from_vec(message).unwrap();
        let mut query = asked.queries[0].clone();
        let name_as_sent = query.name().to_string();
        if mode == Mode::LowerCase || mode == Mode::LowerCaseUdp && !tcp {
            query.name = query.name().to_lowercase();
        }
        let (name, kind) = (query.name().clone(), query.query_type());
        self.seen.lock().unwrap().push(ReceivedQuery {
            name: name_as_sent.to_lowercase(),
            name_as_sent,
            kind: kind.to_string(),
            tcp,
            from,
            id: asked.metadata.id,
            edns: asked.edns.is_some(),
        });
        let mut answer = Message::response(asked.metadata.id, asked.metadata.op_code);
        answer.metadata.recursion_available = true;
        answer.add_query(query);
        let text = name.to_string().to_lowercase();
        let zone = Name::from_ascii("upstream.test.").unwrap();
        let soa = SOA::new(zone.clone(), zone.clone(), 1, 2, 3, 4, 60);
        let soa = Record::from_rdata(zone, 60, RData::SOA(soa));
        let count = if text.starts_with("many") { 300 } else { 1 };
        if text.starts_with("nx") {
            answer.metadata.response_code = ResponseCode::NXDomain;
            answer.add_authority(soa);
        } else if kind == RecordType::A {
            for number in 1..=count {
                let data = RData::A(Ipv4Addr::from(0xc000_0200 + number).into());
                answer.add_answer(Record::from_rdata(name.clone(), 60, data));
            }
        } else {
            answer.add_authority(soa);
        }
        if count > 1 && !tcp {
            answer = answer.truncate();
            answer.metadata.truncation = true;
        }
        let bytes = |message: &Message| message.to_vec().unwrap();
        match mode {
            Mode::Good | Mode::Slow(_) | Mode::LowerCase | Mode::LowerCaseUdp => {
                vec![bytes(&answer)]
            }
            Mode::WrongIds if tcp => vec![bytes(&answer)],
            Mode::WrongIds => (1..=8)
                .map(|guess| {
                    let mut lie = answer.clone();
                    lie.metadata.id = lie.metadata.id.wrapping_add(guess);
                    bytes(&lie)
                })
                .collect(),
            Mode::SilentAbout(part) if !text.contains(part) => vec![bytes(&answer)],
            Mode::Silent | Mode::SilentAbout(_) => Vec::new(),
            Mode::Garbage => vec![[&bytes(&answer)[..30], &[0xff; 9]].concat()],
            Mode::NoEdns if asked.edns.is_some() => {
                answer.answers.clear();
                answer.metadata.response_code = ResponseCode::FormErr;
                vec![bytes(&answer)]
            }
            Mode::NoEdns => vec![bytes(&answer)],
            Mode::Fails(code) => {
                answer.answers.clear();
                answer.metadata.response_code = code;
                vec![bytes(&answer)]
            }
            Mode::WrongThenRight => {
                let lie = |change: &dyn Fn(&mut Message)| {
                    let mut lie = answer.clone();
                    lie.answers = vec![Record::from_rdata(
                        name.clone(),
                        60,
                        RData::A(Ipv4Addr::new(6, 6, 6, 6).into()),
                    )];
                    change(&mut lie);
                    bytes(&lie)
                };
                vec![
                    lie(&|lie| lie.metadata.id ^= 1),
                    lie(&|lie| lie.queries[0].name = Name::from_ascii("bank.test.").unwrap()),
                    lie(&|lie| lie.queries[0].query_type = RecordType::MX),
                    lie(&|lie| lie.metadata.message_type = MessageType::Query),
                    lie(&|lie| lie.queries[0].name = lie.queries[0].name.to_lowercase()),
                    bytes(&answer),
                ]
            }
        }
    }
}
