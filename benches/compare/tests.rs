//! The benchmark's own tests.
//!
//! A benchmark without the test harness cannot hold tests that `cargo test` runs, so this target
//! compiles the same modules with it. The root package's manifest declares it as the test
//! `bench_compare`.

// What only the benchmark's `main` uses is dead here.
#![allow(dead_code)]

mod contender;
mod figures;
mod iperf;
mod lab;
mod load;
mod machine;
mod options;
mod report;
mod results;
mod scenario;
mod schedule;
mod stats;
