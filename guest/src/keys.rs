//! Issue keys that a ticket system puts into subjects.
//!
//! Without configuration the first of these in square brackets counts: `[#123]` is `#123`, `[Bug 123]` is `bug-123`, so
//! are `[Ticket 123]`, `[Case 123]`, `[Issue 123]`, each with or without `#`; `[ABC-123]` is itself. Configured
//! patterns take their place: in them `{n}` stands for 1 to 18 digits and `{P}` for the name of a project, 2 to 10
//! capital letters and digits. All else stands for itself, in either case: `Vorgang {n}` finds `Vorgang 12` and names it
//! `vorgang-12`.

use memchr::{memchr, memchr_iter};

/// At most so many patterns.
const PATTERNS_MAX: usize = 16;
/// No pattern is longer than this.
const PATTERN_MAX_BYTES: usize = 60;

/// Which keys are looked for.
#[derive(Clone, Debug, Default)]
pub struct Keys {
    /// None: the usual ones.
    patterns: Option<Vec<Vec<Piece>>>,
}

#[derive(Clone, Debug)]
enum Piece {
    Text(String),
    Number,
    Project,
}

impl Keys {
    /// Reads patterns, separated by commas. An empty list finds nothing.
    ///
    /// # Errors
    /// What is wrong with which pattern.
    pub fn read(list: &str) -> Result<Keys, String> {
        let patterns = list.split(',').map(str::trim).filter(|pattern| !pattern.is_empty());
        let patterns = patterns.map(read_pattern).collect::<Result<Vec<_>, _>>()?;
        if patterns.len() > PATTERNS_MAX {
            return Err(format!("{} patterns, at most {PATTERNS_MAX} are possible", patterns.len()));
        }
        Ok(Keys { patterns: Some(patterns) })
    }

    /// The first key in a subject.
    pub fn find(&self, subject: &[u8]) -> Option<String> {
        match &self.patterns {
            None => usual_key(subject),
            Some(patterns) => (0..subject.len()).find_map(|start| {
                let starts_word = start == 0 || !subject[start - 1].is_ascii_alphanumeric();
                let rest = &subject[start..];
                patterns.iter().filter(|_| starts_word).find_map(|pattern| key_at(rest, pattern))
            }),
        }
    }
}

fn read_pattern(pattern: &str) -> Result<Vec<Piece>, String> {
    if pattern.len() > PATTERN_MAX_BYTES {
        return Err(format!("the pattern {pattern:?} is longer than {PATTERN_MAX_BYTES} bytes"));
    }
    let mut pieces = Vec::new();
    let mut rest = pattern;
    while let Some(start) = rest.find('{') {
        if start > 0 {
            pieces.push(Piece::Text(rest[..start].to_owned()));
        }
        (rest, _) = if let Some(after) = rest[start..].strip_prefix("{n}") {
            (after, pieces.push(Piece::Number))
        } else if let Some(after) = rest[start..].strip_prefix("{P}") {
            (after, pieces.push(Piece::Project))
        } else {
            return Err(format!("in the pattern {pattern:?} a brace begins neither {{n}} nor {{P}}"));
        };
    }
    if !rest.is_empty() {
        pieces.push(Piece::Text(rest.to_owned()));
    }
    if pieces.iter().any(|piece| matches!(piece, Piece::Number)) {
        Ok(pieces)
    } else {
        Err(format!("the pattern {pattern:?} has no {{n}}"))
    }
}

/// The key that a subject begins with, if it is one of this pattern.
fn key_at(subject: &[u8], pattern: &[Piece]) -> Option<String> {
    let mut at = 0;
    for piece in pattern {
        let rest = &subject[at..];
        at += match piece {
            Piece::Text(text) => {
                rest.get(..text.len()).filter(|start| start.eq_ignore_ascii_case(text.as_bytes()))?.len()
            }
            Piece::Number => {
                let length = rest.iter().take_while(|byte| byte.is_ascii_digit()).count();
                (1..=18).contains(&length).then_some(length)?
            }
            Piece::Project => {
                let capital = |byte: &&u8| byte.is_ascii_uppercase() || byte.is_ascii_digit();
                let length = rest.iter().take_while(capital).count();
                ((2..=10).contains(&length) && rest[0].is_ascii_uppercase()).then_some(length)?
            }
        };
    }
    let whole = str::from_utf8(&subject[..at]).ok()?;
    let inside = whole.trim_matches(|c: char| "[](){}<>: ".contains(c));
    match inside.rsplit_once(' ') {
        Some((kind, number)) => Some(name(kind, number)),
        None => Some(inside.to_owned()),
    }
}

