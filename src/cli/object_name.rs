//! Names of objects in requests.

use super::UsageError;

/// Returns `name` if it can be part of a URL: all valid names can.
pub(super) fn checked(name: &str) -> Result<&str, UsageError> {
    let is_safe = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte);
    if name.is_empty() || !name.bytes().all(is_safe) {
        return Err(UsageError(format!(
            "{name:?} is not a name of a project, a network or an endpoint"
        )));
    }
    Ok(name)
}
