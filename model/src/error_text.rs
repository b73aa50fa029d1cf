//! Addresses and kernel errors in messages.

use std::net::IpAddr;

/// Formats an address as in a URL: IPv6 in brackets.
#[must_use]
pub fn bracketed(ip: IpAddr) -> String {
    match ip {
        IpAddr::V4(v4) => v4.to_string(),
        IpAddr::V6(v6) => format!("[{v6}]"),
    }
}

/// Removes every ` (os error N)`, which [`std::io::Error`] appends to the message of the kernel.
#[must_use]
pub fn without_errno(text: &str) -> String {
    let mut pieces = text.split(" (os error ");
    let first = pieces.next().unwrap_or_default().to_owned();
    pieces.fold(first, |before, rest| match rest.split_once(')') {
        Some((number, after)) if number.bytes().all(|byte| byte.is_ascii_digit()) => before + after,
        _ => before + " (os error " + rest,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_error_numbers_of_the_kernel_are_removed() {
        let text = "a: Invalid argument (os error 22): b (os error x) c (os error 1)";
        assert_eq!(without_errno(text), "a: Invalid argument: b (os error x) c");
    }
}
