//! Messages that the NATS client library cannot read.
//!
//! The server stores whatever bytes a sender calls headers. async-nats ends its connection at a block that is no
//! UTF-8, for example, without a word about the message: all that was on its way with it is lost, and comes again
//! after `ack_wait`, with the same message. So whenever a shard loses its connection, one [`Search`] looks through
//! what the consumer has delivered, by way of the JetStream API, which wraps headers in JSON. What it finds goes to
//! the dead letters.

use crate::admin::Metrics;
use crate::header_block;
use crate::interface::Message;
use crate::letter;
use crate::names::{Names, overlap};
use crate::settle::DeadReason;
use crate::sink::{Cause, Sink, StoreError};
use crate::source::Delivery;
use anyhow::{Context as _, Result};
use async_nats::Client;
use async_nats::jetstream::consumer::Info;
use async_nats::jetstream::message::AckKind;
use async_nats::jetstream::response::Response;
use async_nats::jetstream::stream::RawMessage;
use async_nats::jetstream::{Context, ErrorCode};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use futures::{FutureExt as _, StreamExt as _, stream};
use serde::Deserialize;
use serde_json::json;
use std::collections::BTreeSet;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::Notify;
use tokio::time::sleep;

/// Messages that are looked at or put away at the same time.
const LOOKS_MAX: usize = 16;

/// How long shards are careful after a connection was lost: time to find out why.
const CAREFUL_AFTER_LOSS: Duration = Duration::from_secs(5);

/// How long they are careful after a message was found that did it: its sender may have sent more.
const CAREFUL_AFTER_FINDING: Duration = Duration::from_secs(60);

/// The first and the longest wait before something that failed is repeated.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// How often the server is asked to confirm that a message is terminated.
const CONFIRMATIONS_MAX: usize = 5;

/// Lets the shards, which lose connections, and the [`Search`] for the reason know of each other.
#[derive(Clone)]
pub struct Alarm(Arc<AlarmState>);

struct AlarmState {
    lost: Notify,
    made: Instant,
    /// Until when shards are careful, in milliseconds since `made`.
    careful_until: AtomicU64,
}

impl Default for Alarm {
    fn default() -> Self {
        Self(Arc::new(AlarmState { lost: Notify::new(), made: Instant::now(), careful_until: AtomicU64::new(0) }))
    }
}

impl Alarm {
    /// A shard's connection is lost, perhaps through a message.
    pub fn raise(&self) {
        self.careful_for(CAREFUL_AFTER_LOSS);
        self.0.lost.notify_one();
    }

    /// Whether shards are to ask for one message at a time, so that an unreadable one costs nobody else's delivery.
    pub fn is_raised(&self) -> bool {
        let until = self.0.careful_until.load(Ordering::Relaxed);
        until > 0 && Duration::from_millis(until) > self.0.made.elapsed()
    }

    fn careful_for(&self, time: Duration) {
        let until = u64::try_from((self.0.made.elapsed() + time).as_millis()).unwrap_or(u64::MAX);
        self.0.careful_until.fetch_max(until, Ordering::Relaxed);
    }
}

/// Looks for unreadable messages whenever a connection was lost, and puts them away.
pub struct Search {
    /// A connection that is no shard's.
    pub client: Client,
    /// JetStream on that connection.
    pub jetstream: Context,
    /// The stream and the consumer.
    pub names: Names,
    /// Where the messages go.
    pub sink: Sink,
    /// Says the digest of the component that would run on them now.
    pub component: Box<dyn Fn() -> Arc<str> + Send + Sync>,
    /// Where they are counted.
    pub metrics: Metrics,
    /// Raised by shards that lost their connection.
    pub alarm: Alarm,
    /// How long a message stays away that cannot even be stored as a dead letter.
    pub retry_max: Duration,
}

