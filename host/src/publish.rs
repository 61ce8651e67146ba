//! `host publish`: mails from disk or standard input into the stream, each stored before it counts as done.

use crate::mails::{Format, Mail, MailError, mails};
use crate::names::check_subject;
use crate::nats::{Nats, NatsArgs, find, innermost, refusal};
use anyhow::{Result, bail};
use async_nats::header::{HeaderMap, HeaderName, HeaderValue};
use async_nats::jetstream::context::PublishErrorKind;
use async_nats::jetstream::message::PublishMessage;
use async_nats::jetstream::publish::PublishAck;
use async_nats::jetstream::{self, Context, ErrorCode};
use bytes::Bytes;
use futures::stream::{FuturesUnordered, StreamExt};
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use sha2::{Digest, Sha256};
use std::fs;
use std::io::{self, IsTerminal, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;
use std::thread;
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until};

/// How long one PubAck is waited for before the mail is sent again.
const ACK_TIMEOUT: Duration = Duration::from_secs(5);
/// Mails read ahead of the connection.
const READ_AHEAD: usize = 4;
/// Bytes of mails sent and not yet acknowledged; a single larger mail is sent alone.
const IN_FLIGHT_MAX_BYTES: usize = 64 * 1024 * 1024;
/// How far `--rate` may lag behind and still catch up.
const CATCH_UP: Duration = Duration::from_millis(20);

/// Put mails from files, mbox files, Maildirs or standard input into the stream
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Exit codes, as mail servers understand them (sysexits.h):
   0  every mail is stored
  64  the command line is wrong
  65  a mail itself cannot be published: it is too large. All others were
  66  a file cannot be read. All others were published
  75  try again later: not the mail's fault (NATS away, login refused, no stream, stream full, …)

Examples:
  host publish mail.eml                 one mail
  host publish archive.mbox Maildir/    many
  host publish --subject mail.support < mail.eml
  triage: \"|host publish -\"             in a mail server's aliases: a pipe transport

A mail published twice within the stream's duplicate window is stored once, so that a mail server
may try again.")]
pub struct PublishArgs {
    /// Mails: files, mbox files, Maildirs, folders of them; - is standard input
    #[arg(value_name = "FILE", default_value = "-")]
    files: Vec<PathBuf>,

    /// Subject to publish on; a stream must take it
    #[arg(
        long,
        value_name = "SUBJECT",
        env = "MAILROOM_SUBJECT",
        default_value = "mail.inbox",
        value_parser = parse_subject
    )]
    subject: String,

    /// Header to add to every message, such as `Source:imap`; repeatable. Not Nats-… or Mailroom-…
    #[arg(short = 'H', long = "header", value_name = "NAME:VALUE", env = "MAILROOM_HEADER", value_parser = parse_header)]
    headers: Vec<(HeaderName, HeaderValue)>,

    /// How to understand the files
    #[arg(long, env = "MAILROOM_FORMAT", default_value = "auto")]
    format: Format,

    /// Mails per second at most [default: as fast as they are stored]
    #[arg(long, value_name = "NUMBER", env = "MAILROOM_RATE", value_parser = parse_rate)]
    rate: Option<f64>,

    /// Store a mail again even if the same one was stored a moment ago
    #[arg(long, env = "MAILROOM_ALLOW_DUPLICATES", value_parser = clap::builder::BoolishValueParser::new())]
    allow_duplicates: bool,

    /// Mails sent and not yet acknowledged
    #[arg(
        long,
        value_name = "NUMBER",
        env = "MAILROOM_PUBLISH_MAX_IN_FLIGHT",
        default_value_t = 256,
        value_parser = clap::value_parser!(u16).range(1..)
    )]
    max_in_flight: u16,

    /// How long to go on trying to store a mail that gets no answer; once only with --allow-duplicates
    #[arg(
        long,
        value_name = "DURATION",
        env = "MAILROOM_PUBLISH_TIMEOUT",
        default_value = "30s",
        value_parser = humantime::parse_duration
    )]
    timeout: Duration,

    /// No progress bar and no summary; errors only
    #[arg(short, long, env = "MAILROOM_QUIET", value_parser = clap::builder::BoolishValueParser::new())]
    quiet: bool,

    #[command(flatten)]
    nats: NatsArgs,
}

