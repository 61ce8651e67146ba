//! Dead letters afterwards: listed, shown, run again, removed.

use async_nats::HeaderMap;
use async_nats::jetstream::message::PublishMessage;
use serde_json::{Value, json};
use std::time::SystemTime;
use tests::bed::{Bed, SOON};
use tests::prelude::*;

/// What these tests do with a [`Bed`] beside.
trait Letters {
    /// Runs `host dead` with these arguments.
    async fn dead(&self, args: &[&str]) -> Result<Output>;

    /// What `host dead list --json` prints, with more arguments.
    async fn listed(&self, args: &[&str]) -> Result<Vec<Value>>;

    /// Waits until so many letters are there, neither more nor fewer.
    async fn letters(&self, count: u64) -> Result<()>;

    /// Publishes letters as a host writes them, on messages that were never there.
    async fn forge(&self, count: u64, reason: &str) -> Result<()>;

    /// Publishes letters whose headers the NATS client cannot read.
    async fn unreadable(&self) -> Result<()>;
}

impl Letters for Bed {
    async fn dead(&self, args: &[&str]) -> Result<Output> {
        let (command, rest) = args.split_first().context("a command")?;
        command::host(["dead", command, "--server", self.server.url()].iter().chain(rest)).await
    }

    async fn listed(&self, args: &[&str]) -> Result<Vec<Value>> {
        let printed = self.dead(&[&["list", "--json"], args].concat()).await?.success()?.stdout;
        printed.lines().map(|line| Ok(serde_json::from_str(line)?)).collect()
    }

    async fn letters(&self, count: u64) -> Result<()> {
        let look = async || streams::count(&self.jetstream, streams::DEAD).await;
        eventually(SOON, &format!("{count} dead letters"), look, |found| *found == count).await.map(drop)
    }

    async fn forge(&self, count: u64, reason: &str) -> Result<()> {
        let mut last = None;
        for sequence in 1..=count {
            let letter = PublishMessage::build()
                .header("Mailroom-Id", format!("MAIL:1:triage:{sequence}"))
                .header("Mailroom-Reason", reason)
                .header("Mailroom-Subject", "mail.old")
                .payload("verdict again".into());
            let subject = format!("dead.MAIL.triage.MAIL:1:triage:{sequence}");
            last = Some(self.jetstream.send_publish(subject, letter).await?);
        }
        last.context("at least one letter")?.await?;
        Ok(())
    }

    async fn unreadable(&self) -> Result<()> {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        let address = self.server.url().trim_start_matches("nats://");
        let mut connection = tokio::net::TcpStream::connect(address).await?;
        for line in ["X-Tag: \u{fc}", "no colon"] {
            // In Latin-1 an ü is one byte, and no UTF-8.
            let line: Vec<u8> = line.chars().map(u8::try_from).collect::<Result<_, _>>()?;
            let block = [b"NATS/1.0\r\n", &line[..], b"\r\n\r\n"].concat();
            let start = format!(
                "CONNECT {{\"headers\":true,\"verbose\":false}}\r\nHPUB dead.MAIL.triage.x {0} {0}\r\n",
                block.len()
            );
            connection.write_all(&[start.as_bytes(), &block, b"\r\n"].concat()).await?;
        }
        connection.write_all(b"PING\r\n").await?;
        let mut answer = Vec::new();
        while !answer.ends_with(b"PONG\r\n") {
            ensure!(connection.read_buf(&mut answer).await? > 0, "the server hangs up");
        }
        self.letters(4).await
    }
}

/// A host that ends a message's first failure in the dead letters.
const ONE_ATTEMPT: [&str; 2] = ["--attempts", "1"];

async fn outcome(host: &Host, outcome: &str, count: f64) -> Result<()> {
    let look = async || Ok(host.metrics().await?.get("mailroom_messages_total", &[("outcome", outcome)]));
    eventually(SOON, &format!("{count} times {outcome}"), look, |found| *found == Some(count)).await.map(drop)
}

