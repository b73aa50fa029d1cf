//! Responses of upstream servers: matching, validation, and the form in which they are cached.
//! Pure.
//!
//! hickory decodes a response only to validate it; the original bytes are cached. Record types that
//! tidegate does not support are thus preserved. Only the TTLs are changed, and the OPT record is
//! removed, because it applies to one hop (RFC 6891 section 6.1.1).

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use crate::message::{HEADER, IN, Rcode, Record, RelayedAnswer, flag, kind, short};
use hickory_server::proto::op::Message;
use std::time::Duration;

/// Upper bound of positive TTLs in seconds. It limits how long a wrong response is used.
const MAX_TTL: u32 = 3_600;
/// Upper bound of negative TTLs in seconds. RFC 2308 section 5: "Values of one to three hours have
/// been found to work well". The value is lower because the upstream server has cached the response
/// before.
const MAX_NEGATIVE_TTL: u32 = 900;

/// A response that can be relayed to clients.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) rcode: Rcode,
    authentic: bool,
    /// The response has an OPT record, so the server supports EDNS.
    pub(crate) edns: bool,
    /// Record counts of the answer, authority and additional sections, without OPT.
    counts: [u16; 3],
    /// The message from its question section on.
    body: Box<[u8]>,
    /// Offsets of the TTLs in `body`.
    ttls: Box<[u16]>,
    /// Time in the cache, in seconds.
    lifetime: u32,
}

/// The result of a query to one server: a response, or the reason that there is none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Response {
    /// The response to the query.
    Answer(Answer),
    /// Truncated (TC): the response has to be fetched over TCP.
    Truncated,
    /// FORMERR or NOTIMP: the server does not support EDNS (RFC 6891 section 7), or rejects the
    /// query itself.
    FormatError,
    /// The header and question match, but the records cannot be decoded.
    Malformed,
    /// The question matches except for the case of the name. Either the server does not preserve
    /// case, or the response is forged.
    CaseChanged,
    /// Not a response to the query: late or forged.
    Unrelated,
    /// No response: the server is unreachable (ICMP error).
    Unreachable,
    /// No response: the source port was closed after too many mismatched datagrams.
    Flooded,
    /// The query over TCP failed.
    TcpFailed,
}

/// A query as it was sent to a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SentQuery {
    pub(crate) id: u16,
    /// The name in wire format, with the case of the query.
    pub(crate) name: Box<[u8]>,
    pub(crate) kind: u16,
    /// Whether the response must repeat the case of the name.
    pub(crate) exact: bool,
}

impl SentQuery {
    /// Parses `message`, which was received from the address of the server.
    pub(crate) fn read(&self, message: &[u8]) -> Response {
        if message.len() < HEADER || short(message, 0) != Some(self.id) {
            return Response::Unrelated;
        }
        let flags = short(message, 2).unwrap_or(0);
        if flags & flag::RESPONSE == 0 || flags & flag::OPCODE != 0 {
            return Response::Unrelated;
        }
        let rcode = Rcode::from_wire(flags);
        if short(message, 4) == Some(0) && matches!(rcode, Rcode::FormErr | Rcode::NotImp) {
            // A server that cannot parse the question may omit it. The case of the name then proves
            // nothing, but the only effect is that the query is repeated without EDNS.
            return Response::FormatError;
        }
        // RFC 5452 section 9.1: the question of the response must match the query.
        let question = HEADER + self.name.len() + 4;
        let name = message.get(HEADER..HEADER + self.name.len()).unwrap_or_default();
        let same_name = name.eq_ignore_ascii_case(&self.name);
        let type_and_class = [short(message, question - 4), short(message, question - 2)];
        if short(message, 4) != Some(1)
            || !same_name
            || type_and_class != [Some(self.kind), Some(IN)]
        {
            return Response::Unrelated;
        }
        if self.exact && name != &*self.name {
            return Response::CaseChanged;
        }
        if flags & flag::TRUNCATED != 0 {
            return Response::Truncated;
        }
        match rcode {
            Rcode::FormErr | Rcode::NotImp => Response::FormatError,
            _ => match self.answer(message, question, rcode, flags & flag::AUTHENTIC != 0) {
                Some(answer) => Response::Answer(answer),
                None => Response::Malformed,
            },
        }
    }