fn name(kind: &str, number: &str) -> String {
    kind.trim().to_ascii_lowercase() + "-" + number.trim_start_matches('#')
}

/// The first of the usual keys.
fn usual_key(subject: &[u8]) -> Option<String> {
    memchr_iter(b'[', subject).find_map(|start| {
        let rest = &subject[start + 1..];
        // The longest key, "Ticket #" with its number, fits.
        let rest = &rest[..rest.len().min(40)];
        let inside = rest[..memchr(b']', rest)?].trim_ascii();
        usual_key_of(str::from_utf8(inside).ok()?)
    })
}

fn usual_key_of(inside: &str) -> Option<String> {
    let number = |text: &str| matches!(text.len(), 1..=18) && text.bytes().all(|byte| byte.is_ascii_digit());
    if let Some(digits) = inside.strip_prefix('#') {
        return number(digits).then(|| inside.to_owned());
    }
    if let Some((kind, rest)) = inside.split_once(' ') {
        let rest = rest.trim_start();
        let is_kind = ["bug", "case", "issue", "ticket"].iter().any(|known| kind.eq_ignore_ascii_case(known));
        return (is_kind && number(rest.strip_prefix('#').unwrap_or(rest))).then(|| name(kind, rest));
    }
    let (project, digits) = inside.rsplit_once('-')?;
    let is_project = matches!(project.len(), 2..=10)
        && project.starts_with(|c: char| c.is_ascii_uppercase())
        && project.bytes().all(|byte| byte.is_ascii_uppercase() || byte.is_ascii_digit());
    (is_project && number(digits)).then(|| inside.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A key that a ticket system put into the subject is kept.
    #[test]
    fn keys_in_the_subject_are_found() {
        for (subject, expected) in [
            ("Re: [#123] printer", Some("#123")),
            ("[Bug 42] crash", Some("bug-42")),
            ("[ticket #7]", Some("ticket-7")),
            ("[list] [OPS-9] disk", Some("OPS-9")),
            ("[list] hello", None),
            ("[A-1] [abc-1] [ABC-x] [#] [Bug] [Bug x] #5 (#6) [#7", None),
            ("[\u{e9}t\u{e9}] [OPS-10]", Some("OPS-10")),
        ] {
            assert_eq!(Keys::default().find(subject.as_bytes()).as_deref(), expected, "{subject}");
        }
    }

    /// The operator's own patterns take the place of the usual ones.
    #[test]
    fn patterns_are_configured() {
        let keys = Keys::read("Vorgang {n}, (SUP#{n}), {P}-{n}:").expect("patterns");
        for (subject, expected) in [
            ("AW: vorgang 12 ist offen", Some("vorgang-12")),
            ("(sup#7) x", Some("sup#7")),
            ("OPS2-9: disk", Some("OPS2-9")),
            ("[Bug 12] XVorgang 1 Vorgang", None),
        ] {
            assert_eq!(keys.find(subject.as_bytes()).as_deref(), expected, "{subject}");
        }
        assert_eq!(Keys::read("").expect("none").find(b"[#1]"), None);
    }

    /// A mistake in a pattern is told.
    #[test]
    fn wrong_patterns_are_refused() {
        for (pattern, expected) in [
            ("Vorgang", "the pattern \"Vorgang\" has no {n}"),
            ("{x}{n}", "in the pattern \"{x}{n}\" a brace begins neither {n} nor {P}"),
            (&"x".repeat(61), "is longer than 60 bytes"),
            (&"{n},".repeat(17), "17 patterns"),
        ] {
            let error = Keys::read(pattern).expect_err(pattern);
            assert!(error.contains(expected), "{error}");
        }
    }
}
