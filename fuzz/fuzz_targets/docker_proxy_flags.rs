//! docker-proxy's command line: `cargo +nightly fuzz run docker_proxy_flags`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tidegate::fuzz::check_docker_proxy_flags(data));
