//! Starting, stopping, dying, and coming back: nothing lost, nothing twice.

use async_nats::jetstream::AckKind;
use async_nats::jetstream::message::PublishMessage;
use futures::StreamExt as _;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::Instant;
use tests::bed::{Bed, SOON};
use tests::prelude::*;

/// A host killed in the middle of its work loses nothing and doubles nothing.
#[tokio::test]
async fn a_killed_host_neither_loses_nor_doubles_a_verdict() -> Result<()> {
    let bed = Bed::provisioned(&["--ack-wait", "2s"]).await?;
    bed.tell(std::iter::repeat_n("verdict support", 4000)).await?;
    for stored in [300, 1500] {
        let mut host = bed.actor(&[]).await?;
        bed.verdicts(stored).await?;
        host.kill();
    }
    let _host = bed.actor(&[]).await?;
    bed.one_verdict_each(4000).await
}

/// A message whose first host died between storing its verdict and acknowledging it gets no second one, even from a
/// guest that would answer differently, and long after the server has forgotten the message id.
#[tokio::test]
async fn a_redelivered_message_keeps_its_first_verdict() -> Result<()> {
    let bed = Bed::provisioned(&["--duplicate-window", "100ms"]).await?;
    bed.tell(["alternate"]).await?;
    // What a host does that dies too early: fetch, store the verdict, and no more.
    let first = bed
        .consumer()
        .await?
        .batch()
        .max_messages(1)
        .expires(SOON)
        .messages()
        .await?
        .next()
        .await
        .context("a delivery")?;
    let delivery = first.map_err(|err| anyhow::anyhow!(err))?;
    let created = bed.jetstream.get_stream(streams::MAIL).await?.cached_info().created.unix_timestamp();
    let id = format!("MAIL:{created}:triage:1");
    let verdict = PublishMessage::build().message_id(&id).header("Mailroom-Id", id.as_str()).payload("{}".into());
    bed.jetstream.send_publish(format!("verdict.first.{id}"), verdict).await?.await?;
    delivery.ack_with(AckKind::Nak(Some(Duration::from_millis(300)))).await.map_err(|err| anyhow::anyhow!(err))?;

    let host = bed.actor(&[]).await?;
    let look = async || Ok(host.metrics().await?.get("mailroom_messages_total", &[("outcome", "duplicate")]));
    eventually(SOON, "the duplicate found", look, |found| *found == Some(1.0)).await?;
    bed.settled().await?;
    let verdicts = streams::verdicts(&bed.jetstream).await?;
    assert_eq!(verdicts.len(), 1);
    assert_eq!(verdicts[0].subject, format!("verdict.first.{id}"));
    Ok(())
}

/// Messages that wait in the host for longer than the consumer's ack wait are not delivered a second time.
#[tokio::test]
async fn waiting_messages_are_kept_from_redelivery() -> Result<()> {
    let bed = Bed::provisioned(&["--ack-wait", "2s", "--deadline", "1900ms"]).await?;
    bed.tell(std::iter::repeat_n("sleep 1200", 4)).await?;
    let _host = bed.actor(&["--shards", "1", "--slots", "1", "--deadline", "1900ms"]).await?;
    bed.one_verdict_each(4).await?;
    let delivered = bed.consumer().await?.info().await?.delivered.consumer_sequence;
    assert_eq!(delivered, 4, "deliveries of 4 messages");
    Ok(())
}

/// SIGTERM in the middle of the work: the host exits with 0, and what it had not begun is there for the next host at
/// once instead of after the consumer's ack wait.
#[tokio::test]
async fn sigterm_drains_and_hands_back_what_was_not_begun() -> Result<()> {
    let bed = Bed::new().await?;
    bed.tell(std::iter::repeat_n("sleep 50", 300)).await?;
    let mut host = bed.actor(&["--shards", "1", "--slots", "4", "--max-in-flight", "200"]).await?;
    bed.verdicts(8).await?;
    let status = host.stop(SOON).await?;
    assert_eq!(status.code(), Some(0));
    host.wait_for_line(SOON, |line| line.contains("\"drained\"")).await?;
    let mut consumer = bed.consumer().await?;
    let info = consumer.info().await?;
    assert!(info.num_pending < 300, "{info:?}");

    let _next = bed.actor(&["--slots", "256"]).await?;
    bed.one_verdict_each(300).await
}

