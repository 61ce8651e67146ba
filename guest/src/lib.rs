//! Mail triage in plain Rust: how urgent a mail is, which issue it belongs to, and which queue takes it.
//!
//! ```
//! use guest::{Priority, Rules, triage};
//!
//! let mail = b"From: night@example.org\nTo: help@example.com\nSubject: Outage: the shop is down\n\nSince 02:10.\n";
//! let verdict = triage(mail, &Rules::defaults()).expect("a mail");
//! assert_eq!((verdict.priority, verdict.queue.as_str()), (Priority::Urgent, "operations"));
//! ```
//!
//! The same bytes and rules always give the same verdict: no clock, no randomness, no memory of earlier mails.
//! Time and memory are bounded, whatever the mail: header fields are looked at once, attachments are never
//! decoded, and at most [`mail::TEXT_MAX_BYTES`] of text are read.
//!
//! Reading order: [`mail`] (what is read from the bytes), [`words`] (how words are found in it), [`rules`] (which
//! words, and the configuration), then one module for each decision: [`priority`], [`issue`], [`queue`].

pub mod mail;
pub mod words;

pub mod rules;

pub mod issue;
pub mod priority;
pub mod queue;

use mail::Mail;
use words::Findings;

pub use issue::Issue;
pub use priority::Priority;
pub use rules::Rules;

/// At most this many reasons are given.
pub const REASONS_MAX: usize = 16;
/// No reason is longer than this.
pub const REASON_MAX_BYTES: usize = 256;

/// What was decided about a mail, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// How soon somebody has to look at it.
    pub priority: Priority,
    /// Which issue it opens or belongs to.
    pub issue: Issue,
    /// Who takes it; always a valid queue name, see [`queue::is_name`].
    pub queue: String,
    /// What the decision rests on, for people: at most [`REASONS_MAX`] sentences of at most [`REASON_MAX_BYTES`].
    pub reasons: Vec<String>,
}

/// Decides about one mail, given as the bytes a mail server would deliver.
///
/// Lines may end in CRLF or LF, and an mbox line `From …` may come first.
///
/// # Errors
/// The reason why these bytes are no mail.
pub fn triage(data: &[u8], rules: &Rules) -> Result<Verdict, String> {
    let mail = Mail::read(data)?;
    let findings = Findings::search(&mail, rules.lexicon());
    let mut reasons = Reasons::default();
    let queue = queue::choose(&mail, &findings, rules, &mut reasons);
    let priority = priority::judge(&mail, &findings, rules, queue, &mut reasons);
    let issue = issue::identify(&mail, &mut reasons);
    Ok(Verdict { priority, issue, queue: rules.queue_name(queue).to_owned(), reasons: reasons.list })
}

/// The reasons given so far; keeps them within their bounds.
#[derive(Default)]
struct Reasons {
    list: Vec<String>,
}

impl Reasons {
    /// Adds the sentence that these pieces make, unless it is there already or there are enough.
    ///
    /// Pieces come from the rules or from header fields cut to size, and are cleaned of control characters here,
    /// once, so that no decision has to think of it.
    fn add(&mut self, pieces: &[&str]) {
        if self.list.len() >= REASONS_MAX {
            return;
        }
        if self.list.capacity() == 0 {
            self.list.reserve_exact(REASONS_MAX);
        }
        let mut sentence = pieces.concat();
        if sentence.bytes().any(|byte| !(0x20..0x7f).contains(&byte)) {
            sentence.retain(|c| !c.is_control());
        }
        if sentence.len() > REASON_MAX_BYTES {
            sentence.truncate(sentence.floor_char_boundary(REASON_MAX_BYTES));
        }
        if !self.list.contains(&sentence) {
            self.list.push(sentence);
        }
    }
}

#[cfg(test)]
mod fuzz;
#[cfg(test)]
mod tests;
