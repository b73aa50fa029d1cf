use super::*;
use crate::message::{Bits, Request, question, relay};
use hickory_server::proto::op::{Edns, MessageType, OpCode, Query, ResponseCode};
use hickory_server::proto::rr::rdata::SOA;
use hickory_server::proto::rr::{Name, RData, Record as Rr, RecordType};

const NAME: &[u8] = b"\x03web\x07example\0";

fn asked() -> Asked {
    Asked { id: 7, name: NAME.into(), kind: kind::A, exact: false }
}

/// An answer to `web.example`, with records of these TTLs.
fn message(rcode: ResponseCode, ttls: &[u32], soa: Option<(u32, u32)>) -> Message {
    let name = Name::from_ascii("WEB.example.").unwrap();
    let mut message = Message::new(7, MessageType::Response, OpCode::Query);
    message.metadata.response_code = rcode;
    message.add_query(Query::query(name.clone(), RecordType::A));
    for (number, ttl) in ttls.iter().enumerate() {
        let data = RData::A(std::net::Ipv4Addr::new(192, 0, 2, number as u8).into());
        message.add_answer(Rr::from_rdata(name.clone(), *ttl, data));
    }
    if let Some((ttl, minimum)) = soa {
        let zone = Name::from_ascii("example.").unwrap();
        let data = SOA::new(zone.clone(), zone.clone(), 1, 2, 3, 4, minimum);
        message.add_authority(Rr::from_rdata(zone, ttl, RData::SOA(data)));
    }
    message
}

fn read(message: &Message) -> Reading {
    asked().read(&message.to_vec().unwrap())
}

fn taken(message: &Message) -> Answer {
    match read(message) {
        Reading::Answer(answer) => answer,
        other => panic!("{other:?}"),
    }
}

/// RFC 5452 section 9.1: responses are matched to "Query ID", "Query name", "Query class and type".
#[test]
fn what_is_no_answer_to_the_question_is_none() {
    let good = message(ResponseCode::NoError, &[60], None);
    assert!(matches!(read(&good), Reading::Answer(_)), "names have no case");
    let bytes = good.to_vec().unwrap();
    for (what, at, byte) in [
        ("number", 1, 8),
        ("a question", 2, 0),
        ("name", 14, b'x'),
        ("type", 26, 28),
        ("class", 28, 3),
        ("another question", 5, 0),
    ] {
        let mut bytes = bytes.clone();
        bytes[at] = byte;
        assert_eq!(asked().read(&bytes), Reading::Other, "{what}");
    }
    assert_eq!(asked().read(&bytes[..11]), Reading::Other);
    assert_eq!(asked().read(&bytes[..bytes.len() - 1]), Reading::Malformed);
}

#[test]
fn what_cannot_be_an_answer_is_told_apart() {
    let mut cut = message(ResponseCode::NoError, &[60], None);
    cut.metadata.truncation = true;
    assert_eq!(read(&cut), Reading::Truncated);
    assert_eq!(read(&message(ResponseCode::FormErr, &[], None)), Reading::NotUnderstood);
    let mut bare = message(ResponseCode::NotImp, &[], None);
    bare.queries.clear();
    assert_eq!(read(&bare), Reading::NotUnderstood, "it cannot repeat what it cannot read");
    assert!(taken(&message(ResponseCode::ServFail, &[], None)).is_failure());
    assert!(taken(&message(ResponseCode::Refused, &[], None)).is_failure());
    assert!(!taken(&message(ResponseCode::NXDomain, &[], None)).is_failure());
}

/// RFC 2308 section 3: "The TTL of this record is set from the minimum of the MINIMUM field of the
/// SOA record and the TTL of the SOA itself".
#[test]
fn answers_are_kept_for_as_long_as_they_say() {
    use ResponseCode::{NXDomain, NoError, ServFail};
    for (rcode, ttls, soa, kept) in [
        (NoError, &[60, 30][..], None, 30),
        (NoError, &[100_000], None, LONGEST),
        (NoError, &[0], None, 0),
        (NoError, &[], Some((50, 20)), 20),
        (NXDomain, &[], Some((20, 50)), 20),
        (NXDomain, &[], Some((90_000, 90_000)), LONGEST_NEGATIVE),
        (NXDomain, &[10], Some((20, 50)), 10),
        (NXDomain, &[], None, 0),
        (NoError, &[], None, 0),
        (ServFail, &[], None, 1),
    ] {
        assert_eq!(taken(&message(rcode, ttls, soa)).keep, kept, "{rcode} {ttls:?} {soa:?}");
    }
}

