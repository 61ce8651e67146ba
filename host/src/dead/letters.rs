//! Reads dead letters: in order and without their mails, or one of them whole.

use crate::header_block;
use crate::letter::{COMPONENT, DELIVERIES, DETAIL, ID, REASON, STORED, SUBJECT, subject_in, take_front};
use crate::names::{NameArgs, Names, check_pattern, overlap};
use crate::nats::{Nats, NatsArgs, innermost, read_stream, warn_if_refused};
use crate::settle::DeadReason;
use anyhow::{Context as _, Result, anyhow, bail, ensure};
use async_nats::header::{HeaderMap, HeaderValue};
use async_nats::jetstream::consumer::DeliverPolicy;
use async_nats::jetstream::consumer::pull::{Ordered, OrderedConfig};
use async_nats::jetstream::context::RequestErrorKind;
use async_nats::jetstream::response::Response;
use async_nats::jetstream::{Context, ErrorCode, Message};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use futures::StreamExt as _;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::sync::watch;

/// How long the server may take to answer one request; many are under way at a time.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// Where the letters are, as typed.
#[derive(Debug, clap::Args)]
pub struct PlaceArgs {
    #[command(flatten)]
    nats: NatsArgs,

    #[command(flatten)]
    names: NameArgs,
}

/// The dead letters of one consumer.
pub struct DeadLetters {
    pub names: Names,
    pub jetstream: Context,
    nats: Nats,
}

impl DeadLetters {
    /// Connects.
    pub async fn open(place: PlaceArgs) -> Result<Self> {
        let names = place.names.resolve()?;
        let nats = place.nats.resolve()?;
        let client = nats.connect("mailroom dead", warn_if_refused()).await?;
        Ok(Self { names, jetstream: nats.jetstream(client, REQUEST_TIMEOUT), nats })
    }

    /// Whose letters they are, for messages.
    pub fn of(&self) -> String {
        format!("consumer {} of stream {}", self.names.consumer, self.names.stream)
    }

