//! Which issue the mail belongs to.
//!
//! In this order, the first that answers decides:
//!
//! 1. a key in the subject: `[#123]` is `#123`, `[Bug 123]` is `bug-123`, `[ABC-123]` is itself; so are `[Ticket 123]`,
//!    `[Case 123]`, `[Issue 123]`, each with or without `#`; or what the configuration has in their place;
//! 2. the mails it answers, by `References` and `In-Reply-To`, the parent first ([`crate::thread`]);
//! 3. the series it is numbered in: `[2/3]` of the same sender within two to four hours;
//! 4. the same subject among the same people ([`crate::subject`]): a reply within 30 to 60 days, to a mail of somebody
//!    whom it names, or over the same mailing list; a mail that is no reply within two days of one of its sender's;
//! 5. nearly the same text as a mail that opened an issue, within seven days ([`crate::likeness`]), with the same
//!    subject but for numbers outside of tags, whoever sent it.
//!
//! 3 to 5 and the parents of a parent take [`Memory`]; without one the id that needs none decides: the id of a thread is
//! a hash of its first mail's Message-ID, `m-` and 16 hexadecimal digits. That mail gets it as a new issue, and every
//! reply finds the same Message-ID in its `References`: hosts that share nothing give both the same id.
//!
//! With memory the first mail that is seen of an issue opens it, whatever it says of itself, and every later one belongs
//! to it. Who is first is settled by a claim, so hosts that see two mails of a thread at the same moment agree, and a
//! mail that comes again gets what it got before.

use crate::likeness::Sketch;
use crate::mail::Mail;
use crate::memory::{Away, Memory};
use crate::queue::{Choice, is_name};
use crate::subject::Subject;
use crate::thread::{Thread, hash, hash_all};
use crate::votes::Votes;
use crate::{Reasons, Rules};

/// A subject is remembered in periods of so many seconds, and looked for in the present and the last one.
const SUBJECT_PERIOD: u64 = 30 * 24 * 3600;
/// A mail that is no reply belongs to one with its subject no older than this, in seconds.
const REPEAT_MAX: u64 = 2 * 24 * 3600;
/// A series is remembered in periods of so many seconds.
const SERIES_PERIOD: u64 = 2 * 3600;
/// Texts are compared with those no older than this, in seconds.
const LIKENESS_MAX: u64 = 7 * 24 * 3600;
/// At most so many of the people in a mail are looked for.
const PEOPLE_MAX: usize = 6;
/// No id is longer than this.
const ID_MAX_BYTES: usize = 256;

/// What a mail is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Issue {
    /// Nothing known: the mail opens the issue with this id.
    New(String),
    /// The mail belongs to the issue with this id.
    Existing(String),
}

impl Issue {
    /// The id, whether new or not.
    pub fn id(&self) -> &str {
        match self {
            Issue::New(id) | Issue::Existing(id) => id,
        }
    }

    /// `new` or `existing`, as it is written in a verdict.
    pub const fn kind(&self) -> &'static str {
        match self {
            Issue::New(_) => "new",
            Issue::Existing(_) => "existing",
        }
    }
}

/// Finds the issue of a mail by the mail alone.
pub(crate) fn identify(mail: &Mail<'_>, rules: &Rules, reasons: &mut Reasons) -> Issue {
    if let Some(key) = rules.keys().find(&mail.subject) {
        reasons.add(&["subject carries the issue key ", &key]);
        return Issue::Existing(key);
    }
    let thread = Thread::read(mail);
    if thread.parents.is_empty() {
        if !thread.has_id {
            reasons.add(&["no Message-ID: the issue is named after the content"]);
        }
        return Issue::New(name(thread.own));
    }
    let field = if thread.has_references { "References" } else { "In-Reply-To" };
    reasons.add(&[field, " header: reply in a thread"]);
    Issue::Existing(name(thread.root()))
}

/// Finds the issue of a mail by what memory has of others, and the queue that it is in, and remembers the mail.
///
/// `thread` is what the mail refers to, `time` is its own, in seconds since 1970; `choice` is the queue that the mail
/// alone would go to. Without a queue the issue is in none: nobody knew so far who takes it.
///
/// # Errors
/// The memory is away.
pub(crate) fn recall(
    mail: &Mail<'_>,
    thread: &Thread,
    rules: &Rules,
    time: u64,
    choice: &Choice<'_>,
    memory: &mut impl Memory,
    reasons: &mut Reasons,
) -> Result<(Issue, Option<String>), Away> {
    let record = remember(mail, rules, thread, time, choice, memory)?;
    let (why, queue) = (record.why, record.queue.filter(|queue| rules.knows_queue(queue)));
    let issue = if record.first == thread.own { Issue::New(record.issue) } else { Issue::Existing(record.issue) };
    why.explain(&issue, reasons);
    Ok((issue, queue))
}

