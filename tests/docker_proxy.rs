//! The `docker-proxy` binary, driven the way dockerd drives it.
//!
//! dockerd starts one process per port, with a pipe as descriptor 3, reads from it whether the port
//! is open, and ends the process with SIGINT. Everything here starts the real binary in a namespace
//! of its own and talks to it through those means only; `dockerd.rs` puts a real dockerd in their
//! place.

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
