//! What becomes of one message: verdicts, failures, dead letters, limits.

use async_nats::HeaderMap;
use serde_json::json;
use std::collections::{BTreeMap, BTreeSet};
use std::time::SystemTime;
use tests::HostBuilder;
use tests::bed::{Bed, SOON};
use tests::prelude::*;

/// Every sample mail ends as one verdict or one dead letter, and nothing is left on the consumer.
#[tokio::test]
async fn every_sample_mail_is_settled_once() -> Result<()> {
    let bed = Bed::new().await?;
    let mails = tools::mails()?;
    for mail in &mails {
        bed.jetstream.publish("mail.samples", std::fs::read(mail)?.into()).await?.await?;
    }
    let host = Host::on(bed.server.url()).start().await?;
    let look = async || {
        let verdicts = streams::count(&bed.jetstream, streams::VERDICTS).await?;
        Ok(verdicts + streams::count(&bed.jetstream, streams::DEAD).await?)
    };
    eventually(SOON, "every mail settled", look, |settled| *settled == mails.len() as u64).await?;
    bed.settled().await?;
    let mut sequences = Vec::new();
    for stored in streams::verdicts(&bed.jetstream).await?.iter().chain(&streams::dead_letters(&bed.jetstream).await?) {
        sequences.push(stored.mail_sequence()?);
    }
    sequences.sort_unstable();
    assert_eq!(sequences, (1..=mails.len() as u64).collect::<Vec<_>>());
    let metrics = host.metrics().await?;
    assert_eq!(metrics.get("mailroom_store_failures_total", &[]), Some(0.0));
    Ok(())
}

/// The guest sees the message as the stream holds it, and the verdict carries the documented subject and headers.
#[tokio::test]
async fn the_message_reaches_the_guest_and_the_verdict_names_it() -> Result<()> {
    let bed = Bed::new().await?;
    let host = bed.actor(&[]).await?;
    let mut headers = HeaderMap::new();
    headers.insert("X-Tag", "one");
    headers.append("X-Tag", "two");
    headers.insert("Traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01");
    headers.insert("tracestate", "vendor=value");
    headers.insert("A-First", "1");
    bed.tell_with(headers, "echo").await?;
    let verdict = &bed.verdicts(1).await?[0];

    let mut stream = bed.jetstream.get_stream(streams::MAIL).await?;
    let created = stream.info().await?.created.unix_timestamp();
    let stored = &streams::messages(&bed.jetstream, streams::MAIL).await?[0];
    let time = stored.time.duration_since(SystemTime::UNIX_EPOCH)?.as_millis().to_string();
    let id = format!("MAIL:{created}:triage:1");
    assert_eq!(
        verdict.json()?,
        json!({
            "priority": "normal",
            "issue": verdict.json()?["issue"],
            "queue": "echo",
            "reasons": [
                id, "mail.test", time, "1", "4",
                "A-First=1",
                "Traceparent=00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
                "X-Tag=one", "X-Tag=two",
                "tracestate=vendor=value",
            ],
        })
    );
    assert_eq!(verdict.subject, format!("verdict.echo.{id}"));
    assert_eq!(verdict.header("Nats-Msg-Id"), Some(id.as_str()));
    assert_eq!(verdict.header("Mailroom-Id"), Some(id.as_str()));
    assert_eq!(verdict.header("traceparent"), Some("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"));
    assert_eq!(verdict.header("tracestate"), Some("vendor=value"));
    let digest = verdict.header("Mailroom-Component").context("a component digest")?;
    assert!(digest.starts_with("sha256:") && digest.len() == 71, "{digest}");
    assert_eq!(host.metrics().await?.get("mailroom_component_info", &[("digest", digest)]), Some(1.0));
    let made = verdict.header("Mailroom-Time").context("a time")?;
    assert!(made.starts_with("20") && made.ends_with('Z'), "{made}");
    Ok(())
}

