//! A replacement for slirp4netns, for rootlesskit, podman and other callers.

use std::process::ExitCode;

fn main() -> ExitCode {
    tidegate_slirp4netns::main(std::env::args_os().skip(1))
}