    /// Reads all letters after sequence `after` that are there now, without their mails.
    pub async fn after(&self, after: u64, since: Option<SystemTime>) -> Result<Letters<'_>> {
        let (lost, losses) = watch::channel(());
        let (lost, warn) = (Arc::new(lost), warn_if_refused());
        let on_event = move |event| {
            if event == async_nats::Event::Disconnected {
                lost.send_replace(());
            }
            warn(event);
        };
        // A connection of its own: one message whose headers the client cannot read costs it.
        let client = self.nats.connect("mailroom dead reader", on_event).await?;
        let reader = self.nats.jetstream(client, REQUEST_TIMEOUT);
        let config = self.config("STREAM.INFO", &self.names.dead_stream, "state").await?;
        let last = config["last_seq"].as_u64().context("the stream has no last sequence")?;
        let mut letters =
            Letters { dead: self, reader, losses, next: after + 1, last, pending: 0, messages: None, since };
        letters.begin().await?;
        Ok(letters)
    }

    /// `part` of what the server says about a stream or a consumer (`STREAM/CONSUMER` is written `STREAM.CONSUMER`).
    pub async fn config(&self, request: &str, name: &str, part: &str) -> Result<Value> {
        match self.request(format!("{request}.{name}"), json!({})).await? {
            Ok(mut info) => Ok(info[part].take()),
            Err(err) => match err.error_code() {
                ErrorCode::STREAM_NOT_FOUND => bail!("no stream {name}; `host provision` makes it"),
                ErrorCode::CONSUMER_NOT_FOUND => {
                    bail!("no {}, so nobody would run them; look at --consumer, or add --as-new", self.of())
                }
                _ => bail!("{request} {name}: {err}"),
            },
        }
    }

    /// One letter, whole; nothing if it is gone.
    pub async fn get(&self, sequence: u64) -> Result<Option<Letter>> {
        self.find(json!({ "seq": sequence })).await
    }

    async fn find(&self, which: Value) -> Result<Option<Letter>> {
        let stream = &self.names.dead_stream;
        match self.request(format!("STREAM.MSG.GET.{stream}"), which).await? {
            Ok(answer) => {
                let Answer { message } = serde_json::from_value(answer).context("read a message of the server's")?;
                Ok(Some(Letter::of_raw(message)?))
            }
            Err(err) => match err.error_code() {
                ErrorCode::NO_MESSAGE_FOUND => Ok(None),
                ErrorCode::STREAM_NOT_FOUND => bail!("no stream {stream}; `host provision` makes it"),
                _ => bail!("read stream {stream}: {err}"),
            },
        }
    }

    /// Removes a letter without overwriting it on the disk. False if it was gone.
    pub async fn remove(&self, sequence: u64) -> Result<bool> {
        let stream = &self.names.dead_stream;
        let which = json!({ "seq": sequence, "no_erase": true });
        match self.request(format!("STREAM.MSG.DELETE.{stream}"), which).await? {
            Ok(_) => Ok(true),
            Err(err) => match err.error_code() {
                ErrorCode::NO_MESSAGE_FOUND | ErrorCode::SEQUENCE_NOT_FOUND => Ok(false),
                // What older servers say of a message that is not there.
                ErrorCode::STREAM_MESSAGE_DELETE_FAILED if self.get(sequence).await?.is_none() => Ok(false),
                _ => bail!("remove letter {sequence} of stream {stream}: {err}"),
            },
        }
    }

    /// Removes all of the consumer's letters up to sequence `last`, at least 1; gives their number.
    pub async fn remove_all(&self, last: u64) -> Result<u64> {
        let stream = &self.names.dead_stream;
        let which = json!({ "filter": self.names.dead_of_consumer(), "seq": last + 1 });
        match self.request(format!("STREAM.PURGE.{stream}"), which).await? {
            Ok(answer) => Ok(answer["purged"].as_u64().unwrap_or_default()),
            Err(err) => bail!("purge stream {stream}: {err}"),
        }
    }

    async fn request(&self, subject: String, body: Value) -> Result<Result<Value, async_nats::jetstream::Error>> {
        match self.jetstream.request(subject.clone(), &body).await {
            Ok(Response::Ok(answer)) => Ok(Ok(answer)),
            Ok(Response::Err { error }) => Ok(Err(error)),
            Err(err) => {
                let api = self.nats.api_prefix();
                Err(match err.kind() {
                    RequestErrorKind::TimedOut => anyhow!(
                        "no answer to {api}.{subject}; if the server runs, this user may lack permission to publish \
                         there, or to subscribe to its inbox (see --inbox-prefix)"
                    ),
                    // Nobody listens there: no JetStream, which explains more.
                    RequestErrorKind::NoResponders => match crate::nats::check_jetstream(&self.jetstream).await {
                        Err(err) => err,
                        Ok(()) => anyhow!("nobody answers to {api}.{subject}"),
                    },
                    _ => anyhow!("{api}.{subject}: {}", innermost(&err)),
                })
            }
        }
    }
}

/// Letters in their order, without their mails.
pub struct Letters<'a> {
    dead: &'a DeadLetters,
    reader: Context,
    /// Changes when the reader loses its connection.
    losses: watch::Receiver<()>,
    /// The first sequence not looked at yet.
    next: u64,
    /// The stream's last sequence when reading began: letters that come meanwhile are not read.
    last: u64,
    pending: u64,
    messages: Option<Ordered>,
    /// Letters older than this may be left out.
    since: Option<SystemTime>,
}

