//! Responses of JSON objects, one per line.

use axum::body::Body;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use futures_util::{Stream, StreamExt};
use serde::Serialize;
use std::convert::Infallible;

/// A response with the objects of `batches`, as they come.
pub(super) fn json_lines<T: Serialize>(
    batches: impl Stream<Item = Vec<T>> + Send + 'static,
) -> Response {
    let text = |batch: Vec<T>| {
        let mut text = Vec::new();
        for object in batch {
            // Types of the API can be serialized.
            text.extend(serde_json::to_vec(&object).unwrap_or_default());
            text.push(b'\n');
        }
        Ok::<_, Infallible>(text)
    };
    let kind = [(header::CONTENT_TYPE, "application/x-ndjson")];
    (kind, Body::from_stream(batches.map(text))).into_response()
}
