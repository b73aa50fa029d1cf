//! Parsing of queries in place and encoding of responses (RFC 1035 section 4, RFC 6891). Pure.
//!
//! Nearly every message is a plain query: one question of class IN, with at most an OPT record.
//! These are parsed here without allocation. All others go through the decoder of hickory; see
//! [`non_query`](crate::non_query).

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use crate::name::MAX_NAME;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

/// Size of a message header in bytes.
pub(crate) const HEADER: usize = 12;
/// Size of an OPT record without options in bytes.
const OPT: usize = 11;
/// Maximum UDP response to a client without EDNS, in bytes (RFC 1035 section 2.3.4).
pub(crate) const WITHOUT_EDNS: u16 = 512;
/// Advertised UDP payload size, and the maximum size of a UDP response across a network, in bytes:
/// fits the minimum MTU of IPv6, 1280 bytes.
pub(crate) const PAYLOAD: u16 = 1232;

/// Bits of the second 16-bit word of a header (RFC 1035 section 4.1.1, RFC 4035 section 3.1.6).
pub(crate) mod flag {
    pub(crate) const RESPONSE: u16 = 1 << 15;
    pub(crate) const OPCODE: u16 = 0xf << 11;
    pub(crate) const TRUNCATED: u16 = 1 << 9;
    pub(crate) const RECURSION_DESIRED: u16 = 1 << 8;
    pub(crate) const RECURSION_AVAILABLE: u16 = 1 << 7;
    pub(crate) const AUTHENTIC: u16 = 1 << 5;
    pub(crate) const CHECKING_DISABLED: u16 = 1 << 4;
    pub(crate) const RCODE: u16 = 0xf;
}

/// Record and query types (TYPE, QTYPE).
pub(crate) mod kind {
    pub(crate) const A: u16 = 1;
    pub(crate) const NS: u16 = 2;
    pub(crate) const CNAME: u16 = 5;
    pub(crate) const SOA: u16 = 6;
    pub(crate) const PTR: u16 = 12;
    pub(crate) const MX: u16 = 15;
    pub(crate) const TXT: u16 = 16;
    pub(crate) const AAAA: u16 = 28;
    pub(crate) const SRV: u16 = 33;
    pub(crate) const OPT: u16 = 41;
    pub(crate) const DS: u16 = 43;
    pub(crate) const DNSKEY: u16 = 48;
    pub(crate) const HTTPS: u16 = 65;
    pub(crate) const TKEY: u16 = 249;
    pub(crate) const MAILA: u16 = 254;
    pub(crate) const ANY: u16 = 255;
}

/// The class of the Internet.
pub(crate) const IN: u16 = 1;

/// Response codes (RFC 1035 section 4.1.1, RFC 6891 section 9).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rcode {
    NoError,
    FormErr,
    ServFail,
    NxDomain,
    NotImp,
    Refused,
    BadVers,
    /// Any other code of an upstream server.
    Other(u8),
}

impl Rcode {
    pub(crate) fn from_wire(code: u16) -> Self {
        match code & flag::RCODE {
            0 => Self::NoError,
            1 => Self::FormErr,
            2 => Self::ServFail,
            3 => Self::NxDomain,
            4 => Self::NotImp,
            5 => Self::Refused,
            other => Self::Other(other as u8),
        }
    }

    /// The four bits in the header. The upper bits of `BadVers` are in the OPT record.
    pub(crate) fn to_wire(self) -> u16 {
        match self {
            Self::NoError | Self::BadVers => 0,
            Self::FormErr => 1,
            Self::ServFail => 2,
            Self::NxDomain => 3,
            Self::NotImp => 4,
            Self::Refused => 5,
            Self::Other(code) => u16::from(code) & flag::RCODE,
        }
    }
}

/// A parsed plain query.
#[derive(Clone, Debug)]
pub(crate) struct Request<'a> {
    pub(crate) id: u16,
    pub(crate) flags: u16,
    /// Name, type and class in wire format, which the response repeats.
    pub(crate) question: &'a [u8],
    lower: [u8; MAX_NAME],
    pub(crate) kind: u16,
    pub(crate) edns: Option<Edns>,
}

/// Contents of an OPT record (RFC 6891 section 6.1.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Edns {
    /// Maximum UDP response that the client accepts, in bytes.
    pub(crate) payload: u16,
    /// The DO bit: the client requests DNSSEC records (RFC 3225).
    pub(crate) dnssec: bool,
}

/// The part of a request that is kept until there is a response.
#[derive(Clone, Debug)]
pub(crate) struct StoredRequest {
    id: u16,
    flags: u16,
    question: Box<[u8]>,
    edns: Option<Edns>,
}

impl StoredRequest {
    pub(crate) fn request(&self) -> Request<'_> {
        Request::of(self.id, self.flags, &self.question, self.edns)
    }
}