/// A message that is run again is the one it was: the guest sees the same id, subject, time, headers and payload, and
/// the letter is gone.
#[tokio::test]
async fn a_replayed_message_is_the_one_it_was() -> Result<()> {
    let bed = Bed::new().await?;
    let mut headers = HeaderMap::new();
    for (name, value) in [("X-Tag", "one"), ("X-Tag", "two"), ("Mailroom-Id", "forged"), ("Nats-Msg-Id", "sender's")] {
        headers.append(name, value);
    }
    bed.tell_with(headers, "echo").await?;
    // The triage finds no mail in it.
    let mut first = Host::on(bed.server.url()).start().await?;
    let letter = bed.dead_letters(1).await?.remove(0);
    first.stop(SOON).await?;
    let mail = streams::messages(&bed.jetstream, streams::MAIL).await?.remove(0);
    let stored = letter.header("Mailroom-Stored").context("the time of the message")?;
    let id = letter.header("Mailroom-Id").context("an id")?;

    let list = bed.listed(&["--subject", "mail.*"]).await?;
    assert_eq!(list.len(), 1);
    for (member, value) in [
        ("sequence", json!(1)),
        ("reason", json!("rejected")),
        ("id", json!(id)),
        ("subject", json!("mail.test")),
        ("size", json!(4)),
        ("deliveries", json!(1)),
        ("stored", json!(stored)),
        ("component", json!(letter.header("Mailroom-Component"))),
    ] {
        assert_eq!(list[0][member], value, "{member}");
    }
    let shown = bed.dead(&["show", id]).await?.success()?.stdout;
    for part in ["rejected", id, "  X-Tag: two\n", "  Nats-Msg-Id: sender's\n", "Mail, 4 bytes\n  echo\n"] {
        assert!(shown.contains(part), "{part:?} is not in {shown}");
    }

    let host = bed.actor(&[]).await?;
    let said = bed.dead(&["replay", "1"]).await?.success()?.stderr;
    assert!(said.starts_with("replayed 1 letter, 4 B"), "{said}");
    let verdict = bed.verdicts(1).await?.remove(0);
    let time = mail.time.duration_since(SystemTime::UNIX_EPOCH)?.as_millis().to_string();
    assert_eq!(
        verdict.json()?["reasons"],
        json!([
            id,
            "mail.test",
            time,
            "1",
            "4",
            "Mailroom-Id=forged",
            "Nats-Msg-Id=sender's",
            "X-Tag=one",
            "X-Tag=two",
        ])
    );
    assert_eq!(verdict.subject, format!("verdict.echo.{id}"));
    bed.letters(0).await?;
    bed.settled().await?;
    outcome(&host, "verdict", 1.0).await
}

/// A message that has its verdict by now gets no second one, however often and by whatever way it is run again.
#[tokio::test]
async fn a_replay_gives_no_second_verdict() -> Result<()> {
    let bed = Bed::provisioned(&["--duplicate-window", "100ms"]).await?;
    bed.forge(1, "trap").await?;
    let host = bed.actor(&[]).await?;
    bed.dead(&["replay", "--all", "--keep"]).await?.success()?;
    bed.verdicts(1).await?;
    // Beyond the duplicate window, with a guest that would answer differently.
    let look = async || {
        bed.dead(&["replay", "--all", "--keep"]).await?.success()?;
        Ok(host.metrics().await?.get("mailroom_messages_total", &[("outcome", "duplicate")]))
    };
    eventually(SOON, "a replay found to be late", look, |found| found.is_some_and(|count| count >= 1.0)).await?;
    bed.settled().await?;
    assert_eq!(streams::count(&bed.jetstream, streams::VERDICTS).await?, 1);
    bed.letters(1).await
}