/// How the command ends, from sysexits.h. Trying again beats giving a mail up, so the larger number wins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Exit {
    Stored = 0,
    Unpublishable = 65,
    Unreadable = 66,
    TryAgain = 75,
}

/// Why a mail is not in the stream.
#[derive(Debug)]
enum Failure {
    /// The mail's own fault; the others are not concerned.
    Unpublishable(String),
    /// Not the mail's fault; the next would fare no better.
    TryAgain(String),
}

impl PublishArgs {
    /// Publishes, and prints errors and a summary to standard error.
    pub async fn execute(self) -> ExitCode {
        let started = Instant::now();
        let quiet = self.quiet;
        let mut progress = Progress::new(quiet, &self.files);
        let mut tally = Tally::default();
        let mut exit = Exit::Stored;
        if let Err(err) = self.publish(&mut progress, &mut tally, &mut exit).await {
            exit = Exit::TryAgain;
            progress.error(&format!("{err:#}"));
        }
        progress.finish();
        if !quiet && (tally.stored > 0 || exit == Exit::Stored) {
            say(&tally.summary(started.elapsed()));
        }
        ExitCode::from(exit as u8)
    }

    async fn publish(self, progress: &mut Progress, tally: &mut Tally, exit: &mut Exit) -> Result<()> {
        let nats = self.nats.resolve()?;
        let mut reader = read(self.files, self.format, (!self.allow_duplicates).then(|| self.subject.clone()));
        // Standard input is read before anything can go wrong elsewhere, so that a mail server that writes to us
        // sees our exit code and no broken pipe.
        let mut next = None;
        while next.is_none() {
            match reader.recv().await {
                None => return Ok(()),
                Some(Ok(mail)) => next = Some(mail),
                Some(Err(err)) => progress.unreadable(&err, exit),
            }
        }
        let publisher =
            Publisher::connect(&nats, &self.subject, self.headers, self.timeout, !self.allow_duplicates).await?;

        let mut in_flight = FuturesUnordered::new();
        let mut in_flight_bytes = 0;
        let interval = self.rate.map(|rate| Duration::from_secs_f64(rate.recip()));
        let mut pace = Instant::now();
        let (mut ended, mut stopped) = (false, false);
        loop {
            let has_room = in_flight.len() < usize::from(self.max_in_flight) && in_flight_bytes < IN_FLIGHT_MAX_BYTES;
            tokio::select! {
                biased;
                Some((mail, stored)) = in_flight.next(), if !in_flight.is_empty() => {
                    let mail: Outgoing = mail;
                    in_flight_bytes -= mail.data.len();
                    match stored {
                        Ok(is_new) => {
                            tally.add(mail.data.len(), is_new);
                            progress.stored(tally);
                        }
                        Err(Failure::Unpublishable(why)) => {
                            *exit = (*exit).max(Exit::Unpublishable);
                            tally.failed += 1;
                            progress.error(&format!("{}: {why}", mail.name));
                        }
                        Err(Failure::TryAgain(why)) => {
                            *exit = Exit::TryAgain;
                            tally.failed += 1;
                            // All that are under way share the reason.
                            if !std::mem::replace(&mut stopped, true) {
                                progress.error(&format!("{}: {why}", mail.name));
                            }
                        }
                    }
                }
                mail = async {
                    // Even a moment that has passed costs a millisecond of sleep.
                    if pace > Instant::now() {
                        sleep_until(pace).await;
                    }
                    match next.take() {
                        Some(mail) => Some(Ok(mail)),
                        None => reader.recv().await,
                    }
                }, if has_room && !ended && !stopped => match mail {
                    Some(Ok(mail)) => {
                        // Time lost to the clock's coarse ticks is made up for, time lost to a slow server is not.
                        if let Some(interval) = interval {
                            let now = Instant::now();
                            pace = (pace + interval).max(now.checked_sub(CATCH_UP).unwrap_or(now));
                        }
                        in_flight_bytes += mail.data.len();
                        in_flight.push(publisher.publish(mail));
                    }
                    Some(Err(err)) => progress.unreadable(&err, exit),
                    None => ended = true,
                },
                else => break,
            }
        }
        Ok(())
    }
}