impl Letters<'_> {
    /// How many letters there were to read at the beginning.
    pub fn pending(&self) -> u64 {
        self.pending
    }

    /// The last sequence that will be looked at.
    pub fn last(&self) -> u64 {
        self.last
    }

    /// The next letter, or nothing at the end.
    pub async fn next(&mut self) -> Result<Option<Letter>> {
        let failed = || format!("read stream {}", self.dead.names.dead_stream);
        if self.next > self.last {
            return Ok(None);
        }
        if self.messages.is_none() {
            self.begin().await?;
        }
        let Some(messages) = &mut self.messages else { return Ok(None) };
        let message = tokio::select! {
            biased;
            message = messages.next() => message,
            _ = self.losses.changed() => None,
        };
        let letter = match message {
            Some(Ok(message)) => {
                let info = message.info().map_err(|err| anyhow!("{}: {err}", failed()))?;
                let (sequence, stored) = (info.stream_sequence, info.published.into());
                if info.pending == 0 {
                    self.last = self.last.min(sequence);
                }
                Letter::of_message(message, sequence, stored)
            }
            Some(Err(err)) if !self.losses.has_changed().unwrap_or(false) => {
                return Err(err).with_context(failed);
            }
            // Perhaps because of this very letter. Asked for alone it does no harm.
            _ => {
                self.losses.mark_unchanged();
                self.messages = None;
                let which = json!({ "seq": self.next, "next_by_subj": self.dead.names.dead_of_consumer() });
                match self.dead.find(which).await? {
                    Some(letter) => letter,
                    None => return Ok(None),
                }
            }
        };
        self.next = letter.sequence + 1;
        Ok((letter.sequence <= self.last).then_some(letter))
    }

    async fn begin(&mut self) -> Result<()> {
        let deliver_policy = match self.since {
            Some(since) if self.next == 1 => DeliverPolicy::ByStartTime { start_time: since.into() },
            _ => DeliverPolicy::ByStartSequence { start_sequence: self.next },
        };
        let filter_subject = self.dead.names.dead_of_consumer();
        let config = OrderedConfig { deliver_policy, filter_subject, headers_only: true, ..Default::default() };
        let stream = &self.dead.names.dead_stream;
        let consumer = read_stream(&self.reader, stream, config).await?;
        self.pending = consumer.cached_info().num_pending;
        if self.pending == 0 {
            self.last = 0;
            return Ok(());
        }
        self.messages = Some(consumer.messages().await.with_context(|| format!("read stream {stream}"))?);
        Ok(())
    }
}

/// A dead letter, or what else somebody published where they are.
#[derive(Debug)]
pub struct Letter {
    /// Its sequence in the stream of dead letters.
    pub sequence: u64,
    /// Its subject there.
    pub subject: String,
    /// When it was stored there.
    pub stored: SystemTime,
    /// Bytes of its mail.
    pub size: u64,
    /// The mail, unless it was left out.
    pub mail: Bytes,
    /// The message's header block, where it stood in front of the mail.
    pub front: Option<Bytes>,
    /// Its headers, or what is wrong with them.
    pub headers: Result<HeaderMap, String>,
}

#[derive(Deserialize)]
struct Answer {
    message: Raw,
}

/// A message as JetStream's API shows it.
#[derive(Deserialize)]
struct Raw {
    subject: String,
    seq: u64,
    hdrs: Option<String>,
    data: Option<String>,
    time: String,
}

impl Letter {
    fn of_message(message: Message, sequence: u64, stored: SystemTime) -> Self {
        let async_nats::Message { subject, headers, payload, .. } = message.message;
        let headers = headers.unwrap_or_default();
        let size = headers.get("Nats-Msg-Size").and_then(|size| size.as_str().parse().ok());
        Self {
            sequence,
            subject: subject.into_string(),
            stored,
            size: size.unwrap_or(payload.len() as u64),
            mail: payload,
            front: None,
            headers: Ok(headers),
        }
    }

    /// Not async-nats' own reading, which keeps one value of a repeated header only and fails on odd ones.
    fn of_raw(raw: Raw) -> Result<Self> {
        let decode = |text: Option<String>| BASE64.decode(text.unwrap_or_default()).context("read base64");
        let mut mail = Bytes::from(decode(raw.data)?);
        let headers = headers(&decode(raw.hdrs)?);
        let front = headers.as_ref().ok().and_then(|headers| take_front(headers, &mut mail));
        Ok(Self {
            sequence: raw.seq,
            subject: raw.subject,
            stored: humantime::parse_rfc3339(&raw.time).with_context(|| format!("read the time {}", raw.time))?,
            size: mail.len() as u64,
            mail,
            front,
            headers,
        })
    }

