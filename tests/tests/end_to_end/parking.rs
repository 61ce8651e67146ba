//! Retries that are due late wait in a stream of their own, on servers that publish what is due and on older ones.

use async_nats::HeaderMap;
use tests::bed::{Bed, SOON};
use tests::mix;
use tests::prelude::*;
use tests::{Fault, Fleet};

/// What makes a host park nearly every retry.
const EARLY: [&str; 4] = ["--park-after", "50ms", "--retry-min", "10ms"];

/// A bed on a server of either kind.
async fn bed(new: bool, provision: &[&str]) -> Result<Bed> {
    let server = if new { NatsServer::start_new().await? } else { NatsServer::start().await? };
    Bed::on(server, provision).await
}

async fn parked(host: &Host) -> Result<f64> {
    Ok(host.metrics().await?.get("mailroom_parked_total", &[]).unwrap_or_default())
}

/// While a message waits for its time nothing is unsettled at the consumer. It comes back as what it was: id, subject,
/// time, headers and body, and its deliveries go on.
#[tokio::test]
async fn a_late_retry_leaves_the_consumer_at_rest_and_comes_back_as_it_was() -> Result<()> {
    for new in [false, true] {
        let bed = bed(new, &[]).await?;
        let host = bed.actor(&EARLY).await?;
        let mut headers = HeaderMap::new();
        headers.insert("Subject", "later");
        headers.append("X-Twice", "1");
        headers.append("X-Twice", "2");
        headers.insert("Mailroom-Deliveries", "7");
        headers.insert("Mailroom-Letter", "a.b");
        bed.tell_with(headers, "echo-at 3 2000").await?;
        for round in 1..=2 {
            eventually(SOON, "parked", async || parked(&host).await, |count| *count == f64::from(round)).await?;
            bed.settled().await?;
            ensure!(streams::outcomes(&bed.jetstream).await? == 0, "too early");
        }
        let verdict = bed.verdicts(1).await?.remove(0);
        ensure!(verdict.subject.starts_with("verdict.echo."), "{verdict:?}");
        let json = verdict.json()?;
        let said: Vec<&str> = json["reasons"].as_array().into_iter().flatten().filter_map(|it| it.as_str()).collect();
        let stored = &streams::messages(&bed.jetstream, streams::MAIL).await?[0];
        let stored = stored.time.duration_since(std::time::UNIX_EPOCH)?.as_millis().to_string();
        let id = verdict.header("Mailroom-Id").context("no id")?;
        let expected = [
            id,
            "mail.test",
            &stored,
            "3",
            "14",
            "Mailroom-Deliveries=7",
            "Mailroom-Letter=a.b",
            "Subject=later",
            "X-Twice=1",
            "X-Twice=2",
        ];
        assert_eq!(said, expected);
        ensure!(id.ends_with(":triage:1"), "{id}");
        bed.one_verdict_each(1).await?;
    }
    Ok(())
}

/// Nobody has to be up when a message is due: the server brings it back, so that whoever scales by the consumer's lag
/// has a reason to start a host.
#[tokio::test]
async fn a_new_server_brings_a_message_back_when_no_host_is_up() -> Result<()> {
    let bed = bed(true, &[]).await?;
    let mut host = bed.actor(&EARLY).await?;
    bed.tell(["retry-until 2 2000"]).await?;
    eventually(SOON, "parked", async || parked(&host).await, |count| *count == 1.0).await?;
    host.stop(SOON).await?;
    bed.settled().await?;
    let look = async || Ok(bed.consumer().await?.cached_info().num_pending);
    eventually(SOON, "it is back", look, |pending| *pending == 1).await?;
    let _host = bed.actor(&EARLY).await?;
    bed.one_verdict_each(1).await
}

/// On an older one a host does it, of those that are up then.
#[tokio::test]
async fn another_host_brings_back_what_one_parked() -> Result<()> {
    let bed = bed(false, &[]).await?;
    let host = bed.actor(&EARLY).await?;
    bed.tell(std::iter::repeat_n("retry-until 2 1500", 20)).await?;
    eventually(SOON, "parked", async || parked(&host).await, |count| *count == 20.0).await?;
    drop(host);
    let _host = bed.actor(&EARLY).await?;
    bed.one_verdict_each(20).await?;
    let left = async || streams::count(&bed.jetstream, streams::PARKED).await;
    eventually(SOON, "nothing is left parked", left, |left| *left == 0).await.map(drop)
}

