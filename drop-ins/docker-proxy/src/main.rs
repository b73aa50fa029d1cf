//! A replacement for docker-proxy, for `dockerd --userland-proxy-path`.

use std::process::ExitCode;

fn main() -> ExitCode {
    tidegate_docker_proxy::main(std::env::args_os().skip(1))
}
