//! Answers of other servers: checked, and kept so that they can be passed on. Pure.
//!
//! An answer is decoded by hickory, which tells whether it is sound, and kept as it came: what this
//! program does not know about records reaches the client all the same. Nothing but TTLs is changed
//! in it, and its OPT record, which is between us and that server (RFC 6891 section 6.1.1), is left
//! out.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use crate::message::{Given, HEADER, IN, Rcode, Record, flag, kind, short};
use hickory_server::proto::op::Message;
use std::time::Duration;

/// A TTL above it is taken for it: what is wrong for longer than an hour is remembered for too
/// long.
const LONGEST: u32 = 3_600;
/// The same for what is not there (RFC 2308 section 5: "Values of one to three hours have been
/// found to work well"; we are the second to keep it).
const LONGEST_NEGATIVE: u32 = 900;

/// An answer that can be passed on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) rcode: Rcode,
    authentic: bool,
    /// It came with an OPT record: that server knows EDNS.
    pub(crate) edns: bool,
    counts: [u16; 3],
    body: Box<[u8]>,
    ttls: Box<[u16]>,
    /// For how long it may be kept, in seconds.
    keep: u32,
}

/// What a datagram of a server is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Reading {
    /// The answer to our question.
    Answer(Answer),
    /// The whole of it has to be fetched over TCP.
    Truncated,
    /// It does not understand EDNS (RFC 6891 section 7), or says that something is wrong with our
    /// question.
    NotUnderstood,
    /// It is about our question, and cannot be read.
    Malformed,
    /// It is about our question, with letters of another case: the server does not preserve it, or
    /// this is forged.
    CaseChanged,
    /// Not an answer to our question: late, or forged.
    Other,
    /// Not a datagram at all, but word that nobody is there.
    Unreachable,
    /// Not a datagram at all, but so many that answer nothing that someone is guessing.
    Flooded,
    /// Nothing could be had over TCP.
    NoTcp,
}

/// What was asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Asked {
    pub(crate) id: u16,
    /// As it was sent.
    pub(crate) name: Box<[u8]>,
    pub(crate) kind: u16,
    /// The answer must repeat the case of the name.
    pub(crate) exact: bool,
}

impl Asked {
    /// Reads `message`, which came from where the question went.
    pub(crate) fn read(&self, message: &[u8]) -> Reading {
        if message.len() < HEADER || short(message, 0) != Some(self.id) {
            return Reading::Other;
        }
        let flags = short(message, 2).unwrap_or(0);
        if flags & flag::RESPONSE == 0 || flags & flag::OPCODE != 0 {
            return Reading::Other;
        }
        let rcode = Rcode::from_wire(flags);
        if short(message, 4) == Some(0) && matches!(rcode, Rcode::FormErr | Rcode::NotImp) {
            // Servers that cannot read a question cannot repeat it. The case of the name vouches
            // for nothing here; what it causes is the same question once more.
            return Reading::NotUnderstood;
        }
        // RFC 5452 section 9.1: what comes back is compared with what was asked.
        let question = HEADER + self.name.len() + 4;
        let name = message.get(HEADER..HEADER + self.name.len()).unwrap_or_default();
        let same_name = name.eq_ignore_ascii_case(&self.name);
        let behind = [short(message, question - 4), short(message, question - 2)];
        if short(message, 4) != Some(1) || !same_name || behind != [Some(self.kind), Some(IN)] {
            return Reading::Other;
        }
        if self.exact && name != &*self.name {
            return Reading::CaseChanged;
        }
        if flags & flag::TRUNCATED != 0 {
            return Reading::Truncated;
        }
        match rcode {
            Rcode::FormErr | Rcode::NotImp => Reading::NotUnderstood,
            _ => match self.answer(message, question, rcode, flags & flag::AUTHENTIC != 0) {
                Some(answer) => Reading::Answer(answer),
                None => Reading::Malformed,
            },
        }
    }

    /// Whether `message`, which is about our question, repeats the case of the name.
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
                    // It is the last but for signatures, which are not for our client either.
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
                    // RFC 2308 section 5: the lesser of the SOA's own TTL and its last field.
                    let minimum = message.get(record.end - 4..record.end)?.try_into().ok()?;
                    negative = Some(record.ttl.min(u32::from_be_bytes(minimum)));
                }
            }
        }
        let keep = match (rcode, counts[0]) {
            (Rcode::NoError, 1..) => positive.min(LONGEST),
            // RFC 2308 section 5: "Negative responses without SOA records SHOULD NOT be cached". A
            // chain of aliases that ends in nothing holds as long as its links.
            (Rcode::NoError | Rcode::NxDomain, _) => {
                negative.map_or(0, |ttl| ttl.min(positive).min(LONGEST_NEGATIVE))
            }
            // RFC 9520 section 3.2: "Resolvers MUST cache resolution failures for at least 1
            // second."
            _ => 1,
        };
        let mut body: Box<[u8]> = message[question..end].into();
        // A name that is written out again, and not pointed to, has the random case of our
        // question.
        for echo in echoes {
            body[echo].make_ascii_lowercase();
        }
        Some(Answer { rcode, authentic, edns, counts, body, ttls: ttls.into(), keep })
    }
}

impl Answer {
    /// An answer that says that there is none.
    pub(crate) fn failure() -> Self {
        let nothing = (Box::default(), Box::default());
        Self {
            rcode: Rcode::ServFail,
            authentic: false,
            edns: false,
            counts: [0; 3],
            body: nothing.0,
            ttls: nothing.1,
            keep: 1,
        }
    }

    /// For how long it may be kept.
    pub(crate) fn keep(&self) -> Duration {
        Duration::from_secs(self.keep.into())
    }

    /// Another server may know better (RFC 1035 section 4.1.1: it had a problem, or does not want
    /// to).
    pub(crate) fn is_failure(&self) -> bool {
        !matches!(self.rcode, Rcode::NoError | Rcode::NxDomain)
    }

    /// Bytes that it takes.
    pub(crate) fn size(&self) -> usize {
        self.body.len() + 2 * self.ttls.len()
    }

    /// What is passed on of it, `age` after it came.
    pub(crate) fn given(&self, age: Duration) -> Given<'_> {
        let age = u32::try_from(age.as_secs()).unwrap_or(u32::MAX);
        let Self { rcode, authentic, counts, body, ttls, .. } = self;
        Given { rcode: *rcode, authentic: *authentic, counts: *counts, body, ttls, age }
    }
}

#[cfg(test)]
mod tests;
