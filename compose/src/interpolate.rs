//! Variable interpolation in values: `$NAME`, `${NAME}`, and forms with a default or an error.
//!
//! | form | value |
//! |---|---|
//! | `$$` | a dollar sign |
//! | `$NAME`, `${NAME}` | the variable; an empty string and a warning if it is not set |
//! | `${NAME:-WORD}`, `${NAME-WORD}` | the variable, or WORD if it is not set (`:`: or empty) |
//! | `${NAME:+WORD}`, `${NAME+WORD}` | WORD if the variable is set (`:`: and not empty), otherwise an empty string |
//! | `${NAME:?WORD}`, `${NAME?WORD}` | the variable, or an error with the message WORD |
//!
//! WORD may contain variables itself, nested up to [`MAX_NESTING`] levels. It ends at the first `}`
//! that closes none of them, and is evaluated only if it is used. The reference is the `template`
//! package of compose-go.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use super::tree::MAX_TEXT;
use std::collections::BTreeSet;

/// The maximum nesting depth of variables in words.
pub(super) const MAX_NESTING: usize = 16;

/// Why a value cannot be interpolated.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum InterpolationError {
    /// A dollar sign without a valid form after it.
    #[error("{0:?} is not a valid variable; write $$ for a literal dollar sign")]
    Malformed(String),
    /// The closing brace is missing.
    #[error("{0:?} has no closing brace")]
    Unclosed(String),
    /// A variable with `?` has no value.
    #[error("required variable {name} has no value{}{message}", if .message.is_empty() { "" } else { ": " })]
    Required { name: String, message: String },
    /// The nesting exceeds [`MAX_NESTING`].
    #[error("variables are nested more than {MAX_NESTING} levels deep")]
    TooDeep,
    /// The result exceeds the allowance.
    #[error("values exceed {} MiB after variable expansion; shorten them", MAX_TEXT >> 20)]
    TooLong,
}

/// An interpolation: the source of the variables, the size limit and the unset variables.
pub(super) struct Interpolation<'a> {
    lookup: &'a dyn Fn(&str) -> Option<String>,
    /// The bytes that the result may still grow by.
    allowance: usize,
    /// Variables without a value and without a default.
    pub(super) unset: BTreeSet<String>,
}

impl<'a> Interpolation<'a> {
    /// Takes variables from `lookup` and produces at most `allowance` bytes.
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

    /// Evaluates the content of a pair of braces.
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

/// Splits `text` after the variable name at its beginning. The name may be empty.
fn split_name(text: &str) -> (&str, &str) {
    let named = |c: char| c.is_ascii_alphanumeric() || c == '_';
    if text.starts_with(|c: char| c.is_ascii_digit()) {
        return ("", text);
    }
    text.split_at(text.find(|c| !named(c)).unwrap_or(text.len()))
}

/// Returns the index of the brace that closes the expression whose content begins at `text`.
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

/// Returns the beginning of `text`, short enough for a message.
fn shown(text: &str) -> String {
    const SHOWN: usize = 32;
    let short: String = text.chars().take(SHOWN).collect();
    if short.len() < text.len() { short + "..." } else { short }
}

/// `text` with control characters replaced by spaces.
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
    fn all_forms_of_compose_are_interpolated() {
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
            ("${SET:-${NEVER?evaluated}}", "value"),
        ] {
            assert_eq!(interpolated(text), Ok(value.to_owned()), "{text}");
        }
    }

    #[test]
    fn malformed_variables_are_rejected() {
        for (text, error) in [
            ("cost: 5$", r#""$" is not a valid variable; write $$ for a literal dollar sign"#),
            ("$1", r#""$1" is not a valid variable; write $$ for a literal dollar sign"#),
            ("${}", r#""${}" is not a valid variable; write $$ for a literal dollar sign"#),
            (
                "${SET!x}",
                r#""${SET!x}" is not a valid variable; write $$ for a literal dollar sign"#,
            ),
            ("${SET", r#""${SET" has no closing brace"#),
            ("${MISSING?}", "required variable MISSING has no value"),
            ("${EMPTY:?set it\nplease}", "required variable EMPTY has no value: set it please"),
            (
                "$LONG$LONG$LONG$LONG$LONG",
                "values exceed 4 MiB after variable expansion; shorten them",
            ),
        ] {
            assert_eq!(interpolated(text), Err(error.to_owned()), "{text}");
        }
    }

    #[test]
    fn words_nest_up_to_the_limit() {
        let nested =
            |depth: usize| format!("{}x{}", "${MISSING:-".repeat(depth), "}".repeat(depth));
        assert_eq!(interpolated(&nested(MAX_NESTING)), Ok("x".to_owned()));
        assert_eq!(
            interpolated(&nested(MAX_NESTING + 1)),
            Err("variables are nested more than 16 levels deep".to_owned())
        );
    }

    #[test]
    fn unset_variables_are_recorded() {
        let mut interpolation = Interpolation::new(&lookup, 100);
        interpolation.of("$ONE ${SET} ${TWO} ${THREE:-3} $ONE").unwrap();
        assert!(interpolation.unset.iter().eq(["ONE", "TWO"]));
    }

    proptest! {
        #[test]
        fn any_text_is_interpolated_or_rejected(text in r"([$\{\}:?+\-a-zA-Z_0-9é]|\$\{|SET|MISSING){0,40}") {
            let _ = interpolated(&text);
        }

        #[test]
        fn text_without_dollars_is_unchanged(text in "[^$]{0,100}") {
            prop_assert_eq!(interpolated(&text), Ok(text));
        }
    }
}
