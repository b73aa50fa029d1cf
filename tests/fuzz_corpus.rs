//! Replays the fuzz corpora of all parsers as regression tests.

use std::fs;
use std::path::Path;

#[test]
fn port_spec_corpus_passes() {
    replay("port_spec", tidegate_model::fuzz::check_port_spec);
}

#[test]
fn compose_corpus_passes() {
    replay("compose", tidegate::fuzz::check_compose);
}

#[test]
fn docker_proxy_flags_corpus_passes() {
    replay("docker_proxy_flags", tidegate::fuzz::check_docker_proxy_flags);
}

/// Runs `check` on every file of the corpus of `target`, which must not be empty.
fn replay(target: &str, check: fn(&[u8])) {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
    let entries =
        fs::read_dir(&corpus).unwrap_or_else(|error| panic!("{}: {error}", corpus.display()));
    let mut replayed = 0;
    for entry in entries {
        check(&fs::read(entry.unwrap().path()).unwrap());
        replayed += 1;
    }
    assert!(replayed > 0, "{} is empty", corpus.display());
}
