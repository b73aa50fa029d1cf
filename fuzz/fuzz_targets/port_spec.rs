//! The `-p` grammar of Docker: `cargo +nightly fuzz run port_spec`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tidegate_model::fuzz::check_port_spec(data));