/// A mail on its way.
struct Outgoing {
    name: String,
    data: Bytes,
    /// What the server knows it by, if it may be stored once only.
    id: Option<String>,
}

/// Reads mails in a thread of its own: a slow disk or writer must not keep the connection waiting.
fn read(files: Vec<PathBuf>, format: Format, once_on: Option<String>) -> mpsc::Receiver<Result<Outgoing, MailError>> {
    let (sender, receiver) = mpsc::channel(READ_AHEAD);
    // Not a blocking task of the runtime, which would wait for a read that may never return.
    thread::spawn(move || {
        for mail in mails(&files, format) {
            let mail = mail.map(|Mail { name, data }| Outgoing {
                id: once_on.as_deref().map(|subject| message_id(subject, &data)),
                name,
                data: data.into(),
            });
            if sender.blocking_send(mail).is_err() {
                return;
            }
        }
    });
    receiver
}

/// The same for the same mail on the same subject, whoever publishes it.
fn message_id(subject: &str, data: &[u8]) -> String {
    let digest = Sha256::new().chain_update(subject).chain_update([0]).chain_update(data).finalize();
    format!("{digest:x}")
}

struct Publisher<'a> {
    jetstream: Context,
    subject: &'a str,
    headers: HeaderMap,
    /// What the server said when it stopped letting us in. A refused publish gets no answer of its own.
    refused: watch::Receiver<Option<String>>,
    /// How long to go on with one mail.
    timeout: Duration,
    /// Whether sending a mail twice is harmless.
    repeatable: bool,
}

