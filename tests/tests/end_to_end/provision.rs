//! `host provision` on streams that exist: what it changes, and what it does not.

use async_nats::jetstream::stream;
use std::time::SystemTime;
use tests::bed::{Bed, SOON};
use tests::prelude::*;

/// Runs `host provision` and expects it to refuse, with all of `words`.
async fn refused(bed: &Bed, args: &[&str], words: &[&str]) -> Result<()> {
    let fixed = ["provision", "--server", bed.server.url()];
    let output = command::host(fixed.iter().chain(args)).await?;
    ensure!(output.code() == Some(1), "{args:?}: {output:?}");
    for word in words {
        ensure!(output.stderr.contains(word), "{args:?}: no {word:?} in {}", output.stderr);
    }
    Ok(())
}

async fn info_of(bed: &Bed, name: &str) -> Result<stream::Info> {
    Ok(bed.jetstream.get_stream(name).await?.cached_info().clone())
}

/// A limit below what a stream holds would delete messages, verdicts or dead letters: it is refused, and nothing is
/// changed, unless that is asked for.
#[tokio::test]
async fn smaller_limits_delete_nothing_unless_allowed() -> Result<()> {
    let bed = Bed::new().await?;
    for (stream, subject, flag) in [
        (streams::MAIL, "mail.test", "--mail-max-bytes"),
        (streams::VERDICTS, "verdict.support.x", "--verdict-max-bytes"),
        (streams::DEAD, "dead.MAIL.triage.x", "--dead-max-bytes"),
        ("KV_triage", "$KV.triage.key", "--bucket-max-bytes"),
    ] {
        for number in 0..30 {
            let subject = if stream == "KV_triage" { format!("{subject}{number}") } else { subject.to_owned() };
            bed.jetstream.publish(subject, "x".repeat(100).into()).await?.await?;
        }
        let bytes = info_of(&bed, stream).await?.state.bytes;
        let words = ["holds 30 messages", flag, "nothing was changed", "--allow-loss"];
        refused(&bed, &["--update", "--max-ack-pending", "7", flag, "1KiB"], &words).await?;
        let info = info_of(&bed, stream).await?;
        assert_eq!((info.config.max_bytes, info.state.messages), (-1, 30), "{stream}");
        assert_eq!(bed.consumer().await?.cached_info().config.max_ack_pending, 20_000);

        bed.provision(&["--update", flag, &bytes.to_string()]).await?;
        let info = info_of(&bed, stream).await?;
        assert_eq!((info.config.max_bytes, info.state.messages), (i64::try_from(bytes)?, 30), "{stream}");
        bed.provision(&["--update", "--allow-loss", flag, "1KiB"]).await?;
        assert_eq!(info_of(&bed, stream).await?.config.max_bytes, 1024, "{stream}");
    }
    Ok(())
}

/// So would a shorter time, if something is older.
#[tokio::test]
async fn shorter_times_delete_nothing_unless_allowed() -> Result<()> {
    let bed = Bed::provisioned(&["--duplicate-window", "100ms"]).await?;
    bed.tell(["verdict support"]).await?;
    bed.provision(&["--update", "--mail-max-age", "1h"]).await?;
    let stored: SystemTime = info_of(&bed, streams::MAIL).await?.state.first_timestamp.into();
    let age = async || Ok(SystemTime::now().duration_since(stored)?);
    eventually(SOON, "the message has some age", age, |age| *age > Duration::from_millis(500)).await?;
    let words = ["holds 1 message, the oldest since", "--mail-max-age 500ms", "--allow-loss"];
    refused(&bed, &["--update", "--mail-max-age", "500ms"], &words).await?;
    let info = info_of(&bed, streams::MAIL).await?;
    assert_eq!((info.config.max_age, info.state.messages), (Duration::from_secs(3600), 1));
    bed.provision(&["--update", "--mail-max-age", "500ms", "--allow-loss"]).await?;
    let left = async || streams::count(&bed.jetstream, streams::MAIL).await;
    eventually(SOON, "it goes", left, |left| *left == 0).await.map(drop)
}

