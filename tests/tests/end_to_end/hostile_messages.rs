//! Messages that no honest sender sends: each ends where it should, and its neighbours get their verdicts.

use async_nats::{ConnectOptions, Event};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use futures::StreamExt as _;
use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::mpsc;
use std::time::Instant;
use tests::RawClient;
use tests::bed::{Bed, SOON};
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
        // What comes back shows that the server knows of the subscription.
        client.publish("mail.begin", "".into()).await?;
        tokio::time::timeout(SOON, subscription.next()).await?.context("subscribed")?;
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
    let stored = async || streams::count(&bed.jetstream, streams::MAIL).await;
    eventually(SOON, "all stored", stored, |stored| *stored == total).await?;
    let mut host = bed.actor(&["--shards", "2"]).await?;

    let mut unreadable = Vec::new();
    for (sequence, sample) in (1..).map(|number| 21 * number).zip(&samples).filter(|(_, sample)| !sample.readable) {
        // Newer servers take a sender's status off, and what is left may be readable.
        let stored = stored_headers(&bed, sequence).await?;
        if stored == sample.headers.as_deref().map(bytes) {
            unreadable.push((sequence, sample));
        } else {
            ensure!(sample.name.contains("status") || sample.name.contains("version with more"), "{}", sample.name);
        }
    }
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

/// A client that breaks off while its shard waits for JetStream, with a look at the consumer and with a verdict to be stored, is
/// made anew, and the host is ready again.
#[tokio::test]
async fn a_client_that_breaks_off_while_jetstream_is_away_is_made_anew() -> Result<()> {
    let mut bed = Bed::provisioned(&["--ack-wait", "10s"]).await?;
    let host = bed.actor(&["--shards", "1", "--deadline", "5s"]).await?;
    bed.tell(["sleep 3000"]).await?;
    let look = async || Ok(bed.consumer().await?.cached_info().num_ack_pending);
    eventually(SOON, "the message is in the host's hands", look, |pending| *pending == 1).await?;
    bed.server.restart_with(false).await?;
    host.wait_for_line(SOON, |line| line.contains("cannot store a verdict")).await?;
    // Everything that a shard listens to can break its client off, if its sender may.
    let mut raw = RawClient::connect(bed.server.url()).await?;
    let mut broken_off = async || {
        raw.publish(b"$JS.EVENT.ADVISORY.STREAM.DELETED.MAIL", Some(b"NATS/1.0\r\nA: b\rc\r\n\r\n"), b"").await?;
        raw.flush().await?;
        host.wait_for_line(Duration::from_millis(300), |line| line.contains("the NATS client broke off")).await
    };
    let begun = Instant::now();
    while broken_off().await.is_err() {
        ensure!(begun.elapsed() < SOON, "the client's end is not noticed");
    }
    bed.server.restart_with(true).await?;
    bed.jetstream = bed.server.jetstream().await?;
    host.until_ready(SOON).await?;
    bed.one_verdict_each(1).await
}

/// Messages of odd shapes, as far as a server takes them, get their verdicts.
#[tokio::test]
async fn odd_messages_get_their_verdicts() -> Result<()> {
    let bed = Bed::new().await?;
    let mut raw = RawClient::connect(bed.server.url()).await?;
    let command = b"verdict odd\n";
    raw.publish(b"mail.test", Some(&many_headers()), command).await?;
    raw.publish(b"mail.test", Some(&giant_header()), command).await?;
    raw.publish(many_tokens().as_bytes(), None, command).await?;
    raw.publish(b"mail.test", None, &filled(command, MAX_PAYLOAD)).await?;
    let block = b"NATS/1.0\r\nA: b\r\n\r\n";
    raw.publish(b"mail.test", Some(block), &filled(command, MAX_PAYLOAD - block.len())).await?;
    raw.flush().await?;
    let client = bed.server.client().await?;
    let reply = client.new_inbox();
    client.publish_with_reply("mail.test", reply, command.to_vec().into()).await?;
    client.flush().await?;
    let _host = bed.actor(&[]).await?;
    all_judged(&bed, 6, &[]).await
}