/// What the sandbox is measured against does the same work: the same verdicts and dead letters, with the same headers,
/// under the same configuration.
#[tokio::test]
async fn the_native_handler_settles_mail_as_the_component_does() -> Result<()> {
    let settled = async |host: fn(&str) -> HostBuilder| {
        let bed = Bed::new().await?;
        let mails = tools::mails()?;
        let mut headers = HeaderMap::new();
        headers.insert("Traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01");
        headers.append("X-Tag", "one");
        headers.append("X-Tag", "two");
        for mail in &mails {
            let payload = std::fs::read(mail)?.into();
            bed.jetstream.publish_with_headers("mail.samples", headers.clone(), payload).await?.await?;
        }
        let args = ["--config", "queue.default=helpdesk", "--message-max", "1500B"];
        let mut host = host(bed.server.url()).args(args).start().await?;
        let look = async || {
            let verdicts = streams::count(&bed.jetstream, streams::VERDICTS).await?;
            Ok(verdicts + streams::count(&bed.jetstream, streams::DEAD).await?)
        };
        eventually(SOON, "every mail settled", look, |settled| *settled == mails.len() as u64).await?;
        bed.settled().await?;
        ensure!(host.stop(SOON).await?.success(), "it did not drain");
        let mut settled = BTreeMap::new();
        for stream in [streams::VERDICTS, streams::DEAD] {
            for stored in streams::messages(&bed.jetstream, stream).await? {
                let id = stored.header("Mailroom-Id").context("an id")?.to_owned();
                let mut headers = BTreeMap::new();
                for (name, values) in stored.headers.iter() {
                    let values: Vec<_> = values.iter().map(|value| value.as_str().replace(&id, "ID")).collect();
                    // What runs, and when: the only things that may differ.
                    let differs = ["Mailroom-Component", "Mailroom-Time", "Mailroom-Stored"].contains(&name.as_ref());
                    headers.insert(name.to_string(), if differs { Vec::new() } else { values });
                }
                let sequence = stored.mail_sequence()?;
                settled.insert(sequence, (stored.subject.replace(&id, "ID"), headers, stored.payload));
            }
        }
        Ok(settled)
    };
    let component = settled(Host::on).await?;
    let native = settled(Host::native).await?;
    assert_eq!(component.len(), tools::mails()?.len());
    assert_eq!(component, native);
    let queues: BTreeSet<_> = native.values().map(|(subject, ..)| subject.as_str()).collect();
    let expected = ["verdict.helpdesk.ID", "verdict.billing.ID", "dead.MAIL.triage.ID"];
    assert!(expected.iter().all(|subject| queues.contains(subject)), "{queues:?}");
    let reasons: BTreeSet<_> = native.values().filter_map(|(_, headers, _)| headers.get("Mailroom-Reason")).collect();
    assert_eq!(reasons.len(), 2, "rejected, and too large: {reasons:?}");
    Ok(())
}