    /// The first value of a header.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.as_ref().ok()?.get(name).map(HeaderValue::as_str)
    }

    /// The sender's headers under their own names.
    pub fn senders(&self) -> HeaderMap {
        match (&self.front, &self.headers) {
            (Some(block), _) => header_block::readable(block),
            (None, Ok(headers)) => crate::letter::senders(headers),
            (None, Err(_)) => HeaderMap::new(),
        }
    }

    /// The sender's headers as text, sorted.
    pub fn senders_headers(&self) -> Vec<(String, String)> {
        let sorted = crate::source::sorted(&self.senders());
        sorted.into_iter().map(|(name, value)| (name, String::from_utf8_lossy(&value).into_owned())).collect()
    }

    /// The subject that the message had.
    fn subject_of_message(&self) -> Option<String> {
        subject_in(self.headers.as_ref().ok()?)
    }

    /// What makes it no dead letter of a host's, if it is none.
    pub fn oddity(&self) -> Option<String> {
        match &self.headers {
            Err(err) => Some(err.clone()),
            Ok(headers) => {
                let missing = [ID, REASON, SUBJECT].into_iter().find(|name| headers.get(*name).is_none())?;
                Some(format!("no header {missing}: not a host's letter"))
            }
        }
    }

    /// What there is to say about it in one line.
    pub fn facts(&self) -> Facts<'_> {
        Facts {
            sequence: self.sequence,
            time: humantime::format_rfc3339_millis(self.stored).to_string(),
            reason: self.header(REASON),
            id: self.header(ID),
            subject: self.subject_of_message(),
            size: self.size,
            deliveries: self.header(DELIVERIES).and_then(|number| number.parse().ok()),
            component: self.header(COMPONENT),
            stored: self.header(STORED),
            detail: self.header(DETAIL),
            odd: self.oddity(),
        }
    }
}

/// What a letter says about its message; nothing is missing in one of a host's but, perhaps, the detail.
#[derive(Debug, Serialize)]
pub struct Facts<'a> {
    pub sequence: u64,
    pub time: String,
    pub reason: Option<&'a str>,
    pub id: Option<&'a str>,
    pub subject: Option<String>,
    pub size: u64,
    pub deliveries: Option<u64>,
    pub component: Option<&'a str>,
    pub stored: Option<&'a str>,
    pub detail: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub odd: Option<String>,
}

/// The headers in a block, or what is wrong with it.
fn headers(block: &[u8]) -> Result<HeaderMap, String> {
    match header_block::fault(block) {
        Some(fault) => Err(fault.to_owned()),
        None => Ok(header_block::readable(block)),
    }
}

/// Which letters, as typed.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Which letters")]
pub struct FilterArgs {
    /// Only with this reason, such as trap or deadline; several with commas
    #[arg(long, value_name = "REASON", env = "MAILROOM_LETTER_REASON", value_delimiter = ',')]
    reason: Vec<String>,

    /// Only those whose message was on this subject; * and > stand for any, as in NATS
    #[arg(long, value_name = "SUBJECT", env = "MAILROOM_LETTER_SUBJECT")]
    subject: Option<String>,

    /// Only those of the message with this id
    #[arg(long, value_name = "ID", env = "MAILROOM_LETTER_ID")]
    id: Option<String>,

    /// Only those stored in this time, such as 10m or 2days
    #[arg(long, value_name = "DURATION", env = "MAILROOM_LETTER_SINCE", value_parser = humantime::parse_duration)]
    since: Option<Duration>,

    /// Only those stored longer ago than this
    #[arg(long, value_name = "DURATION", env = "MAILROOM_LETTER_UNTIL", value_parser = humantime::parse_duration)]
    until: Option<Duration>,

    /// Only those of the component whose digest begins like this, with or without `sha256:`
    #[arg(long, value_name = "DIGEST", env = "MAILROOM_LETTER_COMPONENT")]
    component: Option<String>,
}

/// Which letters, as meant. The default is all.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Filter {
    reasons: Vec<String>,
    subject: Option<String>,
    id: Option<String>,
    pub since: Option<SystemTime>,
    until: Option<SystemTime>,
    /// The digest's first digits, in lower case.
    component: Option<String>,
}

