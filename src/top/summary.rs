//! The summary lines above the table: all ports together, the NAT engine, DNS.

use super::cell::{age, bytes_of, number, rate_of};
use super::rates::Rates;
use std::time::Duration;
use tidegate_api::types::Fill;

/// A part of a summary line.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Piece {
    pub(super) text: String,
    /// Whether it is highlighted as an error.
    pub(super) is_error: bool,
}

fn piece(text: String) -> Piece {
    Piece { text, is_error: false }
}

/// `fail 3.0/s`.
fn errors(word: &str, rate: f64) -> Piece {
    Piece { text: format!("{word} {}/s", rate_of(rate)), is_error: rate > 0.0 }
}

fn rate(word: &str, rate: f64) -> Piece {
    piece(format!("{word} {}/s", rate_of(rate)))
}

fn bytes(word: &str, rate: f64) -> Piece {
    piece(format!("{word} {}/s", bytes_of(rate)))
}

/// `open 12/65.5k`, highlighted from 90% of the limit.
fn fill(word: &str, used: u64, limit: u64) -> Piece {
    let text = format!("{word} {}/{}", number(used as f64), number(limit as f64));
    Piece { text, is_error: limit > 0 && used as f64 >= 0.9 * limit as f64 }
}

/// Returns the first line, without the sampling interval.
pub(super) fn title(rates: &Rates) -> Vec<Piece> {
    let Fill { used, limit } = rates.descriptors;
    vec![
        piece(format!("tidegate top: {}", rates.project)),
        piece(format!("up {}", age(Duration::from_secs_f64(rates.up_seconds)))),
        fill("descriptors", used, limit),
    ]
}

/// Returns the lines below the title: their labels and parts, the most important part first.
pub(super) fn lines(rates: &Rates) -> [(&'static str, Vec<Piece>); 3] {
    let flow = rates.flow();
    let ports = vec![
        // UDP sessions have limits per port.
        fill("TCP open", rates.connections.used, rates.connections.limit),
        rate("new", flow.begun_rate),
        bytes("in", flow.bytes_in_rate),
        bytes("out", flow.bytes_out_rate),
        errors("fail", flow.failed_rate),
    ];
    let nat = match &rates.nat {
        Some(nat) => vec![
            fill("flows", nat.flows.used, nat.flows.limit),
            rate("new", nat.begun_rate),
            bytes("in", nat.bytes_in_rate),
            bytes("out", nat.bytes_out_rate),
            errors("drop", nat.dropped_rate),
            rate("retx", nat.retransmissions_rate),
        ],
        None => vec![piece("by the kernel, or no egress".to_owned())],
    };
    let sum =
        |rate: fn(&super::rates::NetworkRates) -> f64| rates.networks.iter().map(rate).sum::<f64>();
    let silent = rates.upstreams.iter().filter(|upstream| !upstream.trusted).count();
    let names = vec![
        rate("asked", sum(|network| network.questions_rate)),
        rate("unknown", sum(|network| network.questions_unknown_rate)),
        errors("fail", sum(|network| network.questions_failed_rate)),
        Piece {
            text: format!("servers {}, silent {silent}", rates.upstreams.len()),
            is_error: silent > 0,
        },
    ];
    [("ports", ports), ("NAT", nat), ("names", names)]
}

/// Returns the parts that fit into `width`, with two blanks between them.
pub(super) fn fitting(pieces: &[Piece], width: usize) -> &[Piece] {
    let mut used = 0;
    let count = pieces.iter().take_while(|piece| {
        used += piece.text.chars().count() + 2;
        used <= width + 2
    });
    &pieces[..count.count()]
}
