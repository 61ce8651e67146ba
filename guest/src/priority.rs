//! How soon somebody has to look at the mail.
//!
//! Points are added up: from 4 it is urgent, from 2 high, down to -2 low.
//!
//! | | subject | body | header |
//! |---|---|---|---|
//! | a word for `urgent` | 4 | 2 | |
//! | a word for `high` | 2 | 1 | |
//! | a word for `low` | -2 | -1 | |
//! | `Importance`, `X-Priority` or `Priority`: high; low | | | 2; -2 |
//! | written by a program (`Auto-Submitted`, `Precedence: bulk`, `junk` or `list`) | | | -2 |
//!
//! A model that was learned adds 4 for `urgent`, 2 for `high`, -2 for `low`.
//!
//! For each word list the best place counts, once, so that saying it often does not help. Mail for the queue `bulk`
//! is always low: advertisements are the most urgent mail of all.

use crate::Reasons;
use crate::mail::Mail;
use crate::rules::{BULK, Rules};
use crate::words::{Findings, Place, Topic};

/// How soon somebody has to look at a mail.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Priority {
    /// When there is time.
    Low,
    /// In turn.
    Normal,
    /// Before others.
    High,
    /// Now.
    Urgent,
}

impl Priority {
    /// The priority as it is written in a verdict.
    pub const fn as_str(self) -> &'static str {
        match self {
            Priority::Low => "low",
            Priority::Normal => "normal",
            Priority::High => "high",
            Priority::Urgent => "urgent",
        }
    }

    /// The priority with this name.
    pub fn of(name: &str) -> Option<Priority> {
        [Priority::Low, Priority::Normal, Priority::High, Priority::Urgent]
            .into_iter()
            .find(|known| known.as_str() == name)
    }

    /// The next higher priority, of what people wait for: nothing raises what is low or urgent.
    pub(crate) const fn raised(self) -> Option<Priority> {
        match self {
            Priority::Low | Priority::Urgent => None,
            Priority::Normal => Some(Priority::High),
            Priority::High => Some(Priority::Urgent),
        }
    }
}

/// Judges a mail that goes to this queue.
pub(crate) fn judge(
    mail: &Mail<'_>,
    findings: &Findings,
    rules: &Rules,
    queue: &str,
    reasons: &mut Reasons,
) -> Priority {
    let mut points = 0;
    for (value, name) in [
        (mail.fields.importance, "Importance"),
        (mail.fields.x_priority, "X-Priority"),
        (mail.fields.priority, "Priority"),
    ] {
        if let Some(claim) = claim(value) {
            points = if claim { 2 } else { -2 };
            reasons.add(&[name, if claim { " header: high" } else { " header: low" }]);
            break;
        }
    }
    if let Some(model) = rules.priority_model() {
        let guess = model.guess(mail);
        let learned = match Priority::of(guess.label) {
            Some(Priority::Urgent) => 4,
            Some(Priority::High) => 2,
            Some(Priority::Low) => -2,
            Some(Priority::Normal) | None => 0,
        };
        if learned != 0 && guess.confidence >= model.threshold() {
            points += learned;
            reasons.add(&["reads like mail of priority ", guess.label]);
        }
    }
    if is_automatic(mail, reasons) {
        points -= 2;
    }
    for (topic, in_subject, in_body) in [(Topic::Urgent, 4, 2), (Topic::High, 2, 1), (Topic::Low, -2, -1)] {
        let mut best = 0_i32;
        for finding in findings.iter(rules.lexicon()) {
            let counts = match finding.place {
                Place::Subject => in_subject,
                Place::Body => in_body,
                Place::Addressee => 0,
            };
            if finding.topic == topic && i32::abs(counts) > best.abs() {
                best = counts;
            }
        }
        if best != 0 {
            points += best;
            explain_words(findings, rules, topic, reasons);
        }
    }
    if queue == BULK {
        return Priority::Low;
    }
    match points {
        4.. => Priority::Urgent,
        2..4 => Priority::High,
        -1..2 => Priority::Normal,
        ..-1 => Priority::Low,
    }
}

/// Tells where words for a topic were found.
pub(crate) fn explain_words(findings: &Findings, rules: &Rules, topic: Topic, reasons: &mut Reasons) {
    for finding in findings.iter(rules.lexicon()) {
        if finding.topic == topic {
            let phrase = str::from_utf8(finding.phrase).unwrap_or_default();
            match finding.place {
                Place::Subject => reasons.add(&["subject says \"", phrase, "\""]),
                Place::Body => reasons.add(&["text says \"", phrase, "\""]),
                Place::Addressee => {}
            }
        }
    }
}

/// What the sender's mail program claims: high (true), low (false), or nothing in particular.
fn claim(value: &[u8]) -> Option<bool> {
    // "1 (Highest)" and "High" alike.
    let word = value.split(|&byte| matches!(byte, b' ' | b'\t' | b'(' | b';')).next().unwrap_or_default();
    let is = |wanted: &str| word.eq_ignore_ascii_case(wanted.as_bytes());
    if ["high", "highest", "urgent", "1", "2"].into_iter().any(is) {
        Some(true)
    } else if ["low", "lowest", "non-urgent", "4", "5"].into_iter().any(is) {
        Some(false)
    } else {
        None
    }
}

/// Whether no person wrote this to us.
fn is_automatic(mail: &Mail<'_>, reasons: &mut Reasons) -> bool {
    let auto = mail.fields.auto_submitted;
    if !auto.is_empty() && !auto.eq_ignore_ascii_case(b"no") {
        reasons.add(&["Auto-Submitted header: written by a program"]);
        return true;
    }
    [b"bulk", b"junk", b"list"].iter().any(|kind| mail.fields.precedence.eq_ignore_ascii_case(*kind))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every mail program has its own way to say "important".
    #[test]
    fn claims_are_understood() {
        for (value, expected) in [
            ("High", Some(true)),
            ("1 (Highest)", Some(true)),
            ("2", Some(true)),
            ("urgent", Some(true)),
            ("3 (Normal)", None),
            ("normal", None),
            ("", None),
            ("5(Lowest)", Some(false)),
            ("non-urgent", Some(false)),
        ] {
            assert_eq!(claim(value.as_bytes()), expected, "{value}");
        }
    }

    /// The words weigh as the table above says, and a quoted "urgent" weighs nothing.
    #[test]
    fn words_weigh_more_in_the_subject() {
        for (mail, expected) in [
            ("Subject: urgent\n\n", Priority::Urgent),
            ("Subject: question\n\nurgent", Priority::High),
            ("Subject: question\n\n> urgent", Priority::Normal),
            ("Subject: question\n\nhello\n-- \nurgent", Priority::Normal),
            ("Subject: important\n\n", Priority::High),
            ("Subject: question\n\nimportant", Priority::Normal),
            ("Subject: fyi\n\n", Priority::Low),
            ("Subject: urgent\nAuto-Submitted: auto-generated\n\n", Priority::High),
            ("Subject: question\nImportance: high\n\nurgent", Priority::Urgent),
            ("Subject: question\nX-Priority: 5\n\n", Priority::Low),
        ] {
            let verdict = crate::triage(mail.as_bytes(), &Rules::defaults()).expect(mail);
            assert_eq!(verdict.priority, expected, "{mail}");
        }
    }
}