impl FilterArgs {
    /// Checks what is given, and counts times from now.
    ///
    /// # Errors
    /// A filter that would match nothing, or everything, whatever there is.
    pub fn resolve(self) -> Result<Filter> {
        if let Some(subject) = &self.subject {
            check_pattern("--subject", subject)?;
        }
        let known = DeadReason::DEAD.map(DeadReason::name);
        for reason in &self.reason {
            ensure!(known.contains(&reason.as_str()), "--reason {reason:?}: one of {}", known.join(", "));
        }
        ensure!(self.id.as_deref() != Some(""), "--id is empty");
        let component = self.component.map(|digest| digest.to_ascii_lowercase());
        let component = component.map(|digest| digest.strip_prefix("sha256:").unwrap_or(&digest).to_owned());
        if let Some(digest) = &component {
            ensure!(!digest.is_empty(), "--component is empty");
            ensure!(
                digest.len() <= 64 && digest.bytes().all(|digit| digit.is_ascii_hexdigit()),
                "--component {digest:?}: the first of the 64 hexadecimal digits of a digest, or all"
            );
        }
        let ago = |flag: &str, ago: Option<Duration>| {
            let time = |ago| SystemTime::now().checked_sub(ago).filter(|time| *time >= SystemTime::UNIX_EPOCH);
            ago.map(|ago| time(ago).with_context(|| format!("{flag} goes back to before 1970"))).transpose()
        };
        Ok(Filter {
            reasons: self.reason,
            subject: self.subject,
            id: self.id,
            since: ago("--since", self.since)?,
            until: ago("--until", self.until)?,
            component,
        })
    }
}

impl Filter {
    /// The letters of the message with this id.
    pub fn of_message(id: String) -> Self {
        Self { id: Some(id), ..Self::default() }
    }