    /// Whether `message`, a response to this query, repeats the case of the name.
    pub(crate) fn has_same_case(&self, message: &[u8]) -> bool {
        message.get(HEADER..HEADER + self.name.len()) == Some(&*self.name)
    }

    fn answer(
        &self,
        message: &[u8],
        question: usize,
        rcode: Rcode,
        authentic: bool,
    ) -> Option<Answer> {
        Message::from_vec(message).ok()?;
        let mut counts = [0; 3];
        let mut ttls = Vec::new();
        let mut positive = u32::MAX;
        let mut negative = None;
        let mut edns = false;
        let mut echoes = Vec::new();
        let mut at = question;
        let mut end = at;
        'sections: for (section, count) in counts.iter_mut().enumerate() {
            for _ in 0..short(message, 6 + 2 * section)? {
                let record = Record::read(message, at)?;
                let owner = std::mem::replace(&mut at, record.end)..record.owner_end;
                if record.kind == kind::OPT {
                    edns = true;
                    // Only signatures (TSIG, SIG(0)) follow the OPT record, and they apply to one
                    // hop too.
                    break 'sections;
                }
                end = at;
                *count += 1;
                if message[owner.clone()].eq_ignore_ascii_case(&self.name) {
                    echoes.push(owner.start - question..owner.end - question);
                }
                ttls.push(u16::try_from(record.owner_end + 4 - question).ok()?);
                if section == 0 {
                    positive = positive.min(record.ttl);
                }
                if section == 1 && record.kind == kind::SOA {
                    // RFC 2308 section 5: the minimum of the TTL of the SOA record and its MINIMUM
                    // field.
                    let minimum = message.get(record.end - 4..record.end)?.try_into().ok()?;
                    negative = Some(record.ttl.min(u32::from_be_bytes(minimum)));
                }
            }
        }
        let lifetime = match (rcode, counts[0]) {
            (Rcode::NoError, 1..) => positive.min(MAX_TTL),
            // RFC 2308 section 5: "Negative responses without SOA records SHOULD NOT be cached". A
            // CNAME chain without a final record is cached at most for the TTLs of its links.
            (Rcode::NoError | Rcode::NxDomain, _) => {
                negative.map_or(0, |ttl| ttl.min(positive).min(MAX_NEGATIVE_TTL))
            }
            // RFC 9520 section 3.2: "Resolvers MUST cache resolution failures for at least 1
            // second."
            _ => 1,
        };
        let mut body: Box<[u8]> = message[question..end].into();
        // Some servers repeat the owner name instead of using a compression pointer. It then has
        // the random case of the query, which the client did not send.
        for echo in echoes {
            body[echo].make_ascii_lowercase();
        }
        Some(Answer { rcode, authentic, edns, counts, body, ttls: ttls.into(), lifetime })
    }
}

impl Answer {
    /// A SERVFAIL response without records.
    pub(crate) fn failure() -> Self {
        let nothing = (Box::default(), Box::default());
        Self {
            rcode: Rcode::ServFail,
            authentic: false,
            edns: false,
            counts: [0; 3],
            body: nothing.0,
            ttls: nothing.1,
            lifetime: 1,
        }
    }

    /// Time in the cache.
    pub(crate) fn lifetime(&self) -> Duration {
        Duration::from_secs(self.lifetime.into())
    }

    /// Whether the next server should be tried. RFC 1035 section 4.1.1: SERVFAIL and REFUSED do not
    /// say that the name does not exist.
    pub(crate) fn is_failure(&self) -> bool {
        !matches!(self.rcode, Rcode::NoError | Rcode::NxDomain)
    }

    /// Size in memory, in bytes.
    pub(crate) fn size(&self) -> usize {
        self.body.len() + 2 * self.ttls.len()
    }

    /// The response as relayed `age` after it was received.
    pub(crate) fn relayed(&self, age: Duration) -> RelayedAnswer<'_> {
        let age = u32::try_from(age.as_secs()).unwrap_or(u32::MAX);
        let Self { rcode, authentic, counts, body, ttls, .. } = self;
        RelayedAnswer { rcode: *rcode, authentic: *authentic, counts: *counts, body, ttls, age }
    }
}

#[cfg(test)]
mod tests;
