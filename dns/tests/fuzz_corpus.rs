//! Replays the fuzz corpus of messages, and variants of each file with bytes replaced, removed or
//! duplicated.

use std::fs;
use std::path::Path;
use tidegate_dns::fuzz::check_message;

#[test]
fn the_corpus_of_messages_passes() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus/dns_message");
    let files =
        fs::read_dir(&corpus).unwrap_or_else(|error| panic!("{}: {error}", corpus.display()));
    let mut replayed = 0;
    for file in files {
        let bytes = fs::read(file.unwrap().path()).unwrap();
        check_message(&bytes);
        for at in 0..bytes.len() {
            check_message(&bytes[..at]);
            for byte in [0, 1, 12, 41, 63, 64, 0x80, 0xc0, 0xff] {
                let mut changed = bytes.clone();
                changed[at] = byte;
                check_message(&changed);
            }
            let mut doubled = bytes.clone();
            doubled.insert(at, bytes[at]);
            check_message(&doubled);
        }
        replayed += 1;
    }
    assert!(replayed > 30, "{replayed} files");
}

/// Random mutations, as many as `FUZZ_ROUNDS`, for machines without a fuzzer.
#[test]
fn random_mutations_of_messages_pass() {
    let rounds =
        std::env::var("FUZZ_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(50_000_u64);
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus/dns_message");
    let files: Vec<Vec<u8>> =
        fs::read_dir(corpus).unwrap().map(|file| fs::read(file.unwrap().path()).unwrap()).collect();
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut random = |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) as usize % below.max(1)
    };
    for _ in 0..rounds {
        let mut bytes = files[random(files.len())].clone();
        for _ in 0..=random(6) {
            let other = &files[random(files.len())];
            let (at, from) = (random(bytes.len() + 1), random(other.len() + 1));
            match random(4) {
                0 => bytes.truncate(at.max(12)),
                1 => drop(bytes.splice(at.., other[from..].iter().copied())),
                2 => bytes.insert(at, random(256) as u8),
                _ if at < bytes.len() => bytes[at] = random(256) as u8,
                _ => {}
            }
        }
        check_message(&bytes);
    }
}
