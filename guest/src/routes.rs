//! Rules of the operator that send a mail to a queue whatever it says otherwise: the first that matches counts.
//!
//! A rule is a configuration key `route.NAME`, and rules are tried in the order of their names. Its value has three
//! parts, `QUEUE FIELD PATTERN`:
//!
//! ```text
//! route.10 = "billing to invoices@example.com"
//! route.20 = "security subject /CVE-\d{4}-\d+/"
//! route.30 = "operations header:X-Monitor production"
//! ```
//!
//! A field is `from`, `to` (and Cc, and the mailbox it arrived in), `subject`, `body` (what the sender wrote anew) or
//! `header:NAME`. A pattern matches anywhere in it, in either case; between slashes it is a regular expression of
//! `regex-lite`.

use memchr::memmem;
use regex_lite::{Regex, RegexBuilder};

use crate::mail::Mail;
use crate::queue;

/// At most so many rules.
pub const ROUTES_MAX: usize = 200;
/// No pattern is longer than this.
const PATTERN_MAX_BYTES: usize = 500;
/// No regular expression takes more memory than this, compiled.
const REGEX_MAX_BYTES: usize = 64 * 1024;

/// A rule.
#[derive(Clone, Debug)]
pub struct Route {
    /// What it is called in the configuration.
    pub name: String,
    /// Where the mail goes.
    pub queue: String,
    field: Field,
    pattern: Pattern,
}

#[derive(Clone, Debug, PartialEq)]
enum Field {
    From,
    To,
    Subject,
    Body,
    Header(String),
}

#[derive(Clone, Debug)]
enum Pattern {
    /// In lower case, as far as ASCII goes.
    Text(Vec<u8>),
    Regex(Regex),
}

impl Route {
    /// Reads a rule.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn read(name: &str, value: &str) -> Result<Route, String> {
        let usage = "it takes a queue, a field and a pattern, as in \"billing to invoices@example.com\"";
        let (queue, rest) = value.trim().split_once(' ').ok_or(usage)?;
        let (field, pattern) = rest.trim_start().split_once(' ').ok_or(usage)?;
        if !queue::is_name(queue) {
            return Err(format!("the queue {queue:?} has no proper name: 1 to 64 of a-z, 0-9, '_' and '-'"));
        }
        let field = match field {
            "from" => Field::From,
            "to" => Field::To,
            "subject" => Field::Subject,
            "body" => Field::Body,
            _ => match field.strip_prefix("header:") {
                Some(header) if !header.is_empty() => Field::Header(header.to_owned()),
                _ => return Err(format!("no field {field:?}; there are from, to, subject, body and header:NAME")),
            },
        };
        let pattern = pattern.trim();
        if !(1..=PATTERN_MAX_BYTES).contains(&pattern.len()) {
            return Err(format!("the pattern has {} bytes, 1 to {PATTERN_MAX_BYTES} are possible", pattern.len()));
        }
        let regex = pattern.strip_prefix('/').and_then(|rest| rest.strip_suffix('/'));
        let pattern = match regex {
            Some(regex) => {
                let built = RegexBuilder::new(regex).case_insensitive(true).size_limit(REGEX_MAX_BYTES).build();
                Pattern::Regex(built.map_err(|error| format!("the expression {regex:?}: {error}"))?)
            }
            None => Pattern::Text(pattern.to_ascii_lowercase().into_bytes()),
        };
        Ok(Route { name: name.to_owned(), queue: queue.to_owned(), field, pattern })
    }

    /// Whether it takes this mail.
    pub fn takes(&self, mail: &Mail<'_>) -> bool {
        let fields = &mail.fields;
        match &self.field {
            Field::From => self.pattern.is_in(&mail.decoded(fields.from)),
            Field::To => {
                [fields.to, fields.cc, fields.delivered_to].iter().any(|to| self.pattern.is_in(&mail.decoded(to)))
            }
            Field::Subject => self.pattern.is_in(&mail.subject),
            Field::Body => {
                let mut found = false;
                mail.new_text(|text| found = found || self.pattern.is_in(text));
                found
            }
            Field::Header(name) => mail.header(name).any(|value| self.pattern.is_in(&mail.decoded(value))),
        }
    }
}

impl Pattern {
    fn is_in(&self, text: &[u8]) -> bool {
        match self {
            Pattern::Text(pattern) => memmem::find(&text.to_ascii_lowercase(), pattern).is_some(),
            Pattern::Regex(regex) => regex.is_match(&String::from_utf8_lossy(text)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn takes(rule: &str) -> bool {
        let mail = b"From: =?utf-8?q?B=C3=A4rbel?= <b@example.org>\nTo: help@example.com\nCc: Invoices@Example.com\n\
            X-Monitor: Production\nX-Monitor: two\nSubject: CVE-2026-12 found\n\nDear all,\n> quoted\nregards\n";
        Route::read("1", rule).expect(rule).takes(&Mail::read(mail).expect("a mail"))
    }

    /// Every field can be asked, by a piece of it or by a regular expression.
    #[test]
    fn fields_are_matched() {
        for rule in [
            "a from Bärbel",
            "a from b@example.org",
            "a to invoices@example.com",
            "a subject cve-2026",
            "a subject /^cve-\\d+-\\d+ FOUND$/",
            "a body dear",
            "a body /dear|cher/",
            "a header:x-monitor production",
            "a header:X-Monitor /^two$/",
        ] {
            assert!(takes(rule), "{rule}");
        }
        for rule in ["a from help@", "a to b@example.org", "a subject dear", "a body quoted", "a header:X-Other x"] {
            assert!(!takes(rule), "{rule}");
        }
    }

    /// A mistake is told with what would be right.
    #[test]
    fn mistakes_are_told() {
        for (rule, expected) in [
            ("billing", "it takes a queue, a field and a pattern"),
            ("Billing to x", "the queue \"Billing\" has no proper name"),
            ("billing cc x", "no field \"cc\""),
            ("billing header: x", "no field \"header:\""),
            ("billing to /(/", "the expression \"(\""),
            (&format!("billing to {}", "x".repeat(501)), "the pattern has 501 bytes"),
        ] {
            let error = Route::read("1", rule).expect_err(rule);
            assert!(error.contains(expected), "{error}");
        }
    }
}
