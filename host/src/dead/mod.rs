//! `host dead`: lists, shows, runs again and removes dead letters.

mod letters;

use crate::cli::{counted, harmless, is_broken_pipe, print, wrong_usage};
use crate::letter::{RAW_HEADERS, SUBJECT, check_id, new_headers, replay_headers};
use crate::names::covers;
use crate::nats::{find, innermost};
use crate::settle::DeadReason;
use anyhow::{Context as _, Result, anyhow, bail, ensure};
use async_nats::jetstream::context::{PublishError, PublishErrorKind};
use async_nats::jetstream::message::PublishMessage;
use async_nats::jetstream::{self, ErrorCode};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use letters::{DeadLetters, Facts, Filter, FilterArgs, Letter, PlaceArgs};
use serde::Serialize;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write as _};
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime};

/// Letters that are replayed or removed at the same time.
const IN_FLIGHT_MAX: usize = 256;
/// Bytes of the mails among them; a single larger one goes alone.
const IN_FLIGHT_MAX_BYTES: u64 = 64 << 20;
/// The longest subject that a replay may have: the server takes lines of 4 KiB, with more on them than the subject.
const SUBJECT_MAX_BYTES: usize = 3 << 10;
/// How much of a mail `host dead show` shows.
const PREVIEW_MAX_BYTES: usize = 4 << 10;
/// Failures of single letters that are told one by one.
const FAILURES_MAX: u64 = 10;
/// The narrowest terminal on which there is room for ids.
const WIDE: usize = 140;

/// List, show, run again or remove dead letters: messages that got no verdict
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  host dead list --reason trap,deadline --since 1day
  host dead show 17
  host dead replay 17 18                these two, once more
  host dead replay --reason trap        all that trapped, when the component is mended
  host dead drop --until 30days         old ones

A number is a letter's sequence in the stream of dead letters; `host dead list` shows it.")]
pub struct DeadArgs {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Print the dead letters, oldest first
    List(Box<ListArgs>),

    /// Print one dead letter: why it is dead, its headers, the beginning of its mail
    Show(Box<ShowArgs>),

    /// Have the messages of dead letters run again, under the ids they had
    Replay(Box<ReplayArgs>),

    /// Remove dead letters for good
    Drop(Box<DropArgs>),
}

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  host dead list                        all there are, oldest first
  host dead list --summary              how many for which reason
  host dead list --limit 100            one page; --after with its last number is the next
  host dead list --json --reason trap | jq -r .detail

With --json every line is {\"sequence\":…,\"time\":…,\"reason\":…,\"id\":…,\"subject\":…,\"size\":…,\"deliveries\":…,\
\"component\":…,\"stored\":…,\"detail\":…}; \"odd\" says what is wrong with one that no host made.")]
struct ListArgs {
    /// Stop after this many
    #[arg(long, value_name = "NUMBER", env = "MAILROOM_LIMIT")]
    limit: Option<u64>,

    /// Only those after this number
    #[arg(long, value_name = "NUMBER", env = "MAILROOM_LETTER_AFTER", default_value_t = 0, hide_default_value = true)]
    after: u64,

    /// Only how many there are for each reason
    #[arg(long, env = "MAILROOM_SUMMARY", value_parser = clap::builder::BoolishValueParser::new())]
    summary: bool,

    /// One JSON object a line
    #[arg(long, env = "MAILROOM_JSON", value_parser = clap::builder::BoolishValueParser::new())]
    json: bool,

    #[command(flatten)]
    filter: FilterArgs,

    #[command(flatten)]
    place: PlaceArgs,
}

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  host dead show 17
  host dead show MAIL:1767225600:triage:4711
  host dead show 17 --raw > mail.eml
  host dead show 17 --raw | host triage triage.wasm -")]
struct ShowArgs {
    /// The letter's number, or the id of its message (the newest letter then)
    #[arg(value_name = "NUMBER|ID")]
    which: String,

    /// Only the mail, byte for byte
    #[arg(long, env = "MAILROOM_RAW", value_parser = clap::builder::BoolishValueParser::new())]
    raw: bool,

