//! Where results go: verdicts and dead letters, each stored once, with its PubAck awaited. Nothing before this
//! module publishes, and nothing acknowledges a message before it says that the result is stored.

use crate::header_block::{block_bytes, block_of};
use crate::interface::Verdict;
use crate::letter::{
    COMPONENT, DELIVERIES, DETAIL, DUE, HEADERS_BYTES, ID, LETTER, RAW_HEADERS, REASON, STORED, SUBJECT, TARGET, hides,
    hides_ours, kept_name, subject_text,
};
use crate::names::Names;
use crate::parking::By;
use crate::settle::DeadReason;
use crate::source::Delivery;
use async_nats::HeaderMap;
use async_nats::jetstream::context::{PublishError, PublishErrorKind};
use async_nats::jetstream::message::PublishMessage;
use async_nats::jetstream::response::Response;
use async_nats::jetstream::stream::LastRawMessageErrorKind;
use async_nats::jetstream::{self, Context, ErrorCode};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use serde_json::{Value, json};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Most bytes of a trace header that is copied to the verdict: what W3C Trace Context asks everyone to carry.
const TRACE_MAX_BYTES: usize = 512;

/// JetStream's error codes for a message that no stream will ever take as it is: larger than the stream's
/// `max_msg_size`, or with more than 64 KiB of headers.
const NEVER_STORED: [u64; 2] = [10_054, 10_097];

/// Most bytes of the header `Mailroom-Detail`.
const DETAIL_MAX_BYTES: usize = 4 << 10;

/// A shard's way to the streams of verdicts and dead letters.
pub struct Sink {
    jetstream: Context,
    names: Names,
}

/// Why a message becomes a dead letter.
#[derive(Clone, Copy)]
pub struct Cause<'a> {
    /// In one word.
    pub reason: DeadReason,
    /// In more, or none.
    pub detail: &'a str,
    /// The digest of the component that ran on it, or would have.
    pub component: &'a str,
}

/// How a result came to be stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stored {
    /// By this host, now.
    Now,
    /// It had been stored before, by an earlier delivery or another host.
    Before,
}

/// Why a result is not stored.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The stream is away, full or refuses; worth repeating. The text says what the server said.
    #[error("{0}")]
    Unavailable(String),
    /// The result, of so many bytes with its headers, is larger than the server takes and will never be stored.
    #[error(
        "too large with {0} bytes for the server's max_payload, the stream's max_msg_size or the 64 KiB that headers may \
         have"
    )]
    TooLarge(usize),
}

impl Sink {
    /// Publishes to the streams of these names.
    pub fn new(jetstream: Context, names: Names) -> Self {
        Self { jetstream, names }
    }

    /// Stores the verdict on a message of the component with the digest `component`, unless the message has one.
    ///
    /// The server itself refuses a second one: by message id within its duplicate window, by subject for good.
    ///
    /// # Errors
    /// See [`StoreError`]; the verdict may have been stored nevertheless, which repeating finds out.
    pub async fn verdict(&self, delivery: &Delivery, verdict: &Verdict, component: &str) -> Result<Stored, StoreError> {
        let id = &delivery.message.id;
        let mut headers = headers_of_ours(id, component);
        headers.insert("Nats-Msg-Id", id.as_str());
        only_once(&mut headers, &self.names.verdict_stream);
        for (name, value) in &delivery.message.headers {
            for trace in ["traceparent", "tracestate"] {
                if name.eq_ignore_ascii_case(trace)
                    && value.len() <= TRACE_MAX_BYTES
                    && let Ok(value) = std::str::from_utf8(value)
                    && !hides(value)
                {
                    headers.insert(trace, value);
                }
            }
        }
        self.publish(self.names.verdict_subject(&verdict.queue, id), headers, verdict.to_json().into()).await
    }

    /// Whether any verdict on the message is stored, whatever its queue.
    ///
    /// # Errors
    /// The verdicts cannot be read; worth repeating.
    pub async fn has_verdict(&self, id: &str) -> Result<bool, StoreError> {
        let unavailable = |err: &dyn std::fmt::Display| StoreError::Unavailable(format!("look for a verdict: {err}"));
        let stream =
            self.jetstream.get_stream_no_info(&self.names.verdict_stream).await.map_err(|e| unavailable(&e))?;
        match stream.get_last_raw_message_by_subject(&self.names.verdict_of(id)).await {
            Ok(_) => Ok(true),
            Err(err) => match err.kind() {
                LastRawMessageErrorKind::NoMessageFound => Ok(false),
                LastRawMessageErrorKind::JetStream(ref cause) if cause.error_code() == ErrorCode::NO_MESSAGE_FOUND => {
                    Ok(false)
                }
                _ => Err(unavailable(&err)),
            },
        }
    }

