//! Requests to the metrics listener and their responses. Pure.

/// Maximum size of a request with its headers, in bytes.
pub(super) const MAX_REQUEST: usize = 8 << 10;

/// The state of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Request {
    /// More bytes are needed.
    Incomplete,
    /// A request for the metrics page.
    Page,
    /// Any other request, with its complete response.
    Answered(String),
}

/// Parses the bytes received so far. `ended` is true after the last byte.
pub(super) fn read(bytes: &[u8], ended: bool) -> Request {
    let mut headers = [httparse::EMPTY_HEADER; 64];
    let mut parsed = httparse::Request::new(&mut headers);
    match parsed.parse(bytes) {
        Ok(httparse::Status::Complete(_)) => {
            answer(parsed.method.unwrap_or_default(), parsed.path.unwrap_or_default())
        }
        Ok(httparse::Status::Partial) if !ended && bytes.len() < MAX_REQUEST => Request::Incomplete,
        _ => Request::Answered(whole("400 Bad Request", "", "invalid HTTP request\n")),
    }
}

fn answer(method: &str, target: &str) -> Request {
    if !matches!(method, "GET" | "HEAD") {
        // RFC 9110 section 15.5.6 requires the supported methods.
        let body = "supported methods: GET, HEAD\n";
        return Request::Answered(whole("405 Method Not Allowed", "Allow: GET, HEAD\r\n", body));
    }
    // RFC 9112 section 3.2.2: a server must accept the absolute form.
    let path = match target.strip_prefix("http://") {
        Some(rest) => rest.find('/').map_or("/", |at| &rest[at..]),
        None => target,
    };
    let (status, body) = match path.split('?').next().unwrap_or_default() {
        // HEAD without a length: RFC 9110 section 8.6 permits a server to omit a length that is
        // known only after generating the content.
        "/metrics" if method == "HEAD" => return Request::Answered(head("200 OK", "", None)),
        "/metrics" => return Request::Page,
        "/" => ("200 OK", "metrics of tidegate: /metrics\n"),
        _ => ("404 Not Found", "not found; the only path is /metrics\n"),
    };
    Request::Answered(match method {
        // RFC 9110 section 9.3.2: no content, but the length of the response to GET.
        "HEAD" => head(status, "", Some(body.len())),
        _ => whole(status, "", body),
    })
}

/// A complete response. `fields` are additional header fields, each terminated by CRLF.
pub(super) fn whole(status: &str, fields: &str, body: &str) -> String {
    head(status, fields, Some(body.len())) + body
}

/// Returns the head of a response with `length` bytes of content.
pub(super) fn head(status: &str, fields: &str, length: Option<usize>) -> String {
    let length = length.map(|length| format!("Content-Length: {length}\r\n")).unwrap_or_default();
    format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\n{fields}{length}Connection: \
         close\r\n\r\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answered(request: &str) -> String {
        match read(request.as_bytes(), false) {
            Request::Answered(answer) => answer,
            other => panic!("{request:?}: {other:?}"),
        }
    }

    #[test]
    fn get_requests_the_page_in_both_target_forms() {
        for target in ["/metrics", "/metrics?name[]=x", "http://127.0.0.1:9464/metrics"] {
            let request = format!("GET {target} HTTP/1.1\r\nHost: x\r\n\r\n");
            assert_eq!(read(request.as_bytes(), false), Request::Page, "{target}");
        }
        let request = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n";
        for end in 0..request.len() {
            assert_eq!(read(&request[..end], false), Request::Incomplete, "{end}");
        }
        assert!(
            matches!(read(&request[..9], true), Request::Answered(answer) if answer.contains(" 400 "))
        );
    }

    #[test]
    fn head_is_answered_like_get_without_content() {
        for (path, status) in
            [("/metrics", "200 OK"), ("/", "200 OK"), ("/elsewhere", "404 Not Found")]
        {
            let answer = answered(&format!("HEAD {path} HTTP/1.1\r\n\r\n"));
            assert!(answer.starts_with(&format!("HTTP/1.1 {status}\r\n")), "{answer}");
            assert!(
                answer.ends_with("\r\n\r\n") && answer.matches("\r\n\r\n").count() == 1,
                "{answer}"
            );
        }
        let get = answered("GET / HTTP/1.1\r\n\r\n");
        assert!(get.starts_with(&answered("HEAD / HTTP/1.1\r\n\r\n")));
    }

    #[test]
    fn other_methods_are_rejected_with_the_supported_ones() {
        for method in ["POST", "PUT", "DELETE", "OPTIONS", "PATCH", "BREW"] {
            let answer = answered(&format!("{method} /metrics HTTP/1.1\r\n\r\n"));
            assert!(answer.starts_with("HTTP/1.1 405 Method Not Allowed\r\n"), "{answer}");
            assert!(answer.contains("\r\nAllow: GET, HEAD\r\n"), "{answer}");
        }
    }

    #[test]
    fn invalid_and_oversized_requests_are_rejected() {
        let long = format!("GET /metrics HTTP/1.1\r\nX: {}", "x".repeat(MAX_REQUEST));
        for request in ["\u{16}\u{3}\u{1}\0\r\n\r\n", "GET\r\n\r\n", &long] {
            assert!(answered(request).starts_with("HTTP/1.1 400 "));
        }
    }
}