    /// One JSON object, with the headers and, in base64, the mail
    #[arg(long, env = "MAILROOM_JSON", value_parser = clap::builder::BoolishValueParser::new())]
    json: bool,

    #[command(flatten)]
    place: PlaceArgs,
}

#[derive(Debug, clap::Args)]
struct SelectionArgs {
    /// Numbers of the letters
    #[arg(value_name = "NUMBER", value_parser = clap::value_parser!(u64).range(1..))]
    sequences: Vec<u64>,

    #[command(flatten)]
    filter: FilterArgs,

    /// All letters of the consumer that are there now
    #[arg(long, env = "MAILROOM_LETTER_ALL", value_parser = clap::builder::BoolishValueParser::new(), help_heading = "Which letters")]
    all: bool,
}

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  host dead replay 17 18
  host dead replay --reason trap --dry-run
  host dead replay --all

A letter is removed when its message is stored for another run. The message has the id, the time and
the headers it had; if it has a verdict by now, it gets no second one. If it dies again, it is a dead
letter again.
Stopped half-way or started twice, the command does no harm.")]
struct ReplayArgs {
    /// Leave the letters where they are
    #[arg(long, env = "MAILROOM_KEEP", value_parser = clap::builder::BoolishValueParser::new())]
    keep: bool,

    /// Publish new messages, with new ids, on the subjects they had: for all consumers of the stream, and for one
    /// that takes no replays
    #[arg(long, env = "MAILROOM_AS_NEW", value_parser = clap::builder::BoolishValueParser::new())]
    as_new: bool,

    #[command(flatten)]
    change: ChangeArgs,
}

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  host dead drop 17 18
  host dead drop --until 30days --dry-run
  host dead drop --all --yes")]
struct DropArgs {
    /// Do not ask; without a terminal there is nobody to ask
    #[arg(short, long, env = "MAILROOM_YES", value_parser = clap::builder::BoolishValueParser::new())]
    yes: bool,

    #[command(flatten)]
    change: ChangeArgs,
}

/// What commands have in common that change which letters there are.
#[derive(Debug, clap::Args)]
struct ChangeArgs {
    /// Only print which letters it would be
    #[arg(long, env = "MAILROOM_DRY_RUN", value_parser = clap::builder::BoolishValueParser::new())]
    dry_run: bool,

    /// No progress bar and no summary; errors only
    #[arg(short, long, env = "MAILROOM_QUIET", value_parser = clap::builder::BoolishValueParser::new())]
    quiet: bool,

    #[command(flatten)]
    selection: SelectionArgs,

    #[command(flatten)]
    place: PlaceArgs,
}

impl DeadArgs {
    /// Carries out the command.
    ///
    /// # Errors
    /// No connection, no stream of dead letters, no permission. Letters that could not be replayed or removed are told
    /// one by one and in the exit code.
    pub async fn execute(self) -> Result<ExitCode> {
        let done = match self.command {
            Command::List(args) => args.execute().await,
            Command::Show(args) => args.execute().await,
            Command::Replay(args) => args.execute().await,
            Command::Drop(args) => args.execute().await,
        };
        match done {
            // `… | head -1` has what it wanted.
            Err(err) if is_broken_pipe(&err) => Ok(ExitCode::SUCCESS),
            done => done,
        }
    }
}

