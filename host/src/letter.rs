//! Dead letters on the wire: what the host adds to a message, how a letter becomes the message again, and which
//! messages are believed to be one.

use crate::header_block;
use crate::names::{Names, check_subject};
use crate::source::{Delivery, sorted};
use anyhow::{Context as _, Result, anyhow, ensure};
use async_nats::HeaderMap;
use async_nats::header::{HeaderName, HeaderValue};
use bytes::Bytes;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

/// The message's id.
pub const ID: &str = "Mailroom-Id";
/// Digest of the component that ran.
pub const COMPONENT: &str = "Mailroom-Component";
/// Why the message is dead, in a word.
pub const REASON: &str = "Mailroom-Reason";
/// Why the message is dead, at length.
pub const DETAIL: &str = "Mailroom-Detail";
/// The message's subject.
pub const SUBJECT: &str = "Mailroom-Subject";
/// When the stream took the message, RFC 3339.
pub const STORED: &str = "Mailroom-Stored";
/// How often the message had been delivered.
pub const DELIVERIES: &str = "Mailroom-Deliveries";
/// The name of the dead letter that a parked retry becomes if it dies.
pub const LETTER: &str = "Mailroom-Letter";
/// When a parked retry is due, RFC 3339, where a host has to see to it.
pub const DUE: &str = "Mailroom-Due";
/// Where a parked retry that is due is published, where a host has to see to it.
pub const TARGET: &str = "Mailroom-Target";
/// The message's header block in base64, where it could not be read.
pub const RAW_HEADERS: &str = "Mailroom-Headers";

/// How many bytes of a dead letter's payload are the message's header block, where that had no room among the headers.
pub const HEADERS_BYTES: &str = "Mailroom-Headers-Bytes";

/// Before a sender's header that NATS would act on, or that would pass for the host's word. In the names of NATS, the
/// hyphen after `Nats` becomes an underline as well: see [`hides_ours`].
const ORIGINAL: &str = "Mailroom-Original-";

/// The headers of the host's that NATS acts on, or how they begin.
const ACTED_ON: [&str; 3] = ["Nats-Msg-Id", "Nats-Expected-", "Nats-Schedule"];

/// Who published a message, by its subject.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// Its sender: none of its headers is believed.
    Sender,
    /// An operator or a host, for this consumer: a dead letter that is run again, or a parked retry.
    Replay {
        /// The name of its next dead letter, see [`Origin::letter`].
        letter: String,
        /// Whether it is a parked retry: then the letter may have been stored for another delivery of the message.
        parked: bool,
        /// The header [`RAW_HEADERS`], which a second dead letter has to carry too.
        raw_headers: Option<HeaderValue>,
        /// The header block that stood in front of the payload, as it has to in a second dead letter.
        front: Option<Bytes>,
    },
    /// An operator, for another consumer of the stream.
    Elsewhere,
    /// Somebody who may publish replays and published something else; the text says what is wrong with it.
    Odd(String),
}

impl Origin {
    /// The name of the dead letter on message `id`, which ends its subject: there is at most one letter of a name.
    ///
    /// A replay that dies again needs another one: its first letter may be gone already while the server still
    /// knows its id, and would take the second for stored; or the first was kept. A parked retry has the name that
    /// the message had before.
    pub fn letter(&self, id: &str) -> String {
        match self {
            Self::Replay { letter, .. } => letter.clone(),
            _ => id.to_owned(),
        }
    }

    /// The header block that stood in front of the payload of the message's dead letter.
    pub fn front(&self) -> Option<&Bytes> {
        match self {
            Self::Replay { front, .. } => front.as_ref(),
            _ => None,
        }
    }

    /// The header block that the message came with at first, if it could not be read.
    pub fn raw_headers(&self) -> Option<&HeaderValue> {
        match self {
            Self::Replay { raw_headers, .. } => raw_headers.as_ref(),
            _ => None,
        }
    }
}