/// A letter that is run again and one that becomes a new message are two things, whichever comes first: each is
/// published, and the letter is only removed for a message that is stored.
#[tokio::test]
async fn a_replay_and_a_new_message_of_one_letter_do_not_pass_for_each_other() -> Result<()> {
    let bed = Bed::new().await?;
    let _host = bed.actor(&[]).await?;
    for (number, order) in (1_u64..).zip([["--keep", "--as-new"], ["--as-new", "--keep"]]) {
        bed.forge(number, "trap").await?;
        let letter = streams::dead_letters(&bed.jetstream).await?.last().context("a letter")?.sequence.to_string();
        for way in order {
            let args = ["replay", &letter, "--keep", way];
            let said = bed.dead(if way == "--keep" { &args[..3] } else { &args }).await?.success()?.stderr;
            assert!(said.starts_with("replayed 1 letter, "), "{order:?}, {way}: {said}");
            // The same once more is the same.
            let said = bed.dead(if way == "--keep" { &args[..3] } else { &args }).await?.success()?.stderr;
            assert!(said.starts_with("replayed 1 letter (1 had been before)"), "{order:?}, {way}: {said}");
        }
        assert_eq!(streams::count(&bed.jetstream, streams::MAIL).await?, 2 * number);
    }
    // One under each letter's id, and one under each new message's.
    bed.settled().await?;
    assert_eq!(streams::count(&bed.jetstream, streams::VERDICTS).await?, 4);
    Ok(())
}

/// A message that dies again is a dead letter again, though the server still knows the first letter's id. Nothing is
/// lost between the two.
#[tokio::test]
async fn a_replayed_message_that_dies_again_is_a_letter_again() -> Result<()> {
    let bed = Bed::new().await?;
    let host = bed.actor(&ONE_ATTEMPT).await?;
    let mut headers = HeaderMap::new();
    headers.insert("Nats-Msg-Id", "sender's");
    bed.tell_with(headers, "trap").await?;
    let first = bed.dead_letters(1).await?.remove(0);
    for round in 2..=4_u32 {
        bed.dead(&["replay", "--reason", "trap"]).await?.success()?;
        outcome(&host, "dead", round.into()).await?;
        bed.letters(1).await?;
        let again = bed.dead_letters(1).await?.remove(0);
        for name in [
            "Mailroom-Id",
            "Mailroom-Subject",
            "Mailroom-Stored",
            "Mailroom-Reason",
            "Mailroom-Deliveries",
            "Mailroom-Original-Nats_Msg-Id",
        ] {
            assert!(first.header(name).is_some() && again.header(name) == first.header(name), "{name}: {again:?}");
        }
        assert_ne!(again.header("Nats-Msg-Id"), first.header("Nats-Msg-Id"));
        assert_eq!(again.headers.len(), first.headers.len(), "{again:?}");
        assert_eq!(again.payload, "trap");
    }
    bed.settled().await
}

/// Headers that could not be read stay with their message, however often it dies, and are shown; the guest does not get
/// them.
#[tokio::test]
async fn unreadable_headers_are_carried_along() -> Result<()> {
    let bed = Bed::new().await?;
    let host = bed.actor(&ONE_ATTEMPT).await?;
    for (sequence, payload) in [(1, "trap"), (2, "echo")] {
        let letter = PublishMessage::build()
            .header("Mailroom-Id", format!("MAIL:1:triage:{sequence}"))
            .header("Mailroom-Reason", "unreadable-headers")
            .header("Mailroom-Subject", "mail.old")
            .header("Mailroom-Stored", "2026-11-21T10:00:00.123Z")
            .header("Mailroom-Headers", "TkFUUy8xLjANClgtVGFnOiD8DQoNCg==")
            .payload(payload.into());
        let subject = format!("dead.MAIL.triage.MAIL:1:triage:{sequence}");
        bed.jetstream.send_publish(subject, letter).await?.await?;
    }
    let shown = bed.dead(&["show", "1"]).await?.success()?.stdout;
    assert!(shown.contains("  NATS/1.0\n  X-Tag: \u{fffd}\n"), "{shown}");
    bed.dead(&["replay", "--all"]).await?.success()?;
    let verdict = bed.verdicts(1).await?.remove(0);
    assert_eq!(verdict.json()?["reasons"], json!(["MAIL:1:triage:2", "mail.old", "1795255200123", "1", "4"]));
    outcome(&host, "dead", 1.0).await?;
    bed.letters(1).await?;
    let again = bed.dead_letters(1).await?.remove(0);
    assert_eq!(again.header("Mailroom-Headers"), Some("TkFUUy8xLjANClgtVGFnOiD8DQoNCg=="));
    assert_eq!(again.header("Mailroom-Stored"), Some("2026-11-21T10:00:00.123Z"));
    assert_eq!(again.header("Mailroom-Original-Mailroom-Headers"), None);
    Ok(())
}

