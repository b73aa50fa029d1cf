//! Ethernet frames for the NAT engine: `cargo +nightly fuzz run nat_layer2`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tidegate_nat::fuzz::check_layer2(data));