impl<'a> Publisher<'a> {
    async fn connect(
        nats: &Nats,
        subject: &'a str,
        headers: Vec<(HeaderName, HeaderValue)>,
        timeout: Duration,
        repeatable: bool,
    ) -> Result<Self> {
        let (refuse, refused) = watch::channel(None);
        let refuse = std::sync::Arc::new(refuse);
        let on_event = move |event| {
            if let Some(reason) = refusal(&event) {
                refuse.send_replace(Some(reason));
            }
        };
        let client = nats.connect("mailroom publish", on_event).await?;
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.append(name, value);
        }
        Ok(Self {
            jetstream: nats.jetstream(client, timeout.min(ACK_TIMEOUT)),
            subject,
            headers: map,
            refused,
            timeout,
            repeatable,
        })
    }

    /// Stores a mail and says whether it was new.
    async fn publish(&self, mail: Outgoing) -> (Outgoing, Result<bool, Failure>) {
        let mut refused = self.refused.clone();
        let stored = tokio::select! {
            stored = self.store(&mail) => stored,
            Ok(reason) = refused.wait_for(Option::is_some) => {
                Err(Failure::TryAgain(format!("the server refuses: {}", reason.as_deref().unwrap_or_default())))
            }
        };
        (mail, stored)
    }

    async fn store(&self, mail: &Outgoing) -> Result<bool, Failure> {
        let deadline = Instant::now() + self.timeout;
        let mut is_first = true;
        loop {
            match self.send(mail).await {
                // A duplicate of our own earlier attempt is new all the same.
                Ok(ack) => return Ok(!(ack.duplicate && is_first)),
                Err(err) => {
                    let is_silence = matches!(err.kind(), PublishErrorKind::TimedOut | PublishErrorKind::BrokenPipe);
                    if !is_silence || !self.repeatable || Instant::now() >= deadline {
                        return Err(self.explain(mail, &err));
                    }
                }
            }
            is_first = false;
        }
    }

    async fn send(&self, mail: &Outgoing) -> Result<PublishAck, jetstream::context::PublishError> {
        let mut message = PublishMessage::build().payload(mail.data.clone());
        if !self.headers.is_empty() {
            message = message.headers(self.headers.clone());
        }
        if let Some(id) = &mail.id {
            message = message.message_id(id);
        }
        self.jetstream.send_publish(self.subject.to_owned(), message).await?.await
    }

    fn explain(&self, mail: &Outgoing, err: &jetstream::context::PublishError) -> Failure {
        let subject = self.subject;
        match err.kind() {
            PublishErrorKind::MaxPayloadExceeded => Failure::Unpublishable(format!(
                "{} with its headers is more than the server takes, {} (its max_payload)",
                HumanBytes(mail.data.len() as u64),
                HumanBytes(self.jetstream.client().server_info().max_payload as u64)
            )),
            PublishErrorKind::StreamNotFound => {
                Failure::TryAgain(format!("no stream takes subject {subject}; `host provision` makes one"))
            }
            PublishErrorKind::TimedOut | PublishErrorKind::BrokenPipe => Failure::TryAgain(format!(
                "no answer from NATS in {}; the mail may or may not be stored",
                humantime::format_duration(self.timeout)
            )),
            _ => match find::<jetstream::Error>(err) {
                Some(refused) if refused.error_code() == ErrorCode::STREAM_MESSAGE_EXCEEDS_MAXIMUM => {
                    Failure::Unpublishable(format!(
                        "{} is more than the stream takes (its max_msg_size)",
                        HumanBytes(mail.data.len() as u64)
                    ))
                }
                Some(refused) => Failure::TryAgain(format!("the stream of subject {subject} refuses: {refused}")),
                None => Failure::TryAgain(format!("publish on {subject}: {}", innermost(err))),
            },
        }
    }
}

/// What became of the mails.
#[derive(Debug, Default)]
struct Tally {
    stored: u64,
    known: u64,
    failed: u64,
    bytes: u64,
}

impl Tally {
    fn add(&mut self, bytes: usize, is_new: bool) {
        self.stored += 1;
        self.known += u64::from(!is_new);
        self.bytes += bytes as u64;
    }

    fn summary(&self, took: Duration) -> String {
        let Self { stored, known, failed, bytes } = self;
        let plural = if *stored == 1 { "" } else { "s" };
        let known = if *known > 0 { format!(" ({known} already there)") } else { String::new() };
        let failed = if *failed > 0 { format!("; {failed} failed") } else { String::new() };
        let seconds = took.as_secs_f64();
        #[expect(clippy::cast_precision_loss, reason = "a rate for people to read")]
        let rate = *stored as f64 / seconds.max(0.001);
        format!(
            "published {stored} mail{plural}{known}, {}, in {seconds:.2} s ({rate:.0} mails/s){failed}",
            HumanBytes(*bytes)
        )
    }
}

/// A bar on a terminal, from the second mail on; and a place for errors beside it.
struct Progress {
    bar: Option<ProgressBar>,
}

impl Progress {
    fn new(quiet: bool, files: &[PathBuf]) -> Self {
        if quiet || !io::stderr().is_terminal() {
            return Self { bar: None };
        }
        // Only plain files tell beforehand how much there is.
        let sizes =
            files.iter().map(|file| fs::metadata(file).ok().filter(fs::Metadata::is_file).map(|file| file.len()));
        let (bar, style) = match sizes.sum::<Option<u64>>() {
            Some(total) => (ProgressBar::new(total), "{bar:30} {bytes}/{total_bytes}  {msg}  {eta} left"),
            None => (ProgressBar::new_spinner(), "{spinner} {bytes}  {msg}"),
        };
        if let Ok(style) = ProgressStyle::with_template(style) {
            bar.set_style(style);
        }
        Self { bar: Some(bar) }
    }

