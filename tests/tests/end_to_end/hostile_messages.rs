//! Messages that no honest sender sends: each ends where it should, and its neighbours get their verdicts.

use crate::bed::{Bed, SOON};
use async_nats::{ConnectOptions, Event};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use futures::StreamExt as _;
use serde::Deserialize;
use std::sync::mpsc;
use tests::RawClient;
use tests::prelude::*;

/// A message as its sender writes it; each character stands for one byte.
#[derive(Deserialize)]
struct Sample {
    name: String,
    subject: Option<String>,
    headers: Option<String>,
    readable: bool,
}

fn samples() -> Result<Vec<Sample>> {
    serde_json::from_str(include_str!("../../headers.json")).context("read tests/headers.json")
}

fn bytes(text: &str) -> Vec<u8> {
    text.chars().map(|c| u8::try_from(u32::from(c)).expect("a character that stands for a byte")).collect()
}

/// The samples of readable and unreadable headers are right: they are tried on the client library itself. The host's
/// own judgement is tried on the same samples.
#[tokio::test]
async fn the_client_library_breaks_off_at_the_samples_that_are_said_to_be_unreadable() -> Result<()> {
    let server = NatsServer::start().await?;
    for sample in samples()? {
        let (sender, events) = mpsc::channel();
        let options = ConnectOptions::new().event_callback(move |event| {
            let _ = sender.send(event);
            std::future::ready(())
        });
        let client = server.client_with(options).await?;
        let mut subscription = client.subscribe("mail.>").await?;
        client.flush().await?;
        let mut raw = RawClient::connect(server.url()).await?;
        sample.publish(&mut raw, "payload").await?;
        // The client comes back, unless it has panicked; then it hears of what is published later.
        let end = async {
            loop {
                raw.publish(b"mail.end", None, b"").await?;
                raw.flush().await?;
                if let Ok(message) = tokio::time::timeout(Duration::from_millis(50), subscription.next()).await {
                    return anyhow::Ok(message);
                }
            }
        };
        let first = tokio::time::timeout(SOON, end).await??;
        let got = first.is_some_and(|message| message.payload == "payload");
        let lost = events.try_iter().any(|event| matches!(event, Event::Disconnected));
        ensure!(got == sample.readable && !(got && lost), "{}: received {got}, connection lost {lost}", sample.name);
    }
    Ok(())
}

/// Messages that the client library cannot read end in the dead letters, whole and once, and everybody else's message
/// gets its verdict.
#[tokio::test]
async fn unreadable_messages_end_in_the_dead_letters_and_the_others_get_their_verdicts() -> Result<()> {
    let mut bed = Bed::provisioned(&["--ack-wait", "2s"]).await?;
    let mut raw = RawClient::connect(bed.server.url()).await?;
    let samples = samples()?;
    for sample in &samples {
        for _ in 0..20 {
            raw.publish(b"mail.test", None, b"verdict ordinary").await?;
        }
        sample.publish(&mut raw, "verdict sample").await?;
    }
    raw.flush().await?;
    let total = 21 * samples.len() as u64;
    ensure!(streams::count(&bed.jetstream, streams::MAIL).await? == total, "not all were stored");
    let mut host = bed.actor(&["--shards", "2"]).await?;

    let unreadable: Vec<_> =
        (1..).map(|number| 21 * number).zip(&samples).filter(|(_, sample)| !sample.readable).collect();
    let dead: Vec<u64> = unreadable.iter().map(|(sequence, _)| *sequence).collect();
    all_judged(&bed, total, &dead).await?;
    let letters = streams::dead_letters(&bed.jetstream).await?;
    for (sequence, sample) in unreadable {
        let name = &sample.name;
        let letter = letters.iter().find(|letter| letter.mail_sequence().ok() == Some(sequence)).context("a letter")?;
        ensure!(letter.header("Mailroom-Reason") == Some("unreadable-headers"), "{name}: {letter:?}");
        ensure!(letter.header("Mailroom-Deliveries") == Some("0"), "{name}: {letter:?}");
        ensure!(letter.header("Mailroom-Detail").is_some_and(|detail| !detail.is_empty()), "{name}: {letter:?}");
        ensure!(letter.payload == "verdict sample", "{name}: {letter:?}");
        let block = letter.header("Mailroom-Headers").map(|block| BASE64.decode(block)).transpose()?;
        ensure!(block == sample.headers.as_deref().map(bytes), "{name}: {letter:?}");
        let subject = sample.subject.as_deref().map_or_else(|| b"mail.test".to_vec(), bytes);
        ensure!(letter.header("Mailroom-Subject") == Some(&*String::from_utf8_lossy(&subject)), "{name}: {letter:?}");
        if name == "a line without a colon" {
            ensure!((letter.header("A"), letter.header("C")) == (Some("b"), Some("d")), "{name}: {letter:?}");
        }
    }
    counted(&host, "dead", "unreadable-headers", dead.len()).await?;
    host.until_ready(SOON).await?;

    // They are settled for good: a restart of the server does not bring them back.
    host.stop(SOON).await?;
    bed.server.kill();
    bed.server.restart().await?;
    bed.jetstream = bed.server.jetstream().await?;
    let look = async || Ok(bed.consumer().await?.cached_info().num_ack_pending);
    let pending = eventually(SOON, "the consumer is back", look, |_| true).await?;
    assert_eq!(pending, 0);
    Ok(())
}

