//! Converts the output of a service into lines that are safe for a terminal. Pure.
//!
//! A line ends at a newline or after [`MAX_LINE`] bytes. Invalid UTF-8 is replaced by U+FFFD. Tabs
//! and SGR sequences (colours) are kept. Other control characters and escape sequences are removed,
//! including their parameters. A service thus cannot move the cursor, change the window title,
//! access the clipboard, or imitate the output of another service.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

/// Maximum length of a line in bytes. Longer lines are split.
pub(super) const MAX_LINE: usize = 16 * 1024;

/// Resets all attributes, so that none affects the next line.
const RESET: &str = "\x1b[0m";

/// Splits one stream into lines. Buffers less than [`MAX_LINE`] bytes and one chunk.
#[derive(Debug, Default)]
pub(super) struct Splitter {
    bytes: Vec<u8>,
    /// Offset of the first byte that was not returned yet.
    start: usize,
}

impl Splitter {
    /// Adds the next bytes of the stream. Call [`next`](Self::next) afterwards until it returns
    /// `None`.
    pub(super) fn feed(&mut self, chunk: &[u8]) {
        self.bytes.drain(..self.start);
        self.start = 0;
        self.bytes.extend_from_slice(chunk);
    }

    /// Returns the next complete line, sanitized.
    pub(super) fn next(&mut self) -> Option<String> {
        let rest = &self.bytes[self.start..];
        let window = &rest[..rest.len().min(MAX_LINE + 1)];
        let (length, taken) = match window.iter().position(|&byte| byte == b'\n') {
            Some(newline) => (newline, newline + 1),
            None if rest.len() > MAX_LINE => {
                let cut = cut(window);
                (cut, cut)
            }
            None => return None,
        };
        let line = sanitize(&rest[..length]);
        self.start += taken;
        Some(line)
    }

    /// Returns the last line of the stream, if it does not end with a newline.
    pub(super) fn finish(&mut self) -> Option<String> {
        let rest = &self.bytes[self.start..];
        let line = (!rest.is_empty()).then(|| sanitize(rest));
        self.bytes.clear();
        self.start = 0;
        line
    }
}

/// Where to split `window`, which has `MAX_LINE + 1` bytes: between two UTF-8 characters.
fn cut(window: &[u8]) -> usize {
    let continues = |at: &usize| window[*at] & 0b1100_0000 == 0b1000_0000;
    // A character has at most three continuation bytes. With more it is invalid and can be split
    // anywhere.
    (MAX_LINE - 3..=MAX_LINE).rev().find(|at| !continues(at)).unwrap_or(MAX_LINE)
}

/// Removes control characters and escape sequences other than tabs and SGR.
pub(super) fn sanitize(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let mut line = String::with_capacity(text.len());
    let mut rest = text.as_ref();
    let mut coloured = false;
    while let Some(next) = rest.chars().next() {
        let tail = &rest[next.len_utf8()..];
        rest = match next {
            '\x1b' => {
                let length = escape(tail);
                if is_colour(&tail[..length]) {
                    line.push(next);
                    line.push_str(&tail[..length]);
                    coloured = true;
                }
                &tail[length..]
            }
            // Also the 8-bit forms of CSI and OSC, U+0080 to U+009F.
            next if next.is_control() && next != '\t' => tail,
            next => {
                line.push(next);
                tail
            }
        };
    }
    if coloured {
        line.push_str(RESET);
    }
    line
}

/// Length in bytes of the escape sequence that follows an ESC in `text` (ECMA-48, 5.3 to 5.6).
fn escape(text: &str) -> usize {
    let bytes = text.as_bytes();
    let run = |from: usize, first: u8, last: u8| {
        from + bytes[from..].iter().take_while(|&&byte| (first..=last).contains(&byte)).count()
    };
    // The end after the final byte. Without a final byte the sequence was truncated.
    let ended = |at: usize, first: u8| match bytes.get(at) {
        Some(byte) if (first..=0x7e).contains(byte) => at + 1,
        _ => at,
    };
    match bytes.first() {
        Some(b'[') => ended(run(run(1, 0x30, 0x3f), 0x20, 0x2f), 0x40),
        // Strings (OSC, DCS, SOS, PM, APC), up to BEL or ST. The caller handles the ESC of ST.
        Some(b']' | b'P' | b'X' | b'^' | b'_') => {
            bytes.iter().position(|byte| matches!(byte, 0x07 | 0x1b)).unwrap_or(bytes.len())
        }
        _ => ended(run(0, 0x20, 0x2f), 0x30),
    }
}

