//! A minimal HTTP client for the API, independent of that of tidegate.

#![allow(dead_code, reason = "every test crate uses a part of it")]

use serde_json::Value;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// The timeout of a response.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(20);

/// The status and the body of the response; `null` for an empty body.
#[track_caller]
pub(crate) fn ask(socket: &Path, method: &str, target: &str, body: &str) -> (u16, Value) {
    let mut stream =
        UnixStream::connect(socket).unwrap_or_else(|error| panic!("{}: {error}", socket.display()));
    stream.set_read_timeout(Some(TIMEOUT)).unwrap();
    let head =
        format!("{method} {target} HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n", body.len());
    stream.write_all(head.as_bytes()).unwrap();
    // The server may reject a large body before it has read all of it.
    let _ = stream.write_all(body.as_bytes());
    let mut answer = String::new();
    stream
        .read_to_string(&mut answer)
        .unwrap_or_else(|error| panic!("{method} {target}: {error}: {answer}"));
    let (head, body) =
        answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no answer: {answer:?}"));
    let code = head.split(' ').nth(1).and_then(|code| code.parse().ok());
    let body = if body.is_empty() { Value::Null } else { serde_json::from_str(body).unwrap() };
    (code.unwrap_or_else(|| panic!("{head}")), body)
}

#[track_caller]
pub(crate) fn get(socket: &Path, target: &str) -> (u16, Value) {
    ask(socket, "GET", target, "")
}
