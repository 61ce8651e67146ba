//! Where messages come from: raw pulls on a JetStream consumer, so that the host never asks for more than it has
//! room for and hands back, at the end, what it has not begun.

use crate::identity::Losses;
use crate::interface::Message;
use crate::letter::{Origin, recognize};
use crate::names::Names;
use anyhow::{Context as _, Result};
use async_nats::header::HeaderValue;
use async_nats::jetstream::consumer::Info;
use async_nats::jetstream::message::AckKind;
use async_nats::{Client, HeaderMap, StatusCode, Subject, Subscriber};
use bytes::Bytes;
use futures::{FutureExt, StreamExt};
use std::cmp::Ordering::{Equal, Greater, Less};
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a pull waits at the server for messages.
const PULL_EXPIRES: Duration = Duration::from_secs(30);

/// How often the server says that a waiting pull still stands.
const IDLE_HEARTBEAT: Duration = Duration::from_secs(2);

/// Silence after which a waiting pull is taken for lost.
const SILENCE_MAX: Duration = Duration::from_secs(5);

/// How long closing waits for what is still under way from the server.
const CLOSE_MAX: Duration = Duration::from_secs(2);

/// Silence after which closing takes it that the server has nothing for the waiting pulls.
const CLOSE_QUIET: Duration = Duration::from_millis(20);

/// One delivery of a message.
pub struct Delivery {
    /// What the guest gets.
    pub message: Arc<Message>,
    /// The headers as received.
    pub headers: Option<HeaderMap>,
    /// The payload as received.
    pub payload: Bytes,
    /// Where acknowledgements go.
    pub reply: Subject,
    /// Which delivery of the message this is; 1 is the first.
    pub count: u64,
    /// When it reached the host.
    pub arrived: Instant,
    /// How long it had been in the stream by then, by the clocks of server and host.
    pub age: Duration,
    /// Who published it, which decides whether its headers are believed.
    pub origin: Origin,
}

/// What came from the consumer.
pub enum Event {
    /// A message.
    Delivery(Box<Delivery>),
    /// The stream may be another one of its name. Either it must have had the message that is the next event again: only
    /// those before it are this stream's, and whether to take it is for the caller to find out. Or no pull is heard of.
    Doubt,
    /// A pull was sent, or came to its end: [`Source::waiting_since`] may say something else now.
    Pulls,
    /// The consumer cannot be pulled from; the text says what the server said.
    Trouble(String),
}

/// A shard's way to the consumer.
pub struct Source {
    client: Client,
    next_subject: String,
    /// `<stream>:<created>:<consumer>:`, the constant part of message ids.
    id_prefix: String,
    names: Names,
    batch_max: usize,
    subscription: Subscriber,
    inbox: String,
    /// The subscription before the last [`Source::renew`], until what was on its way to it has arrived.
    ending: Option<Subscriber>,
    /// Counts lost connections; another number than `losses_seen` means that the pulls are gone.
    losses: Arc<Losses>,
    losses_seen: u64,
    /// Sequence and time of the message that is furthest on in the stream.
    furthest: (u64, Duration),
    /// Whether the last message contradicted that one.
    doubtful: bool,
    /// Waiting pulls by number, with the time at which they were sent.
    pulls: BTreeMap<u64, Instant>,
    pull_number: u64,
    /// Messages asked for and not yet received.
    requested: usize,
    /// Received by an earlier subscription and not yet handed out.
    backlog: VecDeque<async_nats::Message>,
    last_heard: Instant,
}

