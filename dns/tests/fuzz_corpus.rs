//! Replays the fuzz corpus of messages, and all of its files with each byte turned, cut off or doubled.

use std::fs;
use std::path::Path;
use tidegate_dns::fuzz::check_message;

#[test]
fn the_corpus_of_messages_holds() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus/dns_message");
    let files = fs::read_dir(&corpus).unwrap_or_else(|error| panic!("{}: {error}", corpus.display()));
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