/// What was looked at already and needs no second look: messages do not change.
struct Seen {
    consumer_created: i128,
    sequences: RangeInclusive<u64>,
    /// Exceptions: unreadable, and not put away.
    left: BTreeSet<u64>,
}

/// Where the messages of a search come from.
struct Origin {
    /// `<stream>:<created>:<consumer>:`
    id_prefix: String,
    filters: Vec<String>,
    /// When the consumer was made, in nanoseconds since 1970, and the sequence of its last delivery.
    consumer_created: i128,
    delivered: u64,
}

impl Search {
    /// Searches at every [`Alarm::raise`], until the future is dropped.
    pub async fn run(self) {
        let mut seen = None;
        loop {
            self.alarm.0.lost.notified().await;
            let (stream_created, consumer) = self.patiently("the consumer", || self.consumer()).await;
            let config = &consumer.config;
            let filters = config.filter_subjects.iter().chain([&config.filter_subject]);
            let origin = Origin {
                id_prefix: format!("{}:{stream_created}:{}:", self.names.stream, self.names.consumer),
                filters: filters.filter(|filter| !filter.is_empty()).cloned().collect(),
                consumer_created: consumer.created.unix_timestamp_nanos(),
                delivered: consumer.delivered.consumer_sequence,
            };
            seen = Some(self.search(&origin, &consumer, seen.as_ref()).await);
        }
    }

    /// Looks at all that is delivered and perhaps not settled, the newest first.
    async fn search(&self, origin: &Origin, consumer: &Info, seen: Option<&Seen>) -> Seen {
        let consumer_created = origin.consumer_created;
        let seen = seen.filter(|seen| seen.consumer_created == consumer_created);
        let (first, last) = (consumer.ack_floor.stream_sequence + 1, consumer.delivered.stream_sequence);
        let is_new =
            |sequence: &u64| seen.is_none_or(|seen| !seen.sequences.contains(sequence) || seen.left.contains(sequence));
        let started = Instant::now();
        let looks = stream::iter((first..=last).rev().filter(is_new))
            .map(|sequence| self.look(origin, sequence).map(move |end| (sequence, end)).boxed());
        let (mut looked_at, mut put_away, mut left) = (0_u64, 0_u64, BTreeSet::new());
        let mut looks = std::pin::pin!(looks.buffer_unordered(LOOKS_MAX));
        while let Some((sequence, end)) = looks.next().await {
            looked_at += 1;
            match end {
                End::Readable => {}
                End::PutAway => put_away += 1,
                End::Left => drop(left.insert(sequence)),
            }
        }
        if looked_at > 0 {
            let took = started.elapsed();
            tracing::info!(looked_at, put_away, ?took, "looked for a message that cuts connections");
        }
        let first = match seen {
            // A gap between then and now was settled meanwhile.
            Some(seen) if first <= *seen.sequences.end() => first.min(*seen.sequences.start()),
            _ => first,
        };
        Seen { consumer_created, sequences: first..=last, left }
    }

    /// Looks at one message, and puts it away if it is unreadable.
    async fn look(&self, origin: &Origin, sequence: u64) -> End {
        let stored = self.patiently("a message", || self.stored(sequence)).await;
        let Some(stored) = stored else { return End::Readable };
        let wanted = origin.filters.is_empty() || origin.filters.iter().any(|filter| overlap(filter, &stored.subject));
        let block = stored.headers.as_deref();
        let Some(fault) = fault(&stored.subject, block).filter(|_| wanted) else { return End::Readable };
        self.alarm.careful_for(CAREFUL_AFTER_FINDING);
        let delivery = Delivery {
            message: Arc::new(Message {
                id: format!("{}{sequence}", origin.id_prefix),
                subject: stored.subject,
                headers: Vec::new(),
                time: stored.time,
                attempt: 0,
                data: Vec::new(),
            }),
            headers: block.map(header_block::readable),
            payload: stored.payload.into(),
            reply: reply_subject(&self.names, sequence, origin.delivered).into(),
            count: 0,
            arrived: Instant::now(),
            age: Duration::ZERO,
            origin: letter::Origin::Sender,
        };
        self.put_away(origin, &delivery, block, fault).await
    }

