//! The choice of the Compose file.

use super::UsageError;
use std::path::PathBuf;

/// The default file names of Compose, in order of precedence.
const FILES: [&str; 4] =
    ["compose.yaml", "compose.yml", "docker-compose.yaml", "docker-compose.yml"];

/// The Compose file `given`, or the one in this directory.
///
/// # Errors
/// There is none.
pub(super) fn compose_file(given: Option<&PathBuf>) -> Result<PathBuf, UsageError> {
    if let Some(file) = given {
        return Ok(file.clone());
    }
    FILES.iter().map(PathBuf::from).find(|file| file.exists()).ok_or_else(|| {
        UsageError(format!("no {} in this directory; use -f FILE", FILES.join(", ")))
    })
}