/// Gives a replayed message back what it had at its first delivery: id, subject, time and headers.
pub fn recognize(delivery: &mut Delivery, names: &Names) {
    let Some((consumer, subject)) = names.replayed(&delivery.message.subject) else { return };
    if consumer != names.consumer {
        delivery.origin = Origin::Elsewhere;
        return;
    }
    let headers = delivery.headers.take().unwrap_or_default();
    let first = match subject {
        "" => Err(anyhow!("no subject follows {}", delivery.message.subject)),
        _ => first_delivery(&headers, names),
    };
    match first {
        Ok((id, time)) => {
            let raw_headers = headers.get(RAW_HEADERS).cloned();
            let text = |name: &str| headers.get(name).map(|value| value.as_str().to_owned());
            let letter = text(LETTER).filter(|letter| check_subject(LETTER, letter).is_ok());
            let failed: Option<u64> = text(DELIVERIES).and_then(|count| count.parse().ok());
            let subject = subject.to_owned();
            let front = take_front(&headers, &mut delivery.payload);
            let headers = front.as_deref().map_or_else(|| senders(&headers), header_block::readable);
            let message = Arc::make_mut(&mut delivery.message);
            if front.is_some() {
                message.data = delivery.payload.to_vec();
            }
            let here = std::mem::replace(&mut message.id, id);
            message.time = time.unwrap_or(message.time);
            message.subject = subject;
            message.headers = sorted(&headers);
            delivery.count = delivery.count.saturating_add(failed.unwrap_or(0));
            message.attempt = u32::try_from(delivery.count).unwrap_or(u32::MAX);
            let letter = letter.unwrap_or_else(|| format!("{}.{here}", message.id));
            delivery.origin = Origin::Replay { letter, parked: failed.is_some(), raw_headers, front };
            delivery.headers = Some(headers);
        }
        Err(err) => {
            delivery.origin = Origin::Odd(format!("no replay of a dead letter: {err:#}"));
            delivery.headers = Some(headers);
        }
    }
}

/// Takes the message's header block off the payload of a dead letter, if it stands there.
pub fn take_front(headers: &HeaderMap, payload: &mut Bytes) -> Option<Bytes> {
    let bytes = headers.get(HEADERS_BYTES)?.as_str().parse().ok().filter(|bytes| *bytes <= payload.len())?;
    Some(payload.split_to(bytes))
}

/// The id of a replayed message, and when its stream took it at first, in milliseconds since 1970.
fn first_delivery(headers: &HeaderMap, names: &Names) -> Result<(String, Option<u64>)> {
    let id = headers.get(ID).with_context(|| format!("no header {ID}"))?.as_str();
    check_id(id, names)?;
    let time = headers.get(STORED).map(|stored| {
        let stored: SystemTime =
            humantime::parse_rfc3339(stored.as_str()).with_context(|| format!("{STORED} {stored}"))?;
        let time = stored.duration_since(UNIX_EPOCH).with_context(|| format!("{STORED} is before 1970"))?;
        u64::try_from(time.as_millis()).with_context(|| format!("{STORED} is too late"))
    });
    Ok((id.to_owned(), time.transpose()?))
}

/// Checks that `id` is of a message that this consumer had; the stream may have been made anew since.
///
/// # Errors
/// It is another's, or no id at all.
pub fn check_id(id: &str, names: &Names) -> Result<()> {
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let numbers = || {
        let (created, rest) = id.strip_prefix(&names.stream)?.strip_prefix(':')?.split_once(':')?;
        Some((created, rest.strip_prefix(&names.consumer)?.strip_prefix(':')?))
    };
    ensure!(
        numbers().is_some_and(|(created, sequence)| is_number(created) && is_number(sequence)),
        "{ID} {id} is not of consumer {} of stream {}",
        names.consumer,
        names.stream
    );
    Ok(())
}

/// The headers with which the dead letter with `headers` is run again.
pub fn replay_headers(headers: &HeaderMap) -> HeaderMap {
    let mut replayed = HeaderMap::new();
    for (name, values) in headers.iter() {
        let text: &str = name.as_ref();
        let carried = [ID, STORED, RAW_HEADERS, HEADERS_BYTES].contains(&text) || text.starts_with(ORIGINAL);
        if carried || !is_reserved(text) {
            values.iter().for_each(|value| replayed.append(name.clone(), value.clone()));
        }
    }
    replayed
}

