use super::*;
use crate::name::Name;
use hickory_server::proto::op::{Message, MessageType, ResponseCode};
use hickory_server::proto::rr::{RData, RecordType};

/// A query for `name`, with an OPT record of `payload` bytes if given.
pub(crate) fn query(name: &str, kind: u16, payload: Option<u16>) -> Vec<u8> {
    let mut bytes = Vec::new();
    let bits = Bits { edns: payload.is_some(), ..Bits::default() };
    encode_query(0x1234, Name::parse(name).unwrap().wire(), kind, bits, &mut bytes);
    if let Some(payload) = payload {
        let at = bytes.len() - OPT + 3;
        set_short(&mut bytes, at, payload);
    }
    // A stub resolver sets RD only.
    set_short(&mut bytes, 2, flag::RECURSION_DESIRED);
    bytes
}

fn encode(reply: &Reply<'_>, question: &[u8], limit: usize) -> Message {
    let mut out = vec![0xff; 3];
    reply.write(&Request::read(question).unwrap(), limit, &mut out);
    assert!(out.len() - 3 <= limit);
    Message::from_vec(&out[3..]).unwrap()
}

#[test]
fn a_plain_query_is_parsed_in_place() {
    let bytes = query("Web.Example", kind::A, None);
    let mut upper = bytes.clone();
    upper[13] = b'W';
    let request = Request::read(&upper).unwrap();
    assert_eq!((request.id, request.kind, request.edns), (0x1234, kind::A, None));
    assert_eq!(request.name(), b"\x03web\x07example\0");
    assert_eq!(&request.question[..4], b"\x03Web");
    let with_edns = query("web", kind::A, Some(1400));
    assert_eq!(
        Request::read(&with_edns).unwrap().edns,
        Some(Edns { payload: 1400, dnssec: false })
    );
}

#[test]
fn other_messages_are_not_parsed() {
    let plain = query("web", kind::A, Some(1232));
    let with = |at: usize, byte: u8| {
        let mut bytes = plain.clone();
        bytes[at] = byte;
        bytes
    };
    assert!(Request::read(&plain).is_some());
    for (what, bytes) in [
        ("a response", with(2, 0x81)),
        ("a status request", with(2, 0x11)),
        ("two questions", with(5, 2)),
        ("an answer section", with(7, 1)),
        ("a compressed name", with(12, 0xc0)),
        ("class CH", with(20, 3)),
        ("two additional records", with(11, 2)),
        ("an OPT record with a name", with(21, 1)),
        ("version 1", with(27, 1)),
        ("truncated", plain[..plain.len() - 1].to_vec()),
    ] {
        assert!(Request::read(&bytes).is_none(), "{what}");
    }
    for length in 0..plain.len() {
        assert!(Request::read(&plain[..length]).is_none());
    }
}

/// RFC 1035 section 4.1.1: "RD [...] is copied into the response". RFC 6891 section 6.1.1: "If an
/// OPT record is present in a received request, compliant responders MUST include an OPT record in
/// their respective responses."
#[test]
fn a_response_repeats_question_and_flags() {
    let answers = [Data::A([10, 9, 0, 2].into()), Data::A([10, 9, 0, 3].into())];
    let reply = Reply { answers: &answers, ttl: 5, ..Reply::code(Rcode::NoError) };
    let message = encode(&reply, &query("web", kind::A, None), 512);
    let head = &message.metadata;
    assert_eq!((head.id, head.message_type), (0x1234, MessageType::Response));
    assert!(
        head.recursion_desired
            && head.recursion_available
            && !head.authoritative
            && !head.truncation
    );
    assert_eq!(message.answers.len(), 2);
    assert_eq!((message.answers[0].name.to_ascii(), message.answers[0].ttl), ("web.".into(), 5));
    assert_eq!(message.answers[1].data, RData::A(Ipv4Addr::new(10, 9, 0, 3).into()));
    assert!(message.edns.is_none());
    let message = encode(&reply, &query("web", kind::A, Some(4096)), 512);
    assert_eq!(message.edns.unwrap().max_payload(), PAYLOAD);
}

