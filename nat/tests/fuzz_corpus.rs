//! Replays the corpora of the fuzz targets.

use std::path::Path;
use tidegate_nat::fuzz;

#[test]
fn nat_engine_corpus_holds() {
    replay("nat_engine", fuzz::check_engine);
}

#[test]
fn nat_layer2_corpus_holds() {
    replay("nat_layer2", fuzz::check_layer2);
}

fn replay(target: &str, check: fn(&[u8])) {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(target);
    let files = std::fs::read_dir(&corpus).unwrap().map(|entry| entry.unwrap().path());
    let count = files.map(|file| check(&std::fs::read(file).unwrap())).count();
    assert!(count > 5, "{} has {count} files", corpus.display());
}
