//! Mails of all kinds for the guest `actor`, and a publisher that nothing stops.

use anyhow::{Context as _, Result, ensure};
use async_nats::jetstream;
use async_nats::jetstream::context::ContextBuilder;
use async_nats::jetstream::message::PublishMessage;
use futures::future::join_all;
use std::time::Duration;
use tokio::time::{Instant, MissedTickBehavior, interval};

/// Mails in an order that `seed` decides: most get a verdict at once, some later, some are rejected or break their
/// guest.
pub fn mails(seed: u64) -> impl Iterator<Item = &'static str> {
    let mut random = fastrand::Rng::with_seed(seed);
    std::iter::repeat_with(move || match random.u8(..100) {
        0..3 => REJECTED,
        3 => "trap",
        4..7 => "fail-until 2",
        7..9 => "sleep 20",
        9 => "spin 3",
        10..13 => "retry-until 3 60",
        _ => "verdict support",
    })
}

/// The mail among them that becomes a dead letter at its first delivery.
pub const REJECTED: &str = "reject not for us";

/// How often mails are sent, and how many at a time where no rate is wanted.
const BEAT: Duration = Duration::from_millis(50);
const BATCH: usize = 500;

/// Longest wait for a PubAck, before the mail is sent again, and the longest for all of a batch.
const ANSWER: Duration = Duration::from_secs(2);
const PATIENCE: Duration = Duration::from_secs(120);

/// Gets mails into the stream, each once, whatever happens to the server: what is not confirmed is sent again under the
/// same message id.
#[derive(Debug)]
pub struct Publisher {
    jetstream: jetstream::Context,
    name: String,
    sent: u64,
}

impl Publisher {
    /// Connects to a server, or any of several, separated by commas. Message ids begin with `name`.
    ///
    /// # Errors
    /// When no server answers.
    pub async fn connect(servers: &str, name: &str) -> Result<Self> {
        let servers: Vec<&str> = servers.split(',').collect();
        // Finds out soon that a server says nothing any more.
        let options = async_nats::ConnectOptions::new().ping_interval(ANSWER);
        let client = options.connect(&servers[..]).await.with_context(|| format!("connect to {servers:?}"))?;
        let jetstream = ContextBuilder::new().timeout(ANSWER).build(client);
        Ok(Self { jetstream, name: name.to_owned(), sent: 0 })
    }

    /// Publishes `mails`, so many a second or as fast as they are stored; returns when all are confirmed.
    ///
    /// # Errors
    /// When one is not confirmed within 2 minutes.
    pub async fn publish(&mut self, mails: impl IntoIterator<Item = &str>, per_second: Option<u32>) -> Result<()> {
        let batch = per_second.map_or(BATCH, |rate| (BEAT.as_secs_f64() * f64::from(rate)).ceil() as usize);
        let mut beat = interval(BEAT);
        beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut mails = mails.into_iter().peekable();
        while mails.peek().is_some() {
            if per_second.is_some() {
                beat.tick().await;
            }
            let first = self.sent;
            let mut left: Vec<_> = (first..).zip(mails.by_ref().take(batch)).collect();
            self.sent += left.len() as u64;
            let end = Instant::now() + PATIENCE;
            while !left.is_empty() {
                ensure!(Instant::now() < end, "{} mails could not be published within {PATIENCE:?}", left.len());
                let confirmed = join_all(left.iter().map(|(number, mail)| self.send(*number, mail))).await;
                let mut confirmed = confirmed.into_iter();
                left.retain(|_| !confirmed.next().unwrap_or(false));
            }
        }
        Ok(())
    }

    /// How many mails it has published so far.
    pub fn sent(&self) -> u64 {
        self.sent
    }

    /// Whether the server has confirmed the mail.
    async fn send(&self, number: u64, mail: &str) -> bool {
        let id = format!("{}-{number}", self.name);
        let message = PublishMessage::build().message_id(id).payload(mail.to_owned().into());
        match self.jetstream.send_publish("mail.mix", message).await {
            Ok(confirmation) => confirmation.await.is_ok(),
            Err(_) => false,
        }
    }
}
