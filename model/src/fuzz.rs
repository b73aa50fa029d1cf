//! Checks of the fuzz targets as plain functions, so that an ordinary test can replay a corpus.
//!
//! Each function takes the input of the fuzzer and panics if a property is violated. Not part of
//! the public interface.

use crate::PortSpec;

/// Parsing does not panic, and a parsed spec prints to a text that parses to the same spec.
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
