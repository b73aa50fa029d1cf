//! Responses to messages that are not plain queries, as classified by hickory. Pure.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use crate::message::{HEADER, Rcode, flag, short};
use hickory_server::net::xfer::Protocol;
use hickory_server::proto::op::{Edns, Metadata, OpCode, ResponseCode};
use hickory_server::proto::serialize::binary::BinEncoder;
use hickory_server::server::Request;
use hickory_server::zone_handler::MessageResponseBuilder;
use std::net::{Ipv4Addr, SocketAddr};

/// Appends the response to `message` to `out`. `None` if there is none: the message is itself a
/// response, which could cause a loop between two servers, or its header is incomplete.
pub(crate) fn refuse(message: &[u8], out: &mut Vec<u8>) -> Option<Rcode> {
    let flags = short(message, 2).filter(|_| message.len() >= HEADER)?;
    if flags & flag::RESPONSE != 0 {
        return None;
    }
    // hickory requires a client address and does not use it here.
    let unspecified = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0));
    let request = match Request::from_bytes(message.to_vec(), unspecified, Protocol::Udp) {
        // RFC 1035 section 4.1.1: "Not Implemented - The name server does not support the requested
        // kind of query." The message may be valid for that opcode.
        Err(_) if flags & flag::OPCODE == 0 => {
            return Some(bare(message, flags, Rcode::FormErr, out));
        }
        Err(_) => return Some(bare(message, flags, Rcode::NotImp, out)),
        Ok(request) => request,
    };
    let rcode = classify(&request);
    let mut metadata = Metadata::response_from_request(&request.metadata);
    metadata.recursion_available = true;
    metadata.response_code = response_code(rcode);
    // RFC 6891 section 6.1.1: a request with an OPT record gets a response with one.
    let edns = request.edns.as_ref().map(|_| {
        let mut edns = Edns::new();
        edns.set_max_payload(crate::message::PAYLOAD);
        edns.set_rcode_high((u16::from(metadata.response_code) >> 4) as u8);
        edns
    });
    let mut builder = MessageResponseBuilder::from_message_request(&request);
    if let Some(edns) = &edns {
        builder.edns(edns);
    }
    let mut encoded = Vec::new();
    let response = builder.build_no_records(metadata);
    match response.destructive_emit(&mut BinEncoder::new(&mut encoded)) {
        Ok(_) => out.extend(encoded),
        Err(_) => return Some(bare(message, flags, rcode, out)),
    }
    Some(rcode)
}

fn classify(request: &Request) -> Rcode {
    let version = request.edns.as_ref().map_or(0, Edns::version);
    if version > 0 {
        // RFC 6891 section 6.1.3: "If a responder does not implement the VERSION level of the
        // request, then it MUST respond with RCODE=BADVERS."
        Rcode::BadVers
    } else if request.metadata.op_code != OpCode::Query {
        Rcode::NotImp
    } else if request.queries.len() != 1 || !request.answers.is_empty() {
        // RFC 9619 section 4: "A DNS message with OPCODE = 0 and QDCOUNT > 1 MUST be treated as an
        // incorrectly formatted message."
        Rcode::FormErr
    } else {
        // A valid message that is not supported: another class than IN, a signature, or the SOA
        // record of a zone transfer.
        Rcode::Refused
    }
}

fn response_code(rcode: Rcode) -> ResponseCode {
    match rcode {
        Rcode::BadVers => ResponseCode::BADVERS,
        other => ResponseCode::from(0, other.to_wire() as u8),
    }
}

/// Writes a response of a header only, because the question cannot be parsed.
fn bare(message: &[u8], flags: u16, rcode: Rcode, out: &mut Vec<u8>) -> Rcode {
    let kept = flags & (flag::OPCODE | flag::RECURSION_DESIRED);
    let flags = kept | flag::RESPONSE | flag::RECURSION_AVAILABLE | rcode.to_wire();
    out.extend(&message[..2]);
    for word in [flags, 0, 0, 0, 0] {
        out.extend(word.to_be_bytes());
    }
    rcode
}

#[cfg(test)]
mod tests;