/// Returns whether the sequence after an ESC is SGR: `[`, numbers, `m`.
fn is_colour(sequence: &str) -> bool {
    let numbers = sequence.strip_prefix('[').and_then(|rest| rest.strip_suffix('m'));
    numbers.is_some_and(|numbers| {
        numbers.bytes().all(|byte| byte.is_ascii_digit() || b";:".contains(&byte))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(chunks: &[&[u8]]) -> Vec<String> {
        let mut splitter = Splitter::default();
        let mut lines = Vec::new();
        for chunk in chunks {
            splitter.feed(chunk);
            lines.extend(std::iter::from_fn(|| splitter.next()));
            assert!(splitter.bytes.len() - splitter.start <= MAX_LINE);
        }
        lines.extend(splitter.finish());
        lines
    }

    #[test]
    fn lines_do_not_depend_on_chunk_boundaries() {
        let text = b"one\n\nthree\nrest";
        let whole = lines(&[text]);
        assert_eq!(whole, ["one", "", "three", "rest"]);
        for cut in 0..text.len() {
            assert_eq!(lines(&[&text[..cut], &text[cut..]]), whole);
        }
        let bytes: Vec<&[u8]> = text.chunks(1).collect();
        assert_eq!(lines(&bytes), whole);
    }

    #[test]
    fn a_long_line_is_split() {
        let exact = [vec![b'x'; MAX_LINE], vec![b'\n']].concat();
        assert_eq!(lines(&[&exact]), ["x".repeat(MAX_LINE)]);
        let longer = vec![b'x'; 2 * MAX_LINE + 5];
        let lengths: Vec<usize> =
            lines(&longer.chunks(1000).collect::<Vec<_>>()).iter().map(String::len).collect();
        assert_eq!(lengths, [MAX_LINE, MAX_LINE, 5]);
    }

    #[test]
    fn a_long_line_is_not_split_inside_a_character() {
        for shift in 0..4 {
            let text = "y".repeat(shift) + &"\u{1f30a}".repeat(MAX_LINE / 2);
            let split = lines(&[text.as_bytes()]);
            assert!(split.iter().all(|line| line.len() <= MAX_LINE));
            assert_eq!(split.concat(), text);
        }
        // Continuation bytes alone are split anywhere.
        assert_eq!(lines(&[&vec![0x80; MAX_LINE + 1]]).len(), 2);
    }

    #[test]
    fn invalid_utf_8_is_replaced() {
        assert_eq!(sanitize(b"a\xffb"), "a\u{fffd}b");
        assert_eq!(sanitize("grün".as_bytes()), "grün");
    }

    #[test]
    fn colours_are_kept_and_reset_at_the_end_of_the_line() {
        assert_eq!(sanitize(b"\x1b[1;31mred\x1b[0m"), "\x1b[1;31mred\x1b[0m\x1b[0m");
        assert_eq!(sanitize(b"\x1b[38:5:9mx"), "\x1b[38:5:9mx\x1b[0m");
        assert_eq!(sanitize(b"\ttab"), "\ttab");
    }

    #[test]
    fn other_control_sequences_are_removed() {
        for (written, expected) in [
            ("a\x1b[2Jb", "ab"),
            ("a\x1b[?1049hb", "ab"),
            ("a\x1b[>4;2mb", "ab"),
            ("a\x1b[5;5Hb", "ab"),
            ("a\x1b]0;title\x07b", "ab"),
            ("a\x1b]52;c;cGFzdGU=\x1b\\b", "ab"),
            ("a\x1bPq#0\x1b\\b", "ab"),
            ("a\x1bcb", "ab"),
            ("a\x1b(0b", "ab"),
            ("a\x1b7b", "ab"),
            ("a\rb\x08c\x07d\x00e\x7ff", "abcdef"),
            ("a\u{9b}2Jb", "a2Jb"),
            ("a\x1b", "a"),
            ("a\x1b[31", "a"),
            ("a\x1b]0;never ended", "a"),
            ("a\x1b[\u{e9}m", "a\u{e9}m"),
            ("end\r", "end"),
        ] {
            assert_eq!(sanitize(written.as_bytes()), expected, "{written:?}");
        }
    }

    proptest::proptest! {
        #[test]
        fn only_tabs_and_colours_remain_of_any_input(bytes: Vec<u8>) {
            let line = sanitize(&bytes);
            let mut rest = line.as_str();
            while let Some(at) = rest.find(|c: char| c.is_control() && c != '\t') {
                let sequence = &rest[at..];
                let end = sequence.find('m').map(|end| &sequence[1..=end]);
                proptest::prop_assert!(sequence.starts_with('\x1b') && end.is_some_and(is_colour), "{line:?}");
                rest = &sequence[1..];
            }
        }
    }
}
