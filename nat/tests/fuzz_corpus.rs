//! The fuzz target's corpus, replayed.

use std::path::Path;

#[test]
fn nat_engine_corpus_holds() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus/nat_engine");
    let files = std::fs::read_dir(&corpus).unwrap().map(|entry| entry.unwrap().path());
    let count = files.map(|file| tidegate_nat::fuzz::check_engine(&std::fs::read(file).unwrap())).count();
    assert!(count > 5, "{} has {count} files", corpus.display());
}
