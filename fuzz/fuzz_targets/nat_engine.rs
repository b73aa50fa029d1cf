//! Frames, socket events and time for the NAT engine: `cargo +nightly fuzz run nat_engine`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tidegate_nat::fuzz::check_engine(data));