/// A message that does not end within the grace period is handed back, and the host exits with 0 all the same. It says
/// meanwhile that it drains, and in the end that it has not.
#[tokio::test]
async fn the_grace_period_bounds_the_drain() -> Result<()> {
    let bed = Bed::new().await?;
    let mut host = bed.actor(&["--deadline", "20s", "--grace", "2s"]).await?;
    bed.tell(["sleep 15000"]).await?;
    let look = async || Ok(host.metrics().await?.get("mailroom_slots_in_use", &[]));
    eventually(SOON, "the guest runs", look, |slots| *slots == Some(1.0)).await?;
    host.signal(Signal::TERM)?;
    let look = async || host.ready().await;
    eventually(SOON, "draining", look, |ready| *ready == (503, "draining\n".into())).await?;
    assert_eq!(host.wait(Duration::from_secs(10)).await?.code(), Some(0));
    host.wait_for_line(SOON, |line| line.contains("stopped: 1 message not done in time")).await?;
    assert!(!host.process().lines().iter().any(|line| line.contains("\"drained\"")));
    // It is delivered again long before the consumer's ack wait of 30 s is over.
    let consumer = bed.consumer().await?;
    let soon = consumer.batch().max_messages(1).expires(Duration::from_secs(10)).messages();
    soon.await?.next().await.context("a delivery")?.map_err(|err| anyhow::anyhow!(err))?;
    Ok(())
}

/// The second signal ends the host at once.
#[tokio::test]
async fn a_second_signal_exits_at_once() -> Result<()> {
    let bed = Bed::new().await?;
    let mut host = bed.actor(&["--deadline", "20s"]).await?;
    bed.tell(["sleep 15000"]).await?;
    let look = async || Ok(host.metrics().await?.get("mailroom_slots_in_use", &[]));
    eventually(SOON, "the guest runs", look, |slots| *slots == Some(1.0)).await?;
    host.signal(Signal::TERM)?;
    host.wait_for_line(SOON, |line| line.contains("draining")).await?;
    // Within 100 ms it would count as an echo of the first.
    tokio::time::sleep(Duration::from_millis(200)).await;
    host.signal(Signal::TERM)?;
    assert_eq!(host.wait(Duration::from_secs(10)).await?.code(), Some(143));
    Ok(())
}

/// A host on a terminal drains when the terminal is closed, though SIGHUP means another thing elsewhere.
#[tokio::test]
async fn a_closed_terminal_drains_the_host() -> Result<()> {
    let bed = Bed::new().await?;
    // A terminal of its own, which is closed with the process that made it.
    let terminal = ["sh", "-c", "exec script --quiet --flush --command \"exec $*\" /dev/null", "sh"];
    let mut host = Host::on(bed.server.url()).component(tools::component("actor")?).under(terminal).start().await?;
    host.until_ready(SOON).await?;
    let admin = host.admin().to_owned();
    host.kill();
    let gone = async || Ok(http::get(&format!("{admin}/livez")).await.is_err());
    eventually(SOON, "the host has ended", gone, |gone| *gone).await.map(drop)
}

/// A server that dies and comes back is reconnected to, and every message still gets its one verdict.
#[tokio::test]
async fn a_restarted_server_is_reconnected_to() -> Result<()> {
    let mut bed = Bed::provisioned(&["--ack-wait", "2s"]).await?;
    let host = bed.actor(&[]).await?;
    bed.tell(std::iter::repeat_n("verdict support", 1000)).await?;
    bed.verdicts(100).await?;
    bed.server.kill();
    let look = async || host.ready().await;
    eventually(SOON, "not ready", look, |ready| ready.0 == 503 && ready.1.contains("no connection")).await?;
    bed.server.restart().await?;
    bed.jetstream = bed.server.jetstream().await?;
    host.until_ready(SOON).await?;
    bed.tell(std::iter::repeat_n("verdict support", 100)).await?;
    bed.one_verdict_each(1100).await
}