/// The record of this mail, which is in memory afterwards.
fn remember(
    mail: &Mail<'_>,
    rules: &Rules,
    thread: &Thread,
    time: u64,
    choice: &Choice<'_>,
    memory: &mut impl Memory,
) -> Result<Record, Away> {
    let key = rules.keys().find(&mail.subject);
    let traces = Traces::of(mail, time);
    let own = mail_key(thread.own);
    let mut ask = vec![own.clone()];
    match &key {
        Some(key) => ask.push(format!("k.{:016x}", hash(key.as_bytes()))),
        None if thread.parents.is_empty() => ask.extend(traces.keys()),
        None => ask.extend(thread.parents.iter().map(|&id| mail_key(id))),
    }
    let mut answers = look_up(memory, &ask)?;
    let rest = answers.split_off(1);
    if let Some(Some(record)) = answers.pop() {
        // Delivered again, or its answer was here before it.
        return Ok(record);
    }
    let mut found = match &key {
        Some(_) => rest.iter().flatten().next().map(|record| record.clone().known_as(Why::Key)),
        None if thread.parents.is_empty() => traces.choose(&rest),
        None => rest.iter().flatten().next().map(|record| record.clone().known_as(Why::Answer)),
    };
    // The votes are counted where every mail of the issue looks, or nearly every one: at the mail that opened it.
    let tally = found.as_ref().and_then(|found| {
        let opener = mail_key(found.first);
        let at = ask[1..].iter().position(|known| known.starts_with("k.") || *known == opener)?;
        Some((ask[1 + at].clone(), rest.get(at)?.clone()?))
    });
    if let (Some(found), Some((_, tally))) = (&mut found, &tally) {
        found.votes.clone_from(&tally.votes);
    }
    if found.is_none() && key.is_none() && !thread.parents.is_empty() {
        found = traces.choose(&look_up(memory, &traces.keys())?);
    }

    let record = |issue, first, why, votes: Votes| {
        let votes = votes.with(choice);
        Record {
            issue,
            first,
            why,
            queue: votes.queue().map(str::to_owned),
            sender: traces.sender,
            time,
            about: traces.about,
            sketch: traces.sketch,
            votes,
        }
    };
    let opened = match &key {
        Some(key) => record(key.clone(), thread.own, Why::Key, Votes::default()),
        None if thread.parents.is_empty() => record(name(thread.own), thread.own, Why::First, Votes::default()),
        None => record(name(thread.root()), thread.own, Why::Answer, Votes::default()),
    };
    let mut is_settled = false;
    let mut mine = match found {
        Some(found) => record(found.issue, found.first, found.why, found.votes),
        None => {
            // Whoever is first under the key that all mails of the issue would look under, opens it.
            let (decisive, why) = match &key {
                Some(_) => (ask.pop(), Why::Key),
                None if !thread.parents.is_empty() => (Some(mail_key(thread.root())), Why::Answer),
                None if traces.series.is_empty() => (traces.subjects.first().cloned(), Why::Subject),
                None => (traces.series.first().cloned(), Why::Series),
            };
            match decisive {
                Some(decisive) => {
                    let claim = if why == Why::Answer { opened.clone().known_as(Why::Early) } else { opened.clone() };
                    let winner = claimed(memory, &decisive, &claim)?;
                    let fits = why != Why::Subject || traces.is_same_subject(&winner);
                    if winner.first == thread.own || !fits {
                        opened
                    } else {
                        record(winner.issue, winner.first, why, winner.votes)
                    }
                }
                None => opened,
            }
        }
    };
    if thread.parents.is_empty() && key.is_none() {
        // Its answer may have been here a moment ago, and named the issue after it.
        let winner = claimed(memory, &own, &mine)?;
        is_settled = true;
        mine = winner;
    }
    let mut entries = Vec::new();
    if !is_settled {
        entries.push((own, mine.write()));
    }
    if mine.first == thread.own {
        let bands = traces.bands();
        entries.extend(traces.subjects.first().into_iter().chain(&bands).map(|key| (key.clone(), mine.write())));
    } else if matches!(mine.why, Why::Subject | Why::Series | Why::Text) {
        // So that answers to it are found, and a long talk is not forgotten.
        entries.extend(traces.subjects.first().map(|key| (key.clone(), mine.write())));
    }
    if let Some((key, record)) = tally.filter(|(_, record)| record.votes != mine.votes) {
        entries.push((key, Record { votes: mine.votes.clone(), ..record }.write()));
    }
    if !entries.is_empty() {
        memory.set_many(&entries)?;
    }
    Ok(mine)
}

