//! The books: what went in, and what came of each.

use crate::streams::{self, MAIL, Stored};
use anyhow::{Context as _, Result, ensure};
use async_nats::jetstream::Context;
use std::collections::BTreeMap;

/// What became of every mail that is in its stream.
#[derive(Clone, Debug, Default)]
pub struct Books {
    /// Mails.
    pub mails: u64,
    /// Verdicts.
    pub verdicts: usize,
    /// Dead letters by their reason.
    pub dead_letters: BTreeMap<String, usize>,
    /// The sequences of mails that have neither.
    pub lost: Vec<u64>,
    /// The sequences that more than one verdict or dead letter is about.
    pub doubled: Vec<u64>,
    /// The sequences that a verdict or dead letter is about, and no mail has.
    pub unknown: Vec<u64>,
    /// What there is about some of the last three kinds, a line each.
    evidence: Vec<String>,
}

/// So many mails with which something is wrong are told of.
const EVIDENCE_MAX: usize = 10;

impl Books {
    /// Reads all three streams. Whether something is still to come is for the caller to know.
    ///
    /// # Errors
    /// When one of them cannot be read.
    pub async fn of(jetstream: &Context) -> Result<Self> {
        let mut mails = streams::messages(jetstream, MAIL).await?;
        // A parked retry that came back is no mail of its own.
        mails.retain(|mail| !mail.subject.starts_with("replay."));
        let (verdicts, dead_letters) = (streams::verdicts(jetstream).await?, streams::dead_letters(jetstream).await?);
        let mut ends: BTreeMap<u64, Vec<&Stored>> = mails.iter().map(|mail| (mail.sequence, Vec::new())).collect();
        let mut books = Self { mails: mails.len() as u64, verdicts: verdicts.len(), ..Self::default() };
        for letter in &dead_letters {
            let reason = letter.header("Mailroom-Reason").context("a dead letter without a reason")?;
            *books.dead_letters.entry(reason.to_owned()).or_default() += 1;
        }
        for end in verdicts.iter().chain(&dead_letters) {
            let sequence = end.mail_sequence()?;
            if !ends.contains_key(&sequence) {
                books.unknown.push(sequence);
            }
            ends.entry(sequence).or_default().push(end);
        }
        let with = |wanted: fn(usize) -> bool| {
            ends.iter().filter(|(_, ends)| wanted(ends.len())).map(|(sequence, _)| *sequence).collect()
        };
        (books.lost, books.doubled) = (with(|ends| ends == 0), with(|ends| ends > 1));
        for sequence in books.lost.iter().chain(&books.doubled).chain(&books.unknown).take(EVIDENCE_MAX) {
            let mail = mails.iter().find(|mail| mail.sequence == *sequence);
            let text = mail.map_or("not in the stream".into(), |mail| String::from_utf8_lossy(&mail.payload));
            books.evidence.push(format!("mail {sequence}: {text}"));
            books.evidence.extend(ends.get(sequence).into_iter().flatten().map(|end| {
                let header = |name| end.header(name).unwrap_or("-");
                let (made, reason) = (header("Mailroom-Time"), header("Mailroom-Reason"));
                let deliveries = header("Mailroom-Deliveries");
                format!("  {} {}, made {made}, reason {reason}, deliveries {deliveries}", end.subject, end.sequence)
            }));
        }
        Ok(books)
    }

    /// Dead letters, whatever their reason.
    pub fn dead(&self) -> usize {
        self.dead_letters.values().sum()
    }

    /// Every mail has exactly one verdict or one dead letter, and there is nothing else.
    ///
    /// # Errors
    /// When it is not so; says which mails.
    pub fn balance(&self) -> Result<()> {
        let (lost, doubled, unknown) = (self.lost.len(), self.doubled.len(), self.unknown.len());
        ensure!(
            lost + doubled + unknown == 0,
            "of {} mails {lost} are lost and {doubled} have more than one end; {unknown} are unknown\n{}",
            self.mails,
            self.evidence.join("\n")
        );
        Ok(())
    }
}
