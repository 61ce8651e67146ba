//! Streams and consumers that are deleted and made again while the host runs: what is new begins to count at 1 again,
//! and nothing of the old may pass for it.

use async_nats::HeaderMap;
use async_nats::jetstream::AckKind;
use futures::TryStreamExt as _;
use std::time::Instant;
use tests::bed::{Bed, SOON};
use tests::prelude::*;

/// A host whose hands are full when the stream goes has no pull that would end. Nevertheless the acknowledgements of what it
/// holds do not settle messages of the new stream, and each of those gets a verdict of its own.
#[tokio::test]
async fn late_acknowledgements_do_not_settle_messages_of_a_stream_made_again() -> Result<()> {
    let bed = Bed::provisioned(&SLOW).await?;
    let args = ["--shards", "2", "--max-in-flight", "8", "--deadline", "6s"];
    let host = bed.actor(&args).await?;
    bed.tell(std::iter::repeat_n("sleep 4000", 40)).await?;
    let look = async || Ok(bed.consumer().await?.cached_info().num_ack_pending);
    eventually(SOON, "full hands", look, |pending| *pending == 16).await?;
    make_again(&bed, &SLOW).await?;

    // The first of the new messages are in somebody else's hands when the guests of the old ones come to their end.
    bed.tell(std::iter::repeat_n("verdict anew", 100)).await?;
    let held = bed.consumer().await?.fetch().max_messages(16).messages().await?;
    let held: Vec<_> = held.map_err(anyhow::Error::from_boxed).try_collect().await?;
    ensure!(held.len() == 16, "{} messages fetched", held.len());
    let gone = async || Ok(host.metrics().await?.get("mailroom_messages_total", &[("reason", "gone")]));
    eventually(SOON, "old acknowledgements withheld", gone, |gone| *gone == Some(16.0)).await?;
    let info = bed.consumer().await?.cached_info().clone();
    ensure!(info.ack_floor.stream_sequence == 0 && info.num_ack_pending >= 16, "{info:?}");

    for message in held {
        message.ack_with(AckKind::Nak(None)).await.map_err(anyhow::Error::from_boxed)?;
    }
    own_verdicts(&bed, 100).await?;
    host.wait_for_line(SOON, |line| line.contains("fetching goes on; 8 messages returned as gone")).await?;
    host.until_ready(SOON).await
}

/// A host that has looked at its consumer a moment ago, and so is sure of it, is told when it goes.
#[tokio::test]
async fn a_stream_made_again_at_once_is_not_settled_by_what_was_of_the_old_one() -> Result<()> {
    const HANDS: u64 = 8;
    // Long enough to make the stream again meanwhile, and too short for the host to look once more by itself.
    const RUN: Duration = Duration::from_millis(700);
    for _ in 0..5 {
        let bed = Bed::provisioned(&[]).await?;
        let hands = HANDS.to_string();
        let host = bed.actor(&["--shards", "1", "--max-in-flight", &hands, "--deadline", "6s"]).await?;
        let start = Instant::now();
        bed.tell(std::iter::repeat_n(format!("sleep {}", RUN.as_millis()), 2 * HANDS as usize)).await?;
        let look = async || Ok((bed.consumer().await?.cached_info().num_ack_pending as u64, start.elapsed()));
        eventually(SOON, "full hands", look, |(pending, since)| *pending == HANDS || *since > RUN).await?;
        bed.jetstream.delete_stream(streams::MAIL).await?;
        bed.provision(&[]).await?;
        bed.tell(std::iter::repeat_n("verdict anew", HANDS as usize)).await?;
        let held = bed.consumer().await?.fetch().max_messages(HANDS as usize).messages().await?;
        let held: Vec<_> = held.map_err(anyhow::Error::from_boxed).try_collect().await?;
        if start.elapsed() > RUN {
            continue;
        }
        ensure!(held.len() as u64 == HANDS, "{} messages fetched", held.len());
        let done = async || {
            let metrics = host.metrics().await?;
            let of = |outcome| metrics.get("mailroom_messages_total", &[("outcome", outcome)]).unwrap_or_default();
            Ok(of("verdict") + of("returned"))
        };
        eventually(SOON, "the old ones are over", done, |done| *done >= HANDS as f64).await?;
        let info = bed.consumer().await?.cached_info().clone();
        ensure!(info.ack_floor.stream_sequence == 0 && info.num_ack_pending as u64 == HANDS, "{info:?}");
        return Ok(());
    }
    bail!("five times it took longer than {RUN:?} to make a stream again")
}