/// Headers that stand in front of the mail, since a stream takes no more beside the host's, are the message's headers
/// again when it is run again, and stay with it when it dies again.
#[tokio::test]
async fn headers_in_front_of_the_mail_are_carried_along() -> Result<()> {
    let bed = Bed::new().await?;
    let mut headers = HeaderMap::new();
    for number in 0..4_000 {
        headers.append(format!("H{number:04}"), "eight");
    }
    headers.append("H0000", "again");
    headers.append("Z", "z".repeat(9_300));
    bed.tell_with(headers, "echo").await?;
    // The triage finds no mail in it, nor the second time.
    let mut first = Host::on(bed.server.url()).start().await?;
    let letter = bed.dead_letters(1).await?.remove(0);
    bed.dead(&["replay", "1"]).await?.success()?;
    let letters = async || streams::dead_letters(&bed.jetstream).await;
    let next = |letters: &Vec<Stored>| letters.first().is_some_and(|letter| letter.sequence == 2);
    let again = eventually(SOON, "the next letter", letters, next).await?.remove(0);
    first.stop(SOON).await?;
    assert!(letter.header("Mailroom-Headers-Bytes").is_some() && letter.payload.starts_with(b"NATS/1.0\r\n"));
    for name in ["Mailroom-Id", "Mailroom-Subject", "Mailroom-Stored", "Mailroom-Headers-Bytes"] {
        assert_eq!(letter.header(name), again.header(name), "{name}");
    }
    assert!(letter.payload == again.payload);

    let shown = bed.dead(&["show", "2"]).await?.success()?.stdout;
    for part in ["  H0000: eight\n", "  H3999: eight\n", "Mail, 4 bytes\n  echo\n"] {
        assert!(shown.contains(part), "{part:?} is not in {shown}");
    }
    let _host = bed.actor(&[]).await?;
    bed.dead(&["replay", "2"]).await?.success()?;
    let verdict = bed.verdicts(1).await?.remove(0).json()?;
    let reasons = verdict["reasons"].as_array().context("reasons")?;
    assert_eq!((&reasons[0], &reasons[4]), (&json!(letter.header("Mailroom-Id")), &json!("4")));
    assert_eq!((&reasons[5], &reasons[6]), (&json!("H0000=eight"), &json!("H0000=again")));
    bed.letters(0).await?;
    bed.settled().await
}

/// Of two consumers on a stream, only the one whose letter it is runs it again.
#[tokio::test]
async fn a_replay_is_for_its_own_consumer() -> Result<()> {
    let bed = Bed::new().await?;
    bed.provision(&["--consumer", "audit"]).await?;
    let _triage = bed.actor(&ONE_ATTEMPT).await?;
    let audit = bed.actor(&[&ONE_ATTEMPT[..], &["--consumer", "audit"]].concat()).await?;
    bed.tell(["trap"]).await?;
    bed.letters(2).await?;
    let mine = bed.listed(&[]).await?;
    assert_eq!(mine.len(), 1, "{mine:?}");
    let mine = mine[0]["sequence"].to_string();

    let refused = bed.dead(&["replay", &mine, "--consumer", "audit"]).await?;
    assert_eq!(refused.code(), Some(1));
    assert!(refused.stderr.contains("look at --stream and --consumer"), "{}", refused.stderr);
    bed.dead(&["replay", &mine]).await?.success()?;
    outcome(&audit, "elsewhere", 1.0).await?;
    bed.letters(2).await?;
    bed.settled().await?;
    assert_eq!(bed.listed(&[]).await?.len(), 1);
    assert_eq!(bed.listed(&["--consumer", "audit"]).await?.len(), 1);
    assert_eq!(audit.metrics().await?.get("mailroom_messages_total", &[("outcome", "dead")]), Some(1.0));
    Ok(())
}

