use super::*;
use crate::message::{Bits, PAYLOAD, encode_query};
use hickory_server::proto::op::Message;

fn plain(edns: bool) -> Vec<u8> {
    let mut bytes = Vec::new();
    encode_query(0x1234, b"\x03web\0", 1, Bits { edns, ..Bits::default() }, &mut bytes);
    bytes
}

fn with(edns: bool, at: usize, byte: u8) -> Vec<u8> {
    let mut bytes = plain(edns);
    bytes[at] = byte;
    bytes
}

fn answer(message: &[u8]) -> (Option<Rcode>, Option<Message>) {
    let mut out = Vec::new();
    let rcode = refuse(message, &mut out);
    (rcode, (!out.is_empty()).then(|| Message::from_vec(&out).unwrap()))
}

#[test]
fn responses_and_incomplete_headers_get_no_response() {
    assert_eq!(answer(&with(false, 2, 0x81)), (None, None), "no loop between two servers");
    assert_eq!(answer(&plain(false)[..11]), (None, None));
    assert_eq!(answer(&[]), (None, None));
}

#[test]
fn each_unsupported_message_gets_its_code() {
    for (what, message, expected) in [
        ("RFC 1035 section 4.1.1: status", with(false, 2, 0x11), Rcode::NotImp),
        ("RFC 2136: update", with(false, 2, 0x29), Rcode::NotImp),
        ("RFC 1996: notify", with(false, 2, 0x21), Rcode::NotImp),
        ("an unassigned opcode", with(false, 2, 0x79), Rcode::NotImp),
        (
            "RFC 9619: two questions",
            [&with(false, 5, 2)[..], &plain(false)[12..]].concat(),
            Rcode::FormErr,
        ),
        (
            "no question",
            {
                let mut none = plain(false)[..12].to_vec();
                none[5] = 0;
                none
            },
            Rcode::FormErr,
        ),
        ("RFC 6891 section 6.1.3: version 1", with(true, 27, 1), Rcode::BadVers),
        ("class CH", with(false, 20, 3), Rcode::Refused),
        ("truncated", plain(false)[..18].to_vec(), Rcode::FormErr),
        ("a name that points to itself", with(false, 12, 0xc0), Rcode::FormErr),
    ] {
        let (rcode, message) = answer(&message);
        assert_eq!(rcode, Some(expected), "{what}");
        let message = message.unwrap();
        assert_eq!(message.metadata.id, 0x1234, "{what}");
        assert_eq!(u16::from(message.metadata.response_code) & 15, expected.to_wire(), "{what}");
    }
}

/// RFC 6891 section 9: BADVERS is 16, so its upper bits are in the OPT record.
#[test]
fn an_unsupported_edns_version_is_answered_in_version_0() {
    let (_, message) = answer(&with(true, 27, 1));
    let message = message.unwrap();
    let edns = message.edns.unwrap();
    assert_eq!((edns.version(), edns.rcode_high(), edns.max_payload()), (0, 1, PAYLOAD));
}

#[test]
fn the_opcode_is_checked_before_the_format() {
    let update = with(false, 2, 0x28);
    assert_eq!(
        answer(&update[..20]).0,
        Some(Rcode::NotImp),
        "the format of an update is not checked"
    );
}
