//! Errors of requests, and their HTTP status.

use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use std::fmt::Display;
use std::io;
use tidegate_api::types::ErrorBody;
use tidegate_model::without_errno;
use tidegate_publish::publisher::PublishError;

/// An error of a request: the status, and one line of text.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{line}")]
pub(crate) struct Problem {
    pub(super) status: StatusCode,
    pub(super) line: String,
}

impl Problem {
    fn new(status: StatusCode, line: &dyn Display) -> Self {
        Self { status, line: without_errno(&line.to_string()).replace('\n', " ") }
    }

    /// The request is invalid.
    pub(crate) fn bad_request(line: &dyn Display) -> Self {
        Self::new(StatusCode::BAD_REQUEST, line)
    }

    /// The named object does not exist.
    pub(crate) fn not_found(line: &dyn Display) -> Self {
        Self::new(StatusCode::NOT_FOUND, line)
    }

    /// The request conflicts with the current state.
    pub(crate) fn conflict(line: &dyn Display) -> Self {
        Self::new(StatusCode::CONFLICT, line)
    }

    /// The request is valid but failed.
    pub(crate) fn failed(line: &dyn Display) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, line)
    }

    /// The request is valid, and a retry may succeed.
    pub(crate) fn unavailable(line: &dyn Display) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, line)
    }

    /// An error with any other status.
    pub(super) fn of(status: StatusCode, line: &dyn Display) -> Self {
        Self::new(status, line)
    }
}

impl From<PublishError> for Problem {
    fn from(error: PublishError) -> Self {
        match &error {
            PublishError::NoEndpoint(_) => Self::not_found(&error),
            PublishError::Port(port) => match port.kind() {
                io::ErrorKind::AddrInUse => Self::conflict(&error),
                io::ErrorKind::AddrNotAvailable | io::ErrorKind::Unsupported => {
                    Self::bad_request(&error)
                }
                _ => Self::failed(&error),
            },
            PublishError::TooMany(_)
            | PublishError::NoDescriptors(_)
            | PublishError::NoDescriptorsForEndpoint(_)
            | PublishError::Bypasses(..)
            | PublishError::Closed => Self::conflict(&error),
            PublishError::Firewall(source) | PublishError::DockerUser(source)
                if source.kind() == io::ErrorKind::TimedOut =>
            {
                Self::unavailable(&error)
            }
            PublishError::DockerUser(_)
            | PublishError::NoUpstream { .. }
            | PublishError::Firewall(_)
            | PublishError::Engine(_) => Self::failed(&error),
        }
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        (self.status, Json(ErrorBody { error: self.line })).into_response()
    }
}

/// Runs `work`, which may block, on another thread.
///
/// # Errors
/// It panicked.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Problem> {
    tokio::task::spawn_blocking(work).await.map_err(|error| Problem::failed(&error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_problem_is_one_line_without_error_numbers() {
        let problem =
            Problem::failed(&format!("first\nsecond: {}", io::Error::from_raw_os_error(13)));
        assert_eq!(problem.line, "first second: Permission denied");
        assert_eq!(problem.status, StatusCode::INTERNAL_SERVER_ERROR);
    }

    #[test]
    fn missing_objects_and_conflicts_have_their_own_status() {
        let of = |error: PublishError| Problem::from(error).status.as_u16();
        assert_eq!(of(PublishError::NoEndpoint("x".into())), 404);
        assert_eq!(of(PublishError::TooMany(1)), 409);
        assert_eq!(of(PublishError::Closed), 409);
        assert_eq!(of(PublishError::NoDescriptors(1)), 409);
        assert_eq!(of(PublishError::Firewall(io::ErrorKind::TimedOut.into())), 503);
        assert_eq!(of(PublishError::Firewall(io::ErrorKind::Other.into())), 500);
    }
}
