use super::*;
use crate::message::{Bits, Request, encode_query, relay};
use hickory_server::proto::op::{Edns, MessageType, OpCode, Query, ResponseCode};
use hickory_server::proto::rr::rdata::SOA;
use hickory_server::proto::rr::{Name, RData, Record as Rr, RecordType};

const NAME: &[u8] = b"\x03web\x07example\0";

fn asked() -> SentQuery {
    SentQuery { id: 7, name: NAME.into(), kind: kind::A, exact: false }
}

/// A response about `web.example` with A records of these TTLs, and an SOA record with this TTL and
/// MINIMUM.
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

fn read(message: &Message) -> Response {
    asked().read(&message.to_vec().unwrap())
}

fn accepted(message: &Message) -> Answer {
    match read(message) {
        Response::Answer(answer) => answer,
        other => panic!("{other:?}"),
    }
}

/// RFC 5452 section 9.1: responses are matched to "Query ID", "Query name", "Query class and type".
#[test]
fn unrelated_responses_are_rejected() {
    let good = message(ResponseCode::NoError, &[60], None);
    assert!(matches!(read(&good), Response::Answer(_)), "names are case-insensitive");
    let bytes = good.to_vec().unwrap();
    for (what, at, byte) in [
        ("ID", 1, 8),
        ("QR clear", 2, 0),
        ("name", 14, b'x'),
        ("type", 26, 28),
        ("class", 28, 3),
        ("no question", 5, 0),
    ] {
        let mut bytes = bytes.clone();
        bytes[at] = byte;
        assert_eq!(asked().read(&bytes), Response::Unrelated, "{what}");
    }
    assert_eq!(asked().read(&bytes[..11]), Response::Unrelated);
    assert_eq!(asked().read(&bytes[..bytes.len() - 1]), Response::Malformed);
}

#[test]
fn truncation_format_errors_and_failures_are_distinguished() {
    let mut cut = message(ResponseCode::NoError, &[60], None);
    cut.metadata.truncation = true;
    assert_eq!(read(&cut), Response::Truncated);
    assert_eq!(read(&message(ResponseCode::FormErr, &[], None)), Response::FormatError);
    let mut bare = message(ResponseCode::NotImp, &[], None);
    bare.queries.clear();
    assert_eq!(
        read(&bare),
        Response::FormatError,
        "a server that cannot parse the question cannot repeat it"
    );
    assert!(accepted(&message(ResponseCode::ServFail, &[], None)).is_failure());
    assert!(accepted(&message(ResponseCode::Refused, &[], None)).is_failure());
    assert!(!accepted(&message(ResponseCode::NXDomain, &[], None)).is_failure());
}

/// RFC 2308 section 3: "The TTL of this record is set from the minimum of the MINIMUM field of the
/// SOA record and the TTL of the SOA itself".
#[test]
fn the_lifetime_follows_ttls_and_the_soa_record() {
    use ResponseCode::{NXDomain, NoError, ServFail};
    for (rcode, ttls, soa, kept) in [
        (NoError, &[60, 30][..], None, 30),
        (NoError, &[100_000], None, MAX_TTL),
        (NoError, &[0], None, 0),
        (NoError, &[], Some((50, 20)), 20),
        (NXDomain, &[], Some((20, 50)), 20),
        (NXDomain, &[], Some((90_000, 90_000)), MAX_NEGATIVE_TTL),
        (NXDomain, &[10], Some((20, 50)), 10),
        (NXDomain, &[], None, 0),
        (NoError, &[], None, 0),
        (ServFail, &[], None, 1),
    ] {
        assert_eq!(accepted(&message(rcode, ttls, soa)).lifetime, kept, "{rcode} {ttls:?} {soa:?}");
    }
}

#[test]
fn a_relayed_answer_has_reduced_ttls_and_no_upstream_opt_record() {
    let mut given = message(ResponseCode::NoError, &[60, 5], Some((90, 1)));
    given.metadata.authentic_data = true;
    let mut edns = Edns::new();
    edns.set_max_payload(4096);
    given.set_edns(edns);
    let answer = accepted(&given);
    let mut bytes = Vec::new();
    encode_query(9, b"\x03wEb\x07exAmple\0", kind::A, Bits::default(), &mut bytes);
    let request = Request::read(&bytes).unwrap();
    let mut out = vec![1; 5];
    relay(&request, &answer.relayed(Duration::from_secs(10)), 512, &mut out);
    let passed = Message::from_vec(&out[5..]).unwrap();
    assert_eq!(passed.metadata.id, 9);
    assert_eq!(passed.queries[0].name().to_string(), "wEb.exAmple.");
    assert_eq!(passed.answers.iter().map(|record| record.ttl).collect::<Vec<_>>(), [50, 0]);
    assert_eq!(passed.authorities[0].ttl, 80);
    assert!(passed.edns.is_none());
    assert!(passed.metadata.authentic_data, "the query has AD set");
    assert_eq!(passed.answers[0].data, given.answers[0].data);

    let mut with_edns = Vec::new();
    encode_query(9, NAME, kind::A, Bits { edns: true, ..Bits::default() }, &mut with_edns);
    let request = Request::read(&with_edns).unwrap();
    out.clear();
    relay(&request, &answer.relayed(Duration::ZERO), 512, &mut out);
    assert_eq!(
        Message::from_vec(&out).unwrap().edns.unwrap().max_payload(),
        crate::message::PAYLOAD
    );
    out.clear();
    relay(&request, &answer.relayed(Duration::ZERO), 80, &mut out);
    let cut = Message::from_vec(&out).unwrap();
    assert!(cut.metadata.truncation && cut.answers.is_empty() && cut.edns.is_some());
}

/// draft-vixie-dnsext-dns0x20-00: the response repeats the question bit by bit.
#[test]
fn a_response_with_another_case_than_the_query_is_not_accepted() {
    let mixed = SentQuery { name: b"\x03wEb\x07exAmple\0"[..].into(), exact: true, ..asked() };
    let message = |name: &str| {
        let mut message = message(ResponseCode::NoError, &[60], None);
        message.queries[0].name = Name::from_ascii(name).unwrap();
        message.to_vec().unwrap()
    };
    assert!(matches!(mixed.read(&message("wEb.exAmple.")), Response::Answer(_)));
    for name in ["web.example.", "WEB.EXAMPLE.", "wEb.example."] {
        assert_eq!(mixed.read(&message(name)), Response::CaseChanged, "{name}");
        assert!(!mixed.has_same_case(&message(name)));
    }
    assert!(mixed.has_same_case(&message("wEb.exAmple.")));
    assert_eq!(mixed.read(&message("wEb.exAmplf.")), Response::Unrelated);
    let mut cut = message("web.example.");
    cut[2] |= 2;
    assert_eq!(mixed.read(&cut), Response::CaseChanged, "TC does not bypass the check");
}

/// Some servers repeat the owner name instead of a pointer to the question.
#[test]
fn the_random_case_of_a_query_is_not_relayed() {
    let name = b"\x03wEb\x07exAmple\0";
    let head = [0, 7, 0x81, 0x80, 0, 1, 0, 1, 0, 0, 0, 0];
    let record = [0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 192, 0, 2, 1];
    let message = [&head[..], name, &[0, 1, 0, 1], name, &record].concat();
    let asked = SentQuery { name: name[..].into(), exact: true, ..asked() };
    let Response::Answer(answer) = asked.read(&message) else { panic!("no answer") };
    assert_eq!(answer.body[..NAME.len()], *NAME);
}
