//! Variables in values: `$NAME`, `${NAME}`, and with a word for what to do if it is missing.
//!
//! | form | value |
//! |---|---|
//! | `$$` | a dollar sign |
//! | `$NAME`, `${NAME}` | the variable; nothing, and a warning, if it is not set |
//! | `${NAME:-WORD}`, `${NAME-WORD}` | the variable, or WORD if it is not set (`:`: or empty) |
//! | `${NAME:+WORD}`, `${NAME+WORD}` | WORD if the variable is set (`:`: and not empty), otherwise nothing |
//! | `${NAME:?WORD}`, `${NAME?WORD}` | the variable, or an error that says WORD |
//!
//! WORD may hold variables itself, [`MAX_NESTING`] deep, and ends at the first `}` that is not
//! theirs. It is looked at only if it is used. The reference is the `template` package of
//! compose-go.

use std::collections::BTreeSet;

/// How deep variables may stand in the words of others.
pub(super) const MAX_NESTING: usize = 16;

/// Why a value cannot be interpolated.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum InterpolationError {
    /// A dollar sign begins nothing that is known.
    #[error("{0:?} is no variable; write $$ for a dollar sign")]
    Malformed(String),
    /// There is no closing brace.
    #[error("{0:?} has no closing brace")]
    Unclosed(String),
    /// A variable that must be there is not.
    #[error("variable {name} is missing{}{message}", if .message.is_empty() { "" } else { ": " })]
    Required {
        /// Which.
        name: String,
        /// What the file says about it.
        message: String,
    },
    /// Words in words in words.
    #[error("variables nest more than {MAX_NESTING} deep")]
    TooDeep,
    /// The result exceeds what it may have.
    #[error("the values of the file get too long with their variables")]
    TooLong,
}

/// Where variables come from and what became of them.
pub(super) struct Interpolation<'a> {
    lookup: &'a dyn Fn(&str) -> Option<String>,
    /// How many bytes there may be yet.
    allowance: usize,
    /// Variables that were not set and had no default.
    pub(super) unset: BTreeSet<String>,
}

impl<'a> Interpolation<'a> {
    /// Takes variables from `lookup` and makes `allowance` bytes at most.
    pub(super) fn new(lookup: &'a dyn Fn(&str) -> Option<String>, allowance: usize) -> Self {
        Self { lookup, allowance, unset: BTreeSet::new() }
    }

    /// `text` with its variables replaced.
    pub(super) fn of(&mut self, text: &str) -> Result<String, InterpolationError> {
        self.nested(text, 0)
    }

    fn nested(&mut self, text: &str, depth: usize) -> Result<String, InterpolationError> {
        if depth > MAX_NESTING {
            return Err(InterpolationError::TooDeep);
        }
        let mut out = String::new();
        let mut rest = text;
        while let Some(dollar) = rest.find('$') {
            self.push(&mut out, &rest[..dollar])?;
            let behind = &rest[dollar + 1..];
            if let Some(after) = behind.strip_prefix('$') {
                self.push(&mut out, "$")?;
                rest = after;
            } else if let Some(braced) = behind.strip_prefix('{') {
                let end = closing_brace(braced)
                    .ok_or_else(|| InterpolationError::Unclosed(shown(&rest[dollar..])))?;
                let value = self.substitute(&braced[..end], depth)?;
                self.push(&mut out, &value)?;
                rest = &braced[end + 1..];
            } else {
                let (name, after) = split_name(behind);
                if name.is_empty() {
                    return Err(InterpolationError::Malformed(shown(&rest[dollar..])));
                }
                let value = self.variable(name);
                self.push(&mut out, &value)?;
                rest = after;
            }
        }
        self.push(&mut out, rest)?;
        Ok(out)
    }

    /// What stands between braces.
    fn substitute(&mut self, inside: &str, depth: usize) -> Result<String, InterpolationError> {
        let (name, operation) = split_name(inside);
        let malformed = || InterpolationError::Malformed(shown(&format!("${{{inside}}}")));
        if name.is_empty() {
            return Err(malformed());
        }
        if operation.is_empty() {
            return Ok(self.variable(name));
        }
        let (empty_counts, operation) = match operation.strip_prefix(':') {
            Some(operation) => (false, operation),
            None => (true, operation),
        };
        let value = (self.lookup)(name).filter(|value| empty_counts || !value.is_empty());
        let mut characters = operation.chars();
        let operator = characters.next();
        let word = characters.as_str();
        match (operator, value) {
            (Some('-' | '?'), Some(value)) => Ok(value),
            (Some('-'), None) | (Some('+'), Some(_)) => self.nested(word, depth + 1),
            (Some('+'), None) => Ok(String::new()),
            (Some('?'), None) => {
                let message = shown_line(&self.nested(word, depth + 1)?);
                Err(InterpolationError::Required { name: name.to_owned(), message })
            }
            _ => Err(malformed()),
        }
    }

    fn variable(&mut self, name: &str) -> String {
        (self.lookup)(name).unwrap_or_else(|| {
            self.unset.insert(name.to_owned());
            String::new()
        })
    }

    fn push(&mut self, out: &mut String, piece: &str) -> Result<(), InterpolationError> {
        self.allowance =
            self.allowance.checked_sub(piece.len()).ok_or(InterpolationError::TooLong)?;
        out.push_str(piece);
        Ok(())
    }
}

