//! Retries that are due late wait in a stream of their own, so that the consumer comes to rest and pods can go.
//!
//! A message that waits at the consumer, after a nak with a delay, counts as unsettled: whatever scales the hosts keeps
//! them up for it. [`Sink::park`](crate::sink::Sink::park) stores it in the parked stream instead, whole; then it is
//! acknowledged. When it is due it comes back to its stream as a replay does, with its id and its deliveries so far.
//!
//! Who brings it back is a matter of the server. From 2.12 on it publishes messages at a time that they name (ADR-51),
//! here within the parked stream, which the message stream has among its sources: nobody else has to be up. On older
//! ones a [`Mover`] of any host does it; the messages wait at a consumer of the parked stream, whose lag nobody scales by.

use crate::letter::{DUE, TARGET};
use crate::names::Names;
use anyhow::{Context as _, Result};
use async_nats::HeaderMap;
use async_nats::jetstream::consumer::{PullConsumer, pull};
use async_nats::jetstream::message::{AckKind, PublishMessage};
use async_nats::jetstream::response::Response;
use async_nats::jetstream::stream::{self, Source};
use async_nats::jetstream::{self, ErrorCode};
use futures::TryStreamExt as _;
use serde::Deserialize;
use serde_json::json;
use std::time::{Duration, SystemTime};
use tokio::time::{sleep, timeout};

/// The consumer of the parked stream at which retries wait that hosts bring back.
pub const DUE_CONSUMER: &str = "due";

/// After which time a retry that a mover does nothing about is given to another: much longer than it takes.
pub const DUE_ACK_WAIT: Duration = Duration::from_secs(5);

/// How many retries a mover takes at a time, and how long it waits for them.
const BATCH: (usize, Duration) = (100, Duration::from_secs(30));

/// How long after its end a batch is given up whose end the server did not tell.
const LOST_AFTER: Duration = Duration::from_secs(5);

/// How often a mover looks for its consumer while there is none.
const LOOK_EVERY: Duration = Duration::from_secs(30);

/// How long a retry stays away that could not be brought back.
const AGAIN_AFTER: Duration = Duration::from_secs(5);

/// How retries wait on this server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Parking {
    /// Who brings them back.
    pub by: By,
    /// The longest wait for which the stream keeps them.
    pub wait_max: Duration,
}

/// Who brings a retry back that is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum By {
    /// The server, from 2.12 on.
    Server,
    /// A [`Mover`].
    Mover,
}

/// What is asked of the parked stream; the client library knows nothing of schedules.
#[derive(Deserialize)]
struct Info {
    config: Config,
}

#[derive(Deserialize)]
struct Config {
    #[serde(default)]
    max_age: u64,
    #[serde(default)]
    allow_msg_schedules: bool,
}

impl Parking {
    /// How retries of messages of the stream `mail` can wait. Nothing, if the streams are not made for it or cannot be
    /// asked: then they wait at the consumer, which is as safe.
    pub async fn look_up(jetstream: &jetstream::Context, names: &Names, mail: &stream::Config) -> Option<Self> {
        let info = format!("STREAM.INFO.{}", names.parked_stream);
        let reason = match jetstream.request::<_, _, Response<Info>>(info, &json!({})).await {
            Ok(Response::Ok(Info { config })) => return Self::by(jetstream, names, mail, &config).await,
            Ok(Response::Err { error }) if error.error_code() == ErrorCode::STREAM_NOT_FOUND => return None,
            Ok(Response::Err { error }) => error.to_string(),
            Err(err) => err.to_string(),
        };
        tracing::warn!("look for stream {}: {reason}; retries wait at the consumer", names.parked_stream);
        None
    }

    async fn by(jetstream: &jetstream::Context, names: &Names, mail: &stream::Config, parked: &Config) -> Option<Self> {
        let by = if parked.allow_msg_schedules {
            let (due, replays) = (names.due_wildcard(), names.replay_wildcard());
            let mut sources = mail.sources.iter().flatten().filter(|source| source.name == names.parked_stream);
            let leads_back = |source: &Source| {
                let mut transforms = source.subject_transforms.iter();
                transforms.any(|transform| transform.source == due && transform.destination == replays)
            };
            sources.any(leads_back).then_some(By::Server)?
        } else {
            due_consumer(jetstream, &names.parked_stream).await?;
            By::Mover
        };
        let wait_max = if parked.max_age == 0 { Duration::MAX } else { Duration::from_nanos(parked.max_age / 2) };
        Some(Self { by, wait_max })
    }
}