impl<'a> Request<'a> {
    /// Parses a plain query. `None` for any other message, malformed or not.
    pub(crate) fn read(message: &'a [u8]) -> Option<Self> {
        let id = short(message, 0)?;
        let flags = short(message, 2)?;
        let counts = (short(message, 4)?, short(message, 6)?, short(message, 8)?);
        if flags & (flag::RESPONSE | flag::OPCODE) != 0 || counts != (1, 0, 0) {
            return None;
        }
        let name_end = skip_plain_name(message, HEADER)?;
        let end = name_end + 4;
        if short(message, name_end + 2)? != IN {
            return None;
        }
        let mut edns = None;
        match short(message, 10)? {
            0 => {}
            1 => {
                let record = Record::read(message, end)?;
                // RFC 6891 section 6.1.2: "The domain name MUST be 0 (root domain)". The version is
                // the second byte of the TTL.
                if record.kind != kind::OPT
                    || record.owner_end != end + 1
                    || record.ttl >> 16 & 0xff != 0
                {
                    return None;
                }
                edns = Some(Edns { payload: record.class, dnssec: record.ttl & 0x8000 != 0 });
            }
            _ => return None,
        }
        Some(Self::of(id, flags, &message[HEADER..end], edns))
    }

    /// `question` is an uncompressed name, a type and a class.
    fn of(id: u16, flags: u16, question: &'a [u8], edns: Option<Edns>) -> Self {
        let (name, type_and_class) = question.split_at(question.len() - 4);
        let mut lower = [0; MAX_NAME];
        lower[..name.len()].copy_from_slice(name);
        lower.make_ascii_lowercase();
        let kind = u16::from_be_bytes([type_and_class[0], type_and_class[1]]);
        Self { id, flags, question, lower, kind, edns }
    }

    /// The part that is kept until there is a response.
    pub(crate) fn store(&self) -> StoredRequest {
        StoredRequest {
            id: self.id,
            flags: self.flags,
            question: self.question.into(),
            edns: self.edns,
        }
    }

    /// The name in lower case. Length bytes are below 64 and thus never letters.
    pub(crate) fn name(&self) -> &[u8] {
        &self.lower[..self.question.len() - 4]
    }

    /// Maximum size of a UDP response in bytes, for a server that sends at most `most`.
    pub(crate) fn limit(&self, most: u16) -> usize {
        let takes = self.edns.map_or(WITHOUT_EDNS, |edns| edns.payload.max(WITHOUT_EDNS));
        usize::from(takes.min(most))
    }

    /// The flags of the response that follow from the request.
    fn answer_flags(&self) -> u16 {
        let kept = self.flags & (flag::RECURSION_DESIRED | flag::CHECKING_DISABLED);
        kept | flag::RESPONSE | flag::RECURSION_AVAILABLE
    }
}

/// Record data of a local response.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Data {
    A(Ipv4Addr),
    Aaaa(Ipv6Addr),
    Ptr(Arc<[u8]>),
}

/// A local response: about a name of an endpoint, or a name that is not forwarded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Reply<'a> {
    pub(crate) rcode: Rcode,
    pub(crate) answers: &'a [Data],
    pub(crate) ttl: u32,
    /// Offset in the name at which the zone of the SOA record begins. The record limits negative
    /// caching (RFC 2308 section 3).
    pub(crate) zone: Option<usize>,
    /// The extended error code (RFC 8914).
    pub(crate) extended: Option<u16>,
}

impl Reply<'_> {
    /// A response with only a response code.
    pub(crate) fn code(rcode: Rcode) -> Self {
        Self { rcode, answers: &[], ttl: 0, zone: None, extended: None }
    }

    /// Appends the response to `request` to `out`, at most `limit` bytes. If records do not fit,
    /// they are omitted and TC is set.
    pub(crate) fn write(&self, request: &Request<'_>, limit: usize, out: &mut Vec<u8>) {
        let start = out.len();
        let extended = self.extended.filter(|_| request.edns.is_some());
        let tail = request.edns.map_or(0, |_| OPT + extended.map_or(0, |_| 6));
        let limit = limit.saturating_sub(tail);
        header(request, out);
        let mut written = 0_u16;
        let mut truncated = false;
        for data in self.answers {
            if out.len() - start + 12 + data.length() > limit {
                truncated = true;
                break;
            }
            // A pointer to the name of the question.
            out.extend([0xc0, HEADER as u8]);
            data.write(self.ttl, out);
            written += 1;
        }
        let authority = u16::from(self.zone.is_some());
        if let Some(zone) = self.zone {
            soa(request.name(), zone, self.ttl, out);
        }
        if request.edns.is_some() {
            opt(PAYLOAD, self.rcode, dnssec(request), extended, out);
        }
        let truncated = if truncated { flag::TRUNCATED } else { 0 };
        set_short(out, start + 2, request.answer_flags() | truncated | self.rcode.to_wire());
        set_short(out, start + 6, written);
        set_short(out, start + 8, authority);
    }
}

