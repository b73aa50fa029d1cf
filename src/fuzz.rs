//! The checks of the fuzz targets of this package, as functions, so that a test can replay the
//! corpora.
//!
//! Each function takes the input of the fuzzer and panics if a property does not hold. Not part of
//! the interface.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::Path;
use tidegate_docker_proxy::flags::{Invocation, Listen, parse as parse_flags};

/// A Compose file is accepted, or rejected with one line that begins with the name of the file.
/// References in an accepted file resolve.
pub fn check_compose(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let env = |name: &str| (name.len() > 3).then(|| name.to_owned());
    match tidegate_compose::parse(text, Path::new("compose.yaml"), "fuzz", &env) {
        Ok(project) => {
            assert!(!project.services.is_empty(), "a project without services");
            for service in &project.services {
                for attachment in &service.networks {
                    let network = project.networks.get(&attachment.network);
                    assert!(
                        network.is_some(),
                        "{:?} has a network that is not in the file",
                        service.name
                    );
                }
                for name in &service.depends_on {
                    let known = project.services.iter().any(|other| other.name == *name);
                    assert!(known, "{:?} depends on an unknown service", service.name);
                }
            }
        }
        Err(error) => {
            let line = error.to_string();
            assert!(line.starts_with("compose.yaml") && !line.contains('\n'), "{line:?}");
        }
    }
}

/// The flags of docker-proxy, separated by NUL bytes. Accepted ports are not 0, and an error has a
/// message.
pub fn check_docker_proxy_flags(data: &[u8]) {
    let args = data.split(|byte| *byte == 0).map(|arg| OsString::from_vec(arg.to_vec()));
    match parse_flags(args) {
        Ok(Invocation::Run(options)) => {
            assert_ne!(options.container.port(), 0);
            assert!(!matches!(options.listen, Listen::Bind(address) if address.port() == 0));
        }
        Ok(Invocation::Version | Invocation::Help) => {}
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}