fn look_up(memory: &mut impl Memory, keys: &[String]) -> Result<Vec<Option<Record>>, Away> {
    if keys.is_empty() {
        return Ok(Vec::new());
    }
    let mut answers = memory.get_many(keys)?;
    answers.resize(keys.len(), None);
    Ok(answers.iter().map(|answer| Record::read(answer.as_deref()?)).collect())
}

/// Claims a key; the record that is there then. What others left there and is no record, is passed over.
fn claimed(memory: &mut impl Memory, key: &str, record: &Record) -> Result<Record, Away> {
    let there = memory.claim(key, &record.write())?;
    Ok(Record::read(&there).unwrap_or_else(|| record.clone()))
}

/// Why a mail belongs to its issue, as memory writes it down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Why {
    /// It opened it, and refers to nothing.
    First,
    Key,
    Answer,
    /// Its answer came before it.
    Early,
    Series,
    Subject,
    Text,
}

impl Why {
    const ALL: [(Why, &str); 7] = [
        (Why::First, "first"),
        (Why::Key, "key"),
        (Why::Answer, "answer"),
        (Why::Early, "early"),
        (Why::Series, "series"),
        (Why::Subject, "subject"),
        (Why::Text, "text"),
    ];

    fn explain(self, issue: &Issue, reasons: &mut Reasons) {
        let is_new = matches!(issue, Issue::New(_));
        match self {
            Why::First => {}
            Why::Key => reasons.add(&["subject carries the issue key ", issue.id()]),
            Why::Answer if is_new => reasons.add(&["answers a mail that has not been here"]),
            Why::Answer => reasons.add(&["answers a mail of this issue"]),
            Why::Early => reasons.add(&["an answer to it was here before it"]),
            Why::Series => reasons.add(&["numbered in a series with an earlier mail of its sender"]),
            Why::Subject => reasons.add(&["same subject, among the same people, as an earlier mail"]),
            Why::Text => reasons.add(&["nearly the same text as an earlier mail"]),
        }
    }
}

/// What memory has of an issue under each of its keys.
#[derive(Clone, Debug, PartialEq)]
struct Record {
    issue: String,
    /// The mail that opened it.
    first: u64,
    why: Why,
    /// Who took the mail that this record is of, if anybody knew.
    queue: Option<String>,
    /// Who wrote the mail that this record is of.
    sender: u64,
    /// When, in seconds since 1970.
    time: u64,
    /// Its subject but for the numbers outside of tags.
    about: u64,
    sketch: Option<Sketch>,
    /// Who takes what comes next.
    votes: Votes,
}

impl Record {
    fn write(&self) -> Vec<u8> {
        let Record { issue, first, why, queue, sender, time, about, sketch, votes } = self;
        let why = Why::ALL.iter().find(|(known, _)| known == why).map_or("first", |(_, name)| name);
        let sketch = sketch.map(Sketch::to_hex).unwrap_or_default();
        // No queue has such a name.
        let queue = queue.as_deref().unwrap_or(".");
        let votes = votes.write();
        format!("{issue}\n{first:x} {why} {queue} {sender:x} {time} {about:x} {sketch} {votes}").into_bytes()
    }

    /// None if this is nothing that [`Record::write`] wrote.
    fn read(bytes: &[u8]) -> Option<Record> {
        let (issue, rest) = str::from_utf8(bytes).ok()?.split_once('\n')?;
        if !(1..=ID_MAX_BYTES).contains(&issue.len()) || issue.contains(char::is_control) {
            return None;
        }
        let mut rest = rest.split(' ');
        let mut next = || rest.next();
        let hex = |text: &str| u64::from_str_radix(text, 16).ok();
        Some(Record {
            issue: issue.to_owned(),
            first: hex(next()?)?,
            why: next().and_then(|why| Why::ALL.iter().find(|(_, name)| *name == why))?.0,
            queue: Some(next()?).filter(|queue| is_name(queue)).map(str::to_owned),
            sender: hex(next()?)?,
            time: next()?.parse().ok()?,
            about: hex(next()?)?,
            sketch: next().and_then(Sketch::from_hex),
            votes: next().map(Votes::read).unwrap_or_default(),
        })
    }