/// Under load, with room for more, too: every message of each stream that is still there has its own verdict.
#[tokio::test]
async fn a_stream_made_again_under_load_gets_its_own_verdicts() -> Result<()> {
    let bed = Bed::provisioned(&["--ack-wait", "2s"]).await?;
    let host = bed.actor(&["--shards", "2"]).await?;
    for round in 1..=3 {
        bed.tell(std::iter::repeat_n("verdict support", 1000)).await?;
        bed.verdicts(300 * round).await?;
        make_again(&bed, &["--ack-wait", "2s"]).await?;
    }
    bed.tell(std::iter::repeat_n("verdict support", 1000)).await?;
    own_verdicts(&bed, 1000).await?;
    host.until_ready(SOON).await
}

/// A consumer that is made again while guests run delivers everything anew; each message keeps its one verdict.
#[tokio::test]
async fn a_consumer_made_again_under_load_costs_no_second_verdict() -> Result<()> {
    let bed = Bed::provisioned(&["--ack-wait", "3s"]).await?;
    let host = bed.actor(&["--shards", "2", "--max-in-flight", "8", "--deadline", "2s"]).await?;
    bed.tell(std::iter::repeat_n("sleep 500", 48)).await?;
    bed.verdicts(16).await?;
    bed.jetstream.get_stream(streams::MAIL).await?.delete_consumer("triage").await?;
    bed.provision(&["--ack-wait", "3s"]).await?;
    bed.one_verdict_each(48).await?;
    host.until_ready(SOON).await
}

/// A dead letter is stored once, however often its message is delivered anew, and after the duplicate window too: what its
/// sender wrote does not keep the server from recognizing it.
#[tokio::test]
async fn a_consumer_made_again_costs_no_second_dead_letter() -> Result<()> {
    const MAILS: u64 = 40;
    const SUBJECT: &str = "mail.Nats-Msg-Id.50%2D.Nats-Expected-Last-Subject-Sequence";
    let window = Duration::from_secs(3);
    let bed = Bed::provisioned(&["--ack-wait", "2s", "--deadline", "1500ms", "--duplicate-window", "3s"]).await?;
    let host = bed.actor(&["--deadline", "1500ms"]).await?;
    for number in 0..MAILS {
        let mut headers = HeaderMap::new();
        match number % 4 {
            0 => headers.insert("Subject", "what is Nats-Msg-Id or Nats-Expected-Last-Subject-Sequence for?"),
            1 => headers.insert("X-Nats-Msg-Id", "x Nats-Expected-Last-Subject-Sequence: 1"),
            _ => headers.insert("Nats-Msg-Id", number.to_string()),
        }
        let subject = if number % 4 == 2 { SUBJECT } else { "mail.test" };
        let mail = "reject Nats-Msg-Id: Nats-Expected-Last-Subject-Sequence";
        bed.jetstream.publish_with_headers(subject, headers, mail.into()).await?.await?;
    }
    bed.books_balance(MAILS).await?;
    let since = Instant::now();
    eventually(SOON, "the window is over", async || Ok(since.elapsed()), |past| *past > window * 2).await?;
    bed.jetstream.get_stream(streams::MAIL).await?.delete_consumer("triage").await?;
    bed.provision(&[]).await?;
    let look = async || Ok(host.metrics().await?.get("mailroom_messages_total", &[("outcome", "dead")]));
    eventually(SOON, "all of them dead again", look, |dead| *dead == Some(2.0 * MAILS as f64)).await?;
    bed.books_balance(MAILS).await?;
    // Those stand in front of the payload that the server might read something into.
    let letters = streams::dead_letters(&bed.jetstream).await?;
    let in_front = letters.iter().filter(|letter| letter.header("Mailroom-Headers-Bytes").is_some()).count();
    ensure!(in_front as u64 == MAILS / 2, "{in_front} letters with headers in front");
    let listed = command::host(["dead", "list", "--json", "--subject", SUBJECT, "--server", bed.server.url()]).await?;
    let listed = listed.success()?.stdout;
    ensure!(listed.lines().count() as u64 == MAILS / 4 && listed.contains(SUBJECT), "{listed}");
    Ok(())
}