    /// Whether the dead letter of that name is stored.
    ///
    /// # Errors
    /// The dead letters cannot be read; worth repeating.
    pub async fn has_letter(&self, letter: &str) -> Result<bool, StoreError> {
        let unavailable =
            |err: &dyn std::fmt::Display| StoreError::Unavailable(format!("look for a dead letter: {err}"));
        // Asks how many there are on its subject, since hosts need not be allowed to read dead letters.
        let request = json!({ "subjects_filter": self.names.dead_subject(letter) });
        let info = format!("STREAM.INFO.{}", self.names.dead_stream);
        match self.jetstream.request::<_, _, Response<Value>>(info, &request).await {
            Ok(Response::Ok(info)) => {
                Ok(info["state"]["subjects"].as_object().is_some_and(|subjects| !subjects.is_empty()))
            }
            Ok(Response::Err { error }) => Err(unavailable(&error)),
            Err(err) => Err(unavailable(&err)),
        }
    }

    /// Stores a message, whole, in the dead letters, unless it has a letter; the server refuses a second one as it does
    /// for verdicts.
    ///
    /// Its headers go in front of its payload where a stream takes no more headers beside them, or would overlook the
    /// host's among them: see [`Sink::unreadable`] and [`hides_ours`].
    ///
    /// # Errors
    /// See [`StoreError`].
    pub async fn dead(&self, delivery: &Delivery, cause: Cause<'_>) -> Result<Stored, StoreError> {
        let without_detail = Cause { detail: "", ..cause };
        let hidden = || Some(block_of(delivery.headers.as_ref().filter(|headers| hides_ours(headers))?).into());
        if let Some(block) = delivery.origin.front().cloned().or_else(hidden) {
            return match self.headers_in_front(delivery, &block, cause).await {
                Err(StoreError::TooLarge(_)) => self.headers_in_front(delivery, &block, without_detail).await,
                stored => stored,
            };
        }
        let mut stored = self.letter(delivery, self.letter_headers(delivery, cause)).await;
        // The message came near the server's limit by itself; the reason must not cost it its dead letter.
        if matches!(stored, Err(StoreError::TooLarge(_))) && !cause.detail.is_empty() {
            stored = self.letter(delivery, self.letter_headers(delivery, without_detail)).await;
        }
        match (stored, &delivery.headers) {
            (Err(StoreError::TooLarge(_)), Some(headers)) => {
                self.headers_in_front(delivery, &block_of(headers), without_detail).await
            }
            (stored, _) => stored,
        }
    }

    /// Stores a message, whole, where it waits until it is `due` to be run again. It may be acknowledged then: it comes
    /// back as another message of its stream, with the same id.
    ///
    /// # Errors
    /// See [`StoreError`]; it may wait there nevertheless. It is too large as well if its subject could hide from the
    /// server what the host asks for.
    pub async fn park(&self, delivery: &Delivery, due: SystemTime, by: By) -> Result<Stored, StoreError> {
        let (id, subject) = (&delivery.message.id, &delivery.message.subject);
        if hides(subject) {
            return Err(StoreError::TooLarge(delivery.bytes()));
        }
        let due = humantime::format_rfc3339_millis(due).to_string();
        let mut headers = HeaderMap::new();
        headers.insert(ID, id.as_str());
        headers.insert(LETTER, delivery.origin.letter(id));
        only_once(&mut headers, &self.names.parked_stream);
        let waits_on = match by {
            By::Server => {
                headers.insert("Nats-Schedule", format!("@at {due}"));
                headers.insert("Nats-Schedule-Target", self.names.due_subject(subject));
                self.names.scheduled_subject(id, delivery.count)
            }
            By::Mover => {
                headers.insert(DUE, due);
                headers.insert(TARGET, self.names.replay_subject(subject));
                self.names.held_subject(id, delivery.count)
            }
        };
        let mut payload = delivery.payload.clone();
        match (delivery.origin.front(), &delivery.headers) {
            (None, Some(senders)) if !hides_ours(senders) => keep(senders, &mut headers),
            (None, None) => {}
            (front, senders) => {
                let block = match front {
                    Some(front) => front.clone(),
                    None => senders.as_ref().map(block_of).unwrap_or_default().into(),
                };
                headers.insert(HEADERS_BYTES, block.len().to_string());
                payload = [&block[..], &payload].concat().into();
            }
        }
        add_history(delivery, &mut headers);
        self.publish(waits_on, headers, payload).await
    }