    async fn put_away(&self, origin: &Origin, delivery: &Delivery, block: Option<&[u8]>, fault: &str) -> End {
        let id = &delivery.message.id;
        let mut wait = BACK_OFF.0;
        loop {
            let cause = Cause { reason: DeadReason::UNREADABLE, detail: fault, component: &(self.component)() };
            match self.sink.unreadable(delivery, block, cause).await {
                Ok(_) => break,
                Err(StoreError::Unavailable(reason)) => {
                    self.metrics.store_failures.inc();
                    if wait == BACK_OFF.0 {
                        tracing::error!(
                            id,
                            "cannot store a dead letter of a message that cuts connections: {reason}; trying again"
                        );
                    }
                    // Kept from being delivered meanwhile; a host that cannot say so loses one more connection.
                    let _ = self.client.publish(delivery.reply.clone(), AckKind::Progress.into()).await;
                    sleep(wait).await;
                    wait = (wait * 2).min(BACK_OFF.1);
                }
                Err(err @ StoreError::TooLarge(_)) => {
                    tracing::error!(
                        id,
                        "a message cuts connections: {fault}; its dead letter is {err}; the message stays in its stream"
                    );
                    let later = AckKind::Nak(Some(self.retry_max));
                    let _ = self.client.publish(delivery.reply.clone(), later.into()).await;
                    self.metrics.settled("retry", "too-large");
                    return End::Left;
                }
            }
        }
        // Storing may have taken its time. Another stream's message of this number is not meant.
        let (_, consumer) = self.patiently("the consumer", || self.consumer()).await;
        if consumer.created.unix_timestamp_nanos() != origin.consumer_created {
            return End::PutAway;
        }
        for _ in 0..CONFIRMATIONS_MAX {
            match self.client.request(delivery.reply.clone(), AckKind::Term.into()).await {
                Ok(_) => {
                    tracing::warn!(id, "a message cut a connection: {fault}; it is in the dead letters now");
                    self.metrics.settled("dead", DeadReason::UNREADABLE.name());
                    return End::PutAway;
                }
                Err(_) => sleep(BACK_OFF.1).await,
            }
        }
        End::Left
    }

    /// When the stream was made, in seconds since 1970, and the consumer.
    async fn consumer(&self) -> Result<(i64, Info)> {
        let stream = self.jetstream.get_stream(&self.names.stream).await.context("find the stream")?;
        let consumer = stream.consumer_info(&self.names.consumer).await.context("find the consumer")?;
        Ok((stream.cached_info().created.unix_timestamp(), consumer))
    }

    /// A message as the stream keeps it; nothing, if it is gone.
    async fn stored(&self, sequence: u64) -> Result<Option<StoredMessage>> {
        let subject = format!("STREAM.MSG.GET.{}", self.names.stream);
        match self.jetstream.request(subject, &json!({ "seq": sequence })).await? {
            Response::Ok(Found { message }) => Ok(Some(StoredMessage {
                subject: message.subject,
                headers: message.headers.map(|headers| BASE64.decode(headers)).transpose()?,
                payload: BASE64.decode(message.payload)?,
                time: u64::try_from(message.time.unix_timestamp_nanos() / 1_000_000).unwrap_or_default(),
            })),
            Response::Err { error }
                if matches!(error.error_code(), ErrorCode::NO_MESSAGE_FOUND | ErrorCode::STREAM_NOT_FOUND) =>
            {
                Ok(None)
            }
            Response::Err { error } => Err(error.into()),
        }
    }

