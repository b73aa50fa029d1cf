//! The lines above the table: all ports together, the NAT engine, the names.

use super::cell::{age, bytes_of, number, rate_of};
use super::rates::Rates;
use crate::api::types::Fill;
use std::time::Duration;

/// A piece of a line.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Piece {
    pub(super) text: String,
    /// Something is not as it should be.
    pub(super) trouble: bool,
}

fn piece(text: String) -> Piece {
    Piece { text, trouble: false }
}

/// `fail 3.0/s`.
fn trouble(word: &str, rate: f64) -> Piece {
    Piece { text: format!("{word} {}/s", rate_of(rate)), trouble: rate > 0.0 }
}

fn rate(word: &str, rate: f64) -> Piece {
    piece(format!("{word} {}/s", rate_of(rate)))
}

fn bytes(word: &str, rate: f64) -> Piece {
    piece(format!("{word} {}/s", bytes_of(rate)))
}

/// `open 12/65.5k`; trouble from nine tenths on.
fn fill(word: &str, used: u64, limit: u64) -> Piece {
    let text = format!("{word} {}/{}", number(used as f64), number(limit as f64));
    Piece { text, trouble: limit > 0 && used as f64 >= 0.9 * limit as f64 }
}

/// The first line, without the time between samples.
pub(super) fn title(rates: &Rates) -> Vec<Piece> {
    let Fill { used, limit } = rates.descriptors;
    vec![
        piece(format!("tidegate top: {}", rates.project)),
        piece(format!("up {}", age(Duration::from_secs_f64(rates.up_seconds)))),
        fill("descriptors", used, limit),
    ]
}

/// The lines below it: what they are of, and their pieces, the most important first.
pub(super) fn lines(rates: &Rates) -> [(&'static str, Vec<Piece>); 3] {
    let flow = rates.flow();
    let ports = vec![
        // Sessions among them have limits of their own.
        fill("TCP open", rates.connections.used, rates.connections.limit),
        rate("new", flow.begun_rate),
        bytes("in", flow.bytes_in_rate),
        bytes("out", flow.bytes_out_rate),
        trouble("fail", flow.failed_rate),
    ];
    let nat = match &rates.nat {
        Some(nat) => vec![
            fill("flows", nat.flows.used, nat.flows.limit),
            rate("new", nat.begun_rate),
            bytes("in", nat.bytes_in_rate),
            bytes("out", nat.bytes_out_rate),
            trouble("drop", nat.dropped_rate),
            rate("again", nat.retransmissions_rate),
        ],
        None => vec![piece("by the kernel, or there is none".to_owned())],
    };
    let sum =
        |rate: fn(&super::rates::NetworkRates) -> f64| rates.networks.iter().map(rate).sum::<f64>();
    let silent = rates.upstreams.iter().filter(|upstream| !upstream.trusted).count();
    let names = vec![
        rate("asked", sum(|network| network.questions_rate)),
        rate("unknown", sum(|network| network.questions_unknown_rate)),
        trouble("fail", sum(|network| network.questions_failed_rate)),
        Piece {
            text: format!("servers {}, silent {silent}", rates.upstreams.len()),
            trouble: silent > 0,
        },
    ];
    [("ports", ports), ("NAT", nat), ("names", names)]
}

/// Those of `pieces` that fit into `width` with two blanks between them.
pub(super) fn fitting(pieces: &[Piece], width: usize) -> &[Piece] {
    let mut used = 0;
    let count = pieces.iter().take_while(|piece| {
        used += piece.text.chars().count() + 2;
        used <= width + 2
    });
    &pieces[..count.count()]
}