impl Source {
    /// Subscribes to an inbox of its own; pulls nothing yet.
    ///
    /// `losses` counts how often the client lost its connection, which pulls do not survive.
    ///
    /// # Errors
    /// The connection is closed.
    pub async fn open(
        client: Client,
        api_prefix: &str,
        stream_created: i64,
        consumer: &Info,
        names: Names,
        losses: Arc<Losses>,
    ) -> Result<Self> {
        let inbox = client.new_inbox();
        let subscription = client.subscribe(format!("{inbox}.*")).await.context("subscribe to the pull inbox")?;
        let (stream, name) = (&consumer.stream_name, &consumer.name);
        let batch_max = usize::try_from(consumer.config.max_batch).ok().filter(|max| *max > 0).unwrap_or(usize::MAX);
        Ok(Self {
            next_subject: format!("{api_prefix}.CONSUMER.MSG.NEXT.{stream}.{name}"),
            id_prefix: format!("{stream}:{stream_created}:{name}:"),
            names,
            batch_max,
            losses_seen: losses.count(),
            losses,
            client,
            subscription,
            inbox,
            ending: None,
            pulls: BTreeMap::new(),
            pull_number: 0,
            requested: 0,
            backlog: VecDeque::new(),
            last_heard: Instant::now(),
            furthest: (0, Duration::ZERO),
            doubtful: false,
        })
    }

    /// The next event, having asked for as many messages as `room` allows beyond those asked for already.
    ///
    /// # Errors
    /// The connection is closed for good.
    ///
    /// # Cancel safety
    /// No message is lost when the future is dropped. Lost pulls are noticed when it is called: call it anew every
    /// second or so.
    pub async fn next(&mut self, room: usize) -> Result<Event> {
        loop {
            if self.losses_seen != self.losses.count() {
                self.renew().await?;
            }
            self.collect_ending();
            if let Some(event) = self.backlog.pop_front().and_then(|message| self.read_old(message)) {
                return Ok(event);
            }
            if self.is_silent() {
                tracing::warn!("no sign of the pull for {SILENCE_MAX:?}; pulling anew");
                self.pulls_are_lost();
                return Ok(Event::Doubt);
            }
            if self.pull(room).await? {
                return Ok(Event::Pulls);
            }
            match self.subscription.next().await {
                Some(message) => {
                    if let Some(event) = self.read(message) {
                        return Ok(event);
                    }
                }
                None => anyhow::bail!("the connection to NATS is closed"),
            }
        }
    }

    /// A delivery that has arrived already, if there is one.
    pub fn ready(&mut self) -> Option<Event> {
        loop {
            let event = match self.backlog.pop_front() {
                Some(message) => self.read_old(message),
                None => {
                    let message = self.subscription.next().now_or_never()??;
                    self.read(message)
                }
            };
            if event.is_some() {
                return event;
            }
        }
    }

    /// Since when all pulls are sent of which one at least waits at the server, which ends it with a word when the consumer is
    /// deleted. Nothing, if none waits.
    ///
    /// Which one it is can only be said of the last: the server does not tell of those that it has served to the full.
    pub fn waiting_since(&self) -> Option<Instant> {
        let newest = self.pulls.last_key_value().map(|(_, sent)| *sent);
        let is_known = self.losses_seen == self.losses.count() && self.last_heard.elapsed() <= SILENCE_MAX;
        newest.filter(|_| self.requested > 0 && is_known)
    }

    /// Whether what has not been handed out comes from another stream than what has.
    pub fn is_doubtful(&self) -> bool {
        self.doubtful
    }

    /// Asks for messages if there is enough room to make it worth while. Says whether it did.
    async fn pull(&mut self, room: usize) -> Result<bool> {
        let want = room.saturating_sub(self.requested).min(self.batch_max);
        if want == 0 || self.requested > want {
            return Ok(false);
        }
        let request = format!(
            r#"{{"batch":{want},"expires":{},"idle_heartbeat":{}}}"#,
            PULL_EXPIRES.as_nanos(),
            IDLE_HEARTBEAT.as_nanos()
        );
        let reply = format!("{}.{}", self.inbox, self.pull_number);
        self.client
            .publish_with_reply(self.next_subject.clone(), reply, request.into())
            .await
            .context("ask for messages")?;
        let now = Instant::now();
        self.forget_ended(now);
        if self.pulls.is_empty() {
            self.last_heard = now;
        }
        self.pulls.insert(self.pull_number, now);
        self.pull_number += 1;
        self.requested += want;
        Ok(true)
    }

    /// Forgets pulls that must have ended. The server says so of those it could not fill only.
    fn forget_ended(&mut self, now: Instant) {
        while let Some(oldest) = self.pulls.first_entry()
            && *oldest.get() + PULL_EXPIRES + IDLE_HEARTBEAT <= now
        {
            oldest.remove();
        }
    }