impl ListArgs {
    async fn execute(self) -> Result<ExitCode> {
        let filter = self.filter.resolve().map_err(wrong_usage)?;
        let dead = DeadLetters::open(self.place).await?;
        let mut letters = dead.after(self.after, filter.since).await?;
        let mut table = Table::new(self.json);
        let mut summary = Summary::default();
        let (mut shown, mut last) = (0, 0);
        let limit = self.limit.unwrap_or(u64::MAX);
        while shown < limit
            && let Some(letter) = letters.next().await?
        {
            if !filter.matches(&letter) {
                continue;
            }
            (shown, last) = (shown + 1, letter.sequence);
            if self.summary {
                summary.add(&letter);
            } else {
                table.print(&letter)?;
            }
        }
        table.out.flush()?;
        if self.summary {
            print(summary.show(self.json)?)?;
        } else if !self.json && io::stdout().is_terminal() {
            // What a person wants to know and no script reads.
            if shown == 0 {
                say(&format!("no such dead letters of {}", dead.of()));
            } else if shown == limit {
                say(&format!("perhaps more: --after {last}"));
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}

impl ShowArgs {
    async fn execute(self) -> Result<ExitCode> {
        let dead = DeadLetters::open(self.place).await?;
        let stream = &dead.names.dead_stream;
        let sequence = match self.which.parse::<u64>() {
            Ok(sequence) => sequence,
            Err(_) => {
                let filter = Filter::of_message(self.which.clone());
                let found = chosen(&dead, &filter, &mut |_| Ok(())).await?;
                found
                    .last()
                    .with_context(|| format!("stream {stream} has no letter of message {}", self.which))?
                    .sequence
            }
        };
        let letter = dead.get(sequence).await?.with_context(|| format!("stream {stream} has no letter {sequence}"))?;
        if self.raw {
            print(&letter.mail)?;
        } else if self.json {
            let whole =
                Whole { facts: letter.facts(), headers: letter.senders_headers(), data: BASE64.encode(&letter.mail) };
            print(serde_json::to_string(&whole)? + "\n")?;
        } else {
            print(show(&letter))?;
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// A letter with all that is in it, as JSON.
#[derive(Serialize)]
struct Whole<'a> {
    #[serde(flatten)]
    facts: Facts<'a>,
    headers: Vec<(String, String)>,
    data: String,
}

impl ReplayArgs {
    async fn execute(self) -> Result<ExitCode> {
        let selection = self.change.selection.resolve("replay").map_err(wrong_usage)?;
        let dead = DeadLetters::open(self.change.place).await?;
        if !self.as_new {
            check_replayable(&dead).await?;
        }
        let chosen = selection.choose(&dead, self.change.dry_run).await?;
        if self.change.dry_run {
            return would(&dead, "replay", &chosen);
        }
        let (dead, keep, as_new) = (&dead, self.keep, self.as_new);
        let named = matches!(selection, Selection::Named(_));
        let work = Work { verb: "replayed", total: chosen.len(), quiet: self.change.quiet, named };
        let max_payload = dead.jetstream.client().server_info().max_payload as u64;
        Ok(work.on(chosen, max_payload, async |sequence| replay(dead, sequence, keep, as_new).await).await)
    }
}

impl DropArgs {
    async fn execute(self) -> Result<ExitCode> {
        let selection = self.change.selection.resolve("drop").map_err(wrong_usage)?;
        let can_ask = io::stdin().is_terminal() && io::stderr().is_terminal();
        ensure!(
            self.yes || self.change.dry_run || can_ask,
            "there is no terminal to ask whether letters may be removed for good; add --yes"
        );
        let dead = DeadLetters::open(self.change.place).await?;
        if selection == Selection::Matching(Filter::default()) && !self.change.dry_run {
            // The server removes all of a consumer's letters by itself.
            let letters = dead.after(0, None).await?;
            let pending = letters.pending();
            if !self.yes && pending > 0 && !may_drop(&dead, pending)? {
                return Ok(ExitCode::FAILURE);
            }
            let started = Instant::now();
            let count = if pending > 0 { dead.remove_all(letters.last()).await? } else { 0 };
            if !self.change.quiet {
                let tally = Tally { done: count, ..Tally::default() };
                say(&tally.summary("dropped", started.elapsed()));
            }
            return Ok(ExitCode::SUCCESS);
        }
        let chosen = selection.choose(&dead, self.change.dry_run).await?;
        if self.change.dry_run {
            return would(&dead, "drop", &chosen);
        }
        if !self.yes && !chosen.is_empty() && !may_drop(&dead, chosen.len() as u64)? {
            return Ok(ExitCode::FAILURE);
        }
        let (dead, named) = (&dead, matches!(selection, Selection::Named(_)));
        let work = Work { verb: "dropped", total: chosen.len(), quiet: self.change.quiet, named };
        Ok(work.on(chosen, 0, async |sequence| remove(dead, sequence, named).await).await)
    }
}

fn may_drop(dead: &DeadLetters, count: u64) -> Result<bool> {
    eprint!("Remove {} of {} for good? [y/N] ", counted(count, "dead letter"), dead.of());
    let mut answer = String::new();
    io::stdin().read_line(&mut answer).context("read the answer")?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}

/// Which letters are meant: those named, or those that match.
#[derive(Debug, PartialEq, Eq)]
enum Selection {
    Named(Vec<u64>),
    Matching(Filter),
}

impl SelectionArgs {
    fn resolve(self, command: &str) -> Result<Selection> {
        let filter = self.filter.resolve()?;
        let filtered = filter != Filter::default();
        match (self.sequences.is_empty(), filtered, self.all) {
            (false, false, false) => Ok(Selection::Named(self.sequences)),
            (true, true, false) | (true, false, true) => Ok(Selection::Matching(filter)),
            (true, false, false) => bail!(
                "{command} which letters? Give their numbers, a filter such as --reason, or --all; `host dead list` \
                 shows what there is"
            ),
            _ => bail!("numbers, filters and --all exclude each other; use one of them"),
        }
    }
}

impl Selection {
    /// The letters that are there now; prints them for a dry run.
    async fn choose(&self, dead: &DeadLetters, show: bool) -> Result<Vec<Chosen>> {
        let mut table = Table::new(false);
        let mut each = |letter: &Letter| if show { table.print(letter) } else { Ok(()) };
        let chosen = match self {
            Self::Matching(filter) => chosen(dead, filter, &mut each).await?,
            Self::Named(sequences) => {
                if show {
                    for sequence in sequences {
                        let letter = dead.get(*sequence).await?;
                        let letter = letter.with_context(|| format!("letter {sequence}: there is no such letter"))?;
                        each(&letter)?;
                    }
                }
                sequences.iter().map(|&sequence| Chosen { sequence, size: None }).collect()
            }
        };
        table.out.flush()?;
        Ok(chosen)
    }
}

/// A letter to do something with.
struct Chosen {
    sequence: u64,
    /// Bytes of its mail, if known.
    size: Option<u64>,
}

/// Which letters match, in their order.
async fn chosen(
    dead: &DeadLetters,
    filter: &Filter,
    each: &mut dyn FnMut(&Letter) -> Result<()>,
) -> Result<Vec<Chosen>> {
    let mut letters = dead.after(0, filter.since).await?;
    let mut chosen = Vec::new();
    while let Some(letter) = letters.next().await? {
        if filter.matches(&letter) {
            each(&letter)?;
            chosen.push(Chosen { sequence: letter.sequence, size: Some(letter.size) });
        }
    }
    Ok(chosen)
}

fn would(dead: &DeadLetters, verb: &str, chosen: &[Chosen]) -> Result<ExitCode> {
    say(&format!("would {verb} {} of {}", counted(chosen.len() as u64, "letter"), dead.of()));
    Ok(ExitCode::SUCCESS)
}

/// Checks that a replay reaches the consumer.
async fn check_replayable(dead: &DeadLetters) -> Result<()> {
    let (stream, consumer) = (&dead.names.stream, &dead.names.consumer);
    let replays = dead.names.replay_subject(">");
    let takes = |subject: &Value| subject.as_str().is_some_and(|subject| covers(subject, &replays));
    let config = dead.config("STREAM.INFO", stream, "config").await?;
    ensure!(
        config["subjects"].as_array().into_iter().flatten().any(takes),
        "stream {stream} does not take {replays}; `host provision --update` adds it, or --as-new publishes new messages"
    );
    let config = dead.config("CONSUMER.INFO", &format!("{stream}.{consumer}"), "config").await?;
    let filters: Vec<&Value> = config["filter_subjects"]
        .as_array()
        .into_iter()
        .flatten()
        .chain([&config["filter_subject"]])
        .filter(|filter| filter.as_str().is_some_and(|filter| !filter.is_empty()))
        .collect();
    ensure!(
        filters.is_empty() || filters.into_iter().any(takes),
        "the filter of {} leaves out {replays}; on a nats-server 2.10 or later `host provision --update` adds it, or \
         --as-new publishes new messages",
        dead.of()
    );
    Ok(())
}

/// What became of a letter.
enum Done {
    /// Replayed or removed: so many bytes.
    Now(u64),
    /// Replayed earlier, by a command that did not come to the end.
    Before,
    /// Somebody else removed it meanwhile.
    Gone,
}

/// Why nothing became of a letter.
enum Failure {
    /// Its own fault; the others are not concerned.
    Letter(String),
    /// Not its fault; the next would fare no better.
    All(anyhow::Error),
}

impl From<anyhow::Error> for Failure {
    fn from(err: anyhow::Error) -> Self {
        Self::All(err)
    }
}

/// Publishes the message and removes the letter, in that order. What a crash in between leaves is a letter whose
/// second replay finds the first: by its `Nats-Msg-Id` for a while, by its verdict for as long as that is kept.
async fn replay(dead: &DeadLetters, sequence: u64, keep: bool, as_new: bool) -> Result<Done, Failure> {
    let names = &dead.names;
    let Some(letter) = dead.get(sequence).await? else { return Ok(Done::Gone) };
    check_own(dead, &letter)?;
    if let Some(odd) = letter.oddity() {
        return Err(Failure::Letter(odd));
    }
    let facts = letter.facts();
    let (Some(id), Some(subject), Ok(headers)) = (facts.id, &facts.subject, &letter.headers) else {
        return Err(Failure::Letter(format!("no header {SUBJECT}")));
    };
    let (subject, mut headers) = if as_new {
        (subject.to_owned(), new_headers(&letter.senders()))
    } else {
        check_id(id, names).map_err(|err| Failure::Letter(err.to_string()))?;
        (names.replay_subject(subject), replay_headers(headers))
    };
    if subject.len() > SUBJECT_MAX_BYTES {
        return Err(Failure::Letter(format!("its subject of {} bytes is too long", subject.len())));
    }
    // With the time of the letter: a stream that is made anew counts from one again.
    let stored = letter.stored.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_millis();
    // A new message is another one than a replay of the same letter.
    let kind = if as_new { "new" } else { "replay" };
    headers.insert("Nats-Msg-Id", format!("{kind}.{id}.{sequence}.{stored}"));
    headers.insert("Nats-Expected-Stream", names.stream.as_str());
    let payload = match &letter.front {
        Some(block) if !as_new => [&block[..], &letter.mail].concat().into(),
        _ => letter.mail.clone(),
    };
    let message = PublishMessage::build().headers(headers).payload(payload);
    let explain = |err| explain(&err, &names.stream, &subject);
    let acknowledgement = dead.jetstream.send_publish(subject.clone(), message).await.map_err(explain)?;
    let duplicate = acknowledgement.await.map_err(explain)?.duplicate;
    if !keep {
        dead.remove(sequence).await.context("replayed, but its letter is still there")?;
    }
    Ok(if duplicate { Done::Before } else { Done::Now(letter.size) })
}

/// Removes a letter. One that was named may be another consumer's, which is looked at first.
async fn remove(dead: &DeadLetters, sequence: u64, named: bool) -> Result<Done, Failure> {
    if named {
        let Some(letter) = dead.get(sequence).await? else { return Ok(Done::Gone) };
        check_own(dead, &letter)?;
    }
    Ok(if dead.remove(sequence).await? { Done::Now(0) } else { Done::Gone })
}

fn check_own(dead: &DeadLetters, letter: &Letter) -> Result<(), Failure> {
    if covers(&dead.names.dead_of_consumer(), &letter.subject) {
        return Ok(());
    }
    Err(Failure::Letter(format!(
        "lies on {}, so it is none of {}; look at --stream and --consumer",
        harmless(&letter.subject),
        dead.of()
    )))
}

fn explain(err: &PublishError, stream: &str, subject: &str) -> Failure {
    let refused = find::<jetstream::Error>(err);
    match (err.kind(), refused.map(jetstream::Error::error_code)) {
        (PublishErrorKind::MaxPayloadExceeded, _) | (_, Some(ErrorCode::STREAM_MESSAGE_EXCEEDS_MAXIMUM)) => {
            Failure::Letter("larger than the server or the stream takes".into())
        }
        (PublishErrorKind::StreamNotFound, _) => {
            Failure::Letter(format!("no stream takes subject {}", harmless(subject)))
        }
        (_, Some(ErrorCode::STREAM_NOT_MATCH)) => {
            Failure::Letter(format!("subject {} belongs to another stream than {stream}", harmless(subject)))
        }
        (PublishErrorKind::TimedOut | PublishErrorKind::BrokenPipe, _) => Failure::All(anyhow!(
            "no answer from stream {stream}; if the server runs, this user may lack permission to publish on {}",
            harmless(subject)
        )),
        _ => Failure::All(match refused {
            Some(refused) => anyhow!("stream {stream} refuses: {refused}"),
            None => anyhow!("publish on {}: {}", harmless(subject), innermost(err)),
        }),
    }
}

/// Something to do with many letters.
struct Work {
    /// What it is called when it is done.
    verb: &'static str,
    total: usize,
    quiet: bool,
    /// Whether the letters were named, one by one: then each has to be there.
    named: bool,
}

impl Work {
    /// Does it, many at a time; a letter of unknown size counts `size` bytes. Errors and a summary go to standard
    /// error.
    async fn on(self, chosen: Vec<Chosen>, size: u64, act: impl AsyncFn(u64) -> Result<Done, Failure>) -> ExitCode {
        let started = Instant::now();
        let bar = self.bar();
        let mut tally = Tally::default();
        let mut stopped = None;
        let mut chosen = chosen.into_iter();
        let mut running = FuturesUnordered::new();
        let mut running_bytes = 0;
        loop {
            while stopped.is_none()
                && running.len() < IN_FLIGHT_MAX
                && running_bytes < IN_FLIGHT_MAX_BYTES
                && let Some(Chosen { sequence, size: known }) = chosen.next()
            {
                let bytes = known.unwrap_or(size);
                running_bytes += bytes;
                let act = &act;
                running.push(async move { (sequence, bytes, act(sequence).await) });
            }
            let Some((sequence, bytes, done)) = running.next().await else { break };
            running_bytes -= bytes;
            let done = match done {
                Ok(Done::Gone) if self.named => Err(Failure::Letter("there is no such letter".into())),
                done => done,
            };
            match done {
                Ok(Done::Now(bytes)) => (tally.done, tally.bytes) = (tally.done + 1, tally.bytes + bytes),
                Ok(Done::Before) => (tally.done, tally.known) = (tally.done + 1, tally.known + 1),
                Ok(Done::Gone) => tally.gone += 1,
                Err(Failure::Letter(why)) => {
                    tally.failed += 1;
                    match tally.failed.cmp(&(FAILURES_MAX + 1)) {
                        std::cmp::Ordering::Less => bar.suspend(|| say(&format!("error: letter {sequence}: {why}"))),
                        std::cmp::Ordering::Equal => bar.suspend(|| say("error: and more of them")),
                        std::cmp::Ordering::Greater => {}
                    }
                }
                // All that are under way share the reason.
                Err(Failure::All(err)) => {
                    tally.failed += 1;
                    stopped.get_or_insert_with(|| format!("letter {sequence}: {err:#}"));
                }
            }
            bar.inc(1);
        }
        bar.finish_and_clear();
        if let Some(why) = &stopped {
            say(&format!("error: {why}; stopped: what is not {} is where it was", self.verb));
        }
        if !self.quiet {
            say(&tally.summary(self.verb, started.elapsed()));
        }
        if tally.failed > 0 { ExitCode::FAILURE } else { ExitCode::SUCCESS }
    }

    fn bar(&self) -> ProgressBar {
        if self.quiet || self.total < 2 || !io::stderr().is_terminal() {
            return ProgressBar::hidden();
        }
        let bar = ProgressBar::new(self.total as u64);
        if let Ok(style) = ProgressStyle::with_template("{bar:30} {pos}/{len} letters  {eta} left") {
            bar.set_style(style);
        }
        bar
    }
}

/// What became of the letters.
#[derive(Debug, Default)]
struct Tally {
    done: u64,
    known: u64,
    gone: u64,
    failed: u64,
    bytes: u64,
}

impl Tally {
    fn summary(&self, verb: &str, took: Duration) -> String {
        let Self { done, known, gone, failed, bytes } = self;
        let mut text = format!("{verb} {}", counted(*done, "letter"));
        // Writing to a string cannot fail.
        if *known > 0 {
            let _ = write!(text, " ({known} had been before)");
        }
        if *bytes > 0 {
            let _ = write!(text, ", {}", HumanBytes(*bytes));
        }
        let _ = write!(text, ", in {:.2} s", took.as_secs_f64());
        for (count, what) in [(gone, "gone already"), (failed, "failed")] {
            if *count > 0 {
                let _ = write!(text, "; {count} {what}");
            }
        }
        text
    }
}

/// Letters line by line.
struct Table {
    out: io::BufWriter<io::Stdout>,
    json: bool,
    /// The heading is still to come.
    heading: bool,
    /// The terminal's width; nothing is shortened for anything else.
    width: Option<usize>,
}

impl Table {
    fn new(json: bool) -> Self {
        let out = io::stdout();
        let heading = !json && out.is_terminal();
        let width = rustix::termios::tcgetwinsize(&out).ok().map(|size| usize::from(size.ws_col));
        Self { out: io::BufWriter::new(out), json, heading, width: width.filter(|width| *width > 0) }
    }

    fn print(&mut self, letter: &Letter) -> Result<()> {
        let facts = letter.facts();
        if self.json {
            serde_json::to_writer(&mut self.out, &facts).map_err(io::Error::from)?;
            return Ok(self.out.write_all(b"\n")?);
        }
        if std::mem::take(&mut self.heading) {
            let names = ["NUMBER", "TIME", "REASON", "TRIES", "SIZE", "SUBJECT", "ID", "DETAIL"];
            self.out.write_all(row(&names, self.width).as_bytes())?;
        }
        let time = humantime::format_rfc3339_seconds(letter.stored).to_string();
        let tries = facts.deliveries.map_or_else(|| "?".to_owned(), |tries| tries.to_string());
        let detail = facts.odd.as_deref().or(facts.detail).unwrap_or_default();
        let [reason, subject, id] = [facts.reason, facts.subject.as_deref(), facts.id].map(|fact| fact.unwrap_or("?"));
        let (number, size) = (letter.sequence.to_string(), HumanBytes(letter.size).to_string());
        let line = row(&[&number, &time, reason, &tries, &size, subject, id, detail], self.width);
        Ok(self.out.write_all(line.as_bytes())?)
    }
}

/// As wide as the longest reason.
fn reason_width() -> usize {
    DeadReason::DEAD.into_iter().map(|reason| reason.name().len()).max().unwrap_or(0)
}

fn row(cells: &[&str; 8], width: Option<usize>) -> String {
    let [number, time, reason, tries, size, subject, id, detail] = cells.map(harmless);
    let id = if width.is_none_or(|width| width >= WIDE) { format!("{id:<28}  ") } else { String::new() };
    let reason_width = reason_width();
    let line = format!(
        "{number:>8}  {time:<20}  {reason:<reason_width$}  {tries:>5}  {size:>10}  {subject:<20}  {id}{detail}"
    );
    let line = line.trim_end();
    match width {
        Some(width) if line.chars().count() > width => line.chars().take(width - 1).chain(['…', '\n']).collect(),
        _ => format!("{line}\n"),
    }
}

/// Letters by reason.
#[derive(Default)]
struct Summary(BTreeMap<String, Group>);

#[derive(Serialize)]
struct Group {
    letters: u64,
    bytes: u64,
    oldest: String,
    newest: String,
}

impl Summary {
    fn add(&mut self, letter: &Letter) {
        let facts = letter.facts();
        // What no host made has a reason of anybody's invention.
        let reason = facts.reason.filter(|_| facts.odd.is_none()).unwrap_or("?");
        let time = humantime::format_rfc3339_seconds(letter.stored).to_string();
        let group = self.0.entry(reason.to_owned()).or_insert_with(|| Group {
            letters: 0,
            bytes: 0,
            oldest: time.clone(),
            newest: String::new(),
        });
        group.letters += 1;
        group.bytes += letter.size;
        group.newest = time;
    }

    fn show(&self, json: bool) -> Result<String> {
        let mut text = String::new();
        for (reason, group) in &self.0 {
            if json {
                let mut line = serde_json::to_value(group)?;
                line["reason"] = json!(reason);
                writeln!(text, "{line}")?;
            } else {
                let Group { letters, bytes, oldest, newest } = group;
                let (reason, size) = (harmless(reason), HumanBytes(*bytes).to_string());
                let width = reason_width();
                writeln!(text, "{letters:>8}  {reason:<width$}  {size:>10}  {oldest} to {newest}")?;
            }
        }
        Ok(text)
    }
}

/// A letter for a person to read.
fn show(letter: &Letter) -> String {
    let facts = letter.facts();
    let mut text = String::new();
    let mut line = |name: &str, value: &str| text += &format!("{name:<12}{}\n", harmless(value));
    line("letter", &letter.sequence.to_string());
    line("dead since", &facts.time);
    if let Some(odd) = &facts.odd {
        line("odd", odd);
    }
    let deliveries = facts.deliveries.map(|number| number.to_string());
    for (name, fact) in [
        ("reason", facts.reason),
        ("detail", facts.detail),
        ("id", facts.id),
        ("subject", facts.subject.as_deref()),
        ("stored", facts.stored),
        ("deliveries", deliveries.as_deref()),
        ("component", facts.component),
    ] {
        fact.into_iter().for_each(|fact| line(name, fact));
    }
    let headers = letter.senders_headers();
    if !headers.is_empty() {
        text += "\nHeaders\n";
    }
    for (name, value) in headers {
        text += &format!("  {}: {}\n", harmless(&name), harmless(&value));
    }
    if let Some(raw) = letter.header(RAW_HEADERS) {
        text += "\nHeaders as they came, which could not be read\n";
        text += &preview(&BASE64.decode(raw).unwrap_or_else(|_| raw.as_bytes().to_vec()));
    }
    text += &format!("\nMail, {} bytes\n{}", letter.size, preview(&letter.mail));
    if letter.mail.len() > PREVIEW_MAX_BYTES {
        text += &format!("  … {} bytes more; --raw prints all\n", letter.mail.len() - PREVIEW_MAX_BYTES);
    }
    text
}

/// The beginning of what may be anything.
fn preview(data: &[u8]) -> String {
    let start = String::from_utf8_lossy(&data[..data.len().min(PREVIEW_MAX_BYTES)]);
    start.lines().map(|line| format!("  {}\n", harmless(line))).collect()
}

/// Prints to standard error, whether anybody listens or not: the exit code says it too.
fn say(text: &str) {
    let _ = writeln!(io::stderr(), "{text}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_fit_the_terminal_and_cannot_steer_it() {
        let cells = ["7", "2026-11-21T10:00:00Z", "trap", "5", "1 KiB", "mail.a", "MAIL:1:triage:7", "a\u{1b}[2J"];
        let plain = row(&cells, None);
        assert!(plain.contains("MAIL:1:triage:7") && plain.ends_with("a\\u{1b}[2J\n"), "{plain}");
        let mut longer = cells;
        longer[2] = "unreadable-headers";
        assert_eq!(row(&longer, None).find("mail.a"), plain.find("mail.a"));
        let narrow = row(&cells, Some(80));
        assert!(narrow.chars().count() == 81 && narrow.ends_with("…\n") && !narrow.contains("triage"), "{narrow}");
    }

    #[test]
    fn a_summary_counts_what_happened() {
        let second = Duration::from_secs(1);
        assert_eq!(Tally { done: 1, ..Default::default() }.summary("dropped", second), "dropped 1 letter, in 1.00 s");
        let tally = Tally { done: 3, known: 1, gone: 2, failed: 4, bytes: 2048 };
        assert_eq!(
            tally.summary("replayed", second),
            "replayed 3 letters (1 had been before), 2.00 KiB, in 1.00 s; 2 gone already; 4 failed"
        );
    }
}