/// A sender's word on a message's id counts for nothing; and what is published where replays belong without being one
/// is a dead letter, not lost.
#[tokio::test]
async fn an_id_is_believed_on_the_replay_subject_only() -> Result<()> {
    let bed = Bed::new().await?;
    let _host = bed.actor(&[]).await?;
    let mut headers = HeaderMap::new();
    headers.insert("Mailroom-Id", "MAIL:1:triage:99");
    headers.insert("Mailroom-Stored", "1999-01-01T00:00:00Z");
    bed.tell_with(headers.clone(), "verdict support").await?;
    let verdict = bed.verdicts(1).await?.remove(0);
    assert!(verdict.subject.ends_with(":triage:1"), "{}", verdict.subject);

    let subject = "replay.MAIL.triage.mail.test";
    let bad = [
        ("Mailroom-Id", "MAIL:1:audit:99"),
        ("Mailroom-Id", "ORDERS:1:triage:99"),
        ("Mailroom-Id", "MAIL:1:triage:*"),
        ("Mailroom-Stored", "yesterday"),
        ("X-Tag", "no id"),
    ];
    for (name, value) in bad {
        let mut headers = if name == "Mailroom-Stored" { headers.clone() } else { HeaderMap::new() };
        headers.insert(name, value);
        bed.jetstream.publish_with_headers(subject, headers, "verdict odd".into()).await?.await?;
    }
    // Nothing follows the consumer.
    headers.insert("Nats-Msg-Id", "another");
    let no_subject = "replay.MAIL.triage";
    bed.jetstream.publish_with_headers(no_subject, headers, "verdict odd".into()).await?.await?;
    let mut letters = bed.dead_letters(bad.len() + 1).await?;
    letters.sort_by_key(|letter| letter.mail_sequence().ok());
    let last = letters.pop().context("a letter")?;
    assert_eq!(last.header("Mailroom-Reason"), Some("replay"));
    assert_eq!(last.header("Mailroom-Subject"), Some(no_subject));
    for (sequence, letter) in (2..).zip(&letters) {
        assert_eq!(letter.header("Mailroom-Reason"), Some("replay"));
        assert_eq!(letter.header("Mailroom-Subject"), Some(subject));
        assert_eq!(letter.mail_sequence()?, sequence);
        assert_eq!(letter.payload, "verdict odd");
    }
    assert_eq!(letters[0].header("Mailroom-Original-Mailroom-Id"), Some("MAIL:1:audit:99"));
    bed.settled().await?;
    assert_eq!(streams::count(&bed.jetstream, streams::VERDICTS).await?, 1);
    Ok(())
}

/// Thousands of letters can be looked through page by page, chosen among, run again and removed.
#[tokio::test]
async fn thousands_of_letters_are_handled() -> Result<()> {
    let bed = Bed::new().await?;
    let (traps, rejects) = (3000, 1200);
    bed.forge(traps, "trap").await?;
    bed.forge(rejects, "rejected").await?;

    let mut seen = Vec::new();
    loop {
        let after = seen.last().copied().unwrap_or(0_u64).to_string();
        let page = bed.listed(&["--limit", "1500", "--after", &after]).await?;
        if page.is_empty() {
            break;
        }
        seen.extend(page.iter().filter_map(|letter| letter["sequence"].as_u64()));
    }
    assert_eq!(seen, (1..=traps + rejects).collect::<Vec<_>>());
    let summary = bed.dead(&["list", "--summary"]).await?.success()?.stdout;
    assert!(summary.contains("1200  rejected ") && summary.contains("3000  trap "), "{summary}");
    assert_eq!(bed.listed(&["--id", "MAIL:1:triage:700"]).await?.len(), 2);
    assert_eq!(bed.listed(&["--since", "1h", "--subject", "mail.*", "--reason", "rejected,stack"]).await?.len(), 1200);
    assert_eq!(bed.listed(&["--until", "1h"]).await?.len(), 0);

    let host = bed.actor(&[]).await?;
    let dry = bed.dead(&["replay", "--reason", "trap", "--dry-run"]).await?.success()?;
    assert!(dry.stderr.contains("would replay 3000 letters") && dry.stdout.lines().count() == 3000, "{}", dry.stderr);
    bed.letters(traps + rejects).await?;
    let said = bed.dead(&["replay", "--reason", "trap"]).await?.success()?.stderr;
    assert!(said.contains("replayed 3000 letters"), "{said}");
    bed.letters(rejects).await?;
    bed.verdicts(3000).await?;
    bed.settled().await?;
    outcome(&host, "verdict", 3000.0).await?;

    bed.dead(&["drop", "--reason", "rejected", "--until", "1h", "--yes"]).await?.success()?;
    let dropped = bed.dead(&["drop", "3001", "3002", "9999", "--yes"]).await?;
    let said = &dropped.stderr;
    assert!(dropped.code() == Some(1) && said.contains("dropped 2 letters"), "{dropped:?}");
    assert!(said.contains("letter 9999: there is no such letter") && said.contains("1 failed"), "{said}");
    bed.letters(rejects - 2).await?;
    let said = bed.dead(&["drop", "--id", "MAIL:1:triage:700", "--yes"]).await?.success()?.stderr;
    assert!(said.contains("dropped 1 letter,"), "{said}");
    let said = bed.dead(&["drop", "--all", "--yes"]).await?.success()?.stderr;
    assert!(said.contains("dropped 1197 letters"), "{said}");
    bed.letters(0).await
}