    /// Takes lost pulls for ended. Whether the server has said nothing of the others for too long.
    fn is_silent(&mut self) -> bool {
        self.forget_ended(Instant::now());
        if self.pulls.is_empty() {
            self.requested = 0;
        }
        !self.pulls.is_empty() && self.last_heard.elapsed() > SILENCE_MAX
    }

    /// As when the connection is lost: [`Source::next`] takes a new inbox.
    fn pulls_are_lost(&mut self) {
        self.losses_seen = u64::MAX;
    }

    /// A new inbox: what old pulls may still bring would come on top of what is asked for now.
    async fn renew(&mut self) -> Result<()> {
        let losses = self.losses.count();
        let inbox = self.client.new_inbox();
        let subscription = self.client.subscribe(format!("{inbox}.*")).await.context("subscribe to the pull inbox")?;
        // Nothing is awaited while the state changes, so that a dropped future leaves it whole.
        self.collect_ending();
        self.ending = Some(std::mem::replace(&mut self.subscription, subscription));
        self.inbox = inbox;
        self.losses_seen = losses;
        self.pulls.clear();
        self.requested = 0;
        self.last_heard = Instant::now();
        if let Some(ending) = &mut self.ending {
            let _ = ending.drain().await;
        }
        Ok(())
    }

    /// Takes what has arrived on the subscription before this one.
    fn collect_ending(&mut self) {
        while let Some(ending) = &mut self.ending {
            match ending.next().now_or_never() {
                Some(Some(message)) => self.backlog.push_back(message),
                Some(None) => self.ending = None,
                None => return,
            }
        }
    }

    /// A message of an earlier subscription, which no pull of this one asked for.
    fn read_old(&mut self, message: async_nats::Message) -> Option<Event> {
        is_delivery(&message).then(|| self.deliver(message)).flatten()
    }

    /// Makes an event of what arrived, or takes note of what the server says about a pull.
    fn read(&mut self, message: async_nats::Message) -> Option<Event> {
        self.last_heard = Instant::now();
        if !is_delivery(&message) {
            return message.status.and_then(|status| self.status(status, &message));
        }
        self.requested = self.requested.saturating_sub(1);
        if self.requested == 0 {
            self.pulls.clear();
        }
        self.deliver(message)
    }

    fn deliver(&mut self, message: async_nats::Message) -> Option<Event> {
        let Some(reply) = message.reply.as_deref().and_then(ReplyInfo::parse) else {
            tracing::warn!("message with the reply subject {:?} passed over", message.reply);
            return None;
        };
        let here = (reply.sequence, reply.stored);
        self.doubtful = contradict(self.furthest, here);
        if self.doubtful {
            self.furthest = here;
            self.backlog.push_front(message);
            return Some(Event::Doubt);
        }
        self.furthest = self.furthest.max(here);
        let delivery = Delivery::read(message, reply, &self.id_prefix, &self.names)?;
        Some(Event::Delivery(Box::new(delivery)))
    }

    fn status(&mut self, status: StatusCode, message: &async_nats::Message) -> Option<Event> {
        if status == StatusCode::IDLE_HEARTBEAT {
            return None;
        }
        let pull = message.subject.rsplit('.').next().and_then(|number| number.parse::<u64>().ok());
        if pull.is_some_and(|pull| self.pulls.remove(&pull).is_some()) {
            let unserved = message
                .headers
                .as_ref()
                .and_then(|headers| headers.get("Nats-Pending-Messages"))
                .and_then(|pending| pending.as_str().parse::<usize>().ok())
                .unwrap_or(0);
            self.requested = if self.pulls.is_empty() { 0 } else { self.requested.saturating_sub(unserved) };
        }
        let text = message.description.as_deref().unwrap_or_default();
        if text.contains("Leadership Change") {
            // The new leader knows of no pull, and nobody says how much this one has been served.
            self.pulls_are_lost();
            return Some(Event::Doubt);
        }
        // The ends of a pull that are no trouble: it expired, nothing was there, a server stops.
        let ordinary = status == StatusCode::TIMEOUT
            || status == StatusCode::NOT_FOUND
            || ["Server Shutdown", "Batch Completed"].iter().any(|end| text.contains(end));
        if ordinary {
            return Some(Event::Pulls);
        }
        let text = if status == StatusCode::NO_RESPONDERS { "nobody answers for the consumer" } else { text };
        Some(Event::Trouble(format!("{text} ({status})")))
    }