#[test]
fn an_answer_reaches_the_client_older_and_without_the_opt_record() {
    let mut given = message(ResponseCode::NoError, &[60, 5], Some((90, 1)));
    given.metadata.authentic_data = true;
    let mut edns = Edns::new();
    edns.set_max_payload(4096);
    given.set_edns(edns);
    let answer = taken(&given);
    let mut bytes = Vec::new();
    question(9, b"\x03wEb\x07exAmple\0", kind::A, Bits::default(), &mut bytes);
    let request = Request::read(&bytes).unwrap();
    let mut out = vec![1; 5];
    relay(&request, &answer.given(Duration::from_secs(10)), 512, &mut out);
    let passed = Message::from_vec(&out[5..]).unwrap();
    assert_eq!(passed.metadata.id, 9);
    assert_eq!(passed.queries[0].name().to_string(), "wEb.exAmple.");
    assert_eq!(passed.answers.iter().map(|record| record.ttl).collect::<Vec<_>>(), [50, 0]);
    assert_eq!(passed.authorities[0].ttl, 80);
    assert!(passed.edns.is_none());
    assert!(passed.metadata.authentic_data, "our question asks for it");
    assert_eq!(passed.answers[0].data, given.answers[0].data);

    let mut with_edns = Vec::new();
    question(9, NAME, kind::A, Bits { edns: true, ..Bits::default() }, &mut with_edns);
    let request = Request::read(&with_edns).unwrap();
    out.clear();
    relay(&request, &answer.given(Duration::ZERO), 512, &mut out);
    assert_eq!(
        Message::from_vec(&out).unwrap().edns.unwrap().max_payload(),
        crate::message::PAYLOAD
    );
    out.clear();
    relay(&request, &answer.given(Duration::ZERO), 80, &mut out);
    let cut = Message::from_vec(&out).unwrap();
    assert!(cut.metadata.truncation && cut.answers.is_empty() && cut.edns.is_some());
}

/// draft-vixie-dnsext-dns0x20-00: the response repeats the question bit by bit.
#[test]
fn an_answer_in_another_case_than_the_question_is_told_apart() {
    let mixed = Asked { name: b"\x03wEb\x07exAmple\0"[..].into(), exact: true, ..asked() };
    let message = |name: &str| {
        let mut message = message(ResponseCode::NoError, &[60], None);
        message.queries[0].name = Name::from_ascii(name).unwrap();
        message.to_vec().unwrap()
    };
    assert!(matches!(mixed.read(&message("wEb.exAmple.")), Reading::Answer(_)));
    for name in ["web.example.", "WEB.EXAMPLE.", "wEb.example."] {
        assert_eq!(mixed.read(&message(name)), Reading::CaseChanged, "{name}");
        assert!(!mixed.has_same_case(&message(name)));
    }
    assert!(mixed.has_same_case(&message("wEb.exAmple.")));
    assert_eq!(mixed.read(&message("wEb.exAmplf.")), Reading::Other);
    let mut cut = message("web.example.");
    cut[2] |= 2;
    assert_eq!(mixed.read(&cut), Reading::CaseChanged, "the bit for TCP is no way around it");
}

/// Some servers write the owner out instead of pointing to the question.
#[test]
fn the_random_case_of_a_question_does_not_reach_the_client() {
    let name = b"\x03wEb\x07exAmple\0";
    let head = [0, 7, 0x81, 0x80, 0, 1, 0, 1, 0, 0, 0, 0];
    let record = [0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 192, 0, 2, 1];
    let message = [&head[..], name, &[0, 1, 0, 1], name, &record].concat();
    let asked = Asked { name: name[..].into(), exact: true, ..asked() };
    let Reading::Answer(answer) = asked.read(&message) else { panic!("no answer") };
    assert_eq!(answer.body[..NAME.len()], *NAME);
}