    fn stored(&self, tally: &Tally) {
        if let Some(bar) = self.bar.as_ref().filter(|_| tally.stored > 1) {
            bar.set_position(tally.bytes);
            bar.set_message(format!("{} mails", tally.stored));
        }
    }

    fn unreadable(&self, err: &MailError, exit: &mut Exit) {
        *exit = (*exit).max(match err {
            MailError::Unreadable { .. } => Exit::Unreadable,
            MailError::TooLarge { .. } => Exit::Unpublishable,
        });
        self.error(&err.to_string());
    }

    fn error(&self, text: &str) {
        let text = format!("error: {text}");
        match &self.bar {
            Some(bar) => bar.suspend(|| say(&text)),
            None => say(&text),
        }
    }

    fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// Prints to standard error, whether anybody listens or not: the exit code says it too.
fn say(text: &str) {
    let _ = writeln!(io::stderr(), "{text}");
}

fn parse_subject(text: &str) -> Result<String> {
    check_subject("subject", text)?;
    Ok(text.to_owned())
}

fn parse_header(text: &str) -> Result<(HeaderName, HeaderValue)> {
    let Some((name, value)) = text.split_once(':') else { bail!("a header is NAME:VALUE") };
    if name.is_empty() {
        bail!("a header is NAME:VALUE, with a name");
    }
    let lower = name.to_ascii_lowercase();
    for (prefix, whose) in [("nats-", "NATS"), ("mailroom-", "the host")] {
        if lower.starts_with(prefix) {
            bail!("header {name} means something to {whose}; choose another name");
        }
    }
    let parsed = name.parse().map_err(|_| anyhow::anyhow!("{name:?} is no header name"))?;
    let value = value.trim().parse().map_err(|_| anyhow::anyhow!("header {name} has a line break in its value"))?;
    Ok((parsed, value))
}

fn parse_rate(text: &str) -> Result<f64> {
    match text.parse() {
        Ok(rate) if (0.001..=1e6).contains(&rate) => Ok(rate),
        _ => bail!("a rate is a number of mails per second, from 0.001 to 1000000"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reserved_headers_are_refused() {
        let (name, value) = parse_header("Source: a:b ").expect("header");
        assert_eq!((name.to_string().as_str(), value.as_str()), ("Source", "a:b"));
        for text in ["Nats-Msg-Id:1", "nats-rollup:all", "MAILROOM-ID:1", "no colon", "a b:c", ":x", "a:b\r\nc:d"] {
            assert!(parse_header(text).is_err(), "{text}");
        }
    }

    #[test]
    fn trying_again_outweighs_giving_up() {
        assert!(Exit::TryAgain > Exit::Unreadable && Exit::Unreadable > Exit::Unpublishable);
        assert!(Exit::Unpublishable > Exit::Stored);
    }

    #[test]
    fn same_mail_is_known_again_on_its_subject_only() {
        assert_eq!(message_id("a", b"x"), message_id("a", b"x"));
        assert_ne!(message_id("a", b"x"), message_id("b", b"x"));
        assert_ne!(message_id("a", b"x"), message_id("a", b"y"));
        assert_eq!(message_id("a", b"x").len(), 64);
    }

    #[test]
    fn summary_counts_what_was_there_already() {
        let mut tally = Tally::default();
        tally.add(1024, true);
        assert_eq!(tally.summary(Duration::from_secs(1)), "published 1 mail, 1.00 KiB, in 1.00 s (1 mails/s)");
        tally.add(1024, false);
        tally.failed = 3;
        assert_eq!(
            tally.summary(Duration::from_secs(1)),
            "published 2 mails (1 already there), 2.00 KiB, in 1.00 s (2 mails/s); 3 failed"
        );
    }

    #[test]
    fn rates_are_bounded() {
        assert!(parse_rate("0").is_err() && parse_rate("-1").is_err() && parse_rate("NaN").is_err());
        assert!(parse_rate("0.5").is_ok() && parse_rate("1000").is_ok());
    }
}