    /// Ends the subscription and returns what had been delivered and not handed out.
    ///
    /// Lets the server serve the waiting pulls first, as long as it has messages for them: what is on its way to an
    /// inbox that is gone counts as delivered, and would come again only after the consumer's ack wait.
    pub async fn close(mut self) -> Vec<Delivery> {
        let mut left = Vec::new();
        let deadline = tokio::time::Instant::now() + CLOSE_MAX;
        self.collect_ending();
        while let Some(message) = self.backlog.pop_front() {
            left.extend(self.read_last(message));
        }
        while self.requested > 0 {
            let quiet = deadline.min(tokio::time::Instant::now() + CLOSE_QUIET);
            let Ok(Some(message)) = tokio::time::timeout_at(quiet, self.subscription.next()).await else { break };
            left.extend(self.read_last(message));
        }
        if let Ok(Ok(())) = tokio::time::timeout_at(deadline, self.subscription.drain()).await {
            while let Ok(Some(message)) = tokio::time::timeout_at(deadline, self.subscription.next()).await {
                left.extend(self.read_last(message));
            }
        }
        left
    }

    /// What arrives while the source is closing. Whichever stream it is of, it is not begun.
    fn read_last(&mut self, message: async_nats::Message) -> Option<Delivery> {
        if !is_delivery(&message) {
            let _ = message.status.and_then(|status| self.status(status, &message));
            return None;
        }
        self.requested = self.requested.saturating_sub(1);
        let reply = ReplyInfo::parse(message.reply.as_deref()?)?;
        Delivery::read(message, reply, &self.id_prefix, &self.names)
    }
}

impl Delivery {
    fn read(message: async_nats::Message, reply_info: ReplyInfo, id_prefix: &str, names: &Names) -> Option<Self> {
        let reply = message.reply?;
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        let (mut headers, payload) = (message.headers, message.payload);
        if let (Some(headers), Some(status)) = (&mut headers, message.status) {
            // A sender may write one, as the server does in its answers; like this the client for Go tells of it too.
            headers.append("Status", status.to_string());
            if let Some(description) = message.description.and_then(|text| text.parse::<HeaderValue>().ok()) {
                headers.append("Description", description);
            }
        }
        let mut delivery = Self {
            message: Arc::new(Message {
                id: format!("{id_prefix}{}", reply_info.sequence),
                subject: message.subject.to_string(),
                headers: headers.as_ref().map(sorted).unwrap_or_default(),
                time: u64::try_from(reply_info.stored.as_millis()).unwrap_or(u64::MAX),
                attempt: u32::try_from(reply_info.count).unwrap_or(u32::MAX),
                data: payload.to_vec(),
            }),
            headers,
            payload,
            reply,
            count: reply_info.count,
            arrived: Instant::now(),
            age: now.saturating_sub(reply_info.stored),
            origin: Origin::Sender,
        };
        recognize(&mut delivery, names);
        Some(delivery)
    }

    /// How large the message is: its payload, and the names and values of its headers.
    pub fn bytes(&self) -> usize {
        let headers = self.message.headers.iter().map(|(name, value)| name.len() + value.len());
        self.payload.len() + headers.sum::<usize>()
    }

    /// Gives up the copy of the payload that the guest got, once nobody runs on it.
    pub fn forget_copy(&mut self) {
        if let Some(message) = Arc::get_mut(&mut self.message) {
            message.data = Vec::new();
        }
    }

    /// Tells the server what becomes of the message. Only queues the acknowledgement: flush before the end.
    ///
    /// # Errors
    /// The connection is closed for good.
    pub async fn acknowledge(&self, client: &Client, kind: AckKind) -> Result<(), async_nats::PublishError> {
        client.publish(self.reply.clone(), kind.into()).await
    }
}

