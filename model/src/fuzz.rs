//! What the fuzz targets check, as ordinary functions, so that a plain test can replay a corpus.
//!
//! Each takes the bytes a fuzzer made and panics if a property does not hold. Not part of the
//! interface.

use crate::PortSpec;

/// Parsing does not panic, and what parses prints and parses back to the same.
pub fn check_port_spec(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    match text.parse::<PortSpec>() {
        Ok(spec) => {
            assert_eq!(spec.to_string().parse(), Ok(spec), "{text:?} prints as {spec}");
            assert_eq!(spec.mappings().count(), usize::from(spec.container_ports().len()));
        }
        Err(error) => assert!(error.to_string().starts_with(&format!("port spec {text:?}: "))),
    }
}