/// A header block that fits into no header stands in front of the payload.
#[tokio::test]
async fn a_large_unreadable_header_block_is_kept_in_front_of_the_payload() -> Result<()> {
    let bed = Bed::provisioned(&["--ack-wait", "2s"]).await?;
    let mut raw = RawClient::connect(bed.server.url()).await?;
    let block = [b"NATS/1.0\r\nA: ", &[0xff; 65_000][..], b"\r\n\r\n"].concat();
    raw.publish(b"mail.test", Some(&block), b"verdict large").await?;
    raw.publish(b"mail.test", None, b"verdict ordinary").await?;
    raw.flush().await?;
    let _host = bed.actor(&[]).await?;
    all_judged(&bed, 2, &[1]).await?;
    let letter = &streams::dead_letters(&bed.jetstream).await?[0];
    assert_eq!(letter.header("Mailroom-Reason"), Some("unreadable-headers"));
    assert_eq!(letter.header("Mailroom-Headers-Bytes"), Some(&*block.len().to_string()));
    assert_eq!(letter.payload, [&block, &b"verdict large"[..]].concat());
    Ok(())
}

/// An unreadable message so large that not even its dead letter can be stored stays in its stream, is said loudly, and
/// does not keep its neighbours from their verdicts.
#[tokio::test]
async fn an_unreadable_message_that_cannot_be_stored_stays_and_its_neighbours_go_on() -> Result<()> {
    let bed = Bed::provisioned(&["--ack-wait", "2s"]).await?;
    let mut raw = RawClient::connect(bed.server.url()).await?;
    let block = b"NATS/1.0\r\nA: \xff\r\n\r\n";
    raw.publish(b"mail.test", Some(block), &vec![b'x'; MAX_PAYLOAD - block.len()]).await?;
    for _ in 0..50 {
        raw.publish(b"mail.test", None, b"verdict ordinary").await?;
    }
    raw.flush().await?;
    let host = bed.actor(&[]).await?;
    bed.verdicts(50).await?;
    host.wait_for_line(SOON, |line| line.contains("cuts connections") && line.contains("stays in its stream")).await?;
    counted(&host, "retry", "too-large", 1).await?;
    let info = bed.consumer().await?.info().await?.clone();
    assert_eq!((info.num_pending, info.num_ack_pending), (0, 1));
    assert_eq!(streams::count(&bed.jetstream, streams::DEAD).await?, 0);
    Ok(())
}

/// The server's default for the largest message, headers included.
const MAX_PAYLOAD: usize = 1 << 20;

impl Sample {
    async fn publish(&self, raw: &mut RawClient, payload: &str) -> Result<()> {
        let subject = self.subject.as_deref().map_or_else(|| b"mail.test".to_vec(), bytes);
        raw.publish(&subject, self.headers.as_deref().map(bytes).as_deref(), payload.as_bytes()).await
    }
}

/// Waits until the mails 1 to `total` are settled, those in `dead` with one dead letter each, the others with one
/// verdict each.
async fn all_judged(bed: &Bed, total: u64, dead: &[u64]) -> Result<()> {
    let sorted = |stored: Vec<Stored>| -> Result<Vec<u64>> {
        let mut sequences = stored.iter().map(Stored::mail_sequence).collect::<Result<Vec<_>>>()?;
        sequences.sort_unstable();
        Ok(sequences)
    };
    let verdicts = sorted(bed.verdicts(total as usize - dead.len()).await?)?;
    let letters = sorted(bed.dead_letters(dead.len()).await?)?;
    ensure!(letters == dead, "dead letters {letters:?} instead of {dead:?}");
    let alive: Vec<u64> = (1..=total).filter(|sequence| !dead.contains(sequence)).collect();
    ensure!(verdicts == alive, "verdicts {verdicts:?} instead of {alive:?}");
    bed.settled().await
}

/// Waits until the host has counted that many messages with this end.
async fn counted(host: &Host, outcome: &str, reason: &str, count: usize) -> Result<()> {
    let labels = [("outcome", outcome), ("reason", reason)];
    let look = async || Ok(host.metrics().await?.get("mailroom_messages_total", &labels));
    eventually(SOON, "all counted", look, |found| *found == Some(count as f64)).await.map(drop)
}