/// While verdicts cannot be stored the host says so, is not ready and keeps the messages; when they can, it goes on.
/// Nobody's message is at fault.
#[tokio::test]
async fn a_missing_verdict_stream_costs_no_message() -> Result<()> {
    let bed = Bed::new().await?;
    let host = bed.actor(&["--attempts", "1"]).await?;
    bed.jetstream.delete_stream(streams::VERDICTS).await?;
    bed.tell(std::iter::repeat_n("verdict support", 20)).await?;
    let look = async || host.ready().await;
    let told = |ready: &str| ready.contains("verdicts cannot be stored") && !ready.contains("letters");
    eventually(SOON, "not ready", look, |ready| ready.0 == 503 && told(&ready.1)).await?;
    host.wait_for_line(SOON, |line| line.contains("cannot store a verdict")).await?;
    bed.provision(&[]).await?;
    host.until_ready(SOON).await?;
    host.wait_for_line(SOON, |line| line.contains("verdicts can be stored again; fetching goes on")).await?;
    bed.one_verdict_each(20).await
}

/// A host is ready when each of its shards is: nobody sees it ready, and then not for a shard that has yet to begin.
#[tokio::test]
async fn a_starting_host_is_not_ready_before_its_shards() -> Result<()> {
    let bed = Bed::new().await?;
    for _ in 0..12 {
        let host = Host::on(bed.server.url()).component(tools::component("actor")?).args(["--shards", "1"]).start();
        let host = host.await?;
        // Asked without pause: what is to be seen lasts a tenth of a millisecond.
        let mut asked = TcpStream::connect(host.admin().trim_start_matches("http://"))?;
        asked.set_read_timeout(Some(SOON))?;
        let mut answer = [0; 1024];
        let (begun, mut ready) = (Instant::now(), 0);
        while ready < 100 {
            ensure!(begun.elapsed() < SOON, "the host is not ready after {SOON:?}");
            asked.write_all(b"GET /readyz HTTP/1.1\r\nhost: host\r\n\r\n")?;
            let length = asked.read(&mut answer)?;
            let answer = String::from_utf8_lossy(&answer[..length]);
            match answer.starts_with("HTTP/1.1 200") {
                true => ready += 1,
                false => assert_eq!(ready, 0, "it was ready, and then: {answer}"),
            }
        }
    }
    Ok(())
}

/// So it is with the dead letters.
#[tokio::test]
async fn a_missing_dead_letter_stream_costs_no_message() -> Result<()> {
    let bed = Bed::new().await?;
    let host = bed.actor(&[]).await?;
    bed.jetstream.delete_stream(streams::DEAD).await?;
    bed.tell(["reject it"]).await?;
    let look = async || host.ready().await;
    let told = |ready: &str| ready.contains("dead letters cannot be stored") && !ready.contains("verdicts");
    eventually(SOON, "not ready", look, |ready| ready.0 == 503 && told(&ready.1)).await?;
    host.wait_for_line(SOON, |line| line.contains("cannot store a dead letter")).await?;
    bed.provision(&[]).await?;
    host.until_ready(SOON).await?;
    host.wait_for_line(SOON, |line| line.contains("dead letters can be stored again; fetching goes on")).await?;
    bed.dead_letters(1).await?;
    bed.settled().await
}