    /// Stores a message, whole, whose header block the client library cannot read.
    ///
    /// The block goes into the header `Mailroom-Headers`, in base64; where it is too large for that, in front of the
    /// payload, and `Mailroom-Headers-Bytes` says how long it is.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub async fn unreadable(
        &self,
        delivery: &Delivery,
        block: Option<&[u8]>,
        cause: Cause<'_>,
    ) -> Result<Stored, StoreError> {
        let Some(block) = block else { return self.dead(delivery, cause).await };
        let mut headers = self.letter_headers(delivery, cause);
        headers.insert(RAW_HEADERS, BASE64.encode(block));
        match self.letter(delivery, headers).await {
            Err(StoreError::TooLarge(_)) => self.headers_in_front(delivery, block, cause).await,
            stored => stored,
        }
    }

    /// Stores a message with its header block in front of its payload.
    async fn headers_in_front(
        &self,
        delivery: &Delivery,
        block: &[u8],
        cause: Cause<'_>,
    ) -> Result<Stored, StoreError> {
        let in_front = Delivery {
            message: delivery.message.clone(),
            headers: None,
            payload: [block, &delivery.payload].concat().into(),
            reply: delivery.reply.clone(),
            origin: delivery.origin.clone(),
            ..*delivery
        };
        let mut headers = self.letter_headers(&in_front, cause);
        headers.insert(HEADERS_BYTES, block.len().to_string());
        self.letter(&in_front, headers).await
    }

    async fn letter(&self, delivery: &Delivery, headers: HeaderMap) -> Result<Stored, StoreError> {
        let letter = delivery.origin.letter(&delivery.message.id);
        self.publish(self.names.dead_subject(&letter), headers, delivery.payload.clone()).await
    }

    fn letter_headers(&self, delivery: &Delivery, cause: Cause<'_>) -> HeaderMap {
        let Cause { reason, detail, component } = cause;
        let id = &delivery.message.id;
        let mut headers = HeaderMap::new();
        if let Some(senders) = &delivery.headers {
            keep(senders, &mut headers);
        }
        for (name, values) in headers_of_ours(id, component).iter() {
            for value in values {
                headers.insert(name.clone(), value.clone());
            }
        }
        headers.insert("Nats-Msg-Id", format!("dead.{}", delivery.origin.letter(id)));
        only_once(&mut headers, &self.names.dead_stream);
        headers.insert(REASON, reason.name());
        headers.insert(SUBJECT, subject_text(&delivery.message.subject));
        if !detail.is_empty() {
            headers.insert(DETAIL, header_text(detail));
        }
        add_history(delivery, &mut headers);
        headers
    }

    async fn publish(&self, subject: String, headers: HeaderMap, payload: Bytes) -> Result<Stored, StoreError> {
        let bytes = payload.len() + block_bytes(&headers);
        let message = PublishMessage::build().headers(headers).payload(payload);
        let acknowledged = match self.jetstream.send_publish(subject, message).await {
            Ok(acknowledgement) => acknowledgement.await,
            Err(err) => Err(err),
        };
        match acknowledged {
            Ok(acknowledgement) if acknowledgement.duplicate => Ok(Stored::Before),
            Ok(_) => Ok(Stored::Now),
            Err(err) => match err.kind() {
                PublishErrorKind::WrongLastSequence => Ok(Stored::Before),
                _ if is_too_large(&err) => Err(StoreError::TooLarge(bytes)),
                _ => Err(StoreError::Unavailable(err.to_string())),
            },
        }
    }
}

/// Adds a sender's headers, under names that say nothing to NATS.
fn keep(senders: &HeaderMap, headers: &mut HeaderMap) {
    for (name, values) in senders.iter() {
        let kept = kept_name(name.as_ref());
        values.iter().for_each(|value| headers.append(kept.clone(), value.clone()));
    }
}

/// Adds what the message has behind it.
fn add_history(delivery: &Delivery, headers: &mut HeaderMap) {
    let stored = UNIX_EPOCH + Duration::from_millis(delivery.message.time);
    headers.insert(STORED, humantime::format_rfc3339_millis(stored).to_string());
    headers.insert(DELIVERIES, delivery.count.to_string());
    if let Some(raw) = delivery.origin.raw_headers() {
        headers.insert(RAW_HEADERS, raw.clone());
    }
}

/// Has the server refuse a result that is not for `stream`, or not the first on its subject.
fn only_once(headers: &mut HeaderMap, stream: &str) {
    headers.insert("Nats-Expected-Stream", stream);
    headers.insert("Nats-Expected-Last-Subject-Sequence", "0");
}

/// What every result carries.
fn headers_of_ours(id: &str, component: &str) -> HeaderMap {
    let mut headers = HeaderMap::new();
    headers.insert(ID, id);
    headers.insert(COMPONENT, component);
    headers.insert("Mailroom-Time", humantime::format_rfc3339_millis(SystemTime::now()).to_string());
    headers
}

/// Whether the server will never store what it did not store now.
pub(crate) fn is_too_large(err: &PublishError) -> bool {
    let cause = std::error::Error::source(err).and_then(|cause| cause.downcast_ref::<jetstream::Error>());
    err.kind() == PublishErrorKind::MaxPayloadExceeded
        || cause.is_some_and(|cause| NEVER_STORED.contains(&cause.error_code().0))
}

/// `text` as a header's value: one line, bounded, and nothing in it that NATS could take for a header's name.
fn header_text(text: &str) -> String {
    let mut end = text.len().min(DETAIL_MAX_BYTES);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text[..end].replace("Nats-", "Nats_").chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_detail_becomes_one_bounded_line() {
        assert_eq!(header_text("a\r\nb\0c"), "a  b c");
        assert!(!hides(&header_text("Nats-Msg-Id: 1")));
        let long = header_text(&"é".repeat(DETAIL_MAX_BYTES));
        assert_eq!(long.len(), DETAIL_MAX_BYTES);
        assert_eq!(header_text(&format!("x{}", "é".repeat(DETAIL_MAX_BYTES))).len(), DETAIL_MAX_BYTES - 1);
    }
}
