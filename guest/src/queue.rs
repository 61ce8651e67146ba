//! Who takes the mail.
//!
//! The first of the operator's rules that matches decides ([`crate::routes`]). Then the issue does, if memory knows it: what
//! belongs together goes to the same queue, by what all its mails say ([`crate::votes`]). Then a model that was learned
//! does ([`crate::model`]), if it was built in and is sure enough; if it is not, the default queue takes the mail. Without a
//! model words decide.
//!
//! A word of the queue counts 3 in the subject and 1 in the body, there at most 4 altogether; an addressee whose
//! local part is the queue's name or one of its words counts 4. Header fields of mass mail speak for `bulk`. Below
//! 2 points nothing is decided and the default queue takes the mail; at a draw the first queue of the rules does.

use crate::mail::Mail;
use crate::model::Model;
use crate::rules::{QUEUES_MAX, Rules};
use crate::words::{Findings, Place, Topic, is_word};
use crate::{Reasons, priority};

const IN_SUBJECT: u32 = 3;
const AT_ADDRESSEE: u32 = 4;
const IN_BODY: u32 = 1;
const IN_BODY_MAX: u32 = 4;
const ENOUGH: u32 = 2;

/// Whether this may be the name of a queue: 1 to 64 of `a` to `z`, `0` to `9`, `_` and `-`.
pub fn is_name(name: &str) -> bool {
    matches!(name.len(), 1..=64) && name.bytes().all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'_' | b'-'))
}

/// Who takes a mail, by the mail alone.
pub(crate) struct Choice<'r> {
    /// The queue.
    pub name: &'r str,
    /// How it was chosen.
    pub by: By,
    /// How sure the model that was learned is, in percent; 0 if none chose.
    pub confidence: u32,
}

/// How a queue was chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum By {
    /// By the operator's order, which nothing changes.
    Route,
    /// By what the mail says.
    Content,
    /// By nothing: the default queue.
    Default,
}

/// Chooses the queue.
pub(crate) fn choose<'r>(mail: &Mail<'_>, findings: &Findings, rules: &'r Rules, reasons: &mut Reasons) -> Choice<'r> {
    if let Some(route) = rules.routes().iter().find(|route| route.takes(mail)) {
        reasons.add(&["rule route.", &route.name, ": ", &route.queue]);
        return Choice { name: &route.queue, by: By::Route, confidence: 0 };
    }
    let chosen = match rules.team_model() {
        Some(model) => learned(mail, &model, reasons),
        None => by_words(mail, findings, rules, reasons).map(|queue| (rules.queue_name(Some(queue)), 0)),
    };
    match chosen {
        Some((name, confidence)) => Choice { name, by: By::Content, confidence },
        None => Choice { name: rules.queue_name(None), by: By::Default, confidence: 0 },
    }
}

/// What a model makes of it, with its confidence in percent; none if it is not sure enough.
fn learned(mail: &Mail<'_>, model: &Model<'static>, reasons: &mut Reasons) -> Option<(&'static str, u32)> {
    let guess = model.guess(mail);
    let percent = (guess.confidence * 100.0) as u32;
    let confidence = percent.to_string();
    let is_sure = guess.confidence >= model.threshold();
    if is_sure {
        reasons.add(&["reads like mail for ", guess.label, ", confidence ", &confidence, " %"]);
    } else {
        let needed = ((model.threshold() * 100.0) as u32).to_string();
        reasons.add(&[
            "reads most like mail for ",
            guess.label,
            ", but confidence ",
            &confidence,
            " % is below ",
            &needed,
            " %: default queue",
        ]);
    }
    is_sure.then_some((guess.label, percent))
}