/// A verdict stream that is made again takes the verdicts of all that was not settled before.
#[tokio::test]
async fn a_verdict_stream_made_again_takes_what_is_left() -> Result<()> {
    let bed = Bed::new().await?;
    let host = bed.actor(&["--attempts", "1"]).await?;
    bed.tell(std::iter::repeat_n("sleep 100", 1000)).await?;
    bed.verdicts(100).await?;
    let before = streams::count(&bed.jetstream, streams::VERDICTS).await?;
    bed.jetstream.delete_stream(streams::VERDICTS).await?;
    bed.provision(&[]).await?;
    bed.settled().await?;
    let mut sequences: Vec<u64> =
        streams::verdicts(&bed.jetstream).await?.iter().map(Stored::mail_sequence).collect::<Result<_>>()?;
    let count = sequences.len() as u64;
    sequences.sort_unstable();
    sequences.dedup();
    ensure!(sequences.len() as u64 == count, "a message has two verdicts");
    ensure!(count <= 1000 - before && count > 0, "{count} verdicts after {before}");
    ensure!(streams::count(&bed.jetstream, streams::DEAD).await? == 0, "there are dead letters");
    host.until_ready(SOON).await
}

/// A server that came back with nothing is worked for again, once the streams are made.
#[tokio::test]
async fn a_server_that_lost_everything_is_worked_for_again() -> Result<()> {
    let mut bed = Bed::new().await?;
    let host = bed.actor(&["--shards", "2"]).await?;
    bed.tell(std::iter::repeat_n("verdict support", 50)).await?;
    bed.one_verdict_each(50).await?;
    bed.server.kill();
    std::fs::remove_dir_all(bed.server.folder().join("store"))?;
    bed.server.restart().await?;
    bed.jetstream = bed.server.jetstream().await?;
    bed.provision(&[]).await?;
    bed.tell(std::iter::repeat_n("verdict support", 50)).await?;
    own_verdicts(&bed, 50).await?;
    host.until_ready(SOON).await
}

/// A host with a paused consumer says so and is not ready, until it goes on. Servers before 2.11 cannot pause one.
#[tokio::test]
async fn a_paused_consumer_is_told_of() -> Result<()> {
    let bed = Bed::new().await?;
    let host = bed.actor(&[]).await?;
    let until = async |until: &str| -> Result<bool> {
        let request = serde_json::json!({ "pause_until": until });
        let answer: std::result::Result<serde_json::Value, _> =
            bed.jetstream.request("CONSUMER.PAUSE.MAIL.triage", &request).await;
        Ok(answer.is_ok_and(|answer| answer.get("error").is_none()))
    };
    if !until("2099-01-01T00:00:00Z").await? {
        ensure!(!bed.server.client().await?.is_server_compatible(2, 11, 0), "a current server does not pause");
        return Ok(());
    }
    let look = async || host.ready().await;
    eventually(SOON, "not ready", look, |ready| ready.0 == 503 && ready.1.contains("paused")).await?;
    host.wait_for_line(SOON, |line| line.contains("is paused")).await?;
    bed.tell(["verdict support"]).await?;
    ensure!(until("2000-01-01T00:00:00Z").await?, "it stays paused");
    host.until_ready(SOON).await?;
    bed.one_verdict_each(1).await
}

/// For guests that take seconds.
const SLOW: [&str; 4] = ["--ack-wait", "15s", "--deadline", "6s"];

/// Deletes the stream of mails and makes it again, in another second: ids tell streams apart by the second.
async fn make_again(bed: &Bed, args: &[&str]) -> Result<()> {
    let created = bed.jetstream.get_stream(streams::MAIL).await?.cached_info().created.unix_timestamp();
    bed.jetstream.delete_stream(streams::MAIL).await?;
    let now = async || Ok(std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_secs());
    eventually(SOON, "the next second", now, |now| i64::try_from(*now).is_ok_and(|now| now > created)).await?;
    bed.provision(args).await
}

/// Waits until each of the mails 1 to `mails` has one verdict under the id that it has in the present stream.
async fn own_verdicts(bed: &Bed, mails: u64) -> Result<()> {
    bed.settled().await?;
    let created = bed.jetstream.get_stream(streams::MAIL).await?.cached_info().created.unix_timestamp();
    let prefix = format!("MAIL:{created}:triage:");
    let mut sequences = Vec::new();
    for verdict in streams::verdicts(&bed.jetstream).await? {
        if verdict.header("Mailroom-Id").is_some_and(|id| id.starts_with(&prefix)) {
            sequences.push(verdict.mail_sequence()?);
        }
    }
    sequences.sort_unstable();
    ensure!(sequences == (1..=mails).collect::<Vec<_>>(), "{} verdicts on {mails} mails", sequences.len());
    Ok(())
}