/// The name at the beginning of `text`, which may be empty, and what follows it.
fn split_name(text: &str) -> (&str, &str) {
    let named = |c: char| c.is_ascii_alphanumeric() || c == '_';
    if text.starts_with(|c: char| c.is_ascii_digit()) {
        return ("", text);
    }
    text.split_at(text.find(|c| !named(c)).unwrap_or(text.len()))
}

/// Where the brace is that closes what `text` is the inside of.
fn closing_brace(text: &str) -> Option<usize> {
    let bytes = text.as_bytes();
    let (mut at, mut open) = (0, 1);
    while let Some(&byte) = bytes.get(at) {
        match (byte, bytes.get(at + 1)) {
            (b'$', Some(b'$')) => at += 1,
            (b'$', Some(b'{')) => {
                open += 1;
                at += 1;
            }
            (b'}', _) => {
                open -= 1;
                if open == 0 {
                    return Some(at);
                }
            }
            _ => {}
        }
        at += 1;
    }
    None
}

/// As much of `text` as a message needs.
fn shown(text: &str) -> String {
    const SHOWN: usize = 32;
    let short: String = text.chars().take(SHOWN).collect();
    if short.len() < text.len() { short + "..." } else { short }
}

/// `text` on one line.
fn shown_line(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn lookup(name: &str) -> Option<String> {
        match name {
            "SET" => Some("value".to_owned()),
            "EMPTY" => Some(String::new()),
            "LONG" => Some("x".repeat(1000)),
            _ => None,
        }
    }

    fn interpolated(text: &str) -> Result<String, String> {
        Interpolation::new(&lookup, 4000).of(text).map_err(|error| error.to_string())
    }

    #[test]
    fn every_form_of_compose_is_replaced() {
        for (text, value) in [
            ("plain", "plain"),
            ("", ""),
            ("$SET", "value"),
            ("a-$SET-b", "a-value-b"),
            ("${SET}s", "values"),
            ("$SET.x", "value.x"),
            ("$$SET", "$SET"),
            ("$$$SET", "$value"),
            ("$MISSING!", "!"),
            ("${MISSING:-x}", "x"),
            ("${MISSING-x}", "x"),
            ("${EMPTY:-x}", "x"),
            ("${EMPTY-x}", ""),
            ("${SET:-x}", "value"),
            ("${SET:+x}", "x"),
            ("${EMPTY:+x}", ""),
            ("${EMPTY+x}", "x"),
            ("${MISSING+x}", ""),
            ("${SET:?no}", "value"),
            ("${EMPTY?no}", ""),
            ("${MISSING:-}", ""),
            ("${MISSING:-${SET}}", "value"),
            ("${MISSING:-a${EMPTY:-b}c}d", "abcd"),
            ("${MISSING:-$$}}", "$}"),
            ("${MISSING:-8080:80}", "8080:80"),
            ("${SET:-${NEVER?looked at}}", "value"),
        ] {
            assert_eq!(interpolated(text), Ok(value.to_owned()), "{text}");
        }
    }

    #[test]
    fn what_is_malformed_is_told() {
        for (text, error) in [
            ("cost: 5$", r#""$" is no variable; write $$ for a dollar sign"#),
            ("$1", r#""$1" is no variable; write $$ for a dollar sign"#),
            ("${}", r#""${}" is no variable; write $$ for a dollar sign"#),
            ("${SET!x}", r#""${SET!x}" is no variable; write $$ for a dollar sign"#),
            ("${SET", r#""${SET" has no closing brace"#),
            ("${MISSING?}", "variable MISSING is missing"),
            ("${EMPTY:?set it\nplease}", "variable EMPTY is missing: set it please"),
            (
                "$LONG$LONG$LONG$LONG$LONG",
                "the values of the file get too long with their variables",
            ),
        ] {
            assert_eq!(interpolated(text), Err(error.to_owned()), "{text}");
        }
    }

    #[test]
    fn words_nest_as_deep_as_stated_and_no_deeper() {
        let nested =
            |depth: usize| format!("{}x{}", "${MISSING:-".repeat(depth), "}".repeat(depth));
        assert_eq!(interpolated(&nested(MAX_NESTING)), Ok("x".to_owned()));
        assert_eq!(
            interpolated(&nested(MAX_NESTING + 1)),
            Err("variables nest more than 16 deep".to_owned())
        );
    }

    #[test]
    fn variables_that_are_not_set_are_remembered() {
        let mut interpolation = Interpolation::new(&lookup, 100);
        interpolation.of("$ONE ${SET} ${TWO} ${THREE:-3} $ONE").unwrap();
        assert!(interpolation.unset.iter().eq(["ONE", "TWO"]));
    }

    proptest! {
        #[test]
        fn any_text_is_replaced_or_refused(text in r"([$\{\}:?+\-a-zA-Z_0-9é]|\$\{|SET|MISSING){0,40}") {
            let _ = interpolated(&text);
        }

        #[test]
        fn text_without_dollars_is_left_alone(text in "[^$]{0,100}") {
            prop_assert_eq!(interpolated(&text), Ok(text));
        }
    }
}