/// Appends an upstream response to `request` to `out`. If it exceeds `limit` bytes, all records are
/// omitted and TC is set.
pub(crate) fn relay(
    request: &Request<'_>,
    answer: &RelayedAnswer<'_>,
    limit: usize,
    out: &mut Vec<u8>,
) {
    let start = out.len();
    header(request, out);
    let mut flags = request.answer_flags() | answer.rcode.to_wire();
    // RFC 6840 section 5.8: AD only for clients that indicate support.
    if answer.authentic && (request.flags & flag::AUTHENTIC != 0 || dnssec(request)) {
        flags |= flag::AUTHENTIC;
    }
    let tail = if request.edns.is_some() { OPT } else { 0 };
    let mut counts = answer.counts;
    if out.len() - start + answer.body.len() + tail > limit {
        flags |= flag::TRUNCATED;
        counts = [0; 3];
    } else {
        let body = out.len();
        out.extend(answer.body);
        for at in answer.ttls {
            let at = body + usize::from(*at);
            let ttl = long(out, at).unwrap_or(0).saturating_sub(answer.age);
            out[at..at + 4].copy_from_slice(&ttl.to_be_bytes());
        }
    }
    if request.edns.is_some() {
        opt(PAYLOAD, answer.rcode, dnssec(request), None, out);
        counts[2] += 1;
    }
    set_short(out, start + 2, flags);
    for (number, count) in counts.into_iter().enumerate() {
        set_short(out, start + 6 + 2 * number, count);
    }
}

/// An upstream response for [`relay`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct RelayedAnswer<'a> {
    pub(crate) rcode: Rcode,
    pub(crate) authentic: bool,
    /// Record counts of the answer, authority and additional sections.
    pub(crate) counts: [u16; 3],
    /// The encoded records. Compression pointers in them are valid after a question of the same
    /// length as that of the request.
    pub(crate) body: &'a [u8],
    /// Offsets of TTLs in `body`.
    pub(crate) ttls: &'a [u16],
    /// Age in seconds.
    pub(crate) age: u32,
}

/// Randomises the case of each letter of `name` by the bits of `random`, so that a name of `n`
/// letters has 2^n forms ("0x20", draft-vixie-dnsext-dns0x20-00). Length bytes are below 64 and
/// thus never letters.
pub(crate) fn mix_case(name: &mut [u8], random: &[u8; 32]) {
    for (at, byte) in name.iter_mut().enumerate() {
        // A name has at most 255 bytes; there are 256 bits.
        if byte.is_ascii_alphabetic() && random[at / 8 % 32] >> (at % 8) & 1 == 1 {
            *byte ^= 0x20;
        }
    }
}

/// Appends an upstream query to `out`.
pub(crate) fn encode_query(id: u16, name: &[u8], kind: u16, bits: Bits, out: &mut Vec<u8>) {
    let checking = if bits.checking_disabled { flag::CHECKING_DISABLED } else { 0 };
    // RFC 6840 section 5.7: AD in a query requests AD in the response.
    let flags = flag::RECURSION_DESIRED | flag::AUTHENTIC | checking;
    for word in [id, flags, 1, 0, 0, u16::from(bits.edns)] {
        out.extend(word.to_be_bytes());
    }
    out.extend(name);
    out.extend(kind.to_be_bytes());
    out.extend(IN.to_be_bytes());
    if bits.edns {
        opt(PAYLOAD, Rcode::NoError, bits.dnssec, None, out);
    }
}

/// Flags of an upstream query.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Bits {
    pub(crate) edns: bool,
    pub(crate) dnssec: bool,
    pub(crate) checking_disabled: bool,
}

impl Bits {
    pub(crate) fn of(request: &Request<'_>) -> Self {
        let checking_disabled = request.flags & flag::CHECKING_DISABLED != 0;
        Self { edns: true, dnssec: dnssec(request), checking_disabled }
    }
}

fn dnssec(request: &Request<'_>) -> bool {
    request.edns.is_some_and(|edns| edns.dnssec)
}

impl Data {
    fn length(&self) -> usize {
        match self {
            Self::A(_) => 4,
            Self::Aaaa(_) => 16,
            Self::Ptr(name) => name.len(),
        }
    }

