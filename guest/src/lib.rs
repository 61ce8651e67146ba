//! Mail triage in plain Rust: how urgent a mail is, which issue it belongs to, and which queue takes it.
//!
//! ```
//! use triage_rules::{Priority, Rules, triage};
//!
//! let mail = b"From: night@example.org\nTo: help@example.com\nSubject: Outage: the shop is down\n\nSince 02:10.\n";
//! let verdict = triage(mail, &Rules::defaults()).expect("a mail");
//! assert_eq!((verdict.priority, verdict.queue.as_str()), (Priority::Urgent, "operations"));
//! ```
//!
//! [`triage`] looks at the mail alone: the same bytes and rules always give the same verdict, without clock or randomness.
//! [`triage_with`] knows earlier mails from a [`memory::Memory`] as well, and gives a mail that comes again what it gave it
//! before. Time and memory are bounded, whatever the mail: header fields are looked at once, attachments are never
//! decoded, and at most [`mail::TEXT_MAX_BYTES`] of text are read.
//!
//! Reading order: [`mail`] (what is read from the bytes), [`words`] (how words are found in it), [`rules`] (which
//! words, and the configuration), then one module for each decision: [`priority`] (with [`heat`]), [`issue`] (with
//! [`thread`], [`keys`], [`subject`], [`likeness`]), [`queue`] (with [`routes`], and `votes` of an issue's mails). What was
//! learned from sorted mails is in [`model`], of the [`features`] of a mail.

pub mod mail;
pub mod words;

pub mod rules;

pub mod priority;
pub mod queue;
pub mod routes;

pub mod features;
pub mod model;

pub mod memory;

pub mod heat;
pub mod issue;
pub mod keys;
pub mod likeness;
pub mod subject;
pub mod thread;

mod votes;

use mail::Mail;
use memory::{Away, Memory};
use thread::Thread;
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

/// Why there is no verdict.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Failure {
    /// These bytes are no mail, for this reason.
    Reject(String),
    /// The memory is away, for this reason. It may be back when the mail is tried again.
    Away(String),
}

/// Decides about one mail, given as the bytes a mail server would deliver, by itself alone.
///
/// Lines may end in CRLF or LF, and an mbox line `From …` may come first.
///
/// # Errors
/// The reason why these bytes are no mail.
pub fn triage(data: &[u8], rules: &Rules) -> Result<Verdict, String> {
    let mail = Mail::read(data)?;
    let findings = Findings::search(&mail, rules.lexicon());
    let mut reasons = Reasons::default();
    let queue = queue::choose(&mail, &findings, rules, &mut reasons).name;
    let priority = priority::judge(&mail, &findings, rules, queue, &mut reasons);
    let issue = issue::identify(&mail, rules, &mut reasons);
    Ok(Verdict { priority, issue, queue: queue.to_owned(), reasons: reasons.list })
}

/// Decides about one mail by itself and by what `memory` has of others, and remembers it.
///
/// `received` is when it was received, in seconds since 1970: the time of a mail that does not say when it was
/// written. A mail that is decided about again gets the same verdict, whatever came between, as long as the memory
/// lasts.
///
/// # Errors
/// [`Failure::Reject`] for what is no mail, [`Failure::Away`] when the memory does not answer; then the mail may be
/// half remembered, which does no harm.
pub fn triage_with(data: &[u8], received: u64, rules: &Rules, memory: &mut impl Memory) -> Result<Verdict, Failure> {
    let mail = Mail::read(data).map_err(Failure::Reject)?;
    let time = mail.time().unwrap_or(received);
    let findings = Findings::search(&mail, rules.lexicon());
    let (mut reasons, mut of_issue) = (Reasons::default(), Reasons::default());
    let choice = queue::choose(&mail, &findings, rules, &mut reasons);
    let thread = Thread::read(&mail);
    let away = |Away(reason)| Failure::Away(reason);
    let (issue, kept) = issue::recall(&mail, &thread, rules, time, &choice, memory, &mut of_issue).map_err(away)?;
    let queue = kept.unwrap_or_else(|| choice.name.to_owned());
    if queue != choice.name {
        // Why it would go elsewhere is of no interest any more.
        reasons = Reasons::default();
        reasons.add(&["its issue is in queue ", &queue]);
    }
    let mut priority = priority::judge(&mail, &findings, rules, &queue, &mut reasons);
    for reason in &of_issue.list {
        reasons.add(&[reason]);
    }
    if let (Issue::Existing(id), Some(raised)) = (&issue, priority.raised())
        && heat::is_hot(thread::hash(id.as_bytes()), thread.own, time, rules.heat(), memory).map_err(away)?
    {
        reasons.add(&["many mails about this issue within an hour"]);
        priority = raised;
    }
    Ok(Verdict { priority, issue, queue, reasons: reasons.list })
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
        // Looks at all of them: faster than to stop at the first.
        if sentence.bytes().fold(false, |found, byte| found | !(0x20..0x7f).contains(&byte)) {
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