/// A replay that is killed half-way is finished by another, and every message gets one verdict.
#[tokio::test]
async fn a_killed_replay_is_finished_by_the_next() -> Result<()> {
    let bed = Bed::new().await?;
    let _host = bed.actor(&[]).await?;
    bed.forge(3000, "trap").await?;
    let look = async || streams::count(&bed.jetstream, streams::DEAD).await;
    tokio::select! {
        done = bed.dead(&["replay", "--all"]) => drop(done?),
        some = eventually(SOON, "letters replayed", look, |left| *left < 2500) => drop(some?),
    }
    bed.dead(&["replay", "--all"]).await?.success()?;
    bed.letters(0).await?;
    bed.verdicts(3000).await?;
    bed.settled().await?;
    assert_eq!(streams::count(&bed.jetstream, streams::VERDICTS).await?, 3000);
    Ok(())
}

/// What would act on everything, or without anybody's word, or be lost, is refused with the remedy.
#[tokio::test]
async fn what_cannot_be_meant_or_done_is_refused() -> Result<()> {
    let bed = Bed::new().await?;
    bed.forge(2, "trap").await?;
    for (code, args, expected) in [
        (2, &["replay"][..], "or --all"),
        (2, &["drop", "--yes"], "or --all"),
        (2, &["replay", "1", "--all"], "exclude each other"),
        (2, &["drop", "--all", "--reason", "trap"], "exclude each other"),
        (1, &["drop", "--all"], "add --yes"),
        (2, &["replay", "--subject", "a..b"], "two dots"),
        (2, &["replay", "--component", ""], "--component is empty"),
        (2, &["drop", "--component", "sha256:", "--yes"], "--component is empty"),
        (2, &["drop", "--id", "", "--yes"], "--id is empty"),
        (2, &["list", "--reason", "nonsense"], "\"nonsense\": one of rejected, trap, "),
        (1, &["drop", "999", "--yes"], "letter 999: there is no such letter"),
        (1, &["replay", "999"], "letter 999: there is no such letter"),
        (1, &["replay", "999", "--dry-run"], "letter 999: there is no such letter"),
        (1, &["replay", "--all", "--consumer", "gone"], "no consumer gone of stream MAIL"),
        (1, &["replay", "--all", "--stream", "OTHER"], "no stream OTHER"),
        (1, &["list", "--dead-stream", "NONE"], "no stream NONE; `host provision` makes it"),
        (1, &["show", "3"], "no letter 3"),
        (1, &["show", "MAIL:1:triage:9"], "no letter of message MAIL:1:triage:9"),
    ] {
        let output = bed.dead(args).await?;
        assert!(output.code() == Some(code) && output.stderr.contains(expected), "{args:?}: {output:?}");
    }
    // A stream and a consumer as an older host made them, or an operator.
    let mut config = bed.jetstream.get_stream(streams::MAIL).await?.cached_info().config.clone();
    config.subjects = vec!["mail.>".into()];
    bed.jetstream.update_stream(config).await?;
    let output = bed.dead(&["replay", "--all"]).await?;
    assert!(output.stderr.contains("does not take replay.MAIL.triage.>; `host provision --update`"), "{output:?}");
    bed.provision(&["--update"]).await?;
    let mut config = bed.consumer().await?.cached_info().config.clone();
    config.filter_subject = "mail.old".into();
    bed.jetstream.create_consumer_on_stream(config, streams::MAIL).await?;
    let output = bed.dead(&["replay", "--all"]).await?;
    assert!(output.stderr.contains("the filter of consumer triage"), "{output:?}");
    bed.letters(2).await?;

    // What helps then: a new message, with an id of its own.
    let _host = bed.actor(&[]).await?;
    bed.dead(&["replay", "1", "--as-new"]).await?.success()?;
    let verdict = bed.verdicts(1).await?.remove(0);
    assert_eq!((verdict.mail_sequence()?, verdict.json()?["queue"].as_str()), (1, Some("again")));
    bed.letters(1).await
}

