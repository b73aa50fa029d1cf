//! From the bytes that a service writes to lines that a terminal can be trusted with. Pure.
//!
//! A line is what a newline ends, or [`MAX_LINE`] bytes. Invalid UTF-8 becomes U+FFFD. Of control
//! characters only the tab stays, of escape sequences only SGR (colours), so that no service can
//! move the cursor, retitle the window, paste, or make its text look like another's. A sequence is
//! removed as a whole, parameters and all.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

/// The longest line, in bytes; what is longer is told in pieces.
pub(super) const MAX_LINE: usize = 16 * 1024;

/// Ends every colour, so that none runs into the next line.
const RESET: &str = "\x1b[0m";

/// Cuts one stream into lines. Holds less than [`MAX_LINE`] and one chunk.
#[derive(Debug, Default)]
pub(super) struct Splitter {
    bytes: Vec<u8>,
    /// What lies before has been given out.
    start: usize,
}

impl Splitter {
    /// Takes the next bytes of the stream; then ask for [`next`](Self::next) until there is none.
    pub(super) fn feed(&mut self, chunk: &[u8]) {
        self.bytes.drain(..self.start);
        self.start = 0;
        self.bytes.extend_from_slice(chunk);
    }

    /// The next complete line, cleaned.
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
        let line = clean(&rest[..length]);
        self.start += taken;
        Some(line)
    }

    /// What the stream ended with, if that was not a newline.
    pub(super) fn finish(&mut self) -> Option<String> {
        let rest = &self.bytes[self.start..];
        let line = (!rest.is_empty()).then(|| clean(rest));
        self.bytes.clear();
        self.start = 0;
        line
    }
}

/// Where to cut a window of one byte more than a line may have: not inside a character, if it is
/// one.
fn cut(window: &[u8]) -> usize {
    let continues = |at: &usize| window[*at] & 0b1100_0000 == 0b1000_0000;
    // A character has at most three bytes that continue it; with more it is none, and any place is
    // as good.
    (MAX_LINE - 3..=MAX_LINE).rev().find(|at| !continues(at)).unwrap_or(MAX_LINE)
}

/// The line without what is not for a terminal.
pub(super) fn clean(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let mut line = String::with_capacity(text.len());
    let mut rest = text.as_ref();
    let mut coloured = false;
    while let Some(next) = rest.chars().next() {
        let behind = &rest[next.len_utf8()..];
        rest = match next {
            '\x1b' => {
                let length = escape(behind);
                if is_colour(&behind[..length]) {
                    line.push(next);
                    line.push_str(&behind[..length]);
                    coloured = true;
                }
                &behind[length..]
            }
            // Also the 8-bit forms of CSI and OSC, U+0080 to U+009F.
            next if next.is_control() && next != '\t' => behind,
            next => {
                line.push(next);
                behind
            }
        };
    }
    if coloured {
        line.push_str(RESET);
    }
    line
}

/// How many bytes of the text behind an ESC belong to its sequence (ECMA-48, 5.3 to 5.6).
fn escape(text: &str) -> usize {
    let bytes = text.as_bytes();
    let run = |from: usize, first: u8, last: u8| {
        from + bytes[from..].iter().take_while(|&&byte| (first..=last).contains(&byte)).count()
    };
    // The byte that ends the sequence, if there is one: otherwise it was cut off, and what is there
    // is all.
    let ended = |at: usize, first: u8| match bytes.get(at) {
        Some(byte) if (first..=0x7e).contains(byte) => at + 1,
        _ => at,
    };
    match bytes.first() {
        Some(b'[') => ended(run(run(1, 0x30, 0x3f), 0x20, 0x2f), 0x40),
        // Strings (OSC, DCS, SOS, PM, APC), up to BEL or ST; ST's own ESC is left to the caller.
        Some(b']' | b'P' | b'X' | b'^' | b'_') => {
            bytes.iter().position(|byte| matches!(byte, 0x07 | 0x1b)).unwrap_or(bytes.len())
        }
        _ => ended(run(0, 0x20, 0x2f), 0x30),
    }
}

/// Whether the sequence behind an ESC is SGR: `[`, numbers, `m`.
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
    fn lines_do_not_depend_on_how_they_were_written() {
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
    fn a_long_line_is_told_in_pieces() {
        let exact = [vec![b'x'; MAX_LINE], vec![b'\n']].concat();
        assert_eq!(lines(&[&exact]), ["x".repeat(MAX_LINE)]);
        let longer = vec![b'x'; 2 * MAX_LINE + 5];
        let told: Vec<usize> =
            lines(&longer.chunks(1000).collect::<Vec<_>>()).iter().map(String::len).collect();
        assert_eq!(told, [MAX_LINE, MAX_LINE, 5]);
    }

    #[test]
    fn a_long_line_is_not_cut_inside_a_character() {
        for shift in 0..4 {
            let text = "y".repeat(shift) + &"\u{1f30a}".repeat(MAX_LINE / 2);
            let told = lines(&[text.as_bytes()]);
            assert!(told.iter().all(|line| line.len() <= MAX_LINE));
            assert_eq!(told.concat(), text);
        }
        // Bytes that only continue are cut somewhere.
        assert_eq!(lines(&[&vec![0x80; MAX_LINE + 1]]).len(), 2);
    }

    #[test]
    fn invalid_utf_8_is_replaced() {
        assert_eq!(clean(b"a\xffb"), "a\u{fffd}b");
        assert_eq!(clean("grün".as_bytes()), "grün");
    }

    #[test]
    fn colours_stay_and_end_with_the_line() {
        assert_eq!(clean(b"\x1b[1;31mred\x1b[0m"), "\x1b[1;31mred\x1b[0m\x1b[0m");
        assert_eq!(clean(b"\x1b[38:5:9mx"), "\x1b[38:5:9mx\x1b[0m");
        assert_eq!(clean(b"\ttab"), "\ttab");
    }

    #[test]
    fn nothing_else_reaches_the_terminal() {
        for (written, told) in [
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
            assert_eq!(clean(written.as_bytes()), told, "{written:?}");
        }
    }

    proptest::proptest! {
        #[test]
        fn whatever_is_written_only_tabs_and_colours_control(bytes: Vec<u8>) {
            let line = clean(&bytes);
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
