//! Compose files: `cargo +nightly fuzz run compose`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tidegate::fuzz::check_compose(data));