/// Messages of odd shapes that die are in the dead letters whole.
#[tokio::test]
async fn odd_messages_that_die_are_kept_whole() -> Result<()> {
    let bed = Bed::new().await?;
    let mut raw = RawClient::connect(bed.server.url()).await?;
    let command = b"reject odd\n";
    let (many, giant) = (many_headers(), giant_header());
    raw.publish(b"mail.test", Some(&many), command).await?;
    raw.publish(b"mail.test", Some(&giant), command).await?;
    raw.publish(many_tokens().as_bytes(), None, command).await?;
    raw.publish(b"mail.test", None, b"").await?;
    // With just enough room for the host's headers, and no detail.
    let large = filled(command, MAX_PAYLOAD - 700);
    raw.publish(b"mail.test", None, &large).await?;
    raw.publish(b"mail.test", None, b"verdict ordinary").await?;
    raw.flush().await?;
    let _host = bed.actor(&[]).await?;
    all_judged(&bed, 6, &[1, 2, 3, 4, 5]).await?;
    for letter in streams::dead_letters(&bed.jetstream).await? {
        let sequence = letter.mail_sequence()?;
        ensure!(letter.header("Mailroom-Reason") == Some("rejected"), "{sequence}");
        let front = letter.header("Mailroom-Headers-Bytes").map_or(0, |bytes| bytes.parse().unwrap_or(0));
        let (block, payload) = letter.payload.split_at(front);
        let sent: &[u8] = match sequence {
            4 => b"",
            5 => &large,
            _ => command,
        };
        ensure!(payload == sent, "{sequence}: {} bytes of payload", payload.len());
        ensure!((front > 0) == (sequence < 3), "{sequence}: {front} bytes in front");
        let lines = |block: &[u8]| {
            let mut lines: Vec<_> = block.split(|byte| *byte == b'\n').map(<[u8]>::to_vec).collect();
            lines.sort_unstable();
            lines
        };
        ensure!(sequence != 1 || lines(block) == lines(&many), "not all headers were kept");
        ensure!(sequence != 2 || block == giant, "the header was not kept");
        ensure!(sequence != 3 || letter.header("Mailroom-Subject") == Some(&many_tokens()), "{sequence}");
    }
    Ok(())
}

/// A message that fills all that the server takes cannot be a dead letter, which has to say more. It stays in its
/// stream, which is said loudly, and its neighbours get their verdicts.
#[tokio::test]
async fn a_message_that_is_too_large_for_a_dead_letter_stays_and_its_neighbours_go_on() -> Result<()> {
    let bed = Bed::new().await?;
    let mut raw = RawClient::connect(bed.server.url()).await?;
    let block = b"NATS/1.0\r\nA: b\r\n\r\n";
    raw.publish(b"mail.test", None, &filled(b"reject large\n", MAX_PAYLOAD)).await?;
    raw.publish(b"mail.test", Some(block), &filled(b"reject large\n", MAX_PAYLOAD - block.len())).await?;
    raw.publish(b"mail.test", None, b"verdict ordinary").await?;
    raw.flush().await?;
    let host = bed.actor(&[]).await?;
    bed.verdicts(1).await?;
    host.wait_for_line(SOON, |line| line.contains("the message stays in its stream")).await?;
    counted(&host, "retry", "too-large", 2).await?;
    assert_eq!(streams::count(&bed.jetstream, streams::DEAD).await?, 0);
    assert_eq!(bed.consumer().await?.cached_info().num_ack_pending, 2);
    assert_eq!(host.ready().await?.0, 200);
    Ok(())
}