/// A result that no stream will ever take is told with what it is and its size, and its message stays.
#[tokio::test]
async fn a_result_that_is_too_large_is_told_with_its_size() -> Result<()> {
    let bed = Bed::new().await?;
    for stream in [streams::VERDICTS, streams::DEAD] {
        let mut config = bed.jetstream.get_stream(stream).await?.cached_info().config.clone();
        config.max_message_size = 100;
        bed.jetstream.update_stream(&config).await?;
    }
    let host = bed.actor(&[]).await?;
    bed.tell(["verdict support", "reject it"]).await?;
    for what in ["verdict", "dead letter"] {
        let said = format!("the {what} is too large with ");
        let line = host.wait_for_line(SOON, |line| line.contains(&said)).await?;
        let bytes = line.split(&said).nth(1).and_then(|rest| rest.split(" bytes for the server's").next());
        let bytes: usize = bytes.unwrap_or_default().parse().with_context(|| line.clone())?;
        assert!((300..1000).contains(&bytes) && line.contains("the message stays in its stream"), "{line}");
    }
    assert_eq!(bed.consumer().await?.cached_info().num_ack_pending, 2);
    Ok(())
}

/// A consumer that is deleted and made again is found again.
#[tokio::test]
async fn a_consumer_made_again_is_found_again() -> Result<()> {
    let bed = Bed::new().await?;
    let host = bed.actor(&[]).await?;
    bed.tell(["verdict support"]).await?;
    bed.verdicts(1).await?;
    bed.jetstream.get_stream(streams::MAIL).await?.delete_consumer("triage").await?;
    let look = async || host.ready().await;
    eventually(SOON, "not ready", look, |ready| ready.0 == 503 && ready.1.contains("no consumer")).await?;
    bed.provision(&[]).await?;
    host.until_ready(SOON).await?;
    host.wait_for_line(SOON, |line| line.contains("fetching goes on; 0 messages returned as gone")).await?;
    bed.tell(["verdict support"]).await?;
    // The new consumer begins at the first mail again, which has its verdict.
    bed.one_verdict_each(2).await
}

/// Two hosts on one consumer share the work.
#[tokio::test]
async fn two_hosts_share_a_consumer() -> Result<()> {
    let bed = Bed::new().await?;
    let first = bed.actor(&["--max-in-flight", "32"]).await?;
    let second = bed.actor(&["--max-in-flight", "32"]).await?;
    bed.tell(std::iter::repeat_n("verdict support", 3000)).await?;
    bed.one_verdict_each(3000).await?;
    let look = async || {
        let labels = [("outcome", "verdict")];
        let shares = [&first, &second].map(async |host| {
            host.metrics().await?.get("mailroom_messages_total", &labels).context("no verdict counted")
        });
        let [one, other] = shares;
        Ok((one.await?, other.await?))
    };
    eventually(SOON, "both counted", look, |(one, other)| *one > 0.0 && *other > 0.0 && one + other == 3000.0).await?;
    Ok(())
}

/// `--dev` needs nothing but nats-server: it brings one, takes mail, and leaves nothing behind.
#[tokio::test]
async fn dev_brings_its_own_server_and_cleans_up() -> Result<()> {
    let mut command = std::process::Command::new(tools::host()?);
    let component = tools::component("triage")?;
    command.args(["run", "--dev", "--listen", "127.0.0.1:0", "--component"]).arg(component);
    command.arg("--nats-server").arg(tools::nats_server()?);
    let folder = tempfile::tempdir()?;
    command.env("TMPDIR", folder.path());
    let mut host = Process::spawn("host run --dev", command)?;
    host.wait_for_line(SOON, |line| line.contains("running")).await?;
    let line = host.wait_for_line(SOON, |line| line.contains("private nats-server")).await?;
    let url = line.split('"').find(|text| text.starts_with("nats://")).context("the server's URL")?.to_string();

    let client = async_nats::connect(&url).await?;
    let jetstream = async_nats::jetstream::new(client);
    let mail = std::fs::read(tools::mails()?.first().context("a mail")?)?;
    jetstream.publish("mail.test", mail.into()).await?.await?;
    let look = async || streams::count(&jetstream, streams::VERDICTS).await;
    eventually(SOON, "a verdict", look, |verdicts| *verdicts == 1).await?;

    host.signal(Signal::TERM)?;
    assert_eq!(host.wait(SOON).await?.code(), Some(0));
    assert_eq!(std::fs::read_dir(folder.path())?.count(), 0, "the private server's folder is still there");
    assert!(async_nats::connect(&url).await.is_err(), "the private server still runs");
    Ok(())
}
