//! Command line of docker-proxy: `cargo +nightly fuzz run docker_proxy_flags`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tidegate::fuzz::check_docker_proxy_flags(data));