    fn known_as(self, why: Why) -> Record {
        Record { why, ..self }
    }
}

/// What a mail without references can be known by.
struct Traces {
    is_answer: bool,
    sender: u64,
    about: u64,
    time: u64,
    /// The keys of its series, in the present period and the last one.
    series: Vec<String>,
    /// The keys of its subject among each of its people; the first is the one that it is remembered by.
    subjects: Vec<String>,
    sketch: Option<Sketch>,
}

impl Traces {
    fn of(mail: &Mail<'_>, time: u64) -> Traces {
        let subject = Subject::read(&mail.subject);
        let is_answer = subject.is_reply || subject.is_forward;
        let sender = mail.sender().map(|address| hash(&address.to_ascii_lowercase()));
        let periods = |period: u64| [time / period, (time / period).saturating_sub(1)];
        let series = subject.series().zip(sender).filter(|_| !is_answer).map_or(Vec::new(), |(series, sender)| {
            let series = hash_all(&[&series, &sender.to_le_bytes()]);
            periods(SERIES_PERIOD).iter().map(|period| format!("p.{series:016x}.{period}")).collect()
        });
        let mut subjects = Vec::new();
        if subject.is_telling() {
            let list = mail.list().map(|list| hash(&list.to_ascii_lowercase()));
            let mut people: Vec<u64> = list.or(sender).into_iter().collect();
            if list.is_none() && is_answer {
                let known = mail.mailboxes().map(|address| hash(&address.to_ascii_lowercase())).collect::<Vec<_>>();
                for person in mail.people().map(|address| hash(&address.to_ascii_lowercase())) {
                    if people.len() < PEOPLE_MAX && !known.contains(&person) && !people.contains(&person) {
                        people.push(person);
                    }
                }
            }
            for person in people {
                let name = hash_all(&[&subject.text, &person.to_le_bytes()]);
                subjects.extend(periods(SUBJECT_PERIOD).iter().map(|period| format!("s.{name:016x}.{period}")));
            }
        }
        let about = hash_all(&[subject.tags(), &subject.topic_without_numbers()]);
        Traces { is_answer, sender: sender.unwrap_or(0), about, time, series, subjects, sketch: Sketch::of(mail) }
    }

    /// All keys that memory is asked for, in the order of their weight.
    fn keys(&self) -> Vec<String> {
        [self.series.clone(), self.subjects.clone(), self.bands()].concat()
    }

    fn bands(&self) -> Vec<String> {
        self.sketch.map_or(Vec::new(), |sketch| sketch.bands().iter().map(|band| format!("t.{band:016x}")).collect())
    }

    /// The issue that memory's answers to [`Traces::keys`] speak for.
    fn choose(&self, answers: &[Option<Record>]) -> Option<Record> {
        let (series, rest) = answers.split_at_checked(self.series.len())?;
        let (subjects, texts) = rest.split_at_checked(self.subjects.len())?;
        let by_series = || series.iter().flatten().next().map(|record| record.clone().known_as(Why::Series));
        let by_subject = || {
            let found = subjects.iter().flatten().find(|record| self.is_same_subject(record));
            found.map(|record| record.clone().known_as(Why::Subject))
        };
        let by_text = || {
            let sketch = self.sketch?;
            let is_like = |record: &&Record| {
                record.time.abs_diff(self.time) <= LIKENESS_MAX
                    && record.about == self.about
                    && record.sketch.is_some_and(|other| sketch.is_like(&other))
            };
            texts.iter().flatten().find(is_like).map(|record| record.clone().known_as(Why::Text))
        };
        by_series().or_else(by_subject).or_else(by_text)
    }

    fn is_same_subject(&self, record: &Record) -> bool {
        self.is_answer || record.sender == self.sender && record.time.abs_diff(self.time) <= REPEAT_MAX
    }
}

/// The id of the issue that the mail with this id opens.
///
/// Without `format!`: nothing else needs it for a mail without memory, and an instance that does not touch it takes 3 %
/// less time.
fn name(id: u64) -> String {
    let digits = (0..u64::BITS / 4).rev().filter_map(|place| char::from_digit((id >> (4 * place)) as u32 & 0xf, 16));
    let mut name = String::with_capacity(18);
    name.push_str("m-");
    name.extend(digits);
    name
}

fn mail_key(id: u64) -> String {
    format!("m.{id:016x}")
}

#[cfg(test)]
mod tests;