/// Whatever a guest does, it costs only its own message: that ends in the dead letters with the reason, and the host
/// goes on.
#[tokio::test]
async fn a_broken_guest_ends_in_the_dead_letters_and_the_host_goes_on() -> Result<()> {
    let bed = Bed::new().await?;
    let args = ["--attempts", "2", "--retry-min", "10ms", "--retry-max", "20ms", "--deadline", "300ms"];
    let host = bed.actor(&[&args[..], &["--memory-max", "16MiB"]].concat()).await?;
    let cases = [
        ("trap", "trap", ""),
        ("unreachable", "trap", "unreachable"),
        ("loop", "deadline", "300ms"),
        ("sleep 5000", "deadline", "300ms"),
        ("allocate 64", "memory", "16777216 bytes"),
        ("recurse", "stack", "stack overflow"),
        ("reasons 17 1", "output", "17 reasons"),
        ("reasons 1 300", "output", "300 bytes"),
        ("reasons 1000 1000", "output", ""),
        ("verdict no.queue", "output", "no.queue"),
    ];
    bed.tell(cases.iter().map(|(command, ..)| *command)).await?;
    let letters = bed.dead_letters(cases.len()).await?;
    for (sequence, (command, reason, detail)) in (1..).zip(cases) {
        let letter = letters.iter().find(|letter| letter.mail_sequence().ok() == Some(sequence)).context(command)?;
        assert_eq!(letter.header("Mailroom-Reason"), Some(reason), "{command}: {letter:?}");
        let found = letter.header("Mailroom-Detail").context(command)?;
        assert!(found.contains(detail), "{command}: {found}");
        assert_eq!(letter.header("Mailroom-Deliveries"), Some("2"), "{command}");
        assert_eq!(letter.payload, command.as_bytes());
    }
    let trap = letters.iter().find(|letter| letter.mail_sequence().ok() == Some(1)).context("the trap")?;
    let detail = trap.header("Mailroom-Detail").context("its detail")?;
    assert!(detail.contains("actor::"), "no function name in {detail}");

    bed.tell(["verdict after"]).await?;
    assert_eq!(bed.verdicts(1).await?[0].json()?["queue"], "after");
    bed.settled().await?;
    let look = async || Ok(host.metrics().await?.get("mailroom_messages_total", &[("outcome", "dead")]));
    eventually(SOON, "dead letters counted", look, |dead| *dead == Some(cases.len() as f64)).await?;
    let metrics = host.metrics().await?;
    for (reason, count) in [("trap", 2.0), ("deadline", 2.0), ("memory", 1.0), ("stack", 1.0), ("output", 4.0)] {
        let labels = [("outcome", "dead"), ("reason", reason)];
        assert_eq!(metrics.get("mailroom_messages_total", &labels), Some(count), "{reason}");
    }
    Ok(())
}

/// A rejected message is a dead letter at once, with everything its sender gave it, and nothing of the sender's can
/// pass for the host's or act on the stream.
#[tokio::test]
async fn a_dead_letter_keeps_the_whole_message() -> Result<()> {
    let bed = Bed::new().await?;
    let _host = bed.actor(&[]).await?;
    let mut headers = HeaderMap::new();
    headers.insert("X-Tag", "one");
    headers.append("X-Tag", "two");
    headers.insert("Nats-Msg-Id", "the sender's");
    headers.insert("Mailroom-Id", "forged");
    bed.tell_with(headers, "reject not\tfor us\nbody").await?;
    let letter = &bed.dead_letters(1).await?[0];
    assert_eq!(letter.payload, "reject not\tfor us\nbody");
    let tags: Vec<&str> = letter.headers.get_all("X-Tag").map(|value| value.as_str()).collect();
    assert_eq!(tags, ["one", "two"]);
    let id = letter.header("Mailroom-Id").context("an id")?;
    assert!(id.starts_with("MAIL:") && id.ends_with(":triage:1"), "{id}");
    assert_eq!(letter.subject, format!("dead.MAIL.triage.{id}"));
    for (name, value) in [
        ("Nats-Msg-Id", format!("dead.{id}").as_str()),
        ("Mailroom-Original-Nats_Msg-Id", "the sender's"),
        ("Mailroom-Original-Mailroom-Id", "forged"),
        ("Mailroom-Reason", "rejected"),
        ("Mailroom-Detail", "not for us"),
        ("Mailroom-Subject", "mail.test"),
        ("Mailroom-Deliveries", "1"),
    ] {
        assert_eq!(letter.header(name), Some(value), "{name}");
    }
    bed.settled().await
}

/// A guest that fails for a while, or asks to be called again, is; and then gives its verdict.
#[tokio::test]
async fn a_guest_that_recovers_gives_its_verdict() -> Result<()> {
    let bed = Bed::new().await?;
    let host = bed.actor(&["--retry-min", "10ms", "--retry-max", "50ms", "--max-deliver", "8"]).await?;
    bed.tell(["fail-until 3", "retry 20"]).await?;
    assert_eq!(bed.verdicts(1).await?[0].json()?["queue"], "recovered");
    // One that only ever asks for another delivery is given up in the end.
    let letter = &bed.dead_letters(1).await?[0];
    assert_eq!(letter.header("Mailroom-Reason"), Some("max-deliver"));
    assert_eq!(letter.header("Mailroom-Deliveries"), Some("9"));
    bed.settled().await?;
    let look = async || Ok(host.metrics().await?.get("mailroom_messages_total", &[("reason", "retry")]));
    eventually(SOON, "retries counted", look, |retries| *retries == Some(8.0)).await?;
    Ok(())
}