/// Deliveries go on counting: a message whose guest never comes to an end is a dead letter in the end, one.
#[tokio::test]
async fn parked_deliveries_count() -> Result<()> {
    for new in [false, true] {
        let bed = bed(new, &[]).await?;
        let host = bed.actor(&[&EARLY[..], &["--max-deliver", "4", "--attempts", "3"]].concat()).await?;
        bed.tell(["retry 100", "trap"]).await?;
        let mut letters = bed.dead_letters(2).await?;
        letters.sort_by_key(|letter| letter.mail_sequence().unwrap_or_default());
        for (letter, reason, deliveries, body) in
            [(&letters[0], "max-deliver", "5", "retry 100"), (&letters[1], "trap", "3", "trap")]
        {
            assert_eq!(letter.header("Mailroom-Reason"), Some(reason));
            assert_eq!(letter.header("Mailroom-Deliveries"), Some(deliveries));
            assert_eq!(letter.payload, body);
            let id = letter.header("Mailroom-Id").context("no id")?;
            assert_eq!(letter.subject, format!("dead.MAIL.triage.{id}"));
        }
        ensure!(parked(&host).await? >= 4.0, "hardly any was parked");
        bed.books_balance(2).await?;
    }
    Ok(())
}

/// What would keep the server from seeing the host's headers stands in front of the payload, or waits at the consumer;
/// either comes back whole.
#[tokio::test]
async fn a_sender_cannot_hide_the_hosts_headers() -> Result<()> {
    for new in [false, true] {
        let bed = bed(new, &[]).await?;
        let host = bed.actor(&EARLY).await?;
        let mut headers = HeaderMap::new();
        headers.insert("Subject", "what is Nats-Schedule: @at 2100-01-01T00:00:00Z for?");
        headers.insert("X-Nats-Schedule-Target", "mail.else");
        for subject in ["mail.test", "mail.Nats-Schedule-Target.x"] {
            let mail = "retry-until 3 300".into();
            bed.jetstream.publish_with_headers(subject, headers.clone(), mail).await?.await?;
        }
        bed.one_verdict_each(2).await?;
        ensure!(parked(&host).await? == 2.0, "those of one message are parked");
    }
    Ok(())
}

/// Where there is no such stream, or it takes nothing, messages wait at the consumer as they always did. It can be made
/// later, beside what a stream has.
#[tokio::test]
async fn without_the_stream_retries_wait_at_the_consumer() -> Result<()> {
    for new in [false, true] {
        let bed = bed(new, &[]).await?;
        let host = bed.actor(&EARLY).await?;
        bed.jetstream.delete_stream(streams::PARKED).await?;
        bed.tell(["retry-until 3 200"]).await?;
        bed.one_verdict_each(1).await?;
        host.wait_for_line(SOON, |line| line.contains("cannot park a retry")).await?;
        drop(host);

        let mut config = bed.jetstream.get_stream(streams::MAIL).await?.cached_info().config.clone();
        config.sources = None;
        bed.jetstream.update_stream(config).await?;
        bed.provision(&["--update"]).await?;
        bed.provision(&["--check"]).await?;
        let host = bed.actor(&EARLY).await?;
        bed.tell(["retry-until 3 200"]).await?;
        bed.one_verdict_each(2).await?;
        ensure!(parked(&host).await? == 2.0, "it is used");
    }
    Ok(())
}

/// Hosts are killed and frozen, and the server is killed, at any moment between parking and coming back.
#[tokio::test]
async fn a_new_server_loses_and_doubles_no_parked_message() -> Result<()> {
    const MAILS: usize = 6000;
    let provision = ["--ack-wait", "2s", "--deadline", "1500ms"];
    let args = [&EARLY[..], &["--deadline", "1500ms", "--max-deliver", "1000", "--max-in-flight", "64"]].concat();
    let bed = bed(true, &provision).await?;
    let mut fleet = Fleet::on(bed, &provision, 2, &args).await?;
    let mut publisher = mix::Publisher::connect(fleet.bed.server.url(), "parked").await?;
    let later = ["retry-until 2 100", "retry-until 4 60", "retry-until 2 1500", "verdict support"];
    let mails: Vec<&str> =
        mix::mails(4713).zip(later.iter().cycle()).flat_map(|(one, other)| [one, *other]).take(MAILS).collect();
    let publishing = tokio::spawn(async move { publisher.publish(mails, None).await });
    for (outcomes, fault) in [
        (300, Fault::HostKilled(0)),
        (1000, Fault::HostKilled(1)),
        (1800, Fault::ServerKilled),
        (2600, Fault::HostKilled(0)),
        (3400, Fault::HostKilled(1)),
    ] {
        fleet.bed.outcomes(outcomes).await?;
        fleet.begin(fault).await?;
        fleet.end(fault).await?;
        fleet.until_ready().await?;
    }
    publishing.await??;
    fleet.bed.books_balance(MAILS as u64).await.map(drop)
}