/// Whatever a sender calls its headers, they pass for nothing else: neither in the stream of dead letters nor for the
/// host's word.
#[tokio::test]
async fn headers_that_look_like_somebody_elses_do_nothing() -> Result<()> {
    let bed = Bed::new().await?;
    let mut raw = RawClient::connect(bed.server.url()).await?;
    let names = [
        ("Mailroom-Id", "MAIL:1:triage:7"),
        ("Mailroom-Reason", "max-deliver"),
        ("Mailroom-Headers", "AAAA"),
        ("Mailroom-Headers-Bytes", "5"),
        ("mailroom-subject", "mail.other"),
        ("Nats-Msg-Id", "chosen"),
        ("nats-msg-id", "chosen"),
        ("Nats-Rollup", "all"),
        ("nats-rollup", "sub"),
        ("Nats-Expected-Stream", "MAIL"),
        ("nats-expected-stream", "OTHER"),
        ("Nats-Expected-Last-Subject-Sequence", "0"),
        ("Nats-Expected-Last-Sequence", "12345"),
        ("Nats-TTL", "1s"),
        ("Nats-Stream-Source", "OTHER 1"),
        ("Status", "503"),
    ];
    let (mut expected, mut last) = (BTreeMap::new(), 0);
    for (number, (name, value)) in names.into_iter().enumerate() {
        let block = format!("NATS/1.0\r\n{name}: {value}\r\n\r\n");
        raw.publish(format!("mail.{number}").as_bytes(), Some(block.as_bytes()), b"reject odd").await?;
        raw.flush().await?;
        // The server itself acts on some of them, and refuses.
        let next = bed.tell(["verdict ordinary"]).await?;
        if next == last + 2 {
            expected.insert(last + 1, (name, value));
        }
        last = next;
    }
    let _host = bed.actor(&[]).await?;
    let dead: Vec<u64> = expected.keys().copied().collect();
    all_judged(&bed, last, &dead).await?;
    for letter in streams::dead_letters(&bed.jetstream).await? {
        let (name, value) = expected[&letter.mail_sequence()?];
        let kept = match name {
            "Status" => name.to_owned(),
            _ if name.to_ascii_lowercase().starts_with("nats-") => {
                format!("Mailroom-Original-{}", name.replacen('-', "_", 1))
            }
            _ => format!("Mailroom-Original-{name}"),
        };
        ensure!(letter.header(&kept) == Some(value), "{name}: {letter:?}");
        ensure!(letter.header("Mailroom-Reason") == Some("rejected"), "{name}: {letter:?}");
        ensure!(letter.header("Mailroom-Headers-Bytes").is_none(), "{name}: {letter:?}");
        ensure!(letter.payload == "reject odd", "{name}: {letter:?}");
    }
    Ok(())
}

/// A header block of thousands of headers, about as large as a stream takes.
fn many_headers() -> Vec<u8> {
    let headers: String = (0..5_000).map(|number| format!("H{number:04}: x\r\n")).collect();
    format!("NATS/1.0\r\n{headers}H0000: {}\r\n\r\n", "y".repeat(15_400)).into_bytes()
}

fn giant_header() -> Vec<u8> {
    format!("NATS/1.0\r\nA: {}\r\n\r\n", "x".repeat(65_500)).into_bytes()
}

fn many_tokens() -> String {
    format!("mail{}", ".t".repeat(1_000))
}

/// `command`, filled up to `bytes`.
fn filled(command: &[u8], bytes: usize) -> Vec<u8> {
    let mut payload = command.to_vec();
    payload.resize(bytes, b'.');
    payload
}

/// The server's default for the largest message, headers included.
const MAX_PAYLOAD: usize = 1 << 20;

impl Sample {
    async fn publish(&self, raw: &mut RawClient, payload: &str) -> Result<()> {
        let subject = self.subject.as_deref().map_or_else(|| b"mail.test".to_vec(), bytes);
        raw.publish(&subject, self.headers.as_deref().map(bytes).as_deref(), payload.as_bytes()).await
    }
}

/// A mail's header block as the stream keeps it.
async fn stored_headers(bed: &Bed, sequence: u64) -> Result<Option<Vec<u8>>> {
    let request = json!({ "seq": sequence });
    let answer: Value = bed.jetstream.request("STREAM.MSG.GET.MAIL", &request).await?;
    answer["message"]["hdrs"].as_str().map(|headers| BASE64.decode(headers)).transpose().context("decode the headers")
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