    /// Repeats `attempt` until it succeeds.
    async fn patiently<T, F>(&self, what: &str, attempt: impl Fn() -> F) -> T
    where
        F: Future<Output = Result<T>>,
    {
        let mut wait = BACK_OFF.0;
        loop {
            match attempt().await {
                Ok(value) => return value,
                Err(err) => {
                    let longer = (wait * 2).min(BACK_OFF.1);
                    if longer == BACK_OFF.1 && wait < longer {
                        tracing::warn!("cannot look at {what}, for what cut a connection: {err:#}; trying again");
                    }
                    sleep(wait).await;
                    wait = longer;
                }
            }
        }
    }
}

/// What became of a message that was looked at.
enum End {
    /// It is none of ours, or gone.
    Readable,
    /// It is in the dead letters and terminated.
    PutAway,
    /// It is unreadable, and still to be delivered.
    Left,
}

#[derive(Deserialize)]
struct Found {
    message: RawMessage,
}

struct StoredMessage {
    subject: String,
    headers: Option<Vec<u8>>,
    payload: Vec<u8>,
    /// When the stream took it, in milliseconds since 1970.
    time: u64,
}

/// Where the acknowledgement of a message goes whose delivery was never seen (ADR-15). The server goes by the sequence
/// in the stream; that of the delivery only has to be one that the consumer has reached and not all before is settled.
fn reply_subject(names: &Names, sequence: u64, delivered: u64) -> String {
    format!("$JS.ACK.{}.{}.1.{sequence}.{delivered}.0.0", names.stream, names.consumer)
}

/// What async-nats fails at in a message; nothing, if it can read it. `subject` is as the JetStream API tells it, with
/// U+FFFD for what is no UTF-8.
fn fault(subject: &str, block: Option<&[u8]>) -> Option<&'static str> {
    if subject.contains(char::REPLACEMENT_CHARACTER) {
        return Some("its subject is no UTF-8");
    }
    let block = block.filter(|block| !block.is_empty())?;
    if subject.contains(char::is_whitespace) {
        return Some("there is white space in its subject");
    }
    header_block::fault(block)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Deserialize)]
    struct Sample {
        name: String,
        #[serde(default)]
        subject: String,
        headers: Option<String>,
        readable: bool,
    }

    /// The bytes that the characters of a sample stand for.
    fn bytes(text: &str) -> Vec<u8> {
        text.chars().map(|c| u8::try_from(u32::from(c)).expect("a byte")).collect()
    }

    #[test]
    fn unreadable_messages_are_told_from_readable_ones() {
        let samples: Vec<Sample> =
            serde_json::from_str(include_str!("../../tests/headers.json")).expect("the samples are JSON");
        for Sample { name, subject, headers, readable } in samples {
            let subject = String::from_utf8_lossy(&bytes(&subject)).into_owned();
            let fault = fault(&subject, headers.as_deref().map(bytes).as_deref());
            assert_eq!(fault.is_none(), readable, "{name}: {fault:?}");
        }
    }

    #[test]
    fn what_can_be_read_of_headers_is_read() {
        let block = b"NATS/1.0\r\nA: 1\r\n\tfolded\r\nB b: 2\r\nnonsense\r\nC: \xff\r\nA:3\r\nD: a\rb\r\n\r\n";
        let headers = header_block::readable(block);
        let values: Vec<&str> = headers.get_all("A").map(async_nats::header::HeaderValue::as_str).collect();
        assert_eq!((headers.len(), values), (1, vec!["1\tfolded", "3"]));
    }

    #[test]
    fn the_alarm_lasts_for_a_while_and_a_finding_prolongs_it() {
        let alarm = Alarm::default();
        assert!(!alarm.is_raised());
        alarm.raise();
        assert!(alarm.is_raised());
        let until = alarm.0.careful_until.load(Ordering::Relaxed);
        alarm.careful_for(CAREFUL_AFTER_FINDING);
        assert!(alarm.0.careful_until.load(Ordering::Relaxed) >= until + 50_000);
    }
}