/// The headers with which a dead letter becomes a new message, of those of its sender. What its sender told NATS to do was
/// done, or refused, when the message came.
pub fn new_headers(senders: &HeaderMap) -> HeaderMap {
    let mut kept = HeaderMap::new();
    for (name, values) in senders.iter() {
        if !begins(name.as_ref(), "Nats-") {
            values.iter().for_each(|value| kept.append(name.clone(), value.clone()));
        }
    }
    kept
}

/// The sender's headers in those of a dead letter or a replay, under their own names.
pub fn senders(headers: &HeaderMap) -> HeaderMap {
    let mut senders = HeaderMap::new();
    for (name, values) in headers.iter() {
        let text: &str = name.as_ref();
        let own = match text.strip_prefix(ORIGINAL) {
            Some(own) if begins(own, "Nats_") => own.replacen('_', "-", 1).parse::<HeaderName>().ok(),
            Some(own) => own.parse::<HeaderName>().ok(),
            None => (!is_reserved(text)).then(|| name.clone()),
        };
        if let Some(own) = own {
            values.iter().for_each(|value| senders.append(own.clone(), value.clone()));
        }
    }
    senders
}

/// The name that a sender's header keeps in a dead letter: NATS would act on its own names there, and ours speak
/// for the host alone.
pub fn kept_name(name: &str) -> String {
    match name {
        _ if begins(name, "Nats-") => format!("{ORIGINAL}{}", name.replacen('-', "_", 1)),
        _ if is_reserved(name) => format!("{ORIGINAL}{name}"),
        _ => name.to_owned(),
    }
}

/// Whether NATS may overlook what the host tells it, when these headers of a sender are kept among the host's.
///
/// Servers look for a header's name anywhere in the block. If they find it first in another name or in a value, they take
/// it that there is no such header: a message id would not be recognized, an expectation not be checked.
pub fn hides_ours(senders: &HeaderMap) -> bool {
    senders
        .iter()
        .any(|(name, values)| hides(&kept_name(name.as_ref())) || values.iter().any(|value| hides(value.as_str())))
}

/// The same of a single text.
pub fn hides(text: &str) -> bool {
    ACTED_ON.iter().any(|name| text.contains(name))
}

/// A subject as the value of the header [`SUBJECT`]: percent-encoded (RFC 3986) where it could hide a header of the host's.
pub fn subject_text(subject: &str) -> String {
    subject.replace('%', "%25").replace("Nats-", "Nats%2D")
}

/// The subject in the header [`SUBJECT`], if there is one.
pub fn subject_in(headers: &HeaderMap) -> Option<String> {
    headers.get(SUBJECT).map(|value| value.as_str().replace("%2D", "-").replace("%25", "%"))
}

fn is_reserved(name: &str) -> bool {
    begins(name, "Nats-") || begins(name, "Mailroom-")
}

