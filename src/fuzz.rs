//! What the fuzz targets of this package check, as ordinary functions, so that a plain test can
//! replay a corpus.
//!
//! Each takes the bytes a fuzzer made and panics if a property does not hold. Not part of the
//! interface.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::Path;
use tidegate_docker_proxy::flags::{Invocation, Listen, parse as parse_flags};

/// A Compose file is understood or refused in one line that begins with the file's name, and what
/// is understood is within its bounds.
pub fn check_compose(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let env = |name: &str| (name.len() > 3).then(|| name.to_owned());
    match tidegate_compose::parse(text, Path::new("compose.yaml"), "fuzz", &env) {
        Ok(project) => {
            assert!(!project.services.is_empty(), "a project without services");
            for service in &project.services {
                for attachment in &service.networks {
                    let network = project.networks.get(&attachment.network);
                    assert!(network.is_some(), "{:?} is on no network of the file", service.name);
                }
                for name in &service.depends_on {
                    let known = project.services.iter().any(|other| other.name == *name);
                    assert!(known, "{:?} depends on what is not there", service.name);
                }
            }
        }
        Err(error) => {
            let line = error.to_string();
            assert!(line.starts_with("compose.yaml") && !line.contains('\n'), "{line:?}");
        }
    }
}

/// docker-proxy's flags, separated by zero bytes: what is accepted makes sense, what is not is told
/// in one line.
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