/// RFC 2308 section 2.2: "NODATA is indicated by an answer with the RCODE set to NOERROR and no
/// relevant answers in the answer section." Section 5: the MINIMUM field of the SOA record is the
/// negative TTL.
#[test]
fn an_empty_response_has_an_soa_record_with_the_negative_ttl() {
    let nothing = Reply { zone: Some(4), ttl: 7, ..Reply::code(Rcode::NxDomain) };
    let message = encode(&nothing, &query("web.un1", kind::AAAA, None), 512);
    assert_eq!(message.metadata.response_code, ResponseCode::NXDomain);
    let [soa] = &message.authorities[..] else { panic!("one SOA") };
    let RData::SOA(data) = &soa.data else { panic!("an SOA") };
    assert_eq!((soa.name.to_ascii(), soa.ttl, data.minimum), ("un1.".into(), 7, 7));
    assert_eq!(
        (data.mname.to_ascii(), data.rname.to_ascii()),
        ("un1.".into(), "nobody.invalid.".into())
    );
    let root = Reply { zone: Some(8), ttl: 7, ..Reply::code(Rcode::NxDomain) };
    let message = encode(&root, &query("web.un1", kind::AAAA, Some(512)), 512);
    assert_eq!(message.authorities[0].name.to_ascii(), ".");
}

/// RFC 2181 section 9: "The TC bit should be set in responses only when an RRSet is required as a
/// part of the response, but could not be included in its entirety."
#[test]
fn records_that_do_not_fit_are_omitted_and_tc_is_set() {
    let answers: Vec<_> =
        (0..300_u32).map(|number| Data::A((0x0a09_0000 + number).into())).collect();
    let reply = Reply { answers: &answers, ttl: 5, ..Reply::code(Rcode::NoError) };
    for (payload, limit) in [(None, 512), (Some(1232), 1232), (Some(1232), 600)] {
        let message = encode(&reply, &query("web", kind::A, payload), limit);
        assert!(message.metadata.truncation);
        let room = limit - 12 - 9 - payload.map_or(0, |_| OPT);
        assert_eq!(message.answers.len(), room / 16);
        assert_eq!(message.edns.is_some(), payload.is_some());
    }
    let whole = encode(&reply, &query("web", kind::A, None), 65_535);
    assert!(!whole.metadata.truncation);
    assert_eq!(whole.answers.len(), 300);
}

/// RFC 8914 section 3: extended errors go to clients that sent an OPT record.
#[test]
fn a_refusal_has_an_extended_error_for_clients_with_edns() {
    let reply = Reply { extended: Some(18), ..Reply::code(Rcode::Refused) };
    let message = encode(&reply, &query("example.com", kind::A, Some(1232)), 512);
    assert_eq!(message.metadata.response_code, ResponseCode::Refused);
    assert!(message.edns.unwrap().option(15.into()).is_some());
    let message = encode(&reply, &query("example.com", kind::A, None), 512);
    assert!(message.edns.is_none());
}

#[test]
fn ptr_data_is_encoded_as_a_name() {
    let answers = [Data::Ptr(Name::parse("web.un1").unwrap().wire().into())];
    let reply = Reply { answers: &answers, ttl: 5, ..Reply::code(Rcode::NoError) };
    let message = encode(&reply, &query("2.0.9.10.in-addr.arpa", kind::PTR, None), 512);
    assert_eq!(message.answers[0].record_type(), RecordType::PTR);
    assert_eq!(message.answers[0].data.to_string(), "web.un1.");
}

#[test]
fn the_case_of_each_letter_is_independent() {
    let name = *b"\x041-Ab\x02zZ\0";
    let mixed = |random: u8| {
        let mut mixed = name;
        mix_case(&mut mixed, &[random; 32]);
        mixed
    };
    assert_eq!(mixed(0), name);
    assert_eq!(mixed(0xff), *b"\x041-aB\x02Zz\0");
    assert_eq!(mixed(0b1000), *b"\x041-ab\x02zZ\0");
    let mut long = [b'a'; 255];
    mix_case(&mut long, &[0x55; 32]);
    assert!(long.iter().enumerate().all(|(at, byte)| byte.is_ascii_uppercase() == (at % 2 == 0)));
}
