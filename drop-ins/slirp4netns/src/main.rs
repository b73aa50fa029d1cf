//! slirp4netns, by tidegate: for rootlesskit, podman and whoever else starts it.

use std::process::ExitCode;

fn main() -> ExitCode {
    tidegate_slirp4netns::main(std::env::args_os().skip(1))
}
