//! What is stored in a stream, read without changing it.

use anyhow::{Context as _, Result, bail};
use async_nats::HeaderMap;
use async_nats::jetstream::Context;
use async_nats::jetstream::consumer::{AckPolicy, PullConsumer, pull};
use bytes::Bytes;
use futures::StreamExt as _;
use serde_json::Value;
use std::time::{Duration, SystemTime};

/// The stream that mail comes in by.
pub const MAIL: &str = "MAIL";
/// The stream of verdicts.
pub const VERDICTS: &str = "VERDICTS";
/// The stream of dead letters.
pub const DEAD: &str = "DEAD";

/// The stream of parked retries.
pub const PARKED: &str = "PARKED";

/// One message as its stream keeps it.
#[derive(Clone, Debug)]
pub struct Stored {
    /// The subject it was published on.
    pub subject: String,
    /// Its sequence in the stream.
    pub sequence: u64,
    /// When the server took it, by the server's clock.
    pub time: SystemTime,
    /// Its headers, repeated ones too.
    pub headers: HeaderMap,
    /// Its body.
    pub payload: Bytes,
}

impl Stored {
    /// A header's first value as text.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(|value| value.as_str())
    }

    /// The body as JSON.
    ///
    /// # Errors
    /// When it is none.
    pub fn json(&self) -> Result<Value> {
        serde_json::from_slice(&self.payload).with_context(|| format!("{}: the body is no JSON", self.subject))
    }

    /// The sequence of the mail that this verdict or dead letter is about: the last part of its `Mailroom-Id`,
    /// `<stream>:<created>:<consumer>:<sequence>`.
    ///
    /// # Errors
    /// When it has no such header.
    pub fn mail_sequence(&self) -> Result<u64> {
        let id = self.header("Mailroom-Id").with_context(|| format!("{}: no header Mailroom-Id", self.subject))?;
        let sequence = id.rsplit(':').next().and_then(|sequence| sequence.parse().ok());
        sequence.with_context(|| format!("{}: Mailroom-Id {id:?} does not end in a sequence", self.subject))
    }
}

/// How many messages a stream holds.
///
/// # Errors
/// When there is no such stream.
pub async fn count(jetstream: &Context, stream: &str) -> Result<u64> {
    let stream = jetstream.get_stream(stream).await.with_context(|| format!("look up stream {stream}"))?;
    Ok(stream.cached_info().state.messages)
}

/// How many verdicts and dead letters there are.
///
/// # Errors
/// When one of the streams is missing.
pub async fn outcomes(jetstream: &Context) -> Result<u64> {
    Ok(count(jetstream, VERDICTS).await? + count(jetstream, DEAD).await?)
}

/// Every verdict, in the order of the stream `VERDICTS`.
///
/// # Errors
/// As [`messages`].
pub async fn verdicts(jetstream: &Context) -> Result<Vec<Stored>> {
    messages(jetstream, VERDICTS).await
}

/// Every dead letter, in the order of the stream `DEAD`.
///
/// # Errors
/// As [`messages`].
pub async fn dead_letters(jetstream: &Context) -> Result<Vec<Stored>> {
    messages(jetstream, DEAD).await
}

/// Every message of a stream in its order, read through a short-lived consumer that acknowledges nothing.
///
/// # Errors
/// When there is no such stream, when it allows no second consumer (work queue), or when the server is too slow.
pub async fn messages(jetstream: &Context, stream: &str) -> Result<Vec<Stored>> {
    let name = stream;
    let stream = jetstream.get_stream(name).await.with_context(|| format!("look up stream {name}"))?;
    let expected = stream.cached_info().state.messages;
    let mut stored: Vec<Stored> = Vec::new();
    if expected == 0 {
        return Ok(stored);
    }
    let config = pull::Config {
        ack_policy: AckPolicy::None,
        inactive_threshold: Duration::from_secs(30),
        memory_storage: true,
        ..Default::default()
    };
    let mut consumer: PullConsumer =
        stream.create_consumer(config).await.with_context(|| format!("create a consumer on stream {name}"))?;
    let mut pending = expected;
    while pending > 0 {
        let before = stored.len();
        let fetch = consumer.fetch().max_messages(BATCH).expires(BATCH_DEADLINE);
        let mut batch = fetch.messages().await.with_context(|| format!("read stream {name}"))?;
        while let Some(message) = batch.next().await {
            let message = message.map_err(anyhow::Error::from_boxed).with_context(|| format!("read stream {name}"))?;
            let info = message.info().map_err(anyhow::Error::from_boxed).context("read a message's position")?;
            let (sequence, time) = (info.stream_sequence, info.published.into());
            pending = info.pending;
            let async_nats::Message { subject, headers, payload, .. } = message.message;
            let headers = headers.unwrap_or_default();
            stored.push(Stored { subject: subject.into_string(), sequence, time, headers, payload });
        }
        if stored.len() == before {
            bail!("read stream {name}: {pending} messages did not come within {BATCH_DEADLINE:?}");
        }
    }
    let consumer = consumer.info().await.context("look up the reading consumer")?.name.clone();
    stream.delete_consumer(&consumer).await.with_context(|| format!("delete consumer {consumer}"))?;
    Ok(stored)
}

/// Messages asked for at a time, and how long the server may take to gather them.
const BATCH: usize = 500;
const BATCH_DEADLINE: Duration = Duration::from_secs(5);