/// On one thread, a guest that computes and one that waits both let the messages behind them go first.
#[tokio::test]
async fn a_slow_guest_does_not_hold_up_its_neighbours() -> Result<()> {
    let bed = Bed::new().await?;
    bed.tell(["spin 700", "sleep 800"].into_iter().chain(std::iter::repeat_n("verdict quick", 50))).await?;
    let _host = bed.actor(&["--shards", "1", "--deadline", "10s"]).await?;
    let verdicts = bed.verdicts(52).await?;
    let queues: Vec<String> =
        verdicts.iter().map(|verdict| Ok(verdict.json()?["queue"].to_string())).collect::<Result<_>>()?;
    assert!(queues[..50].iter().all(|queue| queue == "\"quick\""), "{queues:?}");
    bed.one_verdict_each(52).await
}

/// What a guest prints is in the log with the message it belongs to, and too much of it harms nobody.
#[tokio::test]
async fn guest_output_is_logged_within_bounds() -> Result<()> {
    let bed = Bed::new().await?;
    let host = bed.actor(&[]).await?;
    bed.tell(["print hello there", "flood 1"]).await?;
    bed.verdicts(2).await?;
    let line = host.wait_for_line(SOON, |line| line.contains("hello there")).await?;
    assert!(line.contains(":triage:1"), "{line}");
    // Escaped once, for JSON, and for a terminal where a person reads it.
    let odd = "it's \"x\" a\\b \u{1b}[2J\u{202e}";
    bed.tell([format!("print {odd}")]).await?;
    let line = host.wait_for_line(SOON, |line| line.contains("it's")).await?;
    assert_eq!(serde_json::from_str::<serde_json::Value>(&line)?["message"], odd);
    bed.provision(&["--consumer", "text"]).await?;
    let text = bed.actor(&["--consumer", "text", "--log-format", "text"]).await?;
    let harmless = odd.replace('\u{1b}', "\\u{1b}").replace('\u{202e}', "\\u{202e}");
    text.wait_for_line(SOON, |line| line.contains(&harmless) && line.contains(":text:3")).await?;
    host.wait_for_line(SOON, |line| line.contains("bytes more")).await?;
    Ok(())
}

/// The operator's configuration reaches the guest; without any it is empty, and nothing else of the host's world is
/// there.
#[tokio::test]
async fn a_guest_gets_its_configuration_and_nothing_else() -> Result<()> {
    let bed = Bed::new().await?;
    let _host = bed.actor(&["--config", "queue.default=desk", "--config", "b=2"]).await?;
    bed.tell(["config", "environment"]).await?;
    let verdicts = bed.verdicts(2).await?;
    let reasons = |sequence: u64| -> Result<serde_json::Value> {
        let verdict = verdicts.iter().find(|verdict| verdict.mail_sequence().ok() == Some(sequence));
        Ok(verdict.context("a verdict")?.json()?["reasons"].clone())
    };
    assert_eq!(reasons(1)?, json!(["b=2", "queue.default=desk"]));
    let environment = reasons(2)?.to_string();
    assert!(environment.contains("variables: 0") && environment.contains("arguments: 0"), "{environment}");
    assert!(!environment.contains(": ok"), "{environment}");
    Ok(())
}

/// Two consumers on one stream are two readers: each gives its own verdict on every mail.
#[tokio::test]
async fn two_consumers_each_give_a_verdict() -> Result<()> {
    let bed = Bed::new().await?;
    bed.provision(&["--consumer", "audit"]).await?;
    let _first = bed.actor(&[]).await?;
    let _second = bed.actor(&["--consumer", "audit"]).await?;
    bed.tell(["verdict support"]).await?;
    let mut subjects: Vec<String> = bed.verdicts(2).await?.into_iter().map(|verdict| verdict.subject).collect();
    subjects.sort();
    assert!(subjects[0].ends_with(":audit:1") && subjects[1].ends_with(":triage:1"), "{subjects:?}");
    Ok(())
}