/// Whether two messages, each with its sequence and its time, cannot be of one stream: who comes later has the higher
/// sequence.
fn contradict(one: (u64, Duration), other: (u64, Duration)) -> bool {
    match one.0.cmp(&other.0) {
        Less => one.1 > other.1,
        Equal => one.1 != other.1,
        Greater => one.1 < other.1,
    }
}

/// Whether it is a message of the stream, and not the server's word about a pull. The reply subject tells, not the
/// status, which a sender can write as well.
fn is_delivery(message: &async_nats::Message) -> bool {
    message.reply.as_deref().is_some_and(|reply| reply.starts_with("$JS.ACK."))
}

/// The headers sorted by name, a repeated one repeated.
pub(crate) fn sorted(headers: &HeaderMap) -> Vec<(String, Vec<u8>)> {
    let mut sorted: Vec<(String, Vec<u8>)> = headers
        .iter()
        .flat_map(|(name, values)| values.iter().map(|value| (name.to_string(), value.as_str().as_bytes().to_vec())))
        .collect();
    sorted.sort_by(|(a, _), (b, _)| a.cmp(b));
    sorted
}

/// What the reply subject of a JetStream delivery says, in both of its formats (ADR-15).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct ReplyInfo {
    sequence: u64,
    count: u64,
    /// Since 1970, by the server's clock.
    stored: Duration,
}

impl ReplyInfo {
    fn parse(reply: &str) -> Option<Self> {
        let tokens = reply.strip_prefix("$JS.ACK.")?.split('.').count();
        // <stream>.<consumer>.<count>.<sequence>.<consumer sequence>.<time>.<pending>, and from version 2 on with
        // <domain>.<account> in front and perhaps a token behind.
        let ahead = if tokens >= 9 { 2 } else { 0 };
        let mut fields = reply.strip_prefix("$JS.ACK.")?.split('.').skip(ahead + 2);
        let count = fields.next()?.parse().ok()?;
        let sequence = fields.next()?.parse().ok()?;
        let stored = Duration::from_nanos(fields.nth(1)?.parse().ok()?);
        Some(Self { sequence, count, stored })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_formats_of_the_reply_subject_are_read() {
        let expected = Some(ReplyInfo { sequence: 100, count: 3, stored: Duration::from_nanos(1_790_230_470_084_404) });
        for reply in [
            "$JS.ACK.MAIL.triage.3.100.7.1790230470084404.42",
            "$JS.ACK._.ACCHASH.MAIL.triage.3.100.7.1790230470084404.42",
            "$JS.ACK.hub.ACCHASH.MAIL.triage.3.100.7.1790230470084404.42.token",
        ] {
            assert_eq!(ReplyInfo::parse(reply), expected, "{reply}");
        }
        for reply in ["", "_INBOX.1", "$JS.ACK.MAIL", "$JS.ACK.MAIL.triage.x.100.7.1.42"] {
            assert_eq!(ReplyInfo::parse(reply), None, "{reply}");
        }
    }

    #[test]
    fn messages_of_two_streams_contradict_each_other() {
        for (one, other, expected) in [
            ((0, 0), (5, 70), false),
            ((4, 60), (5, 70), false),
            ((4, 60), (5, 60), false),
            ((4, 60), (4, 60), false),
            ((4, 60), (5, 50), true),
            ((4, 60), (1, 70), true),
            ((4, 60), (4, 70), true),
        ] {
            let [one, other] = [one, other].map(|(sequence, time)| (sequence, Duration::from_secs(time)));
            assert_eq!(contradict(one, other), expected, "{one:?} {other:?}");
            assert_eq!(contradict(other, one), expected, "{other:?} {one:?}");
        }
    }

    #[test]
    fn headers_come_sorted_and_repeated() {
        let mut headers = HeaderMap::new();
        headers.insert("b", "1");
        headers.append("b", "0");
        headers.insert("A", "2");
        let expected = [("A", "2"), ("b", "1"), ("b", "0")].map(|(k, v)| (k.to_string(), v.as_bytes().to_vec()));
        assert_eq!(sorted(&headers), expected);
    }
}