    /// Whether the letter is meant.
    pub fn matches(&self, letter: &Letter) -> bool {
        let is = |name: &str, test: &dyn Fn(&str) -> bool| letter.header(name).is_some_and(test);
        (self.reasons.is_empty() || is(REASON, &|reason| self.reasons.iter().any(|wanted| wanted == reason)))
            && self
                .subject
                .as_ref()
                .is_none_or(|wanted| letter.subject_of_message().is_some_and(|own| overlap(wanted, &own)))
            && self.id.as_ref().is_none_or(|wanted| is(ID, &|id| id == wanted))
            && self.since.is_none_or(|since| letter.stored >= since)
            && self.until.is_none_or(|until| letter.stored < until)
            && self.component.as_ref().is_none_or(|wanted| {
                is(COMPONENT, &|digest| digest.strip_prefix("sha256:").is_some_and(|digits| digits.starts_with(wanted)))
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_blocks_are_read_or_said_to_be_odd() {
        let read = headers(b"NATS/1.0\r\na: 1\r\na:2 \r\nb:\r\n\r\n").expect("headers");
        assert_eq!(read.get_all("a").map(HeaderValue::as_str).collect::<Vec<_>>(), ["1", "2"]);
        assert_eq!(read.get("b").map(HeaderValue::as_str), Some(""));
        assert!(headers(b"").expect("none").is_empty());
        for odd in
            [&b"x"[..], b"NATS/1.0\r\nno colon\r\n\r\n", b"NATS/1.0\r\na\xff: 1\r\n\r\n", b"NATS/1.0\r\n\x01: 1\r\n"]
        {
            assert!(headers(odd).is_err(), "{odd:?}");
        }
    }

    #[test]
    fn filters_that_choose_nothing_or_everything_are_refused() {
        #[derive(Debug, clap::Parser)]
        struct Command {
            #[command(flatten)]
            filter: FilterArgs,
        }
        let resolve = |arg: &str| <Command as clap::Parser>::parse_from(["test", arg]).filter.resolve();
        for (arg, expected) in [
            ("--component=", "--component is empty"),
            ("--component=sha256:", "--component is empty"),
            ("--component=md5:00", "64 hexadecimal digits"),
            ("--id=", "--id is empty"),
            ("--subject=", "--subject is empty"),
            ("--reason=", "one of rejected, trap, deadline, "),
            ("--reason=trap,nonsense", "\"nonsense\": one of "),
        ] {
            let err = resolve(arg).expect_err(arg).to_string();
            assert!(err.contains(expected), "{arg}: {err}");
        }
        let digest = |arg| resolve(arg).expect(arg).component;
        assert_eq!(digest("--component=SHA256:AB0"), Some("ab0".to_owned()));
        assert_eq!(digest("--component=ab0"), Some("ab0".to_owned()));
        let reasons = DeadReason::DEAD.map(DeadReason::name).join(",");
        assert_eq!(resolve(&format!("--reason={reasons}")).expect("all of them").reasons.len(), 11);
    }

    #[test]
    fn filters_choose() {
        let mut headers = HeaderMap::new();
        for (name, value) in
            [(ID, "MAIL:1:triage:7"), (REASON, "trap"), (SUBJECT, "mail.a.b"), (COMPONENT, "sha256:abcd")]
        {
            headers.insert(name, value);
        }
        let stored = SystemTime::now();
        let mut letter = Letter {
            sequence: 1,
            subject: "dead.MAIL.triage.MAIL:1:triage:7".into(),
            stored,
            size: 0,
            mail: Bytes::new(),
            front: None,
            headers: Ok(headers),
        };
        let later = stored + Duration::from_secs(1);
        let cases = [
            (Filter::default(), true),
            (Filter { reasons: vec!["stack".into(), "trap".into()], ..Default::default() }, true),
            (Filter { reasons: vec!["stack".into()], ..Default::default() }, false),
            (Filter { subject: Some("mail.>".into()), ..Default::default() }, true),
            (Filter { subject: Some("mail.*".into()), ..Default::default() }, false),
            (Filter { id: Some("MAIL:1:triage:7".into()), ..Default::default() }, true),
            (Filter { id: Some("MAIL:1:triage:8".into()), ..Default::default() }, false),
            (Filter { component: Some("ab".into()), ..Default::default() }, true),
            (Filter { component: Some("ac".into()), ..Default::default() }, false),
            (Filter { since: Some(stored), until: Some(later), ..Default::default() }, true),
            (Filter { since: Some(later), ..Default::default() }, false),
            (Filter { until: Some(stored), ..Default::default() }, false),
        ];
        for (filter, expected) in &cases {
            assert_eq!(filter.matches(&letter), *expected, "{filter:?}");
        }
        assert_eq!(letter.oddity(), None);
        letter.headers = Ok(HeaderMap::new());
        assert!(letter.oddity().is_some_and(|odd| odd.contains(ID)));
        assert!(cases[0].0.matches(&letter) && !cases[1].0.matches(&letter));
    }
}

#[cfg(test)]
mod fuzz {
    use super::*;
    use ::fuzz::{any, check, collection, option};

    /// Whatever is typed to choose letters is refused or has a meaning, and no letter's headers break it.
    #[test]
    fn any_choice_of_letters_is_checked() {
        let text = || "[a-f0-9:.*>]{0,12}|sha256:[0-9a-fA-F]{0,66}|\\PC{0,10}";
        let reasons = collection::vec("trap|deadline|rejected|[a-z-]{0,8}", 0..3);
        let times = (option::of(any::<u64>()), option::of(any::<u64>()));
        let typed = (reasons, option::of(text()), option::of(text()), option::of(text()), times);
        let headers = collection::vec(any::<u8>(), 0..100);
        check("a choice of letters", 4_000, (typed, headers), |((reason, subject, id, component, times), block)| {
            let [since, until] = [times.0, times.1].map(|time| time.map(Duration::from_secs));
            let filter = FilterArgs { reason, subject, id, since, until, component }.resolve();
            let block = [b"NATS/1.0\r\nMailroom-Component: ", &block[..]].concat();
            let raw = Raw {
                subject: "dead.MAIL.triage.MAIL:1:triage:7".into(),
                seq: 1,
                hdrs: Some(BASE64.encode(block)),
                data: None,
                time: "1970-01-01T00:00:00Z".into(),
            };
            let (Ok(filter), Ok(letter)) = (filter, Letter::of_raw(raw)) else { return };
            let _ = (filter.matches(&letter), letter.senders_headers(), letter.oddity(), letter.facts());
            assert!(filter.component.is_none_or(|digits| (1..=64).contains(&digits.len())));
        });
    }
}
