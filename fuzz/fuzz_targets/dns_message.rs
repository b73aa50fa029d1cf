//! DNS messages of clients and servers: `cargo +nightly fuzz run dns_message`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tidegate_dns::fuzz::check_message(data));