async fn due_consumer(jetstream: &jetstream::Context, parked_stream: &str) -> Option<PullConsumer> {
    let stream = jetstream.get_stream_no_info(parked_stream).await.ok()?;
    stream.get_consumer::<pull::Config>(DUE_CONSUMER).await.ok()
}

/// Brings retries back that are due, of all streams and consumers, where the server does not do it.
///
/// Any number of movers share the work. What one had in its hands when it ended is brought back by another; a retry
/// that is brought back twice is one message to the server, or one id to the host that gets it.
pub struct Mover {
    jetstream: jetstream::Context,
    parked_stream: String,
}

impl Mover {
    /// One for the parked stream of this name.
    pub fn new(jetstream: jetstream::Context, parked_stream: String) -> Self {
        Self { jetstream, parked_stream }
    }

    /// Goes on for ever. Where there is no consumer to serve it looks again now and then.
    ///
    /// # Cancel safety
    /// Nothing is lost when the future is dropped.
    pub async fn run(self) {
        loop {
            let Some(consumer) = due_consumer(&self.jetstream, &self.parked_stream).await else {
                sleep(LOOK_EVERY).await;
                continue;
            };
            loop {
                match timeout(BATCH.1 + LOST_AFTER, self.serve(&consumer)).await {
                    Ok(Ok(())) => {}
                    Ok(Err(err)) => {
                        tracing::warn!("bring parked retries back: {err:#}");
                        sleep(AGAIN_AFTER).await;
                        break;
                    }
                    Err(_) => break,
                }
            }
        }
    }

    /// Serves one batch.
    async fn serve(&self, consumer: &PullConsumer) -> Result<()> {
        let (most, expires) = BATCH;
        let batch = consumer.batch().max_messages(most).expires(expires).messages().await.context("ask for them")?;
        // Each takes some round trips, which others need not wait for.
        let each = batch.map_err(anyhow::Error::from_boxed).try_for_each_concurrent(most, async |message| {
            if let Err(err) = self.see_to(&message).await {
                tracing::warn!(subject = %message.subject, "bring a parked retry back: {err:#}; again in {AGAIN_AFTER:?}");
                let _ = message.ack_with(AckKind::Nak(Some(AGAIN_AFTER))).await;
            }
            Ok(())
        });
        each.await
    }

    /// Puts it off until it is due, or brings it back.
    async fn see_to(&self, message: &jetstream::Message) -> Result<()> {
        let headers = message.headers.clone().unwrap_or_default();
        let text =
            |name: &str| headers.get(name).map(|value| value.as_str()).with_context(|| format!("no header {name}"));
        let due = humantime::parse_rfc3339(text(DUE)?).context(DUE)?;
        let target = text(TARGET)?.to_owned();
        if let Ok(wait) = due.duration_since(SystemTime::now())
            && !wait.is_zero()
        {
            return message.ack_with(AckKind::Nak(Some(wait))).await.map_err(anyhow::Error::from_boxed);
        }
        let mut again = HeaderMap::new();
        for (name, values) in headers.iter() {
            let text: &str = name.as_ref();
            if ![DUE, TARGET].contains(&text) && !text.starts_with("Nats-") {
                values.iter().for_each(|value| again.append(name.clone(), value.clone()));
            }
        }
        again.insert("Nats-Msg-Id", format!("due.{}", message.subject));
        let again = PublishMessage::build().headers(again).payload(message.payload.clone());
        self.jetstream
            .send_publish(target.clone(), again)
            .await
            .context("publish")?
            .await
            .with_context(|| format!("publish on {target}"))?;
        message.double_ack().await.map_err(anyhow::Error::from_boxed)?;
        // Left where it is it would do no harm, until the stream lets it go by its age.
        let sequence = message.info().map_err(anyhow::Error::from_boxed)?.stream_sequence;
        let subject = format!("STREAM.MSG.DELETE.{}", self.parked_stream);
        let delete: Result<Response<serde_json::Value>, _> =
            self.jetstream.request(subject, &json!({ "seq": sequence, "no_erase": true })).await;
        if let Err(err) = delete {
            tracing::debug!("delete a retry that was brought back: {err}");
        }
        Ok(())
    }
}