/// What no flag and no variable is given for stays as it was made, whatever else is changed, and is no difference.
#[tokio::test]
async fn an_update_changes_what_was_given_and_nothing_else() -> Result<()> {
    let made = [
        "--subjects",
        "mail.>,orders.>",
        "--filter",
        "orders.>",
        "--mail-max-age",
        "30d",
        "--verdict-max-age",
        "60d",
        "--dead-max-bytes",
        "1GiB",
        "--duplicate-window",
        "5m",
        "--max-ack-pending",
        "500",
    ];
    let bed = Bed::provisioned(&made).await?;
    let settings = async || -> Result<_> {
        let mut configs = Vec::new();
        for stream in [streams::MAIL, streams::VERDICTS, streams::DEAD, "KV_triage"] {
            configs.push(info_of(&bed, stream).await?.config);
        }
        Ok((configs, bed.consumer().await?.cached_info().config.clone()))
    };
    let (before, mut consumer) = settings().await?;
    bed.provision(&["--check"]).await?;
    bed.provision(&[&made[..], &["--check"]].concat()).await?;
    for args in [&["--update"][..], &["--update", "--ack-wait", "60s"]] {
        bed.provision(args).await?;
    }
    consumer.ack_wait = Duration::from_secs(60);
    assert_eq!(settings().await?, (before.clone(), consumer.clone()));

    // A variable counts as a flag does.
    let args = ["MAILROOM_ACK_WAIT=90s".into(), tools::host()?.into_os_string(), "provision".into(), "--update".into()];
    let args = args.into_iter().chain(["--server", bed.server.url()].map(Into::into));
    command::run("env", args, b"", SOON).await?.success()?;
    consumer.ack_wait = Duration::from_secs(90);
    assert_eq!(settings().await?, (before, consumer));

    bed.provision(&["--ack-wait", "90s", "--check"]).await?;
    refused(&bed, &["--ack-wait", "30s", "--check"], &[]).await?;
    bed.provision(&["--update", "--filter", ">", "--subjects", "mail.>"]).await?;
    assert_eq!(info_of(&bed, streams::MAIL).await?.config.subjects, ["mail.>", "replay.MAIL.>"]);
    let consumer = bed.consumer().await?.cached_info().config.clone();
    assert!(consumer.filter_subject.is_empty() && consumer.filter_subjects.is_empty(), "{consumer:?}");
    Ok(())
}

/// What would be unsafe together with settings that exist is refused before anything is changed.
#[tokio::test]
async fn an_update_that_would_be_unsafe_changes_nothing() -> Result<()> {
    let bed = Bed::new().await?;
    for (args, words) in [
        (&["--mail-max-age", "30d"][..], ["stream VERDICTS keeps verdicts for 7days", "--verdict-max-age 30d"]),
        (&["--verdict-max-age", "1d"], ["stream VERDICTS keeps verdicts for 1day", "--verdict-max-age 7d"]),
        (&["--deadline", "40s", "--max-ack-pending", "9"], ["ack_wait 30s", "--ack-wait 80s"]),
        (&["--filter", "orders.>"], ["--filter orders.> matches none of the subjects mail.>", "nothing was changed"]),
        (&["--dead-max-age", "1s"], ["--dead-max-age 1s must be at least --duplicate-window 2m", "stream DEAD"]),
    ] {
        refused(&bed, &[&["--update"], args].concat(), &words).await?;
        bed.provision(&["--check", "--mail-max-age", "7d", "--verdict-max-age", "7d", "--dead-max-age", "0"]).await?;
        bed.provision(&["--check", "--max-ack-pending", "20000"]).await?;
    }
    bed.jetstream.delete_stream(streams::VERDICTS).await?;
    refused(&bed, &["--verdict-max-age", "1d"], &["nothing was changed", "--verdict-max-age 7d"]).await?;
    refused(&bed, &["--check"], &[]).await?;
    bed.provision(&["--update", "--mail-max-age", "30d", "--verdict-max-age", "30d"]).await
}

/// A stream and a filter that were made by hand get what replays need, and keep what they have.
#[tokio::test]
async fn an_update_adds_replays_to_what_was_made_by_hand() -> Result<()> {
    let bed = Bed::new().await?;
    let mut config = info_of(&bed, streams::MAIL).await?.config;
    config.subjects = vec!["orders.>".into(), "mail.>".into()];
    bed.jetstream.update_stream(config).await?;
    let mut config = bed.consumer().await?.cached_info().config.clone();
    config.filter_subject = "orders.>".into();
    bed.jetstream.create_consumer_on_stream(config, streams::MAIL).await?;
    refused(&bed, &["--check"], &[]).await?;
    bed.provision(&["--update"]).await?;
    bed.provision(&["--check"]).await?;
    assert_eq!(info_of(&bed, streams::MAIL).await?.config.subjects, ["mail.>", "orders.>", "replay.MAIL.>"]);
    let config = bed.consumer().await?.cached_info().config.clone();
    if bed.jetstream.client().is_server_compatible(2, 10, 0) {
        assert_eq!(config.filter_subjects, ["orders.>", "replay.MAIL.triage.>"]);
    } else {
        assert_eq!(config.filter_subject, "orders.>");
    }
    Ok(())
}