fn begins(name: &str, prefix: &str) -> bool {
    name.get(..prefix.len()).is_some_and(|start| start.eq_ignore_ascii_case(prefix))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_senders_headers_cannot_pass_for_ours() {
        for (name, kept) in [
            ("Subject", "Subject"),
            ("Nats-Msg-Id", "Mailroom-Original-Nats_Msg-Id"),
            ("nats-rollup", "Mailroom-Original-nats_rollup"),
            ("Mailroom-Id", "Mailroom-Original-Mailroom-Id"),
            ("Natsy", "Natsy"),
            ("é", "é"),
        ] {
            assert_eq!(kept_name(name), kept);
        }
    }

    #[test]
    fn a_sender_gets_back_what_it_sent_and_nothing_more() {
        let mut sent = HeaderMap::new();
        sent.append("X-Tag", "one");
        sent.append("X-Tag", "two");
        for name in ["Nats-Msg-Id", "nats-rollup", "Nats_X", "Mailroom-Id", "mailroom-original-x", "Mailroom-Headers"] {
            sent.append(name, "the sender's");
        }
        let mut letter = HeaderMap::new();
        for (name, values) in sent.iter() {
            values.iter().for_each(|value| letter.append(kept_name(name.as_ref()), value.clone()));
        }
        for name in [ID, STORED, RAW_HEADERS, REASON, "Nats-Msg-Id", "Nats-Expected-Stream"] {
            letter.insert(name, "the host's");
        }
        assert_eq!(senders(&letter), sent);
        let replay = replay_headers(&letter);
        assert_eq!(senders(&replay), sent);
        assert_eq!(replay.get(ID).map(HeaderValue::as_str), Some("the host's"));
        assert!(replay.get(REASON).is_none() && replay.get("Nats-Msg-Id").is_none());
        let new = new_headers(&senders(&letter));
        assert_eq!(new.get(ID).map(HeaderValue::as_str), Some("the sender's"));
        assert!(new.get("Nats-Msg-Id").is_none() && new.get("nats-rollup").is_none());
    }

    #[test]
    fn what_hides_our_headers_is_found() {
        for (name, value, expected) in [
            ("Subject", "Nats and other networks", false),
            ("Nats-Msg-Id", "1", false),
            ("nats-msg-id", "1", false),
            ("Nats_Msg-Id", "1", false),
            ("X-Nats-Msg-Id", "1", true),
            ("Nats-Nats-Msg-Id", "1", true),
            ("Mailroom-Nats-Expected-Stream", "1", true),
            ("Subject", "what is Nats-Msg-Id: 1 for?", true),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert("A", "b");
            headers.insert(name, value);
            assert_eq!(hides_ours(&headers), expected, "{name}: {value}");
        }
    }

    #[test]
    fn a_subject_hides_nothing_and_comes_back() {
        for subject in ["mail.a", "mail.50%", "mail.%2D", "mail.Nats-Msg-Id.x", "Nats-Nats-%25", "mail.Nats%2DMsg-Id"] {
            let mut headers = HeaderMap::new();
            headers.insert(SUBJECT, subject_text(subject));
            assert!(!hides_ours(&headers), "{subject}");
            assert_eq!(subject_in(&headers).as_deref(), Some(subject));
        }
    }

    #[test]
    fn a_header_block_comes_off_the_payload_if_it_stands_there() {
        for (bytes, front, rest) in [
            (Some("10"), Some("NATS/1.0\r\n"), "mail"),
            (Some("14"), Some("NATS/1.0\r\nmail"), ""),
            (Some("0"), Some(""), "NATS/1.0\r\nmail"),
            (Some("15"), None, "NATS/1.0\r\nmail"),
            (Some("-1"), None, "NATS/1.0\r\nmail"),
            (Some("ten"), None, "NATS/1.0\r\nmail"),
            (None, None, "NATS/1.0\r\nmail"),
        ] {
            let mut headers = HeaderMap::new();
            if let Some(bytes) = bytes {
                headers.insert(HEADERS_BYTES, bytes);
            }
            let mut payload = Bytes::from_static(b"NATS/1.0\r\nmail");
            let taken = take_front(&headers, &mut payload);
            assert_eq!((taken.as_deref(), &payload[..]), (front.map(str::as_bytes), rest.as_bytes()), "{bytes:?}");
        }
    }

    #[test]
    fn an_id_is_of_its_stream_and_consumer() {
        let names = Names::default();
        for (id, fits) in [
            ("MAIL:1767225600:triage:4711", true),
            ("MAIL:1:triage:1", true),
            ("MAIL:1:audit:1", false),
            ("ORDERS:1:triage:1", false),
            ("MAIL:1:triage:", false),
            ("MAIL::triage:1", false),
            ("MAIL:1:triage:1.>", false),
            ("MAIL:*:triage:1", false),
            ("MAIL:1:triage:-1", false),
            ("", false),
        ] {
            assert_eq!(check_id(id, &names).is_ok(), fits, "{id:?}");
        }
    }
}
