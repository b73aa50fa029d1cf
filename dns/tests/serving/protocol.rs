//! Protocol edge cases.

use crate::support::client::{query, read, summary, with_edns, write};
use crate::support::{Container, TestBed};
use hickory_server::proto::op::{Message, MessageType, OpCode, ResponseCode};
use hickory_server::proto::rr::{DNSClass, RecordType};
use std::collections::BTreeMap;
use std::io::Write;
use std::time::{Duration, Instant};
use tidegate_testbed::Namespace;

fn scene() -> (TestBed, Container) {
    let bed = TestBed::new(Namespace::new(), "");
    bed.network("un1");
    bed.endpoint("un1", "web", &[], &["172.30.1.2"]);
    let container = bed.serve("web");
    (bed, container)
}

#[test]
fn unsupported_messages_get_their_response_code() {
    let (bed, client) = scene();
    let plain = || query(1, "web", RecordType::A);
    let code = |message: Message| client.ask_message(&message).metadata.response_code;
    let mut update = plain();
    update.metadata.op_code = OpCode::Update;
    assert_eq!(code(update), ResponseCode::NotImp);
    let mut notify = plain();
    notify.metadata.op_code = OpCode::Notify;
    assert_eq!(code(notify), ResponseCode::NotImp);
    let mut chaos = plain();
    chaos.queries[0].set_query_class(DNSClass::CH);
    assert_eq!(code(chaos), ResponseCode::Refused);
    assert_eq!(code(query(1, "web", RecordType::AXFR)), ResponseCode::Refused);
    let mut two = plain();
    two.queries.push(two.queries[0].clone());
    assert_eq!(code(two), ResponseCode::FormErr);
    let mut future = with_edns(plain(), 1232);
    future.edns.as_mut().unwrap().set_version(1);
    let answer = client.ask_message(&future);
    assert_eq!(u16::from(answer.metadata.response_code), 16, "BADVERS");
    assert_eq!(answer.edns.unwrap().version(), 0);
    assert_eq!(summary(&client.ask("web", RecordType::A)), "172.30.1.2");
    let page = bed.page();
    assert!(
        page.contains(
            "tidegate_dns_queries_total{network=\"un1\",qtype=\"other\",rcode=\"NOTIMP\"} 2"
        ),
        "{page}"
    );
    assert!(
        page.contains(
            "tidegate_dns_queries_total{network=\"un1\",qtype=\"A\",rcode=\"NOERROR\"} 1"
        ),
        "{page}"
    );
}

#[test]
fn malformed_messages_get_formerr_and_responses_get_none() {
    let (_bed, client) = scene();
    let bytes = query(1, "web", RecordType::A).to_vec().unwrap();
    let answer = client.send(&bytes[..bytes.len() - 2]).unwrap();
    assert_eq!((answer.len(), answer[3] & 15), (12, 1));
    let mut pointer = bytes.clone();
    pointer[12..14].copy_from_slice(&[0xc0, 12]);
    assert_eq!(client.send(&pointer).unwrap()[3] & 15, 1, "a name that points to itself");
    let mut answer = query(1, "web", RecordType::A);
    answer.metadata.message_type = MessageType::Response;
    let timeout = Duration::from_millis(200);
    for silent in [&answer.to_vec().unwrap()[..], &bytes[..11], b""] {
        let server = "127.0.0.11:53".parse().unwrap();
        assert_eq!(crate::support::client::send(&client.namespace, server, silent, timeout), None);
    }
    assert_eq!(summary(&client.ask("web", RecordType::A)), "172.30.1.2");
}

#[test]
fn a_name_can_have_three_hundred_addresses() {
    let (bed, client) = scene();
    for number in 0..300_u32 {
        let address = std::net::Ipv4Addr::from(0xac1e_0a00 + number).to_string();
        bed.endpoint("un1", &format!("c{number}"), &["crowd"], &[&address]);
    }
    let cut = client.ask("crowd", RecordType::A);
    assert!(cut.metadata.truncation);
    assert_eq!(cut.answers.len(), (512 - 12 - 11) / 16);
    let more = client.ask_message(&with_edns(query(1, "crowd", RecordType::A), 4096));
    assert!(more.metadata.truncation && more.answers.len() > 200);
    let mut stream = client.connect();
    write(&mut stream, &query(2, "crowd", RecordType::A));
    let whole = read(&mut stream).unwrap();
    assert!(!whole.metadata.truncation);
    assert_eq!(whole.answers.len(), 300);
}

/// RFC 7766 section 6.2.1.1: "clients SHOULD pipeline their queries"; section 7: servers "are
/// RECOMMENDED to support the preparing of responses in parallel and sending them out of order".
#[test]
fn pipelined_queries_are_answered_out_of_order() {
    use crate::support::upstream::Mode;
    let (bed, upstream) = TestBed::with_upstream();
    bed.network("un1");
    bed.endpoint("un1", "web", &[], &["172.30.1.2"]);
    let client = bed.serve("web");
    upstream.set_mode(Mode::Slow(Duration::from_millis(300)));
    let mut stream = client.connect();
    let mut all = Vec::new();
    for id in 0..200_u16 {
        let name = if id % 2 == 0 { format!("{id}.example") } else { "web".to_owned() };
        let bytes = query(id, &name, RecordType::A).to_vec().unwrap();
        all.extend((bytes.len() as u16).to_be_bytes());
        all.extend(bytes);
    }
    stream.write_all(&all).unwrap();
    let answers: Vec<_> = (0..200).map(|_| read(&mut stream).unwrap()).collect();
    let by_id: BTreeMap<_, _> =
        answers.iter().map(|answer| (answer.metadata.id, summary(answer))).collect();
    assert_eq!(by_id.len(), 200);
    assert!(
        by_id
            .iter()
            .all(|(id, summary)| summary == if id % 2 == 0 { "192.0.2.1" } else { "172.30.1.2" })
    );
    assert_eq!(answers[0].metadata.id, 1, "local responses come first");
}

#[test]
fn a_half_closed_client_gets_its_responses() {
    let (_bed, client) = scene();
    let mut stream = client.connect();
    write(&mut stream, &query(1, "web", RecordType::A));
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(summary(&read(&mut stream).unwrap()), "172.30.1.2");
    assert!(read(&mut stream).is_err(), "then the connection is closed");
}

#[test]
fn a_local_response_takes_less_than_a_millisecond() {
    let (_bed, client) = scene();
    let socket = client.namespace.run(|| std::net::UdpSocket::bind("127.0.0.1:0").unwrap());
    socket.connect("127.0.0.11:53").unwrap();
    let query = query(1, "web", RecordType::A).to_vec().unwrap();
    let mut times = Vec::new();
    let start = Instant::now();
    // 1,000 queries per second for two seconds.
    for number in 1..=2_000_u32 {
        let sent = Instant::now();
        socket.send(&query).unwrap();
        let mut buffer = [0; 512];
        socket.recv(&mut buffer).unwrap();
        times.push(sent.elapsed());
        std::thread::sleep(
            (start + number * Duration::from_millis(1)).saturating_duration_since(Instant::now()),
        );
    }
    times.sort_unstable();
    let (half, most) = (times[times.len() / 2], times[times.len() * 99 / 100]);
    println!("median {half:?}, p99 {most:?}");
    // The machine is shared with other tests, so only the median is checked; the benchmark checks
    // p99.
    assert!(half < Duration::from_millis(1), "{half:?}");
}
