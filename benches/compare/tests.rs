//! The unit tests of the benchmark.
//!
//! A benchmark without the test harness cannot contain tests for `cargo test`, so this target
//! compiles the same modules with the harness. The manifest of the root package declares it as the
//! test `bench_compare`.

// Code that only the `main` of the benchmark uses is dead here.
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
