//! The `docker-proxy` binary, driven as by dockerd.
//!
//! dockerd starts one process per port with a pipe as descriptor 3, reads from the pipe whether the
//! port is open, and ends the process with SIGINT. These tests start the real binary in a namespace
//! of its own and use only these means. `dockerd.rs` uses a real dockerd instead.

#[path = "docker_proxy/command_line.rs"]
mod command_line;
#[path = "docker_proxy/confined.rs"]
mod confined;
#[path = "docker_proxy/driver.rs"]
mod driver;
#[path = "docker_proxy/ending.rs"]
mod ending;
#[path = "docker_proxy/environment.rs"]
mod environment;
#[path = "docker_proxy/forwarding.rs"]
mod forwarding;
#[path = "docker_proxy/listen_fd.rs"]
mod listen_fd;
#[path = "docker_proxy/ready.rs"]
mod ready;