/// The queue that most words speak for; none if nothing does.
fn by_words(mail: &Mail<'_>, findings: &Findings, rules: &Rules, reasons: &mut Reasons) -> Option<u8> {
    let mut points = [Points::default(); QUEUES_MAX];
    for finding in findings.iter(rules.lexicon()) {
        if let Topic::Queue(queue) = finding.topic {
            let points = &mut points[usize::from(queue)];
            match finding.place {
                Place::Subject => points.other += IN_SUBJECT,
                Place::Addressee => points.addressee = true,
                Place::Body => points.body += IN_BODY,
            }
        }
    }
    for local_part in mail.addressees() {
        for (name, points) in rules.queues().iter().zip(&mut points) {
            points.addressee |= is_addressed(local_part, name);
        }
    }
    let mass = Mass::of(mail);
    if let Some(bulk) = rules.bulk() {
        points[usize::from(bulk)].other += mass.points();
    }

    // Of equal maxima `max_by_key` takes the last one.
    let sums = points[..rules.queues().len()].iter().map(Points::sum).enumerate().rev();
    let best = sums.max_by_key(|&(_, sum)| sum).filter(|&(_, sum)| sum >= ENOUGH);
    let queue = best.map(|(queue, _)| queue as u8)?;

    if points[usize::from(queue)].addressee {
        reasons.add(&["addressed to ", rules.queue_name(Some(queue))]);
    }
    if rules.bulk() == Some(queue) {
        mass.explain(reasons);
    }
    priority::explain_words(findings, rules, Topic::Queue(queue), reasons);
    Some(queue)
}

#[derive(Clone, Copy, Default)]
struct Points {
    addressee: bool,
    body: u32,
    other: u32,
}

impl Points {
    fn sum(&self) -> u32 {
        self.other + self.body.min(IN_BODY_MAX) + if self.addressee { AT_ADDRESSEE } else { 0 }
    }
}

/// Whether `billing@`, `billing+4711@` or `billing-eu@` stands for the queue `billing`.
fn is_addressed(local_part: &[u8], queue: &str) -> bool {
    local_part.get(..queue.len()).is_some_and(|start| start.eq_ignore_ascii_case(queue.as_bytes()))
        && local_part.get(queue.len()).is_none_or(|&next| !is_word(next))
}

/// What the header says about how many people got the same.
struct Mass {
    is_spam: bool,
    is_newsletter: bool,
    is_list: bool,
    is_bulk: bool,
}

impl Mass {
    fn of(mail: &Mail<'_>) -> Mass {
        let fields = &mail.fields;
        let precedence = fields.precedence;
        Mass {
            is_spam: fields.spam_flag.eq_ignore_ascii_case(b"yes"),
            is_newsletter: !fields.list_unsubscribe.is_empty() && fields.list_post.is_empty(),
            is_list: !fields.list_id.is_empty() || precedence.eq_ignore_ascii_case(b"list"),
            is_bulk: precedence.eq_ignore_ascii_case(b"bulk") || precedence.eq_ignore_ascii_case(b"junk"),
        }
    }

    fn points(&self) -> u32 {
        10 * u32::from(self.is_spam)
            + 3 * u32::from(self.is_newsletter)
            + 4 * u32::from(self.is_list)
            + u32::from(self.is_bulk)
    }

    fn explain(&self, reasons: &mut Reasons) {
        if self.is_spam {
            reasons.add(&["X-Spam-Flag header: a filter calls it spam"]);
        }
        if self.is_newsletter {
            reasons.add(&["List-Unsubscribe header: newsletter"]);
        }
        if self.is_list {
            reasons.add(&["List-Id header: mailing list"]);
        }
        if self.is_bulk {
            reasons.add(&["Precedence header: bulk mail"]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The name becomes part of a NATS subject: nothing that means something there may be in it.
    #[test]
    fn queue_names_are_plain() {
        for name in ["a", "front-desk_2", &"x".repeat(64)] {
            assert!(is_name(name), "{name}");
        }
        for name in ["", "A", "a.b", "a b", "*", ">", "ü", &"x".repeat(65)] {
            assert!(!is_name(name), "{name}");
        }
    }

    /// `billingham@` is a person, `billing+eu@` is the department.
    #[test]
    fn addressees_are_compared_by_words() {
        for (local_part, expected) in
            [("billing", true), ("Billing+4711", true), ("billingham", false), ("bill", false)]
        {
            assert_eq!(is_addressed(local_part.as_bytes(), "billing"), expected, "{local_part}");
        }
    }
}