/// A filter of the consumer's that `host provision` makes lets replays through, where the server knows how.
#[tokio::test]
async fn a_filtered_consumer_can_be_replayed_to() -> Result<()> {
    let bed = Bed::provisioned(&["--filter", "mail.old"]).await?;
    bed.provision(&["--filter", "mail.old", "--check"]).await?;
    bed.forge(1, "trap").await?;
    let _host = bed.actor(&[]).await?;
    let output = bed.dead(&["replay", "--all"]).await?;
    if bed.jetstream.client().is_server_compatible(2, 10, 0) {
        output.success()?;
        bed.verdicts(1).await?;
        return bed.settled().await;
    }
    ensure!(output.stderr.contains("on a nats-server 2.10 or later"), "{output:?}");
    Ok(())
}

/// Whatever else lies among the letters is listed as what it is, is not run, and keeps nobody from the others.
#[tokio::test]
async fn strange_letters_harm_nobody() -> Result<()> {
    let bed = Bed::new().await?;
    bed.forge(1, "trap").await?;
    bed.jetstream.publish("dead.MAIL.triage.x", "\u{1b}[2Jnot a letter".into()).await?.await?;
    bed.unreadable().await?;
    bed.forge(1, "stack").await?;

    let letters = bed.listed(&[]).await?;
    let reasons: Vec<_> = letters.iter().map(|letter| letter["reason"].as_str()).collect();
    assert_eq!(reasons, [Some("trap"), None, None, None, Some("stack")], "{letters:?}");
    let odd: Vec<_> = letters.iter().filter_map(|letter| letter["odd"].as_str()).collect();
    assert!(odd[0].contains("no header Mailroom-Id"), "{odd:?}");
    assert!(odd[1].contains("no UTF-8") && odd[2].contains("no colon"), "{odd:?}");
    let shown = bed.dead(&["show", "2"]).await?.success()?.stdout;
    assert!(shown.contains("\\u{1b}[2Jnot a letter") && !shown.contains('\u{1b}'), "{shown}");
    assert_eq!(bed.dead(&["show", "2", "--raw"]).await?.success()?.stdout, "\u{1b}[2Jnot a letter");
    bed.dead(&["show", "3"]).await?.success()?;
    let whole: Value = serde_json::from_str(&bed.dead(&["show", "5", "--json"]).await?.success()?.stdout)?;
    assert_eq!((&whole["reason"], &whole["data"]), (&json!("stack"), &json!("dmVyZGljdCBhZ2Fpbg==")));

    let output = bed.dead(&["replay", "--all"]).await?;
    assert_eq!(output.code(), Some(1));
    assert!(output.stderr.contains("replayed 2 letters") && output.stderr.contains("3 failed"), "{}", output.stderr);
    bed.letters(3).await?;
    bed.dead(&["drop", "--all", "--yes"]).await?.success()?;
    bed.letters(0).await
}