    fn write(&self, ttl: u32, out: &mut Vec<u8>) {
        let kind = match self {
            Self::A(_) => kind::A,
            Self::Aaaa(_) => kind::AAAA,
            Self::Ptr(_) => kind::PTR,
        };
        fixed(kind, ttl, self.length(), out);
        match self {
            Self::A(ip) => out.extend(ip.octets()),
            Self::Aaaa(ip) => out.extend(ip.octets()),
            Self::Ptr(name) => out.extend(&name[..]),
        }
    }
}

/// Appends the header and question of a response. Flags and counts are set later.
fn header(request: &Request<'_>, out: &mut Vec<u8>) {
    for word in [request.id, 0, 1, 0, 0, u16::from(request.edns.is_some())] {
        out.extend(word.to_be_bytes());
    }
    out.extend(request.question);
}

/// Appends the fields of a record between its owner name and its data.
fn fixed(kind: u16, ttl: u32, length: usize, out: &mut Vec<u8>) {
    out.extend(kind.to_be_bytes());
    out.extend(IN.to_be_bytes());
    out.extend(ttl.to_be_bytes());
    out.extend((length as u16).to_be_bytes());
}

/// Appends the SOA record of the zone that begins at offset `zone` in the name of the question,
/// with the values of RFC 6303 section 3.
fn soa(name: &[u8], zone: usize, ttl: u32, out: &mut Vec<u8>) {
    const MAILBOX: &[u8] = b"\x06nobody\x07invalid\0";
    let root = name.get(zone).is_none_or(|length| *length == 0);
    let pointer = 0xc000 | (HEADER + zone) as u16;
    let write_name =
        |out: &mut Vec<u8>| if root { out.push(0) } else { out.extend(pointer.to_be_bytes()) };
    write_name(out);
    let server = if root { 1 } else { 2 };
    fixed(kind::SOA, ttl, server + MAILBOX.len() + 20, out);
    write_name(out);
    out.extend(MAILBOX);
    // Serial, refresh, retry, expire, and minimum (negative TTL, RFC 2308 section 4).
    for number in [1, 3600, 1200, 604_800, ttl] {
        out.extend(number.to_be_bytes());
    }
}

/// Appends an OPT record (RFC 6891 section 6.1.2), with an extended error (RFC 8914) if any.
fn opt(payload: u16, rcode: Rcode, dnssec: bool, extended: Option<u16>, out: &mut Vec<u8>) {
    out.push(0);
    out.extend(kind::OPT.to_be_bytes());
    out.extend(payload.to_be_bytes());
    let high = u32::from(rcode == Rcode::BadVers) << 24;
    out.extend((high | u32::from(dnssec) << 15).to_be_bytes());
    match extended {
        None => out.extend([0, 0]),
        // Option 15 (EDE) with two bytes of data.
        Some(code) => {
            out.extend([0, 6, 0, 15, 0, 2]);
            out.extend(code.to_be_bytes());
        }
    }
}

/// A parsed record without its data.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Record {
    /// Offset after the owner name.
    pub(crate) owner_end: usize,
    pub(crate) kind: u16,
    pub(crate) class: u16,
    pub(crate) ttl: u32,
    /// Offset of the next record.
    pub(crate) end: usize,
}

impl Record {
    /// Parses the record at offset `at`.
    pub(crate) fn read(message: &[u8], at: usize) -> Option<Self> {
        let owner_end = skip_name(message, at)?;
        let end = owner_end + 10 + usize::from(short(message, owner_end + 8)?);
        let [kind, class] = [short(message, owner_end)?, short(message, owner_end + 2)?];
        let ttl = long(message, owner_end + 4)?;
        (end <= message.len()).then_some(Self { owner_end, kind, class, ttl, end })
    }
}

/// Offset after an uncompressed name.
fn skip_plain_name(message: &[u8], start: usize) -> Option<usize> {
    let mut at = start;
    loop {
        let length = *message.get(at)?;
        at += 1 + usize::from(length);
        match length {
            0 => return (at - start <= MAX_NAME).then_some(at),
            64.. => return None,
            _ => {}
        }
    }
}

/// Offset after a name. A compression pointer (RFC 1035 section 4.1.4) ends the name and is not
/// followed.
pub(crate) fn skip_name(message: &[u8], mut at: usize) -> Option<usize> {
    loop {
        let length = *message.get(at)?;
        match length {
            0 => return Some(at + 1),
            0xc0.. => return (at + 2 <= message.len()).then_some(at + 2),
            64.. => return None,
            _ => at += 1 + usize::from(length),
        }
    }
}

pub(crate) fn short(message: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(message.get(at..at + 2)?.try_into().ok()?))
}

fn long(message: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(message.get(at..at + 4)?.try_into().ok()?))
}

fn set_short(message: &mut [u8], at: usize, value: u16) {
    message[at..at + 2].copy_from_slice(&value.to_be_bytes());
}

#[cfg(test)]
pub(crate) mod tests;
