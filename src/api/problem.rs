//! Why a request is not fulfilled, and which status says so.

use super::types::ErrorBody;
use crate::port_error::without_numbers;
use crate::publisher::PublishError;
use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use std::fmt::Display;
use std::io;

/// A request that is not fulfilled: the status, and one line.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{line}")]
pub(crate) struct Problem {
    pub(super) status: StatusCode,
    pub(super) line: String,
}

impl Problem {
    fn new(status: StatusCode, line: &dyn Display) -> Self {
        Self { status, line: without_numbers(&line.to_string()).replace('\n', " ") }
    }

    /// The request makes no sense.
    pub(crate) fn bad_request(line: &dyn Display) -> Self {
        Self::new(StatusCode::BAD_REQUEST, line)
    }

    /// What it names is not there.
    pub(crate) fn not_found(line: &dyn Display) -> Self {
        Self::new(StatusCode::NOT_FOUND, line)
    }

    /// What it wants does not go with what is there.
    pub(crate) fn conflict(line: &dyn Display) -> Self {
        Self::new(StatusCode::CONFLICT, line)
    }

    /// It makes sense, and yet it failed.
    pub(crate) fn failed(line: &dyn Display) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, line)
    }

    /// Of another kind.
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
            PublishError::TooMany(_) | PublishError::Bypasses(..) | PublishError::Closed => {
                Self::conflict(&error)
            }
            PublishError::NoDescriptors(_)
            | PublishError::DockerUser(_)
            | PublishError::NoWay { .. }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_problem_is_one_line_without_the_systems_numbers() {
        let problem =
            Problem::failed(&format!("first\nsecond: {}", io::Error::from_raw_os_error(13)));
        assert_eq!(problem.line, "first second: Permission denied");
        assert_eq!(problem.status, StatusCode::INTERNAL_SERVER_ERROR);
    }

    #[test]
    fn what_is_not_there_and_what_is_in_the_way_have_statuses_of_their_own() {
        let of = |error: PublishError| Problem::from(error).status.as_u16();
        assert_eq!(of(PublishError::NoEndpoint("x".into())), 404);
        assert_eq!(of(PublishError::TooMany(1)), 409);
        assert_eq!(of(PublishError::Closed), 409);
        assert_eq!(of(PublishError::NoDescriptors(1)), 500);
    }
}
